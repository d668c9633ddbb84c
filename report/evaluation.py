"""Report on the test set: scores, superclasses, confusions, calibration; and predictions."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cifar100.classes import SUPERCLASS_OF
from data import Dataset
from report.curves import COLOURS
from report.log import Metrics, files_line, score, top5
from report.write import csv_table, markdown_table, write_picture, write_text
from utils import guard, log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEST_REPORTS = ("test-report.md", "confusion.csv", "confusion.png", "mistakes.png")


def write_test_report(logits: Tensor, dataset: Dataset, into: Path) -> None:
    """Print what test logits (N, classes) are worth, and write TEST_REPORTS; raises UserError."""
    names, labels = dataset.class_names, dataset.test.labels
    metrics = score(logits, labels)
    log.info(f"test loss {metrics.loss:.3f} acc {metrics.accuracy:6.2%} top5 {metrics.top5:6.2%}  "
             f"({metrics.images:,} {dataset.name} images)")
    # Break ties as `score` does, unlike argmax: logits computed in bf16 hold some.
    taken, confidence = top5(logits).indices[:, 0], logits.softmax(1).amax(1)
    classes = logits.shape[1]
    pairs = torch.bincount(labels * classes + taken, minlength=classes**2)
    confusion = pairs.view(classes, classes).numpy()  # (class, class that it was taken for)
    superclasses: dict[str, list[int]] = {}  # their labels
    for label, name in enumerate(names):
        superclass = SUPERCLASS_OF.get(name, "other" if len(names) > 20 else name)
        superclasses.setdefault(superclass, []).append(label)
    rows = [(name, *row) for name, row in zip(names, confusion.tolist(), strict=True)]
    with guard(f"{into}: the report cannot be written", OSError):
        write_text(into / "confusion.csv", csv_table(("class", *names), rows))
        text = _score_tables(metrics, confusion, dataset, superclasses)
        text += _calibration(confidence, taken == labels)
        text += write_picture(into / "confusion.png", "## Confusion (numbers: confusion.csv)",
                              draw_confusion, confusion, superclasses)
        text += write_picture(into / "mistakes.png", "## The surest mistakes", draw_mistakes,
                              taken, confidence, dataset)
        write_text(into / "test-report.md", text)
    log.info(files_line(into, TEST_REPORTS))


def draw_confusion(figure: "Figure", confusion: np.ndarray,
                   superclasses: dict[str, list[int]]) -> None:
    """Draw a confusion matrix (C, C), the classes of a superclass side by side."""
    figure.set_size_inches(9, 8)
    order = [label for members in superclasses.values() for label in members]
    shares = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    panel = figure.subplots()
    image = panel.imshow(shares[np.ix_(order, order)], "Greys", vmin=0, vmax=25)
    figure.colorbar(image, label="% of the class's images", shrink=0.8, extend="max")
    edges = np.cumsum([0, *map(len, superclasses.values())])
    middles = (edges[1:] + edges[:-1] - 1) / 2
    panel.set(xlabel="taken for", ylabel="class")
    panel.set_xticks(middles, superclasses, rotation=90)
    panel.set_yticks(middles, superclasses)
    for edge in edges[1:-1] - 0.5:
        panel.axhline(edge, color=COLOURS[0], linewidth=0.3)
        panel.axvline(edge, color=COLOURS[0], linewidth=0.3)


def draw_mistakes(figure: "Figure", taken: Tensor, confidence: Tensor, dataset: Dataset) -> None:
    """Draw the 30 surest mistakes; `taken` are classes and `confidence` fractions of 1, (N,)."""
    figure.set_size_inches(12, 12)
    figure.get_layout_engine().set(h_pad=0.1)  # inches; the titles of the first row are high
    images, labels = dataset.test
    wrong = (taken != labels).nonzero()[:, 0]
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)]
    for panel in figure.subplots(5, 6).flat:
        panel.axis("off")
    for panel, i in zip(figure.axes, wrong, strict=False):
        panel.imshow(images[i].permute(1, 2, 0).numpy())
        panel.set_title(f"{dataset.class_names[labels[i]]}\n"
                        f"taken for {dataset.class_names[taken[i]]},\n{confidence[i]:.0%} sure",
                        fontsize="small")


def _share(count: float, whole: float) -> str:
    return f"{count / whole:.1%}" if whole else "-"


def _score_tables(metrics: Metrics, confusion: np.ndarray, dataset: Dataset,
                  superclasses: dict[str, list[int]]) -> str:
    """Return the tables of the whole set, the superclasses, the classes and the confused pairs."""
    totals, right, names = confusion.sum(1), np.diag(confusion), dataset.class_names
    text = f"# The test set of {dataset.name}\n\n" + markdown_table(
        ("top-1 accuracy", "top-5 accuracy", "cross entropy", "images"),
        [(f"{metrics.accuracy:.2%}", f"{metrics.top5:.2%}", f"{metrics.loss:.3f} nats",
          f"{metrics.images:,}")])
    if SUPERCLASS_OF.keys() & set(names):
        text += "## Superclasses\n\n" + markdown_table(
            ("superclass", "right class", "right superclass"),
            [(name, _share(right[members].sum(), totals[members].sum()),
              _share(confusion[np.ix_(members, members)].sum(), totals[members].sum()))
             for name, members in superclasses.items()])
    mistaken = confusion - np.diag(right)
    classes = []
    for label in (right / np.maximum(totals, 1)).argsort(kind="stable"):
        row = mistaken[label]
        taken = f"{names[row.argmax()]} ({row.max()})" if row.any() else "-"
        classes.append((names[label], _share(right[label], totals[label]), taken))
    text += "## Classes, the worst first\n\n" + markdown_table(
        ("class", "accuracy", "most often taken for"), classes)
    both = np.triu(mistaken + mistaken.T)
    worst = [divmod(index, len(names)) for index in (-both).argsort(axis=None, kind="stable")[:20]]
    return text + "## The most confused pairs\n\n" + markdown_table(
        ("one", "other", "one taken for the other", "other for the one"),
        [(names[a], names[b], mistaken[a, b], mistaken[b, a]) for a, b in worst if both[a, b]])


def _calibration(confidence: Tensor, is_right: Tensor) -> str:
    """Return the expected calibration error with 15 equal bins (Guo et al. 2017)."""
    bin_of = (15 * confidence).ceil().long().clamp(1, 15)
    gaps = torch.bincount(bin_of, is_right.double() - confidence.double())
    error = gaps.abs().sum() / len(confidence)
    return (f"## Calibration\n\nThe expected calibration error is {error:.4f} (15 bins, Guo et al. "
            "2017, arXiv:1706.04599).\n\n")


def print_predictions(logits: Tensor, class_names: Sequence[str], files: list[Path]) -> None:
    """Print each file's five likeliest classes by logits (N, classes); as CSV but on a terminal."""
    rows = []
    for file, shares, labels in zip(files, *top5(logits.softmax(1)), strict=True):
        for rank, (share, label) in enumerate(zip(shares, labels, strict=True), 1):
            rows.append((str(file), rank, class_names[label], share.item()))
    if sys.stdout and sys.stdout.isatty():
        width = max(len(name) for name, *_ in rows)
        text = "".join(f"{name if rank == 1 else '':{width}}  {label:13} {share:6.1%}\n"
                       for name, rank, label, share in rows)
    else:
        text = csv_table(("file", "rank", "class", "probability"),
                         [(*row, f"{share:.4f}") for *row, share in rows])
    print(text, end="", flush=True)
