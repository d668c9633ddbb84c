"""Run both scripts on a network of milliseconds, and record its inputs."""

import contextlib
import copy
import csv
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import data
import engine.process
import report.runs
import utils

SCRIPTS = ("train_resnet", "finetune_resnet18")
CODE = {"commit": "", "changed": False, "modules": "0123456789ab"}
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Shown(NamedTuple):
    """A recorded forward pass: the batch, its logits, and the optimizer's groups at that time."""

    images: torch.Tensor
    logits: torch.Tensor
    needs_graph: bool  # keeps what a backward pass needs
    seed: int  # of torch's global generator
    groups: list[dict]  # of the optimizer, without the weights


class Watched:
    """A run of a script: its end, its forward passes, and the batches that it drew.

    `act(self)` is called in each forward pass, after it was noted; a number that it returns is
    added to the logits.
    """

    def __init__(self, output_dir: Path, act: Callable | None = None):
        self.output_dir, self.act = output_dir, act
        self.status, self.message = 0, ""
        self.drawn, self.batches = [], []  # arguments of `shuffled`, and what that yielded
        self.trained, self.tested = [], []  # forward passes
        self.model = self.optimizer = self.first_weights = self.first_seed = None

    def rows(self) -> list[dict[str, float]]:
        """Return the numbers of metrics.csv."""
        with open(self.output_dir / "metrics.csv", newline="") as file:
            return [{name: float(value) for name, value in row.items() if name != "dataset"}
                    for row in csv.DictReader(file)]


class Tiny(nn.Module):
    """A convolution and a head; each forward pass is recorded in `watched`."""

    def __init__(self, classes: int, watched: Watched):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, classes)
        self.watched = watched

    def forward(self, images):
        watched = self.watched
        logits = self.fc(self.conv(images).mean((2, 3)))
        if not images.any():
            return logits  # a run first tries its network on two such images
        groups = watched.optimizer.param_groups if watched.optimizer else []
        groups = [{name: value for name, value in group.items() if name != "params"}
                  for group in groups]
        shown = Shown(images.clone(), logits.detach().clone(), logits.requires_grad,
                      torch.initial_seed(), groups)
        (watched.trained if self.training else watched.tested).append(shown)
        change = watched.act(watched) if watched.act else None
        return logits if change is None else logits + change


def plain(count: int) -> data.Dataset:
    """Return so many training images of ten classes, and 30 to test; all pixels are 51 of 255."""
    train, test = (data.Split(torch.full((n, 3, 32, 32), 51, dtype=torch.uint8),
                              torch.arange(n) % 10) for n in (count, 30))
    return data.Dataset("mine", train, test, tuple(f"class {i}" for i in range(10)), "here")


def noise(count: int) -> data.Dataset:
    """Return so many random training images, and 30 to test."""
    dataset, generator = plain(count), torch.Generator().manual_seed(0)
    train, test = (split._replace(images=torch.randint(
        256, split.images.shape, generator=generator).byte()) for split in dataset[1:3])
    return dataset._replace(train=train, test=test)


def train(name: str, dataset: data.Dataset, output_dir: Path, *flags,
          act: Callable | None = None, augment: Callable | None = None) -> Watched:
    """Run a script in this process, on these images and a `Tiny`, as "Change it" says."""
    script, watched = importlib.import_module(name), Watched(output_dir, act)
    make_optimizer, shuffled = script.make_optimizer, data.Batches.shuffled
    signature = inspect.signature(shuffled)

    def make_model(_):
        watched.first_seed = torch.initial_seed()
        watched.model = Tiny(len(dataset.class_names), watched)
        watched.first_weights = copy.deepcopy(watched.model.state_dict())
        return watched.model

    def keep_optimizer(*arguments):
        watched.optimizer = make_optimizer(*arguments)
        return watched.optimizer

    def record(*arguments, **keywords):
        bound = signature.bind(*arguments, **keywords)
        bound.apply_defaults()
        _, *named = bound.arguments.items()
        watched.drawn.append(dict(named))
        for batch in shuffled(*arguments, **keywords):
            watched.batches.append(batch)
            yield batch

    replaced = {(script, "make_model"): make_model, (script, "make_optimizer"): keep_optimizer,
                (script, "load_data"): lambda _: dataset,
                (script, "make_augment"): lambda *_: augment,
                (data.Batches, "shuffled"): record,
                (sys, "argv"): [f"{name}.py", "--device", "cpu", "--output-dir", str(output_dir),
                                *map(str, flags)]}
    with pytest.MonkeyPatch.context() as patch, signals_kept():
        for (owner, attribute), value in replaced.items():
            patch.setattr(owner, attribute, value)
        hurry(patch)
        try:
            script.main()
        except utils.UserError as error:
            watched.status, watched.message = error.status, str(error)
        finally:
            engine.process.AT_END.close()
    return watched


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Have a run draw no pictures, read no code and wait for no disk; keep the log's handlers."""
    patch.setitem(sys.modules, "matplotlib.figure", None)
    patch.setattr(report.runs, "describe_code", lambda: CODE)
    patch.setattr(report.runs, "zip_code", bytes)
    patch.setattr(utils.log, "handlers", [*utils.log.handlers])
    patch.setattr(os, "fsync", lambda _: None)


@contextlib.contextmanager
def signals_kept():
    """Ignore what stops a run unless the run itself handles it; then restore what was before."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
