"""What people look at: the reports and their pictures, and predictions for pictures."""

import csv
import fcntl
import functools
import io
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import termios
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED, needs_data
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from processes import ROOT, script

import data
import finetune_resnet18
import models
import train_resnet
import utils

CPU = ["--device", "cpu"]
SHORT = ["--dataset", "synthetic", "--batch-size", 50, "--max-steps", 2, *CPU]


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of a Markdown text's tables, without their headers."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in
             block.splitlines()[2:]] for block in blocks]


def shows_something(path) -> bool:
    """Return whether a file is a picture of more than a plain page."""
    with Image.open(path) as picture:
        return picture.format == "PNG" and len(picture.convert("L").getcolors()) > 10


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written into files, in their order."""
    figures, savefig = [], Figure.savefig

    def record(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


def made_up_run(directory, script="train_resnet", bar=60.0, seed=0, epochs=3, **settings):
    """Write the files of a run with random numbers; return its test accuracies and all rows."""
    rng = np.random.default_rng(seed)
    directory.mkdir()
    settings |= {"seed": seed, "output_dir": str(directory)}
    config = {"script": script, "bar": bar, "command": "a command", "runtime": "a device",
              "torch": "2.14.1", "settings": settings}
    (directory / "config.json").write_text(json.dumps(config))
    names = ("lr", "train_loss", "train_acc", "val_loss", "val_acc", "val_top5", "test_loss",
             "test_acc", "test_top5")
    numbers = rng.uniform(size=(epochs, len(names))).round(4)
    metrics = [["dataset", "epoch", "epochs", *names]]
    times = [["epoch", "images_per_second", "seconds", "eta_seconds"]]
    for epoch, row in enumerate(numbers, 1):
        metrics.append(["cifar100", epoch, epochs, *row])
        times.append([epoch, 100 * epoch, 60, 0])
    for name, table in (("metrics.csv", metrics), ("times.csv", times)):
        with open(directory / name, "w") as file:
            csv.writer(file).writerows(table)
    return dict(zip(names, numbers.T, strict=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on the synthetic set: (process, output directory)."""
    output_dir = tmp_path_factory.mktemp("reports") / "run"
    return script("train_resnet", *SHORT, "--output-dir", output_dir), output_dir


def test_a_run_leaves_a_report_and_its_curves(finished):
    process, output_dir = finished
    assert "report.md, curves.png in" in process.stdout
    runs, environment, settings = tables((output_dir / "report.md").read_text())
    (metrics,) = csv.DictReader(io.StringIO((output_dir / "metrics.csv").read_text()))
    (times,) = csv.DictReader(io.StringIO((output_dir / "times.csv").read_text()))
    config = json.loads((output_dir / "config.json").read_text())
    assert runs == [[
        str(output_dir), "0", "1 of 1", f"{float(metrics['train_acc']):.2%}", "-",
        f"{float(metrics['test_acc']):.2%}", f"{float(metrics['test_top5']):.2%}",
        f"{float(metrics['test_loss']):.3f}",
        "on synthetic images, so the course's bar does not apply",
        utils.duration(float(times["seconds"])), f"{float(times['images_per_second']):.0f}",
    ]]
    assert [name for name, _ in environment] == ["command", "runtime", "torch", "python", "system"]
    assert ["torch", torch.__version__] in environment
    assert settings == [[name, str(value)] for name, value in config["settings"].items()]
    assert shows_something(output_dir / "curves.png")


@pytest.mark.parametrize("accuracy, words", [(0.6, "60% is met"), (0.5999, "60% is not met")])
def test_the_bar_is_met_or_not(accuracy, words):
    assert utils.verdict(accuracy, 60.0) == f"the course's bar of {words}"


def test_the_bars_are_those_of_the_course():
    assert (train_resnet.BAR, finetune_resnet18.BAR) == (60, 70)


def test_the_reported_epoch_is_the_last_not_the_best(tmp_path):
    numbers = made_up_run(tmp_path / "run", seed=4)
    accuracies = numbers["test_acc"]
    assert accuracies[-1] < 0.6 < max(accuracies)
    utils.write_report([tmp_path / "run"], tmp_path / "run", *utils.RUN_REPORTS)
    last = {name: f"{values[-1]:.2%}" for name, values in numbers.items()}
    (row,), *_ = tables((tmp_path / "run" / "report.md").read_text())
    assert row == [str(tmp_path / "run"), "4", "3 of 3", last["train_acc"], last["val_acc"],
                   last["test_acc"], last["test_top5"], f"{numbers['test_loss'][-1]:.3f}",
                   "the course's bar of 60% is not met", "3m00s",
                   "164"], "180 s, and the images of three epochs in the time of all"


