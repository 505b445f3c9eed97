"""PyTorch's private hooks that the package needs, a function each: one place to look when PyTorch changes.

Nothing here is touched at import; tests/test_torch_hooks.py shows that each hook exists and does what is said.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

# Whether torch.compile traces this call: a constant to it, and the quickest such question elsewhere.
compiling = torch.compiler.is_dynamo_compiling

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_while_compiling(function: _Function) -> _Function:
    """Marks a function that torch.compile calls while it traces, and whose result it takes for a constant.

    As torch.compiler.assume_constant_result, which would import the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def untraced(function: _Function) -> _Function:
    """Makes a function run as it is within what torch.compile traces, which breaks the graph around it.

    For what looks at values and so cannot be part of a graph: under ``fullgraph=True`` PyTorch raises. Where a graph is
    broken already, PyTorch goes on with each frame by itself: it does not with this one, nor with what it calls.
    Importing the compiler only to say so would take a second.
    """

    @functools.wraps(function)
    def as_it_is(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None:
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return as_it_is  # type: ignore[return-value]


@constant_while_compiling
def transform_active() -> bool:
    """True inside torch.func transforms and forward-mode AD, where only differentiable PyTorch code is right.

    Under torch.compile as well: transforms are entered while tracing, and their stack is guarded.
    """
    return func_transform_active() or forward_ad._current_level >= 0


def func_transform_active() -> bool:
    """True inside torch.func's transforms; forward-mode AD alone is none of them."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def is_transformed(tensor: Tensor) -> bool:
    """True for a tensor that a torch.func transform sees, or that has a tangent of forward-mode AD."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def is_differentiated(tensor: Tensor) -> bool:
    """True for a tensor in which a derivative is taken, in reverse or forward mode."""
    return requires_grad(tensor) or has_tangent(tensor)


def requires_grad(tensor: Tensor, *, outside: bool = True) -> bool:
    """True for a tensor that autograd differentiates, at whatever level of nested transforms: vmap hides it.

    Args:
        outside: also where that is outside of all transforms, and vmap hides it.
    """
    if tensor.requires_grad:
        return True
    hooks = torch._C._functorch
    while hooks.is_functorch_wrapped_tensor(tensor):
        tensor = hooks.get_unwrapped(tensor)
        if tensor.requires_grad and (outside or hooks.is_functorch_wrapped_tensor(tensor)):
            return True
    return False


def is_mapped(tensor: Tensor) -> bool:
    """True for a tensor with a dimension that torch.vmap hides."""
    hooks = torch._C._functorch
    while hooks.is_functorch_wrapped_tensor(tensor):
        if hooks.is_batchedtensor(tensor):
            return True
        tensor = hooks.get_unwrapped(tensor)
    return False


def has_tangent(tensor: Tensor) -> bool:
    """True for a tensor that forward mode differentiates, at whatever level of nested transforms."""
    if forward_ad._current_level < 0:
        return False
    hooks = torch._C._functorch
    if not hooks.is_functorch_wrapped_tensor(tensor):
        return forward_ad.unpack_dual(tensor).tangent is not None
    with transforms_left() as within:  # vmap cannot be asked for tangents below it: each level is asked as the last one
        while True:
            wrapped = hooks.is_functorch_wrapped_tensor(tensor)
            if not (wrapped and hooks.is_batchedtensor(tensor)):
                with within(max(hooks.maybe_get_level(tensor), 0) if wrapped else 0):
                    if forward_ad.unpack_dual(tensor).tangent is not None:
                        return True
            if not wrapped:
                return False
            tensor = hooks.get_unwrapped(tensor)


def transform_kinds() -> set[str]:
    """The kinds of the active transforms: "Vmap", "Grad" (of vjp and jacrev too), "Jvp", "Functionalize"."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    kinds = {interpreter.key().name for interpreter in stack}
    return kinds | {"Jvp"} if forward_ad._current_level >= 0 else kinds


def reverse_transform_active() -> bool:
    """True where torch.func's grad, vjp or jacrev would find a derivative of 0 of what is not recorded."""
    return torch.is_grad_enabled() and transform_active() and "Grad" in transform_kinds()


Within = Callable[..., AbstractContextManager[Any]]


@contextmanager
def transforms_left() -> Iterator[Within]:
    """Within it operations on plain tensors run as if no transform of torch.func were active.

    Gives a function: within what it returns the transforms are active again, or those of the levels up to one.
    """
    from torch._functorch.pyfunctorch import (
        temporarily_clear_interpreter_stack,
        temporarily_restore_interpreter_stack,
    )

    with temporarily_clear_interpreter_stack() as stack:

        def within(level: int | None = None) -> AbstractContextManager[Any]:
            return temporarily_restore_interpreter_stack(stack if level is None else stack[len(stack) - level :])

        yield within


def beneath(tensor: Tensor) -> tuple[Tensor, dict[int, int]]:
    """The plain tensor beneath torch.func's wrappers, where transforms are left (:func:`transforms_left`).

    Dimensions that vmap hides stand first, in the order of their levels.

    Returns:
        It, and the size of the hidden dimension of each level.
    """
    hooks = torch._C._functorch
    hidden: list[tuple[int, int]] = []
    while hooks.is_functorch_wrapped_tensor(tensor):
        if hooks.is_batchedtensor(tensor):
            hidden.append((hooks.maybe_get_level(tensor), hooks.maybe_get_bdim(tensor)))
        tensor = hooks.get_unwrapped(tensor)
    levels: dict[int, int] = {}
    for place, (level, dim) in enumerate(reversed(hidden)):
        tensor = tensor.movedim(dim + place, place)
        levels[level] = tensor.shape[place]
    return tensor, levels


def plain_beneath(tensor: Tensor) -> Tensor:
    """The plain tensor beneath torch.func's wrappers, within the transforms."""
    hooks = torch._C._functorch
    while hooks.is_functorch_wrapped_tensor(tensor):
        tensor = hooks.get_unwrapped(tensor)
    return tensor


def above(tensor: Tensor, levels: Sequence[int], dim: int) -> Tensor:
    """A plain tensor as one whose dimensions from dim on are hidden by vmap, at levels in ascending order."""
    for level in levels:
        tensor = torch._C._functorch._add_batch_dim(tensor, dim, level)
    return tensor


def legacy_batched(tensor: Tensor) -> bool:
    """True for a batch of gradients, as autograd.grad(is_grads_batched=True) makes it; not to be asked while
    compiling."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_zero(tensor: Tensor) -> bool:
    """True for a tensor of zeros without memory, such as some of PyTorch's derivatives are."""
    return tensor._is_zerotensor()


def dispatch_modes() -> int:
    """How many modes (FakeTensorMode, a profiler's, ...) see each operator that PyTorch's dispatcher is given."""
    return torch._C._len_torch_dispatch_stack()


class _Interceptors:
    """The functions that :func:`intercepted` asks, looked up once: it is on the path of every small call."""

    modes: Callable[[], int]
    transforms: Callable[[], Any]
    tracing: Callable[[], Any]
    bound = False

    @classmethod
    def bind(cls) -> None:
        cls.modes = torch._C._len_torch_dispatch_stack
        cls.transforms = torch._C._functorch.peek_interpreter_stack
        cls.tracing = torch._C._get_tracing_state
        cls.bound = True


def intercepted() -> bool:
    """True where operators do not simply run: torch.compile, a mode or torch.jit.trace sees them, or a transform is
    active."""
    if torch.compiler.is_compiling():
        return True
    hooks = _Interceptors
    if not hooks.bound:
        hooks.bind()
    return (
        hooks.modes() != 0
        or hooks.transforms() is not None
        or forward_ad._current_level >= 0
        or hooks.tracing() is not None
    )


def seeing_operators(see: Callable[[str, Sequence[Any], Any], None]) -> AbstractContextManager[Any]:
    """Within it ``see`` is told each operator that runs: its name, positional arguments and result."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            see(func.overloadpacket.__name__, args, result)
            return result

    return Seeing()


def without_modes() -> AbstractContextManager[Any]:
    """Within it no mode sees operators: tensors are real under FakeTensorMode, too."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def launch_hooks() -> tuple[Callable[[int], int], Callable[[], int]]:
    """What tells the handle of a CUDA device's current stream, and which device is current: 0.1 us each, where
    torch.cuda's functions take ten times as long."""
    return torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice


def storage_users(storage: torch.UntypedStorage) -> int:
    """How many tensors, and Python objects that stand for the storage itself, hold a storage."""
    return torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]


