"""What a person sees: help, the resolved run, and one message with an exit code for what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paraxis.base.axes import Degrees
from paraxis.base.env import Environment
from paraxis.base.errors import ConfigError
from paraxis.cli import main
from paraxis.cli.arguments import parse
from paraxis.cli.train import choose_ranks

ROOT = Path(__file__).parents[2]


def paraxis(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, "-m", "paraxis", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=100)


def refused(*arguments: str, cwd: Path | None = None, **variables: str) -> str:
    """The message of a refused command, which has to be one line on stderr and nothing else."""
    done = paraxis(*arguments, cwd=cwd, **variables)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (78, "", 1), done.stderr
    assert done.stderr.startswith("paraxis: error: ")
    return done.stderr


def test_help_lists_commands_without_importing_torch():
    code = "import sys; sys.argv = ['paraxis', '--help']; from paraxis.cli import main; main(); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "  train " in done.stdout


def test_train_help_has_examples():
    done = paraxis("train", "--help")
    assert done.returncode == 0
    assert "examples:\n  paraxis train debug" in done.stdout


def test_an_unknown_command_is_refused_with_the_nearest():
    assert "there is no command 'trian'; did you mean train?" in refused("trian")


def test_a_recipe_s_help_shows_its_own_values():
    done = paraxis("train", "debug", "--train.steps=321", "--help")
    assert done.returncode == 0
    assert "--train.steps int\n        optimizer steps in all [321]" in done.stdout


def test_print_config_replays_itself_from_a_toml_file(tmp_path: Path):
    first = paraxis("train", "debug", "--parallel.tp", "2", "--train.steps=7", "--print-config")
    assert first.returncode == 0
    (tmp_path / "again.toml").write_text(first.stdout)
    second = paraxis("train", "again.toml", "--print-config", cwd=tmp_path)
    assert second.stdout == first.stdout
    assert "steps = 7" in first.stdout


def test_unknown_settings_and_options_are_refused_with_the_nearest():
    assert "did you mean --parallel.tp?" in refused("train", "debug", "--tp=2")
    assert "did you mean --ranks?" in refused("train", "debug", "--rank", "2")
    assert "did you mean parallel.tp?" in refused("train", "debug", "--parallel.tpp=2")


def test_a_layout_that_needs_other_ranks_is_refused_before_any_worker_starts(tmp_path: Path):
    assert "needs 2 ranks but 3 were started" in refused("train", "debug", "--parallel.tp=2", "--ranks=3", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_debug_adds_the_traceback():
    done = paraxis("train", "nonesuch", "--debug")
    assert done.returncode == 78
    assert "Traceback" in done.stderr
    assert "there is no recipe 'nonesuch'" in done.stderr.splitlines()[-1]


def test_a_reader_that_stops_early_is_no_error():
    pipe = f"{sys.executable} -m paraxis train debug --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipe], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


def test_arguments_are_names_options_flags_and_settings():
    parsed = parse(["a", "--ranks", "2", "--x.y=1=2", "--z", "-1", "--flag", "--debug"], ("ranks",), ("debug",))
    assert (parsed.names, parsed.options, parsed.flags) == (["a"], {"ranks": "2"}, {"debug"})
    assert parsed.settings == {"x.y": "1=2", "z": "-1", "flag": True}
    assert parse(["--x=1", "--x=2"], (), ()).settings == {"x": "2"}
    with pytest.raises(ConfigError, match="--ranks needs a value"):
        parse(["--ranks"], ("ranks",), ())
    with pytest.raises(ConfigError, match="--debug takes no value"):
        parse(["--debug=1"], (), ("debug",))


@pytest.mark.parametrize(
    ("requested", "degrees", "devices", "ranks"),
    [
        (None, Degrees(), 0, 1),
        (None, Degrees(fsdp=-1), 0, 1),
        (None, Degrees(fsdp=-1, tp=2), 0, 2),
        (None, Degrees(fsdp=-1, tp=2), 8, 8),
        (None, Degrees(fsdp=2, tp=2), 0, 4),
        (None, Degrees(fsdp=2, tp=2), 8, 4),
        ("6", Degrees(fsdp=-1), 0, 6),
        ("6", Degrees(fsdp=-1), 8, 6),
    ],
)
def test_how_many_ranks_are_started(
    requested: str | None, degrees: Degrees, devices: int, ranks: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("paraxis.parallel.world.visible_devices", lambda: devices)
    assert choose_ranks(requested, degrees, Environment(cache_dir=tmp_path)) == ranks


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("paraxis.parallel.world.visible_devices", lambda: 2)
    with pytest.raises(ConfigError, match="4 ranks need as many GPUs, but this machine shows 2"):
        choose_ranks("4", Degrees(fsdp=-1), Environment(cache_dir=tmp_path))


def test_a_launcher_s_workers_are_as_many_as_it_started(tmp_path: Path):
    env = Environment(launcher="torchrun", world_size=4, cache_dir=tmp_path)
    assert choose_ranks(None, Degrees(), env) == 4
    assert choose_ranks("4", Degrees(), env) == 4
    with pytest.raises(ConfigError, match="--ranks=2 does not fit the 4 workers that torchrun started"):
        choose_ranks("2", Degrees(), env)


def test_a_layout_sets_every_degree_at_once(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "debug", "--layout", "fsdp2 x tp2", "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert "fsdp = 2" in shown
    assert "tp = 2" in shown


def test_a_layout_beside_a_degree_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "debug", "--layout=tp2", "--parallel.tp=4", "--print-config"]) == ConfigError.exit_code
    assert "--layout=tp2 says every degree, and so does --parallel.tp" in capsys.readouterr().err