def test_the_last_line_tells_the_last_epoch_not_the_best(finished, tmp_path):
    output_dir = shutil.copytree(finished[1], tmp_path / "run")
    state = torch.load(output_dir / "checkpoint.pt")
    (row,) = state["position"]["history"]
    state["position"]["history"] = [{**row, "test_acc": 0.99}, row]
    torch.save(state, output_dir / "checkpoint.pt")
    process = script("train_resnet", *SHORT, "--output-dir", output_dir, "--resume")
    assert f"final test accuracy {row['test_acc']:.2%} " in process.stdout, process.stderr


def test_curves_show_the_numbers_of_a_run_in_three_panels_with_the_bar(tmp_path, drawn):
    numbers = made_up_run(tmp_path / "run")
    utils.write_report([tmp_path / "run"], tmp_path, "report.md", "curves.png")
    (figure,) = drawn
    loss, accuracy, rate = figure.axes
    for panel, names in ((loss, ["train_loss", "val_loss", "test_loss"]),
                         (accuracy, ["train_acc", "val_acc", "test_acc"]), (rate, ["lr"])):
        assert panel.get_xlabel() == "epoch"
        for line, name in zip(panel.lines, names, strict=False):
            scale = 100 if panel is accuracy else 1
            np.testing.assert_allclose(line.get_ydata(), scale * numbers[name])
            assert list(line.get_xdata()) == [1, 2, 3]
    assert list(accuracy.lines[3].get_ydata()) == [60, 60]
    assert [len(panel.lines) for panel in figure.axes] == [3, 4, 1]
    assert "nats" in loss.get_ylabel() and "%" in accuracy.get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "train_resnet train", "train_resnet val", "train_resnet test", "the course's 60%"]
    dashes = {line.get_linestyle() for line in accuracy.lines}
    assert len(dashes) == 4, "to tell them apart without colours"
    assert shows_something(tmp_path / "curves.png")


def test_both_parts_in_one_picture_have_their_bars(tmp_path, drawn):
    """Settings that only the other part has do not make a difference."""
    made_up_run(tmp_path / "one")
    made_up_run(tmp_path / "two", "finetune_resnet18", 70.0, image_size=224)
    utils.compare([tmp_path / "one", tmp_path / "two"], tmp_path)
    (figure,) = drawn
    *curves, one, two = figure.axes[1].lines
    assert [list(bar.get_ydata()) for bar in (one, two)] == [[60, 60], [70, 70]]
    assert one.get_linestyle() != two.get_linestyle()
    assert {line.get_label() for line in curves} == {
        f"{name} {split}" for name in ("train_resnet", "finetune_resnet18")
        for split in ("train", "val", "test")}


def test_seeds_are_compared_as_mean_range_and_table(tmp_path, drawn):
    both = [made_up_run(tmp_path / f"a{seed}", seed=seed, epochs=3 + seed, lr=0.1,
                        device=f"cuda:{seed}") for seed in (0, 1)]
    other = made_up_run(tmp_path / "b", seed=0, lr=0.2, device="cpu")
    names = [tmp_path / name for name in ("a0", "a1", "b")]
    utils.compare(names, tmp_path)
    loss = drawn[0].axes[0]
    values = np.stack([numbers["test_loss"][:3] for numbers in both])
    np.testing.assert_allclose(loss.lines[2].get_ydata(), values.mean(0))
    np.testing.assert_allclose(loss.lines[5].get_ydata(), other["test_loss"])
    *_, band = loss.collections
    for epoch, (one, another) in enumerate(values.T, 1):
        ys = [y for x, y in band.get_paths()[0].vertices if x == epoch]
        np.testing.assert_allclose((min(ys), max(ys)), sorted((one, another)))

    process = script("train_resnet", "--compare", *names, "--output-dir", tmp_path / "new" / "dir")
    assert process.returncode == 0, process.stderr
    last = [100 * numbers["test_acc"][-1] for numbers in both]
    mean, deviation = f"{np.mean(last):.2f}%", f"{np.std(last, ddof=1):.2f}%"
    line = f"lr 0.1: finished runs 2, mean test accuracy {mean}, standard deviation {deviation}"
    assert line in process.stdout
    runs, seeds = tables((tmp_path / "new" / "dir" / "comparison.md").read_text())
    assert [row[0] for row in runs] == [str(name) for name in names]
    assert seeds[0] == ["train_resnet lr 0.1", "2", mean, deviation] and seeds[1][1] == "1"
    assert shows_something(tmp_path / "new" / "dir" / "comparison.png")


