"""The parallel axes and the degree of each: how many ways a run is spread, and along what."""

from dataclasses import dataclass, fields, replace

from paraxis.base.errors import ConfigError

# Outermost first: ranks next to each other share the innermost axis, which talks most.
AXES = ("dp", "fsdp", "tp")
DATA_AXES = ("dp", "fsdp")  # ranks that differ along these read different rows


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """How many ways each axis is split; the product is the number of ranks. `fsdp=-1` takes what is left."""

    dp: int = 1
    fsdp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            degree = getattr(self, field.name)
            if degree < 1 and not (field.name == "fsdp" and degree == -1):
                raise ConfigError(
                    f"parallel.{field.name}={degree} is not a degree; use 1 or more"
                    + (" (or -1 for what is left)" if field.name == "fsdp" else "")
                )

    @property
    def ranks(self) -> int:
        """The number of ranks these degrees need (only once `fsdp` is settled)."""
        assert self.fsdp > 0, "settle fsdp with filling() first"
        return self.dp * self.fsdp * self.tp

    @property
    def data_ranks(self) -> int:
        """How many ranks read different rows."""
        return self.dp * self.fsdp

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
        others = self.dp * self.tp
        if ranks % others:
            raise ConfigError(
                f"parallel.fsdp=-1 takes what dp={self.dp} x tp={self.tp} leave, but {ranks} ranks are not "
                f"a multiple of {others}; start a multiple of {others} ranks or lower dp or tp"
            )
        return replace(self, fsdp=ranks // others)

    @property
    def layout(self) -> str:
        """These degrees in the grammar of `base/layout.py`: "fsdp2xtp2"."""
        return "x".join(f"{axis}{getattr(self, axis)}" for axis in AXES if getattr(self, axis) != 1) or "fsdp1"

    def __str__(self) -> str:
        named = [f"{axis}{getattr(self, axis)}" for axis in AXES if getattr(self, axis) != 1]
        return " x ".join(named) or "one rank"
