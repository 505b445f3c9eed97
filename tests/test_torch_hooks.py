"""PyTorch's private hooks: each exists and does what fmkernels/_torch.py says, and they are used nowhere else."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import Function, forward_ad
from tracing import traces_objects

import fmkernels
from fmkernels import _torch

PACKAGE = Path(fmkernels.__file__).parent


def test_no_other_file_has_private_hooks() -> None:
    private = re.compile(r"torch(\.\w+)*\._[a-zA-Z]|_dynamo_|fx\.experimental|forward_ad\._|\._is_zerotensor|_cdata")
    for file in PACKAGE.rglob("*.py"):
        if file.name != "_torch.py":
            for number, line in enumerate(file.read_text().splitlines(), 1):
                assert not private.search(line), f"{file.relative_to(PACKAGE)}:{number} belongs into _torch.py"


def test_importing_touches_no_hook() -> None:
    """A hook that a later PyTorch lacks must not keep the package from being imported."""
    code = (
        "import torch\n"
        "for name in ('_len_torch_dispatch_stack', '_get_tracing_state', '_is_alias_of', '_functorch', '_autograd'):\n"
        "    delattr(torch._C, name)\n"
        "import fmkernels, fmkernels.solvers, fmkernels.guidance, fmkernels.likelihood"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_transforms_are_seen_in_eager_and_while_compiling() -> None:
    seen = []

    def function(x):
        seen.append(_torch.transform_active())
        return (x * (2.0 if _torch.transform_active() else 3.0)).sum()

    x = torch.ones(2)
    assert not _torch.transform_active()
    for transform in (torch.func.grad, lambda f: torch.func.vmap(f), torch.func.jacfwd, torch.func.hessian):
        seen.clear()
        transform(function)(x)
        assert seen == [True]
    with forward_ad.dual_level():
        assert _torch.transform_active()

    def compiled(x):
        return x * 3.0 if not _torch.transform_active() else x * 2.0

    for wrapped, plain in ((compiled, 3.0), (torch.func.grad(lambda x: compiled(x).sum()), 2.0)):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(wrapped, backend="eager", fullgraph=True)(x), torch.full((2,), plain))


def test_interception_is_seen() -> None:
    seen = []

    def function(x):
        seen.append((_torch.intercepted(), _torch.jit_tracing(), _torch.dispatch_modes()))
        return x

    x = torch.ones(2)
    function(x)
    torch.jit.trace(function, x, check_trace=False)
    with FakeTensorMode():
        function(x)
    torch.func.vmap(function)(x)
    assert seen == [(False, False, 0), (True, True, 0), (True, False, 1), (True, False, 0)]

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        return x * 2.0 if _torch.intercepted() else x

    assert torch.equal(compiled(x), 2 * x)


def test_modes_can_be_left() -> None:
    with FakeTensorMode(), _torch.without_modes():
        assert type(torch.ones(2)) is torch.Tensor


def test_users_of_a_storage_are_counted() -> None:
    x = torch.ones(3)
    storage = x.untyped_storage()
    alone = _torch.storage_users(storage)
    view = x[1:]
    assert _torch.storage_users(storage) == alone + 1
    del view
    assert _torch.storage_users(storage) == alone


def test_batches_of_gradients_are_seen() -> None:
    seen = []

    class Identity(Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append((_torch.legacy_batched(grad), _torch.graph_is_kept()))
            return grad

    x = torch.ones(2, requires_grad=True)
    y = _torch.apply_function(Identity, x)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2), retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [(True, True), (False, True), (False, False)]


def test_hooks_of_saved_tensors_are_seen() -> None:
    assert not _torch.saved_tensor_hooks_active()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert _torch.saved_tensor_hooks_active()


def test_memory_and_lazy_zeros() -> None:
    x = torch.ones(3)
    assert _torch.same_memory(x, x[1:])
    assert not _torch.same_memory(x, x.clone())
    assert _torch.is_zero(torch._efficientzerotensor((3,)))
    assert not _torch.is_zero(x)


def test_static_numbers_are_told_from_symbols() -> None:
    seen = []

    def backend(graph, inputs):
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def function(x):
        if _torch.is_static(x.shape[0]):
            return x + 1.0
        return x + 2.0

    seen = [function(torch.zeros(n))[0].item() for n in (3, 4, 5)]
    assert seen == [2.0, 2.0, 2.0]
    assert _torch.is_static(3)
    assert _torch.is_static(0.5)


def test_assertions_of_compiled_code() -> None:
    _torch.assert_while_running(torch.tensor(True), "never said")
    with pytest.raises(RuntimeError, match="said"):
        _torch.assert_while_running(torch.tensor(False), "said")


@traces_objects
def test_generators_are_remembered_as_long_as_they_live() -> None:
    generator = torch.Generator()
    number = _torch.remember_generator(generator)
    assert _torch.remembered_generator(number) is generator
    del generator
    gc.collect()
    with pytest.raises(KeyError):
        _torch.remembered_generator(number)


def test_transformed_tensors_are_seen() -> None:
    x, seen = torch.rand(3), []

    def see(y: torch.Tensor) -> torch.Tensor:
        seen.append((_torch.is_transformed(y), _torch.is_transformed(x)))
        return y.sum()

    torch.func.grad(see)(torch.rand(2))
    torch.func.vmap(see)(torch.rand(2, 2))
    torch.func.jvp(see, (torch.rand(2),), (torch.rand(2),))
    with torch.autograd.forward_ad.dual_level():
        see(torch.autograd.forward_ad.make_dual(torch.rand(2), torch.rand(2)))
    assert seen == [(True, False)] * 4
    assert not _torch.is_transformed(x)


def test_the_compiler_does_not_look_into_what_it_is_not_to_trace() -> None:
    traced = []

    def hidden(x):
        traced.append(torch.compiler.is_compiling())
        return x + 1.0

    run = _torch.untraced(hidden)

    def function(x):
        torch._dynamo.graph_break()
        return run(x)

    x = torch.zeros(2)
    assert torch.equal(run(x), x + 1.0)
    traced.clear()
    assert torch.equal(torch.compile(function, backend="eager")(x), x + 1.0)
    assert traced == [False]


def test_what_a_derivative_is_taken_in_is_known() -> None:
    x = torch.ones(2)
    assert not _torch.is_differentiated(x)
    assert _torch.is_differentiated(torch.ones(2, requires_grad=True))
    with forward_ad.dual_level():
        assert not _torch.is_differentiated(x)
        assert _torch.is_differentiated(forward_ad.make_dual(x, x))
    seen: list[bool] = []
    torch.func.jvp(lambda y: (seen.append(_torch.is_differentiated(y)), y)[1], (x,), (x,))
    torch.func.vjp(lambda y: (seen.append(_torch.is_differentiated(y)), y)[1], x)
    torch.func.vmap(lambda y: (seen.append(_torch.is_differentiated(y)), y)[1])(x)
    assert seen == [True, True, False]


def test_derivatives_are_seen_below_vmap() -> None:
    x, seen = torch.ones(2), []

    def see(y):
        seen.append((_torch.requires_grad(y), _torch.requires_grad(y, outside=False), _torch.has_tangent(y)))
        return y * 1.0

    def mapped(y):
        return torch.func.vmap(see)(y)

    torch.func.jvp(mapped, (x,), (x,))
    torch.func.vjp(mapped, x)
    mapped(x.clone().requires_grad_())
    with forward_ad.dual_level():
        mapped(forward_ad.make_dual(x, x))
        mapped(x)
    torch.func.jvp(lambda y: (mapped(x), y)[1], (x,), (x,))
    torch.func.vmap(lambda y: torch.func.jvp(see, (y,), (y,)))(x)
    no = (False, False, False)
    tangent, both, outside = (False, False, True), (True, True, False), (True, False, False)
    assert seen == [tangent, both, outside, tangent, no, no, tangent]


def test_transforms_can_be_left_and_entered_again() -> None:
    x = torch.arange(6.0).reshape(2, 3)

    def function(y):
        assert _torch.is_mapped(y)
        assert _torch.transform_kinds() == {"Vmap", "Grad"}
        with _torch.transforms_left() as within:
            assert not _torch.transform_active()
            plain, levels = _torch.beneath(y)
            assert plain.equal(x)
            twice = _torch.above(plain * 2.0, list(levels), 0)
            with within():
                total = (twice + y).sum()
            with within(1):
                assert _torch.transform_kinds() == {"Vmap"}
        return total

    got = torch.func.vmap(torch.func.grad_and_value(function), in_dims=1)(x.t())
    assert torch.equal(got[1], 3.0 * x.sum(1))
    assert torch.equal(got[0], torch.ones(2, 3))
    assert not _torch.transform_active()
    assert _torch.transform_kinds() == set()
    with forward_ad.dual_level():
        assert _torch.transform_kinds() == {"Jvp"}


def test_operators_are_seen() -> None:
    seen = []
    with _torch.seeing_operators(lambda name, args, result: seen.append((name, args[0], result))):
        total = torch.ones(2, 3).sum()
    assert [x.shape for name, x, _ in seen if name == "sum"] == [(2, 3)]
    assert seen[-1][2] is not None
    assert total == 6.0
    torch.ones(2).sum()
    assert len([name for name, *_ in seen if name == "sum"]) == 1


def test_a_failed_capture_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks are those that torch.cuda's own memory pools use."""
    import inspect

    source = inspect.getsource(torch.cuda.memory)
    assert "_cuda_endAllocateToPool(" in source
    assert "_cuda_releasePool(" in source
    calls = []
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: calls.append(stream))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(device))

    def left(index: int, pool: object) -> None:
        raise RuntimeError("not currently recording to this pool")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", left, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *_: calls.append("released"), raising=False)
    _torch.leave_capture(torch.device("cuda", 0), (1, 2), "before")
    assert calls == ["before", torch.device("cuda", 0)]


def test_what_is_written_within_vmap_shows_beneath() -> None:
    seen = []

    def function(y):
        plain = _torch.plain_beneath(y)
        version = plain._version
        y.mul_(2.0)
        seen.append((plain._version - version, plain.shape))
        return y

    torch.func.vmap(torch.func.vmap(function))(torch.ones(2, 3, 4))
    assert seen == [(1, (2, 3, 4))]
