"""Noise that depends on the state: closed forms, orders, and torchsde on the same Brownian path."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import fmkernels as fm
from fmkernels.solvers.equations.sdeint import METHODS, sdeint

torchsde = pytest.importorskip("torchsde")

DTYPE = torch.float64
RATE, LEVEL = 0.4, 0.7
CASES = [(noise, calculus, m) for (noise, calculus), names in METHODS.items() for m in names if noise != "additive"]
each_case = pytest.mark.parametrize(("noise", "calculus", "method"), CASES)
STRONG = {("diagonal", "ito", "euler"): 0.5, ("matrix", "ito", "euler"): 0.5}


def geometric(noise: str, level: float = LEVEL):
    """Geometric Brownian motion; as matrix noise with two noises, which commute."""
    if noise == "diagonal":
        return lambda t, y: level * y
    return lambda t, y: torch.stack((level * y, -0.5 * level * y), -1)


def brownian(noise: str, shape: tuple[int, ...], steps: int, seed: int) -> torch.Tensor:
    """The noise at time 1 that multiplies LEVEL, from the streams that sdeint draws."""
    width = shape if noise == "diagonal" else (shape[0], 2)
    w = sum(fm.randn(width, seed=seed, stream=n, dtype=DTYPE) for n in range(steps)) / math.sqrt(steps)
    return w if noise == "diagonal" else (w[:, :1] - 0.5 * w[:, 1:]).expand(shape)


def solve(noise: str, calculus: str, method: str, y0: torch.Tensor, steps: int, seed: int = 1, **options):
    return sdeint(
        lambda t, y: RATE * y,
        geometric(noise),
        y0,
        torch.tensor([0.0, 1.0], dtype=DTYPE),
        method=method,
        noise=noise,
        calculus=calculus,
        dt=1.0 / steps,
        seed=seed,
        **options,
    )[-1]


def exact(noise: str, calculus: str, y0: torch.Tensor, steps: int, seed: int = 1) -> torch.Tensor:
    w = brownian(noise, tuple(y0.shape), steps, seed)
    variance = LEVEL**2 * (1.0 if noise == "diagonal" else 1.25)
    return y0 * torch.exp(RATE - (0.5 * variance if calculus == "ito" else 0.0) + LEVEL * w)


@each_case
def test_strong_order_on_geometric_brownian_motion(noise: str, calculus: str, method: str) -> None:
    y0 = torch.full((2000, 2), 0.8, dtype=DTYPE)
    errors = []
    for steps in (16, 64):
        away = solve(noise, calculus, method, y0, steps) - exact(noise, calculus, y0, steps)
        errors.append(float(away.square().mean().sqrt()))
    order = 0.5 * math.log2(errors[0] / errors[1])
    assert order == pytest.approx(STRONG.get((noise, calculus, method), 1.0), abs=0.12), errors


@each_case
def test_weak_order_on_geometric_brownian_motion(noise: str, calculus: str, method: str) -> None:
    """Exactly: a step multiplies the state by a factor, whose moments are integrals over the noise."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = torch.from_numpy(weights / weights.sum())
    z = torch.from_numpy(nodes)
    if noise == "matrix":
        z = torch.cartesian_prod(z, z)
        weights = torch.cartesian_prod(weights, weights).prod(-1)
    z = z.reshape(len(weights), -1)
    variance = LEVEL**2 * (1.0 if noise == "diagonal" else 1.25)
    growth = RATE + (0.0 if calculus == "ito" else 0.5 * variance)
    errors = []
    for steps in (16, 32):
        factor = sdeint(
            lambda t, y: RATE * y,
            geometric(noise),
            torch.ones(len(weights), 1, dtype=DTYPE),
            torch.tensor([0.0, 1.0 / steps], dtype=DTYPE),
            method=method,
            noise=noise,
            calculus=calculus,
            noise_transform=lambda drawn: z,
        )[-1, :, 0]
        first, second = (float((weights * factor**p).sum()) ** steps for p in (1, 2))
        errors.append(abs(first - math.exp(growth)) + abs(second - math.exp(2 * growth + variance)))
    assert math.log2(errors[0] / errors[1]) > 0.85, errors


