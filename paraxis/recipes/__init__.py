"""Runs as Python functions: each returns the configuration of a whole run."""

from collections.abc import Callable

from paraxis.recipes import llama3, small
from paraxis.train.config import RunConfig

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "debug": small.debug,
    "demo": small.demo,
    "llama3_1b": llama3.llama3_1b,
    "llama3_3b": llama3.llama3_3b,
    "llama3_8b": llama3.llama3_8b,
    "llama3_70b": llama3.llama3_70b,
    "llama3_405b": llama3.llama3_405b,
}
