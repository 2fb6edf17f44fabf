"""The tokenizer: loaded from a Hugging Face folder or a tokenizer.json, or trained on the data, through `tokenizers`."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from paraxis.base.errors import ConfigError, DataError
from paraxis.data.chat import Spans

END = "<|endoftext|>"
# A bare tokenizer.json does not say which token ends a text. These names mean nothing else.
USUAL_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>")


class Tokenizer:
    """Text to token ids and back. `files` is all that is needed to make it again, by file name."""

    def __init__(self, tokenizer_json: bytes, config: Mapping[str, Any], name: str) -> None:
        try:
            self._inner = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # `tokenizers` raises bare Exception
            raise DataError(f"{name} is not a tokenizer that `tokenizers` {tokenizers.__version__} can read: {error}") from error
        # A file may carry the truncation and padding of its last use, which would silently shorten documents.
        self._inner.no_truncation()
        self._inner.no_padding()
        ids = self._inner.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise DataError(f"{name} has an empty vocabulary; choose another tokenizer")
        self.name = name
        self.vocab_size = max(ids) + 1
        self.eos_id = self._special(config, "eos_token")
        self.bos_id = self._special(config, "bos_token")
        self.sha256 = hashlib.sha256(tokenizer_json).hexdigest()
        self.files = {"tokenizer.json": tokenizer_json, "tokenizer_config.json": json.dumps(dict(config), indent=2).encode()}

    def _special(self, config: Mapping[str, Any], which: str) -> int | None:
        token = config.get(which)
        if token is None:
            return None
        found = self._inner.token_to_id(token)
        if found is None:
            raise DataError(f"{self.name}: {which} {token!r} of tokenizer_config.json is not in the vocabulary; mend one or the other")
        return found

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer in a folder with a tokenizer.json, or in that file; what stands beside the file is read too.

        Raises DataError, naming what was looked for, where there is none.
        """
        path = Path(path).expanduser()
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            data = file.read_bytes()
        except OSError as error:
            raise DataError(
                f"data.tokenizer: no tokenizer at {file} ({error.strerror}); give a Hugging Face folder that holds a "
                "tokenizer.json, the file itself, or train:4096 to train one on the data"
            ) from error
        return cls.from_files({"tokenizer.json": data, **_beside(file)}, name=str(file))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], name: str) -> "Tokenizer":
        """The tokenizer whose files' contents these are, by file name; raises DataError for ones that cannot be read."""
        config = _json(files.get("tokenizer_config.json"), name)
        config.update(_special_tokens(files, config, name))
        return cls(files["tokenizer.json"], config, name)

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """The ids of `text`; with what the tokenizer puts around a text (a start token, say) where `special_tokens`."""
        return self._inner.encode(text, add_special_tokens=special_tokens).ids

    def encode_batch(self, texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
        """The ids of each text, as arrays, computed on all cores."""
        encoded = (encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False))
        return [np.fromiter(ids, dtype, len(ids)) for ids in encoded]  # half the time of np.array

    def encode_spans(self, texts: Sequence[str], spans: Sequence[Spans], dtype: np.dtype) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids of each text, and which of them begin within its spans: bool."""
        found = []
        for encoding, wanted in zip(self._inner.encode_batch(list(texts), add_special_tokens=False), spans, strict=True):
            starts = np.array([start for start, _ in encoding.offsets], np.int64)
            within = np.zeros(len(starts), bool)
            for start, end in wanted:
                within |= (starts >= start) & (starts < end)
            found.append((np.array(encoding.ids, dtype), within))
        return found

    def lacks(self, markers: Sequence[str]) -> str | None:
        """The first of `markers` that is not a token of its own, or None."""
        return next((marker for marker in markers if len(self.encode(marker)) != 1), None)

    def decode(self, ids: Sequence[int], *, special_tokens: bool = False) -> str:
        """The text of `ids`, showing the special ones where `special_tokens`."""
        return self._inner.decode(list(ids), skip_special_tokens=not special_tokens)


def _beside(file: Path) -> dict[str, bytes]:
    names = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
    return {name: (file.parent / name).read_bytes() for name in names if (file.parent / name).is_file()}


def _json(data: bytes | None, name: str) -> dict[str, Any]:
    if data is None:
        return {}
    try:
        value = json.loads(data)
    except ValueError as error:
        raise DataError(f"{name}: a JSON file beside it is broken: {error}") from error
    return value if isinstance(value, dict) else {}


def _special_tokens(files: Mapping[str, bytes], config: Mapping[str, Any], name: str) -> dict[str, str]:
    """The start and end tokens as text, from the first place that names each."""
    special_map, model = _json(files.get("special_tokens_map.json"), name), _json(files.get("config.json"), name)
    contents = {entry["id"]: entry["content"] for entry in _json(files["tokenizer.json"], name).get("added_tokens", [])}
    found = {}
    for which in ("eos_token", "bos_token"):
        token = config.get(which) or special_map.get(which)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            ids = model.get(f"{which}_id")
            token = contents.get(next(iter(ids), None) if isinstance(ids, list) else ids)
        if token is None and which == "eos_token" and which not in config:
            token = next((usual for usual in USUAL_ENDS if usual in contents.values()), None)
        if token is not None:
            found[which] = token
    return found


def train_tokenizer(texts: Iterable[str], entries: int, markers: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE of at most `entries` entries (fewer where the text has no more pairs to merge) trained on `texts`.

    Besides the token that ends a document, `markers` are tokens of their own.
    Byte-level BPE after Radford et al. 2019 (GPT-2): any text can be encoded, and decodes to itself.
    """
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=entries, special_tokens=[END, *markers], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner.to_str().encode(), {"eos_token": END}, f"train:{entries}")


def check_vocabulary(tokenizer_size: int, model_size: int) -> None:
    """Raises ConfigError where the tokenizer can give an id that the model has no embedding for."""
    if tokenizer_size > model_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer_size} entries but the model's vocabulary only {model_size}; "
            f"set model.vocab_size to {tokenizer_size} or more, or choose a smaller tokenizer"
        )
