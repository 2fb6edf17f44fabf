"""Compiled blocks without a compiler: what they keep for backward is what really compiled ones keep."""

from collections import Counter
from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from paraxis.base.seams import Batch
from paraxis.base.strategy import RematConfig
from paraxis.parallel.apply import compile_blocks
from paraxis.parallel.remat import checkpoint_blocks, kept_by
from paraxis.plan.compiled import pretending_to_compile
from paraxis.recipes.find import find

MODES: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")


def block_and_inputs(mode: Literal["none", "selective", "full"]) -> tuple[Any, tuple[Any, ...]]:
    """A block with values, checkpointed, and what it is called with."""
    torch.manual_seed(0)
    config: Any = find("debug", {"model.layers": 1})[0]
    model = config.model.build()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    [block] = model.blocks()
    checkpoint_blocks([block], kept_by(RematConfig(mode=mode), 1), lambda block: True)
    seen: list[tuple[Any, ...]] = []
    hook = block.register_forward_pre_hook(lambda module, args: seen.append(args))
    tokens = torch.arange(32).view(1, 32)
    model(Batch(tokens, tokens, tokens))
    hook.remove()
    x, *others = seen[0]
    return block, (x.detach().requires_grad_(), *others)


def kept(block: Any, inputs: tuple[Any, ...]) -> Counter[tuple[torch.Size, torch.dtype]]:
    """What a block's backward is given, parameters, inputs and random states (bytes of the host's) left out."""
    out: Tensor = block(*inputs)
    own = {x.data_ptr() for x in (*block.parameters(), *(x for x in inputs if isinstance(x, Tensor)))}
    saved = out.grad_fn.saved_tensors  # type: ignore[union-attr]
    out.sum().backward()
    return Counter((x.shape, x.dtype) for x in saved if x.data_ptr() not in own and x.dtype != torch.uint8)


@pytest.mark.parametrize("mode", MODES)
def test_a_pretended_block_keeps_what_a_compiled_one_does(mode: Literal["none", "selective", "full"]):
    block, inputs = block_and_inputs(mode)
    compile_blocks([block], "aot_eager", whole=True)
    really = kept(block, inputs)
    gradients = [p.grad.clone() for p in block.parameters()]
    block, inputs = block_and_inputs(mode)
    with pretending_to_compile("aot_eager"):
        compile_blocks([block], "aot_eager", whole=True)
    pretended = kept(block, inputs)
    assert pretended == really
    for parameter, gradient in zip(block.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_recomputing_more_keeps_less():
    sizes = []
    for mode in MODES:
        block, inputs = block_and_inputs(mode)
        with pretending_to_compile("inductor"):
            compile_blocks([block], "inductor", whole=True)
        sizes.append(sum(number * shape.numel() * dtype.itemsize for (shape, dtype), number in kept(block, inputs).items()))
    assert sizes[0] >= sizes[1] > sizes[2]


class Exchanged:
    """Attention between calls that a compiler must leave alone, as across ranks; in functions of its own, one of which has none."""

    def __init__(self, attend: Any) -> None:
        self.attend = attend
        self.exchange = torch.compiler.disable(lambda x: x.contiguous() * 1)

    def there(self, x: Tensor) -> Tensor:
        return self.exchange(x.movedim(1, 2)).movedim(2, 1) * 2

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        y = self.attend(self.there(q), self.there(halved(k)), v, mask)
        return self.exchange(y.flatten(2) + 1).unflatten(2, y.shape[2:])


def halved(x: Tensor) -> Tensor:
    return x.sigmoid() / 2


def kept_in_pieces(*, really: bool) -> tuple[list[Counter[Any]], list[Tensor]]:
    """What the pieces of a block keep for the backward of each of three runs, and the gradients."""
    torch._dynamo.reset()
    block, inputs = block_and_inputs("none")
    runs, out = [], torch.zeros(())
    with nullcontext() if really else pretending_to_compile("aot_eager"):
        block.attention.attend = Exchanged(block.attention.attend)
        compile_blocks([block], "aot_eager", whole=False)
        for _ in range(3):
            saved: dict[int, Tensor] = {}

            def pack(x: Tensor, saved: dict[int, Tensor] = saved) -> Tensor:
                saved[x.untyped_storage()._cdata] = x
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                out = block(*inputs)
            own = {x.untyped_storage()._cdata for x in (*block.parameters(), *(x for x in inputs if isinstance(x, Tensor)))}
            left = [x for number, x in saved.items() if number not in own and x.dtype not in (torch.uint8, torch.int64)]
            runs.append(Counter((x.numel(), x.dtype) for x in left))
    out.sum().backward()
    return runs, [parameter.grad for parameter in block.parameters()]


def test_a_block_in_pieces_keeps_what_the_pieces_that_a_compiler_makes_do():
    (really, gradients), (pretended, found) = (kept_in_pieces(really=really) for really in (True, False))
    assert pretended[1:] == really[1:]
    assert sum(pretended[0].values()) > sum(really[0].values()), "a first run is eager, or nothing was tried"
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("mode", "pieces"), [("selective", False), ("full", True)])
def test_a_block_in_pieces_is_recomputed_by_them_unless_operators_are_watched(mode: Any, pieces: bool):
    block, inputs = block_and_inputs("none")
    eager, runs = block.forward, list[Any]()

    def forward(*args: Any) -> Any:
        runs.append(None)
        return eager(*args)

    with pretending_to_compile("aot_eager"):
        block.attention.attend = Exchanged(block.attention.attend)
        forward.__self__ = block  # type: ignore[attr-defined]
        block.forward = forward
        compile_blocks([block], "aot_eager", whole=False)
        checkpoint_blocks([block], kept_by(RematConfig(mode=mode), 1), lambda block: False)
        for _ in range(3):
            block(*inputs).sum().backward()
    assert len(runs) == (2 if pieces else 6)  # the first run, which tells where pieces end, and its recomputation
