"""`paraxis bench search`: how long planning takes, on this machine, for clusters of several sizes."""

from paraxis.base.errors import ConfigError
from paraxis.cli.arguments import parse, whole_number
from paraxis.cli.bench_rows import ROWS_FLAGS, ROWS_OPTIONS, measure_rows

OPTIONS = ("cluster", "gpus", "runs", *ROWS_OPTIONS)


def run(arguments: list[str]) -> int:
    """Runs the benchmark and returns its exit code. Raises ParaxisError for what is refused."""
    parsed = parse(arguments, OPTIONS, ROWS_FLAGS)
    if len(parsed.names) != 2:
        raise ConfigError("bench search takes one recipe, as in: paraxis bench search llama3_70b --gpus=64,1024")
    sizes = [whole_number("gpus", number, 1) for number in parsed.options.get("gpus", "64,1024").split(",")]
    runs = whole_number("runs", parsed.options.get("runs", "3"), 1)
    from paraxis.bench.search import search_rows

    settings = [f"--{path}={value}" for path, value in parsed.settings.items()]
    words = [parsed.names[1], *settings, f"--cluster={parsed.options.get('cluster', 'dgx_h100')}"]
    return measure_rows("search", parsed, arguments, lambda _: search_rows(words, sizes, runs))
