"""Generation is the same with and without its cache; scoring sums what the model says."""

import pytest
import torch

from paraxis.base.errors import ConfigError
from paraxis.base.seams import IGNORE, Batch
from paraxis.generate.engine import generate
from paraxis.generate.sample import SamplingConfig, pick
from paraxis.generate.score import score
from paraxis.models.llama import LlamaConfig
from paraxis.ops.rope import RopeConfig


@pytest.fixture
def model():
    torch.manual_seed(0)
    rope = RopeConfig(factor=4.0, original_context=16)
    built = LlamaConfig(vocab_size=61, width=32, layers=3, heads=4, kv_heads=2, mlp_width=48, rope=rope).build().double()
    for parameter in built.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return built


class OnlyLogits:
    """A model that offers nothing but logits."""

    def __init__(self, model):
        self.logits = lambda tokens_bt: model.logits(tokens_bt)


def text(model, prompt, sampling, stop=()):
    return torch.stack(list(generate(model, prompt, sampling, stop)), dim=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("length", [1, 5])
def test_the_cache_changes_nothing(model, temperature, length):
    prompt = torch.randint(61, (3, length))
    sampling = SamplingConfig(max_tokens=20, temperature=temperature)
    assert torch.equal(text(model, prompt, sampling), text(OnlyLogits(model), prompt, sampling))


def test_attention_is_put_back_afterwards(model):
    before = model.attend
    text(model, torch.tensor([[1, 2]]), SamplingConfig(max_tokens=3))
    assert model.attend is before
    tokens = generate(model, torch.tensor([[1, 2]]), SamplingConfig(max_tokens=3))
    next(tokens)
    tokens.close()
    assert model.blocks()[0].attention.attend is before


def test_the_seed_decides(model):
    prompt = torch.tensor([[1, 2, 3]])
    first, again, other = (text(model, prompt, SamplingConfig(max_tokens=30, temperature=2.0, seed=s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_row_ends_at_its_stop_token_and_all_rows_end_the_text(model):
    prompt = torch.tensor([[1, 2], [3, 4]])
    greedy = SamplingConfig(max_tokens=12, temperature=0.0)
    free = text(model, prompt, greedy)
    stop = int(free[0, 3])
    stopped = text(model, prompt, greedy, stop=(stop,))
    end = free[0].tolist().index(stop)
    assert stopped[0, : end + 1].tolist() == free[0, : end + 1].tolist()
    assert (stopped[0, end:] == stop).all()
    assert text(model, prompt[:1], greedy, stop=(stop,)).shape == (1, end + 1)


def test_top_k_and_top_p_choose_only_among_the_likeliest():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.05, 0.35]])).expand(4000, 4)
    generator = torch.Generator().manual_seed(0)

    def share(**sampling):
        picked = pick(logits, SamplingConfig(temperature=1.0, **sampling), generator)
        return (torch.bincount(picked, minlength=4) / 4000).tolist()

    assert share() == pytest.approx([0.1, 0.5, 0.05, 0.35], abs=0.04)
    assert share(top_k=2) == pytest.approx([0, 0.5 / 0.85, 0, 0.35 / 0.85], abs=0.04)
    assert share(top_p=0.8) == pytest.approx([0, 0.5 / 0.85, 0, 0.35 / 0.85], abs=0.04)
    assert share(top_p=0.01) == [0, 1, 0, 0]
    assert share(top_k=1) == [0, 1, 0, 0]


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_nonsense_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingConfig(**wrong)


def test_scores_of_parts_add_up_to_the_score_of_the_whole(model):
    tokens = torch.randint(61, (4, 10))
    targets = torch.randint(61, (4, 10))
    targets[1, 3:] = IGNORE
    positions = torch.arange(10).expand(4, 10)
    rows = [Batch(tokens[i : i + 1], targets[i : i + 1], positions[i : i + 1]) for i in range(4)]
    loss, count = score(model, rows)
    assert loss.dtype == torch.float64
    assert count == 33
    torch.testing.assert_close(loss, model(Batch(tokens, targets, positions)).detach())
    assert score(model, []) == (0, 0)
