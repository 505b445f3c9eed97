"""The benchmark suite itself: what it writes, that it refuses wrong results, and that pages follow the
results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fmkernels as fm
from benchmarks import fields, loops, plain, records, render, report, sampling, targets, timing
from benchmarks.__main__ import main
from benchmarks.families import FAMILIES
from benchmarks.family import implementations
from fmkernels.testing import Case

pytestmark = pytest.mark.xdist_group("benchmarks")

ANY = ["--no-compile", "--rounds", "3", "--device", "cpu", "--name", "tiny"]
TINY = [*ANY, "--memory", "default"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two tiny cases of one family in a folder of their own."""
    root = tmp_path_factory.mktemp("results")
    status = main([*TINY, "--family", "combine", "--filter", "256x2/", "--dtype", "float32", "--out", str(root)])
    assert status == 0
    return root


def _records(root: Path) -> list[records.Record]:
    (path,) = root.glob("*/tiny.jsonl")
    return records.read(path)


def test_records_have_every_field(results: Path) -> None:
    found = _records(results)
    names = {record["implementation"] for record in found}
    assert {"eager", "copy", "fmkernels", "fmkernels-reference"} <= names
    assert len(found) == len(names) * 3  # K = 2, 4, 8
    for record in found:
        assert record["case"]["shape"] == [256, 2]
        assert record["samples"] == 3
        assert 0 < record["q1"] <= record["median"] <= record["q3"]
        assert record["gb_per_s"] == pytest.approx(record["bytes"] / record["median"] / 1e9)
        assert set(record["versions"]) >= {
            "fmkernels",
            "torch",
            "triton",
            "torchcfm",
            "flow_matching",
            "python",
        }
        assert set(record["machine"]) >= {"cpu", "threads", "isa", "gpu", "driver"}
        if record["implementation"] != "copy":
            assert 0 <= record["errors"]["y"] < 1e-6
            assert record["peak_extra_bytes"] >= 256 * 2 * 4
    assert sum(record["auto"] for record in found) == 3


def test_no_host_name_or_path_in_records(results: Path) -> None:
    (path,) = results.glob("*/tiny.jsonl")
    text = path.read_text()
    assert str(Path.home()) not in text
    assert str(Path(__file__).resolve().parent.parent) not in text


def test_a_second_run_is_appended_and_the_last_one_counts_alone(tmp_path: Path) -> None:
    path = tmp_path / "machine" / "a.jsonl"
    record = {
        "family": "f",
        "case": {"shape": [1], "dtype": "float32", "variant": ""},
        "timer": "host",
    }
    first = [{**record, "date": "2026-01-01", "implementation": name} for name in ("eager", "compile")]
    records.append(path, first)
    records.append(path, [{**record, "date": "2026-01-02", "implementation": "eager"}])
    assert len(path.read_text().splitlines()) == 3
    assert [(r["implementation"], r["date"]) for r in records.read(path)] == [("eager", "2026-01-02")]


def test_a_wrong_result_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = fm.combine

    def wrong(*args: object, impl: str = "auto", **kwargs: object) -> Tensor:
        y = right(*args, impl=impl, **kwargs)  # type: ignore[arg-type]
        assert isinstance(y, Tensor)
        if impl != "reference":
            y[-1, -1] += 1e-2
        return y

    if fm._dispatch.chosen("combine", "cpu", "auto") == "reference":
        pytest.skip("needs the compiled library")
    monkeypatch.setattr(fm, "combine", wrong)
    job = ["--family", "combine", "--filter", "256x2/K=2", "--dtype", "float32", "--out", str(tmp_path)]
    assert main([*TINY, *job]) == 1
    assert not list(tmp_path.rglob("*.jsonl"))
    captured = capsys.readouterr()
    assert "its check is red" in captured.out
    assert "REFUSED: combine/256x2/K=2/float32: fmkernels: y: largest error" in captured.err


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_and_is_right(family: str, tmp_path: Path) -> None:
    """The smallest cases, in every dtype, with noise drawn inside too."""
    smallest = "/16x2/unipc" if family == "sampling" else "/256x2"  # the others of it: the quick run below
    assert main([*TINY, "--family", family, "--filter", smallest, "--out", str(tmp_path)]) == 0
    found = _records(tmp_path)
    assert {record["case"]["dtype"] for record in found} == {str(d).split(".")[1] for d in FAMILIES[family].dtypes}
    for measured in records.by_case(found).values():
        assert records.ours(measured) is not None
        assert {"copy"} <= set(measured)
        assert "eager" in measured or smallest == "/16x2/unipc"  # which nobody writes by hand


