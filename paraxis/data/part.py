"""Tokenising some files into one folder of shards: the work of one process."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paraxis.data.config import DataConfig
from paraxis.data.documents import BadRecords, Piece, Reading, pieces
from paraxis.data.ids import holds_ids, pieces_of_ids
from paraxis.data.shards import ShardWriter
from paraxis.data.sources import Source
from paraxis.data.tokens import Tokenizer

# Text is given to the tokenizer, which works on all cores, in batches of about this size.
BATCH_CHARACTERS = 8 << 20
BATCH_PIECES = 8192


@dataclass
class Part:
    """Files to tokenise, in order, and how. It may be sent to another process."""

    sources: Sequence[Source]
    config: DataConfig
    tokenizer: Tokenizer

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(source.size for source in self.sources)


def make_part(part: Part, folder: Path, told: Callable[[int], None]) -> None:
    """Tokenises the part into `folder`, telling how many bytes of input are done. Raises DataError for data that cannot be read."""
    bad = BadRecords(part.config.on_bad_record)
    items = all_pieces(part.sources, part.config, bad, told, part.tokenizer)
    write_tokens(items, [source.name for source in part.sources], part.config, part.tokenizer, folder, bad)


def write_tokens(
    items: Iterable[tuple[int, Piece]], names: Sequence[str], config: DataConfig, tokenizer: Tokenizer, folder: Path, bad: BadRecords
) -> None:
    """Tokenises pieces of text, each with the number of its file in `names`, into a folder of shards."""
    eos_id = tokenizer.eos_id if config.append_eos else None
    writer = ShardWriter(folder, names, tokenizer.vocab_size, eos_id, masked=config.template is not None)
    try:
        for batch in _batches(items):
            for file, last, (tokens, trained) in _encoded(batch, tokenizer, writer.dtype):
                writer.add(file, tokens, last, trained)
        writer.finish({"tokenizer": tokenizer.sha256, "eos_id": eos_id, "chat": config.chat}, bad.skipped, bad.first)
    finally:
        writer.close()


def all_pieces(
    sources: Sequence[Source], config: DataConfig, bad: BadRecords, told: Callable[[int], None], tokenizer: Tokenizer | None = None
) -> Iterator[tuple[int, Piece]]:
    """The pieces of all files, each with the number of its file; those of token ids need the `tokenizer` they are of."""
    reading, before = Reading(config.text_field, config.template), 0
    for file, source in enumerate(sources):
        found = pieces_of_ids(source, tokenizer) if tokenizer and holds_ids(source) else pieces(source, reading, bad)
        for piece in found:
            yield file, piece
            told(before + min(piece.read, source.size - 1))
        before += source.size
    told(before)


def _batches(items: Iterable[tuple[int, Piece]]) -> Iterator[list[tuple[int, Piece]]]:
    batch, characters = [], 0
    for item in items:
        batch.append(item)
        characters += len(item[1].text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(
    batch: Sequence[tuple[int, Piece]], tokenizer: Tokenizer, dtype: np.dtype
) -> Iterator[tuple[int, bool, tuple[np.ndarray, np.ndarray | None]]]:
    """Of each piece its file, whether its document ends, its tokens, and which of them are to be predicted where not all are."""
    texts = [piece for _, piece in batch if piece.ids is None]
    if any(piece.trained is not None for piece in texts):
        encoded = iter(tokenizer.encode_spans([piece.text for piece in texts], [piece.trained or () for piece in texts], dtype))
    else:
        encoded = ((tokens, None) for tokens in tokenizer.encode_batch([piece.text for piece in texts], dtype))
    for file, piece in batch:
        yield file, piece.last, next(encoded) if piece.ids is None else (piece.ids, None)
