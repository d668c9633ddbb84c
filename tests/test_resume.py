"""No run is ever lost: killed, stopped, starved of disk or handed rubbish, it ends the same."""

import functools
import io
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from faults import at_batch, kill, kill_at_write, limit_files, spoil
from helpers import call, contents, equal, result, script, without_pictures, write_binary
from tiny import SCRIPTS, noise, train

import engine.checkpoint
import engine.run
import report.evaluation
import utils

# With all that draws random numbers. Before --crop-padding there was, images were padded by 4.
SMALL = {"train_resnet": ["--cutmix", "0.5", "--trivial-augment", "0.5", "--dropout", "0.1",
                          "--crop-padding", "4"],
         "finetune_resnet18": ["--weights", "random", "--image-size", "32"]}
KILLS = ("clock", "batch", "torn", "whole", "renamed")
EVERY_STEP = ["--checkpoint-minutes", "0"]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir):
    """Runs that nothing disturbs: `whole(name)` has an epoch of two steps, and one of one step."""
    # The first call starts the server, and takes its time.
    call(print)
    return functools.cache(lambda name: Whole(name, tmp_path_factory.mktemp(name), data_dir))


def set_save_after(seconds, before) -> None:
    """Prepare a process in which the end of an epoch saves after so many seconds."""
    engine.run.SAVE_AFTER = seconds
    if before:
        before()


class Whole:
    """An undisturbed run: its flags, its last line, and what it left in `output_dir`."""

    def __init__(self, name, output_dir, data_dir, *flags, before=without_pictures):
        self.name, self.output_dir = name, output_dir
        self.flags = [*SMALL[name], "--data-dir", data_dir, "--device", "cpu", "--resume"]
        # In part 1 the first of the two epochs is on small images; part 2 has none below 32 pixels.
        self.flags += ["--epochs", 2, "--low-res", 0.5]
        self.flags += flags or ["--batch-size", 16, "--max-steps", 3]
        began = time.monotonic()
        process = self.script(output_dir, before=before)
        self.seconds = time.monotonic() - began
        assert (process.returncode, process.stderr) == (0, "")
        self.result, self.last_line = result(output_dir), process.stdout.splitlines()[-1]

    def script(self, output_dir, *flags, before=without_pictures, save_after=0, **kwargs):
        """Run the same command line for another output directory, perhaps with free flags.

        Epochs of a second are saved as those of half a minute are, unless `save_after` is longer.
        """
        flags = [*self.flags, "--output-dir", output_dir, *flags]
        before = functools.partial(set_save_after, save_after, before)
        return script(self.name, *flags, before=before, **kwargs)

    def assert_same_end(self, process, output_dir):
        """Assert that `process` ended as the undisturbed run did, to the bit."""
        assert (process.returncode, process.stderr) == (0, "")
        assert process.stdout.splitlines()[-1] == self.last_line
        # An epoch that was not saved before a kill, or on a full disk, is told twice.
        told = (output_dir / "log.txt").read_text().splitlines()
        assert {line.split()[1] for line in told if "img/s" in line} == {"1/2", "2/2"}
        assert told[-1] == self.last_line
        # One epoch with one save leaves no previous checkpoint. Where matplotlib is hidden, there
        # is no picture.
        allowed = {".lock", "checkpoint-previous.pt"}
        if "curves.png is not drawn" in process.stdout:
            allowed.add("curves.png")
        expected = {*engine.checkpoint.RUN_FILES, *report.evaluation.RUN_REPORTS, ".lock"}
        assert set(contents(output_dir)) | allowed == expected, "no temporary file is left"
        assert result(output_dir) == self.result


def draw_kill(rng: random.Random, seconds: float, batches: int, writes: int, kind: str) -> dict:
    """Draw the moment of a kill in a run of so many of each; return keywords of `script`."""
    if kind == "clock":
        return {"kill_after": rng.uniform(0, seconds)}
    if kind == "batch":
        return {"before": functools.partial(at_batch, rng.randint(1, batches), kill)}
    arguments = kind, rng.randint(1, writes), rng.random()
    return {"before": functools.partial(kill_at_write, *arguments)}


