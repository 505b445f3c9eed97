"""Steps one after the other within a budget of time; each is ended at its limit, and what it said is kept as it comes.

Of the budget every step has a share. What one leaves the next may take, but none takes what later ones have. A run that
is cut, from inside or outside, keeps what it has: logs are what the commands write, unbuffered, and the lines of
``steps.jsonl`` are on the disk before the next command begins.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PASSED, FAILED, CUT, NOT_RUN = "passed", "failed", "cut", "not run"
GRACE = 5.0  # seconds, within the limit, in which an interrupted command may say what it has


class Step(NamedTuple):
    """A command, and its share of the budget in seconds where the budget is the sum of all shares.

    Attributes:
        needed: without it none of the later steps makes sense.
    """

    name: str
    command: Sequence[str]
    share: float
    environment: Mapping[str, str] = {}
    needed: bool = False


class Outcome(NamedTuple):
    name: str
    status: str
    code: int | None
    seconds: float
    limit: float


class Runner:
    """Runs steps in a folder.

    Args:
        cwd: where the commands run.
        out: receives steps.jsonl and steps.log, which holds the output of all steps.
        logs: receives NAME.log for each step.
        budget: seconds for all of them, counted from here.
    """

    def __init__(self, cwd: Path, out: Path, logs: Path, budget: float) -> None:
        self.cwd, self.out, self.logs, self.budget = cwd, out, logs, budget
        self.end = time.monotonic() + budget
        for folder in (out, logs):
            folder.mkdir(parents=True, exist_ok=True)
        for name in ("steps.jsonl", "steps.log"):
            (out / name).write_text("")

    def run(self, steps: Sequence[Step]) -> list[Outcome]:
        scale = self.budget / sum(step.share for step in steps)
        outcomes: list[Outcome] = []
        stopped = False
        for number, step in enumerate(steps):
            later = sum(other.share for other in steps[number + 1 :]) * scale
            limit = self.end - time.monotonic() - later
            if stopped or limit <= 0:
                outcome = Outcome(step.name, NOT_RUN, None, 0.0, max(limit, 0.0))
            else:
                outcome = self._run(step, limit)
                stopped = step.needed and outcome.status != PASSED
            self._note(outcome)
            outcomes.append(outcome)
        return outcomes

    def _note(self, outcome: Outcome) -> None:
        entry: dict[str, Any] = {**outcome._asdict(), "seconds": round(outcome.seconds, 1)}
        entry["limit"] = round(outcome.limit, 1)
        with (self.out / "steps.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._say(f"== {outcome.name}: {outcome.status} in {outcome.seconds:.0f} of {outcome.limit:.0f} s\n".encode())

    def _say(self, text: bytes) -> None:
        with (self.out / "steps.log").open("ab") as file:
            file.write(text)
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()

    def _run(self, step: Step, limit: float) -> Outcome:
        self._say(f"== {step.name}: {' '.join(step.command)}\n".encode())
        start = time.monotonic()
        log = self.logs / f"{step.name}.log"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
        try:
            # the log is the command's own: nothing of it is lost with this process
            with log.open("wb") as file:
                process = subprocess.Popen(
                    step.command,
                    cwd=self.cwd,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    preexec_fn=os.setpgrp,
                )
        except OSError as error:
            self._say(f"{error}\n".encode())
            return Outcome(step.name, FAILED, None, time.monotonic() - start, limit)
        try:
            with log.open("rb") as said:
                cut = self._follow(process, said, start, limit)
                self._say(said.read())
        finally:
            _kill(process, signal.SIGKILL)
            process.wait()
        status = CUT if cut else PASSED if process.returncode == 0 else FAILED
        return Outcome(step.name, status, process.returncode, time.monotonic() - start, limit)

    def _follow(self, process: subprocess.Popen[bytes], said: Any, start: float, limit: float) -> bool:
        """Shows what a command says until it ends; whether it was cut."""
        asked = start + limit - min(GRACE, limit / 4)
        interrupted = False
        while process.poll() is None:
            if text := said.read():
                self._say(text)
            now = time.monotonic()
            if now > start + limit:
                return True
            if now > asked and not interrupted:
                interrupted = True
                _kill(process, signal.SIGINT)  # pytest, for one, then tells what it has
            time.sleep(0.05)
        return interrupted


def _kill(process: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to a command and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def table(outcomes: Sequence[Outcome]) -> str:
    width = max((len(outcome.name) for outcome in outcomes), default=0)
    return "\n".join(
        f"{o.name:{width}}  {o.status:8} {o.seconds:6.0f} s of {o.limit:.0f}"
        + (f", exit status {o.code}" if o.status == FAILED else "")
        for o in outcomes
    )


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """0 where all passed, 1 where any failed, 3 where none failed and some were cut or not run."""
    statuses = {outcome.status for outcome in outcomes}
    if FAILED in statuses:
        return 1
    return 3 if statuses - {PASSED} else 0


def ending_on_sigterm() -> None:
    """What SIGTERM ends ends as by Ctrl-C: with its commands."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
