"""A plugin of pytest: writes each test's outcome into the file LOMO_OUTCOMES as it ends. A process may be killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line of JSON for a test that was called, and for a setup or teardown that failed or skipped it. The workers
    of pytest-xdist hand their reports on to the process that they work for."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    about: dict[str, Any] = {"stage": os.environ["LOMO_STAGE"], "test": report.nodeid, "outcome": report.outcome}
    about["seconds"] = round(report.duration, 3)
    if report.failed:
        about["text"] = report.longreprtext[-4000:]
    elif report.skipped:
        about["text"] = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    with Path(os.environ["LOMO_OUTCOMES"]).open("a") as file:
        file.write(json.dumps(about) + "\n")
