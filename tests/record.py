"""Writes what a test run showed to a file that can be committed: counts, commit, duration, versions, machine."""

import json
import os
import platform
import subprocess
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch


def commit(checkout: Path) -> str:
    """The short commit of `checkout`, ending in "-dirty" where files differ from it, or "unknown" outside git."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"], cwd=checkout, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


class Recorder:
    """A pytest plugin: counts outcomes and writes `<date>-<commit>.json` into `folder` when the session ends."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.not_passed: dict[str, str] = {}
        self.started_s = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
            if report.outcome != "passed":
                self.not_passed[report.nodeid] = report.outcome

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        now = datetime.now(UTC)
        at = commit(session.config.rootpath)
        result = {
            "commit": at,
            "date": now.isoformat(timespec="seconds"),
            "duration_s": round(time.monotonic() - self.started_s, 1),
            "exit_status": int(exitstatus),
            "counts": dict(self.counts),
            "not_passed": self.not_passed,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "gpus": torch.cuda.device_count(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{now:%Y-%m-%d}-{at}.json").write_text(json.dumps(result, indent=2) + "\n")
