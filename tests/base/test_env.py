"""Who started us: told apart from the variables that launchers really set."""

from pathlib import Path

import pytest

from paraxis.base.env import Environment, first_host, read_environment, worker_variables
from paraxis.base.errors import ConfigError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "HOME": "/home/a",
}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "HOME": "/home/a",
}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


def test_a_person_s_shell_is_one_rank():
    assert read_environment({"HOME": "/home/a"}) == Environment(cache_dir=Path("/home/a/.cache/paraxis"))


def test_torchrun_gives_rank_and_meeting_point():
    env = read_environment(TORCHRUN)
    assert (env.launcher, env.rank, env.world_size, env.local_rank, env.local_world_size) == ("torchrun", 5, 8, 1, 4)
    assert (env.master_addr, env.master_port, env.store_path) == ("node0", 29500, None)


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_torchrun_environment_is_refused_by_name(missing: str):
    with pytest.raises(ConfigError, match=f"{missing} is not set.*start with torchrun"):
        read_environment(without(TORCHRUN, missing))


def test_a_variable_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="MASTER_PORT='http' is not a whole number"):
        read_environment({**TORCHRUN, "MASTER_PORT": "http"})


def test_srun_gives_rank_and_first_host():
    env = read_environment(SRUN)
    assert (env.launcher, env.rank, env.world_size, env.local_rank, env.local_world_size) == ("slurm", 6, 7, 2, 3)
    assert env.master_addr == "gpu07"
    assert 1024 < env.master_port < 32768


def test_tasks_of_one_step_agree_on_a_port_that_other_steps_and_jobs_do_not_use():
    ports = [
        read_environment({**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_PROCID": rank}).master_port
        for job in range(4711, 4721)
        for step in range(5)
        for rank in ("0", "6")
    ]
    assert ports[::2] == ports[1::2]
    assert len(set(ports)) == len(ports) // 2


def test_a_meeting_point_that_a_person_sets_beats_slurm_s():
    env = read_environment({**SRUN, "MASTER_ADDR": "ib0", "MASTER_PORT": "1234"})
    assert (env.master_addr, env.master_port) == ("ib0", 1234)


def test_older_slurm_names_are_read_too():
    old = {**without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST"), "SLURM_JOB_NODELIST": "a1,a2"}
    assert read_environment({**old, "SLURM_TASKS_PER_NODE": "4(x2)"}).local_world_size == 4
    assert read_environment({**old, "SLURM_NTASKS_PER_NODE": "4"}).local_world_size == 4
    assert read_environment({**old, "SLURM_NTASKS_PER_NODE": "4"}).master_addr == "a1"


@pytest.mark.parametrize(
    "variables",
    [
        without(SRUN, "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST"),  # an sbatch script
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},  # `srun -n1 --pty bash` in a larger job
        without({**SRUN, "SLURM_NTASKS": "1"}, "SLURM_STEP_NUM_TASKS"),
    ],
)
def test_a_shell_in_a_slurm_job_is_not_a_worker(variables: dict[str, str]):
    assert not read_environment(variables).is_worker


def test_torchrun_inside_a_slurm_step_wins():
    assert read_environment({**SRUN, **TORCHRUN}).launcher == "torchrun"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("node[003-005,9],other", "node003"),
        ("a,b[1-2]", "a"),
        ("rack[1-2]node[01-04]-ib,x", "rack1node01-ib"),
        ("n[12]", "n12"),
    ],
)
def test_the_first_host_of_a_slurm_list(hosts: str, first: str):
    assert first_host(hosts) == first


def test_a_local_worker_s_variables_read_back_as_its_record(tmp_path: Path):
    variables = worker_variables(1, 2, tmp_path / "store")
    env = read_environment({**SRUN, **TORCHRUN, **variables})
    assert (env.launcher, env.rank, env.world_size, env.local_rank, env.local_world_size) == ("local", 1, 2, 1, 2)
    assert env.store_path == tmp_path / "store"
    assert variables["GLOO_SOCKET_IFNAME"].startswith("lo")


def test_workers_share_the_cores_unless_a_person_said_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert worker_variables(0, 10_000, tmp_path)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert worker_variables(0, 10_000, tmp_path)["OMP_NUM_THREADS"] == "7"


def test_the_cache_is_where_it_was_put():
    assert read_environment({"PARAXIS_CACHE": "/c", "XDG_CACHE_HOME": "/x"}).cache_dir == Path("/c")
    assert read_environment({"XDG_CACHE_HOME": "/x"}).cache_dir == Path("/x/paraxis")
