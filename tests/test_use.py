"""A run, used by the command line: its report, evaluation, predictions, comparison.

And its numbers in TensorBoard.
"""

import csv
import functools
import importlib
import io
import json
import os
import pty
import re
import shutil
import struct
import sys
import termios
import threading
from contextlib import suppress
from fcntl import ioctl

import pytest
import torch
from faults import at_batch, kill
from helpers import call, compare_runs, contents, script, shows_something, tables
from PIL import Image

import cifar100.synthetic
import data
import models
import report.log
import utils
from cifar100.classes import CLASS_NAMES

MEANS_NOTE = "Means over n finished runs, in parentheses the sample standard deviation (n - 1):"
CPU = ["--device", "cpu"]
SHORT = ["--dataset", "synthetic", "--batch-size", 50, "--max-steps", 2, *CPU]
PART_2 = ["--weights", "random", "--image-size", 40]


def few_images() -> None:
    """Have a synthetic set of 200 training and 100 test images, for speed."""
    data.synthetic = functools.partial(data.synthetic, 2, 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run of each script on the synthetic set: {name: (process, output directory)}."""
    runs = {}
    for name, flags in (("train_resnet", []), ("finetune_resnet18", PART_2)):
        output_dir = tmp_path_factory.mktemp(name) / "run"
        process = script(name, *SHORT, *flags, "--output-dir", output_dir, before=few_images)
        assert (process.returncode, process.stderr) == (0, "")
        runs[name] = process, output_dir
    return runs


@pytest.fixture
def run_dir(finished):
    """The output directory of the run of part 1."""
    return finished["train_resnet"][1]


@pytest.fixture
def use(monkeypatch, capsys, caplog, drawn):
    """A function that uses a finished model in this process: returns stdout, and the log."""
    monkeypatch.setattr(data, "synthetic", functools.partial(data.synthetic, 2, 1))

    def run(name, *flags) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags), *CPU])
        caplog.clear()
        with caplog.at_level("INFO", "cifar100"):
            importlib.import_module(name).main()
        return capsys.readouterr().out, "\n".join(caplog.messages)

    return run


def only_row(output_dir) -> dict:
    """Return the row of a run's one epoch; metrics.csv has the same to six digits."""
    (row,) = torch.load(output_dir / "checkpoint.pt")["position"]["history"]
    (written,) = csv.DictReader(io.StringIO((output_dir / "metrics.csv").read_text()))
    assert written.pop("dataset") == row["dataset"] and list(row)[1:] == list(written)
    assert {name: float(value) for name, value in written.items()} == pytest.approx(
        {name: row[name] for name in written}, rel=1e-5)
    return row


def test_a_run_leaves_a_report_and_its_curves(finished):
    process, output_dir = finished["train_resnet"]
    assert "report.md, curves.png in" in process.stdout
    text = (output_dir / "report.md").read_text()
    runs, *_, recipe, environment = tables(text)
    row, config = only_row(output_dir), json.loads((output_dir / "config.json").read_text())
    assert runs == [[
        str(output_dir), "0", "1 of 1", f"{row['train_acc']:.2%}", "-", f"{row['test_acc']:.2%}",
        f"{row['test_top5']:.2%}", f"{row['test_loss']:.3f}",
        "not on CIFAR-100, so the course's required accuracy does not apply",
        report.log.duration(row["seconds"]), f"{row['images_per_second']:.0f}",
    ]]
    assert [name for name, _ in environment] == [
        "runtime", "processor", "torch", "torchvision", "numpy", "python", "system"]
    assert ["torch", torch.__version__] in environment
    assert recipe == [[name, text] for name, text in config["in_words"].items()]
    (settings,) = (text for name, text in recipe if name == "recipe")
    for name in ("label_smoothing", "precision", "seed", "val_size"):
        assert f"{name.replace('_', ' ')} {config['settings'][name]}" in settings.split(", ")
    assert re.match(r"# \w+ on synthetic images: \d+\.\d\d% after epoch 1\n", text)
    assert "None" not in text and "False" not in text
    assert shows_something(output_dir / "curves.png")


def test_the_last_line_tells_the_last_epoch_not_the_best(run_dir, tmp_path):
    output_dir = shutil.copytree(run_dir, tmp_path / "run")
    state = torch.load(output_dir / "checkpoint.pt")
    (row,) = state["position"]["history"]
    state["position"]["history"] = [{**row, "test_acc": 0.99}, row]
    torch.save(state, output_dir / "checkpoint.pt")
    process = script("train_resnet", *SHORT, "--output-dir", output_dir, "--resume",
                     before=few_images)
    assert f"final test accuracy {row['test_acc']:.2%} " in process.stdout, process.stderr


@pytest.mark.parametrize("name", ["train_resnet", "finetune_resnet18"])
def test_a_model_is_tested_as_it_was_trained(finished, use, name):
    """The data set and the size of the images come from the run; the scores are the same."""
    output_dir = finished[name][1]
    stdout, log = use(name, "--eval-only", "--output-dir", output_dir, "--resume")
    row = only_row(output_dir)
    assert "data       synthetic: 200 training and 100 test images" in log
    assert (f"test loss {row['test_loss']:.3f} acc {row['test_acc']:6.2%} "
            f"top5 {row['test_top5']:6.2%}  (100 synthetic images)\n"
            "files      test-report.md, confusion.csv, ") in log
    assert stdout == "", "all that it prints is in the log"


def test_the_size_of_the_images_can_be_said_otherwise(finished, use, pictures):
    flags = ["--predict", pictures / "0.png", "--output-dir", finished["finetune_resnet18"][1]]
    as_trained, as_said, other = (use("finetune_resnet18", *flags, *size)[0]
                                  for size in ([], ["--image-size", 40], ["--image-size", 64]))
    assert as_trained == as_said != other


def test_a_model_is_used_by_the_script_that_trained_it(finished, use, pictures):
    output_dir = finished["finetune_resnet18"][1]
    with pytest.raises(utils.UserError, match=r"a run of finetune_resnet18\.py; use that script"):
        use("train_resnet", "--predict", pictures / "0.png", "--output-dir", output_dir)


def test_a_config_that_a_flag_would_not_allow_is_named(finished, use, pictures, tmp_path):
    output_dir = shutil.copytree(finished["finetune_resnet18"][1], tmp_path / "run")
    config = (output_dir / "config.json").read_text()
    (output_dir / "config.json").write_text(config.replace('"image_size": 40', '"image_size": 0'))
    with pytest.raises(utils.UserError, match=r"config\.json: --image_size \(0 is not between"):
        use("finetune_resnet18", "--predict", pictures / "0.png", "--output-dir", output_dir)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures of several formats and sizes; the first two are test images."""
    images = data.synthetic(2, 1).test.images
    folder = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate(("0.png", "1.bmp", "2.webp", "3.GIF", "4.jpg")):
        picture = Image.fromarray(images[i].permute(1, 2, 0).numpy())
        picture.resize((32, 32) if i < 2 else (200 + i, 100)).save(folder / name, lossless=True)
    Image.new("L", (1, 1)).save(folder / "grey.tiff")
    Image.new("RGBA", (70, 50)).save(folder / "transparent.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_predict_prints_the_five_likeliest_as_csv(run_dir, pictures):
    """And nothing beside it, so that it can be piped on; notes.txt is passed over."""
    process = script("train_resnet", "--predict", pictures, pictures / "0.png", *CPU,
                     "--output-dir", run_dir, "--precision", "fp32")
    assert (process.returncode, process.stderr) == (
        0, "note       files passed over: 0 that could not be read, 1 of other kinds\n")
    rows = list(csv.DictReader(io.StringIO(process.stdout)))
    assert list(rows[0]) == ["file", "rank", "class", "probability"]
    names = ["0.png", "1.bmp", "2.webp", "3.GIF", "4.jpg", "grey.tiff", "transparent.png", "0.png"]
    assert [row["file"] for row in rows[::5]] == [str(pictures / name) for name in names]
    assert [row["rank"] for row in rows] == list("12345") * 8
    model = models.ResNet().eval()
    model.load_state_dict(torch.load(run_dir / "model.pt"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in data.CIFAR100_STATS)
    with torch.inference_mode():
        expected = model((data.synthetic(2, 1).test.images[:2] / 255 - mean) / std).softmax(1)
    for i in (0, 1):
        values, labels = expected[i].topk(5)
        shown = rows[5 * i : 5 * i + 5]
        names = [cifar100.synthetic.NAMES[label] for label in labels]
        assert [row["class"] for row in shown] == names
        probabilities = [float(row["probability"]) for row in shown]
        assert probabilities == pytest.approx(values.tolist(), abs=2e-4)


@pytest.mark.parametrize("has_config", [True, False])
def test_a_model_predicts_the_classes_of_its_run(run_dir, use, pictures, tmp_path, has_config):
    """And those of CIFAR-100 if nothing but the model is there."""
    output_dir = shutil.copytree(run_dir, tmp_path / "run")
    config, names = output_dir / "config.json", [f"kind {label}" for label in range(100)]
    if has_config:
        config.write_text(json.dumps({**json.loads(config.read_text()), "classes": names}))
    else:
        config.unlink()
    flags = [f"--predict={pictures / '0.png'}", "--output-dir", output_dir]
    stdout, log = use("train_resnet", *flags)
    rows = list(csv.DictReader(io.StringIO(stdout)))
    assert {row["class"] for row in rows} < set(names if has_config else CLASS_NAMES)
    assert ("the recipe's defaults are used" in log) != has_config
    process = script("train_resnet", *flags, *CPU)
    assert process.stdout == stdout and bool(process.stderr) != has_config, "notes go to stderr"


def test_a_picture_that_cannot_be_read_does_not_keep_the_others_from_being_predicted(
        run_dir, pictures, tmp_path):
    (tmp_path / "in/it").mkdir(parents=True)
    for name in ("a.jfif", "in/it/B.PNG", "in/notes.txt", "in/it/more.txt"):
        (tmp_path / name).write_bytes((pictures / "0.png").read_bytes())
    (tmp_path / "in/bad.jpg").write_text("no picture")
    flags = [*CPU, "--output-dir", run_dir, "--precision", "fp32", "--predict"]
    process = script("train_resnet", *flags, tmp_path)
    warning, last = process.stderr.splitlines()
    assert warning.startswith(f"warning    {tmp_path / 'in/bad.jpg'}: cannot be read as a picture")
    assert last == ("train_resnet.py: files passed over: 1 that could not be read, "
                    "2 of other kinds")
    alone = script("train_resnet", *flags, tmp_path / "a.jfif", tmp_path / "in/it/B.PNG")
    assert (process.returncode, alone.returncode, alone.stderr) == (2, 0, "")
    assert process.stdout == alone.stdout and process.stdout.count("\n") == 11


@pytest.mark.parametrize("names", [["notes.txt"], ["notes.txt", "missing.png"]])
def test_where_no_picture_can_be_read_there_is_one_line(run_dir, pictures, names):
    process = script("train_resnet", "--predict", *(pictures / name for name in names), *CPU,
                     "--output-dir", run_dir)
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (2, "", 1)
    assert f"{pictures / 'notes.txt'}: cannot be read as a picture" in process.stderr
    assert ("nor can 1 more" in process.stderr) == (len(names) > 1)


def test_two_cut_outs_that_look_the_same_are_predicted_the_same(run_dir, tmp_path):
    for name, hidden in (("a.png", (0, 255, 0, 0)), ("b.png", (0, 0, 0, 0))):
        picture = Image.new("RGBA", (32, 32), hidden)
        picture.paste((220, 30, 30, 255), (8, 8, 24, 24))
        picture.save(tmp_path / name)
    process = script("train_resnet", "--predict", tmp_path, *CPU, "--output-dir", run_dir)
    _, *rows = csv.reader(io.StringIO(process.stdout))
    assert [row[1:] for row in rows[:5]] == [row[1:] for row in rows[5:]] and len(rows) == 10


# A run that is not finished


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The output directory of a run that was stopped after its first step."""
    output_dir = tmp_path_factory.mktemp("stopped") / "run"
    process = script("train_resnet", *SHORT, "--output-dir", output_dir, "--max-minutes", 0.001,
                     before=few_images)
    assert process.returncode == 75
    assert not {"model.pt", "checkpoint-previous.pt"} & {*os.listdir(output_dir)}
    return output_dir


def write_state(source, target, likeliest: int, epoch: int = 1, **changes) -> None:
    """Write a finished run's checkpoint, in one of two epochs, whose network has a likely class."""
    state = torch.load(source / "checkpoint.pt")
    state["model"]["fc.bias"][likeliest] = 1e4
    history = [{**state["position"]["history"][0], "epochs": 2}] * epoch
    state["position"] |= {"epoch": epoch, "history": history}
    torch.save({**state, **changes}, target)


def write_model(directory, likeliest: int) -> None:
    """Write a model.pt with a likely class."""
    model = torch.load(directory / "checkpoint.pt")["model"]
    model["fc.bias"][likeliest] = 1e4
    torch.save(model, directory / "model.pt")


def predicted(use, output_dir, pictures) -> tuple[int, str]:
    """Return the class that the network of a run finds likeliest, and what the log says of it."""
    stdout, log = use("train_resnet", "--predict", pictures / "0.png", "--output-dir", output_dir)
    _, row, *_ = csv.reader(io.StringIO(stdout))
    lines = [line for line in log.splitlines() if not line.startswith("note ")]
    return cifar100.synthetic.NAMES.index(row[2]), "\n".join(lines)


def test_a_run_that_is_not_finished_is_tested_and_predicts(stopped, pictures, tmp_path):
    """By its checkpoint, which stays as it is, also while another process has the run."""
    output_dir = shutil.copytree(stopped, tmp_path / "run")
    before, lock = contents(output_dir), (output_dir / ".lock").open("a")
    assert utils.try_lock(lock)
    process = script("train_resnet", "--predict", pictures / "0.png", *CPU, "--precision", "fp32",
                     "--output-dir", output_dir)
    line = (f"model      {output_dir / 'checkpoint.pt'}, after epoch 0 and 1 steps of the next: "
            "the run is not finished\n")
    assert (process.returncode, process.stderr) == (0, line)
    assert contents(output_dir) == before
    model = models.ResNet().eval()
    model.load_state_dict(torch.load(output_dir / "checkpoint.pt")["model"])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in data.CIFAR100_STATS)
    with torch.inference_mode():
        expected = model((data.synthetic(2, 1).test.images[:1] / 255 - mean) / std).softmax(1)
    rows = list(csv.DictReader(io.StringIO(process.stdout)))
    values, labels = expected[0].topk(5)
    assert [row["class"] for row in rows] == [cifar100.synthetic.NAMES[label] for label in labels]
    assert [float(row["probability"]) for row in rows] == pytest.approx(values.tolist(), abs=2e-4)
    tested = script("train_resnet", "--eval-only", *CPU, "--output-dir", output_dir,
                    before=few_images)
    assert (tested.returncode, tested.stderr) == (0, "") and tested.stdout.startswith(line)
    after = contents(output_dir)
    assert {name: after[name] for name in before} == before
    assert line.removeprefix("model").strip() in after["test-report.md"].decode()
    lock.close()


