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
grow by 1 / lambda a step on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..._checks import check_number, check_output, value_error
from ...ops.combine.op import combine
from ..programs.tables import accumulator
from .runge_kutta import RungeKutta
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
        used = RungeKutta(tableau).used
        dtype = accumulator(y)

        def scaled(weights: Sequence[float]) -> list[Any]:
            return [(h * w).to(dtype) for w in weights if w != 0.0]

        ks: list[Tensor] = []
        for c, row in zip(tableau.c[:used], tableau.a[:used], strict=True):
            chosen = [k for k, w in zip(ks, row, strict=True) if w != 0.0]
            state = combine([y, *chosen], [1.0, *scaled(row)]) if chosen else y
            k = self.field(self.time(t if c == 0.0 else u if c == 1.0 else t + c * h), state)
            check_output(self.name, k, y)
            ks.append(k)
        return [k for k, b in zip(ks, tableau.b, strict=False) if b != 0.0], scaled(tableau.b)

    def increment(self, t: Any, u: Any, y: Tensor) -> Tensor:
        return combine(*self.slopes(t, u, y))

    def forward(self, t: Any, u: Any, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        ks, weights = self.slopes(t, u, z)
        y = combine([y, z, *ks], [self.coupling, 1.0 - self.coupling, *weights])
        ks, weights = self.slopes(u, t, y)
        return y, combine([z, *ks], [1.0, *(-w for w in weights)])


class _Solve(torch.autograd.Function):
    """(kept states, the last z) of (scheme, y0, times (S + 1, ...) in float64, *inputs)."""

    @staticmethod
    def forward(ctx: Any, scheme: Scheme, y0: Tensor, times: Tensor, *inputs: Tensor) -> Tensor:
        y = z = y0.detach()
        wanted = set(scheme.kept)
        kept = [y] if 0 in wanted else []
        for n, (t, u) in enumerate(pairwise(times.detach().unbind(0)), start=1):
            y, z = scheme.forward(t, u, y, z)
            if n in wanted:
                kept.append(y)
        ctx.scheme = scheme
        ctx.save_for_backward(y, z, times, *inputs)
        return torch.stack(kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kept: Tensor) -> tuple[Tensor | None, ...]:
        scheme: Scheme = ctx.scheme
        y, z, times, *inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad
        tape = _Tape(scheme, inputs, needs[2])
        places = {n: i for i, n in enumerate(scheme.kept)}
        grad_times = torch.zeros_like(times) if needs[2] else None
        coupling = scheme.coupling
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
            y = combine([y, z, value], [1.0 / coupling, 1.0 - 1.0 / coupling, -1.0 / coupling])
            grad_z = combine([grad_z, of_z, grad_y], [1.0, 1.0, 1.0 - coupling])
            grad_y = coupling * grad_y
            if grad_times is not None:
                grad_times[n] += of_u + more_of_u
                grad_times[n - 1] += of_t + more_of_t
        grad_y = grad_y + grad_z
        if 0 in places:
            grad_y = grad_y + grad_kept[places[0]]
        return None, grad_y, grad_times, *tape.grads


class _Tape:
    """Differentiates increments and sums the gradients of what the field uses."""

    def __init__(self, scheme: Scheme, inputs: Sequence[Tensor], with_times: bool) -> None:
        self.scheme, self.inputs, self.with_times = scheme, list(inputs), with_times
        self.grads: list[Tensor | None] = [None] * len(self.inputs)

    def pull(self, t: Tensor, u: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Any, Any]:
        """Psi from t to u at y, and the gradients of grad . Psi to y, t and u."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            t, u = (x.detach().clone().requires_grad_(self.with_times) for x in (t, u))
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


def used_tensors(output: Tensor, known: Sequence[Tensor]) -> list[Tensor]:
    """The leaves with a gradient that an output depends on, not through the tensors known."""
    stops = {id(x.grad_fn) for x in known if x.grad_fn is not None}
    seen, leaves = set(stops), {}
    nodes = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            leaves[id(leaf)] = leaf
        nodes += [following for following, _ in node.next_functions]
    return [leaf for leaf in leaves.values() if not any(leaf is x for x in known)]


def solve_reversible(
    scheme: Scheme, y0: Tensor, times: Tensor, modules: Sequence[Any] = (), tensors: Sequence[Any] = ()
) -> Tensor:
    """The states after the kept steps, (len(kept), *y0.shape).

    Gradients flow to y0, times, the parameters of modules, the given tensors, and the leaves that one more call of the
    field shows it to use.

    Args:
        times: (S + 1,), or of a leading part of y0's shape each, (S + 1, B, ...); float64.
    """
    if not torch.is_grad_enabled():
        return _Solve.apply(scheme, y0, times)  # type: ignore[no-untyped-call, no-any-return]
    inputs = [x for x in tensors if isinstance(x, Tensor) and x.requires_grad]
    for module in modules:
        if isinstance(module, nn.Module):
            inputs += [p for p in module.parameters() if p.requires_grad]
    probe = scheme.field(scheme.time(times[0].detach()), y0.detach())
    check_output(scheme.name, probe, y0)
    inputs += used_tensors(probe, inputs)
    return _Solve.apply(scheme, y0, times, *inputs)  # type: ignore[no-untyped-call, no-any-return]


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
