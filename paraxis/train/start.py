"""How a run begins: from its newest checkpoint, else from the weights that train.init_from names, else from its first values."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from paraxis.base.errors import CheckpointError, ConfigError, ParaxisError
from paraxis.base.keys import to_theirs
from paraxis.base.layout import Box, whole_box
from paraxis.checkpoint.hf import MODEL, some
from paraxis.checkpoint.hf_source import HuggingFaceWeights
from paraxis.checkpoint.inspect import checkpoint_in
from paraxis.checkpoint.place import Location, location
from paraxis.checkpoint.weights_source import BUFFER, OurWeights, TheirWeights, WeightsSource
from paraxis.models.buffers import persistent_buffers
from paraxis.models.registry import FROM_HF, from_hf, to_record
from paraxis.observe.folder import RunFolder
from paraxis.train.config import TrainConfig
from paraxis.train.resume import resume_run
from paraxis.train.run import Run, on_meta
from paraxis.train.state import buffers, follow, optimizer_tensors, warn_of_another_model, weights
from paraxis.train.unregistered import refuse_unsaved

log = logging.getLogger("paraxis")

OPTIMIZER = "optim/"


@dataclass(frozen=True)
class Taken:
    """What a run takes: by tensor of ours the box of it that the source has, all of it or the rows of ids that both have.

    `kept` keep their first values. `resized` has the rows there and here of tensors of which only some rows are taken.
    """

    boxes: Mapping[str, Box]
    kept: Sequence[str]
    resized: Mapping[str, tuple[int, int]]


def begin(run: Run, folder: RunFolder, resume: str) -> Location | None:
    """Continues from the run folder's newest checkpoint and returns its path, as `resume` allows; else starts as train.init_from says.

    Raises ConfigError for a run with a state that no checkpoint would hold, and what `resume_run` and `start_from` raise.
    """
    refuse_unsaved(run)
    resumed = resume_run(run, folder, resume)
    if resumed is None and run.config.train.init_from:
        start_from(run)
    return resumed


def start_from(run: Run) -> None:
    """Gives a fresh `run` the weights that train.init_from names; with train.init_parts=weights+optimizer the optimizer's state too.

    Layouts do not matter: every rank reads its own parts. Raises CheckpointError on every rank alike where a tensor is missing, left
    over or of another shape and no setting allows it, and where what is there cannot be read; ConfigError for settings that do not fit.
    """
    asked = run.config.train
    found = run.world.broadcast_json(_attempt(lambda: _resolved(asked.init_from)) if run.world.first else None)
    outcomes = run.world.gather_json({} if "problem" in found else _attempt(lambda: _load(run, found["done"], asked)))
    failed = found if "problem" in found else next((one for one in outcomes or [] if "problem" in one), {})
    failed = run.world.broadcast_json(failed)
    if "problem" in failed:
        raise (ConfigError if failed["mend"] else CheckpointError)(failed["problem"])


def _attempt(action: Callable[[], Any]) -> dict[str, Any]:
    """What `action` returned, or why it failed, for the other ranks to learn."""
    try:
        return {"done": action()}
    except ParaxisError as error:
        return {"problem": str(error), "mend": isinstance(error, ConfigError)}


def _resolved(place: str) -> str:
    """What `place` stands for now: the newest checkpoint of a run's folder, or the place itself."""
    found = checkpoint_in(location(place))
    return place if found is None else str(found.path)