def test_the_newest_whole_checkpoint_is_used(run_dir, use, pictures, tmp_path):
    output_dir = shutil.copytree(run_dir, tmp_path / "run")
    newest, previous = output_dir / "checkpoint.pt", output_dir / "checkpoint-previous.pt"
    (output_dir / "model.pt").unlink()
    write_state(run_dir, previous, 7)
    write_state(run_dir, newest, 3, epoch=2, keep={"average": {}})
    likeliest, log = predicted(use, output_dir, pictures)
    assert likeliest == 3
    assert log == (f"model      {newest}, after epoch 2: the run is not finished; the network "
                   "itself, not what the run keeps (average)")
    newest.write_bytes(newest.read_bytes()[:-1000])
    before = contents(output_dir)
    likeliest, log = predicted(use, output_dir, pictures)
    warning, line = log.splitlines()
    assert likeliest == 7
    assert line == f"model      {previous}, after epoch 1: the run is not finished"
    assert re.fullmatch(r"warning .*checkpoint\.pt: .*; the checkpoint before it is used", warning)
    assert contents(output_dir) == before
    newest.unlink()  # as between the two renames of a save
    assert predicted(use, output_dir, pictures)[0] == 7
    previous.write_text("no checkpoint")
    with pytest.raises(utils.UserError, match=r"checkpoint-previous\.pt: not a PyTorch file"):
        predicted(use, output_dir, pictures)


