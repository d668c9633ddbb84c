"""The job files, submitted to a real Slurm with no more changed than a user would on sbatch's line.

A job of the qsub wrapper finds stand-ins for aprun and for Blue Waters' modules.
"""

import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
import torch
from helpers import ROOT, equal, result, script
from slurm_cluster import ended, job, log_of, make_checkout, submit, wait_for

import utils

SMALL = ["--device", "cpu", "--batch-size", 8]
slow = pytest.mark.slow
APRUN = """#!/bin/bash
echo "aprun $*"
[ "${*:1:10}" = "-cc none -n 1 -N 1 -d 16 -b --" ] || exit 64
shift 10
exec "$@" $APRUN_FLAGS
"""

# The first start of a job finds a slow disk: it takes long to save, so it is still at work when its
# signal comes, however fast the machine.
SLOW_DISK = """
import os, time
if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    fsync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(0.4), fsync(descriptor))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if slurm_cluster.missing():
        pytest.skip(slurm_cluster.missing())
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")):
        yield


@pytest.fixture
def checkout(cluster, tmp_path, data_dir, monkeypatch):
    """The working directory: the repository as a user has it, with data and an environment."""
    make_checkout(tmp_path, data_dir, SLOW_DISK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CIFAR100_DIR", raising=False)
    # By default a job's cache lies in output, unless a test before has had torch name another one.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path.parent / "compiled"))
    return tmp_path


@slow
def test_an_array_trains_a_seed_in_each_job(checkout):
    number = submit("--array=0-1", "slurm/one_gpu.sbatch", "train_resnet", *SMALL, "--epochs", 1)
    for task in "01":
        assert wait_for(f"{number}_{task}", ended)["JobState"] == "COMPLETED"
    (first, rows), (second, other_rows) = (
        result(checkout / f"output/train_resnet-seed{task}") for task in "01")
    assert first != second
    readme = (ROOT / "slurm" / "README.md").read_text().splitlines()
    (summary,) = (line for line in readme if "report.compare output/train_resnet-seed*" in line)
    command = ["bash", "-c", summary]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    accuracies = [100 * float(row["test_acc"]) for row in (rows[-1], other_rows[-1])]
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    assert f": n 2, test accuracy {mean:.2f}% ({deviation:.2f}%), test top-5 " in shown
    assert (checkout / "output" / "comparison.png").exists()


@pytest.mark.parametrize("sweep, number, output, flags", [
    ("--lr 0.05;--lr 0.1 --low-res 0", "0", "-lr-0.05-seed0", "--lr 0.05"),
    ("--lr 0.05;--lr 0.1 --low-res 0", "1", "-lr-0.1-low-res-0-seed0", "--lr 0.1 --low-res 0"),
    ("--lr 0.05;--lr 0.1 --low-res 0", "4", "-lr-0.05-seed2", "--lr 0.05"),
    ("--lr=1e-3 ;\n --weights a/*", "1", "-weights-a---seed0", "--weights a/*"),
    ("", "3", "-seed3", ""), ("", "", "-seed0", ""),
])
def test_each_number_of_an_array_has_its_flags_seed_and_directory(
        tmp_path, sweep, number, output, flags):
    process = without_slurm(tmp_path, "one_gpu", SWEEP=sweep, SLURM_ARRAY_TASK_ID=number)
    seed = output.rpartition("seed")[2]
    assert process.stdout.splitlines()[-1].split() == [
        "python", "train_resnet.py", "--device", "cuda", "--data-dir", "data", "--output-dir",
        f"output/train_resnet{output}", "--seed", seed, "--resume", "--epochs", "9", *flags.split()]
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("file, says", [("one_gpu", "--array=0-1"), ("ddp", "one_gpu.sbatch")])
def test_a_sweep_that_would_not_be_one_is_refused(tmp_path, file, says):
    process = without_slurm(tmp_path, file, SWEEP="--lr 0.05;--lr 0.1")
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (2, "", 1)
    assert says in process.stderr


@pytest.mark.parametrize("file", ["one_gpu", "ddp"])
def test_a_script_may_be_named_with_its_suffix(tmp_path, file):
    variables = {"SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1"}
    named = [re.sub(r"/proc/\d+/", "", without_slurm(tmp_path, file, script, **variables).stdout)
             for script in ("train_resnet", "train_resnet.py")]
    assert named[0] == named[1] and "train_resnet.py" in named[0] and ".py.py" not in named[0]


@pytest.mark.parametrize("file", ["one_gpu", "ddp"])
@pytest.mark.parametrize("missing, says", [
    ("train_resnet.py", "no train_resnet.py in {}: submit from the directory of the main README"),
    (".venv/bin/activate", "no .venv in {}: install it there")])
def test_a_job_from_another_directory_or_without_an_environment_is_one_line(
        tmp_path, file, missing, says):
    """Whatever python stands on the PATH, it does not train."""
    process = without_slurm(tmp_path, file, missing=missing)
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)
    assert says.format(tmp_path) in process.stderr and "srun" not in process.stdout


@pytest.mark.parametrize("name", ["train_resnet", "finetune_resnet18"])
def test_a_pbs_job_from_another_directory_is_one_line(tmp_path, name):
    process = subprocess.run(["bash", ROOT / "slurm" / f"{name}.pbs"], capture_output=True,
                             text=True, env={"PBS_O_WORKDIR": str(tmp_path)})
    assert process.returncode == 2
    assert process.stderr == (f"no {name}.py in {tmp_path}: submit from the directory of the main "
                              "README.md\n")


def without_slurm(directory: Path, file: str, script: str = "train_resnet", missing: str = "",
                  **variables) -> subprocess.CompletedProcess:
    """Run a job file with a stand-in for srun, which prints what it should start."""
    for path, text in ((".venv/bin/activate", ""), ("train_resnet.py", ""),
                       ("bin/srun", "#!/bin/sh\necho $*\n")):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text)
    (directory / "bin" / "srun").chmod(0o755)
    if missing:
        (directory / missing).unlink()
    variables |= {"PATH": f"{directory}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    command = ["bash", ROOT / "slurm" / f"{file}.sbatch", script, "--epochs", "9"]
    return subprocess.run(command, cwd=directory, env=variables, capture_output=True, text=True)


@slow
def test_a_sweep_trains_a_value_in_each_job_through_requeues(checkout, monkeypatch):
    """Each start does a step of two, so each job requeues itself."""
    monkeypatch.setenv("SWEEP", "--lr 0.05;--lr 0.2")
    flags = [*SMALL, "--max-steps", 2]
    number = submit("--array=0-1", "slurm/one_gpu.sbatch", "train_resnet", *flags,
                    "--max-minutes", 0.001)
    for task, lr in enumerate(("0.05", "0.2")):
        known = wait_for(f"{number}_{task}", ended)
        assert known["JobState"] == "COMPLETED" and int(known["Restarts"]) >= 1
        plain = checkout / f"plain-{lr}"
        script("train_resnet", *flags, "--lr", lr, "--data-dir", checkout / "data",
               "--output-dir", plain)
        assert result(checkout / f"output/train_resnet-lr-{lr}-seed0") == result(plain)


@slow
def test_a_sweep_without_an_array_or_of_no_flags_does_not_requeue(checkout, monkeypatch):
    monkeypatch.setenv("SWEEP", "lr=0.05;lr=0.2")
    for array in ([], ["--array=0-0"]):
        number = submit(*array, "slurm/one_gpu.sbatch", "train_resnet", *SMALL)
        known = wait_for(number, ended)
        assert (known["JobState"], known["ExitCode"]) == ("FAILED", "2:0"), log_of(known["JobId"])
        assert known["Restarts"] == "0"
    assert "unrecognized arguments: lr=0.05" in log_of(known["JobId"])
    assert not (checkout / "output").exists()


@slow
def test_a_job_whose_time_is_too_short_requeues_itself_and_ends_the_same(checkout, monkeypatch):
    """Slurm gives its signal up to 30 s early, so here 15 to 45 s after the start."""
    monkeypatch.setenv("OUTPUT", "output/mine")
    flags = [*SMALL, "--weights", "random", "--image-size", 32, "--epochs", 10]
    number = submit("--time=1", "--signal=B:USR2@15", "slurm/one_gpu.sbatch", "finetune_resnet18",
                    *flags, "--checkpoint-minutes", 0)
    known = wait_for(number, ended)
    log = log_of(number)
    restarts = int(known["Restarts"])
    assert known["JobState"] == "COMPLETED" and restarts >= 1, log
    # A start on a slow machine can be signalled before its first step, and before its header.
    assert 1 <= len(re.findall("SIGUSR2: stopped in epoch .* saved in", log)) <= restarts
    epochs = [line.split()[1] for line in log.splitlines() if "img/s" in line]
    assert epochs == [f"{epoch}/10" for epoch in range(1, 11)], "the log reads as one run"
    data_dir = checkout / "data"
    unlimited = script("finetune_resnet18", *flags, "--data-dir", data_dir, "--output-dir",
                       checkout / "whole")
    final = [line for line in log.splitlines() if line.startswith("final")]
    assert final == unlimited.stdout.splitlines()[-1:]
    assert result(checkout / "output/mine-seed0") == result(checkout / "whole")


@slow
def test_scancel_leaves_a_checkpoint_and_no_job(checkout):
    number = submit("slurm/one_gpu.sbatch", "train_resnet", *SMALL, "--epochs", 99)
    wait_for(number, lambda known: known["JobState"] == "RUNNING" and "img/s" in log_of(number))
    subprocess.run(["scancel", number], check=True)
    known = wait_for(number, ended)
    assert (known["JobState"], known["Restarts"]) == ("CANCELLED", "0")
    # Slurm's TERM and the USR2 that the job makes of it: whichever comes first.
    says = r"SIG(TERM|USR2): stopped in epoch"
    wait_for(number, lambda known: re.search(says, log_of(number)))
    state = utils.load_tensors(checkout / "output/train_resnet-seed0/checkpoint.pt")
    assert state["position"]["epoch"] >= 1


@slow
def test_restarts_are_capped(checkout):
    number = submit("--export=ALL,MOST_RESTARTS=1", "slurm/one_gpu.sbatch", "train_resnet", *SMALL,
                    "--max-minutes", 0.001)
    known = wait_for(number, ended)
    assert (known["JobState"], known["ExitCode"], known["Restarts"]) == ("FAILED", "75:0", "1")
    assert "stopped after 1 restarts; the same sbatch command goes on" in log_of(number)


@slow
def test_an_error_does_not_requeue(checkout):
    number = submit("slurm/one_gpu.sbatch", "train_resnet", *SMALL, "--lr", "1e30")
    known = wait_for(number, ended)
    assert (known["JobState"], known["ExitCode"], known["Restarts"]) == ("FAILED", "1:0", "0")
    assert "the loss was not finite" in log_of(number)


@slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("file", ["one_gpu", "ddp"])
def test_a_job_that_finds_no_gpu_fails_at_once(checkout, file):
    """Rather than train on the CPU for all of its time."""
    number = submit(f"slurm/{file}.sbatch", "train_resnet")
    known = wait_for(number, ended)
    assert (known["JobState"], known["Restarts"]) == ("FAILED", "0")
    assert "--device cuda" in log_of(number) and "is not available" in log_of(number)
    assert not (checkout / "output").exists()


@slow
def test_several_gpus_stop_together_requeue_and_finish(checkout):
    number = submit("--gpus-per-node=2", "slurm/ddp.sbatch", "train_resnet", *SMALL, "--epochs", 6)
    wait_for(number, lambda known: known["JobState"] == "RUNNING" and "img/s" in log_of(number))
    subprocess.run(["scancel", "--batch", "--signal=USR2", number], check=True)
    known = wait_for(number, ended)
    log = log_of(number)
    assert (known["JobState"], known["Restarts"]) == ("COMPLETED", "1"), log
    assert log.count("2 x CPU") == 2 and log.count("SIGUSR2: stopped in epoch") == 1
    state = utils.load_tensors(checkout / "output/train_resnet-ddp/checkpoint.pt")
    weights = utils.load_tensors(checkout / "output/train_resnet-ddp/model.pt")
    assert len(state["ranks"]) == 2 and equal(dict(state["model"]), weights)


@pytest.fixture
def blue_waters(checkout, monkeypatch):
    """Stand-ins for what is Cray's own."""
    if Path("/opt/modules").exists():
        pytest.skip("this machine has modules of its own")
    (checkout / "bin").mkdir()
    (checkout / "bin" / "aprun").write_text(APRUN)
    (checkout / "bin" / "aprun").chmod(0o755)
    Path("/opt/modules/default/init").mkdir(parents=True)
    # Torque sets these two; Slurm's wrapper of qsub does not.
    monkeypatch.setenv("PBS_O_WORKDIR", str(checkout))
    Path("/opt/modules/default/init/bash").write_text(
        "PBS_JOBID=$SLURM_JOB_ID\nmodule() { echo \"module $*\"; }\n")
    monkeypatch.setenv("PATH", f"{checkout}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}")
    yield checkout
    shutil.rmtree("/opt/modules")


