"""The commands in the documentation exist, and the ones it says can be run do run.

In README.md, CONTRIBUTING.md and docs/, a line that starts with `$ ` inside a ```console fence is a command. Wherever one calls
paraxis, its recipe, fields and options must be accepted; a make target must be in the Makefile. In a fence marked ```console run
every command is run too, in order, in one empty folder a document, on CPU.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from paraxis.base.axes import DEGREES
from paraxis.base.layout import parse_layout
from paraxis.base.strategy import ParallelConfig
from paraxis.cli import main
from tools.draw_pictures import FOLDER, pictures, with_table

CHECKOUT = Path(__file__).parents[2]
DOCUMENTS = [CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]
KNOBS = {"PYTHON", "TORCH"}
LONGEST_RUN_S = 240  # for all commands of one document

FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```\s*?$", re.MULTILINE | re.DOTALL)


def relative(document: Path) -> str:
    return document.relative_to(CHECKOUT).as_posix()


@dataclass(frozen=True)
class Command:
    """One command of a document: where it stands, its words, and whether the document says that it can be run."""

    where: str
    words: tuple[str, ...]
    runnable: bool


def commands_in(name: str, text: str) -> list[Command]:
    """The commands of a document. A backslash at a line's end joins the next line; `#` starts a comment."""
    found = []
    for fence in FENCE.finditer(text):
        kind, *marks = fence["info"].split() or [""]
        if kind == "console":
            first_line = text[: fence.start("body")].count("\n") + 1
            joined = re.sub(r"\\\n\s*", " ", fence["body"])
            where = f"{name}:{first_line}"
            lines = [line[2:] for line in joined.splitlines() if line.startswith("$ ")]
            found += [Command(where, tuple(words), "run" in marks) for line in lines if (words := shlex.split(line, comments=True))]
    return found


def document_commands() -> list[Command]:
    documents = [(relative(path), path.read_text()) for path in DOCUMENTS]
    return [command for name, text in documents for command in commands_in(name, text)]


def problem_with_make(words: tuple[str, ...], makefile: str) -> str | None:
    """Why `make` would not know these words, or None."""
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    knobs = {word.partition("=")[0] for word in words if "=" in word}
    unknown = knobs - KNOBS | {word for word in words if "=" not in word} - targets
    return f"make does not know {', '.join(sorted(unknown))}" if unknown else None


def problem_with_paraxis(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str | None:
    """Why `paraxis` would refuse these words, or None: `train` prints the configuration, others are held to their own help."""

    def paraxis(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(arguments)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    if "--help" in words or not words:
        code, text = paraxis(*words)
        return text if code else None
    if words[0] == "train":
        code, text = paraxis(*words, "--print-config")
        return text if code else None
    # The command, and where it has them its own: `convert import SRC DST`.
    names = words[: next((at for at, word in enumerate(words) if not re.fullmatch("[a-z]+", word)), len(words))]
    code, text = paraxis(*names, "--help")
    if code:
        return text
    unknown = [option for word in words if (option := word.partition("=")[0]).startswith("--") and option not in text]
    return f"{' '.join(names)} has no {', '.join(unknown)}" if unknown else None


@pytest.mark.parametrize("command", document_commands(), ids=lambda command: f"{command.where} {' '.join(command.words)}")
def test_every_command_in_the_documents_exists(command, monkeypatch, capsys):
    monkeypatch.chdir(CHECKOUT)
    problem = None
    if command.words[0] == "make":
        problem = problem_with_make(command.words[1:], (CHECKOUT / "Makefile").read_text())
    elif "paraxis" in command.words:  # also behind torchrun, srun or a variable
        problem = problem_with_paraxis(command.words[command.words.index("paraxis") + 1 :], capsys)
    assert problem is None, f"{command.where}: {problem}"


@pytest.mark.timeout(LONGEST_RUN_S)
@pytest.mark.parametrize("document", sorted({c.where.partition(":")[0] for c in document_commands() if c.runnable}))
def test_runnable_commands_run(document, tmp_path):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "PARAXIS_CACHE": str(tmp_path / "cache"),
    }
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "examples").symlink_to(CHECKOUT / "examples")  # as in a checkout
    for command in document_commands():
        if command.runnable and command.where.startswith(f"{document}:"):
            assert command.words[0] == "paraxis", f"{command.where}: only paraxis is run from a document, not {command.words[0]}"
            done = subprocess.run(command.words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command.where}: {shlex.join(command.words)}\n{done.stdout}\n{done.stderr}"


