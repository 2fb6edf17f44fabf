"""The run folder: where each thing a run leaves behind lies, and the lock that keeps a second run out of it."""

import fcntl
import logging
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from paraxis.base.errors import StorageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run, under `path`."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def trace(self) -> Path:
        return self.path / "trace"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def write_config(self, text: str) -> None:
        """Replaces `config.toml`, whole or not at all. Raises StorageError when it cannot be written."""
        draft = self.config_file.with_suffix(".tmp")
        try:
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, self.config_file)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise _unwritable(self.path, error) from error

    def hold(self) -> "RunLock":
        """Creates the folder and keeps every other process from holding it, until the lock is released or this process ends.

        Raises StorageError when the folder cannot be created or written, or when another process holds it.
        """
        return RunLock(self)


class RunLock:
    """Holds a run folder; also a context manager. One process of a run takes it: the one that writes metrics and checkpoints.

    The lock is the kernel's (flock), so that a killed holder never leaves it behind; `lock` only says who holds it. A run that
    was refused before it wrote anything takes the file, and the folder if it made it, away again.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._file = folder.path, folder.path / "lock"
        try:
            self._made_folder = not folder.path.exists()
            folder.path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unwritable(folder.path, error) from error
        try:
            self._lock(folder.path)
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:
            self.release()
            raise _unwritable(folder.path, error) from error
        except StorageError:
            os.close(self._descriptor)
            raise

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 200, 0).decode(errors="replace") or "another process"
            raise StorageError(
                f"run folder {path} is in use by {holder}; stop that process, wait for it, or choose another --run-dir"
            ) from error
        except OSError as error:  # some cluster file systems are mounted without locks
            log.warning("%s cannot be locked (%s): take care that no second run writes to it", path, error.strerror)
        if not self._is_in_place():
            raise StorageError(f"run folder {path} was left by another run just now; start again")

    def _is_in_place(self) -> bool:
        """Whether the file that is held is still the one that others find."""
        try:
            return os.path.samestat(os.stat(self._file), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Lets another process hold the folder. Calling it again does nothing."""
        if self._descriptor < 0:
            return
        with suppress(OSError):
            if os.listdir(self._folder) == [self._file.name]:
                self._file.unlink()
                if self._made_folder:
                    self._folder.rmdir()
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"run folder {path} cannot be written: {error.strerror}; free space, make it writable, or choose another --run-dir")
