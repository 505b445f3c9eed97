"""The peers' solvers, each as its users call it where that is fastest: (task) -> variants of a run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fmkernels.testing import Inputs

from .family import Outputs, Run
from .peers import Peer
from .tasks import Kept, Task, velocity

Runs = dict[str, Run]
Solve = Callable[[Inputs], Tensor]
# torchdiffeq's names, which flow_matching passes on; its rk4 is the 3/8 rule.
_TORCHDIFFEQ = {"euler": "euler", "midpoint": "midpoint", "heun2": "heun2", "rk4_38": "rk4", "dopri5": "dopri5"}


def as_run(task: Task, solve: Solve) -> Run:
    def run(inputs: Inputs) -> Outputs:
        with torch.no_grad():
            return {"x_1": solve(inputs), "task": task}

    return run


def _grid(task: Task, x: Tensor) -> Tensor:
    return torch.tensor(task.times, dtype=x.dtype, device=x.device)


def _ends(x: Tensor) -> Tensor:
    return torch.tensor([0.0, 1.0], dtype=x.dtype, device=x.device)


def _torchdiffeq() -> Callable[[Task], Runs]:
    odeint = importlib.import_module("torchdiffeq").odeint

    def runs(task: Task) -> Runs:
        method = _TORCHDIFFEQ.get(task.method)
        if method is None:
            return {}

        def solve(inputs: Inputs) -> Tensor:
            x, field = inputs["x_0"], velocity(inputs, task)
            settings: dict[str, Any] = {"rtol": task.tolerance, "atol": task.tolerance}
            if task.steps is not None:  # one interval of steps: faster than a time grid, all of whose states are kept
                settings["options"] = {"step_size": 1.0 / task.steps}
            return odeint(lambda t, y: field(y, t), x, _ends(x), method=method, **settings)[-1]

        return {"": as_run(task, solve)}

    return runs


def _flow_matching() -> Callable[[Task], Runs]:
    solver_type = importlib.import_module("flow_matching.solver").ODESolver

    def runs(task: Task) -> Runs:
        method = _TORCHDIFFEQ.get(task.method)
        if method is None:
            return {}

        def solve(inputs: Inputs) -> Tensor:
            x = inputs["x_0"]
            solver = solver_type(velocity(inputs, task))
            tolerances = {"rtol": task.tolerance, "atol": task.tolerance}
            size = None if task.steps is None else 1.0 / task.steps
            return solver.sample(x, step_size=size, method=method, time_grid=_ends(x), **tolerances)

        return {"": as_run(task, solve)}

    return runs


class _Flat(nn.Module):
    """A field of (B, F) states for torchode, as a module so that TorchScript can take it."""

    def __init__(self, model: Any, label: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.model, self.label, self.shape = model, label, list(shape)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.model(y.view(self.shape), t, self.label).flatten(1)


def _torchode() -> Callable[[Task], Runs]:
    to = importlib.import_module("torchode")

    def runs(task: Task) -> Runs:
        if task.method != "dopri5" or task.guided:
            return {}

        def solver(scripted: bool) -> Solve:
            def build(model: Any, inputs: Inputs) -> Any:
                field: Any = _Flat(model, inputs["label"], inputs["x_0"].shape)
                # a field that is recorded cannot be scripted; the calls are the same
                scripts = scripted and isinstance(model, nn.Module)
                term = to.ODETerm(torch.jit.script(field) if scripts else field)
                control = to.IntegralController(task.tolerance, task.tolerance, term=term)
                adjoint = to.AutoDiffAdjoint(to.Dopri5(term=term), control)
                return torch.jit.script(adjoint) if scripts else adjoint

            current: dict[str, Inputs] = {}
            kept = Kept(lambda model: build(model, current["inputs"]))

            def solve(inputs: Inputs) -> Tensor:
                current["inputs"] = inputs
                x = inputs["x_0"]
                ends = (x.new_zeros(x.shape[0]), x.new_ones(x.shape[0]))
                problem = to.InitialValueProblem(y0=x.flatten(1), t_start=ends[0], t_end=ends[1])
                return kept(inputs["model"]).solve(problem).ys[:, -1].view_as(x)

            return solve

        return {"": as_run(task, solver(False)), "jit": as_run(task, solver(True))}

    return runs


def _diffusers() -> Callable[[Task], Runs]:
    diffusers = importlib.import_module("diffusers")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    schedulers: dict[str, Callable[[], Any]] = {
        "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**flow),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow),
    }

    def runs(task: Task) -> Runs:
        if task.method not in schedulers or task.guided:
            return {}
        scheduler = schedulers[task.method]()
        negated = Kept(lambda model: model.negated())  # their velocity points from the data to the noise

        def solve(inputs: Inputs) -> Tensor:
            x, label, model = inputs["x_0"], inputs["label"], negated(inputs["model"])
            scheduler.set_timesteps(task.steps)
            # our grid, on the host as they want it
            sigmas = 1.0 - torch.tensor(task.times, dtype=torch.float64)
            scheduler.sigmas = sigmas.float()
            scheduler.timesteps = 1000.0 * sigmas[:-1].float()
            scheduler.set_begin_index(0)
            times = _grid(task, x)
            for i, timestep in enumerate(scheduler.timesteps):
                x = scheduler.step(model(x, times[i], label), timestep, x, return_dict=False)[0]
            return x

        return {"": as_run(task, solve)}

    return runs


SOLVERS = (
    Peer("torchdiffeq", _torchdiffeq),
    Peer("torchode", _torchode),
    Peer("flow_matching", _flow_matching),
    Peer("diffusers", _diffusers),
)