def test_no_two_of_thirty_groups_look_the_same(tmp_path):
    """And in black and white at least six do not; no colour is too light for paper."""
    runs = []
    for i in range(30):
        made_up_run(tmp_path / str(i), lr=i)
        runs.append(utils.load_run(tmp_path / str(i)))
    figure = Figure(layout="constrained")
    utils.draw_curves(figure, utils.group_runs(runs))
    figure.draw_without_rendering()
    legend, page = figure.legends[0].get_window_extent(), figure.bbox
    assert legend.x0 >= 0 and legend.x1 <= page.x1 and figure.axes[0].bbox.height > 200, "pixels"
    looks = [(line.get_color(), line.get_marker()) for line in figure.axes[2].lines]
    assert len(set(looks)) == 30 and len({marker for _, marker in looks[:6]}) == 6
    assert all(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)) < 0.7 for colour, _ in looks)


def test_an_unfinished_run_is_drawn_but_not_in_the_mean(tmp_path):
    last = made_up_run(tmp_path / "whole", seed=0)["test_acc"][-1]
    made_up_run(tmp_path / "half", seed=1)
    for name in ("metrics.csv", "times.csv"):
        lines = (tmp_path / "half" / name).read_text().splitlines()
        (tmp_path / "half" / name).write_text("\n".join(lines[:-1]) + "\n")
    for _ in range(2):  # what the first leaves behind is not in the way of the second
        utils.compare([tmp_path / "whole", tmp_path / "half"], tmp_path)
    runs, groups = tables((tmp_path / "comparison.md").read_text())
    assert [row[2] for row in runs] == ["3 of 3", "2 of 3"]
    assert groups == [["train_resnet", "1", f"{last:.2%}", "-"]]


