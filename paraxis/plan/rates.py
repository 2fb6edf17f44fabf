"""How fast one accelerator works: times of matrix products, attention and memory traffic, measured where they were, else by the roofline.

A measured time enters as a share: the roofline's time over the measured one. Between measured sizes shares are interpolated over the
logarithms of the sizes, which keeps what lies between, and beyond, within what the hardware can do.
Source of the roofline: Williams et al. 2009, "Roofline: an insightful visual performance model", CACM 52(4).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from paraxis.base.errors import ConfigError

ITEMSIZE = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "float8": 1, "fp4": 0.5}
HOST = ("host_eager_s", "host_compiled_s", "host_selective_s", "host_exchange_s", "host_sharding_s")
SHORTEST_S = 3e-6  # what a device needs for the smallest kernel
NEIGHBOURS = 4  # measured points that an interpolated share is made of


@dataclass(frozen=True, kw_only=True)
class Product:
    """A measured matrix product [m, k] x [k, n]."""

    dtype: str
    m: int
    n: int
    k: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AttentionTime:
    """Measured causal attention of `batch` rows of `length` positions, forward and backward."""

    dtype: str
    batch: int
    heads: int
    kv_heads: int
    width: int
    length: int
    forward_s: float
    backward_s: float


@dataclass(frozen=True, kw_only=True)
class Move:
    """A measured kernel that reads and writes `bytes` in all, and computes next to nothing."""

    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One device: FLOP/s by dtype, bytes and bytes/s of its memory, and what was measured on it. Times are in seconds.

    `reserved_bytes` of the memory are not the allocator's: CUDA's context, libraries' workspaces and NCCL's buffers. `launch_s` is what
    the host needs to start a kernel and nothing else. The shares are what of the roofline is reached where nothing was measured; `overlap`
    is how many times as long computing takes while messages travel, and `posted` beside a receive that waits for its message, as in a
    pipeline one always does: NCCL's kernel holds multiprocessors meanwhile.

    `host_*_s` is what Python, autograd and the dispatcher take on the host to ask for an operator: one that runs eagerly; a kernel of a
    compiled block, with what calling its graph takes, shared out; an operator of a block that is recomputed selectively and not compiled,
    as each comes by Python; an exchange; and to gather a unit's parameters or reduce their gradients (`sharding`), with FSDP's hooks
    around it. They were fitted on runs with 2 H100s, are those of one machine's CPU and torch 2.11, and stand for others where
    `paraxis bench planner --measured FILE --cluster FILE --calibrate` was not run; `fitted` says where it was.
    """

    name: str
    memory_bytes: int
    bytes_per_s: float
    peak_flops: Mapping[str, float]
    source: str = ""
    measured: str = ""
    reserved_bytes: int = 3 << 29
    launch_s: float = 4e-6
    host_eager_s: float = 60e-6
    host_compiled_s: float = 200e-6
    host_selective_s: float = 135e-6
    host_exchange_s: float = 460e-6
    host_sharding_s: float = 560e-6
    fitted: str = ""
    product_share: float = 0.7
    attention_share: float = 0.45
    memory_share: float = 0.8
    overlap: float = 1.1
    posted: float = 1.0
    products: tuple[Product, ...] = field(default=(), repr=False)
    attentions: tuple[AttentionTime, ...] = field(default=(), repr=False)
    moves: tuple[Move, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "bytes_per_s", "product_share", "attention_share", "memory_share"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"device {self.name}: {name}={getattr(self, name)} must be more than 0")
        for name in HOST:
            if getattr(self, name) < 0:
                raise ConfigError(f"device {self.name}: {name}={getattr(self, name)} must be 0 or more")
        for name in ("overlap", "posted"):
            if getattr(self, name) < 1:
                said = f"{name}={getattr(self, name)} must be 1 or more: 1.1 says that computing takes 10 % longer"
                raise ConfigError(f"device {self.name}: {said}")
        if self.reserved_bytes >= self.memory_bytes:
            raise ConfigError(f"device {self.name}: all of its {self.memory_bytes} bytes are reserved; lower reserved_gib")
        for dtype, peak in self.peak_flops.items():
            if dtype not in ITEMSIZE or not peak > 0:
                raise ConfigError(f"device {self.name}: peak of {dtype!r} is {peak}; name one of {', '.join(ITEMSIZE)}, and more than 0")

    @property
    def usable_bytes(self) -> int:
        """What the caching allocator can have of the memory."""
        return self.memory_bytes - self.reserved_bytes

    @property
    def shortest_s(self) -> float:
        """The least that a kernel takes on the device."""
        return min(self.launch_s, SHORTEST_S)

    def peak(self, dtype: str) -> float:
        """FLOP/s of matrix products. Raises ConfigError for a dtype whose peak is not known."""
        if dtype not in self.peak_flops:
            raise ConfigError(f"device {self.name} has no peak for {dtype}; add it to peak_tflops in the cluster file")
        return self.peak_flops[dtype]

    def product_s(self, dtype: str, m: int, n: int, k: int, batch: int = 1) -> float:
        """A product of [m, k] and [k, n], or `batch` of them at once."""
        ideal = batch * self._product_ideal(dtype, m, n, k)
        share = _interpolated(self._product_shares.get(dtype, ()), (batch * m, n, k), self.product_share)
        return max(self.shortest_s, ideal / share)

    def attention_s(
        self, dtype: str, batch: int, heads: int, width: int, queries: int, keys: int, *, causal: bool = True, backward: bool = False
    ) -> float:
        """Fused attention; under a causal mask half of the pairs count. A backward computes 5 products where a forward has 2."""
        ideal = self._attention_ideal(dtype, batch * heads * queries * keys * width, causal, backward)
        measured = self._attention_shares.get((dtype, backward), ())
        return max(self.shortest_s, ideal / _interpolated(measured, (keys, width, batch * heads), self.attention_share))

    def moving_s(self, bytes: float) -> float:
        """A kernel that reads and writes `bytes` in all."""
        return max(self.shortest_s, bytes / self.bytes_per_s / _interpolated(self._move_shares, (max(1, bytes),), self.memory_share))

    def _product_ideal(self, dtype: str, m: int, n: int, k: int) -> float:
        return max(2.0 * m * n * k / self.peak(dtype), ITEMSIZE[dtype] * (m * k + k * n + m * n) / self.bytes_per_s)

    def _attention_ideal(self, dtype: str, entries: float, causal: bool, backward: bool) -> float:
        return (10 if backward else 4) * entries * (0.5 if causal else 1) / self.peak(dtype)

    @cached_property
    def _product_shares(self) -> "dict[str, list[Point]]":
        found: dict[str, list[Point]] = {}
        for p in self.products:
            point = Point((p.m, p.n, p.k), self._product_ideal(p.dtype, p.m, p.n, p.k) / p.seconds)
            found.setdefault(p.dtype, []).append(point)
        return found

    @cached_property
    def _attention_shares(self) -> "dict[tuple[str, bool], list[Point]]":
        found: dict[tuple[str, bool], list[Point]] = {}
        for a in self.attentions:
            entries = a.batch * a.heads * a.length**2 * a.width
            for backward, seconds in ((False, a.forward_s), (True, a.backward_s)):
                share = self._attention_ideal(a.dtype, entries, True, backward) / seconds
                found.setdefault((a.dtype, backward), []).append(Point((a.length, a.width, a.batch * a.heads), share))
        return found

    @cached_property
    def _move_shares(self) -> "list[Point]":
        return [Point((move.bytes,), move.bytes / self.bytes_per_s / move.seconds) for move in self.moves]


@dataclass(frozen=True)
class Point:
    """A share that was measured at these sizes."""

    sizes: Sequence[float]
    share: float


def _interpolated(points: Iterable[Point], sizes: Sequence[float], otherwise: float) -> float:
    """The shares of the nearest points, each weighted by the inverse square of its distance in log size (Shepard 1968)."""
    near = sorted((sum(math.log(a / b) ** 2 for a, b in zip(point.sizes, sizes, strict=True)), point.share) for point in points)[
        :NEIGHBOURS
    ]
    if not near:
        return otherwise
    if near[0][0] < 1e-12:
        return near[0][1]
    weights = [1 / distance for distance, _ in near]
    return sum(weight * share for weight, (_, share) in zip(weights, near, strict=True)) / sum(weights)
