"""Paths, their sampling, targets and conversions. A new schedule is one line in PATHS."""

from __future__ import annotations

import ast
import itertools
import math
from pathlib import Path as File

import pytest
import torch
from path_problems import Plain

import fmkernels as fm
from fmkernels.paths import (
    VE,
    VP,
    CondOT,
    ConstantBridge,
    Cosine,
    LinearVP,
    OptimalTransport,
    Path,
    Polynomial,
    SchrodingerBridge,
)

AFFINE = [
    CondOT(),
    OptimalTransport(),
    OptimalTransport(0.1),
    Polynomial(1),
    Polynomial(2.5),
    Cosine(),
    LinearVP(),
    VP(),
    VE(),
    Plain(),
]
BRIDGES = [SchrodingerBridge(0.7), ConstantBridge(0.1), ConstantBridge(0.2, base=Cosine())]
PATHS = AFFINE + BRIDGES
TARGETS = ("velocity", "x_1", "x_0", "score", "v", "edm")
ENDS = torch.tensor([0.0, 1.0])
INSIDE = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
NEAR = torch.tensor([0.0, 1e-7, 1e-4, 0.3, 0.9999, 1 - 2.0**-23, 1.0], dtype=torch.float64)
paths = pytest.mark.parametrize("path", PATHS, ids=repr)
affine = pytest.mark.parametrize("path", AFFINE, ids=repr)


def test_the_files_of_paths_import_one_way() -> None:
    """schedule <- fused, targets <- batch <- path <- affine <- bridges, discrete, imports for types alone included."""
    order = [
        "derivatives",
        "schedule",
        "fused",
        "targets",
        "batch",
        "path",
        "affine",
        "bridges",
        "discrete",
        "__init__",
    ]
    folder = File(fm.paths.__file__).parent
    assert {file.stem for file in folder.glob("*.py")} == set(order)
    for rank, name in enumerate(order):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                for imported in [node.module] if node.module else [alias.name for alias in node.names]:
                    assert order.index(imported) < rank, f"{name} imports {imported}"


@paths
def test_coefficients_are_float32_finite_and_accurate_up_to_both_ends(path: Path) -> None:
    exact = path.coefficients(NEAR)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for value in path.coefficients(ENDS.to(dtype)):
            if value is not None:
                assert value.dtype == torch.float32
                assert torch.isfinite(value).all()
    got = path.coefficients(NEAR.float())
    for name, a, b in zip(exact._fields, got, path.coefficients(NEAR.float().double()), strict=True):
        if a is None:
            assert b is None
            continue
        error = (a.double() - b).abs() / b.abs().clamp(min=1e-6)
        # a user's 1 - t and sqrt(t (1 - t)) lose no more than t itself resolves
        assert error.max() < 2e-4, (name, error)


@paths
def test_derivatives_are_derivatives(path: Path) -> None:
    h = 1e-6
    low, high, at = path.coefficients(INSIDE - h), path.coefficients(INSIDE + h), path.coefficients(INSIDE)
    pairs = [("alpha_t", "d_alpha_t"), ("sigma_t", "d_sigma_t"), ("gamma_t", "d_gamma_t")]
    for value, slope in pairs:
        if getattr(at, value) is not None:
            difference = (getattr(high, value) - getattr(low, value)) / (2 * h)
            torch.testing.assert_close(getattr(at, slope), difference, rtol=3e-9, atol=3e-9)


@pytest.mark.parametrize(
    ("path", "t", "alpha", "sigma", "d_alpha", "d_sigma"),
    [
        (CondOT(), 0.25, 0.25, 0.75, 1.0, -1.0),
        (OptimalTransport(0.1), 0.5, 0.5, 0.55, 1.0, -0.9),
        (Polynomial(2), 0.5, 0.25, 0.75, 1.0, -1.0),
        (Cosine(), 1 / 3, 0.5, math.sqrt(3) / 2, math.pi / 2 * math.sqrt(3) / 2, -math.pi / 4),
        (LinearVP(), 0.6, 0.6, 0.8, 1.0, -0.75),
        (VE(0.01, 1.0), 0.5, 1.0, 0.1, 0.0, -0.1 * math.log(100)),
    ],
    ids=repr,
)
def test_known_values(path, t, alpha, sigma, d_alpha, d_sigma) -> None:
    c = path.coefficients(torch.tensor([t], dtype=torch.float64))
    for got, want in zip(c, (alpha, sigma, d_alpha, d_sigma), strict=False):
        assert got.item() == pytest.approx(want, rel=1e-12)


