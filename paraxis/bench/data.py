"""What the data cost on their own: rows out of prepared shards, by one reader; and text into shards, beside the bare tokenizer."""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from paraxis.base.seams import Rows
from paraxis.bench.rows import Measured, Row
from paraxis.data.config import DataConfig
from paraxis.data.documents import BadRecords, Reading, pieces
from paraxis.data.loader import Loader
from paraxis.data.mixture import Change, MixtureRows
from paraxis.data.open import open_training
from paraxis.data.prepare import load_tokenizer, parts_of, prepare
from paraxis.data.shards import token_dtype
from paraxis.data.sources import expand
from paraxis.data.tokens import Tokenizer

MICRO_BATCH = 8
LEAST_S = 0.2  # of one measurement
SHARES = {"half": Fraction(5, 10), "third": Fraction(3, 10), "rest": Fraction(2, 10)}  # of a mixture of the same data three times
BATCH_TEXTS = 1024


@dataclass(frozen=True)
class Reader:
    """A row of the benchmark that reads training rows: the micro-batches of one data rank, as the training loop gets them."""

    row: Row
    open: Callable[[], Rows]

    def measure(self, folder: Path, rounds: int) -> Measured:
        """Reads for `rounds` times LEAST_S after a first step that is not counted."""
        started_s, rates = time.perf_counter(), []
        loader = Loader(self.open(), micro_batch=MICRO_BATCH, data_rank=0, data_ranks=1, rows_per_step=MICRO_BATCH, start_row=0, pin=False)
        with closing(loader):
            next(loader)
            for _ in range(rounds):
                steps, since_s = 0, time.perf_counter()
                while (elapsed_s := time.perf_counter() - since_s) < LEAST_S or not steps:
                    next(loader)
                    steps += 1
                rates.append(steps * MICRO_BATCH * self.row.seq_len / elapsed_s)
        return _measured(rates, "one reader", time.perf_counter() - started_s)


@dataclass(frozen=True)
class Tokenising:
    """A row that makes shards of the text, in `processes`; in none, only the tokenizer is called, on texts that are in memory."""

    row: Row
    config: DataConfig
    tokenizer: Tokenizer
    processes: int

    def measure(self, folder: Path, rounds: int) -> Measured:
        """Tokenises all of the text, `rounds` times."""
        started_s, rates = time.perf_counter(), []
        texts = [] if self.processes else self._texts()
        for _ in range(rounds):
            since_s = time.perf_counter()
            tokens = self._make(folder / "shards") if self.processes else self._encode(texts)
            rates.append(tokens / (time.perf_counter() - since_s))
            shutil.rmtree(folder / "shards", ignore_errors=True)
        return _measured(rates, f"processes: {self.processes}" if self.processes else "", time.perf_counter() - started_s)

    def _make(self, cache: Path) -> int:
        return prepare(self.config, cache, tokenizer=self.tokenizer, processes=self.processes).tokens

    def _texts(self) -> list[str]:
        bad, reading = BadRecords(self.config.on_bad_record), Reading(self.config.text_field, self.config.template)
        return [piece.text for source in expand(self.config.plain_paths) for piece in pieces(source, reading, bad)]

    def _encode(self, texts: Sequence[str]) -> int:
        dtype = token_dtype(self.tokenizer.vocab_size)
        batches = (texts[first : first + BATCH_TEXTS] for first in range(0, len(texts), BATCH_TEXTS))
        return sum(len(ids) for batch in batches for ids in self.tokenizer.encode_batch(batch, dtype))


def readers(config: DataConfig, cache: Path) -> list[Reader]:
    """Rows of the data packed one way and the other, and of a mixture. The data are prepared in `cache` first."""
    kinds = {
        "rows, concatenated": replace(config, packing="concatenate", long_documents="split", document_mask=False),
        "rows, concatenated, masked": replace(config, packing="concatenate", long_documents="split", document_mask=True),
        "rows, best fit, masked": replace(config, packing="best_fit", document_mask=True),
    }
    opened = {name: open_training(kind, cache, seed=0, rows_per_step=lambda: 1).rows for name, kind in kinds.items()}
    found = [Reader(_row("paraxis", name, "reading", config), lambda rows=rows: rows) for name, rows in opened.items()]
    first = next(iter(opened.values()))
    if not isinstance(first, MixtureRows):
        mixed = MixtureRows(dict.fromkeys(SHARES, first), [Change(0, SHARES)], 1)
        found.append(Reader(_row("paraxis", "rows, mixture of three", "reading", config), lambda: mixed))
    return found


def tokenisers(config: DataConfig, cache: Path, processes: int) -> list[Tokenising]:
    """The bare tokenizer, and shards made by one process and by at most `processes`: no more than the data have parts."""
    plain = replace(config, paths=config.plain_paths, mixture=())
    tokenizer = load_tokenizer(plain, cache)
    numbers = sorted({1, min(processes, len(parts_of(expand(plain.paths))))})
    bare = Tokenising(_row("tokenizers", "encode_batch", "tokenising", config), plain, tokenizer, 0)
    return [bare, *(Tokenising(_row("paraxis", "text to shards", "tokenising", config), plain, tokenizer, number) for number in numbers)]


def _row(system: str, name: str, work: str, config: DataConfig) -> Row:
    # What in other benchmarks is the model: only rows that do the same work are compared.
    return Row(system=system, name=name, options="", model=work, seq_len=config.seq_len, batch=MICRO_BATCH)


def _measured(rates: Sequence[float], layout: str, wall_s: float) -> Measured:
    return Measured(layout=layout, ranks=None, precision="", tokens_per_s=rates, wall_s=wall_s)
