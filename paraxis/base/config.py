"""Settings as frozen dataclasses: set by dotted path, described for help, written as TOML and read back.

A section is a frozen dataclass whose fields are `name: Annotated[type, "one line on it"] = default`. A field is another
section, a plain type (`int | float | bool | str`), a tuple of one plain type, a `Literal`, or one of these `| None`.
"""

import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from paraxis.base.errors import ConfigError

Section = TypeVar("Section")

NONE = "none"  # how a missing value is written on the command line and in TOML, which has no null
REDACTED = "<redacted>"
_SECRET_NAME = re.compile(r"(^|_)(passwords?|passwd|secrets?|credentials?)(_|$)|(^|_)(token|key)$", re.IGNORECASE)
_TEXT_TOKEN = re.compile(r"(^|_)(bos|eos|pad|unk|mask|sep|end|start|stop)_token$", re.IGNORECASE)  # vocabulary, not a credential
_USERINFO = re.compile(r"(?<=://)[^/\s]*(?=@)")
_SECRET_QUERY = re.compile(r"([?&][^=&\s]*(?:token|key|secret|password|signature|sig)=)[^&\s]+", re.IGNORECASE)


@dataclass(frozen=True)
class Setting:
    """One field of a configuration: its dotted path, its type in words, its value and its one-line doc."""

    path: str
    words: str
    value: object
    doc: str


def describe(config: object) -> list[Setting]:
    """Every setting of `config`: its own in the order they are declared, then those of each section inside it."""
    return list(_walk(config, ""))


def flatten(config: object) -> dict[str, object]:
    """Dotted path to value, for every setting of `config`. Secrets are not redacted."""
    return {setting.path: setting.value for setting in _walk(config, "")}


def override(config: Section, settings: Mapping[str, object]) -> Section:
    """`config` with `settings` (dotted path to a value, or to text that spells one) in place of what it had.

    All settings of one section are set at once, so its `__post_init__` judges only their final values. Raises ConfigError
    for an unknown path, with the nearest known one, and for a value of the wrong type.
    """
    return _override(config, settings, "", list(flatten(config)))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """What was most likely meant by `name`: the closest spelling of a whole path or of its last word, None if nothing is close."""

    def closeness(candidate: str) -> float:
        last, last_known = (_plain(word).rpartition(".")[2] for word in (name, candidate))
        whole = SequenceMatcher(None, _plain(name), _plain(candidate)).ratio()
        # Just below the whole: where both are equally close, the same section wins.
        return max(whole, 0.99 * SequenceMatcher(None, last, last_known).ratio())

    best = max(known, key=closeness, default=None)
    return best if best is not None and closeness(best) > 0.6 else None


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown `name`: asks for the nearest of `known`, where one is close."""
    best = nearest(name, known)
    return f"; did you mean {best}?" if best else "."


def redact(path: str, value: object) -> object:
    """`value` without the secret it may hold: a field named like a credential, or one inside a URL."""
    name = path.rpartition(".")[2]
    if isinstance(value, (tuple, list)):
        redacted = [redact(path, item) for item in cast(Iterable[object], value)]
        return tuple(redacted) if isinstance(value, tuple) else redacted
    if not isinstance(value, str) or not value:
        return value
    if _SECRET_NAME.search(name) and not _TEXT_TOKEN.search(name):
        return REDACTED
    return _SECRET_QUERY.sub(rf"\g<1>{REDACTED}", _USERINFO.sub(REDACTED, value))


def to_toml(config: object, base: str) -> str:
    """`config` as TOML that replays it: the recipe it came from and every setting, secrets redacted."""
    return "\n".join([f"base = {_toml_value(base)}", *_toml_lines(config, "")]) + "\n"


def read_toml(path: Path) -> tuple[str, dict[str, object]]:
    """The recipe that the TOML file at `path` starts from, and its settings by dotted path.

    Raises ConfigError when the file is missing, is not TOML or names no recipe.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check the path") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    base = tables.pop("base", None)
    if not isinstance(base, str):
        raise ConfigError(f'{path} does not say which recipe it starts from; begin it with a line such as base = "debug"')
    return base, dict(_dotted(tables, ""))


# What follows is how; nothing below is called from outside this file.


def _plain(name: str) -> str:
    return name.lower().strip("-").replace("-", "_")


def _is_section(value: object) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _fields(section: object) -> dict[str, tuple[Any, str]]:
    """Field name to (type, doc) of a section."""
    return _fields_of(type(section))


@cache
def _fields_of(section: type[Any]) -> dict[str, tuple[Any, str]]:
    kinds: dict[str, tuple[Any, str]] = {}
    hints = get_type_hints(section, include_extras=True)
    for field in fields(section):
        kind: Any = hints[field.name]
        doc = ""
        if get_origin(kind) is Annotated:
            kind, doc = get_args(kind)[:2]
        kinds[field.name] = (kind, doc)
    return kinds


def _walk(section: Any, prefix: str) -> Iterator[Setting]:
    values = {name: getattr(section, name) for name in _fields(section)}
    for name, (kind, doc) in _fields(section).items():
        if not _is_section(values[name]):
            yield Setting(prefix + name, _words(kind), values[name], doc)
    for name, value in values.items():
        if _is_section(value):
            yield from _walk(value, f"{prefix}{name}.")


