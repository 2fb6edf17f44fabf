"""What a run cannot be, refused before any process is started."""

from collections.abc import Mapping
from math import lcm

import torch
from torch import nn

from paraxis.base.axes import AXES, Degrees
from paraxis.base.dtypes import low_precision, precision
from paraxis.base.errors import ConfigError
from paraxis.base.layout import Placed, Whole, place
from paraxis.base.seams import HasAttention, routed_layers
from paraxis.parallel.context import kv_copies
from paraxis.parallel.lowp import refuse_idle_float8
from paraxis.train.config import RunConfig
from paraxis.train.stages import Stages, build_stages
from paraxis.train.unsaved import refuse_unsaved_model


def check(config: RunConfig, ranks: int, model: nn.Module | None = None) -> None:
    """Refuses what cannot run on `ranks` ranks. Raises ConfigError naming the setting, the rule and the next move.

    `model` is the run's, on the meta device, where it was built already.
    """
    if config.parallel.auto:
        raise ConfigError(
            "parallel.auto=true is settled by paraxis train before a run is built; from Python, set parallel to what paraxis plan finds"
        )
    degrees = config.parallel.degrees.filling(ranks)
    config.rows_per_step(degrees)
    model = on_meta(config) if model is None else model
    check_sequence(config, degrees, model)
    check_heads(config, degrees)
    stages = build_stages(config, degrees, model)
    if degrees.ep > 1 and not routed_layers(model):
        raise ConfigError(f"parallel.ep={degrees.ep} shares out experts, but {type(model).__name__} has none; use ep=1")
    refuse_unsaved_model(model, degrees)
    table = getattr(model, "layout", {})
    first: dict[str, int] = dict.fromkeys(AXES, 0)
    placed = {name: place(name, tuple(parameter.shape), table, degrees, first) for name, parameter in model.named_parameters()}
    check_float8(config, degrees, stages, model, placed)
    check_travel(config, degrees)
    if ranks > 1 and (name := dropout_of(model)):
        raise ConfigError(f"{name} drops out at random, which differs between layouts; set its probability to 0 or train on one rank")


def on_meta(config: RunConfig) -> nn.Module:
    """The whole model, without memory or values."""
    with torch.device("meta"):
        return config.model.build()


def check_sequence(config: RunConfig, degrees: Degrees, model: nn.Module) -> None:
    """Refuses rows that cp and tp cannot share out, and a model that would not notice."""
    length, cp, tp = config.data.seq_len, degrees.cp, degrees.tp if config.parallel.sequence_parallel else 1
    unit = lcm(2 * cp, cp * tp) if cp > 1 else tp
    if length % unit:
        below = length // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        pieces = [f"parallel.cp={cp} cuts every row in {2 * cp} pieces"] if cp > 1 else []
        pieces += [f"parallel.tp={tp} splits {'what a rank has' if cp > 1 else 'every row'} along the sequence"] if tp > 1 else []
        raise ConfigError(f"data.seq_len={length} is not a multiple of {unit}: {', '.join(pieces)}; use {near}, or other degrees")
    most = getattr(model, "most_positions", None)
    if most is not None and length > most:
        raise ConfigError(
            f"data.seq_len={length} is longer than the {most} positions that {type(model).__name__} learns vectors for; "
            f"set model.max_seq_len={length}, or shorten the rows"
        )
    whole = any(isinstance(rule, Whole) for rule in getattr(model, "layout", {}).values())
    if cp > 1 and not (isinstance(model, HasAttention) or whole):
        raise ConfigError(
            f"parallel.cp={cp} spreads every row over ranks, but {type(model).__name__} has neither use_attention(attend) nor a `Whole` "
            "rule in its layout table, so nothing would let positions see each other; see docs/how-to-add-a-model.md, or use cp=1"
        )