def kill_and_resume(run, draw, counts: dict, wanted: int, output_dir, *flags) -> None:
    """Start a run until it ends, always by the same command line; kill it up to `wanted` times.

    `draw(kind)` draws the moment of a kill, and `counts` says how many there were of each kind.
    """
    log, status = [], -1
    while status:
        # The rarest kind so far.
        kind = min(KILLS, key=counts.get)
        how = draw(kind) if sum(counts.values()) < wanted else {}
        process = run.script(output_dir, *flags, **{"before": None, **how})
        status = process.returncode
        assert status in (0, -signal.SIGKILL), process.stderr
        if status:
            counts[kind] += 1
        log += [line.split()[1] for line in process.stdout.splitlines() if "img/s" in line]
        assert log == sorted(log), "the appended log tells the epochs in order"
    run.assert_same_end(process, output_dir)


def test_a_run_killed_in_five_ways_ends_the_same(whole, tmp_path):
    """By the clock, in a batch, in a half-written file, before and after it gets its name."""
    run, counts = whole("train_resnet"), dict.fromkeys(KILLS, 0)
    draw = functools.partial(draw_kill, random.Random(0), run.seconds / 2, 2, 4)
    kill_and_resume(run, draw, counts, len(KILLS), tmp_path, *EVERY_STEP)
    assert set(counts.values()) == {1}


def test_a_kill_costs_the_short_epochs_since_the_last_save(whole, tmp_path):
    """They are not saved one by one: the log tells them again, and the end is the same."""
    run = whole("train_resnet")
    in_second_epoch = functools.partial(at_batch, 4, kill)
    killed = run.script(tmp_path, before=in_second_epoch, save_after=engine.run.SAVE_AFTER)
    assert killed.returncode == -signal.SIGKILL and "epoch  1/2" in killed.stdout
    assert not (tmp_path / "checkpoint.pt").exists()
    process = run.script(tmp_path, save_after=engine.run.SAVE_AFTER)
    assert "epoch  1/2" in process.stdout
    assert not (tmp_path / "checkpoint-previous.pt").exists(), "only the last epoch is saved"
    run.assert_same_end(process, tmp_path)


@slow
@pytest.mark.parametrize("name", SMALL)
def test_a_run_killed_at_any_moment_ends_the_same(name, tmp_path, data_dir, pytestconfig):
    """As often as --kills says, in both scripts together; in batches, evaluations and saves."""
    run = Whole(name, tmp_path / "whole", data_dir, "--batch-size", 4, "--max-steps", 12)
    wanted = math.ceil(pytestconfig.getoption("kills") / len(SMALL))
    rng, counts, runs = random.Random(name), dict.fromkeys(KILLS, 0), 0
    # Epochs of 8 and of 4 steps, and an evaluation of each.
    draw = functools.partial(draw_kill, rng, run.seconds, 14, 12)
    while sum(counts.values()) < wanted:
        flags = rng.choice([EVERY_STEP, []])
        kill_and_resume(run, draw, counts, wanted, tmp_path / str(runs), *flags)
        runs += 1
    print(f"{name}: {wanted} kills in {runs} runs, which ended the same: {counts}")


@pytest.mark.parametrize("name, number, batch, where", [
    pytest.param("train_resnet", signal.SIGTERM, 1, "epoch 1 after 1 steps", marks=slow),
    # Nothing is evaluated any more.
    ("train_resnet", signal.SIGUSR2, 2, "epoch 1 after 2 steps"),
    ("train_resnet", signal.SIGINT, 4, "epoch 2 after 1 steps"),
    pytest.param("finetune_resnet18", signal.SIGTERM, 2, "epoch 1 after 2 steps", marks=slow),
    pytest.param("finetune_resnet18", signal.SIGUSR2, 4, "epoch 2 after 1 steps", marks=slow),
    ("finetune_resnet18", signal.SIGINT, 1, "epoch 1 after 1 steps"),
])
def test_a_signal_stops_the_run_and_resume_ends_the_same(
    whole, tmp_path, name, number, batch, where
):
    run, action = whole(name), functools.partial(signal.raise_signal, number)
    stopped = run.script(tmp_path, before=functools.partial(at_batch, batch, action))
    assert stopped.returncode == utils.STOPPED
    assert stopped.stderr == (
        f"{name}.py: {number.name}: stopped in {where}, saved in {tmp_path}/checkpoint.pt; "
        "the same command with --resume goes on\n"
    )
    run.assert_same_end(run.script(tmp_path), tmp_path)


