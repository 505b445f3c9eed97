"""Expressions evaluated at once, where times are tensors that only the device knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor

from ..._cache import is_plain_context
from ..._checks import as_state, tensor_of, type_error
from ...ops.combine.op import combine
from ...paths import Path
from .builder import Builder
from .expressions import Expr, Number
from .ownership import check_each, owned, owned_each, references_of
from .program import Operation, Work, perform
from .run import Call


@final
class Immediate(Builder):
    """A builder that does at once what it is told, at times that are tensors on the device; it has no steps.

    Registers are tensors; 0 is the state.
    """

    def __init__(self, calls: Mapping[str, Call], x: Tensor, t: Tensor, path: Path, prediction: str) -> None:
        super().__init__([t, t], path, prediction)
        self._calls, self._tensors = calls, [x]
        self._look = is_plain_context()
        self.evaluations = 0  # network outputs

    def register(self, x: Expr) -> int:
        terms = {base: c for base, c in x.terms.items() if not (isinstance(c, float) and c == 0.0)} or {0: 0.0}
        if len(terms) == 1:
            ((base, coefficient),) = terms.items()
            if isinstance(coefficient, float) and coefficient == 1.0:
                return base
        return self._append(combine([self._tensors[base] for base in terms], list(terms.values())))  # type: ignore[arg-type]  # floats and tensors, as times are

    def _append(self, tensor: Tensor) -> int:
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def tensor(self, x: Expr) -> Tensor:
        return self._tensors[self.register(x)]

    def evaluate_all(self, x: Expr, t: Number, branch: str, count: int, prediction: str | None = None) -> list[Expr]:
        state = self.keep(x)
        x_t = self.tensor(state)
        # the network may write to its times, which other branches and conversions read
        output = self._calls[branch](x_t, t.clone() if isinstance(t, Tensor) else tensor_of(t))
        references = references_of(output) if self._look else 0
        # the next branch's call may write to what this one returned
        if count > 1:
            if not isinstance(output, (tuple, list)) or len(output) != count:
                raise type_error("model", f"{count} outputs", output)
            check_each(output, x_t, "model")
            outputs = owned_each(output, self._look)
        else:
            check_each([output], x_t, "model")
            outputs = [owned(output, references, 1, self._look)]  # type: ignore[arg-type]  # told of below
        results = []
        for v in outputs:
            kept = Expr({self._append(as_state("model", v, x_t)): 1.0})
            self.evaluations += 1
            results.append(self.convert(state, kept, t, "velocity", prediction or self.prediction))
        return results

    def compute(self, function: Work | Operation, sources: Sequence[Expr], count: int) -> list[Expr]:
        return [Expr({self._append(v): 1.0}) for v in perform(function, [self.tensor(x) for x in sources])]

    def conversion(self, t: Number, source: str, target: str) -> tuple[Number, Number]:
        key = (id(t), source, target)
        if key not in self._conversions:
            self._conversions[key] = super().conversion(t, source, target)
            self._times.append(t)  # its id is its own while it lives
        return self._conversions[key]
