"""Training steps of `transformers.Trainer` (https://github.com/huggingface/transformers) on the very work of a row of ours.

The same model, in the form in which `paraxis convert export` describes it; the same rows of tokens, in memory, and as many of them a
micro-batch and a step; AdamW, clipping and precision as the recipe has them. Many ranks train on copies of the model (DDP).
"""

import importlib.metadata
import importlib.util
import json
import shlex
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from paraxis.base.axes import Degrees
from paraxis.base.env import peer_variables, read_environment, share_cores
from paraxis.base.errors import ConfigError, ParaxisError
from paraxis.bench.machine import Machine
from paraxis.bench.program import reason, run_program
from paraxis.bench.rows import Measured, Pace, Row
from paraxis.bench.step import Ours, read_json_lines, words
from paraxis.models.registry import to_hf
from paraxis.train.config import RunConfig
from paraxis.train.data import open_data

PACKAGES = ("transformers", "accelerate")  # the second is what the first one's Trainer runs on

# What a run does beside its steps is left out, as it is of ours.
QUIET = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_strategy": "no",
    "logging_nan_inf_filter": False,  # it would wait for the device in every micro-batch
    "report_to": "none",
    "disable_tqdm": True,
    "remove_unused_columns": False,
}


@dataclass(frozen=True)
class HfTrainer:
    """One row: `model` is a config.json, `arguments` the TrainingArguments that say what work is done."""

    row: Row
    config: RunConfig
    model: Mapping[str, Any]
    arguments: Mapping[str, Any]
    ranks: int
    devices: int
    pace: Pace

    def measure(self, folder: Path) -> Measured:
        """Trains once, with what the process is given, writes and prints in `folder`."""
        try:
            self._prepare(folder)
        except ParaxisError as error:
            return Measured(layout=self._layout, ranks=self.ranks, precision=self.config.precision, error=str(error))
        output, steps = folder / "output.log", folder / "steps.jsonl"
        timing = run_program(
            self._command(folder),
            output,
            first_step_done=lambda: bool(read_json_lines(steps)),
            limit_s=self.pace.limit_s,
            variables=self.variables(),
        )
        kept = [line["step_s"] for line in read_json_lines(steps) if line["step"] > self.pace.warmup]
        ends = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
        return Measured(
            layout=self._layout,
            ranks=self.ranks,
            precision=self.config.precision,
            tokens_per_s=[self._rows_per_step * self.row.seq_len / seconds / self.ranks for seconds in kept],
            step_s=kept,
            reserved_gib=max((end["reserved_gib"] for end in ends), default=None),
            losses=list(enumerate(np.mean([end["losses"] for end in ends], axis=0).tolist(), 1)) if ends else [],
            first_step_s=timing.first_step_s,
            wall_s=timing.wall_s,
            error=reason(timing, output.read_text(errors="replace"), self.pace.limit_s),
        )

    @property
    def _layout(self) -> str:
        return str(Degrees(dp=self.ranks))

    @property
    def _rows_per_step(self) -> int:
        return self.row.batch * self.arguments["gradient_accumulation_steps"] * self.ranks

    def _prepare(self, folder: Path) -> None:
        """Writes what the process reads. Raises ParaxisError for data that cannot be had."""
        arguments = {
            **QUIET,
            **self.arguments,
            "output_dir": str(folder / "output"),
            "max_steps": self.pace.steps,
            "use_cpu": not self.devices,
            "dataloader_pin_memory": bool(self.devices),
            **({"ddp_backend": "nccl" if self.devices else "gloo", "ddp_find_unused_parameters": False} if self.ranks > 1 else {}),
        }
        (folder / "config.json").write_text(json.dumps(self.model))
        (folder / "arguments.json").write_text(json.dumps(arguments))
        with closing(open_data(self.config, read_environment().cache_dir, self.ranks)) as data:
            rows = [data.rows.row(index) for index in range(self.pace.steps * self._rows_per_step)]
        tensors = {name: torch.from_numpy(np.stack([row[f"{name}_bt"] for row in rows])) for name in ("tokens", "targets")}
        save_file(tensors, folder / "rows.safetensors")

    def _command(self, folder: Path) -> list[str]:
        program = ["-m", "paraxis.bench.hf_process", str(folder)]
        if self.ranks == 1:
            return [sys.executable, *program]
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.ranks), *meet, *program]

    def variables(self) -> dict[str, str]:
        """The environment of the process: nothing is asked of the network, and it has as many threads as ours."""
        variables = {**peer_variables(None), "HF_HUB_OFFLINE": "1"}
        if self.ranks > 1:  # one by itself has torch's own number of threads, as ours has
            return share_cores(variables, self.ranks)
        if self.devices > 1:  # one process that sees many GPUs would spread every batch over them
            variables["CUDA_VISIBLE_DEVICES"] = variables.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        return variables


