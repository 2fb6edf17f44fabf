"""The device mesh: every rank's coordinates along the axes, and the groups that talk along each."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from paraxis.base.axes import AXES, Degrees
from paraxis.parallel.world import World


@dataclass(frozen=True)
class Mesh:
    """The ranks arranged by axis. `at` holds this rank's index along each.

    Some groups span what two axes share, so there are several views of the same ranks: `sharding` is the (dp, fsdp x cp) mesh that
    dense parameters are replicated and sharded over, `experts` the (dp, fsdp x cp / ep) mesh of expert parameters. Without replicas
    both have one dimension: FSDP would take sums over one replica for sums that can be put off, and keep them beside the gradients.
    """

    world: World
    degrees: Degrees
    at: dict[str, int]
    axes: DeviceMesh
    sharding: DeviceMesh
    experts: DeviceMesh
    ep: dist.ProcessGroup | None  # None where each rank has every expert

    @property
    def tp(self) -> dist.ProcessGroup:
        """This rank's tensor-parallel peers."""
        return self.axes["tp"].get_group()

    @property
    def cp(self) -> dist.ProcessGroup:
        """The ranks that hold this rank's rows, each other positions of them."""
        return self.axes["cp"].get_group()

    @property
    def pipeline(self) -> list[int]:
        """The world's numbers of the ranks that this one forms a pipeline with, in pipeline order."""
        return dist.get_process_group_ranks(self.axes["pp"].get_group())

    @property
    def stage(self) -> list[int]:
        """The world's numbers of the ranks that compute with the same blocks as this one."""
        return self.axes.mesh[self.at["pp"]].flatten().tolist()

    @property
    def data_rank(self) -> int:
        """Which of the data ranks this is: ranks with the same number read the same rows."""
        return self.at["dp"] * self.degrees.fsdp + self.at["fsdp"]

    def context_grid(self, inner: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """The `cp` ranks as a grid: this rank's `inner` neighbours, and the ranks in its place among others' neighbours."""
        d = self.degrees
        shape = (d.pp, d.dp, d.fsdp, d.cp // inner, inner, d.tp)
        grid = init_device_mesh(self.world.device.kind, shape, mesh_dim_names=("pp", "dp", "fsdp", "outer", "inner", "tp"))
        return grid["inner"].get_group(), grid["outer"].get_group()


def build_mesh(world: World, degrees: Degrees) -> Mesh:
    """Arranges the ranks by axis, innermost last. `degrees` must be settled and fill the world."""
    assert degrees.ranks == world.size, (degrees, world.size)
    kind, d = world.device.kind, degrees
    axes = init_device_mesh(kind, tuple(getattr(d, axis) for axis in AXES), mesh_dim_names=AXES)
    sharded = axes
    if d.cp > 1:
        sharded = init_device_mesh(kind, (d.pp, d.dp, d.shards, d.tp), mesh_dim_names=("pp", "dp", "fsdp", "tp"))
    split = sharded
    if d.ep > 1:
        names = ("pp", "dp", "fsdp", "ep", "tp")
        split = init_device_mesh(kind, (d.pp, d.dp, d.shards // d.ep, d.ep, d.tp), mesh_dim_names=names)
    coordinates = axes.get_coordinate()
    assert coordinates is not None
    at = {str(axis): place for axis, place in zip(AXES, coordinates, strict=True)}
    ep = split["ep"].get_group() if d.ep > 1 else None
    over = ("dp", "fsdp") if d.dp > 1 else ("fsdp",)
    return Mesh(world, d, at, axes, sharded[over], split[over], ep)