@slow
@pytest.mark.parametrize("name", SMALL)
def test_a_run_of_two_threads_stops_and_ends_the_same(tmp_path, data_dir, name):
    """All other runs here have one."""
    before = functools.partial(torch.set_num_threads, 2)
    run = Whole(name, tmp_path / "whole", data_dir, before=before)
    stopped = run.script(tmp_path / "run", "--max-minutes", 0.001, before=before)
    assert stopped.returncode == utils.STOPPED
    resumed = run.script(tmp_path / "run", before=before)
    assert "CPU, 2 threads" in resumed.stdout
    run.assert_same_end(resumed, tmp_path / "run")


def interrupt_twice() -> None:
    """What impatient people do."""
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def test_a_second_interrupt_ends_at_once(whole, tmp_path):
    before = functools.partial(at_batch, 1, interrupt_twice)
    stopped = whole("train_resnet").script(tmp_path, before=before)
    assert (stopped.returncode, stopped.stderr) == (130, "train_resnet.py: interrupted\n")
    assert set(contents(tmp_path)) == {".lock", "code.zip", "config.json", "log.txt"}


@pytest.mark.parametrize("name", ["train_resnet", pytest.param("finetune_resnet18", marks=slow)])
def test_a_chain_of_short_jobs_ends_the_same(whole, tmp_path, name):
    """--max-minutes lets each job do one step or one evaluation: here three, and two."""
    run = whole(name)
    says = rf"{name}.py: --max-minutes 0.001: stopped in epoch \d after \d steps, saved in .*\n"
    for _ in range(4):
        job = run.script(tmp_path / "chain", "--max-minutes", 0.001)
        assert job.returncode == utils.STOPPED and re.fullmatch(says, job.stderr)
    job = run.script(tmp_path / "chain", "--max-minutes", 0.001)
    run.assert_same_end(job, tmp_path / "chain")


