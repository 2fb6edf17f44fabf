"""Measurements that others have published, each as a run of ours: what `paraxis bench planner` predicts.

Of every row it is written down whether it calibrates or is scored (`bench/published/README.md`).
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from paraxis.base.errors import ConfigError, DataError
from paraxis.base.layout import parse_layout
from paraxis.base.strategy import ParallelConfig, RematConfig
from paraxis.data.config import DataConfig
from paraxis.models import gpt, llama
from paraxis.plan.cluster_file import read_cluster
from paraxis.plan.hardware import Cluster, Exchange
from paraxis.train.config import RunConfig, TrainConfig

FOLDER = Path("bench/published")
SIZES = 11  # of a table of collectives, from its first to its last, evenly in their logarithms

Use = Literal["calibrate", "score"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A run and what it was measured to take; `set` names the rows it is one of."""

    set: str
    name: str
    use: Use
    ranks: int
    cluster: str
    config: RunConfig
    step_s: float
    reserved_gib: float | None = None


def clusters(folder: Path) -> dict[str, Cluster]:
    """The machines of the rows, by name. Raises ConfigError for a file that is not there or not one of a cluster."""
    found = {name: read_cluster(str(folder / "clusters" / f"{name}.toml")) for name in ("vtrain_a100", "selene_a100", "titan_h100")}
    vtrain = found["vtrain_a100"]
    tables = [row for ranks in (2, 4, 8) for row in all_reduces(folder / "vtrain" / f"a100_all_reduce_{ranks}gpu.txt", ranks)]
    links = {**vtrain.links, "nvlink": replace(vtrain.links["nvlink"], exchanges=tuple(tables))}
    return found | {"vtrain_a100": replace(vtrain, links=links)}


def all_reduces(path: Path, ranks: int) -> Iterator[Exchange]:
    """Some of the sizes of a table of nccl-tests: bytes in the first column, nanoseconds out of place in the fourth."""
    table = {int(row[0]): int(row[3]) for row in _csv(path)[1:]}
    sizes = sorted(table)
    wanted = [sizes[0] * (sizes[-1] / sizes[0]) ** (n / (SIZES - 1)) for n in range(SIZES)]
    for size in sorted({min(sizes, key=lambda size: abs(size - want)) for want in wanted}):
        yield Exchange(kind="all_reduce", ranks=ranks, bytes=size, seconds=table[size] * 1e-9)


def published(folder: Path) -> list[Published]:
    """Every row, calibrating and scored. Raises DataError for files that are not there or say something else."""
    rows = [
        *vtrain(folder / "vtrain" / "measured_single_node.csv", "vtrain, one host", "calibrate", recompute=False),
        *vtrain(folder / "vtrain" / "measured_multi_node.csv", "vtrain, many hosts", "score", recompute=True),
    ]
    path = folder / "published_rows.json"
    try:
        tables = json.loads(path.read_text())
        rows += megatron(tables["megatron_ptdp_a100"]["rows"])
        rows += titan(tables["torchtitan_h100_2024_12"])
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; --rows names the folder of published rows, bench/published in the sources") from error
    except (ValueError, KeyError) as error:
        raise DataError(f"{path} does not hold the published rows: {error!r}") from error
    return rows


def vtrain(path: Path, set: str, use: Use, *, recompute: bool) -> Iterator[Published]:
    """vTrain's tables of GPTs trained by Megatron-DeepSpeed; bench/published/README.md says why one of them recomputes nothing."""
    head, *rows = _csv(path)
    for row in rows:
        said = dict(zip(head, row, strict=True))
        tp, dp, pp, layers, width, heads = (
            int(said[name])
            for name in ("tensor parallelism", "data parallelism", "pipeline parallelism", "# layers", "hidden size", "attention heads")
        )
        seq_len, rows_a_step = int(said["sequence length"]), int(said["global batch"])
        yield Published(
            set=set,
            name=f"{width}x{layers} {rows_a_step} rows of {seq_len}, {said['micro batch']} at a time, pp{pp}xdp{dp}xtp{tp}",
            use=use,
            ranks=int(said["# GPUs"]),
            cluster="vtrain_a100",
            config=of_megatron(
                gpt.megatron(width, layers, heads, seq_len),
                {"tp": tp, "dp": dp, "pp": pp},
                int(said["micro batch"]),
                rows_a_step,
                recompute=recompute,
            ),
            step_s=float(said["iteration time (ms)"]) / 1e3,
        )


