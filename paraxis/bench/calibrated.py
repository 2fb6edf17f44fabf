"""The constants of a machine that no probe sees, fitted on runs of ours: what the host takes to ask for an operator, and what computing
loses beside messages.

They are those with the least root mean square of the relative error of step times, over the rows that calibrate and no others, by
coordinate descent from what the cluster file has. What was found goes into the accelerator's table of the file, by hand.
"""

from collections.abc import Callable, Sequence
from math import sqrt
from statistics import fmean

from paraxis.base.errors import ConfigError
from paraxis.bench.measured import MeasuredRun
from paraxis.bench.planner import accelerator, descended
from paraxis.plan.cluster_file import UNITS
from paraxis.plan.hardware import Cluster
from paraxis.plan.predict import predict
from paraxis.plan.rates import HOST

NAMES = (*HOST, "posted", "overlap")


def calibrated(runs: Sequence[MeasuredRun], cluster: Cluster, tell: Callable[[str], None]) -> Cluster:
    """The cluster with constants fitted on the calibrating ones of `runs`; `tell` hears of the way, and of the lines for the file. Raises
    ConfigError without such rows."""
    timed = [(run, run.step_s) for run in runs if run.calibrates and run.step_s and run.limit_gib is None]
    if not timed:
        raise ConfigError("--calibrate fits on the rows that a file beside the results names, FILE.calibration.txt; write it first")

    def error(tried: Cluster) -> float:
        return sqrt(fmean((predict(run.config, tried, run.ranks).step_s / step_s - 1) ** 2 for run, step_s in timed))

    found = descended(error, cluster, NAMES, tell)
    for name in NAMES:
        called, unit = UNITS.get(name, (name, 1.0))
        tell(f"{called} = {getattr(accelerator(found), name) / unit:.4g}")
    tell(f'fitted = "on {len(timed)} rows: {", ".join(run.name for run, _ in timed)}"')
    return found
