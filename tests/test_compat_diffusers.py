"""diffusers' flow scheduler: our steps beside its own, every option, and where its own is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_rounded
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from fmkernels.compat.diffusers import FlowMatchEulerDiscreteScheduler as Ours  # noqa: E402
from fmkernels.compat.diffusers import training_utils  # noqa: E402

Theirs: Any = diffusers.FlowMatchEulerDiscreteScheduler

OPTIONS: list[dict[str, Any]] = [
    {},
    {"shift": 3.0},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True, "shift": 2.0},
    {"use_beta_sigmas": True},
    {"invert_sigmas": True},
    {"shift_terminal": 0.1},
    {"shift_terminal": 0.1, "use_dynamic_shifting": True},
    {"stochastic_sampling": True},
    {"num_train_timesteps": 500, "shift": 1.5},
]


def network(x: Tensor, timestep: Tensor) -> Tensor:
    return (torch.sin(3 * x) + 0.001 * timestep).to(x.dtype)


def run(scheduler: Any, steps: int, x: Tensor, **given: Any) -> Tensor:
    mu = {"mu": 0.8} if scheduler.config.use_dynamic_shifting else {}
    scheduler.set_timesteps(steps, **mu, **given)
    generator = torch.Generator().manual_seed(5)
    for timestep in scheduler.timesteps:
        (x,) = scheduler.step(network(x, timestep), timestep, x, generator=generator, return_dict=False)
    return x


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 5, 28, 50])
def test_latents_are_the_peers(options: dict[str, Any], steps: int) -> None:
    ours, theirs = Ours(**options), Theirs(**options)
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    got = run(ours, steps, x)
    assert ours.step_index == steps
    if steps == 1 and "shift_terminal" in options:  # where theirs has no sigma but NaN, and finds no timestep
        assert ours.sigmas.tolist() == [1.0, 0.0]
        assert torch.isfinite(got).all()
        return
    want = run(theirs, steps, x)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert_rounded(got, want, 60 * steps, size=4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """One step of half-precision tensors is the float32 formula, rounded; diffusers rounds the product before."""
    ours = Ours(shift=3.0)
    ours.set_timesteps(10)
    x, v = torch.randn(2, 3, 16, 8).to(dtype).unbind(0)
    (got,) = ours.step(v, ours.timesteps[0], x, return_dict=False)
    assert got.dtype == dtype
    assert torch.equal(got, (x.double() + (ours.sigmas[1] - ours.sigmas[0]).double() * v.double()).to(dtype))
    mixed = ours.step(v, ours.timesteps[1], x.float()).prev_sample
    assert mixed.dtype == dtype


@pytest.mark.parametrize("own", ["sigmas", "timesteps", "both"])
def test_own_sigmas_and_timesteps(own: str) -> None:
    sigmas = [1.0, 0.7, 0.45, 0.1]
    given: dict[str, Any] = {}
    if own in ("sigmas", "both"):
        given["sigmas"] = sigmas
    if own in ("timesteps", "both"):
        given["timesteps"] = [1000 * s for s in sigmas]
    x = torch.randn(2, 3)
    got, want = (run(kind(shift=2.0), 4, x, **given) for kind in (Ours, Theirs))
    assert_rounded(got, want, 64, size=4.0)
    for wrong in ({"sigmas": sigmas, "timesteps": [1.0]}, {"num_inference_steps": 3, "sigmas": sigmas}):
        with pytest.raises(ValueError, match="same length"):
            Ours().set_timesteps(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_inference_steps"):
        Ours().set_timesteps()


def test_configurations_go_both_ways(tmp_path: Path) -> None:
    ours = Ours(shift=3.0, use_karras_sigmas=True)
    assert Theirs.from_config(ours.config).config.shift == 3.0
    assert Ours.from_config(Theirs(shift=2.5).config).config.shift == 2.5
    ours.save_pretrained(tmp_path / "ours")
    assert Theirs.from_pretrained(tmp_path / "ours").config.use_karras_sigmas
    Theirs(shift=1.7).save_pretrained(tmp_path / "theirs")
    again = Ours.from_pretrained(tmp_path / "theirs")
    assert isinstance(again, Ours)
    assert again.config.shift == 1.7
    assert again.set_begin_index(2) is None
    assert again.begin_index == 2


def test_starting_in_the_middle_and_adding_noise() -> None:
    x, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for begin in (None, 3):
        results = []
        for kind in (Ours, Theirs):
            scheduler = kind(shift=3.0)
            scheduler.set_timesteps(8)
            if begin is not None:
                scheduler.set_begin_index(begin)
            start = scheduler.timesteps[3:]
            y = scheduler.scale_noise(x, start[:1].repeat(2), noise)
            for timestep in start:
                (y,) = scheduler.step(network(y, timestep), timestep, y, return_dict=False)
            results += [y]
        assert_rounded(*results, 200, size=4.0)
    scheduler = Ours()
    scheduler.set_timesteps(8)
    own = scheduler.scale_noise(x, scheduler.timesteps[[1, 5]], noise)
    sigma = scheduler.sigmas[[1, 5]].reshape(2, 1, 1)
    assert_rounded(own, sigma * noise + (1 - sigma) * x, 4, size=x.abs() + noise.abs())


def test_sigmas_that_somebody_sets_or_writes_are_used() -> None:
    scheduler = Ours()
    scheduler.set_timesteps(4)
    x, v = torch.zeros(3), torch.ones(3)
    scheduler.step(v, scheduler.timesteps[0], x)
    scheduler.sigmas = torch.tensor([1.0, 0.9, 0.2, 0.1, 0.0])
    (got,) = scheduler.step(v, scheduler.timesteps[1], x, return_dict=False)
    assert_rounded(got, torch.full((3,), -0.7), 4)
    scheduler.sigmas[3] = 0.15
    (got,) = scheduler.step(v, scheduler.timesteps[2], x, return_dict=False)
    assert_rounded(got, torch.full((3,), -0.05), 8)


def test_a_time_for_each_token_goes_down() -> None:
    """diffusers' own adds sigma - sigma' times the velocity, the wrong way."""
    scheduler = Ours()
    scheduler.set_timesteps(4)
    times = torch.tensor([[1000.0, 500.0, 250.0], [0.0, 750.0, 300.0]])
    x, v = torch.randn(2, 2, 3, 5).unbind(0)
    (got,) = scheduler.step(v, scheduler.timesteps[0], x, per_token_timesteps=times, return_dict=False)
    levels = scheduler.sigmas.tolist()
    after = torch.tensor(
        [[max([s for s in levels if s < t / 1000 - 1e-6], default=0.0) for t in row] for row in times.tolist()]
    )
    assert_rounded(got, x + (after - times / 1000)[..., None] * v, 4, size=x.abs() + v.abs())


def test_integers_and_strangers_are_refused() -> None:
    scheduler = Ours()
    scheduler.set_timesteps(4)
    x = torch.zeros(3)
    for wrong in (1, torch.tensor(1)):
        with pytest.raises(ValueError, match="timestep: expected one of the scheduler's timesteps, got an integer"):
            scheduler.step(x, wrong, x)
    with pytest.raises(IndexError, match="timestep"):
        scheduler.step(x, torch.tensor(123.4), x)


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "none"])
def test_densities_and_weights_are_the_peers(scheme: str) -> None:
    from diffusers import training_utils as theirs

    arguments: dict[str, Any] = {"logit_mean": 0.3, "logit_std": 1.2, "mode_scale": 1.29}
    draws = []
    for module in (training_utils, theirs):
        torch.manual_seed(3)
        draws.append(module.compute_density_for_timestep_sampling(scheme, 64, **arguments))
    assert torch.equal(*draws)
    sigmas = torch.linspace(0.01, 1, 20)
    for name in ("sigma_sqrt", "cosmap", "none"):
        ours, want = (module.compute_loss_weighting_for_sd3(name, sigmas) for module in (training_utils, theirs))
        assert torch.equal(ours, want)
    if scheme != "none":
        with pytest.raises(ValueError, match="expected"):
            training_utils.compute_density_for_timestep_sampling(scheme, 4)


def test_sigmas_are_looked_up_at_once() -> None:
    scheduler = Ours(shift=3.0)
    places = torch.tensor([0, 999, 17, 500])
    timesteps = scheduler.timesteps[places]
    found = training_utils.get_sigmas(scheduler, timesteps, n_dim=4)
    assert torch.equal(found, scheduler.sigmas[places].reshape(4, 1, 1, 1))


def test_the_patch_hands_ours_to_diffusers() -> None:
    from fmkernels import compat

    with compat.patch("diffusers"):
        assert diffusers.FlowMatchEulerDiscreteScheduler is Ours
    assert diffusers.FlowMatchEulerDiscreteScheduler is Theirs


def test_what_a_scheduler_is_told_later_is_heard() -> None:
    """Inference mode, another configuration, learnable sigmas, timesteps as Python floats."""
    x, v = torch.randn(2, 4), torch.randn(2, 4)
    scheduler = Ours()
    with torch.inference_mode():
        scheduler.set_timesteps(4)
        scheduler.step(v, scheduler.timesteps[0], x)
    scheduler.set_timesteps(4)
    scheduler.step(v, scheduler.timesteps[0], x)
    scheduler.register_to_config(stochastic_sampling=True)
    results = [scheduler.step(v, scheduler.timesteps[1], x).prev_sample]
    scheduler._step_index = 1
    results += [scheduler.step(v, scheduler.timesteps[1], x).prev_sample]
    assert not torch.equal(*results)
    learnt = []
    for kind in (Ours, Theirs):
        scheduler = kind()
        scheduler.set_timesteps(4)
        scheduler.sigmas = scheduler.sigmas.clone().requires_grad_()
        scheduler.step(torch.ones(2, 4), scheduler.timesteps[0], x, return_dict=False)[0].sum().backward()
        learnt.append(scheduler.sigmas.grad)
    assert torch.equal(*learnt)
    scheduler = Ours()
    scheduler.set_timesteps(timesteps=[899.1, 500.0, 100.3])
    scheduler.step(v, 899.1, x)
    assert scheduler.step_index == 1


def test_sigmas_of_ascending_and_of_unknown_timesteps() -> None:
    scheduler = Ours(invert_sigmas=True)
    scheduler.set_timesteps(4)
    timesteps = torch.cat([scheduler.timesteps, torch.tensor([500.4])])
    found = training_utils.get_sigmas(scheduler, timesteps, n_dim=1)
    assert torch.equal(found[:4], scheduler.sigmas[:4])
    assert found[4].isnan()


@pytest.mark.parametrize("first", ["patch", "import"])
def test_the_patch_before_and_after_the_import(first: str) -> None:
    import subprocess
    import sys

    lines = ["import diffusers", "import fmkernels.compat; p = fmkernels.compat.patch('diffusers')"]
    lines = lines if first == "import" else lines[::-1]
    code = (
        "; ".join(lines)
        + """
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler as A
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler as B
from fmkernels.compat.diffusers import FlowMatchEulerDiscreteScheduler as ours
assert A is B is diffusers.FlowMatchEulerDiscreteScheduler is ours
p.undo()
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler as C
assert C is not ours and issubclass(ours, C)
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
