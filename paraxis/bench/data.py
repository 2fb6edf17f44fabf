"""What the data cost on their own: rows out of prepared shards, by one reader; and text into tokens, beside the bare tokenizer."""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import tokenizers

from paraxis.base.seams import Rows
from paraxis.bench.rows import Measured, Row
from paraxis.data.config import DataConfig
from paraxis.data.crew import Crew, Maker
from paraxis.data.documents import BadRecords, Reading, pieces
from paraxis.data.loader import Loader
from paraxis.data.mixed_documents import DocumentMixing
from paraxis.data.mixture import Change, MixtureRows
from paraxis.data.open import open_training
from paraxis.data.part import Part
from paraxis.data.pools import ChunkMaker, chunks_of
from paraxis.data.prepare import load_tokenizer, parts_of, prepare
from paraxis.data.rows import TrainingRows
from paraxis.data.shards import read_meta, token_dtype
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
        texts = [] if self.processes else self.texts()
        for _ in range(rounds):
            since_s = time.perf_counter()
            tokens = self._make(folder / "shards") if self.processes else self._encode(texts)
            rates.append(tokens / (time.perf_counter() - since_s))
            shutil.rmtree(folder / "shards", ignore_errors=True)
        return _measured(rates, f"processes: {self.processes}" if self.processes else "", time.perf_counter() - started_s)

    def _make(self, cache: Path) -> int:
        return prepare(self.config, cache, tokenizer=self.tokenizer, processes=self.processes).tokens

    def texts(self) -> list[str]:
        """The text in pieces, as it is given to the tokenizer."""
        bad, reading = BadRecords(self.config.on_bad_record), Reading(self.config.text_field, self.config.template)
        return [piece.text for source in expand(self.config.plain_paths) for piece in pieces(source, reading, bad)]

    def _encode(self, texts: Sequence[str]) -> int:
        dtype = token_dtype(self.tokenizer.vocab_size)
        batches = (texts[first : first + BATCH_TEXTS] for first in range(0, len(texts), BATCH_TEXTS))
        return sum(len(ids) for batch in batches for ids in self.tokenizer.encode_batch(batch, dtype))


@dataclass
class Bare:
    """The bare tokenizer on texts that are in memory, by one of its functions. A job is to encode them all; it tells the tokens."""

    texts: Sequence[str]
    tokenizer: Tokenizer
    function: str

    def __call__(self, job: int) -> int:
        inner = tokenizers.Tokenizer.from_buffer(self.tokenizer.files["tokenizer.json"])
        batches = (self.texts[first : first + BATCH_TEXTS] for first in range(0, len(self.texts), BATCH_TEXTS))
        return sum(len(encoding.ids) for batch in batches for encoding in getattr(inner, self.function)(batch, add_special_tokens=False))


@dataclass
class Repeated:
    """Makes chunks as live tokenising does, again and again. A job is a number counted over all rounds; it tells the chunk's folder."""

    folder: Path
    parts: Sequence[Part]

    def __call__(self, job: int) -> Path:
        turn, number = divmod(job, len(self.parts))
        return ChunkMaker(self.folder / f"{turn}", self.parts)(number)


@dataclass(frozen=True)
class Background:
    """A row of work in processes beside the one that trains, each of one thread. `make` is given an empty folder to work in."""

    row: Row
    make: Callable[[Path], Maker]
    jobs: int  # in a round
    processes: int
    tokens: Callable[[Any], int]  # in what a job returns

    def measure(self, folder: Path, rounds: int) -> Measured:
        """Does all jobs `rounds` times, without a pause between; what starts the processes is not counted."""
        started_s, rates = time.perf_counter(), []
        with closing(Crew(self.make(folder), self.processes)) as crew:
            # As many as there are processes, so that all have started.
            for wait in (crew.ask, crew.get):
                for job in range(self.processes):
                    wait(job)
            jobs = [range(first, first + self.jobs) for first in range(self.processes, self.processes + rounds * self.jobs, self.jobs)]
            for job in (job for round in jobs for job in round):
                crew.ask(job)
            for round in jobs:
                since_s = time.perf_counter()
                tokens = sum(self.tokens(crew.get(job)) for job in round)
                rates.append(tokens / (time.perf_counter() - since_s))
        return _measured(rates, f"processes: {self.processes}", time.perf_counter() - started_s)


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
        sources, changes = dict.fromkeys(SHARES, first), [Change(0, SHARES)]
        mixed = MixtureRows(sources, changes, 1)
        found.append(Reader(_row("paraxis", "rows, mixture of three", "reading", config), lambda: mixed))
        if isinstance(first, TrainingRows):
            mixing = DocumentMixing(dict.fromkeys(SHARES, first), seq_len=config.seq_len, document_mask=False)
            documents = MixtureRows(sources, changes, 1, mixing)
            found.append(Reader(_row("paraxis", "documents, mixture of three", "reading", config), lambda: documents))
    return found


def tokenisers(config: DataConfig, cache: Path, processes: int) -> list[Tokenising | Background]:
    """The bare tokenizer on all cores and on one; shards made ahead by one process and by at most `processes`, no more than the data
    have parts; and chunks made live by one process and by two or `processes`, each of one thread.
    """
    plain = config.unmixed(config.plain_paths)
    tokenizer = load_tokenizer(plain, cache)
    numbers = sorted({1, min(processes, len(parts_of(expand(plain.paths))))})
    bare = Tokenising(_row("tokenizers", "encode_batch_fast", "tokenising", config), plain, tokenizer, 0)
    ahead = [Tokenising(_row("paraxis", "text to shards", "tokenising", config), plain, tokenizer, number) for number in numbers]
    texts = bare.texts()
    alone = [
        Background(
            row=_row("tokenizers", f"{function}, one thread", "tokenising", config),
            make=lambda folder, function=function: Bare(texts, tokenizer, function),
            jobs=1,
            processes=1,
            tokens=int,
        )
        for function in ("encode_batch", "encode_batch_fast")
    ]
    return [bare, *alone, *ahead, *(_live(config, plain, tokenizer, number) for number in sorted({1, max(2, processes)}))]


def _live(config: DataConfig, plain: DataConfig, tokenizer: Tokenizer, processes: int) -> Background:
    """Chunks of the text, over and over, as live tokenising makes them."""
    chunks = chunks_of(expand(plain.paths))
    return Background(
        row=_row("paraxis", "live", "tokenising", config),
        make=lambda folder: Repeated(folder, [Part(chunk, plain, tokenizer) for chunk in chunks]),
        jobs=len(chunks),
        processes=processes,
        tokens=lambda folder: read_meta(folder)["tokens"],
    )


def _row(system: str, name: str, work: str, config: DataConfig) -> Row:
    # What in other benchmarks is the model: only rows that do the same work are compared.
    return Row(system=system, name=name, options="", model=work, seq_len=config.seq_len, batch=MICRO_BATCH)


def _measured(rates: Sequence[float], layout: str, wall_s: float) -> Measured:
    return Measured(layout=layout, ranks=None, precision="", tokens_per_s=rates, wall_s=wall_s)
