"""`paraxis bench placement`: what placing ranks on hosts saves, by how much the links of hosts differ."""

from paraxis.base.errors import ConfigError
from paraxis.cli.arguments import parse, whole_number
from paraxis.cli.bench_rows import ROWS_FLAGS, ROWS_OPTIONS, measure_rows

OPTIONS = ("cluster", "hosts", "matrices", *ROWS_OPTIONS)


def run(arguments: list[str]) -> int:
    """Runs the benchmark and returns its exit code. Raises ParaxisError for what is refused."""
    parsed = parse(arguments, OPTIONS, ROWS_FLAGS)
    if len(parsed.names) != 2:
        raise ConfigError("bench placement takes one recipe, as in: paraxis bench placement llama3_8b --parallel.pp=4 --parallel.tp=8")
    hosts = whole_number("hosts", parsed.options.get("hosts", "16"), 2)
    matrices = whole_number("matrices", parsed.options.get("matrices", "3"), 1)
    from paraxis.bench.placement import placement_rows
    from paraxis.plan.cluster_file import read_cluster
    from paraxis.recipes.find import find

    host = read_cluster(parsed.options.get("cluster", "dgx_h100"))
    cluster = host.with_devices(hosts * max(1, host.ranks // host.hosts))
    config, _ = find(parsed.names[1], parsed.settings)
    config.parallel.degrees.filling(cluster.ranks)  # refused before anything is asked of the machine
    return measure_rows("placement", parsed, arguments, lambda _: placement_rows(config, cluster, seeds=matrices))
