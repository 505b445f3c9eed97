"""What all tests share: the cores of parallel workers, ids that are the same in each of them, the compiled library."""

from __future__ import annotations

import importlib.util
import os
import re
import sys

import pytest
from cuda_sources import Compile, compiler

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
MOST_WORKERS = 4  # each holds torch, and on a GPU a share of its memory


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if _WORKERS > 1:  # read when torch is imported, by the workers and by what they start: more threads than cores wait
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // _WORKERS)))


def _use_library(path: str) -> None:
    spec = importlib.util.spec_from_file_location("fmkernels._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fmkernels._C"] = module


if path := os.environ.get("FMKERNELS_TEST_LIBRARY"):  # another build of the compiled library: tools/sanitize.sh
    _use_library(path)
if os.environ.get("FMKERNELS_TEST_EMULATED"):  # tools/emulated.sh
    from emulated import install

    install()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What ``-n auto`` means."""
    return min(MOST_WORKERS, _cores())


@pytest.fixture(scope="session")
def compile_cuda(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Machine code of a CUDA source: file, architecture."""
    return compiler(tmp_path_factory.mktemp("cubin"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An object's address in an id is another one in each process: parallel workers would not find the test."""
    for item in items:
        if re.search(r" at 0x[0-9a-f]+", item.nodeid):
            raise pytest.UsageError(f"{item.nodeid}: expected an id without an address, give the parameter ids")
