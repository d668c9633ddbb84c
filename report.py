"""What people look at: the log's lines, scores, predictions, reports and their pictures.

All is made of logits, labels and rows of numbers. Pictures need matplotlib, which is optional.
"""

import csv
import hashlib
import io
import json
import logging
import math
import shlex
import statistics
import subprocess
import sys
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import SUPERCLASS_OF, Dataset
from utils import Runtime, UserError, guard, log, one_line, process_rank, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RUN_REPORTS = ("report.md", "curves.png")
TEST_REPORTS = ("test-report.md", "confusion.csv", "confusion.png", "mistakes.png")
COMPARISON = ("comparison.md", "comparison.png")
TIMES = ("images_per_second", "seconds", "eta_seconds")  # columns that differ between equal runs
# Curves have five colours of Okabe & Ito (2008), which the colour-blind can tell apart. From the
# sixth curve on they have another marker.
COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"), "os"
DASHES = {"train": ("--", "training"), "val": (":", "validation"), "test": ("-", "test")}


class Metrics(NamedTuple):
    """Means over `images` images; accuracies are fractions of 1, and top5 is NaN in training."""

    loss: float  # nats
    accuracy: float
    top5: float
    images: int


def top5(logits: Tensor) -> torch.return_types.topk:
    """Return the five largest of each row and their places, or all if there are fewer."""
    return logits.topk(min(5, logits.shape[1]))


def score(logits: Tensor, labels: Tensor) -> Metrics:
    """Return what logits (N, C) are worth for labels int64 (N,), computed in float64."""
    hits = top5(logits).indices == labels[:, None]  # (N, 5)
    loss = F.cross_entropy(logits.double(), labels).item()
    return Metrics(loss, hits[:, 0].double().mean().item(),
                   hits.any(1).double().mean().item(), len(labels))


def metric_columns(results: dict[str, Metrics]) -> dict[str, float]:
    """Return the columns of metrics.csv for the results of each split."""
    columns = {}
    for split, metrics in results.items():
        columns |= {f"{split}_loss": metrics.loss, f"{split}_acc": metrics.accuracy}
        if split != "train":
            columns[f"{split}_top5"] = metrics.top5
    return columns


def epoch_line(row: dict) -> str:
    """Format one row of metrics.csv as the line for the log."""
    width = max(2, len(str(row["epochs"])))
    fields = [] if row["dataset"] == "cifar100" else [f"[{row['dataset']}]"]
    fields += [f"epoch {row['epoch']:{width}}/{row['epochs']}", f"{row['image_size']}px",
               f"lr {row['lr']:.4f}"]
    for split in ("train", "val", "test"):
        if f"{split}_loss" in row:
            field = f"{split} loss {row[f'{split}_loss']:.3f} acc {row[f'{split}_acc']:6.2%}"
            if split != "train":
                field += f" top5 {row[f'{split}_top5']:6.2%}"
            fields.append(field)
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


def in_words(runtime: Runtime, dataset: Dataset, model: nn.Module) -> dict[str, str]:
    """Return the first lines of a log, by their first word: command, device, data and network."""
    held = f", {len(dataset.val.labels):,} validation" if dataset.val else ""
    parameters = sum(p.numel() for p in model.parameters())
    return {"command": shlex.join(["python", *sys.argv]),
            "device": f"{runtime}, torch {torch.__version__}",
            "data": f"{dataset.name}: {len(dataset.train.labels):,} training{held} and "
                    f"{len(dataset.test.labels):,} test images, {dataset.source}",
            "network": f"{type(model).__name__}, {parameters:,} parameters"}


def print_words(words: dict[str, str]) -> None:
    """Print them, a line each."""
    for name, text in words.items():
        log.info(f"{name:10} {text}")


def progress(batches: Iterable, text: str, runtime: Runtime, done: int = 0,
             total: int | None = None) -> tqdm:
    """Return `batches` under a progress bar, which only rank 0 shows, and only on a terminal."""
    return tqdm(batches, text, initial=done, total=total, leave=False, unit="batch",
                disable=True if runtime.rank else None)  # None: unless there is a terminal


