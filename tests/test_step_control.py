"""The control of adaptive steps: the compiled formula against the one in PyTorch, on random states, and its rules."""

from __future__ import annotations

import math

import pytest
import torch
from rounding import assert_rounded
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fmkernels import _dispatch
from fmkernels.ops.step_control.op import MAX_FAILURES, Clock, Count, Rules, Status, new_state, step_control
from fmkernels.solvers.adaptive.controllers import Controller, IController, PIController, PIDController

NODES = (0.0, 0.2, 0.3, 0.8, 8 / 9, 1.0, 1.0)
IMPLS = ["reference"] + (["native"] if _dispatch.unavailable("native", "cpu") is None else [])


def rules(controller: Controller | None = None, order: int = 5, **changes: float) -> Rules:
    controller = controller or IController()
    made = Rules(
        controller.exponents(order),
        controller.safety,
        controller.ifactor,
        controller.dfactor,
        controller.least_growth,
        0.0,
        math.inf,
        100,
        False,
        NODES,
    )
    return made._replace(**changes)


class State:
    """Rows from t0 to t1, in a state that a solve can be in, and what the control writes."""

    def __init__(self, t0: Tensor, t1: Tensor, dtype: torch.dtype = torch.float64) -> None:
        self.clock, self.count = new_state(t0, t1)
        self.step = torch.full(t0.shape, math.nan, dtype=dtype)
        self.times = torch.full((len(NODES), *t0.shape), math.nan, dtype=dtype)

    def copy(self) -> State:
        other = object.__new__(State)
        for name, value in vars(self).items():
            setattr(other, name, value.clone())
        return other

    def control(
        self, error: Tensor, rules: Rules, impl: str, wanted: Tensor | None = None, start: bool = False
    ) -> None:
        step_control(self.clock, self.count, self.step, self.times, error, rules, wanted, start=start, impl=impl)

    def __getitem__(self, row: Clock | Count) -> Tensor:
        return (self.clock if isinstance(row, Clock) else self.count)[row]


