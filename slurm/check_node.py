"""Checks that this machine runs both scripts as the main README.md promises.

    python slurm/check_node.py                 on the GPUs, if there are any, else on the CPU
    python slurm/check_node.py --device cpu

Facts come first, then a line for each check, then a table of all. A failed check prints its
commands and the end of what they said, so the whole output is a bug report. The status is 0 if no
check failed, else 1. Images and weights are made up, and everything is written into a temporary
directory. This process itself never touches a GPU, for some clusters allow it one process alone.
"""

import argparse
import csv
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]
PARTS = ("train_resnet", "finetune_resnet18")
LIMIT = 240  # seconds after which a command counts as hanging; compiling takes up to 150
DEADLINE = 13 * 60  # seconds for all checks; the job has 15 minutes and ends with the table
LINES = 30  # of a failed command's output that are shown
# Ten steps, and a checkpoint at each.
FLAGS = ["--dataset", "synthetic", "--max-steps", "10", "--checkpoint-minutes", "0"]
# After ten steps at part 1's usual rate, activations in evaluation come near the limit of fp16.
# Dropout draws random numbers in each step, with which a resumed run must go on.
OF_PART = {"train_resnet": ["--lr", "0.01", "--dropout", "0.1"],
           "finetune_resnet18": ["--weights", "random"]}
# A CPU takes small batches of small images, a GPU those of the recipe.
SMALL = {"train_resnet": ["--batch-size", "20"],
         "finetune_resnet18": ["--batch-size", "20", "--image-size", "32"]}


class Failed(Exception):
    """What is checked does not hold."""


class Skipped(Exception):
    """What the check needs is not here."""


def describe_torch() -> None:
    """Print as JSON what torch says of this machine; `sees_gpu` runs this as a process."""
    import torch

    import utils

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = {dtype: name for name, dtype in utils.PRECISIONS.items()}
    print(json.dumps({
        "versions": f"torch {torch.__version__}, CUDA {torch.version.cuda}, "
                    f"cuDNN {torch.backends.cudnn.version()}",
        "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, "
                 f"compute capability {gpu.major}.{gpu.minor}" for gpu in gpus],
        "fastest": {device: names[utils.fastest_dtype(torch.device(device))]
                    for device in (["cpu", "cuda"] if gpus else ["cpu"])}}))


def facts() -> Iterator[tuple[str, str]]:
    """Yield the names and values of what is known of this machine without torch."""
    yield "date", datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    yield "host", f"{platform.node()}, {platform.platform()}"
    yield "python", f"{platform.python_version()}, {sys.executable}"
    yield "packages", ", ".join(f"{package.name} {package.version}"
                                for package in importlib.metadata.distributions()
                                if package.name in ("torch", "torchvision", "numpy", "tqdm"))
    commit = ask("git", "log", "-1", "--format=commit %h of %cs") or "no commit is known"
    changed = ask("git", "status", "--porcelain", "--untracked-files=no")
    yield "checkout", f"{ROOT}, {commit}{', changed since' if changed else ''}"
    query = "--query-gpu=driver_version,name,memory.total"
    yield "nvidia-smi", ask("nvidia-smi", query, "--format=csv,noheader") or "says nothing"
    cpu = ask("sed", "-n", "/^model name/{s/.*: //p;q}", "/proc/cpuinfo")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cpu", f"{cpu or platform.machine()}, {cores} cores for this process"
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        yield name, os.environ.get(name, "not set")


