"""What is measured: families of cases, and how each implementation does them.

A family says how ours is called, which plain PyTorch a user would write instead (run eagerly and under
torch.compile), where a peer's call fits, and what the right answer is. Every run takes a case's inputs and
returns its results by name; results under a name that the oracle gives too are checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fmkernels as fm
from fmkernels.ops.combine.cases import CASES as COMBINE
from fmkernels.ops.interpolate.cases import CASES as INTERPOLATE
from fmkernels.ops.random.cases import CASES as RANDOM
from fmkernels.ops.regression_loss.cases import CASES as LOSS
from fmkernels.random import draw_seed, noise_like, normals
from fmkernels.testing import BENCH_SHAPES, Case, Inputs, generator, random_tensor, select

from . import plain
from .family import HALF_LOSS, Family, Outputs, Run, Transform
from .peers import Sample
from .sampling import SAMPLING

# path


def _source(x_0: Any, x_1: Tensor) -> Tensor:
    """Noise that a run has used, as a tensor; drawn by the reference where it was not stored."""
    return x_0 if isinstance(x_0, Tensor) else noise_like(x_0, x_1)


def _path_ours(case: Case, impl: str) -> dict[str, Run]:
    def run(inputs: Inputs) -> Outputs:
        x_t, x_0, _ = fm.interpolate(**inputs, impl=impl)
        return {"x_t": x_t, "x_0": x_0}

    return {"": run}


def _path_plain(case: Case, transform: Transform) -> dict[str, Run]:
    def step(formula: Callable[..., Tensor]) -> Run:
        formula = transform(formula)

        def run(inputs: Inputs) -> Outputs:
            x_1, x_0 = inputs["x_1"], inputs["x_0"]
            x_0 = torch.randn_like(x_1) if x_0 is None else x_0  # outside what is compiled, whose own is far slower
            return {"x_t": formula(x_1, x_0, inputs["alpha"]), "x_0": x_0}

        return run

    return {"": step(plain.path), "naive": step(plain.naive_path)}


def _path_peer(case: Case, sample: Sample) -> dict[str, Run]:
    def run(inputs: Inputs) -> Outputs:
        x_0 = torch.randn_like(inputs["x_1"]) if inputs["x_0"] is None else inputs["x_0"]
        x_t, u = sample(inputs["x_1"], x_0, inputs["alpha"])  # their calls form the target too
        return {"x_t": x_t, "x_0": x_0, "u": u}

    return {"": run}


def _path_oracle(case: Case, inputs: Inputs, outputs: Outputs) -> dict[str, Tensor]:
    x_1, t = inputs["x_1"].double(), inputs["alpha"].double()
    return {"x_t": plain.naive_path(x_1, _source(outputs["x_0"], inputs["x_1"]).double(), t)}


def _path_reference(case: Case, inputs: Inputs, outputs: Outputs) -> dict[str, Tensor]:
    x_0 = _source(outputs["x_0"], inputs["x_1"])
    options = {"alpha": inputs["alpha"], "sigma": inputs["sigma"]}
    return {"x_t": fm.interpolate(inputs["x_1"], x_0, **options, impl="reference").x_t}


# loss


def _loss_ours(case: Case, impl: str) -> dict[str, Run]:
    def run(inputs: Inputs) -> Outputs:
        loss = fm.regression_loss(**inputs, impl=impl)
        return {"loss": loss, "grad": plain.gradient(loss, inputs["pred"])}

    return {"": run}


def _loss_plain(case: Case, transform: Transform) -> dict[str, Run]:
    def step(formula: Callable[..., Tensor]) -> Run:
        formula = transform(formula)

        def run(inputs: Inputs) -> Outputs:
            mask = () if inputs.get("mask") is None else (inputs["mask"],)
            loss = formula(inputs["pred"], *inputs["operands"], *mask)
            return {"loss": loss, "grad": plain.gradient(loss, inputs["pred"])}

        return run

    if "mask" in case.variant:
        return {"": step(plain.masked_loss)}
    return {"": step(plain.loss), HALF_LOSS: step(plain.half_loss)}


def _loss_in(dtype: torch.dtype | None) -> Callable[[Case, Inputs, Outputs], dict[str, Tensor]]:
    """The reference in float64 (the oracle) or in the case's own dtype."""

    def evaluate(case: Case, inputs: Inputs, outputs: Outputs) -> dict[str, Tensor]:
        def cast(x: Tensor) -> Tensor:
            return x.detach() if dtype is None else x.detach().to(dtype)

        given = {**inputs, "pred": cast(inputs["pred"]).requires_grad_()}
        given["operands"] = [cast(x) for x in inputs["operands"]]
        loss = fm.regression_loss(**given, impl="reference")
        return {"loss": loss.detach(), "grad": plain.gradient(loss, given["pred"])}

    return evaluate


