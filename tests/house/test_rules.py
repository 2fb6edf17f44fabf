"""The house rules, held by reading the source. Raising a limit is an edit here, with its reason in the same commit.

A rule is a function from a module of the package to the violations in it. Each is also shown a planted violation, so that
a rule that has stopped seeing anything fails too.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

LONGEST_FILE = 400  # lines: one sitting
LONGEST_FUNCTION = 60  # lines, decorators and docstring included: one screen
READS_THE_ENVIRONMENT = ("base/env.py",)
ASKS_THE_DEVICE = ("parallel/world.py", "observe/memory.py")
ASKS_WHERE_A_TENSOR_IS = ("ops/", "optim/")  # which says nothing of hardware: a planner's tensors answer too
VAGUE_NAMES = ("utils.py", "util.py", "helpers.py", "misc.py", "common.py")
UNFINISHED = ("TODO", "FIXME", "XXX")
# Reads the metadata of torch's distributed checkpoints, which is a pickle, with a list of the names that may stand in it.
READS_A_PICKLE = ("checkpoint/dcp_metadata.py",)
UNSAFE_MODULES = ("pickle", "dill", "cloudpickle", "shelve", "marshal")
UNSAFE_CALLS = ("eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput")
UNSAFE_ARGUMENTS = {"weights_only": False, "allow_pickle": True, "shell": True, "trust_remote_code": True}
ENVIRONMENT_NAMES = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")
DEVICE_QUESTIONS = (
    "torch.cuda.is_",
    "torch.cuda.get_device",
    "torch.cuda.device_count",
    "torch.cuda.current_device",
    "torch.cuda.mem_get_info",
    "torch.accelerator.",
    "torch.backends.mps.",
)

PACKAGE = Path(__file__).parents[2] / "paraxis"


@dataclass(frozen=True)
class Module:
    """One source file: `place` is its path within the package, such as "base/env.py"."""

    place: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def within(self, places: tuple[str, ...]) -> bool:
        return any(self.place == place or (place.endswith("/") and self.place.startswith(place)) for place in places)


Rule = Callable[[Module], Iterator[str]]


def dotted(node: ast.AST) -> str:
    """`a.b.c` as it is written, or "" where a part is not a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def file_fits_in_one_sitting(module: Module) -> Iterator[str]:
    if (lines := module.text.count("\n")) > LONGEST_FILE:
        yield f"{module.place} has {lines} lines, more than {LONGEST_FILE}"