def ask(*command: str) -> str:
    """Return what a command prints; nothing if it fails or is not installed."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if process.returncode else "; ".join(process.stdout.splitlines())


def result(directory: Path) -> dict[str, str]:
    """Return, by name, all in which a resumed run must equal an undisturbed one."""
    sys.path.insert(0, str(ROOT))
    from report import TIMES

    values = {"model.pt": hashlib.sha256((directory / "model.pt").read_bytes()).hexdigest()}
    with open(directory / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            values |= {f"{name} of epoch {row['epoch']}": value for name, value in row.items()
                       if name not in TIMES}
    return values


def difference(one: dict[str, str], other: dict[str, str]) -> str:
    """Return the names of what differs between two results."""
    return ", ".join(name for name in {**one, **other} if one.get(name) != other.get(name))


def table(rows: list[tuple[str, str, str]]) -> str:
    """Format rows of name, verdict and reason in columns."""
    width = max((len(name) for name, _, _ in rows), default=0)
    return "\n".join(f"{name:{width}}  {verdict}  {reason}".rstrip()
                     for name, verdict, reason in rows)


class Checker:
    """Makes checks one after the other, and keeps a row of each."""

    def __init__(self, device: str, directory: Path):
        self.wanted, self.directory = device, directory
        self.device = "cpu" if device == "auto" else device
        self.gpus: list[str] = []
        self.fastest = "fp32"  # the precision that the scripts would choose
        self.rows: list[tuple[str, str, str]] = []  # name, PASS, FAIL, SKIP or FACT, and why
        self.commands: list[str] = []  # of the check at work
        self.said = ""  # by the last of them
        self.results: dict[str, dict[str, str]] = {}  # of undisturbed runs, by their command
        self.end = time.monotonic() + DEADLINE

    def check(self, name: str, function: Callable[..., str | None], *arguments: str | int) -> None:
        """Make one check and keep its row; if it fails, show its commands and the last output."""
        print(f"{name} ... ", end="", flush=True)
        began, self.commands, self.said = time.monotonic(), [], ""
        try:
            verdict, reason = "PASS", function(*arguments) or ""
        except Skipped as error:
            verdict, reason = "SKIP", str(error)
        except Exception as error:
            verdict, reason = "FAIL", str(error) if isinstance(error, Failed) else repr(error)
        self.rows.append((name, verdict, reason))
        print(f"{verdict}, {time.monotonic() - began:.0f} s", flush=True)
        if verdict == "FAIL":
            lines = [reason, *self.commands, *self.said.splitlines()[-LINES:]]
            print("\n".join(f"    {line}" for line in lines), flush=True)
        # What a failed check has left would be in the way of the next one.
        for run in ("undisturbed", "interrupted"):
            shutil.rmtree(self.directory / run, ignore_errors=True)

    def run(self, command: list[str], stop: int = 0, saved: Path | None = None,
            status: int = 0) -> str:
        """Run a command and return what it says; the signal `stop` is sent once `saved` exists.

        Raises Failed unless it ends in time, with `status`.
        """
        limit = min(LIMIT, self.end - time.monotonic())
        output = self.directory / "output.txt"
        with output.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            ended = wait(process, limit, stop, saved)
        finally:
            end(process)
        self.said = output.read_text(errors="replace")
        how = f"exit status {process.returncode}" if ended else f"no end within {limit:.0f} s"
        sent = f", {signal.Signals(stop).name} after a step" if stop else ""
        self.commands.append(f"$ {shlex.join(command)}    # {how}{sent}")
        if not ended and limit < LIMIT:
            raise Skipped(f"the {DEADLINE // 60} minutes for all checks are over")
        if not ended or process.returncode != status:
            raise Failed(f"{how}{sent}, instead of {status}")
        return self.said

    def sees_gpu(self) -> str:
        """Ask torch for GPUs, and choose the device if it is not given."""
        code = "from slurm import check_node; check_node.describe_torch()"
        known = json.loads(self.run([sys.executable, "-c", code]).splitlines()[-1])
        self.gpus = known["gpus"]
        if self.wanted == "auto" and self.gpus:
            self.device = "cuda"
        self.fastest = known["fastest"].get(self.device, "fp32")
        if self.wanted == "cpu":
            raise Skipped(f"--device cpu; {known['versions']}")
        if self.gpus:
            return "; ".join([*self.gpus, known["versions"]])
        if self.wanted == "cuda" or "SLURM_JOB_ID" in os.environ:
            raise Failed(f"it sees none; {known['versions']}")
        raise Skipped(f"it sees none; {known['versions']}")

    def command(self, part: str, name: str, *flags: str, processes: int = 1) -> list[str]:
        """Return the command of a run into the directory `name`."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        launcher = [*torchrun, str(processes)] if processes > 1 else []
        small = SMALL[part] if self.device == "cpu" else []
        return [sys.executable, *launcher, f"{part}.py", "--output-dir", str(self.directory / name),
                "--device", self.device, *FLAGS, *OF_PART[part], *small, *flags]

    def finish(self, command: list[str], name: str) -> dict[str, str]:
        """Run a command to the end of its run in the directory `name`; return the run's result."""
        if "final test accuracy" not in self.run(command):
            raise Failed("the last line, with the final test accuracy, is missing")
        return result(self.directory / name)

    def undisturbed(self, part: str, *flags: str, processes: int = 1) -> dict[str, str]:
        """Return the result of a run without interruption, which is made once."""
        command = self.command(part, "undisturbed", *flags, processes=processes)
        key = shlex.join(command)
        if key in self.results:
            self.commands.append(f"$ {key}    # exit status 0, in a check above")
        else:
            self.results[key] = self.finish(command, "undisturbed")
        return self.results[key]

    def trains(self, part: str, precision: str) -> None:
        """Check that a script runs to its end in a precision."""
        if self.device == "cpu" and precision not in ("fp32", self.fastest):
            raise Skipped(f"this CPU does not compute in {precision}")
        if self.device == "cuda" and precision == "bf16" and self.fastest != "bf16":
            raise Skipped("needs a GPU of compute capability 8.0")
        self.undisturbed(part, "--precision", precision)

    def resumes(self, part: str, stop: int, *more: str) -> None:
        """Check that a run that gets a signal after its first step ends as an undisturbed one."""
        compiler = "gcc" if self.device == "cuda" else "g++"
        if "--compile" in more and not shutil.which(compiler):
            raise Skipped(f"--compile needs {compiler}, which is not installed")
        flags = ("--precision", self.fastest, *more)
        whole = self.undisturbed(part, *flags)
        command = self.command(part, "interrupted", *flags)
        # The first checkpoint, made before the first step, gets this name when the second is made.
        saved = self.directory / "interrupted" / "checkpoint-previous.pt"
        self.run(command, stop, saved, status=75 if stop == signal.SIGUSR2 else -stop)
        self.goes_on(command, whole, "without --compile" if "--compile" in more else "")

    def several(self) -> None:
        """Check that several processes train, stop together and resume."""
        processes = len(self.gpus) if self.device == "cuda" else 2
        if processes < 2:
            raise Skipped("needs several GPUs")
        flags = ("--precision", self.fastest)
        whole = self.undisturbed(PARTS[0], *flags, processes=processes)
        command = self.command(PARTS[0], "interrupted", *flags, processes=processes)
        # It stops after one step, under torchrun with status 0.
        self.run([*command, "--max-minutes", "0.001"])
        self.goes_on(command, whole, "on one GPU")

    def goes_on(self, command: list[str], whole: dict[str, str], promised: str) -> None:
        """Resume a run and compare its end. GPUs may give the same bits only as is `promised`."""
        values = self.finish([*command, "--resume"], "interrupted")
        if "\nresume " not in self.said:
            raise Failed("the run began again instead of going on")
        if differs := difference(whole, values):
            if promised and self.device == "cuda":
                raise Skipped(f"the bits differ, and are promised only {promised} ({differs})")
            raise Failed(f"the resumed run differs from the undisturbed one in {differs}")

    def measures(self) -> None:
        """Measure how fast both parts are beside the matrix product; none is too slow."""
        # With the recipe's batches one slow core takes longer than LIMIT.
        small = ["--batch-size", "50"] if self.device == "cpu" else []
        said = self.run([sys.executable, "results/benchmark.py", "--device", self.device,
                         "--seconds", "1", "--rounds", "1", *small])
        print(f"\n{said}")
        for line in said.splitlines():
            # The columns are those of the benchmark's table.
            name, images, gflop = line[:36].strip(), line[36:47].strip(), line[47:57].strip()
            if name.startswith(("matrix product", *(f"{part}, training" for part in PARTS))):
                images = f"{images} images/s, " if images else ""
                self.rows.append((name, "FACT", f"{images}{gflop} GFLOP/s"))

    def check_all(self) -> None:
        """Make every check."""
        first, kill = PARTS[0], signal.SIGKILL
        self.check("torch sees a GPU", self.sees_gpu)
        for part in PARTS:
            for precision in ("fp32", "bf16", "fp16"):
                self.check(f"{part} in {precision}", self.trains, part, precision)
        for part in PARTS:
            self.check(f"{part} killed and resumed", self.resumes, part, kill)
        self.check(f"{first} stopped and resumed", self.resumes, first, signal.SIGUSR2)
        self.check(f"{first} compiled, killed and resumed", self.resumes, first, kill, "--compile")
        self.check(f"{first} in several processes", self.several)
        self.check("speed is measured", self.measures)