def rows_of_tables(text: str) -> list[list[str]]:
    """The cells of every line of a table, without the backticks around them."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and line.endswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("name", sorted(pictures()))
def test_pictures_are_as_the_code_draws_them(name):
    assert (FOLDER / "pictures" / name).read_text() == pictures()[name], "python -m tools.draw_pictures draws them again"


def test_the_table_of_schedules_is_as_the_lists_have_it():
    page = (FOLDER / "pipeline.md").read_text()
    assert page == with_table(page), "python -m tools.draw_pictures writes it again"


def test_pages_show_every_picture_and_no_other():
    shown = [name for page in FOLDER.glob("*.md") for name in re.findall(r"!\[[^]]+\]\(pictures/([^)]+)\)", page.read_text())]
    assert sorted(shown) == sorted(pictures()) == sorted(path.name for path in (FOLDER / "pictures").iterdir())


def test_pages_on_axes_have_every_parallel_setting_with_its_default():
    cells = [row for page in FOLDER.glob("*.md") for row in rows_of_tables(page.read_text())]
    told = {row[0].removeprefix("parallel."): row[1] for row in cells if row[0].startswith("parallel.")}
    assert told == {field.name: spelled(field.default) for field in fields(ParallelConfig)}


def spelled(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def test_layouts_mean_what_the_page_says():
    written = [row for row in rows_of_tables((FOLDER / "README.md").read_text()) if row[1].startswith("--parallel.")]
    assert len(written) > len(DEGREES)
    for layout, settings in written:
        said = dict(word.removeprefix("--parallel.").split("=") for word in settings.split())
        assert {name: str(value) for name, value in parse_layout(layout).items()} == said


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_between_documents_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", FENCE.sub("", document.read_text()))
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_tests_that_documents_name_exist(document):
    """`tests/train/test_resume.py`, and after it `test_same_numbers.py` for one in the same folder."""
    folder, missing = "", []
    for name in re.findall(r"`((?:tests/)?[a-z_/]*(?:test_[a-z0-9_]+\.py|/))`", document.read_text()):
        if name.startswith("tests/"):
            folder = name.rpartition("/")[0]
        path = name if name.startswith("tests/") else f"{folder}/{name}"
        if "test" in name and not (CHECKOUT / path).exists():
            missing.append(name)
    assert missing == []


EXAMPLE = """
Text with `$ paraxis nothing`.

```python
$ not a command
```

```console
$ make test PYTHON=python3.12   # a comment
what it prints
$ torchrun --nproc-per-node=2 \\
    -m paraxis train debug
```

```console run
$ paraxis train debug
```
"""


def test_commands_are_found_with_their_places_and_marks():
    assert commands_in("a.md", EXAMPLE) == [
        Command("a.md:9", ("make", "test", "PYTHON=python3.12"), False),
        Command("a.md:9", ("torchrun", "--nproc-per-node=2", "-m", "paraxis", "train", "debug"), False),
        Command("a.md:16", ("paraxis", "train", "debug"), True),
    ]


def test_an_unknown_make_target_or_knob_is_found():
    makefile = "test: lint\n\techo\n"
    assert problem_with_make(("test", "TORCH=torch"), makefile) is None
    assert problem_with_make(("tset",), makefile) == "make does not know tset"
    assert problem_with_make(("test", "JOBS=2"), makefile) == "make does not know JOBS"


@pytest.mark.parametrize("line", ["trian debug", "train debgu", "train debug --train.stepz=3", "generate ckpt --prmpt=hello"])
def test_a_command_that_does_not_exist_is_found(line, capsys):
    assert problem_with_paraxis(tuple(line.split()), capsys)
