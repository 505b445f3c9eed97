"""A solver that keeps its settings between solves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter, is_
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..._checks import (
    check_choice,
    check_float_dtype,
    check_float_tensor,
    check_int,
    check_number,
    type_error,
    value_error,
)
from ...ops.random.op import randn
from ...paths import CondOT, Path
from ...random import draw_seed
from ...times import Shift
from ..adaptive.controllers import Controller, IController
from ..adaptive.options import AdaptiveOptions
from ..adaptive.solve import solve_adaptive
from ..methods import registry as methods
from ..methods.reversible import Scheme, solve_reversible, tableau_of
from ..methods.tableaus import Tableau
from ..programs.builder import Method
from ..programs.draws import Transform, check_transform, transformed
from ..programs.expressions import Number
from ..programs.program import Program
from ..programs.run import Call, Run
from ..programs.solve_graph import Wanted, replayed
from ..programs.tables import numbers_for, table_of_numbers
from . import grids
from .plan import plan, plan_while_compiling
from .result import SampleResult
from .velocity import Model, Velocity

Callback = Callable[[int, float, Tensor], object]
GRADIENTS = ("none", "direct", "checkpoint", "reversible")
DEFAULT_STEPS = 50
_COND_OT, _I_CONTROLLER = CondOT(), IController()


@dataclass
class Solver:
    """A model with a method, kept for repeated use: the plan, its tables and the captured graph stay between calls.

    All arguments are those of :func:`fmkernels.sample`. Each is an attribute: one that is changed is checked, and used
    from the next call on. Several threads may use one solver at once, and so may its own model or callback.

    Example:
        >>> solver = fm.Solver(model, method="heun2", steps=20)
        >>> x_1, result = solver.sample((64, 2))
    """

    model: Model
    steps: int | None = None
    method: str | Method = "euler"
    path: Path = _COND_OT
    prediction: str = "velocity"
    guidance: Any = None
    sde: Any = None
    schedule: str | Shift | grids.Schedule = "uniform"
    time_grid: Tensor | np.ndarray | Sequence[float] | None = None
    rtol: float = 1e-5
    atol: float = 1e-5
    controller: Controller = _I_CONTROLLER
    max_steps: int = 10_000
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    cuda_graph: bool | Literal["auto"] = "auto"
    gradient: str = "none"
    time_shape: str = "batch"
    time_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        """Checks the settings, and what they are from which nothing has changed since."""
        if not callable(self.model):
            raise type_error("model", "a callable model(x, t, **model_kwargs)", self.model)
        if not isinstance(self.path, Path):
            raise type_error("path", "a path of fm.paths", self.path)
        check_choice("time_shape", self.time_shape, ("batch", "scalar"))
        check_choice("gradient", self.gradient, GRADIENTS)
        if self.cuda_graph not in (True, False, "auto"):
            raise value_error("cuda_graph", "True, False or 'auto'", self.cuda_graph)
        check_int("max_steps", self.max_steps, low=1)
        for name in ("dtype", "time_dtype"):
            if getattr(self, name) is not None:
                check_float_dtype(name, getattr(self, name))
        for name in ("rtol", "atol"):
            check_number(name, getattr(self, name), low=0.0)
        if self.steps is not None:
            check_int("steps", self.steps, low=0)
            if self.time_grid is not None:
                raise ValueError("steps, time_grid: expected at most one of them, got both")
        if self.sde is not None and self.method != "euler":
            raise value_error("method", "none beside sde=, which has its own", self.method)
        self._adaptive = self._adaptive_tableau()
        if self._adaptive is not None and self.gradient != "none":
            raise value_error(
                "gradient", "'none' with adaptive steps (fm.odeint has gradients), or steps=", self.gradient
            )
        if self._adaptive is None and self.sde is None and not torch.compiler.is_compiling():
            methods.resolve(self.method)  # a wrong name is told here
        if not torch.compiler.is_compiling():
            self._checked = _settings(self)

    def _adaptive_tableau(self) -> Tableau | None:
        if self.sde is not None or self.steps is not None:
            return None
        return methods.adaptive_tableau(self.method)

    def _start(self, x_0: Tensor | Sequence[int], generator: torch.Generator | None) -> Tensor:
        if not isinstance(x_0, Tensor):
            if not isinstance(x_0, Sequence) or not all(isinstance(n, int) for n in x_0):
                raise type_error("x_0", "a tensor or a shape", x_0)
            device = self.device
            if device is None:
                parameter = next(self.model.parameters(), None) if isinstance(self.model, torch.nn.Module) else None
                device = parameter.device if parameter is not None else getattr(generator, "device", None)
            return randn(x_0, dtype=self.dtype or torch.float32, device=device, generator=generator)
        check_float_tensor("x_0", x_0)
        return x_0.to(device=self.device, dtype=self.dtype)

    def sample(
        self,
        x_0: Tensor | Sequence[int],
        *,
        generator: torch.Generator | None = None,
        row_offset: int = 0,
        noise_transform: Transform | None = None,
        return_trajectory: bool = False,
        callback: Callback | None = None,
        progress: bool = False,
        **model_kwargs: Any,
    ) -> tuple[Tensor, SampleResult]:
        """Samples: see :func:`fmkernels.sample`."""
        check_transform(noise_transform)
        if torch.compiler.is_compiling():
            adaptive = self._adaptive_tableau()
        else:
            if not all(map(is_, _settings(self), self._checked)):
                self._check()
            adaptive = self._adaptive
        x = self._start(x_0, generator)
        if not isinstance(x_0, Tensor):
            x = transformed(noise_transform, x)
        if x.dim() == 0:
            raise value_error("x_0", "at least one dimension, of samples", x)
        if self.gradient == "reversible":
            return self._sample_reversible(x, return_trajectory, callback is not None or progress, model_kwargs)
        if adaptive is not None:
            return self._sample_adaptive(adaptive, x, return_trajectory, callback, progress, model_kwargs)
        program = self.plan()
        watcher = _watcher(program, callback, progress)
        if self.gradient != "none" and torch.is_grad_enabled():
            return self._sample_fixed(
                program, x, generator, row_offset, noise_transform, return_trajectory, watcher, model_kwargs
            )
        with torch.no_grad():
            graph = self._graph_refusal(x, noise_transform, return_trajectory, watcher, program)
            if graph is None:
                samples, how = replayed(self._wanted(x), program, x, generator, row_offset, model_kwargs)
                if samples is not None:
                    return samples, SampleResult(program.evaluations, program.steps, graph=how)
                graph = how
            return self._sample_fixed(
                program, x, generator, row_offset, noise_transform, return_trajectory, watcher, model_kwargs, graph
            )

    def grid(self) -> list[Number]:
        steps = DEFAULT_STEPS if self.steps is None else self.steps
        return grids.make_grid(steps, self.schedule, self.time_grid, waiting=True)

    def plan(self) -> Program:
        """The program of the fixed-grid method; the same object for the same settings."""
        method = self.method if self.sde is None else self.sde
        steps = DEFAULT_STEPS if self.steps is None else self.steps
        make = plan_while_compiling if torch.compiler.is_compiling() else plan
        return make(method, steps, self.schedule, self.time_grid, self.path, self.prediction, self.guidance)

    def calls(self, model_kwargs: dict[str, Any]) -> dict[str, Call]:
        """The network calls of each branch."""
        if self.guidance is not None:
            return self.guidance.calls(self.model, model_kwargs)
        model = self.model
        return {"": (lambda x, t: model(x, t, **model_kwargs)) if model_kwargs else model}

    def _wanted(self, x: Tensor) -> Wanted:
        return Wanted(self.model, self.calls, self.guidance, self.time_dtype_of(x), self.time_shape, self.cuda_graph)

    def time_dtype_of(self, x: Tensor) -> torch.dtype:
        return self.time_dtype or (torch.float64 if x.dtype == torch.float64 else torch.float32)

    def _graph_refusal(self, x: Tensor, transform: Any, trajectory: bool, watcher: Any, program: Program) -> str | None:
        """Why no graph is used, or None where one may be."""
        if self.cuda_graph is False:
            return "eager"
        if not x.is_cuda:
            reason = f"the state is on {x.device.type}"
        elif trajectory or watcher is not None:
            reason = "a trajectory, callback or progress bar wants the states between"
        elif program.streams and transform is not None:
            reason = "its noise goes through a function"
        elif program.extras:
            reason = "the method returns more than the samples"
        elif torch.compiler.is_compiling():
            reason = "torch.compile is tracing"
        else:
            return None
        if self.cuda_graph is True:
            raise RuntimeError(f"cuda_graph: expected a solve that can be captured, but {reason}")
        return f"eager: {reason}"

    def _sample_fixed(
        self,
        program: Program,
        x: Tensor,
        generator: torch.Generator | None,
        row_offset: int,
        noise_transform: Transform | None,
        return_trajectory: bool,
        watcher: Any,
        model_kwargs: dict[str, Any],
        graph: str = "eager",
    ) -> tuple[Tensor, SampleResult]:
        with_gradient = torch.is_grad_enabled() and self.gradient != "none"
        states: list[Tensor] = [x]

        def on_step(number: int, state: Tensor) -> None:
            if return_trajectory and with_gradient:
                states.append(state)
            if watcher is not None:
                watcher(number, state)

        reuse = not with_gradient and not torch.compiler.is_compiling()
        trajectory = None
        if return_trajectory and not with_gradient:
            trajectory = x.new_empty((program.steps + 1, *x.shape))
            trajectory[0].copy_(x)
        run = Run(
            program,
            self.calls(model_kwargs),
            x,
            numbers_for(program, x, self.time_dtype_of(x), self.time_shape, keep=not with_gradient),
            draw_seed(x.device, generator) if program.streams else None,
            row_offset=row_offset,
            noise_transform=noise_transform,
            reuse=reuse,
            trajectory=trajectory,
            on_step=on_step if watcher is not None or (return_trajectory and with_gradient) else None,
        )
        if self.gradient == "checkpoint" and with_gradient:
            run.checkpointed(max(1, round(program.steps**0.5)))
        else:
            run.all()
        samples = run.result
        if samples is x or trajectory is not None:  # the caller's, or a row of what is returned beside it
            samples = samples.clone()
        if return_trajectory and with_gradient:
            trajectory = torch.stack(states)
        extras = run.extras()
        log_prob = torch.stack(extras["log_prob"]) if "log_prob" in extras else None
        count = torch.stack(extras["log_prob_count"]) if "log_prob_count" in extras else None
        times = None
        if return_trajectory:
            times = table_of_numbers(program.grid).to(x.device, non_blocking=True)
        return samples, SampleResult(
            program.evaluations, program.steps, None, times, trajectory, log_prob, count, graph=graph
        )

    def _sample_adaptive(
        self,
        tableau: Tableau,
        x: Tensor,
        return_trajectory: bool,
        callback: Callback | None,
        progress: bool,
        model_kwargs: dict[str, Any],
    ) -> tuple[Tensor, SampleResult]:
        if callback is not None or progress:
            raise value_error("callback", "none with adaptive steps, which differ between samples", callback)
        grid = grids.make_grid(1, "uniform", self.time_grid)
        options = AdaptiveOptions(
            rtol=self.rtol,
            atol=self.atol,
            controller=self.controller,
            max_steps=self.max_steps,
            time_shape=self.time_shape,
            time_dtype=self.time_dtype,
        )
        t_eval = torch.as_tensor(np.asarray(grid)).to(x.device, non_blocking=True) if return_trajectory else None
        if self.guidance is not None:
            model_kwargs = self.guidance.per_sample(model_kwargs, x)
        velocity = Velocity(self.model, self.guidance, self.path, self.prediction)
        graph = None if self.cuda_graph is False else velocity.graph(self.cuda_graph)
        result = solve_adaptive(
            velocity, x, grid[0], grid[-1], tableau, options, t_eval=t_eval, model_kwargs=model_kwargs, graph=graph
        )
        nfe = round(result.n_f_evals * velocity.branches)
        return result.y, SampleResult(nfe, result.n_steps, result.status, t_eval, result.ys, graph=result.graph)

    def _sample_reversible(
        self, x: Tensor, return_trajectory: bool, watched: bool, model_kwargs: dict[str, Any]
    ) -> tuple[Tensor, SampleResult]:
        """The same scheme with and without gradients."""
        if watched:
            raise value_error("gradient", "no callback or progress bar beside 'reversible'", self.gradient)
        tableau = tableau_of(methods.resolve(self.method) if self.sde is None else self.sde)
        grid = [torch.as_tensor(t, dtype=torch.float64) for t in self.grid()]
        times = torch.stack(grid).to(x.device)
        steps, dtype = len(grid) - 1, self.time_dtype_of(x)
        field = Velocity(self.model, self.guidance, self.path, self.prediction)

        def time(t: Tensor) -> Tensor:
            t = t.to(dtype)
            return t.expand(x.shape[0]) if t.dim() == 0 and self.time_shape == "batch" else t

        kept = range(steps + 1) if return_trajectory else [steps]
        scheme = Scheme(lambda t, y: field(t, y, **model_kwargs), tableau, kept, time=time, name="model")
        states = solve_reversible(scheme, x, times, [self.model], list(model_kwargs.values()))
        where, trajectory = (times, states) if return_trajectory else (None, None)
        return states[-1], SampleResult(round(field.evaluations), steps, None, where, trajectory)


_settings = attrgetter(*(f.name for f in fields(Solver)))


def _watcher(program: Program, callback: Callback | None, progress: bool) -> Callable[[int, Tensor], None] | None:
    """What is told of each step."""
    if callback is None and not progress:
        return None
    bar, grid = None, program.grid
    if progress:
        from tqdm.auto import tqdm  # an optional dependency

        bar = tqdm(total=program.steps)

    def watch(number: int, state: Tensor) -> None:
        if callback is not None:
            callback(number, grid[number + 1], state.clone())  # the caller's own: the state's memory is written again
        if bar is not None:
            bar.update()
            if number + 1 == program.steps:
                bar.close()

    return watch
