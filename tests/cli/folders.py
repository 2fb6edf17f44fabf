"""Small models on disk for the tests of this room: a Hugging Face folder that transformers wrote, a run's checkpoint, a text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

from paraxis.base.layout import whole_box
from paraxis.checkpoint.save import Piece, save
from paraxis.cli import main
from paraxis.data.tokens import Tokenizer, train_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "naïve", "seven", "wizards", "brew", "tea", "日本", "🙂"]
SENTENCES = [" ".join(WORDS[n * step % len(WORDS)] for step in range(1, 4 + n % 13)) + f" {n}.\n" for n in range(1, 60)]
TEXT = "".join(SENTENCES)


def tokenizer(entries: int = 300) -> Tokenizer:
    """A byte-level BPE."""
    return train_tokenizer(SENTENCES, entries)


def hugging_face(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A tiny Llama with grouped heads and its tokenizer, which begins every text with a start token, written by transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": [0, 2], "initializer_range": 0.3, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**shape, **special, max_position_embeddings=64, **changes)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    inner = tokenizers.Tokenizer.from_str(tokenizer().files["tokenizer.json"].decode())
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="! $A", special_tokens=[("!", inner.token_to_id("!"))])
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", bos_token="!").save_pretrained(folder)
    return folder


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], meta: dict[str, object], files: dict[str, bytes]) -> Path:
    """A checkpoint of a model whose parameters are `tensors`."""
    pieces = [Piece(f"model/{name}", tuple(t.shape), whole_box(tuple(t.shape)), t) for name, t in tensors.items()]
    return save(folder, 1, pieces, meta, files)


def help_of(*words: str) -> str:
    """What a command's --help prints, in a process that it leaves without torch."""
    code = f"import sys; from paraxis.cli import main; main({[*words, '--help']}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that succeeds prints."""
    capsys.readouterr()
    code = main([str(word) for word in arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def said_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    """What a command that succeeds prints with --json."""
    return json.loads(said(capsys, *arguments, "--json"))


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """The message of a command that ends with `code`: one line on stderr, and nothing else."""
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == code
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1), printed
    return printed.err


# A recipe that brings a model of its own, in a file.
OWN_RECIPE = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F
from paraxis.data.config import DataConfig
from paraxis.train.config import EvalConfig, RunConfig, TrainConfig

class Bigrams(nn.Module):
    layout = {}
    keys = {"table.weight": "their.table"}

    def __init__(self, size):
        super().__init__()
        self.table = nn.Embedding(size, size)

    def logits(self, tokens_bt):
        return self.table(tokens_bt)

    def forward(self, batch):
        return F.cross_entropy(self.logits(batch.tokens_bt).flatten(0, 1).float(), batch.targets_bt.flatten(), reduction="sum")

    def blocks(self):
        return []

@dataclass(frozen=True, kw_only=True)
class BigramsConfig:
    vocab_size: int = 300

    def build(self):
        return Bigrams(self.vocab_size)

def bigrams():
    return RunConfig(
        name="bigrams", model=BigramsConfig(), precision="fp32",
        data=DataConfig(paths=("text.txt",), tokenizer="train:300", seq_len=16),
        train=TrainConfig(steps=2, sample="the "), eval=EvalConfig(every=1, paths=("text.txt",)),
    )
"""
