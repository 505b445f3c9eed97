"""Argument checks: one place for what is checked and for the wording of errors.

Every message reads ``name: expected <what>, got <what>``. A wrong type is a TypeError, a wrong value a ValueError.
"""

from __future__ import annotations

import math
import operator
import sys
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._torch import is_differentiated, is_mapped, transform_active

LARGEST = sys.float_info.max
LARGEST_INT = 2**63 - 1  # that the kernels, and tensors, know
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def warn(message: str) -> None:
    """Warns at the line of the user's code that called: the nearest one outside this package and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("fmkernels", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def describe(value: Any) -> str:
    """A short description of a value for an error message."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return f"a nested {value.dtype} tensor on {value.device}"
        if (placements := getattr(value, "placements", None)) is not None:
            return f"a {value.dtype} DTensor of shape {tuple(value.shape)}, placed by {placements}"
        kind = "" if value.layout is torch.strided else f" {value.layout}"
        return f"a {value.dtype}{kind} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {value.shape}"
    try:
        text = repr(value)
    except Exception:  # a message must not fail: of ints too long to be written, of objects whose repr raises
        return f"a value of type {type(value).__name__}"
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 4 :]}"
    return f"{text} of type {type(value).__name__}"


_LONGEST = 400  # characters of a value in a message


def type_error(name: str, expected: str, value: Any) -> TypeError:
    return TypeError(f"{name}: expected {expected}, got {describe(value)}")


