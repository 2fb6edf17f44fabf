"""Llama 3.1 and 3.2 with their true shapes, as runs: `paraxis train llama3_8b --data.paths=... --data.tokenizer=...`."""

from paraxis.base.strategy import ParallelConfig, RematConfig
from paraxis.checkpoint.config import CheckpointConfig
from paraxis.data.config import DataConfig
from paraxis.models import llama
from paraxis.optim.config import OptimConfig
from paraxis.train.config import RunConfig, TrainConfig


def _pretraining(name: str, model: llama.LlamaConfig, *, lr: float, tp: int = 1, remat: str = "selective") -> RunConfig:
    return RunConfig(
        name=name,
        model=model,
        data=DataConfig(paths=("stdlib:train",), tokenizer="train:32768", seq_len=8192),
        train=TrainConfig(steps=1000),
        optim=OptimConfig(lr=lr, warmup=200, schedule="cosine", final=0.1),
        parallel=ParallelConfig(fsdp=-1, tp=tp),
        remat=RematConfig(mode=remat),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(every=500),
    )


def llama3_1b() -> RunConfig:
    """Llama 3.2 1B: tied embeddings, RoPE scaled by 32."""
    return _pretraining("llama3_1b", llama.llama3_1b(), lr=4e-4, remat="none")


def llama3_3b() -> RunConfig:
    """Llama 3.2 3B: tied embeddings, RoPE scaled by 32."""
    return _pretraining("llama3_3b", llama.llama3_3b(), lr=3e-4, remat="none")


def llama3_8b() -> RunConfig:
    """Llama 3.1 8B."""
    return _pretraining("llama3_8b", llama.llama3_8b(), lr=3e-4)


def llama3_70b() -> RunConfig:
    """Llama 3.1 70B, eight tensor-parallel ranks in a host."""
    return _pretraining("llama3_70b", llama.llama3_70b(), lr=1.5e-4, tp=8, remat="full")


def llama3_405b() -> RunConfig:
    """Llama 3.1 405B, eight tensor-parallel ranks in a host."""
    return _pretraining("llama3_405b", llama.llama3_405b(), lr=8e-5, tp=8, remat="full")
