"""Small corpora and tokenizers for the tests of this room."""

from pathlib import Path

import numpy as np

from paraxis.data.config import DataConfig
from paraxis.data.prepare import prepare
from paraxis.data.shards import Prepared
from paraxis.data.tokens import Tokenizer, train_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "brew", "tea", "and", "count"]


def sentences(count: int) -> list[str]:
    """`count` texts of different lengths, no two alike."""
    return [" ".join(WORDS[(n * step) % len(WORDS)] for step in range(1, 4 + n % 13)) + f" {n}." for n in range(1, count + 1)]


def tokenizer() -> Tokenizer:
    """A byte-level BPE of 300 entries."""
    return train_tokenizer(sentences(50), 300)


def tokenizer_folder(folder: Path) -> str:
    """The files of that tokenizer in a folder, as data.tokenizer names one."""
    (folder / "tokenizer").mkdir()
    for name, content in tokenizer().files.items():
        (folder / "tokenizer" / name).write_bytes(content)
    return str(folder / "tokenizer")


def prepared(folder: Path, texts: list[str], **settings) -> Prepared:
    """`texts`, a file each, tokenised."""
    (folder / "text").mkdir()
    for number, text in enumerate(texts):
        (folder / "text" / f"{number:04}.txt").write_text(text)
    return prepare(DataConfig(paths=(str(folder / "text"),), **settings), folder / "cache", tokenizer=tokenizer())


def documents(data: Prepared) -> list[list[int]]:
    """The tokens of every document."""
    lengths = np.diff(data.ends, prepend=0)
    return [data.read(number, 0, int(length)).tolist() for number, length in enumerate(lengths)]
