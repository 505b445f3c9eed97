"""`step_control` in plain PyTorch: the oracle, and what runs on devices without a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# An error norm below this counts as this: no factor is infinite.
LEAST_RATIO = 1e-10
# A step that would leave less than this much of itself to the end goes there.
STRETCH = 1.01


def run(
    clock: Tensor,
    count: Tensor,
    step: Tensor,
    times: Tensor,
    error: Tensor,
    rules: Sequence[float],
    nodes: Sequence[float],
    wanted: Tensor | None,
    start: bool,
) -> None:
    """See step_control; the formulas are those of csrc/step_control/step_control_body.h."""
    power, power_1, power_2, safety, ifactor, dfactor, least_growth = rules[:7]
    min_step, max_step, max_steps, force_min_step, max_failures = rules[7:]
    t, h, t_end, ratio_1, ratio_2 = clock[:5].unbind(0)
    status, steps, accepted, failures = count[:4].unbind(0)
    error = error.double()
    running = status == 0
    finite = error.isfinite()
    at_minimum = h.abs() <= min_step

    if start:
        accept = torch.zeros_like(running)
        magnitude = error
        failures = torch.where(running & ~finite, int(max_failures), failures)
    else:
        accept = running & (error <= 1.0)
        if force_min_step:
            accept = accept | (running & finite & at_minimum)
        steps = steps + running.int()
        accepted = accepted + accept.int()
        failures = torch.where(running, torch.where(finite, 0, failures + 1).int(), failures)
        ratio = torch.where(finite, error, 1.0).clamp(min=LEAST_RATIO)
        factor = safety * ratio**power
        if power_1 != 0.0:
            factor = factor * ratio_1**power_1
        if power_2 != 0.0:
            factor = factor * ratio_2**power_2
        low = torch.where(ratio < 1.0, torch.full_like(ratio, least_growth), dfactor)
        high = torch.where(accept, torch.full_like(ratio, ifactor), min(ifactor, safety))
        factor = torch.minimum(high, torch.maximum(low, factor))
        magnitude = h.abs() * torch.where(finite, factor, dfactor)
        moved = torch.where(h == t_end - t, t_end, t + h)
        clock[5].copy_(t)
        clock[6].copy_(torch.where(running, h, 0.0))
        clock[4].copy_(torch.where(accept, ratio_1, ratio_2))
        clock[3].copy_(torch.where(accept, ratio, ratio_1))
        t = torch.where(accept, moved, t)

    remaining = t_end - t
    proposed = magnitude.clamp(max=max_step)
    magnitude = proposed.clamp(min=min_step)
    last = (magnitude * STRETCH).clamp(max=max_step) >= remaining.abs()
    h = torch.where(last, remaining, torch.copysign(magnitude, remaining))
    stuck = (t + h == t) | ((proposed < min_step) & at_minimum & ~accept & (not start))
    ended = torch.where(finite, 4, 3) * stuck
    ended = torch.where(failures >= max_failures, 3, ended)
    ended = torch.where((steps >= max_steps), 2, ended)
    ended = torch.where(remaining == 0.0, 1, ended)
    status = torch.where(running, ended.int(), status)
    h = torch.where(status == 0, h, 0.0)

    direction = torch.sign(t_end - clock[5])
    clock[7].copy_(torch.where(running, torch.copysign(magnitude, direction), clock[7]))
    clock[0].copy_(t)
    clock[1].copy_(h)
    for row, value in zip(count, (status, steps, accepted, failures, accept), strict=False):
        row.copy_(value)
    step.copy_(h)
    for row, node in zip(times, nodes, strict=True):
        row.copy_(torch.where(h == t_end - t, t_end, t + h) if node == 1.0 else t + node * h)
    if wanted is not None:
        first = count[6].clone()
        number = torch.arange(wanted.shape[1], device=wanted.device)
        due = (number >= first[:, None]) & ((wanted - t[:, None]) * direction[:, None] <= 0.0)
        if not start:
            due = due & accept[:, None]
        count[5].copy_(first)
        count[6].add_(due.sum(1, dtype=torch.int32))
