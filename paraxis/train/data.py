"""Opening a run's data: the rows to train on, those held out, and the tokenizer that checkpoints carry."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from paraxis.base.errors import ConfigError
from paraxis.base.seams import Rows
from paraxis.data.config import DataConfig
from paraxis.data.prepare import Progress, prepare
from paraxis.data.rows import HeldOutRows, TrainingRows
from paraxis.data.tokens import Tokenizer, check_vocabulary
from paraxis.train.config import RunConfig


@dataclass(frozen=True)
class OpenedData:
    """`files` are the tokenizer's, by name, as a checkpoint stores them; `skipped` counts broken records left out."""

    rows: Rows
    held_out: Rows | None
    files: Mapping[str, bytes]
    tokenizer: Tokenizer | None
    skipped: int = 0


def open_data(config: RunConfig, cache: Path, progress: Progress | None = None) -> OpenedData:
    """Tokenises what is not in `cache` yet and opens it. Any number of ranks may call this at once.

    Raises DataError for missing, empty or broken data, ConfigError for a tokenizer larger than the model's vocabulary.
    """
    data = config.data
    if not isinstance(data, DataConfig):
        if not hasattr(data, "rows"):
            raise ConfigError(f"data={type(data).__name__} is neither a DataConfig nor has rows(seed); see base/seams.py:RowsConfig")
        return OpenedData(data.rows(config.train.seed), data.held_out() if config.eval.every else None, {}, None)
    prepared = prepare(data, cache, progress=progress)
    check_vocabulary(prepared.tokenizer.vocab_size, config.model.vocab_size)
    rows = TrainingRows(prepared, seq_len=data.seq_len, document_mask=data.document_mask, shuffle=data.shuffle, seed=config.train.seed)
    held_out = None
    if config.eval.every:
        kept = prepare(replace(data, paths=config.eval.paths), cache, tokenizer=prepared.tokenizer, progress=progress)
        held_out = HeldOutRows(kept, seq_len=data.seq_len, document_mask=data.document_mask)
    files = {f"tokenizer/{name}": content for name, content in prepared.tokenizer.files.items()}
    return OpenedData(rows, held_out, files, prepared.tokenizer, prepared.skipped)
