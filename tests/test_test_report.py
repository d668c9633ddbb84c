"""The report on the test set says what numpy says of the same guesses."""

import csv
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import shows_something, tables

import data
import report.log
import utils
from cifar100.classes import CLASS_NAMES, SUPERCLASS_OF, SUPERCLASSES
from report.evaluation import write_test_report

NAMES = list(CLASS_NAMES)


def guesses(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logits float32 (count, 100), right in part, and labels (count,)."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 100, count)
    logits = rng.normal(0, 1.5, (count, 100)).astype(np.float32)
    logits[np.arange(count), labels] += rng.uniform(0, 8, count).astype(np.float32)
    return logits, labels


def dataset_of(labels: torch.Tensor) -> data.Dataset:
    """Return a data set whose test set has these labels and random images."""
    images = torch.randint(256, (len(labels), 3, 32, 32), dtype=torch.uint8)
    test = data.Split(images, labels)
    return data.Dataset("cifar100", test, test, CLASS_NAMES, "made up")


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A report on guesses with its pictures, and what numpy says of them."""
    directory, figures = tmp_path_factory.mktemp("report"), []
    logits, labels = guesses(2000)
    dataset = dataset_of(torch.from_numpy(labels))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_confusion", "draw_mistakes"):
            draw = getattr(report.evaluation, name)
            patch.setattr(report.evaluation, name, lambda figure, *content, draw=draw: (
                figures.append(figure), draw(figure, *content)))
        write_test_report(torch.from_numpy(logits), dataset, directory)
    exp = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    taken = logits.argmax(1)
    confusion = np.zeros((100, 100), int)
    np.add.at(confusion, (labels, taken), 1)
    text = (directory / "test-report.md").read_text()
    return SimpleNamespace(directory=directory, text=text, tables=tables(text), labels=labels,
                           logits=logits, probabilities=exp / exp.sum(1, keepdims=True),
                           taken=taken, confusion=confusion, figures=figures,
                           images=dataset.test.images.numpy())


def test_the_report_has_accuracy_loss_confusion_and_pictures(reported):
    labels, order = reported.labels, np.argsort(-reported.logits, 1)
    loss = -np.log(reported.probabilities[np.arange(len(labels)), labels]).mean()
    top1, top5 = ((order[:, :k] == labels[:, None]).any(1).mean() for k in (1, 5))
    assert reported.tables[0] == [[f"{top1:.2%}", f"{top5:.2%}", f"{loss:.3f} nats", "2,000"]]
    with open(reported.directory / "confusion.csv") as file:
        header, *rows = csv.reader(file)
    assert header == ["class", *NAMES] and [row[0] for row in rows] == NAMES
    assert np.array_equal(np.array([row[1:] for row in rows], int), reported.confusion)
    assert reported.text.startswith("# The test set of cifar100\n")
    for picture in ("confusion.png", "mistakes.png"):
        assert shows_something(reported.directory / picture)
        assert f"]({picture})" in reported.text


def test_the_report_has_every_superclass(reported):
    groups = list(SUPERCLASSES)
    group = np.array([groups.index(SUPERCLASS_OF[name]) for name in NAMES])
    superclasses = reported.tables[1]
    assert sorted(row[0] for row in superclasses) == sorted(groups)
    for name, right_class, right_superclass in superclasses:
        inside = group[reported.labels] == groups.index(name)
        labels, taken = reported.labels[inside], reported.taken[inside]
        assert right_class == f"{(taken == labels).mean():.1%}"
        assert right_superclass == f"{(group[taken] == group[labels]).mean():.1%}"


def test_the_report_has_every_class_the_worst_first(reported):
    classes = reported.tables[2]
    assert sorted(row[0] for row in classes) == NAMES
    shares = [float(accuracy.rstrip("%")) for _, accuracy, _ in classes]
    assert shares == sorted(shares)
    for name, accuracy, taken in classes:
        row = reported.confusion[NAMES.index(name)].copy()
        assert accuracy == f"{row[NAMES.index(name)] / row.sum():.1%}"
        row[NAMES.index(name)] = 0
        other, count = re.fullmatch(r"(\w+) \((\d+)\)", taken).groups()
        assert int(count) == row.max() == row[NAMES.index(other)]


def test_the_report_has_the_expected_calibration_error(reported):
    confidence, right = reported.probabilities.max(1), reported.taken == reported.labels
    error = 0
    for low, high in zip(np.arange(15) / 15, np.arange(1, 16) / 15, strict=True):
        inside = (low < confidence) & (confidence <= high)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert f"expected calibration error is {error:.4f} (15 bins" in reported.text


def test_the_confusion_picture_puts_superclasses_side_by_side(reported):
    panel, scale = reported.figures[0].axes
    groups = [label.get_text() for label in panel.get_yticklabels()]
    assert sorted(groups) == sorted(SUPERCLASSES)
    assert [label.get_text() for label in panel.get_xticklabels()] == groups
    assert list(panel.get_xticks()) == list(panel.get_yticks()) == list(range(2, 100, 5))
    order = [NAMES.index(name) for group in groups for name in SUPERCLASSES[group].split()]
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


def test_the_log_has_the_same_scores_and_names_the_files(tmp_path, drawn, caplog):
    logits, labels = map(torch.from_numpy, guesses(50))
    with caplog.at_level("INFO", "cifar100"):
        write_test_report(logits, dataset_of(labels), tmp_path)
    scores = report.log.score(logits, labels)
    assert caplog.messages == [
        f"test loss {scores.loss:.3f} acc {scores.accuracy:.2%} top5 {scores.top5:.2%}  "
        "(50 cifar100 images)",
        f"files      test-report.md, confusion.csv, confusion.png, mistakes.png in {tmp_path}",
    ]


def test_classes_without_images_or_mistakes_are_said_to_be_so(tmp_path, drawn):
    """Numbers that do not exist are not made up: neither 0/0, nor the first class by default."""
    write_test_report(torch.eye(100)[[7]], dataset_of(torch.tensor([7])), tmp_path)
    text = (tmp_path / "test-report.md").read_text()
    _, superclasses, classes, *_ = tables(text)
    assert ["insects", "100.0%", "100.0%"] in superclasses and ["fish", "-", "-"] in superclasses
    assert classes[-1] == ["beetle", "100.0%", "-"] and classes[0] == ["apple", "-", "-"]
    assert "nan" not in text
    assert not any(panel.images for panel in drawn[1].axes), "no mistake, no picture of one"


def test_without_matplotlib_the_report_has_no_pictures_and_no_old_ones(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "mistakes.png").touch()  # of an earlier model
    with caplog.at_level("INFO", "cifar100"):
        write_test_report(torch.eye(100)[[7]], dataset_of(torch.tensor([8])), tmp_path)
    assert caplog.text.count("is not drawn") == 2
    assert caplog.messages[-1] == f"files      test-report.md, confusion.csv in {tmp_path}"
    assert "png" not in (tmp_path / "test-report.md").read_text()


def test_a_report_that_cannot_be_written_is_an_error_after_the_result(tmp_path, drawn, caplog):
    (tmp_path / "test-report.md").mkdir()
    with caplog.at_level("INFO", "cifar100"), pytest.raises(utils.UserError, match="be written"):
        write_test_report(torch.eye(100)[[7]], dataset_of(torch.tensor([7])), tmp_path)
    assert "(1 cifar100 images)" in caplog.messages[-1]
