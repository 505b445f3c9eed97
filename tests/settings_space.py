"""Settings of the calls whose results caches serve: for every attribute and argument some values, by its name.

What a call or a class takes is read from its signature. A new argument has values here, or is one of NOT_HERE, or the
tests that draw from this space say so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fmkernels as fm
from fmkernels import guidance as g
from fmkernels import paths as p
from fmkernels.solvers.adaptive.controllers import IController, PIController, PIDController
from fmkernels.solvers.equations.options import ADAPTIVE_OPTIONS, FIXED_OPTIONS
from fmkernels.solvers.methods import adams, diffusion, edm, registry
from fmkernels.solvers.sampling import grids

ROWS = 4
X = torch.linspace(-1.0, 1.0, 3 * ROWS).reshape(ROWS, 3)
Y = torch.linspace(0.5, 2.0, ROWS)
MASK = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [True, True, True]])


def field(x: Tensor, t: Tensor, y: Any = 0.0) -> Tensor:
    t, y = (v.reshape(v.shape + (1,) * (x.dim() - v.dim())) if isinstance(v, Tensor) else v for v in (t, y))
    return torch.sin(3.0 * x) * (0.5 + t) + y


def weak(x: Tensor, t: Tensor, y: Any = 0.0) -> Tensor:
    return -x


def log_density(x: Tensor) -> Tensor:
    return -x.square().sum(1)


def pull(x: Tensor, t: Tensor, y: Any = 0.0) -> Tensor:
    return -0.1 * x


class Spec(NamedTuple):
    """An object to be made: a class and its arguments, which may be such again."""

    kind: Callable[..., Any]
    arguments: dict[str, Any]


def build(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.kind(**{name: build(each) for name, each in value.arguments.items()})
    return {k: build(v) for k, v in value.items()} if type(value) is dict else value


SCALES = [0.0, 1.0, 2.5, torch.linspace(1.0, 3.0, ROWS), lambda t: 1.0 + t, lambda t: 2.0 - t]
CONDITIONS = [
    [({"y": 1.0}, 2.0)],
    [({"y": 2.0}, 2.0)],
    [({"y": 1.0}, 3.0)],
    [({"y": 1.0}, 2.0), ({"y": -1.0}, lambda t: t)],
]
PATHS = [p.CondOT, p.Cosine, p.LinearVP, p.OptimalTransport, p.Polynomial, p.VE, p.VP]
BRIDGES = [p.ConstantBridge, p.SchrodingerBridge]
GUIDANCE = [g.CFG, g.APG, g.CFGPlusPlus, g.RectifiedCFGPlusPlus, g.AutoGuidance, g.ClassifierGuidance, g.MultiCondition]
METHODS = [
    adams.AdamsBashforth, adams.AdamsMoulton, diffusion.DDIM, diffusion.Ancestral, diffusion.DPMSolverPP,
    diffusion.DPMSolverPP2S, diffusion.UniPC, diffusion.DEIS, diffusion.LMS, edm.EDM, edm.Restart, fm.SDE,
]  # fmt: skip
CONTROLLERS = [IController, PIController, PIDController]
SCHEDULES = [fm.times.Shift, grids.Power, grids.Log, grids.Karras, grids.Stretched]

# By the class (or function) and its argument, else by the argument alone. Classes stand for their objects.
VALUES: dict[Any, list[Any]] = {
    # paths
    "beta_min": [0.1, 0.3],
    "beta_max": [20.0, 5.0],
    "sigma_min": [0.02, 0.1],
    "sigma_max": [100.0, 20.0],
    "sigma": [1.0, 0.3],
    "base": [None, *PATHS],
    "n": [1.0, 2.0, 3.5],
    # guidance
    "scale": SCALES,
    "negative": [None, {"y": 0.0}, {"y": -1.0}],
    (g.CFG, "batched"): ["auto", False, True, ("y",)],
    (g.APG, "batched"): ["auto", False],
    (g.CFGPlusPlus, "batched"): ["auto", False],
    (g.RectifiedCFGPlusPlus, "batched"): ["auto", False],
    (g.MultiCondition, "batched"): ["auto", False],
    "interval": [None, (0.2, 0.8), (0.0, 0.4)],
    "shared": [(), ("y",)],
    "batched": [(), ("y",)],
    "eta": [0.0, 0.5, 1.0],
    "threshold": [0.0, 0.3],
    "momentum": [0.0, -0.5],
    (g.APG, "base"): ["conditional", "unconditional"],
    (g.APG, "target"): ["x_1", "velocity"],
    "convention": ["scale", "weight"],
    "rescale": [0.0, 0.7],
    "zero_star": [False, True],
    "zero_init": [None, 1, 2],
    "step": ["euler", "ddim"],
    "fraction": [0.5, 0.25],
    "weak_model": [weak, field],
    "weak_kwargs": [None, {"y": 0.5}],
    "gradient_kwargs": [None, {"y": 0.5}],
    (g.ClassifierGuidance, "gradient"): [pull, weak],
    "conditions": CONDITIONS,
    # methods
    "order": [2, 3, 1],
    "reuse": [False, True],
    "solver_type": ["midpoint", "heun"],
    "lower_order_final": ["auto", True, False],
    "r": [0.5, 0.3],
    "variant": ["bh2", "bh1"],
    "corrector": [True, False],
    "variable": ["log_rho", "t"],
    "s_churn": [0.0, 10.0],
    "s_tmin": [0.0, 0.5],
    "s_tmax": [1e9, 2.0],
    "s_noise": [1.0, 1.01],
    "heun": [True, False],
    "intervals": [(edm.RestartInterval(0.06, 0.3, repeats=2),), (edm.RestartInterval(0.1, 0.3, 2),)],
    "rho": [7.0, 3.0],
    "diffusion": ["sigma", "sbdm", "constant", lambda t: 1.0 - t, lambda t: 0.5 * (1.0 - t)],
    (fm.SDE, "scale"): [1.0, 0.5, 0.0],
    "last_step": ["mean", "none", "tweedie", "euler"],
    "last_step_size": [None, 0.05],
    (fm.SDE, "method"): ["euler", "heun", "exponential"],
    (fm.SDE, "log_prob"): [False, "sum", "mean", "none"],
    # controllers and schedules
    "safety": [0.9, 0.8],
    "ifactor": [10.0, 2.0],
    "dfactor": [0.2, 0.5],
    "pcoeff": [0.4, 0.2],
    "icoeff": [0.3, 0.5],
    "dcoeff": [0.0, 0.1],
    "shift": [3.0, 2.0],
    "power": [2.0, 1.5],
    (grids.Stretched, "schedule"): ["uniform", "cosine", fm.times.Shift, grids.Power],
    "terminal": [0.1, 0.2],
    # solves
    "steps": [None, 3, 4],
    "method": [*registry.names(registry.SAMPLE), *METHODS],
    "path": [None, *PATHS, *BRIDGES],
    "prediction": ["velocity", "x_1", "x_0", "score"],
    "guidance": [None, None, *GUIDANCE],
    "sde": [None, None, fm.SDE],
    "schedule": ["uniform", "cosine", *SCHEDULES, lambda n: np.linspace(0, 1, n + 1), lambda n: torch.ones(n + 1)],
    "time_grid": [None, None, [0.0, 0.4, 1.0], np.array([0.0, 0.5, 1.0]), torch.tensor([0.0, 0.2, 0.7])],
    "rtol": [1e-2, 1e-3],
    "atol": [1e-2, 1e-3],
    "controller": [None, *CONTROLLERS],
    "max_steps": [20, 5],
    "compact": ["auto", False, True, 0.25],
    "row_offset": [0, 3],
    "noise_transform": [None, fm.MaskedNoise, fm.ZeroMeanNoise],
    "mask": [None, MASK, torch.ones_like(MASK)],
    (fm.MaskedNoise, "mask"): [MASK, MASK[:, :2].all(1)],
    "dim": [1],
    "return_trajectory": [False, True],
    "cuda_graph": ["auto", False],
    (fm.sample, "gradient"): ["none", "direct", "checkpoint", "reversible"],
    "dtype": [None, torch.float64, torch.bfloat16],
    "time_shape": ["batch", "scalar"],
    "time_dtype": [None, torch.float64, torch.bfloat16],
    "model_kwargs": [None, {"y": 1.0}, {"y": Y}, {"y": 2.0 * Y}],
    # log_prob
    "log_p0": [None, log_density],
    (fm.log_prob, "method"): registry.names(registry.LOG_PROB),
    "t_0": [0.0, 0.1],
    "t_1": [1.0, 0.8],
    "divergence": ["exact", "hutchinson"],
    "probes": [1, 2],
    "distribution": ["rademacher", "gaussian"],
    "fresh": [False, True],
    "mode": ["reverse", "forward"],
    "chunk": [None, 1, 2],
    (fm.log_prob, "gradient"): [False, True],
    # odeint
    "t": [torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.3, 0.5]), torch.tensor([0.5, 0.1])],
    (fm.odeint, "method"): [None, *registry.names(registry.ODEINT)],
    (fm.odeint, "options"): [None, {}, *({name: value} for name, values in {
        "step_size": [0.1, 0.25],
        "grid_constructor": [lambda f, y, t: torch.linspace(float(t[0]), float(t[-1]), 4)],
        "interp": ["linear", "cubic"],
        "perturb": [True],
        "checkpoint": [True],
        "max_order": [2, 3],
        "reversible": [True],
        "first_step": [0.1, 0.05],
        "min_step": [0.1],
        "max_step": [0.1, 0.2],
        "max_num_steps": [1000, 3],
        "safety": [0.8],
        "ifactor": [2.0],
        "dfactor": [0.5],
        "controller": [PIController()],
        "norm": [lambda y: y.abs().max()],
        "step_t": [torch.tensor([0.4])],
        "jump_t": [torch.tensor([0.4])],
        "per_sample": [True],
    }.items() for value in values)],
    # losses
    "pred": [X, X.double(), X.bfloat16()],
    (fm.cfm_loss, "t"): [torch.linspace(0.1, 0.9, ROWS), 0.5],
    (fm.cfm_loss, "target"): ["velocity", "x_1", "x_0", "score", "edm"],
    "weight": [None, "snr", fm.weightings.MinSNR(5.0), fm.weightings.MinSNR(2.0), Y],
    "reduction": ["mean", "sum", "none"],
    "count": [None, 3.0],
    "kind": ["squared", "huber", "pseudo_huber", "l1"],
    "delta": [1.0, 0.1],
    "sigma_data": [None, 0.5],
    "checks": [False, True],
    "impl": ["auto", "reference"],
    # equations with noise
    "noise": ["additive", "diagonal"],
    "calculus": ["ito", "stratonovich"],
    "dt": [None, 0.25],
    "seed": [1, 2],
    (fm.sdeint, "method"): [None, "euler", "heun", "milstein"],
    (fm.sdeint, "diffusion"): [lambda t: 0.5, lambda t: 1.0 - t, lambda t, y: 0.3 * y],
    # one step
    (fm.sde_step_log_prob, "t"): [0.2, 0.4],
    "t_next": [0.6, 1.0],
    (fm.sde_step_log_prob, "sde"): [fm.SDE],
    (fm.sde_step_log_prob, "reduction"): ["sum", "mean", "none"],
    "last": [None, True, False],
    "return_count": [False, True],
}  # fmt: skip
assert {*FIXED_OPTIONS, *ADAPTIVE_OPTIONS} <= {
    n for options in VALUES[fm.odeint, "options"] if options for n in options
}

# What a test gives itself, and what shows progress.
NOT_HERE = {
    "model", "x_0", "x_1", "x", "x_next", "y0", "func", "drift", "z", "batch", "event_fn",
    "generator", "device", "callback", "progress", "kwargs",
}  # fmt: skip


def arguments(kind: Any) -> list[str]:
    """What a class or function takes."""
    return [name for name in inspect.signature(kind).parameters if name not in NOT_HERE]


def values(kind: Any, name: str) -> list[Any]:
    found = VALUES.get((kind, name), VALUES.get(name))
    if found is None:
        raise KeyError(f"{name} of {kind.__name__}: expected values in tests/settings_space.py")
    return found


def is_object(value: Any) -> bool:
    return inspect.isclass(value)
