"""Every example runs, quickly, and leaves what it promises; the digits demo's report is held to its own limits."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytestmark = pytest.mark.xdist_group("examples")
for _needed in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(_needed)


@pytest.fixture(scope="module")
def example() -> Any:
    """Imports an example by name, as a script finds its neighbours; its processes find fmkernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.setenv("PYTHONPATH", str(EXAMPLES.parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so small, more threads only wait for each other on a busy machine
        yield importlib.import_module
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo(example: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("digits") / "new" / "folder"
    assert example("digits").main(["--quick", "--device", "cpu", "--seed", "3", "--out", str(out)]) == 0
    return out, json.loads((out / "report.json").read_text())


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.parametrize("name", ["checkerboard", "eight_gaussians_to_moons"])
def test_plane(example: Any, name: str, tmp_path: Path) -> None:
    picture = tmp_path / "new" / f"{name}.png"
    assert example(name).main(["--quick", "--out", str(picture)]) == 0
    assert is_picture(picture)
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80


def test_demo_pictures(demo: tuple[Path, dict[str, Any]]) -> None:
    for name in ("samples.png", "solvers.png", "trajectories.png", "loss.png"):
        assert is_picture(demo[0] / name), name


def test_demo_trains_as_plain_pytorch(demo: tuple[Path, dict[str, Any]]) -> None:
    parity = demo[1]["parity"]
    fused, plain = parity["losses_fused"], parity["losses_plain"]
    assert len(fused) == len(plain) == parity["steps"] == 10
    assert max(abs(a - b) for a, b in zip(fused, plain, strict=True)) == parity["max_abs_difference"] <= 1e-5
    assert fused[-1] < fused[0]
    losses = demo[1]["training"]["losses"]
    assert len(losses) == demo[1]["training"]["steps"] == 20
    assert sum(losses[-5:]) < sum(losses[:5])


def test_demo_report(demo: tuple[Path, dict[str, Any]]) -> None:
    report = demo[1]
    assert report["passed"] is True
    assert (report["seed"], report["device"], report["quick"]) == (3, "cpu", True)
    assert report["parity"]["step_seconds_fused"] > 0
    assert report["parity"]["step_seconds_plain"] > 0
    assert {(len(p["shape"]), p["noise"]) for p in report["loss_part"]} == {(4, "given"), (4, "drawn")}
    for part in report["loss_part"]:
        assert part["speedup"] == pytest.approx(part["seconds_plain"] / part["seconds_fused"])
    assert set(report["sampling"]["guided"]) == set(report["sampling"]["unguided"])
    for method, nfe in (("euler", 4), ("midpoint", 4), ("heun2", 4), ("ab2", 4), ("dpmpp_2m", 4), ("sde", 8)):
        for kind, branches in (("guided", 2), ("unguided", 1)):
            drawn = report["sampling"][kind][method]
            assert (drawn["images"], drawn["nfe"]) == (500, branches * nfe)
            assert drawn["read_as_asked"] == round(500 * drawn["agreement"])
            assert drawn["sliced_wasserstein"] > 0
    assert report["sampling"]["guided"]["dopri5"]["nfe"] > 6
    assert 0 < report["sampling"]["distance_of_real_digits"] < 0.3
    assert report["classifier"]["held_out_accuracy"] > 0.95
    assert report["environment"]["torch"]


def test_demo_memory(demo: tuple[Path, dict[str, Any]]) -> None:
    memory = demo[1]["peak_memory"]
    # x_t and the gradient; a page here and there, and what a thread keeps, are no tensors.
    assert memory["peak_bytes_fused"] < 2.5 * memory["input_bytes_each"]
    assert memory["peak_bytes_plain"] > 2.5 * memory["input_bytes_each"]


def test_demo_fails_where_a_limit_is_missed(example: Any) -> None:
    failed, good = example("digits").failed, {"euler": {"agreement": 0.95}}
    assert failed({"max_abs_difference": 0.0}, good, False) == []
    assert "differ" in failed({"max_abs_difference": 2e-5}, good, True)[0]
    assert "differ" in failed({"max_abs_difference": float("nan")}, good, True)[0]
    assert "euler" in failed({"max_abs_difference": 0.0}, {"euler": {"agreement": 0.89}}, False)[0]
    assert failed({"max_abs_difference": 0.0}, {"euler": {"agreement": 0.1}}, True) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--device", "abacus"], "--device: expected auto or a device of this machine, got 'abacus'"),
    ],
)
def test_demo_bad_options(example: Any, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        example("digits").main(arguments)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err