def files_line(directory: Path, names: Iterable[str]) -> str:
    """Return the log line that says which of these files there are."""
    there = [name for name in names if (directory / name).exists()]
    return f"files      {', '.join(there)} in {directory}"


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


def csv_table(header: Iterable[str], rows: Iterable[Iterable]) -> str:
    """Return a table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def markdown_table(header: Sequence[str], rows: Iterable[Iterable]) -> str:
    """Return a table in Markdown, with an empty line after it."""
    lines = [header, ["---"] * len(header)]
    lines += [[one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def write_text(path: Path, text: str) -> None:
    """Write a text whole or not at all; raises OSError."""
    write_atomically(path, text.encode(errors="replace"))  # paths in it can hold any bytes


def write_picture(path: Path, caption: str, draw: Callable, *content: object) -> str:
    """Write what `draw(figure, *content)` makes of a matplotlib figure; return its Markdown.

    Where that fails, as without matplotlib, a line says so instead. Raises OSError.
    """
    png = io.BytesIO()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # else it tells of its font cache
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from matplotlib.figure import Figure

            figure = Figure(layout="constrained")
            draw(figure, *content)
            figure.savefig(png, format="png", dpi=150)
    except Exception as error:  # no picture is worth a run
        remedy = ": pip install 'matplotlib>=3.7'" if isinstance(error, ImportError) else ""
        log.info(f"note       {path.name} is not drawn ({error}){remedy}")
        path.unlink(missing_ok=True)
        return ""
    write_atomically(path, png.getvalue())
    return f"{caption}\n\n![{path.stem}]({path.name})\n\n"


class RunRecord(NamedTuple):
    """One run: where it is, what config.json says, and the rows of metrics.csv, as numbers."""

    directory: Path
    config: dict
    history: list[dict]


def describe_code() -> dict:
    """Return the git commit of the project, if any, and a hash of its modules in this process."""
    here = Path(__file__).resolve().parent
    files = {Path(module.__file__).resolve() for module in list(sys.modules.values())
             if getattr(module, "__file__", None)}
    own = sorted(file for file in files if file.is_relative_to(here) and file.is_file()
                 and not {"tests", "site-packages"} & set(file.relative_to(here).parts))
    modules = hashlib.sha256(b"".join(file.read_bytes() for file in own)).hexdigest()
    commands = ["rev-parse", "HEAD"], ["status", "--porcelain", "--", *own]
    try:
        commit, changes = (subprocess.run(["git", "-C", here, *command], capture_output=True,
                                          check=True, text=True).stdout for command in commands)
    except (OSError, subprocess.SubprocessError):
        commit = changes = ""  # no git, or no checkout
    return {"commit": commit[:12], "changed": bool(changes), "modules": modules[:12]}


def name_of_code(code: dict | None) -> str:
    """Return in words what `describe_code` returned, or that it is unknown."""
    if not code:
        return "unknown code"
    words = "changed code of" if code["changed"] else "code"
    return f"{words} {code['commit'][:7] or code['modules']}"


def code_has_changed(before: dict | None, now: dict) -> str:
    """Return a note if `before`, the code of a run or a model, is not today's, else ""."""
    if before and before["modules"].endswith(now["modules"]):
        return ""
    was, is_now = (f"{name_of_code(code)} ({code['modules']})" if code else "unknown code"
                   for code in (before, now))
    return f"note       the code has changed since: it was {was}, and is {is_now}"


def read_config(directory: Path) -> dict:
    """Return what config.json says of a run; raises UserError if it is missing or not whole."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
        config["script"], config["settings"] = str(config["script"]), dict(config["settings"])
        return config
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: cannot be used ({type(error).__name__}: {error})") from error


def write_metrics(directory: Path, history: list[dict]) -> None:
    """Write metrics.csv, a row an epoch, the floats to six digits; raises OSError."""
    if history:
        # A run that began before a column was introduced goes on without it.
        rows = [[f"{row[name]:.6g}" if isinstance(row[name], float) else row[name]
                 for name in history[0]] for row in history]
        write_text(directory / "metrics.csv", csv_table(history[0], rows))


def read_run(directory: Path) -> RunRecord:
    """Read a run's files; raises UserError if there is no finished epoch."""
    try:
        with open(directory / "metrics.csv", newline="") as file:
            history = [{name: float(value) for name, value in row.items() if name != "dataset"}
                       for row in csv.DictReader(file)]
        record = RunRecord(directory, read_config(directory), history)
        # Fail here, before anything is written, if something is missing.
        _summary(record)
        group_runs([record])
        return record
    except Exception as error:  # what is no run can raise anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{directory}: holds no run with a finished epoch, or one of older code "
                        f"({reason})") from error


