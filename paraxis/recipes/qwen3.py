"""Qwen3 with its true shapes, as runs: `paraxis train qwen3_8b --data.paths=... --data.tokenizer=...`."""

from paraxis.models import qwen3
from paraxis.recipes.pretraining import pretraining
from paraxis.train.config import RunConfig


def qwen3_600m() -> RunConfig:
    """Qwen3 0.6B: tied embeddings."""
    return pretraining("qwen3_600m", qwen3.qwen3_0_6b(), lr=6e-4, remat="none")


def qwen3_1700m() -> RunConfig:
    """Qwen3 1.7B: tied embeddings."""
    return pretraining("qwen3_1700m", qwen3.qwen3_1_7b(), lr=4e-4, remat="none")


def qwen3_4b() -> RunConfig:
    """Qwen3 4B: tied embeddings."""
    return pretraining("qwen3_4b", qwen3.qwen3_4b(), lr=3e-4)


def qwen3_8b() -> RunConfig:
    """Qwen3 8B."""
    return pretraining("qwen3_8b", qwen3.qwen3_8b(), lr=3e-4)


def qwen3_14b() -> RunConfig:
    """Qwen3 14B."""
    return pretraining("qwen3_14b", qwen3.qwen3_14b(), lr=2e-4)


def qwen3_32b() -> RunConfig:
    """Qwen3 32B, eight tensor-parallel ranks in a host."""
    return pretraining("qwen3_32b", qwen3.qwen3_32b(), lr=1.5e-4, tp=8)


def qwen3_30b_a3b() -> RunConfig:
    """Qwen3 30B with 3B active: 128 experts over the eight ranks of a host."""
    return pretraining("qwen3_30b_a3b", qwen3.qwen3_30b_a3b(), lr=3e-4, ep=8)


def qwen3_235b_a22b() -> RunConfig:
    """Qwen3 235B with 22B active: 128 experts over the ranks of eight hosts."""
    return pretraining("qwen3_235b_a22b", qwen3.qwen3_235b_a22b(), lr=1.5e-4, ep=64, remat="full")
