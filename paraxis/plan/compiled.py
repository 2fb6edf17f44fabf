"""Compiled blocks without a compiler: forward and backward as AOTAutograd cuts them, run operator by operator on the pretended device.

What a compiled block keeps for backward is the partitioner's choice, so the partitioner itself makes it here, on the same joint graph
with the same recomputation tags as under `torch.compile`. The kernels that Inductor would make of it are told by `fusion.py`.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy

from paraxis.ops import loss
from paraxis.parallel import lowp_gather, remat
from paraxis.parallel.apply import untraceable
from paraxis.parallel.once import computed_once
from paraxis.parallel.tabulate import call_name
from paraxis.plan.cut_blocks import Function, Tape, cut, left_alone
from paraxis.plan.pretend import composite_rms_norm, replaced

Graph = torch.fx.GraphModule


@contextmanager
def pretending_to_compile(backend: str) -> Iterator[None]:
    """While inside, what is compiled is cut as AOTAutograd would cut it for `backend`; "none" leaves everything as it is."""
    if backend == "none":
        yield
        return
    known: dict[Any, Callable[..., Any]] = {}
    with ExitStack() as inside:
        inside.enter_context(replaced(torch, "compile", partial(_compile, known)))
        inside.enter_context(replaced(torch.compiler, "disable", left_alone))
        inside.enter_context(replaced(loss, "_compiled", lambda: (loss.vocabulary_statistics, loss.logit_gradient)))
        inside.enter_context(replaced(lowp_gather, "_compiled", lambda: lowp_gather._cast_into))
        yield


def _compile(known: dict[Any, Callable[..., Any]], forward: Callable[..., Any], *, backend: str, fullgraph: bool, **_: Any) -> Any:
    """Stands in for torch.compile of a block's forward. Of those that cannot be compiled in one piece, blocks with experts run as they are:
    what is compiled of them keeps what eager blocks do, or less."""
    module: nn.Module = getattr(forward, "__wrapped__", forward).__self__
    if not fullgraph:
        return forward if untraceable(module) else _compile_pieces(known, module, forward, backend)
    options = _checkpointed(forward)
    checkpointing = None if options is None else str(getattr(options.get("context_fn"), "args", "all"))

    def call(*args: Any) -> Any:
        parameters = dict(module.named_parameters())
        key = _key(module, checkpointing, (parameters, args))
        if key not in known:
            known[key] = _cut(module, forward, tuple(parameters), backend)
            with _disable_current_modes(), replaced(F, "rms_norm", composite_rms_norm):  # taken apart, as a compiler does
                # Makes the graphs. Nobody follows this run, and what it is given may be held on to.
                known[key](*tree_map_only(Tensor, _alike, (list(parameters.values()), *args)))
        return known[key](list(parameters.values()), *args)

    return call


def _checkpointed(forward: Callable[..., Any]) -> dict[str, Any] | None:
    """How a block's forward is recomputed; None where it is not."""
    return inspect.getclosurevars(forward).nonlocals["options"] if hasattr(forward, "__wrapped__") else None


def _compile_pieces(known: dict[Any, Callable[..., Any]], module: nn.Module, forward: Callable[..., Any], backend: str) -> Any:
    """A block's forward in pieces, from its second run on: the first tells where they end."""

    def compiled(function: Function, values: list[Any]) -> Function:
        piece = _graphs(function, min_cut_rematerialization_partition, backend)
        # As above; nor does a checkpoint hear of what it saves.
        with _disable_current_modes(), replaced(F, "rms_norm", composite_rms_norm), saved_tensors_hooks(lambda x: x, lambda x: x):
            piece(tree_map_only(Tensor, _alike, values))
        return piece

    first = set[nn.Module]()  # blocks whose first run is to be computed again

    def call(*args: Any) -> Any:
        options = _checkpointed(module.forward)
        if options is not None and options.get("context_fn") not in (None, computed_once):
            return forward(*args)  # operator by operator: torch compiles nothing while it is watched for what to keep
        given = [x for x in (*module.parameters(), *args) if x is not None]
        key = _key(module, "pieces", given)
        if module in first:  # is computed again as it was computed
            first.remove(module)
            with replaced(F, "rms_norm", composite_rms_norm):
                return forward(*args)
        if key in known:
            return known[key](given)
        if options is not None:
            first.add(module)
        tape = Tape()
        slots = [tape.slot(value).number for value in given]
        with replaced(F, "rms_norm", composite_rms_norm), tape.running():
            out = forward(*args)
        known[key] = cut(tape, slots, out, compiled)
        tape.forget()
        return out

    return call


