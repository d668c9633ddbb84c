"""Scores, and the lines of the log that are made of them."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from utils import log


class Metrics(NamedTuple):
    """Means over `images` images; accuracies are fractions of 1, and top5 is NaN in training."""

    loss: float  # nats
    accuracy: float
    top5: float
    images: int


def top5(logits: Tensor) -> Tensor:
    """Return the five likeliest classes of each row; of equal logits the lower first, as argmax."""
    return logits.argsort(descending=True, stable=True)[:, :5]


def score(logits: Tensor, labels: Tensor) -> Metrics:
    """Return the metrics of logits (N, C) for labels int64 (N,), computed in float64."""
    hits = (top5(logits) == labels[:, None]).double()  # (N, 5)
    loss = F.cross_entropy(logits.double(), labels)
    return Metrics(loss.item(), hits[:, 0].mean().item(), hits.sum(1).mean().item(), len(labels))


def metric_columns(results: dict[str, Metrics]) -> dict[str, float]:
    """Return the columns of metrics.csv for the results of each split."""
    names = ("loss", "acc", "top5")
    return {f"{split}_{name}": value for split, metrics in results.items()
            for name, value in zip(names, metrics, strict=False) if not math.isnan(value)}


def epoch_line(row: dict) -> str:
    """Format one row of metrics.csv as the line for the log."""
    width = max(2, len(str(row["epochs"])))
    fields = [] if row["dataset"] == "cifar100" else [f"[{row['dataset']}]"]
    is_same = row["test_image_size"] == row["image_size"]
    tested = "" if is_same else f" tested at {row['test_image_size']}px"
    fields += [f"epoch {row['epoch']:{width}}/{row['epochs']}", f"{row['image_size']}px{tested}",
               f"lr {row['lr']:.4f}"]
    for split in ("train", "val", "test"):
        if f"{split}_loss" in row:
            fields.append(f"{split} loss {row[f'{split}_loss']:.3f} acc {row[f'{split}_acc']:6.2%}")
        if f"{split}_top5" in row:
            fields[-1] += f" top5 {row[f'{split}_top5']:6.2%}"
    fields += [f"{row['images_per_second']:.0f} img/s", f"{row['seconds']:.1f} s",
               f"eta {duration(row['eta_seconds'])}"]
    return "  ".join(fields)


def duration(seconds: float) -> str:
    """Format seconds as 41s, 4m41s or 1h04m."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def verdict(accuracy: float, required: float | None) -> str:
    """Say whether a test accuracy, a fraction of 1, is what the course requires, in %."""
    if required is None:
        return "not on CIFAR-100, so the course's required accuracy does not apply"
    is_met = "met" if 100 * accuracy >= required else "not met"
    return f"the course's required accuracy of {required:.0f}% is {is_met}"


def log_words(words: dict[str, str]) -> None:
    """Log a line for each entry: its name, then its text."""
    for name, text in words.items():
        log.info(f"{name:10} {text}")


def progress(batches: Iterable | None, text: str, rank: int, done: int = 0,
             total: int | None = None, unit: str = "batch") -> tqdm:
    """Return `batches` under a progress bar, which only rank 0 shows, and only on a terminal."""
    return tqdm(batches, text, initial=done, total=total, leave=False, unit=unit,
                disable=True if rank else None)  # None: unless there is a terminal


def files_line(directory: Path, names: Iterable[str]) -> str:
    """Return the log line that says which of these files there are."""
    there = [name for name in names if (directory / name).exists()]
    return f"files      {', '.join(there)} in {directory}"