def test_bars_in_a_path_do_not_break_the_table(tmp_path):
    made_up_run(tmp_path / "a|b")
    utils.compare([tmp_path / "a|b", tmp_path / "a|b"], tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert "a\\|b | 0 | 3 of 3 |" in text and "a device" in text, "and twice the same is one run"


@pytest.mark.parametrize("broken, content", [
    ("config.json", ""), ("config.json", "[1]"), ("config.json", '{"settings": []}'),
    ("metrics.csv", ""), ("metrics.csv", "epoch,epochs\n1,1\n"), ("times.csv", None),
])
def test_what_is_no_run_is_refused_in_a_line(tmp_path, broken, content):
    made_up_run(tmp_path / "run")
    (tmp_path / "run" / broken).unlink()
    if content is not None:
        (tmp_path / "run" / broken).write_text(content)
    with pytest.raises(utils.UserError, match="run: holds no run with a finished epoch"):
        utils.compare([tmp_path / "run"], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_output_dir_that_is_a_file_is_a_mistake(tmp_path):
    made_up_run(tmp_path / "run")
    (tmp_path / "file").touch()
    process = script("train_resnet", "--compare", tmp_path / "run", "--output-dir",
                     tmp_path / "file")
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert f"--output-dir {tmp_path / 'file'}: cannot be written" in process.stderr


def no_matplotlib():
    sys.modules["matplotlib.figure"] = None


def test_without_matplotlib_a_line_says_what_to_install(tmp_path):
    process = script("train_resnet", *SHORT, "--output-dir", tmp_path, before=no_matplotlib)
    assert process.returncode == 0, process.stderr
    assert re.search(r"curves.png is not drawn .*: pip install 'matplotlib>=3.7'\n", process.stdout)
    assert (tmp_path / "report.md").exists() and not (tmp_path / "curves.png").exists()
    (tmp_path / "mistakes.png").touch()  # of an earlier model
    process = script("train_resnet", "--eval-only", *CPU, "--output-dir", tmp_path,
                     before=no_matplotlib)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("is not drawn") == 2
    assert process.stdout.endswith(f"files      test-report.md, confusion.csv in {tmp_path}\n")
    assert "png" not in (tmp_path / "test-report.md").read_text()


def guesses(count: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Return logits float32 (count, 100), right in part, and labels (count,)."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 100, count)
    logits = rng.normal(0, 1.5, (count, 100)).astype(np.float32)
    logits[np.arange(count), labels] += rng.uniform(0, 8, count).astype(np.float32)
    return logits, labels


NAMES = list(data.CLASS_NAMES)


@pytest.fixture
def reported(tmp_path, caplog, drawn):
    """A report on guesses, and what numpy says of them."""
    logits, labels = guesses()
    images = torch.randint(256, (len(labels), 3, 32, 32), dtype=torch.uint8)
    dataset = SimpleNamespace(test=data.Split(images, torch.from_numpy(labels)), name="cifar100",
                              class_names=data.CLASS_NAMES)
    with caplog.at_level("INFO", "cifar100"):
        utils.report_test(torch.from_numpy(logits), dataset, data.SUPERCLASS_OF, tmp_path)
    exp = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    order = np.argsort(-logits, 1)
    confusion = np.zeros((100, 100), int)
    for label, taken in zip(labels, order[:, 0], strict=True):
        confusion[label, taken] += 1
    text = (tmp_path / "test-report.md").read_text()
    return SimpleNamespace(directory=tmp_path, text=text, tables=tables(text), labels=labels,
                           probabilities=exp / exp.sum(1, keepdims=True), order=order,
                           taken=order[:, 0], confusion=confusion, log=caplog.messages,
                           images=images.numpy(), figures=drawn)


def test_the_report_has_accuracy_loss_confusion_and_pictures(reported):
    labels = reported.labels
    loss = -np.log(reported.probabilities[np.arange(len(labels)), labels]).mean()
    top1, top5 = ((reported.order[:, :k] == labels[:, None]).any(1).mean() for k in (1, 5))
    assert reported.tables[0] == [[f"{top1:.2%}", f"{top5:.2%}", f"{loss:.3f} nats", "2,000"]]
    assert f"test loss {loss:.3f} acc {top1:.2%} top5 {top5:.2%}" in reported.log[0]
    with open(reported.directory / "confusion.csv") as file:
        header, *rows = csv.reader(file)
    assert header == ["class", *NAMES] and [row[0] for row in rows] == NAMES
    assert np.array_equal(np.array([row[1:] for row in rows], int), reported.confusion)
    assert reported.text.startswith("# The test set of cifar100\n")
    for picture in ("confusion.png", "mistakes.png"):
        assert shows_something(reported.directory / picture)
        assert f"]({picture})" in reported.text


def test_the_report_has_every_class_and_superclass(reported):
    superclasses, classes = reported.tables[1:3]
    groups = list(data.SUPERCLASSES)
    group = np.array([groups.index(data.SUPERCLASS_OF[name]) for name in NAMES])
    assert len(superclasses) == 20
    for name, right_class, right_superclass in superclasses:
        inside = group[reported.labels] == groups.index(name)
        labels, taken = reported.labels[inside], reported.taken[inside]
        assert right_class == f"{(taken == labels).mean():.1%}"
        assert right_superclass == f"{(group[taken] == group[labels]).mean():.1%}"

    assert sorted(row[0] for row in classes) == NAMES
    shares = [float(accuracy.rstrip("%")) for _, accuracy, _ in classes]
    assert shares == sorted(shares), "the worst first"
    for name, accuracy, taken in classes:
        row = reported.confusion[NAMES.index(name)].copy()
        assert accuracy == f"{row[NAMES.index(name)] / row.sum():.1%}"
        row[NAMES.index(name)] = 0
        other, count = re.fullmatch(r"(\w+) \((\d+)\)", taken).groups()
        assert int(count) == row.max() == row[NAMES.index(other)]


def test_the_report_has_the_most_confused_pairs(reported):
    confusion, pairs = reported.confusion, reported.tables[3]
    counted = [confusion[a, b] + confusion[b, a] for a in range(100) for b in range(a)]
    assert [int(one) + int(other) for *_, one, other in pairs] == sorted(counted)[::-1][:20]
    for a, b, one, other in pairs:
        assert int(one) == confusion[NAMES.index(a), NAMES.index(b)]
        assert int(other) == confusion[NAMES.index(b), NAMES.index(a)]


def test_the_report_has_the_calibration_with_its_bins(reported):
    confidence, right = reported.probabilities.max(1), reported.taken == reported.labels
    error, expected = 0, []
    for low, high in zip(np.arange(15) / 15, np.arange(1, 16) / 15, strict=True):
        inside = (low < confidence) & (confidence <= high)
        if inside.any():
            sure, accuracy = confidence[inside].mean(), right[inside].mean()
            error += inside.mean() * abs(accuracy - sure)
            expected.append([f"{low:.3f} to {high:.3f}", str(inside.sum()), f"{sure:.1%}",
                             f"{accuracy:.1%}"])
    assert reported.tables[4] == expected
    assert f"expected calibration error is {error:.4f}" in reported.text


def test_classes_without_images_or_mistakes_are_said_to_be_so(tmp_path, drawn):
    """Numbers that do not exist are not made up: neither 0/0, nor the first class by default."""
    images = torch.zeros((1, 3, 32, 32), dtype=torch.uint8)
    dataset = SimpleNamespace(test=data.Split(images, torch.tensor([7])), name="cifar100",
                              class_names=data.CLASS_NAMES)
    utils.report_test(torch.eye(100)[[7]], dataset, data.SUPERCLASS_OF, tmp_path)
    text = (tmp_path / "test-report.md").read_text()
    _, superclasses, classes, *_ = tables(text)
    assert ["insects", "100.0%", "100.0%"] in superclasses and ["fish", "-", "-"] in superclasses
    assert classes[-1] == ["beetle", "100.0%", "-"] and classes[0] == ["apple", "-", "-"]
    assert "nan" not in text
    assert not any(panel.images for panel in drawn[1].axes), "no mistake, no picture of one"


def test_a_report_that_cannot_be_written_is_an_error_after_the_result(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    (tmp_path / "run" / "test-report.md").mkdir()
    process = script("train_resnet", "--eval-only", *CPU, "--output-dir", tmp_path / "run")
    assert process.returncode == 2 and process.stdout.endswith("(1,000 synthetic images)\n")
    assert process.stderr.count("\n") == 1 and "cannot be written" in process.stderr


def test_the_confusion_picture_puts_superclasses_side_by_side(reported):
    panel, scale = reported.figures[0].axes
    groups = [label.get_text() for label in panel.get_yticklabels()]
    assert sorted(groups) == sorted(data.SUPERCLASSES)
    assert [label.get_text() for label in panel.get_xticklabels()] == groups
    assert list(panel.get_xticks()) == list(panel.get_yticks()) == list(range(2, 100, 5))
    order = [NAMES.index(name) for group in groups for name in data.SUPERCLASSES[group].split()]
    shares = 100 * reported.confusion / reported.confusion.sum(1, keepdims=True)
    np.testing.assert_allclose(panel.images[0].get_array(), shares[order][:, order])
    assert (panel.get_ylabel(), panel.get_xlabel()) == ("class", "taken for"), "a row is a class"
    assert "%" in scale.get_ylabel()


def test_the_sheet_shows_the_surest_mistakes_with_both_names(reported):
    confidence = reported.probabilities.max(1)
    wrong = [i for i in np.argsort(-confidence) if reported.taken[i] != reported.labels[i]]
    panels = reported.figures[1].axes
    assert len(panels) == 30 <= len(wrong)
    for panel, i in zip(panels, wrong, strict=False):
        assert np.array_equal(panel.images[0].get_array(), reported.images[i].transpose(1, 2, 0))
        name, says, sure = panel.get_title().split("\n")
        assert name == NAMES[reported.labels[i]]
        assert says == f"taken for {NAMES[reported.taken[i]]},"
        assert sure == f"{confidence[i]:.0%} sure"


def test_a_model_is_tested_as_it_was_trained(finished, pictures, tmp_path):
    """The data set and the size of the images come from the run, and can be said otherwise."""
    process = script("train_resnet", "--eval-only", *CPU, "--output-dir", finished[1])
    assert process.returncode == 0, process.stderr
    assert "(1,000 synthetic images)\nfiles      test-report.md, confusion.csv, " in process.stdout
    output_dir = tmp_path / "run"
    script("finetune_resnet18", *SHORT, "--weights", "random", "--image-size", 40,
           "--output-dir", output_dir)
    (metrics,) = csv.DictReader(io.StringIO((output_dir / "metrics.csv").read_text()))
    process = script("finetune_resnet18", "--eval-only", *CPU, "--output-dir", output_dir,
                     "--resume")
    assert f"test loss {float(metrics['test_loss']):.3f} " in process.stdout
    command = ["--predict", pictures / "0.png", *CPU, "--output-dir", output_dir]
    same, as_said = (script("finetune_resnet18", *command, *size).stdout
                     for size in ([], ["--image-size", 64]))
    assert same == script("finetune_resnet18", *command, "--image-size", 40).stdout != as_said
    process = script("train_resnet", *command)
    assert process.returncode == 2 and "a run of finetune_resnet18.py; use that" in process.stderr
    config = (output_dir / "config.json").read_text()
    (output_dir / "config.json").write_text(config.replace('"image_size": 40', '"image_size": 0'))
    process = script("finetune_resnet18", *command)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "config.json: argument --image-size: 0 is not within 32" in process.stderr


@needs_data
def test_the_superclasses_are_those_of_the_real_set():
    with tarfile.open(next((SHARED / "cifar100").glob("*.tar.gz"))) as archive:
        members = {member.name.split("/")[-1]: archive.extractfile(member).read()
                   for member in archive if member.name.endswith(("/meta", "/test"))}
    meta, test = (data._unpickle(members[name]) for name in ("meta", "test"))
    assert meta["fine_label_names"] == list(data.CLASS_NAMES)
    pairs = set(zip(test["fine_labels"], test["coarse_labels"], strict=True))
    assert len(pairs) == 100
    for fine, coarse in pairs:
        big = data.SUPERCLASS_OF[data.CLASS_NAMES[fine]]
        assert list(data.SUPERCLASSES).index(big) == coarse, "the official order, too"


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures of several formats and sizes, and its test images as they are."""
    images = data.synthetic().test.images
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, name in enumerate(("0.png", "1.bmp", "2.webp", "3.GIF", "4.jpg")):
        picture = Image.fromarray(images[i].permute(1, 2, 0).numpy())
        picture.resize((32, 32) if i < 2 else (200 + i, 100)).save(folder / name, lossless=True)
    Image.new("L", (1, 1)).save(folder / "grey.tiff")
    Image.new("RGBA", (70, 50)).save(folder / "transparent.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_predict_prints_the_five_likeliest_as_csv(finished, pictures):
    _, output_dir = finished
    command = ["--predict", pictures, pictures / "0.png", *CPU, "--output-dir", output_dir]
    process = script("train_resnet", *command, "--precision", "fp32")
    assert (process.returncode, process.stderr) == (0, "")
    rows = list(csv.DictReader(io.StringIO(process.stdout)))
    assert list(rows[0]) == ["file", "rank", "class", "probability"]
    names = ["0.png", "1.bmp", "2.webp", "3.GIF", "4.jpg", "grey.tiff", "transparent.png", "0.png"]
    assert [row["file"] for row in rows[::5]] == [str(pictures / name) for name in names]
    assert [row["rank"] for row in rows] == list("12345") * 8
    model = models.ResNet().eval()
    model.load_state_dict(torch.load(output_dir / "model.pt"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in data.CIFAR100_STATS)
    with torch.inference_mode():
        expected = model((data.synthetic().test.images[:2] / 255 - mean) / std).softmax(1)
    for i in (0, 1):
        values, labels = expected[i].topk(5)
        shown = rows[5 * i : 5 * i + 5]
        assert [row["class"] for row in shown] == [data.SYNTHETIC_NAMES[label] for label in labels]
        probabilities = [float(row["probability"]) for row in shown]
        assert probabilities == pytest.approx(values.tolist(), abs=2e-4)


def test_a_picture_is_turned_cut_and_scaled(tmp_path):
    """A wide red picture with green ends, taken with the camera turned by 90 degrees."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :, 0], pixels[:, :32], pixels[:, 96:] = 200, (0, 99, 0), (0, 99, 0)
    pixels[:32, 32:96, 2] = 255  # the upper half, blue: the right one when it is turned
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    dataset, files = data.pictures("cifar100", [tmp_path / "turned.png"])
    red, green, blue = dataset.test.images[0]
    assert dataset.test.images.shape == (1, 3, 32, 32) and files == [tmp_path / "turned.png"]
    assert int(green[2:-2].max()) == 0 and int(red[2:-2].min()) == 200, "the ends are cut off"
    assert int(blue[2:-2, :12].max()) == 0 and int(blue[2:-2, 20:].min()) > 240
    assert dataset.class_names == data.CLASS_NAMES


@pytest.mark.parametrize("name", ["grey.png", "grey.pgm", "grey.tiff"])
def test_a_picture_of_16_bits_is_not_clipped(tmp_path, name):
    if name == "grey.pgm":
        (tmp_path / name).write_bytes(b"P5 9 9 65535\n" + np.full(81, 25_700, ">u2").tobytes())
    else:
        Image.fromarray(np.full((9, 9), 25_700, np.uint16)).save(tmp_path / name)
    dataset, _ = data.pictures("cifar100", [tmp_path / name])
    assert dataset.test.images.unique().tolist() == [100]


@pytest.mark.parametrize("fault, words", [
    ("missing", "cannot be read as a picture"), ("text", "cannot be read as a picture"),
    ("cut", "cannot be read as a picture"), ("empty folder", "holds no picture"),
])
def test_what_is_no_picture_is_refused_in_a_line(finished, pictures, fault, words):
    _, output_dir = finished
    path = pictures / {"text": "notes.txt", "cut": "cut.png"}.get(fault, "nothing")
    if fault == "cut":
        path.write_bytes((pictures / "0.png").read_bytes()[:-500])
    elif fault == "empty folder":
        path.mkdir()
    process = script("train_resnet", "--predict", pictures / "0.png", path, *CPU,
                     "--output-dir", output_dir)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.count("\n") == 1 and f"{path}: {words}" in process.stderr


@pytest.mark.parametrize("where", ["closed pipe", "/dev/full"])
def test_predictions_that_nobody_takes_end_in_a_line(finished, pictures, where):
    process = script("train_resnet", "--predict", pictures, *CPU, "--output-dir", finished[1],
                     before=functools.partial(write_to, where))
    assert process.returncode == 1 and process.stderr.count("\n") == 1, process.stderr
    assert "train_resnet.py: cannot go on: " in process.stderr


def write_to(where: str) -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write if where == "closed pipe" else os.open(where, os.O_WRONLY), 1)


def on_a_terminal(*command, stdout=None) -> str:
    """Run a command with its output on a pseudo-terminal; return what it shows.

    Its standard output goes there, too, unless it has a file of its own.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows, columns
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT,
                               stdout=stdout or slave, stderr=slave, stdin=slave)
    os.close(slave)
    killer = threading.Timer(300, process.kill)
    killer.start()
    shown = b""
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # EIO, Linux's end of a terminal
        pass
    killer.cancel()
    os.close(master)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def test_a_terminal_shows_a_bar_and_aligned_predictions(finished, pictures, tmp_path):
    """And a pipe neither, as above and in test_training."""
    shown = on_a_terminal("train_resnet.py", *SHORT, "--output-dir", tmp_path / "run")
    assert re.search(r"epoch 1 train: +\d+%\|.*\| *\d/2 ", shown)
    assert re.search(r"epoch 1 test: +\d+%\|.*\| *\d/2 ", shown)
    predict = ["train_resnet.py", "--predict", pictures / "0.png", pictures / "grey.tiff", *CPU,
               "--output-dir", finished[1]]
    shown = on_a_terminal(*predict)
    assert re.search(r"test: +\d+%\|.*\| *\d/1 ", shown)
    lines = [line for line in shown.replace("\r", "\n").splitlines() if "plaid" in line]
    assert len(lines) == 10 and len({line.index("hue") for line in lines}) == 1
    assert [bool(line.split("hue")[0].strip()) for line in lines] == [True, *[False] * 4] * 2

    with open(tmp_path / "predictions.csv", "w+") as file:
        assert "test: " in on_a_terminal(*predict, stdout=file)
        file.seek(0)
        rows = list(csv.DictReader(file))
    for line, row in zip(lines, rows, strict=True):
        name, percent = re.search(r"(hue .*?) +(\d+\.\d)%$", line).groups()
        assert name == row["class"]
        assert float(percent) == pytest.approx(100 * float(row["probability"]), abs=0.06)
