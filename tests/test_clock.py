"""When a run saves, stops and tells the time: a second before and after each limit.

The clock of these runs is moved by their training, evaluations and saves alone.
"""

import json
import logging
import time
from pathlib import Path

import pytest
import torch
from helpers import call
from tiny import SCRIPTS, noise, train

import utils

EVERY_STEP = ["--checkpoint-minutes", 0]
MINUTES = [60] * 99
# Of each run the epochs, the steps in each, the flags, and how many seconds the first steps,
# evaluations and saves take; later ones take none.
RUNS = {
    # Two steps leave 79 s or 81 s; one more needs 60 s, and two saves of at least 10 s.
    "79 s left": (1, 9, ["--max-minutes", 199 / 60], {"step": MINUTES}),
    "81 s left": (1, 9, ["--max-minutes", 201 / 60], {"step": MINUTES}),
    # Three steps leave as much, and one of them took a minute.
    "79 s after a slow step": (1, 9, ["--max-minutes", 149 / 60], {"step": [60, *[5] * 8]}),
    "81 s after a slow step": (1, 9, ["--max-minutes", 151 / 60], {"step": [60, *[5] * 8]}),
    # Three steps and a slow save leave 159 s or 161 s; one more and two such saves need 160 s.
    "159 s after a slow save": (1, 9, ["--max-minutes", 389 / 60, *EVERY_STEP],
                                {"step": MINUTES, "save": [50]}),
    "161 s after a slow save": (1, 9, ["--max-minutes", 391 / 60, *EVERY_STEP],
                                {"step": MINUTES, "save": [50]}),
    # Two steps and a slow evaluation leave 109 s or 111 s; one more and two saves need 110 s.
    "109 s after a slow evaluation": (3, 1, ["--max-minutes", 209 / 60],
                                      {"step": [5] * 9, "test": [90]}),
    "111 s after a slow evaluation": (3, 1, ["--max-minutes", 211 / 60],
                                      {"step": [5] * 9, "test": [90]}),
    "59 s a step": (1, 15, [], {"step": [59] * 99}),
    "61 s a step": (1, 15, [], {"step": [61] * 99}),
    "a save every 179 s": (1, 5, ["--checkpoint-minutes", 179 / 60], {"step": MINUTES}),
    "a save every 181 s": (1, 5, ["--checkpoint-minutes", 181 / 60], {"step": MINUTES}),
    "29 s an epoch": (4, 1, [], {"step": [29] * 9}),
    "31 s an epoch": (4, 1, [], {"step": [31] * 9}),
    "18 s an epoch": (1, 3, [], {"step": [6] * 9}),
    "270 s an epoch": (3, 4, [], {"step": MINUTES, "test": [30] * 9}),
}


class Clock:
    """A clock that shows `now`, and a run that moves it."""

    def __init__(self):
        self.now = 0.0

    def begin(self, durations: dict[str, list[float]]) -> None:
        """Begin a run at 0."""
        self.now, self.steps, self.saves, self.lines = 0.0, 0, [], []
        self.durations = {kind: iter(seconds) for kind, seconds in durations.items()}

    def spend(self, kind: str) -> None:
        """Move on by what comes next of a kind."""
        self.now += next(self.durations.get(kind, iter(())), 0)

    def pass_forward(self, watched) -> None:
        """Note a forward pass of the network."""
        self.steps += watched.model.training
        self.spend("step" if watched.model.training else "test")

    def save(self, content: dict, file) -> None:
        """Write what torch.save does, and note after which step a checkpoint was written."""
        SAVE(content, file)
        if "optimizer" in content:
            self.saves.append(self.steps)
            self.spend("save")


SAVE = torch.save


def run_by_the_clock(directory: Path) -> None:
    """Do all runs of both scripts; print of each the status, steps, saves, rows and log."""
    clock, ended, handler = Clock(), {}, logging.Handler()
    handler.emit = lambda record: clock.lines.append(record.getMessage())
    utils.log.addHandler(handler)
    utils.log.setLevel(logging.INFO)
    # Before the scripts and what they import are loaded: --max-minutes begin there.
    time.monotonic, torch.save = lambda: clock.now, clock.save
    for name in SCRIPTS:
        for number, (title, (epochs, steps, flags, durations)) in enumerate(RUNS.items()):
            clock.begin(durations)
            size = ["--image-size", 32] if name == "finetune_resnet18" else []
            run = train(name, noise(2 * steps), directory / f"{name}{number}", *size, *flags,
                        "--batch-size", 2, "--epochs", epochs, "--low-res", 0,
                        act=clock.pass_forward)
            rows = [] if run.status else run.rows()
            ended[f"{name}, {title}"] = run.status, clock.steps, clock.saves, rows, clock.lines
    print(json.dumps(ended))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A function that returns how a run of a script ended: status, steps, saves, rows, log."""
    process = call(run_by_the_clock, tmp_path_factory.mktemp("clock"))
    assert (process.returncode, process.stderr) == (0, "")
    runs = json.loads(process.stdout.splitlines()[-1])
    return lambda name, title: runs[f"{name}, {title}"]


both = pytest.mark.parametrize("name", SCRIPTS)


@both
@pytest.mark.parametrize("title, steps", [
    ("79 s left", 2), ("81 s left", 3), ("79 s after a slow step", 3),
    ("81 s after a slow step", 4), ("159 s after a slow save", 3), ("161 s after a slow save", 4),
    ("109 s after a slow evaluation", 2), ("111 s after a slow evaluation", 3),
])
def test_a_job_stops_while_there_is_time_for_the_slowest_step_and_two_slow_saves(
        ended, name, title, steps):
    status, done, saves, *_ = ended(name, title)
    assert (status, done, saves[-1]) == (utils.STOPPED, steps, steps)


@both
@pytest.mark.parametrize("title, first", [
    ("59 s a step", 11), ("61 s a step", 10), ("a save every 179 s", 3), ("a save every 181 s", 4)])
def test_a_checkpoint_is_written_every_ten_minutes_or_as_the_flag_says(ended, name, title, first):
    status, _, saves, *_ = ended(name, title)
    assert (status, saves[0]) == (0, first)


@both
@pytest.mark.parametrize("title, saves", [("29 s an epoch", [2, 4]),
                                          ("31 s an epoch", [1, 2, 3, 4])])
def test_an_epochs_end_saves_if_the_last_save_is_30_seconds_old(ended, name, title, saves):
    assert ended(name, title)[2] == saves


@both
def test_the_times_of_an_epoch_are_in_seconds(ended, name):
    *_, rows, _ = ended(name, "270 s an epoch")
    assert [row["seconds"] for row in rows] == pytest.approx([270] * 3, rel=1e-3)
    assert [row["images_per_second"] for row in rows] == pytest.approx([8 / 240] * 3, rel=1e-3)
    assert [row["eta_seconds"] for row in rows] == pytest.approx([540, 270, 0], rel=1e-3)


@both
@pytest.mark.parametrize("title, times", [("18 s an epoch", 0), ("270 s an epoch", 1)])
def test_a_log_tells_the_time_left_once_if_an_epoch_takes_more_than_20_seconds(
        ended, name, title, times):
    *_, lines = ended(name, title)
    starts = [line.partition("  ")[0] for line in lines]
    assert (starts.count("time"), starts[:starts.index("[mine]")].count("time")) == (times, times)
