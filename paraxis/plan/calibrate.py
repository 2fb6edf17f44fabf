"""Measuring a machine or a cluster: matrix products, attention, memory, and collectives under NCCL or gloo, as the planner's tables.

Every rank measures its own device at the same time, as in training; one of each kind of device is kept. Collectives are measured in
growing groups of ranks that follow each other, so that those of one host come first, and messages between neighbours and hosts.
"""

import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paraxis.base.device import Device
from paraxis.base.errors import ConfigError
from paraxis.observe.stopwatch import median_s
from paraxis.ops.attention import choose_attention
from paraxis.parallel.world import World
from paraxis.plan.cluster_file import read_cluster, ready_clusters
from paraxis.plan.hardware import Cluster, Exchange, ExchangeKind, Link, Pool
from paraxis.plan.operators import DTYPES
from paraxis.plan.rates import Accelerator, AttentionTime, Move, Product

MIB = 1 << 20
NVLINK_BYTES_PER_S, INFINIBAND_BYTES_PER_S = 80e9, 5e9  # a link of one host, or between hosts, that is faster is taken for one


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What is measured: products (m, n, k), attention (rows, heads, kv heads, width, length), bytes of moves and of exchanges."""

    dtypes: Sequence[torch.dtype]
    products: Sequence[tuple[int, int, int]]
    attentions: Sequence[tuple[int, int, int, int, int]]
    moves: Sequence[int]
    exchanges: Sequence[int]


def usual(device: Device, *, quick: bool = False) -> Effort:
    """What is worth measuring on a device; `quick` a fraction of it."""
    if not device.is_cuda:
        products = [(size, size, size) for size in ((128, 512) if quick else (64, 128, 256, 512, 1024))]
        attentions = [(1, 4, 4, 32, length) for length in ((128,) if quick else (128, 256, 512))]
        sizes = [1 << power for power in ((16, 20) if quick else (12, 14, 16, 18, 20, 22, 24))]
        return Effort(dtypes=(torch.float32,), products=products, attentions=attentions, moves=sizes, exchanges=sizes)
    tokens = (8192,) if quick else (1024, 4096, 16384)
    weights = ((4096, 4096), (14336, 4096)) if quick else ((1024, 4096), (4096, 4096), (14336, 4096), (8192, 8192), (2048, 2048))
    # A layer's forward, and backward by its input and by its weight; then the vocabulary's.
    products = [shape for t in tokens for n, k in weights for shape in ((t, n, k), (t, k, n), (n, k, t))]
    products += [(2048, 128256, 4096), (128256, 4096, 2048), (2048, 4096, 128256), (512, 512, 512), (8192, 8192, 8192)]
    lengths = (8192,) if quick else (1024, 2048, 4096, 8192, 16384)
    attentions = [(max(1, 8192 // length), 32, 8, 128, length) for length in lengths]
    attentions += [] if quick else [(2, 16, 16, 64, 2048), (4, 32, 32, 128, 2048)]
    sizes = [1 << power for power in (range(20, 31, 5) if quick else range(10, 31, 2))]
    return Effort(dtypes=(torch.bfloat16, torch.float32), products=products, attentions=attentions, moves=sizes, exchanges=sizes)


def measure_products(device: Device, effort: Effort) -> list[Product]:
    """Every shape in every dtype; in fp32 only small ones, which take long."""
    found = []
    for dtype in effort.dtypes:
        for m, n, k in effort.products:
            if dtype == torch.float32 and m * n * k > 1 << 34:
                continue
            left, right = (torch.randn(shape, dtype=dtype, device=device.torch) for shape in ((m, k), (n, k)))
            seconds = median_s(lambda left=left, right=right: left @ right.t(), device)
            found.append(Product(dtype=DTYPES[dtype], m=m, n=n, k=k, seconds=seconds))
    return found


def measure_attention(device: Device, effort: Effort) -> list[AttentionTime]:
    """The attention that training would choose, forward and backward."""
    dtype, found = effort.dtypes[0], []
    for batch, heads, kv_heads, width, length in effort.attentions:
        attend = choose_attention("auto", device, False, width, dtype)
        q, k, v, cotangent = (
            torch.randn(batch, length, h, width, dtype=dtype, device=device.torch, requires_grad=number < 3)
            for number, h in enumerate((heads, kv_heads, kv_heads, heads))
        )

        def forward(attend: Any = attend, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return attend(q, k, v, None)

        with torch.no_grad():
            forward_s = median_s(forward, device)
        out = forward()
        backward_s = median_s(lambda out=out, q=q, k=k, v=v, c=cotangent: torch.autograd.grad(out, (q, k, v), c, retain_graph=True), device)
        sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "width": width, "length": length}
        found.append(AttentionTime(dtype=DTYPES[dtype], **sizes, forward_s=forward_s, backward_s=backward_s))
    return found


def measure_moves(device: Device, effort: Effort) -> list[Move]:
    """An elementwise kernel over so many bytes, which it reads and writes once: twice as many in all."""
    found = []
    for size in effort.moves:
        source = torch.ones(size // 4, dtype=torch.float32, device=device.torch)
        target = torch.empty_like(source)
        found.append(Move(bytes=2 * size, seconds=median_s(lambda a=source, b=target: torch.mul(a, 2.0, out=b), device)))
    return found


def measure_launch_s(device: Device) -> float:
    """What the host needs to start a kernel: a share of many small ones."""
    x, number = torch.zeros(1, device=device.torch), 200

    def many() -> None:
        for _ in range(number):
            x.add_(1.0)

    return median_s(many, device) / number


def measure_overlap(device: Device) -> float:
    """How many times as long products take while all ranks gather; 1 where it makes no difference."""
    size = 4096 if device.is_cuda else 256
    x = torch.randn(size, size, dtype=torch.bfloat16 if device.is_cuda else torch.float32, device=device.torch)
    part = torch.ones((64 if device.is_cuda else 1) * MIB, device=device.torch)
    whole = part.new_empty(part.numel() * dist.get_world_size())

    def products() -> None:
        for _ in range(20):
            torch.mm(x, x)

    works: list[Any] = []

    def beside() -> None:
        # Enough messages to outlast the products; those of the turn before have ended by then.
        works.extend(_GATHER(whole, part, async_op=True) for _ in range(2))
        products()

    alone_s, beside_s = median_s(products, device), median_s(beside, device)
    for work in works:
        work.wait()
    return max(1.0, beside_s / alone_s) if device.is_cuda else 1.0


_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _calls(ranks: Sequence[int], group: Any, buffer: Tensor, rank: int) -> dict[ExchangeKind, Callable[[], Any]]:
    """What this rank does in each collective of a group on a whole buffer; `p2p` is a message from the first to the last, and back."""
    size = len(ranks)
    part, other = buffer[: buffer.numel() // size].clone(), torch.empty_like(buffer)

    def message() -> None:
        if rank == ranks[0]:
            dist.send(buffer, ranks[-1], group=group)
            dist.recv(other, ranks[-1], group=group)
        elif rank == ranks[-1]:
            dist.recv(other, ranks[0], group=group)
            dist.send(buffer, ranks[0], group=group)

    return {
        "all_gather": lambda: _GATHER(other, part, group=group),
        "reduce_scatter": lambda: _SCATTER(part, buffer, group=group),
        "all_reduce": lambda: dist.all_reduce(other, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, buffer, group=group),
        "p2p": message,
    }


def measure_exchanges(world: World, effort: Effort, hosts: Sequence[str], *, pairs: bool = False) -> list[tuple[Sequence[int], Exchange]]:
    """Every collective in the first 2, 4, 8 ... ranks and in all of them, or only messages between the first ranks of each pair of hosts.

    `hosts` names each rank's. The slowest rank's time counts. Every rank has the same list, each group's ranks beside its time.
    """
    groups = list(_pairs_of_hosts(hosts)) if pairs else list(_growing(world.size))
    found: list[tuple[Sequence[int], Exchange]] = []
    for ranks in groups:
        group: Any = dist.new_group(list(ranks))
        for size in effort.exchanges if world.rank in ranks else ():
            number = -(-size // (4 * len(ranks))) * len(ranks)
            calls = _calls(ranks, group, torch.zeros(number, device=world.device.torch), world.rank)
            for kind in ("p2p",) if pairs else calls:
                if kind == "p2p" and len(ranks) > 2:
                    continue
                dist.barrier(group)
                seconds = torch.tensor([median_s(calls[kind], world.device)], dtype=torch.float64, device=world.device.torch)
                dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
                spread = len({hosts[rank] for rank in ranks})
                one_way = seconds.item() / (2 if kind == "p2p" else 1)
                found.append((ranks, Exchange(kind=kind, ranks=len(ranks), hosts=spread, bytes=4 * number, seconds=one_way)))
        dist.barrier()
    return found


def _growing(ranks: int) -> Iterable[range]:
    sizes = {ranks, *(1 << power for power in range(1, ranks.bit_length()) if 1 << power <= ranks)} - {1}
    return (range(size) for size in sorted(sizes))


def _pairs_of_hosts(hosts: Sequence[str]) -> Iterable[tuple[int, int]]:
    first = {host: rank for rank, host in reversed(list(enumerate(hosts)))}
    return combinations(sorted(first.values()), 2)


@dataclass(frozen=True)
class Measured:
    """What the ranks have measured; `hosts` and `devices` name each rank's."""

    hosts: Sequence[str]
    devices: Sequence[Mapping[str, Any]]
    exchanges: Sequence[tuple[Sequence[int], Exchange]]
    messages: Sequence[tuple[Sequence[int], Exchange]] = field(default=())


