"""What a stream may still read is not given to another: FSDP's streams, and ours, told apart by a clock for each.

The step is traced as the planner does it, with streams that remember who has waited for whom. Memory belongs to the stream that it was
asked for on, which may have it again as soon as it is let go of. So by then that stream has to have waited for all that others do with it.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from paraxis.base.replaced import replaced
from paraxis.parallel.reduction import Reduction
from paraxis.plan.operators import Operator
from paraxis.plan.pretend import PretendedDevice
from paraxis.plan.record import Recorder
from paraxis.plan.trace import trace_step
from tests.plan.test_timing import config_of

HOPPER = PretendedDevice("cpu", 0, "NVIDIA H100 80GB HBM3", 79 << 30, (9, 0))


class Clocks:
    """How much each stream was asked for, and how much of each other's it has waited for."""

    def __init__(self) -> None:
        self._known: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        self._streams: list[Any] = []  # kept, so that numbers stay theirs

    def tick(self) -> tuple[int, int]:
        """Something is asked of the current stream."""
        stream = self.current()
        self._known[stream][stream] += 1
        return stream, self._known[stream][stream]

    def current(self) -> int:
        stream = torch.cpu.current_stream()
        if stream not in self._streams:
            self._streams.append(stream)
        return id(stream)

    def has_waited(self, stream: int, other: int, time: int) -> bool:
        return self._known[stream][other] >= time

    def now(self, stream: Any) -> dict[int, int]:
        return dict(self._known[id(stream)])

    def wait(self, stream: Any, known: Mapping[int, int]) -> None:
        mine = self._known[id(stream)]
        for other, time in known.items():
            mine[other] = max(mine[other], time)


class Event:
    """Stands in for a device's event. `clocks` is set for the time of a test."""

    clocks: Clocks

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.known: dict[int, int] = {}

    def record(self, stream: Any = None) -> "Event":
        self.known = self.clocks.now(stream or torch.cpu.current_stream())
        return self

    def wait(self, stream: Any = None) -> None:
        self.clocks.wait(stream or torch.cpu.current_stream(), self.known)

    def synchronize(self) -> None: ...


def found_hazards(settings: dict[str, object], ranks: int) -> list[str]:
    """What is let go of while another stream than its own may still read or write it."""
    clocks, stream = Clocks(), torch.cpu.Stream
    touched: dict[int, dict[int, int]] = defaultdict(dict)
    owners: dict[int, int] = {}
    hazards: list[str] = []
    note, set_size, gone = Recorder.note, Recorder._set, Recorder._gone

    def noted(self: Recorder, operator: Operator) -> None:
        note(self, operator)
        if operator.sort not in ("begin", "wait", "read"):
            on, time = clocks.tick()
            touched.update({number: {**touched[number], on: time} for number, _ in (*operator.reads, *operator.writes)})

    def let_go(self: Recorder, number: int, size: int) -> None:
        owner = owners.get(number)
        for on, time in touched[number].items():
            if owner is not None and not clocks.has_waited(owner, on, time) and on != owner:
                hazards.append(f"{size} bytes of {self.trace.category[number]} in {self.at}")

    def resized(self: Recorder, storage: torch.UntypedStorage, category: str | None) -> None:
        number, held = self._held.get(storage._cdata, (-1, 0))
        if held and not storage.nbytes():
            let_go(self, number, held)
        set_size(self, storage, category)
        owners.setdefault(self._held[storage._cdata][0], clocks.current())

    def ended(self: Recorder, key: int, reference: Any) -> None:
        let_go(self, *self._held[key])
        gone(self, key, reference)

    Event.clocks = clocks
    with (
        replaced(torch.cpu, "Event", Event),
        replaced(stream, "wait_stream", lambda self, other: clocks.wait(self, clocks.now(other))),
        replaced(stream, "record_event", lambda self, event=None: (event or Event()).record(self)),
        replaced(stream, "wait_event", lambda self, event: event.wait(self)),
        replaced(Recorder, "note", noted),
        replaced(Recorder, "_set", resized),
        replaced(Recorder, "_gone", ended),
    ):
        trace_step(config_of({"model.layers": 2, **settings}), ranks, 0, HOPPER)
    return hazards


EACH: dict[str, object] = {"parallel.microbatches": 3, "parallel.reduce": "micro_batch"}
STEP: dict[str, object] = {"parallel.microbatches": 3, "parallel.reduce": "step"}
RUNS: dict[str, tuple[int, dict[str, object]]] = {
    "one micro-batch": (2, {"parallel.fsdp": 2}),
    "summed each micro-batch": (2, {"parallel.fsdp": 2, **EACH}),
    "summed on their way": (2, {"parallel.fsdp": 2, "parallel.travel": "reduced", **EACH}),
    "summed once a step": (2, {"parallel.fsdp": 2, **STEP}),
    "context": (2, {"parallel.cp": 2, **EACH}),
    "replicas": (2, {"parallel.dp": 2, **EACH}),
    "sharded replicas, each": (4, {"parallel.dp": 2, "parallel.fsdp": 2, **EACH}),
    "sharded replicas, once": (4, {"parallel.dp": 2, "parallel.fsdp": 2, **STEP}),
    "pipeline": (4, {"parallel.pp": 2, "parallel.fsdp": 2, "parallel.microbatches": 4, "parallel.reduce": "micro_batch"}),
    "a split backward": (4, {"parallel.pp": 2, "parallel.fsdp": 2, "parallel.schedule": "zbh1", "parallel.microbatches": 4}),
}


@pytest.mark.parametrize("name", RUNS)
def test_no_memory_is_let_go_of_that_another_stream_may_still_use(name: str, apart: Callable[..., Any]):
    ranks, settings = RUNS[name]
    assert apart(lambda: found_hazards(settings, ranks)) == []


def test_a_gradient_that_is_added_on_another_stream_than_its_memorys_is_found(apart: Callable[..., Any]):
    def found() -> list[str]:
        with replaced(Reduction, "_is_let_go", lambda self, dtype: False):
            return found_hazards({"parallel.fsdp": 2, **EACH}, 2)

    assert len(apart(found)) == 2 * 4  # the sums of the second and third micro-batch: of two blocks, the head, and what is left
