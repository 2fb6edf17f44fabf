"""Names are translated by a table."""

import pytest

from paraxis.base.keys import Piece, Stacked, to_theirs

TABLE = {
    "embed.weight": "model.embed_tokens.weight",
    "layers.{i}.q.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.experts.{e}.up": "model.layers.{i}.mlp.{e}.up",
    "same.{i}.{i}": "{i}.twice.{i}",
}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("embed.weight", "model.embed_tokens.weight"),
        ("layers.0.q.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("layers.127.q.weight", "model.layers.127.self_attn.q_proj.weight"),
        ("layers.3.experts.12.up", "model.layers.3.mlp.12.up"),
        ("same.4.4", "4.twice.4"),
    ],
)
def test_a_name_has_its_counterpart(ours, theirs):
    assert to_theirs(TABLE, ours) == theirs


def test_a_piece_has_the_whole_s_name_and_shape():
    table = {
        "l.{i}.k.weight": Piece("h.{i}.qkv.weight", 1, of=3, transpose=True),
        "l.{i}.k.bias": Piece("h.{i}.qkv.bias", 1, of=3),
    }
    weight, bias = to_theirs(table, "l.7.k.weight"), to_theirs(table, "l.7.k.bias")
    assert (weight, bias) == (Piece("h.7.qkv.weight", 1, of=3, transpose=True), Piece("h.7.qkv.bias", 1, of=3))
    assert (weight.their_shape((4, 5)), bias.their_shape((4,))) == ((5, 12), (12,))


def test_a_stack_has_a_name_and_a_shape_for_each_of_its_entries():
    table = {"layers.{i}.up": Stacked("model.{i}.experts.{e}.up.{i}", transpose=True), "layers.{i}.bias": Stacked("{e}.{i}.bias")}
    up, bias = to_theirs(table, "layers.7.up"), to_theirs(table, "layers.7.bias")
    assert (up, bias) == (Stacked("model.7.experts.{e}.up.7", transpose=True), Stacked("{e}.7.bias"))
    assert up.names(3) == ["model.7.experts.0.up.7", "model.7.experts.1.up.7", "model.7.experts.2.up.7"]
    assert (up.their_shape((3, 4, 5)), bias.their_shape((3, 4, 5)), bias.their_shape((3, 4))) == ((5, 4), (4, 5), (4,))
    assert to_theirs(table, "layers.07.up") is None


@pytest.mark.parametrize(
    "name", ["", "embedXweight", "layers.x.q.weight", "layers.01.q.weight", "layers.-1.q.weight", "same.4.5", "embed.weight.more"]
)
def test_a_name_no_row_speaks_of_is_none(name):
    assert to_theirs(TABLE, name) is None