def test_ornstein_uhlenbeck_by_every_method() -> None:
    """Constant g: all are solutions of one equation, of known law."""
    t = torch.linspace(0.0, 1.0, 3, dtype=DTYPE)
    y0 = torch.full((4000, 2), 2.0, dtype=DTYPE)
    decay, std = math.exp(-1.5), 0.8 * math.sqrt((1 - math.exp(-3.0)) / 3.0)
    level = torch.tensor([[0.8, 0.0], [0.0, 0.8]], dtype=DTYPE)
    for noise, calculus, method in CASES:
        g = (lambda t, y: torch.full_like(y, 0.8)) if noise == "diagonal" else (lambda t, y: level.expand(*y.shape, 2))
        ys = sdeint(
            lambda t, y: 1.5 * (0.7 - y), g, y0, t, method=method, noise=noise, calculus=calculus, dt=0.02, seed=2
        )
        assert float(ys[-1].mean()) == pytest.approx(0.7 + 1.3 * decay, abs=0.03)
        assert float(ys[-1].std()) == pytest.approx(std, abs=0.03)
        if noise == "diagonal" and method in ("euler", "milstein"):
            additive = sdeint(lambda t, y: 1.5 * (0.7 - y), 0.8, y0, t, dt=0.02, seed=2)
            torch.testing.assert_close(ys, additive, rtol=1e-12, atol=1e-12)


class Path(torchsde.BaseBrownian):
    """The Brownian path that sdeint draws, on its own grid."""

    def __init__(self, shape, steps: int, seed: int) -> None:
        super().__init__()
        self._shape, self.steps, self.seed = shape, steps, seed

    def __call__(self, ta, tb=None, return_U=False, return_A=False):
        n = round(float(ta) * self.steps)
        assert round(float(tb) * self.steps) == n + 1
        return fm.randn(self._shape, seed=self.seed, stream=n, dtype=DTYPE) / math.sqrt(self.steps)

    def __repr__(self) -> str:
        return "Path()"

    dtype = property(lambda self: DTYPE)
    device = property(lambda self: torch.device("cpu"))
    shape = property(lambda self: self._shape)
    levy_area_approximation = property(lambda self: "none")


@each_case
def test_is_torchsdes_on_the_same_path(noise: str, calculus: str, method: str) -> None:
    """Its formulas, where it has the method, with a drift and noise that depend on time and state."""
    mix = torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.4, -0.6]], dtype=DTYPE)

    class System(torch.nn.Module):
        noise_type = "diagonal" if noise == "diagonal" else "general"
        sde_type = calculus

        def f(self, t, y):
            return torch.sin(y) - t * y

        def g(self, t, y):
            if noise == "diagonal":
                return 0.3 + 0.5 * torch.cos(y + t)
            return mix * torch.cos(y + t).sum(-1)[:, None, None] + 0.1 * y[..., None]

    steps, y0 = 16, torch.randn(3, 2, dtype=DTYPE)
    shape = (3, 2) if noise == "diagonal" else (3, 3)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=DTYPE)
    system = System()
    wanted = torchsde.sdeint(system, y0, t, bm=Path(shape, steps, 5), method=method, dt=1.0 / steps)
    got = sdeint(system.f, system.g, y0, t, method=method, noise=noise, calculus=calculus, dt=1.0 / steps, seed=5)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@each_case
