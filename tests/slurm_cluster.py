"""Starts a Slurm cluster on this machine, and submits jobs: Debian's packages, as root.

`running` starts one node, which is the machine itself. It is named xk, for Slurm's qsub takes the
":xk" of "nodes=1:ppn=16:xk" for a name. `running_two` starts two nodes that share nothing but the
file system: each has a network, a host name and process numbers of its own (Linux's namespaces),
and a cable to a switch, which can be pulled.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from helpers import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "qsub")
# SlurmdTimeout is how many seconds a node may be silent until it counts as down. Slurm's default is
# 300.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmdTimeout=30
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
GresTypes=gpu
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
{nodes}
PartitionName=gpuA100x4 Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr={address} CPUs=64 RealMemory=250000 Gres=gpu:4"
# What stands for four GPUs.
DEVICES = ("null", "zero", "full", "random")

# The two nodes, and the controller, which runs on the machine itself. The network is one that is
# kept for tests, RFC 2544.
ADDRESSES = {"first": "198.18.77.1", "second": "198.18.77.2"}
CONTROLLER = "198.18.77.254"
SWITCH = "cifar-switch"
# A node's first process. It stays, for it must inherit and bury the orphans, as init does: Slurm
# takes a job's dead processes for living ones. When it ends, all of its node's processes do.
NODE_SCRIPT = """
hostname {name}
mount --bind {directory}/hosts-{name} /etc/hosts
slurmd -D -N {name}
exit
"""


def missing() -> str:
    """Return why no cluster can be started here, or nothing."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if absent:
        return f"needs Debian's Slurm packages, for {', '.join(absent)}"
    return "" if os.geteuid() == 0 else "needs to be root, to start Slurm"


def missing_for_two() -> str:
    """Return why no cluster of two nodes can be started here, or nothing."""
    if missing():
        return missing()
    if not shutil.which("ip", path=_path()):
        return "needs Debian's iproute2, for ip"
    try:
        for command in (f"ip link add {SWITCH} type bridge", f"ip link delete {SWITCH}",
                        " ".join([*_in_namespaces(), "true"])):
            _call(command)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"needs leave to make networks and namespaces ({error})"
    return ""


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


