"""Draw the curves of one or several runs."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from report.runs import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Five colours of Okabe & Ito (2008), which the colour-blind can tell apart, with each marker.
COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"), "os"
DASHES = {"train": ("--", "training"), "val": (":", "validation"), "test": ("-", "test")}


def draw_curves(figure: "Figure", groups: dict[str, list[RunRecord]]) -> None:
    """Draw the groups' mean loss, accuracy and learning rate by epoch, one row a script."""
    scripts: dict[str, dict[str, list[RunRecord]]] = {}
    for label, records in groups.items():
        script, _, name = label.partition(", ")
        scripts.setdefault(script, {})[name or "this recipe"] = records
    figure.set_size_inches(15, 4 * len(scripts))
    grid = figure.subplots(len(scripts), 3, squeeze=False)
    for panels, (script, named) in zip(grid, scripts.items(), strict=True):
        handles = _draw_groups(panels, named)
        longest = max(len(record.history) for records in named.values() for record in records)
        loss, accuracy, rate = panels
        loss.set(title=f"{script}.py", ylabel="cross entropy, nats (training: smoothed)")
        accuracy.set(ylabel="accuracy, %", ylim=(0, 100))
        rate.set(ylabel="learning rate at the end of the epoch")
        rate.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
        for panel in panels:
            panel.set(xlabel="epoch", xlim=(0.5, max(longest, 2) + 0.5))
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.3)


def _draw_groups(panels: Sequence["Axes"], groups: dict[str, list[RunRecord]]) -> list:
    """Draw the groups of one script into its panels; return what the legend explains."""
    loss, accuracy, rate = panels
    handles, common = [], {}  # of the groups, and by label of what they have in common
    is_mixed = any(records[0].config["settings"].get("cutmix") for records in groups.values())
    cutmix = " (partly with CutMix)" if is_mixed else ""
    for i, (name, records) in enumerate(groups.items()):
        look = {"color": COLOURS[i % 5], "marker": MARKERS[i // 5 % 2], "markersize": 4}
        name += f" ({len(records)} runs)" if len(records) > 1 else ""
        handles += loss.plot([], [], label=textwrap.fill(name, 45), **look)
        _, config, history = records[0]
        for split, (dash, label) in DASHES.items():
            if f"{split}_loss" in history[0]:
                _draw_mean(loss, records, f"{split}_loss", 1, linestyle=dash, **look)
                _draw_mean(accuracy, records, f"{split}_acc", 100, linestyle=dash, **look)
                label += cutmix if split == "train" else ""
                (common[label],) = loss.plot([], [], "0.3", linestyle=dash, label=label)
        _draw_mean(rate, records, "lr", 1, **look)
        full = config["settings"].get("image_size", 32)
        small = [row["image_size"] for row in history if row["image_size"] < full]
        if small:
            is_same = history[0].get("test_image_size") == small[0]  # not so in older runs
            tested = " and tested" if is_same else ""
            label = f"trained{tested} on images of {small[0]:.0f} pixels"
            for panel in panels:
                common[label] = panel.axvspan(0.5, len(small) + 0.5, color="0.5", linewidth=0,
                                              alpha=0.3 / len(groups), label=label)
        if required := config["required_accuracy"]:
            label = f"required: {required:.0f}%"
            common[label] = accuracy.axhline(required, color="0.3", linestyle="-.", label=label)
    return [*handles, *common.values()]


def _draw_mean(panel: "Axes", records: list[RunRecord], column: str, scale: float,
               **look: object) -> None:
    """Draw the mean of a column over the runs, times `scale`, in a band of its range."""
    epochs = min(len(record.history) for record in records)  # some may not be finished
    curves = np.array([[scale * row[column] for row in record.history[:epochs]]
                       for record in records])  # (runs, epochs)
    x = np.arange(1, epochs + 1)
    panel.plot(x, curves.mean(0), markevery=max(1, epochs // 10), **look)
    if len(records) > 1:
        panel.fill_between(x, curves.min(0), curves.max(0), color=look["color"], alpha=0.25)
