"""Recipes of one's own: found in files, packages and TOML; refused with the nearest match; their errors say where."""

import sys
from pathlib import Path

import pytest

from paraxis.base.config import to_toml
from paraxis.base.errors import ConfigError
from paraxis.recipes.find import find

MINE = """
from dataclasses import replace
from beside_it import NAME
from paraxis.recipes.small import debug
from paraxis.train.config import TrainConfig

def tiny():
    return replace(debug(), name=NAME)

def broken():
    return 1 / 0

def refused():
    return replace(debug(), train=TrainConfig(steps=0))

def nothing():
    pass
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "beside_it", raising=False)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "beside_it.py").write_text("NAME = 'tiny'\n")
    return tmp_path


def test_a_built_in_recipe_takes_settings():
    config, base = find("debug", {"train.steps": "3"})
    assert (config.train.steps, base) == (3, "debug")


def test_an_unknown_recipe_is_refused_with_the_nearest_and_the_list():
    with pytest.raises(ConfigError, match=r"no recipe 'llama_8b'; did you mean llama3_8b\? Built in are debug, demo, gpt2_124m, llama3_1b"):
        find("llama_8b")


def test_a_function_in_a_file_is_a_recipe_that_may_import_its_neighbours(mine: Path):
    config, base = find("mine.py:tiny", {"train.steps": 4})
    assert (config.name, config.train.steps, base) == ("tiny", 4, f"{mine / 'mine.py'}:tiny")


def test_a_function_in_a_package_is_a_recipe(mine: Path):
    assert find("mine:tiny")[1] == "mine:tiny"
    assert find("paraxis.recipes.small:debug")[0] == find("debug")[0]


def test_what_was_saved_is_found_again_from_elsewhere(mine: Path, monkeypatch: pytest.MonkeyPatch):
    config, base = find("mine.py:tiny", {"train.steps": "4"})
    (mine / "run").mkdir()
    (mine / "run" / "config.toml").write_text(to_toml(config, base))
    monkeypatch.chdir("/")
    assert find(str(mine / "run" / "config.toml")) == (config, base)


def test_a_toml_file_is_laid_over_its_base_and_under_the_command_line(mine: Path):
    (mine / "a.toml").write_text('base = "mine.py:tiny"\n[train]\nsteps = 5\nseed = 5\n[data]\nseq_len = 32\n')
    (mine / "deep").mkdir()
    (mine / "deep" / "b.toml").write_text('base = "../a.toml"\n[train]\nsteps = 6\n')
    config, base = find("deep/b.toml", {"data.seq_len": "16"})
    assert (config.train.steps, config.train.seed, config.data.seq_len) == (6, 5, 16)
    assert base == f"{mine / 'mine.py'}:tiny"


def test_a_toml_file_that_is_its_own_base_is_refused(mine: Path):
    (mine / "a.toml").write_text('base = "a.toml"\n')
    with pytest.raises(ConfigError, match="is its own base"):
        find("a.toml")


def test_a_redacted_setting_can_be_given_again_on_the_command_line(mine: Path):
    config, base = find("debug", {"data.paths": "s3://me:pw@b/x"})
    (mine / "a.toml").write_text(to_toml(config, base))
    assert find("a.toml", {"data.paths": "s3://me:pw@b/x"})[0] == config
    with pytest.raises(ConfigError, match=r"give it again: --data\.paths"):
        find("a.toml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py:tinny", r"no function 'tinny'; did you mean tiny\? It has tiny, broken, refused, nothing"),
        ("mine.py", r"say which, as in mine\.py:tiny"),
        ("absent.py:tiny", r"there is no recipe file .*absent\.py"),
        ("absent.module:tiny", r"recipe absent\.module failed: ModuleNotFoundError: No module named 'absent'"),
        ("mine.py:broken", r"recipe mine\.py:broken failed: ZeroDivisionError: division by zero \(.*mine\.py, line 11\)"),
        ("mine.py:refused", r"train\.steps=0 must be 1 or more \(.*mine\.py, line 14\)"),
        ("mine.py:nothing", r"returned a NoneType; a recipe returns"),
    ],
)
def test_a_recipe_that_cannot_be_had_says_why_and_where(mine: Path, name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        find(name)


def test_a_recipe_file_that_does_not_parse_or_import_names_the_line(mine: Path):
    (mine / "syntax.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(ConfigError, match=r"SyntaxError.*syntax\.py, line 2\)"):
        find("syntax.py:f")
    (mine / "imports.py").write_text("import json\njson.loads('{')\n")
    with pytest.raises(ConfigError, match=r"JSONDecodeError.*imports\.py, line 2\)"):
        find("imports.py:f")
