"""When a run saves, and how much of it is kept."""

from dataclasses import dataclass
from typing import Annotated, Literal

from paraxis.base.errors import ConfigError
from paraxis.checkpoint.place import location

KEEP_LEAST = 2  # the newest may turn out damaged when it is needed


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run saves, and how much of it is kept."""

    every: Annotated[int, "save every so many steps, and at the end; 0 means only at the end"] = 0
    folder: Annotated[str, "where the checkpoints go: a path, or a URL such as s3://bucket/runs/demo; empty: RUN_DIR/checkpoints"] = ""
    mode: Annotated[
        Literal["sync", "async"],
        "sync: training stands still while a checkpoint is written; async: only while it is copied to memory of the host, "
        "from where a process beside each rank writes it",
    ] = "sync"
    at_end: Annotated[bool, "save at the end; a run that is asked to stop early saves in any case"] = True
    keep_last: Annotated[int, "complete checkpoints to keep; older ones are removed once a new one is complete"] = KEEP_LEAST
    keep_every: Annotated[int, "besides those, keep every checkpoint whose step is a multiple of this; 0 means none"] = 0
    keep_best: Annotated[int, "besides those, keep so many of the lowest held-out loss among those scored at the step they are of"] = 0

    def __post_init__(self) -> None:
        location(self.folder)
        for name, none in (("every", "only at the end"), ("keep_every", "none"), ("keep_best", "none")):
            if getattr(self, name) < 0:
                raise ConfigError(f"checkpoint.{name}={getattr(self, name)} must be 0 ({none}) or more")
        if self.keep_last < KEEP_LEAST:
            raise ConfigError(
                f"checkpoint.keep_last={self.keep_last} must be {KEEP_LEAST} or more, "
                f"so that a damaged checkpoint has one to fall back to; use {KEEP_LEAST}"
            )