def test_list_and_unknown_filter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--quick"]) == 0
    names = capsys.readouterr().out.split("\n")
    assert "randn/256x16x64x64/float32" in names
    assert main(["--filter", "no such case"]) == 2


def test_targets_name_existing_cases() -> None:
    """A target whose case was renamed would never be measured again."""
    known = {(family.name, case.shape, case.variant) for family in FAMILIES.values() for case in family.cases}
    for target in targets.TARGETS:
        assert (target.family, target.shape, target.variant) in known


def test_targets_pass_fail_and_missing() -> None:
    target = targets.TARGETS[0]
    base = {
        "family": target.family,
        "case": {"shape": list(target.shape), "dtype": "float32", "variant": target.variant},
        "timer": "host",
    }
    mine = {**base, "implementation": "fmkernels-native", "auto": True, "median": 1.0}
    for eager, verdict in ((target.at_least + 1, "pass:"), (target.at_least - 1, "FAIL:")):
        lines, kept = targets.check([mine, {**base, "implementation": "eager", "auto": False, "median": eager}], "cpu")
        assert verdict in lines[0]
        assert "NOT MEASURED" in lines[-1]
        assert not kept  # the others were not measured


def test_render_is_idempotent_and_check_sees_stale_pages(results: Path, tmp_path: Path) -> None:
    pages = {"README.md": "readme", "docs/performance.md": "performance", "docs/solvers.md": "sampling"}
    for name, block in pages.items():
        page = tmp_path / name
        page.parent.mkdir(exist_ok=True)
        page.write_text(f"before\n<!-- benchmarks:begin {block} -->\nold\n<!-- benchmarks:end -->\nafter\n")
    arguments = ["render", "--root", str(tmp_path), "--results", str(results)]
    assert main([*arguments, "--check"]) == 1
    assert main(arguments) == 0
    written = {name: (tmp_path / name).read_text() for name in pages}
    (image,) = (tmp_path / "docs" / "images").glob("benchmarks-*.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    full = written["docs/performance.md"]
    assert "256x2 K=4" in full
    assert "old" not in full
    assert f"(images/{image.name})" in full
    assert f"(docs/images/{image.name})" in written["README.md"]
    assert "Not measured yet." in written["docs/solvers.md"]
    assert full.startswith("before\n")
    assert full.endswith("after\n")

    drawn = image.stat().st_mtime_ns
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    assert {name: (tmp_path / name).read_text() for name in pages} == written
    assert image.stat().st_mtime_ns == drawn

    stale = full.replace("float32", "float64", 1)
    (tmp_path / "docs" / "performance.md").write_text(stale)
    assert main([*arguments, "--check"]) == 1
    (tmp_path / "README.md").write_text("<!-- benchmarks:begin other -->\n<!-- benchmarks:end -->\n")
    assert any("unknown block 'other'" in p for p in render.render(tmp_path, results, check=True))
    image.write_bytes(b"another picture")
    assert any("made from other results" in p for p in render.render(tmp_path, results, check=True))


@pytest.fixture(scope="module")
def solves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a quick run of whole solves."""
    root = tmp_path_factory.mktemp("solves")
    assert main([*TINY, "--quick", "--family", "sampling", "--budget", "0.1", "--out", str(root)]) == 0
    return root


def test_records_of_solves_have_the_network_apart(solves: Path) -> None:
    cases = records.by_case(_records(solves))
    assert {key[3] for key in cases} == {"euler 100", "euler cfg 50", "dopri5 1e-05"}
    for (_, _, _, variant, _), measured in cases.items():
        assert records.ours(measured) is measured["fmkernels"]
        assert {"fmkernels-Solver", "eager", "copy"} <= set(measured)
        assert "solve" not in measured["copy"]
        for name, record in measured.items():
            if name == "copy":
                continue
            solve = record["solve"]
            assert solve["overhead"]["samples"] == solve["network"]["samples"] == record["samples"]
            assert solve["overhead_per_step"] == pytest.approx(solve["overhead"]["median"] / solve["steps"])
            assert 0 < solve["network"]["q1"] <= solve["network"]["median"] <= solve["network"]["q3"]
            if variant == "euler 100":
                assert (solve["nfe"], solve["nfe_per_sample"], solve["steps"]) == (100, 100.0, 100)
                assert record["errors"]["method"] < 1e-5 < record["errors"]["x_1"] < 0.2
            elif variant == "euler cfg 50":
                assert (solve["nfe"], solve["nfe_per_sample"], solve["steps"]) == (50, 100.0, 50)
                assert record["errors"]["method"] < 1e-5
            else:
                assert solve["nfe"] >= solve["nfe_per_sample"] > 6
                assert record["errors"]["x_1"] < 1e-3


def test_pages_of_solves(solves: Path, tmp_path: Path) -> None:
    """All blocks, the work-precision ones from records made up after a measured one."""
    found = _records(solves)
    (one,) = [r for r in found if r["implementation"] == "fmkernels" and r["case"]["variant"] == "euler 100"]
    case = {**one["case"], "shape": [1024, 2], "variant": sampling.PRECISION}
    for name in ("fmkernels", "fmkernels-euler 8", "torchdiffeq-euler 8", "fmkernels-ab2 16"):
        found.append({**one, "case": case, "implementation": name, "auto": name == "fmkernels"})
    records.append(tmp_path / "results" / "machine" / "a.jsonl", found)
    for name in render.PAGES:
        page = tmp_path / name
        page.parent.mkdir(exist_ok=True)
        page.write_text((Path(__file__).resolve().parent.parent / name).read_text())
    arguments = ["render", "--root", str(tmp_path), "--results", str(tmp_path / "results")]
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    text = (tmp_path / "docs" / "solvers.md").read_text()
    assert "![Whole solves on machine](images/sampling-machine.png)" in text
    assert "overhead a step: >= 4 x torchdiffeq [cpu]" in text
    assert "| 16x2 euler 100 | fmkernels-Solver |" in text
    assert "| euler 100 | 16x2 |" in text
    assert "| euler | 8 |" in text
    assert "| ab2 | 16 |" in text
    assert "Not measured yet." not in text
    assert [path.name for path in (tmp_path / "docs" / "images").iterdir()] == ["sampling-machine.png"]


def test_a_target_of_overhead() -> None:
    (target, *_) = [t for t in targets.TARGETS if t.of == "overhead a step"]
    base = {
        "family": target.family,
        "case": {"shape": list(target.shape), "dtype": "float32", "variant": target.variant},
        "timer": "host",
        "median": 1.0,
    }
    mine = {**base, "implementation": "fmkernels", "auto": True}
    mine["solve"] = {"overhead_per_step": 1e-6, "overhead": {"q1": 1e-5, "median": 1e-4}}
    theirs = {"overhead_per_step": 5e-6, "overhead": {"q1": 1e-5, "median": 5e-4}}
    other = {**base, "implementation": target.against, "auto": False, "solve": theirs}
    assert "pass: 5.00 x" in targets.check([mine, other], "cpu", [target.family])[0][0]
    mine["solve"] = {"overhead_per_step": 1e-9, "overhead": {"q1": -1e-4, "median": 1e-7}}  # noise is no success
    lines, kept = targets.check([mine, other], "cpu", [target.family])
    assert "NOT RESOLVED" in lines[0]
    assert not kept


@pytest.mark.parametrize("task", [t for t in sampling.PRECISION_TASKS if t.method in loops.LOOPS][::3], ids=str)
def test_loops_by_hand_agree_with_ours(task: sampling.Task) -> None:
    """In float64, where only the formula can differ."""
    rng = torch.Generator().manual_seed(0)
    model, x_0 = fields.Mixture(), torch.randn(32, 2, generator=rng, dtype=torch.float64)
    label = torch.zeros(32, dtype=torch.float64)
    ours, _ = fm.sample(model, x_0, method=task.method, steps=task.steps, label=label)
    by_hand = loops.LOOPS[task.method](lambda x, t: model(x, t, label), x_0, task.times)
    torch.testing.assert_close(ours, by_hand, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("field", [fields.Network, fields.Pixels, fields.Mixture])
def test_negated_fields(field: type) -> None:
    model, label = field(), torch.rand(8)
    x, t = torch.randn(8, 2), torch.rand(8)
    torch.testing.assert_close(model.negated()(x, t, label), -model(x, t, label), rtol=1e-5, atol=2e-6)


def test_newest_results_of_each_family(tmp_path: Path) -> None:
    case = {"shape": [1], "dtype": "float32", "variant": ""}
    for name, family, date in (("a", "f", "2026-01-01"), ("a", "g", "2026-01-01"), ("b", "g", "2026-01-02")):
        record = {"family": family, "case": case, "timer": "host", "date": date, "file": name}
        records.append(tmp_path / "machine" / f"{name}.jsonl", [record])
    (found,) = records.newest(tmp_path).values()
    assert [(r["family"], r["file"]) for r in found] == [("f", "a"), ("g", "b")]


def test_render_says_what_is_missing(results: Path, tmp_path: Path) -> None:
    assert "no results" in render.render(tmp_path, tmp_path, check=True)[0]
    (tmp_path / "README.md").write_text("no marks\n")
    problems = render.render(tmp_path, results, check=True)
    assert any("README.md: no marks" in problem for problem in problems)
    assert any("docs/performance.md: missing" in problem for problem in problems)


def _lines(memory: str, **seconds: float) -> list[records.Record]:
    base = {
        "family": "cfm",
        "case": {"shape": [8192, 2], "dtype": "float32", "variant": "x_0 given"},
        "timer": "host",
        "memory": memory,
        "floor_share": 0.5,
        "peak_extra_bytes": 1024,
        "retained_bytes": 2048,
        "errors": {"x_t": 1e-7},
    }
    return [
        {**base, "implementation": name, "auto": name == "fmkernels", "median": median}
        for name, median in seconds.items()
    ]


def test_a_row_tells_what_is_left_where_nobody_pays_for_page_faults() -> None:
    lines = _lines("default", fmkernels=1.0, eager=11.0, compile=3.0)
    lines += _lines("kept", fmkernels=1.0, eager=3.0, compile=0.5)
    (row,) = report.rows(lines)
    told = dict(zip(report.HEADER, row, strict=True))
    assert (told["vs eager"], told["vs compile"], told["vs torchcfm"]) == ("11.00 x", "3.00 x", "-")
    assert (told["memory kept: vs eager"], told["memory kept: vs compile"]) == ("3.00 x", "0.50 x")
    assert told["page faults' share"] == "80 %"  # 8 of the 10 seconds
    assert told["retained"] == "2 KiB"
    alone = dict(zip(report.HEADER, report.rows(_lines("kept", fmkernels=1.0, eager=2.0))[0], strict=True))
    assert (alone["dtype"], alone["vs eager"]) == ("float32, host, memory kept", "2.00 x")


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's settings are glibc's")
def test_every_case_is_measured_with_large_blocks_kept_too(tmp_path: Path) -> None:
    job = ["--family", "combine", "--filter", "256x2/K=2", "--dtype", "float32", "--out", str(tmp_path)]
    assert main([*ANY, *job]) == 0
    both = {memory: [r for r in _records(tmp_path) if r["memory"] == memory] for memory in ("default", "kept")}
    assert {r["implementation"] for r in both["kept"]} == {"fmkernels", "eager", "eager-naive", "copy"}
    assert {r["implementation"] for r in both["default"]} > {r["implementation"] for r in both["kept"]}


def test_where_another_is_faster_is_told() -> None:
    lines = _lines("default", fmkernels=1.0, eager=11.0, compile=3.0) + _lines("kept", fmkernels=1.0, compile=0.5)
    assert report.losses(lines) == [("cfm 8192x2 x_0 given", "float32", "host, memory kept", "compile", "2.00 x")]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "sampling"])
def test_half_losses_are_measured_in_half_precision_alone(family: str) -> None:
    case, device = FAMILIES[family].cases[0], torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        found = implementations(FAMILIES[family], case, dtype, device, with_compile=False)
        names = {entry.name for entry in found if not isinstance(entry, tuple)}
        assert "eager" in names
        assert ("eager-half loss" in names) == (dtype is torch.bfloat16 and family in ("cfm", "loss"))


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3)])
def test_the_best_form_in_plain_pytorch_is_the_naive_one(shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    x_1, x_0, z = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(3))
    t = torch.rand(shape[0], generator=rng, dtype=torch.float64)
    torch.testing.assert_close(plain.path(x_1, x_0, t), plain.naive_path(x_1, x_0, t))
    torch.testing.assert_close(plain.combine([x_1, x_0, z], [0.3, -2.0, 0.1]), 0.3 * x_1 - 2.0 * x_0 + 0.1 * z)


def test_units() -> None:
    assert [report.seconds(x) for x in (2.0, 0.0125, 3.4e-6, 5e-8)] == ["2 s", "12.5 ms", "3.4 µs", "50 ns"]
    assert [report.size(x) for x in (None, 12, 2048, 64 << 20)] == ["-", "12 B", "2 KiB", "64 MiB"]


def test_interleave_counts_samples_and_rotates_inputs() -> None:
    seen: list[int] = []
    slow = timing.Entry("slow", lambda x: sum(range(20000)), [0])
    fast = timing.Entry("fast", seen.append, [0, 1, 2])
    times = timing.interleave([slow, fast], torch.device("cpu"), budget=0.1, rounds=4)
    assert times["slow"].samples == times["fast"].samples == 4
    assert set(seen) == {0, 1, 2}
    assert times["fast"].median < times["slow"].median


def test_interleave_pairs_an_entry_with_its_part() -> None:
    part = timing.Entry("part", lambda x: sum(range(20000)), [0])
    whole = timing.Entry("whole", lambda x: sum(range(60000)), [0], part=part)
    times = timing.interleave([whole], torch.device("cpu"), budget=0.1, rounds=5)
    assert {timing_.samples for timing_ in times.values()} == {5}
    assert 0 < times[whole.rest].median < times["whole"].median


def test_peak_extra_bytes() -> None:
    from benchmarks.memory import peak_extra_bytes

    x = torch.randn(1 << 16)

    def three_at_once() -> Tensor:
        a = x * 2  # held while the next two come
        b = a + 1
        return a * b

    assert peak_extra_bytes(three_at_once, torch.device("cpu")) == 3 * (4 << 16)


def _latency_case() -> tuple[Case, dict]:
    case = next(c for c in FAMILIES["cfm"].cases if c.shape == (256, 2) and not c.noise)
    inputs = case.make(torch.float32, torch.device("cpu"), 0)
    inputs["pred"].requires_grad_()
    return case, inputs


@pytest.mark.parametrize("name", ["fmkernels", "eager"])
def test_latency(benchmark: object, name: str) -> None:
    """Path, loss and gradient at (256, 2), for pytest-benchmark's own statistics and comparisons."""
    case, inputs = _latency_case()
    family = FAMILIES["cfm"]
    run = family.ours(case, "auto")[""] if name == "fmkernels" else family.plain(case, lambda f: f)[""]
    outputs = benchmark(run, inputs)  # type: ignore[operator]
    right = family.oracle(case, inputs, outputs)
    for key in ("x_t", "loss", "grad"):
        torch.testing.assert_close(outputs[key].double(), right[key], rtol=1e-5, atol=1e-6)


def test_records_are_valid_json_lines(results: Path) -> None:
    (path,) = results.glob("*/tiny.jsonl")
    for line in path.read_text().splitlines():
        assert json.loads(line)["schema"] == records.SCHEMA