def hf_trainer(ours: Ours, ranks: int) -> HfTrainer:
    """The row that does the work of `ours` on so many ranks. Raises ConfigError for work that it cannot do alike."""
    config, row = ours.config, ours.row
    try:
        _refuse(config, ranks)
        model, arguments = to_hf(config.model), _arguments(config, ranks, ours.machine)
    except ConfigError as error:
        raise ConfigError(f"--against transformers, row {row.name!r}: {error}") from None
    return HfTrainer(
        row=replace(row, system="transformers", options=shlex.join(words(arguments))),
        config=replace(config, train=replace(config.train, steps=ours.pace.steps)),
        model=model,
        arguments=arguments,
        ranks=ranks,
        devices=ours.machine.devices,
        pace=ours.pace,
    )


def versions() -> dict[str, str]:
    """The versions of what it runs on. Raises ConfigError where Python does not find it."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--against transformers: Python finds no {' and no '.join(missing)}; pip install {' '.join(PACKAGES)}")
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _refuse(config: RunConfig, ranks: int) -> None:
    """Raises ConfigError for work that the Trainer, as it is run here, cannot do alike, with a next move."""
    degrees = config.parallel.degrees.filling(ranks)
    problems = {
        "parallel.auto=true leaves the layout open; name one": config.parallel.auto,
        f"{degrees} splits more than the rows of a step, and the Trainer only copies the model here; use dp or fsdp": (
            degrees.data_ranks != ranks
        ),
        f"precision={config.precision} is not its; use fp32 or bf16": config.precision not in ("fp32", "bf16"),
        f"optim.name={config.optim.name} is not measured; use adamw": config.optim.name != "adamw",
        f"remat.mode={config.remat.mode} is not its; use none, or full with remat.every=1": _remat(config) is None,
        "data.document_mask=true is not its: attention would see across documents; leave it out": (
            getattr(config.data, "document_mask", False)
        ),
        "train.deterministic=true holds for ours only; leave it out": config.train.deterministic,
        "train.init_from is read by ours only; leave it out": bool(config.train.init_from),
    }
    for problem, holds in problems.items():
        if holds:
            raise ConfigError(problem)


def _remat(config: RunConfig) -> bool | None:
    """Whether every block is recomputed; None where the Trainer has nothing like it."""
    return {("none", 1): False, ("full", 1): True}.get((config.remat.mode, config.remat.every))


def _arguments(config: RunConfig, ranks: int, machine: Machine) -> dict[str, Any]:
    """The recipe's work as TrainingArguments. The learning rate stays at its peak after the warm-up, which changes no step's time."""
    optim, rows = config.optim, config.rows_per_step(config.parallel.degrees.filling(ranks))
    compiled = "inductor" if config.compile == "auto" and machine.devices else config.compile
    return {
        "per_device_train_batch_size": config.train.micro_batch,
        "gradient_accumulation_steps": rows // (config.train.micro_batch * ranks),
        "bf16": config.precision == "bf16",
        **({"gradient_checkpointing": True} if _remat(config) else {}),
        **({"torch_compile_backend": compiled} if compiled not in ("none", "auto") else {}),
        "optim": "adamw_torch_fused",
        "learning_rate": optim.lr,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": optim.warmup,
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "adam_epsilon": optim.eps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.clip_norm,
        "seed": config.train.seed,
    }
