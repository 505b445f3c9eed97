"""What every solve of a flow is told, between noise and data: the one place of its defaults and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..._arguments import NOTHING, Named, all_kwargs, check_names, named
from ..._checks import (
    check_callable,
    check_choice,
    check_float_dtype,
    check_float_tensor,
    check_int,
    check_number,
    check_values,
    is_word,
    type_error,
    value_error,
)
from ...ops.random.op import randn
from ...paths import CondOT, Path
from ...paths.targets import TARGETS
from ...times import Shift
from ..adaptive.controllers import Controller, IController
from ..adaptive.options import AdaptiveOptions
from ..methods import registry as methods
from ..methods.tableaus import Tableau
from ..programs.builder import Method
from ..programs.expressions import Number
from . import grids
from .velocity import Model, Rule, check_guidance

DEFAULT_STEPS = 50
_COND_OT, _I_CONTROLLER = CondOT(), IController()
Compact = bool | float | Literal["auto"]


@dataclass(eq=False)
class FlowSettings:
    """The arguments that :func:`fmkernels.sample`, :class:`fmkernels.Solver`, :func:`fmkernels.sample_stream`,
    :func:`fmkernels.log_prob` and :func:`fmkernels.sample_with_log_prob` share: see the first.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    model: Model
    steps: int | None = None
    method: str | Method = "euler"
    path: Path = field(default=None)  # type: ignore[assignment]  # CondOT()
    prediction: str = "velocity"
    guidance: Rule | None = None
    _: KW_ONLY
    schedule: str | Shift | grids.Schedule = "uniform"
    time_grid: Tensor | np.ndarray | Sequence[float] | None = None
    rtol: float = 1e-5
    atol: float = 1e-5
    controller: Controller = field(default=None)  # type: ignore[assignment]  # IController()
    max_steps: int = 10_000
    compact: Compact = False
    batched: Sequence[str] = ()
    shared: Sequence[str] = ()
    time_shape: str = "batch"
    time_dtype: torch.dtype | None = None

    interface = methods.SAMPLE
    said: Named = field(default=NOTHING, init=False, repr=False)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Puts defaults in the place of None, and refuses what cannot be."""
        check_callable("model", "a callable model(x, t, **model_kwargs)", self.model)
        if self.path is None:
            self.path = _COND_OT
        elif not isinstance(self.path, Path):
            raise type_error("path", "a path of fm.paths, e.g. fm.paths.CondOT()", self.path)
        if self.controller is None:
            self.controller = _I_CONTROLLER
        elif not isinstance(self.controller, Controller):
            raise type_error("controller", "an IController, PIController or PIDController", self.controller)
        check_choice("prediction", self.prediction, TARGETS)
        if self.prediction != "velocity" and self.path.gamma(torch.zeros((), device="cpu")) is not None:
            raise value_error(
                "prediction",
                f"'velocity' with {self.path!r}, whose gamma term other predictions say nothing of",
                self.prediction,
            )
        if self.guidance is not None:
            check_guidance(self.guidance)
        grids.check_schedule(self.schedule)
        check_choice("time_shape", self.time_shape, ("batch", "scalar"))
        if self.time_dtype is not None:
            check_float_dtype("time_dtype", self.time_dtype)
        check_int("max_steps", self.max_steps, low=1)
        check_number("rtol", self.rtol, low=0.0)
        check_number("atol", self.atol, low=0.0)
        if not is_word(self.compact, "auto"):
            check_compact(self.compact)
        unsaid = type(self.batched) is tuple is type(self.shared) and not (self.batched or self.shared)
        self.said = NOTHING if unsaid else named(self.batched, self.shared)
        if not unsaid:  # a list might change unseen
            self.batched, self.shared = (tuple(sorted(names)) for names in (self.said.batched, self.said.shared))
        if self.steps is not None:
            check_int("steps", self.steps, low=0, high=grids.MOST_STEPS)
            if self.time_grid is not None:
                raise ValueError("steps, time_grid: expected at most one of them, got both")

    def tableau(self) -> Tableau | None:
        """The tableau of an adaptive method; None for a fixed grid."""
        return None if self.steps is not None else methods.adaptive_tableau(self.method, self.interface)

    def fixed_method(self) -> Method:
        return methods.resolve(self.method, self.interface)

    def grid(self) -> list[Number]:
        """The times of a fixed grid, or the ends of an adaptive solve and the times of its trajectory."""
        return grids.make_grid(DEFAULT_STEPS if self.steps is None else self.steps, self.schedule, self.time_grid)

    def check_times(self, shape: tuple[int, ...], x: Tensor, state: str = "x_0", *, tokens: bool = True) -> None:
        """That times of samples or tokens are those of a state's.

        Args:
            shape: of each of them.
            state: the argument that it is, in the error.
            tokens: whether tokens may have times of their own.
        """
        if not shape:
            return
        if self.time_shape == "scalar":
            raise value_error("time_shape", "'batch' with times of each sample or token", self.time_shape)
        if shape != x.shape[: len(shape)] or (len(shape) > 1 and not tokens):
            own = "such of a leading part of the shape" if tokens else "(S + 1, B) with B of the shape"
            raise ValueError(
                f"{'schedule' if self.time_grid is None else 'time_grid'}: expected times (S + 1,), or {own} of "
                f"{state}, {tuple(x.shape)}, got times of shape {shape}"
            )

    def options(self, **more: Any) -> AdaptiveOptions:
        """How an adaptive solve is controlled."""
        return AdaptiveOptions(
            rtol=self.rtol,
            atol=self.atol,
            controller=self.controller,
            max_steps=self.max_steps,
            time_shape=self.time_shape,
            time_dtype=self.time_dtype,
            **{"compact": self.compact, **more},
        )

    def check_recorded(self) -> None:
        """That what the solve records has all of its gradients."""
        if isinstance(self.time_grid, Tensor) and self.time_grid.requires_grad:
            raise value_error("time_grid", "times without a gradient, which fm.odeint alone has", self.time_grid)

    def time_dtype_of(self, x: Tensor) -> torch.dtype:
        return self.time_dtype or (torch.float64 if x.dtype == torch.float64 else torch.float32)


def check_time(name: str, value: Any) -> None:
    """A number in [0, 1]."""
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"{name}: expected a time in [0, 1], from noise (t = 0) to data (t = 1), got {value!r}"
            f"{grids.times_hint(0.0, float(value))}"
        )


def check_compact(value: Any) -> None:
    if value is not True and value is not False:
        if isinstance(value, str):
            raise value_error("compact", "True, False, 'auto' or a share of the batch", value)
        check_number("compact", value, low=0.0, high=1.0)


def check_generator(value: Any) -> None:
    if not isinstance(value, torch.Generator):
        raise type_error("generator", "a torch.Generator, e.g. torch.Generator().manual_seed(0)", value)


def check_state(name: str, x: Any) -> None:
    """Samples (B, ...)."""
    check_float_tensor(name, x)
    if x.dim() == 0:
        raise value_error(name, "at least one dimension, of samples", x)
    check_values(name, x)


def _is_length(n: Any) -> bool:
    return isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool)


def start_state(
    x_0: Any,
    model: Model,
    generator: torch.Generator | None,
    row_offset: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The initial states: given, or standard normal noise for a shape, of the rows from ``row_offset`` on."""
    if isinstance(x_0, Tensor):
        check_state("x_0", x_0)
        return x_0 if dtype is None and device is None else x_0.to(device=device, dtype=dtype)
    if not isinstance(x_0, Sequence) or isinstance(x_0, (str, bytes)) or not all(_is_length(n) for n in x_0):
        raise type_error("x_0", "a tensor or a shape", x_0)
    if not x_0 or min(x_0) < 0:
        raise value_error("x_0", "a shape of at least one dimension, none below 0", tuple(x_0))
    if device is None:
        parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
        device = parameter.device if parameter is not None else getattr(generator, "device", None)
    return randn(x_0, dtype=dtype or torch.float32, device=device, generator=generator, row_offset=row_offset)


def network_kwargs(
    functions: tuple[Any, ...], settings: FlowSettings, kwargs: dict[str, Any], model_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The model's keyword arguments; what was meant for the functions that take them is an error."""
    if kwargs and not torch.compiler.is_compiling():
        check_names(kwargs, functions, (settings.model, getattr(settings.guidance, "weak_model", None)))
    return all_kwargs(kwargs, model_kwargs)
