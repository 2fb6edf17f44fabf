"""Everything a run must remember, as named pieces and a few numbers: saved by every rank, restored on every rank.

    model/NAME            the master weights
    optim/STATE/NAME      the optimizer's tensors (exp_avg, exp_avg_sq, momentum_buffer)
    meta                  step, tokens, data position, optimizer counters, fingerprints, the model's record, the held-out loss
    config.toml           the resolved configuration; tokenizer/... the tokenizer's files

Initial values, data order and learning rate are functions of seed and step, so no random state is needed; a model that
drops out at random trains on one rank only, and that rank's generator is saved too.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from paraxis.base.errors import CheckpointError
from paraxis.base.layout import whole_box
from paraxis.checkpoint.load import Checkpoint
from paraxis.checkpoint.retain import HELD_OUT, Keep, held_out
from paraxis.checkpoint.save import Piece, save
from paraxis.data.record import continue_data, data_record, problem_with_data
from paraxis.models.registry import to_record
from paraxis.train.check import dropout_of
from paraxis.train.run import Run


def pieces(run: Run) -> Iterator[Piece]:
    """This rank's tensors."""
    placed = {shard.placed.name: shard.placed for shard in run.shards}
    tensors = {f"model/{shard.placed.name}": (shard.placed.name, shard.local.detach()) for shard in run.shards}
    for state, by_name in run.optimizer.state().items():
        tensors |= {f"optim/{state}/{name}": (name, tensor) for name, tensor in by_name.items()}
    for key, (name, tensor) in tensors.items():
        where = placed[name]
        yield Piece(key, where.shape, where.stored, tensor, where.replica, where.replicas)
    for name, state in _random_states(run).items():
        yield Piece(name, tuple(state.shape), whole_box(tuple(state.shape)), state)


def _random_states(run: Run) -> dict[str, torch.Tensor]:
    if not any(dropout_of(module) for module in run.modules):
        return {}
    states = {"random/cpu": torch.get_rng_state()}
    return states | ({"random/cuda": torch.cuda.get_rng_state()} if run.world.device.is_cuda else {})


def meta(run: Run) -> dict[str, Any]:
    """What is saved beside the tensors; the same on every rank."""
    return {
        "step": run.step,
        "tokens": run.tokens,
        "row": run.row,
        "seed": run.config.train.seed,
        "optimizer": {"name": run.config.optim.name, "counters": run.optimizer.counters()},
        "data": {"seq_len": run.config.data.seq_len, **data_record(run.rows, run.row)},
        "model": to_record(run.config.model),
    }


def save_run(run: Run, folder: Path, files: Mapping[str, bytes], held_out_loss: float | None = None) -> Path:
    """Saves the run at its step, with its held-out loss where it was scored, under `folder`.

    Raises StorageError on every rank alike where any fails.
    """
    kept = run.config.checkpoint
    return save(
        folder,
        run.step,
        pieces(run),
        {**meta(run), HELD_OUT: held_out(held_out_loss, run.held_out.fingerprint if run.held_out is not None else "")},
        files,
        run.world,
        layout=run.mesh.degrees.layout,
        keep=Keep(last=kept.keep_last, every=kept.keep_every, best=kept.keep_best),
    )


def refuse_foreign(run: Run, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where `checkpoint` is of another model, optimizer, seed or data, or holds weights alone."""
    held = checkpoint.meta
    if "optimizer" not in held:
        raise CheckpointError(f"{checkpoint.path} holds weights but no state of a run, so it cannot be resumed; start in another --run-dir")
    for what, saved, now in (
        ("train.seed", held["seed"], run.config.train.seed),
        ("optim.name", held["optimizer"]["name"], run.config.optim.name),
        ("data.seq_len", held["data"]["seq_len"], run.config.data.seq_len),
    ):
        if saved != now:
            raise CheckpointError(
                f"{checkpoint.path} was saved with {what} = {saved}, but this run has {now}; use the same, or start in another --run-dir"
            )
    if problem := problem_with_data(held["data"], run.rows, held["step"]):
        raise CheckpointError(f"{checkpoint.path} was saved with {problem}; use the same, or start in another --run-dir")
    for piece in _restored(run):
        stored = checkpoint.tensors.get(piece.name)
        if stored is None or tuple(stored.shape) != piece.shape:
            found = "no such tensor" if stored is None else f"shape {tuple(stored.shape)}"
            raise CheckpointError(
                f"{checkpoint.path} has {found} for {piece.name}, which this model needs in shape {piece.shape}; "
                f"resume with the recipe it was saved from, or start in another --run-dir"
            )


def restore_run(run: Run, checkpoint: Checkpoint) -> None:
    """Continues `run` from what `checkpoint` holds, once `refuse_foreign` has passed it. Raises CheckpointError where it is damaged."""
    for piece in _restored(run):
        checkpoint.read(piece.name, piece.box, out=piece.tensor)
    if run.tied is not None:
        run.tied.follow()
    for name in _random_states(run).keys() & checkpoint.tensors.keys():
        (torch.set_rng_state if name == "random/cpu" else torch.cuda.set_rng_state)(checkpoint.read(name))
    held = checkpoint.meta
    run.optimizer.load_counters(held["optimizer"]["counters"])
    run.step, run.tokens, run.row = held["step"], held["tokens"], held["row"]
    continue_data(held["data"], run.rows, run.step, run.row)


def _restored(run: Run) -> Iterator[Piece]:
    """The pieces that every checkpoint of this run has, whatever its layout was."""
    return (piece for piece in pieces(run) if not piece.name.startswith("random/"))
