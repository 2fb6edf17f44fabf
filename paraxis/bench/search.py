"""What it takes to plan a run: `paraxis plan` as a user would start it, for clusters of several sizes."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from paraxis.base.errors import ParaxisError

NOTHING_FITS = 1  # the exit code of `paraxis plan` where nothing fits, which is an answer too


def search_rows(words: Sequence[str], sizes: Sequence[int], runs: int) -> Iterator[dict[str, Any]]:
    """A record for each number of devices: seconds from the command's start to its end, and what was searched and found.

    `words` are the recipe and the options of `paraxis plan`. Raises ParaxisError where that fails.
    """
    for devices in sizes:
        seconds: list[float] = []
        for _ in range(runs):
            started_s = time.perf_counter()
            command = [sys.executable, "-m", "paraxis", "plan", *words, f"--gpus={devices}", "--json"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds.append(time.perf_counter() - started_s)
            if done.returncode not in (0, NOTHING_FITS):
                raise ParaxisError(f"paraxis plan for {devices} devices ended with exit code {done.returncode}: {done.stderr.strip()}")
        said = json.loads(done.stdout)
        best = (said["plans"] or [{}])[0]
        yield {
            "recipe": words[0],
            "devices": devices,
            "seconds": round(median(seconds), 2),
            "seconds_min": round(min(seconds), 2),
            "seconds_max": round(max(seconds), 2),
            "runs": runs,
            **{name: said["search"][name] for name in ("candidates", "simulated", "traced", "complete")},
            "best": best.get("layout"),
            "step_s": best.get("step_s"),
            "device_tokens_per_s": best.get("tokens_per_s"),
            "mfu": best.get("mfu"),
        }