def wait(process: subprocess.Popen, limit: float, stop: int, saved: Path | None) -> bool:
    """Wait for a process, signal it once `saved` exists, and return whether it has ended."""
    last = time.monotonic() + limit
    while process.poll() is None and time.monotonic() < last:
        if stop and saved.exists():
            process.send_signal(stop)
            stop = 0
        time.sleep(0.01)
    return process.poll() is not None


def end(process: subprocess.Popen) -> None:
    """End a process if it is still there. torchrun ends its own processes at SIGTERM alone."""
    process.terminate()
    try:
        process.wait(40)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> None:
    """Print the facts, make every check, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto: the GPUs, if there are any, else the CPU")
    args = parser.parse_args()
    # Also when it is interrupted it prints the table and leaves nothing behind.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda signum, _: sys.exit(128 + signum))
    print("\n".join(f"{name:20}  {value}" for name, value in facts()), end="\n\n", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="check_node-") as directory:
        # torchrun leaves files behind. Compiled code of other days is neither used nor replaced.
        os.environ |= {"TMPDIR": directory, "TORCHINDUCTOR_CACHE_DIR": f"{directory}/compiled"}
        checker = Checker(args.device, Path(directory))
        try:
            checker.check_all()
        finally:
            print(f"\n{table(checker.rows)}")
    failed = sum(verdict == "FAIL" for _, verdict, _ in checker.rows)
    print(f"{failed} FAIL, {(time.monotonic() - began) / 60:.1f} minutes")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
