"""Fused against plain PyTorch: the same training steps, the time of the loss part, and its peak memory.

The plain side is what one writes without fmkernels: x_t = t x_1 + (1 - t) x_0, mse_loss(pred, x_1 - x_0), autograd.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fmkernels as fm

PATH = fm.paths.CondOT()
LATENTS = (256, 16, 64, 64)  # a batch of image latents: larger than the caches, where memory traffic decides
Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x_1, labels, x_0, t) -> loss, after the update


def fused_loss(model: Callable[[Tensor, Tensor], Tensor], x_1: Tensor, x_0: Tensor | None, t: Tensor) -> Tensor:
    batch = PATH.sample(x_1, x_0=x_0, t=t)
    return fm.cfm_loss(model(batch.x_t, batch.t), batch)


def plain_loss(model: Callable[[Tensor, Tensor], Tensor], x_1: Tensor, x_0: Tensor | None, t: Tensor) -> Tensor:
    if x_0 is None:
        x_0 = torch.randn_like(x_1)
    s = t.view(-1, *[1] * (x_1.dim() - 1))
    x_t = s * x_1 + (1 - s) * x_0
    return F.mse_loss(model(x_t, t), x_1 - x_0)


LOSSES = {"fused": fused_loss, "plain": plain_loss}


def seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall-clock time of a call and what it returned; waits for the GPU before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def compare_training(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    batches: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    device: torch.device,
) -> dict[str, Any]:
    """Trains two equal models on the same batches, one fused and one plain, a step of each by turns.

    Args:
        make_model: returns the same model, on the device, at every call.
        batches: (x_1, labels, x_0, t) for each step; x_0 and t are given to both.

    Returns:
        The losses of both, their largest difference, and the median seconds of a whole training step.
    """
    models = {name: make_model() for name in LOSSES}
    optimizers = {name: make_optimizer(model) for name, model in models.items()}
    losses: dict[str, list[Tensor]] = {name: [] for name in LOSSES}
    times: dict[str, list[float]] = {name: [] for name in LOSSES}

    def step(name: str, x_1: Tensor, labels: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        model, optimizer = models[name], optimizers[name]
        loss = LOSSES[name](lambda x_t, t: model(x_t, t, labels), x_1, x_0, t)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    for i, batch in enumerate(batches):
        for name in ("fused", "plain") if i % 2 else ("plain", "fused"):
            duration, loss = seconds(lambda name=name, batch=batch: step(name, *batch), device)  # type: ignore[misc]
            times[name].append(duration)
            losses[name].append(loss)
    fused, plain = torch.stack(losses["fused"]).tolist(), torch.stack(losses["plain"]).tolist()
    return {
        "steps": len(batches),
        "losses_fused": fused,
        "losses_plain": plain,
        "max_abs_difference": max(abs(a - b) for a, b in zip(fused, plain, strict=True)),
        "step_seconds_fused": statistics.median(times["fused"]),
        "step_seconds_plain": statistics.median(times["plain"]),
    }


def _inputs(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x_1, x_0, pred = (torch.randn(shape, device=device, generator=generator) for _ in range(3))
    return x_1, x_0, torch.rand(shape[0], device=device, generator=generator), pred.requires_grad_()


def loss_part(name: str, x_1: Tensor, x_0: Tensor | None, t: Tensor, pred: Tensor) -> Tensor:
    """All that is not the network: from data and noise to x_t, to the loss, to the gradient of the prediction."""
    loss = LOSSES[name](lambda x_t, t: pred, x_1, x_0, t)
    return torch.autograd.grad(loss, pred)[0]


def compare_loss_part(shape: tuple[int, ...], drawn: bool, repeats: int, device: torch.device) -> dict[str, Any]:
    """Median seconds of the loss part, fused and plain by turns; noise given, or drawn inside."""
    x_1, x_0, t, pred = _inputs(shape, device)
    source = None if drawn else x_0
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    for i in range(repeats + 2):
        for name in LOSSES:
            duration, _ = seconds(lambda name=name: loss_part(name, x_1, source, t, pred), device)  # type: ignore[misc]
            if i >= 2:  # the first two only warm up
                times[name].append(duration)
    fused, plain = statistics.median(times["fused"]), statistics.median(times["plain"])
    return {
        "shape": list(shape),
        "noise": "drawn" if drawn else "given",
        "seconds_fused": fused,
        "seconds_plain": plain,
        "speedup": plain / fused,
    }


def _peak_resident_bytes() -> int:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage would also count the parent's peak from before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_bytes(name: str, shape: tuple[int, ...], device: torch.device) -> int:
    """Peak memory of the loss part above its inputs; on the CPU true only in a fresh process."""
    loss_part(name, *_inputs((2, *shape[1:]), device))  # loads and warms up all that stays
    inputs = _inputs(shape, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        loss_part(name, *inputs)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = _peak_resident_bytes()
    loss_part(name, *inputs)
    return _peak_resident_bytes() - before


def compare_memory(shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Peak memory of the loss part above its inputs, each side in a fresh process."""
    result: dict[str, Any] = {
        "what": "path + loss + gradient of the prediction, above the inputs x_1, x_0, t and prediction: "
        + ("torch.cuda.max_memory_allocated" if device.type == "cuda" else "peak resident memory")
        + ", each in a fresh process",
        "shape": list(shape),
        "input_bytes_each": 4 * torch.Size(shape).numel(),
    }
    for name in LOSSES:
        command = [sys.executable, __file__, name, str(device), *map(str, shape)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result[f"peak_bytes_{name}"] = int(done.stdout.split()[-1])
    return result


if __name__ == "__main__":
    print(peak_bytes(sys.argv[1], tuple(map(int, sys.argv[3:])), torch.device(sys.argv[2])))
