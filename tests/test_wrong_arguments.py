"""Every public argument of paths, losses, weightings and times, wrong in every way: a clear answer, never silence.

A call either is right, and then listed as such, or raises a TypeError or ValueError that names an argument the caller
gave, what was expected and what came.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from wrong_values import Calls, cases, check_answer

import fmkernels as fm
from fmkernels import paths, times, weightings
from fmkernels.paths import VP, Batch, CondOT, Path, SchrodingerBridge

X, T = torch.randn(4, 3), torch.rand(4)
PATH, BRIDGE = CondOT(), SchrodingerBridge(0.3)
BATCH = PATH.sample(X)


class Mine(Path):
    def alpha(self, t):
        return t**2

    def sigma(self, t):
        return 1 - t**2


VALUES: dict[str, Any] = {
    "none": None,
    "text": "text",
    "int": 3,
    "negative int": -1,
    "huge int": 2**70,
    "float": 2.5,
    "negative float": -0.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "bool": True,
    "complex number": 1j,
    "list": [1.0],
    "tuple": (1, 2),
    "dict": {},
    "object": object(),
    "function": lambda *args, **kwargs: "x",
    "class": CondOT,
    "array": np.ones(4),
    "generator": torch.Generator(),
    "noise": fm.Noise(torch.tensor(1)),
    "int tensor": torch.ones(4, dtype=torch.int64),
    "bool tensor": torch.ones(4, dtype=torch.bool),
    "complex tensor": torch.ones(4, 3, dtype=torch.complex64),
    "double tensor": torch.rand(4, 3, dtype=torch.float64),
    "scalar tensor": torch.tensor(0.5),
    "column": torch.rand(4, 1),
    "other shape": torch.rand(5, 7),
    "empty": torch.empty(0),
    "other device": torch.rand(4, 3, device="meta"),
    "other device's times": torch.rand(4, device="meta"),
    "sparse": torch.eye(4)[:, :3].to_sparse(),
    "nested": torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
    "mkldnn": torch.rand(4, 3).to_mkldnn() if torch.backends.mkldnn.is_available() else torch.eye(4).to_sparse_csr(),
}
FLOATING = ["double tensor", "scalar tensor", "column", "other shape", "empty", "other device", "other device's times"]
NUMBERS = ["int", "negative int", "float", "negative float"]
POSITIVE = ["int", "huge int", "float"]
OPTIONAL = ["none"]

# A call, its right arguments, and for each argument to vary: which of VALUES are right.
CALLS: Calls = {
    "path.sample": (
        lambda **given: PATH.sample(**given),
        {"x_1": X},
        {
            "x_1": ["double tensor", "column", "other shape", "empty", "other device", "other device's times"],
            "x_0": ["none", "noise"],
            "t": ["none", "double tensor", "scalar tensor"],
            "z": OPTIONAL,
            "generator": ["none", "generator"],
            "seed": ["none", "int", "negative int"],
            "time_sampler": OPTIONAL,
            "row_offset": ["int"],
            "store_noise": ["none", "bool"],
            "checks": ["bool"],
            "impl": [],
        },
    ),
    "path.sample of a bridge": (
        lambda **given: BRIDGE.sample(**given),
        {"x_1": X},
        {"x_0": ["none", "noise"], "z": ["none", "noise"]},
    ),
    "path.sample of one's own": (
        lambda **given: Mine().sample(**given),
        {"x_1": X},
        {"t": ["none", "double tensor", "scalar tensor"]},
    ),
    "cfm_loss": (
        fm.cfm_loss,
        {"pred": X, "batch": BATCH},
        {
            "pred": ["double tensor"],
            "batch": [],
            "target": [],
            "weight": ["none", "double tensor", "scalar tensor"],
            "mask": ["none", "bool tensor"],
            "delta": POSITIVE,
            "sigma_data": OPTIONAL,
            "x_0": OPTIONAL,
            "x_1": OPTIONAL,
            "z": OPTIONAL,
            "t": OPTIONAL,
            "path": OPTIONAL,
            "checks": ["bool"],
            "impl": [],
            "reduction": [],
            "count": ["none", *POSITIVE, "scalar tensor"],
            "kind": [],
        },
    ),
    "cfm_loss for edm": (
        fm.cfm_loss,
        {"pred": X, "batch": BATCH, "target": "edm"},
        {"sigma_data": ["none", *POSITIVE]},
    ),
    "cfm_loss without a batch": (
        fm.cfm_loss,
        {"pred": X, "x_0": X, "x_1": X, "t": T, "path": PATH},
        {
            "pred": ["double tensor"],
            "x_0": ["noise"],
            "x_1": [],
            "z": OPTIONAL,
            "t": ["double tensor", "scalar tensor"],
            "path": [],
        },
    ),
    "cfm_loss of a bridge": (
        fm.cfm_loss,
        {"pred": X, "x_0": X, "x_1": X, "z": X, "t": T, "path": BRIDGE},
        {"x_0": ["noise"], "x_1": [], "z": ["noise"], "t": ["double tensor", "scalar tensor"]},
    ),
    "convert": (
        fm.convert,
        {"path": PATH, "prediction": X, "x_t": X, "t": T, "source": "velocity", "target": "x_1"},
        {
            "path": [],
            "prediction": ["double tensor"],
            "x_t": ["double tensor"],
            "t": ["double tensor", "scalar tensor"],
            "source": [],
            "target": [],
            "sigma_data": [],
            "sigma": [],
        },
    ),
    "convert of edm": (
        fm.convert,
        {"path": PATH, "prediction": X, "x_t": X, "t": T, "source": "edm", "target": "x_1"},
        {"sigma_data": POSITIVE, "sigma": []},
    ),
    **{
        f"{path!r}.{name}": (getattr(path, name), {}, {argument: right})
        for path in (PATH, VP(), Mine())
        for name, argument, right in (
            ("coefficients", "t", FLOATING),
            ("snr", "t", FLOATING),
            ("log_snr", "t", FLOATING),
            ("snr_inverse", "snr", [*FLOATING, *NUMBERS, "huge int", "nan", "inf"]),
            ("log_snr_inverse", "log_snr", [*FLOATING, *NUMBERS, "huge int", "nan", "inf"]),
        )
    },
    "target_coefficients": (
        PATH.target_coefficients,
        {"t": T, "target": "v"},
        {"t": FLOATING, "target": [], "sigma_data": []},
    ),
    "Batch": (
        Batch,
        {"x_t": X, "t": T, "x_1": X, "path": PATH, "source": X, "bridge": None},
        {
            "x_t": [],
            "t": ["double tensor", "scalar tensor"],
            "x_1": [],
            "path": [],
            "source": ["noise"],
            "bridge": ["none", "noise"],
        },
    ),
    "Batch.target": (BATCH.target, {}, {"target": [], "sigma_data": [], "sigma": []}),
    "Batch.to": (BATCH.to, {"device": "cpu"}, {"device": [], "non_blocking": ["bool"]}),
    "Batch[]": (lambda index: BATCH[index], {}, {"index": ["int tensor", "bool tensor"]}),
    "Batch.split": (BATCH.split, {}, {"size": ["int", "huge int"]}),
    "weightings.resolve": (
        weightings.resolve,
        {"weight": "snr", "path": PATH, "t": T},
        {"path": [], "t": FLOATING},
    ),
    **{
        f"weightings.{name}.weight": (weighting.weight, {"path": PATH, "t": T}, {"path": [], "t": FLOATING})
        for name, weighting in weightings.WEIGHTINGS.items()
        if weighting is not None
    },
    "MinSNR": (weightings.MinSNR, {}, {"gamma": POSITIVE}),
    "Sigmoid": (weightings.Sigmoid, {}, {"bias": NUMBERS}),
    "Uniform": (times.Uniform, {}, {"low": [], "high": [], "stratified": ["bool"]}),
    "Uniform, stratified": (times.Uniform, {"stratified": True}, {"size": ["none", "int", "huge int"]}),
    "LogitNormal": (times.LogitNormal, {}, {"mean": [*NUMBERS, "huge int"], "std": POSITIVE}),
    "Mode": (times.Mode, {}, {"scale": ["negative int", "negative float"]}),
    "UShaped": (times.UShaped, {}, {"a": ["int", "float"]}),
    "Beta": (times.Beta, {}, {"a": POSITIVE, "b": POSITIVE, "scale": [], "offset": []}),
    "Shift": (times.Shift, {}, {"shift": POSITIVE}),
    "Shift()": (times.Shift(2.0), {}, {"t": FLOATING}),
    "Shift.inverse": (times.Shift(2.0).inverse, {}, {"t": FLOATING}),
    "Shift.dynamic": (times.Shift.dynamic, {}, {"mu": NUMBERS}),
    "Shift.for_resolution": (
        times.Shift.for_resolution,
        {"seq_len": 256},
        {
            "seq_len": ["int"],
            "base_seq_len": ["int"],
            "max_seq_len": ["int"],
            "base_shift": NUMBERS,
            "max_shift": NUMBERS,
        },
    ),
    "Shifted": (
        times.Shifted,
        {"sampler": times.Uniform(), "shift": times.Shift()},
        {"sampler": ["function"], "shift": []},
    ),
    **{
        f"{sampler!r}()": (
            sampler,
            {"shape": 4},
            {
                "shape": ["int", "tuple"],
                "device": OPTIONAL,
                "generator": ["none", "generator"],
                "seed": ["none", "int", "negative int"],
                "row_offset": ["int"],
            },
        )
        for sampler in (times.Uniform(), times.Beta(2.0, 3.0), times.Shifted(times.LogitNormal(), times.Shift()))
    },
    "OptimalTransport": (paths.OptimalTransport, {}, {"sigma_min": []}),
    "Polynomial": (paths.Polynomial, {}, {"n": POSITIVE}),
    "VP": (VP, {}, {"beta_min": ["int", "float"], "beta_max": POSITIVE}),
    "VE": (paths.VE, {}, {"sigma_min": ["int", "float"], "sigma_max": POSITIVE}),
    "SchrodingerBridge": (SchrodingerBridge, {}, {"sigma": POSITIVE, "base": OPTIONAL}),
    "ConstantBridge": (paths.ConstantBridge, {"sigma": 0.1}, {"sigma": POSITIVE, "base": OPTIONAL}),
    "LossBins": (fm.LossBins, {}, {"bins": ["int"], "device": OPTIONAL}),
    "LossBins.update": (
        fm.LossBins(3).update,
        {"t": T, "loss": T},
        {"t": [], "loss": [], "weight": ["none", "int tensor", "bool tensor"]},
    ),
    "LossBins.load_state_dict": (fm.LossBins(3).load_state_dict, {}, {"state": []}),
}
# Where two arguments contradict, either is named.
PAIRS = {
    ("x_1", "pred"),
    ("x_1", "x_0"),
    ("x_1", "x_t"),
    ("x_1", "source"),
    ("x_t", "prediction"),
    ("t", "loss"),
    ("beta_min", "beta_max"),
    ("sigma_min", "sigma_max"),
    ("batch", "path"),
    ("generator", "seed, generator"),
}


@pytest.mark.parametrize(("name", "argument"), cases(CALLS), ids=lambda value: value)
def test_a_wrong_argument_has_a_clear_answer(name: str, argument: str) -> None:
    call, right, arguments = CALLS[name]
    names = [argument, *(other for first, other in PAIRS if first == argument)]
    for kind, value in VALUES.items():
        given = {**right, argument: value}
        check_answer(lambda given=given: call(**given), names, kind, kind in arguments[argument])


def returned(value):
    return lambda *args, **kwargs: value


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: PATH.sample(X, time_sampler=returned(0.5)),
            TypeError,
            r"time_sampler\(shape\): expected a tensor, got 0.5",
        ),
        (
            lambda: PATH.sample(X, time_sampler=returned(torch.ones(4, dtype=torch.int64))),
            TypeError,
            r"time_sampler\(shape\): expected a float32",
        ),
        (
            lambda: PATH.sample(X, time_sampler=returned(torch.rand(3))),
            ValueError,
            r"time_sampler\(shape\): expected times of the shape that was asked for, \(4,\)",
        ),
        (
            lambda: PATH.sample(X, time_sampler=returned(torch.rand(4, device="meta"))),
            ValueError,
            r"time_sampler\(shape\): expected times on cpu",
        ),
        (
            lambda: PATH.sample(X, time_sampler=returned(torch.full((4,), -0.1)), checks=True),
            ValueError,
            r"time_sampler\(shape\): expected finite times in \[0, 1\]",
        ),
        (
            lambda: PATH.sample(X, time_sampler=lambda shape, device, generator: T, seed=3),
            ValueError,
            "time_sampler: expected one of fm.times, or a function with arguments seed and row_offset",
        ),
        (
            lambda: PATH.sample(X, time_sampler=lambda shape, device, generator: T, row_offset=3),
            ValueError,
            "time_sampler: expected one of fm.times, or a function with arguments seed and row_offset",
        ),
        (lambda: PATH.sample(X, X, T, row_offset=2), ValueError, "row_offset: expected 0 where nothing is drawn"),
        (lambda: PATH.sample(X, X, T, seed=2), ValueError, "seed: expected None where nothing is drawn"),
        (
            lambda: PATH.sample(X, seed=2, generator=torch.Generator()),
            ValueError,
            "seed, generator: expected at most one",
        ),
        (lambda: PATH.coefficients(1.5), ValueError, "t: expected a finite number >= 0.0 and <= 1.0, got 1.5"),
        (lambda: PATH.snr(-0.5), ValueError, "t: expected a finite number >= 0.0"),
        (
            lambda: fm.cfm_loss(X, BATCH, weight=returned(torch.ones(4, dtype=torch.int64))),
            TypeError,
            "weight: expected a float32",
        ),
        (lambda: fm.cfm_loss(X, BATCH, weight=returned(torch.rand(3))), ValueError, "weight: expected a leading part"),
        (
            lambda: fm.cfm_loss(X, x_1=X, x_0=X, z=X, t=T, path=PATH),
            ValueError,
            r"z: expected None, as CondOT\(\) has no gamma term",
        ),
        (
            lambda: fm.convert(PATH, X, X, T, "velocity", "velocity", sigma_data=1.0),
            ValueError,
            "sigma_data: expected none but for the target 'edm'",
        ),
        (lambda: BATCH[2], TypeError, "index: expected a slice, or a 1-D tensor"),
        (lambda: list(BATCH), TypeError, "not iterable"),
        (lambda: fm.LossBins(3).all_reduce("group"), TypeError, "group: expected a process group"),
    ],
)
def test_a_call_that_cannot_be_right_has_a_clear_answer(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_checks_see_every_bad_time(bad: float, shape) -> None:
    t = torch.rand(shape)
    t.view(-1)[-1] = bad
    for call in (
        lambda: PATH.sample(X, t=t, checks=True),
        lambda: fm.cfm_loss(X, x_1=X, x_0=X, t=t, path=PATH, checks=True),
        lambda: fm.cfm_loss(X, Batch(X, t, X, PATH, X), checks=True),
    ):
        with pytest.raises(ValueError, match=r"t: expected finite times in \[0, 1\]"):
            call()
    PATH.sample(X, t=t)  # unchecked: no wait for the device
