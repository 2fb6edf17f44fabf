"""What the rows of a benchmark run on: the devices of this machine and the versions of what drives them."""

import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass

from paraxis import __version__
from paraxis.base.env import cores
from paraxis.base.errors import ParaxisError


@dataclass(frozen=True)
class Machine:
    """`devices` counts accelerators, 0 on a machine without any; `name` is that of one of them, or of the CPU."""

    devices: int
    name: str
    cores: int
    versions: dict[str, str]

    @property
    def hardware(self) -> str:
        """The machine in words, such as "2 x NVIDIA H200"."""
        return f"{self.devices} x {self.name}" if self.devices else f"CPU {self.name}, {self.cores} cores"


def look() -> Machine:
    """The machine as this process sees it; binds the process to the first device."""
    import torch
    from torch.cuda import nccl

    from paraxis.ops import flash4
    from paraxis.parallel.world import this_device, visible_devices

    devices = visible_devices()
    versions = {"paraxis": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    if devices:
        versions["cudnn"] = str(torch.backends.cudnn.version())
        versions["nccl"] = ".".join(map(str, nccl.version()))
        versions |= {flash4.PACKAGE: found} if (found := flash4.installed_version()) else {}
    return Machine(devices, this_device(0).name, cores(), versions)


def ask_machine() -> Machine:
    """The machine as a process of its own sees it: whoever has asked CUDA holds some of a GPU's memory, which the rows need."""
    done = subprocess.run([sys.executable, "-m", "paraxis.bench.machine"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ParaxisError(f"this machine's devices could not be read:\n{done.stderr.strip()}")
    return Machine(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps(asdict(look())))
