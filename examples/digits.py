"""Handwritten digits by flow matching, from training to pictures: what ``make demo`` runs.

A class-conditional U-Net learns the velocity field on scikit-learn's 8x8 digits with the fused loss, then draws digits
with fused solvers, with and without classifier-free guidance, and compares them. Writes samples.png, solvers.png,
trajectories.png, loss.png and report.json. Exit status: 0; 1 where fused and plain training disagree or the guided
digits are not legible.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import digits_measure as measure
import digits_plots as plots
import digits_sampling as sampling
import torch
from digits_model import NO_CLASS, UNet
from digits_sampling import GUIDANCE, PER_CLASS
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import fmkernels as fm
from fmkernels.cli import environment

BATCH = 128
LEARNING_RATE = 2e-3
LABEL_DROPOUT = 0.1
EMA_DECAY = 0.99
PARITY_STEPS = 50
PARITY_LIMIT = 1e-5
AGREEMENT_LIMIT = 0.9
SHOWN = (("guided", "euler"), ("guided", "dopri5"), ("unguided", "euler"))


def training_batch(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random batch; some labels become NO_CLASS, so that one network learns both halves of guidance."""
    index = torch.randint(len(images), (BATCH,), device=images.device, generator=generator)
    drop = torch.rand(BATCH, device=images.device, generator=generator) < LABEL_DROPOUT
    return images[index], labels[index].masked_fill(drop, NO_CLASS)


def train(
    model: nn.Module, images: Tensor, labels: Tensor, steps: int, generator: torch.Generator
) -> tuple[nn.Module, list[float]]:
    """Trains in place; returns the moving average of the weights, and the loss at every step."""
    path = fm.paths.CondOT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    losses = []
    progress = tqdm(range(steps), desc="training", unit="step", mininterval=0.5)
    for step in progress:
        x_1, classes = training_batch(images, labels, generator)
        batch = path.sample(x_1, generator=generator)  # noise and time drawn, x_t fused
        loss = fm.cfm_loss(model(batch.x_t, batch.t, classes), batch)  # loss and gradient in one pass
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        losses.append(loss.detach())
        if step % 50 == 49:
            progress.set_postfix(loss=f"{torch.stack(losses[-50:]).mean().item():.3f}")
    return average.module, torch.stack(losses).tolist()


def load(seed: int) -> tuple[Any, Any, Any, Any]:
    """Real digits scaled to [-1, 1], shape (N, 1, 8, 8): images to learn, held-out images, and labels of both."""
    digits = load_digits()
    images = (digits.data / 8 - 1).astype("float32").reshape(-1, 1, 8, 8)
    return tuple(train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=seed))


def parity(images: Tensor, labels: Tensor, steps: int, channels: int, seed: int) -> dict[str, Any]:
    """The first training steps twice, fused and plain, from the same weights on the same batches, noise and times."""
    device = images.device
    generator = torch.Generator(device).manual_seed(seed)
    batches = []
    for _ in range(steps):
        x_1, classes = training_batch(images, labels, generator)
        x_0 = torch.randn(x_1.shape, device=device, generator=generator)
        batches.append((x_1, classes, x_0, torch.rand(len(x_1), device=device, generator=generator)))

    def make_model() -> nn.Module:
        torch.manual_seed(seed)
        return UNet(channels).to(device)

    return measure.compare_training(
        make_model, lambda model: torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), batches, device
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for pictures and report (demo)")
    parser.add_argument("--steps", type=int, default=None, help="training steps (600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that all runs; no digits yet")
    options = parser.parse_args(argv)
    if options.steps is None:
        options.steps = 20 if options.quick else 600
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA
        parser.error(f"--device: expected auto or a device of this machine, got {options.device!r}: {error}")
    return options


def compare(images: Tensor, labels: Tensor, channels: int, seed: int, quick: bool) -> dict[str, Any]:
    """Fused against plain PyTorch: the same training steps, the time of the loss part and its peak memory."""
    device = images.device
    latents = (16, *measure.LATENTS[1:]) if quick else measure.LATENTS
    cases = [((BATCH, 1, 8, 8), 50), (latents, 3 if quick else 9)]
    return {
        "parity": {**parity(images, labels, 10 if quick else PARITY_STEPS, channels, seed), "limit": PARITY_LIMIT},
        "loss_part": [
            measure.compare_loss_part(shape, drawn, repeats, device)
            for shape, repeats in cases
            for drawn in (False, True)
        ],
        "peak_memory": measure.compare_memory(latents, device),
    }


