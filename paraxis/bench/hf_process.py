"""One run of `transformers.Trainer`, in a process of its own for each rank: `python -m paraxis.bench.hf_process FOLDER`.

    FOLDER/config.json        the model, as Hugging Face knows it
    FOLDER/arguments.json     TrainingArguments
    FOLDER/rows.safetensors   tokens and targets, int64 [rows, seq_len], in the order in which steps take them

What it measures goes there too: rank 0 writes a line of `steps.jsonl` after every step, and at the end each rank its `rank-N.json`.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from paraxis.base.device import CPU, Device
from paraxis.observe.memory import read_memory
from paraxis.observe.sinks import JsonLines
from paraxis.observe.throughput import StepClock
from paraxis.parallel.world import leave


class RowsInMemory(IterableDataset[dict[str, Tensor]]):
    """Rows that cost nothing to read; their targets are shifted already, which `shift_labels` tells the model's loss."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._pairs = list(zip(tensors["tokens"], tensors["targets"], strict=True))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for tokens_t, targets_t in self._pairs:
            yield {"input_ids": tokens_t, "labels": targets_t, "shift_labels": targets_t}


class StepTimes(TrainerCallback):
    """Writes the wall seconds of every step: the host's clock, without waiting for the device, as ours are."""

    def __init__(self, file: Path) -> None:
        self._lines, self._clock = JsonLines(file), StepClock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock.restart()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lines.write({"step": state.global_step, "step_s": self._clock.lap().step_s})


class LossKeepingTrainer(Trainer):
    """A Trainer that keeps the loss of every micro-batch on the device: its own log would wait for each step's."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kept: list[Tensor] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.kept.append(super().training_step(*args, **kwargs))
        return self.kept[-1]

    @property
    def losses(self) -> list[float]:
        """This rank's loss of each step, in nats a target token."""
        return torch.stack(self.kept).view(-1, self.args.gradient_accumulation_steps).sum(1).tolist()


def run(folder: Path) -> None:
    """Trains once, as this rank."""
    # Each rank takes its own rows; rank 0 would send them to the others otherwise.
    arguments = TrainingArguments(**json.loads((folder / "arguments.json").read_text()), accelerator_config={"dispatch_batches": False})
    set_seed(arguments.seed)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    trainer = LossKeepingTrainer(model=model, args=arguments, train_dataset=RowsInMemory(load_file(folder / "rows.safetensors")))
    if arguments.process_index == 0:
        trainer.add_callback(StepTimes(folder / "steps.jsonl"))
    trainer.train()
    place = arguments.device
    device = CPU if arguments.use_cpu else Device("cuda", place.index or 0, "", 0)
    told = {"losses": trainer.losses, "reserved_gib": read_memory(device).reserved_gib, "threads": torch.get_num_threads()}
    (folder / f"rank-{arguments.process_index}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]))
    finally:
        leave()  # an interpreter that ends with open groups may abort in gloo's threads, now and then
