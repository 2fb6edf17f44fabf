"""From files to tokenised shards, once: later calls, other ranks and other runs on the same data only map them.

Large data are made in parts, each of some files and each kept when it is done: what is interrupted goes on with the next part.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from paraxis.base.errors import DataError
from paraxis.data.cache import made_once
from paraxis.data.config import DataConfig
from paraxis.data.documents import BadRecords
from paraxis.data.ids import holds_ids
from paraxis.data.part import Part, all_pieces, make_part
from paraxis.data.shards import FORMAT, META, Prepared, join_parts, read_meta
from paraxis.data.sources import Source, expand, without_secrets
from paraxis.data.tokens import Tokenizer, train_tokenizer

log = logging.getLogger(__name__)

# Of input. Files are not divided, so a part may be larger. Small data are cut finer, so that several processes share them.
LEAST_PART_BYTES = 8 << 20
MOST_PART_BYTES = 64 << 20
PARTS = 16
REPORT_BYTES = 1 << 20
# Merges hardly change with more text than this, and training keeps every distinct word in memory.
TOKENIZER_TRAINING_CHARACTERS = 1 << 30

Progress = Callable[[str, int, int], None]  # what is being done, bytes of input done, bytes of input in all


def prepare(
    config: DataConfig,
    cache: Path,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
    processes: int = 1,
    out: Path | None = None,
) -> Prepared:
    """The tokens of the paths, from `cache` or made into it; held-out data is given the training data's `tokenizer`.

    With `out` they are made into that folder, which must not be there yet and can be given as a path afterwards.

    Every rank may call this at once: one does the work, in as many processes as `processes` says. Raises DataError for missing,
    empty or broken data, and StorageError where the cache cannot be written.
    """
    if (folder := prepared_folder(config)) is not None:
        return _mapped(folder, config, tokenizer or load_tokenizer(config, cache))
    sources = expand(config.plain_paths)
    tokenizer = tokenizer or load_tokenizer(config, cache, progress=progress)
    check_tokenizer(config, tokenizer)
    eos_id = tokenizer.eos_id if config.append_eos else None
    settings = {"tokenizer": tokenizer.sha256, "eos_id": eos_id, "most_skipped": config.most_skipped}
    key = key_of(config, sources, **settings)
    parts = [Part(part, config, tokenizer) for part in parts_of(sources)]
    # Named for the paths, not for what they hold: once a broken file is mended, the parts before it are still good.
    unfinished = cache / f"parts-{key_of(config, [], paths=config.plain_paths, **settings)}"

    def make(partial: Path) -> None:
        if len(parts) == 1:
            make_part(parts[0], partial, _told(progress, sources))
        else:
            join_parts(_made(parts, unfinished, processes, progress), partial)
        _check(config, partial, len(sources))
        for name, data in tokenizer.files.items():
            (partial / name).write_bytes(data)

    folder = made_once(out.parent, out.name, make) if out else made_once(cache, f"tokens-{key}", make)
    shutil.rmtree(unfinished, ignore_errors=True)
    return Prepared(folder, tokenizer)


def load_tokenizer(config: DataConfig, cache: Path, *, progress: Progress | None = None) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names, trained on the data (the first GiB of it) if that is what it asks."""
    if config.entries_to_train is None:
        return Tokenizer.load(config.tokenizer)
    entries, sources = config.entries_to_train, expand(config.plain_paths)
    if named := next((source.name for source in sources if holds_ids(source)), None):
        raise DataError(f"{named} holds token ids, on which no tokenizer can be trained; set data.tokenizer to the one they are of")

    def make(partial: Path) -> None:
        bad, told = BadRecords(config.on_bad_record), _told(progress, sources, "training the tokenizer")
        texts = _limited(piece.text for _, piece in all_pieces(sources, config, bad, told))
        markers = config.template.markers if config.template else ()
        trained = train_tokenizer((text for text in texts if text), entries, markers)
        for name, data in trained.files.items():
            (partial / name).write_bytes(data)

    return Tokenizer.load(made_once(cache, f"tokenizer-{key_of(config, sources, entries=entries)}", make))


def prepared_folder(config: DataConfig) -> Path | None:
    """The folder that `paraxis data prepare` made, where the data is that and nothing else."""
    folder = next((Path(path) for path in config.plain_paths if (Path(path) / META).is_file()), None)
    if folder and len(config.plain_paths) > 1:
        raise DataError(f"data.paths: {folder} is a folder of shards, which is a source by itself; name it as one in data.mixture")
    return folder