def failed(compared: dict[str, Any], figures: dict[str, dict[str, Any]], quick: bool) -> list[str]:
    """What does not reach its limit; digits are not looked at in a quick run."""
    failures = []
    if not compared["max_abs_difference"] <= PARITY_LIMIT:  # a NaN fails too
        failures.append(f"fused and plain losses differ by {compared['max_abs_difference']:.1e} > {PARITY_LIMIT:.0e}")
    failures += [
        f"{method}: {s['agreement']:.1%} of the digits are read as asked, expected at least {AGREEMENT_LIMIT:.0%}"
        for method, s in figures.items()
        if s["agreement"] < AGREEMENT_LIMIT and not quick
    ]
    return failures


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything: compares, trains, draws, writes pictures; returns the report."""
    start = time.perf_counter()
    device, quick, out = torch.device(options.device), options.quick, options.out
    channels = 8 if quick else 32
    real, held_out, real_labels, held_out_labels = load(options.seed)
    classifier = SVC().fit(real.reshape(len(real), -1), real_labels)
    images, labels = torch.tensor(real, device=device), torch.tensor(real_labels, device=device)

    print("fused against plain PyTorch: same steps, loss part, memory ...", flush=True)
    compared = compare(images, labels, channels, options.seed, quick)

    torch.manual_seed(options.seed)
    generator = torch.Generator(device).manual_seed(options.seed)
    train_start = time.perf_counter()
    model, losses = train(UNet(channels).to(device), images, labels, options.steps, generator)
    train_seconds = time.perf_counter() - train_start
    unseen = torch.tensor(held_out, device=device)
    drawn = sampling.draw(model, classifier, unseen, generator, quick)
    figures = {kind: {name: d.figures for name, d in solvers.items()} for kind, solvers in drawn.items()}
    floor = sampling.sliced_wasserstein(images, unseen)

    shown = {f"{kind}, {name}": drawn[kind][name].images for kind, name in SHOWN}
    plots.samples(out / "samples.png", images, labels, shown, PER_CLASS)
    plots.solvers(out / "solvers.png", drawn, floor, PER_CLASS)
    plots.trajectories(out / "trajectories.png", drawn["guided"]["euler"].states, PER_CLASS)
    plots.losses(out / "loss.png", losses, compared["parity"])
    failures = failed(compared["parity"], figures["guided"], quick)
    return {
        "passed": not failures,
        "failures": failures,
        "seed": options.seed,
        "device": str(device),
        "quick": quick,
        "model_parameters": sum(p.numel() for p in model.parameters()),
        "training": {"steps": options.steps, "batch": BATCH, "seconds": train_seconds, "losses": losses},
        **compared,
        "sampling": {"guidance": GUIDANCE, "limit": AGREEMENT_LIMIT, "distance_of_real_digits": floor, **figures},
        "classifier": {
            "what": "sklearn.svm.SVC, trained on the digits that the model learns from",
            "held_out_images": len(held_out),
            "held_out_accuracy": float(classifier.score(held_out.reshape(len(held_out), -1), held_out_labels)),
        },
        "seconds_total": time.perf_counter() - start,
        "environment": environment(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    # TF32 would turn the last bit of x_t into a difference of 1e-3, and the two trainings could not be compared.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        report = run(options)
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(summary(report))
    print(f"pictures and report.json: {options.out}/")
    for failure in report["failures"]:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 0 if report["passed"] else 1


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    compared, memory, training = report["parity"], report["peak_memory"], report["training"]
    lines = [
        f"training: {training['steps']} steps of {training['batch']} images in {training['seconds']:.0f} s",
        f"first {compared['steps']} steps, fused and plain: losses differ by at most "
        f"{compared['max_abs_difference']:.1e}; a step takes {compared['step_seconds_fused'] * 1e3:.1f} and "
        f"{compared['step_seconds_plain'] * 1e3:.1f} ms (nearly all of it the network)",
    ]
    for part in report["loss_part"]:
        fused, plain = part["seconds_fused"] * 1e3, part["seconds_plain"] * 1e3
        lines.append(
            f"path + loss + gradient, {'x'.join(map(str, part['shape']))}, noise {part['noise']}: "
            f"{fused:.3g} and {plain:.3g} ms, {part['speedup']:.1f} times as fast"
        )
    mib = 1 / 2**20
    lines.append(
        f"peak memory of the same, {'x'.join(map(str, memory['shape']))}, noise given: "
        f"{memory['peak_bytes_fused'] * mib:.0f} and {memory['peak_bytes_plain'] * mib:.0f} MiB above the inputs"
    )
    drawn = report["sampling"]
    lines += sampling.table({kind: drawn[kind] for kind in ("guided", "unguided")}, drawn["distance_of_real_digits"])
    lines.append(f"the classifier on held-out real digits: {report['classifier']['held_out_accuracy']:.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