def measure(world: World, effort: Effort, *, devices: bool = True, say: Callable[[str], None] = lambda text: None) -> Measured | None:
    """Measures this rank's device (unless `devices` is false) and the links; the result is on rank 0, None on the others."""
    own: dict[str, Any] = {"name": world.device.name, "memory_bytes": world.device.memory_bytes}
    if devices:
        say("matrix products")
        own["products"] = [asdict(one) for one in measure_products(world.device, effort)]
        say("attention")
        own["attentions"] = [asdict(one) for one in measure_attention(world.device, effort)]
        say("memory")
        own["moves"] = [asdict(one) for one in measure_moves(world.device, effort)]
        own["launch_s"] = measure_launch_s(world.device)
    hosts: list[str] = world.broadcast_json(world.gather_json(platform.node()))
    exchanges: list[tuple[Sequence[int], Exchange]] = []
    messages: list[tuple[Sequence[int], Exchange]] = []
    if world.size > 1:
        say("collectives")
        exchanges = measure_exchanges(world, effort, hosts)
        messages = measure_exchanges(world, effort, hosts, pairs=True)
        own["overlap"] = measure_overlap(world.device) if devices else 1.0
    told = [[list(ranks), asdict(one)] for ranks, one in messages if world.rank == ranks[0]]
    gathered = world.gather_json([own, told])
    if gathered is None:
        return None
    all_messages = [(ranks, Exchange(**one)) for _, rank_told in gathered for ranks, one in rank_told]
    return Measured(hosts, [device for device, _ in gathered], exchanges, all_messages)


