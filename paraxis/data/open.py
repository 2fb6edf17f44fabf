"""From the `data` section to rows: one source or a mixture, packed one way or the other."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from paraxis.base.env import cores
from paraxis.base.errors import ConfigError
from paraxis.data.config import DataConfig
from paraxis.data.hub import DATASET, read_name
from paraxis.data.ids import holds_ids
from paraxis.data.live import LiveRows
from paraxis.data.mixed_documents import DocumentMixing
from paraxis.data.mixture import Mixing, MixtureRows, RowMixing
from paraxis.data.packing import PackedRows, kept_plan
from paraxis.data.pools import FilePools, Pools, StreamPools
from paraxis.data.prepare import Progress, check_tokenizer, load_tokenizer, prepare, prepared_folder
from paraxis.data.rows import HeldOutRows, TrainingRows
from paraxis.data.shards import Prepared
from paraxis.data.sources import expand
from paraxis.data.tokens import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on, and their tokenizer."""

    rows: TrainingRows | PackedRows | LiveRows | MixtureRows
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Live:
    """Who reads what is tokenised live: `owner` is the same for all ranks of a run and for no other, `leads` holds for one rank a host."""

    owner: str = ""
    leads: bool = True


ALONE = Live()


def open_training(
    config: DataConfig,
    cache: Path,
    *,
    seed: int,
    rows_per_step: Callable[[], int],
    progress: Progress | None = None,
    processes: int = 1,
    live: Live = ALONE,
) -> TrainingData:
    """Tokenises and packs what is not in `cache` yet, and opens it. Any number of ranks may call this at once.

    With data.tokenize=live text is left to the processes of the rank that `live` has lead; `close_rows` ends them.

    `rows_per_step` is asked only where a mixture changes at a step. Raises DataError for missing, empty or broken data.
    """
    tokenizer = load_tokenizer(config, cache, progress=progress)
    opened: dict[str, TrainingRows | PackedRows | LiveRows] = {}
    for name, paths in config.sources.items():
        source = config.unmixed(paths)
        if (pools := _pools(source, cache, tokenizer, _seed_of(name, seed), live)) is not None:
            opened[name] = LiveRows(pools, source, _seed_of(name, seed))
            continue
        prepared = prepare(source, cache, tokenizer=tokenizer, progress=progress, processes=processes)
        opened[name] = _rows(config, prepared, cache, _seed_of(name, seed))
    if not config.mixture:
        return TrainingData(opened[""], tokenizer)
    changes = config.changes
    rows = MixtureRows(opened, changes, rows_per_step() if len(changes) > 1 else 1, _mixing(config, opened))
    return TrainingData(rows, tokenizer)


def _mixing(config: DataConfig, opened: Mapping[str, TrainingRows | PackedRows | LiveRows]) -> Mixing:
    """Of rows or of documents: as data.mixture_of says, or what is closer to the weights."""
    ends_known = {name: rows for name, rows in opened.items() if isinstance(rows, TrainingRows)}
    if live := sorted(opened.keys() - ends_known.keys()):
        if config.mixture_of == "documents":
            raise ConfigError(
                f"data.mixture_of=documents has to know where all documents end, and the source {live[0]} is tokenised while training; "
                "set data.tokenize=ahead or data.mixture_of=rows"
            )
        return RowMixing(opened)
    if config.mixture_of == "rows":
        return RowMixing(opened)
    mixing = DocumentMixing(ends_known, seq_len=config.seq_len, document_mask=config.document_mask)
    if config.mixture_of == "auto":
        of = "documents" if mixing.longest < config.seq_len else "rows"
        log.info("data.mixture_of: auto chose %s: the longest document has %d tokens, a row %d", of, mixing.longest, config.seq_len)
        if of == "rows":
            return RowMixing(opened)
    for change in config.changes:
        log.info("from step %d on no source is more than %.0f tokens from its share", change.step, mixing.furthest(change))
    return mixing


def open_held_out(
    config: DataConfig, paths: tuple[str, ...], cache: Path, tokenizer: Tokenizer, progress: Progress | None = None
) -> HeldOutRows:
    """The text at `paths`, read as `config` reads its own, each token to be predicted once."""
    if stream := next((path for path in paths if path.startswith(DATASET) and read_name(path).stream), None):
        raise ConfigError(f"eval.paths: {stream} is a stream, and held-out data are read again and again; leave stream=true out")
    config = replace(config.unmixed(paths), tokenize="ahead", workers=0)
    prepared = prepare(config, cache, tokenizer=tokenizer, progress=progress)
    return HeldOutRows(prepared, seq_len=config.seq_len, document_mask=config.document_mask)


def refuse_repeats(data: TrainingData, rows_in_all: int) -> None:
    """Raises ConfigError where so many rows go over a source more often than data.repeat allows, by rows or tokens as it is mixed.

    Rows that are made live have no length yet: they are refused where the pass too many begins.
    """
    rows = data.rows
    sources = rows.sources.items() if isinstance(rows, MixtureRows) else [("", rows)]
    counts = rows.read(rows_in_all) if isinstance(rows, MixtureRows) else {"": rows_in_all}
    unit = "tokens" if isinstance(rows, MixtureRows) and rows.mixing.of == "documents" else "rows"
    for name, source in sources:
        length = rows.mixing.pass_length(name) if isinstance(rows, MixtureRows) else source.length
        allowed, asked = source.repeat * length, counts.get(name, 0)
        if source.repeat and length and asked > allowed:
            raise ConfigError(
                f"the run reads {asked} {unit} of {f'the source {name}' if name else 'its data'}, but data.repeat={source.repeat} allows "
                f"{allowed} ({length} a pass); lower train.steps, give more data, or raise data.repeat (0: any number of passes)"
            )


def _pools(config: DataConfig, cache: Path, tokenizer: Tokenizer, seed: int, live: Live) -> Pools | None:
    """The text of one source, to be tokenised live; None where that is not asked for, or it consists of tokens already."""
    if config.tokenize != "live" or prepared_folder(config) is not None:
        return None
    workers = (config.workers or max(1, cores() // 4)) if live.leads else 0
    (path, *others) = config.plain_paths
    if not others and path.startswith(DATASET) and read_name(path).stream:
        check_tokenizer(config, tokenizer)
        return StreamPools(config, path, tokenizer, cache, owner=live.owner, workers=workers)
    sources = expand(config.plain_paths)
    if all(map(holds_ids, sources)):
        return None
    check_tokenizer(config, tokenizer)
    return FilePools(config, sources, tokenizer, cache, seed=seed, owner=live.owner, workers=workers)


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
