"""What the runs of published models share: data to replace by one's own, a cosine schedule, a checkpoint every 500 steps."""

from typing import Any, Literal

from paraxis.base.strategy import ParallelConfig, RematConfig
from paraxis.checkpoint.config import CheckpointConfig
from paraxis.data.config import DataConfig
from paraxis.optim.config import OptimConfig
from paraxis.train.config import RunConfig, TrainConfig


def pretraining(
    name: str,
    model: Any,
    *,
    lr: float,
    seq_len: int = 4096,
    tp: int = 1,
    ep: int = 1,
    pp: int = 1,
    remat: Literal["none", "selective", "full"] = "selective",
) -> RunConfig:
    """A run of `model` with peak learning rate `lr`, on all ranks that the degrees leave to fsdp."""
    return RunConfig(
        name=name,
        model=model,
        data=DataConfig(paths=("stdlib:train",), tokenizer="train:32768", seq_len=seq_len),
        train=TrainConfig(steps=1000),
        optim=OptimConfig(lr=lr, warmup=200, schedule="cosine", final=0.1),
        parallel=ParallelConfig(fsdp=-1, tp=tp, ep=ep, pp=pp),
        remat=RematConfig(mode=remat),
        checkpoint=CheckpointConfig(every=500),
    )
