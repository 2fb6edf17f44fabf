"""How much memory a rank uses, and a record of every allocation: the only page of this room that asks what the device is.

Recording on CUDA is private to torch (`torch.cuda.memory._record_memory_history`), so it is reached only through here.
"""

import gzip
import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from paraxis.base.device import Device

GIB = 2**30
_MAX_ENTRIES = 200_000  # allocations kept, the newest: some kilobytes each, with their stacks


@dataclass(frozen=True)
class Memory:
    """Memory in GiB. `reserved_gib` and `allocated_gib` are peaks; `current_gib` is allocated now.

    On CUDA, reserved is what the allocator holds and allocated what tensors hold. On CPU all three are the resident
    set of this process.
    """

    reserved_gib: float
    allocated_gib: float
    current_gib: float


def read_memory(device: Device) -> Memory:
    """What this process uses of the device's memory."""
    if device.is_cuda:
        return Memory(
            torch.cuda.max_memory_reserved(device.torch) / GIB,
            torch.cuda.max_memory_allocated(device.torch) / GIB,
            torch.cuda.memory_allocated(device.torch) / GIB,
        )
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB
    resident = Path("/proc/self/statm")  # Linux only; elsewhere the peak stands in
    current_gib = int(resident.read_text().split()[1]) * resource.getpagesize() / GIB if resident.exists() else peak_gib
    return Memory(peak_gib, peak_gib, current_gib)


def limit_memory(device: Device, bytes: int) -> None:
    """Holds the allocator to so many bytes of a CUDA device, or to all of it for 0, gives back what it keeps unused, and forgets peaks."""
    if device.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, bytes / device.memory_bytes) if bytes else 1.0, device.torch)
        torch.cuda.reset_peak_memory_stats(device.torch)


def start_recording(device: Device) -> None:
    """Records allocations from here on (CUDA only: on CPU the profiler does, with `profile_memory=True`)."""
    if device.is_cuda:
        torch.cuda.memory._record_memory_history(max_entries=_MAX_ENTRIES)


def stop_recording(device: Device) -> None:
    """Ends what `start_recording` began, and forgets what was recorded."""
    if device.is_cuda:
        torch.cuda.memory._record_memory_history(enabled=None)


def write_recording(device: Device, stem: Path, trace: Path) -> Path:
    """Writes what was recorded, next to the Chrome trace of the same steps; returns the file.

    CUDA: `<stem>.pickle`, every allocation with its stack, for https://pytorch.org/memory_viz. CPU:
    `<stem>.json.gz`, allocated memory over time as a Chrome trace, for https://ui.perfetto.dev, taken from `trace`.
    Raises OSError when it cannot be written.
    """
    if device.is_cuda:
        path = stem.with_name(stem.name + ".pickle")
        torch.cuda.memory._dump_snapshot(str(path))
        return path
    with gzip.open(trace, "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("name") == "[memory]"]
    curve = [
        {"name": "allocated", "ph": "C", "pid": event["pid"], "ts": event["ts"], "args": {"bytes": event["args"]["Total Allocated"]}}
        for event in events
    ]
    path = stem.with_name(stem.name + ".json.gz")
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": curve}, file)
    return path
