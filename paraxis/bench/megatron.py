"""A step of a GPT under Megatron-LM or Megatron-DeepSpeed, priced from one traced rank: what `paraxis bench planner` says of their rows.

Stages of these pipelines are like pieces of one model, so two blocks between an embedding and a head are traced once, without a pipeline,
and every stage is put together from the pieces. What differs from a run of ours stands here, from the sources of both (2021 to 2023):

- The host runs ahead of the device: an action takes as long as its kernels, or as the host needs to start them all.
- A message between stages carries a tensor-parallel rank's part of the activations, which the receiver gathers inside its host
  (`scatter_gather_tensors_in_pipeline`, `pipe_partitioned`); sending and receiving keep the device waiting (`batch_isend_irecv`).
- Replicas sum their gradients in half precision after the last backward, overlapped with nothing, from a buffer that they are copied into,
  scaled in and copied out of (`allreduce_gradients`); first and last stage sum those of the embedding that they share.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from paraxis.base.schedule import Action, Schedule
from paraxis.base.strategy import ParallelConfig
from paraxis.models.gpt import GPTConfig
from paraxis.plan.fusion import last_uses, merged
from paraxis.plan.hardware import Cluster
from paraxis.plan.operators import Operator
from paraxis.plan.pretend import PretendedDevice
from paraxis.plan.rates import Accelerator
from paraxis.plan.record import Trace
from paraxis.plan.simulate import Compute, play_pipeline
from paraxis.plan.timing import kernel_s
from paraxis.plan.trace import trace_step
from paraxis.train.config import RunConfig
from paraxis.train.stages import build_order

BLOCKS = 2  # traced; the second stands for all
HALF = 2  # bytes of a number in fp16 and bf16

Shape = tuple[int, int, int, int, int, int, str]


@dataclass(frozen=True)
class Pieces:
    """What a device is asked for by each piece of a micro-batch: the embedding, one block, the head with the loss (forward and backward
    together); and by the optimizer for `parameters` of them."""

    embed: Sequence[Operator]
    forward: Sequence[Operator]
    head: Sequence[Operator]
    backward: Sequence[Operator]
    embed_backward: Sequence[Operator]
    update: Sequence[Operator]
    parameters: int

    @staticmethod
    def cut(trace: Trace, parameters: int) -> "Pieces":
        """The pieces of the last micro-batch, which adds to gradients that are there."""
        batches = [mark.operator for mark in trace.marks if mark.kind == "batch"]
        first, tail = batches[-1], next(mark.operator for mark in trace.marks if mark.kind == "tail")
        last_use = last_uses(trace.operators)
        phases = trace.phases
        ends = [*(phase.operator for phase in phases[1:]), len(trace.operators)]
        found: dict[tuple[str, int], list[Operator]] = {}
        for phase, end in zip(phases, ends, strict=True):
            if first <= phase.operator < tail:
                operators, _ = merged(trace.operators[phase.operator : min(end, tail)], min(end, tail), last_use)
                found.setdefault((phase.kind, phase.block), []).extend(operators)
        before_blocks = next(phase.operator for phase in phases if phase.operator >= first and phase.kind == "forward")
        return Pieces(
            embed=trace.operators[first:before_blocks],
            forward=found["forward", BLOCKS - 1],
            head=found["between", -1],
            backward=found["backward", BLOCKS - 1],
            embed_backward=found["after", -1],
            update=[*trace.operators[: batches[0]], *trace.operators[tail:]],
            parameters=parameters,
        )


def shape(config: RunConfig) -> Shape:
    """What the pieces of a run depend on."""
    model = config.model
    return (
        model.width,
        model.heads,
        model.vocab_size,
        config.data.seq_len,
        config.train.micro_batch,
        config.parallel.tp,
        config.remat.mode,
    )


def trace_pieces(config: RunConfig, known: dict[Shape, Pieces]) -> Pieces:
    """The pieces of a run, traced unless they are `known`, to which they are added."""
    key = shape(config)
    if key not in known:
        tp = config.parallel.tp
        tensor = {"tp": tp, "sequence_parallel": False} if tp > 1 else {}
        small = replace(
            config,
            model=replace(config.model, layers=BLOCKS),
            train=replace(config.train, global_tokens=0),
            parallel=ParallelConfig(**tensor, microbatches=2, reduce="step", reshard="never"),  # type: ignore[arg-type]
            compile="none",  # what a compiler would merge is merged in the pieces
        )
        trace = trace_step(small, tp, 0, PretendedDevice("cpu", 0, "GPU", 1 << 60))
        known[key] = Pieces.cut(trace, rank_parameters(config.model, tp, BLOCKS, embedding=True))
    return known[key]


def rank_parameters(model: GPTConfig, tp: int, blocks: int, *, embedding: bool) -> int:
    """Entries of the matrices that one rank holds of so many blocks, and of the embedding."""
    block = 4 * model.width**2 + 2 * model.width * model.inner_width
    return (blocks * block + embedding * model.vocab_size * model.width) // tp


@dataclass(frozen=True)
class Work:
    """Seconds of kernels on the device, exchanges included, and how many the host starts."""

    device_s: float = 0.0
    kernels: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.device_s + other.device_s, self.kernels + other.kernels)

    def __mul__(self, times: int) -> "Work":
        return Work(self.device_s * times, self.kernels * times)


def work(operators: Sequence[Operator], accelerator: Accelerator, cluster: Cluster) -> Work:
    """What operators take; of tensor-parallel ranks, the first on the first host."""
    asked = [operator for operator in operators if operator.sort != "wait" and (operator.sort != "exchange" or len(operator.group) > 1)]
    seconds = 0.0
    for operator in asked:
        if operator.exchange is not None:
            seconds += cluster.exchange_s(operator.exchange, operator.bytes, operator.group)
        else:
            seconds += kernel_s(operator, accelerator)
    return Work(seconds, len(asked))


@dataclass(frozen=True)
class MegatronStep:
    """A step of `config` on `cluster`, which has a device for every rank: tensor-parallel ranks follow each other, then replicas, then
    stages."""

    config: RunConfig
    pieces: Pieces
    cluster: Cluster

    @cached_property
    def _work(self) -> Mapping[str, Work]:
        accelerator = self.cluster.accelerator_of(0)
        names = ("embed", "forward", "head", "backward", "embed_backward")
        return {name: work(getattr(self.pieces, name), accelerator, self.cluster) for name in names}

    @cached_property
    def _schedule(self) -> Schedule | None:
        return build_order(self.config, self.config.parallel.degrees) if self.config.parallel.pp > 1 else None

    @property
    def _stages(self) -> int:
        return self._schedule.stages if self._schedule else 1

    @property
    def _blocks(self) -> int:
        """Of a stage."""
        return self.config.model.layers // self._stages

    @property
    def _stage_ranks(self) -> int:
        return self.config.parallel.dp * self.config.parallel.tp

    def _seconds(self, done: Work) -> float:
        return max(done.device_s, done.kernels * self.cluster.accelerator_of(0).launch_s)

    def forward_s(self, stage: int) -> float:
        """Of one micro-batch, without messages. The head's is counted in backward, which follows at once."""
        own = self._work["forward"] * self._blocks
        return self._seconds(own + self._work["embed"] if stage == 0 else own)

    def backward_s(self, stage: int) -> float:
        """Of one micro-batch, without messages, what it recomputes included."""
        own = self._work["backward"] * self._blocks
        if stage == self._stages - 1:
            own += self._work["head"]
        return self._seconds(own + self._work["embed_backward"] if stage == 0 else own)

    @cached_property
    def message_bytes(self) -> int:
        """Of the activations between two stages, all tensor-parallel ranks' parts together."""
        return HALF * self.config.train.micro_batch * self.config.data.seq_len * self.config.model.width

    def _sending_s(self, source: int, target: int) -> float:
        """From one rank of the pipeline to another: every tensor-parallel rank its part."""
        return self.cluster.exchange_s(
            "p2p", self.message_bytes // self.config.parallel.tp, [source * self._stage_ranks, target * self._stage_ranks]
        )

    @cached_property
    def _gathering_s(self) -> float:
        """Putting the parts of what was received together."""
        return self.cluster.exchange_s("all_gather", self.message_bytes, range(self.config.parallel.tp))

    def _action(self, action: Action) -> Compute:
        schedule = self._schedule
        assert schedule is not None
        seconds = (self.forward_s if action.kind == "F" else self.backward_s)(action.stage)
        before, after = (action.stage - 1, action.stage + 1) if action.kind == "F" else (action.stage + 1, action.stage - 1)
        if 0 <= before < self._stages:
            seconds += self._gathering_s
        if 0 <= after < self._stages:
            seconds += self._sending_s(schedule.rank_of[action.stage], schedule.rank_of[after])
        return Compute(seconds)

    @cached_property
    def passes_s(self) -> float:
        """All micro-batches, forward and backward."""
        if self._schedule is None:
            rows = self.config.train.micro_batch * self.config.parallel.dp
            batches = self.config.rows_per_step(self.config.parallel.degrees) // rows
            parts = ("embed", "head", "embed_backward")
            whole = (self._work["forward"] + self._work["backward"]) * self._blocks
            return batches * self._seconds(sum((self._work[part] for part in parts), whole))
        # Messages are part of the actions, since they keep the device waiting.
        players = play_pipeline(self._schedule, lambda action: [self._action(action)], lambda source, target: 0.0)
        return max(player.now_s for player in players)

    def rank_parameters(self, pipeline_rank: int) -> int:
        """Entries that a rank holds; the last stage has an embedding of its own, which the head is."""
        parallel, model = self.config.parallel, self.config.model
        ends = pipeline_rank in (0, parallel.pp - 1)
        return rank_parameters(model, parallel.tp, model.layers // parallel.pp, embedding=ends)

    def tail_s(self, pipeline_rank: int) -> float:
        """After the passes: gradients summed over replicas, those of the embedding over both ends, and the optimizer."""
        accelerator, parallel = self.cluster.accelerator_of(0), self.config.parallel
        parameters = self.rank_parameters(pipeline_rank)
        first = pipeline_rank * self._stage_ranks
        seconds = work(self.pieces.update, accelerator, self.cluster).device_s * parameters / self.pieces.parameters
        if parallel.dp > 1:
            bytes = HALF * parameters
            seconds += self.cluster.exchange_s("all_reduce", bytes, range(first, first + self._stage_ranks, parallel.tp))
            seconds += 3 * accelerator.moving_s(2 * bytes)
        if parallel.pp > 1 and pipeline_rank in (0, parallel.pp - 1):
            shared = HALF * self.config.model.vocab_size * self.config.model.width // parallel.tp
            seconds += self.cluster.exchange_s("all_reduce", shared, [0, (parallel.pp - 1) * self._stage_ranks])
        return seconds

    @property
    def step_s(self) -> float:
        return self.passes_s + max(self.tail_s(rank) for rank in range(self.config.parallel.pp))

    def slowest(self) -> tuple[float, float]:
        """Seconds of one micro-batch's forward and backward on the rank of the pipeline that has most to do, all its stages together."""

        def of(rank: int) -> Iterator[tuple[float, float]]:
            for stage, holder in enumerate(self._schedule.rank_of if self._schedule else [0]):
                if holder == rank:
                    yield self.forward_s(stage), self.backward_s(stage)

        both = [tuple(map(sum, zip(*of(rank), strict=True))) for rank in range(self.config.parallel.pp)]
        forward_s, backward_s = max(both, key=sum)
        return forward_s, backward_s
