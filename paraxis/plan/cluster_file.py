"""Cluster files: TOML in the units of data sheets (GiB, GB/s, TFLOP/s, microseconds), read and written.

    name = "DGX H100"
    between = "ethernet"            # needed with several pools

    [[pools]]
    hosts = 4
    devices = 8                     # a host
    accelerator = "h100"
    inside = "nvlink"               # links by name, described below
    network = "infiniband"

    [accelerators.h100]
    name = "NVIDIA H100"
    memory_gib = 79.1
    gb_per_s = 3350                 # of its memory
    peak_tflops = { bf16 = 989.4 }
    products = [["bf16", 8192, 8192, 8192, 1395.0]]               # dtype, m, n, k, microseconds
    attentions = [["bf16", 1, 32, 8, 128, 8192, 900.0, 2200.0]]   # dtype, rows, heads, kv heads, width, length, forward, backward
    moves = [[1073741824, 260.0]]                                  # bytes read and written, microseconds

    [links.nvlink]
    kind = "nvlink"
    gb_per_s = 450                  # of one device in one direction
    exchanges = [["all_gather", 8, 1, 1073741824, 2500.0]]         # kind, ranks, hosts, bytes, microseconds

`matrix_gb_per_s` has a row and a column for each host. What a field means stands in `hardware.py` and `rates.py`.
"""

import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

from paraxis.base.config import suggestion
from paraxis.base.errors import ConfigError, StorageError
from paraxis.plan.hardware import EXCHANGES, Cluster, Exchange, Link, Pool
from paraxis.plan.rates import Accelerator, AttentionTime, Move, Product

READY = Path(__file__).with_name("clusters")
GIB, GIGA, TERA, MICRO = float(1 << 30), 1e9, 1e12, 1e-6


@dataclass(frozen=True)
class Table:
    """A measured table: what a row becomes, its columns, and how many of the last ones are microseconds."""

    make: Callable[..., Any]
    columns: Sequence[str]
    times: int


TABLES = {
    "products": Table(Product, ("dtype", "m", "n", "k", "seconds"), 1),
    "attentions": Table(AttentionTime, ("dtype", "batch", "heads", "kv_heads", "width", "length", "forward_s", "backward_s"), 2),
    "moves": Table(Move, ("bytes", "seconds"), 1),
    "exchanges": Table(Exchange, ("kind", "ranks", "hosts", "bytes", "seconds"), 1),
}
# What a field is called in a file, and the unit there.
UNITS = {
    "memory_bytes": ("memory_gib", GIB),
    "reserved_bytes": ("reserved_gib", GIB),
    "bytes_per_s": ("gb_per_s", GIGA),
    "peak_flops": ("peak_tflops", TERA),
    "launch_s": ("launch_us", MICRO),
    "host_eager_s": ("host_eager_us", MICRO),
    "host_compiled_s": ("host_compiled_us", MICRO),
    "host_selective_s": ("host_selective_us", MICRO),
    "host_exchange_s": ("host_exchange_us", MICRO),
    "host_sharding_s": ("host_sharding_us", MICRO),
    "latency_s": ("latency_us", MICRO),
    "host_s": ("host_us", MICRO),
    "skew_s": ("skew_us", MICRO),
    "matrix": ("matrix_gb_per_s", GIGA),
}
WHOLE = ("memory_bytes", "reserved_bytes")  # bytes that are counted


def ready_clusters() -> list[str]:
    """The names of the cluster files that come with paraxis."""
    return sorted(path.stem for path in READY.glob("*.toml"))


