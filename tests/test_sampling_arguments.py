"""Every public argument of sampling, likelihoods, guidance and methods, wrong in every way: a clear answer each time.

A call either is right, and then listed as such, or raises a TypeError or ValueError that begins with the name of an
argument the caller gave and says what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from wrong_values import Calls, cases, check_answer

import fmkernels as fm
from fmkernels import guidance
from fmkernels.likelihood.density import bits_per_dim
from fmkernels.solvers.adaptive.controllers import IController, PIController, PIDController
from fmkernels.solvers.methods import diffusion, edm, sde_coefficients
from fmkernels.solvers.methods.adams import AdamsBashforth, AdamsMoulton
from fmkernels.solvers.sampling import grids

B, D = 4, 3
X = torch.linspace(-1.0, 1.0, B * D).reshape(B, D)
PATH = fm.paths.CondOT()
NULL = {"y": 0}


def model(x, t, y=None, **_):
    return -0.5 * x


class Custom:
    pass


VALUES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "text": lambda: "text",
    "bytes": lambda: b"text",
    "int": lambda: 3,
    "zero": lambda: 0,
    "one": lambda: 1,
    "negative int": lambda: -1,
    "int64 and more": lambda: 2**63,
    "huge int": lambda: 10**400,
    "half": lambda: 0.5,
    "float": lambda: 2.5,
    "negative float": lambda: -0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "bool": lambda: True,
    "complex": lambda: 1j,
    "number array": lambda: np.float32(0.5),
    "list": lambda: [1.0],
    "list of text": lambda: ["a"],
    "ragged list": lambda: [[1.0], [1.0, 2.0]],
    "empty list": list,
    "tuple": lambda: (1, 2),
    "dict": dict,
    "dict of numbers": lambda: {1: 2},
    "set": lambda: {"y"},
    "object": Custom,
    "class": lambda: Custom,
    "function": lambda: lambda *a, **k: "x",
    "array": lambda: np.ones(4),
    "array of objects": lambda: np.array([object()] * 4),
    "generator": lambda: torch.Generator(),
    "int tensor": lambda: torch.ones(4, dtype=torch.int64),
    "bool tensor": lambda: torch.ones(4, dtype=torch.bool),
    "complex tensor": lambda: torch.ones(B, D, dtype=torch.complex64),
    "double tensor": lambda: torch.full((B, D), 0.5, dtype=torch.float64),
    "scalar tensor": lambda: torch.tensor(0.5),
    "column": lambda: torch.full((B, 1), 0.5),
    "other shape": lambda: torch.full((5, 7), 0.5),
    "wide": lambda: torch.full((B, D, 2), 0.5),
    "empty": lambda: torch.empty(0),
    "nan tensor": lambda: torch.full((B,), float("nan")),
    "meta": lambda: torch.rand(B, D, device="meta"),
    "meta times": lambda: torch.rand(B, device="meta"),
    "meta number": lambda: torch.rand((), device="meta"),
    "sparse": lambda: torch.ones(B, D).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
    "mkldnn": lambda: X.to_mkldnn(),
}


NUMBERS = ["int", "zero", "one", "negative int", "int64 and more", "half", "float", "negative float"]
POSITIVE = ["int", "one", "int64 and more", "half", "float"]
NOT_NEGATIVE = [*POSITIVE, "zero"]
UNIT = ["zero", "one", "half"]
OPTIONAL = ["none"]
FUNCTIONS = ["function"]
STATES = ["double tensor", "column", "other shape", "wide", "nan tensor"]
# whose shapes are seen when they are used
ARRAYS = [
    "scalar tensor",
    "array",
    "number array",
    "int tensor",
    "column",
    "double tensor",
    "other shape",
    "wide",
    "empty",
]
SCALES = [*NUMBERS, *ARRAYS, *FUNCTIONS]

COMMON: dict[str, list[str]] = {
    "model": [],
    "method": [],
    "path": OPTIONAL,
    "prediction": [],
    "guidance": OPTIONAL,
    "time_dtype": OPTIONAL,
    "model_kwargs": ["none", "dict"],
}
ADAPTIVE = {"rtol": NOT_NEGATIVE, "atol": NOT_NEGATIVE, "controller": OPTIONAL, "max_steps": ["int", "one"]}
FIXED: dict[str, list[str]] = {
    "steps": ["none", "int", "zero", "one"],
    "schedule": [],
    "compact": ["bool", "zero", "one", "half"],
    "batched": ["empty list"],
    "shared": ["empty list"],
    "time_shape": [],
}
SAMPLE = {
    "generator": ["none", "generator"],
    "row_offset": ["int", "zero", "one"],
    "noise_transform": ["none", "function"],
    "return_trajectory": ["bool"],
    "callback": ["none", "function"],
    "progress": ["bool"],
}
SETTINGS = {
    **{name: right for name, right in COMMON.items() if name != "model_kwargs"},
    **ADAPTIVE,
    **FIXED,
    "sde": OPTIONAL,
    "cuda_graph": [],
    "gradient": [],
    "dtype": OPTIONAL,
    "device": OPTIONAL,
}
LIKELIHOOD = {
    **COMMON,
    **ADAPTIVE,
    **FIXED,
    "log_p0": OPTIONAL,
    "t_0": ["zero", "half"],
    "t_1": ["one", "half"],
    "divergence": [],
    "probes": ["int", "one"],
    "distribution": [],
    "fresh": ["bool"],
    "mode": [],
    "chunk": ["none", "int", "one"],
    "gradient": ["bool"],
    "mask": ["none", "bool tensor"],
    "generator": ["none", "generator"],
    "row_offset": ["int", "zero", "one"],
}


NAMES = {name: ["list of text", "empty list", "set"] for name in ("batched", "shared")}


def stream(**given):
    return [result.x for result in fm.sample_stream(**given)]


CALLS: Calls = {
    "sample": (
        fm.sample,
        {"model": model, "x_0": X, "steps": 2},
        {**SETTINGS, **COMMON, **SAMPLE, "x_0": [*STATES, "tuple", "empty"]},
    ),
    "sample adaptive": (
        fm.sample,
        {"model": model, "x_0": X, "method": "heun_euler", "rtol": 0.1, "atol": 0.1},
        {
            **COMMON,
            **ADAPTIVE,
            "time_grid": ["none", "list"],
            "compact": FIXED["compact"],
            "row_offset": SAMPLE["row_offset"],
        },
    ),
    "sample of noise": (
        fm.sample,
        {"model": model, "x_0": (2, 3), "steps": 2, "method": "euler_maruyama"},
        {"x_0": ["tuple", "empty", *STATES], "generator": ["none", "generator"], "dtype": OPTIONAL, "device": OPTIONAL},
    ),
    "sample reversible": (
        fm.sample,
        {"model": model, "x_0": X, "steps": 2, "gradient": "reversible"},
        {"path": OPTIONAL, "method": []},
    ),
    "Solver": (
        fm.Solver,
        {"model": model, "steps": 2},
        # what a function of one's own does is seen when it is used
        {**SETTINGS, "model": FUNCTIONS, "method": FUNCTIONS, "schedule": FUNCTIONS, "cuda_graph": ["bool"], **NAMES},
    ),
    "Solver.sample": (fm.Solver(model, 2).sample, {"x_0": X}, {**SAMPLE, "x_0": [*STATES, "tuple", "empty"]}),
    "sample_stream": (
        stream,
        {"model": model, "requests": [X[0], X[1]], "method": "heun_euler", "rtol": 0.1, "atol": 0.1},
        {
            **COMMON,
            **ADAPTIVE,
            "requests": ["empty list", *STATES, "empty"],
            "capacity": ["int", "one"],
            "refill_at": ["none", "int", "one"],
            "t0": ["zero", "one", "half"],
            "t1": ["zero", "one", "half"],
        },
    ),
    "log_prob": (
        fm.log_prob,
        {"model": model, "x_1": X, "method": "euler", "steps": 1},
        {**LIKELIHOOD, "x_1": [*STATES, "empty"]},
    ),
    "sample_with_log_prob": (
        fm.sample_with_log_prob,
        {"model": model, "x_0": X, "method": "euler", "steps": 1},
        {**LIKELIHOOD, "x_0": [*STATES, "tuple", "empty"]},
    ),
    "bits_per_dim": (
        bits_per_dim,
        {"log_prob": X[:, 0], "shape": (3,)},
        {
            "log_prob": [
                "double tensor",
                "scalar tensor",
                "column",
                "other shape",
                "wide",
                "empty",
                "nan tensor",
                "meta",
                "meta times",
                "meta number",
            ],
            "shape": ["tuple", "empty list"],
            "scale": POSITIVE,
        },
    ),
    "sde_step_log_prob": (
        fm.sde_step_log_prob,
        {"model": model, "x": X, "x_next": X, "t": 0.2, "t_next": 0.4, "sde": fm.SDE(), "path": PATH},
        {
            "model": [],
            "x": [],
            "x_next": [],
            "t": ["zero", "one", "half", "scalar tensor", "double tensor", "nan tensor"],
            "t_next": ["zero", "one", "half", "scalar tensor", "double tensor", "nan tensor"],
            "sde": [],
            "path": [],
            "prediction": [],
            "reduction": [],
            "last": ["none", "bool"],
            "noise_transform": OPTIONAL,
            "return_count": ["bool"],
            "model_kwargs": ["none", "dict"],
        },
    ),
    "divergence": (
        fm.divergence,
        {"func": lambda t, x, **_: -0.5 * x * x, "x": X, "t": 0.5},
        {
            "func": [],
            "x": [*STATES, "empty", "meta", "meta times"],
            "t": [*NUMBERS, *STATES, "scalar tensor", "empty"],
            "method": [],
            "probes": ["int", "one"],
            "distribution": [],
            "mode": [],
            "chunk": ["none", "int", "one"],
            "gradient": ["bool"],
            "model_kwargs": ["none", "dict"],
        },
    ),
    "divergence by probes": (
        fm.divergence,
        {"func": lambda t, x, **_: -0.5 * x, "x": X, "t": 0.5, "method": "hutchinson"},
        {"noise": OPTIONAL},
    ),
    "CFG": (
        guidance.CFG,
        {"scale": 2.0, "negative": NULL},
        {
            "scale": SCALES,
            "negative": [],
            **NAMES,
            "batched": ["bool", *NAMES["batched"]],
            "interval": ["none", "tuple"],
            "convention": [],
            "rescale": UNIT,
            "zero_star": ["bool"],
            "zero_init": ["none", "int", "zero", "one"],
        },
    ),
    "APG": (
        guidance.APG,
        {"scale": 2.0, "negative": NULL},
        {"scale": SCALES, "eta": NUMBERS, "threshold": NOT_NEGATIVE, "momentum": NUMBERS, "base": [], "target": []},
    ),
    "CFGPlusPlus": (guidance.CFGPlusPlus, {"scale": 0.5, "negative": NULL}, {"scale": SCALES, "step": []}),
    "RectifiedCFGPlusPlus": (
        guidance.RectifiedCFGPlusPlus,
        {"scale": 0.5, "negative": NULL},
        {"scale": SCALES, "fraction": ["one", "half"]},
    ),
    "AutoGuidance": (
        guidance.AutoGuidance,
        {"weak_model": model, "scale": 2.0},
        {"weak_model": FUNCTIONS, "scale": SCALES, "weak_kwargs": ["none", "dict"], "interval": ["none", "tuple"]},
    ),
    "MultiCondition": (
        guidance.MultiCondition,
        {"conditions": [({"y": 1}, 2.0)], "negative": NULL},
        {
            "conditions": [],
            "negative": ["none", "dict"],
            "batched": ["bool", *NAMES["batched"]],
            "shared": NAMES["shared"],
        },
    ),
    "MultiCondition's weight": (
        lambda **given: guidance.MultiCondition([({"y": 1}, given["conditions"])]),
        {"conditions": 2.0},
        {"conditions": SCALES},
    ),
    "ClassifierGuidance": (
        guidance.ClassifierGuidance,
        {"gradient": model, "scale": 2.0},
        {"gradient": FUNCTIONS, "scale": SCALES, "gradient_kwargs": ["none", "dict"], "interval": ["none", "tuple"]},
    ),
    "CFG.at": (
        guidance.CFG(2.0, negative=NULL).at,
        {"model": model},
        {
            "model": FUNCTIONS,
            "model_kwargs": ["none", "dict"],
            "path": [],
            "prediction": [],
            "batched": ["empty list", "set"],
            "shared": ["empty list", "set"],
        },
    ),
    "CFG.converted": (guidance.CFG(2.0, negative=NULL).converted, {}, {"convention": []}),
    "scale_of_weight": (guidance.scale_of_weight, {}, {"weight": SCALES}),
    "weight_of_scale": (guidance.weight_of_scale, {}, {"scale": SCALES}),
    "SDE": (
        fm.SDE,
        {},
        {
            "diffusion": FUNCTIONS,
            "scale": NOT_NEGATIVE,
            "last_step": [],
            "last_step_size": ["none", *POSITIVE],
            "method": [],
            "log_prob": ["bool"],
        },
    ),
    "MaskedNoise": (fm.MaskedNoise, {}, {"mask": ["bool tensor"]}),
    "ZeroMeanNoise": (fm.ZeroMeanNoise, {}, {"mask": OPTIONAL, "dim": ["int", "one"]}),
    "FlowGRPO": (sde_coefficients.FlowGRPO, {}, {"noise_level": NOT_NEGATIVE}),
    "Function": (sde_coefficients.Function, {}, {"function": FUNCTIONS}),
    "DDIM": (diffusion.DDIM, {}, {"eta": UNIT}),
    "Ancestral": (diffusion.Ancestral, {}, {"eta": UNIT}),
    "DPMSolverPP": (
        diffusion.DPMSolverPP,
        {},
        {"order": ["int", "one"], "eta": NOT_NEGATIVE, "solver_type": [], "lower_order_final": ["bool"]},
    ),
    "DPMSolverPP2S": (diffusion.DPMSolverPP2S, {}, {"eta": NOT_NEGATIVE, "r": ["half", "one"]}),
    "UniPC": (
        diffusion.UniPC,
        {},
        {"order": ["int", "one"], "variant": [], "corrector": ["bool"], "lower_order_final": ["bool"]},
    ),
    "DEIS": (diffusion.DEIS, {}, {"order": ["int", "one"], "variable": [], "lower_order_final": ["bool"]}),
    "LMS": (diffusion.LMS, {}, {"order": ["int", "one"]}),
    "AdamsBashforth": (AdamsBashforth, {}, {"order": ["int", "one"]}),
    "AdamsMoulton": (AdamsMoulton, {}, {"order": ["int"]}),
    "EDM": (
        edm.EDM,
        {},
        {
            "s_churn": NOT_NEGATIVE,
            "s_noise": NOT_NEGATIVE,
            "s_tmin": NOT_NEGATIVE,
            "s_tmax": [*NOT_NEGATIVE, "inf"],
            "heun": ["bool"],
        },
    ),
    "Restart": (
        edm.Restart,
        {},
        {"intervals": [], "heun": ["bool"], "s_noise": NOT_NEGATIVE, "rho": POSITIVE},
    ),
    "RestartInterval": (
        edm.RestartInterval,
        {"sigma_min": 0.1, "sigma_max": 80.0},
        {
            "sigma_min": ["int", "one", "half", "float"],
            "sigma_max": POSITIVE,
            "steps": ["none", "int", "one"],
            "repeats": ["int", "zero", "one"],
        },
    ),
    "IController": (
        IController,
        {},
        {"safety": ["one", "half"], "ifactor": ["one", "int", "float", "int64 and more"], "dfactor": ["one", "half"]},
    ),
    "PIController": (PIController, {}, {"pcoeff": NUMBERS, "icoeff": NUMBERS}),
    "PIDController": (PIDController, {}, {"pcoeff": NUMBERS, "icoeff": NUMBERS, "dcoeff": NUMBERS}),
    "Power": (grids.Power, {}, {"power": POSITIVE}),
    "Log": (grids.Log, {}, {"sigma_min": ["half"]}),
    "Karras": (
        grids.Karras,
        {},
        {"sigma_min": ["one", "half", "int", "float"], "sigma_max": POSITIVE, "rho": POSITIVE},
    ),
    "Stretched": (
        grids.Stretched,
        {"schedule": "uniform", "terminal": 0.1},
        {"schedule": FUNCTIONS, "terminal": ["half"]},
    ),
}

# Where two arguments contradict, either is named.
PAIRS = {("t_0", "t_1"), ("x", "x_next"), ("sigma_min", "sigma_max"), ("steps", "steps, time_grid")}


@pytest.mark.parametrize(("name", "argument"), cases(CALLS), ids=lambda value: value)
def test_a_wrong_argument_has_a_clear_answer(name: str, argument: str) -> None:
    call, right, arguments = CALLS[name]
    names = [argument, *(other for first, other in PAIRS if first == argument)]
    for kind, make in VALUES.items():
        given = {**right, argument: make()}
        check_answer(lambda given=given: call(**given), names, kind, kind in arguments[argument])