def megatron(rows: Sequence[Mapping[str, Any]]) -> Iterator[Published]:
    """Table 1 of Narayanan et al. 2021, whose FLOP/s are those of equation 3 over the time of a step."""
    for row in rows:
        model = gpt.megatron(row["hidden"], row["layers"], row["heads"])
        tp, pp, chunks = row["tp"], row["pp"], row.get("chunks_per_stage", 1)
        degrees = {"tp": tp, "pp": pp, "dp": row["gpus"] // (tp * pp)}
        h, l, v, s = model.width, model.layers, model.vocab_size, model.max_seq_len
        flops = 96 * row["global_batch"] * s * l * h**2 * (1 + s / (6 * h) + v / (16 * l * h))
        config = of_megatron(model, degrees, row["micro_batch"], row["global_batch"], recompute=True)
        if chunks > 1:
            cuts = (model.layers // (pp * chunks),) * (pp * chunks)
            config = replace(config, parallel=replace(config.parallel, schedule="interleaved", stages_a_rank=chunks, cuts=cuts))
        yield Published(
            set="Megatron-LM",
            name=f"{row['params_b']}B on {row['gpus']}, {row['micro_batch']} rows at a time, "
            f"pp{pp}{f'.interleaved{chunks}' if chunks > 1 else ''}xdp{degrees['dp']}xtp{tp}",
            use=row["use"],
            ranks=row["gpus"],
            cluster="selene_a100",
            config=config,
            step_s=flops / (row["gpus"] * row["tflops_per_gpu"] * 1e12),
        )


def of_megatron(model: gpt.GPTConfig, degrees: Mapping[str, int], micro_batch: int, rows: int, *, recompute: bool) -> RunConfig:
    """How Megatron-LM of 2021 to 2023 runs: replicas that are not sharded, activations whole on every tensor-parallel rank, attention
    that keeps its scores, fused element-wise kernels; `recompute` says whether every block is recomputed."""
    settings: dict[str, Any] = dict(degrees)
    if degrees["tp"] > 1:
        settings["sequence_parallel"] = False
    if (pp := degrees["pp"]) > 1:
        settings |= {"schedule": "1f1b", "cuts": (model.layers // pp,) * pp}
    return RunConfig(
        model=model,
        data=DataConfig(seq_len=model.max_seq_len),
        train=TrainConfig(micro_batch=micro_batch, global_tokens=rows * model.max_seq_len),
        parallel=ParallelConfig(**settings, reduce="step", reshard="never"),
        remat=RematConfig(mode="full" if recompute else "none"),
        compile="inductor",
        attention="reference",
    )


def titan(table: Mapping[str, Any]) -> Iterator[Published]:
    """TorchTitan's report: Llama 3.1 8B under FSDP, the logits of a whole micro-batch in memory at once."""
    model, seq_len, rows = llama.llama3_8b(), table["seq"], table["local_batch"]
    for row in table["rows"]:
        how = ["compiled" if row["compile"] else "eager", *(["float8"] if row["fp8"] else [])]
        degrees = "x".join(f"{axis}{degree}" for axis, degree in row["layout"].items())
        yield Published(
            set="TorchTitan",
            name=f"8B on {row['gpus']}, {degrees}, {', '.join(how)}",
            use=row["use"],
            ranks=row["gpus"],
            cluster="titan_h100",
            config=RunConfig(
                model=model,
                data=DataConfig(seq_len=seq_len),
                train=TrainConfig(micro_batch=rows, loss_tokens=0),
                parallel=ParallelConfig(**parse_layout(degrees)),  # type: ignore[arg-type]
                remat=RematConfig(mode="selective"),
                compile="inductor" if row["compile"] else "none",
                precision="float8_tensorwise" if row["fp8"] else "bf16",
            ),
            step_s=rows * seq_len / row["tps"],
            reserved_gib=row["reserved_gib"],
        )


def _csv(path: Path) -> list[list[str]]:
    try:
        with path.open(newline="") as file:
            return [row for row in csv.reader(file) if row]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; --rows names the folder of published rows, bench/published in the sources") from error
