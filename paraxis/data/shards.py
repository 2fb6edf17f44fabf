"""Tokenised documents on disk: token shards, an index of where documents end, and what they were made from.

tokens-00000.bin ...   token ids, little-endian uint16 (uint32 for vocabularies over 65,536); no document straddles two
ends.bin               int64 per document: how many tokens there are up to its end
meta.json              counts, settings, the fingerprint
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paraxis.base.errors import DataError
from paraxis.data.tokens import Tokenizer

SHARD_TOKENS = 1 << 28
ENDS_BUFFER = 1 << 16
FORMAT = 1  # raise it when a change makes old folders unreadable, or makes other tokens


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id of the vocabulary."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclass
class FileRecord:
    """What one source file became. `sha256` is of its documents' tokens and lengths, so of content, not of place or time."""

    name: str
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    sha256: str = ""


class ShardWriter:
    """Appends the documents of files to shards in `folder`, holding in memory no more than it is given at once."""

    def __init__(self, folder: Path, names: Sequence[str], vocab_size: int, eos_id: int | None) -> None:
        self.dtype = token_dtype(vocab_size)
        self.files = [FileRecord(name) for name in names]
        self._folder = folder
        self._end = np.array([] if eos_id is None else [eos_id], self.dtype)
        self._hashes = [hashlib.sha256() for _ in names]
        self._shard_ends: list[int] = []
        self._tokens = 0  # in all shards
        self._length = 0  # of the document being written
        self._ends: list[int] = []
        self._ends_file = (folder / "ends.bin").open("wb")
        self._shard = (folder / _shard_name(0)).open("wb")

    def add(self, file: int, tokens: np.ndarray, last: bool) -> None:
        """These tokens of `file` go on with its document, which ends here where `last`; one without tokens is only counted."""
        self._write(file, tokens)
        if not last:
            return
        if self._length == 0:
            self.files[file].empty += 1
            return
        self._write(file, self._end)
        self._hashes[file].update(self._length.to_bytes(8, "little"))
        self.files[file].documents += 1
        self.files[file].tokens += self._length
        self._length = 0
        self._ends.append(self._tokens)
        if len(self._ends) >= ENDS_BUFFER:
            self._flush_ends()
        if self._tokens - (self._shard_ends[-1] if self._shard_ends else 0) >= SHARD_TOKENS:
            self._finish_shard()
            self._shard = (self._folder / _shard_name(len(self._shard_ends))).open("wb")

    def _write(self, file: int, tokens: np.ndarray) -> None:
        assert tokens.dtype == self.dtype
        data = tokens.tobytes()
        self._shard.write(data)
        self._hashes[file].update(data)
        self._tokens += len(tokens)
        self._length += len(tokens)

    def _flush_ends(self) -> None:
        self._ends_file.write(np.array(self._ends, "<i8").tobytes())
        self._ends.clear()

    def _finish_shard(self) -> None:
        self._shard.close()
        self._shard_ends.append(self._tokens)

    def finish(self, settings: Mapping[str, Any], skipped: int) -> None:
        """Writes the index and the metadata. `settings` is what, beside the content, the fingerprint is to cover."""
        for record, digest in zip(self.files, self._hashes, strict=True):
            record.sha256 = digest.hexdigest()
        self._flush_ends()
        self._ends_file.close()
        self._finish_shard()
        content = {"format": FORMAT, "dtype": self.dtype.str, **settings, "files": [record.sha256 for record in self.files]}
        meta = {
            "fingerprint": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
            "format": FORMAT,
            "dtype": self.dtype.str,
            "settings": settings,
            "shard_ends": self._shard_ends,
            "documents": sum(record.documents for record in self.files),
            "tokens": self._tokens,
            "skipped": skipped,
            "files": [asdict(record) for record in self.files],
        }
        (self._folder / "meta.json").write_text(json.dumps(meta, indent=1))

    def close(self) -> None:
        """Closes the files, finished or not."""
        self._shard.close()
        self._ends_file.close()


class Prepared:
    """Tokenised documents, mapped from a finished folder: any part of any document, without reading the rest.

    `fingerprint` covers the tokens, their order and the tokenizer, and nothing of where the files were: it is the same on
    every machine. `skipped` counts the broken records that were left out.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        try:
            meta = json.loads((folder / "meta.json").read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"the data cache is damaged: {error}; delete the folder {folder} and it is made again") from error
        self.folder = folder
        self.tokenizer = tokenizer
        self.fingerprint: str = meta["fingerprint"]
        self.documents: int = meta["documents"]
        self.tokens: int = meta["tokens"]
        self.skipped: int = meta["skipped"]
        dtype = np.dtype(meta["dtype"])
        self._shard_ends = np.array(meta["shard_ends"], np.int64)
        sizes = np.diff(self._shard_ends, prepend=0)
        self.ends = _map(folder / "ends.bin", np.dtype("<i8"), self.documents)
        self._shards = [_map(folder / _shard_name(index), dtype, int(size)) for index, size in enumerate(sizes)]

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of `document`, counted from its own beginning, in the type they are stored in."""
        begin = int(self.ends[document - 1]) if document else 0
        shard = int(np.searchsorted(self._shard_ends, begin, side="right"))
        offset = begin - (int(self._shard_ends[shard - 1]) if shard else 0)
        return self._shards[shard][offset + start : offset + stop]


def _shard_name(index: int) -> str:
    return f"tokens-{index:05}.bin"


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
        raise DataError(
            f"the data cache is damaged: {path} is missing or not {count * dtype.itemsize} bytes; "
            f"delete the folder {path.parent} and it is made again"
        )
    return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)
