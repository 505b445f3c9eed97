r"""The divergence of a velocity field: exact, or Hutchinson's estimate.

.. math:: \operatorname{div} v(x) = \operatorname{tr} J = \sum_d e_d^\top J e_d = E[\epsilon^\top J \epsilon],

with J = dv/dx, unit vectors e_d, and any noise of mean 0 and covariance 1 (Hutchinson 1990; Grathwohl et al. 2019).
Both are sums over directions of :math:`\epsilon^\top (J^\top \epsilon)`: one evaluation of the field, and one backward
pass a direction. Directions are taken a few at a time, as many as make passes of a fixed size, so that the memory
does not grow with the number of dimensions.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from .._arguments import all_kwargs, check_names, tree_map
from .._checks import (
    as_state,
    check_bool,
    check_callable,
    check_choice,
    check_float_tensor,
    check_int,
    check_like,
    check_number,
    check_same_device,
    value_error,
)
from .._gradients import check_unrecorded
from .._torch import transform_active
from ..ops._operands import compute_dtype
from ..ops.random.op import randn, random_words
from ..ops.row_dots.op import row_dots
from ..random import Noise, check_noise, draw_seed
from ..solvers.programs.ownership import reading

Field = Callable[..., Tensor]
Reading = Callable[[Tensor, Tensor], Tensor]  # (x, t), of a field that does not write to x
METHODS = ("exact", "hutchinson")
DISTRIBUTIONS = ("rademacher", "gaussian")
MODES = ("reverse", "forward")
# Numbers in one batched pass over several directions: on the CPU more of them no longer fit into the cache and gain
# nothing over a pass for each direction; on a GPU a small pass is all launch.
_PASS = {"cpu": 1 << 14, "cuda": 1 << 20}
# Fewer directions than this are faster one at a time.
_MIN_BATCHED = 4
_BITS = 32  # of a random word: that many Rademacher probes come from one stream


def draw_probes(like: Tensor, noise: Noise, count: int, distribution: str, *, first: int = 0) -> list[Tensor]:
    """Probes ``first`` to ``first + count - 1`` of Hutchinson's estimator, each of like's shape and dtype.

    Gaussian probe p is stream noise.stream + p of :func:`fmkernels.randn`. Rademacher probe p is bit p % 32 of the
    words of stream noise.stream + p // 32 of :func:`fmkernels.random_words`: 1 where it is clear, -1 where it is set.
    """
    options: dict[str, Any] = {"seed": noise.seed, "row_offset": noise.row_offset, "device": like.device}
    if distribution == "gaussian":
        streams = range(noise.stream + first, noise.stream + first + count)
        return [randn(like.shape, stream=stream, dtype=like.dtype, **options) for stream in streams]
    probes: list[Tensor] = []
    words, held = None, -1
    for p in range(first, first + count):
        if p // _BITS != held:
            held = p // _BITS
            words = random_words(like.shape, stream=noise.stream + held, **options)
        assert words is not None
        probes.append((1 - 2 * ((words >> (p % _BITS)) & 1)).to(like.dtype))
    return probes


def streams_of(count: int, distribution: str) -> int:
    """How many streams ``count`` probes take."""
    return count if distribution == "gaussian" else -(-count // _BITS)


def _ordinary(leaf: Any) -> Any:
    """A tensor that autograd may save, in the place of one made in inference mode."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _no_derivative(name: str) -> ValueError:
    return ValueError(
        f"{name}: expected a velocity that depends on x by differentiable operations, got one whose derivative is not "
        "recorded (add 0 * x to a field that does not depend on x; take torch.no_grad out of the model)"
    )


class _Reverse:
    """Products J^T e: the field's graph is kept, a backward pass for each e. Its graph is freed with this object."""

    def __init__(self, read: Reading, t: Tensor, x: Tensor, gradient: bool, name: str) -> None:
        self.gradient, self.name = gradient, name
        if transform_active():
            raise RuntimeError(
                f"{name}: divergences by reverse-mode products do not run within torch.func's transforms (vmap, grad, "
                "jacrev, jvp, ...) and forward-mode AD: call it outside of them, with all samples in one batch"
            )
        with torch.enable_grad():
            self.x = x if gradient and x.requires_grad else x.detach().requires_grad_()
            self.v = as_state(self.name, read(self.x, t.clone()), x)
        if not self.v.requires_grad:
            raise _no_derivative(self.name)

    def product(self, e: Tensor, last: bool) -> Tensor:
        return self._product(e, self.gradient or not last)

    def products(self, e: Tensor) -> Tensor:
        return self._product(e, True, is_grads_batched=True)

    def _product(self, e: Tensor, retain_graph: bool, **options: bool) -> Tensor:
        (result,) = torch.autograd.grad(
            self.v, self.x, e, retain_graph, create_graph=self.gradient, allow_unused=True, **options
        )
        if result is None:
            raise _no_derivative(self.name)
        return result


