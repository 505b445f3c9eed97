"""Adaptive steps by the compiled library: one call of it between two network calls (csrc/step_plan)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from ... import _dispatch, _native
from ..._checks import as_state
from ..._torch import storage_users
from ...ops.step_control.native import wanted_times
from ...ops.step_control.op import Clock
from ..programs.ownership import owned_memory, references_of
from .rows import Batch, Problem
from .stepper import AdaptiveStep, Restart, Stepper, overlap

# What StepPlan.next answers where it does not take an output.
OVERLAPS_STAGE = -2
OVERLAPS_STATE = -3


def make_stepper(problem: Problem, batch: Batch, *, copy: bool = False) -> Stepper:
    """The stepper for a batch: the compiled library's where it can run."""
    return (NativeStepper if runs_natively(problem, batch.y) else Stepper)(problem, batch, copy=copy)


def runs_natively(problem: Problem, y: Tensor) -> bool:
    impl = _dispatch.wanted(problem.impl)
    if impl not in ("auto", "native") or problem.slow_norm or not _dispatch.plain(y):
        return False
    return all(_dispatch.chosen(op, y.device.type, impl) == "native" for op in ("combine", "step_control"))


@final
class NativeStepper(Stepper):
    """A stepper whose linear combinations, control and row copies are calls of a StepPlan.

    On the CPU the host sees at once which rows accept. Where all do, y and the new state swap their buffers and the
    last network output becomes the derivative as it is: nothing is copied.
    """

    def prepare(self) -> None:
        batch, y = self.batch, self.batch.y
        self._error = torch.empty(batch.rows, dtype=self.step_size.dtype, device=y.device)
        self._sizes = self._error.new_empty(2, batch.rows)
        self._workspace = _native.workspace(y, batch.rows)
        self._on_cpu = _native.on_host(y)
        self._plan()

    def _plan(self) -> None:
        self._states = (self.batch.y, self.y1)
        self._memory, self._time_memory = [owned_memory(x) for x in self._states], owned_memory(self.times)
        self._stage_times = self.time_views[1:]
        self.plan = _native.library().StepPlan(self.y1, self._settings())
        self.plan.steal = self._on_cpu and not self.copies_outputs  # there the host knows whether all rows accept

    def let_go(self) -> None:
        """In the trial step."""
        self._let_go(None)

    def _let_go(self, stage: int | None) -> None:
        """Another plan in other memory, at the same place: the trial step, or a stage's output comes next."""
        old, derivative = self.plan, self.derivative
        super().let_go()
        self._plan()
        self.set_derivative(derivative)
        self.plan.look = old.look
        if stage is None:
            self.plan.trial(self._stream())
            return
        self.plan.first(self._stream())
        for number in range(1, stage):
            self.plan.next(old.stage(number))

    def _settings(self) -> Any:
        """What the plan is told, all of it by address; this stepper and its batch keep the memory alive."""
        problem, batch, library = self.problem, self.batch, _native.library()
        tableau, y, dense = problem.tableau, batch.y, batch.dense
        settings = library.StepPlanSettings()
        settings.tableau = library.StepTableau(
            tableau.c,
            tableau.columns,
            tableau.weights[:-1],
            tableau.weights[-1],
            tableau.interpolant,
            float(tableau.order),
        )
        settings.rules = library.StepRules(problem.rules.numbers())
        settings.atol, settings.rtol = float(problem.atol), float(problem.rtol)
        settings.on_cpu = self._on_cpu
        settings.dtype = _native.DTYPE_CODE[y.dtype]
        settings.time_dtype = _native.DTYPE_CODE[problem.time_dtype]
        settings.rows, settings.inner = batch.rows, y.numel() // batch.rows
        settings.y, settings.y1, settings.k0 = y.data_ptr(), self.y1.data_ptr(), self.k0.data_ptr()
        settings.clock, settings.count = batch.clock.data_ptr(), batch.count.data_ptr()
        settings.step, settings.times = self.step_size.data_ptr(), self.times.data_ptr()
        settings.error, settings.sizes = self._error.data_ptr(), self._sizes.data_ptr()
        settings.workspace = 0 if self._workspace is None else self._workspace.data_ptr()
        if dense is not None:
            settings.wanted = library.WantedTimes(wanted_times(dense.wanted))
            settings.ids = 0 if dense.ids is None else dense.ids.data_ptr()
            settings.out, settings.out_stride = dense.out.data_ptr(), dense.out.stride(0)
        return settings

    @property
    def derivative(self) -> Tensor:
        k0 = self.plan.stage(0)
        return self.k0 if k0 is None else k0

    def set_derivative(self, k: Tensor) -> None:
        if k is not self.k0 and (not self._on_cpu or self.copies_outputs):
            k = self.k0.copy_(k)
        if not self.plan.set_k0(k):  # another layout, a subclass
            self.plan.set_k0(self.k0.copy_(k))

    def copy_outputs(self) -> None:
        super().copy_outputs()
        if hasattr(self, "plan"):
            self.plan.steal = False

    def begin(self, first_step: float | None) -> int:
        if self._on_cpu:
            return self._begin(first_step)
        with _native.current_device(self.y1):
            return self._begin(first_step)

    def _begin(self, first_step: float | None) -> int:
        batch = self.batch
        time = self.time_view(batch.clock[Clock.T].to(self.problem.time_dtype))
        self.set_derivative(self.evaluate(0, time, batch.y, ()))
        if first_step is not None:
            self._error.fill_(first_step)
            self.plan.start(self._stream())
            return 1
        self.plan.trial(self._stream())
        k = self.call(self.time_views[1], self.y1)
        if self.plan.begin(k) < 0:
            # evaluated again where an output overwrites another: the derivative at y may be lost
            k = as_state(self.problem.name, k, self.y1)
            if overlap(k, [self.derivative]):
                self.copy_outputs()
                self.set_derivative(self.evaluate(0, time, batch.y, ()))
                self.plan.trial(self._stream())
                k = self.call(self.time_views[1], self.y1)
            self.plan.begin(torch.empty_like(self.y1).copy_(k))
        return 2

    def _stream(self) -> int:
        return 0 if self._on_cpu else _native.stream(self.y1)

    def step(self, on_step: Callable[[AdaptiveStep], Any] | None = None) -> Any:
        if self._on_cpu:
            return self._step(on_step)
        with _native.current_device(self.y1):
            return self._step(on_step)

    def _step(self, on_step: Callable[[AdaptiveStep], Any] | None) -> Any:
        plan, func, kwargs, lends = self.plan, self.problem.func, self.batch.kwargs, self.problem.lends
        plan.look = on_step is not None
        # the plan knows which buffer holds what, also after a step that an exception has left
        which = 1 - plan.first(self._stream())
        y1, (storage, users), copies = self._states[which], self._memory[which], lends and self.gives_copies
        last = len(self._stage_times)
        code = 0
        try:
            for number, t in enumerate(self._stage_times, 1):
                if copies:
                    k = func(t.clone(), y1.clone())
                elif lends:
                    references = references_of(t) + references_of(y1)
                    k = func(t, y1)
                    if (
                        references_of(t) + references_of(y1) != references
                        or storage_users(storage) != users
                        or y1.requires_grad
                        or t.requires_grad
                        # the times are written again when the step has ended
                        or (number == last and storage_users(self._time_memory[0]) != self._time_memory[1])
                    ):
                        copies = self.gives_copies = True
                        self._let_go(number)
                        plan, y1 = self.plan, self.y1
                else:
                    k = func(t, y1, **kwargs)
                code = plan.next(k) if self._copies is None else plan.next(self._copied(number, k))
                if code < 0:
                    code = self._take(k, code)
        except Restart:
            # The derivative at y may be lost too, where it is the network's own tensor.
            self.copy_outputs()
            t = self.time_view(self.batch.clock[Clock.T].to(self.problem.time_dtype))
            self.set_derivative(self.evaluate(0, t, self.batch.y, ()))
            return self._step(on_step)
        answer = None
        if on_step is not None:
            answer = on_step(AdaptiveStep(self))
            code = plan.move()
        current = code & 1
        self.batch.y, self.y1 = self._states[current], self._states[1 - current]
        if self._on_cpu:
            self.running = code >> 1
        return answer

    def _copied(self, number: int, k: Tensor) -> Tensor:
        k = as_state(self.problem.name, k, self.y1)
        assert self._copies is not None
        return self._copies[number].copy_(k)

    def _take(self, k: Any, code: int) -> int:
        """Hands over an output that is not taken as it is."""
        k = as_state(self.problem.name, k, self.y1)
        if code == OVERLAPS_STAGE:
            raise Restart
        if code == OVERLAPS_STATE:
            return self.plan.next(k.clone())
        # another layout, a subclass
        return self.plan.next(torch.empty_like(self.y1).copy_(k))

    @property
    def stages(self) -> list[Tensor]:  # type: ignore[override]
        return [self.derivative, *(self.plan.stage(s) for s in range(1, self.problem.tableau.stages))]

    @stages.setter
    def stages(self, value: list[Tensor]) -> None:
        """The plan holds them."""
