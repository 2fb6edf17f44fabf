"""Another value in an object's place for a while."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Generator[None]:
    """While inside, `owner.name` is `value`."""
    held: Mapping[str, Any] = cast("Mapping[str, Any]", vars(owner))
    own, before = name in held, held.get(name)  # a class's method as it lies there, not bound
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)  # what it inherits shows again
