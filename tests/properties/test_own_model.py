"""A model that lives outside the package trains on any layout with the numbers of one process."""

from dataclasses import replace
from pathlib import Path

import pytest

from paraxis.optim.config import OptimConfig
from paraxis.recipes.find import find
from tests.measure import MadeRows, measure
from tests.properties.test_layouts import assert_same

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "convolutional.py"


@pytest.fixture(scope="module")
def config():
    found, _ = find(f"{EXAMPLE}:tiny")
    return replace(
        found,
        model=replace(found.model, vocab_size=64, width=16, depth=4),
        data=replace(found.data, seq_len=32),
        train=replace(found.train, micro_batch=1, global_tokens=8 * 32),
        optim=OptimConfig(name="sgd", lr=0.1, momentum=0.9, clip_norm=0.05),
        precision="fp64",
    )


@pytest.mark.parametrize(
    "layout", ["dp2", "fsdp2", "tp2", "fsdp2 x tp2", "pp2", "pp2.zbv", "cp2", "cp2 x tp2", "pp2 x cp2", "pp2 x fsdp2 x tp2"]
)
def test_a_model_of_ones_own_gives_the_numbers_of_one_process(config, layout):
    rows = MadeRows(64, 32)
    assert_same(measure(config=config, layout=layout, rows=rows), measure(config=config, layout="", rows=rows), "fp64")


def test_the_page_on_adding_a_model_quotes_the_file_that_is_tested():
    page = (ROOT / "docs" / "how-to-add-a-model.md").read_text()
    assert f"```python\n{EXAMPLE.read_text()}```" in page