def _words(kind: Any) -> str:
    """A type as a person writes its values."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return "|".join(NONE if part is NoneType else _words(part) for part in parts)
    if origin is Literal:
        return "|".join(str(part) for part in parts)
    if origin is tuple:
        return f"{_words(parts[0])},..."
    if is_dataclass(kind):
        return "section"
    return {bool: "true|false", str: "text"}.get(kind, getattr(kind, "__name__", str(kind)))


def _override(section: Any, settings: Mapping[str, object], prefix: str, known: list[str]) -> Any:
    kinds = _fields(section)
    whole, inner = _by_field(list(kinds), settings, prefix, known)
    changes: dict[str, object] = {}
    for name, value in whole.items():
        if _is_section(getattr(section, name)) and value != NONE:
            raise ConfigError(
                f"{prefix}{name} is a section, not a setting; set one of its fields: "
                + ", ".join(f"{prefix}{name}.{field}" for field in _fields(getattr(section, name)))
            )
        changes[name] = _convert(value, kinds[name][0], prefix + name)
    for name, nested in inner.items():
        current, within = getattr(section, name), f"{prefix}{name}."
        if _is_section(current):
            changes[name] = _override(current, nested, within, known)
        elif current is None and (absent := _section_type(kinds[name][0])):
            changes[name] = _create(absent, nested, within, known)
        else:
            raise ConfigError(
                f"{within}{next(iter(nested))} does not exist: {prefix}{name} is a setting without fields ({_words(kinds[name][0])})"
            )
    return replace(section, **changes)


def _by_field(
    names: list[str], settings: Mapping[str, object], prefix: str, known: list[str]
) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """`settings` sorted into those for one of the fields `names`, and those for a field of a section inside."""
    whole: dict[str, object] = {}
    inner: dict[str, dict[str, object]] = {}
    for path, value in settings.items():
        name, _, rest = path.partition(".")
        if name not in names:
            place = prefix.rstrip(".") or "The run"
            candidates = [prefix + name for name in names] + known
            raise ConfigError(f"{prefix}{path} is not a setting{suggestion(prefix + path, candidates)} {place} has {', '.join(names)}")
        if rest:
            inner.setdefault(name, {})[rest] = value
        else:
            whole[name] = value
    for name in whole.keys() & inner.keys():
        raise ConfigError(f"{prefix}{name}={whole[name]!r} and {prefix}{name}.{next(iter(inner[name]))} cannot both be set; keep one")
    return whole, inner


def _section_type(kind: Any) -> type[Any] | None:
    """The section that an optional field holds when it is not None."""
    return next((cast(type[Any], part) for part in get_args(kind) if is_dataclass(part)), None)


def _create(section: type[Any], settings: Mapping[str, object], prefix: str, known: list[str]) -> Any:
    """A section that was None until now, from its defaults and `settings`."""
    kinds = _fields_of(section)
    whole, inner = _by_field(list(kinds), settings, prefix, known)
    required = [field.name for field in fields(section) if field.default is MISSING and field.default_factory is MISSING]
    if missing := [prefix + name for name in required if name not in whole]:
        raise ConfigError(f"{prefix.rstrip('.')} was {NONE} and is missing {', '.join(missing)}; set these too")
    made = section(**{name: _convert(value, kinds[name][0], prefix + name) for name, value in whole.items()})
    nested = {f"{name}.{rest}": value for name, settings in inner.items() for rest, value in settings.items()}
    return _override(made, nested, prefix, known)


def _convert(value: object, kind: Any, path: str) -> object:
    if REDACTED in str(value):
        raise ConfigError(f"{path} held a secret that was redacted when it was saved; give it again: --{path}=...")
    try:
        return _typed(value, kind)
    except ValueError:
        choices = map(str, get_args(kind)) if get_origin(kind) is Literal else ()
        hint = suggestion(str(value), choices).removesuffix(".")
        raise ConfigError(f"{path} expects {_words(kind)}, not {redact(path, value)!r}{hint}") from None


def _typed(value: Any, kind: Any) -> object:
    """`value` as a `kind`, read from text where it is text; raises ValueError when it is not one."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if NoneType in parts and value in (None, NONE):
            return None
        *others, last = [part for part in parts if part is not NoneType]
        for part in others:
            try:
                return _typed(value, part)
            except ValueError:
                continue
        return _typed(value, last)
    if origin is Literal:
        for choice in parts:
            if str(choice) == str(value):
                return choice
    elif origin is tuple:
        items: Any = [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)):
            return tuple(_typed(item, parts[0]) for item in cast(Iterable[object], items))
    elif kind is bool:
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif kind is str:
        if isinstance(value, str):
            return value
    elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
        if kind is int:
            return _integer(value)
        if kind is float and not math.isnan(number := float(value)):
            return number
    raise ValueError


def _integer(value: int | float | str) -> int:
    """A whole number, also spelled 1_000 or 1e6."""
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)
    if not value.is_integer():
        raise ValueError
    return int(value)


def _toml_lines(section: Any, prefix: str) -> Iterator[str]:
    """The settings of `section`, then a table for each section inside it: TOML wants them in that order."""
    names = list(_fields(section))
    for name in names:
        if not _is_section(value := getattr(section, name)):
            yield f"{name} = {_toml_value(redact(prefix + name, value))}"
    for name in names:
        if _is_section(value := getattr(section, name)):
            yield ""
            yield f"[{prefix}{name}]"
            yield from _toml_lines(value, f"{prefix}{name}.")


def _toml_value(value: object) -> str:
    if value is None:
        return _toml_value(NONE)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, except that TOML wants DEL escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    assert isinstance(value, tuple), f"no setting holds a {type(value).__name__}"
    return f"[{', '.join(_toml_value(item) for item in cast(tuple[object, ...], value))}]"


def _dotted(table: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _dotted(cast(dict[str, object], value), f"{prefix}{name}.")
        else:
            yield prefix + name, value
