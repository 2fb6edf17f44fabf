"""Tokenised documents on disk: token shards, an index of where documents end, and what they were made from.

tokens-00000.bin ...   token ids, little-endian uint16 (uint32 for vocabularies over 65,536); no document straddles two
ends.bin               int64 per document: how many tokens there are up to its end
trained-00000.bin ...  uint8 per token, 1 where it is to be predicted; only where some are not
*.sha256               of each of these, the hashes of its parts (mapped.py)
meta.json              counts, settings, the fingerprint
tokenizer.json ...     the tokenizer's files
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paraxis.base.errors import DataError
from paraxis.base.seams import IGNORE
from paraxis.data.mapped import Mapped, files_of, hash_parts
from paraxis.data.tokens import Tokenizer

SHARD_TOKENS = 1 << 28
ENDS_BUFFER = 1 << 16
META = "meta.json"
ENDS = "ends.bin"
FORMAT = 3  # raise it when a change makes old folders unreadable, or makes other tokens


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

    def __init__(self, folder: Path, names: Sequence[str], vocab_size: int, eos_id: int | None, *, masked: bool = False) -> None:
        self.dtype = token_dtype(vocab_size)
        self.files = [FileRecord(name) for name in names]
        self._folder = folder
        self._end = np.array([] if eos_id is None else [eos_id], self.dtype)
        self._hashes = [hashlib.sha256() for _ in names]
        self._shard_ends: list[int] = []
        self._tokens = 0  # in all shards
        self._length = 0  # of the document being written
        self._ends: list[int] = []
        self._ends_file = (folder / ENDS).open("wb")
        self._shard = (folder / _shard_name(0)).open("wb")
        self._trained = (folder / _trained_name(0)).open("wb") if masked else None

    def add(self, file: int, tokens: np.ndarray, last: bool, trained: np.ndarray | None = None) -> None:
        """These tokens of `file` go on with its document, which ends here where `last`; one without tokens is only counted.

        `trained` says which are to be predicted, and is given where the writer is `masked`.
        """
        self._write(file, tokens, trained)
        if not last:
            return
        if self._length == 0:
            self.files[file].empty += 1
            return
        self._write(file, self._end, np.zeros(len(self._end), bool))
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
            if self._trained:
                self._trained = (self._folder / _trained_name(len(self._shard_ends))).open("wb")

    def _write(self, file: int, tokens: np.ndarray, trained: np.ndarray | None) -> None:
        assert tokens.dtype == self.dtype
        if self._trained:
            assert trained is not None
            flags = trained.astype(np.uint8).tobytes()
            self._trained.write(flags)
            self._hashes[file].update(flags)
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
        if self._trained:
            self._trained.close()
        self._shard_ends.append(self._tokens)

    def finish(self, settings: Mapping[str, Any], skipped: int, first_skipped: str = "") -> None:
        """Writes the index and the metadata. `settings` is what, beside the content, the fingerprint is to cover."""
        for record, digest in zip(self.files, self._hashes, strict=True):
            record.sha256 = digest.hexdigest()
        self._flush_ends()
        self._ends_file.close()
        self._finish_shard()
        for number in range(len(self._shard_ends)):
            hash_parts(self._folder / _shard_name(number))
            if self._trained:
                hash_parts(self._folder / _trained_name(number))
        hash_parts(self._folder / ENDS)
        write_meta(self._folder, self.dtype, self._trained is not None, settings, self._shard_ends, self.files, skipped, first_skipped)

    def close(self) -> None:
        """Closes the files, finished or not."""
        self._shard.close()
        self._ends_file.close()
        if self._trained:
            self._trained.close()


def write_meta(
    folder: Path,
    dtype: np.dtype,
    masked: bool,
    settings: Mapping[str, Any],
    shard_ends: Sequence[int],
    files: Sequence[FileRecord],
    skipped: int,
    first_skipped: str,
) -> None:
    """Writes what there is to know about the shards in `folder`. The fingerprint is of content and `settings`."""
    meta = {
        "fingerprint": _fingerprint(dtype.str, settings, [record.sha256 for record in files]),
        "format": FORMAT,
        "dtype": dtype.str,
        "masked": masked,
        "settings": settings,
        "shard_ends": shard_ends,
        "documents": sum(record.documents for record in files),
        "tokens": sum(record.tokens for record in files),
        "skipped": skipped,
        "first_skipped": first_skipped,
        "files": [asdict(record) for record in files],
    }
    (folder / META).write_text(json.dumps(meta, indent=1))


def _fingerprint(dtype: str, settings: Mapping[str, Any], hashes: Sequence[str]) -> str:
    content = {"format": FORMAT, "dtype": dtype, **settings, "files": hashes}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_meta(folder: Path) -> dict[str, Any]:
    """What `write_meta` wrote. Raises DataError where it cannot be read."""
    try:
        meta = json.loads((folder / META).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"the tokens are damaged: {folder / META}: {error}; delete the folder {folder} and make it again") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(f"{folder / META} is not of format {FORMAT}, which this version of paraxis reads; prepare the data again")
    if not _describes_shards(meta):
        raise DataError(f"the tokens are damaged: {folder / META} says what cannot be; delete the folder {folder} and make it again")
    return meta


def _describes_shards(meta: Mapping[str, Any]) -> bool:
    match meta:
        case {
            "fingerprint": str(),
            "dtype": "<u2" | "<u4",
            "masked": bool(),
            "settings": {},
            "shard_ends": [*ends],
            "documents": int(documents),
            "tokens": int(tokens),
            "skipped": int(),
            "first_skipped": str(),
            "files": [*files],
        }:
            if not all(isinstance(file, dict) and file.keys() == FileRecord("").__dict__.keys() for file in files):
                return False
            printed = _fingerprint(meta["dtype"], meta["settings"], [file["sha256"] for file in files]) == meta["fingerprint"]
            counts = [0, *ends, tokens]
            return printed and documents >= 0 and all(type(n) is int for n in counts) and counts == sorted(counts) and ends[-1:] == [tokens]
    return False


def join_parts(parts: Sequence[Path], folder: Path) -> None:
    """Makes one folder of shards out of several, in order, without copying their tokens where the file system has hard links."""
    metas = [read_meta(part) for part in parts]
    shard_ends: list[int] = []
    with (folder / ENDS).open("wb") as ends_file:
        for part, meta in zip(parts, metas, strict=True):
            before = shard_ends[-1] if shard_ends else 0
            for number, end in enumerate(meta["shard_ends"]):
                _link(part / _shard_name(number), folder / _shard_name(len(shard_ends)))
                if meta["masked"]:
                    _link(part / _trained_name(number), folder / _trained_name(len(shard_ends)))
                shard_ends.append(before + end)
            (np.fromfile(part / ENDS, "<i8") + before).tofile(ends_file)
    hash_parts(folder / ENDS)
    first = metas[0]
    files = [FileRecord(**record) for meta in metas for record in meta["files"]]
    skipped = sum(meta["skipped"] for meta in metas)
    first_skipped = next((meta["first_skipped"] for meta in metas if meta["first_skipped"]), "")
    write_meta(folder, np.dtype(first["dtype"]), first["masked"], first["settings"], shard_ends, files, skipped, first_skipped)


def _link(source: Path, target: Path) -> None:
    """An array in another folder, with its hashes."""
    for old, new in zip(files_of(source), files_of(target), strict=True):
        try:
            new.hardlink_to(old)
        except OSError:
            shutil.copyfile(old, new)


class Documents:
    """Tokenised documents, mapped from finished folders one after another: any part of any document, without reading the rest.

    `skipped` counts the broken records that were left out, of which `first_skipped` names one; `empty` those without a token.
    """

    def __init__(self, folders: Sequence[Path], tokenizer: Tokenizer) -> None:
        metas = [read_meta(folder) for folder in folders]
        self.tokenizer = tokenizer
        self.documents: int = sum(meta["documents"] for meta in metas)
        self.tokens: int = sum(meta["tokens"] for meta in metas)
        self.skipped: int = sum(meta["skipped"] for meta in metas)
        self.first_skipped: str = next((meta["first_skipped"] for meta in metas if meta["first_skipped"]), "")
        self.empty: int = sum(record["empty"] for meta in metas for record in meta["files"])
        ends, shard_ends, before = [], [], 0
        self._shards: list[Mapped] = []
        self._trained: list[Mapped] = []
        for folder, meta in zip(folders, metas, strict=True):
            found = Mapped(folder / ENDS, np.dtype("<i8"), meta["documents"]).read(0, meta["documents"])
            if len(found) and found[-1] != meta["tokens"]:
                raise DataError(f"the tokens are damaged: {folder / ENDS} does not end where they do; delete {folder} and make it again")
            ends.append(found + before if before else found)
            shard_ends += [before + end for end in meta["shard_ends"]]
            for number, size in enumerate(np.diff(meta["shard_ends"], prepend=0).tolist()):
                self._shards.append(Mapped(folder / _shard_name(number), np.dtype(meta["dtype"]), size))
                if meta["masked"]:
                    self._trained.append(Mapped(folder / _trained_name(number), np.dtype(np.uint8), size))
            before += meta["tokens"]
        self.ends = ends[0] if len(ends) == 1 else np.concatenate(ends)
        self._shard_ends = np.array(shard_ends, np.int64)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of `document`, counted from its own beginning, in the type they are stored in."""
        shard, offset = self._place(document)
        return self._shards[shard].read(offset + start, offset + stop)

    def targets(self, document: int, start: int, stop: int) -> np.ndarray:
        """The same tokens as int64, with IGNORE in place of those that are not to be predicted."""
        tokens = self.read(document, start, stop).astype(np.int64)
        if not self._trained:
            return tokens
        shard, offset = self._place(document)
        return np.where(self._trained[shard].read(offset + start, offset + stop), tokens, IGNORE)

    def _place(self, document: int) -> tuple[int, int]:
        """The shard that holds `document`, and where in it the document begins."""
        begin = int(self.ends[document - 1]) if document else 0
        shard = int(np.searchsorted(self._shard_ends, begin, side="right"))
        return shard, begin - (int(self._shard_ends[shard - 1]) if shard else 0)


class Prepared(Documents):
    """The documents of one folder, which were made of whole files.

    `fingerprint` covers the tokens, their order and the tokenizer, and nothing of where the files were: it is the same on
    every machine.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        super().__init__([folder], tokenizer)
        meta = read_meta(folder)
        self.folder = folder
        self.fingerprint: str = meta["fingerprint"]
        self.files: list[list[str]] = [[record["name"], record["sha256"]] for record in meta["files"]]


def _shard_name(index: int) -> str:
    return f"tokens-{index:05}.bin"


def _trained_name(index: int) -> str:
    return f"trained-{index:05}.bin"
