"""What saving needs of the other processes: small JSON values, to rank 0 and back. Never pickle."""

from dataclasses import dataclass
from typing import Any, Protocol


class Ranks(Protocol):
    """The processes that save one checkpoint together; all of them call each method, in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather_json(self, value: Any) -> list[Any] | None:
        """Every rank's `value` in rank order on rank 0; None on the others."""
        ...

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        ...


@dataclass(frozen=True)
class OneProcess:
    """The `Ranks` of a process that saves alone."""

    rank: int = 0
    size: int = 1

    def gather_json(self, value: Any) -> list[Any] | None:
        return [value]

    def broadcast_json(self, value: Any) -> Any:
        return value
