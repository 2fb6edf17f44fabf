"""The record that tells other rooms what they run on, so that only `parallel/world.py` has to ask."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """One rank's device: `kind` is "cuda" or "cpu", `name` as the vendor prints it, `memory_bytes` its own memory; of a GPU, `capability`
    is NVIDIA's number of what it can compute."""

    kind: str
    index: int
    name: str
    memory_bytes: int
    capability: tuple[int, int] = (0, 0)

    @property
    def torch(self) -> torch.device:
        return torch.device(self.kind, self.index) if self.kind == "cuda" else torch.device(self.kind)

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"


CPU = Device("cpu", 0, "CPU", 0)
