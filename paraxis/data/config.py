"""What to train on: the `data` section of a run."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from paraxis.base.errors import ConfigError
from paraxis.data.chat import TEMPLATES, Template
from paraxis.data.hub import DATASET, read_name
from paraxis.data.mixture import NAME, Change, read_mixture

BUILT_IN = ("stdlib:train", "stdlib:heldout")
TRAIN_TOKENIZER = "train:"
SMALLEST_TOKENIZER = 257  # every byte, and the token that ends a document

CHOICES = {
    "on_bad_record": ("stop", "skip"),
    "packing": ("concatenate", "best_fit"),
    "long_documents": ("split", "drop"),
    "chat": ("none", *TEMPLATES),
    "tokenize": ("ahead", "live"),
    "mixture_of": ("auto", "rows", "documents"),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, how it becomes tokens, and how tokens become rows."""

    paths: Annotated[
        tuple[str, ...], "files, folders, globs, URLs: text, .jsonl, .parquet, .arrow, token ids; hf:NAME; or stdlib:train"
    ] = ("stdlib:train",)
    mixture: Annotated[
        tuple[str, ...],
        "shares of sources in tokens, as 'web=0.7 code=0.3'; each path is then web=..., and '1000: web=1' a change at a step",
    ] = ()
    mixture_of: Annotated[
        Literal["auto", "rows", "documents"],
        "mix whole rows or whole documents; auto takes documents where all are shorter than a row, which is then closer to the shares",
    ] = "auto"
    tokenizer: Annotated[str, "a Hugging Face folder or tokenizer.json, or train:4096 to train a byte-level BPE on the data"] = "train:4096"
    seq_len: Annotated[int, "tokens in a row"] = 512
    document_mask: Annotated[bool, "confine attention to documents: positions restart, no target crosses a boundary"] = False
    shuffle: Annotated[bool, "put documents and rows in a new seeded order in each pass"] = True
    packing: Annotated[
        Literal["concatenate", "best_fit"], "lay documents end to end and cut them into rows, or put whole ones where they fit best"
    ] = "concatenate"
    long_documents: Annotated[Literal["split", "drop"], "what best_fit does with documents longer than a row"] = "split"
    text_field: Annotated[str, "the field (JSON) or column (Parquet) that holds the text"] = "text"
    chat: Annotated[
        Literal["none", "chatml", "llama3"],
        "write the conversations in the field 'messages' by this template, and train on the assistant's part",
    ] = "none"
    on_bad_record: Annotated[Literal["stop", "skip"], "what a broken record does: stop the run, or be left out and counted"] = "stop"
    most_skipped: Annotated[float, "refuse data of whose records more than this share is skipped"] = 1.0
    append_eos: Annotated[bool, "end each document with the tokenizer's end token, where it has one"] = True
    tokenize: Annotated[Literal["ahead", "live"], "tokenise all text before the first step, or in the background while training"] = "ahead"
    workers: Annotated[int, "processes on each host that tokenise live; 0: one for every four cores"] = 0
    repeat: Annotated[int, "passes a run may make over the data, or over a source of a mixture; 0: any number"] = 0

    def __post_init__(self) -> None:
        if not self.paths or not all(self.paths):
            raise ConfigError(f"data.paths={self.paths} names no data; give at least one file, folder or glob, or stdlib:train")
        if self.mixture:
            self._check_sources()
        for path in self.plain_paths:
            if path.startswith("stdlib:") and path not in BUILT_IN:
                raise ConfigError(f"data.paths={path!r} is not a built-in corpus; choose one of {', '.join(BUILT_IN)}")
        if not self.tokenizer:
            raise ConfigError("data.tokenizer='' names no tokenizer; give a folder, a tokenizer.json, or train:4096")
        if self.seq_len < 1:
            raise ConfigError(f"data.seq_len={self.seq_len} must be at least 1; give the tokens in a row")
        if not self.text_field:
            raise ConfigError("data.text_field='' names no field; give the field or column that holds the text, such as text")
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"data.{name}={value!r} is unknown; choose {' or '.join(choices)}")
        if self.long_documents == "drop" and self.packing != "best_fit":
            raise ConfigError("data.long_documents=drop says nothing while data.packing=concatenate; set data.packing=best_fit")
        if self.mixture_of != "auto" and not self.mixture:
            raise ConfigError(f"data.mixture_of={self.mixture_of} says nothing without data.mixture; give the sources' weights there")
        if self.mixture_of == "documents" and self.packing != "concatenate":
            raise ConfigError(
                f"data.mixture_of=documents lays documents end to end, and data.packing={self.packing} does not; "
                "set data.packing=concatenate or data.mixture_of=rows"
            )
        if not 0 <= self.most_skipped <= 1:
            raise ConfigError(f"data.most_skipped={self.most_skipped} must be a share from 0 to 1, such as 0.01")
        if self.most_skipped < 1 and self.on_bad_record != "skip":
            raise ConfigError(f"data.most_skipped={self.most_skipped} says nothing while data.on_bad_record=stop; set it to skip")
        if self.repeat < 0:
            raise ConfigError(f"data.repeat={self.repeat} must be 0 (any number of passes) or more")
        if self.tokenizer.startswith(TRAIN_TOKENIZER):
            self._check_entries()
        if self.workers < 0:
            raise ConfigError(f"data.workers={self.workers} must be 0 (one for every four cores) or more")
        if self.workers and self.tokenize != "live":
            raise ConfigError(f"data.workers={self.workers} says nothing while data.tokenize=ahead; set data.tokenize=live")
        for paths in self.sources.values():
            self._check_datasets(paths)

    def _check_datasets(self, paths: tuple[str, ...]) -> None:
        for path in paths:
            if not path.startswith(DATASET) or not read_name(path).stream:
                continue
            if self.tokenize != "live":
                raise ConfigError(f"data.paths={path!r} is a stream, which is read while training: set data.tokenize=live")
            if self.entries_to_train is not None:
                raise ConfigError(f"data.tokenizer={self.tokenizer!r} cannot be trained on the stream {path}; name a finished tokenizer")
            if len(paths) > 1:
                raise ConfigError(f"data.paths: {path} is a stream, which is a source by itself; name it as one in data.mixture")

    def _check_sources(self) -> None:
        for path in self.paths:
            name, equals, place = path.partition("=")
            if not equals or not place or not NAME.fullmatch(name):
                raise ConfigError(f"data.paths={path!r} needs its source's name in a mixture; write name={path}")
        drawn = {name for change in self.changes for name in change.shares}
        if unknown := sorted(drawn - self.sources.keys()):
            raise ConfigError(f"data.mixture draws from {unknown[0]}, which data.paths do not have; add {unknown[0]}=PATH to them")
        if idle := sorted(self.sources.keys() - drawn):
            raise ConfigError(f"data.paths have a source {idle[0]} that data.mixture never draws from; give it a weight or leave it out")

    @property
    def template(self) -> Template | None:
        """How conversations are written, where the data are conversations."""
        return TEMPLATES.get(self.chat)

    @property
    def sources(self) -> dict[str, tuple[str, ...]]:
        """The paths of each source of a mixture; of the one source without a name where there is no mixture."""
        if not self.mixture:
            return {"": self.paths}
        named: dict[str, tuple[str, ...]] = {}
        for path in self.paths:
            name, _, place = path.partition("=")
            named[name] = (*named.get(name, ()), place)
        return named

    def unmixed(self, paths: tuple[str, ...]) -> "DataConfig":
        """The same for these paths, which are of one source."""
        return replace(self, paths=paths, mixture=(), mixture_of="auto")

    @property
    def plain_paths(self) -> tuple[str, ...]:
        """The paths of all sources, without the sources' names."""
        return tuple(path for paths in self.sources.values() for path in paths)

    @property
    def changes(self) -> list[Change]:
        """The mixture, read."""
        return read_mixture(self.mixture)

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
