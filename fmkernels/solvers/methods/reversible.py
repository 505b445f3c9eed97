r"""Algebraically reversible Runge-Kutta solves: exact gradients of the scheme in memory constant in the steps.

With the increment :math:`\Psi_h(t, y) = h \sum_i b_i k_i` of any Runge-Kutta method, two copies of the state, both y_0
at first, take the step from t to u = t + h (McCallum and Foster 2024, "Efficient, accurate and stable gradients for
neural ODEs", arXiv 2410.11648)

.. math::
    y' = \lambda y + (1 - \lambda) z + \Psi_h(t, z), \qquad z' = z - \Psi_{-h}(u, y'),

of the method's order. It is solved backwards in closed form,

.. math:: z = z' + \Psi_{-h}(u, y'), \qquad y = \lambda^{-1} (y' - (1 - \lambda) z - \Psi_h(t, z)),

so that the backward pass makes the states again, one step at a time, from the last ones, and differentiates each step
there. It costs twice the network calls of the plain method, forward, and as many, recorded, backward. Rounding errors
grow by 1 / lambda a step on the way back. Where no time passes (a sample or token that waits), lambda is 1: both copies
stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._checks import as_state, check_number, value_error
from ..._gradients import Autocast, first_derivatives_only, present_autocast
from ..._torch import next_node_number, node_number, transform_active
from ...ops.combine.op import combine
from ..programs.tables import accumulator
from .runge_kutta import RungeKutta, take_stages
from .tableaus import Tableau

COUPLING = 0.999
Field = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Scheme:
    """A reversible scheme for one field.

    Args:
        field: (t, y) to dy/dt.
        tableau: of the Runge-Kutta method.
        kept: numbers of the steps after which the state is put out, from 0, ascending; the last one ends the solve.
        coupling: lambda, in (0, 1].
        time: a time of the grid in the field's shape and dtype.
        name: of the field in errors.
    """

    field: Field
    tableau: Tableau
    kept: Sequence[int]
    coupling: float = COUPLING
    time: Callable[[Tensor], Tensor] = lambda t: t
    name: str = "func"

    def slopes(self, t: Any, u: Any, y: Tensor) -> tuple[list[Tensor], list[Any]]:
        """The stages k_i of a step from t to u and their weights h b_i, those of weight 0 left out."""
        h, tableau = u - t, self.tableau
        dtype = accumulator(y)

        def scaled(weights: Sequence[float]) -> list[Any]:
            return [(h * w).to(dtype) for w in weights if w != 0.0]

        def state(row: Sequence[float], ks: list[Tensor]) -> Tensor:
            chosen = [k for k, w in zip(ks, row, strict=True) if w != 0.0]
            return combine([y, *chosen], [1.0, *scaled(row)]) if chosen else y

        def evaluate(state: Tensor, time: Any) -> Tensor:
            # its own: the field may write to what it is given, and have one buffer for its answers
            return as_state(self.name, self.field(self.time(time).clone(), state.clone()), y).clone()

        ks, _ = take_stages(tableau, t, u, state, evaluate, count=RungeKutta(tableau).used)
        return [k for k, b in zip(ks, tableau.b, strict=False) if b != 0.0], scaled(tableau.b)

    def increment(self, t: Any, u: Any, y: Tensor) -> Tensor:
        return combine(*self.slopes(t, u, y))

    def couplings(self, t: Any, u: Any, y: Tensor, power: int = 1) -> tuple[Any, Any]:
        """lambda^power and 1 - lambda^power of a step."""
        coupling = self.coupling**power
        still = (u - t).detach() == 0.0
        if still.dim() == 0:  # one step for all, which is none that waits
            return coupling, 1.0 - coupling
        ones = torch.ones_like(still, dtype=accumulator(y))
        return torch.where(still, ones, coupling), torch.where(still, 0.0 * ones, 1.0 - coupling)

    def forward(self, t: Any, u: Any, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        ks, weights = self.slopes(t, u, z)
        coupling, rest = self.couplings(t, u, y)
        y = combine([y, z, *ks], [coupling, rest, *weights])
        ks, weights = self.slopes(u, t, y)
        return y, combine([z, *ks], [1.0, *(-w for w in weights)])


class _Solved(NamedTuple):
    """A solve forward: the kept states, stacked, and both copies of the last state."""

    kept: Tensor
    y: Tensor
    z: Tensor


def _solve_forward(scheme: Scheme, y0: Tensor, times: Tensor) -> _Solved:
    y = z = y0
    wanted = set(scheme.kept)
    kept = [y] if 0 in wanted else []
    for n, (t, u) in enumerate(pairwise(times.unbind(0)), start=1):
        y, z = scheme.forward(t, u, y, z)
        if n in wanted:
            kept.append(y)
    return _Solved(torch.stack(kept), y, z)


class _Solve(torch.autograd.Function):
    """The kept states of (scheme, its solve, what the field uses, y0, times (S + 1, ...) in float64, *whose gradient
    that of what the field uses is)."""

    @staticmethod
    def forward(
        ctx: Any, scheme: Scheme, solved: _Solved, used: Sequence[Tensor], y0: Tensor, times: Tensor, *inputs: Tensor
    ) -> Tensor:
        ctx.scheme, ctx.used, ctx.autocast = scheme, used, present_autocast(y0.device)
        ctx.save_for_backward(solved.y, solved.z, times, solved.kept, *inputs)
        return solved.kept

    @staticmethod
    @first_derivatives_only("a reversible solve")
    def backward(ctx: Any, grad_kept: Tensor) -> tuple[Tensor | None, ...]:
        scheme: Scheme = ctx.scheme
        y, z, times, *_ = ctx.saved_tensors
        with_times = ctx.needs_input_grad[4]
        tape = _Tape(scheme, ctx.used, with_times, ctx.autocast)
        places = {n: i for i, n in enumerate(scheme.kept)}
        grad_times = torch.zeros_like(times) if with_times else None
        grad_y, grad_z = torch.zeros_like(y), torch.zeros_like(z)
        rows = times.detach().unbind(0)
        for n in range(len(rows) - 1, 0, -1):
            if n in places:
                grad_y = grad_y + grad_kept[places[n]]
            t, u = rows[n - 1], rows[n]
            # z' = z - Psi_{-h}(u, y')
            value, of_y, of_u, of_t = tape.pull(u, t, y, -grad_z)
            z = combine([z, value], [1.0, 1.0])
            grad_y = grad_y + of_y
            # y' = lambda y + (1 - lambda) z + Psi_h(t, z)
            value, of_z, more_of_t, more_of_u = tape.pull(t, u, z, grad_y)
            inverse, inverse_rest = scheme.couplings(t, u, y, -1)
            y = combine([y, z, value], [inverse, inverse_rest, -inverse])
            coupling, rest = scheme.couplings(t, u, y)
            grad_z = combine([grad_z, of_z, grad_y], [1.0, 1.0, rest])
            grad_y = combine([grad_y], [coupling])
            if grad_times is not None:
                grad_times[n] += of_u + more_of_u
                grad_times[n - 1] += of_t + more_of_t
        grad_y = grad_y + grad_z
        if 0 in places:
            grad_y = grad_y + grad_kept[places[0]]
        return None, None, None, grad_y, grad_times, *tape.grads


class _Tape:
    """Differentiates increments and sums the gradients of what the field uses."""

    def __init__(self, scheme: Scheme, inputs: Sequence[Tensor], with_times: bool, autocast: Autocast) -> None:
        self.scheme, self.inputs, self.with_times, self.autocast = scheme, list(inputs), with_times, autocast
        self.grads: list[Tensor | None] = [None] * len(self.inputs)

    def pull(self, t: Tensor, u: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Any, Any]:
        """Psi from t to u at y, and the gradients of grad . Psi to y, t and u."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            t, u = (x.detach().clone().requires_grad_(self.with_times) for x in (t, u))
            with self.autocast():
                value = self.scheme.increment(t, u, y)
            if not value.requires_grad:
                return value, torch.zeros_like(y), 0.0, 0.0
            own = [y, t, u] if self.with_times else [y]
            # what the inputs are made from may be shared between calls
            found = torch.autograd.grad(value, [*own, *self.inputs], grad, allow_unused=True, retain_graph=True)
        for i, new in enumerate(found[len(own) :]):
            old = self.grads[i]
            self.grads[i] = new if old is None else old if new is None else old + new
        of_y = torch.zeros_like(y) if found[0] is None else found[0]
        of_t, of_u = (0.0 if x is None else x for x in found[1:3]) if self.with_times else (0.0, 0.0)
        return value.detach(), of_y, of_t, of_u


