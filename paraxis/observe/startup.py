"""Where the time before a run's first step goes."""

import time

from paraxis.base.env import STARTED_S


class StartUp:
    """Seconds of each stretch of the way to the first step, from when this process, or the one it is a copy of, began to load paraxis."""

    def __init__(self) -> None:
        self._last_s = STARTED_S
        self.seconds: dict[str, float] = {}

    def ends(self, stretch: str) -> None:
        """The stretch that began where the last one ended is over."""
        now_s = time.perf_counter()
        self.seconds[stretch], self._last_s = round(now_s - self._last_s, 3), now_s
