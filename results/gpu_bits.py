"""Do runs by CUDA graphs end with the bits of eager steps? The answers are rows of a table.

    python results/gpu_bits.py cuda
    python results/gpu_bits.py cpu     a tape stands in for the graphs, and all is tiny

gpu_session.sh makes the table. The exit status is 1 if a check fails. Each training has a process
of its own, so that a fault of the GPU reaches no other.
"""

import argparse
import importlib
import itertools
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import benchmark
import torch
from torch import Tensor, nn

import data
import engine.graphs
import models
import utils
from engine import process, run

PARTS = ("train_resnet", "finetune_resnet18")
# Two epochs of small and two of full images, the last without CutMix, are three kinds of batches.
KINDS = 3
RECIPE = ["--epochs", "4", "--low-res", "0.5", "--cutmix", "0.5", "--trivial-augment", "0.5"]
BATCHES = 6.5  # an epoch
TIMES = ("images_per_second", "seconds", "eta_seconds")  # columns that differ between equal runs
STOP = 20  # looks at the clock, after which a run is stopped: in the middle of its third epoch
LIMIT = 90  # seconds of a process
EQUAL = "equal to the bit"
TINY = {"train_resnet": ["--batch-size", "8"],
        "finetune_resnet18": ["--batch-size", "8", "--image-size", "40", "--weights", "random"]}


class Network(nn.Module):
    """A small network with dropout; `factor(images)` is a factor of its features."""

    def __init__(self, factor: Callable[[Tensor], float], momentum: float | None = 0.1):
        super().__init__()
        self.factor, self.dropout = factor, nn.Dropout(0.1)
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8, momentum=momentum)
        self.fc = nn.Linear(8, 100)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 100)."""
        maps = self.dropout(self.bn(self.conv(images)).relu())
        return self.fc(maps.mean((2, 3)) * self.factor(images))


def resnet18() -> nn.Module:
    """Return part 2's network, with dropout before its head."""
    model = models.resnet18()
    model.fc.register_forward_pre_hook(
        lambda layer, inputs: nn.functional.dropout(inputs[0], 0.1, layer.training))
    return model


NETWORKS = {"train_resnet": lambda: models.ResNet(dropout=0.1), "finetune_resnet18": resnet18,
            "tiny": lambda: Network(lambda _: 1.0)}
# A graph cannot repeat what these do.
IN_THE_WAY = {
    "reads a value": lambda: Network(lambda images: 1.0 if images.mean().item() < 9 else 2.0),
    "draws Python's random numbers": lambda: Network(lambda _: 1 + random.random()),
    "has batch norm with momentum=None": lambda: Network(lambda _: 1.0, None),
}


