"""Rewriting a checkpoint so that other ranks find their parts in files of their own: the same bits, in other files.

Reading does not need it: any layout reads any checkpoint. It pays where many ranks would each open the files of few.
"""

from collections.abc import Callable
from functools import partial
from zlib import crc32

from torch import Tensor

from paraxis.base.errors import CheckpointError
from paraxis.base.layout import Box, whole_box
from paraxis.checkpoint.load import Checkpoint
from paraxis.checkpoint.manifest import files_beside
from paraxis.checkpoint.place import Location
from paraxis.checkpoint.save import Part, save_shares
from paraxis.checkpoint.store import open_store
from paraxis.checkpoint.tensor_file import DTYPES


def reshard(source: Checkpoint, destination: str | Location, ranks: int, progress: Callable[[int, int], None]) -> Location:
    """Writes what `source` holds as `destination/step-N` and returns that path; rank r of `ranks` fully sharded ones reads rank-r-*.

    One part is in memory at a time; `progress` is told how many bytes of tensors were read, and of how many. Raises CheckpointError
    where `source` is damaged or `destination` holds something, StorageError where that cannot be written.
    """
    if not open_store(destination).is_empty():
        raise CheckpointError(f"{destination} exists and is not an empty folder; name a new one")
    for name, stored in source.tensors.items():
        if stored.dtype not in DTYPES:
            raise CheckpointError(f"{source.path}: {name} is {stored.dtype!r}; this release reads {', '.join(DTYPES)}")
    total = sum(_bytes(source, name, whole_box(stored.shape)) for name, stored in source.tensors.items())
    done = 0

    def read(name: str, box: Box) -> Tensor:
        nonlocal done
        done += _bytes(source, name, box)
        progress(done, total)
        return source.read(name, box)

    shares = [
        [
            Part(name, stored.shape, DTYPES[stored.dtype], box, partial(read, name, box or whole_box(stored.shape)))
            for name, stored in source.tensors.items()
            for box in [share_of(name, stored.shape, rank, ranks)]
        ]
        for rank in range(ranks)
    ]
    files = {name: source.file(name) for name in files_beside(source.manifest)}
    return save_shares(destination, source.manifest.step, shares, source.meta, files, layout=f"fsdp{ranks}")


def share_of(name: str, shape: tuple[int, ...], rank: int, ranks: int) -> Box | None:
    """The part of a tensor that goes to the files of `rank`, or None where that is nothing.

    Rows, as fully sharded parameters are cut; of a tensor with fewer rows than ranks the longest dimension, so that all have work.
    """
    whole = whole_box(shape)
    if not shape:
        return whole if rank == crc32(name.encode()) % ranks else None
    dim = 0 if shape[0] >= ranks else shape.index(max(shape))
    part = whole.cut(dim, ranks, rank)
    return part if part.numel else None


def _bytes(source: Checkpoint, name: str, box: Box) -> int:
    return box.numel * DTYPES[source.tensors[name].dtype].itemsize
