"""GPT-2 with its true shape, as a run: `paraxis train gpt2_124m --data.paths=... --data.tokenizer=...`."""

from paraxis.models import gpt
from paraxis.recipes.pretraining import pretraining
from paraxis.train.config import RunConfig


def gpt2_124m() -> RunConfig:
    """The smallest GPT-2, in rows of its 1,024 positions; peak learning rate of Brown et al. 2020 (arXiv:2005.14165, table 2.1)."""
    return pretraining("gpt2_124m", gpt.gpt2_124m(), seq_len=1024, lr=6e-4, remat="none")
