"""What `paraxis verify` says: verdicts, failures that cost one row only, and messages for people."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from paraxis.base.errors import ConfigError, TrainingError
from paraxis.cli import main
from paraxis.cli.verify import take_layouts
from paraxis.recipes import RECIPES
from paraxis.recipes.find import find
from paraxis.verify import run
from paraxis.verify.compare import compare, put_together
from paraxis.verify.measure import Measured
from paraxis.verify.run import verify

EXAMPLE = Path(__file__).parents[2] / "examples" / "convolutional.py"
KEYS = ["layout", "ranks", "loss_diff", "grad_norm_diff", "grad_diff", "grad_name", "weight_diff", "ok"]


@pytest.fixture
def debug():
    return RECIPES["debug"]()


def on_dp2_only(monkeypatch, act):
    """Has `act` happen on rank 1 of dp2 in place of the measurement."""
    right = run.measure_rank

    def wrong(config, world, *args):
        if config.parallel.dp == 2 and world.rank == 1:
            act()
        return right(config, world, *args)

    monkeypatch.setattr(run, "measure_rank", wrong)


def raises():
    raise ValueError("the cat ate it")


@pytest.mark.parametrize(
    ("act", "reason"),
    [(raises, "rank 1 of 2 raised ValueError: the cat ate it"), (lambda: os._exit(3), "rank 1 of 2 died: exit code 3")],
    ids=["raises", "dies"],
)
def test_a_layout_that_fails_is_a_row_with_its_reason_and_the_others_still_run(monkeypatch, debug, act, reason):
    on_dp2_only(monkeypatch, act)
    failed, other = verify(debug, ["dp2", "fsdp2"], steps=1)
    assert (failed.ok, failed.reason, failed.loss_diff) == (False, reason, None)
    assert other.ok


def test_a_layout_that_hangs_is_ended_and_said_to_hang(monkeypatch, debug):
    on_dp2_only(monkeypatch, lambda: time.sleep(1000))
    failed, other = verify(debug, ["dp2", "fsdp2"], steps=1, timeout_s=8)
    assert failed.reason in {f"rank {rank} of 2 had not ended after 8 s" for rank in (0, 1)}
    assert other.ok


def test_a_recipe_that_fails_on_one_process_says_so(monkeypatch, debug):
    monkeypatch.setattr(run, "measure_rank", lambda *args: raises())
    with pytest.raises(TrainingError, match=r"debug fails on one process already.*ValueError: the cat ate it"):
        list(verify(debug, ["dp2"], steps=1))


def test_an_illegal_layout_and_a_coarse_precision_are_refused_before_anything_runs(debug):
    with pytest.raises(ConfigError, match=r"layout tp8: model.kv_heads=4 is not divisible by parallel.tp=8"):
        verify(debug, ["dp2", "tp8"])
    with pytest.raises(ConfigError, match="precision='bf16' cannot be compared number by number; choose one of fp64, fp32"):
        verify(debug, ["dp2"], precision="bf16")


def test_gpus_that_forked_ranks_could_not_use_are_refused(monkeypatch, debug):
    monkeypatch.setattr(run, "visible_devices", lambda: 2)
    monkeypatch.setattr(run, "can_be_copied", lambda: False)
    with pytest.raises(ConfigError, match=r"once this process has used CUDA.* or set CUDA_VISIBLE_DEVICES= to verify"):
        verify(debug, ["dp2"])


def python(code: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_the_command_forks_ranks_from_a_process_of_one_thread():
    code = """
import os
from paraxis.base.env import stay_forkable
stay_forkable()
from paraxis.verify import run
fork = run.fork_world
run.fork_world = lambda *args, **kwargs: (print("threads", len(os.listdir("/proc/self/task"))), fork(*args, **kwargs))[1]
from paraxis.cli import main
assert main(["verify", "debug", "--layouts", "dp2", "--steps=1"]) == 0
"""
    assert [line for line in python(code).splitlines() if line.startswith("threads")] == ["threads 1"] * 3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("recipe", "layouts"),
    [("debug", "fsdp2 tp2 pp2 pp2.zbv cp2.ring cp2.ulysses"), ("qwen3_30b_a3b", "fsdp2xep2"), ("deepseek_v3", "cp2.ringxep2")],
)
def test_layouts_on_gpus_give_the_numbers_of_one_gpu(recipe, layouts):
    code = f"""
