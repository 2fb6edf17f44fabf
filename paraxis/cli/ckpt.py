"""`paraxis ckpt`: what checkpoints there are, whether they are whole, how two differ, and removing or rewriting them."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paraxis.base.config import suggestion
from paraxis.base.errors import CheckpointError, ConfigError, StorageError
from paraxis.cli.arguments import Arguments, parse_strictly, whole_number
from paraxis.cli.output import show

if TYPE_CHECKING:
    from paraxis.checkpoint.compare import Differences, TensorDifference
    from paraxis.checkpoint.inspect import Listed
    from paraxis.checkpoint.place import Location
    from paraxis.checkpoint.verify import Verdict

DIFFERENT = 1  # as `diff` says it
SHOWN = 20  # lines of one kind, before people stop reading

HELP = f"""\
usage: paraxis ckpt ls DIR [--json]
       paraxis ckpt verify CKPT|DIR [--json]
       paraxis ckpt diff A B [--json]
       paraxis ckpt prune DIR --keep-last N [--keep-every K] [--keep-best N] [--dry-run] [--json]
       paraxis ckpt reshard SRC DST [--ranks N]

CKPT is a checkpoint, such as runs/demo/checkpoints/step-100; DIR is a run's folder or the folder with its checkpoints. For A, B
and SRC a folder stands for its newest checkpoint. All may be URLs of an object store, such as s3://bucket/runs/demo.

ls       what is in DIR: step, when, how many saves into this folder (generation), the layout that wrote it, tensors, size,
         whether it is complete as far as manifests and sizes tell, and which of them `latest` names
verify   reads every byte against its SHA-256 and names each damaged file and the tensors in it, and files that the manifest
         does not list. The exit code is {CheckpointError.exit_code} where there are any
diff     tensors that only one has, other shapes and dtypes, max|a - b| / max|b| of those that are not equal bit for bit, and
         other entries of the meta and other files. The exit code is {DIFFERENT} where there are any
prune    removes all but the newest N, those of the steps that are multiples of K, and the N of lowest held-out loss. Before
         that it reads the newest in full, as verify does, until two have passed; these stay in any case, and if there are not
         two, nothing is removed. Damaged ones stay, and so does what is being written. Refused while a run is using DIR, as
         far as its lock can be seen: beside a URL there is none, so see that no run saves there
reshard  rewrites SRC into the new folder DST so that N fully sharded ranks each find their part in files of their own; bit for
         bit the same. A checkpoint can be read on any layout without it

  --keep-last N      of prune: so many of the newest (2 or more)
  --keep-every K     of prune: those of every K-th step too
  --keep-best N      of prune: so many of the lowest held-out loss too
  --dry-run          of prune: say what would be removed, and remove nothing
  --ranks N          of reshard: for how many ranks (default: 1)
  --json             print JSON
  --debug            show tracebacks of errors

examples:
  paraxis ckpt ls runs/demo
  paraxis ckpt verify runs/demo/checkpoints/step-100
  paraxis ckpt diff runs/one runs/other --json
  paraxis ckpt prune runs/demo --keep-last 2 --keep-every 1000 --dry-run
  paraxis ckpt reshard runs/demo sharded --ranks 8
  paraxis ckpt verify s3://bucket/runs/demo
"""


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit code. Raises ParaxisError for what is refused or fails."""
    action = arguments[0] if arguments else ""
    if action in _ACTIONS:
        names, options, flags, act = _ACTIONS[action]
        parsed = parse_strictly(f"ckpt {action}", arguments[1:], names, options, (*flags, "debug", "help"))
        if "help" not in parsed.flags:
            return act(parsed)
    elif not {"-h", "--help"} & set(arguments):
        if not action:
            raise ConfigError(f"ckpt needs to be told what to do: {', '.join(_ACTIONS)}. See paraxis ckpt --help")
        raise ConfigError(f"there is no command ckpt {action!r}{suggestion(action, _ACTIONS)} See paraxis ckpt --help")
    print(HELP, end="")
    return 0


