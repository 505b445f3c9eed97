"""Keyword arguments of networks: which of them have an entry for each sample, and which were meant for us.

Nothing in a tensor says that its first dimension is the batch: a context of as many rows as there are samples looks
the same. So one of three things is known of an argument: that it is "batched" (said by the caller, or ours), that it
is "shared" (said, or it has no dimension of the batch's size), or nothing. Whoever would have to know does without.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from ._checks import type_error, value_error

Kind = Literal["batched", "shared", "unknown"]
PLAIN = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, np.generic)


@final
@dataclass(frozen=True)
class Named:
    """What is said of arguments by their names.

    Args:
        batched: every tensor in them has an entry for each sample (or one for all, of size 1).
        shared: none has.
        labels: those that are batched if they are class labels, integers of shape (B,).
    """

    batched: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    labels: frozenset[str] = frozenset()

    def __or__(self, other: Named) -> Named:
        return Named(self.batched | other.batched, self.shared | other.shared, self.labels | other.labels)


NOTHING = Named()


def names_of(argument: str, value: Any) -> frozenset[str]:
    """The names that a ``batched=`` or ``shared=`` gives."""
    if isinstance(value, (str, bytes, Mapping, Tensor, np.ndarray)) or not isinstance(value, Iterable):
        raise type_error(argument, "a sequence of names of keyword arguments", value)
    names = tuple(value)
    for name in names:
        if not isinstance(name, str):
            raise type_error(argument, "names of keyword arguments", name)
    return frozenset(names)


def named(batched: Any, shared: Any) -> Named:
    """What the arguments ``batched=`` and ``shared=`` say."""
    said = Named(names_of("batched", batched), names_of("shared", shared))
    both = said.batched & said.shared
    if both:
        raise value_error("batched", "names that are not in shared= too", sorted(both))
    return said


def check_named(said: Named, given: Iterable[str]) -> None:
    """That the names said are those of arguments."""
    known = set(given)
    for argument, names in (("batched", said.batched), ("shared", said.shared)):
        for name in sorted(names - known):
            have = ", ".join(map(repr, sorted(known))) or "none"
            raise value_error(argument, f"names of the model's keyword arguments ({have})", name)


# ---------------------------------------------------------------------- trees


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    """The entries of a list, tuple, dict or dataclass, with their keys; None of anything else."""
    if type(value) in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        return list(enumerate(value))
    if type(value) is dict:
        return list(value.items())
    if is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in fields(value)]
    return None


def leaves(value: Any) -> Iterator[Any]:
    """What lists, tuples, dicts and dataclasses hold at last."""
    parts = _parts(value)
    if parts is None:
        yield value
    else:
        for _, part in parts:
            yield from leaves(part)


def structure(value: Any) -> Any:
    """What two trees must have in common to be joined leaf by leaf."""
    parts = _parts(value)
    return None if parts is None else (type(value), tuple((key, structure(part)) for key, part in parts))


def tree_map(function: Callable[..., Any], *values: Any) -> Any:
    """The tree of function(*leaves) of trees of one structure."""
    columns = [_parts(value) for value in values]
    if columns[0] is None:
        return function(*values)
    parts = {row[0][0]: tree_map(function, *(part for _, part in row)) for row in zip(*columns, strict=True)}  # type: ignore[arg-type]
    first = values[0]
    if isinstance(first, dict):
        return parts
    if isinstance(first, list):
        return list(parts.values())
    if isinstance(first, tuple):
        return type(first)(*parts.values()) if hasattr(first, "_fields") else tuple(parts.values())
    result = copy.copy(first)
    for name, part in parts.items():
        object.__setattr__(result, name, part)
    return result


# ---------------------------------------------------------------------- whether they belong to single samples


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _entries(value: Any) -> int | None:
    """The first dimension of an array; None without one."""
    if isinstance(value, Tensor) and value.is_nested:
        return value.size(0)
    return value.shape[0] if len(value.shape) else None


def kind_of(name: str, value: Any, rows: int, said: Named = NOTHING) -> Kind:
    """What is known of an argument beside a batch of so many rows: the one place where this is decided.

    Raises:
        ValueError: it is said to be batched and is not.
    """
    if name in said.shared:
        return "shared"
    if name in said.batched:
        for leaf in leaves(value):
            _check_batched(name, leaf, rows)
        return "batched"
    if (
        name in said.labels
        and isinstance(value, Tensor)
        and value.shape == (rows,)
        and not (value.is_floating_point() or value.is_complex())
    ):
        return "batched"
    for leaf in leaves(value):
        if isinstance(leaf, PLAIN):
            continue
        if not _is_array(leaf) or _entries(leaf) == rows:
            return "unknown"
    return "shared"


def _check_batched(name: str, leaf: Any, rows: int) -> None:
    if isinstance(leaf, PLAIN):
        return
    if not _is_array(leaf) or (isinstance(leaf, Tensor) and leaf.is_nested):
        raise value_error("batched", f"{name} made of tensors, in lists, tuples, dicts or dataclasses", leaf)
    if _entries(leaf) not in (None, 1, rows):
        raise value_error("batched", f"{name} to have an entry for each of {rows} samples", leaf)


def divided(
    kwargs: Mapping[str, Any], rows: int, said: Named = NOTHING
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(batched arguments, the others, names of those of which nothing is known)."""
    batched: dict[str, Any] = {}
    others: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in kwargs.items():
        kind = kind_of(name, value, rows, said)
        (batched if kind == "batched" else others)[name] = value
        if kind == "unknown":
            unknown.append(name)
    return batched, others, unknown


