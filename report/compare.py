"""Compare runs: means over their seeds, a table of all, and one picture of their curves.

    python -m report.compare output/train_resnet-seed* --output-dir output
"""

import argparse
import logging
import statistics
import sys
from pathlib import Path

from report.curves import draw_curves
from report.log import files_line
from report.runs import RunRecord, group_runs, read_run, summary_table
from report.write import markdown_table, write_picture, write_text
from utils import UserError, guard, log, one_line, user_path

COMPARISON = ("comparison.md", "comparison.png")
MEANS_NOTE = "Means over n finished runs, in parentheses the sample standard deviation (n - 1):"
MEANS = {"test accuracy": "test_acc", "test top-5": "test_top5", "val accuracy": "val_acc",
         "val top-5": "val_top5"}


def compare(directories: list[Path], into: Path) -> None:
    """Write comparison.md and .png of these runs, and log means over seeds; raises UserError."""
    records, unread = [], []
    for directory in dict.fromkeys(directories):
        try:
            records.append(read_run(directory))
        except UserError as error:
            unread.append(one_line(error))
    if not records:
        raise UserError("; ".join(unread))
    groups = group_runs(records)
    notes = [f"warning    {error}" for error in unread]
    for label, group in groups.items():
        seeds = [str(record.config["settings"]["seed"]) for record in group]
        if len(set(seeds)) < len(seeds):
            notes.append(f"warning    {label}: not independent, for the seeds are "
                         f"{', '.join(seeds)}")
    notes.append(MEANS_NOTE)
    means = {label: _means(group) for label, group in groups.items()}
    with guard(f"--output-dir {into}: cannot be written", OSError):
        into.mkdir(parents=True, exist_ok=True)
        text = summary_table(records)
        text += write_picture(into / "comparison.png", "", draw_curves, groups)
        text += "".join(f"{one_line(note)}\n\n" for note in notes)
        rows = ((label, *cells.values()) for label, cells in means.items())
        text += markdown_table(("runs", "n", *MEANS), rows)
        write_text(into / "comparison.md", text)
    for note in notes:
        log.info(note)
    for label, cells in means.items():
        known = ", ".join(f"{name} {cell}" for name, cell in cells.items() if cell != "-")
        log.info(f"{label}: {known}")
    log.info(files_line(into, COMPARISON))


def _means(group: list[RunRecord]) -> dict[str, str]:
    """Return the number of finished runs, and their mean accuracies, by column of the table."""
    last = [record.history[-1] for record in group]
    last = [row for row in last if row["epoch"] == row["epochs"]]
    cells = {"n": str(len(last))}
    for name, column in MEANS.items():
        values = [row[column] for row in last if column in row]
        cells[name] = f"{statistics.mean(values):.2%}" if values else "-"
        if len(values) > 1:
            cells[name] += f" ({statistics.stdev(values):.2%})"
    return cells


def main() -> None:
    """Read the command line and compare; bad input is one line on stderr and status 2."""
    parser = argparse.ArgumentParser("python -m report.compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="output directories")
    parser.add_argument("--output-dir", type=user_path, default="output", metavar="DIR",
                        help="where comparison.md and comparison.png go (default: output)")
    args = parser.parse_args()
    logging.raiseExceptions = False  # stdout may be full or closed
    log.addHandler(logging.StreamHandler(sys.stdout))
    log.setLevel(logging.INFO)
    try:
        compare(args.runs, args.output_dir)
    except UserError as error:
        parser.exit(error.status, f"report.compare: {one_line(error)}\n")


if __name__ == "__main__":
    main()