from paraxis.base.env import stay_forkable
stay_forkable()
from paraxis.parallel.world import visible_devices
from paraxis.cli import main
if visible_devices() < 2:
    print("too few")
else:
    assert main("verify {recipe} --layouts {layouts} --debug".split()) == 0
"""
    if python(code) == "too few\n":
        pytest.skip("needs two GPUs")


@pytest.mark.parametrize("layout", ["fsdp2", "tp2"])
def test_fp32_is_compared_within_its_own_tolerance(debug, layout):
    [row] = verify(debug, [layout], precision="fp32", steps=2)
    assert row.ok, row.reason
    assert row.weight_diff is not None
    assert 1e-12 < row.weight_diff < 1e-5


def test_a_model_of_one_s_own_and_documents_kept_apart_are_verified(debug):
    config, _ = find(f"{EXAMPLE}:tiny")
    [own] = verify(config, ["fsdp2xtp2"], steps=1)
    [documents] = verify(replace(debug, data=replace(debug.data, document_mask=True)), ["cp2"], steps=1)
    assert own.ok, own.reason
    assert documents.ok, documents.reason


def test_ranks_that_disagree_on_the_loss_are_named():
    with pytest.raises(ValueError, match="ranks 0 and 1 report different losses"):
        put_together([Measured([1.0], [2.0]), Measured([1.5], [2.0])])


def test_a_loss_that_is_no_number_is_a_miss_even_where_all_ranks_agree():
    alone, spread = (put_together([Measured([loss], [1.0], {"weight": []})] * 2) for loss in (1.0, math.nan))
    row = compare("dp2", 2, {"sgd": spread}, {"sgd": alone}, "fp64")
    assert (row.ok, row.reason, row.loss_diff) == (False, "loss, which is not a number", math.inf)


def test_the_command_prints_a_table_and_succeeds(capsys):
    assert main(["verify", "debug", "--layouts", "fsdp2", "x", "tp2", "--steps=1"]) == 0
    printed = capsys.readouterr().out
    assert "fsdp2xtp2" in printed
    assert "1 layout: the same numbers as one process" in printed


def test_the_command_fails_on_a_miss_and_says_what_in_json(monkeypatch, capsys):
    on_dp2_only(monkeypatch, raises)
    assert main(["verify", "debug", "--layouts", "dp2", "fsdp2", "--steps=1", "--json"]) == 1
    printed = capsys.readouterr()
    failed, other = json.loads(printed.out)["layouts"]
    assert list(failed) == list(other) == KEYS
    assert (failed["ok"], failed["grad_diff"], other["ok"], other["ranks"]) == (False, None, True, 2)
    assert printed.err == "dp2: rank 1 of 2 raised ValueError: the cat ate it\n"


def test_layouts_are_read_with_spaces_and_commas_up_to_the_next_option():
    assert take_layouts(["debug", "--layouts", "dp2", "fsdp2", "x", "tp2", "--json"]) == (["debug", "--json"], ["dp2", "fsdp2xtp2"])
    assert take_layouts(["debug", "--layouts=dp2,tp2"]) == (["debug"], ["dp2", "tp2"])
    assert take_layouts(["debug"]) == (["debug"], None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["debug", "--layouts"], "--layouts needs layouts, such as"),
        (["debug", "--layouts", "all", "dp2"], "all holds every legal layout"),
        (["debug", "--layouts", "pd2"], "cannot read 'pd2'"),
        (["--layouts", "dp2"], "verify takes one recipe"),
        (["debug", "--steps=0"], "--steps=0 is not a whole number of 1 or more"),
        (["debug", "--precison=fp32"], "precison is not a setting; did you mean precision?"),
    ],
)
def test_bad_input_is_one_message(words, message, capsys):
    assert main(["verify", *words]) == ConfigError.exit_code
    assert message in capsys.readouterr().err
