"""Both scripts as a user runs them: what they print, write and refuse."""

import csv
import ctypes
import functools
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    TIMES,
    call,
    compare_runs,
    contents,
    result,
    script,
    without_pictures,
    write_binary,
)

import engine.checkpoint
import engine.optim
import models
import report.evaluation
import report.log

# Flags without which a script needs files that a test has not.
SMALL = {"train_resnet": [],
         "finetune_resnet18": ["--weights", "random", "--image-size", 32]}
SYNTHETIC = ["--dataset", "synthetic"]
SIX_STEPS = ["--batch-size", 8, "--max-steps", 6, "--device", "cpu"]
EPOCH_LINE = re.compile(
    r"^\[synthetic\]  epoch  1/1  32px  lr 0\.0000  train loss \d+\.\d{3} acc +\d+\.\d\d%  "
    r"test loss \d+\.\d{3} acc +(\d+\.\d\d)% top5 +\d+\.\d\d%  \d+ img/s  \d+\.\d s  eta 0s$",
    re.MULTILINE,
)
slow = pytest.mark.slow
both = pytest.mark.parametrize("name", SMALL)
# Where the scripts share the code, and a run of each takes seconds.
one_at_first = pytest.mark.parametrize("name", [
    "train_resnet", pytest.param("finetune_resnet18", marks=slow)])


