"""`paraxis bench attention` and `bench loss` measure what they say, on real inputs."""

import json
from pathlib import Path

import pytest
import torch

from paraxis.base.device import CPU
from paraxis.bench.attention import Shape, attention_rows, documents
from paraxis.bench.loss import loss_rows
from paraxis.cli import main
from paraxis.ops.attention import BACKENDS, causal_mask, document_mask
from paraxis.recipes import RECIPES

SHAPE = Shape(rows=2, length=50, heads=4, kv_heads=2, width=8)


def test_attention_counts_the_pairs_that_are_seen():
    whole = causal_mask(50, 50, torch.device("cpu")).sum().item() * 2
    assert SHAPE.flops(None) == 4.0 * whole * 4 * 8
    documents_bt = torch.tensor([[0] * 20 + [1] * 30, [0] * 50])
    assert SHAPE.flops(documents_bt) == 4.0 * document_mask(documents_bt).sum().item() * 4 * 8


def test_the_documents_are_the_same_in_every_run():
    shape = Shape(rows=4, length=4000, heads=1, kv_heads=1, width=8)
    first = documents(shape, CPU)
    assert torch.equal(first, documents(shape, CPU))
    assert 8 <= int(first[:, -1].sum()) <= 32  # a thousand tokens each, of 16 thousand


def test_every_backend_is_timed_or_says_why_not():
    rows = list(attention_rows(RECIPES["debug"](), CPU))
    assert [row["name"] for row in rows] == [*BACKENDS, *BACKENDS]
    for row in rows:
        assert ("not here" in row) != (row.get("forward_ms", 0) > 0 and row["backward_ms"] > 0), row
    assert {row["name"] for row in rows if "not here" not in row} == {"sdpa", "reference"}


def test_every_way_to_compute_the_loss_is_timed():
    names = [row["name"] for row in loss_rows(RECIPES["debug"](), CPU) if row["forward_and_backward_ms"] > 0]
    assert names == ["reference", "chunks of 128"]


@pytest.mark.parametrize("benchmark", ["attention", "loss"])
def test_the_command_writes_results_that_become_a_table(benchmark, tmp_path: Path, capsys):
    out = tmp_path / "results.json"
    assert main(["bench", benchmark, "debug", "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert main(["bench", "table", str(out)]) == 0
    table = capsys.readouterr().out
    assert "| reference |" in table
    assert "backward ms" in table