@slow
@pytest.mark.parametrize("name, minutes, flags", [
    ("train_resnet", 170, ""),
    ("finetune_resnet18", 230, "--weights random --image-size 32"),
])
def test_the_pbs_files_chain_themselves(blue_waters, monkeypatch, name, minutes, flags):
    """One epoch a job by aprun's stand-in: a run of one step, and its end in the next job."""
    monkeypatch.setenv("APRUN_FLAGS", f"{flags} --device cpu --epochs 1 --batch-size 200 "
                                      "--max-minutes 0.001")
    command = ["qsub", f"slurm/{name}.pbs"]
    first = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    number = re.match(r"\d+", first)[0]
    assert wait_for(number, ended)["ExitCode"] == "75:0"
    second = str(int(number) + 1)
    assert job(second)["JobName"] == name
    assert wait_for(second, ended)["ExitCode"] == "0:0"
    (first_log, second_log) = sorted(Path().glob(f"{name}.pbs.o*"))
    says = f"aprun -cc none -n 1 -N 1 -d 16 -b -- python {name}.py --output-dir output/{name} "
    for log in (first_log, second_log):
        assert f"{says}--resume --max-minutes {minutes}\n" in log.read_text()
    assert "final test accuracy" in second_log.read_text()


@slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_the_check_of_a_node_without_a_gpu_fails(checkout):
    """It reports the node, says in its last line what is missing, and starts no test."""
    number = submit("slurm/check.sbatch")
    known = wait_for(number, ended)
    log = log_of(number)
    assert (known["JobState"], known["ExitCode"], known["Restarts"]) == ("FAILED", "1:0", "0"), log
    assert f"== The node\n{socket.gethostname()}\n" in log and "no GPU: nvidia-smi" in log
    facts, reason = log.splitlines()[-2:]
    assert facts.startswith(f"torch {torch.__version__} for CUDA ") and facts.endswith("is False")
    assert reason.startswith("check: torch finds no GPU that works (")
    assert not (checkout / "output").exists()


