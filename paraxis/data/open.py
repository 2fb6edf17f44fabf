"""From the `data` section to rows: one source or a mixture, packed one way or the other."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from paraxis.base.errors import ConfigError
from paraxis.data.config import DataConfig
from paraxis.data.mixture import MixtureRows
from paraxis.data.packing import PackedRows, kept_plan
from paraxis.data.prepare import Progress, load_tokenizer, prepare
from paraxis.data.rows import HeldOutRows, TrainingRows
from paraxis.data.shards import Prepared
from paraxis.data.tokens import Tokenizer


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on, their tokenizer, and how many broken records were left out."""

    rows: TrainingRows | PackedRows | MixtureRows
    tokenizer: Tokenizer
    skipped: int


def open_training(
    config: DataConfig,
    cache: Path,
    *,
    seed: int,
    rows_per_step: Callable[[], int],
    progress: Progress | None = None,
    processes: int = 1,
) -> TrainingData:
    """Tokenises and packs what is not in `cache` yet, and opens it. Any number of ranks may call this at once.

    `rows_per_step` is asked only where a mixture changes at a step. Raises DataError for missing, empty or broken data.
    """
    tokenizer = load_tokenizer(config, cache, progress=progress)
    skipped, opened = 0, {}
    for name, paths in config.sources.items():
        source = replace(config, paths=paths, mixture=())
        prepared = prepare(source, cache, tokenizer=tokenizer, progress=progress, processes=processes)
        skipped += prepared.skipped
        opened[name] = _rows(config, prepared, cache, _seed_of(name, seed))
    if not config.mixture:
        return TrainingData(opened[""], tokenizer, skipped)
    changes = config.changes
    rows = MixtureRows(opened, changes, rows_per_step() if len(changes) > 1 else 1)
    return TrainingData(rows, tokenizer, skipped)


def open_held_out(
    config: DataConfig, paths: tuple[str, ...], cache: Path, tokenizer: Tokenizer, progress: Progress | None = None
) -> HeldOutRows:
    """The text at `paths`, read as `config` reads its own, each token to be predicted once."""
    prepared = prepare(replace(config, paths=paths, mixture=()), cache, tokenizer=tokenizer, progress=progress)
    return HeldOutRows(prepared, seq_len=config.seq_len, document_mask=config.document_mask)


def refuse_repeats(data: TrainingData, rows_in_all: int) -> None:
    """Raises ConfigError where so many rows go over a source more often than data.repeat allows."""
    rows = data.rows
    sources = rows.sources.items() if isinstance(rows, MixtureRows) else [("", rows)]
    counts = rows.read(rows_in_all) if isinstance(rows, MixtureRows) else {"": rows_in_all}
    for name, source in sources:
        allowed, asked = source.repeat * source.length, counts.get(name, 0)
        if source.repeat and asked > allowed:
            raise ConfigError(
                f"the run reads {asked} rows of {f'the source {name}' if name else 'its data'}, but data.repeat={source.repeat} allows "
                f"{allowed} ({source.length} a pass); lower train.steps, give more data, or raise data.repeat (0: any number of passes)"
            )


def _rows(config: DataConfig, prepared: Prepared, cache: Path, seed: int) -> TrainingRows | PackedRows:
    if config.packing == "concatenate":
        return TrainingRows(
            prepared,
            seq_len=config.seq_len,
            document_mask=config.document_mask,
            shuffle=config.shuffle,
            seed=seed,
            repeat=config.repeat,
        )
    return PackedRows(
        prepared,
        kept_plan(prepared, config.seq_len, config.long_documents, cache),
        seq_len=config.seq_len,
        document_mask=config.document_mask,
        shuffle=config.shuffle,
        seed=seed,
        long_documents=config.long_documents,
        repeat=config.repeat,
    )


def _seed_of(name: str, seed: int) -> int:
    """A seed for each source by its name, so that it has the same order whatever it is mixed with."""
    return seed + int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") if name else seed
