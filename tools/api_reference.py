"""Writes docs/api.md from the docstrings of the public names; with --check, says whether it is up to date."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import fmkernels
from fmkernels import compat, guidance, likelihood, models, paths, testing, times, weightings
from fmkernels.compat import sit
from fmkernels.compat.flow_matching import path as flow_matching_path
from fmkernels.compat.flow_matching import solver as flow_matching_solver
from fmkernels.compat.flow_matching import utils as flow_matching_utils
from fmkernels.compat.flow_matching.path import scheduler as flow_matching_scheduler
from fmkernels.compat.torchcfm import conditional_flow_matching, optimal_transport
from fmkernels.solvers.adaptive import controllers
from fmkernels.solvers.adaptive import options as adaptive_options
from fmkernels.solvers.adaptive import solve as adaptive_solve
from fmkernels.solvers.implicit import solve as implicit_solve
from fmkernels.solvers.methods import (
    adams,
    diffusion,
    edm,
    noise_transforms,
    registry,
    runge_kutta,
    sde_coefficients,
    tableaus,
)
from fmkernels.solvers.programs import builder
from fmkernels.solvers.sampling import grids

HEAD = "# API\n\nGenerated from the docstrings by `make docs`.\n"


def signature(value: Any) -> str:
    try:
        text = str(inspect.signature(value))
    except (TypeError, ValueError):
        return ""
    text = re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", text)
    return text.replace("torch.Tensor", "Tensor").replace("'", "")


def entry(name: str, value: Any, level: int) -> list[str]:
    doc = inspect.getdoc(value) or ""
    lines = [f"{'#' * level} `{name}{signature(value)}`", "", doc, ""]
    if inspect.isclass(value):
        for method, function in vars(value).items():
            if not method.startswith("_") and callable(function) and inspect.getdoc(function):
                lines += entry(f"{name}.{method}", function, level + 1)
    return lines


def own_names(module: ModuleType) -> list[str]:
    if hasattr(module, "__all__"):
        return sorted(module.__all__, key=str.lower)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and (inspect.isclass(value) or inspect.isfunction(value))
    ]


def render() -> str:
    lines = [HEAD]
    for title, module in (
        ("fmkernels", fmkernels),
        ("fmkernels.paths", paths),
        ("fmkernels.weightings", weightings),
        ("fmkernels.times", times),
        ("fmkernels.guidance", guidance),
        ("fmkernels.likelihood", likelihood),
        ("fmkernels.models", models),
        ("fmkernels.compat", compat),
        ("fmkernels.compat.torchcfm.conditional_flow_matching", conditional_flow_matching),
        ("fmkernels.compat.torchcfm.optimal_transport", optimal_transport),
        ("fmkernels.compat.flow_matching.path", flow_matching_path),
        ("fmkernels.compat.flow_matching.path.scheduler", flow_matching_scheduler),
        ("fmkernels.compat.flow_matching.solver", flow_matching_solver),
        ("fmkernels.compat.flow_matching.utils", flow_matching_utils),
        ("fmkernels.compat.sit", sit),
        ("fmkernels.solvers.methods.registry", registry),
        ("fmkernels.solvers.methods.tableaus", tableaus),
        ("fmkernels.solvers.methods.runge_kutta", runge_kutta),
        ("fmkernels.solvers.methods.adams", adams),
        ("fmkernels.solvers.methods.diffusion", diffusion),
        ("fmkernels.solvers.methods.edm", edm),
        ("fmkernels.solvers.methods.sde_coefficients", sde_coefficients),
        ("fmkernels.solvers.methods.noise_transforms", noise_transforms),
        ("fmkernels.solvers.programs.builder", builder),
        ("fmkernels.solvers.sampling.grids", grids),
        ("fmkernels.solvers.adaptive.options", adaptive_options),
        ("fmkernels.solvers.adaptive.controllers", controllers),
        ("fmkernels.solvers.adaptive.solve", adaptive_solve),
        ("fmkernels.solvers.implicit.solve", implicit_solve),
        ("fmkernels.testing", testing),
    ):
        lines += [f"## {title}", "", inspect.getdoc(module) or "", ""]
        if module is registry:
            lines += [registry.table(), ""]
        for name in own_names(module):
            value = getattr(module, name)
            if callable(value):
                lines += entry(f"{title.replace('fmkernels', 'fm', 1)}.{name}", value, 3)
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines()) + "\n"


def main(arguments: list[str]) -> int:
    target = Path(arguments[0])
    text = render()
    if "--check" in arguments:
        if target.read_text() != text:
            print(f"{target} is not what the docstrings give: run make docs", file=sys.stderr)
            return 1
        return 0
    target.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
