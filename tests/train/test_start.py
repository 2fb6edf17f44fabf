"""A fine-tuning run begins with exactly the weights it names, on any layout; what does not fit is refused by name unless allowed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paraxis.base.errors import CheckpointError, ConfigError
from paraxis.checkpoint.load import open_checkpoint
from paraxis.cli import main
from paraxis.models.llama import LlamaConfig
from paraxis.models.qwen3 import Qwen3MoEConfig
from paraxis.ops.routing import RoutingConfig
from paraxis.train.config import RunConfig
from paraxis.train.start import start_from
from paraxis.train.state import pieces, save_run
from paraxis.verify.measure import joined
from tests.measure import MadeRows, Part, run_of, with_layout
from tests.runs import events, paraxis, refusal, saved, succeeded
from tests.train.planted import PlantedData, experts
from tests.worlds import run_world

VOCABULARY, SEQ_LEN = 32, 16
SIZES = {"vocab_size": VOCABULARY, "width": 16, "layers": 4, "heads": 4, "kv_heads": 2}
DENSE = LlamaConfig(**SIZES, mlp_width=32)
MODELS = {
    "dense": DENSE,
    "tied": replace(DENSE, tied=True),
    "experts": Qwen3MoEConfig(**SIZES, head_size=4, mlp_width=16, routing=RoutingConfig(experts=8, chosen=2)),
}


def config_of(model: Any, layout: str = "", **settings: Any) -> RunConfig:
    base = replace(experts(), model=model, data=PlantedData(seq_len=SEQ_LEN))
    return with_layout(replace(base, train=replace(base.train, **settings)), layout)


def parts_of(config: RunConfig, folder: Path | None, start: bool) -> list[Part]:
    run = run_of(config, MadeRows(VOCABULARY, SEQ_LEN))
    if start:
        start_from(run)
    if folder is not None:
        save_run(run, folder, {})
    return [Part(p.name, p.shape, p.box, p.tensor.detach().clone()) for p in pieces(run)]


def whole(config: RunConfig, *, folder: Path | None = None, start: bool = True) -> dict[str, torch.Tensor]:
    """Every tensor of a run that has just begun (and is saved in `folder`), put together from its ranks' parts."""
    tensors, apart = joined(run_world(parts_of, config.parallel.degrees.ranks, config, folder, start))
    assert [name for name, spread in apart.items() if spread] == []
    return tensors


def weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("model/")}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", params=MODELS)
def origin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A model, a checkpoint of its weights that another seed made, and the same as a Hugging Face folder in bf16."""
    folder, model = tmp_path_factory.mktemp(request.param), MODELS[request.param]
    whole(config_of(model, seed=7), folder=folder / "ours", start=False)
    assert main(["convert", "export", str(folder / "ours"), str(folder / "hf"), "--dtype=bf16", "--shard-size=20KB"]) == 0
    return model, folder / "ours" / "step-0", folder / "hf"


@pytest.mark.parametrize(
    "layout",
    ["", "fsdp2", "tp2", "pp2", *(pytest.param(one, marks=pytest.mark.full) for one in ("pp2.zbv", "fsdp2xtp2", "cp2", "fsdp4"))],
)
def test_the_first_weights_are_bitwise_those_that_are_named(origin: tuple[Any, Path, Path], layout: str, tmp_path: Path):
    """Of ours as they are; of bf16 files as `paraxis convert import --dtype fp32` makes them."""
    model, ours, hf = origin
    assert main(["convert", "import", str(hf), str(tmp_path / "imported"), "--dtype=fp32"]) == 0
    for source, expected in ((ours, ours), (hf, tmp_path / "imported" / "step-0")):
        checkpoint = open_checkpoint(expected)
        begun = whole(config_of(model, layout, init_from=str(source)))
        assert same(weights(begun), {n: checkpoint.read(n) for n in checkpoint.tensors if n.startswith("model/")})
        assert not any(tensor.any() for name, tensor in begun.items() if name.startswith("optim/"))


def test_experts_share_out_what_is_read(tmp_path: Path):
    config = config_of(MODELS["experts"], seed=7)
    expected = whole(config, folder=tmp_path / "ours", start=False)
    begun = whole(config_of(MODELS["experts"], "fsdp2xep2", init_from=str(tmp_path / "ours")))
    assert same(weights(begun), weights(expected))


def test_a_vocabulary_that_grew_or_shrank_keeps_the_rows_of_ids_that_both_have(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    before = whole(config_of(DENSE, seed=7), folder=tmp_path, start=False)
    for entries in (48, 24):
        model = replace(DENSE, vocab_size=entries)
        plain = whole(config_of(model), start=False)
        for layout in ("", "fsdp2", "tp2"):
            begun = whole(config_of(model, layout, init_from=str(tmp_path), init_resize=True))
            for name in ("model/embed.weight", "model/head.weight"):
                rows = min(entries, VOCABULARY)
                assert torch.equal(begun[name][:rows], before[name][:rows])
                assert torch.equal(begun[name][rows:], plain[name][rows:])
            assert torch.equal(begun["model/layers.3.mlp.up_proj.weight"], before["model/layers.3.mlp.up_proj.weight"])
    [message] = [failure(replace(DENSE, vocab_size=48), tmp_path)]
    assert "has embed.weight in shape (32, 16), the model in (48, 16); train.init_resize=true copies the rows of ids" in message


def failure(model: Any, source: Path, layout: str = "", **settings: Any) -> str:
    """The one message that every rank ends with."""

    def body() -> str:
        run = run_of(config_of(model, layout, init_from=str(source), **settings), MadeRows(VOCABULARY, SEQ_LEN))
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            start_from(run)
        return str(caught.value)

    messages = set(run_world(body, config_of(model, layout).parallel.degrees.ranks))
    assert len(messages) == 1
    return messages.pop()


def test_what_does_not_fit_is_refused_by_name_with_the_setting_that_would_allow_it(tmp_path: Path):
    whole(config_of(DENSE), folder=tmp_path, start=False)
    tied, deeper = MODELS["tied"], replace(DENSE, layers=5)
    spare = failure(tied, tmp_path, "fsdp2")
    assert "has head.weight, which the model has not; train.init_skip=head.weight would do without" in spare
    missing = failure(deeper, tmp_path, "pp2")
    assert "lacks layers.4.attention_norm.weight" in missing
    assert "train.init_skip=layers.4" in missing
    other = failure(replace(DENSE, mlp_width=64), tmp_path)
    assert "in shape (32, 16), the model in (64, 16); is it of the same size?" in other
    assert "train.init_skip: 'haed.weight' is the name of no tensor" in failure(DENSE, tmp_path, init_skip=("haed.weight",))
    assert "does not exist" in failure(DENSE, tmp_path / "none", "fsdp2")
    (tmp_path / "empty").mkdir()
    assert "holds neither a complete paraxis checkpoint" in failure(DENSE, tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"train\.init_resize is about the weights to begin with, but there are none"):
        config_of(DENSE, init_resize=True)


def test_what_is_skipped_keeps_its_first_values_on_either_side(tmp_path: Path):
    source = whole(config_of(DENSE, seed=7), folder=tmp_path / "ours", start=False)
    assert main(["convert", "export", str(tmp_path / "ours"), str(tmp_path / "hf")]) == 0
    deeper, plain = replace(DENSE, layers=5), whole(config_of(replace(DENSE, layers=5)), start=False)
    for place in ("ours", "hf"):
        begun = weights(whole(config_of(deeper, init_from=str(tmp_path / place), init_skip=("layers.4.*", "head.weight"))))
        for name, tensor in begun.items():
            kept = name.startswith("model/layers.4.") or name == "model/head.weight"
            assert torch.equal(tensor, (plain if kept else source)[name]), name
    tied = weights(whole(config_of(MODELS["tied"], init_from=str(tmp_path / "ours"), init_skip=("head.weight",))))
    assert same(tied, {name: tensor for name, tensor in source.items() if name in tied})
    theirs = weights(whole(config_of(MODELS["tied"], init_from=str(tmp_path / "hf"), init_skip=("lm_head.weight",))))
    assert same(theirs, tied)


def test_a_head_that_repeats_the_embedding_is_no_surprise_and_another_is(tmp_path: Path):
    whole(config_of(DENSE, seed=7), folder=tmp_path / "ours", start=False)
    assert main(["convert", "export", str(tmp_path / "ours"), str(tmp_path / "hf")]) == 0
    assert "lm_head.weight differs from model.embed_tokens.weight" in failure(MODELS["tied"], tmp_path / "hf")


def test_fp64_takes_fp32_exactly_and_a_checkpoint_in_bf16_likewise(tmp_path: Path):
    source = whole(config_of(DENSE, seed=7), folder=tmp_path, start=False)
    begun = whole(replace(config_of(DENSE, init_from=str(tmp_path)), precision="fp64"), folder=tmp_path / "wide")
    assert all(torch.equal(begun[name], tensor.double()) for name, tensor in weights(source).items())
    narrowed = whole(replace(config_of(DENSE, init_from=str(tmp_path / "wide")), precision="bf16"))
    assert same(weights(narrowed), weights(source))


def test_the_optimizer_comes_along_where_it_is_asked_for_and_there(tmp_path: Path):
    run = ["train", f"{Path(__file__).parent / 'planted.py'}:layers"]
    succeeded(paraxis(*run, "--train.steps=3", "--run-dir=first", folder=tmp_path))
    meta, before = saved(tmp_path / "first")
    again = [*run, "--run-dir=second", "--train.steps=1", "--optim.lr=0", "--optim.weight_decay=0", "--train.init_from=first"]
    succeeded(paraxis(*again, "--train.init_parts=weights+optimizer", "--parallel.fsdp=2", folder=tmp_path))
    later, after = saved(tmp_path / "second")
    assert later["optimizer"]["counters"]["updates"] == meta["optimizer"]["counters"]["updates"] + 1
    assert same(weights(after), weights(before))
    exp_avg = "optim/exp_avg/head.weight"
    assert not torch.allclose(after[exp_avg], after[exp_avg].sign() * 0)
    assert (after[exp_avg] - 0.9 * before[exp_avg]).abs().max() < before[exp_avg].abs().max()
    succeeded(paraxis("convert", "export", "first", "hf", folder=tmp_path))
    refused = [*run, "--run-dir=third", "--train.init_parts=weights+optimizer"]
    message = refusal(paraxis(*refused, "--train.init_from=hf", folder=tmp_path), 77)
    assert "hf holds no optimizer state, but train.init_parts=weights+optimizer asks for that of adamw" in message
    message = refusal(paraxis(*refused, "--train.init_from=first", "--optim.name=sgd", folder=tmp_path), 77)
    assert "holds the state of adamw" in message


def test_a_run_that_is_resumed_does_not_begin_again_and_its_configuration_replays_it(tmp_path: Path):
    run = ["train", f"{Path(__file__).parent / 'planted.py'}:layers"]
    succeeded(paraxis(*run, "--train.steps=2", "--train.seed=5", "--run-dir=first", folder=tmp_path))
    tuned = [*run, "--optim.schedule=constant", "--train.init_from=first", "--run-dir=tuned"]
    succeeded(paraxis(*tuned, "--train.steps=4", folder=tmp_path))
    succeeded(paraxis(*tuned, "--train.steps=6", folder=tmp_path))
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    succeeded(paraxis(*tuned, "--train.steps=8", folder=tmp_path))  # what it began with is no longer needed
    (tmp_path / "elsewhere").rename(tmp_path / "first")
    succeeded(paraxis("train", "tuned/config.toml", "--run-dir=replayed", folder=tmp_path))
    assert same(saved(tmp_path / "tuned")[1], saved(tmp_path / "replayed")[1])
    assert [event["init_from"] for event in events(tmp_path / "replayed", "start")] == ["first"]


def test_settings_that_shapes_do_not_show_are_told_of(tmp_path: Path):
    run = ["train", f"{Path(__file__).parent / 'planted.py'}:layers"]
    succeeded(paraxis(*run, "--train.steps=1", "--run-dir=first", folder=tmp_path))
    other = ["--model.rope.theta=5000", "--model.kv_heads=2", "--train.init_from=first", "--run-dir=second", "--train.steps=1"]
    assert "is not quite this one: rope.theta 500000.0 (here 5000.0)" in succeeded(paraxis(*run, *other, folder=tmp_path)).err