class _UsedTensors:
    """A field that notes the leaves with a gradient that its outputs depend on, at whatever time they show.

    Args:
        known: leaves that are noted already.
        name: of the field, in the error.

    Raises:
        RuntimeError: in a call; it depends on a tensor with a graph from before the solve, of which the solve would not
            be a part.
    """

    def __init__(self, field: Field, known: Sequence[Tensor], name: str) -> None:
        self.field, self.leaves, self.name = field, {id(x): x for x in known}, name
        self._begin = next_node_number()

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        value = self.field(t, y)
        if not (isinstance(value, Tensor) and value.requires_grad):
            return value
        if value.grad_fn is None:
            self.leaves.setdefault(id(value), value)
        seen, nodes = set(), [value.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor):
                self.leaves.setdefault(id(leaf), leaf)
            elif node_number(node) < self._begin and not _is_cast_parameter(node):
                raise RuntimeError(
                    f"{self.name}: expected tensors with a gradient that are leaves (parameters), keyword arguments of "
                    "the network, or computed in the call, got one computed before the solve, whose own gradient a "
                    "reversible solve would leave out"
                )
            nodes += [following for following, _ in node.next_functions]
        return value.detach()


def _is_cast_parameter(node: Any) -> bool:
    """Whether a node is the cast of a leaf, as autocast keeps it for all calls: nobody else has that tensor."""
    before = [following for following, _ in node.next_functions if following is not None]
    return node.name() == "ToCopyBackward0" and all(isinstance(getattr(x, "variable", None), Tensor) for x in before)


