"""Starts a Slurm cluster of one node on this machine: Debian's packages, as root.

The node is named xk, for Slurm's qsub takes the ":xk" of "nodes=1:ppn=16:xk" for a name.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "qsub")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
GresTypes=gpu
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
NodeName=xk NodeHostname={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=250000 Gres=gpu:4
PartitionName=gpuA100x4 Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Return why no cluster can be started here, or nothing."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if absent:
        return f"needs Debian's Slurm packages, for {', '.join(absent)}"
    return "" if os.geteuid() == 0 else "needs to be root, to start Slurm"


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


@contextlib.contextmanager
def running(directory: Path) -> Iterator[None]:
    """Run munged, slurmctld and slurmd. Sets SLURM_CONF, which the commands read."""
    os.environ |= {"SLURM_CONF": str(directory / "slurm.conf"), "PATH": _path()}
    for name in ("state", "spool"):
        (directory / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    (directory / "slurm.conf").write_text(CONFIGURATION.format(host=host, directory=directory))
    # What stands for four GPUs.
    devices = ("null", "zero", "full", "random")
    (directory / "gres.conf").write_text("".join(
        f"NodeName=xk Name=gpu File=/dev/{device}\n" for device in devices))
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    daemons = []
    try:
        with (directory / "log").open("wb") as log:
            for command in (["runuser", "-u", "munge", "--", "munged", "--foreground"],
                            ["slurmctld", "-D"], ["slurmd", "-D", "-N", "xk"]):
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
                time.sleep(1)
        _wait_for_answer(["sinfo", "-h", "-o", "%T"], "idle")
        yield
        subprocess.run(["scancel", "--user", "root"], check=True)
        _wait_for_answer(["squeue", "-h"], "")
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(60)


def _wait_for_answer(command: list[str], answer: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode == 0 and process.stdout.strip() == answer:
            return
        time.sleep(0.5)
    raise AssertionError(f"{' '.join(command)}: {process.stdout}{process.stderr}")
