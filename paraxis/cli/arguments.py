"""Reading a command line of names, options and settings: `paraxis train RECIPE --ranks 2 --parallel.tp=2`."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from paraxis.base.config import suggestion
from paraxis.base.errors import ConfigError


@dataclass(frozen=True)
class Arguments:
    """A command line taken apart. `settings` are the options that the command does not know; True where no value was given."""

    names: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    settings: dict[str, object] = field(default_factory=dict)


def parse(arguments: Sequence[str], options: Collection[str], flags: Collection[str], lists: Collection[str] = ()) -> Arguments:
    """Takes `arguments` apart; `--name value` is `--name=value`. The last of two wins, save for `lists`, which keep all.

    Raises ConfigError for one of `options` or `lists` without a value, and for one of `flags` with one.
    """
    parsed = Arguments()
    left = list(arguments)
    while left:
        word = left.pop(0)
        if word == "-h":
            word = "--help"
        if not word.startswith("--"):
            parsed.names.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        if name in flags:
            if equals:
                raise ConfigError(f"--{name} takes no value; leave out ={value}")
            parsed.flags.add(name)
            continue
        if not equals and left and not left[0].startswith("--"):
            equals, value = "=", left.pop(0)
        if name not in options and name not in lists:
            parsed.settings[name] = value if equals else True
        elif not (equals and value):
            raise ConfigError(f"--{name} needs a value, as in --{name}=...")
        elif name in lists:
            parsed.lists.setdefault(name, []).append(value)
        else:
            parsed.options[name] = value
    return parsed


def parse_strictly(
    command: str, arguments: Sequence[str], names: Collection[str], options: Collection[str], flags: Collection[str]
) -> Arguments:
    """`parse` for a command without settings: as many names as `names`, and no other options. Raises ConfigError.

    With --help, which has to be among `flags`, anything may be missing.
    """
    parsed = parse(arguments, options, flags)
    for name in parsed.settings:
        known = [f"--{known}" for known in (*options, *flags)]
        raise ConfigError(f"--{name} is not an option of {command}{suggestion(f'--{name}', known)} See paraxis {command} --help")
    if len(parsed.names) != len(names) and "help" not in parsed.flags:
        given = f"not {len(parsed.names)} ({' '.join(parsed.names)})" if parsed.names else "but none was given"
        raise ConfigError(f"{command} takes {' and '.join(names)}, {given}. See paraxis {command} --help")
    return parsed


def whole_number(name: str, text: str, least: int) -> int:
    """The value of option `name`. Raises ConfigError when it is not a whole number of at least `least`."""
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"--{name}={text} is not a whole number of {least} or more")
    return int(text)


def one_of(name: str, text: str, choices: Sequence[str]) -> str:
    """The value of option `name`. Raises ConfigError when it is not among `choices`."""
    if text not in choices:
        raise ConfigError(f"--{name}={text} is unknown; choose one of {', '.join(choices)}")
    return text
