"""Where checkpoints stand: a local path or the URL of an object store, and the names that saves go by there."""

import re
from dataclasses import dataclass
from pathlib import Path

from paraxis.base.errors import ConfigError

LATEST = "latest"  # the file that holds the name of the newest complete checkpoint

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Url:
    """A place in an object store, such as s3://bucket/runs/demo, without a slash at its end. Made by `location`."""

    text: str

    @property
    def name(self) -> str:
        return self.text.rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        return Url(self.text.rpartition("/")[0])

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.text}/{name}")

    def __str__(self) -> str:
        return self.text


Location = Path | Url


@dataclass(frozen=True)
class Draft:
    """A save that has begun: what it is called until it is complete and then, and which save of its place it is.

    `owner` tells this save apart from another that took the same number where a store cannot hand a number to one alone.
    """

    name: str
    final: str
    generation: int
    owner: str = ""


def location(place: str | Location) -> Location:
    """`place` as a local path, or as the URL of an object store (`file://` is local).

    Raises ConfigError for a URL with credentials or options in it, and for one that names no single place.
    """
    if not isinstance(place, str):
        return place
    scheme, separator, rest = place.partition("://")
    if not separator:
        return Path(place)
    if problem := _problem(place):
        # Neither what is between // and @ nor what follows ? may be shown.
        shown = re.sub(r"//.*@", "//", place).partition("?")[0].partition("#")[0]
        raise ConfigError(f"{shown} cannot be a place for checkpoints: {problem}")
    if scheme.lower() in ("file", "local"):
        return Path(rest)
    return Url(f"{scheme.lower()}://{rest.rstrip('/')}")


def checkpoints_of(folder: str, run_dir: Path) -> Location:
    """Where the run in `run_dir` keeps its checkpoints: at `folder` (checkpoint.folder), or beside its metrics where that is empty."""
    return location(folder) if folder else run_dir / "checkpoints"


def step_in_name(name: str) -> int:
    """The step of the checkpoint that is called `name`."""
    match = _STEP.match(name)
    assert match is not None, name
    return int(match[1])


def _problem(url: str) -> str:
    from_environment = "leave it out: the store's own library takes credentials from the environment and its configuration files"
    if ":" in url.partition("://")[2].rpartition("@")[0]:  # a password may have a slash in it
        return f"it carries a user and a password; {from_environment}"
    if "?" in url or "#" in url:
        return f"it carries options after a ? or #, which may be secrets; {from_environment}"
    if "::" in url or not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url):
        return "it does not begin with the scheme of one file system; write it like s3://bucket/runs/demo"
    scheme, _, rest = url.partition("://")
    if scheme.lower() in ("file", "local"):
        return "" if rest.startswith("/") else "a file URL goes file:///absolute/path; or give the path alone"
    if any(part in ("", ".", "..") for part in rest.rstrip("/").split("/")):
        return "a part of it is empty, '.' or '..'; write it like s3://bucket/runs/demo"
    if re.search(r"[*\[\]\s\\]", rest):
        return "it has a wildcard, a blank or a backslash in it; write it like s3://bucket/runs/demo"
    return ""
