"""results/gpu_session.sh runs each part whatever becomes of the others, and prints its table last.

A stand-in for Python notes each command. The slow test runs the checks themselves on the CPU, where
a tape stands in for the graphs (tape.py).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, script

SESSION = ROOT / "results" / "gpu_session.sh"
CHECKS = ["gpu_bits.py", "gpu_replay.py", "benchmark.py", "-m pytest -m cuda"]
# It fails as $FAILS says, and stops the run that $STOPS names with a checkpoint of 20 MB. A run
# that goes on finds the checkpoint.
PYTHON = r"""#!/bin/bash
printf '%q ' "$@" | tr '\n' ' ' >>"$COMMANDS"
echo >>"$COMMANDS"
case "$*" in
  *"$FAILS"*) echo "it breaks"; exit 7 ;;
  *gpu_bits*) echo "row: bits: all | ok: equal to the bit | 12" ;;
  results/benchmark*) printf '%-36s %10s %9s\n' "train_resnet, training at 20" 11173.0 5625 ;;
  *.py" --epochs"*)
    directory=$(sed 's/.*--output-dir \([^ ]*\).*/\1/' <<<"$*")
    mkdir -p "$directory"
    touch "$directory"/{config.json,log.txt}
    printf 'dataset,epoch,seconds,eta_seconds\ncifar100,1,1.5,9\ncifar100,2,2,0\n' \
      >"$directory/metrics.csv"
    if [ -e "$directory/checkpoint.pt" ]; then echo "goes on" >>"$COMMANDS"; fi
    if [[ "$*" == *"$STOPS"* ]]; then
      head -c 20000000 /dev/zero >"$directory/checkpoint.pt"
      echo "train_resnet.py: --max-minutes 1: stopped in epoch 2 after 3 steps, saved in it"
      exit 75
    fi
    printf 'peak memory 1.30 GB\nfinal test accuracy 65.92%% (above)\n' ;;
esac
"""


@pytest.fixture
def session(tmp_path):
    """Return a function that runs the session by a stand-in; it returns process and commands."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(PYTHON)
    (tmp_path / "bin" / "python3").chmod(0o755)
    commands = tmp_path / "commands"

    def run(*flags, fails="nothing", stops="nothing"):
        commands.write_text("")
        process = subprocess.run(
            ["bash", SESSION, *map(str, flags)], cwd=ROOT, text=True, capture_output=True,
            env=os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "FAILS": fails,
                              "STOPS": stops, "COMMANDS": str(commands)})
        return process, commands.read_text().splitlines()

    return run


def table_of(process, out) -> list[str]:
    """Return the table, with which the output ends."""
    table = (out / "table.txt").read_text()
    assert process.stdout.endswith(f"\n== The table\n{table}")
    return table.splitlines()


def test_the_shell_reads_it():
    subprocess.run(["bash", "-n", SESSION], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck")
    subprocess.run(["shellcheck", SESSION], check=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_command_has_a_file_and_flags_that_there_are(session, tmp_path, device):
    (tmp_path / "data.gz").touch()
    (tmp_path / "a b.pth").touch()
    process, commands = session("--device", device, "--out", tmp_path / "out", "--data",
                                tmp_path / "data.gz", "--weights", tmp_path / "a b.pth")
    table = table_of(process, tmp_path / "out")
    assert process.returncode == 0, process.stdout + process.stderr
    assert all(any(check in command for command in commands) for check in CHECKS)
    runs = [line for line in table if re.match(r"\w+\.py --epochs", line)]
    assert len(runs) == 16 and all("65.92 % after 3.5 s" in line for line in runs)
    assert any("11173.0 images/s, 5625 GFLOP/s" in line for line in table)
    seen, known = set(), {}
    for command in commands:
        if command.partition(" ")[0].endswith(".py"):
            name, *flags = shlex.split(command)
            assert (ROOT / name).is_file()
            seen |= {(name, flag) for flag in flags if flag.startswith("--")}
    for name, flag in sorted(seen):
        if name not in known:
            known[name] = script(name.removesuffix(".py"), "--help").stdout
        assert re.search(rf"{flag}\b", known[name]), (name, flag)
    assert ("train_resnet.py", "--max-minutes") in seen


@pytest.mark.parametrize("fails", ["gpu_bits.py", "benchmark.py", "--epochs 20 --seed 1"])
def test_a_part_that_fails_does_not_end_the_others(session, tmp_path, fails):
    process, commands = session("--device", "cpu", "--out", tmp_path, fails=fails)
    table = table_of(process, tmp_path)
    assert process.returncode == 1
    assert any("FAILED" in line for line in table)
    assert all(any(check in command for command in commands) for check in CHECKS)
    assert "finetune_resnet18.py --epochs 10 --seed 1" in table[-1 - (fails not in CHECKS)]
    assert "it breaks" in (tmp_path / "log.txt").read_text()


def test_a_stopped_run_goes_on_in_the_next_call_and_finished_ones_are_skipped(session, tmp_path):
    flags, stops = ["--device", "cpu", "--only", "accuracy", "--out"], "--epochs 20 --seed 2"
    process, commands = session(*flags, tmp_path / "one", stops=stops)
    assert process.returncode == 0 and len(commands) == 3
    first = table_of(process, tmp_path / "one")
    assert "stopped in epoch 2 after 3 steps" in first[-1]
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["log.txt", "runs.tar", "stopped.tar-aa", "stopped.tar-ab", "table.txt"]
    assert all(path.stat().st_size <= 2**24 for path in (tmp_path / "one").iterdir())
    process, commands = session(*flags, tmp_path / "two", "--from", tmp_path / "one")
    second = table_of(process, tmp_path / "two")
    assert second[:2] == first[:2] and len(second) == 16
    assert stops in commands[0] and commands.count("goes on") == 1 and commands[1] == "goes on"
    assert len(commands) == 15
    process, _ = session(*flags, tmp_path / "one", "--from", tmp_path / "one")
    assert process.returncode == 2 and "has the table of a session" in process.stderr
    assert (tmp_path / "one" / "stopped.tar-aa").exists()


def test_what_there_is_no_time_for_is_said(session, tmp_path):
    process, commands = session("--device", "cpu", "--out", tmp_path, "--minutes", 0)
    assert process.returncode == 1 and not commands
    assert all("not started: " in line for line in table_of(process, tmp_path))


@pytest.mark.parametrize("flags", [
    ["--what", 1], ["--data"], ["--data", "missing"], ["--minutes", "1.5"], ["--only", "bit"],
    ["--from", "missing"]])
def test_a_mistake_in_the_flags_is_one_line(session, flags):
    process, commands = session(*flags)
    assert process.returncode in (1, 2) and not commands and not process.stdout
    assert process.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("what", ["gpu_bits", "gpu_replay"])
def test_the_checks_pass_on_the_cpu(what):
    process = subprocess.run([sys.executable, f"results/{what}.py", "cpu"], cwd=ROOT, text=True,
                             capture_output=True)
    rows = re.findall("^row: .*", process.stdout, re.MULTILINE)
    assert process.returncode == 0 and len(rows) == {"gpu_bits": 13, "gpu_replay": 8}[what], rows