def _call(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


def _in_namespaces() -> list[str]:
    return ["unshare", "--uts", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]


@contextlib.contextmanager
def running(directory: Path) -> Iterator[None]:
    """Run a cluster of one node. Sets SLURM_CONF, which the commands read."""
    host = socket.gethostname().partition(".")[0]
    _configure(directory, "127.0.0.1", 6817, {"xk": (host, "127.0.0.1")})
    with _daemons(directory, {"xk": ["slurmd", "-D", "-N", "xk"]}):
        yield


@contextlib.contextmanager
def running_two(directory: Path) -> Iterator[None]:
    """Run a cluster of the nodes "first" and "second". Sets SLURM_CONF, as `running` does."""
    # Another port than `running` has, so that both can run at once.
    nodes = {name: (name, address) for name, address in ADDRESSES.items()}
    _configure(directory, CONTROLLER, 6827, nodes)
    for own in ADDRESSES:
        # Debian's installer, too, gives a machine's own name an address that no other can reach.
        addresses = ADDRESSES | {own: "127.0.1.1", "localhost": "127.0.0.1"}
        (directory / f"hosts-{own}").write_text("".join(
            f"{address} {name}\n" for name, address in addresses.items()))
    with contextlib.ExitStack() as stack:
        _call(f"ip link add {SWITCH} type bridge")
        stack.callback(_call, f"ip link delete {SWITCH}")
        _call(f"ip address add {CONTROLLER}/24 dev {SWITCH}")
        _call(f"ip link set {SWITCH} up")
        for name, address in ADDRESSES.items():
            _call(f"ip netns add cifar-{name}")
            stack.callback(_call, f"ip netns delete cifar-{name}")
            _call(f"ip link add {_cable(name)} master {SWITCH} type veth "
                  f"peer name eth0 netns cifar-{name}")
            for command in ("link set lo up", f"address add {address}/24 dev eth0",
                            "link set eth0 up"):
                _call(f"ip -netns cifar-{name} {command}")
            _call(f"ip link set {_cable(name)} up")
        script = {name: NODE_SCRIPT.format(name=name, directory=directory) for name in ADDRESSES}
        stack.enter_context(_daemons(directory, {
            name: ["nsenter", f"--net=/run/netns/cifar-{name}", *_in_namespaces(), "bash", "-c",
                   script[name]] for name in ADDRESSES}))
        yield


def _cable(name: str) -> str:
    """Return the name of the switch's end of a node's cable."""
    return f"cifar-{name}"


def pull_cable(name: str) -> None:
    """Cut a node off from the others and from the controller."""
    _call(f"ip link set {_cable(name)} down")


def plug_cable(name: str) -> None:
    """Connect a node again, and tell Slurm, which does not ask a node that is down by itself.

    Before that end what the node still runs, as a reboot does: Slurm would end it by the number of
    its step, and the requeued job has a step of the same number.
    """
    for process in processes(name, "slurmstepd|torchrun|train_resnet.py"):
        os.kill(process, signal.SIGKILL)
    _call(f"ip link set {_cable(name)} up")
    subprocess.run(["scontrol", "update", f"NodeName={name}", "State=RESUME"])


def processes(name: str, pattern: str) -> list[int]:
    """Return the numbers of a node's processes whose command line matches."""
    space = os.readlink(f"/proc/{_first_process(name)}/ns/pid")
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split()
    held = []
    for process in found:
        # It may have ended meanwhile.
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{process}/ns/pid") == space:
                held.append(int(process))
    return held


def _first_process(name: str) -> str:
    command = ["pgrep", "-o", "-x", "-f", f"slurmd -D -N {name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _configure(directory: Path, controller: str, port: int, nodes: dict) -> None:
    """Write Slurm's files for nodes, {name: (host name, address)}."""
    os.environ |= {"SLURM_CONF": str(directory / "slurm.conf"), "PATH": _path()}
    for name in ("state", *(f"spool-{name}" for name in nodes)):
        (directory / name).mkdir()
    lines = [NODE.format(name=name, host=host, address=address)
             for name, (host, address) in nodes.items()]
    (directory / "slurm.conf").write_text(CONFIGURATION.format(
        host=socket.gethostname().partition(".")[0], address=controller, port=port,
        directory=directory, nodes="\n".join(lines)))
    (directory / "gres.conf").write_text("".join(
        f"NodeName={name} Name=gpu File=/dev/{device}\n" for name in nodes for device in DEVICES))
    # A munged of this cluster's own: others may run one, too.
    (directory / "munge").mkdir()
    (directory / "munge" / "key").write_bytes(secrets.token_bytes(128))
    (directory / "munge" / "key").chmod(0o600)


@contextlib.contextmanager
def _daemons(directory: Path, nodes: dict[str, list[str]]) -> Iterator[None]:
    """Run munged, slurmctld, and the command of each node; wait for all nodes."""
    munge = directory / "munge"
    munged = ["munged", "--foreground", "--force", f"--key-file={munge}/key",
              f"--socket={munge}/socket", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed"]
    daemons = []
    try:
        with (directory / "log").open("wb") as log:
            for command in (munged, ["slurmctld", "-D"], *nodes.values()):
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
                time.sleep(1)
        _wait_for_answer(["sinfo", "-h", "-N", "-o", "%T"], "\n".join(["idle"] * len(nodes)))
        yield
        subprocess.run(["scancel", "--user", "root"], check=True)
        _wait_for_answer(["squeue", "-h"], "")
    finally:
        # unshare ignores SIGTERM. When it is killed, all of its node's processes are.
        for daemon in reversed(daemons):
            daemon.kill()
            daemon.wait(60)


def _wait_for_answer(command: list[str], answer: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode == 0 and process.stdout.strip() == answer:
            return
        time.sleep(0.5)
    raise AssertionError(f"{' '.join(command)}: {process.stdout}{process.stderr}")


def make_checkout(directory: Path, data_dir: Path, hook: str) -> None:
    """Make a directory what a user submits from: the repository, with data and an environment.

    Each Python of a job first executes `hook`.
    """
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    for path in (*ROOT.glob("*.py"), *packages, ROOT / "slurm"):
        (directory / path.name).symlink_to(path)
    programs = directory / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(
        f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={directory}/hook\n")
    # A link would be a Python without the packages of this one.
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "python").chmod(0o755)
    (directory / "hook").mkdir()
    (directory / "hook" / "sitecustomize.py").write_text(hook)
    shutil.copytree(data_dir, directory / "data")


def submit(*arguments) -> str:
    """Submit a job; return its number."""
    command = list(map(str, ["sbatch", "--parsable", *arguments]))
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def job(number: str) -> dict[str, str]:
    """Return what Slurm knows of a job."""
    command = ["scontrol", "--oneliner", "show", "job", number]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(re.findall(r"(\w+)=(\S+)", shown))


def wait_for(number: str, reached, seconds: float = 600) -> dict[str, str]:
    """Wait until `reached(job)`; a requeued job starts at once instead of two minutes later."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        known = job(number)
        if reached(known):
            return known
        if known["JobState"] == "PENDING" and known["Reason"] == "BeginTime":
            # The node refuses a job that it ended within the same second.
            time.sleep(5)
            subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"])
        time.sleep(0.5)
    raise AssertionError(f"{known['JobState']}: {log_of(number)}")


def ended(known: dict[str, str]) -> bool:
    """Return whether a job is over."""
    return known["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def log_of(number: str) -> str:
    """Return what a job has printed; a job that has just begun has no log yet."""
    return "".join(log.read_text() for log in Path().glob(f"*-{number}.log"))
