"""A solver that keeps its settings between solves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from operator import attrgetter, is_
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..._arguments import check_named, tree_map, unknown_reason
from ..._checks import (
    check_bool,
    check_callable,
    check_choice,
    check_device,
    check_float_dtype,
    check_int,
    is_word,
    tensor_of,
    type_error,
    value_error,
)
from ..._gradients import check_unrecorded
from ..._torch import has_tangent, transform_active
from ...random import draw_seed
from ..adaptive.lowered import Lowered
from ..adaptive.solve import solve_adaptive
from ..methods.reversible import Scheme, StandIns, solve_reversible, tableau_of
from ..methods.sde import SDE
from ..methods.tableaus import Tableau
from ..programs.draws import Transform, check_transform, transformed
from ..programs.expressions import Number, shape_of
from ..programs.ownership import ordinary_memory, reading
from ..programs.program import Program
from ..programs.run import Call, Run
from ..programs.solve_graph import Wanted, replayed
from ..programs.tables import numbers_for, table_of_numbers
from . import grids
from .plan import plan, plan_while_compiling
from .result import SampleResult
from .settings import (
    DEFAULT_STEPS,
    FlowSettings,
    check_generator,
    network_kwargs,
    start_state,
)
from .velocity import FOLLOW, Velocity

Callback = Callable[[int, Any, Tensor], object]  # (step, t, x): t is a float, or an array on a grid of such
GRADIENTS = ("none", "direct", "checkpoint", "reversible")


@dataclass(eq=False)
class Solver(FlowSettings):
    """A model with a method, kept for repeated use: the plan, its tables and the captured graph stay between calls.

    All arguments are those of :func:`fmkernels.sample`. Each is an attribute: one that is changed is checked, and used
    from the next call on. Several threads may use one solver at once, and so may its own model or callback.

    Example:
        >>> solver = fm.Solver(model, method="heun2", steps=20)
        >>> x_1, result = solver.sample((64, 2))
    """

    _: KW_ONLY
    sde: SDE | None = None
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    cuda_graph: bool | Literal["auto"] = "auto"
    gradient: str = "none"

    def __post_init__(self) -> None:
        self.check()
        self._checked: tuple[Any, ...] | None = None

    def check(self) -> None:
        super().check()
        check_choice("gradient", self.gradient, GRADIENTS)
        if not isinstance(self.cuda_graph, bool) and not is_word(self.cuda_graph, "auto"):
            raise value_error("cuda_graph", "True, False or 'auto'", self.cuda_graph)
        if self.dtype is not None:
            check_float_dtype("dtype", self.dtype)
        if self.device is not None:
            check_device("device", self.device)
        if self.sde is not None:
            if not isinstance(self.sde, SDE):
                raise type_error("sde", "an fm.SDE", self.sde)
            if self.method != "euler":
                raise value_error("method", "none beside sde=, which has its own", self.method)
        if torch.compiler.is_compiling():
            return
        if self.tableau() is None:
            if self.sde is None:
                self.fixed_method()  # a wrong name is told here
        elif self.gradient != "none":
            raise value_error(
                "gradient", "'none' with adaptive steps (fm.odeint has gradients), or steps=", self.gradient
            )

    def _unchanged(self) -> bool:
        return self._checked is not None and all(map(is_, _settings(self), self._checked))

    def tableau(self) -> Tableau | None:
        return None if self.sde is not None else super().tableau()

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
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, SampleResult]:
        """Samples: see :func:`fmkernels.sample`."""
        if not torch.compiler.is_compiling() and not self._unchanged():
            self.check()  # settings may have changed since
            self._checked = _settings(self)
        given = network_kwargs((Solver.sample, Solver), self, kwargs, model_kwargs)
        return self.run(x_0, generator, row_offset, noise_transform, return_trajectory, callback, progress, given)

    def run(
        self,
        x_0: Tensor | Sequence[int],
        generator: torch.Generator | None,
        row_offset: int,
        noise_transform: Transform | None,
        return_trajectory: bool,
        callback: Callback | None,
        progress: bool,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, SampleResult]:
        """Samples with settings that are checked, and keyword arguments that are the model's."""
        if type(row_offset) is not int or row_offset:
            check_int("row_offset", row_offset, low=0)
        if generator is not None:
            check_generator(generator)
        if return_trajectory is not False:
            check_bool("return_trajectory", return_trajectory)
        if progress is not False:
            check_bool("progress", progress)
        if callback is not None:
            check_callable("callback", "a function callback(step, t, x)", callback)
        check_transform(noise_transform)
        x = start_state(x_0, self.model, generator, row_offset, self.dtype, self.device)
        if not isinstance(x_0, Tensor):
            x = transformed(noise_transform, x)
        recorded = self.gradient != "none" and torch.is_grad_enabled()
        if recorded:
            self.check_recorded()
        else:
            check_unrecorded("'direct'", "none")
        if self.gradient == "reversible":
            return self._sample_reversible(x, return_trajectory, callback is not None or progress, kwargs)
        tableau = self.tableau()
        if tableau is not None:
            return self._sample_adaptive(tableau, x, return_trajectory, callback, progress, kwargs)
        if recorded:
            program = self.plan()
            self.check_times(program.own_times, x)
            watcher = _watcher(program, callback, progress)
            return self._sample_fixed(
                program, x, generator, row_offset, noise_transform, return_trajectory, watcher, kwargs
            )
        with torch.no_grad():
            program = self.plan()
            self.check_times(program.own_times, x)
            watcher = _watcher(program, callback, progress)
            graph = self._graph_refusal(x, noise_transform, return_trajectory, watcher, program)
            if graph is None:
                samples, how = replayed(self._wanted(x), program, x, generator, row_offset, kwargs)
                if samples is not None:
                    return samples, SampleResult(program.evaluations, program.steps, graph=how)
                graph = how
            return self._sample_fixed(
                program, x, generator, row_offset, noise_transform, return_trajectory, watcher, kwargs, graph
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

    def calls(self, model_kwargs: dict[str, Any]) -> Mapping[str, Call]:
        """The network calls of each branch."""
        if self.guidance is not None:
            return self.guidance.calls(self.model, model_kwargs, self.said)
        check_named(self.said, model_kwargs)
        return {"": reading("model", self.model, model_kwargs)}

    def _wanted(self, x: Tensor) -> Wanted:
        return Wanted(
            self.model, self.calls, self.guidance, self.said, self.time_dtype_of(x), self.time_shape, self.cuda_graph
        )

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
            raise ValueError(f"cuda_graph: expected a solve that can be captured, got one that cannot: {reason}")
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
        in_place = not with_gradient and not transform_active()  # what transforms hide may not fit into a buffer
        states: list[Tensor] = [x]

        def on_step(number: int, state: Tensor) -> None:
            if return_trajectory and not in_place:
                states.append(state)
            if watcher is not None:
                watcher(number, state)

        reuse = in_place and not torch.compiler.is_compiling()
        trajectory = None
        if return_trajectory and in_place:
            with ordinary_memory():
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
            on_step=on_step if watcher is not None or (return_trajectory and not in_place) else None,
        )
        if self.gradient == "checkpoint" and with_gradient:
            if transform_active():  # a backward pass would compute again what has left its transforms
                raise value_error("gradient", "'direct' within torch.func's transforms and forward mode", "checkpoint")
            run.checkpointed(max(1, round(program.steps**0.5)))
        else:
            run.all()
        samples = run.result
        if samples is x or trajectory is not None:  # the caller's, or a row of what is returned beside it
            samples = samples.clone()
        if return_trajectory and not in_place:
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
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, SampleResult]:
        if callback is not None or progress:
            name, value = ("callback", callback) if callback is not None else ("progress", progress)
            raise value_error(name, "none with adaptive steps, which differ between samples", value)
        grid = grids.make_grid(1, "uniform", self.time_grid)
        self.check_times(shape_of(grid), x, tokens=False)
        start, end = (t if isinstance(t, float) else tensor_of(t) for t in (grid[0], grid[-1]))
        velocity = Velocity(self.model, self.guidance, self.path, self.prediction, self.said)
        arguments = velocity.arguments(kwargs, x)
        options, compaction = adaptive_options(self, x, velocity.unknown)
        times = tensor_of(np.asarray(grid)).to(x.device, non_blocking=True) if return_trajectory else None
        t_eval = None if times is None else times.t()  # (T,) as it is, (B, T) of (T, B)
        span = (start, end, tableau, options)
        if transform_active():
            compaction = "off: within torch.func's transforms"
            _refuse_tangent(x)
            lowered = Lowered(1, on_output=_refuse_tangent)
            result = lowered.solve(velocity, x, *span, t_eval=t_eval, arguments=arguments)
        else:
            graph = None if self.cuda_graph is False else velocity.graph(self.cuda_graph)
            result = solve_adaptive(velocity, x, *span, t_eval=t_eval, arguments=arguments, follow=FOLLOW, graph=graph)
        if not result.graph.startswith("eager"):
            compaction = "off: the steps are a captured graph"
        nfe = round(result.n_f_evals * velocity.evaluations_each(x))
        return result.y, SampleResult(
            nfe, result.n_steps, result.status, times, result.ys, graph=result.graph, compaction=compaction
        )

    def _sample_reversible(
        self, x: Tensor, return_trajectory: bool, watched: bool, kwargs: dict[str, Any]
    ) -> tuple[Tensor, SampleResult]:
        """The same scheme with and without gradients."""
        if watched:
            raise value_error("gradient", "no callback or progress bar beside 'reversible'", self.gradient)
        tableau = tableau_of(self.fixed_method() if self.sde is None else self.sde)
        numbers = self.grid()
        self.check_times(shape_of(numbers), x)
        grid = [tensor_of(t, torch.float64) for t in numbers]
        times = torch.stack(grid).to(x.device)
        steps, dtype = len(grid) - 1, self.time_dtype_of(x)
        velocity = Velocity(self.model, self.guidance, self.path, self.prediction, self.said)
        given = StandIns()
        arguments = tree_map(given, velocity.arguments(kwargs, x))

        def time(t: Tensor) -> Tensor:
            t = t.to(dtype)
            return t.expand(x.shape[0]) if t.dim() == 0 and self.time_shape == "batch" else t

        kept = range(steps + 1) if return_trajectory else [steps]
        scheme = Scheme(lambda t, y: velocity(t, y, **arguments), tableau, kept, time=time, name="model")
        states = solve_reversible(scheme, x, times, velocity.modules, given)
        where, trajectory = (times, states) if return_trajectory else (None, None)
        return states[-1], SampleResult(velocity.evaluations, steps, None, where, trajectory)


