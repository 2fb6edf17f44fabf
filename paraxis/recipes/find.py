"""From what a person types to a run: a built-in recipe, a function in a file or an installed package, or a TOML file."""

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from paraxis.base.config import override, read_toml, suggestion
from paraxis.base.errors import ConfigError
from paraxis.recipes import RECIPES
from paraxis.train.config import RunConfig


def find(name: str, settings: Mapping[str, object] | None = None) -> tuple[RunConfig, str]:
    """The run that `name` stands for with `settings` (dotted path to value) applied, and the recipe it starts from.

    `name` is a built-in recipe, `path/to/my.py:function`, `package.module:function`, or a TOML file with a `base`; the recipe
    returned is never a TOML file, and names a Python file by its absolute path, so that it can be found again from anywhere.
    Raises ConfigError when there is no such recipe, when it fails (naming its file and line), and for settings it does not have.
    """
    recipe, merged = _follow(name, dict(settings or {}), ())
    make, base = _function(recipe)
    with _blaming(recipe):
        config = make()
    if not isinstance(config, RunConfig):
        raise ConfigError(f"recipe {recipe} returned a {type(config).__name__}; a recipe returns a paraxis.train.config.RunConfig")
    return override(config, merged), base


def _follow(name: str, settings: dict[str, object], seen: tuple[Path, ...]) -> tuple[str, dict[str, object]]:
    """The recipe below any TOML files, with all their settings; what is nearer to the command line wins."""
    if not name.endswith(".toml"):
        return name, settings
    path = Path(name).resolve()
    if path in seen:
        raise ConfigError(f"{name} is its own base; name a recipe there, such as one of {', '.join(RECIPES)}")
    base, below = read_toml(path)
    if base.endswith(".toml") or ".py:" in base:
        base = str(path.parent / base)  # next to the file that names it
    kept = {known: value for known, value in below.items() if not any(_overlap(known, nearer) for nearer in settings)}
    return _follow(base, {**kept, **settings}, (*seen, path))


def _overlap(a: str, b: str) -> bool:
    """Whether two paths set the same thing: they are equal, or one is a section that holds the other."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def _function(recipe: str) -> tuple[Callable[[], Any], str]:
    """The function that makes the recipe, and a name that finds it again."""
    if recipe in RECIPES:
        return RECIPES[recipe], recipe
    place, colon, function = recipe.rpartition(":")
    if not colon:
        if recipe.endswith(".py"):
            module, _ = _load_file(Path(recipe))
            raise ConfigError(f"{recipe} is a file of recipes; say which, as in {recipe}:{next(iter(_functions(module)), 'my_recipe')}")
        raise ConfigError(
            f"there is no recipe {recipe!r}{suggestion(recipe, RECIPES)} Built in are {', '.join(RECIPES)}; "
            "your own are path/to/file.py:function, package.module:function or a .toml file"
        )
    module, base = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    make = getattr(module, function, None)
    if not callable(make):
        known = _functions(module)
        raise ConfigError(f"{place} has no function {function!r}{suggestion(function, known)} It has {', '.join(known) or 'none'}")
    return make, f"{base}:{function}"


def _functions(module: ModuleType) -> list[str]:
    """The public functions that `module` itself defines."""
    return [
        name
        for name, value in vars(module).items()
        if callable(value)
        and not isinstance(value, type)
        and not name.startswith("_")
        and getattr(value, "__module__", "") == module.__name__
    ]


def _load_file(path: Path) -> tuple[ModuleType, str]:
    path = path.resolve()
    if not path.is_file():
        raise ConfigError(f"there is no recipe file {path}; check the path")
    spec = importlib.util.spec_from_file_location(f"paraxis_recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None  # there is one for every name that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look up their module by name
    _let_import_from(path.parent)
    with _blaming(str(path)):
        spec.loader.exec_module(module)
    return module, str(path)


def _load_module(name: str) -> tuple[ModuleType, str]:
    _let_import_from(Path.cwd())
    with _blaming(name):
        return importlib.import_module(name), name


def _let_import_from(folder: Path) -> None:
    """Lets a recipe import what lies beside it; last, so that it hides nothing installed."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@contextmanager
def _blaming(recipe: str) -> Iterator[None]:
    """Turns an error in a person's recipe into a ConfigError that names the file and line, outside ours where possible."""
    try:
        yield
    except Exception as error:
        what = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"recipe {recipe} failed: {what} ({_where(error)})") from error


def _where(error: Exception) -> str:
    """The file and line of a person's code that `error` came from."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    libraries = ("<", sysconfig.get_path("stdlib"), str(Path(__file__).parents[1]))
    theirs = [frame for frame in frames if not frame.filename.startswith(libraries) and "site-packages" not in frame.filename]
    frame = (theirs or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}"
