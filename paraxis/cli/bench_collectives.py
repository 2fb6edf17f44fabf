"""`paraxis bench collectives`: what `paraxis probe` measures of the links, as a table."""

import tempfile
from pathlib import Path

from paraxis.base.errors import ConfigError, TrainingError
from paraxis.cli import probe
from paraxis.cli.arguments import parse
from paraxis.cli.bench_rows import ROWS_FLAGS, ROWS_OPTIONS, measure_rows


def run(arguments: list[str]) -> int:
    """Runs the benchmark. Raises ParaxisError for what is refused or fails."""
    parsed = parse(arguments, (*ROWS_OPTIONS, "ranks"), (*ROWS_FLAGS, "quick"))
    if len(parsed.names) != 1 or parsed.settings:
        said = next((f"--{name}" for name in parsed.settings), " ".join(parsed.names[1:]))
        raise ConfigError(f"bench collectives takes no recipe or setting, but was given {said}; it has --ranks N and --quick")
    from paraxis.bench.collectives import collective_rows
    from paraxis.plan.cluster_file import read_cluster

    with tempfile.TemporaryDirectory(prefix="paraxis-bench-") as folder:
        out = Path(folder) / "cluster.toml"
        ranks = ["--ranks", parsed.options["ranks"]] if "ranks" in parsed.options else []
        if probe.run(["--links", "--out", str(out), *ranks, *(["--quick"] if "quick" in parsed.flags else [])]):
            raise TrainingError("the collectives could not be measured; what a rank says above is the reason")
        cluster = read_cluster(str(out))
    return measure_rows("collectives", parsed, arguments, lambda machine: collective_rows(cluster))
