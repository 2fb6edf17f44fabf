"""From files to tokenised shards, once: later calls, other ranks and other runs on the same data only map them."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from paraxis.base.errors import DataError
from paraxis.data.cache import made_once
from paraxis.data.config import DataConfig
from paraxis.data.documents import BadRecords, Piece, pieces
from paraxis.data.shards import FORMAT, Prepared, ShardWriter
from paraxis.data.sources import Source, expand, without_secrets
from paraxis.data.tokens import Tokenizer, train_tokenizer

log = logging.getLogger(__name__)

# Text is given to the tokenizer, which works on all cores, in batches of about this size.
BATCH_CHARACTERS = 8 << 20
BATCH_PIECES = 8192
REPORT_BYTES = 1 << 20
# Merges hardly change with more text than this, and training keeps every distinct word in memory.
TOKENIZER_TRAINING_CHARACTERS = 1 << 30

Progress = Callable[[str, int, int], None]  # what is being done, bytes of input done, bytes of input in all


def prepare(config: DataConfig, cache: Path, *, tokenizer: Tokenizer | None = None, progress: Progress | None = None) -> Prepared:
    """The tokens of `config.paths`, from `cache` or made into it; held-out data is given the training data's `tokenizer`.

    Every rank may call this at once: one does the work. Raises DataError for missing, empty or broken data, and
    StorageError where the cache cannot be written.
    """
    sources = expand(config.paths)
    tokenizer = tokenizer or load_tokenizer(config, cache, progress=progress)
    eos_id = tokenizer.eos_id if config.append_eos else None
    if config.append_eos and eos_id is None:
        log.warning("%s names no end token, so documents follow each other without one", tokenizer.name)
    key = _key(config, sources, tokenizer=tokenizer.sha256, eos_id=eos_id)
    folder = made_once(cache, f"tokens-{key}", lambda partial: _tokenise(config, sources, tokenizer, eos_id, partial, progress))
    return Prepared(folder, tokenizer)


def load_tokenizer(config: DataConfig, cache: Path, *, progress: Progress | None = None) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names, trained on `config.paths` (the first GiB of it) if that is what it asks."""
    if config.entries_to_train is None:
        return Tokenizer.load(config.tokenizer)
    entries, sources = config.entries_to_train, expand(config.paths)

    def make(partial: Path) -> None:
        bad = BadRecords(config.on_bad_record)
        texts = _limited(piece.text for _, piece in _all_pieces(config, sources, bad, "training the tokenizer", progress))
        trained = train_tokenizer((text for text in texts if text), entries)
        for name, data in trained.files.items():
            (partial / name).write_bytes(data)

    return Tokenizer.load(made_once(cache, f"tokenizer-{_key(config, sources, entries=entries)}", make))


def _key(config: DataConfig, sources: Sequence[Source], **settings: Any) -> str:
    """A name for these files as they are now and what is done to them, without reading them."""
    made_from = {
        "format": FORMAT,
        "sources": [(source.name, source.path, source.size, source.version) for source in sources],
        "text_field": config.text_field,
        "on_bad_record": config.on_bad_record,
        **settings,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:24]


def _tokenise(
    config: DataConfig, sources: Sequence[Source], tokenizer: Tokenizer, eos_id: int | None, partial: Path, progress: Progress | None
) -> None:
    bad = BadRecords(config.on_bad_record)
    writer = ShardWriter(partial, [source.name for source in sources], tokenizer.vocab_size, eos_id)
    try:
        for batch in _batches(_all_pieces(config, sources, bad, "tokenising", progress)):
            encoded = tokenizer.encode_batch([piece.text for _, piece in batch], writer.dtype)
            for (file, piece), tokens in zip(batch, encoded, strict=True):
                writer.add(file, tokens, piece.last)
        if not any(record.documents for record in writer.files):
            skipped = f", and {bad.skipped} broken records left out" if bad.skipped else ""
            raise DataError(f"data.paths: no text in {_named(config.paths)} ({len(sources)} files{skipped}); give files that hold text")
        writer.finish({"tokenizer": tokenizer.sha256, "eos_id": eos_id}, bad.skipped)
    finally:
        writer.close()


def _all_pieces(
    config: DataConfig, sources: Sequence[Source], bad: BadRecords, what: str, progress: Progress | None
) -> Iterator[tuple[int, Piece]]:
    """The pieces of all sources, each with the number of its source; reports how far it has read about once a MiB."""
    total, before, reported = sum(source.size for source in sources), 0, 0
    for file, source in enumerate(sources):
        for piece in pieces(source, config.text_field, bad):
            yield file, piece
            done = before + piece.read
            if progress and done - reported >= REPORT_BYTES:
                progress(what, done, total)
                reported = done
        before += source.size
    if progress:
        progress(what, total, total)


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


def _limited(texts: Iterable[str]) -> Iterator[str]:
    """The texts, until there have been enough to train a tokenizer on."""
    characters = 0
    for text in texts:
        if characters >= TOKENIZER_TRAINING_CHARACTERS:
            return
        characters += len(text)
        yield text


def _named(paths: Sequence[str]) -> str:
    return ", ".join(map(without_secrets, paths))
