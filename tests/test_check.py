"""The node's own check: it finds planted faults, blames no missing GPU, and always ends.

`test_slurm.py` submits it. Nothing here was run on CUDA.
"""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

from slurm import check_node
from slurm.check_node import Checker, Failed, Skipped

KNOWN = {"versions": "torch 2", "gpus": [], "fastest": {"cpu": "bf16", "cuda": "fp16"}}
# A benchmark that takes no time, with the columns of the real one.
BENCHMARK = 'print(f"{\'train_resnet, training at 32\':36} {502.0:10.1f} {646:9.0f} {0.64:12.2f}")'


@pytest.fixture
def checker(tmp_path):
    """A checker of the CPU that has asked torch for nothing yet."""
    return Checker("cpu", tmp_path)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_table_is_in_columns():
    rows = [("one", "PASS", ""), ("longer", "FAIL", "why")]
    assert check_node.table(rows) == "one     PASS\nlonger  FAIL  why"
    assert check_node.table([]) == ""


def test_facts_are_a_line_each():
    """A processor is named once, not once a core."""
    facts = dict(check_node.facts())
    assert not [name for name, value in facts.items() if not value or "\n" in value]
    assert ";" not in facts["cpu"]
    assert f"torch {importlib.metadata.version('torch')}" in facts["packages"]


def test_a_result_leaves_out_times_alone(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"weights")
    (tmp_path / "metrics.csv").write_text("epoch,test_loss,seconds\n1,2.5,7\n")
    one = check_node.result(tmp_path)
    (tmp_path / "metrics.csv").write_text("epoch,test_loss,seconds\n1,2.5,8\n")
    assert check_node.difference(one, check_node.result(tmp_path)) == ""
    (tmp_path / "metrics.csv").write_text("epoch,test_loss,seconds\n1,2.6,7\n")
    assert check_node.difference(one, check_node.result(tmp_path)) == "test_loss of epoch 1"
    (tmp_path / "model.pt").write_bytes(b"Weights")
    assert check_node.difference(one, check_node.result(tmp_path)).startswith("model.pt, ")
    assert check_node.difference(one, {}) == ", ".join(one)


def test_a_check_that_fails_shows_its_command_and_the_end_of_its_output(checker, capsys):
    code = "print('first'); print('x\\n' * 40 + 'last'); raise SystemExit(3)"
    checker.check("broken", checker.run, python(code))
    checker.check("crashes", lambda: {}["key"])
    checker.check("absent", lacks_something)
    checker.check("fine", checker.run, python("print('never shown')"))
    assert [row[:2] for row in checker.rows] == [
        ("broken", "FAIL"), ("crashes", "FAIL"), ("absent", "SKIP"), ("fine", "PASS")]
    assert checker.rows[0][2] == "exit status 3, instead of 0"
    assert "KeyError" in checker.rows[1][2] and checker.rows[2][2] == "is not here"
    shown = capsys.readouterr().out
    assert f"$ {sys.executable} -c " in shown and "\n    last\n" in shown
    assert "    first\n" not in shown and "never shown" not in shown


def lacks_something() -> None:
    raise Skipped("is not here")


def test_a_command_that_hangs_is_ended(checker, monkeypatch):
    """Also one that ends well once it is told to, as the scripts do."""
    monkeypatch.setattr(check_node, "LIMIT", 1)
    ends_well = "import signal, time; signal.signal(15, lambda *_: exit()); time.sleep(600)"
    with pytest.raises(Failed, match="no end within 1 s"):
        checker.run(python(ends_well))


@pytest.mark.parametrize("left", [0.5, -1])
def test_when_the_time_is_over_the_rest_is_skipped(checker, left):
    checker.end = time.monotonic() + left
    with pytest.raises(Skipped, match="minutes for all checks are over"):
        checker.run(python("import time; time.sleep(600)"))


def test_a_signal_is_sent_once_the_file_is_there(checker, tmp_path):
    saved = tmp_path / "saved"
    code = f"import pathlib, time; pathlib.Path({str(saved)!r}).touch(); time.sleep(600)"
    checker.run(python(code), signal.SIGKILL, saved, status=-9)
    saved.unlink()
    with pytest.raises(Failed, match="exit status 0, SIGKILL after a step, instead of -9"):
        checker.run(python(""), signal.SIGKILL, saved, status=-9)


@pytest.mark.parametrize("wanted, gpus, job, verdict, device", [
    ("auto", [], False, "SKIP", "cpu"),
    ("auto", [], True, "FAIL", "cpu"),
    ("cuda", [], False, "FAIL", "cuda"),
    ("cpu", ["a GPU"], True, "SKIP", "cpu"),
    ("auto", ["a GPU"], True, "PASS", "cuda"),
])
def test_a_missing_gpu_is_a_fault_where_one_was_asked_for(tmp_path, monkeypatch, wanted, gpus, job,
                                                          verdict, device):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", "1")
    checker = Checker(wanted, tmp_path)
    said = "a warning about the driver\n" + json.dumps({**KNOWN, "gpus": gpus})
    monkeypatch.setattr(checker, "run", lambda _: said)
    checker.check("torch sees a GPU", checker.sees_gpu)
    assert (checker.rows[0][1], checker.device) == (verdict, device)


