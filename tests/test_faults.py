"""No run is ever lost: killed, stopped, starved of disk or handed rubbish, it ends the same."""

import functools
import itertools
import os
import random
import signal
import stat
import time

import pytest
import torch
from conftest import contents, write_binary
from processes import call, script
from torch.nn.modules.module import register_module_forward_hook

import utils

SMALL = {"train_resnet": [], "finetune_resnet18": ["--weights", "random", "--image-size", "32"]}
KILLS = ("clock", "batch", "torn", "whole", "renamed")
EVERY_STEP = ["--checkpoint-minutes", "0"]
both = pytest.mark.parametrize("name", SMALL)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, arrays):
    """200 training and 100 test images."""
    return write_binary(tmp_path_factory.mktemp("data"), arrays)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir):
    """A run of each script that nothing disturbs: epochs of 10 and of 5 steps."""
    call(print)  # the first call starts the server, and takes its time
    return {name: Whole(name, tmp_path_factory.mktemp(name), data_dir) for name in SMALL}


class Whole:
    """An undisturbed run: its flags, its last line, and what it left in `output_dir`."""

    def __init__(self, name, output_dir, data_dir, *flags):
        self.name = name
        self.flags = [*SMALL[name], "--data-dir", data_dir, "--device", "cpu", "--resume"]
        self.flags += flags or ["--epochs", 2, "--batch-size", 20, "--max-steps", 15]
        began = time.monotonic()
        process = script(name, *self.flags, "--output-dir", output_dir)
        self.seconds = time.monotonic() - began
        assert (process.returncode, process.stderr) == (0, "")
        self.files = contents(output_dir)
        self.last_line = process.stdout.splitlines()[-1]

    def script(self, output_dir, *flags, **kwargs):
        """Run the same command line for another output directory, perhaps with free flags."""
        return script(self.name, *self.flags, "--output-dir", output_dir, *flags, **kwargs)

    def assert_same_end(self, process, output_dir):
        """Assert that `process` ended as the undisturbed run did, to the bit."""
        assert (process.returncode, process.stderr) == (0, "")
        assert process.stdout.splitlines()[-1] == self.last_line
        files = contents(output_dir)
        assert set(files) | {"checkpoint-previous.pt"} == set(utils.RUN_FILES), "nothing is left"
        for file in ("metrics.csv", "model.pt"):
            assert files[file] == self.files[file], f"{file} differs"


def at_batch(number: int, action) -> None:
    """Have `action()` called after the forward pass of batch `number` of this process, from 1."""
    batches = itertools.count(1)

    def hook(module, *_):
        if isinstance(module, torch.nn.Linear) and next(batches) == number:
            action()

    register_module_forward_hook(hook)


def kill() -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_write(moment: str, number: int, part: float) -> None:
    """Kill this process at a moment of its file number `number`, from 1.

    "torn": `part` of the temporary file is on the disk; "whole": all of it, under its temporary
    name; "renamed": under its own name, and nothing after that is done.
    """
    count = itertools.count(1)
    fsync, replace = os.fsync, os.replace

    def torn_fsync(descriptor):
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if moment == "torn" and is_file and next(count) == number:
            os.truncate(descriptor, int(part * os.fstat(descriptor).st_size))
            kill()
        fsync(descriptor)

    def cut_replace(source, target):
        reached = moment != "torn" and next(count) == number
        if reached and moment == "whole":
            kill()
        replace(source, target)
        if reached:
            kill()

    os.fsync, os.replace = torn_fsync, cut_replace


def draw_kill(rng: random.Random, seconds: float) -> tuple[str, dict]:
    """Draw what kills the next start: its kind, and keywords of `script`."""
    kind = rng.choice(KILLS)
    if kind == "clock":
        return kind, {"kill_after": rng.uniform(0, seconds)}
    if kind == "batch":
        return kind, {"before": functools.partial(at_batch, rng.randint(1, 17), kill)}
    arguments = kind, rng.randint(1, 12), rng.random()
    return kind, {"before": functools.partial(kill_at_write, *arguments)}


@both
def test_a_run_killed_at_any_moment_ends_the_same(whole, name, tmp_path, pytestconfig):
    """Always the same command line; in batches, evaluations, saves, and between them."""
    run, wanted = whole[name], -(-pytestconfig.getoption("kills") // len(SMALL))
    rng, kills, runs = random.Random(name), dict.fromkeys(KILLS, 0), 0
    while sum(kills.values()) < wanted:
        output_dir, log, status = tmp_path / str(runs), [], -1
        while status:
            kind, how = draw_kill(rng, run.seconds) if sum(kills.values()) < wanted else ("", {})
            process = run.script(output_dir, *rng.choice([EVERY_STEP, []]), **how)
            status = process.returncode
            assert status in (0, -signal.SIGKILL), process.stderr
            if status:
                kills[kind] += 1
            log += [line.split()[1] for line in process.stdout.splitlines() if "img/s" in line]
            assert log == sorted(set(log)), "the appended log tells each epoch once, in order"
        run.assert_same_end(process, output_dir)
        runs += 1
    print(f"{name}: {sum(kills.values())} kills in {runs} runs, which ended the same: {kills}")
