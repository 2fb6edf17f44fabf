"""`paraxis bench attention` and `paraxis bench loss`: the two largest pieces of a step beside its matrix products, by themselves."""

from paraxis.base.errors import ConfigError
from paraxis.cli.arguments import parse
from paraxis.cli.bench_rows import ROWS_FLAGS, ROWS_OPTIONS, measure_rows


def run(arguments: list[str]) -> int:
    """Runs the benchmark that the first of `arguments` names. Raises ParaxisError for what is refused."""
    parsed = parse(arguments, ROWS_OPTIONS, ROWS_FLAGS)
    if len(parsed.names) != 2:
        raise ConfigError(f"bench {parsed.names[0]} takes one recipe, as in: paraxis bench {parsed.names[0]} llama3_8b")
    from paraxis.bench.attention import attention_rows, shape_of
    from paraxis.bench.loss import loss_rows
    from paraxis.parallel.world import this_device
    from paraxis.recipes.find import find

    benchmark, recipe = parsed.names
    config, _ = find(recipe, parsed.settings)
    if benchmark == "attention":
        shape_of(config)  # refused before anything is asked of the machine
    rows = attention_rows if benchmark == "attention" else loss_rows
    return measure_rows(benchmark, parsed, arguments, lambda _: rows(config, this_device(0)))
