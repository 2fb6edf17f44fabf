"""`paraxis eval`: the loss that a model has on text."""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from paraxis.base.env import read_environment
from paraxis.base.errors import CheckpointError, ConfigError, DataError
from paraxis.cli.arguments import Arguments, parse_strictly, whole_number

if TYPE_CHECKING:
    from paraxis.base.seams import Batch
    from paraxis.cli.weights import Weights

OPTIONS = ("data", "seq-len", "batch", "precision", "text-field", "tokenizer", "recipe")
FLAGS = ("json", "debug", "help")
LONGEST_WINDOW = 2048  # unless asked for, where nothing says what the model was trained with
BATCH = 4
BEYOND_NATS = 700.0  # its exponential leaves fp64

HELP = f"""\
usage: paraxis eval CKPT --data FILES [options]

Scores text with a model: the mean loss in nats per target token, the perplexity (its exponential), and how many tokens
were targets. CKPT is a checkpoint of ours, a run's folder (its newest checkpoint), or a Hugging Face folder.

The tokens are exactly those that the tokenizer gives for the text: nothing is put before or after a document. A text file
is a document; so is a line of JSONL and a row of Parquet. Windows of --seq-len tokens follow each other and overlap by one
token, so that each token but the first is predicted exactly once, from what precedes it in its window. Where there are
several documents they are laid end to end, and each is kept to itself: it sees no other, and its first token is no target.

  --data FILES       text, .jsonl or .parquet files: paths, globs or URLs, with commas between them
  --seq-len N        tokens of a window (default: what the model was trained with; else {LONGEST_WINDOW} or what it can)
  --batch N          windows at a time (default: {BATCH})
  --precision NAME   fp32 (default), bf16 or fp64
  --text-field NAME  the field or column that holds the text (default: text)
  --tokenizer PATH   a tokenizer.json or its folder, instead of the one that came with the weights
  --recipe RECIPE    the recipe whose model this is, for a model that is not built in
  --json             print {{"loss": ..., "perplexity": ..., "tokens": ...}}
  --debug            show tracebacks of errors

examples:
  paraxis eval runs/demo --data stdlib:heldout
  paraxis eval runs/demo/checkpoints/step-100 --data notes.txt --json
  paraxis eval path/to/Llama-3.2-1B --data 'corpus/*.jsonl' --seq-len 4096 --precision bf16
  paraxis eval runs/mine --data notes.txt --recipe my.py:small
"""


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit code. Raises ParaxisError for what is refused or fails."""
    parsed = parse_strictly("eval", arguments, ["one checkpoint"], OPTIONS, FLAGS)
    if "help" in parsed.flags:
        print(HELP, end="")
        return 0
    if "data" not in parsed.options:
        raise ConfigError("eval needs the text to score, as in --data=notes.txt")
    loss, tokens = _evaluate(parsed)
    perplexity = math.exp(loss)
    if "json" in parsed.flags:
        print(json.dumps({"loss": loss, "perplexity": perplexity, "tokens": tokens}))
    else:
        print(f"loss {loss:.4f} nats per token, perplexity {perplexity:.4g}, over {tokens} tokens")
    return 0


def _evaluate(parsed: Arguments) -> tuple[float, int]:
    """The mean loss in nats per target, and the number of targets."""
    # Here, so that help does not wait for torch.
    from paraxis.base.dtypes import scoring_dtype
    from paraxis.cli.weights import open_weights, recipe_model
    from paraxis.data.config import DataConfig
    from paraxis.data.loader import evaluation_batches
    from paraxis.data.prepare import prepare
    from paraxis.data.rows import HeldOutRows
    from paraxis.generate.score import score
    from paraxis.parallel.world import this_device

    options = parsed.options
    dtype = scoring_dtype(options.get("precision", "fp32"))
    batch = whole_number("batch", options.get("batch", str(BATCH)), 1)
    weights = open_weights(parsed.names[0], recipe_model(options.get("recipe")))
    seq_len = whole_number("seq-len", options["seq-len"], 1) if "seq-len" in options else _window(weights)
    paths = tuple(path.strip() for path in options["data"].split(",") if path.strip())
    data = DataConfig(paths=paths, seq_len=seq_len, text_field=options.get("text-field", "text"), append_eos=False)
    prepared = prepare(data, read_environment().cache_dir, tokenizer=weights.tokenizer(options.get("tokenizer")))
    # One document needs no mask to keep it to itself, and kernels are faster without one.
    rows = HeldOutRows(prepared, seq_len=seq_len, document_mask=prepared.documents > 1)
    batch = min(batch, rows.length)
    device = this_device(0)
    model = weights.load(device, dtype)
    batches = evaluation_batches(rows, batch, 0, 1)
    shown = _counted(batches, -(-rows.length // batch)) if sys.stderr.isatty() else batches
    total, count = score(model, (batch.to(device.torch) for batch in shown))
    targets = int(count)
    if not targets:
        raise DataError(f"no document in {options['data']} has two tokens, so there is nothing to predict; give more text")
    loss = float(total) / targets
    if not loss < BEYOND_NATS:  # nor is NaN
        raise CheckpointError(
            f"{weights.path} has a loss of {loss} nats per token in {dtype}: its weights do not hold up there; try another --precision"
        )
    return loss, targets


def _window(weights: "Weights") -> int:
    """How many tokens a window has unless asked for: as in training where that is known, else what the model is made for."""
    if (trained := weights.trained_seq_len) is not None:
        return trained
    return min(LONGEST_WINDOW, getattr(weights.config, "max_seq_len", LONGEST_WINDOW))


def _counted(batches: "Iterable[Batch]", count: int) -> "Iterator[Batch]":
    """`batches`, counted in a line of the terminal."""
    for number, batch in enumerate(batches, start=1):
        print(f"\rbatch {number} of {count}", end="", file=sys.stderr, flush=True)
        yield batch
    print("\r\033[K", end="", file=sys.stderr, flush=True)