def describe_cluster(measured: Measured, name: str, versions: Mapping[str, str], date: str) -> Cluster:
    """The cluster file's content. Raises ConfigError where hosts have different numbers of devices of one kind."""
    by_host: dict[str, list[Mapping[str, Any]]] = {}
    for host, device in zip(measured.hosts, measured.devices, strict=True):
        by_host.setdefault(host, []).append(device)
    kinds = {host: (own[0]["name"], len(own)) for host, own in by_host.items()}
    if any(device["name"] != kinds[host][0] for host, own in by_host.items() for device in own):
        raise ConfigError("a host has devices of different kinds; probe each kind by itself, and join the files by hand")
    said = f"paraxis probe, {date}"
    links = _links(measured, said)
    accelerators = {_slug(one["name"]): _accelerator(one, said) for one in reversed(measured.devices)}
    network = "network" if "network" in links else ""
    pools: list[Pool] = []
    for device, number in dict.fromkeys(kinds.values()):
        hosts = sum(kind == (device, number) for kind in kinds.values())
        pools.append(Pool(hosts=hosts, devices=number, accelerator=_slug(device), inside="inside", network=network if hosts > 1 else ""))
    matrix = _matrix(measured) if len(by_host) > 2 else ()
    between = network if len(pools) > 1 else ""
    return Cluster(
        name=name, accelerators=accelerators, links=links, pools=tuple(pools), between=between, matrix=matrix, versions=versions, date=date
    )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _accelerator(one: Mapping[str, Any], said: str) -> Accelerator:
    """A measured device; its peaks are the data sheet's where a ready file has it, else the best that was measured."""
    products = tuple(Product(**row) for row in one.get("products", ()))
    moves = tuple(Move(**row) for row in one.get("moves", ()))
    known = next((a for ready in ready_clusters() for a in read_cluster(ready).accelerators.values() if a.name == one["name"]), None)
    best: dict[str, float] = {}
    for p in products:
        best[p.dtype] = max(best.get(p.dtype, 0.0), 2.0 * p.m * p.n * p.k / p.seconds)
    return Accelerator(
        name=one["name"],
        memory_bytes=one["memory_bytes"],
        bytes_per_s=known.bytes_per_s if known else max((m.bytes / m.seconds for m in moves), default=1e9),
        peak_flops={**best, **known.peak_flops} if known else best,
        source=known.source if known else "the best that was measured",
        measured=said,
        launch_s=one.get("launch_s", 4e-6),
        overlap=max(1.0, one.get("overlap", 1.0)),
        products=products,
        attentions=tuple(AttentionTime(**row) for row in one.get("attentions", ())),
        moves=moves,
    )