SUMMARY = ("run", "seed", "epochs", "train accuracy", "val accuracy", "test accuracy", "top 5",
           "test loss", "verdict", "time", "training images/s")
NUMBERS_NOTE = "Numbers are those of the last epoch, not of the best.\n\n"
MEANS_NOTE = "Means over n finished runs, in parentheses the sample standard deviation (n - 1):"
MEANS = {"test accuracy": "test_acc", "test top-5": "test_top5", "val accuracy": "val_acc",
         "val top-5": "val_top5"}


def _summary(record: RunRecord) -> tuple:
    """Return a run's row below SUMMARY; the numbers are those of the last epoch."""
    last = record.history[-1]
    return (record.directory, record.config["settings"]["seed"],
            f"{last['epoch']:.0f} of {last['epochs']:.0f}", f"{last['train_acc']:.2%}",
            f"{last['val_acc']:.2%}" if "val_acc" in last else "-",
            f"{last['test_acc']:.2%}", f"{last['test_top5']:.2%}", f"{last['test_loss']:.3f}",
            verdict(last["test_acc"], record.config["required_accuracy"]),
            duration(sum(row["seconds"] for row in record.history)),
            f"{statistics.harmonic_mean(row['images_per_second'] for row in record.history):.0f}")


def write_run_report(directory: Path, history: list[dict]) -> None:
    """Write report.md and curves.png into a run's directory; raises OSError."""
    try:
        record = RunRecord(directory, read_config(directory), history)
        config, groups, words = record.config, group_runs([record]), record.config["in_words"]
    except UserError as error:
        log.info(f"warning    no report: {error}")
        return
    except KeyError as error:
        path = directory / "config.json"
        log.info(f"warning    no report: {path} is of older code, and lacks {error}")
        return
    last, network = history[-1], config["network"]
    images = "CIFAR-100" if config["dataset"] == "cifar100" else f"{config['dataset']} images"
    layers = [*network["layers"], ("all", network["name"], network["parameters"])]
    report, picture = (directory / name for name in RUN_REPORTS)
    write_text(report, "".join([
        f"# {network['name']} on {images}: {last['test_acc']:.2%} after epoch {last['epoch']:.0f}",
        f"\n\n{NUMBERS_NOTE}", markdown_table(SUMMARY, [_summary(record)]),
        write_picture(picture, "## Curves", draw_curves, groups),
        "## Network\n\n", markdown_table(("layer", "kind", "parameters"), [
            (*layer, f"{count:,}") for *layer, count in layers]),
        "## Recipe\n\n", markdown_table(("", ""), words.items()),
        "## Environment\n\n", markdown_table(("", ""), [
            (name, config[name]) for name in ("runtime", "torch", "python", "system")])]))


def compare(directories: list[Path], into: Path) -> None:
    """Write COMPARISON on these runs, and print the means over seeds; raises UserError."""
    if process_rank():
        return
    records, unread = [], []
    for directory in dict.fromkeys(directories):
        try:
            records.append(read_run(directory))
        except UserError as error:
            unread.append(one_line(error))
    if not records:
        raise UserError("; ".join(unread))
    groups = group_runs(records)
    notes = [f"warning    {error}" for error in unread] + _notes(records, groups)
    means = {label: _means(group) for label, group in groups.items()}
    report, picture = (into / name for name in COMPARISON)
    with guard(f"--output-dir {into}: cannot be written", OSError):
        into.mkdir(parents=True, exist_ok=True)
        text = NUMBERS_NOTE + "".join(f"{one_line(note)}\n\n" for note in notes)
        text += markdown_table(SUMMARY, map(_summary, records))
        text += write_picture(picture, "", draw_curves, groups) + f"{MEANS_NOTE}\n\n"
        rows = [(label, *cells.values()) for label, cells in means.items()]
        write_text(report, text + markdown_table(("runs", "n", *MEANS), rows))
    for line in (*notes, MEANS_NOTE):
        log.info(line)
    for label, cells in means.items():
        said = [f"{name} {cell}" for name, cell in cells.items() if cell != "-"]
        log.info(f"{label}: {', '.join(said)}")
    log.info(files_line(into, COMPARISON))


