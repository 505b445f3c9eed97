"""Gradients that are not to be had say so: of what is not recorded, or only once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, final

import torch
from torch import Tensor

from ._checks import value_error
from ._torch import reverse_transform_active

Backward = Callable[..., Any]


Autocast = Callable[[], AbstractContextManager[Any]]


def present_autocast(device: torch.device) -> Autocast:
    """The state of autocast, to be entered again by a backward pass that calls a network again."""
    settings = [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in {"cpu", device.type}
    ]
    cached = torch.is_autocast_cache_enabled()

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as stack:
            for kind, enabled, dtype in settings:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached))
            yield

    return again


@final
class _Once(torch.autograd.Function):
    """A gradient as a function of what it depends on, whose derivative is an error."""

    @staticmethod
    def forward(ctx: Any, message: str, grad: Tensor, *on: Tensor) -> Tensor:
        ctx.message = message
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.message)


def first_derivatives_only(what: str) -> Callable[[Backward], Backward]:
    """For the backward of an autograd.Function whose own operations are not recorded.

    With create_graph=True it gives the same gradients, and differentiating them is an error. That of
    ``torch.autograd.function.once_differentiable`` is raised only on the way to what the gradients came from: to the
    function's inputs the gradients seem constant, and a gradient penalty is silently left out.

    The function saves its output, by which the gradients depend on all inputs.

    Args:
        what: whose gradients they are, in the error.
    """
    message = f"{what} has first derivatives only, not those of gradients made with create_graph=True"

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def guarded(ctx: Any, *grads: Any) -> Any:
            with torch.no_grad():
                found = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return found
            on = [x for x in (*ctx.saved_tensors, *grads) if isinstance(x, Tensor) and x.requires_grad]
            return tuple(_Once.apply(message, x, *on) if isinstance(x, Tensor) else x for x in found)

        return guarded

    return decorate


def check_unrecorded(wanted: str, given: object) -> None:
    """That no transform asks for a derivative of a solve that is not recorded.

    Of what, is not seen: the network's parameters are mostly what it closes over.
    """
    if reverse_transform_active():
        raise value_error(
            "gradient",
            f"{wanted} within torch.func's grad, vjp or jacrev, which would find a derivative of 0 (or torch.no_grad() "
            "around what is a constant)",
            given,
        )


def check_apart(name: str, tensors: Sequence[Tensor]) -> None:
    """That none of several tensors with a gradient is computed from another one, whose gradient would count twice.

    Raises:
        ValueError: one is.
    """
    made = {x.grad_fn: i for i, x in enumerate(tensors) if x.grad_fn is not None}
    if not made:
        return
    leaves = {id(x): i for i, x in enumerate(tensors) if x.grad_fn is None}
    for node, first in made.items():
        seen, nodes = {node}, [following for following, _ in node.next_functions]
        while nodes:
            behind = nodes.pop()
            if behind is None or behind in seen:
                continue
            seen.add(behind)
            second = made.get(behind, leaves.get(id(getattr(behind, "variable", None))))
            if second is not None:
                raise ValueError(
                    f"{name}: expected tensors of which none is computed from another, whose gradient would count "
                    f"twice, but {name}[{first}] is from {name}[{second}]"
                )
            nodes += [following for following, _ in behind.next_functions]
