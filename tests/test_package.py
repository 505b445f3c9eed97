"""The package as such: what importing it loads and costs, which way imports go, documentation that is up to date."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fmkernels as fm

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fm.__file__).parent


def python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_neither_triton_nor_the_compiled_library() -> None:
    python(
        "import torch, sys; before = set(sys.modules); import fmkernels; new = set(sys.modules) - before\n"
        "bad = [m for m in new if m.split('.')[0] == 'triton' or m == 'fmkernels._C']\n"
        "assert not bad, bad"
    )


def test_import_takes_under_50_ms_on_top_of_torch(tmp_path: Path) -> None:
    # of the process's own time, and on a busy machine, which slows that too, by torch's; compiled once, as installing
    # does, whether or not this run's environment forbids writing bytecode
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    python("import torch, fmkernels", **compiled)
    code = """
import time
before = time.process_time()
import torch
between = time.process_time()
import fmkernels
print(between - before, time.process_time() - between)
"""

    def quick() -> bool:
        torch_takes, own = map(float, python(code, **compiled).split())
        return own < max(0.050, 0.06 * torch_takes)

    assert any(quick() for _ in range(5))


def test_works_where_triton_is_blocked() -> None:
    python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fmkernels as fm\n"
        "x = torch.randn(4, 3); b = fm.paths.CondOT().sample(x); assert torch.isfinite(fm.cfm_loss(x, b))"
    )


# The rooms of the house, from the ground up: a module imports from its own room and from those before it. Files of one
# room form no circle either.
ROOMS = [
    ("leaves", r"^(_[a-z]\w*|random|testing|version)$"),
    ("ops", r"^ops(\.|$)"),
    ("paths", r"^(paths(\.|$)|weightings$|times$)"),
    ("losses", r"^losses$"),
    ("programs", r"^solvers(\.programs(\.|$)|$)"),
    ("methods", r"^solvers\.methods(\.|$)"),
    ("adaptive", r"^solvers\.adaptive(\.|$)"),
    ("implicit", r"^solvers\.implicit(\.|$)"),
    ("sampling", r"^solvers\.sampling(\.|$)"),
    ("equations", r"^solvers\.equations(\.|$)"),
    ("guidance", r"^guidance(\.|$)"),
    ("likelihood", r"^likelihood(\.|$)"),
    ("models", r"^models(\.|$)"),
    ("compat", r"^compat(\.|$)"),
    ("top", r"^(__init__|__main__|cli)$"),
]
# Rooms beside each other: what is above in the list knows nothing of these below.
APART = {"guidance": {"methods", "adaptive", "implicit", "sampling", "equations"}, "equations": {"sampling"}}


def room(module: str) -> int:
    for rank, (_, pattern) in enumerate(ROOMS):
        if re.match(pattern, module):
            return rank
    raise AssertionError(f"{module} belongs to no room: name it in ROOMS")


def imports_of_the_package() -> dict[str, set[str]]:
    """For each module of the package those of it that it imports, anywhere in its text."""
    files = {}
    for file in PACKAGE.rglob("*.py"):
        parts = list(file.relative_to(PACKAGE).with_suffix("").parts)
        files[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = file
    found: dict[str, set[str]] = {}
    for module, file in files.items():
        package = list(file.relative_to(PACKAGE).parts[:-1])
        found[module] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            base = package[: len(package) - (node.level - 1)] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                whole, stem = ".".join([*base, alias.name]), ".".join(base)
                target = whole if whole in files else stem
                if target:
                    assert target in files, f"{module} imports {target}, which does not exist"
                    found[module].add(target)
    return found


def test_imports_go_one_way_through_the_rooms() -> None:
    for module, targets in imports_of_the_package().items():
        for target in targets:
            assert room(target) <= room(module), f"{module} imports {target}"
            apart = APART.get(ROOMS[room(module)][0], set())
            assert ROOMS[room(target)][0] not in apart, f"{module} imports {target}: these rooms stand apart"


def test_no_imports_form_a_circle() -> None:
    imports, order = imports_of_the_package(), {}

    def visit(module: str, chain: list[str]) -> None:
        assert module not in chain, "a circle of imports: " + " -> ".join([*chain[chain.index(module) :], module])
        if module not in order:
            for target in sorted(imports[module]):
                visit(target, [*chain, module])
            order[module] = len(order)

    for module in sorted(imports):
        visit(module, [])


def test_files_stay_small() -> None:
    for file in PACKAGE.rglob("*.py"):
        count = len(file.read_text().splitlines())
        assert count <= 500, f"{file.name} has {count} lines: split it by responsibility"


def test_implementations_never_import_each_other() -> None:
    for file in (PACKAGE / "ops").glob("*/*.py"):
        if file.stem in ("native", "triton"):
            others = {"native", "triton", "reference"} - {file.stem}
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == 1:
                    names = {node.module} if node.module else {a.name for a in node.names}
                    assert not names & others, f"{file} imports {names & others}"


def test_every_public_name_is_documented() -> None:
    for name in fm.__all__:
        value = getattr(fm, name)
        if callable(value):
            assert (value.__doc__ or "").strip(), name


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a source checkout")
def test_documentation_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "tools/api_reference.py", "docs/api.md", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", file.read_text()):
            assert (file.parent / link).exists(), f"{file.name} links to {link}"


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a source checkout")
def test_the_readmes_examples_run() -> None:
    train, draw = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    setup = """
import torch
x_1, weight = torch.randn(8, 3), torch.ones(3, requires_grad=True)
model = lambda x, t: x * weight
"""
    python(setup + train + "\nassert weight.grad is not None")
    setup = """
import torch, fmkernels as fm
labels = torch.arange(64) % 10
model = lambda x, t, labels: x * (labels < 10)[:, None, None, None]
"""
    python(setup + draw + "\nassert x_1.shape == (64, 1, 8, 8) and result.nfe == 80")


def test_documentation_examples_run() -> None:
    """Every Python block of getting-started, in order, with the names that it takes for granted."""
    text = (ROOT / "docs" / "getting-started.md").read_text() if (ROOT / "docs").is_dir() else ""
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    setup = """
import torch, fmkernels as fm
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
    def forward(self, x, t, labels=None):
        return x * self.scale
model = Net(); optimizer = torch.optim.SGD(model.parameters(), 1e-3)
data = [torch.randn(4, 1, 8, 8)] * 2; is_valid = torch.ones(4, dtype=torch.bool)
pred, x_0, x_1, t = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), data[0], torch.rand(4)
conditional = model
"""
    python(setup + "\n".join(blocks))


MAKERS = {
    "tensor",
    "as_tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "linspace",
    "eye",
    "rand",
    "randn",
    "randint",
}


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    """Else the default device (torch.device("meta") as a context, another GPU) decides where it is."""
    unnamed = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS:
                of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
                if of_torch and not any(keyword.arg in ("device", None) for keyword in node.keywords):
                    unnamed.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    assert not unnamed