@pytest.mark.parametrize("name, megabytes", [
    pytest.param("train_resnet", 1, marks=slow),
    ("train_resnet", 20),
    pytest.param("finetune_resnet18", 1, marks=slow),
    pytest.param("finetune_resnet18", 60, marks=slow),
])
def test_a_disk_full_from_the_start_is_one_line(whole, name, megabytes, tmp_path):
    """The larger ones have room for model.pt, but not for a checkpoint."""
    run, before = whole(name), functools.partial(limit_files, megabytes)
    process = run.script(tmp_path, before=before)
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert re.search("not all is written .*make room, and the same command with", process.stderr)
    warning = "warning    not saved ([Errno 27] File too large); training goes on, the next save"
    assert process.stdout.count(warning) == 1, "at the end of the first epoch"
    assert set(contents(tmp_path)) <= {".lock", "code.zip", "config.json", "log.txt", "metrics.csv"}
    run.assert_same_end(run.script(tmp_path), tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 50 MB: room for one checkpoint of part 1."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(disk)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(mount).returncode:
        pytest.skip("needs to be root and allowed to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@slow
def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(whole, small_disk):
    """And once there is room, the run ends the same."""
    run, output_dir = whole("train_resnet"), small_disk / "run"
    process = run.script(output_dir, *EVERY_STEP)
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert "warning    not saved ([Errno 28] No space left on device)" in process.stdout
    assert utils.load_tensors(output_dir / "checkpoint.pt")["position"]["step"] == 1
    subprocess.run(["mount", "-o", "remount,size=130m", str(small_disk)], check=True)
    run.assert_same_end(run.script(output_dir, *EVERY_STEP), output_dir)


def move_at_batches(path: Path, leave: int, come_back: int) -> None:
    """Take the directory away after one batch, and put it back after another."""
    away = path.with_name("away")
    at_batch(leave, functools.partial(os.rename, path, away))
    at_batch(come_back, functools.partial(os.rename, away, path))


@pytest.mark.parametrize("come_back", [4, pytest.param(99, marks=slow)])
def test_an_output_directory_that_vanishes_does_not_stop_the_training(whole, tmp_path, come_back):
    run, output_dir = whole("train_resnet"), tmp_path / "run"
    before = functools.partial(move_at_batches, output_dir, 1, come_back)
    process = run.script(output_dir, before=before)
    assert process.stdout.count("warning    not saved ([Errno 2] No such file") >= 1
    # Batch 4 is in the second epoch.
    if come_back == 4:
        return run.assert_same_end(process, output_dir)
    assert (process.returncode, process.stderr.count("\n")) == (1, 1)
    assert f"{output_dir}: not all is written" in process.stderr
    assert not output_dir.exists()
    assert set(contents(tmp_path / "away")) == {".lock", "code.zip", "config.json", "log.txt"}


def test_a_table_that_cannot_be_written_does_not_make_the_checkpoint_unsaved(whole, tmp_path):
    run = whole("train_resnet")
    before = functools.partial(at_batch, 1, (tmp_path / "metrics.csv").mkdir)
    process = run.script(tmp_path, before=before)
    warning = "warning    metrics.csv not written ([Errno 21] Is a directory"
    assert process.stdout.count(warning) == 2
    assert "not saved" not in process.stdout
    assert (process.returncode, process.stderr.count("\n")) == (1, 1)
    assert "not all is written" in process.stderr
    (tmp_path / "metrics.csv").rmdir()
    run.assert_same_end(run.script(tmp_path), tmp_path)


@pytest.fixture(scope="module")
def stopped(whole, tmp_path_factory):
    """Part 1, stopped in its second epoch: it has a checkpoint, and the one before."""
    output_dir = tmp_path_factory.mktemp("stopped")
    action = functools.partial(signal.raise_signal, signal.SIGTERM)
    run = whole("train_resnet")
    assert run.script(output_dir, before=functools.partial(at_batch, 4, action)).returncode == 75
    return output_dir


@pytest.mark.parametrize("percent", range(0, 100, 5))
def test_a_truncated_checkpoint_is_never_believed(stopped, tmp_path, percent):
    content = (stopped / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[: len(content) * percent // 100])
    with pytest.raises(utils.DamagedFile, match=r"not a PyTorch file, or a damaged"):
        utils.load_tensors(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=slow)])
def test_a_checkpoint_with_flipped_bytes_is_never_believed(stopped, tmp_path, count):
    """Flips of what means nothing, such as a time in the zip headers, may load equal."""
    content, rng = (stopped / "checkpoint.pt").read_bytes(), random.Random(0)
    original = utils.load_tensors(stopped / "checkpoint.pt")
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 10])):
            # Every second flip is in the last hundredth, where the zip directory is.
            near_end = rng.random() < 0.5
            position = rng.randrange(len(content) * 99 // 100 if near_end else 0, len(content))
            changed[position] ^= rng.randrange(1, 256)
        (tmp_path / "checkpoint.pt").write_bytes(changed)
        try:
            assert equal(utils.load_tensors(tmp_path / "checkpoint.pt"), original)
        except utils.DamagedFile as error:
            assert "\n" not in str(error)


def test_a_disk_that_fails_to_read_is_damage(tmp_path):
    """The first page of a process's memory cannot be read: EIO, as of a bad sector."""
    (tmp_path / "checkpoint.pt").symlink_to("/proc/self/mem")
    with pytest.raises(utils.DamagedFile):
        utils.load_tensors(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("damage", ["flipped", "another dict", *(
    pytest.param(damage, marks=slow) for damage in ("missing", "truncated", "text"))])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(
    whole, stopped, tmp_path, damage
):
    output_dir = shutil.copytree(stopped, tmp_path / "run")
    newest = output_dir / "checkpoint.pt"
    if damage == "another dict":
        torch.save({"script": "train_resnet"}, newest)
    else:
        spoil(newest, damage)
    process = whole("train_resnet").script(output_dir)
    if damage != "missing":
        warning = r"warning .*checkpoint\.pt: .*; the checkpoint before it is used"
        assert re.search(warning, process.stdout)
        assert re.search(warning, (output_dir / "log.txt").read_text())
    assert "resume     after 1 epochs and 0 steps\n" in process.stdout
    whole("train_resnet").assert_same_end(process, output_dir)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "another dict", "part 2's"])
def test_without_a_whole_checkpoint_nothing_starts(whole, stopped, tmp_path, damage):
    output_dir = shutil.copytree(stopped, tmp_path / "run")
    for name in engine.checkpoint.CHECKPOINTS:
        if damage == "another dict":
            torch.save({"script": "train_resnet"}, output_dir / name)
        elif damage == "part 2's":
            shutil.copy(whole("finetune_resnet18").output_dir / "checkpoint.pt", output_dir / name)
        else:
            spoil(output_dir / name, damage)
    before = contents(output_dir)
    process = whole("train_resnet").script(output_dir)
    assert (process.returncode, process.stderr.count("\n")) == (2, 1), process.stderr
    assert str(output_dir / "checkpoint.pt") in process.stderr
    assert contents(output_dir) == before
    remedy = "another output directory" if damage == "part 2's" else "--overwrite starts again"
    assert remedy in process.stderr