def random_state(seed: int, rows: int = 300) -> tuple[State, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def draw(low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(rows, generator=rng, dtype=torch.float64)

    t0 = draw(-1, 1)
    t1 = torch.where(draw() < 0.1, t0, draw(-2, 2))
    state = State(t0, t1)
    progress = draw()
    state.clock[Clock.T] = t0 + progress * (t1 - t0)
    state.clock[Clock.H] = torch.where(draw() < 0.3, t1 - state[Clock.T], (t1 - t0) * 10 ** draw(-6, 0))
    state.clock[Clock.RATIO_1] = 10 ** draw(-6, 0)
    state.clock[Clock.RATIO_2] = 10 ** draw(-6, 0)
    state.count[Count.STATUS] = (draw() < 0.2).int() * (1 + (draw() * 4).int())
    state.clock[Clock.H][state[Count.STATUS] != 0] = 0
    state.count[Count.STEPS] = (draw() * 110).int()
    state.count[Count.FAILURES] = (draw() < 0.2).int() * (draw() * (MAX_FAILURES + 1)).int()
    error = 10 ** draw(-12, 3)
    for value in (0.0, 1.0, math.nan, math.inf):
        error[draw() < 0.05] = value
    wanted = torch.sort(torch.rand(rows, 9, generator=rng, dtype=torch.float64), dim=1).values
    wanted = t0[:, None] + wanted * (t1 - t0)[:, None]
    wanted[:, -1] = t1
    state.count[Count.NEXT_OUTPUT] = (draw() * 4).int()
    return state, error, wanted


@pytest.mark.skipif("native" not in IMPLS, reason="there is no compiled library")
@pytest.mark.parametrize("controller", [IController(), PIController(), PIDController()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(
    "changes",
    [{}, {"min_step": 1e-3, "max_step": 0.3}, {"min_step": 1e-2, "force_min_step": True}, {"max_steps": 0}],
    ids=str,
)
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float32, torch.float32)], ids=str)
def test_compiled_and_reference_agree(controller: Controller, changes: dict, dtypes: tuple) -> None:
    made = rules(controller, **changes)
    for seed in range(2):
        state, error, wanted = random_state(seed)
        state.step, state.times = state.step.to(dtypes[0]), state.times.to(dtypes[1])
        for_all = wanted[:1].expand(300, -1)
        for start in (False, True):
            for times in (None, wanted, for_all):
                states = [state.copy(), state.copy()]
                for one, impl in zip(states, ("reference", "native"), strict=True):
                    one.control(error.abs().to(dtypes[0]), made, impl, times, start)
                a, b = states
                # times for all are in order for the rows that go the same way
                direction = state[Clock.T_END] - state[Clock.T_FROM]
                fits = slice(None) if times is not for_all else direction * direction[0] > 0
                assert torch.equal(a.count[:, fits], b.count[:, fits])
                # three powers, each within two roundings, and their products, on either side
                assert_rounded(a.clock, b.clock, 18)
                assert_rounded(a.step, b.step, 18, of=torch.float64)
                assert_rounded(a.times, b.times, 20, size=b[Clock.T].abs() + b[Clock.H].abs(), of=torch.float64)
                assert not a.step.isnan().any()
                assert not a.times.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_times(dtype: torch.dtype) -> None:
    state, error, _ = random_state(0)
    state.times = state.times.to(dtype)
    states = [state.copy() for _ in IMPLS]
    for one, impl in zip(states, IMPLS, strict=True):
        one.control(error, rules(), impl)
    for one in states:
        assert_rounded(one.times, states[0].times, 2)


@pytest.mark.parametrize("impl", IMPLS)
def test_rules_by_hand(impl: str) -> None:
    """One row of each kind; the factors are those of SOLVERS' formulas."""
    zero, one = torch.zeros(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    state = State(zero, one)
    state.control(0.1 * one, rules(), impl, start=True)
    assert torch.equal(state.step, 0.1 * one)
    assert_rounded(state.times, torch.tensor(NODES, dtype=torch.float64)[:, None] * 0.1 * one, 2)
    error = torch.tensor([0.0, 0.5, 0.9, 1.0, 2.0, 1e9, math.nan], dtype=torch.float64)
    state.control(error, rules(), impl)
    assert state[Count.ACCEPT].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert state[Count.FAILURES].tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert torch.equal(state[Clock.T], 0.1 * state[Count.ACCEPT].double())
    # growth within [1, 10] where e < 1, shrinking to 0.2 at most
    factors = [10.0, 0.9 * 0.5**-0.2, 1.0, 0.9, 0.9 * 2**-0.2, 0.2, 0.2]
    steps = torch.tensor(factors, dtype=torch.float64) * 0.1
    steps[0] = 0.9  # 1.0 would go beyond the end
    assert_rounded(state.step, steps, 8)  # a power and two products on either side
    assert state.times[-1, 0] == 1.0


@pytest.mark.parametrize("impl", IMPLS)
def test_history_of_errors(impl: str) -> None:
    """PID: the errors of accepted steps count, those of rejected ones do not stay."""
    made = rules(PIDController(0.3, 0.5, 0.1, dfactor=0.001, ifactor=1000.0), order=4)
    state = State(torch.zeros(1, dtype=torch.float64), torch.full((1,), 1e9, dtype=torch.float64))
    state.control(torch.ones(1, dtype=torch.float64), made, impl, start=True)
    h, e1, e2, rounds = 1.0, 1.0, 1.0, 0
    for error in (0.3, 0.02, 5.0, 0.4, 0.9):
        state.control(torch.tensor([error], dtype=torch.float64), made, impl)
        factor = 0.9 * error ** (-0.9 / 4) * e1 ** (0.5 / 4) * e2 ** (-0.1 / 4)
        if error > 1:
            factor = min(factor, 0.9)
        else:
            e1, e2 = error, e1
        h *= factor
        rounds += 18  # three powers and their products, on either side
        assert_rounded(state.step, torch.tensor([h], dtype=torch.float64), rounds)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_last_step_is_tiny(impl: str) -> None:
    """A step that would leave less than a hundredth of itself goes to the end, unless max_step forbids."""
    for size, max_step, want in [
        (0.995, math.inf, 1.0),
        (0.98, math.inf, 0.98),
        (0.995, 0.995, 0.995),
        (3.0, 5.0, 1.0),
    ]:
        state = State(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        state.control(torch.full((1,), size, dtype=torch.float64), rules(max_step=max_step), impl, start=True)
        assert float(state.step) == want


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_never_becomes_finite_ends(impl: str) -> None:
    state = State(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    state.control(torch.tensor([0.1, math.nan], dtype=torch.float64), rules(), impl, start=True)
    assert state[Count.STATUS].tolist() == [Status.RUNNING, Status.NON_FINITE]
    for _ in range(MAX_FAILURES):
        assert state[Count.STATUS][0] == Status.RUNNING
        state.control(torch.full((2,), math.inf, dtype=torch.float64), rules(), impl)
    assert state[Count.STATUS].tolist() == [Status.NON_FINITE] * 2
    assert state[Count.STEPS].tolist() == [MAX_FAILURES, 0]
    assert state.step.tolist() == [0, 0]


def test_operator_check() -> None:
    state, error, wanted = random_state(0, rows=5)
    arguments = (
        state.clock,
        state.count,
        state.step,
        state.times,
        error,
        rules().numbers(),
        list(NODES),
        wanted,
        False,
    )
    torch.library.opcheck(
        torch.ops.fmkernels.step_control, (*arguments, "auto"), test_utils=("test_schema", "test_faketensor")
    )


def test_there_is_no_triton_kernel_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "unavailable", lambda impl, device_type: None)  # Triton itself can run
    state, error, _ = random_state(0)
    with pytest.raises(RuntimeError, match=r"impl: expected an available implementation of step_control.*no triton"):
        state.control(error, rules(), "triton")


def test_shapes_alone_can_be_controlled() -> None:
    with FakeTensorMode():
        state = State(torch.zeros(3), torch.ones(3))
        state.control(torch.ones(3, dtype=torch.float64), rules(), "auto")
        assert state.clock.shape == (len(Clock), 3)
