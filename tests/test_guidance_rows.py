"""Guidance of each sample by itself: statistics of its row, ends of an interval, and what its batch mates do not do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from guidance_problems import NULL, B, Model, close, data, pair
from torch import Tensor

import fmkernels as fm
from fmkernels.guidance import APG, CFG, AutoGuidance, CFGPlusPlus, ClassifierGuidance, RectifiedCFGPlusPlus

# ---------------------------------------------------------------------- standard deviations


def rescaled(c: Tensor, u: Tensor, rescale: float = 1.0, scale: float = 3.0) -> Tensor:
    """One step of length 1 from 0 with the branches' outputs c and u."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.where((y == NULL).reshape(-1, *(1,) * (x.dim() - 1)), u, c)

    guidance = CFG(scale, negative={"y": NULL}, rescale=rescale, batched=False)
    return fm.sample(model, torch.zeros_like(c), steps=1, guidance=guidance, y=torch.zeros(len(c)).long())[0]


@pytest.mark.parametrize("shape", [(2, 16), (2, 4099), (2, 3, 8, 8)])
@pytest.mark.parametrize("mean", [0.0, 10.0, 1e3, -1e4])
def test_rescale_of_a_mean_far_from_zero(mean: float, shape: tuple[int, ...]) -> None:
    """Deviations were differences of sums of squares: at 1e3 standard deviations nothing was left of them."""
    g = torch.Generator().manual_seed(1)
    c, u = (torch.randn(shape, generator=g) * max(abs(mean) * 1e-3, 1e-2) + mean for _ in range(2))
    v = u + 3.0 * (c - u)  # what float32 makes of it, whose deviation is asked for
    dims = tuple(range(1, len(shape)))
    ratio = c.double().std(dims, keepdim=True) / v.double().std(dims, keepdim=True)
    torch.testing.assert_close(rescaled(c, u).double(), v.double() * ratio, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1e3, 1e-20])
def test_rescale_leaves_a_constant_field(value: float, dtype: torch.dtype) -> None:
    c, u = (torch.full((2, 17), w * value, dtype=dtype) for w in (1.0, 0.7))
    got, wanted = rescaled(c, u, 0.7), (c.double() * 3.0 - u.double() * 2.0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), wanted, rtol=4 * eps, atol=0.0)


@pytest.mark.parametrize("constant", ["all", "conditional", "unconditional"])
def test_rescale_of_constant_rows_beside_others_has_finite_gradients(constant: str) -> None:
    x, y = data()
    x[0] = 0.3
    x.requires_grad_()

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        null = (y == NULL)[:, None]
        flat = torch.where(null, 0.7, 1.0) * x[:1, :1]
        whole = x if constant == "all" else torch.where(null == (constant == "unconditional"), flat, x.cos())
        return torch.where(null, 0.7, 1.0) * whole

    v = CFG(3.0, negative={"y": NULL}, rescale=0.7).at(model, {"y": y})(x, torch.tensor(0.5))
    assert v.isfinite().all()
    assert torch.autograd.grad(v.sum(), x)[0].isfinite().all()


# ---------------------------------------------------------------------- ends of an interval


@pytest.mark.parametrize(
    ("interval", "inside"),
    [((0.3, 0.7), 5), ((0.1, 0.6), 6), ((0.2, 0.2), 1), ((0.21, 0.29), 0), ((0.3, 0.69), 4), ((0.7, 1.0), 3)],
)
def test_an_intervals_ends_belong_to_it_whatever_a_grids_rounding(interval: Any, inside: int) -> None:
    x, y = data()
    singles = torch.linspace(0, 1, 11)
    for times in (None, singles, singles.double(), torch.arange(11) * 0.1, singles[:, None].expand(11, B)):
        model = Model()
        guidance = CFG(3.0, negative={"y": NULL}, interval=interval)
        grid = {"steps": 10} if times is None else {"time_grid": times}
        fm.sample(model, x, guidance=guidance, y=y, **grid)
        assert model.rows.count(2 * B) == inside
    # where the device alone knows the times
    guided = CFG(3.0, negative={"y": NULL}, interval=interval).at(Model(), {"y": y})
    for dtype in (torch.float32, torch.float64):
        x = x.to(dtype)
        times = (torch.arange(10, dtype=dtype) * 0.1).to(dtype)
        differs = [not torch.allclose(guided(x, t), pair(y)(x, t.expand(B))[0]) for t in times]
        assert sum(differs) == inside


# ---------------------------------------------------------------------- each sample by itself

