"""Report on a run, and on the test set: scores, superclasses, confusions; and predictions."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from cifar100.classes import SUPERCLASS_OF
from data import Dataset
from report.curves import draw_curves
from report.log import Metrics, files_line, score, top5
from report.runs import group_runs, read_run, summary_table
from report.write import csv_table, markdown_table, write_picture, write_text
from utils import UserError, guard, log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN_REPORTS = ("report.md", "curves.png")
TEST_REPORTS = ("test-report.md", "confusion.csv", "confusion.png", "mistakes.png")
ENVIRONMENT = ("runtime", "processor", "torch", "torchvision", "numpy", "python", "system",
               "weights_sha256")


def write_run_report(directory: Path, history: list[dict]) -> None:
    """Write report.md and curves.png into a run's directory; raises OSError."""
    try:
        record = read_run(directory, history)
    except UserError as error:
        log.info(f"warning    no report: {error}")
        return
    config, last, network = record.config, history[-1], record.config["network"]
    images = "CIFAR-100" if config["dataset"] == "cifar100" else f"{config['dataset']} images"
    layers = [*network["layers"], ("all", network["name"], network["parameters"])]
    environment = ((name, config[name]) for name in ENVIRONMENT if config.get(name))
    write_text(directory / "report.md", "".join([
        f"# {network['name']} on {images}: {last['test_acc']:.2%} after epoch {last['epoch']:.0f}",
        "\n\n", summary_table([record]),
        write_picture(directory / "curves.png", "## Curves", draw_curves, group_runs([record])),
        "## Network\n\n", markdown_table(("layer", "kind", "parameters"), [
            (*layer, f"{count:,}") for *layer, count in layers]),
        "## Recipe\n\n", markdown_table(("", ""), config["in_words"].items()),
        "## Environment\n\n", markdown_table(("", ""), environment)]))


def write_test_report(logits: Tensor, dataset: Dataset, into: Path, note: str = "") -> None:
    """Log the scores of test logits (N, classes), and write TEST_REPORTS; raises UserError.

    `note` is a line about the model, for the report.
    """
    names, labels = dataset.class_names, dataset.test.labels
    metrics = score(logits, labels)
    log.info(f"test loss {metrics.loss:.3f} acc {metrics.accuracy:6.2%} top5 {metrics.top5:6.2%}  "
             f"({metrics.images:,} {dataset.name} images)")
    taken, confidence = logits.argmax(1), logits.softmax(1).amax(1)
    confusion = np.zeros((len(names), len(names)), int)  # (class, class that it was taken for)
    np.add.at(confusion, (labels.numpy(), taken.numpy()), 1)
    superclasses: dict[str, list[int]] = {}  # their labels
    for label, name in enumerate(names):
        superclass = SUPERCLASS_OF.get(name, "other" if len(names) > 20 else name)
        superclasses.setdefault(superclass, []).append(label)
    with guard(f"{into}: the report cannot be written", OSError):
        rows = np.column_stack([names, confusion])
        write_text(into / "confusion.csv", csv_table(("class", *names), rows))
        text = f"# The test set of {dataset.name}\n\n" + (f"{note}\n\n" if note else "")
        text += _score_tables(metrics, confusion, names, superclasses)
        # The expected calibration error: |accuracy - confidence|, averaged over bins.
        bins = (15 * confidence).ceil().long().clamp(1, 15)
        gaps = bins.bincount((taken == labels).double() - confidence.double())
        text += (f"The expected calibration error is {gaps.abs().sum() / len(bins):.4f} (15 bins, "
                 "Guo et al. 2017, arXiv:1706.04599).\n\n")
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
    panel = figure.subplots()
    panel.set(xlabel="taken for", ylabel="class")
    order = [label for members in superclasses.values() for label in members]
    shares = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    image = panel.imshow(shares[np.ix_(order, order)], "Greys", vmin=0, vmax=25)
    figure.colorbar(image, label="% of the class's images", extend="max")
    edges = np.cumsum([0, *map(len, superclasses.values())]) - 0.5
    middles = (edges[1:] + edges[:-1]) / 2
    panel.set_xticks(middles, superclasses, rotation=90)
    panel.set_yticks(middles, superclasses)


def draw_mistakes(figure: "Figure", taken: Tensor, confidence: Tensor, dataset: Dataset) -> None:
    """Draw the 30 surest mistakes; `taken` are classes and `confidence` fractions of 1, (N,)."""
    figure.set_size_inches(12, 13)
    images, labels = dataset.test
    wrong = [i for i in confidence.argsort(descending=True, stable=True) if taken[i] != labels[i]]
    for panel in figure.subplots(5, 6).flat:
        panel.axis("off")
    for panel, i in zip(figure.axes, wrong, strict=False):
        panel.imshow(images[i].permute(1, 2, 0).numpy())
        panel.set_title(f"{dataset.class_names[labels[i]]}\n"
                        f"taken for {dataset.class_names[taken[i]]},\n{confidence[i]:.0%} sure",
                        fontsize="small")


def _share(count: float, whole: float) -> str:
    return f"{count / whole:.1%}" if whole else "-"


def _score_tables(metrics: Metrics, confusion: np.ndarray, names: Sequence[str],
                  superclasses: dict[str, list[int]]) -> str:
    """Return the tables of the whole set, the superclasses and the classes."""
    text = markdown_table(("top-1 accuracy", "top-5 accuracy", "cross entropy", "images"), [
        (f"{metrics.accuracy:.2%}", f"{metrics.top5:.2%}", f"{metrics.loss:.3f} nats",
         f"{metrics.images:,}")])
    totals, right = confusion.sum(1), np.diag(confusion)
    if SUPERCLASS_OF.keys() & set(names):
        text += "## Superclasses\n\n" + markdown_table(
            ("superclass", "right class", "right superclass"),
            [(name, _share(right[members].sum(), totals[members].sum()),
              _share(confusion[np.ix_(members, members)].sum(), totals[members].sum()))
             for name, members in superclasses.items()])
    mistaken = confusion - np.diag(right)
    others = [f"{names[row.argmax()]} ({row.max()})" if row.any() else "-" for row in mistaken]
    text += "## Classes, the worst first\n\n" + markdown_table(
        ("class", "accuracy", "most often taken for"),
        [(names[label], _share(right[label], totals[label]), others[label])
         for label in (right / np.maximum(totals, 1)).argsort(kind="stable")])
    return text


def print_predictions(logits: Tensor, class_names: Sequence[str], files: list[Path]) -> None:
    """Print each file's five likeliest classes by logits (N, classes); as CSV but on a terminal."""
    rows = []
    for file, shares, labels in zip(files, logits.softmax(1), top5(logits), strict=True):
        rows += [(str(file), rank, class_names[label], shares[label].item())
                 for rank, label in enumerate(labels, 1)]
    if sys.stdout and sys.stdout.isatty():
        width = max(len(name) for name, *_ in rows)
        text = "".join(f"{name if rank == 1 else '':{width}}  {label:13} {share:6.1%}\n"
                       for name, rank, label, share in rows)
    else:
        text = csv_table(("file", "rank", "class", "probability"),
                         [(*row, f"{share:.4f}") for *row, share in rows])
    print(text, end="", flush=True)
