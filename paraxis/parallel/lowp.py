"""Which linear layers multiply in eight or four bits, and how: those that read one input cast it once and share their products.

Every rank scales the part of a tensor that it has. That is as right as a scale of the whole: a product divides by its own factors'
scales, whatever they are, and a part's own scale is never coarser. Since scales of tensors are powers of two, both round an entry alike.
"""

import logging
import types
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from paraxis.base.dtypes import LowPrecision
from paraxis.base.errors import ConfigError
from paraxis.base.layout import Gather, LayoutTable, matching
from paraxis.ops.lowp import scaled_linears
from paraxis.parallel.overlap import handing_out

log = logging.getLogger("paraxis")


def convert_linears(model: nn.Module, table: LayoutTable, recipe: LowPrecision) -> list[list[str]]:
    """Lets the linear layers inside the model's blocks multiply by the recipe, save those that are skipped or whose features do not divide.

    A layer that is left out keeps the compute dtype, as do the head, embeddings, norms, routers, and experts. Layers that a `Gather` rule
    names as readers of its module's input are made one product. Returns the layers of each product, by name.
    """
    layers = block_linears(model)
    left_out = {name: why for name, layer in layers.items() if (why := _why_not(name, layer.weight.shape, recipe))}
    products = {name: [name] for name in layers if name not in left_out}
    for name in products:
        _multiply_alone(layers[name], recipe)
    for name, module in model.named_modules():
        rule = matching(table, name) if name else None
        readers = [f"{name}.{reader}" for reader in rule.readers] if isinstance(rule, Gather) else []
        if len(readers) > 1 and all(reader in products for reader in readers):
            products[readers[0]] = readers
            for reader in readers[1:]:
                del products[reader]
            _multiply_together(module, [reader.removeprefix(f"{name}.") for reader in readers], recipe)
    log.info("%s: %d linear layers; head, embeddings, norms and experts stay in bf16", recipe.name, len(layers) - len(left_out))
    for why in dict.fromkeys(left_out.values()):
        names = [name for name, reason in left_out.items() if reason == why]
        named = ", ".join(names[:4]) + (", ..." if names[4:] else "")
        log.info("%s: %d linear layers stay in bf16, %s: %s", recipe.name, len(names), why, named)
    return list(products.values())


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside a model's blocks, by name."""
    blocks: Sequence[nn.Module] = model.blocks() if hasattr(model, "blocks") else ()  # type: ignore[operator]
    inside = {id(module) for block in blocks for module in block.modules()}
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside}


def refuse_idle_float8(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], recipe: LowPrecision) -> None:
    """Raises ConfigError where no layer of the whole model would be converted, or a pattern skips none.

    `shapes` are those that a rank has of the parameters.
    """
    layers = block_linears(model)
    for pattern in recipe.skip:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ConfigError(f"float8.skip={pattern} matches no linear layer, such as {next(iter(layers), 'none')}; leave it out")
    reasons = {name: _why_not(name, shapes[f"{name}.weight"], recipe) for name in layers}
    if all(reasons.values()):
        why = ", ".join(sorted({f"{reason}" for reason in reasons.values()})) or "as no block has one"
        raise ConfigError(f"precision={recipe.name} finds no linear layer to convert, {why}; use precision=bf16")


def _why_not(name: str, shape: Sequence[int], recipe: LowPrecision) -> str | None:
    """Why a layer keeps the compute dtype, or None. `shape` is that of the part of its weight that a rank has."""
    if name.endswith(".router"):
        return "as routers choose experts by small differences"
    if any(fnmatchcase(name, pattern) for pattern in recipe.skip):
        return "as float8.skip says"
    if any(size % recipe.multiple for size in shape):
        return f"as a rank's features are not multiples of {recipe.multiple}"
    return None


def _multiply_alone(layer: Any, recipe: LowPrecision) -> None:
    """A product in few bits in place of a layer's own. One whose partial outputs are summed over ranks does that as before."""

    def product(layer: nn.Linear, x: Tensor) -> Tensor:
        return scaled_linears(x, [layer.weight], recipe)[0]

    def forward(layer: nn.Linear, x: Tensor) -> Tensor:
        y = product(layer, x)
        return y if layer.bias is None else y + layer.bias

    if hasattr(layer, "product"):
        layer.product = types.MethodType(product, layer)
    else:
        layer.forward = types.MethodType(forward, layer)


def _multiply_together(module: nn.Module, readers: Sequence[str], recipe: LowPrecision) -> None:
    """One product for all of a module's `readers`, made before the module runs; their forward only hands out."""
    layers: list[Any] = [getattr(module, name) for name in readers]
    for name, layer in zip(readers, layers, strict=True):
        layer.forward = types.MethodType(handing_out(name), layer)

    def multiply(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        products = scaled_linears(args[0], [getattr(module, name).weight for name in readers], recipe)
        return (dict(zip(readers, products, strict=True)), *args[1:])

    module.register_forward_pre_hook(multiply)
