"""Reading documents out of files: plain text (a document a file); JSON lines, Parquet and Arrow (a document a record).

A record that may be skipped is a line, a row, or the part of a text file (about a MiB) in which a byte is wrong.
"""

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Literal, cast

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from paraxis.base.errors import DataError
from paraxis.data.chat import MESSAGES, Spans, Template
from paraxis.data.hub import open_whole
from paraxis.data.sources import Source

log = logging.getLogger(__name__)

# A text file is read, and tokenised, in pieces of about this size: it may be larger than memory, and keeps all cores busy.
PIECE_BYTES = 1 << 20
PARQUET_ROWS = 1024
LOGGED_BAD_RECORDS = 10
RECORD_SUFFIXES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class Piece:
    """A document, or part of one: `last` where it ends. `read` is how many bytes of the file have been read so far.

    `trained` are the characters that are to be predicted, None for all. `ids` are the tokens, where the file holds those.
    """

    text: str
    last: bool
    read: int
    trained: Spans | None = None
    ids: np.ndarray | None = None


@dataclass(frozen=True)
class Reading:
    """What to take from a record: the text of a field, or a conversation, written out by `template`."""

    text_field: str
    template: Template | None = None

    @property
    def field(self) -> str:
        return MESSAGES if self.template else self.text_field

    @property
    def setting(self) -> str:
        """How to ask for another field."""
        return "data.chat" if self.template else "data.text_field"

    def take(self, value: Any, what: str, present: Sequence[str], read: int) -> Piece | str:
        """The document that the field's `value` is, or what is wrong with it."""
        if value is None:
            return f"no {what}" + (f" among {', '.join(map(repr, present[:8]))}" if present else "")
        spans = None
        if self.template:
            try:
                value, spans = self.template.written(value)
            except ValueError as error:
                return f"{what}: {error}"
        if not isinstance(value, str):
            return f"{what} is of type {type(value).__name__}, not text"
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no tokenizer takes
            return f"{what} holds half of a surrogate pair, which is no character"
        return Piece(value, last=True, read=read, trained=spans)


@dataclass
class BadRecords:
    """What to do with a record that cannot be read: `stop` raises DataError, `skip` leaves it out and counts it."""

    policy: Literal["stop", "skip"]
    skipped: int = field(default=0, init=False)
    first: str = field(default="", init=False)  # where the first one skipped stands, and what is wrong with it

    def report(self, where: str, problem: str) -> None:
        if self.policy == "stop":
            raise DataError(f"{where}: {problem}; mend it, or set data.on_bad_record=skip to leave such records out")
        self.skipped += 1
        self.first = self.first or f"{where}: {problem}"
        if self.skipped <= LOGGED_BAD_RECORDS:
            log.warning("skipped %s: %s", where, problem)


def pieces(source: Source, reading: Reading, bad: BadRecords) -> Iterator[Piece]:
    """The documents of one file, or of the source's share of it, in order.

    Raises DataError for a file that cannot be read, whatever the policy.
    """
    if source.is_dataset:
        yield from _dataset(source, reading, bad)
        return
    name = source.path.lower()
    packed = name.endswith(".gz")
    name = name.removesuffix(".gz")
    try:
        with cast(IO[bytes], source.fs.open(source.path, "rb")) as raw:
            if name.endswith(".parquet"):
                yield from _parquet(source, raw, reading, bad)
                return
            if name.endswith(".arrow"):
                yield from _arrow(source, pyarrow.memory_map(source.path) if source.is_local else raw, reading, bad)
                return
            handle = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if packed else raw
            if name.endswith(RECORD_SUFFIXES):
                yield from _json_lines(source, handle, raw, reading, bad)
            elif reading.template:
                raise DataError(f"{source.name} holds no records, which data.chat needs: give .jsonl, .parquet or .arrow files")
            else:
                yield from _text(source, handle, raw, bad)
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise DataError(f"{source.name} cannot be read: {error}; it may be damaged, incomplete or not what its name says") from error


def divisible(source: Source) -> bool:
    """Whether the source can be read in shares: where its records can be found without reading what is before them."""
    name = source.path.lower()
    return source.is_dataset or name.endswith((".parquet", *RECORD_SUFFIXES)) or (source.is_local and name.endswith(".arrow"))


