"""Fresh processes for the tests, forked from one that has imported torch and nothing else: that takes 2 s."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Server:
    """Runs Python code in forks of one process, one after the other; the first call starts it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, code: str, *arguments: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """As ``python -c code arguments`` with the environment `env`, in this folder, which is last in `sys.path`."""
        with tempfile.TemporaryDirectory() as folder:
            request = {"code": code, "arguments": arguments, "env": dict(env), "folder": folder, "cwd": os.getcwd()}
            try:
                status = int(self._answer(json.dumps(request)))
            except BaseException:  # a test whose time is up: what runs has to end
                self.close()
                raise
            output, errors = ((Path(folder) / name).read_text() for name in ("output", "errors"))
        return subprocess.CompletedProcess(["-c", *arguments], status, output, errors)

    def _answer(self, line: str) -> str:
        if self._process is None:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [sys.executable, __file__], env=environment, start_new_session=True, **pipes
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def close(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


def served() -> dict[str, Any] | None:
    """Forks at each request; returns the request in the fork, and None when no more come."""
    while line := sys.stdin.readline():
        if (child := os.fork()) == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """What Python is when it starts with the request's code."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for stream, name in enumerate((os.devnull, "output", "errors")):
        os.dup2(os.open(os.path.join(request["folder"], name), os.O_RDWR | os.O_CREAT), stream)
    sys.argv = ["-c", *request["arguments"]]
    sys.path[:1] = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
    sys.path.append("")
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(request["code"], "<string>", "exec"), sys.modules["__main__"].__dict__)


if __name__ == "__main__":
    import torch  # noqa: F401

    if request := served():
        become(request)
