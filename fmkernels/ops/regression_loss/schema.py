"""``torch.ops.fmkernels.regression_loss``: its schema, its fake, and which implementation a call takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _dispatch
from ..library import LIBRARY

LIBRARY.define(
    "regression_loss(Tensor pred, Tensor[] tensors, SymInt[] streams, SymInt[] offsets, Tensor?[] coefs, "
    "float[] values, ScalarType noise_dtype, Tensor? weight, Tensor? scale, float scale_value, Tensor? mask, int kind, "
    "float delta, bool per_sample, bool need_grad, str impl) -> (Tensor, Tensor)"
)

MASK = 9  # its place among the arguments after pred


def loss_dtype(pred: Tensor, noise_dtype: torch.dtype) -> torch.dtype:
    """float64 where pred or the operands are, else float32."""
    # operands, drawn or not, are of noise_dtype
    return torch.float64 if noise_dtype is torch.float64 or pred.dtype is torch.float64 else torch.float32


def gradient_dtype(pred: Tensor) -> torch.dtype:
    """The dtype in which d loss / d pred is stored until backward: pred's.

    float32 for float16: what the loss scale or a large divisor will bring back into its range may be far outside.
    """
    return torch.float32 if pred.dtype is torch.float16 else pred.dtype


def _regression_loss(pred: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, impl = args
    return _dispatch.implementation("regression_loss", pred.device.type, impl).run(pred, *rest)


def _regression_loss_fake(pred: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    noise_dtype, (per_sample, need_grad) = args[5], args[-3:-1]
    loss = pred.new_empty(pred.shape[:1] if per_sample else (), dtype=loss_dtype(pred, noise_dtype))
    return loss, torch.empty_like(pred, dtype=gradient_dtype(pred)) if need_grad else pred.new_empty(0)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("regression_loss", _regression_loss, _key)
torch.library.register_fake("fmkernels::regression_loss", _regression_loss_fake, lib=LIBRARY)


def call(pred: Tensor, args: tuple) -> tuple[Tensor, Tensor]:
    """(loss, gradient w.r.t. pred) by the operator's arguments after pred; past PyTorch's dispatcher where allowed."""
    tensors, coefs, weight, scale, mask = args[0], args[3], args[6], args[7], args[MASK]
    if _dispatch.plain(pred, *tensors, *coefs, weight, scale, mask):
        return _regression_loss(pred, *args)
    return torch.ops.fmkernels.regression_loss(pred, *args)
