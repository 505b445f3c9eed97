"""torchdiffeq's callbacks, which are attributes of the function that is solved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import Tensor

from ..adaptive.rows import Batch
from ..adaptive.stepper import AdaptiveStep
from ..implicit.solve import ImplicitStep, Watch
from .packed import Packed

STEP, ACCEPTED, REJECTED = CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
Callback = Callable[[Tensor, Any, Tensor], object]


@final
class Callbacks(Watch):
    """Tells the callbacks of each step once, also where a solve has to begin again. What it hands out are copies.

    ``callback_step(t, y, h)`` is called before a step is tried, ``callback_accept_step`` and ``callback_reject_step``
    after it was judged, with the time, state and signed size of its beginning.
    """

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        given = [getattr(packed.func, name, None) for name in CALLBACKS]
        self.on_try, self.on_accept, self.on_reject = given
        self.judges = self.on_accept is not None or self.on_reject is not None
        self._told = self._known = (0, 0)  # tries and judgements: of this run, and of the one before it

    def __bool__(self) -> bool:
        return self.on_try is not None or self.judges

    def unused(self, steps: bool, judges: bool) -> list[str]:
        """The names of those that a method does not call, which tells of its steps or not, and judges them or not."""
        called = (steps, judges, judges)
        given = zip(CALLBACKS, (self.on_try, self.on_accept, self.on_reject), called, strict=True)
        return [name for name, call, is_called in given if call is not None and not is_called]

    def begin(self) -> None:
        """A part of the solve begins, that may begin :meth:`again`."""
        self._told = self._known = (0, 0)

    def again(self) -> None:
        self._told, self._known = (0, 0), max(self._told, self._known)

    def tried(self, t: Tensor, y: Tensor, h: Tensor) -> None:
        tries, judged = self._told
        self._told = (tries + 1, judged)
        if tries >= self._known[0]:
            self._tell(self.on_try, t, y, h)

    def judged(self, t: Tensor, y: Tensor, h: Tensor, accepted: Tensor) -> None:
        tries, judged = self._told
        self._told = (tries, judged + 1)
        if judged >= self._known[1]:
            self._tell(self.on_accept if bool(accepted.all()) else self.on_reject, t, y, h)

    def _tell(self, callback: Callback | None, t: Tensor, y: Tensor, h: Tensor) -> None:
        if callback is not None:
            t, h = (x[0].clone() if x.shape == (1,) else x.clone() for x in (t, h))
            callback(t, self.packed.unpack(y.reshape(self.packed.y0.shape).clone()), h)

    # ------------------------------------------------------------------ as the solvers call it

    def before_step(self, batch: Batch) -> None:
        """Of an explicit method with step control."""
        self.tried(batch.time, batch.y, batch.next_size)

    def after_step(self, step: AdaptiveStep) -> None:
        self.judged(step.t, step.y, step.h, step.accepted)

    def before(self, t: Tensor, y: Tensor, h: Tensor) -> None:
        self.tried(t, y, h)

    def after(self, step: ImplicitStep, h: Tensor) -> None:
        self.judged(step.t, step.y, h, step.accepted)