# A stand-in for Python. It prints its arguments, leaves a temporary file behind, and fails in the
# part that $FAILS names.
PYTHON = """#!/bin/sh
echo "python $*"
touch "$TMPDIR/left behind"
case "$*" in "$FAILS"*) exit 7;; esac
"""


@pytest.mark.parametrize("fails, started", [("-m pytest", 2), ("results/benchmark.py", 3), ("-", 1),
                                            ("nothing", 3)])
def test_the_check_of_a_node_ends_with_the_status_of_the_first_part_that_fails(
        tmp_path, fails, started):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={tmp_path}/.venv/bin:$PATH\n")
    (tmp_path / ".venv" / "bin" / "python").write_text(PYTHON)
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    (tmp_path / "temporary").mkdir()
    (tmp_path / "train_resnet.py").touch()
    process = check_in(tmp_path, FAILS=fails, TMPDIR=str(tmp_path / "temporary"))
    tests = "-m cuda -v -p no:cacheprovider --ignore tests/test_graphs.py"
    parts = ["python -", f"python -m pytest {tests}",
             "python results/benchmark.py --device cuda --seconds 1"]
    lines = process.stdout.splitlines()
    assert [line for line in lines if line.startswith("python")] == parts[:started]
    assert (ROOT / parts[2].split()[1]).exists()
    assert process.returncode == (0 if fails == "nothing" else 7)
    assert ("The check has passed." in lines) == (fails == "nothing")
    assert not list((tmp_path / "temporary").iterdir())