def take_rows(value: Any, rows: Tensor, size: int) -> Any:
    """Some rows of batched arguments of ``size`` rows."""

    def taken(leaf: Any) -> Any:
        if not _is_array(leaf) or _entries(leaf) != size:
            return leaf
        if isinstance(leaf, np.ndarray):
            return leaf[rows.cpu().numpy()]
        return leaf.index_select(0, rows.to(leaf.device))

    return tree_map(taken, value)


def unknown_reason(names: Sequence[str]) -> str:
    """Why finished samples stay in the batch, in a result."""
    listed = ", ".join(names)
    return f"off: {listed} may have an entry for each sample or none: name it in batched= or shared="


# ---------------------------------------------------------------------- which are the model's


def all_kwargs(kwargs: dict[str, Any], model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The model's keyword arguments, given by themselves or as ``model_kwargs={...}``."""
    if model_kwargs is None:
        return kwargs
    if not isinstance(model_kwargs, Mapping) or not all(isinstance(name, str) for name in model_kwargs):
        raise type_error("model_kwargs", "a dict of the model's keyword arguments by name", model_kwargs)
    both = sorted(set(kwargs) & set(model_kwargs))
    if both:
        raise value_error("model_kwargs", "names that are not given as keyword arguments too", both)
    return {**kwargs, **model_kwargs} if kwargs else dict(model_kwargs)


# What other libraries, and habit, call what we call otherwise: for each of ours, in lower case.
_HABITS = {
    "steps": (
        "num_steps n_steps nsteps num_inference_steps inference_steps num_sampling_steps sampling_steps sample_steps "
        "num_timesteps n_timesteps timesteps num_integration_steps ode_steps nfe step_size dt"
    ),
    "time_grid": "time_steps t_span tspan t_eval t_grid timestamps",
    "generator": "seed rng random_seed manual_seed",
    "guidance": (
        "cfg cfg_scale cfg_weight cfg_strength cfg_rescale guidance_scale guidance_weight guidance_strength "
        "guidance_rescale guide_scale classifier_free_guidance"
    ),
    "return_trajectory": (
        "return_intermediates return_intermediate return_all return_traj return_trajectories return_states "
        "return_history return_path save_trajectory"
    ),
    "method": "solver sampler integrator ode_method ode_solver solver_type",
    "rtol": "rel_tol reltol relative_tolerance",
    "atol": "abs_tol abstol absolute_tolerance tol tolerance",
    "max_steps": "max_num_steps max_n_steps maxsteps",
    "prediction": "pred_type prediction_type parameterization parametrization",
    "schedule": "scheduler noise_schedule sigma_schedule time_schedule",
    "progress": "show_progress progress_bar pbar verbose",
    "cuda_graph": "use_cuda_graph use_cuda_graphs cuda_graphs",
    "gradient": "with_grad enable_grad enable_gradients differentiable create_graph",
    "divergence": "exact_divergence divergence_method trace_estimator",
    "probes": "num_probes n_probes hutchinson_samples n_hutchinson",
    "log_p0": "log_p_0 prior_log_prob log_prob_0 base_log_prob base_dist",
    "t_0": "t0 t_start",
    "t_1": "t1 t_end",
}
MEANT = {habit: ours for ours, habits in _HABITS.items() for habit in habits.split()}
_SAY = {
    "guidance": "guidance=fm.guidance.CFG(scale, negative={...})",
    "generator": "generator=torch.Generator(device).manual_seed(seed)",
    "steps": "steps= (a number of steps; time_grid= takes the times themselves)",
}


@lru_cache(maxsize=1024)
def _meant(name: str, parameters: tuple[str, ...]) -> str | None:
    """The parameter that a name was probably meant for."""
    ours = MEANT.get(name.lower(), name)
    if ours in parameters:
        return ours
    import difflib  # for names that nobody knows

    close = difflib.get_close_matches(name.lower(), parameters, 1, cutoff=0.85)
    return close[0] if close else None


@lru_cache(maxsize=64)
def _parameters(functions: tuple[Callable[..., Any], ...]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    every = [p for function in functions for p in inspect.signature(function).parameters.values()]
    return tuple(dict.fromkeys(p.name for p in every if p.kind not in kinds))


def _takes(model: Any, name: str) -> bool:
    """Whether a model's own signature has a parameter of this name."""
    while isinstance(model, torch.nn.Module):  # within what DistributedDataParallel, torch.compile and their like wrap
        inner = [getattr(model, wrapped, None) for wrapped in ("module", "_orig_mod")]
        found = next((module for module in inner if isinstance(module, torch.nn.Module)), None)
        if found is None:
            model = model.forward
            break
        model = found
    try:
        parameter = inspect.signature(model).parameters.get(name)
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.kind is not inspect.Parameter.VAR_KEYWORD


def check_names(kwargs: Mapping[str, Any], functions: tuple[Callable[..., Any], ...], models: Iterable[Any]) -> None:
    """That no keyword argument for a model was meant for the functions that hand them on.

    What a model names in its own signature is its own, and what comes through ``model_kwargs={...}`` is not looked at.

    Raises:
        TypeError: one resembles a parameter of theirs; the message names it.
    """
    parameters = _parameters(functions)
    for name in kwargs:
        ours = _meant(name, parameters)
        if ours is not None and not any(_takes(model, name) for model in models):
            say = _SAY.get(ours, f"{ours}=")
            raise TypeError(
                f"{name}: expected a keyword argument of the model, got one that {functions[0].__name__} "
                f"calls {say}; if it is the model's, hand it over as model_kwargs={{{name!r}: ...}}"
            )
