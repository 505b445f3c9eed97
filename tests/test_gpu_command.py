"""`make gpu` without a GPU: the steps' order, their budget, what a cut run keeps, exit statuses; and the commands that
its steps run, on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import targets
from benchmarks.__main__ import main as benchmarks

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))

import gpu  # noqa: E402
import gpu_operations  # noqa: E402
import measured_model  # noqa: E402
import sass_model  # noqa: E402
import timed_steps  # noqa: E402
from timed_steps import CUT, FAILED, NOT_RUN, PASSED, Outcome, Runner, Step  # noqa: E402


def says(name: str, code: str, share: float = 1.0, **options: Any) -> Step:
    return Step(name, [sys.executable, "-c", code], share, **options)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(tmp_path: Path, budget: float, *steps: Step) -> list[Outcome]:
    return Runner(tmp_path, tmp_path / "out", tmp_path / "logs", budget).run(steps)


def test_steps_run_in_order_and_their_ends_are_told(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    outcomes = run(
        tmp_path, 60, says("a", "print('one')"), says("b", "import sys; sys.exit(7)"), says("c", "print('three')")
    )
    assert [(o.name, o.status, o.code) for o in outcomes] == [("a", PASSED, 0), ("b", FAILED, 7), ("c", PASSED, 0)]
    assert [(line["name"], line["status"]) for line in lines_of(tmp_path / "out" / "steps.jsonl")] == [
        ("a", PASSED), ("b", FAILED), ("c", PASSED),
    ]  # fmt: skip
    log = (tmp_path / "out" / "steps.log").read_text()
    assert log.index("one") < log.index("== b: failed") < log.index("three")
    assert (tmp_path / "logs" / "a.log").read_text() == "one\n"
    assert capfdbinary.readouterr().out.decode() == log


def test_a_step_is_ended_at_its_limit_and_what_it_said_is_kept(tmp_path: Path) -> None:
    """The second ignores the interrupt and has started a process that does so too."""
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    deaf = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid); time.sleep(60)"
    )
    polite = "import time\ntry:\n    print('begun'); time.sleep(60)\nfinally:\n    print('so far')"
    start = time.monotonic()
    outcomes = run(tmp_path, 14, says("polite", polite), says("deaf", deaf), says("last", "print('last')", 2.0))
    assert time.monotonic() - start < 14
    assert [o.status for o in outcomes] == [CUT, CUT, PASSED]
    assert (tmp_path / "logs" / "polite.log").read_text().startswith("begun\nso far\n")
    pid = int((tmp_path / "logs" / "deaf.log").read_text())
    for _ in range(100):
        if not alive(pid):
            break
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return "(" in (text := Path(f"/proc/{pid}/stat").read_text()) and text.rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_step_leaves_is_for_the_next_and_no_step_takes_what_later_ones_have(tmp_path: Path) -> None:
    outcomes = run(tmp_path, 40, says("a", ""), says("b", ""), says("c", "", 2.0))
    a, b, c = (o.limit for o in outcomes)
    assert a <= 10
    assert 10 < b <= 20
    assert 30 < c <= 40


def test_nothing_follows_a_step_that_is_needed_and_fails(tmp_path: Path) -> None:
    outcomes = run(tmp_path, 60, says("build", "raise SystemExit(1)", needed=True), says("rest", "print('ran')"))
    assert [o.status for o in outcomes] == [FAILED, NOT_RUN]
    assert [line["status"] for line in lines_of(tmp_path / "out" / "steps.jsonl")] == [FAILED, NOT_RUN]


def test_a_command_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    outcomes = run(tmp_path, 60, Step("no", ["/no/such/command"], 1.0), says("after", "print(1)"))
    assert [o.status for o in outcomes] == [FAILED, PASSED]
    assert "No such file" in (tmp_path / "out" / "steps.log").read_text()


def test_an_environment_reaches_its_step_alone(tmp_path: Path) -> None:
    show = "import os; print(os.environ.get('FM_STEP', 'none'), os.environ['PYTHONUNBUFFERED'])"
    run(tmp_path, 60, says("a", show, environment={"FM_STEP": "here"}), says("b", show))
    assert [(tmp_path / "logs" / f"{name}.log").read_text() for name in "ab"] == ["here 1\n", "none 1\n"]


@pytest.mark.parametrize(
    ("statuses", "status"),
    [([PASSED, PASSED], 0), ([PASSED, CUT], 3), ([CUT, FAILED], 1), ([FAILED, NOT_RUN], 1), ([PASSED, NOT_RUN], 3)],
)
def test_exit_statuses(statuses: list[str], status: int) -> None:
    outcomes = [Outcome(str(i), s, None, 1.0, 2.0) for i, s in enumerate(statuses)]
    assert timed_steps.exit_status(outcomes) == status
    assert len(timed_steps.table(outcomes).splitlines()) == len(statuses)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tools!r})
import timed_steps
from timed_steps import Step
timed_steps.ending_on_sigterm()
out = Path({out!r})
steps = [Step("first", [sys.executable, "-c", "print('done')"], 1.0),
         Step("second", [sys.executable, "-c", "import os, time; print(os.getpid()); time.sleep(60)"], 9.0)]
timed_steps.Runner(out, out, out / "logs", 100.0).run(steps)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_has_left_what_it_had(tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(tools=str(TOOLS), out=str(tmp_path))], stdout=subprocess.DEVNULL
    )
    log = tmp_path / "logs" / "second.log"
    for _ in range(200):
        if log.is_file() and log.read_text().endswith("\n"):
            break
        time.sleep(0.05)
    pid = int(log.read_text())
    process.send_signal(number)
    process.wait(10)
    try:
        assert [line["name"] for line in lines_of(tmp_path / "steps.jsonl")] == ["first"]
        assert "done" in (tmp_path / "steps.log").read_text()
        if number == signal.SIGTERM:  # its commands end with it
            for _ in range(100):
                if not alive(pid):
                    break
                time.sleep(0.05)
            assert not alive(pid)
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


# ---------------------------------------------------------------------- the steps of make gpu


def test_what_tells_most_comes_first_within_the_budget(tmp_path: Path) -> None:
    steps = gpu.steps("python3", tmp_path, "90", "/bin/compute-sanitizer", 4)
    assert [s.name for s in steps] == [
        "build", "env", "operations", "bench", "model", "tests", "memcheck", "racecheck", "synccheck", "initcheck",
        "rest",
    ]  # fmt: skip
    assert sum(s.share for s in steps) <= gpu.BUDGET
    build = steps[0]
    assert build.share <= 180
    assert build.needed
    assert build.environment == {"FMKERNELS_CUDA": "on", "FMKERNELS_CUDA_ARCHITECTURES": "90"}
    assert [s.name for s in gpu.steps("python3", tmp_path, "90", None, 1)] == [s.name for s in (*steps[:6], steps[-1])]
    assert [s.name for s in gpu.chosen(steps, ["env", "bench"], ["env"])] == ["bench"]
    with pytest.raises(ValueError, match="expected steps among build, env"):
        gpu.chosen(steps, [], ["benches"])


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, str(TOOLS / "gpu.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected a CUDA device, found none" in done.stderr


def test_the_benchmarks_of_a_quick_run_hold_every_promise(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks(["--list", "--quick", "--promises", "--device", "cuda"]) == 0
    listed = capsys.readouterr().out.split("\n")
    wanted = {
        f"{t.family}/{'x'.join(map(str, t.shape))}/{t.variant}/{t.dtype}".replace("//", "/")
        for t in targets.TARGETS
        if t.device == "cuda"
    }
    assert wanted == {line for line in listed if line}


def test_every_operation_is_looked_at_by_all_sanitizers() -> None:
    from fmkernels import _dispatch

    work = gpu_operations.groups(["native"], torch.device("cuda"))
    looked_at = {op for _, op, _ in work}
    assert looked_at >= {*_dispatch.OPS, "interpolate", gpu_operations.SOLVE, gpu_operations.SCHEDULE}
    assert all(checks for checks in work.values())


def test_operations_are_checked_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "operations.jsonl"
    arguments = ["--device", "cpu", "--check", "--most", "3", "--out", str(out)]
    assert gpu_operations.main(arguments) == 0
    lines = lines_of(out)
    assert len(lines) == 4 * (len(gpu_operations.OPS) + 1) + 2  # times are float32 or float64
    assert all(line["run"] == 3 and line["wrong"] == [] for line in lines)

    def wrong(*_: Any, name: str = "", **__: Any) -> None:
        assert not name.startswith("odd"), f"{name}: wrong"

    monkeypatch.setattr(gpu_operations, "assert_within_budget", wrong)
    out.unlink()
    assert gpu_operations.main([*arguments[:3], "--out", str(out)]) == 1
    assert {line["operation"] for line in lines_of(out) if line["wrong"]} >= {"interpolate"}


def test_operations_that_are_cut_have_seen_a_part_of_all(tmp_path: Path) -> None:
    out = tmp_path / "operations.jsonl"
    assert gpu_operations.main(["--device", "cpu", "--seconds", "0", "--out", str(out)]) == 0
    assert {line["run"] for line in lines_of(out)} == {0}
    work = {"a": [0, 1, 2], "b": [3], "c": [4, 5]}
    turns = [(key, check) for key, _, check in gpu_operations.take_turns(work)]  # type: ignore[arg-type]
    assert turns == [("a", 0), ("b", 3), ("c", 4), ("a", 1), ("c", 5), ("a", 2)]


def test_every_case_of_the_model_can_be_measured() -> None:
    elements, device = 2 * measured_model.INNER, torch.device("cpu")
    for architecture in sass_model.ARCHITECTURES:
        for name in sass_model.read_table(architecture)["cases"]:
            call = measured_model.call_of(name, device, elements)
            if call is not None:
                call()


def test_a_measured_case_stands_beside_its_model() -> None:
    entry = sass_model.read_table("90")["cases"]["scale, f32"]
    h200 = measured_model.gpu_named("NVIDIA H200")
    assert h200 is not None
    assert measured_model.gpu_named("NVIDIA A100-SXM4") is None
    line = measured_model.line_of("scale, f32", entry, h200, 2e-4)
    assert line["measured_us"] == 200.0
    assert line["modelled_us"] == pytest.approx(2**26 * 8 / 4.8e6, rel=1e-3)
    assert line["bound"] == "memory"
    assert line["over_model"] == pytest.approx(200.0 / line["modelled_us"], rel=1e-3)
    assert measured_model.text_of(line).split()[:2] == ["scale,", "f32"]