@pytest.mark.parametrize("device, fastest, tried", [
    ("cpu", "fp32", ["fp32"]), ("cpu", "bf16", ["fp32", "bf16"]),
    ("cuda", "fp16", ["fp32", "fp16"]), ("cuda", "bf16", ["fp32", "bf16", "fp16"]),
])
def test_the_precisions_that_a_device_has_are_tried(checker, monkeypatch, device, fastest, tried):
    checker.device, checker.fastest = device, fastest
    monkeypatch.setattr(checker, "undisturbed", lambda *_: {})
    for precision in ("fp32", "bf16", "fp16"):
        checker.check(precision, checker.trains, "train_resnet", precision)
    assert [name for name, verdict, _ in checker.rows if verdict == "PASS"] == tried


@pytest.mark.parametrize("device, promised, verdict", [
    ("cpu", "", "FAIL"), ("cpu", "on one GPU", "FAIL"), ("cuda", "", "FAIL"),
    ("cuda", "on one GPU", "SKIP"),
])
def test_other_bits_are_a_fault_where_the_same_are_promised(checker, monkeypatch, device, promised,
                                                            verdict):
    checker.device = device
    monkeypatch.setattr(checker, "finish", lambda *_: {"model.pt": "1"})
    for other in "12":
        checker.check(other, resumed, checker, {"model.pt": other}, promised)
    assert [row[1] for row in checker.rows] == ["PASS", verdict]
    assert "model.pt" in checker.rows[1][2]


def resumed(checker: Checker, whole: dict, promised: str) -> None:
    checker.said = "device\nresume     after 3 steps\n"
    checker.goes_on([], whole, promised)


def test_a_run_that_begins_again_has_not_resumed(checker, monkeypatch):
    monkeypatch.setattr(checker, "finish", lambda *_: {})
    checker.said = "device\n"
    with pytest.raises(Failed, match="began again"):
        checker.goes_on([], {}, "")


def plant(path: Path, text: str, fault: str) -> None:
    """Put a fault in place of a text that a file holds once."""
    content = path.read_text()
    assert content.count(text) == 1
    path.write_text(content.replace(text, fault))


@pytest.fixture
def faulty(tmp_path) -> Path:
    """A checkout whose resumed runs have lost their random numbers and whose part 2 crashes."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "slurm", checkout / "slurm")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, checkout)
    (checkout / "results").mkdir()
    (checkout / "results" / "benchmark.py").write_text(BENCHMARK)
    plant(checkout / "engine.py", 'torch.set_rng_state(of_rank["cpu_rng"])', "pass")
    plant(checkout / "finetune_resnet18.py", "args = parse_args()", "raise TypeError('planted')")
    return checkout


@pytest.mark.slow
def test_by_hand_it_finds_planted_faults_and_completes_its_table(tmp_path, faulty):
    """It runs without .venv, Slurm, git and a compiler, and leaves nothing behind."""
    for name in ("programs", "tmp"):
        (tmp_path / name).mkdir()
    python3 = tmp_path / "programs" / "python3"
    python3.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python3.chmod(0o755)
    before = files(faulty)
    environment = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    process = subprocess.run(
        [shutil.which("bash"), "slurm/check.sbatch", "--device", "cpu"], cwd=faulty, text=True,
        env={**environment, "PATH": str(python3.parent), "TMPDIR": str(tmp_path / "tmp")},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.returncode == 1, process.stdout
    details, _, table = process.stdout.rpartition("\n\n")
    first, second = check_node.PARTS
    for row in (f"{first} in fp32 +PASS$", f"{first} in fp16 +SKIP  this CPU",
                f"{second} in fp32 +FAIL  exit status 1", f"{second} killed and resumed +FAIL ",
                f"{first} killed and resumed +FAIL  the resumed run differs .* in model.pt, ",
                f"{first} stopped and resumed +FAIL  the resumed run differs",
                f"{first} compiled, killed and resumed +SKIP  --compile needs g",
                f"{first} in several processes +FAIL  the resumed run differs",
                "speed is measured +PASS$",
                f"{first}, training at 32 +FACT  502.0 images/s, 646 GFLOP/s$"):
        assert re.search(f"^{row}", table, re.MULTILINE), (row, process.stdout)
    assert "TypeError: planted" in details and f" {first}.py --output-dir " in details
    assert " --resume    # exit status 0\n" in details
    assert files(faulty) == before and not files(tmp_path / "tmp")


def files(directory: Path) -> set[Path]:
    """Return what a directory holds at any depth, but for Python's own caches."""
    return {path for path in directory.rglob("*") if "__pycache__" not in path.parts}
