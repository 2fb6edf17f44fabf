"""Reading documents out of files: plain text (a document a file), JSON lines and Parquet (a document a record).

A record that may be skipped is a line, a row, or the part of a text file (about a MiB) in which a byte is wrong.
"""

import gzip
import json
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Literal, cast

import pyarrow
import pyarrow.parquet

from paraxis.base.errors import DataError
from paraxis.data.sources import Source

log = logging.getLogger(__name__)

# A text file is read, and tokenised, in pieces of about this size: it may be larger than memory, and keeps all cores busy.
PIECE_BYTES = 1 << 20
PARQUET_ROWS = 1024
LOGGED_BAD_RECORDS = 10
RECORD_SUFFIXES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class Piece:
    """A document, or part of one: `last` where it ends. `read` is how many bytes of the file have been read so far."""

    text: str
    last: bool
    read: int


@dataclass
class BadRecords:
    """What to do with a record that cannot be read: `stop` raises DataError, `skip` leaves it out and counts it."""

    policy: Literal["stop", "skip"]
    skipped: int = field(default=0, init=False)

    def report(self, where: str, problem: str) -> None:
        if self.policy == "stop":
            raise DataError(f"{where}: {problem}; mend it, or set data.on_bad_record=skip to leave such records out")
        self.skipped += 1
        if self.skipped <= LOGGED_BAD_RECORDS:
            log.warning("skipped %s: %s", where, problem)


def pieces(source: Source, text_field: str, bad: BadRecords) -> Iterator[Piece]:
    """The documents of one file, in order. Raises DataError for a file that cannot be read, whatever the policy."""
    name = source.path.lower()
    packed = name.endswith(".gz")
    name = name.removesuffix(".gz")
    try:
        with cast(IO[bytes], source.fs.open(source.path, "rb")) as raw:
            if name.endswith(".parquet"):
                yield from _parquet(source, raw, text_field, bad)
                return
            handle = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if packed else raw
            if name.endswith(RECORD_SUFFIXES):
                yield from _json_lines(source, handle, raw, text_field, bad)
            else:
                yield from _text(source, handle, raw, bad)
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise DataError(f"{source.name} cannot be read: {error}; it may be damaged, incomplete or not what its name says") from error


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


def _json_lines(source: Source, handle: IO[bytes], raw: IO[bytes], text_field: str, bad: BadRecords) -> Iterator[Piece]:
    for number, line in enumerate(handle, start=1):
        if not line.strip():
            continue
        text, problem = _text_of_json(line, text_field, first=number == 1)
        if problem:
            bad.report(f"{source.name}, line {number}", problem)
        else:
            yield Piece(text, last=True, read=raw.tell())


def _text_of_json(line: bytes, text_field: str, first: bool) -> tuple[str, str | None]:
    """The text of one line, and what is wrong with the line if anything is."""
    try:
        record = json.loads(_decode(line, first))
    except UnicodeDecodeError:
        return "", "not valid UTF-8"
    except (ValueError, RecursionError) as error:
        return "", f"not valid JSON ({error})"
    if not isinstance(record, dict):
        return "", f"a JSON {type(record).__name__} where an object is needed, one a line"
    return _checked_text(record.get(text_field), f"field {text_field!r} (data.text_field)", list(record))


def _checked_text(value: Any, what: str, present: list[str]) -> tuple[str, str | None]:
    if value is None:
        return "", f"no {what}" + (f" among {', '.join(map(repr, present[:8]))}" if present else "")
    if not isinstance(value, str):
        return "", f"{what} is of type {type(value).__name__}, not text"
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        return "", f"{what} holds half of a surrogate pair, which is no character"
    return value, None


def _parquet(source: Source, raw: IO[bytes], text_field: str, bad: BadRecords) -> Iterator[Piece]:
    file = pyarrow.parquet.ParquetFile(raw)
    columns = file.schema_arrow.names
    if text_field not in columns:
        raise DataError(f"{source.name} has no column {text_field!r}; set data.text_field to one of {', '.join(columns)}")
    rows, done = max(1, file.metadata.num_rows), 0
    for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
        for scalar in batch.column(0):
            done += 1
            try:
                text, problem = _checked_text(scalar.as_py(), f"value in column {text_field!r}", [])
            except UnicodeDecodeError:
                text, problem = "", "not valid UTF-8"
            if problem:
                bad.report(f"{source.name}, row {done}", problem)
            else:
                yield Piece(text, last=True, read=source.size * done // rows)
