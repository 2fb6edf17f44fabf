"""The launcher with real, tiny workers: exit codes, one message, nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from paraxis.resilience.launch import launch, leave_words

ROOT = Path(__file__).parents[2]
HEAD = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
rank, folder = int(os.environ["RANK"]), Path.cwd()

def meet():
    (folder / f"met{{rank}}").touch()
    while len(list(folder.glob("met*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)

"""
UNTIL_SIGTERM = """
from paraxis.resilience.launch import leave_words
def save(number, _):
    (folder / f"saved{rank}").write_text(str(number))
    leave_words(Path(os.environ["PARAXIS_STORE"]), rank, "saved")
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, save)
(folder / f"ready{rank}").touch()
"""
SLEEP = "time.sleep(60)\n"


def worker(body: str) -> list[str]:
    return [sys.executable, "-S", "-c", HEAD + body]


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def eventually(true: Callable[[], bool], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return true()


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start_launcher(body: str, ranks: int) -> subprocess.Popen[str]:
    code = f"import sys\nfrom paraxis.resilience.launch import launch\nsys.exit(launch({worker(body)!r}, {ranks}))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(Path.cwd())}  # a killed launcher leaves its folder
    return subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)


def test_every_rank_gets_its_place_and_a_private_store(tmp_path: Path):
    body = """
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PARAXIS_STORE")
mode = Path(os.environ["PARAXIS_STORE"]).parent.stat().st_mode & 0o777
(folder / f"rank{rank}").write_text(" ".join(os.environ[name] for name in names) + f" {mode:o}")
"""
    assert launch(worker(body), 2) == 0
    first, second = ((tmp_path / f"rank{rank}").read_text().split() for rank in range(2))
    assert first[:4] == ["0", "0", "2", "2"]
    assert second[:4] == ["1", "1", "2", "2"]
    assert first[4:] == second[4:]
    assert first[5] == "700"
    assert not Path(first[4]).parent.exists()


def test_only_rank_0_writes_to_stdout(capfd: pytest.CaptureFixture[str]):
    assert launch(worker("print('out', rank); print('err', rank, file=sys.stderr)"), 2) == 0
    out, err = capfd.readouterr()
    assert out == "out 0\n"
    assert sorted(err.splitlines()) == ["err 0", "err 1"]


def test_a_failing_rank_ends_the_others_and_gives_the_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    body = "(folder / f'pid{rank}').write_text(str(os.getpid()))\nmeet()\nif rank == 1: sys.exit(3)\n" + SLEEP
    assert launch(worker(body), 2) == 3
    assert not alive(int((tmp_path / "pid0").read_text()))
    assert capfd.readouterr().err == "paraxis: error: rank 1 ended with exit code 3\n"


def test_a_killed_rank_is_named_with_its_signal_though_a_peer_failed_first(capfd: pytest.CaptureFixture[str]):
    # Rank 0 stands for a peer whose connection broke before the kernel had finished with rank 1.
    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
meet()
if rank == 0: sys.exit(1)
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert launch(worker(body), 2) == 128 + signal.SIGKILL
    assert capfd.readouterr().err == "paraxis: error: rank 1 was killed by SIGKILL, as the system does when memory runs out\n"


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path):
    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / f"ready{rank}").write_text(str(os.getpid()))
meet()
if rank == 1: sys.exit(70)
"""
    assert launch(worker(body + SLEEP), 2, grace_s=0.2) == 70
    assert not alive(int((tmp_path / "ready0").read_text()))


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ((78, 1, 70), 0),
        ((1, 65, 1), 1),  # bad data on one rank, broken connections on its peers
        ((70, 70, 1), 2),
        ((3, -6, 70), 0),
    ],
)
def test_of_failing_ranks_only_the_cause_is_heard(codes: tuple[int, ...], cause: int, capfd: pytest.CaptureFixture[str]):
    body = f"""
from paraxis.resilience.launch import leave_words
signal.signal(signal.SIGTERM, signal.SIG_IGN)
leave_words(Path(os.environ["PARAXIS_STORE"]), rank, f"words of {{rank}}")
meet()
code = {codes}[rank]
os._exit(code) if code >= 0 else os.kill(os.getpid(), -code)
"""
    assert launch(worker(body), 3) == codes[cause]
    assert capfd.readouterr().err == f"words of {cause}\n"


def test_words_are_said_aloud_when_nobody_collects_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    leave_words(tmp_path / "gone" / "store", 0, "why")
    assert capfd.readouterr().err == "why\n"


def test_a_preempted_rank_lets_the_others_finish(tmp_path: Path):
    body = "if rank == 0: sys.exit(75)\ntime.sleep(0.5)\n(folder / 'finished').touch()\nsys.exit(75)"
    assert launch(worker(body), 2) == 75
    assert (tmp_path / "finished").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_passed_on_once_so_that_workers_save(tmp_path: Path, number: int):
    launcher = start_launcher(UNTIL_SIGTERM + SLEEP, 2)
    assert eventually(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    launcher.send_signal(number)
    _, err = launcher.communicate(timeout=15)
    assert (launcher.returncode, err) == (75, "saved\n")
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2


def test_the_sigterm_that_follows_a_scheduler_s_notice_does_not_kill(tmp_path: Path):
    body = """
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: (folder / f"got{rank}-{number}").touch())
(folder / f"ready{rank}").touch()
while not (folder / f"got{rank}-{int(signal.SIGTERM)}").exists(): time.sleep(0.01)
time.sleep(0.3)
sys.exit(75)
"""
    launcher = start_launcher(body, 2)
    assert eventually(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    launcher.send_signal(signal.SIGUSR1)
    assert eventually(lambda: all((tmp_path / f"got{rank}-{int(signal.SIGUSR1)}").exists() for rank in range(2)))
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=15)
    assert (launcher.returncode, err) == (75, "paraxis: error: rank 0 ended with exit code 75\n")


def test_a_second_ctrl_c_kills(tmp_path: Path):
    body = """
signal.signal(signal.SIGINT, lambda *_: (folder / f"asked{rank}").touch())
(folder / f"ready{rank}").write_text(str(os.getpid()))
"""
    launcher = start_launcher(body + "while True: time.sleep(0.1)", 2)
    assert eventually(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    launcher.send_signal(signal.SIGINT)
    assert eventually(lambda: all((tmp_path / f"asked{rank}").exists() for rank in range(2)))
    launcher.send_signal(signal.SIGINT)
    _, err = launcher.communicate(timeout=15)
    assert launcher.returncode == 130
    assert err == "paraxis: stopped by SIGINT before the workers had saved\n"
    assert not any(alive(int((tmp_path / f"ready{rank}").read_text())) for rank in range(2))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_workers_die_with_a_launcher_that_is_killed(tmp_path: Path):
    launcher = start_launcher("(folder / f'pid{rank}').write_text(str(os.getpid()))\n" + SLEEP, 2)
    files = [tmp_path / f"pid{rank}" for rank in range(2)]
    assert eventually(lambda: all(file.exists() and file.read_text() for file in files))
    launcher.kill()
    launcher.communicate()
    assert eventually(lambda: not any(alive(int(file.read_text())) for file in files))


def test_what_a_killed_worker_started_goes_with_it(tmp_path: Path):
    body = """
import subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 0:
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    (folder / "child").write_text(str(child.pid))
meet()
if rank == 1: sys.exit(1)
"""
    assert launch(worker(body + SLEEP), 2, grace_s=0.2) == 1
    assert eventually(lambda: not alive(int((tmp_path / "child").read_text())))