def _ls(parsed: Arguments) -> int:
    # Here and below, so that help does not wait for torch.
    from paraxis.checkpoint.inspect import checkpoints_folder, listed

    entries = listed(checkpoints_folder(parsed.names[0]))
    if "json" in parsed.flags:
        show(json.dumps([_entry_json(entry) for entry in entries], indent=1))
        return 0
    head = ("name", "saved", "generation", "layout", "tensors", "size", "")
    rows = [head, *(_entry_row(entry) for entry in entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        if not show(f"{line}  {row[-1]}".rstrip()):
            break
    return 0


def _entry_json(entry: "Listed") -> dict[str, Any]:
    return {
        "path": str(entry.path),
        "step": entry.step,
        "generation": entry.generation,
        "layout": entry.layout,
        "tensors": entry.tensors,
        "bytes": entry.size_bytes,
        "saved": None if entry.saved_s is None else datetime.fromtimestamp(entry.saved_s, UTC).isoformat(timespec="seconds"),
        "latest": entry.latest,
        "problem": entry.problem or None,
    }


def _entry_row(entry: "Listed") -> tuple[str, ...]:
    saved = "-" if entry.saved_s is None else f"{datetime.fromtimestamp(entry.saved_s):%Y-%m-%d %H:%M}"
    known = ["-" if value in (None, "") else str(value) for value in (entry.generation, entry.layout, entry.tensors)]
    state = entry.problem or ("complete, latest" if entry.latest else "complete")
    return (entry.path.name, saved, *known, _size(entry.size_bytes), state)


def _verify(parsed: Arguments) -> int:
    from paraxis.checkpoint.inspect import checkpoints_at
    from paraxis.checkpoint.store import open_files
    from paraxis.checkpoint.verify import verify

    verdicts = []
    with _progress() as progress:
        for path in checkpoints_at(parsed.names[0]):
            verdict = verify(path, lambda done, total, path=path: progress(path.name, done, total))
            if verdict.whole or open_files(path).listing():  # else its run has removed it meanwhile
                verdicts.append(verdict)
    if "json" in parsed.flags:
        show(json.dumps([_verdict_json(verdict) for verdict in verdicts], indent=1))
    else:
        show("\n".join(line for verdict in verdicts for line in _verdict_lines(verdict)))
    return 0 if all(verdict.whole for verdict in verdicts) else CheckpointError.exit_code


def _verdict_json(verdict: "Verdict") -> dict[str, Any]:
    damage = [{"file": one.file, "why": one.why, "tensors": one.tensors} for one in verdict.damage]
    return {"path": str(verdict.path), "ok": verdict.whole, "bytes": verdict.size_bytes, "damage": damage, "unlisted": verdict.unlisted}


def _verdict_lines(verdict: "Verdict") -> Iterator[str]:
    if verdict.whole:
        yield f"{verdict.path}: {_size(verdict.size_bytes)}, every byte as it was written"
    for one in verdict.damage:
        yield f"{verdict.path}: {one.file} is damaged: {one.why}{_concerned(one.tensors)}"
    for name in verdict.unlisted:
        yield f"{verdict.path}: {name} is not in the manifest; nothing reads it, so it can go"


def _concerned(tensors: tuple[str, ...], most: int = 5) -> str:
    more = f" and {len(tensors) - most} more" if len(tensors) > most else ""
    return f"; tensors there: {', '.join(tensors[:most])}{more}" if tensors else ""


def _diff(parsed: Arguments) -> int:
    from paraxis.checkpoint.compare import compare
    from paraxis.checkpoint.inspect import newest_at
    from paraxis.checkpoint.load import open_checkpoint

    a, b = (open_checkpoint(newest_at(name)) for name in parsed.names)
    with _progress() as progress:
        found = compare(a, b, lambda done, total: progress("comparing", done, total))
    if "json" in parsed.flags:
        show(json.dumps(_diff_json(found), indent=1))
    else:
        show(f"a: {a.path}\nb: {b.path}\n" + "\n".join(_diff_lines(found)))
    return 0 if found.same else DIFFERENT


def _diff_json(found: "Differences") -> dict[str, Any]:
    def side(kind: "tuple[tuple[int, ...], str] | None") -> dict[str, Any] | None:
        return None if kind is None else {"shape": kind[0], "dtype": kind[1]}

    def number(relative: float | None) -> float | str | None:
        return relative if relative is None or math.isfinite(relative) else "inf"

    tensors = [{"name": one.name, "a": side(one.a), "b": side(one.b), "relative": number(one.relative)} for one in found.tensors]
    meta = [{"name": one.name, "a": one.a, "b": one.b} for one in found.meta]
    return {"same": found.same, "compared": found.compared, "tensors": tensors, "meta": meta, "files": found.files}


def _diff_lines(found: "Differences") -> Iterator[str]:
    tensors = [_tensor_line(one) for one in found.tensors]
    meta = [f"meta {one.name}: {_short(one.a)} in a, {_short(one.b)} in b" for one in found.meta]
    files = [f"file {name}: other contents, or on one side only" for name in found.files]
    for kind, lines in (("tensors", tensors), ("entries of the meta", meta), ("files", files)):
        yield from lines[:SHOWN]
        if len(lines) > SHOWN:
            yield f"and {len(lines) - SHOWN} more {kind}; --json has all"
    differ = sum(one.a is not None and one.b is not None for one in found.tensors)
    yield f"{found.compared - differ} of the {found.compared} tensors that both have are equal bit for bit"


def _tensor_line(one: "TensorDifference") -> str:
    if one.a is None or one.b is None:
        return f"{one.name}: only in {'b' if one.a is None else 'a'}"
    (shape_a, dtype_a), (shape_b, dtype_b) = one.a, one.b
    if shape_a != shape_b:
        return f"{one.name}: shape {shape_a} in a, {shape_b} in b"
    kinds = f"{dtype_a} in a, {dtype_b} in b, " if dtype_a != dtype_b else ""
    return f"{one.name}: {kinds}max|a - b| / max|b| = {one.relative:.2g}"


def _short(value: Any, most: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def _prune(parsed: Arguments) -> int:
    from paraxis.checkpoint.config import KEEP_LEAST
    from paraxis.checkpoint.inspect import checkpoints_folder
    from paraxis.checkpoint.retain import Keep, prune

    if "keep-last" not in parsed.options:
        raise ConfigError(f"prune needs to be told how many of the newest to keep, as in --keep-last={KEEP_LEAST}")
    least = {"keep-last": KEEP_LEAST, "keep-every": 0, "keep-best": 0}
    last, every, best = (whole_number(name, parsed.options.get(name, "0"), most) for name, most in least.items())
    folder = checkpoints_folder(parsed.names[0])
    dry_run = "dry-run" in parsed.flags
    with nullcontext() if dry_run else _held(parsed.names[0], folder), _progress() as progress:
        done = prune(folder, Keep(last=last, every=every, best=best), dry_run=dry_run, progress=progress)
    if "json" in parsed.flags:
        names = {"removed": done.removed, "kept": done.kept, "verified": done.verified, "damaged": done.damaged}
        show(json.dumps({**names, "dry_run": dry_run}, indent=1))
        return 0
    would = "would be " if dry_run else ""
    for name in done.removed:
        show(f"{name}: {would}removed")
    for name in done.damaged:
        show(f"{name}: damaged, and left where it is; `paraxis ckpt verify {folder / name}` says more")
    checked = f", of which {' and '.join(done.verified)} were read in full" if done.verified else ""
    show(f"{folder}: {len(done.removed)} {would}removed, {len(done.kept)} kept{checked}")
    return 0


def _reshard(parsed: Arguments) -> int:
    from paraxis.checkpoint.inspect import newest_at
    from paraxis.checkpoint.load import open_checkpoint
    from paraxis.checkpoint.reshard import reshard

    ranks = whole_number("ranks", parsed.options.get("ranks", "1"), 1)
    source = open_checkpoint(newest_at(parsed.names[0]))
    with _progress() as progress:
        written = reshard(source, parsed.names[1], ranks, lambda done, total: progress("rewriting", done, total))
    show(f"{written}: {source.path}, rewritten for {ranks} rank{'' if ranks == 1 else 's'}")
    return 0


@contextmanager
def _held(given: str, folder: "Location") -> Iterator[None]:
    """Keeps a run from starting in the run folder that was given, or that `folder` is of. Raises StorageError where one is at work."""
    from paraxis.observe.folder import RunFolder

    paths = [Path(given).absolute()]
    if isinstance(folder, Path) and folder.absolute().name == "checkpoints":
        paths.append(folder.absolute().parent)
    run_dir = next((path for path in paths if (path / "lock").exists()), None)
    if run_dir is None:
        yield  # no run ever wrote here, or nobody can know
        return
    run_folder = RunFolder(run_dir)
    try:
        lock = run_folder.hold()
    except StorageError as error:
        if isinstance(error.__cause__, BlockingIOError):
            raise StorageError(
                f"a run is using {run_folder.path}, and removes checkpoints itself as its checkpoint.keep_last says; "
                "wait for it or stop it first, or see with --dry-run what would go"
            ) from error
        raise
    with lock:
        yield


@contextmanager
def _progress() -> "Iterator[Callable[[str, int, int], None]]":
    """A line of the terminal that counts bytes; nothing where standard error is none."""
    last_s = time.monotonic()

    def line(what: str, done: int, total: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s > 0.1:
            last_s = time.monotonic()
            print(f"\r\033[K{what}: {_size(done)} of {_size(total)}", end="", file=sys.stderr, flush=True)

    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    try:
        yield line
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _size(size_bytes: int) -> str:
    size, unit = float(size_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.1f} {unit}" if unit != "B" else f"{size_bytes} B"


_ACTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], Callable[[Arguments], int]]] = {
    "ls": (("a run's folder or its checkpoints",), (), ("json",), _ls),
    "verify": (("a checkpoint or a folder of them",), (), ("json",), _verify),
    "diff": (("one checkpoint", "another"), (), ("json",), _diff),
    "prune": (("a run's folder or its checkpoints",), ("keep-last", "keep-every", "keep-best"), ("json", "dry-run"), _prune),
    "reshard": (("a checkpoint", "a new folder"), ("ranks",), (), _reshard),
}
