"""Run all tests with the oldest versions allowed, with the newest, and with the last for CUDA 12.

    python tests/versions.py --envs DIR                                     everything, some hours
    python tests/versions.py --envs DIR --only oldest -- -m 'not slow'      quick tests, one of them
    python tests/versions.py --envs DIR --only oldest newest -- -x tests/test_data.py

What stands after -- goes to pytest. pip makes each environment in DIR/NAME, outside the checkout,
and needs 3 to 6 GB for it. The Pythons named below must be on the PATH or come from pyenv. Each
environment gives a row of the table "Versions" in results/README.md. Between any two of them whose
torch differs a stopped run changes hands: what one saved, the other must read to the bit and go on
with.
The exit status is 1 if a test or a resumption fails.
"""

import argparse
import datetime
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchvision", "numpy", "tqdm")
COLUMNS = ("", "torch", "torchvision", "Python", "numpy", "tqdm",
           "passed", "skipped", "failed", "date")
# Name: Python, and what is pinned. Of "oldest" all is pinned, to the lower bounds.
ENVIRONMENTS = {
    "oldest": ("3.10", None),
    # The last on PyPI whose wheels ask for nvidia-*-cu12; from 2.11 on they ask for CUDA 13.
    "cuda12": ("3.12", ("torch==2.10.*", "torchvision==0.25.*")),
    "newest": ("3.13", ("torch==2.14.1", "torchvision==0.29.1")),
}
ASK_VERSIONS = f"""
import json, platform, importlib.metadata, torch
versions = {{name: importlib.metadata.version(name) for name in {PACKAGES}}}
print(json.dumps({{**versions, "torch": torch.__version__, "Python": platform.python_version()}}))
"""
DIGEST = """
import hashlib, sys, torch, utils
def digest(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), *value.shape, hashlib.sha256(value.numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: digest(each) for key, each in value.items()}
    return list(map(digest, value)) if isinstance(value, (list, tuple)) else value
print(digest(utils.load_tensors(sys.argv[1])))
"""


def lower_bounds(path: Path = ROOT / "tests" / "requirements.txt") -> list[str]:
    """Return the requirements of a file, and of those that it includes, pinned to their bounds."""
    pins = []
    for line in path.read_text().splitlines():
        if included := re.fullmatch(r"-r (\S+)", line):
            pins += lower_bounds(path.parent / included[1])
        elif line and not line.startswith("#"):
            pins.append(line.replace(">=", "=="))
    return pins


def find_python(version: str) -> str:
    """Return the path of an interpreter of this version, such as 3.10."""
    from_pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    found = from_pyenv[-1] if from_pyenv else shutil.which(f"python{version}")
    if not found:
        give_up(f"Python {version} is neither from pyenv nor on the PATH")
    return str(found)


def make_environment(directory: Path, name: str) -> Path:
    """Make or complete the environment `name`, and return its interpreter."""
    version, pins = ENVIRONMENTS[name]
    python = directory / name / "bin" / "python"
    if not python.exists():
        subprocess.run([find_python(version), "-m", "venv", directory / name], check=True)
    wanted = lower_bounds() if pins is None else ["-r", ROOT / "tests" / "requirements.txt", *pins]
    # Wheels alone: what has none for this Python would be compiled for minutes, and fail.
    pip = [python, "-m", "pip", "install", "-q", "--no-cache-dir", "--only-binary", ":all:"]
    if subprocess.run([*pip, *wanted]).returncode:
        give_up(f"pip cannot install the environment {name} in {directory}")
    return python


def run_tests(python: Path, arguments: list[str]) -> list[int]:
    """Run pytest in the checkout, by default all tests; return how many passed, skipped, failed."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "results.xml"
        command = [python, "-m", "pytest", "-q", "-m", "", f"--junitxml={path}", *arguments]
        # The rows alone go to stdout.
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
        if not path.exists():
            give_up("pytest did not run to its end")
        suite = ElementTree.parse(path).find("testsuite")
    total, skipped, failures, errors = (int(suite.get(name)) for name in
                                        ("tests", "skipped", "failures", "errors"))
    return [total - skipped - failures - errors, skipped, failures + errors]


def ask_versions(python: Path) -> dict[str, str]:
    """Return the versions of an environment; torch's has its CUDA's, as in 2.10.0+cu128."""
    return json.loads(output([python, "-c", ASK_VERSIONS]).stdout)


def hand_over(writer: Path, reader: Path) -> str:
    """Stop a run with one interpreter, finish it with another; return what went wrong, if any."""
    with tempfile.TemporaryDirectory() as directory:
        # float32, as torch 2.10 does not know which CPUs compute in bf16.
        flags = ["--dataset", "synthetic", "--batch-size", "50", "--max-steps", "3", "--low-res",
                 "1", "--precision", "fp32", "--output-dir", directory]
        stopped = output([writer, "train_resnet.py", *flags, "--max-minutes", "0.001"])
        if stopped.returncode != 75:
            return f"the first part ended with {stopped.returncode}: {stopped.stderr}"
        read = [output([python, "-c", DIGEST, f"{directory}/checkpoint.pt"]).stdout
                for python in (writer, reader)]
        if not read[0] or read[0] != read[1]:
            return "the checkpoint is not read to the bit"
        resumed = output([reader, "train_resnet.py", *flags, "--resume"])
        if resumed.returncode:
            return f"the second part ended with {resumed.returncode}: {resumed.stderr}"
        if "the end will not be the same bits" not in resumed.stdout:
            return "no note says that the bits will differ"
        tested = output([writer, "train_resnet.py", "--eval-only", "--output-dir", directory])
        return "" if tested.returncode == 0 else f"model.pt is not read: {tested.stderr}"


def output(command: list) -> subprocess.CompletedProcess:
    """Run a command in the checkout, and return its status and texts."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def give_up(reason: str) -> None:
    """End with one line on stderr and status 2."""
    print(f"versions.py: {reason}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Environments, tests, rows, resumptions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, required=True, metavar="DIR", help="outside of here")
    parser.add_argument("--only", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS))
    parser.add_argument("arguments", nargs="*", help="of pytest, after --")
    args = parser.parse_args()
    directory = args.envs.resolve()
    if directory.is_relative_to(ROOT):
        give_up(f"--envs {args.envs}: is inside the checkout, whose tests would look into it")
    pythons = {name: make_environment(directory, name) for name in args.only}
    versions = {name: ask_versions(python) for name, python in pythons.items()}
    print(f"|{' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", sep="\n", flush=True)
    failed = 0
    for name, python in pythons.items():
        *_, errors = counts = run_tests(python, args.arguments)
        failed += errors
        cells = [name, *(versions[name][column] for column in COLUMNS[1:6]), *counts,
                 datetime.date.today()]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    for writer, reader in itertools.permutations(pythons, 2):
        if versions[writer]["torch"] != versions[reader]["torch"]:
            reason = hand_over(pythons[writer], pythons[reader])
            failed += bool(reason)
            print(f"{writer} to {reader}: {reason or 'resumed'}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
