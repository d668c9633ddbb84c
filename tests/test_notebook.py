"""Several runs in one Python process, such as a notebook's kernel, do not touch each other."""

import logging
import runpy
import signal
import sys

import pytest
from helpers import ROOT, call, result

FLAGS = ["--dataset", "synthetic", "--device", "cpu", "--precision", "fp32", "--batch-size", "20",
         "--max-steps", "2"]
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def run_here(name: str, *flags) -> int:
    """Run a script in this process as %run does; return its exit status."""
    sys.argv = [f"{name}.py", *FLAGS, *map(str, flags)]
    try:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    except SystemExit as end:
        print(f"status {end.code}", flush=True)
        return end.code
    raise AssertionError("a script ends by SystemExit")


def run_two(first, second) -> None:
    """Run part 1 and then part 2, then part 1 again in the same directory."""
    before = [signal.getsignal(number) for number in STOPS]
    assert run_here("train_resnet", "--output-dir", first) == 0
    assert [signal.getsignal(number) for number in STOPS] == before
    assert not logging.getLogger("cifar100").handlers
    assert run_here("finetune_resnet18", "--weights", "random", "--image-size", 32,
                    "--output-dir", second) == 0
    # The directory is not locked. The limit counts from this start.
    assert run_here("train_resnet", "--output-dir", first) == 2
    assert run_here("train_resnet", "--output-dir", first, "--overwrite",
                    "--max-minutes", 0.001) == 75
    assert run_here("train_resnet", "--output-dir", first, "--resume") == 0
    assert [signal.getsignal(number) for number in STOPS] == before
    sys.modules["matplotlib.figure"] = None


def run_one(directory) -> None:
    """Run part 1."""
    run_here("train_resnet", "--output-dir", directory)


def test_runs_in_one_process_do_not_touch_each_other(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    process = call(run_two, first, second)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    epochs = [line for line in lines if " img/s" in line]
    assert len(epochs) == 3 and len(set(epochs)) == 3, "each line is printed once"
    logs = [(path / "log.txt").read_text() for path in (first, second)]
    assert [text.count("command    python") for text in logs] == [2, 1], "a start and its resume"
    assert "train_resnet.py" in logs[0] and "finetune_resnet18.py" not in logs[0]
    assert call(run_one, tmp_path / "alone").returncode == 0
    assert result(first) == result(tmp_path / "alone")


@pytest.mark.slow
def test_the_scripts_run_in_a_notebook_s_kernel(tmp_path):
    """%run twice in one kernel, then an interrupt reaches the kernel as it did before."""
    pytest.importorskip("ipykernel")
    manager = pytest.importorskip("jupyter_client.manager")
    kernel, client = manager.start_new_kernel(kernel_name="python3", cwd=str(ROOT))
    texts = []

    def execute(code: str) -> str:
        output = []
        client.execute_interactive(code, timeout=300, output_hook=lambda message: output.append(
            message["content"].get("text", "")))
        texts.append("".join(output))
        return texts[-1]

    try:
        for name, more in (("train_resnet", ""),
                           ("finetune_resnet18", "--weights random --image-size 32")):
            text = execute(f"%run {name}.py {' '.join(FLAGS)} {more} --output-dir "
                           f"{tmp_path / name}")
            assert text.count(" img/s") == 1 and text.count("final test accuracy") == 1, texts
            log = (tmp_path / name / "log.txt").read_text()
            assert log.count("final test accuracy") == 1 and f"python {name}.py" in log
        text = execute("import signal\nprint([signal.getsignal(s).__name__ if callable("
                       "signal.getsignal(s)) else signal.getsignal(s) for s in "
                       "(signal.SIGINT, signal.SIGTERM)], len(__import__('logging')"
                       ".getLogger('cifar100').handlers))")
        assert "default_int_handler" in text and text.endswith(" 0\n"), texts
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