def _means(group: list[RunRecord]) -> dict[str, str]:
    """Return how many of these runs are finished, and of these the MEANS, by name."""
    last = [record.history[-1] for record in group]
    last = [row for row in last if row["epoch"] == row["epochs"]]
    cells = {"n": str(len(last))}
    for name, column in MEANS.items():
        values = [row[column] for row in last if column in row]
        cells[name] = f"{statistics.mean(values):.2%}" if values else "-"
        if len(values) > 1:
            cells[name] += f" ({statistics.stdev(values):.2%})"
    return cells


def _notes(records: list[RunRecord], groups: dict[str, list[RunRecord]]) -> list[str]:
    """Return a line on each group that has a seed twice, or other code, network or images."""
    notes = []
    for label, group in groups.items():
        seeds = [str(record.config["settings"]["seed"]) for record in group]
        same = [f"seed {seed} in {record.directory}"
                for seed, record in zip(seeds, group, strict=True) if seeds.count(seed) > 1]
        if same:
            notes.append(f"warning    {label}: runs that are not independent: {', '.join(same)}")
        kinds = [name for name in _differences(group[0], records) if not name.startswith("--")]
        if kinds:
            runs = ", ".join(str(record.directory) for record in group)
            notes.append(f"note       {label}: kept apart from runs of other "
                         f"{' and '.join(kinds)}: {runs}")
    return notes


# How a legend says a setting; others are said by the name of their flag.
LEGEND = {
    "epochs": "{} epochs", "max_steps": "{} steps", "batch_size": "batch size {}",
    "lr": "learning rate {}", "val_size": "{} images held out", "image_size": "{} pixels",
    "low_res": "{} of the epochs at low resolution", "precision": "{}", "dataset": "{} images"}


def group_runs(records: list[RunRecord]) -> dict[str, list[RunRecord]]:
    """Group the runs that differ only in the seed; keys name the script and what differs."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        label = ", ".join([record.config["script"], *_differences(record, records).values()])
        groups.setdefault(label, []).append(record)
    return groups


def _differences(record: RunRecord, records: list[RunRecord]) -> dict[str, str]:
    """Return in words, by name, what tells a run from others of its script, but for the seed."""
    others = [_identity(other.config) for other in records
              if other.config["script"] == record.config["script"]]
    differences = {}
    for name, (value, words) in _identity(record.config).items():
        theirs = [other.get(name, (None, None)) for other in others]
        rivals = {other_words for other, other_words in theirs if other != value}
        if rivals:
            # Two versions of changed code have the same words.
            differences[name] = f"{words} ({value})" if words in rivals else words
    return differences


def _identity(config: dict) -> dict[str, tuple[object, str]]:
    """Return all that runs to be averaged agree in, by name: its value, and the legend's words."""
    identity, code, network = {}, config["code"], config["network"]
    # A resumed run may omit --weights, so it is not in the recipe, but it makes another network.
    for name in (*config["recipe"], "weights"):
        value = config["settings"].get(name)
        if value is not None and name != "seed":
            words = LEGEND.get(name, f"{name.replace('_', ' ')} {{}}").format(value)
            identity[f"--{name}"] = value, words
    layers = f"{zlib.crc32(repr(network).encode()):08x}"
    return identity | {
        "code": (code["modules"], name_of_code(code)),
        "network": (layers, f"{network['name']} of {network['parameters']:,} parameters"),
        "images": (config["data"], f"images {config['data']:08x}")}


