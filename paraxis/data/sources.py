"""Where text comes from: paths, globs and URLs expanded to an ordered list of files, each of a known size and version."""

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from paraxis.base.errors import DataError
from paraxis.data.hub import DATASET, open_whole, read_name

HELDOUT_PERCENT = 4
# Tests, what a distribution adds, files that differ between machines, and generated tables, of which there are so many
# near copies that they would stand in both parts of the corpus.
NOT_STDLIB = re.compile(
    r"tests?|idle_test|site-packages|dist-packages|config-.*|_sysconfigdata.*|encodings|pydoc_data|__phello__|__pycache__"
)
# What file systems call the thing that changes when a file is written again.
VERSION_KEYS = ("mtime", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True)
class Source:
    """One file or dataset: `name` is fit for messages, `size` is in bytes, `version` changes when it is written again.

    `share` (i, n) is the i-th of n parts of about one size, counted from 0, of one whose records can be found without reading all before.
    """

    name: str
    path: str
    fs: AbstractFileSystem
    size: int
    version: str
    share: tuple[int, int] = (0, 1)

    @property
    def is_dataset(self) -> bool:
        """Whether it is one of the `datasets` library rather than a file."""
        return self.path.startswith(DATASET)

    @property
    def is_local(self) -> bool:
        """Whether it is a file of this machine."""
        return isinstance(self.fs, LocalFileSystem) and not self.is_dataset


def expand(paths: Sequence[str]) -> list[Source]:
    """The files that `paths` name: in the order given, and sorted within a folder, a glob or a built-in corpus.

    Raises DataError for a path that does not exist or matches nothing.
    """
    return [source for path in paths for source in _expand(path)]


def _expand(path: str) -> list[Source]:
    if path.startswith("stdlib:"):
        return _stdlib(path)
    if path.startswith(DATASET):
        return [_dataset(path)]
    return _expand_one(path)


def _dataset(path: str) -> Source:
    nowhere = fsspec.filesystem("file")
    if read_name(path).stream:
        return Source(path, path, nowhere, 0, "")
    found = open_whole(path)
    return Source(path, path, nowhere, found.data.nbytes, found._fingerprint)


def without_secrets(path: str) -> str:
    """`path` without the user and password a URL may carry."""
    return re.sub(r"//[^/@]*@", "//", path)


def _expand_one(path: str) -> list[Source]:
    shown = without_secrets(path)
    try:
        fs, inner = url_to_fs(path)
        # A file may have a glob's characters in its own name, so the literal path comes first.
        if fs.isfile(inner):
            files = [inner]
        elif fs.isdir(inner):
            files = [file for file in fs.find(inner) if not _hidden(str(file).removeprefix(inner))]
            if splits := [file for file in files if str(file).endswith("/dataset_dict.json")]:
                raise DataError(f"data.paths: {shown} holds the splits of a dataset ({splits[0]}); name one of them, as {shown}/train")
            if any(str(file).endswith("/dataset_info.json") for file in files):  # saved by the `datasets` library
                files = [file for file in files if str(file).endswith(".arrow")]
        else:
            files = _matches(fs, inner)
        prefix = shown.partition("://")[0] + "://" if "://" in path else ""
        found = [_source(prefix + str(file), str(file), fs) for file in sorted(map(str, files))]
    except ImportError as error:
        raise DataError(f"data.paths: {shown} needs a package that is not installed: {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"data.paths: {shown} cannot be read: {error}; check the path and your access to it") from error
    if not found:
        raise DataError(f"data.paths: no file at {shown}; check the path, or use stdlib:train to try paraxis without data")
    return found


def _matches(fs: AbstractFileSystem, pattern: str) -> list[str]:
    """The files a glob stands for; like a shell's, its wildcards do not find hidden files."""
    wildcard = re.search(r"[*?\[]", pattern)
    if not wildcard:
        return []
    literal = pattern[: wildcard.start()].rpartition("/")[0]
    found = map(str, fs.glob(pattern))
    return [match for match in found if not _hidden(match.removeprefix(literal)) and fs.isfile(match)]


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.split("/"))


def _source(name: str, path: str, fs: AbstractFileSystem) -> Source:
    info: dict[str, Any] = fs.info(path)
    version = next((f"{key}={info[key]}" for key in VERSION_KEYS if info.get(key) is not None), "")
    return Source(name, path, fs, int(info.get("size") or 0), version)


def _stdlib(path: str) -> list[Source]:
    """The running Python's own source files; a file is held out by the hash of its path, so on every machine alike."""
    root = Path(sysconfig.get_path("stdlib"))
    fs = fsspec.filesystem("file")
    chosen = [name for name in sorted(_stdlib_names(root)) if _is_held_out(name) == (path == "stdlib:heldout")]
    if not chosen:
        raise DataError(f"data.paths: {path} found no Python source under {root}; this Python carries none, so give files of your own")
    return [_source(f"stdlib/{name}", str(root / name), fs) for name in chosen]


def _stdlib_names(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not NOT_STDLIB.fullmatch(name)]
        for file in files:
            if file.endswith(".py") and not NOT_STDLIB.fullmatch(file):
                yield (Path(folder) / file).relative_to(root).as_posix()


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100 < HELDOUT_PERCENT