class StandIns:
    """Leaves in the place of tensors with a gradient, for a field of a reversible solve. The graph behind a tensor is
    not the field's: what both use, an encoder's parameters beside what it made, would get its gradient twice."""

    def __init__(self) -> None:
        self.of: dict[int, tuple[Tensor, Tensor]] = {}  # by the leaf: it, and what it stands for

    def __call__(self, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()):
            return value
        leaf = value.detach().requires_grad_()
        self.of[id(leaf)] = leaf, value
        return leaf


def solve_reversible(
    scheme: Scheme, y0: Tensor, times: Tensor, modules: Sequence[Any] = (), given: StandIns | None = None
) -> Tensor:
    """The states after the kept steps, (len(kept), *y0.shape).

    Gradients flow to y0, times, the parameters of modules, the given tensors, and the leaves that the field is seen to
    use on the way.

    Args:
        given: what the field has in the place of tensors with a gradient.
        times: (S + 1,), or of a leading part of y0's shape each, (S + 1, B, ...); float64.
    """
    if transform_active():
        raise RuntimeError(
            "a reversible solve does not run within torch.func's transforms (vmap, grad, jacrev, jvp, ...) and "
            "forward-mode AD: its gradient is that of autograd alone"
        )
    start, grid = y0.detach(), times.detach()
    if not torch.is_grad_enabled():
        return _solve_forward(scheme, start, grid).kept
    stands_for = {} if given is None else given.of
    inputs = [leaf for leaf, _ in stands_for.values()]
    for module in modules:
        if isinstance(module, nn.Module):
            inputs += [p for p in module.parameters() if p.requires_grad]
    used, before = _UsedTensors(scheme.field, inputs, scheme.name), _random_states(y0)
    solved = _solve_forward(replace(scheme, field=used), start, grid)
    if not all(map(torch.equal, before, _random_states(y0))):
        raise RuntimeError(
            f"{scheme.name}: expected a field that draws no random numbers where the solve is reversible (dropout in "
            "training does): the way back would draw others; take gradient='direct' or checkpoints"
        )
    leaves = list(used.leaves.values())
    wanted = [stands_for[id(leaf)][1] if id(leaf) in stands_for else leaf for leaf in leaves]
    return _Solve.apply(scheme, solved, leaves, y0, times, *wanted)  # type: ignore[no-untyped-call, no-any-return]


def _random_states(y: Tensor) -> list[Tensor]:
    """Those of the generators a field draws from by default."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(y.device)] if y.is_cuda else states


def coupling_of(value: Any) -> float:
    """lambda: COUPLING for True, else the number given."""
    if value is True:
        return COUPLING
    check_number("reversible", value, above=0.0, high=1.0)
    return float(value)


def tableau_of(method: Any) -> Tableau:
    if not isinstance(method, RungeKutta):
        raise value_error("method", "an explicit Runge-Kutta method where the solve is reversible", method)
    return method.tableau
