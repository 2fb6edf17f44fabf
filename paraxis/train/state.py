"""Everything a run must remember, as one table: saved by every rank, restored on every rank. What is not here follows from what is.

    model/NAME            the master weights, what is not trained among them (the bias by which a router chooses experts)
    buffer/NAME           persistent buffers
    optim/STATE/NAME      the optimizer's tensors (exp_avg, exp_avg_sq, momentum_buffer)
    random/DEVICE         torch's generators, of a run on one rank whose model draws from them
    meta                  step, tokens, data position, skipped steps in a row, optimizer counters, the data's record (fingerprints, mixture
                          log), the seed, the model's record, the held-out loss
    config.toml           the resolved configuration; tokenizer/... the tokenizer's files

Initial values, data order and learning rate are functions of seed and step, and metrics are of one step each, or counted here. Second
copies of tied weights follow the first. unsaved.py and unregistered.py refuse what has a state and no entry.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from paraxis.base.errors import CheckpointError
from paraxis.base.layout import whole_box
from paraxis.checkpoint.load import Checkpoint
from paraxis.checkpoint.manifest import files_beside
from paraxis.checkpoint.place import Location, step_in_name
from paraxis.checkpoint.retain import HELD_OUT, Keep, held_out
from paraxis.checkpoint.save import Piece, save
from paraxis.data.record import continue_data, data_record, problem_with_data
from paraxis.models.buffers import persistent_buffers
from paraxis.models.registry import to_record
from paraxis.train.run import Run, on_meta

log = logging.getLogger("paraxis")


@dataclass(frozen=True)
class Remembered:
    """One thing that a run remembers: this rank's tensors of it, its entries of the meta (the same on every rank), and what is to be done
    once its tensors have been read back into place. `always`: every checkpoint of the run has all of its tensors.
    """

    pieces: Callable[[Run], Iterator[Piece]] = lambda run: iter(())
    record: Callable[[Run], Mapping[str, Any]] = lambda run: {}
    restore: Callable[[Run, Checkpoint], None] = lambda run, checkpoint: None
    always: bool = True


def weights(run: Run) -> Iterator[Piece]:
    """This rank's parts of the parameters."""
    for shard in run.shards:
        where = shard.placed
        yield Piece(f"model/{where.name}", where.shape, where.stored, shard.local.detach(), where.replica, where.replicas)


def buffers(run: Run) -> Iterator[Piece]:
    """The persistent buffers of this rank's modules."""
    for buffer in run.buffers:
        shape = tuple(buffer.copies[0].shape)
        yield Piece(f"buffer/{buffer.name}", shape, whole_box(shape), buffer.copies[0], buffer.replica, buffer.replicas)


def follow(run: Run) -> None:
    """Has second copies on this rank, of weights and of buffers, follow the first."""
    if run.tied is not None:
        run.tied.follow()
    for buffer in run.buffers:
        for copy in buffer.copies[1:]:
            copy.copy_(buffer.copies[0])


def optimizer_tensors(run: Run) -> Iterator[Piece]:
    """This rank's parts of the optimizer's state."""
    placed = {shard.placed.name: shard.placed for shard in run.shards}
    for state, by_name in run.optimizer.state().items():
        for name, tensor in by_name.items():
            where = placed[name]
            yield Piece(f"optim/{state}/{name}", where.shape, where.stored, tensor, where.replica, where.replicas)


def _counters(run: Run) -> dict[str, Any]:
    return {"optimizer": {"name": run.config.optim.name, "counters": run.optimizer.counters()}}


def _set_counters(run: Run, checkpoint: Checkpoint) -> None:
    run.optimizer.load_counters(checkpoint.meta["optimizer"]["counters"])


def _random(run: Run) -> Iterator[Piece]:
    """The generators, where something was drawn since they were seeded. Ranks that draw are refused after the first step of several."""
    if run.world.size > 1:
        return
    states = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if run.world.device.is_cuda else {})
    for device, state in states.items():
        if not torch.equal(state, torch.Generator(device).manual_seed(run.config.train.seed).get_state()):
            yield Piece(f"random/{device}", tuple(state.shape), whole_box(tuple(state.shape)), state)


def _set_random(run: Run, checkpoint: Checkpoint) -> None:
    # Read where they are of no use too: nothing of a checkpoint that a run goes on from is left unverified.
    states = {device: checkpoint.read(f"random/{device}") for device in ("cpu", "cuda") if f"random/{device}" in checkpoint.tensors}
    if run.world.size > 1:
        return
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and run.world.device.is_cuda:
        torch.cuda.set_rng_state(states["cuda"])


def _position(run: Run) -> dict[str, Any]:
    return {"step": run.step, "tokens": run.tokens, "row": run.row, "skipped_steps": run.skipped_steps}


def _set_position(run: Run, checkpoint: Checkpoint) -> None:
    held = checkpoint.meta
    run.step, run.tokens, run.row, run.skipped_steps = held["step"], held["tokens"], held["row"], held.get("skipped_steps", 0)


