"""Runs as Python functions: each returns the configuration of a whole run."""

from collections.abc import Callable

from paraxis.recipes import deepseek, gpt, llama3, qwen3, small
from paraxis.train.config import RunConfig

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "debug": small.debug,
    "demo": small.demo,
    "gpt2_124m": gpt.gpt2_124m,
    "llama3_1b": llama3.llama3_1b,
    "llama3_3b": llama3.llama3_3b,
    "llama3_8b": llama3.llama3_8b,
    "llama3_70b": llama3.llama3_70b,
    "llama3_405b": llama3.llama3_405b,
    "deepseek_v2_lite": deepseek.deepseek_v2_lite,
    "deepseek_v2": deepseek.deepseek_v2,
    "deepseek_v3_16b": deepseek.deepseek_v3_16b,
    "deepseek_v3": deepseek.deepseek_v3,
    "qwen3_600m": qwen3.qwen3_600m,
    "qwen3_1700m": qwen3.qwen3_1700m,
    "qwen3_4b": qwen3.qwen3_4b,
    "qwen3_8b": qwen3.qwen3_8b,
    "qwen3_14b": qwen3.qwen3_14b,
    "qwen3_32b": qwen3.qwen3_32b,
    "qwen3_30b_a3b": qwen3.qwen3_30b_a3b,
    "qwen3_235b_a22b": qwen3.qwen3_235b_a22b,
}
