"""Settings: set by dotted path, refused with the nearest match, written as TOML that replays them, secrets left out."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from paraxis.base.config import describe, flatten, nearest, override, read_toml, redact, to_toml
from paraxis.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Rope:
    theta: Annotated[float, "base of the wavelengths"]
    factor: Annotated[float, "how much slower"] = 1.0


@dataclass(frozen=True, kw_only=True)
class Model:
    width: Annotated[int, "width of the stream"] = 8
    heads: Annotated[int, "query heads"] = 2
    rope: Annotated[Rope | None, "rotary positions"] = None

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"model.width={self.width} is not a multiple of model.heads={self.heads}")


@dataclass(frozen=True, kw_only=True)
class Data:
    paths: Annotated[tuple[str, ...], "files to read"] = ("a.txt",)
    betas: Annotated[tuple[float, ...], "numbers"] = (0.9, 0.95)
    shuffle: Annotated[bool, "mix the rows"] = True
    api_token: Annotated[str, "a credential"] = ""
    eos_token: Annotated[str, "a word of the vocabulary"] = "</s>"


@dataclass(frozen=True, kw_only=True)
class Run:
    name: Annotated[str, "what it is called"] = "run"
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    kind: Annotated[Literal["ring", "ulysses"], "how"] = "ring"
    lr: Annotated[float, "step size"] = 1e-3
    limit: Annotated[int | None, "at most"] = None


def replayed(config: Run, folder: Path, base: str = "debug") -> Run:
    path = folder / "config.toml"
    path.write_text(to_toml(config, base))
    read_base, settings = read_toml(path)
    assert read_base == base
    return override(Run(), settings)


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("model.width", "16", 16),
        ("model.width", "1e6", 1_000_000),
        ("model.width", "1_000", 1000),
        ("limit", "3", 3),
        ("limit", "none", None),
        ("lr", "3e-4", 3e-4),
        ("lr", 1, 1.0),
        ("data.shuffle", "false", False),
        ("data.shuffle", True, True),
        ("data.paths", "a.txt, b.txt", ("a.txt", "b.txt")),
        ("data.paths", ["a,b.txt"], ("a,b.txt",)),
        ("data.betas", "0.9,0.99", (0.9, 0.99)),
        ("kind", "ulysses", "ulysses"),
        ("name", "none", "none"),
    ],
)
def test_text_and_toml_values_become_the_field_s_type(path: str, text: object, value: object):
    result = flatten(override(Run(), {path: text}))[path]
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.width", "1.5"),
        ("model.width", "abc"),
        ("model.width", "inf"),
        ("model.width", True),
        ("model.width", "none"),
        ("lr", "nan"),
        ("lr", ["1"]),
        ("data.shuffle", "yes"),
        ("data.paths", 3),
        ("data.betas", "0.9,x"),
        ("kind", "rings"),
        ("name", 3),
        ("name", True),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_field_value_and_type(path: str, value: object):
    with pytest.raises(ConfigError, match=rf"{path} expects .*, not ") as refused:
        override(Run(), {path: value})
    assert repr(value)[:8] in str(refused.value)


def test_a_choice_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"kind expects ring\|ulysses, not 'ulises'; did you mean ulysses\?"):
        override(Run(), {"kind": "ulises"})


@pytest.mark.parametrize(
    ("path", "meant"),
    [("model.widht", "model.width"), ("widht", "model.width"), ("shuffle", "data.shuffle"), ("data.heads", "model.heads"), ("lrr", "lr")],
)
def test_an_unknown_setting_is_refused_with_the_nearest(path: str, meant: str):
    with pytest.raises(ConfigError, match=rf"{path} is not a setting; did you mean {meant}\?"):
        override(Run(), {path: "1"})


def test_an_unknown_setting_lists_its_section():
    with pytest.raises(ConfigError, match="data has paths, betas, shuffle"):
        override(Run(), {"data.zzzzz": "1"})


def test_a_section_is_not_a_setting_and_a_setting_not_a_section():
    with pytest.raises(ConfigError, match=r"model is a section.*model\.width"):
        override(Run(), {"model": "3"})
    with pytest.raises(ConfigError, match=r"name\.x does not exist"):
        override(Run(), {"name.x": "3"})


def test_settings_of_one_section_are_judged_together():
    assert override(Run(), {"model.heads": "3", "model.width": "9"}).model == Model(width=9, heads=3)
    with pytest.raises(ConfigError, match=r"model\.width=8 is not a multiple of model\.heads=3"):
        override(Run(), {"model.heads": "3"})


def test_a_missing_section_is_made_from_its_settings_and_removed_again():
    made = override(Run(), {"model.rope.theta": "500"})
    assert made.model.rope == Rope(theta=500.0)
    assert override(made, {"model.rope": "none"}).model.rope is None
    with pytest.raises(ConfigError, match=r"missing model\.rope\.theta"):
        override(Run(), {"model.rope.factor": "2"})
    with pytest.raises(ConfigError, match="cannot both be set"):
        override(made, {"model.rope": "none", "model.rope.factor": "2"})


def test_toml_replays_every_setting(tmp_path: Path):
    config = Run(
        name='quote " backslash \\ tab \t del \x7f é 語',
        model=Model(width=12, rope=Rope(theta=1e-5)),
        data=Data(paths=("a,b", "c"), shuffle=False, betas=()),
        lr=0.1 + 0.2,
        limit=7,
    )
    assert replayed(config, tmp_path) == config
    assert replayed(Run(), tmp_path) == Run()
    assert set(flatten(config)) >= {"name", "model.rope.theta", "data.paths"}


def test_secrets_are_not_written_and_have_to_be_given_again(tmp_path: Path):
    config = Run(data=Data(paths=("s3://user:pw@bucket/x", "https://h/x?sig=abc&part=1", "plain"), api_token="abc123"))
    text = to_toml(config, "debug")
    assert not any(secret in text for secret in ("user:pw", "abc"))
    assert tomllib.loads(text)["data"]["eos_token"] == "</s>"
    assert redact("data.paths", config.data.paths) == ("s3://<redacted>@bucket/x", "https://h/x?sig=<redacted>&part=1", "plain")
    with pytest.raises(ConfigError, match=r"give it again: --data\.paths"):
        replayed(config, tmp_path)


def test_a_wrong_secret_is_not_shown():
    with pytest.raises(ConfigError) as refused:
        override(Run(), {"data.api_token": ["hunter2"]})
    assert "hunter2" not in str(refused.value)


def test_toml_without_a_base_or_broken_is_refused(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text("[train]\nsteps = 3\n")
    with pytest.raises(ConfigError, match="does not say which recipe"):
        read_toml(path)
    path.write_text("base = \n")
    with pytest.raises(ConfigError, match="line 1"):
        read_toml(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_toml(tmp_path / "absent.toml")


def test_every_setting_is_described_own_settings_first():
    rows = describe(Run())
    assert [row.path for row in rows][:5] == ["name", "kind", "lr", "limit", "model.width"]
    assert {row.path: row.words for row in rows} | {"kind": "ring|ulysses", "limit": "int|none", "data.paths": "text,..."} == {
        row.path: row.words for row in rows
    }
    assert all(row.doc for row in rows)


def test_nothing_is_suggested_for_what_resembles_nothing():
    assert nearest("zzz", ["train", "plan"]) is None
    assert nearest("trian", ["plan", "train"]) == "train"
    assert nearest("anything", []) is None
