r"""Fixed-grid samplers as programs of linear updates.

Every fixed-grid sampler is :math:`x' = a x + \sum_j b_j m_j + c z` with numbers known before the solve. A method
therefore writes its step down in expressions: linear combinations of states, network outputs and noise, whose
coefficients are numbers (float64, one for all or one a sample or token). The builder turns an expression into one
update where a tensor is needed, so that predictions, schedules, guidance and multistep terms never cost a launch of
their own, and the program that comes out is a list of network calls and updates that one executor runs.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..._checks import tensor_of
from ..._keys import NoKey, is_ours, key_or_none
from ...ops._operands import MAX_TENSORS
from ...paths import Path
from ...paths.targets import conversion_coefficients
from .expressions import Expr, Number, as_number, at_index
from .plans import method_key, planned, settings_key
from .program import (
    Compute,
    EndStep,
    Evaluate,
    Instruction,
    Loop,
    LoopProgram,
    Operation,
    Program,
    Segment,
    Step,
    Update,
    Work,
)


class Guidance(Protocol):
    """How network outputs make the guided velocity: see :mod:`fmkernels.guidance`."""

    def velocity(self, builder: Builder, x: Expr, t: Number) -> Expr: ...


class Method(Protocol):
    """A fixed-grid method: writes its steps down in a builder."""

    def __call__(self, builder: Builder) -> None: ...


class Builder:
    """What a method sees: times, the state, and the model as a function from expressions to expressions.

    Args:
        grid: times t_0, ..., t_n, each a number or an array of the leading shape.
        path: the probability path, for conversions between predictions.
        prediction: what the network returns, a target of :mod:`fmkernels.paths.targets`.
        guidance: how its outputs are combined; None takes the one output.
    """

    def __init__(
        self,
        grid: Sequence[Number],
        path: Path,
        prediction: str = "velocity",
        guidance: Guidance | None = None,
    ) -> None:
        self.grid, self.path, self.prediction, self.guidance = list(grid), path, prediction, guidance
        self.memory: dict[Any, Any] = {}  # what a guidance or method keeps from step to step
        self.step = Step(0, self.grid[0], self.grid[-1])
        self._instructions: list[Instruction] = []
        self._times: list[Number] = []
        self._registers = 1
        self._streams = 0
        self._state = 0
        self._steps = 0
        self._extras: dict[str, list[int]] = {}
        self.still: np.ndarray | None = None  # who has no time to pass in the step; None where all have
        self.own_number: int | np.ndarray = 0  # of the step, counted without those in which one waited
        self._goal: Expr | None = None
        self._known: dict[Any, int] = {}
        self._conversions: dict[Any, tuple[Number, Number]] = {}
        self._converted: set[tuple[str, str]] = set()

    # ------------------------------------------------------------------ what a method writes

    @property
    def x(self) -> Expr:
        """The current state."""
        return Expr({self._state: 1.0})

    def steps(self) -> Iterator[Step]:
        """The intervals of the grid in order; each must end in :meth:`advance`."""
        for i, (t, u) in enumerate(zip(self.grid[:-1], self.grid[1:], strict=True)):
            self.step = Step(i, t, u)
            still = t == u if isinstance(t, np.ndarray) else None
            self.still = still if still is not None and still.any() else None
            yield self.step
            self.own_number = self.own_number + (1 if self.still is None else ~self.still)

    def advance(self, x: Expr) -> Expr:
        """Ends the step with the state x; what has no time to pass in it stays as it is, bit for bit."""
        if self._goal is not None:
            self._check_goal(x)
        self._state = self.register(self._held(x))
        self._instructions.append(EndStep(self.step.number, self._state))
        self._steps += 1
        return self.x

    def model(self, x: Expr, t: Number) -> Expr:
        """The (guided) velocity at the state x and time t."""
        if self.guidance is None:
            return self.evaluate(x, t)
        return self.guidance.velocity(self, self.keep(x), t)

    def noise(self) -> Expr:
        """Fresh standard normal noise, drawn where an update uses it.

        A method asks in every step for as many as a step can need: so a shard draws what the whole batch does, also
        where its own samples need none in a step.
        """
        self._streams += 1
        return Expr({-self._streams: 1.0})

    def convert(self, x: Expr, v: Expr, t: Number, target: str, source: str = "velocity") -> Expr:
        """The target (x_1, x_0, score, ...) that a prediction v means at the state x and time t."""
        if target == source:
            return v
        a, b = self.conversion(t, source, target)
        return a * x + b * v

    def keep(self, x: Expr) -> Expr:
        """The expression as one state: a single update, or none where it is one already."""
        return Expr({self.register(x): 1.0})

    # ------------------------------------------------------------------ what a guidance writes

    def evaluate(self, x: Expr, t: Number, branch: str = "") -> Expr:
        """The velocity from one call of the network."""
        return self.evaluate_all(x, t, branch, 1)[0]

    def evaluate_all(self, x: Expr, t: Number, branch: str, count: int, prediction: str | None = None) -> list[Expr]:
        """The velocities from one call that returns ``count`` outputs.

        Args:
            prediction: what they are, if not what the network returns; "velocity" leaves them as they are.
        """
        state = self.keep(self._held(x))
        results = tuple(range(self._registers, self._registers + count))
        self._registers += count
        self._times.append(t)
        (source,) = state.terms
        self._instructions.append(Evaluate(branch, source, len(self._times) - 1, results))
        source_kind = prediction or self.prediction
        return [self.convert(state, Expr({r: 1.0}), t, "velocity", source_kind) for r in results]

    def compute(self, function: Work | Operation, sources: Sequence[Expr], count: int) -> list[Expr]:
        """Registers from a function of tensors: row reductions and what is not linear with known coefficients.

        Noise alone is given as a :class:`fmkernels.solvers.programs.draws.Draw`.
        """
        registers = tuple(self._drawn(x) or self.register(x) for x in sources)
        results = tuple(range(self._registers, self._registers + count))
        self._registers += count
        self._instructions.append(Compute(function, registers, results))
        return [Expr({r: 1.0}) for r in results]

    def expect(self, goal: Expr) -> None:
        """Says where the method must end the step: for a rule that decides it, through the velocity that it gives."""
        self._goal = goal

    def _check_goal(self, x: Expr) -> None:
        goal, self._goal = self._goal, None
        assert goal is not None
        goal = self._held(goal)
        ends = self._held(x)
        largest = max((np.max(np.abs(c)) for c in goal.terms.values()), default=0.0)
        for base in {*goal.terms, *ends.terms}:
            wanted, got = (terms.get(base, 0.0) for terms in (goal.terms, ends.terms))
            if not np.allclose(wanted, got, rtol=1e-9, atol=1e-9 * largest):
                raise ValueError(
                    "method: expected one whose steps the guidance decides (one call, no past, no noise: 'euler', or "
                    f"'ddim' for step='ddim'); step {self.step.number} ends elsewhere"
                )

    def _held(self, x: Expr) -> Expr:
        """x, and the state itself where no time passes in the step: a token of a grid of its own may wait."""
        still = self.still
        own = x.terms.get(self._state)
        if still is None or (len(x.terms) == 1 and isinstance(own, float) and own == 1.0):
            return x
        terms: dict[int, Number] = {base: np.where(still, 0.0, c) for base, c in x.terms.items()}
        terms[self._state] = np.where(still, 1.0, 0.0 if own is None else own)
        return Expr(terms)

    @staticmethod
    def _drawn(x: Expr) -> int:
        """The noise that the expression is, or 0."""
        ((base, coefficient),) = x.terms.items() if len(x.terms) == 1 else ((0, 0.0),)
        return base if base < 0 and isinstance(coefficient, float) and coefficient == 1.0 else 0

    def output(self, name: str, x: Expr) -> None:
        """Keeps a register for the caller, as one more entry of result.extras[name]."""
        self._extras.setdefault(name, []).append(self.register(x))

    # ------------------------------------------------------------------ the rest

    def conversion(self, t: Number, source: str, target: str) -> tuple[Number, Number]:
        """(a, b) with target = a x_t + b prediction at time t."""
        if isinstance(t, Tensor):
            return conversion_coefficients(self.path, t, source, target)
        known, key = self._conversions, (_key(t), source, target)
        if key not in known and (source, target) not in self._converted:
            # of all grid times at once: one by one they would take longer than all else that a method does
            self._converted.add((source, target))
            if not any(isinstance(time, Tensor) for time in self.grid):
                a, b = self._conversion(np.asarray(self.grid, dtype=np.float64), source, target)
                known.update(
                    {(_key(u), source, target): (at_index(a, i), at_index(b, i)) for i, u in enumerate(self.grid)}
                )
        if key not in known:
            known[key] = self._conversion(t, source, target)
        return known[key]

    def _conversion(self, t: Number, source: str, target: str) -> tuple[Number, Number]:
        a, b = conversion_coefficients(self.path, tensor_of(t, torch.float64), source, target)
        return as_number(a, "path"), as_number(b, "path")

    def register(self, x: Expr) -> int:
        """The register that holds the expression, by an update unless it is there."""
        terms = {base: c for base, c in x.terms.items() if not (isinstance(c, float) and c == 0.0)}
        if len(terms) == 1:
            ((base, coefficient),) = terms.items()
            if base >= 0 and isinstance(coefficient, float) and coefficient == 1.0:
                return base
        if not terms:
            terms = {self._state: 0.0}
        if len(terms) > MAX_TENSORS:  # more than one launch takes
            bases = sorted(terms)
            head, tail = bases[:MAX_TENSORS], bases[MAX_TENSORS:]
            return self.register(self.keep(Expr({b: terms[b] for b in head})) + Expr({b: terms[b] for b in tail}))
        if all(isinstance(c, float) for c in terms.values()):
            known = self._known.get(key := tuple(sorted(terms.items())))
            if known is not None:
                return known
        else:
            key = None
        # the state first: it decides dtype and layout, and an update may be nothing but noise
        bases = sorted(terms, key=lambda base: (base < 0, base))
        if bases[0] < 0:
            bases.insert(0, self._state)
            terms[self._state] = 0.0
        result = self._registers
        self._registers += 1
        # floats of numpy's are floats to Python but not to torch.compile
        coefficients = (float(c) if isinstance(c := terms[base], float) else c for base in bases)
        self._instructions.append(Update(result, tuple(bases), tuple(coefficients)))
        if key is not None:
            self._known[key] = result
        return result

    def plan(self, method: Method) -> Program:
        """The program of a method on this builder's grid: the same object for equal settings, see
        :mod:`fmkernels.solvers.programs.plans`."""
        return planned(self._key(method), lambda: self.write(method))

    def write(self, method: Method) -> Program:
        """A new program of the method."""
        if self._has_equal_steps(method):
            return self._looped(method)
        method(self)
        return self.program()

    def _key(self, method: Method) -> Hashable | None:
        try:
            grid = grid_key(self.grid)
            return None if grid is None else (type(self), method_key(method), self._settings(), grid)
        except (NoKey, RecursionError):
            return None

    def _settings(self) -> Hashable:
        """What the program depends on beside the method and the grid.

        Raises:
            NoKey: that cannot be told.
        """
        if not is_ours(type(self)):
            raise NoKey
        return settings_key(self.path, self.prediction, self.guidance)

    def _has_equal_steps(self, method: Method) -> bool:
        return (
            getattr(method, "equal_steps", False) is True
            and type(self) is Builder
            and self.guidance is None
            and len(self.grid) > 2
            and all(type(t) is float for t in self.grid)
        )

    def _looped(self, method: Method) -> Program:
        """All steps at once: one step, with the times of all in the place of its own."""
        times = np.asarray(self.grid, dtype=np.float64)
        step = type(self)([times[:-1], times[1:]], self.path, self.prediction)
        method(step)
        evaluated = np.stack([np.broadcast_to(t, times[1:].shape) for t in step._times], -1)
        loop = Loop(tuple(step._instructions), evaluated, step._registers, step._state)
        return LoopProgram(loop, self.grid)

    def program(self) -> Program:
        """The program of what was written."""
        if self._steps != max(len(self.grid) - 1, 0):
            raise ValueError(
                f"method: expected one that ends each of its {len(self.grid) - 1} steps by builder.advance, "
                f"got one that ended {self._steps}"
            )
        extras = tuple((name, tuple(registers)) for name, registers in self._extras.items())
        kept = tuple(register for _, registers in extras for register in registers)
        segment = Segment(tuple(self._instructions), self._registers, self._state, kept)
        # those that are drawn, and the ones between
        drawn = (-s for i in self._instructions if isinstance(i, Update | Compute) for s in i.sources if s < 0)
        return Program(segment, self.grid, self._times, max(drawn, default=0), extras)


def grid_key(grid: Sequence[Number]) -> Hashable | None:
    """Times as a key, or None for times that are tensors."""
    kinds = set(map(type, grid))
    if kinds == {float}:
        return array("d", map(float, grid)).tobytes()
    return key_or_none(*grid) if kinds == {np.ndarray} else None


def _key(t: Number) -> Hashable:
    if isinstance(t, float):
        return t
    assert isinstance(t, np.ndarray)
    return t.shape, t.tobytes()
