"""Processes that work in the background: what they return and raise comes back, and a lost one loses nothing."""

import multiprocessing
import os
import signal
import time
from contextlib import closing
from multiprocessing.connection import Connection
from typing import Any

import pytest

from paraxis.base.errors import DataError
from paraxis.data.crew import Crew


def work(job: tuple[str, int]) -> Any:
    """A job of the tests; the number is the process that gives it."""
    what, parent = job
    if what == "die" and os.getpid() != parent:
        os._exit(1)
    if what == "refuse":
        raise DataError("a.jsonl, line 3: broken")
    if what == "break":
        raise ValueError("no such thing")
    if what == "sleep":
        time.sleep(60)
    return os.getpid()


def job(what: str) -> tuple[str, int]:
    return what, os.getpid()


def test_jobs_are_done_in_other_processes_and_without_any_in_this_one():
    with closing(Crew(work, 2)) as crew:
        for name in ("a", "b", "c"):
            crew.ask(job(name))
        assert os.getpid() not in {crew.get(job(name)) for name in ("a", "b", "c", "not asked for")}
    assert Crew(work, 0).get(job("a")) == os.getpid()


def test_what_goes_wrong_there_is_raised_here_and_the_next_job_is_done():
    with closing(Crew(work, 1)) as crew:
        with pytest.raises(DataError, match=r"^a\.jsonl, line 3: broken$"):
            crew.get(job("refuse"))
        with pytest.raises(DataError, match="tokenising failed: ValueError: no such thing"):
            crew.get(job("break"))
        assert crew.get(job("a")) != os.getpid()


def test_the_work_of_a_process_that_has_ended_is_done_here(caplog):
    with closing(Crew(work, 1)) as crew:
        assert crew.get(job("die")) == os.getpid()
        assert crew.get(job("a")) == os.getpid()
    assert caplog.text.count("has ended, perhaps for want of memory") == 1


def test_closing_ends_processes_at_work_and_those_who_wait_for_them():
    crew = Crew(work, 1)
    crew.ask(job("sleep"))
    before_s = time.monotonic()
    while not crew._processes or crew._processes[0].pid is None:
        assert time.monotonic() < before_s + 60
        time.sleep(0.01)
    [process] = crew._processes
    crew.close()
    process.join(30)
    assert process.exitcode is not None
    with pytest.raises(DataError, match="closed while they were read"):
        crew.get(job("sleep"))


def _lead(pipe: Connection) -> None:
    crew = Crew(work, 1)
    pipe.send(crew.get(job("a")))
    time.sleep(60)


def test_no_process_outlives_the_one_that_started_it_even_where_that_is_killed():
    ours, theirs = multiprocessing.Pipe()
    leader = multiprocessing.get_context("fork").Process(target=_lead, args=(theirs,))
    leader.start()
    member: int = ours.recv()
    os.kill(leader.pid or 0, signal.SIGKILL)
    leader.join(30)
    before_s = time.monotonic()
    while _lives(member):
        assert time.monotonic() < before_s + 60
        time.sleep(0.01)


def _lives(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
