"""Datasets of the Hugging Face `datasets` library by name, whole or as a stream.

    hf:saved/c4                                    a folder that `save_to_disk` made
    hf:allenai/c4?config=en&split=train            from the Hub
    hf:json?files=web/*.jsonl.gz                   files, by one of the library's own readers (csv, xml, webdataset ...)
    hf:allenai/c4?config=en&stream=true            read as it is trained on, with data.tokenize=live

The library is asked for only when a path needs it. Datasets that bring code of their own are refused: it has run none since 4.0.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from paraxis.base.errors import ConfigError, DataError

DATASET = "hf:"
KEYS = ("config", "split", "files", "revision", "stream")
OLDEST = 4


@dataclass(frozen=True, kw_only=True)
class Name:
    """What a path that begins with `hf:` says."""

    name: str
    config: str | None = None
    split: str = "train"
    files: str | None = None
    revision: str | None = None
    stream: bool = False


@lru_cache
def read_name(path: str) -> Name:
    """The parts of such a path. Raises ConfigError for one that cannot be read."""
    name, _, query = path.removeprefix(DATASET).partition("?")
    try:
        asked = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        asked = [(query, "")]
    wrong = next((f"{key}={value}" for key, value in asked if key not in KEYS or not value), None)
    wrong = wrong or next((f"stream={value}" for key, value in asked if key == "stream" and value not in ("true", "false")), None)
    if not name or wrong or len(dict(asked)) < len(asked):
        raise ConfigError(
            f"data.paths={path!r} {f'has {wrong}' if wrong else 'cannot be read'}; write hf:NAME, and behind it any of "
            "?config=...&split=...&files=...&revision=...&stream=true, each once"
        )
    values: dict[str, Any] = dict(asked)
    values["stream"] = values.get("stream") == "true"
    return Name(name=name, **values)


@lru_cache(maxsize=4)
def open_whole(path: str) -> Any:
    """The `datasets.Dataset` of which any row can be read at once. Raises DataError where there is none."""
    return _opened(path, read_name(path))


def open_stream(path: str) -> Any:
    """A new `datasets.IterableDataset`, which is read from its beginning or from a state. Raises DataError where there is none."""
    return _opened(path, read_name(path))


def _opened(path: str, name: Name) -> Any:
    library = _library(path)
    folder = Path(name.name)
    try:
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            found = library.load_from_disk(str(folder))
            found = found[name.split] if isinstance(found, library.DatasetDict) else found
            return found.to_iterable_dataset() if name.stream else found
        return library.load_dataset(
            name.name, name.config, data_files=name.files, split=name.split, revision=name.revision, streaming=name.stream
        )
    except Exception as error:  # of any kind: the library and its readers have no common one
        raise DataError(f"data.paths: {path} cannot be opened: {type(error).__name__}: {error}; check the name, split and files") from error


def _library(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"data.paths: {path} needs the package datasets, which is not installed; pip install 'datasets>=4'") from error
    if int(datasets.__version__.partition(".")[0]) < OLDEST:
        raise DataError(f"data.paths: {path} needs datasets {OLDEST} or later, not {datasets.__version__}; pip install 'datasets>=4'")
    datasets.disable_progress_bars()  # one a rank
    return datasets
