"""The command ``fmkernels``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fmkernels as fm
from fmkernels import _dispatch, _native, cli


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, Any]]]:
    """Processes that the command would start; each "exits" with 7."""
    found: list[tuple[list[str], dict[str, Any]]] = []

    def call(command: list[str], **options: Any) -> int:
        found.append((command, options))
        return 7

    monkeypatch.setattr(cli.subprocess, "call", call)
    return found


def test_env_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["fmkernels"], found["torch"]) == (fm.__version__, torch.__version__)
    assert found["threads"] == torch.get_num_threads()
    assert len(found["gpus"]) == torch.cuda.device_count()
    for device, taken in found["implementations"].items():
        assert list(taken) == list(_dispatch.OPS)
        for impl in taken.values():
            assert impl not in found["unavailable"][device]
    if _native.missing("cpu") is None:
        assert found["library"]["isa"]
        assert found["library"]["build"]["compiler"]


def test_env_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    for word in ("fmkernels", "python", "torch", "triton", "GPU", "compiled library", "regression_loss on cpu"):
        assert word in text


def test_env_without_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_native, "missing", lambda device_type: "it was not built")
    _dispatch.chosen.cache_clear()
    try:
        assert cli.main(["env"]) == 0
    finally:
        _dispatch.chosen.cache_clear()
    text = capsys.readouterr().out
    assert "missing: it was not built" in text
    assert "no native on cpu" in text
    assert "reference" in text.split("combine on cpu", 1)[1].splitlines()[0]


def test_env_under_an_implementation_that_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_dispatch, "_ENVIRONMENT", "triton")
    monkeypatch.setattr(_dispatch, "unavailable", lambda impl, device: "no interpreter" if impl == "triton" else None)
    _dispatch.chosen.cache_clear()
    try:
        assert cli.main(["env"]) == 0
    finally:
        _dispatch.chosen.cache_clear()
    assert "no interpreter" in capsys.readouterr().out.split("combine on cpu", 1)[1].splitlines()[0]


def test_as_a_module_without_triton() -> None:
    code = "import runpy, sys; sys.argv[1:] = ['env', '--json']; runpy.run_module('fmkernels', run_name='__main__')"
    watch = "import atexit, sys; atexit.register(lambda: sys.stderr.write(str('triton' in sys.modules)));"
    root = str(Path(cli.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", watch + code],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["fmkernels"] == fm.__version__
    assert done.stderr.endswith("False")


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["env", "--yaml"]])
def test_unknown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: fmkernels" in capsys.readouterr().err


def test_demo_passes_all_arguments(calls: list[tuple[list[str], dict[str, Any]]]) -> None:
    assert cli.main(["demo", "--steps", "5", "--help"]) == 7
    [(command, options)] = calls
    assert command == [sys.executable, str(cli.ROOT / "examples/digits.py"), "--steps", "5", "--help"]
    assert options["env"]["PYTHONPATH"].split(os.pathsep)[0] == str(cli.ROOT)


def test_bench_passes_all_arguments(calls: list[tuple[list[str], dict[str, Any]]]) -> None:
    assert cli.main(["bench", "render", "--quick", "--", "-k"]) == 7
    assert calls[0][0] == [sys.executable, "-m", "benchmarks", "render", "--quick", "--", "-k"]


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_needs_a_source_checkout(
    command: str,
    calls: list[tuple[list[str], dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    assert cli.main([command]) == 2
    assert calls == []
    assert f"make {command}" in capsys.readouterr().err
