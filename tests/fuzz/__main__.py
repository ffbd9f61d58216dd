"""``python -m fuzz`` (`make fuzz`): random cases until the time is over. A finding ends it with exit status 1.

A child process runs the cases, so that a crash or a call that does not come back is a finding, too. What it found is
made smaller and printed with the command that runs it again.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from pprint import pformat
from random import Random
from tempfile import NamedTemporaryFile

KINDS = ("operators", "wrappers", "models", "states")
#: Share of the time of each.
SHARES = {"operators": 0.45, "wrappers": 0.2, "models": 0.25, "states": 0.1}
#: Seconds that one case may take.
PATIENCE = 120


def _kind(name: str):
    from importlib import import_module

    return getattr(import_module(f"fuzz.{name}"), name.upper())


def spec_of(kind: str, seed: int, number: int):
    return _kind(kind).draw(Random(f"{kind} {seed} {number}"))


def run_cases(
    kind: str, seed: int, first: int, count: int, seconds: float, at: mmap.mmap | None = None
) -> dict[str, int]:
    """Runs cases, in this process. Returns how many there were, how many calls, and what came of them.

    Raises:
        Finding: of the first case that goes wrong; its number is in the exception's notes.
    """
    import torch

    torch.set_num_threads(1)
    chosen, counts, begin = _kind(kind), Counter(), time.monotonic()
    for number in range(first, first + count):
        if time.monotonic() - begin > seconds:
            break
        if at is not None:
            at[:8] = number.to_bytes(8, "little")
        spec = chosen.draw(Random(f"{kind} {seed} {number}"))
        try:
            outcome = chosen.run(spec)
        except Exception as error:
            error.args = (f"{kind} {seed} {number}: {error}",)
            raise
        counts[outcome.what] += 1
        counts["calls"] += outcome.calls
        counts["cases"] += 1
    return dict(counts)


def _shrunk(kind: str, spec):
    from fuzz.specs import Finding, shrink

    def message(smaller) -> str:
        try:
            _kind(kind).run(smaller)
        except Finding as error:
            return re.sub(r"[\d.]+", "#", str(error))[:50]
        except Exception:
            return ""  # no case at all
        return ""

    wanted = message(spec)
    return shrink(spec, lambda smaller: bool(wanted) and message(smaller) == wanted)


def printed(spec) -> str:
    """A spec as Python. Python does not write out an int of thousands of digits."""

    def short(value):
        if isinstance(value, dict):
            return {key: short(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [short(inner) for inner in value]
        return f"an int of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > 2**70 else value

    return pformat(short(spec), width=120)


def _child(arguments: argparse.Namespace) -> int:
    import faulthandler
    import traceback
    import warnings

    faulthandler.enable()
    warnings.simplefilter("ignore")
    kind = arguments.kinds[0]
    with open(arguments.at, "r+b") as file, mmap.mmap(file.fileno(), 8) as at:
        try:
            counts = run_cases(kind, arguments.seed, arguments.first, arguments.cases, 60 * arguments.minutes, at)
        except Exception:
            number = int.from_bytes(at[:8], "little")
            text = traceback.format_exc(limit=-6)
            spec = spec_of(kind, arguments.seed, number)
            print(f"{text}\nThe smallest case found that fails:\n{printed(_shrunk(kind, spec))}", file=sys.stderr)
            return 1
    print(json.dumps(counts))
    return 0


def _supervise(
    kind: str, arguments: argparse.Namespace, first: int, count: int, minutes: float
) -> dict[str, int] | None:
    """Runs cases in a child process. Prints a finding, and returns None then."""
    with NamedTemporaryFile() as file:
        file.write(first.to_bytes(8, "little"))
        file.flush()
        command = [sys.executable, "-m", "fuzz", kind, "--child", "--at", file.name, "--seed", str(arguments.seed)]
        command += ["--first", str(first), "--cases", str(count), "--minutes", str(minutes)]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )
        last, since = -1, time.monotonic()
        while True:
            try:
                out, errors = child.communicate(timeout=5)
                break
            except subprocess.TimeoutExpired:
                number = int.from_bytes(Path(file.name).read_bytes()[:8], "little")
                if number != last:
                    last, since = number, time.monotonic()
                elif time.monotonic() - since > PATIENCE:
                    child.send_signal(signal.SIGABRT)  # faulthandler prints where it is
                    out, errors = child.communicate()
                    errors += f"\nIt did not come back in {PATIENCE} seconds"
                    break
        if child.returncode == 0:
            return json.loads(out.strip().splitlines()[-1])
        number = int.from_bytes(Path(file.name).read_bytes()[:8], "little")
    print(
        f"{errors[-6000:]}\n{kind}: case {number} of seed {arguments.seed} failed (status {child.returncode}). Again:"
    )
    print(f"  cd tests && python -m fuzz {kind} --seed={arguments.seed} --first={number} --cases=1", flush=True)
    if child.returncode != 1:
        print(printed(spec_of(kind, arguments.seed, number)))
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=None, help="default: of the time")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=10**12, help="at most so many of each kind")
    parser.add_argument("--keep-going", action="store_true", help="after a finding, with the next kind")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--at", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.seed is None:
        arguments.seed = int(time.time())
    if arguments.child:
        return _child(arguments)
    kinds = arguments.kinds or list(KINDS)
    print(f"seed {arguments.seed}, {arguments.minutes:g} minutes: {', '.join(kinds)}", flush=True)
    shares = sum(SHARES[kind] for kind in kinds)
    failed = False
    for kind in kinds:
        begin, total, first = time.monotonic(), Counter[str](), arguments.first
        minutes, last = arguments.minutes * SHARES[kind] / shares, arguments.first + arguments.cases
        while first < last:
            left = minutes - (time.monotonic() - begin) / 60
            if left <= 0:
                break
            counts = _supervise(kind, arguments, first, last - first, left)
            if counts is None:
                failed = True
                if not arguments.keep_going:
                    return 1
                break
            total.update(counts)
            first += counts.get("cases", 0)
            if first < last and not counts.get("cases"):
                break
        seconds = time.monotonic() - begin
        what = ", ".join(f"{n} {name}" for name, n in sorted(total.items()) if name not in ("cases", "calls"))
        rate = total["cases"] / max(seconds, 1e-9)
        print(f"{kind}: {total['cases']} cases, {total['calls']} calls ({what}); {rate:.0f} a second", flush=True)
    return int(failed)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