def read_cluster(name: str) -> Cluster:
    """The cluster described in the file `name`, or in the ready one of that name. Raises ConfigError naming what is wrong with it."""
    path = READY / f"{name}.toml" if name in ready_clusters() else Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cluster {name}: {error.strerror}; give a file that paraxis probe wrote, or one of {', '.join(ready_clusters())}"
        ) from error
    try:
        return parse_cluster(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"cluster {name} is not valid TOML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"cluster {name}: {error}") from error


def parse_cluster(tables: Mapping[str, Any]) -> Cluster:
    """The cluster of a parsed file. Raises ConfigError."""
    said = dict(tables)
    pools = tuple(_made(Pool, pool, f"pool {number}") for number, pool in enumerate(_list(said.pop("pools", []), "pools")))
    accelerators = {
        name: _made(Accelerator, {"name": name, **_table(one, name)}, f"accelerators.{name}")
        for name, one in _table(said.pop("accelerators", {}), "accelerators").items()
    }
    links = {
        name: _made(Link, {"name": name, **_table(one, name)}, f"links.{name}")
        for name, one in _table(said.pop("links", {}), "links").items()
    }
    return _made(Cluster, {**said, "pools": pools, "accelerators": accelerators, "links": links}, "the file")


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a table, as in [{where}], not {value!r}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{where} must be a list, as in [[{where}]], not {value!r}")
    return value


def _made(kind: type[Any], said: Mapping[str, Any], where: str) -> Any:
    """A `kind` of what the file says, in SI units."""
    known = {UNITS.get(field.name, (field.name, 1))[0]: field for field in fields(kind)}
    for name in said:
        if name not in known:
            raise ConfigError(f"{where} has {name!r}, which means nothing here{suggestion(name, known)}")
    missing = [name for name, field in known.items() if name not in said and not _optional(field)]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    values = {known[name].name: value for name, value in said.items()}
    return kind(**{name: _value(name, str(known[_called(name)].type), value, where) for name, value in values.items()})


def _called(name: str) -> str:
    return UNITS.get(name, (name, 1))[0]


def _value(name: str, kind: str, value: Any, where: str) -> Any:
    if name in TABLES:
        return tuple(_row(TABLES[name], row, f"{where}, {name}") for row in _list(value, f"{where}, {name}"))
    if name in UNITS:
        value = _scaled(value, UNITS[name][1], f"{where}, {_called(name)}")
        return round(value) if name in WHOLE else value
    wanted = {"int": int, "float": (int, float), "str": str}.get(kind)
    if wanted is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
        words = {"int": "a whole number", "float": "a number", "str": "text"}[kind]
        raise ConfigError(f"{where}: {name}={value!r} must be {words}")
    return value


def _scaled(value: Any, unit: float, where: str) -> Any:
    if isinstance(value, dict):
        return {name: _scaled(part, unit, where) for name, part in value.items()}
    if isinstance(value, list):
        return tuple(_scaled(part, unit, where) for part in value)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{where}={value!r} must be a number")
    return _rounded(value * unit)


def _rounded(value: float) -> float:
    """Without the last digits, in which a change of units is seen."""
    return float(f"{value:.12g}")


def _row(table: Table, row: Any, where: str) -> Any:
    if not isinstance(row, list) or len(row) != len(table.columns):
        raise ConfigError(f"{where}: {row!r} is no row; a row has {', '.join(table.columns)}")
    first = len(table.columns) - table.times
    words = 1 if isinstance(row[0], str) else 0
    good = all(isinstance(x, int | float) and not isinstance(x, bool) and x > 0 for x in row[words:])
    if not good or words != (table.columns[0] in ("dtype", "kind")) or (table.make is Exchange and row[0] not in EXCHANGES):
        raise ConfigError(f"{where}: {row!r} must have {', '.join(table.columns)}, sizes and microseconds above 0")
    values = [*row[:first], *(_rounded(value * MICRO) for value in row[first:])]
    return table.make(**dict(zip(table.columns, values, strict=True)))


def write_cluster(path: Path, cluster: Cluster) -> None:
    """Writes a file that `read_cluster` reads back, whole or not at all. Raises StorageError where it cannot be written."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(cluster_toml(cluster), encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; choose another --out") from error


def cluster_toml(cluster: Cluster) -> str:
    """The cluster as a file."""
    lines = list(_lines(cluster, ("pools", "accelerators", "links")))
    for pool in cluster.pools:
        lines += ["", "[[pools]]", *_lines(pool)]
    for section, members in (("accelerators", cluster.accelerators), ("links", cluster.links)):
        for name, one in members.items():
            lines += ["", f"[{section}.{name}]", *_lines(one)]
    return "\n".join(lines) + "\n"


def _lines(one: Any, without: Sequence[str] = ()) -> Iterator[str]:
    for field in fields(one):
        value = getattr(one, field.name)
        if field.name in without or (value in ("", (), {}) and _optional(field)):
            continue
        if field.name in TABLES:
            yield f"{field.name} = ["
            yield from (f"  {_text(_cells(TABLES[field.name], row))}," for row in value)
            yield "]"
        else:
            name, unit = UNITS.get(field.name, (field.name, 1))
            yield f"{name} = {_text(value, unit)}"


def _optional(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _cells(table: Table, row: Any) -> list[Any]:
    values = [getattr(row, column) for column in table.columns]
    first = len(values) - table.times
    return [*values[:first], *(float(f"{value / MICRO:.6g}") for value in values[first:])]


def _text(value: Any, unit: float = 1) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_text(part, unit)}" for name, part in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_text(part, unit) for part in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value) if unit == 1 else f"{value / unit:.12g}"
