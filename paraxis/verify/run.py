"""Running the shrunken recipe on one process and on each layout, in worlds of ranks forked from this process."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from paraxis.base.env import become_worker, count_gpus_without_cuda, read_environment
from paraxis.base.errors import ConfigError, TrainingError
from paraxis.base.seams import Rows
from paraxis.data.config import DataConfig
from paraxis.parallel.world import can_be_copied, join, leave, visible_devices
from paraxis.resilience.fork import WorldError, fork_world
from paraxis.train.config import RunConfig
from paraxis.verify.compare import TOLERANCES, Row, Whole, compare, put_together
from paraxis.verify.layouts import why_not
from paraxis.verify.measure import Measured, measure_rank, with_layout
from paraxis.verify.rows import MadeRows
from paraxis.verify.shrink import OPTIMIZERS, shrunk, with_optimizer

TIMEOUT_S = 600.0  # for one layout; a small model takes a few, eight ranks on two busy cores minutes
CLIPPED_TO = 0.5  # of the first step's norm, so that clipping acts


def verify(
    config: RunConfig, layouts: Sequence[str], *, precision: str = "fp64", steps: int = 3, timeout_s: float = TIMEOUT_S
) -> Iterator[Row]:
    """Runs the recipe, shrunken, on each of `layouts` and yields its verdict as soon as it is known.

    A layout that fails, dies or hangs is a row that says so; the others still run. Ranks are this machine's GPUs where there are enough,
    else CPU processes; they are forked, so this process must have no threads and not have used CUDA. Raises ConfigError, before anything
    runs, for a layout that is refused, a precision that has no tolerance, or GPUs that ranks forked from here could not use, and
    TrainingError where one process fails already.
    """
    if precision not in TOLERANCES:
        raise ConfigError(f"precision={precision!r} cannot be compared number by number; choose one of {', '.join(TOLERANCES)}")
    for layout in layouts:
        if problem := why_not(config, layout, precision):
            raise ConfigError(f"layout {layout}: {problem}")
    count_gpus_without_cuda()
    if visible_devices() and not can_be_copied():
        raise ConfigError(
            "verify forks its ranks, which cannot use GPUs once this process has used CUDA, and it has: a recipe that does so when it is "
            "imported or built, or code that called verify; keep CUDA out of it, or set CUDA_VISIBLE_DEVICES= to verify on CPU processes"
        )
    trials = _Trials(config, precision, steps, timeout_s)
    return (trials.verdict(layout) for layout in layouts)


class _Trials:
    """The runs of one verification. What one process computes is found once for each depth of the model, rows of a step and device."""

    def __init__(self, config: RunConfig, precision: str, steps: int, timeout_s: float) -> None:
        self._config, self._precision, self._steps, self._timeout_s = config, precision, steps, timeout_s
        # AdamW divides by the root of gradients that may be near nothing: in fp32 its weights are rounding.
        self._optimizers = [name for name in OPTIMIZERS if precision == "fp64" or name == "sgd"]
        self._devices = visible_devices()
        torch.compiler.disable(lambda: None)  # loads the compiler: once here, where each rank would load it for half of its time
        self._right: dict[tuple[int, int, bool], tuple[float, dict[str, Whole]]] = {}

    def verdict(self, layout: str) -> Row:
        small = shrunk(self._config, layout, self._precision)
        ranks = small.parallel.degrees.ranks
        gpus = ranks <= self._devices
        clip_norm, expected = self._one_process(small, gpus)
        try:
            found = self._under_each_optimizer(small, clip_norm, gpus)
            return compare(layout, ranks, found, expected, self._precision)
        except WorldError as error:
            return Row(layout, ranks, reason=error.reason, account=str(error))
        except ValueError as error:
            return Row(layout, ranks, reason=str(error))

    def _one_process(self, small: RunConfig, gpus: bool) -> tuple[float, dict[str, Whole]]:
        """What is right for a model of this depth and so many rows, and the norm that gradients are clipped to."""
        key = getattr(small.model, "layers", 0), small.train.global_tokens, gpus
        if key not in self._right:
            alone = with_layout(small, "")
            try:
                [first] = _measured([with_optimizer(alone, "sgd", 0.0)], 0, gpus, self._timeout_s)
                clip_norm = CLIPPED_TO * first.norms[0]
                self._right[key] = clip_norm, self._under_each_optimizer(alone, clip_norm, gpus)
            except (WorldError, ValueError) as error:
                reason = error.reason if isinstance(error, WorldError) else error
                raise TrainingError(f"{self._config.name} fails on one process already, so nothing can be compared: {reason}") from error
        return self._right[key]

    def _under_each_optimizer(self, small: RunConfig, clip_norm: float, gpus: bool) -> dict[str, Whole]:
        configs = [with_optimizer(small, name, clip_norm) for name in self._optimizers]
        return dict(zip(self._optimizers, _measured(configs, self._steps, gpus, self._timeout_s), strict=True))


def rows_of(config: RunConfig) -> Rows:
    """Rows that are made up, of the shape that `config.data` asks for; a recipe's own data is taken as it comes."""
    if isinstance(config.data, DataConfig):
        return MadeRows(config.model.vocab_size, config.data.seq_len, config.data.document_mask)
    return config.data.rows(config.train.seed)


def _measured(configs: Sequence[RunConfig], steps: int, gpus: bool, timeout_s: float) -> list[Whole]:
    """What the ranks of a new world compute under each of `configs`, which differ in their optimizers alone."""
    ranks = configs[0].parallel.degrees.ranks

    def body(rank: int, store_path: Path) -> bytes:
        become_worker(rank, ranks, store_path, gpus)
        torch.set_num_threads(1)
        torch.backends.cudnn.allow_tf32 = False  # of convolutions on GPUs: fp32 is to be fp32, as it is in matrix products
        world = join(read_environment())
        packed = [measure_rank(config, world, rows_of(config), steps).packed() for config in configs]
        dist.barrier()  # nobody leaves while another still needs its connection
        leave()
        return b"".join(len(one).to_bytes(8, "little") + one for one in packed)

    by_rank = [_taken_apart(data) for data in fork_world(body, ranks, timeout_s=timeout_s)]
    return [put_together(of_all_ranks) for of_all_ranks in zip(*by_rank, strict=True)]


def _taken_apart(data: bytes) -> list[Measured]:
    found: list[Measured] = []
    while data:
        size, data = int.from_bytes(data[:8], "little"), data[8:]
        found.append(Measured.unpacked(data[:size]))
        data = data[size:]
    return found
