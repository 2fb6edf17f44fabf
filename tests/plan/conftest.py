"""What tests of traces share: a process that has no world, in which one can be pretended."""

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist


@pytest.fixture
def apart(world: Callable[..., list[Any]]) -> Callable[..., Any]:
    """Calls a function in a process of its own, which is in no world yet."""

    def call(function: Callable[..., Any], *args: Any, timeout: float = 100) -> Any:
        def alone() -> Any:
            dist.destroy_process_group()
            return function(*args)

        return world(1, alone, timeout=timeout)[0]

    return call