def _key(module: nn.Module, kind: str | None, given: Any) -> Any:
    tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
    traits = tuple((x.shape, x.stride(), x.dtype, x.requires_grad) for x in tensors)
    return type(module), kind, torch.is_grad_enabled(), traits


def _cut(module: nn.Module, forward: Callable[..., Any], names: tuple[str, ...], backend: str) -> Callable[..., Any]:
    """`forward` as a function of the module's parameters and its arguments, cut into a forward and a backward graph."""
    policy: list[Callable[[Any], CheckpointPolicy]] = []

    def checkpoint(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        policy.append(_wanted(options))
        return function(*args)

    def functional(parameters: list[Tensor], *args: Any) -> Any:
        with _reparametrize_module(module, dict(zip(names, parameters, strict=True))), replaced(remat, "checkpoint", checkpoint):
            return forward(*args)

    def partition(joint: Graph, inputs: Any, **options: Any) -> tuple[Graph, Graph]:
        if policy:
            _tag(joint, policy[0])
        return min_cut_rematerialization_partition(joint, inputs, **options)

    return _graphs(functional, partition, backend)


def _graphs(function: Callable[..., Any], partition: Callable[..., tuple[Graph, Graph]], backend: str) -> Callable[..., Any]:
    return aot_function(function, fw_compiler=_run, bw_compiler=_run, partition_fn=partition, decompositions=_decompositions(backend))


class _Runner(torch.fx.Interpreter):
    """Runs a graph. Attention that is recomputed comes wrapped, so that its random state is that of the first time; it draws nothing."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(target, "__name__", "")
        if name == "run_and_save_rng_state":
            return torch.empty(0, dtype=torch.uint8), args[0](*args[1:], **kwargs)
        if name == "run_with_rng_state":
            return args[1](*args[2:], **kwargs)
        return super().call_function(target, args, kwargs)


def _run(gm: Graph, example_inputs: Any) -> Callable[..., Any]:
    """Runs a graph node by node, and lets go of arguments and values after their last use, as generated code does."""

    def call(args: list[Any]) -> Any:
        return _Runner(gm).boxed_run(args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def _decompositions(backend: str) -> dict[Any, Any]:
    if backend != "inductor":
        return {}
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def _alike(x: Tensor) -> Tensor:
    if is_traceable_wrapper_subclass(x):
        names, context = x.__tensor_flatten__()
        inner = {name: getattr(x, name).detach().clone() for name in names}
        return type(x).__tensor_unflatten__(inner, context, x.shape, x.stride()).requires_grad_(x.requires_grad)
    return x.detach().clone().requires_grad_(x.requires_grad)


def _wanted(options: dict[str, Any]) -> Callable[[Any], CheckpointPolicy]:
    """What checkpointing with these options wants of each operator, asked in the order of the forward."""
    contexts = options.get("context_fn")
    if contexts is None:
        return lambda operator: CheckpointPolicy.PREFER_RECOMPUTE
    kept: Any = contexts.args[0]  # a policy, or the calls whose outputs are kept; see remat.checkpoint_blocks
    if callable(kept):
        policy: Any = kept
        return lambda operator: policy(None, operator)
    calls: Counter[str] = Counter()

    def wanted(operator: Any) -> CheckpointPolicy:
        family = call_name(operator)
        if family is None:
            return CheckpointPolicy.PREFER_RECOMPUTE
        calls[family] += 1
        return CheckpointPolicy.MUST_SAVE if (family, calls[family] - 1) in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return wanted


def _tag(joint: Graph, policy: Callable[[Any], CheckpointPolicy]) -> None:
    """Says of every forward operator what checkpointing wants of it; whatever needs a gradient of the output is backward's."""
    backward: set[torch.fx.Node] = set()
    for node in joint.graph.nodes:
        if (node.op == "placeholder" and "tangents" in str(node.target)) or any(one in backward for one in node.all_input_nodes):
            backward.add(node)
        elif isinstance(node.target, torch._ops.OpOverload):
            node.meta["recompute"] = policy(node.target)
            node.meta["ac_graph_id"] = 0
