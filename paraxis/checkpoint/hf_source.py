"""Reading Hugging Face folders: safetensors files only, one tensor in memory at a time, fp8 weights with their scales applied.

Quantised folders are DeepSeek-V3's kind (arXiv:2412.19437, section 3.3.2): a float8_e4m3fn matrix X beside `X_scale_inv`, an fp32
factor for each block of `weight_block_size` entries; blocks at the lower and right edge may be cut short.
"""

import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paraxis.base.errors import CheckpointError
from paraxis.checkpoint.tensor_file import DTYPES

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\..+")
_MTP_ONLY = "model.layers.{}.eh_proj.weight"  # joins a hidden state and the next token's embedding: no other layer has it
_SCALE = "_scale_inv"
_QUANTISED = torch.float8_e4m3fn

Stored = tuple[tuple[int, ...], torch.dtype]


class ForeignWeights(Protocol):
    """Tensors that others wrote, by the names they gave them."""

    @property
    def source(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Shape and dtype of each."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, on CPU."""
        ...


class HuggingFaceWeights:
    """The tensors of a Hugging Face folder (single file or sharded with an index) or of one safetensors file, by their own names.

    Links are followed: the hub's cache consists of them. Raises CheckpointError where files are missing, damaged, pickled, or
    quantised in a way that is not the one above.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self._files: dict[Path, Any] = {}
        self._where = self._find()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The folder's config.json; empty where there is none."""
        file = self.source / CONFIG
        return parse_config(file.read_bytes(), self.source) if file.is_file() else {}

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Shape and dtype of every tensor but those `left_out`. One that is quantised counts as bf16, and its scales are not listed."""
        return self._tensors

    @cached_property
    def _tensors(self) -> dict[str, Stored]:
        left_out = {name for names in self._beyond_the_last_layer().values() for name in names}
        stored = {name: self._stored(name) for name in self._where if name not in left_out}
        if self._block is None:
            return stored
        quantised = [name for name, (_, dtype) in stored.items() if dtype == _QUANTISED]
        for name in quantised:
            self._check_scale(name, stored[name][0], stored.pop(name + _SCALE, None))
        return stored | {name: (stored[name][0], torch.bfloat16) for name in quantised}

    @property
    def left_out(self) -> dict[str, int]:
        """Layers of multi-token prediction, which the files hold beside the model: how many tensors `model.layers.61.*` has, and so on."""
        return {f"model.layers.{layer}.*": len(names) for layer, names in self._beyond_the_last_layer().items()}

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, on CPU; of one that is quantised, the fp32 product of weight and scale.

        It has a mapping of its file to itself: what is resident of that goes when the tensor goes.
        """
        tensor = _mapped(self._where[name]).get_tensor(name)
        if self._block is None or tensor.dtype != _QUANTISED:
            return tensor
        return dequantised(tensor, _mapped(self._where[name + _SCALE]).get_tensor(name + _SCALE), self._block)

    @cached_property
    def _block(self) -> tuple[int, int] | None:
        """Rows and columns of a block that shares one scale; None where nothing is quantised."""
        settings = self.config.get("quantization_config")
        if not settings:
            return None
        match settings:
            case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)]} if rows > 0 and columns > 0:
                if settings.get("fmt", "e4m3") == "e4m3":
                    return rows, columns
        raise CheckpointError(
            f"{self.source / CONFIG}: quantization_config={json.dumps(settings)} cannot be read; this release knows "
            "quant_method='fp8' with fmt='e4m3' and a weight_block_size such as [128, 128]. Get the model's unquantised weights"
        )

    def _check_scale(self, name: str, shape: tuple[int, ...], scale: Stored | None) -> None:
        assert self._block is not None
        if scale is None:
            raise CheckpointError(f"{self.source} lacks {name}{_SCALE}, without which the fp8 weight {name} means nothing")
        grid = tuple(-(-size // block) for size, block in zip(shape, self._block, strict=False))
        if len(shape) != 2 or scale != (grid, torch.float32):
            raise CheckpointError(
                f"{self.source}: {name}{_SCALE} has shape {scale[0]} in {scale[1]}; a weight of shape {shape} in blocks of {self._block} "
                f"needs {grid} in torch.float32"
            )

    def _beyond_the_last_layer(self) -> dict[int, list[str]]:
        """The tensors of multi-token prediction, by layer: such layers stand after the model's own, declared or known by a part."""
        layers = self.config.get("num_hidden_layers")
        if not isinstance(layers, int):
            return {}
        declared = self.config.get("num_nextn_predict_layers") or 0
        found: dict[int, list[str]] = {}
        for name in self._where:
            if (match := _IN_LAYER.fullmatch(name)) and (layer := int(match[1])) >= layers:
                found.setdefault(layer, []).append(name)
        return {k: names for k, names in sorted(found.items()) if k < layers + declared or _MTP_ONLY.format(k) in self._where}

    def _stored(self, name: str) -> Stored:
        path = self._where[name]
        try:
            part = self._open(path).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path} holds no {name}, although {self.source / INDEX} says so ({error})") from error
        if part.get_dtype() not in DTYPES:
            raise CheckpointError(f"{path}: {name} is {part.get_dtype()}; only {', '.join(DTYPES)} can be read")
        return tuple(part.get_shape()), DTYPES[part.get_dtype()]

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = _mapped(path)
        return self._files[path]

    def _find(self) -> dict[str, Path]:
        if self.source.is_dir() and (self.source / INDEX).is_file():
            return self._indexed()
        path = self.source / SINGLE if self.source.is_dir() else self.source
        if path.suffix == ".safetensors" and path.is_file():
            return dict.fromkeys(self._open(path).keys(), path)
        present = sorted(self.source.iterdir()) if self.source.is_dir() else [self.source]
        if pickled := [file.name for file in present if file.suffix in _PICKLED and file.is_file()]:
            raise CheckpointError(
                f"{self.source} holds pickled weights only ({', '.join(pickled[:3])}); opening a pickle can run code, so it is never done. "
                f"Get the safetensors files of this model, or convert it where you trust its source"
            )
        raise CheckpointError(f"{self.source} holds no Hugging Face weights; expected {SINGLE} or {INDEX} there")

    def _indexed(self) -> dict[str, Path]:
        index = self.source / INDEX
        try:
            weight_map = dict(json.loads(index.read_bytes())["weight_map"])
            foreign = [file for file in weight_map.values() if not _SHARD_NAME.fullmatch(file)]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{index} is not an index of safetensors files: {type(error).__name__}: {error}") from error
        if foreign:
            raise CheckpointError(f"{index} names {foreign[0]!r}; only safetensors files of the same folder are read")
        return {name: self.source / file for name, file in weight_map.items()}


def dequantised(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """weight * scale in fp32, where each entry of `scale` is for a block of `weight`."""
    rows, columns = weight.shape
    return weight.to(torch.float32).mul_(scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns])


def parse_config(data: bytes, place: object) -> dict[str, Any]:
    """What the config.json of the weights at `place` says. Raises CheckpointError where it says nothing that can be read."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{place}: config.json is not valid JSON ({error}); get it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{place}: config.json holds a {type(value).__name__}, not an object; get it again")
    return value


def _mapped(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or not a whole safetensors file: {error}") from error