class _Forward:
    """Products J e by forward-mode differentiation: an evaluation of the field for each e, no graph."""

    def __init__(self, read: Reading, t: Tensor, x: Tensor, gradient: bool, name: str) -> None:
        self.read, self.t, self.name = read, t, name
        self.x = x if gradient else x.detach()
        self.gradient = gradient
        self.velocity: Tensor | None = None

    def product(self, e: Tensor, last: bool) -> Tensor:
        with torch.set_grad_enabled(self.gradient), forward_ad.dual_level():
            output = self.read(forward_ad.make_dual(self.x, e.contiguous()), self.t.clone())
            dual = as_state(self.name, output, self.x)
            self.velocity, tangent = forward_ad.unpack_dual(dual)
        if tangent is None:
            raise _no_derivative(self.name)
        return tangent

    def products(self, e: Tensor) -> Tensor:
        def product(direction: Tensor) -> tuple[Tensor, Tensor]:
            pair = torch.func.jvp(self._at, (self.x,), (direction,), strict=True)
            return pair[0], pair[1]

        with torch.set_grad_enabled(self.gradient):
            self.velocity, tangents = torch.func.vmap(product, out_dims=(None, 0))(e)  # type: ignore[arg-type]
        return tangents

    def _at(self, x: Tensor) -> Tensor:
        return as_state(self.name, self.read(x, self.t.clone()), x)

    @property
    def v(self) -> Tensor:
        if self.velocity is None:  # no directions at all
            with torch.set_grad_enabled(self.gradient):
                self.velocity = self._at(self.x)
        return self.velocity


