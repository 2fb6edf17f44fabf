"""Runs for one desk: `demo` learns Python from the standard library in minutes; `debug` proves the machinery in seconds."""

from paraxis.base.strategy import ParallelConfig
from paraxis.checkpoint.config import CheckpointConfig
from paraxis.data.config import DataConfig
from paraxis.models.llama import LlamaConfig
from paraxis.optim.config import OptimConfig
from paraxis.train.config import EvalConfig, RunConfig, TrainConfig


def demo() -> RunConfig:
    """A small Llama on the running Python's own standard library: real text, nothing downloaded, minutes on two cores."""
    return RunConfig(
        name="demo",
        model=LlamaConfig(vocab_size=4096, width=256, layers=4, heads=8, kv_heads=4, mlp_width=704),
        data=DataConfig(paths=("stdlib:train",), tokenizer="train:4096", seq_len=256),
        train=TrainConfig(steps=460, micro_batch=4, sample="def "),
        optim=OptimConfig(lr=3e-3, warmup=40, schedule="cosine", final=0.1),
        parallel=ParallelConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every=230),
        eval=EvalConfig(every=230, paths=("stdlib:heldout",)),
    )


def debug() -> RunConfig:
    """The smallest run with every part of the large ones: seconds on a CPU."""
    return RunConfig(
        name="debug",
        model=LlamaConfig(vocab_size=512, width=64, layers=2, heads=8, kv_heads=4, mlp_width=128),
        data=DataConfig(paths=("stdlib:heldout",), tokenizer="train:512", seq_len=64),
        train=TrainConfig(steps=10, micro_batch=2),
        optim=OptimConfig(lr=1e-3, warmup=2),
        precision="fp32",
    )