NO_MEMORY = "DefaultCPUAllocator: can't allocate memory", 2, "asks for more memory than there is"
GPU_FAULT = "CUDA error: unspecified launch failure"


def fail(where: str, message: str) -> None:
    """Have what reads a checkpoint, or what takes its weights, raise as torch does."""
    load = torch.load

    def raise_error(file=None, *rest, **keywords):
        if isinstance(file, io.BytesIO):  # a run tries its own state before it begins
            return load(file, *rest, **keywords)
        raise (torch.AcceleratorError if "CUDA" in message else RuntimeError)(message)

    if where == "reading":
        torch.load = raise_error
    else:
        torch.nn.Module.load_state_dict = raise_error


@pytest.mark.parametrize("where, message, status, says", [
    ("reading", *NO_MEMORY),
    ("taking", NO_MEMORY[0], 2, "out of memory: try a smaller --batch-size"),
    ("taking", GPU_FAULT, 1,
     f"the GPU failed ({GPU_FAULT}); the same command with --resume goes on")])
def test_a_checkpoint_that_memory_or_gpu_cannot_take_is_not_replaced(
        whole, stopped, where, message, status, says):
    before = contents(stopped)
    process = whole("train_resnet").script(
        stopped, before=functools.partial(fail, where, message))
    assert (process.returncode, process.stderr.count("\n")) == (status, 1), process.stderr
    assert process.stderr.endswith(f"{says}\n")
    assert contents(stopped) == before


def test_other_settings_or_images_are_refused_by_name(whole, stopped, tmp_path, arrays):
    run, before = whole("train_resnet"), contents(stopped)
    process = run.script(stopped, "--lr", 0.2, "--seed", 5)
    assert process.returncode == 2
    assert "--lr 0.2 (was 0.1), --seed 5 (was 0)" in process.stderr
    # As many, in another order.
    images, labels = arrays["train"]
    write_binary(tmp_path / "other", {**arrays, "train": (images[31::-1], labels[:32])})
    process = run.script(stopped, "--data-dir", tmp_path / "other")
    assert process.returncode == 2
    assert re.search(r"of a run on other images; --data-dir must hold the same\n", process.stderr)
    assert contents(stopped) == before


def test_part_2_goes_on_without_the_file_that_it_began_with(whole, tmp_path):
    """The checkpoint has all weights. What it says of the run's settings stays."""
    run = whole("finetune_resnet18")
    assert run.script(tmp_path / "run", "--max-minutes", 0.001).returncode == utils.STOPPED
    process = run.script(tmp_path / "run", "--weights", tmp_path / "purged.pth")
    run.assert_same_end(process, tmp_path / "run")
    state = utils.load_tensors(tmp_path / "run" / "checkpoint.pt")
    assert state["settings"]["weights"] == "random"


def test_a_run_may_go_on_compiled_or_not(whole, stopped, tmp_path):
    """And with other values of all that is no part of the recipe."""
    output_dir = shutil.copytree(stopped, tmp_path / "run")
    state = utils.load_tensors(output_dir / "checkpoint.pt")
    state["settings"]["compile"], state["runtime"] = True, state["runtime"] + ", compiled"
    torch.save(state, output_dir / "checkpoint.pt")
    process = whole("train_resnet").script(output_dir)
    assert process.returncode == 0, process.stderr
    assert ", compiled, torch" in process.stdout and "will not be the same bits" in process.stdout


@pytest.mark.parametrize("lacking", ["flag", "position"])
def test_a_checkpoint_of_older_code_is_called_so(whole, stopped, tmp_path, lacking):
    output_dir = shutil.copytree(stopped, tmp_path / "run")
    state = utils.load_tensors(output_dir / "checkpoint.pt")
    del state["settings" if lacking == "flag" else "position"][
        "dropout" if lacking == "flag" else "train_seconds"]
    torch.save(state, output_dir / "checkpoint.pt")
    before = contents(output_dir)
    process = whole("train_resnet").script(output_dir)
    assert (process.returncode, process.stderr.count("\n")) == (2, 1), process.stderr
    assert "checkpoint.pt: of older code; finish the run with that, or choose " in process.stderr
    assert contents(output_dir) == before


def hold(path: Path) -> None:
    """Lock the directory, as another process at work on it does."""
    assert utils.try_lock(os.open(path / ".lock", os.O_WRONLY))


