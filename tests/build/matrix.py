"""One wheel beside several versions of torch and Python, each pair in an environment of its own.

    python tests/build/matrix.py dist/lomo_kernels-*.whl 3.10:2.11.0 3.13:2.15.0 path/to/python:2.13.0+cpu

A pair is a Python (its version, or a path) and a version of torch. The environment gets this torch, the wheel and what
the tests need, from the package index that pip is set to. `pip check` says whether the wheel allows this torch. Then
the operators' contract runs against the installed wheel. The table on standard output is that of docs/install.md. A
torch for CUDA takes 6 GB of disk, and an environment is deleted after its tests. --keep DIR keeps all of them, and
reuses those that have their torch already.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
#: The operators on every kind of tensor, through torch's dispatcher; the optimizer's bits; fused layers.
CONTRACT = ["sgd", "sq_norm", "linear", "embedding", "factored", "opcheck", "overlap", "bits", "layers"]
TOOLS = ["numpy>=1.26,<3", "pytest>=8,<10", "pytest-timeout>=2.3,<3", "hypothesis>=6.100,<7", "expecttest>=0.2,<0.4"]
DESCRIBE = """
import platform, torch
from lomo_kernels import backends
cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
print(platform.python_version(), torch.__version__.split("+")[0], cuda, backends.choice("CPU").detail, sep="|")
"""


HEADER = "| date | Python | torch | built for | CPU kernels | contract |\n|---|---|---|---|---|---|"


class Failed(Exception):
    """What went wrong, with the last lines of a command's output."""


@dataclass(frozen=True)
class Row:
    """One pair's line of the table."""

    python: str
    torch: str
    built_for: str
    kernels: str
    outcome: str

    def cells(self, date: str) -> str:
        return f"| {date} | {self.python} | {self.torch} | {self.built_for} | {self.kernels} | {self.outcome} |"


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Its output. Raises Failed if it fails."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    process = subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True)
    if process.returncode:
        last = "\n".join((process.stdout + process.stderr).splitlines()[-30:])
        raise Failed(f"{' '.join(map(str, command))} failed:\n{last}")
    return process.stdout


def interpreter(name: str) -> str:
    """The path of a Python of this version, or of this path."""
    found = shutil.which(name if "/" in name else f"python{name}")
    if not found:
        raise Failed(f"there is no python{name} on PATH; a path in place of the version names another one")
    return found


def environment(folder: Path, python: str, torch: str, wheel: Path) -> Path:
    """Makes the environment, or completes it, and returns its Python."""
    inside = folder / "bin" / "python"
    if not inside.exists():
        run(interpreter(python), "-m", "venv", folder, cwd=folder.parent)
    pip = (inside, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q")
    run(*pip, "install", "--no-compile", f"torch=={torch}", *TOOLS, cwd=folder)
    run(*pip, "install", "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=folder)
    run(*pip, "check", cwd=folder)
    return inside


def test(python: Path, wheel_only: Path) -> Row:
    """Runs the contract in a folder that has the tests and no source of the package."""
    described = run(python, "-c", DESCRIBE, cwd=wheel_only).strip().split("|")
    files = [f"tests/test_{name}.py" for name in CONTRACT]
    options = ("-q", "-p", "no:cacheprovider", "-c", "pytest.ini", "--rootdir=.")
    output = run(python, "-m", "pytest", *options, *files, cwd=wheel_only, OMP_NUM_THREADS="1")
    passed = re.search(r"\d+ passed(, \d+ skipped)?", output)
    if not passed:
        raise Failed(f"no test ran:\n{output[-2000:]}")
    return Row(*described, passed[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("pairs", nargs="+", metavar="PYTHON:TORCH")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the environments in this folder")
    options = parser.parse_args()
    if not options.wheel.is_file():
        parser.error(f"{options.wheel} is no file: `make wheel` builds one")
    date, rows, failures = datetime.date.today().isoformat(), [], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary, "environments")).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        wheel_only = Path(temporary, "contract")
        shutil.copytree(TESTS, wheel_only / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        (wheel_only / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    slow\n")
        for pair in options.pairs:
            python, _, torch = pair.rpartition(":")
            home = folder / re.sub(r"[^\w.+]+", "-", f"py{python}-torch{torch}")
            try:
                rows.append(test(environment(home, python, torch, options.wheel.resolve()), wheel_only))
            except Failed as error:
                failures += 1
                print(error, file=sys.stderr)
                rows.append(Row(python, torch, "", "", "failed"))
            print(rows[-1].cells(date), file=sys.stderr, flush=True)
            if not options.keep:
                shutil.rmtree(home, ignore_errors=True)
    print(f"{options.wheel.name}:\n\n{HEADER}")
    print(*(row.cells(date) for row in rows), sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