def rows(output_dir):
    """Return the rows of metrics.csv."""
    with open(output_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of each script on the synthetic set: {name: (process, output directory)}."""
    runs = {}
    for name, flags in SMALL.items():
        output_dir = tmp_path_factory.mktemp(name) / "run"
        flags = [*SYNTHETIC, *flags, *SIX_STEPS, "--output-dir", output_dir]
        runs[name] = script(name, *flags), output_dir
    return runs


@pytest.fixture
def small(data_dir):
    """Flags of runs of a few steps on 32 images: {name: flags}."""
    return {name: [*flags, "--data-dir", data_dir, "--device", "cpu", "--batch-size", 8]
            for name, flags in SMALL.items()}


@both
def test_the_log_has_header_epoch_line_and_verdict(finished, name):
    process, output_dir = finished[name]
    assert (process.returncode, process.stderr) == (0, ""), "no bar without a terminal"
    for start in ("command ", "device     CPU", "data       synthetic", "network    ResNet, ",
                  "code       ", "recipe     epochs ", "optimizer  ", "steps      6, 625 an epoch",
                  "images     epochs: 1 of 32px; random crop, flip", "output "):
        assert re.search(f"^{start}", process.stdout, re.MULTILINE), start
    assert (output_dir / "log.txt").read_text() == process.stdout
    assert len(EPOCH_LINE.findall(process.stdout)) == 1
    accuracy = EPOCH_LINE.search(process.stdout)[1]
    *_, files, last = process.stdout.splitlines()
    assert files.startswith("files ") and str(output_dir) in files
    assert last.startswith(f"final test accuracy {accuracy}% (not on CIFAR-100, so the")


@both
def test_the_files_say_the_same(finished, name):
    process, output_dir = finished[name]
    written = {*engine.checkpoint.RUN_FILES, *report.evaluation.RUN_REPORTS, ".lock"}
    assert set(contents(output_dir)) == written - {"checkpoint-previous.pt"}
    (row,) = rows(output_dir)
    assert (row["dataset"], row["epoch"], row["epochs"]) == ("synthetic", "1", "1")
    assert row["image_size"] == "32" and set(TIMES) < set(row)
    assert f"{float(row['test_acc']):.2%}" == EPOCH_LINE.search(process.stdout)[1] + "%"
    config = json.loads((output_dir / "config.json").read_text())
    assert config["script"] == name and config["dataset"] == "synthetic"
    assert config["settings"]["max_steps"] == 6
    assert {"max_steps", "seed", "precision"} < set(config["recipe"]) < set(config["settings"])


@both
def test_the_weights_load_strictly_and_the_state_safely(finished, name):
    _, output_dir = finished[name]
    weights = torch.load(output_dir / "model.pt", weights_only=True)
    network = models.ResNet() if name == "train_resnet" else models.resnet18()
    network.load_state_dict(weights, strict=True)
    state = torch.load(output_dir / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(state["model"][k], weights[k]) for k in weights)
    assert state["scheduler"]["last_epoch"] == 6, "one step of the schedule per optimizer step"
    assert state["optimizer"]["param_groups"][0]["lr"] < 1e-4, "and it ends at its end"


@one_at_first
def test_eval_only_prints_the_same_test_accuracy(finished, name):
    process, output_dir = finished[name]
    flags = [*SYNTHETIC, *SMALL[name], "--eval-only", "--output-dir", output_dir]
    evaluated = script(name, *flags, "--device", "cpu", before=without_pictures)
    assert evaluated.returncode == 0
    test_part = re.search(r"test loss .* top5 +[\d.]+%", process.stdout)[0]
    lines = [line for line in evaluated.stdout.splitlines() if line.startswith("test ")]
    assert lines == [f"{test_part}  (1,000 synthetic images)"]


@slow
@both
def test_a_script_started_by_python_itself_ends_the_same(finished, name, tmp_path):
    """All other tests start it as a fork of a process that has imported torch."""
    process, output_dir = finished[name]
    flags = [*SYNTHETIC, *SMALL[name], *SIX_STEPS, "--output-dir", tmp_path]
    command = list(map(str, [sys.executable, ROOT / f"{name}.py", *flags]))
    started = subprocess.run(command, capture_output=True, text=True)
    assert (started.returncode, started.stderr) == (0, "")
    assert started.stdout.splitlines()[-1] == process.stdout.splitlines()[-1]
    assert result(tmp_path) == result(output_dir)


def test_a_held_out_split_is_printed_beside_the_test_set(tmp_path, arrays):
    data_dir = write_binary(tmp_path / "data", arrays)
    process = script("train_resnet", "--data-dir", data_dir, "--device", "cpu", "--batch-size", 20,
                     "--max-steps", 2, "--val-size", 100, "--low-res", 1,
                     "--output-dir", tmp_path / "run")
    assert "100 training, 100 validation and 100 test images" in process.stdout
    assert re.search(r"train loss .*  val loss .* top5 .*  test loss .* top5 ", process.stdout)
    (row,) = rows(tmp_path / "run")
    assert {"val_acc", "test_acc"} <= set(row) and row["image_size"] == "20"


@both
def test_a_run_is_not_overwritten_unless_asked(finished, name):
    _, output_dir = finished[name]
    before = contents(output_dir)
    again = script(name, *SYNTHETIC, *SMALL[name], *SIX_STEPS, "--output-dir", output_dir)
    assert (again.returncode, again.stdout) == (2, "")
    assert re.fullmatch(r".*already holds a run .*--resume.*--overwrite.*\n", again.stderr)
    assert contents(output_dir) == before


@one_at_first
def test_overwrite_begins_anew(small, name, tmp_path):
    flags = [*small[name], "--max-steps", 1, "--output-dir", tmp_path / "run"]
    assert script(name, *flags, before=without_pictures).returncode == 0
    first = torch.load(tmp_path / "run" / "model.pt")
    other = script(name, *flags, "--seed", 1, "--overwrite", before=without_pictures)
    assert other.returncode == 0
    second = torch.load(tmp_path / "run" / "model.pt")
    assert not torch.equal(first["fc.weight"], second["fc.weight"]), "another seed, another run"


@pytest.mark.parametrize("name, flag, value", [
    ("train_resnet", "--cutmix", 1), ("train_resnet", "--dropout", 0.5),
    ("train_resnet", "--crop-padding", 9), ("train_resnet", "--trivial-augment", 1),
    pytest.param("finetune_resnet18", "--cutmix", 1, marks=slow),
    pytest.param("finetune_resnet18", "--trivial-augment", 1, marks=slow)])
def test_regularisation_changes_what_is_learnt(small, tmp_path, name, flag, value):
    heads = []
    for flags in ([], [flag, value]):
        output_dir = tmp_path / str(len(heads))
        process = script(name, *small[name], "--max-steps", 1, *flags, "--output-dir", output_dir,
                         before=without_pictures)
        assert (process.returncode, process.stderr) == (0, "")
        heads.append(torch.load(output_dir / "model.pt")["fc.weight"])
    # Rounding differs by less than a thousandth of that.
    assert (heads[0] - heads[1]).abs().max() > 1e-4


def test_a_finished_run_is_not_trained_again(finished):
    process, output_dir = finished["train_resnet"]
    before = contents(output_dir)
    flags = [*SYNTHETIC, *SIX_STEPS, "--resume", "--output-dir", output_dir]
    again = script("train_resnet", *flags)
    assert again.returncode == 0 and not EPOCH_LINE.search(again.stdout)
    told = (output_dir / "log.txt").read_text()
    assert len(EPOCH_LINE.findall(told)) == 1
    after = contents(output_dir)
    assert {**after, "log.txt": None} == {**before, "log.txt": None}
    final = [line for line in process.stdout.splitlines() if line.startswith("final")]
    assert final and final[0] in again.stdout


def test_a_finished_run_without_a_checkpoint_is_not_replaced_unasked(finished, tmp_path):
    model = tmp_path / "model.pt"
    model.write_bytes((finished["train_resnet"][1] / "model.pt").read_bytes())
    process = script("train_resnet", "--resume", "--output-dir", tmp_path)
    assert process.returncode == 2 and contents(tmp_path).keys() == {"model.pt"}
    assert "; no checkpoint is left to go on from, --overwrite replaces it, or " in process.stderr


POSIX = {"os": r"fork|getp?g.*|get[er]*uid|killpg|nice|O_(DIRECTORY|NOFOLLOW|SYNC)|p(read|write).*|"
               r"posix_.*|sched_.*|setsid|sync|uname|wait[34]",
         "signal": r"SIG(?!ABRT|FPE|ILL|INT|SEGV|TERM|_DFL|_IGN|nals)\w+|alarm|pause|setitimer",
         "errno": "EDQUOT"}


def enter_windows() -> None:
    """Let the project's modules see no name that is POSIX's alone, when imported or later."""
    ours = {path.stem for path in ROOT.glob("*.py")}
    for name in sorted(ours):
        importlib.import_module(name)  # and all that they need, which knows Windows itself
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for name in list(sys.modules):
        if name.partition(".")[0] in ours | folders:
            del sys.modules[name]
    seen = {name: {key: value for key, value in vars(sys.modules[name]).items()
                   if not re.fullmatch(posix, key)} for name, posix in POSIX.items()}

    def open_file(path, *arguments):
        if os.path.isdir(path):
            raise PermissionError(f"a directory: {path}")
        return os.open(path, *arguments)

    seen["os"] |= {"name": "nt", "open": open_file}
    platform.libc_ver = lambda: ("", "")
    ctypes.CDLL = None
    sys.modules |= dict.fromkeys(("fcntl", "resource", "termios", "pwd"))
    true = {name: sys.modules[name] for name in seen}
    sys.modules |= {name: types.SimpleNamespace(**names) for name, names in seen.items()}
    for name in sorted(ours):
        importlib.import_module(name)
    sys.modules |= true


@both
def test_a_run_needs_nothing_that_only_posix_has(small, name, tmp_path):
    """On Windows and macOS; it is stopped and goes on."""
    flags = [*small[name], "--max-steps", 2, "--output-dir", tmp_path]
    stopped = script(name, *flags, "--max-minutes", 0.001, before=enter_windows)
    assert (stopped.returncode, stopped.stderr.count("\n")) == (75, 1), stopped.stderr
    resumed = script(name, *flags, "--resume", before=enter_windows)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert "and 1 steps\n" in resumed.stdout and "final test accuracy" in resumed.stdout


@one_at_first
def test_a_diverging_run_stops_and_names_the_step(small, name, tmp_path):
    flags = [*small[name], "--max-steps", 4, "--lr", "1e30", "--output-dir", tmp_path / "run"]
    process = script(name, *flags)
    assert process.returncode == 1
    says = r".*not finite by step [1-4]; start again with --overwrite and a lower --lr.*\n"
    assert re.fullmatch(says, process.stderr)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_run_whose_last_step_diverges_is_not_saved(small, tmp_path):
    flags = [*small["train_resnet"], "--max-steps", 1, "--lr", "1e30"]
    process = script("train_resnet", *flags, "--output-dir", tmp_path / "run")
    assert process.returncode == 1 and "not finite by step 1" in process.stderr
    assert sorted(contents(tmp_path / "run")) == [
        ".lock", "code.zip", "config.json", "log.txt"]


@pytest.mark.parametrize("flags, says", [
    (["--epochs", "0"], "--epochs: 0 is not between 1 and inf"),
    (["--epochs", "many"], "--epochs: invalid whole number value: 'many'"),
    (["--lr", "nan"], "--lr: nan is not between"),
    (["--label-smoothing", "1.1"], "--label-smoothing: 1.1 is not between 0 and 1"),
    (["--batchsize", "3"], "--batchsize 3; --batchsize: do you mean --batch-size? (--help"),
    (["--epoch=3"], "--epoch=3; --epoch: do you mean --epochs? (--help"),
    (["--zzz"], "unrecognized arguments: --zzz (--help"),
    (["--precision", "fp8"], "--precision"),
    (["--device", "abacus"], "--device abacus"),
    (["--val-size", "150"], "--val-size 150"),
    (["--resume", "--overwrite"], "not allowed with argument --resume"),
    (["--eval-only"], "holds no model.pt, which a run writes at its end, and no checkpoint"),
    (["--predict", "x.png"], "holds no model.pt, "),
    (["--dataset", "cifar100", "--data-dir", "nowhere", "--no-download"], "Three ways out"),
    (["--dataset", "cifar100", "--data-dir", "gone.tar.gz"], "gone.tar.gz: no such file"),
    (["--output-dir", "file"], "is a file"),
    (["--output-dir", "file/below"], "file/below: cannot be written"),
    (["--output-dir", "/proc/none"], "/proc/none: cannot be written"),
    (["--max-minutes", "0"], "--max-minutes: 0 is not between"),
    (["--data-dir", "file", "--dataset", "cifar100"], "file: not an HDF5 file, tar archive or zip"),
])
def test_bad_input_is_one_line_and_status_2(tmp_path, flags, says):
    (tmp_path / "file").write_text("")
    process = script("train_resnet", *SYNTHETIC, *flags, cwd=tmp_path)
    assert (process.returncode, process.stderr.count("\n")) == (2, 1), process.stderr
    assert process.stderr.startswith("train_resnet.py: ") and says in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left behind"


def test_debug_adds_the_traceback(tmp_path):
    process = script("train_resnet", *SYNTHETIC, "--val-size", 150, "--debug", cwd=tmp_path)
    assert process.returncode == 2 and process.stderr.startswith("Traceback")
    assert process.stderr.splitlines()[-1].startswith("train_resnet.py: --val-size 150: must be")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_one_line(tmp_path):
    process = script("train_resnet", *SYNTHETIC, "--device", "cuda", cwd=tmp_path)
    assert process.returncode == 2 and "try --device cpu" in process.stderr


def test_bad_weights_are_one_line(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"not weights")
    flags = [*SYNTHETIC, "--weights", tmp_path / "weights.pth"]
    process = script("finetune_resnet18", *flags, cwd=tmp_path)
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)
    assert "weights.pth: not a PyTorch file" in process.stderr


@pytest.mark.parametrize("flags", [[], ["--image-size", 64, "--epochs", 2]])
def test_a_last_batch_of_one_image_is_one_line_before_the_first_step(small, tmp_path, flags):
    """Where the last maps are of one pixel, batch norm has nothing to average over.

    Of 64 x 64 pixels that is so in the first epoch, whose images are smaller.
    """
    process = script("finetune_resnet18", *small["finetune_resnet18"], "--batch-size", 31, *flags,
                     "--output-dir", tmp_path)
    assert (process.returncode, process.stderr) == (2, (
        "finetune_resnet18.py: 32 images in batches of 31 leave a process one image, on "
        "which batch norm cannot train; try another --batch-size\n"))
    assert not contents(tmp_path), "nothing is begun"


@pytest.mark.parametrize("name, flags", [
    ("train_resnet", []), ("finetune_resnet18", ["--image-size", 64, "--low-res", 0]),
    ("finetune_resnet18", ["--max-steps", 1])])
def test_a_batch_of_one_image_that_does_no_harm_is_trained_on(small, tmp_path, name, flags):
    """Where its maps are larger than a pixel, or the run ends before it."""
    process = script(name, *small[name], "--batch-size", 31, "--epochs", 1, *flags,
                     "--output-dir", tmp_path / "run", before=without_pictures)
    assert (process.returncode, process.stderr) == (0, "")


def live_elsewhere(home) -> None:
    """Have a home directory, and a set of images that is named by it."""
    os.environ |= {"HOME": str(home), "CIFAR100_DIR": "~/cifar"}


def test_a_tilde_is_the_home_directory_in_every_path(small, data_dir, tmp_path):
    """No shell expands it in --flag=~/path, in quotes or in a job file."""
    (tmp_path / "cifar").symlink_to(data_dir)
    begin = functools.partial(live_elsewhere, tmp_path)
    flags = ["--device", "cpu", "--batch-size", 8, "--max-steps", 1, "--output-dir=~/run"]
    process = script("train_resnet", *flags, cwd=tmp_path, before=begin)
    assert (process.returncode, process.stderr) == (0, "")
    assert re.search(f"^data .*, {tmp_path / 'cifar'}", process.stdout, re.MULTILINE)
    assert f"output     {tmp_path / 'run'}\n" in process.stdout
    settings = json.loads((tmp_path / "run/config.json").read_text())["settings"]
    assert settings["output_dir"] == str(tmp_path / "run")
    assert settings["data_dir"] == str(tmp_path / "cifar")
    compared = call(compare_runs, "~/run", "--output-dir=~/compared", cwd=tmp_path, before=begin)
    assert f" in {tmp_path / 'compared'}\n" in compared.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"cifar", "run", "compared"}


def test_every_flag_that_names_a_path_expands_a_tilde(parse, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CIFAR100_DIR", raising=False)
    _, args = parse("finetune_resnet18", "--overwrite", "--data-dir=~/data", "--weights", "~/w.pth",
                    "--output-dir=~")
    assert (args.data_dir, args.weights, args.output_dir) == (
        str(tmp_path / "data"), str(tmp_path / "w.pth"), tmp_path)
    (tmp_path / "model.pt").touch()
    (tmp_path / "~kept.png").touch()
    root = Path(os.path.expanduser("~root"))
    assert root.is_absolute()
    _, args = parse("train_resnet", "--output-dir=~", "--predict", "~/a.png", "~root/b.png",
                    "~kept.png", "./~", "c~")
    assert args.predict == [tmp_path / "a.png", root / "b.png",
                            *map(Path, ("~kept.png", "~", "c~"))]


@pytest.mark.parametrize("named, data_dir", [
    ("", "data"), (" \t", "data"), ("~/c", "HOME/c"), ("/c d", "/c d"), (None, "data")])
def test_the_data_are_where_the_environment_says_unless_it_is_blank(
        parse, tmp_path, monkeypatch, named, data_dir):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CIFAR100_DIR", raising=False)
    if named is not None:
        monkeypatch.setenv("CIFAR100_DIR", named)
    for flags in ([], ["--data-dir=given"]):
        _, args = parse("train_resnet", "--overwrite", *flags)
        expected = data_dir.replace("HOME", str(tmp_path))
        assert args.data_dir == ("given" if flags else expected)


@both
def test_the_recipe_is_all_that_the_numbers_depend_on(monkeypatch, name):
    """The other settings may change at --resume: where files are, what is computed where, when."""
    monkeypatch.setattr(sys, "argv", [name, "--overwrite"])
    args = importlib.import_module(name).parse_args()
    not_flags = {"recipe", "trained", "is_new", "script", "command", "began"}
    free = set(vars(args)) - not_flags - set(args.recipe)
    assert free - {"weights"} == {
        "data_dir", "data_url", "no_download", "output_dir", "resume", "overwrite", "eval_only",
        "predict", "tensorboard", "debug", "device", "compile", "graphs",
        "checkpoint_minutes", "max_minutes"}


SHORT = {"weight_decay": 0.01, "low_res": 0.3, "dropout": 0, "crop_padding": 2, "cutmix": 0,
         "trivial_augment": 0}
MEDIUM = {**SHORT, "crop_padding": 4, "cutmix": 0.5}
LONG = {**MEDIUM, "trivial_augment": 0.5}


@pytest.mark.parametrize("epochs, chosen", [
    (1, SHORT), (10, SHORT), (11, MEDIUM), (20, MEDIUM), (39, MEDIUM), (40, LONG), (200, LONG)])
def test_the_recipe_fits_the_length_unless_it_is_given(parse, epochs, chosen):
    _, args = parse("train_resnet", "--epochs", epochs)
    assert chosen.items() <= vars(args).items()
    given = {"crop_padding": 0, "cutmix": 0.25, "trivial_augment": 0.25, "low_res": 0,
             "weight_decay": 0}
    _, args = parse("train_resnet", "--epochs", epochs, "--crop-padding", 0, "--cutmix", 0.25,
                    "--trivial-augment", 0.25, "--low-res", 0, "--weight-decay", 0)
    assert given.items() <= vars(args).items()


def print_cutmix() -> None:
    """Print with which probability each epoch mixes images."""
    without_pictures()
    import data

    shuffled = data.Batches.shuffled

    def tell(batches, seed, epoch, start, size, cutmix):
        print(f"mixed {cutmix}")
        return shuffled(batches, seed, epoch, start, size, cutmix)

    data.Batches.shuffled = tell


@both
def test_the_last_epochs_are_not_mixed(name, data_dir, tmp_path):
    process = script(name, *SMALL[name], "--data-dir", data_dir, "--device", "cpu", "--batch-size",
                     16, "--epochs", 4, "--cutmix", 1, "--trivial-augment", 0.5, "--output-dir",
                     tmp_path, before=print_cutmix)
    assert (process.returncode, process.stderr) == (0, "")
    assert re.findall("mixed (.*)", process.stdout) == ["1.0", "1.0", "1.0", "0.0"]
    assert "random crop, flip, CutMix until epoch 3\n" in process.stdout


@pytest.mark.parametrize("epochs, unmixed", [(1, 0), (3, 0), (4, 1), (10, 3), (20, 6), (60, 6)])
def test_so_many_epochs_end_without_cutmix(epochs, unmixed):
    assert engine.optim.cutmix_by_epoch(epochs, 0.5) == [0.5] * (epochs - unmixed) + [0] * unmixed
