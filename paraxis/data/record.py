"""What a checkpoint keeps of the data: enough to go on with the same rows, and to say by name what is no longer the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from paraxis.base.seams import Rows
from paraxis.data.live import LiveRows
from paraxis.data.mixture import MixtureRows
from paraxis.data.packing import PackedRows
from paraxis.data.rows import TrainingRows

FILES_NAMED = 2000  # a checkpoint of more files than this keeps their common fingerprint only


def data_record(rows: Rows, row: int) -> dict[str, Any]:
    """The identity of what the rows before `row` were read from, for JSON."""
    if isinstance(rows, MixtureRows):
        read = {name: count for name, count in rows.read(row).items() if count}
        sources = {name: _read_from(rows.sources[name], count) for name, count in read.items()}
        return {"mixture": rows.log(row), "mixture_of": rows.mixing.of, "sources": sources}
    return {"sources": {"": _read_from(rows, row)}}


def skipped_records(rows: Rows) -> int:
    """How many broken records have been left out of the rows so far."""
    if isinstance(rows, MixtureRows):
        return sum(map(skipped_records, rows.sources.values()))
    if isinstance(rows, (TrainingRows, PackedRows)):
        return rows.data.skipped
    return rows.skipped if isinstance(rows, LiveRows) else 0


def close_rows(rows: Rows) -> None:
    """Ends what works in the background for the rows."""
    for source in rows.sources.values() if isinstance(rows, MixtureRows) else [rows]:
        if isinstance(source, LiveRows):
            source.close()


def _read_from(rows: Rows, row: int) -> dict[str, Any]:
    """What a source is, and where its rows go on after `row` of them, where that is more than a number."""
    return _source(rows) | ({"position": rows.position(row)} if isinstance(rows, LiveRows) else {})


def _source(rows: Rows) -> dict[str, Any]:
    record: dict[str, Any] = {"fingerprint": rows.fingerprint}
    if isinstance(rows, (TrainingRows, PackedRows)):
        tokenizer, files = rows.data.tokenizer, rows.data.files
        record |= {"tokenizer": tokenizer.sha256, "files": files if len(files) <= FILES_NAMED else None, "tokenize": "ahead"}
    if isinstance(rows, LiveRows):
        files = rows.files
        named = files if files is not None and len(files) <= FILES_NAMED else None
        record |= {"tokenizer": rows.tokenizer.sha256, "files": named, "tokenize": "live"}
    return record


def problem_with_data(held: Mapping[str, Any], rows: Rows, step: int) -> str | None:
    """Why a run that has done `step` steps on the data that `held` records cannot go on with `rows`; None where it can."""
    if "sources" not in held:
        return "its data recorded as another version of paraxis does"
    mixed = isinstance(rows, MixtureRows)
    if mixed != ("mixture" in held):
        return "no data.mixture, but now there is one" if mixed else "a data.mixture, but now there is none"
    if mixed and (of := held.get("mixture_of", "rows")) != rows.mixing.of:
        return f"a mixture of {of}, but now it is one of {rows.mixing.of}: set data.mixture_of={of}"
    if mixed and (problem := rows.problem_with(held["mixture"], step)):
        return problem
    for name, was in held["sources"].items():
        source = rows.sources.get(name) if mixed else rows
        where = f"source {name}: " if name else ""
        if source is None:
            return f"a source {name}, of which data.paths now name nothing"
        now = _source(source)
        if was["fingerprint"] != now["fingerprint"]:
            return where + _difference(was, now)
    return None


def continue_data(held: Mapping[str, Any], rows: Rows, step: int, row: int) -> None:
    """Goes on at `row` after `step` steps, once `problem_with_data` has found nothing."""
    if isinstance(rows, MixtureRows):
        rows.continue_from(held["mixture"], step, row)
    for name, was in held["sources"].items():
        source = rows.sources[name] if isinstance(rows, MixtureRows) else rows
        if isinstance(source, LiveRows):
            source.continue_from(was["position"])


def _difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    prints = f"the data's fingerprint {was['fingerprint'][:12]}, but now it is {now['fingerprint'][:12]}"
    if was.get("tokenizer") != now.get("tokenizer"):
        return f"{prints}: the tokenizer is another"
    if was.get("tokenize", "ahead") != now.get("tokenize", "ahead"):
        return f"{prints}: data.tokenize was {was.get('tokenize', 'ahead')}"
    if was.get("files") is None or now.get("files") is None:
        return prints
    return f"{prints}: {_difference_of_files(was['files'], now['files'])}"


def _difference_of_files(was: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> str:
    """What has become of files, each given by name and hash of its content."""
    hashes = {digest for _, digest in now}
    names = {name for name, _ in now}
    for name, digest in was:
        if digest not in hashes:
            return f"{name} {'has changed' if name in names else 'is missing'}"
    before = {digest for _, digest in was}
    for name, digest in now:
        if digest not in before:
            return f"{name} was not there"
    moved = next((name for (name, digest), (_, other) in zip(now, was, strict=False) if digest != other), None)
    if moved:
        return f"the files are in another order, from {moved} on"
    if len(was) != len(now):
        return f"{len(was)} files have become {len(now)}"
    return "the files are the same, so it is data.packing, data.shuffle, data.long_documents, data.append_eos or how records are read"