def test_a_checkpoint_can_be_renamed_while_it_is_looked_for(
        run_dir, use, pictures, tmp_path, monkeypatch):
    output_dir = shutil.copytree(run_dir, tmp_path / "run")
    (output_dir / "model.pt").unlink()
    load_tensors = utils.load_tensors

    def load_after_rename(path):
        if path.name == "checkpoint.pt":
            path.rename(output_dir / "checkpoint-previous.pt")
        return load_tensors(path)

    monkeypatch.setattr(utils, "load_tensors", load_after_rename)
    assert "checkpoint-previous.pt, after epoch 1: " in predicted(use, output_dir, pictures)[1]


@pytest.mark.parametrize("checkpoint", ["finished", "older", "damaged", "none"])
def test_the_model_of_a_finished_run_is_used(run_dir, use, pictures, tmp_path, checkpoint):
    """Whatever became of its checkpoints."""
    output_dir = shutil.copytree(run_dir, tmp_path / "run")
    newest, previous = output_dir / "checkpoint.pt", output_dir / "checkpoint-previous.pt"
    write_model(output_dir, 5)
    write_state(run_dir, previous, 7)
    write_state(run_dir, newest, 3, epoch=2)
    if checkpoint == "damaged":
        newest.write_text("no checkpoint")
    elif checkpoint != "finished":
        newest.unlink()
    if checkpoint == "none":
        previous.unlink()
    assert predicted(use, output_dir, pictures) == (5, "")


