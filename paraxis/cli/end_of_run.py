"""What `paraxis train` says once the run is over: where its state is, how good it is, and what to do with it next."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from paraxis.base.config import redact
from paraxis.base.errors import ParaxisError, StorageError
from paraxis.cli.generate import continuation, prompt_ids, show_continued, spelled
from paraxis.cli.output import show

if TYPE_CHECKING:
    from paraxis.cli.weights import Weights
    from paraxis.train.config import RunConfig

SAMPLE_TOKENS = 100


def show_end(config: "RunConfig", run_dir: Path) -> None:
    """Prints the last checkpoint of the run in `run_dir`, its held-out score, a sample if `train.sample` asks for one, three commands."""
    # Here, so that help does not wait for torch.
    from paraxis.checkpoint.load import newest
    from paraxis.checkpoint.place import checkpoints_of
    from paraxis.cli.weights import open_weights
    from paraxis.observe.folder import RunFolder

    folder = RunFolder(run_dir)
    try:
        path = newest(checkpoints_of(config.checkpoint.folder, run_dir))
    except StorageError as error:  # of a store that does not answer just now; the run has ended well
        show(f"\ncheckpoint: {error}")
        return
    show(f"\ncheckpoint: {path or 'none was saved'}")
    if score := last_score(folder.events_file):
        show(score)
    if path is None:
        return
    weights = open_weights(path, config.model)
    if config.train.sample:
        show("sample:\n")
        _show_sample(config, weights)
    show("\nnext:")
    for command in next_commands(config, run_dir, weights):
        show(f"  {shlex.join(command)}")


def last_score(events: Path) -> str:
    """The newest held-out score in an events file, in words; empty where there is none."""
    found = ""
    for line in events.read_bytes().splitlines() if events.is_file() else ():
        try:
            event = json.loads(line)
            if event["kind"] == "evaluation":
                found = f"held-out loss: {event['loss']:.4f} nats per token over {event['targets']} tokens, after step {event['step']}"
        except (ValueError, KeyError, TypeError):
            continue  # a crash can leave less than a line, and a loss that is not finite is null
    return found


def next_commands(config: "RunConfig", run_dir: Path, weights: "Weights") -> list[list[str]]:
    """Three commands, as words, that the run's checkpoint can be given to."""
    from paraxis.cli.weights import TOKENIZER
    from paraxis.models.registry import to_record

    recipe = [] if to_record(config.model) else ["--recipe", str(run_dir / "config.toml")]
    tokenizer = [] if f"{TOKENIZER}tokenizer.json" in weights.files else ["--tokenizer", "FOLDER"]
    prompt, path = config.train.sample or "The ", str(weights.path)
    data = ",".join(str(redact("paths", name)) for name in config.eval.paths) or "stdlib:heldout"
    return [
        ["paraxis", "generate", path, "--prompt", prompt, *tokenizer, *recipe],
        ["paraxis", "eval", path, "--data", data, *tokenizer, *recipe],
        ["paraxis", "convert", "export", path, str(run_dir / "hugging_face"), *recipe],
    ]


def _show_sample(config: "RunConfig", weights: "Weights") -> None:
    """The run is finished and safe: what keeps a sample from being made is said, and fails nothing."""
    import torch

    from paraxis.base.dtypes import precision
    from paraxis.generate.sample import SamplingConfig

    sampling = SamplingConfig(max_tokens=SAMPLE_TOKENS, seed=config.train.seed)
    try:
        tokenizer = weights.tokenizer(None)
        before = prompt_ids(tokenizer, config.train.sample)
        following = continuation(weights, tokenizer, before, sampling, precision(config.precision).compute)
        show_continued(config.train.sample, spelled(following, tokenizer.decode, before))
    except (ParaxisError, torch.OutOfMemoryError) as error:
        show(f"none could be made: {error}")