def _own(source: Source, count: int) -> range:
    """The source's share of `count` things."""
    share, shares = source.share
    return range(count * share // shares, count * (share + 1) // shares)


def _decode(data: bytes, first: bool) -> str:
    return data.decode("utf-8-sig" if first else "utf-8")


def _text(source: Source, handle: IO[bytes], raw: IO[bytes], bad: BadRecords) -> Iterator[Piece]:
    lines_before = 0
    for lines in _cut(handle):
        data = b"".join(lines)
        try:
            yield Piece(_decode(data, first=lines_before == 0), last=False, read=raw.tell())
        except UnicodeDecodeError as error:
            line = lines_before + data.count(b"\n", 0, error.start) + 1
            bad.report(f"{source.name}, line {line}", "not valid UTF-8 text")
        lines_before += len(lines)
    yield Piece("", last=True, read=raw.tell())


def _cut(handle: IO[bytes]) -> Iterator[list[bytes]]:
    """The lines of a file in groups of about PIECE_BYTES, each cut before a line that does not start with white space.

    There every byte-level tokenizer in use cuts words too, so that the tokens are those of the uncut text.
    """
    held: list[bytes] = []
    while lines := handle.readlines(PIECE_BYTES):
        cut = next((index for index in reversed(range(len(lines))) if (held or index) and not _starts_with_space(lines[index])), None)
        if cut is None:
            held += lines
        else:
            yield held + lines[:cut]
            held = lines[cut:]
    if held:
        yield held


def _starts_with_space(line: bytes) -> bool:
    return line[:4].decode(errors="replace")[:1].isspace()


def _json_lines(source: Source, handle: IO[bytes], raw: IO[bytes], reading: Reading, bad: BadRecords) -> Iterator[Piece]:
    """A share has the lines that begin in its bytes."""
    own = _own(source, source.size) if source.share[1] > 1 else None
    at = own.start if own else 0
    if at:
        handle.seek(at - 1)
        at += len(handle.readline()) - 1
    for number, line in enumerate(handle, start=1):
        if own and at >= own.stop:
            return
        first, at = at == 0, at + len(line)
        if not line.strip():
            continue
        found = _of_json(line, reading, first=first, read=raw.tell())
        if isinstance(found, str):
            bad.report(f"{source.name}, line {_lines_before(source, own) + number}", found)
        else:
            yield found


def _lines_before(source: Source, own: range | None) -> int:
    """How many lines begin before a share: counted only where one has to be named."""
    if not own or not own.start:
        return 0
    lines, left = 0, own.start - 1
    with cast(IO[bytes], source.fs.open(source.path, "rb")) as handle:
        while left and (data := handle.read(min(left, PIECE_BYTES))):
            lines += data.count(b"\n")
            left -= len(data)
    return lines + 1


def _of_json(line: bytes, reading: Reading, *, first: bool, read: int) -> Piece | str:
    """The document of one line, or what is wrong with the line."""
    try:
        record = json.loads(_decode(line, first))
    except UnicodeDecodeError:
        return "not valid UTF-8"
    except (ValueError, RecursionError) as error:
        return f"not valid JSON ({error})"
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__} where an object is needed, one a line"
    return reading.take(record.get(reading.field), f"field {reading.field!r} ({reading.setting})", list(record), read)


def _parquet(source: Source, raw: IO[bytes], reading: Reading, bad: BadRecords) -> Iterator[Piece]:
    """A share has some of the row groups, which is what can be read by itself."""
    file = pyarrow.parquet.ParquetFile(raw)
    _check_column(source, file.schema_arrow.names, reading)
    own, groups = _own(source, file.num_row_groups), [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    rows, done = max(1, sum(groups)), sum(groups[: own.start])
    for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[reading.field], row_groups=list(own)):
        yield from _column(source, batch.column(0), done, reading, bad, lambda row: source.size * row // rows)
        done += batch.num_rows


def _arrow(source: Source, raw: Any, reading: Reading, bad: BadRecords) -> Iterator[Piece]:
    """Either of Arrow's formats, the file or the stream; the `datasets` library writes streams.

    A share has some of a file's batches, and of a stream's those that begin in its bytes.
    """
    try:
        file = pyarrow.ipc.open_file(raw)
        own = _own(source, file.num_record_batches)
        batches: Iterator[Any] = ((number in own, file.get_batch(number)) for number in range(file.num_record_batches))
        names = file.schema.names
    except pyarrow.ArrowInvalid:
        raw.seek(0)
        stream = pyarrow.ipc.open_stream(raw)
        batches, names = _of_stream(stream, raw, _own(source, source.size)), stream.schema.names
    _check_column(source, names, reading)
    done = 0
    for is_own, batch in batches:
        at = min(raw.tell(), source.size)
        if is_own:
            yield from _column(source, batch.column(names.index(reading.field)), done, reading, bad, lambda row, at=at: at)
        done += batch.num_rows


def _of_stream(stream: Any, raw: Any, own: range) -> Iterator[tuple[bool, Any]]:
    """The batches of a stream, each with whether it begins in `own`, up to the last that does."""
    while (at := raw.tell()) < own.stop:
        try:
            batch = stream.read_next_batch()
        except StopIteration:
            return
        yield at in own, batch


def _dataset(source: Source, reading: Reading, bad: BadRecords) -> Iterator[Piece]:
    """The rows of a dataset of which any can be read at once."""
    dataset = open_whole(source.path)
    _check_column(source, dataset.column_names, reading)
    own, rows = _own(source, len(dataset)), max(1, len(dataset))
    done = own.start
    wanted = dataset.select_columns([reading.field]).with_format("arrow").select(own)
    for table in wanted.iter(batch_size=PARQUET_ROWS):
        yield from _column(source, table.column(0), done, reading, bad, lambda row: source.size * row // rows)
        done += table.num_rows


def _check_column(source: Source, names: list[str], reading: Reading) -> None:
    if reading.field not in names:
        mend = "data.chat reads conversations from it" if reading.template else f"set data.text_field to one of {', '.join(names)}"
        raise DataError(f"{source.name} has no column {reading.field!r}; {mend}")


def _column(source: Source, column: Any, done: int, reading: Reading, bad: BadRecords, read: Callable[[int], int]) -> Iterator[Piece]:
    """The documents of a column whose first row is the file's row `done`, counted from 0; `read` gives the bytes up to a row."""
    for row, scalar in enumerate(column, start=done + 1):
        try:
            found = reading.take(scalar.as_py(), f"value in column {reading.field!r}", [], read(row))
        except UnicodeDecodeError:
            found = "not valid UTF-8"
        if isinstance(found, str):
            bad.report(f"{source.name}, row {row}", found)
        else:
            yield found
