"""Reading every byte of a checkpoint against its SHA-256, to name what is damaged before it is needed."""

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

from paraxis.base.env import cores
from paraxis.base.errors import CheckpointError
from paraxis.checkpoint.load import check_size, read_manifest
from paraxis.checkpoint.manifest import CHUNK_BYTES, MANIFEST, Manifest, StoredFile, StoredPiece
from paraxis.checkpoint.place import Location
from paraxis.checkpoint.store import Files, open_files
from paraxis.checkpoint.tensor_file import DTYPES, HEADER_LIMIT_BYTES, Located, parse_header

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_MISMATCH = "do not match their SHA-256"


def no_progress(done: int, total: int) -> None:
    """For callers who do not wait."""


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file of a checkpoint, and the tensors that it may concern: those with a byte in what is damaged."""

    file: str
    why: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What reading all of a checkpoint has found. `unlisted` are files in its folder that its manifest does not know."""

    path: Location
    size_bytes: int
    damage: tuple[Damage, ...]
    unlisted: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        return not (self.damage or self.unlisted)


@dataclass(frozen=True)
class _Chunk:
    file: str
    index: int

    @property
    def start(self) -> int:
        return self.index * CHUNK_BYTES


def verify(path: str | Location, progress: Progress = no_progress) -> Verdict:
    """Reads every byte of the checkpoint at `path`, on as many threads as there are cores (SHA-256 lets the others run)."""
    held = open_files(path)
    try:
        manifest = read_manifest(held)
    except CheckpointError as error:
        return Verdict(held.path, 0, (Damage(MANIFEST, str(error), ()),))
    pieces: dict[str, list[tuple[str, StoredPiece]]] = {name: [] for name in manifest.files}
    for name, tensor in manifest.tensors.items():
        for piece in tensor.pieces:
            pieces[piece.file].append((name, piece))
    damage: list[Damage] = []
    whole: list[str] = []
    for file, stored in manifest.files.items():
        try:
            check_size(held, file, stored)
            whole.append(file)
        except CheckpointError as error:
            damage.append(Damage(file, str(error), _names(pieces[file])))
    problems = _read_all(held, manifest, whole, progress)
    for file in whole:
        damage += _damage(held, manifest, file, pieces[file], problems.get(file, {}))
    total = sum(stored.size_bytes for stored in manifest.files.values())
    unlisted = held.listing().keys() - {MANIFEST, *manifest.files}
    return Verdict(held.path, total, tuple(damage), tuple(sorted(unlisted)))


def _read_all(held: Files, manifest: Manifest, names: list[str], progress: Progress) -> dict[str, dict[int, str]]:
    """By file, the chunks that are not as they were written, and why."""
    chunks = [_Chunk(name, index) for name in names for index in range(len(manifest.files[name].chunks))]
    total, done = sum(manifest.files[name].size_bytes for name in names), 0
    found: dict[str, dict[int, str]] = {}
    pool = ThreadPoolExecutor(cores())
    try:
        for chunk, problem in zip(chunks, pool.map(lambda c: _problem(held, manifest.files[c.file], c), chunks), strict=True):
            if problem is not None:
                found.setdefault(chunk.file, {})[chunk.index] = problem
            done += min(CHUNK_BYTES, manifest.files[chunk.file].size_bytes - chunk.start)
            progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for what has not begun
    return found


def _problem(held: Files, stored: StoredFile, chunk: _Chunk) -> str | None:
    try:
        data = held.read_range(chunk.file, chunk.start, min(CHUNK_BYTES, stored.size_bytes - chunk.start))
    except CheckpointError as error:
        return f"cannot be read ({error})"
    return None if hashlib.sha256(data).hexdigest() == stored.chunks[chunk.index] else _MISMATCH


def _damage(held: Files, manifest: Manifest, file: str, pieces: Sequence[tuple[str, StoredPiece]], bad: dict[int, str]) -> Iterator[Damage]:
    """What is wrong with a file of the right length: one entry for each stretch of bad chunks, with the tensors in it."""
    places = _places(held, manifest, file, pieces) if pieces else []
    if places is None and not bad:
        yield Damage(file, "it does not hold its tensors as the manifest says", _names(pieces))
    for _, run in groupby(enumerate(sorted(bad)), lambda item: item[1] - item[0]):
        stretch = [index for _, index in run]
        begin, end = stretch[0] * CHUNK_BYTES, min((stretch[-1] + 1) * CHUNK_BYTES, manifest.files[file].size_bytes)
        why = f"bytes {begin} to {end} " + ", or ".join(sorted({bad[index] for index in stretch}))
        hit = pieces if places is None else [piece for piece, (a, b) in zip(pieces, places, strict=True) if a < end and begin < b]
        yield Damage(file, why, _names(hit))


def _places(held: Files, manifest: Manifest, file: str, pieces: Sequence[tuple[str, StoredPiece]]) -> list[tuple[int, int]] | None:
    """The bytes of each of `pieces` in `file`, or None where its header is not what the manifest says: then nobody knows."""
    try:
        header = _header(held, file, manifest.files[file].size_bytes)
    except (CheckpointError, ValueError, struct.error):
        return None
    places = []
    for name, piece in pieces:
        located = header.get(piece.key)
        if located is None or (located.dtype, located.shape) != (DTYPES.get(manifest.tensors[name].dtype), piece.box.sizes):
            return None
        places.append((located.begin, located.end))
    return places


def _names(pieces: Sequence[tuple[str, StoredPiece]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name, _ in pieces))


def _header(held: Files, file: str, size: int) -> dict[str, Located]:
    length = struct.unpack("<Q", held.read_range(file, 0, min(8, size)))[0]
    if length > min(HEADER_LIMIT_BYTES, size - 8):
        raise ValueError(f"its header claims {length} bytes")
    return parse_header(held.read_range(file, 8, length), size)