def test_two_processes_cannot_work_on_one_run(whole, stopped):
    process = whole("train_resnet").script(stopped, before=functools.partial(hold, stopped))
    assert process.returncode == 2
    assert process.stderr.endswith("another process is at work on this run\n")


@pytest.fixture
def tiny_run(tmp_path):
    """A function that runs a script for six steps of two images, and saves after each step."""
    def run(name, act, *flags):
        size = ["--image-size", "32"] if name == "finetune_resnet18" else []
        return train(name, noise(12), tmp_path, *size, *EVERY_STEP, "--batch-size", 2,
                     "--epochs", 1, *flags, act=act)

    return run


@pytest.mark.parametrize("by_signal", [True, False])
@pytest.mark.parametrize("name", SCRIPTS)
def test_no_save_puts_a_loss_that_is_not_finite_over_a_good_checkpoint(
        tiny_run, tmp_path, name, by_signal):
    before = {}

    def diverge(run):
        if len(run.trained) < 5:
            return 0
        before.update(contents(tmp_path))
        if by_signal:
            signal.raise_signal(signal.SIGTERM)
        return math.nan

    run = tiny_run(name, diverge)
    assert (run.status, len(run.trained)) == (1, 5) and "not finite by step 5" in run.message
    assert set(engine.checkpoint.CHECKPOINTS) < set(before) and contents(tmp_path) == before


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_loss_that_is_not_finite_ends_the_run_within_25_steps(tmp_path, name):
    size = ["--image-size", "32"] if name == "finetune_resnet18" else []
    run = train(name, noise(80), tmp_path, *size, "--batch-size", 2, "--epochs", 1,
                act=lambda run: math.nan if len(run.trained) == 3 else 0)
    assert (run.status, len(run.trained)) == (1, 25) and "not finite by step 25" in run.message


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_of_16_bits_goes_on_with_its_optimizer_schedule_and_scale(tmp_path, name, precision):
    size = ["--image-size", "32"] if name == "finetune_resnet18" else []
    flags = [*size, "--batch-size", 2, "--epochs", 1, "--precision", precision]
    whole, chain = (tmp_path / part for part in ("whole", "chain"))
    train(name, noise(12), whole, *flags)
    assert train(name, noise(12), chain, *flags, "--max-minutes", 0.001).status == utils.STOPPED
    assert train(name, noise(12), chain, *flags, "--resume").status == 0
    one, other = (utils.load_tensors(path / "checkpoint.pt") for path in (whole, chain))
    for part in ("model", "optimizer", "scheduler", "scaler"):
        assert equal(one[part], other[part]), part
    assert bool(one["scaler"]) == (precision == "fp16")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_save_after_a_damaged_checkpoint_keeps_the_good_one(tiny_run, tmp_path, name):
    def stop(run):
        if len(run.trained) == 3:
            signal.raise_signal(signal.SIGTERM)

    assert tiny_run(name, stop).status == utils.STOPPED
    spoil(tmp_path / "checkpoint.pt", "flipped")
    steps = []

    def look(run):
        if len(run.trained) == 1:
            steps.extend(utils.load_tensors(tmp_path / file)["position"]["step"]
                         for file in engine.checkpoint.CHECKPOINTS)

    assert tiny_run(name, look, "--resume").status == 0
    assert steps == [2, 2], "the save before the first step left both whole"


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_other_process_gets_at_a_run_while_it_trains(tiny_run, tmp_path, name):
    free = []

    def try_to_lock(run):
        with open(tmp_path / ".lock") as file:
            free.append(utils.try_lock(file))

    assert tiny_run(name, try_to_lock).status == 0
    assert free == [False] * 7, "in six steps and the evaluation"


def stop_while_loading(number: int) -> None:
    """Have a signal come when the seed is set, before there is a network."""
    torch.manual_seed = lambda _: signal.raise_signal(number)


@pytest.mark.parametrize("name, number", [
    ("train_resnet", signal.SIGTERM), ("finetune_resnet18", signal.SIGUSR2)])
def test_a_job_that_is_stopped_before_its_first_step_goes_on_later(tmp_path, name, number):
    process = script(name, *SMALL[name], "--dataset", "synthetic", "--device", "cpu",
                     "--output-dir", tmp_path / "run",
                     before=functools.partial(stop_while_loading, number))
    assert (process.returncode, process.stderr.count("\n")) == (utils.STOPPED, 1)
    assert f"{number.name}: stopped before the first step; start the same" in process.stderr
