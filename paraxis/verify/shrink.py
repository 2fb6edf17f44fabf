"""A recipe's run made small, of the same kind: the layers, gates and heads that it has, but few and narrow."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from paraxis.base.dtypes import Float8Config
from paraxis.base.errors import ConfigError
from paraxis.data.config import DataConfig
from paraxis.models.registry import MODELS
from paraxis.ops.routing import RoutingConfig
from paraxis.optim.config import OptimConfig
from paraxis.train.config import EvalConfig, RunConfig
from paraxis.verify.measure import with_layout

SEQ_LEN = 32
MICRO_BATCHES = 2  # on each data rank, so that gradients accumulate; pipelines take as many for every rank of theirs
LARGEST_AS_IT_IS = 5_000_000  # parameters
LEAST_LAYERS = 2
EXPERTS = 8

# What a field of a model we know becomes, if it is there and not none. Multiples of 8 can be shared out among 8 ranks.
SMALL = {
    "vocab_size": 96,
    "width": 32,
    "mlp_width": 64,
    "expert_width": 32,
    "head_size": 8,
    "q_rank": 24,
    "kv_rank": 16,
    "nope_width": 8,
    "rope_width": 4,
    "value_width": 8,
}

OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "adamw": {"name": "adamw", "lr": 0.01},
}


def shrunk(config: RunConfig, layout: str, precision: str) -> RunConfig:
    """`config` with a small model and small rows, on `layout`. Raises ConfigError for a layout or a model that cannot be had small."""
    parallel = with_layout(config, layout).parallel
    # Two layers for every pipeline rank, since some schedules give each two stages.
    layers = max(LEAST_LAYERS, parallel.pp * max(2, parallel.stages_a_rank) if parallel.pp > 1 else 0)
    rows = parallel.degrees.data_ranks * MICRO_BATCHES * parallel.pp
    model, data = shrunk_model(config.model, layers), config.data
    if isinstance(data, DataConfig):
        data = replace(data, seq_len=SEQ_LEN)
    elif type(model) in MODELS.values():
        model = replace(model, vocab_size=config.model.vocab_size)  # the recipe's own rows hold any of its tokens
    return replace(
        config,
        model=model,
        data=data,
        train=replace(config.train, micro_batch=1, global_tokens=rows * data.seq_len, deterministic=False),
        eval=EvalConfig(),
        parallel=parallel,
        compile="none",
        attention="auto",
        precision=precision,
        float8=Float8Config(),
    )


def with_optimizer(config: RunConfig, name: str, clip_norm: float) -> RunConfig:
    """`config` trained by one of OPTIMIZERS, its parameters grouped as the recipe has them."""
    kept = {field: getattr(config.optim, field) for field in ("no_decay", "decay_vectors")}
    return replace(config, optim=OptimConfig(**OPTIMIZERS[name], **kept, warmup=0, schedule="constant", clip_norm=clip_norm))


def shrunk_model(model: Any, layers: int) -> Any:
    """A small model of the kind that `model` configures: by its own `shrunk()` if it has one, by its fields if it is one of ours."""
    if callable(own := getattr(model, "shrunk", None)):
        return own()
    if type(model) in MODELS.values():
        return _small_decoder(model, layers)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model.build().parameters())
    if count > LARGEST_AS_IT_IS:
        raise ConfigError(
            f"{type(model).__name__} has {count:,} parameters, and verify does not know how to make it small; give it a method "
            f"shrunk() that returns a small configuration of its kind, or a recipe with a model of under {LARGEST_AS_IT_IS:,} parameters"
        )
    return model


def _small_decoder(model: Any, layers: int) -> Any:
    names = {field.name for field in fields(model)}
    changes: dict[str, Any] = {name: size for name, size in SMALL.items() if getattr(model, name, None) is not None and name in names}
    changes["layers"] = layers
    changes["heads"] = 4
    if "kv_heads" in names:
        group = model.heads // model.kv_heads
        changes["kv_heads"] = min(model.kv_heads, 4 if group <= 4 else 2)
        changes["heads"] = changes["kv_heads"] * group
        if model.head_size is None:
            changes["width"] = 4 * changes["heads"]
    if "dense_layers" in names:
        changes["dense_layers"] = min(model.dense_layers, 1)
    if "shared_experts" in names:
        changes["shared_experts"] = min(model.shared_experts, 2)
    if "routing" in names:
        changes["routing"] = _small_routing(model.routing)
    return replace(model, **changes)


def _small_routing(routing: RoutingConfig) -> RoutingConfig:
    """Few experts, in groups of two at least, of which some stay out of reach if they did."""
    groups = min(routing.groups, 4)
    chosen_groups = min(routing.chosen_groups, max(1, groups // 2)) if routing.chosen_groups < routing.groups else groups
    chosen = min(routing.chosen, 3, EXPERTS * chosen_groups // groups)
    return replace(routing, experts=EXPERTS, groups=groups, chosen_groups=chosen_groups, chosen=chosen)
