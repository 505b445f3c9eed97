"""Calls on CPU tensors where the default device is another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from odeint_problems import D, times

import fmkernels as fm

X = torch.rand(2, 3)
CALLS: dict[str, Callable[[], Any]] = {
    "sdeint": lambda: fm.sdeint(lambda t, y: -y, 0.5, X, torch.tensor([0.0, 1.0], device="cpu"), seed=1),
    "adjoint": lambda: fm.odeint_adjoint(lambda t, y: -y, X, torch.tensor([0.0, 1.0], device="cpu"), adjoint_params=()),
    "scipy": lambda: fm.odeint(lambda t, y: -y, X.to(D), TIMES, method="scipy_solver"),
    "log_prob": lambda: fm.log_prob(lambda x, t: -x, X),
    "trajectory": lambda: fm.sample(lambda x, t: -x, X, method="dopri5", return_trajectory=True)[1].trajectory,
    "guided": lambda: fm.sample(
        lambda x, t, y: -x * y[:, None], X, steps=3, guidance=fm.guidance.CFG(2.0, negative={"y": 0.0}), y=X[:, 0]
    )[0],
    "dense": lambda: fm.odeint_dense(lambda t, y: -y, X, 0.0, 1.0)(0.5),
    "sde": lambda: fm.sample(lambda x, t: -x, X, steps=3, sde=fm.SDE())[0],
}
TIMES = times(0.0, 1.0)


@pytest.mark.parametrize("name", CALLS)
def test_a_default_device_without_data_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    expected = CALLS[name]()
    torch.manual_seed(0)
    with torch.device("meta"):
        got = CALLS[name]()
    if isinstance(got, fm.likelihood.LogProb):
        got, expected = got.log_prob, expected.log_prob
    assert got.device.type == "cpu"
    assert torch.equal(got, expected)
