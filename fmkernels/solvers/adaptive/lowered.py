r"""Adaptive solves within torch.func's transforms: on the plain tensors beneath them, with the function above.

The steps of a solve are chosen by values, which transforms hide. So the solve runs as if no transform were active, on
the values beneath, in which a dimension that vmap hides is one of the state; its function alone runs within the
transforms, on the state as they show it. That finds the values and the steps. Derivatives are those of the accepted
steps taken again within the transforms.

A closed-over parameter may have a hidden dimension that the state lacks. It shows in an output of the function, and
the solve begins again with a state that has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, final

from torch import Tensor

from ... import _torch
from ..._checks import as_state
from ..methods.tableaus import Tableau
from .gradient_watch import watched
from .options import AdaptiveOptions
from .rows import Field, Norm, root_mean_square
from .solve import AdaptiveResult, solve_adaptive


@final
class _FoundLevel(Exception):
    """An output has a hidden dimension that the state lacks."""


@final
class Lowered:
    """A solve beneath the active transforms.

    The step size is shared by the entries of a vmap: the error norm is the largest one among them, so that each entry
    meets the tolerances by itself.

    Args:
        place: where a state has its hidden dimensions: 0, or 1 where dimension 0 is that of the rows.
        on_output: looks at each output of the function, within the transforms.
    """

    def __init__(self, place: int, on_output: Callable[[Tensor], object] | None = None) -> None:
        self.place, self.on_output = place, on_output
        self.sizes: dict[int, int] = {}  # of the hidden dimensions, by their level
        self._within: _torch.Within | None = None

    def solve(
        self,
        func: Field,
        y0: Tensor,
        t0: float | Tensor,
        t1: float | Tensor,
        tableau: Tableau,
        options: AdaptiveOptions,
        *,
        t_eval: Tensor | None = None,
        watching: bool = False,
        again: Callable[[], object] | None = None,
        norm: Norm | None = None,
        **more: Any,
    ) -> AdaptiveResult:
        """:func:`fmkernels.solvers.adaptive.solve.solve_adaptive`, whose y and ys are given as transforms show them.

        Args:
            watching: looks for a gradient of autograd's beneath the transforms.
            again: called where the solve begins again.
            more: of solve_adaptive's arguments.

        Raises:
            FoundGradient: there is one.
        """
        shape, rows, y0 = y0.shape, 1 if options.shared else y0.shape[0], y0.detach()
        field = self._field(func, watching)
        with _torch.transforms_left() as self._within:
            try:
                self.sizes.update(_torch.beneath(y0)[1])
                t0, t1, t_eval = map(_number, (t0, t1, t_eval))
                while True:
                    start, control = self.beneath(y0).detach(), self._options(options, len(shape))
                    largest = self._norm(norm, options.shared, rows)
                    try:
                        result = solve_adaptive(
                            field,
                            start,
                            t0,
                            t1,
                            tableau,
                            control,
                            t_eval=t_eval,
                            norm=largest,
                            enable_grad=watching,
                            **more,
                        )
                        break
                    except _FoundLevel:
                        if again is not None:
                            again()
            finally:
                self._within = None
        y, ys = self.above(result.y), result.ys
        if ys is not None:
            ys = _torch.above(ys, self.levels, self.place + 1)
        of_rows = {name: getattr(result, name) for name in ("t", "status", "n_steps", "n_accepted", "next_step")}
        if options.shared:
            of_rows = {name: x[:1].expand(shape[0] if shape else 1) for name, x in of_rows.items()}
        return result._replace(y=y, ys=ys, **of_rows)

    def _field(self, func: Field, watching: bool) -> Field:
        """The function on the plain state."""
        name = getattr(func, "name_in_errors", "func")

        def field(t: Tensor, y: Tensor, /, **kwargs: Any) -> Tensor:
            t, shown = t.clone(), self.above(y.clone())  # of which no transform is to make another level
            with self.within():
                k = as_state(name, func(t, shown, **kwargs), shown)
                if self.on_output is not None:
                    self.on_output(k)
            k = self.beneath(k)
            return k if watching else k.detach()

        return watched(field) if watching else field

    def within(self) -> Any:
        """During a solve: what runs in it runs within the transforms."""
        assert self._within is not None
        return self._within()

    @property
    def levels(self) -> list[int]:
        return sorted(self.sizes)

    def above(self, y: Tensor) -> Tensor:
        """A state of the solve as the transforms show it."""
        return _torch.above(y, self.levels, self.place)

    def beneath(self, y: Tensor, place: int | None = None) -> Tensor:
        """The opposite."""
        plain, sizes = _torch.beneath(y)
        if not sizes.keys() <= self.sizes.keys():
            self.sizes.update(sizes)
            raise _FoundLevel
        for at, level in enumerate(self.levels):
            if level not in sizes:
                plain = plain.unsqueeze(at).expand(*plain.shape[:at], self.sizes[level], *plain.shape[at:])
        hidden, place = range(len(self.sizes)), self.place if place is None else place
        return plain.movedim(tuple(hidden), tuple(at + place for at in hidden)) if place and hidden else plain

    def _options(self, options: AdaptiveOptions, dims: int) -> AdaptiveOptions:
        def tolerance(value: float | Tensor) -> float | Tensor:
            if not isinstance(value, Tensor):
                return value
            value = _torch.beneath(value)[0]
            if self.place and value.dim() == dims:
                return value.reshape(*value.shape[:1], *(1 for _ in self.sizes), *value.shape[1:])
            return value

        return replace(options, rtol=tolerance(options.rtol), atol=tolerance(options.atol), compact=False)

    def _norm(self, norm: Norm | None, shared: bool, rows: int) -> Norm | None:
        """The largest norm among the entries of a vmap."""
        if norm is None and not self.sizes:
            return None

        def own(ratio: Tensor) -> Tensor:
            if norm is not None:
                return norm(ratio)
            value = root_mean_square(ratio, rows)
            return value[0] if shared else value

        def largest(ratio: Tensor) -> Tensor:
            with self.within():
                value = own(self.above(ratio))
            if not isinstance(value, Tensor):
                return value
            place = min(self.place, value.dim())
            value = self.beneath(value, place).detach()
            return value.amax(tuple(range(place, place + len(self.sizes)))) if self.sizes else value

        return largest


def _number(value: Any) -> Any:
    return _torch.beneath(value)[0].detach() if isinstance(value, Tensor) else value