def jit_tracing() -> bool:
    """True inside torch.jit.trace."""
    return torch._C._get_tracing_state() is not None  # type: ignore[no-untyped-call]


def apply_function(function: type[Function], *args: Any) -> Any:
    """function.apply without its search for transforms, which :func:`intercepted` has made: a third of the price."""
    return super(Function, function).apply(*args)  # type: ignore[misc]


def apply_traced(function: type[Function], *args: Any) -> Any:
    """function.apply, also where one tensor is several arguments: torch.compile takes each once only."""
    if not torch.compiler.is_compiling():
        return function.apply(*args)
    given: list[Any] = []
    for x in args:
        again = isinstance(x, Tensor) and any(x is other for other in given)
        given.append(x.view_as(x) if again else x)
    return function.apply(*given)


def node_number(node: Any) -> int:
    """The number of a node of an autograd graph: greater than those of all that its thread made before."""
    return node._sequence_nr()  # type: ignore[no-any-return]


def next_node_number() -> int:
    """The number that the next node of a graph will have at least."""
    with torch.enable_grad():
        return node_number(torch.zeros((), device="cpu", requires_grad=True).view(()).grad_fn)


def graph_is_kept() -> bool:
    """Within a backward pass: whether the graph is kept, so that this backward may run again (retain_graph)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def saved_tensor_hooks_active() -> bool:
    """True where somebody sees the tensors that are saved for backward: checkpoints, save_on_cpu, a user's hooks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def same_memory(a: Tensor, b: Tensor) -> bool:
    """True where two tensors are views of one storage."""
    return torch._C._is_alias_of(a, b)  # type: ignore[attr-defined]


