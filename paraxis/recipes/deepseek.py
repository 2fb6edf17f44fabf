"""DeepSeek-V2 and V3 with their true shapes, as runs: `paraxis train deepseek_v2_lite --data.paths=... --data.tokenizer=...`.

Peak learning rates, rows of 4,096 tokens, and pipeline and expert degrees of the largest are the papers' (arXiv:2405.04434, section 3.1
and appendix B; arXiv:2412.19437, sections 3.2 and 4.2; arXiv:2502.16982).
"""

from paraxis.models import deepseek
from paraxis.recipes.pretraining import pretraining
from paraxis.train.config import RunConfig


def deepseek_v2_lite() -> RunConfig:
    """DeepSeek-V2-Lite: 16B, of which a token uses 2.4B; experts shared out in a host of eight."""
    return pretraining("deepseek_v2_lite", deepseek.deepseek_v2_lite(), lr=4.2e-4, ep=8)


def deepseek_v2() -> RunConfig:
    """DeepSeek-V2: 236B, of which a token uses 21B; 16 pipeline stages."""
    return pretraining("deepseek_v2", deepseek.deepseek_v2(), lr=2.4e-4, ep=8, pp=16, remat="full")


def deepseek_v3() -> RunConfig:
    """DeepSeek-V3: 671B, of which a token uses 37B; 16 pipeline stages, experts shared out over eight hosts."""
    return pretraining("deepseek_v3", deepseek.deepseek_v3(), lr=2.2e-4, ep=64, pp=16, remat="full")


def deepseek_v3_16b() -> RunConfig:
    """V3's kind of model at 16B, of which a token uses 3B, in Moonlight's shape; experts shared out in a host of eight."""
    return pretraining("deepseek_v3_16b", deepseek.deepseek_v3_16b(), lr=4.2e-4, ep=8)
