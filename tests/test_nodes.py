"""slurm/ddp.sbatch on two nodes of a real Slurm, by gloo on the CPU; and one of them is lost.

Each test compares with the same two processes on one node, which nothing disturbs.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_cluster
from helpers import result
from slurm_cluster import ended, log_of, make_checkout, submit, wait_for

pytestmark = pytest.mark.slow
FLAGS = ["--device", "cpu", "--batch-size", 8, "--epochs", 8, "--dropout", 0.1]
NOTICED = 120  # seconds, within which a job must have noticed that a node is lost

# Each rank has one core, as if its node had no more. The first start finds a slow disk, so it is
# still at work when it is disturbed.
HOOK = """
import os, socket, time

if "RANK" in os.environ:
    os.sched_setaffinity(0, {int(os.environ["RANK"]) % os.cpu_count()})
    if os.path.exists(socket.gethostname() + "-fails"):
        os._exit(2)
if os.environ.get("SLURM_RESTART_COUNT") == "0":
    fsync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(0.4), fsync(descriptor))
"""

# train_resnet.py, whose ranks leave behind where they ran and a digest of their weights.
TRAIN_DIGEST = """
import hashlib, os, socket
import train_resnet
from engine.process import run_script
from engine.run import Run

def finish(run, model, finish=Run.finish):
    finish(run, model)
    weights = [value.numpy().tobytes() for value in run.model.state_dict().values()]
    with open("rank" + os.environ["RANK"], "w") as file:
        print(socket.gethostname(), hashlib.sha256(b"".join(weights)).hexdigest(), file=file)

Run.finish = finish
run_script(train_resnet.main)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if slurm_cluster.missing_for_two():
        pytest.skip(slurm_cluster.missing_for_two())
    with slurm_cluster.running_two(tmp_path_factory.mktemp("slurm")):
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data_dir):
    """What two processes of one node end with."""
    directory = tmp_path_factory.mktemp("one")
    make_checkout(directory, data_dir, HOOK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               2, "train_resnet.py", *FLAGS, "--data-dir", data_dir, "--output-dir", "run"]
    subprocess.run(list(map(str, command)), cwd=directory, check=True, capture_output=True,
                   env=os.environ | {"PYTHONPATH": str(directory / "hook")})
    return result(directory / "run")


@pytest.fixture
def checkout(cluster, tmp_path, data_dir, monkeypatch):
    """The working directory of a user, who has named the nodes' network to gloo."""
    make_checkout(tmp_path, data_dir, HOOK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CIFAR100_DIR", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    return tmp_path


def submit_to_two(*flags, script: str = "train_resnet") -> str:
    """Submit a run that saves after every step to both nodes."""
    return submit("--nodes=2", "--gpus-per-node=1", "slurm/ddp.sbatch", script, *FLAGS,
                  "--checkpoint-minutes", 0, *flags)


def wait_for_an_epoch(number: str) -> None:
    """Wait until a job has told its first epoch."""
    wait_for(number, lambda known: known["JobState"] == "RUNNING" and "img/s" in log_of(number))


def assert_ends_as(expected: tuple, number: str, restarts: int) -> str:
    """Wait for a job's end; it must have been so often restarted, and end so. Return its log."""
    known = wait_for(number, ended)
    log = log_of(number)
    assert (known["JobState"], known["Restarts"]) == ("COMPLETED", str(restarts)), log
    assert log.count("final test accuracy") == 1
    (directory,) = Path("output").glob("train_*-ddp")
    assert result(directory) == expected
    return log


def test_two_nodes_train_as_two_processes_of_one_node_do(checkout, undisturbed):
    (checkout / "train_digest.py").write_text(TRAIN_DIGEST)
    number = submit_to_two(script="train_digest")
    log = assert_ends_as(undisturbed, number, 0)
    assert "on first,second, restart 0" in log and "device     2 x CPU" in log
    hosts, weights = zip(*((checkout / f"rank{rank}").read_text().split() for rank in (0, 1)),
                         strict=True)
    assert set(hosts) == {"first", "second"} and len(set(weights)) == 1


def test_a_signal_stops_both_nodes_and_the_job_ends_the_same(checkout, undisturbed):
    number = submit_to_two()
    wait_for_an_epoch(number)
    subprocess.run(["scancel", "--batch", "--signal=USR2", number], check=True)
    log = assert_ends_as(undisturbed, number, 1)
    assert log.count("SIGUSR2: stopped in epoch") == 1


def test_a_node_whose_processes_die_is_noticed_and_the_job_ends_the_same(checkout, undisturbed):
    number = submit_to_two()
    wait_for_an_epoch(number)
    for process in slurm_cluster.processes("second", "train_resnet.py"):
        os.kill(process, signal.SIGKILL)
    wait_for(number, lambda known: known["Restarts"] == "1", NOTICED)
    log = assert_ends_as(undisturbed, number, 1)
    assert "second: task 1: Killed" in log and "another rank has ended" in log


def test_a_node_whose_cable_is_pulled_is_noticed_and_the_job_ends_the_same(checkout, undisturbed):
    """By Slurm, for no byte tells the other node. It ends there before the cable is back."""
    number = submit_to_two()
    wait_for_an_epoch(number)
    slurm_cluster.pull_cable("second")
    try:
        wait_for(number, lambda known: known["Restarts"] == "1"
                 and not slurm_cluster.processes("first", "train_resnet.py"), NOTICED)
        assert slurm_cluster.processes("second", "train_resnet.py")
    finally:
        slurm_cluster.plug_cable("second")
    log = assert_ends_as(undisturbed, number, 1)
    assert "Node failure on second" in log


def test_an_error_of_all_does_not_requeue(checkout):
    number = submit_to_two("--lr", "1e30")
    known = wait_for(number, ended)
    assert (known["JobState"], known["Restarts"]) == ("FAILED", "0"), log_of(number)
    assert "the loss was not finite" in log_of(number)


def test_an_error_of_one_node_does_not_requeue(checkout):
    """Though the other, which waits for it, must be killed."""
    (checkout / "second-fails").touch()
    number = submit_to_two()
    known = wait_for(number, ended, NOTICED)
    assert (known["JobState"], known["Restarts"]) == ("FAILED", "0"), log_of(number)
