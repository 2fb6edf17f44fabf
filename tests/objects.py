"""An object store in a local folder, so that several processes see it, with faults on request: `faulty://bucket/key`.

Like the real ones it has no folders and no renames, an object appears whole when its upload is completed, a key can be made for one
writer alone, and, if asked, a listing lags behind. What fails, how often and how is in files beside the objects, for all processes.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, unquote

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

ERRORS: dict[str, type[BaseException]] = {
    "connection": ConnectionResetError,
    "timeout": TimeoutError,
    "permission": PermissionError,
    "cut": SystemExit,  # as if the process ended there
}


@dataclass(frozen=True)
class Fault:
    """The operations `op` (read, info, list, put, part, complete, remove; any where empty) on keys that match fail with `error`.

    The first `skip` of them work, then so many `times` fail. `short` reads bring half of the bytes instead. `slow_s` only delays.
    """

    op: str = ""
    key: str = ""
    error: str = "connection"
    skip: int = 0
    times: int = 10**9
    short: bool = False
    slow_s: float = 0.0


class Bench:
    """The folder behind the store: objects, unfinished uploads, and what is to fail."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("objects", "uploads", "counts"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.expect()

    def expect(self, *faults: Fault, late_listings: int = 0) -> None:
        """From now on these faults, and new keys missing in their first `late_listings` listings."""
        for path in (self.folder / "counts").iterdir():
            path.unlink()
        (self.folder / "faults.json").write_text(json.dumps({"faults": [asdict(fault) for fault in faults], "late": late_listings}))

    def count(self, name: str) -> int:
        """How often this was called with this name, this time included; among all processes."""
        with open(self.folder / "counts" / name, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(".")
            file.flush()
            return os.fstat(file.fileno()).st_size

    def met(self, name: str) -> int:
        """How often that was counted so far."""
        path = self.folder / "counts" / name
        return path.stat().st_size if path.exists() else 0

    def there(self) -> list[str]:
        """Every object there is, whatever a listing would say."""
        return sorted(unquote(path.name) for path in (self.folder / "objects").iterdir() if not path.name.startswith("."))

    def path(self, key: str) -> Path:
        return self.folder / "objects" / quote(key, safe="")

    def meet(self, op: str, key: str) -> bool:
        """Raises what is to fail here, and says whether a read is to be cut short."""
        self.count(op)
        for number, fault in enumerate(json.loads((self.folder / "faults.json").read_text())["faults"]):
            if fault["op"] in ("", op) and re.search(fault["key"], key):
                turn = self.count(f"fault-{number}")
                time.sleep(fault["slow_s"])
                if fault["slow_s"] or not fault["skip"] < turn <= fault["skip"] + fault["times"]:
                    continue
                if fault["short"]:
                    return True
                raise ERRORS[fault["error"]](f"injected: {op} {key}")
        return False

    def listed(self) -> dict[str, int]:
        """What a listing shows now: keys and sizes."""
        late = json.loads((self.folder / "faults.json").read_text())["late"]
        self.count("list")
        found = {}
        for key in self.there():
            if not late or self.count("seen-" + quote(key, safe="")) > late:
                found[key] = self.path(key).stat().st_size
        return found

    def put(self, key: str, data: bytes, *, alone: bool = False) -> None:
        """An object appears whole; `alone`, only where there is none."""
        draft = self.folder / "objects" / f".{os.getpid()}-{time.monotonic_ns()}"
        draft.write_bytes(data)
        try:
            if alone:
                os.link(draft, self.path(key))
            else:
                os.replace(draft, self.path(key))
        finally:
            draft.unlink(missing_ok=True)


class FaultyFileSystem(AbstractFileSystem):
    """See above. `bench` is set before any process is forked."""

    protocol = "faulty"
    cachable = False
    bench: Bench

    def invalidate_cache(self, path=None):
        pass

    def info(self, path, **kwargs):
        key = self._strip_protocol(path)
        self.bench.meet("info", key)
        if (file := self.bench.path(key)).exists():
            return {"name": key, "size": file.stat().st_size, "type": "file"}
        if any(name.startswith(key + "/") for name in self.bench.there()):
            return {"name": key, "size": 0, "type": "directory"}
        raise FileNotFoundError(key)

    def ls(self, path, detail=True, **kwargs):
        key = self._strip_protocol(path)
        self.bench.meet("list", key)
        found: dict[str, dict] = {}
        for name, size in self.bench.listed().items():
            if name.startswith(key + "/"):
                first, deeper, _ = name[len(key) + 1 :].partition("/")
                found[first] = {"name": f"{key}/{first}", "size": 0 if deeper else size, "type": "directory" if deeper else "file"}
        if not found:
            raise FileNotFoundError(key)
        return list(found.values()) if detail else [entry["name"] for entry in found.values()]

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **kwargs):
        key = self._strip_protocol(path)
        self.bench.meet("list", key)
        found = {n: {"name": n, "size": s, "type": "file"} for n, s in self.bench.listed().items() if n.startswith(key + "/")}
        return found if detail else list(found)

    def modified(self, path):
        return datetime.fromtimestamp(self.bench.path(self._strip_protocol(path)).stat().st_mtime, UTC)

    def cat_file(self, path, start=None, end=None, **kwargs):
        key = self._strip_protocol(path)
        short = self.bench.meet("read", key)
        data = self.bench.path(key).read_bytes()[start:end]
        return data[: len(data) // 2] if short else data

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        key = self._strip_protocol(path)
        self.bench.meet("put", key)
        self.bench.put(key, value, alone=mode == "create")

    def rm_file(self, path):
        key = self._strip_protocol(path)
        self.bench.meet("remove", key)
        self.bench.path(key).unlink()

    def _open(self, path, mode="rb", block_size=None, autocommit=True, **kwargs):
        assert mode == "wb"
        return _Upload(self, path, mode, block_size=block_size)


class _Upload(AbstractBufferedFile):
    """An upload in parts, each of which may fail."""

    def _initiate_upload(self):
        self.bench = self.fs.bench
        self.parts = self.bench.folder / "uploads" / f"{os.getpid()}-{time.monotonic_ns()}"
        self.parts.touch()

    def _upload_chunk(self, final=False):
        self.bench.meet("part", self.path)
        with open(self.parts, "ab") as file:
            file.write(self.buffer.getvalue())
        if final:
            self.bench.meet("complete", self.path)
            self.bench.put(self.path, self.parts.read_bytes())
            self.parts.unlink()
        return True

    def discard(self):
        if hasattr(self, "parts"):
            self.parts.unlink(missing_ok=True)


@contextmanager
def served(folder: Path) -> Iterator[Bench]:
    """`faulty://` over `folder`, for this process and those forked from it."""
    FaultyFileSystem.bench = Bench(folder)
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    try:
        yield FaultyFileSystem.bench
    finally:
        del FaultyFileSystem.bench
