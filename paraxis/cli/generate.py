"""`paraxis generate`: text that continues a prompt, shown as it is made."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from paraxis.base.errors import ConfigError
from paraxis.cli.arguments import Arguments, parse_strictly
from paraxis.cli.output import show

if TYPE_CHECKING:
    import torch

    from paraxis.cli.weights import Weights
    from paraxis.data.tokens import Tokenizer
    from paraxis.generate.sample import SamplingConfig

SAMPLING = ("max-tokens", "temperature", "top-k", "top-p", "seed")
OPTIONS = ("prompt", *SAMPLING, "precision", "tokenizer", "recipe")
FLAGS = ("json", "debug", "help")

HELP = """\
usage: paraxis generate CKPT --prompt TEXT [options]

Continues a text, token by token, until the model ends it or --max-tokens are made. CKPT is a checkpoint of ours, a run's
folder (its newest checkpoint), or a Hugging Face folder. A GPU is used where there is one.

  --prompt TEXT      the text to continue
  --max-tokens N     tokens to add at most (default: 100)
  --temperature X    logits are divided by it; 0 takes the likeliest token (default: 0.8)
  --top-k N          choose among the N likeliest tokens; 0 means all (default: 0)
  --top-p X          choose among the fewest likeliest tokens that hold this much probability (default: 1.0)
  --seed N           seed of the choices (default: 0)
  --precision NAME   fp32 (default), bf16 or fp64
  --tokenizer PATH   a tokenizer.json or its folder, instead of the one that came with the weights
  --recipe RECIPE    the recipe whose model this is, for a model that is not built in
  --json             print {"prompt": ..., "text": what follows it, "tokens": how many} at the end
  --debug            show tracebacks of errors

examples:
  paraxis generate runs/demo --prompt "def "
  paraxis generate runs/demo/checkpoints/step-100 --prompt "import " --temperature 0 --max-tokens 20
  paraxis generate path/to/Llama-3.2-1B --prompt "The capital of France is" --precision bf16 --json
  paraxis generate runs/mine --prompt "Once" --recipe my.py:small
"""

CONTEXT = 8  # tokens before a new one that may change how it is spelled


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit code. Raises ParaxisError for what is refused or fails."""
    parsed = parse_strictly("generate", arguments, ["one checkpoint"], OPTIONS, FLAGS)
    if "help" in parsed.flags:
        print(HELP, end="")
        return 0
    if "prompt" not in parsed.options:
        raise ConfigError('generate needs a text to continue, as in --prompt="def "')
    _generate(parsed)
    return 0


def _generate(parsed: Arguments) -> None:
    # Here, so that help does not wait for torch.
    from paraxis.base.config import override
    from paraxis.base.dtypes import scoring_dtype
    from paraxis.cli.weights import open_weights, recipe_model
    from paraxis.generate.sample import SamplingConfig

    options, prompt = parsed.options, parsed.options["prompt"]
    sampling = override(SamplingConfig(), {name.replace("-", "_"): options[name] for name in SAMPLING if name in options})
    dtype = scoring_dtype(options.get("precision", "fp32"))
    weights = open_weights(parsed.names[0], recipe_model(options.get("recipe")))
    tokenizer = weights.tokenizer(options.get("tokenizer"))
    before = prompt_ids(tokenizer, prompt)
    following = continuation(weights, tokenizer, before, sampling, dtype)
    if "json" in parsed.flags:
        made = list(following)
        text = "".join(spelled(made, tokenizer.decode, before))
        print(json.dumps({"prompt": prompt, "text": text, "tokens": len(made)}))
    else:
        show_continued(prompt, spelled(following, tokenizer.decode, before))


def prompt_ids(tokenizer: "Tokenizer", prompt: str) -> list[int]:
    """The tokens of `prompt`, with the start token where the tokenizer puts one. Raises ConfigError where there are none."""
    if ids := tokenizer.encode(prompt, special_tokens=True):
        return ids
    raise ConfigError(f"the prompt {prompt!r} has no tokens; give some text, as in --prompt='def '")


def continuation(
    weights: "Weights", tokenizer: "Tokenizer", before: Sequence[int], sampling: "SamplingConfig", dtype: "torch.dtype"
) -> Iterator[int]:
    """The tokens that follow those of `before`, up to the one that ends a text. Raises ConfigError for a model that cannot predict."""
    import torch

    from paraxis.generate.engine import generate
    from paraxis.parallel.world import this_device

    device = this_device(0)
    model = weights.load(device, dtype)
    if not hasattr(model, "logits"):
        raise ConfigError(
            f"{type(model).__name__} cannot be generated from: give it a method logits(tokens_bt), what it predicts at each place"
        )
    prompt_bt = torch.tensor([list(before)], device=device.torch)
    return (int(token_b) for token_b in generate(model, prompt_bt, sampling, weights.stop_ids(tokenizer)))  # type: ignore[arg-type]


def spelled(ids: Iterable[int], decode: Callable[[Sequence[int]], str], before: Sequence[int]) -> Iterator[str]:
    """The text of `ids`, each part as soon as its last character is whole. `before` are the tokens that precede them.

    Neighbours are decoded together: some tokenizers drop a space at the beginning, and a character may span tokens.
    """
    window = list(before)[-CONTEXT:]
    done = len(decode(window))
    for token in ids:
        window.append(token)
        text = decode(window)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue  # the rest of a character is yet to come
        yield text[done:]
        window = window[-CONTEXT:]
        done = len(decode(window))
    if rest := decode(window)[done:]:
        yield rest


def show_continued(prompt: str, pieces: Iterable[str]) -> None:
    """Prints `prompt`, and `pieces` as they come."""
    reading = show(prompt, end="")
    for piece in pieces:
        if not reading:
            return
        reading = show(piece, end="")
    show("")
