"""Opening a run's data: the rows to train on, those held out, and the tokenizer that checkpoints carry."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paraxis.base.errors import ConfigError
from paraxis.base.seams import Rows
from paraxis.data.config import DataConfig
from paraxis.data.open import ALONE, Live, open_held_out, open_training, refuse_repeats
from paraxis.data.prepare import Progress
from paraxis.data.record import close_rows
from paraxis.data.tokens import Tokenizer, check_vocabulary
from paraxis.train.config import RunConfig


@dataclass(frozen=True)
class OpenedData:
    """`files` are the tokenizer's, by name, as a checkpoint stores them."""

    rows: Rows
    held_out: Rows | None
    files: Mapping[str, bytes]
    tokenizer: Tokenizer | None

    def close(self) -> None:
        """Ends what tokenises in the background."""
        close_rows(self.rows)


def open_data(config: RunConfig, cache: Path, ranks: int, progress: Progress | None = None, live: Live = ALONE) -> OpenedData:
    """Tokenises what is not in `cache` yet and opens it. Any number of ranks may call this at once; close it in the end.

    Raises DataError for missing, empty or broken data, ConfigError for a tokenizer larger than the model's vocabulary and for a run
    on `ranks` that reads its data more often than it may.
    """
    data = config.data
    if not isinstance(data, DataConfig):
        if not hasattr(data, "rows"):
            raise ConfigError(f"data={type(data).__name__} is neither a DataConfig nor has rows(seed); see base/seams.py:RowsConfig")
        return OpenedData(data.rows(config.train.seed), data.held_out() if config.eval.every else None, {}, None)

    def rows_per_step() -> int:
        return config.rows_per_step(config.parallel.degrees.filling(ranks))

    opened = open_training(data, cache, seed=config.train.seed, rows_per_step=rows_per_step, progress=progress, live=live)
    check_vocabulary(opened.tokenizer.vocab_size, config.model.vocab_size)
    if data.repeat:
        refuse_repeats(opened, config.train.steps * rows_per_step())
    held_out = open_held_out(data, config.eval.paths, cache, opened.tokenizer, progress) if config.eval.every else None
    files = {f"tokenizer/{name}": content for name, content in opened.tokenizer.files.items()}
    return OpenedData(opened.rows, held_out, files, opened.tokenizer)