def _links(measured: Measured, said: str) -> dict[str, Link]:
    """The link inside hosts, and the network between them; what cannot be measured on one device is a guess that says so."""
    found: dict[str, Link] = {}
    cuda = any("NVIDIA" in device["name"] or "AMD Instinct" in device["name"] for device in measured.devices)
    for name, across in (("inside", False), ("network", True)):
        exchanges = tuple(one for _, one in measured.exchanges if (one.hosts > 1) == across)
        messages = [one for _, one in (*measured.messages, *measured.exchanges) if one.kind == "p2p" and (one.hosts > 1) == across]
        if not exchanges:
            if not across:
                kind, rate = ("nvlink", NVLINK_BYTES_PER_S) if cuda else ("memory", 1e9)
                found[name] = Link(name=name, kind=kind, bytes_per_s=rate, source="a guess: one rank has no link to measure")
            continue
        rate = max((one.bytes / one.seconds for one in messages), default=max(one.bytes / one.seconds for one in exchanges))
        fast = rate > (INFINIBAND_BYTES_PER_S if across else NVLINK_BYTES_PER_S)
        kind = (("infiniband" if fast else "ethernet") if across else ("nvlink" if fast else "pcie")) if cuda else "memory"
        if across and not cuda:
            kind = "ethernet"
        found[name] = Link(name=name, kind=kind, bytes_per_s=rate, share=1.0, source="messages", measured=said, exchanges=exchanges)
    return found


def _matrix(measured: Measured) -> tuple[tuple[float, ...], ...]:
    """Bytes/s between the first ranks of each two hosts, of the largest message."""
    hosts = list(dict.fromkeys(measured.hosts))
    found = [[0.0] * len(hosts) for _ in hosts]
    for (one, other), message in measured.messages:
        a, b = hosts.index(measured.hosts[one]), hosts.index(measured.hosts[other])
        found[a][b] = found[b][a] = message.bytes / message.seconds  # sizes rise: the last counts
    return tuple(tuple(row) for row in found)
