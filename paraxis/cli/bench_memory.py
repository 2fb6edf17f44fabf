"""`paraxis bench memory`: what steps of many configurations take in memory and time, and with how little memory they still run."""

from paraxis.base.errors import ConfigError
from paraxis.cli.arguments import Arguments, parse, whole_number
from paraxis.cli.bench_rows import ROWS_FLAGS, ROWS_OPTIONS, Variant, measure_rows, read_variants

OPTIONS = ("ranks", "steps", *ROWS_OPTIONS)


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit code. Raises ParaxisError for what is refused."""
    parsed = parse(arguments, OPTIONS, ROWS_FLAGS, ("row",))
    if len(parsed.names) != 2:
        raise ConfigError("bench memory takes one recipe, as in: paraxis bench memory llama3_8b --row 'eight: --model.layers=8'")
    from paraxis.base.env import count_gpus_without_cuda

    count_gpus_without_cuda()
    from paraxis.bench.memory import WARM_UP, Trial, memory_rows

    recipe, steps = parsed.names[1], whole_number("steps", parsed.options.get("steps", "5"), WARM_UP + 1)
    trials = []
    for variant in read_variants("row", parsed.lists.get("row", [])) or [Variant(recipe, ())]:
        own = parse(variant.options, ("limits", "recipe"), ())
        if own.names:
            raise ConfigError(f"--row {variant.name!r}: {own.names[0]!r} is not a setting; write --field=value")
        trials.append(
            Trial(
                name=variant.name,
                recipe=own.options.get("recipe", recipe),
                settings={**parsed.settings, **own.settings},
                ranks=whole_number("ranks", parsed.options.get("ranks", "1"), 1),
                steps=steps,
                limits_gib=_limits(variant.name, own),
            )
        )
    return measure_rows("memory", parsed, arguments, lambda _: memory_rows(trials))


def _limits(row: str, own: Arguments) -> tuple[float, ...]:
    """GiB, as --limits=60,55.5 says them."""
    words = own.options["limits"].split(",") if "limits" in own.options else []
    try:
        limits = tuple(map(float, words))
    except ValueError:
        limits = (0.0,)
    if any(not 0 < limit < 2**20 for limit in limits):
        raise ConfigError(f"--row {row!r}: --limits={own.options['limits']} must be sizes in GiB above 0, such as 60,55.5")
    return limits
