"""The device mesh: every rank's coordinates along the axes, and the groups that talk along each."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from paraxis.base.axes import AXES, Degrees
from paraxis.parallel.world import World


@dataclass(frozen=True)
class Mesh:
    """The ranks arranged by axis. `at` holds this rank's index along each."""

    world: World
    degrees: Degrees
    device_mesh: DeviceMesh
    at: dict[str, int]

    @property
    def sharding(self) -> DeviceMesh:
        """The (dp, fsdp) mesh that parameters are replicated and sharded over."""
        return self.device_mesh["dp", "fsdp"]

    @property
    def tp(self) -> dist.ProcessGroup:
        """This rank's tensor-parallel peers."""
        return self.device_mesh["tp"].get_group()

    @property
    def data_rank(self) -> int:
        """Which of the data ranks this is: ranks with the same number read the same rows."""
        return self.at["dp"] * self.degrees.fsdp + self.at["fsdp"]


def build_mesh(world: World, degrees: Degrees) -> Mesh:
    """Arranges the ranks by axis, innermost last. `degrees` must be settled and fill the world."""
    assert degrees.ranks == world.size, (degrees, world.size)
    shape = tuple(getattr(degrees, axis) for axis in AXES)
    device_mesh = init_device_mesh(world.device.kind, shape, mesh_dim_names=AXES)
    coordinates = device_mesh.get_coordinate()
    assert coordinates is not None
    return Mesh(world, degrees, device_mesh, dict(zip(AXES, coordinates, strict=True)))