@final
@dataclass
class Divergence:
    """How divergences are taken over a solve; see :func:`divergence` for the arguments.

    A model that torch.vmap does not take is met with one pass for each direction from then on, unless ``chunk`` asks
    for more.
    """

    method: str = "exact"
    probes: int = 1
    distribution: str = "rademacher"
    mode: str = "reverse"
    chunk: int | None = None
    name: str = "func"  # of the field in errors
    _loops: bool = field(default=False, init=False)
    _identity: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_choice("divergence", self.method, METHODS)
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        check_choice("mode", self.mode, MODES)
        check_int("probes", self.probes, low=1)
        if self.chunk is not None:
            check_int("chunk", self.chunk, low=1)

    def __call__(
        self,
        func: Field,
        t: Tensor,
        x: Tensor,
        probes: Sequence[Tensor] = (),
        gradient: bool = False,
        kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(v, div v) of func(t, x, **kwargs); Hutchinson's estimate takes its probes as they are given."""
        with contextlib.ExitStack() as stack:
            if x.is_inference() or torch.is_inference_mode_enabled():
                # inference mode records nothing, enable_grad notwithstanding
                stack.enter_context(torch.inference_mode(False))
                x, t = x.clone(), t.clone()
                probes = [e.clone() for e in probes]
                kwargs = tree_map(_ordinary, kwargs or {})
            read = reading(self.name, functools.partial(func, **kwargs) if kwargs else func, time_first=True)
            jacobian = (_Reverse if self.mode == "reverse" else _Forward)(read, t, x, gradient, self.name)
            stack.enter_context(torch.set_grad_enabled(gradient))
            div = self._exact(jacobian, x) if self.method == "exact" else self._estimate(jacobian, x, probes)
            v = jacobian.v
        return (v, div) if gradient else (v.detach(), div.detach())

    def _size(self, x: Tensor, count: int) -> int:
        """How many directions make one pass."""
        if self.chunk is not None:
            return min(self.chunk, count)
        if self._loops:
            return 1
        size = min(count, _PASS.get(x.device.type, _PASS["cpu"]) // max(1, x.numel()))
        return size if size >= _MIN_BATCHED else 1

    def _products(self, jacobian: _Reverse | _Forward, e: Tensor, last: bool) -> Tensor:
        """J^T e or J e for directions stacked along dimension 0."""
        if e.shape[0] == 1:
            return jacobian.product(e[0], last)[None]
        if not self._loops:
            try:
                return jacobian.products(e)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                if self.chunk is not None:
                    raise
                self._loops = True
        return torch.stack([jacobian.product(direction, False) for direction in e])

    def _exact(self, jacobian: _Reverse | _Forward, x: Tensor) -> Tensor:
        batch, dims = x.shape[0], math.prod(x.shape[1:])
        total = torch.zeros(batch, dtype=compute_dtype(x), device=x.device)
        size = self._size(x, dims)
        for start in range(0, dims if batch else 0, size):
            stop = min(start + size, dims)
            e = self._rows(x, start, stop, dims)[:, None].expand(-1, batch, -1).view(stop - start, *x.shape)
            products = self._products(jacobian, e, stop == dims)
            if len(products) == 1:
                total = total + products[0].reshape(batch, dims)[:, start]
            else:
                columns = products.reshape(-1, batch, dims)[:, :, start:stop].diagonal(dim1=0, dim2=2)
                total = total + columns.sum(-1, dtype=total.dtype)
        return total

    def _rows(self, x: Tensor, start: int, stop: int, dims: int) -> Tensor:
        """Rows of an identity matrix: unit directions, the same memory for all samples."""
        if dims * dims <= _PASS["cpu"]:
            kept = self._identity
            if kept is None or (kept.shape[0], kept.dtype, kept.device) != (dims, x.dtype, x.device):
                self._identity = kept = torch.eye(dims, dtype=x.dtype, device=x.device)
            return kept[start:stop]
        rows = torch.zeros(stop - start, dims, dtype=x.dtype, device=x.device)
        rows.diagonal(start).fill_(1.0)
        return rows

    def _estimate(self, jacobian: _Reverse | _Forward, x: Tensor, probes: Sequence[Tensor]) -> Tensor:
        batch, count = x.shape[0], len(probes)
        total = torch.zeros(batch, dtype=compute_dtype(x), device=x.device)
        size = self._size(x, count)
        for start in range(0, count if x.numel() else 0, size):
            several = probes[start : start + size]
            if len(several) == 1:
                product = jacobian.product(several[0], start + 1 == count)
                total = total + row_dots([several[0], product], [(0, 1)])[:, 0]
            else:
                e = torch.stack(list(several))
                products = self._products(jacobian, e, start + size >= count)
                dots = row_dots([e.flatten(0, 1), products.flatten(0, 1)], [(0, 1)])
                total = total + dots.view(len(several), batch).sum(0)
        return total / count

    def draw(self, like: Tensor, noise: Noise, evaluation: int = 0) -> list[Tensor]:
        """The probes of an evaluation: other streams for each; none where the divergence is exact."""
        if self.method == "exact":
            return []
        stream = noise.stream + evaluation * streams_of(self.probes, self.distribution)
        return draw_probes(like, Noise._of(noise.seed, stream, noise.row_offset), self.probes, self.distribution)


def divergence(
    func: Field,
    t: Tensor | float,
    x: Tensor,
    *,
    method: str = "exact",
    probes: int = 1,
    distribution: str = "rademacher",
    noise: Noise | Sequence[Tensor] | None = None,
    mode: str = "reverse",
    chunk: int | None = None,
    gradient: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    r"""A velocity field and its divergence, sum_d dv_d / dx_d of each sample.

    "exact" takes one derivative for each dimension of a sample, "hutchinson" the mean over ``probes`` of
    :math:`\epsilon^\top J \epsilon`, an unbiased estimate (Hutchinson 1990). Its variance is 2 (|S|^2 - sum_d S_dd^2)
    with Rademacher probes, S = (J + J^T) / 2, so that it is exact for a diagonal Jacobian, and 2 |S|^2 with Gaussian
    ones; p probes divide it by p.

    Args:
        func: func(t, x, **model_kwargs) -> velocity of x's shape; samples must not depend on each other.
        t: a number, or a tensor of any shape that func takes.
        x: states (B, ...), floating.
        method: "exact" or "hutchinson".
        probes: directions of Hutchinson's estimate.
        distribution: of the probes: "rademacher" (+1 or -1, the smaller variance) or "gaussian".
        noise: where probes come from, see :func:`draw_probes`: :class:`fmkernels.Noise`, or the probes themselves, a
            sequence of tensors like x; None draws a seed.
        mode: "reverse", one evaluation with its graph and one backward pass a direction; or "forward", one evaluation
            a direction in forward-mode differentiation, without a graph, for models that have no backward pass or
            whose graph is too large.
        chunk: directions batched into one pass by torch.vmap; None chooses, by size, and takes one at a time where
            the model does not allow more.
        gradient: keep the graph, so that v and the divergence can be differentiated (to x where it requires a
            gradient, and to the model's parameters).
        model_kwargs: keyword arguments of func; those that have none of our names may stand by themselves.

    Returns:
        (v, div): x's shape and dtype; (B,), float32 (float64 for float64 data).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value; a velocity without a recorded derivative.
    """
    check_float_tensor("x", x)
    if x.dim() == 0:
        raise value_error("x", "at least one dimension, of samples", x)
    check_callable("func", "a callable func(t, x)", func)
    check_choice("method", method, METHODS)
    check_bool("gradient", gradient)
    if not gradient:
        check_unrecorded("True", gradient)
    how = Divergence(method, probes, distribution, mode, chunk)
    if isinstance(t, Tensor):
        check_float_tensor("t", t)
        check_same_device("t", t, "x", x)
        time = t
    else:
        check_number("t", t)
        time = torch.full((), float(t), dtype=compute_dtype(x), device=x.device)
    check_names(kwargs, (divergence,), (func,))
    given = all_kwargs(kwargs, model_kwargs)
    directions: Sequence[Tensor] = ()
    if method == "hutchinson":
        if noise is None:
            noise = Noise(draw_seed(x.device))
        if isinstance(noise, (Noise, Tensor)) or not isinstance(noise, Sequence):
            check_noise("noise", noise, "x", x)
            directions = how.draw(x, noise)
        else:
            directions = noise
            if not directions:
                raise value_error("noise", "at least one probe", noise)
            for p, probe in enumerate(directions):
                check_like(f"noise[{p}]", probe, "x", x)
    return how(func, time, x, directions, gradient, given)
