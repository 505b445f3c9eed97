"""Adaptive steps by the engine of csrc/step_plan as Python drives it; tests/cpp/test_step_plan.cpp has the engine."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from fmkernels.ops.step_control.op import new_state
from fmkernels.solvers.adaptive.native_stepper import OVERLAPS_STAGE, OVERLAPS_STATE, NativeStepper
from fmkernels.solvers.adaptive.options import AdaptiveOptions
from fmkernels.solvers.adaptive.rows import Batch, Field
from fmkernels.solvers.methods.tableaus import TABLEAUS

BOSH3 = TABLEAUS["bosh3"]


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def stepper_of(func: Field, y: Tensor) -> NativeStepper:
    """A stepper from t = 0 to 1, at its first step."""
    rows = y.shape[0]
    batch = Batch(y.clone(), *new_state(*torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, rows)), {})
    stepper = NativeStepper(AdaptiveOptions(rtol=1e-6, atol=1e-6).problem(func, BOSH3, y.dtype), batch)
    stepper.begin(None)
    return stepper


@pytest.mark.host
@torch.no_grad()
@pytest.mark.parametrize("rows", [3, 40_000])  # on both sides of where Python's lock is given away
def test_outputs_whose_strides_differ_in_a_dimension_of_size_1_are_taken_as_they_lie(rows: int) -> None:
    y = torch.rand(rows, 1)
    plain, turned = stepper_of(decay, y), stepper_of(lambda t, y: (-y.reshape(1, -1)).t(), y)
    strides = turned.plan.stage(0).stride()
    assert strides == (1, rows)  # as it came, and so not copied
    for _ in range(4):
        plain.step()
        turned.step()
    assert torch.equal(plain.batch.y, turned.batch.y)


@torch.no_grad()
def test_outputs_with_a_negative_bit_are_resolved() -> None:
    def lazily(t: Tensor, y: Tensor) -> Tensor:
        k = torch.complex(torch.zeros_like(y), y).conj().imag
        assert k.is_neg()
        return k

    y = torch.rand(1, 1)
    plain, lazy = stepper_of(decay, y), stepper_of(lazily, y)
    for _ in range(4):
        plain.step()
        lazy.step()
    assert torch.equal(plain.batch.y, lazy.batch.y)


@torch.no_grad()
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_step_that_an_exception_left_is_taken_again(error: type[BaseException]) -> None:
    calls = 0

    def fails(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            raise error
        return -y

    y = torch.rand(7, 3)
    whole, left = stepper_of(decay, y), stepper_of(fails, y)
    for _ in range(6):
        whole.step()
        try:
            left.step()
        except error:
            left.step()
    assert calls > 20
    assert torch.equal(whole.batch.y, left.batch.y)
    assert torch.equal(whole.batch.clock, left.batch.clock)


@torch.no_grad()
def test_calls_out_of_order_are_refused() -> None:
    plan = stepper_of(decay, torch.rand(2, 3)).plan
    for call in (lambda: plan.next(torch.rand(2, 3)), lambda: plan.move()):
        with pytest.raises((RuntimeError, ValueError)):
            call()


@torch.no_grad()
def test_a_step_that_was_judged_and_left_is_not_moved_later() -> None:
    """first() forgets the step before, so that move() cannot end the new one half way."""
    stepper = stepper_of(decay, torch.rand(2, 3))
    plan, y = stepper.plan, stepper.batch.y.clone()
    plan.look = True

    def stages(which: int) -> None:
        for _ in range(1, BOSH3.stages):
            assert plan.next(-stepper._states[1 - which]) == 0

    stages(plan.first(0))  # judged, and left
    which = plan.first(0)
    with pytest.raises((RuntimeError, ValueError)):
        plan.move()
    assert torch.equal(stepper._states[which], y)
    stages(which)
    assert not torch.equal(stepper._states[plan.move() & 1], y)


@pytest.mark.host  # where the derivative's own buffer may hold none
@torch.no_grad()
def test_an_output_in_any_memory_of_the_solve_is_told() -> None:
    """Also where a move puts the derivative of rows that were rejected, though it holds none now."""
    stepper = stepper_of(decay, torch.rand(2, 3))
    plan = stepper.plan
    plan.first(0)
    assert plan.stage(0) is not None  # the network's own tensor, so that k0 is free
    for tensor in (stepper.batch.y, stepper.y1, stepper.k0):
        assert plan.next(tensor) == OVERLAPS_STATE
    assert plan.next(stepper.derivative) == OVERLAPS_STAGE


@torch.no_grad()
def test_one_plan_in_two_threads_works_or_says_so() -> None:
    """A call that finds another under way, without Python's lock, raises; it never runs into its buffers."""
    stepper = stepper_of(decay, torch.rand(64, 20_000))
    plan, errors, done = stepper.plan, [], threading.Event()

    def intrude() -> None:
        while not done.is_set():
            try:
                plan.set_k0(stepper.derivative)
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=intrude)
    thread.start()
    try:
        for _ in range(20):
            try:
                plan.first(0)
            except RuntimeError as error:
                errors.append(error)
    finally:
        done.set()
        thread.join()
    assert errors
    assert all(type(error) is RuntimeError and "one call at a time" in str(error) for error in errors), errors[:3]


def test_settings_have_no_field_of_another_name() -> None:
    from fmkernels import _native

    settings: Any = _native.library().StepPlanSettings()
    with pytest.raises(AttributeError):
        settings.row = 3