def _load(run: Run, place: str, asked: TrainConfig) -> None:
    whole = on_meta(run.config)
    shapes = {MODEL + name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
    shapes |= {BUFFER + name: tuple(buffer.shape) for name, buffer in persistent_buffers(whole).items()}
    source = _open(place, whole, run, {_plain(name) for name in shapes if _skipped(name, asked.init_skip)})
    taken = choose(source, place, shapes, asked, run.config.model.vocab_size)
    pieces = [*weights(run), *buffers(run)]
    if asked.init_parts == "weights+optimizer":
        _refuse_without_optimizer(run, source, place, taken)
        pieces += list(optimizer_tensors(run))
    for name, piece in ((_weight_of(piece.name), piece) for piece in pieces):
        if name in taken.boxes and (part := piece.box.overlap(taken.boxes[name])):
            source.read(piece.name, part, piece.tensor[part.slices_within(piece.box)])
    if isinstance(source, OurWeights) and asked.init_parts == "weights+optimizer":
        run.optimizer.load_counters(source.checkpoint.meta["optimizer"]["counters"])
    follow(run)
    log.info("weights are those of %s%s", place, "".join(_told(taken)))


def choose(source: WeightsSource, place: str, shapes: Mapping[str, tuple[int, ...]], asked: TrainConfig, vocab_size: int) -> Taken:
    """What is taken of `source`, for a model whose weights have these `shapes` (model/NAME, buffer/NAME).

    Raises CheckpointError, naming the tensors and the setting that would allow it, for what does not fit.
    """
    others = source.others(shapes.keys(), asked.init_skip)
    for pattern in asked.init_skip:
        if not any(_skipped(name, (pattern,)) for name in [*shapes, *others]):
            raise ConfigError(f"train.init_skip: {pattern!r} is the name of no tensor here or in {place}; take it out, or correct it")
    kept = [name for name in shapes if _skipped(name, asked.init_skip)]
    wanted = {name: source.shape(name) for name in shapes if name not in kept}
    if missing := [_plain(name) for name, there in wanted.items() if there is None]:
        raise CheckpointError(
            f"{place} lacks {some(missing)}, which the model has; "
            f"train.init_skip={missing[0]} would leave that at its first values. Is it the model that the recipe names?"
        )
    if spare := [_plain(name) for name in others if not _skipped(name, asked.init_skip)]:
        raise CheckpointError(
            f"{place} has {some(spare)}, which the model has not; train.init_skip={spare[0]} would do without. "
            "Is it the model that the recipe names?"
        )
    boxes: dict[str, Box] = {}
    resized: dict[str, tuple[int, int]] = {}
    for name, there in wanted.items():
        assert there is not None
        here = shapes[name]
        boxes[name] = whole_box(here)
        if here == there:
            continue
        of_vocabulary = len(here) == len(there) > 0 and here[0] == vocab_size and here[1:] == there[1:]
        if not (of_vocabulary and asked.init_resize):
            hint = "train.init_resize=true copies the rows of ids that both have" if of_vocabulary else "is it of the same size?"
            raise CheckpointError(
                f"{place} has {_plain(name)} in shape {there}, the model in {here}; {hint}, "
                f"and train.init_skip={_plain(name)} would leave it at its first values"
            )
        resized[name] = there[0], here[0]
        boxes[name] = whole_box((min(there[0], here[0]), *here[1:]))
    return Taken(boxes, kept, resized)


def _open(place: str, whole: nn.Module, run: Run, skipped: Collection[str]) -> WeightsSource:
    where = location(place)
    if (found := checkpoint_in(where)) is not None:
        warn_of_another_model(place, found.meta.get("model"), run)
        return OurWeights(found)
    assert isinstance(where, Path)  # what is at a URL is ours, or nothing
    theirs = HuggingFaceWeights(where)
    keys = getattr(whole, "keys", None)
    if not isinstance(keys, Mapping):
        raise ConfigError(
            f"train.init_from={place} has Hugging Face's names, but {type(whole).__name__} has no key table; "
            "give the model an attribute keys, a dict from its parameters' names to theirs"
        )
    if theirs.config.get("model_type") in FROM_HF:
        warn_of_another_model(place, to_record(from_hf(theirs.config)), run)
    for layer, count in theirs.left_out.items():
        log.info("%s: %s is left out (multi-token prediction, %d tensors)", place, layer, count)
    return TheirWeights(theirs, keys, [name for name, _ in whole.named_parameters() if name not in skipped or to_theirs(keys, name)])


def _refuse_without_optimizer(run: Run, source: WeightsSource, place: str, taken: Taken) -> None:
    """Raises CheckpointError where `source` has not the whole state of this optimizer for what is `taken`."""
    name = run.config.optim.name
    held = source.checkpoint.meta.get("optimizer") if isinstance(source, OurWeights) else None
    if held is None or held["name"] != name:
        found = "no optimizer state" if held is None else f"the state of {held['name']}"
        raise CheckpointError(
            f"{place} holds {found}, but train.init_parts=weights+optimizer asks for that of {name}; use train.init_parts=weights"
        )
    trained = [name for name, parameter in on_meta(run.config).named_parameters() if parameter.requires_grad]
    for state in run.optimizer.state():
        lacking = [name for name in trained if MODEL + name in taken.boxes and source.shape(f"{OPTIMIZER}{state}/{name}") is None]
        if lacking:
            raise CheckpointError(f"{place} lacks the optimizer's {state} of {some(lacking)}; use train.init_parts=weights")


def _skipped(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(_plain(name), pattern) for pattern in patterns)


def _plain(name: str) -> str:
    """A tensor's name as a person knows it: of ours without what says that it is a weight or a buffer."""
    return name.removeprefix(MODEL).removeprefix(BUFFER)


def _weight_of(name: str) -> str:
    """The weight whose optimizer state `name` is, or `name` itself."""
    return MODEL + name.split("/", 2)[2] if name.startswith(OPTIMIZER) else name


def _told(taken: Taken) -> Iterator[str]:
    for name, (there, here) in taken.resized.items():
        fate = f"{here - there} new ones keep their first values" if here > there else f"{there - here} are dropped"
        yield f"; {_plain(name)}: {min(there, here)} rows are taken, {fate}"
    if taken.kept:
        yield f"; first values stay in {some([_plain(name) for name in taken.kept])}"