def draw_curves(figure: "Figure", groups: dict[str, list[RunRecord]]) -> None:
    """Draw the groups' mean loss, accuracy and learning rate by epoch, one row a script."""
    scripts: dict[str, dict[str, list[RunRecord]]] = {}
    for label, records in groups.items():
        script, _, name = label.partition(", ")
        scripts.setdefault(script, {})[name or "this recipe"] = records
    legends = []
    grid = figure.subplots(len(scripts), 3, squeeze=False)
    for panels, (script, named) in zip(grid, scripts.items(), strict=True):
        loss, accuracy, rate = panels
        loss.set_title(f"{script}.py", loc="left")
        loss.set(ylabel="cross entropy, nats (training: smoothed)")
        accuracy.set(ylabel="accuracy, %", ylim=(0, 100))
        rate.set(ylabel="learning rate at the end of the epoch")
        longest = max(len(record.history) for records in named.values() for record in records)
        for panel in panels:
            panel.set(xlabel="epoch", xlim=(0.5, max(longest, 2) + 0.5))
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.3)
        handles = _draw_groups(panels, named)
        rate.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1))
        legends.append("\n".join(handle.get_label() for handle in handles).splitlines())
    # Inches: 11.5 for the panels, and what a legend needs beside them, by its lines and letters.
    letters = max(len(line) for legend in legends for line in legend)
    lines = max(map(len, legends))
    figure.set_size_inches(11.5 + 0.09 * letters, len(scripts) * max(4, 0.5 + 0.22 * lines))


def _draw_groups(panels: Sequence["Axes"], groups: dict[str, list[RunRecord]]) -> list:
    """Draw the groups of one script into its panels; return what the legend explains."""
    loss, accuracy, rate = panels
    handles, dashes, shades = [], {}, {}
    for i, (name, records) in enumerate(groups.items()):
        name += f" ({len(records)} runs)" if len(records) > 1 else ""
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i // 5 % 2],
                "markersize": 4}
        handles += loss.plot([], [], label=textwrap.fill(name, 45), **look)
        history, full = records[0].history, records[0].config["settings"].get("image_size", 32)
        for split, (dash, word) in DASHES.items():
            if f"{split}_loss" in history[0]:
                dashes[word] = dash
                _draw_mean(loss, records, f"{split}_loss", 1, linestyle=dash, **look)
                _draw_mean(accuracy, records, f"{split}_acc", 100, linestyle=dash, **look)
        _draw_mean(rate, records, "lr", 1, **look)
        small = [row["image_size"] for row in history if row.get("image_size", full) < full]
        if small:
            shades.setdefault(len(small), set()).add(f"{small[0]:.0f}")
    # Most groups have the same epochs on small images: one shade for all of them.
    named = {}
    for epochs, sides in shades.items():
        label = f"trained on images of {' and '.join(sorted(sides))} pixels"
        for panel in panels:
            named[label] = panel.axvspan(0.5, epochs + 0.5, color="0.5", alpha=0.12, linewidth=0,
                                         label=label)
    handles += named.values()
    mixed = [bool(records[0].config["settings"].get("cutmix")) for records in groups.values()]
    where = "" if all(mixed) else ", where it is above 0"
    for word, dash in dashes.items():
        if any(mixed) and word == "training":
            word += f" (partly with CutMix{where})"
        handles += loss.plot([], [], color="0.3", linestyle=dash, label=word)
    required = {records[0].config["required_accuracy"] for records in groups.values()} - {None}
    return handles + [accuracy.axhline(value, color="0.3", linestyle="-.",
                                       label=f"required: {value:.0f}%")
                      for value in sorted(required)]


def _draw_mean(panel: "Axes", records: list[RunRecord], column: str, scale: float,
               **look: object) -> None:
    """Draw the mean of a column over the runs, times `scale`, in a band of its range."""
    epochs = min(len(record.history) for record in records)  # some may not be finished
    curves = np.array([[scale * row[column] for row in record.history[:epochs]]
                       for record in records])  # (runs, epochs)
    x = np.arange(1, epochs + 1)
    panel.plot(x, curves.mean(0), markevery=math.ceil(epochs / 10), **look)
    if len(records) > 1:
        panel.fill_between(x, curves.min(0), curves.max(0), color=look["color"], alpha=0.25)


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
