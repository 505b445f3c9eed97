"""Paths, weightings and samplers are values: equality, hash, repr, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from path_problems import EXACT, Learned, Mine

import fmkernels as fm
from fmkernels import times, weightings
from fmkernels.paths import (
    VE,
    VP,
    CondOT,
    ConstantBridge,
    Cosine,
    OptimalTransport,
    Path,
    Polynomial,
    SchrodingerBridge,
)


class Slotted(Path):
    __slots__ = ("n",)

    def __init__(self, n: float) -> None:
        self.n = n


class Elsewhere(dict, Path):
    """What it is lies outside its attributes."""

    __hash__ = Path.__hash__
    __eq__ = Path.__eq__


SAME = [
    *((copy.deepcopy(path), path) for path in EXACT),
    (Polynomial(2), Polynomial(2.0)),
    (VP(0.2), VP(0.2, 20.0)),
    (SchrodingerBridge(0.5, Cosine()), SchrodingerBridge(0.5, base=Cosine())),
    (Mine(3.0, base=VP()), Mine(3.0, base=VP())),
]
DIFFERENT = [
    *((a, b) for i, a in enumerate(EXACT) for b in EXACT[:i]),
    (VE(0.1), VE(0.2)),
    (VE(0.1), VE(0.1, 90.0)),
    (SchrodingerBridge(0.5), SchrodingerBridge(0.6)),
    (SchrodingerBridge(0.5), ConstantBridge(0.5)),
    (ConstantBridge(0.5), ConstantBridge(0.5, Cosine())),
    (Mine(2), Mine(2.0)),
    (Mine(base=VP()), Mine(base=VP(0.2))),
    (Mine(), Learned(2.0)),
    (Learned(2.0), Learned(2.0)),
    (Slotted(2), Slotted(3)),
    (Elsewhere(a=1), Elsewhere(a=2)),
    (Mine(torch.ones(2)), Mine(torch.ones(2))),
    (Mine([1.0]), Mine([1.0])),
    (CondOT(), "CondOT()"),
    (CondOT(), None),
]


@pytest.mark.parametrize(("a", "b"), SAME, ids=repr)
def test_paths_with_the_same_parameters_are_equal(a: Path, b: Path) -> None:
    assert a == b
    assert not (a != b)  # noqa: SIM202 - the other operator
    assert hash(a) == hash(b)
    assert len({a, b}) == 1
    assert pickle.loads(pickle.dumps(a)) == a


@pytest.mark.parametrize(("a", "b"), DIFFERENT, ids=lambda value: type(value).__name__)
def test_paths_that_differ_or_may_differ_are_not_equal(a: Path, b: object) -> None:
    assert a != b
    assert a == a
    assert hash(a) == hash(a)


def test_a_changed_path_is_no_longer_equal() -> None:
    path = VE()
    path.sigma_min = 0.5
    assert path != VE()
    assert path == VE(0.5)


@pytest.mark.parametrize("path", [*EXACT, OptimalTransport(), SchrodingerBridge(0.5, VP(0.3, 7.0)), Mine(3, base=VP())])
def test_repr_makes_the_path_again(path: Path) -> None:
    assert eval(repr(path), {**vars(fm.paths), "Mine": Mine}) == path


@pytest.mark.parametrize(
    "value",
    [w for w in weightings.WEIGHTINGS.values() if w is not None]
    + [weightings.MinSNR(3.0), weightings.Sigmoid(-1.0), times.Uniform(0.1, 0.9, stratified=True), times.Beta()]
    + [times.Shifted(times.LogitNormal(0.5), times.Shift(2.0)), times.Mode(), times.CosMap(), times.UShaped(3.0)],
    ids=repr,
)
def test_weightings_and_samplers_are_values_too(value) -> None:
    module = weightings if type(value).__module__ == weightings.__name__ else times
    again = eval(repr(value), vars(module))
    assert again == value
    assert hash(again) == hash(value)
    assert pickle.loads(pickle.dumps(value)) == value
