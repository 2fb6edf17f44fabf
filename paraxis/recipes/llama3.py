"""Llama 3.1 and 3.2 with their true shapes, as runs: `paraxis train llama3_8b --data.paths=... --data.tokenizer=...`."""

from paraxis.models import llama
from paraxis.recipes.pretraining import pretraining
from paraxis.train.config import RunConfig


def llama3_1b() -> RunConfig:
    """Llama 3.2 1B: tied embeddings, RoPE scaled by 32."""
    return pretraining("llama3_1b", llama.llama3_1b(), seq_len=8192, lr=4e-4, remat="none")


def llama3_3b() -> RunConfig:
    """Llama 3.2 3B: tied embeddings, RoPE scaled by 32."""
    return pretraining("llama3_3b", llama.llama3_3b(), seq_len=8192, lr=3e-4, remat="none")


def llama3_8b() -> RunConfig:
    """Llama 3.1 8B."""
    return pretraining("llama3_8b", llama.llama3_8b(), seq_len=8192, lr=3e-4)


def llama3_70b() -> RunConfig:
    """Llama 3.1 70B, eight tensor-parallel ranks in a host."""
    return pretraining("llama3_70b", llama.llama3_70b(), seq_len=8192, lr=1.5e-4, tp=8, remat="full")


def llama3_405b() -> RunConfig:
    """Llama 3.1 405B, eight tensor-parallel ranks in a host."""
    return pretraining("llama3_405b", llama.llama3_405b(), seq_len=8192, lr=8e-5, tp=8, remat="full")