APGS = [
    {"base": base, **options}
    for base in ("conditional", "unconditional")
    for options in ({}, {"eta": 1.0}, {"eta": 0.5, "threshold": 1.0}, {"momentum": -0.5}, {"eta": 0.3, "momentum": 0.7})
]
NEGATIVE: Any = {"negative": {"y": NULL}, "interval": (0.2, 0.7)}
OTHERS = {
    "cfg": CFG(3.0, **NEGATIVE),
    "rescale": CFG(3.0, rescale=0.7, **NEGATIVE),
    "zero star": CFG(3.0, zero_star=True, **NEGATIVE),
    "cfg++": CFGPlusPlus(0.5, **NEGATIVE),
    "rectified": RectifiedCFGPlusPlus(2.0, **NEGATIVE),
    "autoguidance": AutoGuidance(lambda x, t, y: -x, 2.0, interval=(0.2, 0.7)),
    "classifier": ClassifierGuidance(lambda x, t: -x, 1.5, interval=(0.2, 0.7)),
    "a scale that becomes 1": APG(
        lambda t: 1.0 + 2.0 * (t > 0.3), base="unconditional", momentum=-0.5, negative={"y": NULL}
    ),
}
GUIDANCES = {**{str(options): APG(3.0, **options, **NEGATIVE) for options in APGS}, **OTHERS}
OWN = torch.linspace(0, 1, 9, dtype=torch.float64)
GRIDS = torch.stack([OWN, OWN**2, 0.1 + 0.8 * OWN], 1)


@pytest.mark.parametrize("name", GUIDANCES)
def test_a_sample_with_a_grid_of_its_own_is_what_it_is_alone(name: str) -> None:
    """In the stages of a step too: one's may be in the interval while another's are not."""
    x, y = data()
    guidance = GUIDANCES[name]
    bound = isinstance(guidance, CFGPlusPlus | RectifiedCFGPlusPlus)
    for method in ("euler",) if bound else ("euler", "heun2", "dpmpp_2m"):
        together = fm.sample(Model(), x, method=method, time_grid=GRIDS, guidance=guidance, y=y)[0]
        for i in range(B):
            own = slice(i, i + 1)
            alone = fm.sample(Model(), x[own], method=method, time_grid=GRIDS[:, i], guidance=guidance, y=y[own])[0]
            close(together[own], alone, 1e-11)


@pytest.mark.parametrize("options", APGS, ids=str)
def test_apg_beyond_its_interval_is_the_conditional_velocity(options: dict[str, Any]) -> None:
    x, y = data()
    guidance = APG(3.0, negative={"y": NULL}, interval=(0.9, 1.0), **options)
    times = torch.tensor([0.1, 0.95, 0.5], dtype=torch.float64)
    got, conditional = guidance.at(Model(), {"y": y})(x, times), pair(y)(x, times)[0]
    close(got[::2], conditional[::2])
    assert (got[1] - conditional[1]).abs().max() > 1e-2
    alone = {"method": "dopri5", "time_grid": [0.0, 0.8], "rtol": 1e-8, "atol": 1e-8, "y": y}
    close(fm.sample(Model(), x, guidance=guidance, **alone)[0], fm.sample(Model(), x, **alone)[0], 1e-9)


@pytest.mark.parametrize("options", APGS, ids=str)
def test_apg_of_scales_of_1_is_that_of_the_number_1(options: dict[str, Any]) -> None:
    x, y = data()
    ones, number = (APG(w, negative={"y": NULL}, **options) for w in (torch.tensor([1.0, 2.0, 1.0]), 1.0))
    got = fm.sample(Model(), x, steps=5, guidance=ones, y=y)[0]
    close(got[::2], fm.sample(Model(), x, steps=5, guidance=number, y=y)[0][::2])
    time = torch.tensor(0.3, dtype=torch.float64)
    close(ones.at(Model(), {"y": y})(x, time)[::2], pair(y)(x, time.expand(B))[0][::2])


@pytest.mark.parametrize("path", [fm.paths.CondOT(), fm.paths.Cosine()], ids=repr)
def test_classifier_guidance_of_samples_with_grids_of_their_own(path: fm.paths.Path) -> None:
    """Pure noise, where the term is left out, is where each sample's own alpha is 0."""
    x, y = data()
    guidance = ClassifierGuidance(lambda x, t: -x, 1.5)
    grid = np.linspace([0.0, 0.2, 0.1], [1.0, 0.8, 0.4], 5)
    together = fm.sample(Model(), x, time_grid=grid, guidance=guidance, path=path, y=y)[0]
    for i in range(B):
        own = slice(i, i + 1)
        alone = fm.sample(Model(), x[own], time_grid=grid[:, i], guidance=guidance, path=path, y=y[own])[0]
        close(together[own], alone)
