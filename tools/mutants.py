"""Plants small bugs, one at a time, and tells which of them no test sees: `make mutants`.

mutants_of_solvers.py, mutants_of_kernels.py and mutants_elsewhere.py hold the bugs as text: a file, what stands in it,
what is put there, and the tests that must fail: pytest's, or programs of tests/cpp, which see what a GPU's kernel
does. Each runs in a copy of the working tree; those of C++ files are built there first. The exit status is 1 where a
bug survives, 2 where the list is out of date or the tests fail without any.

    python tools/mutants.py [--check] [--only WORDS] [--trust] [--jobs N]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 900.0  # seconds of one bug's tests; what hangs is seen
FAILED = 1  # pytest's exit status where tests ran and some failed
BROKEN = 3  # pytest's own for an internal error


def is_program(test: str) -> bool:
    """Whether a test is a program of its own."""
    return test.endswith(".cpp")


class Mutant(NamedTuple):
    """A bug: ``old``, which stands once in ``file``, becomes ``new``; some of ``tests`` must fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        start = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0)
        start = max(0, old.rfind(" ", 0, start) + 1)
        return f"{self.file}: {old[start:][:50]!r} -> {new[start:][:50]!r}"

    @property
    def compiled(self) -> bool:
        return self.file.startswith(("csrc/", "python/"))


def mutants() -> list[Mutant]:
    """The list, whose entries may name one test or several."""
    import mutants_elsewhere  # beside this file
    import mutants_of_kernels
    import mutants_of_solvers

    listed = [*mutants_of_solvers.MUTANTS, *mutants_of_kernels.MUTANTS, *mutants_elsewhere.MUTANTS]
    return [Mutant(file, old, new, (tests,) if isinstance(tests, str) else tests) for file, old, new, tests in listed]


def stale(mutant: Mutant) -> str | None:
    """What of an entry does not fit the sources any more."""
    file = ROOT / mutant.file
    if not file.is_file():
        return "there is no such file"
    count = file.read_text().count(mutant.old)
    if count != 1:
        return f"expected the old text once, found it {count} times"
    if mutant.old == mutant.new:
        return "the new text is the old one"
    for test in mutant.tests:
        path, _, name = test.partition("::")
        if not (ROOT / path).is_file():
            return f"there is no {path}"
        if name and not re.search(rf"^def {re.escape(name.partition('[')[0])}\(", (ROOT / path).read_text(), re.M):
            return f"there is no {test}"
    return None


def copy_tree(target: Path) -> None:
    """The working tree without what git ignores, and the compiled library."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    built = [str(path.relative_to(ROOT)) for path in (ROOT / "fmkernels").glob("_C*")]
    for name in [*filter(None, listed.stdout.split("\0")), *built]:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def environment(tree: Path) -> dict[str, str]:
    # no bytecode: two versions of a file may have one size and one time
    return {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "FMKERNELS_CUDA": "off"}


def build(tree: Path) -> bool:
    """Builds the compiled library of a copy, only what has changed since the last time."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, check=False).returncode == 0


def _pytest(tree: Path, tests: tuple[str, ...], log: Path) -> int:
    """Runs tests in this process, which is a fork for nothing else."""
    import pytest

    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(tree)
    os.environ.update(environment(tree))
    sys.dont_write_bytecode = True
    sys.path[0] = str(tree)
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))


class Way(NamedTuple):
    """How a program of tests/cpp is built and run."""

    sanitize: str = ""
    order: str = "forward"
    rounds: tuple[str, ...] = ()


PLAIN = (Way(),)
# whole launches: what no order of threads shows, a sanitizer does
EMULATED = (Way(), Way(order="reverse"), Way("address,undefined", "random", ("100",)), Way("thread", "random", ("6",)))


def run_program(tree: Path, source: str, timeout: float) -> tuple[int, str]:
    """Builds a program of tests/cpp without Python and runs it, in each way until one fails: (pytest's exit status for
    it, what it says)."""
    emulated = "/emulated/" in source
    for way in EMULATED if emulated else PLAIN:
        status, output = run_one_way(tree, Path(source).stem, "emulated" if emulated else "off", way, timeout)
        if status != 0:
            return status, f"{way.sanitize or 'plain'}, {way.order}: {output}"
    return 0, ""


