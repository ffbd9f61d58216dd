"""Runs commands within a budget of seconds, also commands that hang. Needs only the standard library."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

LEAST = 8.0  # seconds: a stage is not started if fewer are left, since importing torch takes most of them
POLL = 0.1  # seconds
GRACE = 5.0  # seconds before a stage's limit, or a quarter of it: it is interrupted, so that pytest writes what it has
OUTPUT = 64 * 2**20  # bytes: a stage that prints more is killed before it fills the disk
INTERRUPTED = (signal.SIGTERM, signal.SIGHUP)


class Stage(NamedTuple):
    """A command with its own time limit in seconds. Neighbours with the same `together` run side by side."""

    name: str
    limit: float
    command: list[str]
    environment: Mapping[str, str] = MappingProxyType({})
    together: str = ""


class Outcome(NamedTuple):
    """How a stage ended. `status` is "passed" or says what went wrong; `started` is false if no time was left."""

    stage: Stage
    status: str
    seconds: float
    output: Path
    started: bool = True

    @property
    def passed(self) -> bool:
        return self.status == "passed"


class Process(Protocol):
    """The part of `subprocess.Popen` that is used here."""

    pid: int

    def poll(self) -> int | None: ...


def spawn(stage: Stage, output: Path) -> Process:
    """Starts the command as the leader of a process group in this session, so that killing the session kills it too.
    The output goes to a file: a grandchild could keep a pipe open."""
    with output.open("wb") as file:
        return subprocess.Popen(
            stage.command,
            env={**os.environ, **stage.environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=_lead,
        )


def _lead() -> None:
    """What a shell starts in the background ignores SIGINT, and so would what it starts."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Running:
    """A stage that was started."""

    def __init__(self, stage: Stage, left: float, output: Path, start: Callable[[Stage, Path], Process]) -> None:
        self.stage, self.output = stage, output
        self.limit = min(stage.limit, left)
        self.interrupted = False
        self.begin = time.monotonic()
        self.process = start(stage, output)

    def outcome(self) -> Outcome | None:
        """None while it runs. At its limit, and at its end, the whole process group is killed."""
        status, seconds = self.process.poll(), time.monotonic() - self.begin
        if status == 0:
            words = "passed"
        elif seconds >= self.limit or (self.interrupted and status is not None):
            words = f"stopped at its limit of {self.limit:.0f} s"
        elif status is not None:
            words = f"exit status {status}" if status > 0 else f"killed by signal {-status}"
        elif self.output.stat().st_size > OUTPUT:
            words = f"stopped after {OUTPUT >> 20} MiB of output"
        else:
            if not self.interrupted and seconds >= self.limit - min(GRACE, self.limit / 4):
                self.interrupted = True
                self._send(signal.SIGINT)
            return None
        self.kill()
        return Outcome(self.stage, words, seconds, self.output)

    def kill(self) -> None:
        """Kills the group: also the children of a leader that has ended, such as workers of pytest-xdist."""
        self._send(signal.SIGKILL)
        self.process.poll()

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def groups(stages: list[Stage]) -> Iterator[list[Stage]]:
    """Stages that run side by side."""
    for _, group in itertools.groupby(stages, key=lambda stage: stage.together or stage.name):
        yield list(group)


def run(
    stages: list[Stage],
    end: float,
    folder: Path,
    start: Callable[[Stage, Path], Process] = spawn,
) -> Iterator[Outcome]:
    """Yields each stage's outcome as it ends, the last before the time `end` of `time.monotonic()`. Output goes into
    ``folder/<name>.txt``."""

    def interrupted(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    running: list[Running] = []
    before = {number: signal.signal(number, interrupted) for number in INTERRUPTED}
    try:
        for group in groups(stages):
            left = end - time.monotonic()
            for stage in group:
                output = folder / f"{stage.name}.txt"
                if left < min(LEAST, stage.limit):
                    yield Outcome(stage, f"not started: {max(left, 0):.0f} s were left", 0.0, output, started=False)
                    continue
                try:
                    running.append(Running(stage, left, output, start))
                except OSError as error:
                    yield Outcome(stage, f"cannot be started: {error}", 0.0, output)
            while running:
                time.sleep(POLL)
                for job in list(running):
                    if outcome := job.outcome():
                        running.remove(job)
                        yield outcome
    finally:
        for job in running:
            job.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
