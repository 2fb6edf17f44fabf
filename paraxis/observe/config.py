"""The configuration of what a run writes about itself: metrics, and profiles of chosen steps."""

import re
from dataclasses import dataclass
from typing import Annotated

from paraxis.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Which steps are measured into `metrics.jsonl`, and what is written beside it."""

    every: Annotated[int, "write metrics of every n-th step"] = 1
    tensorboard: Annotated[bool, "write TensorBoard curves into the run folder too"] = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"metrics.every={self.every} must be 1 or more; 1 writes every step")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps are profiled, on which ranks; the files go into the run folder's `trace`."""

    steps: Annotated[str, "steps to trace, first:last, both included, such as 10:12; empty for none"] = ""
    memory: Annotated[bool, "record every allocation of those steps too"] = False
    ranks: Annotated[tuple[int, ...], "ranks that write profiles"] = (0,)

    def __post_init__(self) -> None:
        if self.memory and not self.steps:
            raise ConfigError("profile.memory=true needs to know which steps; set profile.steps too, such as profile.steps=2:3")
        if any(rank < 0 for rank in self.ranks):
            raise ConfigError(f"profile.ranks={self.ranks} must not be negative; ranks count from 0")
        _ = self.window  # refuses what cannot be read

    @property
    def window(self) -> range:
        """The steps to profile: empty where profiling is off."""
        if not self.steps:
            return range(0)
        match = re.fullmatch(r"(\d+):(\d+)", self.steps)
        if not match or int(match[1]) > int(match[2]):
            raise ConfigError(f"profile.steps={self.steps!r} must be first:last, both included, such as 10:12 (10:10 for one step)")
        return range(int(match[1]), int(match[2]) + 1)
