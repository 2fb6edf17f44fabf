"""The harness that distributed tests stand on: results come back, failures are named, nothing hangs or is left behind."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from tests.worlds import WorldError, run_world


def rank_sum() -> float:
    x = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(x)
    return x.item()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_four_ranks_sum_their_numbers(world):
    assert world(4, rank_sum) == [6.0] * 4


def test_results_come_back_in_rank_order_from_a_closure(world):
    offset = 10
    results = world(3, lambda scale: torch.full((2,), offset + scale * dist.get_rank()), 100)
    assert [r.tolist() for r in results] == [[10, 10], [110, 110], [210, 210]]


def test_a_rank_knows_its_place_and_sees_one_thread_and_no_gpu(world):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    places = world(2, lambda: ([os.environ[name] for name in names], torch.get_num_threads(), torch.cuda.is_available()))
    assert places == [(["0", "0", "2", "2"], 1, False), (["1", "1", "2", "2"], 1, False)]
    assert "RANK" not in os.environ


def test_large_results_come_back_whole(world):
    sizes = [len(r) for r in world(2, lambda: torch.zeros(2_000_000))]
    assert sizes == [2_000_000] * 2


def test_forking_after_a_backward_pass_works(world):
    def gradient() -> float:
        x = torch.ones(64, 64, requires_grad=True)
        (x @ x).sum().backward()
        assert x.grad is not None
        dist.all_reduce(x.grad)
        return x.grad[0, 0].item()

    x = torch.ones(64, 64, requires_grad=True)
    (x @ x).sum().backward()
    assert world(2, gradient) == [256.0, 256.0]


def test_the_parent_stays_free_of_threads(world):
    world(2, rank_sum)
    assert threading.active_count() == 1
    assert not dist.is_initialized()


def test_a_raising_rank_is_named_with_its_traceback_while_others_wait(world):
    def fail_on_two() -> None:
        if dist.get_rank() == 2:
            raise ValueError("the cat ate it")
        dist.barrier()

    with pytest.raises(WorldError, match=r"rank 2 of 4 raised\n(?s:.)*fail_on_two\n(?s:.)*ValueError: the cat ate it"):
        world(4, fail_on_two)


@pytest.mark.parametrize(
    ("end", "words"),
    [(lambda: os._exit(3), "exit code 3"), (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL")],
    ids=["exit", "signal"],
)
def test_a_dying_rank_is_named(world, end, words):
    def die_on_one() -> None:
        if dist.get_rank() == 1:
            end()
        rank_sum()

    with pytest.raises(WorldError, match=f"rank 1 of 2 died: {words}") as error:
        world(2, die_on_one)
    assert error.value.rank == 1


def test_a_hang_is_ended_and_shows_where_each_rank_stood(world, tmp_path):
    def never_comes_back() -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(1000)

    with pytest.raises(WorldError, match=r"(?s)rank 0 of 2 had not ended after 1 s.*never_comes_back.*rank 1 had not.*never_comes_back"):
        world(2, never_comes_back, timeout=1)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)


def test_a_result_that_cannot_travel_is_that_ranks_failure(world):
    with pytest.raises(WorldError, match=r"rank \d of 2 raised"):
        world(2, lambda: threading.Lock())


def test_a_world_after_a_failed_one_is_fresh(world):
    with pytest.raises(WorldError):
        world(2, lambda: 1 / 0)
    assert run_world(rank_sum, 2) == [1.0, 1.0]
