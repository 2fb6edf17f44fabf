"""The other training systems of `paraxis bench step` and `startup`, run beside the rows of ours."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from paraxis.base.env import count_gpus_without_cuda, read_environment
from paraxis.base.errors import ConfigError
from paraxis.cli.arguments import Arguments, one_of, whole_number
from paraxis.cli.bench_rows import Variant, read_variants, split

if TYPE_CHECKING:
    from paraxis.bench.machine import Machine
    from paraxis.bench.rows import Pace, Subject
    from paraxis.bench.step import Ours
    from paraxis.bench.titan import Site

PEERS = ("titan", "transformers")
PEER_OPTIONS = ("against", "titan", "titan-options")
PEER_LISTS = ("titan-row",)


def peers(
    parsed: Arguments, ours: "Sequence[Ours]", scratch: Path, machine: "Machine", pace: "Pace"
) -> tuple[dict[str, str], "list[Subject]"]:
    """The rows of the system that --against names, and its versions; neither where none is to run.

    `scratch` is where packages may be installed for the time of the benchmark. Raises ConfigError for what is missing or cannot run.
    """
    of_titan = [name for name in ("titan", "titan-options", "titan-row") if name in parsed.options or name in parsed.lists]
    against = one_of("against", parsed.options["against"], PEERS) if "against" in parsed.options else None
    if (of_titan and against != "titan") or (against == "titan" and "titan" not in of_titan):
        raise ConfigError(f"--{[*of_titan, 'against'][0]} is for runs beside TorchTitan, which need both --against titan and --titan DIR")
    if against == "titan":
        from paraxis.bench.titan import open_site

        site = open_site(Path(parsed.options["titan"]), scratch / "site")
        return {"torchtitan": site.version}, [*_titans(parsed, site, machine, pace)]
    if against == "transformers":
        from paraxis.bench.hf_trainer import versions

        return versions(), _hf_trainers(parsed, ours)
    return {}, []


def _titans(parsed: Arguments, site: "Site", machine: "Machine", pace: "Pace") -> "Iterator[Subject]":
    from paraxis.bench.titan import CONFIG, titan

    ranks = whole_number("ranks", parsed.options.get("ranks", str(machine.devices or 1)), 1)
    common = split("titan-options", parsed.options.get("titan-options", ""))
    for variant in read_variants("titan-row", parsed.lists.get("titan-row", [])) or [Variant(CONFIG, ())]:
        yield titan(variant.name, [*common, *variant.options], site, ranks, pace)


def _hf_trainers(parsed: Arguments, ours: "Sequence[Ours]") -> "list[Subject]":
    """A row for each of ours, on the ranks that `paraxis train` would choose; one for all that are the same work to it."""
    count_gpus_without_cuda()
    from paraxis.bench.hf_trainer import HfTrainer, hf_trainer
    from paraxis.cli.train import choose_ranks

    found: dict[object, HfTrainer] = {}
    for subject in ours:
        subject = hf_trainer(subject, choose_ranks(parsed.options.get("ranks"), subject.config.parallel.degrees, read_environment()))
        found.setdefault((replace(subject.row, name=""), subject.ranks), subject)
    return [*found.values()]
