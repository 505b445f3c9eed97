"""What torch.compile takes for a constant, and one tensor given for several arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fmkernels as fm
from fmkernels.paths import CondOT, ConstantBridge, Path, SchrodingerBridge


class Power(Path):
    def __init__(self, k: Tensor) -> None:
        self.k = k

    def alpha(self, t: Tensor) -> Tensor:
        return t**self.k

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t


class Mirrored(Power):
    def alpha(self, t: Tensor) -> Tensor:
        return 1 - (1 - t) ** self.k


@pytest.mark.parametrize("path_type", [Power, Mirrored])
@pytest.mark.parametrize("parameter", [False, True])
def test_a_schedule_may_lose_its_finite_ends_under_compiled_code(path_type: type[Power], parameter: bool) -> None:
    k = torch.tensor(1.5)
    path = path_type(nn.Parameter(k) if parameter else k)

    def step(x_1: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        return fm.cfm_loss(torch.zeros_like(x_1), path.sample(x_1, x_0, t), reduction="none")

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    given = torch.ones(5, 2), torch.zeros(5, 2), torch.tensor([0.0, 1e-5, 0.5, 1.0 - 1e-5, 1.0])
    for value in (1.5, 0.8, 2.0):
        with torch.no_grad():
            path.k.fill_(value)
        expected = step(*given)
        assert expected.isfinite().all()
        torch.testing.assert_close(compiled(*given), expected, rtol=1e-5, atol=0.0)


class Same(Path):
    """Whose two schedules return one tensor."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return t


def _bridge(x: Tensor) -> Tensor:
    batch = SchrodingerBridge(0.5).sample(x, seed=torch.tensor(4), store_noise=False)
    return fm.cfm_loss(batch.x_t * 2, batch)


def _half(x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), 0.5)


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "bridge": _bridge,
    "a bridge's x_t": lambda x: ConstantBridge(0.5).sample(x, seed=torch.tensor(4)).x_t.sum(),
    "operands": lambda x: fm.combine([x, x], [1.0, 2.0]).sum(),
    "coefficients": lambda x: fm.combine([x, 2 * x], [x[:, 0]] * 2).sum(),
    "interpolate": lambda x: fm.interpolate(x, 2 * x, alpha=_half(x), sigma=_half(x)).x_t.sum(),
    "rows": lambda x: fm.row_dots([x, x], [(0, 1)]).sum(),
    "pred": lambda x: fm.cfm_loss(x, x_1=x, t=_half(x), path=CondOT(), target="x_1"),
    "schedules": lambda x: Same().sample(x, x * 2, _half(x)).x_t.sum(),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_tensor_for_several_arguments(name: str) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    for function in (compiled, CALLS[name]):
        value = function(x)
        (grad,) = torch.autograd.grad(value, x)
        if function is compiled:
            got = value, grad
    torch.testing.assert_close(got, (value, grad), rtol=1e-6, atol=1e-6)
