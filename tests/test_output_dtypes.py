"""Networks that answer in another dtype than the state, as under autocast: every solver takes what they mean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fmkernels as fm
from fmkernels.guidance import APG, CFG, AutoGuidance, ClassifierGuidance

CFGS = {"batched": CFG(3.0, negative={"y": 3}), "apart": CFG(3.0, negative={"y": 3}, batched=False)}
LABELS = torch.tensor([0, 1, 2, 0])


class Labelled(nn.Module):
    """Answers in a dtype of its own, or in the state's."""

    def __init__(self, answer: torch.dtype | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.answer = nn.Linear(3, 2), answer

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        column = torch.zeros_like(x[:, :1]) if y is None else y[:, None].to(x.dtype)
        with torch.autocast("cpu", enabled=False):
            v = torch.tanh(self.net(torch.cat([x + t.reshape(-1, 1), column], 1).float()))
        # rounded in either case, so that the two differ in nothing but the dtype of the answer
        return v.bfloat16().to(self.answer or x.dtype)


SOLVES: dict[str, Callable[[Labelled, Tensor], Tensor]] = {
    "euler": lambda m, x: fm.sample(m, x, steps=4)[0],
    "rk4": lambda m, x: fm.sample(m, x, steps=3, method="rk4")[0],
    "ab3": lambda m, x: fm.sample(m, x, steps=5, method="ab3")[0],
    "am2": lambda m, x: fm.sample(m, x, steps=5, method="am2")[0],
    "dpmpp_2m": lambda m, x: fm.sample(m, x, steps=5, method="dpmpp_2m")[0],
    "unipc": lambda m, x: fm.sample(m, x, steps=5, method="unipc")[0],
    "trajectory": lambda m, x: fm.sample(m, x, steps=4, return_trajectory=True)[1].trajectory,
    "dopri5": lambda m, x: fm.sample(m, x, method="dopri5", rtol=1e-2, atol=1e-2)[0],
    "dopri5 scalars": lambda m, x: fm.odeint(
        lambda t, y: m(y, t.expand(4)), x, torch.tensor([0.0, 1.0]), rtol=1e-2, atol=1e-2
    ),
    "implicit": lambda m, x: fm.odeint(
        lambda t, y: (0 * y + 1).to(m.answer or y.dtype), x, torch.tensor([0.0, 1.0]), method="implicit_euler"
    ),
    "sde": lambda m, x: fm.sample(m, x, steps=4, sde=fm.SDE(), generator=torch.Generator().manual_seed(0))[0],
    "guided": lambda m, x: fm.sample(m, x, steps=4, guidance=CFGS["batched"], y=LABELS)[0],
    "guided apart": lambda m, x: fm.sample(m, x, steps=4, guidance=CFGS["apart"], y=LABELS)[0],
    "guided adaptively": lambda m, x: fm.sample(
        m, x, method="dopri5", rtol=1e-2, atol=1e-2, guidance=CFGS["batched"], y=LABELS
    )[0],
    "rescaled": lambda m, x: fm.sample(m, x, steps=4, guidance=CFG(3.0, negative={"y": 3}, rescale=0.7), y=LABELS)[0],
    "apg": lambda m, x: fm.sample(m, x, steps=4, guidance=APG(3.0, negative={"y": 3}, momentum=-0.5), y=LABELS)[0],
    "autoguidance": lambda m, x: fm.sample(m, x, steps=4, guidance=AutoGuidance(m, 2.0))[0],
    "classifier": lambda m, x: fm.sample(
        m, x, steps=4, guidance=ClassifierGuidance(lambda x, t: torch.sin(x).bfloat16().to(m.answer or x.dtype), 2.0)
    )[0],
    "direct": lambda m, x: fm.sample(m, x, steps=4, gradient="direct")[0],
    "checkpoint": lambda m, x: fm.sample(m, x, steps=4, gradient="checkpoint")[0],
    "reversible": lambda m, x: fm.sample(m, x, steps=4, gradient="reversible")[0],
    "stream": lambda m, x: torch.stack(
        [
            r.x
            for r in sorted(fm.sample_stream(m, x, capacity=2, rtol=1e-2, atol=1e-2), key=lambda result: result.request)
        ]
    ),
    "log_prob": lambda m, x: fm.log_prob(m, x, method="euler", steps=4).log_prob,
    "log_prob forward": lambda m, x: fm.log_prob(m, x, method="euler", steps=4, mode="forward").log_prob,
    "log_prob of chunks": lambda m, x: fm.log_prob(m, x, method="euler", steps=4, chunk=2).log_prob,
    "log_prob adaptively": lambda m, x: fm.log_prob(m, x, rtol=1e-2, atol=1e-2).log_prob,
    "divergence": lambda m, x: fm.divergence(lambda t, x: m(x, t.expand(4)), 0.5, x)[1],
    "step": lambda m, x: fm.sde_step_log_prob(m, x, x + 0.1, 0.5, 0.6, sde=fm.SDE(), path=fm.paths.CondOT()),
}


@pytest.mark.parametrize("answer", [torch.bfloat16, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("solve", SOLVES.values(), ids=SOLVES)
def test_every_solver_takes_answers_of_another_dtype(solve: Callable, answer: torch.dtype) -> None:
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    other, own = solve(Labelled(answer), x), solve(Labelled(None), x)
    assert other.dtype == own.dtype == torch.float32
    torch.testing.assert_close(other, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["euler", "heun2", "dopri5"])
def test_autocast_around_a_solve(method: str) -> None:
    net = nn.Linear(2, 2)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    steps = None if method == "dopri5" else 5
    with torch.autocast("cpu", torch.bfloat16):
        samples, _ = fm.sample(lambda x, t: net(x), x, method=method, steps=steps, rtol=1e-2, atol=1e-2)
        assert net(x).dtype == torch.bfloat16
    assert samples.dtype == torch.float32
    exact, _ = fm.sample(lambda x, t: net(x), x, method=method, steps=steps)
    torch.testing.assert_close(samples, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "reversible"])
def test_gradients_pass_through_answers_of_another_dtype(gradient: str) -> None:
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    grads = []
    for answer in (torch.bfloat16, None):
        model = Labelled(answer)
        fm.sample(model, x, steps=3, gradient=gradient)[0].sum().backward()
        grads.append(model.net.weight.grad)
    torch.testing.assert_close(*grads, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("answer", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_answers_that_are_not_floating_are_refused(answer: torch.dtype) -> None:
    x = torch.zeros(4, 2)
    for options in ({"steps": 2}, {"steps": 2, "method": "rk4"}, {"method": "dopri5"}):
        with pytest.raises(TypeError, match=r"model: expected a floating output, as the state is torch\.float32, got"):
            fm.sample(lambda x, t: x.to(answer), x, **options)