def cutout(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Grey out a square of 8 x 8: an augmentation with a generator of its own."""
    pixels = torch.arange(images.shape[-1], device=images.device)
    centres = torch.rand(2, len(images), 1, generator=generator, device=images.device)
    rows, columns = (pixels - centres * len(pixels)).abs() < 4
    return images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0), labels


def few_images(args: argparse.Namespace) -> data.Dataset:
    """Return made-up images for BATCHES batches, and 200 to test."""
    count = int(BATCHES * args.batch_size)
    dataset = data.synthetic(math.ceil(count / 100), 2)
    return dataset._replace(train=data.Split(*(values[:count] for values in dataset.train)))


def in_process(function: Callable, *arguments: object) -> tuple[int, str]:
    """Call a function in a process of its own; return its exit status and what it printed."""
    def begin() -> None:
        for number in (1, 2):
            os.dup2(output.fileno(), number)
        sys.modules["matplotlib.figure"] = None  # a run then draws no pictures
        function(*arguments)

    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = multiprocessing.get_context("fork").Process(target=begin)
        child.start()
        child.join(LIMIT)
        child.kill()
        child.join()
        output.seek(0)
        text = output.read()
    print(text, flush=True)
    return child.exitcode, text


def prepare(device: str) -> list:
    """Have each capture be logged; return the list to which it adds its graph."""
    if device == "cpu":
        torch.set_num_threads(1)
        # The tape names pytest's class in an annotation alone, and there may be no pytest.
        sys.modules.setdefault("pytest", SimpleNamespace(MonkeyPatch=object))
        sys.path.append(str(benchmark.ROOT / "tests"))
        importlib.import_module("tape").stand_in(SimpleNamespace(setattr=setattr))
    graphs, capture = [], engine.graphs.capture

    def timed(*arguments: object) -> object:
        began = time.monotonic()
        graphs.append(capture(*arguments))
        utils.log.info(f"captured a graph in {time.monotonic() - began:.2f} s")
        return graphs[-1]

    engine.graphs.capture = timed
    return graphs


class Outcome(NamedTuple):
    """How a training ended."""

    status: int
    text: str  # what it printed
    weights: dict[str, bytes]  # of model.pt
    metrics: list[list[str]]  # of each epoch, without the times

    def compared(self, other: "Outcome") -> str:
        """Return in words how it differs from another one."""
        if self.status or other.status:
            return f"ended with statuses {self.status} and {other.status}"
        tensors = sum(value != other.weights[name] for name, value in self.weights.items())
        epochs = sum(map(list.__ne__, self.metrics, other.metrics))
        if not tensors and not epochs:
            return EQUAL
        return (f"{tensors} of {len(self.weights)} tensors and the metrics of {epochs} of "
                f"{len(self.metrics)} epochs differ")

    def captures(self) -> list[str]:
        """Return the seconds that each capture took."""
        return re.findall(r"captured a graph in (\S+) s", self.text)

    def graphs(self) -> str:
        """Return in words how many graphs there were, and why there were no more."""
        seconds, note = self.captures(), re.search(r"no CUDA graphs \(.*\)", self.text)
        took = f", captured in {' '.join(seconds)} s" if seconds else ""
        return f"{len(seconds)} graphs{took}" + (f", {note[0]}" if note else "")


def begin_training(part: str, network: Callable, flags: list[str], device: str, is_eager: bool,
                   stop: int) -> None:
    """Train in this process, which then ends. `stop` is the look at which it is stopped, or 0."""
    prepare(device)
    script = importlib.import_module(part)
    script.load_data, script.make_augment = few_images, lambda *_: cutout
    script.make_model = lambda _: network()
    if is_eager:
        # No step is captured, but all else is as with graphs: SGD's fused form has its own bits.
        engine.graphs.EAGER_STEPS, engine.graphs.PATIENCE = sys.maxsize, 0
    looks, stop_or_save = itertools.count(1), run.Run.stop_or_save

    def stop_then(this: run.Run) -> None:
        if next(looks) == stop:
            this.clock.stop_signal = signal.SIGTERM
        stop_or_save(this)

    run.Run.stop_or_save = stop_then
    random.seed(1)  # of the network that draws
    sys.argv = [f"{part}.py", *flags]
    process.run_script(script.main)


def train(part: str, directory: Path, device: str, *flags: str, network: Callable | None = None,
          is_eager: bool = False, stop: int = 0) -> Outcome:
    """Train a part in a process of its own; a stopped run in `directory` goes on."""
    network = network or NETWORKS["tiny" if device == "cpu" else part]
    flags = [*RECIPE, *(TINY[part] if device == "cpu" else []), "--device", device, "--graphs",
             "--resume", "--output-dir", str(directory), *flags]
    status, text = in_process(begin_training, part, network, flags, device, is_eager, stop)
    if status:
        return Outcome(status, text, {}, [])
    header, *rows = (line.split(",") for line in (directory / "metrics.csv").read_text().split())
    metrics = [[value for name, value in zip(header, row, strict=True) if name not in TIMES]
               for row in rows]
    # As bytes: torch's own comparison would start threads, and then no fork of this process works.
    weights = {name: value.numpy().tobytes()
               for name, value in utils.load_tensors(directory / "model.pt").items()}
    return Outcome(0, text, weights, metrics)


def check_bits(device: str, folder: Path) -> bool:
    """Print a row for each comparison; return whether all came out as they should."""
    verdicts, began = [], time.monotonic()

    def compare(name: str, one: Outcome, other: Outcome, is_right: bool,
                must_be_equal: bool = True) -> None:
        nonlocal began
        result = one.compared(other)
        verdicts.append(is_right and (result == EQUAL or not must_be_equal))
        verdict, now = "ok" if verdicts[-1] else "FAILED", time.monotonic()
        print(f"row: bits: {name} | {verdict}: {result}; {one.graphs()} | {now - began:.0f}",
              flush=True)
        began = now

    for part in PARTS:
        for precision in ("fp32", "bf16"):
            flags, name = ["--precision", precision], f"{part} {precision}"
            whole = train(part, folder / name, device, *flags)
            eager = train(part, folder / f"{name} eager", device, *flags, is_eager=True)
            compare(f"{name}, graphs and eager", whole, eager,
                    len(whole.captures()) == KINDS and "no CUDA graphs" not in whole.text)
        # What follows is in bf16.
        for before in ("graphs", "eager"):
            directory = folder / f"{name} after {before}"
            first = train(part, directory, device, *flags, is_eager=before == "eager", stop=STOP)
            resumed = train(part, directory, device, *flags)
            compare(f"{name}, {before}, stopped, graphs", resumed, whole,
                    first.status == utils.STOPPED and "resume     after" in resumed.text)
        without = train(part, folder / f"{name} without", device, *flags, "--no-graphs")
        compare(f"{name}, --graphs and --no-graphs", whole, without, not without.status, False)
    for does, network in IN_THE_WAY.items():
        one, other = (train("train_resnet", folder / f"{does} {is_eager}", device,
                            network=network, is_eager=is_eager) for is_eager in (False, True))
        compare(f"a network that {does}", one, other, "no CUDA graphs" in one.text)
    return all(verdicts)


def main() -> None:
    """Check, with the device that the command line names."""
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(not check_bits(device, Path(folder)))


if __name__ == "__main__":
    main()
