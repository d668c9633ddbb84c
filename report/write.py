"""Write tables as CSV and Markdown, and pictures, whole or not at all."""

import csv
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from utils import log, one_line, write_atomically


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
    """Write a figure that `draw(figure, *content)` fills; return its Markdown; raises OSError."""
    png = io.BytesIO()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns that it looks for fonts
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from matplotlib.figure import Figure
            figure = Figure(layout="constrained")
            draw(figure, *content)
            figure.savefig(png, format="png", dpi=120)
    except Exception as error:  # no picture is worth a run
        remedy = ": pip install 'matplotlib>=3.7'" if isinstance(error, ImportError) else ""
        log.info(f"note       {path.name} is not drawn ({error}){remedy}")
        path.unlink(missing_ok=True)
        return ""
    write_atomically(path, png.getvalue())
    return f"{caption}\n\n![{path.stem}]({path.name})\n\n"