def check_heads(config: RunConfig, degrees: Degrees) -> None:
    """Refuses attention heads that tensor parallelism, or an all-to-all over heads, cannot share out."""
    for field in ("heads", "kv_heads"):
        heads = getattr(config.model, field, None)
        if isinstance(heads, int) and heads % degrees.tp:
            raise ConfigError(
                f"model.{field}={heads} is not divisible by parallel.tp={degrees.tp}; "
                f"use a degree that divides it: {', '.join(str(d) for d in range(1, heads + 1) if heads % d == 0)}"
            )
    heads = getattr(config.model, "heads", None)
    kv_heads = getattr(config.model, "kv_heads", heads)
    exchange = config.parallel.cp_ulysses or (degrees.cp if config.parallel.cp_kind == "ulysses" else 1)
    if exchange > 1 and isinstance(heads, int) and isinstance(kv_heads, int):
        kv_copies(heads // degrees.tp, kv_heads // degrees.tp, exchange)
    if degrees.cp > 1 and config.attention != "auto" and context_kind(config, degrees) != "ulysses":
        raise ConfigError(
            f"attention={config.attention} attends to whole rows, but parallel.cp_kind={context_kind(config, degrees)} to blocks of keys, "
            "for which there are other kernels; use attention=auto, which takes the fastest, or cp_kind=ulysses"
        )


def check_travel(config: RunConfig, degrees: Degrees) -> None:
    """Refuses gradients that shall travel as they were computed where none travel, or where that is how they are reduced anyway."""
    dtypes = precision(config.precision)
    if config.parallel.travel == "computed" and (degrees.shards == 1 or dtypes.compute == dtypes.reduce):
        why = "fsdp x cp is 1, so none travel" if degrees.shards == 1 else f"precision={config.precision} also reduces them so"
        raise ConfigError(f"parallel.travel=computed has gradients travel between fsdp ranks as they are computed, but {why}; leave it out")


def context_kind(config: RunConfig, degrees: Degrees) -> str:
    """How attention crosses `cp`, `auto` settled: an all-to-all over heads where they divide over the ranks, else a ring."""
    if config.parallel.cp_ulysses:
        return "usp"
    if config.parallel.cp_kind != "auto":
        return config.parallel.cp_kind
    heads = getattr(config.model, "heads", None)
    return "ulysses" if isinstance(heads, int) and heads // degrees.tp % degrees.cp == 0 else "ring"


def dropout_of(model: nn.Module) -> str | None:
    """The name of the first module that drops out at random, if any."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return name
    return None


def check_float8(config: RunConfig, degrees: Degrees, stages: Stages | None, model: nn.Module, placed: Mapping[str, Placed]) -> None:
    """Refuses what float8 products cannot be combined with, numbers of tokens that they cannot multiply, and settings without effect."""
    recipe = low_precision(precision(config.precision), config.float8)
    if recipe is None:
        return
    if recipe.gathered and degrees.shards == 1:
        raise ConfigError("float8.gather=float8 says nothing where no weight is gathered; raise parallel.fsdp, or leave it out")
    refuse_idle_float8(model, {name: where.computed.sizes for name, where in placed.items()}, recipe)
    if config.parallel.async_tp:
        raise ConfigError(
            f"parallel.async_tp=True multiplies in bf16 what is on its way, which precision={config.precision} would cast first; "
            "use async_tp=False, or precision=bf16"
        )
    if stages is not None and stages.schedule.splits_backward:
        raise ConfigError(
            f"precision={config.precision} makes the gradients of inputs and weights of one cast, but parallel.schedule="
            f"{stages.schedule.name} makes them at different times; use 1f1b, interleaved, gpipe or bfs, or precision=bf16"
        )
    tokens = config.train.micro_batch * config.data.seq_len // degrees.cp
    if tokens % recipe.multiple:
        raise ConfigError(
            f"precision={config.precision} multiplies multiples of {recipe.multiple} tokens, but a rank's micro-batch has {tokens} "
            f"(train.micro_batch={config.train.micro_batch} x data.seq_len={config.data.seq_len} / parallel.cp={degrees.cp}); "
            "use other ones, or precision=bf16"
        )
