"""Text that is tokenised while training: pools of documents, each tokenised on its own when its turn comes.

Files are cut into chunks of about CHUNK_BYTES: some small files, or a share of a large one. A pass takes the chunks in a seeded
order, and so many that follow each other are a pool. A stream has no such index: a pool of it is the next POOL_CHARACTERS, and
where the next one begins is known when it has been read. What a chunk or a pool holds depends on the data alone, so whichever
process of whichever rank comes first makes it, in a folder that all of a host share, and the others map it. Folders behind the
reader are removed: what is on disk at any time is a few pools. One that is missed after all is made again.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from paraxis.base.errors import DataError
from paraxis.data.cache import drop, made_once
from paraxis.data.config import DataConfig
from paraxis.data.crew import Crew
from paraxis.data.documents import BadRecords, Piece, Reading, divisible
from paraxis.data.hub import open_stream
from paraxis.data.part import Part, make_part, write_tokens
from paraxis.data.prepare import key_of
from paraxis.data.rows import shuffled
from paraxis.data.shards import Documents
from paraxis.data.sources import Source
from paraxis.data.tokens import Tokenizer

log = logging.getLogger(__name__)

CHUNK_BYTES = 4 << 20  # of input: about a second's work of one core
POOL_CHUNKS = 8  # documents of one pool are shuffled together
POOL_CHARACTERS = CHUNK_BYTES * POOL_CHUNKS
AHEAD = 2  # pools that are tokenised before they are needed
BEHIND = 2  # pools that another rank may still be at
LOCKS = 64
AFTER = "after.json"
_CHUNKS = 2  # beside rows.DOCUMENTS and rows.ROWS

Place = dict[str, Any]  # where a pool begins, for JSON


@dataclass(frozen=True)
class Pool:
    """Documents that are packed together: the `number`-th pool since the beginning, in pass `repetition` over the data."""

    number: int
    repetition: int
    data: Documents
    after: Place


class Pools(Protocol):
    """The pools of one source, one after another, for ever. `files` are name and digest of each file, None where nothing can be said."""

    fingerprint: str
    files: list[list[str]] | None
    first: Place
    tokenizer: Tokenizer

    def open(self, place: Place) -> Pool: ...

    def close(self) -> None: ...


def chunks_of(sources: Sequence[Source]) -> list[list[Source]]:
    """The files, in order, as chunks of about CHUNK_BYTES each: a function of their sizes alone."""
    chunks: list[list[Source]] = []
    size = CHUNK_BYTES
    for source in sources:
        shares = max(1, round(source.size / CHUNK_BYTES)) if divisible(source) else 1
        if shares > 1:
            chunks += [[replace(source, share=(share, shares))] for share in range(shares)]
            size = CHUNK_BYTES
            continue
        if size + source.size > CHUNK_BYTES:
            chunks.append([])
            size = 0
        chunks[-1].append(source)
        size += source.size
    return chunks


@dataclass
class ChunkMaker:
    """Tokenises a chunk by number, into a folder of its own. It may be sent to another process."""

    folder: Path
    parts: Sequence[Part]

    def __call__(self, number: int) -> Path:
        def make(partial: Path) -> None:
            make_part(self.parts[number], partial, lambda done: None)

        return made_once(self.folder, f"chunk-{number:07}", make, lock=f"{number % LOCKS}")


class FilePools:
    """Pools of files. `workers` processes tokenise ahead; without any, what is not there yet is made when asked for."""

    def __init__(
        self, config: DataConfig, sources: Sequence[Source], tokenizer: Tokenizer, cache: Path, *, seed: int, owner: str, workers: int
    ) -> None:
        settings = {"tokenizer": tokenizer.sha256, "append_eos": config.append_eos, "chunk": CHUNK_BYTES, "pool": POOL_CHUNKS}
        # A copy is the same data where it keeps its time, which `cp -p` and `rsync -a` see to; its folder has no say.
        self.files: list[list[str]] | None = [
            [source.name, _digest(Path(source.name).name, source.size, source.version)] for source in sources
        ]
        reading = {"text_field": config.text_field, "chat": config.chat, "on_bad_record": config.on_bad_record}
        self.fingerprint = _digest([digest for _, digest in self.files], {**settings, **reading})
        self.first: Place = {"pool": 0}
        self.tokenizer = tokenizer
        parts = [Part(chunk, config, tokenizer) for chunk in chunks_of(sources)]
        self._folder = cache / f"live-{key_of(config, sources, owner=owner, **settings)}"
        self._crew, self._leads = Crew(ChunkMaker(self._folder, parts), workers), workers > 0
        self._count, self._pools = len(parts), -(-len(parts) // POOL_CHUNKS)
        self._shuffle, self._seed = config.shuffle, seed
        self._order = lru_cache(maxsize=3)(self._make_order)

    def _make_order(self, repetition: int) -> list[int]:
        return shuffled(self._count, self._seed, repetition, _CHUNKS).tolist() if self._shuffle else list(range(self._count))

    def _chunks(self, pool: int) -> list[int]:
        repetition, number = divmod(pool, self._pools)
        return self._order(repetition)[number * POOL_CHUNKS : (number + 1) * POOL_CHUNKS]

    def open(self, place: Place) -> Pool:
        """The pool that begins at `place`, waiting for what is not tokenised yet; those that follow are begun."""
        pool: int = place["pool"]
        chunks, ahead = self._chunks(pool), [chunk for later in range(AHEAD) for chunk in self._chunks(pool + 1 + later)]
        for chunk in (*chunks, *ahead):
            if self._leads and (chunk in chunks or not self._path(chunk).is_dir()):
                self._crew.ask(chunk)
        data = _mapped(lambda: [self._crew.get(chunk) for chunk in chunks], self.tokenizer)
        if self._leads:
            behind = [chunk for before in range(min(BEHIND, pool)) for chunk in self._chunks(pool - 1 - before)]
            _sweep(self._folder, "chunk-*", {self._path(chunk) for chunk in (*behind, *chunks, *ahead)})
        return Pool(pool, pool // self._pools, data, {"pool": pool + 1})

    def _path(self, chunk: int) -> Path:
        return self._folder / f"chunk-{chunk:07}"

    def close(self) -> None:
        """Ends the processes, and removes what they made."""
        self._crew.close()
        if self._leads and self._folder.is_dir():
            drop(self._folder)


@dataclass
class StreamMaker:
    """Tokenises the pool of a stream that begins at a place, given as JSON, and tells where the next begins.

    It goes on reading where it stopped if that is the next it is asked for; else it starts from the state in the place.
    """

    folder: Path
    path: str
    config: DataConfig
    tokenizer: Tokenizer
    characters: int  # of text in a pool
    _at: str = field(default="", init=False)
    _dataset: Any = field(default=None, init=False)
    _examples: Any = field(default=None, init=False)

    def __call__(self, job: str) -> tuple[Path, Place]:
        name = f"pool-{_digest(job)[:24]}"
        folder = made_once(self.folder, name, lambda partial: self._make(job, partial), lock=f"{int(_digest(job)[:8], 16) % LOCKS}")
        try:
            return folder, json.loads((folder / AFTER).read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"the data cache is damaged: {error}; delete the folder {folder} and it is made again") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_at": "", "_dataset": None, "_examples": None}

    def _make(self, job: str, partial: Path) -> None:
        place: Place = json.loads(job)
        if self._at != job:
            self._dataset = open_stream(self.path)
            if place["state"] is not None:
                self._dataset.load_state_dict(place["state"])
            self._examples = iter(self._dataset)
        self._at = ""
        after: Place = {}
        bad = BadRecords(self.config.on_bad_record)
        write_tokens(self._pieces(place, after, bad), [self.path], self.config, self.tokenizer, partial, bad)
        following = json.dumps(after, sort_keys=True)
        (partial / AFTER).write_text(following)
        self._at = following if after["state"] is not None else ""  # a pass that is over begins anew

    def _pieces(self, place: Place, after: Place, bad: BadRecords) -> Iterator[tuple[int, Piece]]:
        """What the pool is made of; fills in `after` at its end."""
        reading = Reading(self.config.text_field, self.config.template)
        number, characters = place["record"], 0
        while characters < self.characters:
            try:
                example = next(self._examples)
            except StopIteration:
                after.update(pool=place["pool"] + 1, repetition=place["repetition"] + 1, record=0, state=None)
                return
            except Exception as error:  # of any kind: what reads the stream may be anything
                raise DataError(f"{self.path}, after record {number}: {type(error).__name__}: {error}; the run can be resumed") from error
            number += 1
            found = reading.take(example.get(reading.field), f"field {reading.field!r} ({reading.setting})", list(example), 0)
            if isinstance(found, str):
                bad.report(f"{self.path}, record {number}", found)
                continue
            characters += len(found.text)
            yield 0, found
        after.update(pool=place["pool"] + 1, repetition=place["repetition"], record=number, state=self._dataset.state_dict())


class StreamPools:
    """Pools of a stream, which is read from its beginning or from a saved state, by one process that is a pool ahead."""

    def __init__(self, config: DataConfig, path: str, tokenizer: Tokenizer, cache: Path, *, owner: str, workers: int) -> None:
        log.warning("%s is a stream: it is continued from its own state, but whether its content is the same cannot be checked", path)
        settings = {"tokenizer": tokenizer.sha256, "append_eos": config.append_eos, "pool": POOL_CHARACTERS, "stream": path}
        reading = {"text_field": config.text_field, "chat": config.chat, "on_bad_record": config.on_bad_record}
        self.files: list[list[str]] | None = None
        self.fingerprint = _digest({**settings, **reading})
        self.first: Place = {"pool": 0, "repetition": 0, "record": 0, "state": None}
        self.tokenizer = tokenizer
        self._folder = cache / f"live-{key_of(config, [], owner=owner, **settings)}"
        self._crew = Crew(StreamMaker(self._folder, path, config, tokenizer, POOL_CHARACTERS), min(workers, 1), threads=workers)
        self._leads = workers > 0
        self._window: list[Path] = []

    def open(self, place: Place) -> Pool:
        """The pool that begins at `place`, waiting for it; the next is begun."""
        after: Place = {}

        def made() -> list[Path]:
            folder, following = self._crew.get(json.dumps(place, sort_keys=True))
            after.update(following)
            return [folder]

        data = _mapped(made, self.tokenizer)
        if self._leads:
            job = json.dumps(after, sort_keys=True)
            self._window = [*self._window[-BEHIND:], self._folder / f"pool-{_digest(json.dumps(place, sort_keys=True))[:24]}"]
            self._crew.ask(job)
            _sweep(self._folder, "pool-*", {*self._window, self._folder / f"pool-{_digest(job)[:24]}"})
        return Pool(place["pool"], place["repetition"], data, after)

    def close(self) -> None:
        """Ends the process, and removes what it made."""
        self._crew.close()
        if self._leads and self._folder.is_dir():
            drop(self._folder)


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _mapped(made: Callable[[], list[Path]], tokenizer: Tokenizer) -> Documents:
    """The documents in the folders that `made` returns, which are made again where another process has removed one meanwhile."""
    for _ in range(2):
        folders = made()
        try:
            return Documents(folders, tokenizer)
        except DataError:
            log.debug("made again: a folder of the data was removed as it was opened", exc_info=True)
    return Documents(made(), tokenizer)


def _sweep(folder: Path, pattern: str, kept: set[Path]) -> None:
    for path in folder.glob(pattern):
        if path not in kept and ".partial-" not in path.name and ".dropped-" not in path.name:
            drop(path)