def function_fits_on_one_screen(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if (lines := node.end_lineno - first + 1) > LONGEST_FUNCTION:
                yield f"{module.place}:{node.lineno} {node.name} has {lines} lines, more than {LONGEST_FUNCTION}"


def module_says_what_it_is_for(module: Module) -> Iterator[str]:
    if not ast.get_docstring(module.tree):
        yield f"{module.place} has no docstring"


def file_is_named_for_what_it_holds(module: Module) -> Iterator[str]:
    if Path(module.place).name in VAGUE_NAMES:
        yield f"{module.place} is named for nothing in particular"


def environment_is_read_in_one_file(module: Module) -> Iterator[str]:
    if module.within(READS_THE_ENVIRONMENT):
        return
    for node in ast.walk(module.tree):
        imported = isinstance(node, ast.ImportFrom) and node.module == "os" and any(a.name in ENVIRONMENT_NAMES for a in node.names)
        if imported or (isinstance(node, ast.Attribute) and dotted(node) in {f"os.{name}" for name in ENVIRONMENT_NAMES}):
            yield f"{module.place}:{node.lineno} touches the environment; that is for {READS_THE_ENVIRONMENT[0]}"


def nothing_runs_code_from_disk_or_a_shell(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        where = f"{module.place}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            allowed = ("pickle",) if module.within(READS_A_PICKLE) else ()
            yield from (f"{where} imports {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES and name not in allowed)
        elif isinstance(node, ast.Call):
            if dotted(node.func) in UNSAFE_CALLS:
                yield f"{where} calls {dotted(node.func)}"
            for keyword in node.keywords:
                # Only a constant that is the safe value passes: an expression could turn out either way.
                if keyword.arg in UNSAFE_ARGUMENTS:
                    safe = not UNSAFE_ARGUMENTS[keyword.arg]
                    if not (isinstance(keyword.value, ast.Constant) and keyword.value.value is safe):
                        yield f"{where} passes {keyword.arg}={ast.unparse(keyword.value)}"


def nothing_is_left_unfinished(module: Module) -> Iterator[str]:
    for number, line in enumerate(module.text.splitlines(), 1):
        if word := re.search(rf"\b({'|'.join(UNFINISHED)})\b", line):
            yield f"{module.place}:{number} says {word[0]}"
    for node in ast.walk(module.tree):
        raised = node.exc if isinstance(node, ast.Raise) else None
        if raised is not None and dotted(raised.func if isinstance(raised, ast.Call) else raised) == "NotImplementedError":
            yield f"{module.place}:{node.lineno} raises NotImplementedError"


def few_ask_what_the_device_is(module: Module) -> Iterator[str]:
    """Everyone else is given a `base.device.Device`, which is why `device.kind` and `device.is_cuda` are nobody's question."""
    if module.within(ASKS_THE_DEVICE):
        return
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = dotted(node.value).split(".")[-1].lstrip("_")
        of_a_tensor = node.attr == "is_cuda" and owner != "device"
        of_a_torch_device = node.attr == "type" and owner == "device"
        of_where_it_is = (of_a_tensor or of_a_torch_device) and not module.within(ASKS_WHERE_A_TENSOR_IS)
        if dotted(node).startswith(DEVICE_QUESTIONS) or of_where_it_is:
            yield f"{module.place}:{node.lineno} asks the device: {ast.unparse(node)}"


# Each rule, and a file in which it must find so many violations.
RULES: dict[Rule, tuple[int, str, str]] = {
    file_fits_in_one_sitting: (1, "data/long.py", "x = 1\n" * (LONGEST_FILE + 1)),
    function_fits_on_one_screen: (1, "data/long.py", "@cache\ndef f():\n" + "    x = 1\n" * (LONGEST_FUNCTION - 1)),
    module_says_what_it_is_for: (1, "data/silent.py", "x = 1\n"),
    file_is_named_for_what_it_holds: (1, "data/utils.py", '"""Things."""\n'),
    environment_is_read_in_one_file: (3, "data/a.py", "import os\nos.environ['A']\nos.getenv('B')\nfrom os import environ\n"),
    nothing_runs_code_from_disk_or_a_shell: (
        7,
        "data/a.py",
        "import pickle\nfrom dill import loads\neval('1')\nos.system('ls')\nf(shell=True)\nf(weights_only=w)\nf(trust_remote_code=1)\n",
    ),
    nothing_is_left_unfinished: (3, "data/a.py", "# TODO\nraise NotImplementedError\nraise NotImplementedError('x')\n"),
    few_ask_what_the_device_is: (
        5,
        "data/a.py",
        "torch.cuda.is_available()\ntorch.cuda.get_device_name(0)\nx.is_cuda\nx.device.type\ntorch.accelerator.current_accelerator()\n",
    ),
}


@cache
def package() -> list[Module]:
    return [Module(path.relative_to(PACKAGE).as_posix(), path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Rule):
    violations = [violation for module in package() for violation in rule(module)]
    assert not violations, "\n" + "\n".join(violations)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_planted_violations_are_found(rule: Rule):
    count, place, text = RULES[rule]
    found = list(rule(Module(place, text)))
    assert len(found) == count, found


def test_the_exempt_places_are_exempt_and_exist():
    assert not list(few_ask_what_the_device_is(Module("ops/attention.py", "x.is_cuda\n")))
    assert list(few_ask_what_the_device_is(Module("ops/attention.py", "torch.cuda.is_available()\n")))
    assert not list(few_ask_what_the_device_is(Module("train/a.py", "self._device.is_cuda or device.kind == 'cuda'\n")))
    assert not list(nothing_runs_code_from_disk_or_a_shell(Module("checkpoint/dcp_metadata.py", "import pickle\n")))
    assert list(nothing_runs_code_from_disk_or_a_shell(Module("checkpoint/dcp_metadata.py", "import dill\nimport marshal\n")))
    assert not list(environment_is_read_in_one_file(Module("base/env.py", "import os\nos.environ\n")))
    assert all((PACKAGE / place).exists() for place in (*READS_THE_ENVIRONMENT, *ASKS_THE_DEVICE, *ASKS_WHERE_A_TENSOR_IS, *READS_A_PICKLE))


def decorator_name(node: ast.expr) -> str:
    return dotted(node.func if isinstance(node, ast.Call) else node).split(".")[-1]


def config_fields(module: Module) -> Iterator[tuple[str, str]]:
    """Each (class, field) of the module's config dataclasses: classes called ...Config, fields annotated in their body."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and "dataclass" in map(decorator_name, node.decorator_list):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    yield node.name, statement.target.id


def names_read(tree: ast.AST) -> Iterator[str]:
    """Attributes that are read, save by `__post_init__`: to check a setting is not yet to heed it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        yield from names_read(node)


def settings_nobody_reads(modules: list[Module]) -> list[str]:
    read = {name for module in modules for name in names_read(module.tree)}
    return [f"{module.place} {owner}.{field}" for module in modules for owner, field in config_fields(module) if field not in read]


def test_every_setting_is_read_by_someone():
    ignored = settings_nobody_reads(package())
    assert not ignored, "nobody reads these settings:\n" + "\n".join(ignored)


PLANTED_CONFIG = """
@dataclass(frozen=True, kw_only=True)
class AConfig:
    used: Annotated[int, "read below"] = 1
    checked: Annotated[int, "only checked"] = 1

    def __post_init__(self):
        if self.checked < 1:
            raise ConfigError

def f(a):
    return a.used
"""


def test_a_setting_that_is_only_checked_counts_as_ignored():
    assert settings_nobody_reads([Module("data/a.py", PLANTED_CONFIG)]) == ["data/a.py AConfig.checked"]