# cfm: the whole step around the network


def _cfm_make(shape: tuple[int, ...], drawn: bool) -> Callable[[torch.dtype, torch.device, int], Inputs]:
    def make(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        rng = generator(device, seed)
        return {
            "x_1": random_tensor(shape, dtype, rng),
            "x_0": None if drawn else random_tensor(shape, dtype, rng),
            "t": random_tensor(shape[:1], torch.float32, rng, uniform=True),
            "pred": random_tensor(shape, dtype, rng),
        }

    return make


def _cfm_case(shape: tuple[int, ...], variant: str) -> Case:
    drawn = variant == "x_0 drawn"
    return Case(
        name=f"cfm-{'x'.join(map(str, shape))}-{'drawn' if drawn else 'given'}",
        shape=shape,
        make=_cfm_make(shape, drawn),
        call=lambda inputs, impl: tuple(_cfm_ours(None, impl)[""](inputs).values()),
        # Path: x_1 in, x_t out; loss: pred and x_1 in, gradient out; x_0 is read by both where it is given.
        tensors_moved=5 if drawn else 7,
        flops_per_element=12 + (25 if drawn else 0),
        noise=drawn,
        variant=variant,
        tags=frozenset({"bench"}),
    )


def _cfm_ours(case: Case | None, impl: str) -> dict[str, Run]:
    path = fm.paths.CondOT()

    def step(store_noise: bool | None) -> Run:
        def run(inputs: Inputs) -> Outputs:
            batch = path.sample(inputs["x_1"], x_0=inputs["x_0"], t=inputs["t"], store_noise=store_noise, impl=impl)
            loss = fm.cfm_loss(inputs["pred"], batch, impl=impl)
            return {
                "x_t": batch.x_t,
                "x_0": batch.source,
                "loss": loss,
                "grad": plain.gradient(loss, inputs["pred"]),
            }

        return run

    runs = {"": step(None)}
    if case is not None and case.noise and impl not in ("auto", "reference"):
        runs |= {"stored": step(True), "redrawn": step(False)}  # evidence for the default
    return runs


def _cfm_plain(case: Case, transform: Transform) -> dict[str, Run]:
    def step(path: Callable[..., Tensor], loss: Callable[..., Tensor]) -> Run:
        # Two functions, since the network's forward pass stands between them.
        path, loss = transform(path), transform(loss)

        def run(inputs: Inputs) -> Outputs:
            x_1, x_0, pred = inputs["x_1"], inputs["x_0"], inputs["pred"]
            x_0 = torch.randn_like(x_1) if x_0 is None else x_0  # outside what is compiled, whose own is far slower
            x_t, value = path(x_1, x_0, inputs["t"]), loss(pred, x_1, x_0)
            return {"x_t": x_t, "x_0": x_0, "loss": value, "grad": plain.gradient(value, pred)}

        return run

    return {
        "": step(plain.path, plain.loss),
        HALF_LOSS: step(plain.path, plain.half_loss),
        "naive": step(plain.naive_path, plain.loss),
    }


def _cfm_peer(case: Case, sample: Sample) -> dict[str, Run]:
    def step(half: bool) -> Run:
        def run(inputs: Inputs) -> Outputs:
            x_0 = torch.randn_like(inputs["x_1"]) if inputs["x_0"] is None else inputs["x_0"]
            x_t, u = sample(inputs["x_1"], x_0, inputs["t"])
            pred = inputs["pred"]
            loss = F.mse_loss(pred, u) if half else F.mse_loss(pred.float(), u.float())
            return {"x_t": x_t, "x_0": x_0, "loss": loss, "grad": plain.gradient(loss, pred)}

        return run

    return {"": step(False), HALF_LOSS: step(True)}


def _cfm_oracle(case: Case, inputs: Inputs, outputs: Outputs) -> dict[str, Tensor]:
    x_1, pred = inputs["x_1"].double(), inputs["pred"].detach().double()
    x_0 = _source(outputs["x_0"], inputs["x_1"]).double()
    x_t = plain.naive_path(x_1, x_0, inputs["t"].double())
    d = pred - (x_1 - x_0)
    return {"x_t": x_t, "loss": d.square().mean(), "grad": d * (2 / max(d.numel(), 1))}


def _cfm_reference(case: Case, inputs: Inputs, outputs: Outputs) -> dict[str, Tensor]:
    given = {**inputs, "x_0": _source(outputs["x_0"], inputs["x_1"])}
    results = _cfm_ours(None, "reference")[""](given)
    return {name: results[name].detach() for name in ("x_t", "loss", "grad")}


# combine and randn


def _combine_ours(case: Case, impl: str) -> dict[str, Run]:
    return {"": lambda inputs: {"y": fm.combine(**inputs, impl=impl)}}


def _combine_plain(case: Case, transform: Transform) -> dict[str, Run]:
    def step(formula: Callable[..., Tensor]) -> Run:
        formula = transform(formula)
        return lambda inputs: {"y": formula(inputs["operands"], inputs["coefficients"])}

    return {"": step(plain.combine), "naive": step(plain.naive_combine)}


def _combine_oracle(case: Case, inputs: Inputs, outputs: Outputs) -> dict[str, Tensor]:
    return {"y": plain.naive_combine([k.double() for k in inputs["operands"]], inputs["coefficients"])}


def _combine_reference(case: Case, inputs: Inputs, outputs: Outputs) -> dict[str, Any]:
    return {"y": fm.combine(**inputs, impl="reference")}


def _randn_ours(case: Case, impl: str) -> dict[str, Run]:
    def run(inputs: Inputs) -> Outputs:
        device = inputs["seed"].device  # the seed itself is drawn, as for a user
        return {"z": fm.randn(inputs["size"], dtype=inputs["dtype"], device=device, impl=impl)}

    return {"": run}


def _randn_plain(case: Case, transform: Transform) -> dict[str, Run]:
    function = transform(plain.randn)

    def run(inputs: Inputs) -> Outputs:
        # Another name: there is no oracle for the numbers of torch's own stream.
        return {
            "torch_z": function(inputs["size"], inputs["dtype"], inputs["seed"].device),
        }

    return {"": run}


def _ends(count: int) -> list[tuple[int, int]]:
    """Offset and length of what is checked: the oracle is too slow for every number of a large case."""
    part = min(count, 1 << 20)
    return [(0, part), (count - part, part)]


def _randn_checked(outputs: Outputs) -> Outputs:
    return {
        name: torch.cat([z.flatten()[offset : offset + length] for offset, length in _ends(z.numel())])
        for name, z in outputs.items()
    }


def _randn_in(dtype: torch.dtype | None) -> Callable[[Case, Inputs, Outputs], dict[str, Tensor]]:
    def evaluate(case: Case, inputs: Inputs, outputs: Outputs) -> dict[str, Tensor]:
        torch.manual_seed(CHECK_SEED)  # as before the run that is checked
        seed = draw_seed(inputs["seed"].device)
        parts = [
            normals(seed, 0, offset, length, dtype or inputs["dtype"])
            for offset, length in _ends(torch.Size(inputs["size"]).numel())
        ]
        return {"z": torch.cat(parts)}

    return evaluate


CHECK_SEED = 20

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="cfm",
            what="path, loss and backward to the gradient of pred",
            cases=[_cfm_case(shape, variant) for shape in BENCH_SHAPES for variant in ("x_0 given", "x_0 drawn")],
            ours=_cfm_ours,
            plain=_cfm_plain,
            oracle=_cfm_oracle,
            reference=_cfm_reference,
            peer=_cfm_peer,
        ),
        Family(
            name="path",
            what="x_t = t x_1 + (1 - t) x_0 alone",
            cases=select(INTERPOLATE, "bench"),
            ours=_path_ours,
            plain=_path_plain,
            oracle=_path_oracle,
            reference=_path_reference,
            peer=_path_peer,
        ),
        Family(
            name="loss",
            what="loss against x_1 - x_0 and backward to the gradient of pred",
            cases=select(LOSS, "bench"),
            ours=_loss_ours,
            plain=_loss_plain,
            oracle=_loss_in(torch.float64),
            reference=_loss_in(None),
        ),
        Family(
            name="randn",
            what="standard normal numbers",
            cases=select(RANDOM, "bench"),
            ours=_randn_ours,
            plain=_randn_plain,
            oracle=_randn_in(torch.float64),
            reference=_randn_in(None),
            checked=_randn_checked,
        ),
        Family(
            name="combine",
            what="sum of K tensors times numbers: a solver stage",
            cases=select(COMBINE, "bench"),
            ours=_combine_ours,
            plain=_combine_plain,
            oracle=_combine_oracle,
            reference=_combine_reference,
        ),
        SAMPLING,
    )
}
