"""The parallel axes and the degree of each: how many ways a run is spread, and along what."""

from dataclasses import dataclass, fields, replace

from paraxis.base.errors import ConfigError

# Outermost first: ranks next to each other share the innermost axis, which talks most.
AXES = ("pp", "dp", "fsdp", "cp", "tp")
DEGREES = (*AXES, "ep")  # ep is no factor of the ranks: it divides fsdp x cp


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """How many ways each axis is split; the product of AXES is the number of ranks. `fsdp=-1` takes what is left.

    `ep` splits experts among ranks that hold different tokens, so it divides `fsdp x cp`.
    """

    pp: int = 1
    dp: int = 1
    fsdp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            degree = getattr(self, field.name)
            if degree < 1 and not (field.name == "fsdp" and degree == -1):
                raise ConfigError(
                    f"parallel.{field.name}={degree} is not a degree; use 1 or more"
                    + (" (or -1 for what is left)" if field.name == "fsdp" else "")
                )
        if self.fsdp != -1 and self.shards % self.ep:
            raise ConfigError(
                f"parallel.ep={self.ep} does not divide fsdp x cp = {self.shards}, whose ranks share out the experts; "
                f"choose one that does, or raise fsdp"
            )

    @property
    def ranks(self) -> int:
        """The number of ranks these degrees need (only once `fsdp` is settled)."""
        assert self.fsdp > 0, "settle fsdp with filling() first"
        return self.others * self.fsdp

    @property
    def others(self) -> int:
        """The ranks beside fsdp's: the product of the other axes."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def data_ranks(self) -> int:
        """How many ranks read different rows."""
        return self.dp * self.fsdp

    @property
    def shards(self) -> int:
        """Ways that dense parameters, gradients and optimizer state are sharded."""
        return self.fsdp * self.cp

    @property
    def same_rows(self) -> int:
        """How many ranks count each target: every stage and every tensor-parallel peer reads it, a context peer its own part."""
        return self.pp * self.tp

    def filling(self, ranks: int) -> "Degrees":
        """These degrees with `fsdp=-1` settled so that the product is `ranks`.

        Raises ConfigError when the product cannot be `ranks`, naming the nearest move.
        """
        if self.fsdp != -1:
            if self.ranks != ranks:
                raise ConfigError(
                    f"{self} needs {self.ranks} ranks but {ranks} were started; "
                    f"start {self.ranks}, or set parallel.fsdp=-1 to take what is left"
                )
            return self
        if ranks % self.others:
            named = " x ".join(f"{axis}={getattr(self, axis)}" for axis in AXES if axis != "fsdp" and getattr(self, axis) > 1)
            raise ConfigError(
                f"parallel.fsdp=-1 takes what {named} leave, but {ranks} ranks are not "
                f"a multiple of {self.others}; start a multiple of {self.others} ranks or lower a degree"
            )
        return replace(self, fsdp=ranks // self.others)

    @property
    def layout(self) -> str:
        """These degrees in the grammar of `base/layout.py`: "fsdp2xtp2"."""
        return "x".join(f"{axis}{getattr(self, axis)}" for axis in DEGREES if getattr(self, axis) != 1) or "fsdp1"

    def __str__(self) -> str:
        named = [f"{axis}{getattr(self, axis)}" for axis in DEGREES if getattr(self, axis) != 1]
        return " x ".join(named) or "one rank"