def _mapped(folder: Path, config: DataConfig, tokenizer: Tokenizer) -> Prepared:
    """Raises DataError where the folder was made with another tokenizer, or other settings that say what a token is."""
    eos_id = tokenizer.eos_id if config.append_eos else None
    settings = read_meta(folder)["settings"]
    for name, has, needs in (
        ("a tokenizer", settings.get("tokenizer"), tokenizer.sha256),
        ("an end token", settings.get("eos_id"), eos_id),
        ("data.chat", settings.get("chat"), config.chat),
    ):
        if has != needs:
            raise DataError(f"{folder} was prepared with {name} = {has}, but this run has {needs}; use the same, or prepare the data again")
    return Prepared(folder, tokenizer)


def check_tokenizer(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Raises DataError where the tokenizer lacks what conversations need, and warns where it lacks an end token."""
    if config.append_eos and tokenizer.eos_id is None:
        log.warning("%s names no end token, so documents follow each other without one", tokenizer.name)
    if config.template and (missing := tokenizer.lacks(config.template.markers)):
        raise DataError(f"data.chat={config.chat} needs {missing} as one token, which {tokenizer.name} has not; choose another template")


def _check(config: DataConfig, folder: Path, files: int) -> None:
    """Raises DataError where there is no text, or too much has been left out of it."""
    meta = read_meta(folder)
    skipped, whole = meta["skipped"], meta["documents"] + sum(record["empty"] for record in meta["files"])
    if not meta["documents"]:
        left_out = f", and {skipped} broken records left out" if skipped else ""
        named = ", ".join(map(without_secrets, config.plain_paths))
        raise DataError(f"data.paths: no text in {named} ({files} files{left_out}); give files that hold text")
    if skipped > config.most_skipped * (skipped + whole):
        raise DataError(
            f"{skipped} of {skipped + whole} records were skipped, a larger share than data.most_skipped={config.most_skipped}; "
            f"the first: {meta['first_skipped']}; mend them, or raise data.most_skipped"
        )


def key_of(config: DataConfig, sources: Sequence[Source], **settings: Any) -> str:
    """A name for these files as they are now and what is done to them, without reading them."""
    made_from = {
        "format": FORMAT,
        "sources": [(source.name, source.path, source.size, source.version) for source in sources],
        "text_field": config.text_field,
        "chat": config.chat,
        "on_bad_record": config.on_bad_record,
        **settings,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:24]


def parts_of(sources: Sequence[Source]) -> list[list[Source]]:
    """The files, in order, in groups of some size: what is done at once, and what is kept of work that is interrupted."""
    least = sum(source.size for source in sources) // PARTS
    least = min(max(least, LEAST_PART_BYTES), MOST_PART_BYTES)
    parts: list[list[Source]] = [[]]
    size = 0
    for source in sources:
        if size >= least:
            parts.append([])
            size = 0
        parts[-1].append(source)
        size += source.size
    return parts


def _made(parts: Sequence[Part], folder: Path, processes: int, progress: Progress | None) -> list[Path]:
    """The folder of each part, made by one of `processes` if it is not there yet."""
    told = _told(progress, [source for part in parts for source in part.sources])
    done = 0
    if processes == 1:
        made = []
        for part in parts:
            made.append(_make_once(folder, part))
            done += part.size
            told(done)
        return made
    # Not forked: a process that has used threads, as the tokenizer does, cannot be copied safely.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_make_once, folder, part): part for part in parts}
        try:
            for future in as_completed(futures):
                future.result()
                done += futures[future].size
                told(done)
        except BrokenProcessPool as error:
            raise DataError(
                "a process that tokenises has ended, perhaps for want of memory; use fewer processes: what is done is kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [future.result() for future in futures]


def _make_once(folder: Path, part: Part) -> Path:
    return made_once(folder, f"part-{key_of(part.config, part.sources)}", lambda partial: make_part(part, partial, lambda done: None))


def _told(progress: Progress | None, sources: Sequence[Source], what: str = "tokenising") -> Callable[[int], None]:
    """Reports bytes done about once a MiB, and at the end."""
    total, reported = sum(source.size for source in sources), 0

    def told(done: int) -> None:
        nonlocal reported
        if progress and (done - reported >= REPORT_BYTES or (done >= total and reported < total)):
            progress(what, done, total)
            reported = done

    return told


def _limited(texts: Iterable[str]) -> Iterator[str]:
    """The texts, until there have been enough to train a tokenizer on."""
    characters = 0
    for text in texts:
        if characters >= TOKENIZER_TRAINING_CHARACTERS:
            return
        characters += len(text)
        yield text
