"""What an implicit solver asks of a field: values, dense Jacobians, tolerances, linear solves and the gradient of a
stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from ..._checks import as_state, type_error, value_error
from ..._gradients import first_derivatives_only
from ..adaptive.gradient_watch import FoundGradient

Field = Callable[[Tensor, Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]
Factors = tuple[Tensor, Tensor]
# A Jacobian has at most MAX_SIZE rows, and those of a batch at most MAX_ENTRIES numbers together.
MAX_SIZE = 2048
MAX_ENTRIES = 2**28
_CHUNK = 64  # backward passes in one batch


@final
class Stage(torch.autograd.Function):
    """The derivatives k of stages, found without a graph, as a function of f = f(t, y + h A k) by implicit
    differentiation: dk = matrix^-1 df, matrix = I - h a_ij J_i."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, k: Tensor, matrix: Tensor) -> Tensor:
        out = k.clone()
        ctx.save_for_backward(matrix, out)
        return out

    @staticmethod
    @first_derivatives_only("a solve by an implicit method")  # how the matrix depends on everything is not recorded
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        matrix, _ = ctx.saved_tensors
        return torch.linalg.solve(matrix.mT, grad.unsqueeze(-1)).squeeze(-1), None, None


@final
class System:
    """The field on a state (R, N) of R independent rows, its Jacobians and the tolerances.

    Args:
        stages: that are solved together.

    Attributes:
        watching: a value of the field that has a gradient raises FoundGradient.
    """

    watching = False

    def __init__(
        self,
        field: Field,
        y0: Tensor,
        per_sample: bool,
        rtol: float | Tensor,
        atol: float | Tensor,
        norm: Norm | None,
        stages: int = 1,
    ) -> None:
        if y0.dtype not in (torch.float32, torch.float64):
            raise type_error("y0", "a float32 or float64 tensor for an implicit method", y0)
        if per_sample and y0.dim() == 0:
            raise value_error("y0", "at least one dimension, of samples, with per_sample=True", y0)
        self.field, self.shape, self.per_sample, self.norm = field, y0.shape, per_sample, norm
        self.rows = y0.shape[0] if per_sample else 1
        self.size = y0.numel() // max(self.rows, 1)
        if self.size > MAX_SIZE or self.rows * (stages * self.size) ** 2 > MAX_ENTRIES:
            hint = "" if per_sample else "; options={'per_sample': True} has one for each independent sample"
            raise value_error(
                "y0",
                f"at most {MAX_SIZE} elements for the dense Jacobian of an implicit method, and at most {MAX_ENTRIES} "
                f"numbers in all Jacobians{hint}",
                y0,
            )
        self.dtype, self.epsilon = y0.dtype, torch.finfo(y0.dtype).eps
        self.rtol = self._tolerance(rtol, y0).clamp(min=100.0 * self.epsilon)
        self.atol = self._tolerance(atol, y0)
        self.eye = torch.eye(self.size, dtype=y0.dtype, device=y0.device)
        self._batched = True

    def _tolerance(self, value: float | Tensor, y0: Tensor) -> Tensor:
        value = torch.as_tensor(value, dtype=y0.dtype, device=y0.device)
        return value.expand(y0.shape).reshape(self.rows, self.size) if value.dim() else value

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """f at times (R,) and states (R, N)."""
        if not self.watching:
            return self._value(t, y)
        with torch.enable_grad():
            k = self._value(t, y)
        if k.requires_grad:
            raise FoundGradient
        return k

    def _value(self, t: Tensor, y: Tensor) -> Tensor:
        state, time = y.reshape(self.shape), t.to(self.dtype).clone()  # to which the field may write
        k = self.field(time if self.per_sample else time[0], state)
        # a copy, as the field may have one buffer for its answers, and those of several stages are needed at once
        return as_state("func", k, state).clone().reshape(y.shape)

    def linearise(self, t: Tensor, y: Tensor, *, graph: bool = False) -> tuple[Tensor, Tensor]:
        """f and its Jacobians (R, N, N) without gradient; ``graph`` keeps that of f."""
        with torch.inference_mode(False), torch.enable_grad():
            if not graph:
                t = t.clone()
            if not (graph and y.requires_grad):
                y = y.detach().clone().requires_grad_()
            value = self._value(t, y)
            if not value.requires_grad:
                return value, self.eye.new_zeros((self.rows, self.size, self.size))
            parts = [self._products(value, y, rows) for rows in self.eye.split(_CHUNK)]
            jacobian = torch.cat(parts).transpose(0, 1)
        return (value if graph else value.detach()), jacobian.detach()

    def _products(self, value: Tensor, y: Tensor, directions: Tensor) -> Tensor:
        """The vector-Jacobian products (M, R, N) for directions (M, N)."""

        def product(direction: Tensor) -> Tensor:
            grad = direction.expand_as(value)
            return torch.autograd.grad(value, y, grad, retain_graph=True, materialize_grads=True)[0]

        if self._batched:
            try:  # torch.func's vmap: the one behind is_grads_batched is unknown to operations that guard against it
                return torch.func.vmap(product)(directions)
            except RuntimeError:  # a backward pass that cannot be batched: the same products one by one
                self._batched = False
        return torch.stack([product(direction) for direction in directions])

    def matrix(self, step: Tensor, jacobian: Tensor) -> Tensor:
        """I - step J; step is (R, 1)."""
        return self.eye - step[:, :, None] * jacobian

    def tolerances(self, *states: Tensor) -> Tensor:
        """atol + rtol times the largest magnitude of the states."""
        magnitude = states[0].abs()
        for state in states[1:]:
            magnitude = torch.maximum(magnitude, state.abs())
        return self.tolerance_of(magnitude)

    def tolerance_of(self, magnitude: Tensor) -> Tensor:
        """atol + rtol times magnitudes (R, N), or (R, S, N) of S stages."""
        rtol, atol = (x[:, None] if x.dim() and magnitude.dim() == 3 else x for x in (self.rtol, self.atol))
        return atol + rtol * magnitude

    def error_norm(self, ratio: Tensor) -> Tensor:
        """(R,) norms of error ratios."""
        if self.norm is None:
            return rms(ratio)
        norm = self.norm(ratio.reshape(self.shape))
        expected = (self.rows,) if self.per_sample else ()
        if not isinstance(norm, Tensor) or norm.shape != expected:
            raise value_error("norm", f"to return a tensor of shape {expected}", norm)
        return norm.reshape(self.rows).abs()


def rms(x: Tensor) -> Tensor:
    return x.square().mean(1).sqrt()


def linear_solve(factors: Factors, b: Tensor) -> Tensor:
    return torch.linalg.lu_solve(*factors, b.unsqueeze(-1)).squeeze(-1)


def factorise(matrix: Tensor) -> Factors:
    factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)  # of a singular one, inf and NaN: not converged
    return factors, pivots
