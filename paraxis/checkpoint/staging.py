"""Memory that two processes share: a rank copies a snapshot of its state into it, and its saver reads it from there."""

import errno
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: any dtype can be viewed at a multiple of it

_PORTABLE = 1  # cudaHostRegisterPortable


def padded(size_bytes: int) -> int:
    """`size_bytes`, rounded up to where the next thing may begin."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


class Staging:
    """A block of memory behind the file `descriptor`, which no folder shows. It grows, and never shrinks.

    `pinned` says whether CUDA is to copy into it directly: the block is then registered with the driver, once for each growth.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.descriptor = _anonymous_file()
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)

    @property
    def size_bytes(self) -> int:
        return self._bytes.numel()

    def reserve(self, size_bytes: int) -> None:
        """Makes the block at least so large, with its pages in place. Raises OSError and RuntimeError where the memory is not to be had."""
        if size_bytes <= self.size_bytes:
            return
        if (left := _available_bytes()) is not None and size_bytes - self.size_bytes > left:
            # The system would give it page by page, and end a process once there are none.
            raise OSError(errno.ENOMEM, f"{size_bytes} bytes are needed, {left} are left")
        self._unpin()
        self._bytes = torch.empty(0, dtype=torch.uint8)
        os.ftruncate(self.descriptor, size_bytes)
        self._bytes = torch.frombuffer(mapped(self.descriptor, size_bytes, populate=True), dtype=torch.uint8)
        if self._pinned and (error := int(_cuda().cudaHostRegister(self._bytes.data_ptr(), size_bytes, _PORTABLE))):
            raise RuntimeError(f"CUDA cannot pin {size_bytes} bytes of memory: error {error}")

    def fill(self, tensors: Iterable[tuple[int, Tensor]]) -> None:
        """Copies each tensor, row-major, to its offset (a multiple of ALIGNMENT). What happens to them after the return does not matter."""
        with torch.no_grad():
            for offset, tensor in tensors:
                at(self._bytes, offset, tensor.dtype, tuple(tensor.shape)).copy_(tensor, non_blocking=True)
        if self._pinned:
            torch.cuda.current_stream().synchronize()

    def write(self, offset: int, data: bytes) -> None:
        """Copies bytes to an offset."""
        if data:
            self._bytes[offset : offset + len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def close(self) -> None:
        """Gives the memory back, once no other process has it either."""
        self._unpin()
        self._bytes = torch.empty(0, dtype=torch.uint8)
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _unpin(self) -> None:
        if self._pinned and self.size_bytes:
            _cuda().cudaHostUnregister(self._bytes.data_ptr())  # whatever it says: after a failed kernel it says that again


def at(block: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor that lies at `offset` of a uint8 block."""
    size_bytes = dtype.itemsize * torch.Size(shape).numel()
    return block[offset : offset + size_bytes].view(dtype).view(shape)


def mapped(descriptor: int, size_bytes: int, *, populate: bool = False) -> mmap.mmap:
    """The block behind `descriptor`; with `populate`, pages come now rather than one by one when they are first written."""
    flags = mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if populate else 0)
    return mmap.mmap(descriptor, size_bytes, flags=flags)


def _available_bytes() -> int | None:
    """The memory that this host can still give, where it says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cuda() -> Any:
    """The driver's own calls; torch has no other for memory that it did not allocate."""
    return torch.cuda.cudart()


def _anonymous_file() -> int:
    if sys.platform == "linux":
        return os.memfd_create("paraxis-staging")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
