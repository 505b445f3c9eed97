"""The solvers that the digits demo compares, with and without guidance."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from digits_model import CLASSES, NO_CLASS
from scipy.stats import wasserstein_distance
from sklearn.svm import SVC
from torch import Tensor, nn

import fmkernels as fm

GUIDANCE = 2.0
PER_CLASS = 50
PROJECTIONS = 128
# Twenty evaluations a branch for each fixed grid, so that the methods can be compared; the SDE needs more.
SOLVERS: dict[str, dict[str, Any]] = {
    "euler": {"method": "euler", "steps": 20},
    "midpoint": {"method": "midpoint", "steps": 10},
    "heun2": {"method": "heun2", "steps": 10},
    "ab2": {"method": "ab2", "steps": 20},
    "dpmpp_2m": {"method": "dpmpp_2m", "steps": 20},
    "unipc": {"method": "unipc", "steps": 20},
    "dopri5": {"method": "dopri5", "rtol": 3e-2, "atol": 3e-2},
    "sde": {"sde": fm.SDE(diffusion="sigma"), "steps": 40},
}


@dataclass
class Drawn:
    """What a solver drew: the images, all states of a fixed grid, and its line of the table."""

    images: Tensor
    states: list[Tensor]
    figures: dict[str, Any]


def sliced_wasserstein(a: Tensor, b: Tensor, seed: int = 0) -> float:
    """The mean over random directions of the Wasserstein-1 distance of two sets of images projected on them."""
    a, b = (x.flatten(1).double().cpu() for x in (a, b))
    directions = torch.randn(PROJECTIONS, a.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    directions = (directions / directions.norm(dim=1, keepdim=True)).T
    pairs = zip((a @ directions).T.numpy(), (b @ directions).T.numpy(), strict=True)
    return float(np.mean([wasserstein_distance(x, y) for x, y in pairs]))


def agreement(classifier: SVC, images: Tensor, labels: Tensor) -> float:
    """Share of images that the classifier reads as their label."""
    return float(classifier.score(images.clamp(-1, 1).flatten(1).cpu().numpy(), labels.cpu().numpy()))


def draw(
    model: nn.Module, classifier: SVC, real: Tensor, generator: torch.Generator, quick: bool
) -> dict[str, dict[str, Drawn]]:
    """Digits of every class from the same noise, by each solver, guided and not."""
    device = generator.device
    asked = torch.arange(CLASSES, device=device).repeat_interleave(PER_CLASS)
    noise = torch.randn((len(asked), 1, 8, 8), device=device, generator=generator)
    guided = fm.guidance.CFG(GUIDANCE, negative={"labels": NO_CLASS})
    drawn: dict[str, dict[str, Drawn]] = {"guided": {}, "unguided": {}}
    for kind, guidance in (("guided", guided), ("unguided", None)):
        for name, options in SOLVERS.items():
            options = dict(options)
            if quick and "steps" in options:
                options["steps"] //= 5
            start = time.perf_counter()
            images, result = fm.sample(
                model,
                noise,
                guidance=guidance,
                generator=generator,
                return_trajectory=name == "euler",
                labels=asked,
                **options,
            )
            share = agreement(classifier, images, asked)  # waits for the device
            seconds = time.perf_counter() - start
            figures = {
                "images": len(asked),
                "nfe": result.nfe,
                "agreement": share,
                "read_as_asked": round(share * len(asked)),
                "sliced_wasserstein": sliced_wasserstein(images, real),
                "seconds": seconds,
            }
            states = [] if result.trajectory is None else list(result.trajectory)
            drawn[kind][name] = Drawn(images, states, figures)
    return drawn


def table(drawn: dict[str, dict[str, Any]], floor: float) -> list[str]:
    """The figures of all solvers as lines of text."""
    lines = [
        f"{'solver':<10}{'guidance':>9}{'evaluations':>13}{'seconds':>9}{'distance':>10}{'read as asked':>15}",
    ]
    for kind, solvers in drawn.items():
        for name, f in solvers.items():
            lines.append(
                f"{name:<10}{GUIDANCE if kind == 'guided' else 'none':>9}{f['nfe']:>13}{f['seconds']:>9.2f}"
                f"{f['sliced_wasserstein']:>10.4f}{f['read_as_asked']:>9} ({f['agreement']:.0%})"
            )
    lines.append(f"distance: sliced Wasserstein to held-out digits; that of the digits learnt from is {floor:.4f}")
    return lines
