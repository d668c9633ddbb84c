"""The files of a run, the identity of its code, and which runs belong together."""

import csv
import hashlib
import io
import json
import statistics
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from report.log import duration, verdict
from report.write import csv_table, markdown_table, write_text
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]


class RunRecord(NamedTuple):
    """One run: its directory, its config.json, and the rows of metrics.csv, as numbers."""

    directory: Path
    config: dict
    history: list[dict]


def describe_code() -> dict:
    """Return the git commit of the project, if any, and a hash of its modules in this process."""
    sources = _sources()
    modules = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()
    own = [file for file in sources if file.is_relative_to(ROOT)]
    commands = ["rev-parse", "HEAD"], ["status", "--porcelain", "--", *own]
    try:
        commit, changes = (subprocess.run(["git", "-C", ROOT, *command], capture_output=True,
                                          check=True, text=True).stdout for command in commands)
    except (OSError, subprocess.SubprocessError):
        commit = changes = ""  # no git, or no checkout
    return {"commit": commit[:12], "changed": bool(changes), "modules": modules[:12]}


def zip_code() -> bytes:
    """Return a zip file of the modules that `describe_code` hashes, in their folders."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for file, name in _sources().items():
            archive.write(file, name)
    return buffer.getvalue()


def _sources() -> dict[Path, str]:
    """Return the modules of the project and of the script's folder, with their paths in there."""
    # The script may lie elsewhere.
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or ROOT / "none").resolve()
    roots = [ROOT, script.parent]
    not_ours = {"tests", "site-packages", f"python3.{sys.version_info.minor}"}  # an environment's
    sources = {}
    for module in list(sys.modules.values()):
        file = Path(getattr(module, "__file__", None) or "").resolve()
        root = next(filter(file.is_relative_to, roots), None)
        is_ours = root and not not_ours & {*file.relative_to(root).parts}
        if file.is_file() and (is_ours or file == script):
            sources[file] = str(file.relative_to(root))
    return dict(sorted(sources.items(), key=lambda item: item[1]))  # wherever they lie


def name_of_code(code: dict) -> str:
    """Return the name of the code that `describe_code` described, for a log."""
    words = "changed code of" if code["changed"] else "code"
    return f"{words} {code['commit'][:7] or code['modules']}"


def code_has_changed(before: dict | None, now: dict) -> str:
    """Return a note if `before`, the code of a run or a model, is not today's, else ""."""
    if not before or before["modules"].endswith(now["modules"]):
        return ""
    was, is_now = (f"{name_of_code(code)} ({code['modules']})" for code in (before, now))
    return f"note       the code has changed since: it was {was}, and is {is_now}"


def read_config(directory: Path) -> dict:
    """Return a run's config.json; raises UserError if it is missing or not whole."""
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
        rows = [[f"{row[name]:.6g}" if isinstance(row[name], float) else row[name]
                 for name in history[0]] for row in history]
        write_text(directory / "metrics.csv", csv_table(history[0], rows))


def read_run(directory: Path, history: list[dict] | None = None) -> RunRecord:
    """Return a run that can be reported on, by default with metrics.csv; raises UserError."""
    try:
        if history is None:
            with open(directory / "metrics.csv", newline="") as file:
                history = [{name: float(value) for name, value in row.items() if name != "dataset"}
                           for row in csv.DictReader(file)]
        record = RunRecord(directory, read_config(directory), history)
        summary_table([record])
        group_runs([record])
        record.config["in_words"]
        return record
    except Exception as error:  # what is no run can raise anything
        raise UserError(f"{directory}: holds no run with a finished epoch, or one of older code "
                        f"({type(error).__name__}: {error})") from error


def summary_table(records: list[RunRecord]) -> str:
    """Return a Markdown table of runs, a row each."""
    rows = []
    for directory, config, history in records:
        last = history[-1]
        speed = statistics.harmonic_mean(row["images_per_second"] for row in history)
        rows.append((
            directory, config["settings"]["seed"], f"{last['epoch']:.0f} of {last['epochs']:.0f}",
            f"{last['train_acc']:.2%}", f"{last['val_acc']:.2%}" if "val_acc" in last else "-",
            f"{last['test_acc']:.2%}", f"{last['test_top5']:.2%}", f"{last['test_loss']:.3f}",
            verdict(last["test_acc"], config["required_accuracy"]),
            duration(sum(row["seconds"] for row in history)), f"{speed:.0f}"))
    return "Numbers are those of the last epoch, not of the best.\n\n" + markdown_table(
        ("run", "seed", "epochs", "train accuracy", "val accuracy", "test accuracy", "top 5",
         "test loss", "verdict", "time", "training images/s"), rows)


def group_runs(records: list[RunRecord]) -> dict[str, list[RunRecord]]:
    """Group the runs that differ only in the seed; keys name the script and what differs."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        rivals = [_identity(other.config) for other in records
                  if other.config["script"] == record.config["script"]]
        differences = [text for text in _identity(record.config)
                       if not all(text in rival for rival in rivals)]
        label = ", ".join([record.config["script"], *differences])
        groups.setdefault(label, []).append(record)
    return groups


def _identity(config: dict) -> list[str]:
    """Return what runs must agree in to be averaged, as texts for a legend."""
    network, settings = config["network"], config["settings"] | {"dataset": config["dataset"]}
    # A resumed run may omit --weights, so it is not in the recipe, but it makes another network.
    texts = [f"{name.replace('_', ' ')} {settings[name]}" for name in (*config["recipe"], "weights")
             if settings.get(name) is not None and name != "seed"]
    layers = f"{zlib.crc32(repr(network).encode()):08x}"
    return [*texts, f"code {config['code']['modules']}",
            f"{network['name']} of {network['parameters']:,} parameters ({layers})",
            f"images {config['data']:08x}"]
