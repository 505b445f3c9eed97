"""The guided velocity as a function of tensors, as adaptive solvers and likelihoods call it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, Protocol, final

import numpy as np
import torch
from torch import Tensor

from ..._arguments import NOTHING, Named, check_named, divided
from ..._checks import as_state, tensor_of, type_error
from ..._keys import NoKey
from ...paths import Path
from ..adaptive.step_graph import StepGraph
from ..programs.builder import Builder
from ..programs.captures import held_object
from ..programs.expressions import Expr, Number
from ..programs.immediate import Immediate
from ..programs.ownership import reading
from ..programs.run import Call

Model = Callable[..., Tensor]
FOLLOW = ("batched", "scales")  # the arguments of a velocity that have an entry for each sample
_NONE: Mapping[str, Any] = {}


class Rule(Protocol):
    """A guidance as solvers use it: what :class:`fmkernels.guidance.Guidance` is."""

    def velocity(self, builder: Builder, x: Expr, t: Number) -> Expr: ...

    def branches(
        self, model: Model, model_kwargs: Mapping[str, Any]
    ) -> Mapping[str, tuple[Model, Mapping[str, Any]]]: ...

    def calls(self, model: Model, model_kwargs: Mapping[str, Any], said: Named = ...) -> Mapping[str, Call]: ...

    def joined(
        self, branches: Mapping[str, tuple[Model, Mapping[str, Any]]], said: Named = ...
    ) -> Mapping[str, Call]: ...

    def scales(self) -> Mapping[str, np.ndarray | Tensor]: ...

    def with_scales(self, scales: Mapping[str, Tensor]) -> Rule: ...

    @property
    def said(self) -> Named: ...

    @property
    def plan_key(self) -> Hashable | None: ...


_USED = ("velocity", "branches", "calls", "joined", "scales", "with_scales")


def check_guidance(value: Any) -> None:
    """That a guidance is one: a number is not, and neither is a class."""
    if isinstance(value, type) or not all(callable(getattr(value, name, None)) for name in _USED):
        raise type_error("guidance", "an object of fm.guidance, e.g. fm.guidance.CFG(4.0, negative={...})", value)


@final
class Velocity:
    """(t, x) and what :meth:`arguments` makes of keyword arguments to the velocity of a model.

    Args:
        said: of the model's keyword arguments.

    Attributes:
        unknown: names of keyword arguments of which it is not known whether they have an entry for each sample.
    """

    name_in_errors = "model"

    def __init__(self, model: Model, guidance: Rule | None, path: Path, prediction: str, said: Named = NOTHING) -> None:
        self.model, self.guidance, self.path, self.prediction, self.said = model, guidance, path, prediction, said
        self.unknown: list[str] = []
        self._call = reading(self.name_in_errors, model)
        self._models: dict[str, Model] = {}
        self._velocities, self._evaluations = 0, 0

    def arguments(self, model_kwargs: Mapping[str, Any], x: Tensor) -> dict[str, Any]:
        """Arguments of calls with states like x; those in FOLLOW follow the samples."""
        if self.guidance is None:
            check_named(self.said, model_kwargs)
            batched, shared, self.unknown = divided(model_kwargs, x.shape[0], self.said)
            return {name: part for name, part in (("batched", batched), ("shared", shared)) if part}
        result: dict[str, Any] = {"batched": {}, "shared": {}, "scales": {}}
        said, unknown = self.guidance.said | self.said, {}
        branches = self.guidance.branches(self.model, model_kwargs)
        check_named(self.said, (name for _, kwargs in branches.values() for name in kwargs))
        for branch, (model, kwargs) in branches.items():
            self._models[branch] = model
            result["batched"][branch], result["shared"][branch], names = divided(kwargs, x.shape[0], said)
            unknown.update(dict.fromkeys(names))
        self.unknown = list(unknown)
        result["scales"] = {name: tensor_of(scale).to(x.device) for name, scale in self.guidance.scales().items()}
        return result

    def __call__(
        self,
        t: Tensor,
        x: Tensor,
        /,
        *,
        batched: Mapping[str, Any] = _NONE,
        shared: Mapping[str, Any] = _NONE,
        scales: Mapping[str, Tensor] = _NONE,
    ) -> Tensor:
        self._velocities += 1
        if self.guidance is None:
            call = self._call
            if shared or batched:
                call = reading(self.name_in_errors, self.model, {**shared, **batched})
            v = call(x, t.clone())  # times to which the network may write
            if self.prediction == "velocity":
                return v
            return self.path.convert(as_state("model", v, x), x, t, self.prediction, "velocity")
        guidance = self.guidance.with_scales(scales)
        branches = {name: (model, {**shared[name], **batched[name]}) for name, model in self._models.items()}
        builder = Immediate(guidance.joined(branches, self.said), x, t, self.path, self.prediction)
        v = builder.tensor(guidance.velocity(builder, builder.x, t))
        self._evaluations += builder.evaluations
        return v

    def wrap(self, wrapper: Callable[[Model], Model]) -> None:
        """Calls the networks of a guidance's branches through wrappers from now on."""
        self._models = {branch: wrapper(model) for branch, model in self._models.items()}

    @property
    def modules(self) -> list[Model]:
        """The networks that it calls."""
        return [self.model, *self._models.values()]

    @property
    def evaluations(self) -> int:
        """Network evaluations a sample so far."""
        return self._velocities if self.guidance is None else self._evaluations

    def graph(self, mode: bool | Literal["auto"]) -> StepGraph:
        """Asks for captured steps of this velocity."""
        owners: list[Any] = []
        try:
            # without guidance a velocity needs no path
            path = None if self.guidance is None and self.prediction == "velocity" else held_object(self.path, owners)
            key = path, self.prediction, held_object(self.guidance, owners), self.said
        except NoKey as error:
            return StepGraph(self.model, None, mode, refusal=str(error))
        return StepGraph(self.model, key, mode, owners)

    def evaluations_each(self, x: Tensor) -> float:
        """Network evaluations a velocity: more than 1 with guidance, its other networks counted too."""
        if self.guidance is None:
            return 1.0
        if self._velocities == 0:  # a replayed graph counts none: counted with outputs of zeros
            t = torch.full(x.shape[:1], 0.5, device=x.device)
            builder = Immediate(_Zeros(), x, t, self.path, self.prediction)
            self.guidance.velocity(builder, builder.x, builder.step.t)
            return float(builder.evaluations)
        return self._evaluations / self._velocities


class _Zeros(dict[str, Call]):
    """For each branch, or several in one call, outputs of zeros."""

    def __missing__(self, branch: str) -> Call:
        count = branch.count("|") + 1
        return lambda x, t: tuple(torch.zeros_like(x) for _ in range(count)) if count > 1 else torch.zeros_like(x)