def test_gradients_shards_and_precision(noise: str, calculus: str, method: str) -> None:
    t = torch.tensor([0.0, 0.2, 0.5], dtype=DTYPE)
    options = {"method": method, "noise": noise, "calculus": calculus, "seed": 3}

    def function(y0, level):
        def g(t, y):
            diagonal = level * torch.sin(y) + t
            return diagonal if noise == "diagonal" else torch.stack((diagonal, y * level), -1)

        return sdeint(lambda t, y: -level * y + t, g, y0, t, **options)

    y0 = torch.randn(4, 2, dtype=DTYPE)
    level = torch.tensor(0.6, dtype=DTYPE)
    assert not function(y0, level).requires_grad  # nothing needs one
    assert function(y0, level.clone().requires_grad_()).requires_grad
    assert torch.autograd.gradcheck(function, (y0.clone().requires_grad_(), level.clone().requires_grad_()))
    with torch.no_grad():
        whole = function(y0, level)
    torch.testing.assert_close(function(y0.clone().requires_grad_(), level).detach(), whole, rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(function(y0.clone(), level), whole, rtol=1e-12, atol=1e-12)
    wide = torch.cat([y0, y0 + 1.0])
    options["row_offset"] = 0
    with torch.no_grad():
        whole = function(wide, level)
        parts = []
        for first in (0, 3):
            options["row_offset"] = first
            parts.append(function(wide[first : 3 + 5 * (first // 3)], level))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    options["row_offset"] = 0
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            low = function(y0.to(dtype), level.to(dtype))
        assert low.dtype == dtype
        assert low.isfinite().all()


def test_masked_noise_leaves_padding_to_the_drift() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    y0 = torch.ones(2, 3, 4, dtype=DTYPE)
    t = torch.linspace(0.0, 1.0, 5, dtype=DTYPE)
    for options in (
        {"diffusion": 0.5},
        {"diffusion": lambda t: torch.full((4,), 0.5)},
        {"diffusion": lambda t, y: y, "noise": "diagonal", "method": "milstein"},
    ):
        ys = sdeint(lambda t, y: torch.zeros_like(y), y0=y0, t=t, noise_transform=fm.MaskedNoise(mask), **options)
        moved = ys[-1] != 1.0
        if options.get("method") != "milstein":
            assert torch.equal(moved, mask[..., None].expand_as(moved))
        assert moved[mask].all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"drift": 1.0}, TypeError, "drift: expected"),
        ({"diffusion": 1.0}, TypeError, r"diffusion: expected a function g\(t, y\) with diagonal noise"),
        ({"diffusion": lambda t, y: 1.0}, TypeError, r"diffusion\(t, y\): expected a floating tensor"),
        ({"diffusion": lambda t, y: y[:1]}, ValueError, r"diffusion\(t, y\): expected y's shape"),
        ({"diffusion": lambda t, y: y, "noise": "matrix"}, ValueError, "a dimension of noises"),
        ({"drift": lambda t, y: y[:1]}, ValueError, "expected an output of the state's shape"),
        ({"noise": "general"}, ValueError, "noise: expected one of 'additive'"),
        ({"noise": None}, TypeError, "noise: expected one of the names"),
        ({"calculus": "stratonovitch"}, ValueError, r"calculus: expected one of .*\(nearest: 'stratonovich'\)"),
        ({"method": "heun"}, ValueError, "method: expected one of 'euler', 'milstein'"),
        ({"method": "euler", "calculus": "stratonovich"}, ValueError, "method: expected one of 'heun'"),
        ({"method": "milstein", "noise": "matrix"}, ValueError, "method: expected one of 'euler'"),
        ({"y0": torch.tensor(1.0)}, ValueError, "y0: expected at least one dimension"),
        ({"y0": [1.0]}, TypeError, "y0: expected"),
        ({"y0": torch.ones(2, dtype=torch.int64)}, TypeError, "y0: expected"),
        ({"t": torch.tensor([1.0, 0.0])}, ValueError, "t: expected increasing times"),
        ({"t": torch.tensor([0.0, 0.0])}, ValueError, "t: expected strictly monotone times"),
        ({"t": torch.tensor([0.0, math.nan])}, ValueError, "t: expected finite times"),
        ({"t": torch.tensor([[0.0], [1.0]])}, ValueError, "t: expected one dimension"),
        ({"t": torch.tensor([0.0, 1.0], requires_grad=True)}, ValueError, "t: expected times without a gradient"),
        ({"t": torch.zeros(0)}, ValueError, "t: expected at least one time"),
        ({"dt": -1.0}, ValueError, "dt: expected"),
        ({"dt": "0.1"}, TypeError, "dt: expected a number"),
        ({"row_offset": -1}, ValueError, "row_offset: expected"),
        ({"row_offset": 0.5}, TypeError, "row_offset: expected"),
        ({"seed": "x"}, TypeError, "seed: expected"),
        ({"noise_transform": 3}, TypeError, "noise_transform: expected"),
        ({"noise_transform": fm.MaskedNoise}, TypeError, "noise_transform: expected"),
        ({"noise_transform": lambda z: z[:1]}, ValueError, r"noise_transform\(z\): expected"),
    ],
    ids=itertools.count(),
)
def test_errors_name_the_argument(change, error, message) -> None:
    arguments = {
        "drift": lambda t, y: -y,
        "diffusion": lambda t, y: y,
        "y0": torch.ones(2, 3),
        "t": torch.tensor([0.0, 1.0]),
        "noise": "diagonal",
    }
    with pytest.raises(error, match=message):
        sdeint(**{**arguments, **change})