def run_one_way(tree: Path, name: str, cuda: str, way: Way, timeout: float) -> tuple[int, str]:
    folder = tree / "build" / f"programs-{cuda}-{way.sanitize.partition(',')[0]}"
    options = [
        "-DFMKERNELS_PYTHON=OFF",
        f"-DFMKERNELS_CUDA={cuda}",
        f"-DFMKERNELS_SANITIZE={way.sanitize}",
        "-DFMKERNELS_CPU_VARIANTS=",
        f"-DCMAKE_BUILD_TYPE={'None' if way.sanitize else 'Release'}",
    ]
    for command in (
        ["cmake", "-G", "Ninja", "-S", str(tree), "-B", str(folder), *options],
        ["cmake", "--build", str(folder), "--target", name],
    ):
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode != 0:
            return BROKEN, (built.stdout + built.stderr)[-3000:]
    fixed = ["setarch", "-R"] if way.sanitize == "thread" and shutil.which("setarch") else []
    settings = {"SIMT_ORDER": way.order, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    command = [*fixed, str(folder / name), *way.rounds]
    environment = {**os.environ, **settings}
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout, env=environment, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return FAILED, "timeout"
    return 0 if ran.returncode == 0 else FAILED, (ran.stdout + ran.stderr)[-3000:]


def run_tests(tree: Path, tests: tuple[str, ...], timeout: float) -> tuple[int, str]:
    """The exit status of the first programs and of pytest that is not 0, and the end of what it says."""
    for program in (test for test in tests if is_program(test)):
        status, output = run_program(tree, program, timeout)
        if status != 0:
            return status, output
    rest = tuple(test for test in tests if not is_program(test))
    return run_pytest(tree, rest, timeout) if rest else (0, "")


def run_pytest(tree: Path, tests: tuple[str, ...], timeout: float) -> tuple[int, str]:
    """(pytest's exit status, the end of what it says); FAILED for tests that hang.

    In a fork of this process, where torch is imported already: most bugs are seen in less time than that takes.
    """
    log = tree / "mutants.log"
    child = os.fork()
    if child == 0:
        status = BROKEN
        try:
            status = _pytest(tree, tests, log)
        finally:
            os._exit(status)
    end = time.monotonic() + timeout
    while True:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(code), log.read_text()[-3000:]
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return FAILED, "timeout"
        time.sleep(0.02)


def verdict(mutant: Mutant, tree: Path) -> tuple[str, str]:
    """("seen", "SURVIVED" or "ERROR", details) of a bug planted in a copy, which is as it was afterwards."""
    file = tree / mutant.file
    text = file.read_text()
    try:
        file.write_text(text.replace(mutant.old, mutant.new))
        if mutant.compiled and not build(tree):
            return "ERROR", "does not compile"
        status, output = run_tests(tree, mutant.tests, TIMEOUT)
    finally:
        file.write_text(text)
    if status == 0:
        return "SURVIVED", ""
    # a crash is seen too
    return ("seen", "") if status == FAILED or status < 0 else ("ERROR", output)


class Worker:
    """A process with a copy of the tree."""

    tree: Path
    stale_library = False

    @classmethod
    def start(cls, folder: str, compiled: bool) -> None:
        cls.tree = Path(tempfile.mkdtemp(dir=folder))
        copy_tree(cls.tree)
        if compiled and not build(cls.tree):
            raise RuntimeError("the copy does not build")

    @classmethod
    def judge(cls, mutant: Mutant) -> tuple[str, str]:
        """The verdict, and a line that tells it."""
        if cls.stale_library and not mutant.compiled:
            build(cls.tree)
        cls.stale_library = mutant.compiled
        start = time.perf_counter()
        found, details = verdict(mutant, cls.tree)
        return found, f"{found:9}{time.perf_counter() - start:6.1f} s  {mutant.name} {details}"

    @classmethod
    def baseline(cls, tests: tuple[str, ...]) -> tuple[int, str]:
        return run_tests(cls.tree, tests, 1e5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only whether the list fits the sources")
    parser.add_argument("--only", default="", help="entries whose text holds this")
    parser.add_argument("--trust", action="store_true", help="that the tests pass without any bug")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="copies at a time")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in mutants() if arguments.only in "\n".join(map(str, mutant))]
    faults = [f"{mutant.name}: {fault}" for mutant in chosen if (fault := stale(mutant))]
    if faults or arguments.check or not chosen:
        print("\n".join(faults) or f"{len(chosen)} bugs fit the sources")
        return 2 if faults else 0
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401 - for all forks

    compiled = any(mutant.compiled for mutant in chosen)
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        ProcessPoolExecutor(
            min(arguments.jobs, len(chosen)),
            mp_context=multiprocessing.get_context("fork"),
            initializer=Worker.start,
            initargs=(folder, compiled),
        ) as pool,
    ):
        if not arguments.trust:
            named = tuple(sorted({test for mutant in chosen for test in mutant.tests}))
            status, output = pool.submit(Worker.baseline, named).result()
            if status != 0:
                print(output, "\nthe tests fail without any bug")
                return 2
        # the compiled ones last, one after another, so that little is built again
        survivors = 0
        for found, line in pool.map(Worker.judge, sorted(chosen, key=lambda mutant: (mutant.compiled, mutant.file))):
            survivors += found != "seen"
            print(line, flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} bugs are seen")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
