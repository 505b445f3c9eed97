"""Noise as a run draws it: from its stream, and through a transform into the subspace where the samples live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

from torch import Tensor

from ..._checks import check_callable, check_like
from ...ops._operands import compute_dtype
from ...ops.random.op import randn
from ...random import Noise

# z to the noise that is used in its place, of its shape: a linear projection, see
# :mod:`fmkernels.solvers.methods.noise_transforms`.
Transform = Callable[[Tensor], Tensor]


def check_transform(transform: Any) -> None:
    if transform is not None:
        check_callable("noise_transform", "None or a function of noise, e.g. an fm.MaskedNoise", transform)


def transformed(transform: Transform | None, z: Tensor) -> Tensor:
    """The noise that is used in the place of z."""
    if transform is None:
        return z
    result = transform(z)
    check_like("noise_transform(z)", result, "z", z)
    return result


class Draw(NamedTuple):
    """The noise of one stream, for states like ``like``."""

    noise: Noise
    like: Tensor
    transform: Transform | None

    def tensor(self) -> Tensor:
        """As it was drawn, before it is rounded to the states' dtype: float32 (float64 for float64 states)."""
        x, noise = self.like, self.noise
        z = randn(
            x.shape,
            seed=noise.seed,
            stream=noise.stream,
            row_offset=noise.row_offset,
            dtype=compute_dtype(x),
            device=x.device,
        )
        return transformed(self.transform, z)


@final
class Draws(Sequence[Any]):
    """The operands of updates for the streams of noise: a stream itself, or a tensor where a transform changes it."""

    def __init__(self, noises: Sequence[Noise], like: Tensor, transform: Transform | None) -> None:
        self._draws = [Draw(noise, like, transform) for noise in noises]

    def __len__(self) -> int:
        return len(self._draws)

    def __getitem__(self, stream: Any) -> Any:
        draw = self._draws[stream]
        return draw.tensor().to(draw.like.dtype).contiguous()

    def draw(self, stream: int) -> Draw:
        return self._draws[stream]
