"""The family ``sampling``: whole solves with a network, the network's calls alone, and so the solver's own time.

Every solver of a case does the same task on the same start. Errors are told twice: "x_1" against the exact solution
(that of the method too), "method" against the same method in float64 (rounding, or a different formula).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fmkernels as fm
from fmkernels.testing import Case, Inputs, generator

from . import loops
from .family import Family, Outputs, Run, Solve, Transform
from .fields import Mixture, Network, Pixels, Recorder
from .solver_peers import SOLVERS, as_run
from .tasks import GUIDANCE_SCALE, STAGES, Kept, Task, velocity

PRECISION = "work-precision"
HEADLINE = (16, 2)
IMAGES = (64, 3, 64, 64)
_DIFFUSION = ("dpmpp_2m", "unipc")
DOPRI5 = Task("dopri5")
_EXPLICIT = (Task("euler", 100), Task("midpoint", 50), Task("rk4_38", 25), DOPRI5)
_MULTISTEP = (Task("dpmpp_2m", 20), Task("unipc", 20))
_CFG = Task("euler", 50, guided=True)
_PLANNED: tuple[tuple[tuple[int, ...], tuple[Task, ...]], ...] = (
    (HEADLINE, (*_EXPLICIT, *_MULTISTEP, _CFG)),
    ((1, 2), _EXPLICIT),
    ((256, 2), _EXPLICIT),
    ((1024, 2), (_EXPLICIT[0], DOPRI5)),  # what is promised on a GPU
    ((4096, 2), _EXPLICIT),
    (IMAGES, (Task("euler", 50), DOPRI5, Task("dpmpp_2m", 20), _CFG)),
)
_EVALUATIONS = (8, 16, 32, 64, 128)
_METHODS = ("euler", "midpoint", "heun2", "ab2", "rk4", *_DIFFUSION)
PRECISION_TASKS = (
    *(Task(method, nfe // STAGES.get(method, 1)) for method in _METHODS for nfe in _EVALUATIONS),
    *(Task("dopri5", tolerance=tolerance) for tolerance in (1e-2, 1e-3, 1e-4, 1e-6)),
)
_TASKS = {str(task): task for _, tasks in _PLANNED for task in tasks} | {PRECISION: DOPRI5}


def _exact(model: Any, x_0: Tensor, label: Tensor, steps: int) -> Tensor:
    """The float64 solution, by a method that no measured one shares, with many small steps."""
    model, label = copy.deepcopy(model).double(), label.double()
    return loops.rk4(lambda x, t: model(x, t, label), x_0.double(), [i / steps for i in range(steps + 1)])


def _case(shape: tuple[int, ...], field: Callable[[], nn.Module], variant: str, exact_steps: int) -> Case:
    def make(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        rng = generator(device, seed)
        x_0 = torch.randn(shape, generator=rng, device=device, dtype=dtype)
        label = torch.rand(shape[0], generator=rng, device=device, dtype=dtype)
        model = field().to(device)
        model = model if isinstance(model, Mixture) else model.to(dtype)
        exact = functools.cache(lambda: _exact(model, x_0, label, exact_steps))
        return {"model": model, "x_0": x_0, "label": label, "exact": exact}

    def call(inputs: Inputs, impl: str) -> tuple[Tensor, ...]:
        return (_ours_runs(_TASKS[variant])[""](inputs)["x_1"],)

    return Case(f"{variant} {shape}", shape, make, call, tensors_moved=2, variant=variant, tags=frozenset({"bench"}))


def _cases() -> list[Case]:
    cases = []
    for shape, tasks in _PLANNED:
        field, exact_steps = (Pixels, 64) if shape == IMAGES else (Network, 512)
        cases += [_case(shape, field, str(task), exact_steps) for task in tasks]
    return [*cases, _case((1024, 2), Mixture, PRECISION, 2000)]


# ours


def _settings(task: Task) -> dict[str, Any]:
    guidance = fm.guidance.CFG(GUIDANCE_SCALE, negative={"label": 0.0}) if task.guided else None
    tolerances = {"rtol": task.tolerance, "atol": task.tolerance}
    said = {"batched": ("label",)}  # one call for both branches of guidance; labels leave with finished samples
    # the model holds nothing of single samples
    return {"method": task.method, "steps": task.steps, "guidance": guidance, "compact": "auto", **tolerances, **said}


def _sample(task: Task) -> Run:
    settings = _settings(task)
    return as_run(task, lambda inputs: fm.sample(inputs["model"], inputs["x_0"], label=inputs["label"], **settings)[0])


def _odeint(task: Task) -> Run:
    options: dict[str, Any] = {"method": task.method, "rtol": task.tolerance, "atol": task.tolerance}
    times = torch.tensor([0.0, 1.0] if task.steps is None else task.times)

    def solve(inputs: Inputs) -> Tensor:
        field = velocity(inputs, task)
        return fm.odeint(lambda t, y: field(y, t), inputs["x_0"], times, **options)[-1]

    return as_run(task, solve)


def _ours_runs(task: Task) -> dict[str, Run]:
    settings = _settings(task)
    solver = Kept(lambda model: fm.Solver(model, **settings))
    runs = {
        "": _sample(task),
        "Solver": as_run(task, lambda inputs: solver(inputs["model"]).sample(inputs["x_0"], label=inputs["label"])[0]),
    }
    if task.method not in _DIFFUSION and not task.guided:
        runs["odeint"] = _odeint(task)
    return runs


def _ours(case: Case, impl: str) -> dict[str, Run]:
    if impl != "auto":
        return {}
    if case.variant == PRECISION:
        return {"": _sample(DOPRI5)} | {str(task): _sample(task) for task in PRECISION_TASKS}
    return _ours_runs(_TASKS[case.variant])


# the others


def _loop(task: Task, inputs: Inputs) -> Tensor:
    """By hand."""
    with torch.no_grad():
        if task.steps is None:
            return loops.dopri5(velocity(inputs, task), inputs["x_0"], task.tolerance)
        return loops.LOOPS[task.method](velocity(inputs, task), inputs["x_0"], task.times)


def _plain(case: Case, transform: Transform) -> dict[str, Run]:
    task = _TASKS[case.variant]
    if task.steps is not None and task.method not in loops.LOOPS:
        return {}  # what nobody writes by hand
    return {"": lambda inputs: {"x_1": _loop(task, inputs), "task": task}}


def _peer(case: Case, runs: Callable[[Task], dict[str, Run]]) -> dict[str, Run]:
    if case.variant != PRECISION:
        return runs(_TASKS[case.variant])
    found = {"": runs(DOPRI5).get("")}
    found |= {str(task): runs(task).get("") for task in PRECISION_TASKS}
    return {name: run for name, run in found.items() if run is not None}


# what is right


def _checked(outputs: Outputs) -> Outputs:
    task: Task = outputs["task"]
    return outputs | ({"method": outputs["x_1"]} if task.steps and task.method in loops.LOOPS else {})


def _double(inputs: Inputs) -> Inputs:
    model = copy.deepcopy(inputs["model"]).double()
    return {"model": model, "x_0": inputs["x_0"].double(), "label": inputs["label"].double()}


def _oracle(case: Case, inputs: Inputs, outputs: Outputs) -> dict[str, Tensor]:
    task: Task = outputs["task"]
    if "method" not in outputs:
        return {"x_1": inputs["exact"]()}
    method = _loop(task, _double(inputs))
    # of a guided solve the exact solution is that of the guided field, which nobody asks for
    return {"method": method} if task.guided else {"x_1": inputs["exact"](), "method": method}


def _reference(case: Case, inputs: Inputs, outputs: Outputs) -> dict[str, Tensor]:
    # of a method that nobody writes by hand, DPM-Solver++ 2M's error says how large one may be
    task: Task = outputs["task"]
    known = task if task.steps is None or task.method in loops.LOOPS else replace(task, method="dpmpp_2m")
    result = _loop(known, inputs)
    return {"x_1": result, "method": result}


def _budget(outputs: Outputs) -> float:
    """Wide: step control may be per sample or shared, and a field that parts neighbours enlarges what rounding does
    in one element. A wrong formula is off by orders of magnitude."""
    return 10.0


def _solve(case: Case, run: Run, inputs: Inputs) -> Solve:
    recorder = Recorder(inputs["model"])
    task: Task = run({**inputs, "model": recorder})["task"]
    calls = len(recorder.calls)
    return Solve(recorder.replay, calls, recorder.rows_per(case.shape[0]), task.steps_of(calls))


SAMPLING = Family(
    name="sampling",
    what="whole solves, the network included",
    cases=_cases(),
    ours=_ours,
    plain=_plain,
    oracle=_oracle,
    reference=_reference,
    peer=_peer,
    peers=SOLVERS,
    checked=_checked,
    solve=_solve,
    budget=_budget,
    dtypes=(torch.float32,),
    compiles=False,
)
