"""Files of token ids that something else has tokenised: NumPy's .npy, or raw .bin as wide as the vocabulary needs."""

from collections.abc import Iterator
from typing import IO, cast

import numpy as np

from paraxis.base.errors import DataError
from paraxis.data.documents import Piece
from paraxis.data.shards import token_dtype
from paraxis.data.sources import Source
from paraxis.data.tokens import Tokenizer

ID_SUFFIXES = (".npy", ".bin")
CHUNK_BYTES = 4 << 20


def holds_ids(source: Source) -> bool:
    """Whether the file's name says that it holds token ids."""
    return source.path.lower().endswith(ID_SUFFIXES)


def pieces_of_ids(source: Source, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The documents in a file; each ends at the tokenizer's end token, which is left out, and the last at the file's end.

    Raises DataError for a file that cannot be read, and for ids that the tokenizer does not have.
    """
    stored, at, unfinished = token_dtype(tokenizer.vocab_size), 0, False
    try:
        with cast(IO[bytes], source.fs.open(source.path, "rb")) as raw:
            dtype = _header(raw) if source.path.lower().endswith(".npy") else stored
            while data := raw.read(CHUNK_BYTES):
                ids = np.frombuffer(data, dtype)
                _check(source, ids, at, tokenizer)
                at += len(ids)
                start = 0
                for end in np.flatnonzero(ids == tokenizer.eos_id).tolist() if tokenizer.eos_id is not None else ():
                    yield Piece("", last=True, read=raw.tell(), ids=ids[start:end].astype(stored))
                    start = end + 1
                unfinished = start < len(ids)
                if unfinished:
                    yield Piece("", last=False, read=raw.tell(), ids=ids[start:].astype(stored))
            if unfinished:
                yield Piece("", last=True, read=raw.tell(), ids=np.empty(0, stored))
    except (OSError, ValueError) as error:
        raise DataError(f"{source.name} cannot be read as token ids: {error}; it may be damaged or not what its name says") from error


def _header(raw: IO[bytes]) -> np.dtype:
    version = np.lib.format.read_magic(raw)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(raw)
    if len(shape) != 1 or dtype.kind not in "iu":
        raise ValueError(f"an array of {dtype} in shape {shape} where one row of integers is needed")
    return dtype


def _check(source: Source, ids: np.ndarray, at: int, tokenizer: Tokenizer) -> None:
    wrong = np.flatnonzero((ids < 0) | (ids >= tokenizer.vocab_size))
    if len(wrong):
        raise DataError(
            f"{source.name}, token {at + wrong[0] + 1}: id {ids[wrong[0]]} is none of the {tokenizer.vocab_size} of {tokenizer.name}; "
            "give the tokenizer that the file was made with"
        )
