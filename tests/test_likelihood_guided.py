"""Log-densities of guided flows, and of samples with padding: against the trace of the whole Jacobian."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from likelihood_problems import DTYPE, Network, expand, normal_flow
from torch import Tensor, nn

import fmkernels as fm
from fmkernels.guidance import APG, CFG, AutoGuidance, CFGPlusPlus, ClassifierGuidance, MultiCondition

B, D = 4, 3
X = torch.randn(B, D, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(B) % 3


class Labelled(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = Network(D + 1, seed=seed)
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.rows.append(x.shape[0])
        y = torch.zeros(x.shape[0]) if y is None else y
        return self.net(torch.cat([x, y.to(x.dtype).reshape(-1, 1)], 1), t)[:, :D]


def classifier(x: Tensor, t: Tensor) -> Tensor:
    return -torch.sin(x)


SCALES = torch.linspace(0.5, 3.0, B)
GUIDANCE = {
    "cfg": CFG(2.0, negative={"y": 5}),
    "cfg apart": CFG(2.0, negative={"y": 5}, batched=False),
    "scales": CFG(SCALES, negative={"y": 5}),
    "function": CFG(lambda t: 1.0 + t, negative={"y": 5}, interval=(0.2, 0.8)),
    "rescale": CFG(2.0, negative={"y": 5}, rescale=0.7),
    "zero star": CFG(2.0, negative={"y": 5}, zero_star=True),
    "apg": APG(3.0, negative={"y": 5}, eta=0.3, threshold=1.0),
    "weak": AutoGuidance(Labelled(3), 2.0),
    "several": MultiCondition([({"y": 1}, 1.5), ({"y": 2}, -0.5)], negative={"y": 5}),
    "classifier": ClassifierGuidance(classifier, 0.7, gradient_kwargs={}),
}


def guided_trace(guidance: Any, model: Any, x: Tensor, t: Tensor, path: fm.paths.Path, prediction: str) -> Tensor:
    field = guidance.at(model, {"y": LABELS}, path, prediction)
    jacobian = torch.autograd.functional.jacobian(lambda x: field(x, t).sum(0), x)  # (D, B, D)
    return jacobian.diagonal(dim1=0, dim2=2).sum(1)


@pytest.mark.parametrize("options", [{}, {"chunk": 3}, {"mode": "forward"}, {"mode": "forward", "chunk": 3}], ids=str)
@pytest.mark.parametrize("name", GUIDANCE)
def test_log_density_of_a_guided_flow(name: str, options: dict[str, Any]) -> None:
    """Euler's two steps, against the trace of the guided field's Jacobian."""
    guidance, model, path = GUIDANCE[name], Labelled(), fm.paths.CondOT()
    grid = [0.1, 0.4, 0.9]
    got = fm.log_prob(model, X, method="euler", time_grid=grid, guidance=guidance, y=LABELS, **options)
    x, integral = X, torch.zeros(B, dtype=DTYPE)
    for t, u in ((0.9, 0.4), (0.4, 0.1)):
        times = torch.full((B,), t, dtype=DTYPE)
        integral = integral + (u - t) * guided_trace(guidance, model, x, times, path, "velocity")
        x = x + (u - t) * guidance.at(model, {"y": LABELS})(x, times)
    torch.testing.assert_close(got.x_0, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.delta_log_p, integral, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", ["x_1", "score"])
@pytest.mark.parametrize("name", ["cfg", "scales", "weak"])
def test_guided_adaptive_solves_agree_with_fine_grids(name: str, prediction: str) -> None:
    guidance, model, path = GUIDANCE[name], Labelled(), fm.paths.CondOT()
    options = {"guidance": guidance, "y": LABELS, "prediction": prediction, "path": path, "t_0": 0.1, "t_1": 0.8}
    fine = fm.log_prob(model, X, method="rk4", steps=40, **options)
    model.rows.clear()
    # shrinking batches too
    got = fm.log_prob(model, X, rtol=1e-8, atol=1e-8, compact=1.0, batched=("y",), **options)
    assert got.compaction == "on"
    torch.testing.assert_close(got.log_prob, fine.log_prob, rtol=1e-5, atol=1e-5)
    x_1, forward = fm.sample_with_log_prob(model, got.x_0, rtol=1e-8, atol=1e-8, **options)
    torch.testing.assert_close(x_1, X, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(forward.log_prob, got.log_prob, rtol=1e-5, atol=1e-5)


def test_guided_estimates_and_gradients() -> None:
    model = Labelled()
    exact = fm.log_prob(model, X, method="rk4", steps=4, guidance=GUIDANCE["cfg"], y=LABELS)
    draws = torch.stack(
        [
            fm.log_prob(
                model,
                X,
                method="rk4",
                steps=4,
                guidance=GUIDANCE["cfg"],
                y=LABELS,
                divergence="hutchinson",
                probes=32,
                generator=torch.Generator().manual_seed(seed),
            ).log_prob
            for seed in range(8)
        ]
    )
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact.log_prob).abs() < 5 * error).all()
    for method in ("rk4", "dopri5"):
        x = X.clone().requires_grad_()
        steps = 4 if method == "rk4" else None
        options = {"method": method, "steps": steps, "guidance": GUIDANCE["apg"], "y": LABELS, "rtol": 1e-7}
        (grad,) = torch.autograd.grad(fm.log_prob(model, x, gradient=True, **options).log_prob.sum(), x)
        step = 1e-5 * torch.ones_like(X)
        ends = [fm.log_prob(model, X + s * step, **options).log_prob.sum() for s in (1, -1)]
        torch.testing.assert_close(grad.sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_differentiated_is_told() -> None:
    model = Labelled()

    def detached(x: Tensor, t: Tensor) -> Tensor:
        return classifier(x.detach(), t)

    for rule in (ClassifierGuidance(detached, 1.0), AutoGuidance(detached, 2.0)):
        for options in ({"method": "euler", "steps": 2}, {}):
            with pytest.raises(ValueError, match="guidance: expected networks whose outputs depend on x by diff"):
                fm.log_prob(model, X, guidance=rule, **options)
    with pytest.raises(ValueError, match="guidance: expected a rule that is a velocity, but CFGPlusPlus"):
        fm.log_prob(model, X, guidance=CFGPlusPlus(0.5, negative={"y": 5}), y=LABELS)


# ---------------------------------------------------------------------- padding


T, C = 5, 2
LENGTHS = torch.tensor([5, 2, 4, 1])
MASK = torch.arange(T) < LENGTHS[:, None]
OTHERS = MASK * (1.0 + torch.arange(T))


class Tokens(nn.Module):
    """Tokens that see each other, those that are there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2 * C + 1, 16), nn.SiLU(), nn.Linear(16, C)).to(DTYPE)

    def forward(self, x: Tensor, t: Tensor, there: Tensor) -> Tensor:
        weights = there[..., None].to(x.dtype)
        mean = (x * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        return self.net(torch.cat([x, mean.expand_as(x), expand(t, x).expand(*x.shape[:2], 1)], -1))


def padded(fill: float) -> Tensor:
    x = torch.randn(B, T, C, dtype=DTYPE, generator=torch.Generator().manual_seed(2))
    return torch.where(MASK[..., None], x, fill)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "rk4", "steps": 3},
        {"rtol": 1e-7, "atol": 1e-7},
        {"rtol": 1e-7, "atol": 1e-7, "compact": 1.0, "batched": ("there",)},
        {"rtol": 1e-7, "atol": 1e-7, "gradient": True},
        {"method": "euler", "steps": 3, "prediction": "x_1", "t_1": 0.9},
        {"method": "euler", "steps": 3, "guidance": CFG(2.0, negative={"there": OTHERS}, batched=("there",))},
    ],
    ids=str,
)
def test_padding_has_no_density(options: dict[str, Any], mode: str) -> None:
    """The density of each sample is that of its tokens alone, whatever the padding holds."""
    model = Tokens()
    guidance = options.get("guidance")
    for fill in (0.0, 7.0):
        x = padded(fill)
        got = fm.log_prob(model, x, mask=MASK, mode=mode, there=MASK, **options)
        assert got.dims.tolist() == (LENGTHS * C).tolist()
        assert torch.equal(got.x_0[~MASK], x[~MASK]), "padding stays as it is"
        for i, n in enumerate(LENGTHS.tolist()):
            own = dict(options)
            if guidance is not None:
                own["guidance"] = CFG(2.0, negative={"there": OTHERS[i : i + 1, :n]})
            own.pop("batched", None)
            alone = fm.log_prob(model, x[i : i + 1, :n], mode=mode, there=MASK[i : i + 1, :n], **own)
            torch.testing.assert_close(got.log_prob[i : i + 1], alone.log_prob, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(got.x_0[i : i + 1, :n], alone.x_0, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(got.bits_per_dim(2.0)[i : i + 1], alone.bits_per_dim(2.0), rtol=1e-6, atol=1e-6)
        if "gradient" not in options:
            x_1, back = fm.sample_with_log_prob(model, got.x_0, mask=MASK, mode=mode, there=MASK, **options)
            assert torch.equal(x_1[~MASK], x[~MASK])
            if "rtol" in options:
                torch.testing.assert_close(back.log_prob, got.log_prob, rtol=1e-5, atol=1e-5)


def test_probes_of_padding_are_zero() -> None:
    x, model = padded(0.0), Tokens()
    options = {"method": "euler", "steps": 2, "mask": MASK, "there": MASK}
    exact = fm.log_prob(model, x, **options).log_prob
    draws = torch.stack(
        [
            fm.log_prob(
                model,
                x,
                divergence="hutchinson",
                probes=16,
                fresh=fresh,
                generator=torch.Generator().manual_seed(seed),
                **options,
            ).log_prob
            for seed in range(8)
            for fresh in (False, True)
        ]
    )
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / math.sqrt(len(draws)) + 1e-9).all()


def test_masks_of_every_leading_shape() -> None:
    """Of samples, tokens, elements; a sample without elements has the density 1 of nothing."""
    x = torch.randn(3, 4, 2, dtype=DTYPE)
    flow = normal_flow(0.3, 0.7)
    each = fm.log_prob(flow, x.reshape(24, 1), rtol=1e-8, atol=1e-8).log_prob.view(3, 4, 2)
    g = torch.Generator().manual_seed(3)
    for shape in ((3,), (3, 4), (3, 4, 2)):
        mask = torch.rand(shape, generator=g) > 0.4
        wide = mask.reshape(shape + (1,) * (3 - len(shape)))
        want = torch.where(wide, each, 0.0).sum((1, 2))
        for options in ({"rtol": 1e-8, "atol": 1e-8}, {"method": "dopri8", "steps": 12}):
            got = fm.log_prob(flow, x, mask=mask, **options).log_prob
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got = fm.log_prob(flow, x, mask=torch.zeros(3, 4, dtype=torch.bool))
    assert got.log_prob.tolist() == [0.0] * 3
    for wrong, error in (
        (torch.ones(3, 4), TypeError),
        ([True] * 3, TypeError),
        (True, TypeError),
        (torch.ones(4, dtype=torch.bool), ValueError),
        (torch.ones(3, 1, dtype=torch.bool), ValueError),
        (torch.ones(3, dtype=torch.bool, device="meta"), ValueError),
    ):
        with pytest.raises(error, match=r"^mask: expected"):
            fm.log_prob(flow, x, mask=wrong)
    with pytest.raises(ValueError, match="log_p0: expected a function from states"):
        fm.log_prob(flow, x, log_p0=lambda x: x.sum())