def assert_while_running(condition: Tensor, message: str) -> None:
    """While compiling: the compiled code raises a RuntimeError where a condition does not hold."""
    torch._assert_async(condition, message)


def first_local_row(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> int:
    """The index, in the whole, of the first row of this rank's part of a DTensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return int(compute_local_shape_and_global_offset(tuple(shape), mesh, placements)[1][0])


def is_static(number: float) -> bool:
    """While compiling: whether a number is a constant of the graph, not a symbol that stands for many values."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # late: it imports sympy

    return has_static_value(number)


# The generators that compiled graphs draw from, by the number a graph holds for each, while they live; its guards tell
# which one a call has.
_generators: weakref.WeakValueDictionary[int, torch.Generator] = weakref.WeakValueDictionary()


@constant_while_compiling
def remember_generator(generator: torch.Generator) -> int:
    """While compiling: makes a generator known by its id; torch.compile cannot take generators into its graphs."""
    _generators[id(generator)] = generator
    return id(generator)


def remembered_generator(number: int) -> torch.Generator:
    return _generators[number]


def leave_capture(device: torch.device, pool: Any, stream: Any) -> None:
    """After a capture that failed: PyTorch leaves its allocator in the graph's memory, and the graph's stream set."""
    torch.cuda.set_stream(stream)
    torch.cuda.synchronize(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        torch._C._cuda_endAllocateToPool(index, pool)
    except RuntimeError:  # it has been left
        return
    torch._C._cuda_releasePool(index, pool)
