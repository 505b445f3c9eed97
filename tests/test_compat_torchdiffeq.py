"""torchdiffeq's names and exception types; its numbers are those of fm.odeint, whose tests have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmkernels as fm
from fmkernels.compat import torchdiffeq as ours

theirs = pytest.importorskip("torchdiffeq")


class Decay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.7))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.rate * y


@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint"])
def test_solutions_and_gradients_are_the_peers(name: str) -> None:
    y, t, results = torch.ones(3), torch.linspace(0, 1, 4), []
    for module in (ours, theirs):
        field = Decay()
        solution = getattr(module, name)(field, y, t, rtol=1e-7, atol=1e-9)
        solution.sum().backward()
        assert field.rate.grad is not None
        results.append((solution.detach(), field.rate.grad))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-5
    assert ours.odeint_event is fm.odeint_event
    assert ours.odeint_dense is fm.odeint_dense


WRONG: list[tuple[Any, Any, dict[str, Any]]] = [
    (torch.ones(3), torch.tensor([0.0, 0.5, 0.2]), {}),
    (torch.ones(3), torch.rand(2, 2), {}),
    (torch.ones(3), [0.0, 1.0], {}),
    (1.0, torch.tensor([0.0, 1.0]), {}),
    (torch.ones(3), torch.tensor([0.0, 1.0]), {"method": "nothing"}),
]


@pytest.mark.parametrize(("y", "t", "options"), WRONG)
def test_errors_are_of_the_peers_types(y: Any, t: Any, options: dict[str, Any]) -> None:
    def kind(function: Callable[..., Any]) -> type[Exception]:
        with pytest.raises(Exception) as error:  # noqa: PT011 (which is asked)
            function(lambda t, y: -y, y, t, **options)
        return error.type

    assert kind(ours.odeint) is kind(theirs.odeint)