def value_error(name: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {describe(value)}")


def check_tensor(name: str, value: Any) -> None:
    """A tensor that lies in memory by strides: not a sparse, nested or mkldnn one."""
    if not isinstance(value, Tensor):
        raise type_error(name, "a torch.Tensor", value)
    check_dense(name, value)


def check_values(name: str, value: Tensor) -> None:
    if value.is_meta:
        raise value_error(name, "a tensor with values", value)


def check_dense(name: str, value: Tensor) -> None:
    if torch.compiler.is_compiling():  # which does not tell a layout everywhere; what it traces is dense
        return
    if value.layout is not torch.strided or value.is_nested:
        raise type_error(name, "a dense tensor (torch.strided)", value)
    if type(value) is not Tensor and isinstance(value, torch.masked.MaskedTensor):
        raise type_error(name, "a dense tensor, not a masked one", value)


def check_has_values(name: str, value: Tensor) -> None:
    """A dense tensor whose values can be read."""
    check_dense(name, value)
    if value.is_meta:
        raise value_error(name, "a tensor with values, not one on meta", value)


def check_unmapped(name: str, value: Tensor) -> None:
    """A tensor that torch.vmap does not map over, so that its values can be read."""
    if is_mapped(value):
        raise value_error(name, "values that torch.vmap does not map over, the same for all its entries", value)


def check_function(name: str, value: Any, expected: str) -> None:
    """Something to call: no class."""
    if not callable(value) or isinstance(value, type):
        raise type_error(name, expected, value)


def check_float_tensor(name: str, value: Any) -> None:
    """A tensor of one of the supported floating dtypes."""
    check_tensor(name, value)
    if value.dtype not in FLOATING:
        raise type_error(name, "a float32, bfloat16, float16 or float64 tensor", value)


def check_same_device(name: str, value: Tensor, data_name: str, data: Tensor) -> None:
    if value.device != data.device:
        raise value_error(name, f"a tensor on {data.device} like {data_name}", value)


def check_like(name: str, value: Any, data_name: str, data: Tensor, *, dtype: bool = True) -> None:
    """A floating tensor of data's shape and device (and dtype)."""
    check_float_tensor(name, value)
    if value.shape != data.shape:
        raise value_error(name, f"the shape of {data_name}, {tuple(data.shape)}", value)
    if value.device != data.device:
        check_same_device(name, value, data_name, data)
    if dtype and value.dtype != data.dtype:
        raise type_error(name, f"the dtype of {data_name}, {data.dtype}", value)


def as_state(name: str, value: Any, state: Tensor) -> Tensor:
    """What a network or right-hand side returned, in the state's dtype: autocast may give another one.

    Raises:
        TypeError, ValueError: it is no floating tensor of the state's shape on its device.
    """
    if (
        type(value) is Tensor
        and value.dtype is state.dtype
        and value.shape == state.shape
        and value.device == state.device
    ):
        return value
    if not isinstance(value, Tensor):
        raise type_error(name, f"a tensor from {name}", value)
    if value.shape != state.shape:
        raise value_error(name, f"an output of the state's shape, {tuple(state.shape)}", value)
    if value.dtype is not state.dtype and value.dtype not in FLOATING:
        raise type_error(name, f"a floating output, as the state is {state.dtype}", value)
    if value.device != state.device:
        raise value_error(name, f"an output on the state's device, {state.device}", value)
    return value if value.dtype is state.dtype else value.to(state.dtype)


def leading_shape(name: str, value: Tensor, data_name: str, data: Tensor) -> None:
    """Checks that value's shape is a leading part of data's, and its device data's."""
    check_dense(name, value)
    lead, shape = value.shape, data.shape
    if lead != shape[: len(lead)]:
        raise value_error(
            name,
            f"a leading part of the shape of {data_name}, {tuple(shape)}: {_leading_parts(shape)}",
            value,
        )
    if value.device != data.device:
        check_same_device(name, value, data_name, data)


def _leading_parts(shape: Sequence[int]) -> str:
    return " or ".join(str(tuple(shape[: n + 1])) for n in range(-1, len(shape)))


def nearest(value: str, names: Collection[str]) -> str:
    """What a message adds about the name that was probably meant: nothing if there is none."""
    import difflib  # for errors alone

    found = difflib.get_close_matches(value, names, 1)
    return f" (nearest: {found[0]!r})" if found else ""


def is_word(value: Any, word: str) -> bool:
    """Whether a value is a name, without comparing tensors and arrays with it."""
    return isinstance(value, str) and value == word


def is_infinite(value: Any) -> bool:
    """Whether a value is the float infinity, without comparing tensors and arrays with it."""
    return isinstance(value, float) and value == math.inf


def check_callable(name: str, expected: str, value: Any) -> None:
    """A function, or an object that is called like one: a class is called to make an object."""
    if not callable(value) or isinstance(value, type):
        raise type_error(name, expected, value)


def real_array(name: str, expected: str, value: Any) -> np.ndarray:
    """Real numbers in float64 on the host, from a tensor, an array or sequences of numbers: no bools among them.

    Raises:
        TypeError, ValueError: it is none of them.
    """
    if isinstance(value, Tensor):
        check_dense(name, value)
        if value.is_complex() or value.dtype == torch.bool or value.is_quantized:
            raise type_error(name, expected, value)
        check_values(name, value)
        if transform_active():  # whose tensors have no memory to look at, be they constants
            if is_differentiated(value):
                raise value_error(name, "values without a derivative, as they are read as numbers", value)
            try:
                return np.asarray(value.tolist(), dtype=np.float64).reshape(value.shape)
            except RuntimeError:  # a batch of torch.vmap's
                raise value_error(name, "values that torch.vmap does not map over, as they are read", value) from None
        return value.detach().double().resolve_neg().cpu().numpy()
    if isinstance(value, np.ndarray):
        array = value
    elif isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise type_error(name, expected, value)
    else:
        try:
            array = np.asarray(value)
        except (ValueError, TypeError, RuntimeError, OverflowError):
            raise type_error(name, expected, value) from None
    if array.dtype.kind not in "iuf" and array.size > 0:
        raise type_error(name, expected, value)
    return array.astype(np.float64, copy=False)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    if not isinstance(value, str):
        raise type_error(name, f"one of the names {', '.join(map(repr, choices))}", value)
    if value not in choices:
        raise value_error(name, f"one of {', '.join(map(repr, choices))}{nearest(value, choices)}", value)


def check_number(
    name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, above: float = -math.inf
) -> None:
    """A finite real number with low <= value <= high and value > above."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise type_error(name, "a number", value)
    # comparisons, not math.isfinite: torch.compile knows them of symbols, and an int may be beyond every float
    if not (-LARGEST <= value <= LARGEST and low <= value <= high and value > above):
        bounds = [f">= {low}" if low > -math.inf else "", f"<= {high}" if high < math.inf else ""]
        bounds.append(f"> {above}" if above > -math.inf else "")
        raise value_error(name, f"a finite number {' and '.join(filter(None, bounds))}".rstrip(), value)


def check_float_dtype(name: str, value: Any) -> None:
    """A floating dtype."""
    if not isinstance(value, torch.dtype) or value not in FLOATING:
        raise type_error(name, "a floating dtype: torch.float32, bfloat16, float16 or float64", value)


def tensor_of(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor where it is; numbers as one on the CPU, whatever the default device."""
    if isinstance(value, Tensor):
        return value if dtype is None else value.to(dtype)
    if isinstance(value, np.ndarray) and not torch.compiler.is_compiling() and not value.flags.writeable:
        value = value.copy()  # a tensor over its memory could be written to
    return torch.as_tensor(value, dtype=dtype, device="cpu")


def own_times(t: Any) -> Tensor:
    """Times for one call of a user's function of t (a scale, a schedule, a diffusion, a weighting), which may write to
    them or keep them: a copy, as the network has one; of numbers in float64 on the CPU."""
    if isinstance(t, Tensor):
        return t.clone()
    return tensor_of(np.array(t) if isinstance(t, np.ndarray) else t, torch.float64)


def check_int(name: str, value: Any, *, low: int | None = None, high: int | None = LARGEST_INT) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise type_error(name, "an int", value)
    if high is not None and value > high:
        raise value_error(name, f"an int <= {high}", value)
    if low is not None and value < low:
        raise value_error(name, f"an int >= {low}", value)


def as_length(name: str, value: Any) -> int:
    """A length of a shape: an int, or what stands for one (NumPy's integers) and need not be read from a device."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if hasattr(value, "__index__") and not isinstance(value, (bool, np.bool_, np.ndarray, Tensor)):
        return operator.index(value)
    raise type_error(name, "ints", value)


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise type_error(name, "a bool", value)


def check_device(name: str, value: Any) -> torch.device:
    """A device, from a torch.device, its name or its index."""
    if isinstance(value, torch.device):
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise type_error(name, "a torch.device, its name or its index", value)
    try:
        device = torch.device(value)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise value_error(name, "the name or index of a device", value) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise value_error(name, f"one of the {torch.cuda.device_count()} CUDA devices here", value)
    return device


def check_generator(name: str, value: Any, device: torch.device | str | None) -> None:
    """A generator that draws on a device (torch's default one if None)."""
    if not isinstance(value, torch.Generator):
        raise type_error(name, "a torch.Generator", value)
    place = torch.get_default_device() if device is None else torch.device(device)
    if value.device.type != place.type:
        raise ValueError(f"{name}: expected a torch.Generator on {place}, got one on {value.device}")
