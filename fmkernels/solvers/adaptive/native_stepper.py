"""Adaptive steps by the compiled library: one call of it between two network calls (python/step_call.h)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from ... import _dispatch, _native
from ..._checks import check_output
from ...ops.step_control.native import wanted_times
from ...ops.step_control.op import Clock
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
        problem, batch = self.problem, self.batch
        tableau, y, dense = problem.tableau, batch.y, batch.dense
        self._error = torch.empty(batch.rows, dtype=self.step_size.dtype, device=y.device)
        self._sizes = self._error.new_empty(2, batch.rows)
        self._workspace = _native.workspace(y, batch.rows)
        self._states = (y, self.y1)
        self._stage_times = self.time_views[1:]
        self._on_cpu = y.is_cpu
        self.plan = _native.library().StepPlan(
            self.y1,
            {
                "on_cpu": y.is_cpu,
                "dtype": _native.DTYPE_CODE[y.dtype],
                "rows": batch.rows,
                "inner": y.numel() // batch.rows,
                "steal": y.is_cpu and not self.copies_outputs,  # the host knows whether all rows accept
                "y": y.data_ptr(),
                "y1": self.y1.data_ptr(),
                "k0": self.k0.data_ptr(),
                "clock": batch.clock.data_ptr(),
                "count": batch.count.data_ptr(),
                "step": self.step_size.data_ptr(),
                "times": self.times.data_ptr(),
                "error": self._error.data_ptr(),
                "sizes": self._sizes.data_ptr(),
                "order": float(tableau.order),
                "workspace": 0 if self._workspace is None else self._workspace.data_ptr(),
                "time_dtype": _native.DTYPE_CODE[problem.time_dtype],
                "nodes": tableau.c,
                "rules": problem.rules.numbers(),
                "columns": tableau.columns,
                "weights": tableau.weights[:-1],
                "error_weights": tableau.weights[-1],
                "atol": float(problem.atol),
                "rtol": float(problem.rtol),
                "polynomials": tableau.interpolant,
                "wanted": wanted_times(None if dense is None else dense.wanted),
                "ids": 0 if dense is None or dense.ids is None else dense.ids.data_ptr(),
                "out": 0 if dense is None else dense.out.data_ptr(),
                "out_stride": 0 if dense is None else dense.out.stride(0),
            },
        )

    @property
    def derivative(self) -> Tensor:
        k0 = self.plan.stage(0)
        return self.k0 if k0 is None else k0

    def set_derivative(self, k: Tensor) -> None:
        if k is not self.k0 and (not self._on_cpu or self.copies_outputs):
            k = self.k0.copy_(k)
        self.plan.set_k0(k)

    def copy_outputs(self) -> None:
        super().copy_outputs()
        if hasattr(self, "plan"):
            self.plan.steal = False

    def begin(self, first_step: float | None) -> int:
        if self._on_cpu:
            return self._begin(first_step)
        with torch.cuda.device(self.y1.device):
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
        k = self.problem.func(self.time_views[1], self.y1, **batch.kwargs)
        if self.plan.begin(k) < 0:
            # evaluated again where an output overwrites another: the derivative at y may be lost
            check_output(self.problem.name, k, self.y1)
            if overlap(k, [self.derivative]):
                self.copy_outputs()
                self.set_derivative(self.evaluate(0, time, batch.y, ()))
                self.plan.trial(self._stream())
                k = self.problem.func(self.time_views[1], self.y1, **batch.kwargs)
            self.plan.begin(torch.empty_like(self.y1).copy_(k))
        return 2

    def _stream(self) -> int:
        return 0 if self._on_cpu else torch.cuda.current_stream().cuda_stream

    def step(self, on_step: Callable[[AdaptiveStep], Any] | None = None) -> Any:
        if self._on_cpu:
            return self._step(on_step)
        with torch.cuda.device(self.y1.device):
            return self._step(on_step)

    def _step(self, on_step: Callable[[AdaptiveStep], Any] | None) -> Any:
        plan, func, kwargs, y1 = self.plan, self.problem.func, self.batch.kwargs, self.y1
        plan.look = on_step is not None
        plan.first(self._stream())
        code = 0
        try:
            for number, t in enumerate(self._stage_times, 1):
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
        check_output(self.problem.name, k, self.y1)
        assert self._copies is not None
        return self._copies[number].copy_(k)

    def _take(self, k: Any, code: int) -> int:
        """Hands over an output that is not taken as it is."""
        check_output(self.problem.name, k, self.y1)
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