def test_a_checkpoint_of_another_network_is_one_line(run_dir, use, pictures, tmp_path):
    output_dir = shutil.copytree(run_dir, tmp_path / "run")
    (output_dir / "model.pt").unlink()
    write_state(run_dir, output_dir / "checkpoint.pt", 3, model=models.ResNet(10).state_dict())
    says = r"checkpoint\.pt: weights of another network: it has fc\.weight \(10, 256\), where"
    with pytest.raises(utils.UserError, match=says):
        predicted(use, output_dir, pictures)


def write_to(where: str) -> None:
    """Have stdout be a pipe that nobody reads, or a full disk."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write if where == "closed pipe" else os.open(where, os.O_WRONLY), 1)


@pytest.mark.parametrize("where", ["closed pipe", "/dev/full"])
def test_predictions_that_nobody_takes_end_in_a_line(run_dir, pictures, where):
    process = script("train_resnet", "--predict", pictures / "0.png", *CPU, "--output-dir", run_dir,
                     before=functools.partial(write_to, where))
    assert process.returncode == 1 and process.stderr.count("\n") == 1, process.stderr
    assert "train_resnet.py: cannot go on: " in process.stderr


def take_terminal(path: str, stdout: str | None) -> None:
    """Have the terminal at `path` for stderr, and for stdout if that has no file of its own."""
    few_images()
    terminal = os.open(path, os.O_RDWR)
    os.dup2(terminal, 2)
    os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT) if stdout else terminal, 1)


def on_a_terminal(*command, stdout=None) -> str:
    """Run a script with its output on a pseudo-terminal; return what it shows.

    Its standard output goes there, too, unless it has a file of its own.
    """
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows, columns
    shown = []

    def read():
        with suppress(OSError):  # EIO, Linux's end of a terminal
            while chunk := os.read(master, 65536):
                shown.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    take = functools.partial(take_terminal, os.ttyname(slave), stdout and str(stdout))
    process = script(*command, before=take)
    os.close(slave)
    reader.join(60)
    os.close(master)
    text = b"".join(shown).decode()
    assert process.returncode == 0, text
    return text


def test_a_terminal_shows_a_bar_for_training_and_for_the_test(tmp_path):
    shown = on_a_terminal("train_resnet", *SHORT, "--output-dir", tmp_path / "run")
    assert re.search(r"epoch 1 train: +\d+%\|.*\| *\d/2 ", shown)
    assert re.search(r"epoch 1 test: +\d+%\|.*\| *\d/1 ", shown)


def test_a_terminal_shows_a_bar_and_aligned_predictions(run_dir, pictures, tmp_path):
    """The same predictions as a file gets as CSV, while the bar goes to the terminal."""
    predict = ["train_resnet", "--predict", pictures / "0.png", pictures / "grey.tiff", *CPU,
               "--output-dir", run_dir]
    shown = on_a_terminal(*predict)
    assert re.search(r"test: +\d+%\|.*\| *\d/1 ", shown)
    lines = [line for line in shown.replace("\r", "\n").splitlines() if "plaid" in line]
    assert len(lines) == 10 and len({line.index("hue") for line in lines}) == 1
    assert [bool(line.split("hue")[0].strip()) for line in lines] == [True, *[False] * 4] * 2
    assert "test: " in on_a_terminal(*predict, stdout=tmp_path / "predictions.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "predictions.csv").read_text())))
    for line, row in zip(lines, rows, strict=True):
        name, percent = re.search(r"(hue .*?) +(\d+\.\d)%$", line).groups()
        assert name == row["class"]
        assert float(percent) == pytest.approx(100 * float(row["probability"]), abs=0.06)


def test_runs_are_compared_by_the_command_line(run_dir, tmp_path):
    other = shutil.copytree(run_dir, tmp_path / "other")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"seed": 0', '"seed": 1'))
    process = call(compare_runs, run_dir, other, "--output-dir", tmp_path / "new")
    assert (process.returncode, process.stderr) == (0, "")
    row = only_row(run_dir)
    assert process.stdout == (
        f"{MEANS_NOTE}\ntrain_resnet: n 2, "
        f"test accuracy {row['test_acc']:.2%} (0.00%), "
        f"test top-5 {row['test_top5']:.2%} (0.00%)\n"
        f"files      comparison.md, comparison.png in {tmp_path / 'new'}\n")
    assert shows_something(tmp_path / "new" / "comparison.png")


def test_a_comparison_that_cannot_be_written_is_one_line(run_dir, tmp_path):
    (tmp_path / "file").touch()
    process = call(compare_runs, run_dir, "--output-dir", tmp_path / "file")
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert f"--output-dir {tmp_path / 'file'}: cannot be written" in process.stderr


@pytest.fixture
def told(data_dir, tmp_path):
    """A function that starts a run of three epochs, of two steps each, and asks how it is shown.

    It returns the process, what TensorBoard reads and what metrics.csv holds, if it is there: both
    as {name: [(epoch, number)]}.
    """
    pytest.importorskip("tensorboard")
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")

    def start(before=None, *flags):
        process = script("train_resnet", "--data-dir", data_dir, *CPU, "--batch-size", 16,
                         "--epochs", 3, "--low-res", 0.4, "--output-dir", tmp_path,
                         "--tensorboard", "--resume", *flags, before=before)
        events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        shown = {name: [(event.step, event.value) for event in events.Scalars(name)]
                 for name in events.Tags()["scalars"]}
        if not (tmp_path / "model.pt").exists():
            return process, shown, None
        rows = list(csv.DictReader(io.StringIO((tmp_path / "metrics.csv").read_text())))
        return process, shown, {
            name: [(int(row["epoch"]), pytest.approx(float(row[name]), rel=1e-5)) for row in rows]
            for name in rows[0].keys() - {"dataset", "epoch", "epochs"}}

    return start


def test_tensorboard_shows_the_numbers_of_metrics_csv_once(told):
    """Also after two kills, of which the first lost two epochs."""
    kill_in_epoch_3 = functools.partial(at_batch, 8, kill)
    for flags in ([], ["--checkpoint-minutes", 0]):
        process, shown, _ = told(kill_in_epoch_3, *flags)
        assert process.returncode == -9 and [epoch for epoch, _ in shown["test_acc"]] == [1, 2]
    process, shown, written = told()
    assert "resume     after 2 epochs" in process.stdout and "epoch  2/3" not in process.stdout
    assert process.returncode == 0 and shown == written and len(shown["lr"]) == 3


def fill_disk_for_tensorboard() -> None:
    """Have the disk be full for one write of the second epoch."""
    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem
    append, calls = LocalFileSystem.append, iter(range(1000))

    def append_or_fail(*arguments):
        if next(calls) == 15:
            raise OSError(28, "No space left on device")
        append(*arguments)

    LocalFileSystem.append = append_or_fail


def test_a_full_disk_under_tensorboard_costs_a_line(told):
    process, shown, written = told(fill_disk_for_tensorboard)
    assert process.returncode == 0 and shown == written
    assert process.stdout.count("warning    not written for TensorBoard ([Errno 28] ") == 1


def hide_tensorboard() -> None:
    """Have no package of this name."""
    sys.modules["tensorboard"] = None


def test_without_its_package_tensorboard_is_one_line_before_training(tmp_path):
    process = script("train_resnet", *SHORT, "--output-dir", tmp_path / "run", "--tensorboard",
                     before=hide_tensorboard)
    assert (process.returncode, process.stderr.count("\n")) == (2, 1), process.stderr
    assert "--tensorboard needs pip install 'tensorboard>=2.17.1'" in process.stderr
    assert not (tmp_path / "run").exists()