def _data(run: Run) -> dict[str, Any]:
    return {"data": {"seq_len": run.config.data.seq_len, **data_record(run.rows, run.row)}}


def _set_data(run: Run, checkpoint: Checkpoint) -> None:
    held = checkpoint.meta
    continue_data(held["data"], run.rows, held["step"], held["row"])


def _identity(run: Run) -> dict[str, Any]:
    return {"seed": run.config.train.seed, "model": to_record(run.config.model)}


STATE: dict[str, Remembered] = {
    "position": Remembered(record=_position, restore=_set_position),
    "weights": Remembered(weights, restore=lambda run, checkpoint: follow(run)),
    "buffers": Remembered(buffers),
    "optimizer": Remembered(optimizer_tensors, _counters, _set_counters),
    "random": Remembered(_random, restore=_set_random, always=False),
    "data": Remembered(record=_data, restore=_set_data),
    "identity": Remembered(record=_identity),
}


def pieces(run: Run) -> Iterator[Piece]:
    """This rank's tensors."""
    for one in STATE.values():
        yield from one.pieces(run)


def meta(run: Run) -> dict[str, Any]:
    """What is saved beside the tensors; the same on every rank."""
    return {key: value for one in STATE.values() for key, value in one.record(run).items()}


def save_run(
    run: Run,
    folder: Location,
    files: Mapping[str, bytes],
    held_out_loss: float | None = None,
    *,
    save: Callable[..., Location | None] = save,
) -> Location | None:
    """Saves the run at its step, with its held-out loss where it was scored, under `folder`, and returns what `save` does: the place of
    the checkpoint, or None where it is that of a BackgroundSaver.

    Raises StorageError on every rank alike where any fails.
    """
    kept = run.config.checkpoint
    run.damaged = tuple(name for name in run.damaged if step_in_name(name) != run.step)  # this save replaces it
    return save(
        folder,
        run.step,
        pieces(run),
        {**meta(run), HELD_OUT: held_out(held_out_loss, run.held_out.fingerprint if run.held_out is not None else "")},
        files,
        run.world,
        layout=run.mesh.degrees.layout,
        keep=Keep(last=kept.keep_last, every=kept.keep_every, best=kept.keep_best, damaged=run.damaged),
    )


def refuse_foreign(run: Run, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where `checkpoint` is of another model, optimizer, seed or data, or holds weights alone.

    Settings of the model that neither names nor shapes show are a warning.
    """
    held = checkpoint.meta
    if "optimizer" not in held:
        raise CheckpointError(f"{checkpoint.path} holds weights but no state of a run, so it cannot be resumed; start in another --run-dir")
    match held:
        case {
            "step": int(),
            "tokens": int(),
            "row": int(),
            "seed": int(),
            "optimizer": {"name": str(), "counters": {}},
            "data": {"seq_len": int()},
        }:
            pass
        case _:
            raise CheckpointError(f"{checkpoint.path} does not record a run as this version of paraxis does; start in another --run-dir")
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
    whole = on_meta(run.config)
    known = {f"model/{name}" for name, _ in whole.named_parameters()} | {f"buffer/{name}" for name in persistent_buffers(whole)}
    if spare := [name for name in checkpoint.tensors if name.startswith(("model/", "buffer/")) and name not in known]:
        raise CheckpointError(
            f"{checkpoint.path} has {len(spare)} tensors that this model has not, {spare[0]} the first; "
            f"resume with the recipe it was saved from, or start in another --run-dir"
        )
    warn_of_another_model(str(checkpoint.path), held.get("model"), run)


def warn_of_another_model(place: str, record: Any, run: Run) -> None:
    """Shapes may agree where models do not: says which settings of the model are not those that its weights were trained with."""
    now = to_record(run.config.model)
    if not isinstance(record, Mapping) or now is None:
        return
    was, here = dict(_flat(record)), dict(_flat(now))
    apart = [key for key in here if key in was and was[key] != here[key] and not key.endswith("vocab_size")]
    if apart:
        told = ", ".join(f"{key.removeprefix('fields.')} {was[key]} (here {here[key]})" for key in apart)
        log.warning("the model in %s is not quite this one: %s", place, told)


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def restore_run(run: Run, checkpoint: Checkpoint) -> None:
    """Continues `run` from what `checkpoint` holds, once `refuse_foreign` has passed it. Raises CheckpointError where it is damaged.

    All ranks together read every byte of it, those of files that nothing is taken from too.
    """
    for piece in _restored(run):
        checkpoint.read(piece.name, piece.box, out=piece.tensor)
    if run.world.first:
        for name in files_beside(checkpoint.manifest):
            checkpoint.file(name)
    for one in STATE.values():
        one.restore(run, checkpoint)


def _restored(run: Run) -> Iterator[Piece]:
    """The pieces that every checkpoint of this run has, whatever its layout was."""
    return (piece for one in STATE.values() if one.always for piece in one.pieces(run))
