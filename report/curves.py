"""Draw the curves of one or several runs."""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from report.runs import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Curves have five colours of Okabe & Ito (2008), which the colour-blind can tell apart. From the
# sixth curve on they have another marker.
COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"), "os"
DASHES = {"train": ("--", "training"), "val": (":", "validation"), "test": ("-", "test")}


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