def _refuse_tangent(x: Tensor) -> None:
    if has_tangent(x):
        raise value_error(
            "gradient", "steps= or a method of fixed steps where forward mode differentiates, or fm.odeint", "none"
        )


def adaptive_options(settings: FlowSettings, x: Tensor, unknown: Sequence[str], **more: Any) -> tuple[Any, str]:
    """How an adaptive solve is controlled, and whether finished samples leave the batch: in words, for a result."""
    if not settings.compact:
        return settings.options(**more), f"off: compact={settings.compact}"
    options = settings.options(**more)
    if options.record:
        return options, "off: steps are recorded"
    if options.compact_below(x) == 0.0:
        return options, "off: a small state (compact='auto')"
    if len(x) == 1:
        return options, "off: one sample"
    if not unknown:
        return options, "on"
    if settings.compact != "auto":
        raise value_error("compact", f"batched= or shared= to name {', '.join(unknown)} beside it", settings.compact)
    return settings.options(compact=False, **more), unknown_reason(unknown)


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
            t = grid[number + 1]
            # the caller's own: the state's memory is written again, and the plan keeps its times
            callback(number, t.copy() if isinstance(t, np.ndarray) else t, state.clone())
        if bar is not None:
            bar.update()
            if number + 1 == program.steps:
                bar.close()

    return watch
