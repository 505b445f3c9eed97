"""Every public argument of every operation, wrong in every way: a TypeError or ValueError that begins with its name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fmkernels as fm

B, D = 4, 3


def x() -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, B * D).reshape(B, D)


def nested(layout: Any = torch.strided) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(D)], layout=layout)


def masked() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.masked.masked_tensor(x(), x() > 0)


Values = dict[str, Callable[[], Any]]

NO_TENSOR: Values = {
    "text": lambda: "x_1",
    "list": lambda: [[1.0] * D] * B,
    "array": lambda: np.ones((B, D), dtype=np.float32),
    "object": object,
    "dict": lambda: {"x": 1.0},
}
NUMBER: Values = {"number": lambda: 1.5, "int": lambda: 2, "bool": lambda: True}
NONE: Values = {"None": lambda: None}
ODD_TENSORS: Values = {
    "sparse": lambda: x().to_sparse(),
    "csr": lambda: x().to_sparse_csr(),
    "mkldnn": lambda: x().to_mkldnn(),
    "nested": nested,
    "jagged": lambda: nested(torch.jagged),
    "masked": masked,
    "meta": lambda: x().to("meta"),
}
NO_FLOATS: Values = {
    "int tensor": lambda: torch.ones(B, D, dtype=torch.int64),
    "bool tensor": lambda: torch.ones(B, D, dtype=torch.bool),
    "complex tensor": lambda: torch.ones(B, D, dtype=torch.complex64),
    "float8 tensor": lambda: torch.ones(B, D).to(torch.float8_e4m3fn),
    "quantised tensor": lambda: torch.quantize_per_tensor(x(), 0.1, 0, torch.qint8),
}
SHAPES: Values = {
    "transposed": lambda: x().t(),
    "longer": lambda: torch.ones(B + 1, D),
    "flat": lambda: torch.ones(B * D),
    "scalar": lambda: torch.ones(()),
    "empty": lambda: torch.ones(0, D),
}
OTHER_DTYPE: Values = {"float64 tensor": lambda: x().double(), "bfloat16 tensor": lambda: x().bfloat16()}
# what x_1 and pred cannot be; of two that do not fit together the other one is named
DATA = NO_TENSOR | NUMBER | NO_FLOATS | {name: value for name, value in ODD_TENSORS.items() if name != "meta"}
LIKE = DATA | SHAPES | OTHER_DTYPE | {"meta": ODD_TENSORS["meta"]}  # what must be like them
NO_NUMBER: Values = {
    "text": lambda: "1.0",
    "list": lambda: [1.0],
    "tuple": lambda: (1.0,),
    "object": object,
    "bool": lambda: True,
    "complex": lambda: 1j,
    "array": lambda: np.ones(B),
    "array scalar": lambda: np.float32(1.0),
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "int beyond floats": lambda: 10**400,
}
COEFFICIENT = (
    NO_NUMBER
    | ODD_TENSORS
    | NO_FLOATS
    | {
        "longer tensor": lambda: torch.ones(B + 1),
        "trailing tensor": lambda: torch.ones(D),
        "wider tensor": lambda: torch.ones(B, D, 1),
    }
)
POSITIVE = NO_NUMBER | {"tensor": lambda: torch.tensor(1.0), "zero": lambda: 0.0, "negative": lambda: -1.0}
TOLERANCE = {name: value for name, value in POSITIVE.items() if name != "zero"}
NO_INT: Values = {
    "text": lambda: "1",
    "float": lambda: 1.0,
    "bool": lambda: True,
    "None": lambda: None,
    "list": lambda: [1],
    "tensor": lambda: torch.tensor(1),
    "nan": lambda: math.nan,
    "negative": lambda: -1,
    "2^63": lambda: 2**63,
    "2^70": lambda: 2**70,
    "10^400": lambda: 10**400,
}
NO_INDEX = {name: value for name, value in NO_INT.items() if name != "negative"} | {"2": lambda: 2, "-2": lambda: -2}
NO_BOOL: Values = {"int": lambda: 1, "text": lambda: "yes", "None": lambda: None, "tensor": lambda: torch.tensor(True)}
NO_NAME: Values = {
    "unknown": lambda: "nothing",
    "int": lambda: 0,
    "None": lambda: None,
    "list": lambda: ["mean"],
    "dict": dict,
    "tensor": lambda: torch.ones(2),
    "array": lambda: np.ones(2),
    "bool": lambda: True,
}
NO_DTYPE: Values = {
    "text": lambda: "float32",
    "int dtype": lambda: torch.int32,
    "complex dtype": lambda: torch.complex64,
    "array's": lambda: np.float32,
    "type": lambda: float,
    "tensor": lambda: torch.ones(2),
}
NO_DEVICE: Values = {
    "text": lambda: "nowhere",
    "number": lambda: 1.5,
    "tensor": lambda: torch.ones(1),
    "absent": lambda: "cuda:99",
}
NO_GENERATOR: Values = {"int": lambda: 3, "text": lambda: "cpu", "type": lambda: torch.Generator, "tensor": x}
NO_SEED: Values = {
    "text": lambda: "1",
    "float": lambda: 1.5,
    "bool": lambda: True,
    "float tensor": lambda: torch.tensor(1.0),
    "int32 tensor": lambda: torch.tensor(1, dtype=torch.int32),
    "two": lambda: torch.tensor([1, 2]),
    "none at all": lambda: torch.ones(0, dtype=torch.int64),
    "sparse": lambda: torch.ones(1, dtype=torch.int64).to_sparse(),
    "too large": lambda: 2**64,
    "too small": lambda: -(2**63) - 1,
    "huge": lambda: 10**400,
}
NO_LIST: Values = {
    "tensor": x,
    "None": lambda: None,
    "number": lambda: 1.5,
    "set": lambda: {1.0},
    "dict": lambda: {0: 1.0},
    "generator": lambda: iter([1.0]),
    "empty": list,
    "text": lambda: "ab",
}
NO_MASK = (
    NO_TENSOR
    | NUMBER
    | ODD_TENSORS
    | {
        "float tensor": lambda: torch.ones(B),
        "int tensor": lambda: torch.ones(B, dtype=torch.int64),
        "longer": lambda: torch.ones(B + 1, dtype=torch.bool),
        "trailing": lambda: torch.ones(D, dtype=torch.bool),
        "sparse bool": lambda: torch.ones(B, dtype=torch.bool).to_sparse(),
        "meta bool": lambda: torch.ones(B, dtype=torch.bool, device="meta"),
    }
)


def each(values: Values, others: Callable[[], list]) -> Values:
    """A list whose last entry is wrong."""
    return {name: lambda value=value: [*others(), value()] for name, value in values.items()}


def first(values: Values) -> Values:
    """A list whose first entry is wrong."""
    return {f"first {name}": lambda value=value: [value(), x()] for name, value in values.items()}


def without(values: Values, *names: str) -> Values:
    return {name: value for name, value in values.items() if name not in names}


COEFFICIENTS = NO_LIST | each(COEFFICIENT | NONE, lambda: [1.0]) | {"one": lambda: [1.0], "three": lambda: [1.0] * 3}
COUNT = NO_NUMBER | {
    "zero": lambda: 0,
    "negative": lambda: -2,
    "two": lambda: torch.tensor([1, 2]),
    "bool tensor": lambda: torch.tensor(True),
    "complex tensor": lambda: torch.tensor(1j),
    "meta": lambda: torch.ones((), device="meta"),
    "sparse": lambda: torch.ones(1).to_sparse(),
}


def call(function: Callable[..., Any], *positional: Callable[[], Any], **given: Callable[[], Any]) -> Callable:
    """function with an argument replaced: by position for those named here as arg0, arg1."""

    def run(name: str, value: Any) -> Any:
        arguments = [value if name == f"arg{i}" else make() for i, make in enumerate(positional)]
        named = {key: make() for key, make in given.items()} | ({} if name.startswith("arg") else {name: value})
        return function(*arguments, **named)

    return run


def t() -> torch.Tensor:
    return torch.linspace(0.1, 0.9, B)


def seed() -> torch.Tensor:
    return torch.tensor(3)


INTERPOLATE = call(fm.interpolate, x_1=x, x_0=x, alpha=t, sigma=t)
DRAWN = call(fm.interpolate, x_1=x, alpha=t, sigma=t)
BRIDGE = call(fm.interpolate, x_1=x, x_0=x, alpha=t, sigma=t, gamma=t, z=x)
COMBINE = call(fm.combine, operands=lambda: [x(), x()], coefficients=lambda: [1.0, 0.5])
NORMED = call(fm.combine, operands=lambda: [x(), x()], coefficients=lambda: [1.0, 0.5], atol=lambda: 0.1)
LOSS = call(fm.regression_loss, pred=x, operands=lambda: [x(), x()], coefficients=lambda: [1.0, -1.0])
CFM = call(fm.cfm_loss, pred=x, x_1=x, x_0=x, t=t, path=fm.paths.CondOT)
DOTS = call(fm.row_dots, tensors=lambda: [x(), x()], pairs=lambda: [(0, 1)])
NOISE = call(fm.Noise, seed=seed)

# operation: (how it is called, {argument: (its name in the call, wrong values)})
TABLE: list[tuple[str, Callable, str, Values]] = [
    ("interpolate", INTERPOLATE, "x_1", DATA | NONE),
    ("interpolate", INTERPOLATE, "x_0", LIKE),
    ("interpolate", INTERPOLATE, "alpha", COEFFICIENT | NONE),
    ("interpolate", INTERPOLATE, "sigma", COEFFICIENT | NONE),
    ("interpolate", DRAWN, "gamma", COEFFICIENT),
    ("interpolate", BRIDGE, "z", LIKE),
    ("interpolate", INTERPOLATE, "z", {"without gamma": x, "text": lambda: "z"}),
    ("interpolate", DRAWN, "generator", NO_GENERATOR),
    ("interpolate", INTERPOLATE, "generator", NO_GENERATOR),
    ("interpolate", DRAWN, "row_offset", NO_INT),
    ("interpolate", INTERPOLATE, "row_offset", NO_INT | {"where nothing is drawn": lambda: 2}),
    ("interpolate", DRAWN, "store_noise", NO_BOOL),
    ("interpolate", INTERPOLATE, "impl", NO_NAME),
    ("combine", COMBINE, "operands", NO_LIST | each(LIKE | NONE, lambda: [x()]) | first(DATA | NONE)),
    ("combine", COMBINE, "operands", {"18": lambda: [x()] * 18, "noise alone": lambda: [fm.Noise(seed())]}),
    ("combine", COMBINE, "coefficients", COEFFICIENTS | {"table": lambda: torch.ones(B, 3)}),
    ("combine", NORMED, "error_coefficients", without(COEFFICIENTS, "None") | {"table": lambda: torch.ones(B, 3)}),
    ("combine", COMBINE, "error_coefficients", {"no tolerance": lambda: [1.0, 0.5]}),
    ("combine", COMBINE, "atol", TOLERANCE),
    ("combine", COMBINE, "rtol", TOLERANCE),
    ("combine", COMBINE, "out", LIKE | {"expanded": lambda: torch.ones(D).expand(B, D)}),
    ("combine", COMBINE, "impl", NO_NAME),
    ("regression_loss", LOSS, "pred", DATA | NONE),
    ("regression_loss", LOSS, "operands", NO_LIST | each(LIKE | NONE, lambda: [x()]) | {"four": lambda: [x()] * 4}),
    ("regression_loss", LOSS, "coefficients", COEFFICIENTS | {"table": lambda: torch.ones(B, 3)}),
    ("regression_loss", LOSS, "weight", COEFFICIENT),
    ("regression_loss", LOSS, "mask", NO_MASK),
    ("regression_loss", LOSS, "reduction", NO_NAME),
    ("regression_loss", LOSS, "count", COUNT),
    (
        "regression_loss",
        lambda name, value: (
            LOSS(name, value[0])
            if value[1] is None
            else fm.regression_loss(x(), [x()], [1.0], reduction=value[1], count=value[0])
        ),
        "count",
        {name: lambda name=name: (2, name) for name in ("sum", "none", "weighted_mean")},
    ),
    ("regression_loss", LOSS, "kind", NO_NAME),
    ("regression_loss", LOSS, "delta", POSITIVE | NONE),
    ("regression_loss", LOSS, "noise_dtype", NO_DTYPE | {"not the operands'": lambda: torch.float64}),
    ("regression_loss", LOSS, "impl", NO_NAME),
    ("cfm_loss", CFM, "pred", DATA | NONE | SHAPES),
    ("cfm_loss", CFM, "x_1", DATA | NONE),
    ("cfm_loss", CFM, "x_0", LIKE | NONE),
    ("cfm_loss", CFM, "mask", NO_MASK),
    ("cfm_loss", CFM, "count", COUNT),
    ("cfm_loss", CFM, "delta", POSITIVE | NONE),
    ("cfm_loss", CFM, "kind", NO_NAME),
    ("cfm_loss", CFM, "reduction", NO_NAME),
    ("cfm_loss", CFM, "impl", NO_NAME),
    ("row_dots", DOTS, "tensors", without(NO_LIST, "text") | each(LIKE | NONE, lambda: [x()]) | first(DATA)),
    ("row_dots", DOTS, "tensors", {"seven": lambda: [x()] * 7, "text": lambda: "ab"}),
    (
        "row_dots",
        DOTS,
        "pairs",
        NO_LIST
        | each(NO_INT, list)
        | {f"index {name}": lambda v=v: [(0, v())] for name, v in NO_INDEX.items()}
        | {"seventeen": lambda: [(0, 0)] * 17, "three": lambda: [(0, 1, 1)]},
    ),
    ("row_dots", DOTS, "impl", NO_NAME),
    ("Noise", NOISE, "seed", NO_SEED | NONE | {"int": lambda: 3}),
    ("Noise", NOISE, "stream", NO_INT),
    ("Noise", NOISE, "row_offset", NO_INT),
    ("draw_seed", call(fm.draw_seed), "device", NO_DEVICE),
    ("draw_seed", call(fm.draw_seed), "generator", NO_GENERATOR),
    ("set_cpu_pool_limit", call(fm.set_cpu_pool_limit, megabytes=lambda: 1024), "megabytes", NO_INT),
]
for _name, _function in (("randn", fm.randn), ("rand", fm.rand), ("random_words", fm.random_words)):
    _DRAW = call(_function, lambda: 3, seed=seed)
    TABLE += [
        (_name, _DRAW, "seed", NO_SEED),
        (_name, _DRAW, "generator", NO_GENERATOR),
        (_name, call(_function, lambda: 3), "generator", NO_GENERATOR),
        (_name, _DRAW, "stream", NO_INT),
        (_name, _DRAW, "row_offset", NO_INT),
        (_name, _DRAW, "device", NO_DEVICE),
        (_name, _DRAW, "impl", NO_NAME),
        (
            _name,
            _DRAW,
            "arg0",
            without(NO_INT, "list")
            | {
                "list": lambda: [2.0],
                "nested": lambda: [[2]],
                "product beyond int64": lambda: (2**40, 2**40),
                "negative of many": lambda: (3, -1),
            },
        ),
    ]
    if _function is not fm.random_words:
        TABLE.append((_name, _DRAW, "dtype", NO_DTYPE))

CASES = [
    pytest.param(run, name, value, id=f"{operation}-{name}-{what}")
    for operation, run, name, values in TABLE
    for what, value in values.items()
]


def complaint(run: Callable, name: str, value: Any) -> str | None:
    """What is wrong with the answer to a wrong argument, or None."""
    called = "size" if name == "arg0" else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = run(name, value())
    except (TypeError, ValueError) as error:
        text = str(error)
        if not text.startswith(called) or text[len(called) : len(called) + 1] not in (":", "[", ".", ","):
            return f"the message does not begin with {called!r}: {text[:200]}"
        if "expected" not in text:
            return f"the message does not say what was expected: {text[:200]}"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return f"accepted: {str(result)[:100]}"


@pytest.mark.parametrize(("run", "name", "value"), CASES)
def test_wrong_arguments_are_told_by_name(run: Callable, name: str, value: Callable[[], Any]) -> None:
    told = complaint(run, name, value)
    assert told is None, told