def test_the_check_of_a_node_without_an_environment_is_one_line(tmp_path):
    for says in (f"submit from the directory of the main README.md, not from {tmp_path}\n",
                 f"no .venv in {tmp_path};"):
        process = check_in(tmp_path)
        assert (process.returncode, process.stdout, process.stderr.count("\n")) == (2, "", 1)
        assert says in process.stderr
        (tmp_path / "train_resnet.py").touch()


def check_in(directory: Path, **variables) -> subprocess.CompletedProcess:
    """Run check.sbatch without Slurm in a directory."""
    return subprocess.run(["bash", ROOT / "slurm" / "check.sbatch"], cwd=directory, text=True,
                          env=os.environ | variables, capture_output=True)


def test_shellcheck_passes():
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck")
    job_files = [path for path in (ROOT / "slurm").iterdir() if path.suffix in (".sbatch", ".pbs")]
    assert len(job_files) == 5
    subprocess.run(["shellcheck", *job_files], check=True)


# It starts a script, in a session of its own, that no TERM ends; and dies at once of a TERM.
TORCHRUN = """#!/bin/bash
export TORCHELASTIC_RUN_ID=$SLURM_JOB_ID
setsid bash -c 'trap "" TERM USR2; echo $$ >script; exec sleep 100' &
trap 'exit 1' TERM
while :; do wait; done
"""


@slow
def test_a_node_that_is_told_to_end_leaves_no_script_behind(tmp_path):
    """Though torchrun has died before. Slurm kills what it knows of 30 seconds after its TERM."""
    (tmp_path / "torchrun").write_text(TORCHRUN)
    (tmp_path / "torchrun").chmod(0o755)
    (shell,) = re.findall(r"^node='(.*?)'$", (ROOT / "slurm/ddp.sbatch").read_text(), re.M | re.S)
    node = subprocess.Popen(
        ["bash", "-c", shell, "node"], cwd=tmp_path, start_new_session=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "error": "error",
                          "SLURM_JOB_ID": f"test-{os.getpid()}"})
    started = tmp_path / "script"
    while not (started.exists() and started.read_text()):
        assert node.poll() is None
        time.sleep(0.1)
    os.killpg(node.pid, signal.SIGTERM)
    assert node.wait(30) == 143 and not (tmp_path / "error").exists()
    state = Path("/proc", started.read_text().strip(), "stat")
    assert not state.exists() or ") Z " in state.read_text(), "nobody may have asked for its status"