def test_vp_is_the_diffusion_it_says() -> None:
    path, t = VP(0.1, 20.0), torch.linspace(0, 0.999, 50, dtype=torch.float64)
    s = 1 - t
    log_mean = -0.25 * s**2 * 19.9 - 0.5 * s * 0.1  # Song et al. 2021, eq. 33
    c = path.coefficients(t)
    torch.testing.assert_close(c.alpha_t, torch.exp(log_mean), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(c.alpha_t**2 + c.sigma_t**2, torch.ones_like(t), rtol=1e-14, atol=1e-14)


@affine
def test_ends(path: Path) -> None:
    c = path.coefficients(ENDS)
    if not isinstance(path, VE | VP):
        assert c.alpha_t.tolist() == [0.0, 1.0]
        assert c.sigma_t[0] == 1.0
        assert abs(c.sigma_t[1]) == getattr(path, "sigma_min", 0.0) or isinstance(path, OptimalTransport)


@affine
def test_snr_and_its_inverse(path: Path) -> None:
    t = torch.linspace(0.01, 0.99, 41, dtype=torch.float64)
    snr = path.snr(t)
    c = path.coefficients(t)
    torch.testing.assert_close(snr, (c.alpha_t / c.sigma_t) ** 2)
    torch.testing.assert_close(path.log_snr(t), torch.log(snr), rtol=1e-14, atol=1e-14)
    assert (snr[1:] > snr[:-1]).all()
    torch.testing.assert_close(path.snr_inverse(snr), t, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(path.snr_inverse(snr.float()), t.float(), rtol=1e-6, atol=1e-6)
    extremes = path.snr_inverse(torch.tensor([1e-30, 1e30], dtype=torch.float64))
    assert ((extremes >= 0) & (extremes <= 1)).all()


@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sample_and_loss_equal_plain_pytorch(path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x_1 = torch.randn(6, 5, 4).to(dtype)
    for x_0, store in ((torch.randn(6, 5, 4).to(dtype), None), (None, True), (None, False)):
        batch = path.sample(x_1, x_0, store_noise=store)
        assert batch.t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert batch.t.shape == (6,)
        c = path.coefficients(batch.t.double())
        wide = [v[:, None, None] if v is not None else None for v in c]
        x_1d, x_0d = x_1.double(), batch.x_0.double()
        z = None if batch.z is None else batch.z.double()
        want = wide[0] * x_1d + wide[1] * x_0d + (0 if z is None else wide[4] * z)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-6}[dtype]
        torch.testing.assert_close(batch.x_t.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())
        u = wide[2] * x_1d + wide[3] * x_0d + (0 if z is None else wide[5] * z)
        pred = torch.randn(6, 5, 4).to(dtype)
        loss = fm.cfm_loss(pred, batch)
        torch.testing.assert_close(loss.double(), (pred.double() - u).square().mean(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(batch.target().double(), u, rtol=tolerance, atol=tolerance * u.abs().max().item())


def test_functional_form_equals_the_batch() -> None:
    torch.manual_seed(0)
    x_1, x_0, pred, t = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 3), torch.rand(5)
    path = Cosine()
    batch = path.sample(x_1, x_0, t)
    for target in TARGETS:
        a = fm.cfm_loss(pred, batch, target=target)
        b = fm.cfm_loss(pred, x_0=x_0, x_1=x_1, t=t, path=path, target=target)
        assert torch.equal(a, b)
    assert torch.isfinite(fm.cfm_loss(pred, x_1=x_1, t=0.5, path=path, target="x_1")), "x_1 needs no x_0"


def test_per_token_times_and_masks() -> None:
    torch.manual_seed(0)
    x_1, x_0, t = torch.randn(3, 7, 4), torch.randn(3, 7, 4), torch.rand(3, 7)
    batch = CondOT().sample(x_1, x_0, t)
    torch.testing.assert_close(batch.x_t, t[..., None] * x_1 + (1 - t[..., None]) * x_0)
    pred = torch.randn(3, 7, 4)
    mask = torch.rand(3, 7) > 0.5
    mask[1] = False
    pred[~mask] = float("nan")
    error = (pred - (x_1 - x_0)).square()
    torch.testing.assert_close(fm.cfm_loss(pred, batch, mask=mask), error[mask].mean())
    per_sample = fm.cfm_loss(pred, batch, mask=mask, reduction="none")
    assert per_sample[1] == 0
    torch.testing.assert_close(per_sample[0], error[0][mask[0]].mean())
    weighted = fm.cfm_loss(pred, batch, mask=mask, weight=t)
    torch.testing.assert_close(weighted, (error * t[..., None])[mask].mean())
    assert fm.cfm_loss(pred, batch, mask=torch.zeros(3, dtype=torch.bool)) == 0


@pytest.mark.parametrize("store", [True, False])
def test_draws_follow_the_generator_and_shards_draw_the_whole(store: bool) -> None:
    x_1 = torch.randn(8, 5)

    def draw(**options):
        return CondOT().sample(x_1, generator=torch.Generator().manual_seed(3), store_noise=store, **options)

    a, b = draw(), draw()
    assert torch.equal(a.x_t, b.x_t)
    assert torch.equal(a.t, b.t)
    torch.manual_seed(7)
    c = CondOT().sample(x_1, store_noise=store)
    torch.manual_seed(7)
    assert torch.equal(c.x_t, CondOT().sample(x_1, store_noise=not store).x_t)
    assert not torch.equal(c.x_t, CondOT().sample(x_1).x_t)

    t = torch.rand(8)
    whole = CondOT().sample(x_1, t=t, generator=torch.Generator().manual_seed(3), store_noise=store)
    for first in (0, 3):
        shard = CondOT().sample(
            x_1[first : first + 3],
            t=t[first : first + 3],
            generator=torch.Generator().manual_seed(3),
            row_offset=first,
            store_noise=store,
        )
        assert torch.equal(shard.x_t, whole.x_t[first : first + 3])
        assert torch.equal(shard.x_0, whole.x_0[first : first + 3])


@affine
@pytest.mark.parametrize(("source", "target"), list(itertools.product(TARGETS, TARGETS)))
def test_conversions(path: Path, source: str, target: str) -> None:
    torch.manual_seed(0)
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    x_1, x_0 = torch.randn(7, 3, 2, dtype=torch.float64), torch.randn(7, 3, 2, dtype=torch.float64)
    batch = path.sample(x_1, x_0, t)
    got = path.convert(batch.target(source), batch.x_t, t, source, target)
    torch.testing.assert_close(got, batch.target(target), rtol=1e-11, atol=1e-11)
    in_float32 = path.convert(batch.target(source).float(), batch.x_t.float(), t.float(), source, target)
    assert in_float32.dtype == torch.float32
    torch.testing.assert_close(in_float32.double(), batch.target(target), rtol=1e-3, atol=1e-3)
    for end in (0.0, 1.0, torch.zeros(7), torch.ones(7)):
        x_t = path.sample(x_1.float(), x_0.float(), end).x_t
        assert torch.isfinite(path.convert(x_1.float(), x_t, end, source, target)).all()


def test_conversion_at_the_ends_has_its_limit() -> None:
    """Velocity to data at t = 0 and to noise at t = 1 lose nothing: x_1 = x_t + (1 - t) v, x_0 = x_t - t v."""
    x_1, x_0 = torch.randn(4, 3), torch.randn(4, 3)
    for t in (0.0, 1.0):
        batch = CondOT().sample(x_1, x_0, t)
        v = x_1 - x_0
        torch.testing.assert_close(CondOT().convert(v, batch.x_t, t, "velocity", "x_1"), x_1)
        torch.testing.assert_close(CondOT().convert(v, batch.x_t, t, "velocity", "x_0"), x_0)


def test_conversion_broadcasts_along_leading_dimensions_when_batch_equals_width() -> None:
    x_1, x_0, t = torch.randn(4, 4), torch.randn(4, 4), torch.tensor([0.1, 0.3, 0.6, 0.9])
    batch = CondOT().sample(x_1, x_0, t)
    torch.testing.assert_close(fm.convert(CondOT(), x_1 - x_0, batch.x_t, t, "velocity", "x_1"), x_1)


def test_conversion_is_differentiable_and_keeps_the_predictions_dtype() -> None:
    prediction = torch.randn(3, 2, dtype=torch.bfloat16, requires_grad=True)
    out = CondOT().convert(prediction, torch.randn(3, 2), torch.rand(3), "velocity", "x_1")
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert prediction.grad is not None


def test_edm_target_is_edms() -> None:
    """Karras et al. 2022, table 1: D = c_skip x + c_out F on x = x_t / alpha with noise level sigma / alpha."""
    path = VP()
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x_1, x_0 = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    c = path.coefficients(t)
    level = (c.sigma_t / c.alpha_t)[:, None]
    x = x_1 + level * x_0
    batch = path.sample(x_1, x_0, t)
    for s in (0.5, 1.7):
        c_skip, c_out = s**2 / (level**2 + s**2), level * s / (level**2 + s**2).sqrt()
        target = (x_1 - c_skip * x) / c_out
        torch.testing.assert_close(batch.target("edm", sigma_data=s), target, rtol=1e-14, atol=1e-14)
        loss = fm.cfm_loss(torch.zeros_like(x_1), batch, target="edm", sigma_data=s)
        torch.testing.assert_close(loss, target.square().mean(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(fm.cfm_loss(target, batch, target="edm", sigma_data=1.7), torch.zeros_like(loss))
    with pytest.raises(ValueError, match="sigma_data: expected none but for the target 'edm'"):
        fm.cfm_loss(x_1, batch, sigma_data=1.0)


def test_bridges_are_torchcfms() -> None:
    torch.manual_seed(0)
    x_1, x_0, z = (torch.randn(5, 3, dtype=torch.float64) for _ in range(3))
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    w = t[:, None]
    batch = SchrodingerBridge(0.5).sample(x_1, x_0, t, z=z)
    mean = w * x_1 + (1 - w) * x_0
    torch.testing.assert_close(batch.x_t, mean + 0.5 * (w * (1 - w)).sqrt() * z, rtol=1e-14, atol=1e-14)
    flow = (1 - 2 * w) / (2 * w * (1 - w)) * (batch.x_t - mean) + x_1 - x_0
    torch.testing.assert_close(batch.target(), flow, rtol=1e-14, atol=1e-14)
    batch = ConstantBridge(0.1, base=Cosine()).sample(x_1, x_0, t, z=z)
    angle = math.pi / 2 * w
    torch.testing.assert_close(
        batch.x_t, torch.cos(angle) * x_0 + torch.sin(angle) * x_1 + 0.1 * z, rtol=1e-14, atol=1e-14
    )
    torch.testing.assert_close(
        batch.target(), math.pi / 2 * (torch.cos(angle) * x_1 - torch.sin(angle) * x_0), rtol=1e-14, atol=1e-14
    )
    torch.testing.assert_close(batch.target("score"), -z / 0.1, rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match="target: expected one that is defined on a bridge"):
        batch.target("edm")


@pytest.mark.parametrize("path", [VP(), Polynomial(3)], ids=repr)
def test_compiled_schedules_are_as_accurate_as_eager(path: Path) -> None:
    t = torch.tensor([0.0, 0.3, 0.9, 0.99, 0.999, 0.99999])
    compiled = torch.compile(lambda t: path.coefficients(t)[:4], fullgraph=True)(t)
    for got, want in zip(compiled, path.coefficients(t.double())[:4], strict=True):
        assert ((got.double() - want).abs() <= 2e-6 * want.abs().clamp(min=1e-9)).all()


def test_compile_the_public_use() -> None:
    model = torch.nn.Linear(4, 4)
    x_1 = torch.randn(6, 4)

    @torch.compile(fullgraph=True)
    def step(x_1):
        batch = CondOT().sample(x_1)
        return fm.cfm_loss(model(batch.x_t), batch, weight="min_snr", target="x_1")

    loss = step(x_1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(model.weight.grad).all()


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: CondOT().sample(torch.ones(2, 3, dtype=torch.int64)),
            TypeError,
            r"x_1: expected a float32.*int64",
        ),
        (lambda: CondOT().sample([1.0]), TypeError, "x_1: expected a torch.Tensor"),
        (lambda: CondOT().sample(torch.tensor(1.0)), ValueError, "x_1: expected at least one dimension"),
        (
            lambda: CondOT().sample(X, X[:2]),
            ValueError,
            r"x_0: expected the shape of x_1, \(4, 3\), got .*\(2, 3\)",
        ),
        (lambda: CondOT().sample(X, X.double()), TypeError, "x_0: expected the dtype of x_1"),
        (
            lambda: CondOT().sample(X, t=torch.rand(4, 1)),
            ValueError,
            r"t: expected a leading part of the shape of x_1",
        ),
        (lambda: CondOT().sample(X, t=torch.rand(3)), ValueError, "t: expected a leading part"),
        (
            lambda: CondOT().sample(X, t=torch.rand(4, device="meta")),
            ValueError,
            "t: expected a tensor on cpu",
        ),
        (lambda: CondOT().sample(X, t=torch.ones(4, dtype=torch.int64)), TypeError, "t: expected a float32"),
        (
            lambda: CondOT().sample(X, t=torch.tensor([0.1, 0.2, 0.3, math.nan]), checks=True),
            ValueError,
            "t: expected finite times",
        ),
        (
            lambda: CondOT().sample(X, t=2.0),
            ValueError,
            "t: expected a finite number >= 0.0 and <= 1.0, got 2.0",
        ),
        (lambda: CondOT().sample(X, z=X), ValueError, "z: expected None"),
        (lambda: CondOT().sample(X, t=0.5, time_sampler=fm.times.Uniform()), ValueError, "t, time_sampler"),
        (lambda: CondOT().sample(X, impl="fast"), ValueError, "impl: expected one of 'auto'"),
        (lambda: CondOT().sample(X, row_offset=-1), ValueError, "row_offset: expected an int >= 0"),
        (
            lambda: fm.cfm_loss(X, CondOT().sample(X), target="speed"),
            ValueError,
            "target: expected one of 'velocity'",
        ),
        (
            lambda: fm.cfm_loss(X, CondOT().sample(X), kind="l3"),
            ValueError,
            "kind: expected one of 'squared'",
        ),
        (
            lambda: fm.cfm_loss(X, CondOT().sample(X), reduction="avg"),
            ValueError,
            "reduction: expected one of 'mean'",
        ),
        (
            lambda: fm.cfm_loss(X, CondOT().sample(X), weight="snrr"),
            ValueError,
            "weight: expected one of 'uniform'",
        ),
        (
            lambda: fm.cfm_loss(X, CondOT().sample(X), weight=3 + 4j),
            TypeError,
            "weight: expected None, a name",
        ),
        (
            lambda: fm.cfm_loss(X, CondOT().sample(X), weight=torch.rand(3)),
            ValueError,
            "weight: expected a leading part",
        ),
        (
            lambda: fm.cfm_loss(X, CondOT().sample(X), mask=torch.ones(3, dtype=torch.bool)),
            ValueError,
            "mask: expected a leading part",
        ),
        (
            lambda: fm.cfm_loss(X, CondOT().sample(X), mask=torch.ones(4)),
            TypeError,
            "mask: expected a boolean tensor",
        ),
        (
            lambda: fm.cfm_loss(X, CondOT().sample(X), delta=0.0),
            ValueError,
            "delta: expected a finite number > 0.0",
        ),
        (lambda: fm.cfm_loss(X[:2], CondOT().sample(X)), ValueError, "pred: expected the shape of x_1"),
        (lambda: fm.cfm_loss(X.int(), CondOT().sample(X)), TypeError, "pred: expected a float32"),
        (lambda: fm.cfm_loss(X, "batch"), TypeError, "batch: expected what path.sample returned"),
        (lambda: fm.cfm_loss(X, CondOT().sample(X), t=0.5), TypeError, "t: expected None beside a batch"),
        (lambda: fm.cfm_loss(X, x_1=X, t=0.5), TypeError, "path: expected a path"),
        (lambda: fm.cfm_loss(X, x_1=X, path=CondOT()), TypeError, "t: expected a tensor or a number"),
        (
            lambda: fm.cfm_loss(X, x_1=X, t=0.5, path=CondOT()),
            TypeError,
            "x_0: expected a tensor or fm.Noise for the target",
        ),
        (lambda: fm.convert(CondOT(), X, X, 0.5, "velocity", "speed"), ValueError, "target: expected one of"),
        (
            lambda: fm.convert(CondOT(), X, X, torch.rand(3), "velocity", "x_1"),
            ValueError,
            "t: expected a leading part",
        ),
        (
            lambda: fm.convert(SchrodingerBridge(), X, X, 0.5, "velocity", "x_1"),
            ValueError,
            "path: expected a path without a gamma",
        ),
        (lambda: OptimalTransport(1.0), ValueError, "sigma_min: expected a number < 1"),
        (lambda: Polynomial(0.5), ValueError, "n: expected a finite number >= 1.0"),
        (lambda: VP(0.0), ValueError, "beta_min"),
        (lambda: VE(1.0, 0.5), ValueError, "sigma_max"),
        (lambda: SchrodingerBridge("a"), TypeError, "sigma: expected a number"),
        (lambda: ConstantBridge(0.1, base=SchrodingerBridge()), TypeError, "base: expected a path without"),
        (lambda: Path().sample(X), NotImplementedError, r"Path: expected a method alpha\(t\)"),
    ],
)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
