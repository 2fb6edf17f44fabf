"""What to train on: the `data` section of a run."""

from dataclasses import dataclass
from typing import Annotated, Literal

from paraxis.base.errors import ConfigError

BUILT_IN = ("stdlib:train", "stdlib:heldout")
TRAIN_TOKENIZER = "train:"
SMALLEST_TOKENIZER = 257  # every byte, and the token that ends a document


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, how it becomes tokens, and how tokens become rows."""

    paths: Annotated[tuple[str, ...], "files, folders, globs, fsspec URLs: text, .jsonl, .parquet; or stdlib:train"] = ("stdlib:train",)
    tokenizer: Annotated[str, "a Hugging Face folder or tokenizer.json, or train:4096 to train a byte-level BPE on the data"] = "train:4096"
    seq_len: Annotated[int, "tokens in a row"] = 512
    document_mask: Annotated[bool, "confine attention to documents: positions restart, no target crosses a boundary"] = False
    shuffle: Annotated[bool, "put documents and rows in a new seeded order in each pass"] = True
    text_field: Annotated[str, "the field (JSON) or column (Parquet) that holds the text"] = "text"
    on_bad_record: Annotated[Literal["stop", "skip"], "what a broken record does: stop the run, or be left out and counted"] = "stop"
    append_eos: Annotated[bool, "end each document with the tokenizer's end token, where it has one"] = True

    def __post_init__(self) -> None:
        if not self.paths or not all(self.paths):
            raise ConfigError(f"data.paths={self.paths} names no data; give at least one file, folder or glob, or stdlib:train")
        for path in self.paths:
            if path.startswith("stdlib:") and path not in BUILT_IN:
                raise ConfigError(f"data.paths={path!r} is not a built-in corpus; choose one of {', '.join(BUILT_IN)}")
        if not self.tokenizer:
            raise ConfigError("data.tokenizer='' names no tokenizer; give a folder, a tokenizer.json, or train:4096")
        if self.seq_len < 1:
            raise ConfigError(f"data.seq_len={self.seq_len} must be at least 1; give the tokens in a row")
        if not self.text_field:
            raise ConfigError("data.text_field='' names no field; give the field or column that holds the text, such as text")
        if self.on_bad_record not in ("stop", "skip"):
            raise ConfigError(f"data.on_bad_record={self.on_bad_record!r} is unknown; choose stop or skip")
        if self.tokenizer.startswith(TRAIN_TOKENIZER):
            self._check_entries()

    def _check_entries(self) -> None:
        entries = self.tokenizer.removeprefix(TRAIN_TOKENIZER)
        if not entries.isdecimal() or int(entries) < SMALLEST_TOKENIZER:
            raise ConfigError(
                f"data.tokenizer={self.tokenizer!r} must end in a number of at least {SMALLEST_TOKENIZER} entries "
                "(all bytes, and the end token); try train:4096"
            )

    @property
    def entries_to_train(self) -> int | None:
        """How many entries the tokenizer to be trained has, or None where a finished one is named."""
        if not self.tokenizer.startswith(TRAIN_TOKENIZER):
            return None
        return int(self.tokenizer.removeprefix(TRAIN_TOKENIZER))
