"""Fixtures of several test files, and the option --kills."""

import importlib
import os
import sys

import numpy as np
import pytest
import torch
from helpers import write_binary

from engine.process import AT_END
from engine.runtime import Runtime


def pytest_addoption(parser):
    """Add --kills."""
    parser.addoption("--kills", type=int, default=10, help="SIGKILLs of the marked kill test")


def pytest_configure():
    """Have every process compute with one thread, unless $OMP_NUM_THREADS says otherwise.

    Several threads gain little on such small work, and where another program keeps a core busy
    they wait for each other: the tests then take twenty times as long.
    """
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


def pytest_xdist_auto_num_workers(config):
    """Have two processes run the quick tests, but one the others, of which some use Slurm."""
    return 2 if config.option.markexpr == "not slow" else 0


@pytest.fixture(autouse=True)
def _at_end():
    """End what a test has started of a run, as the end of the run does."""
    yield
    AT_END.close()


@pytest.fixture
def runtime():
    """The CPU in float32, one process."""
    return Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Return a function that imports a script and parses flags as it does."""
    monkeypatch.chdir(tmp_path)

    def parse_flags(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        script = importlib.import_module(name)
        return script, script.parse_args()

    return parse_flags


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be written into files, in their order; for speed they are not."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    figures = []
    monkeypatch.setattr(figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


@pytest.fixture(scope="session")
def arrays():
    """Two images a class to train, one to test: {split: (images, labels)}."""
    rng = np.random.default_rng(0)
    return {
        split: (
            rng.integers(0, 256, (100 * each, 3, 32, 32), np.uint8),
            rng.permutation(np.repeat(np.arange(100), each)),
        )
        for split, each in (("train", 2), ("test", 1))
    }


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, arrays):
    """A directory with a CIFAR-100 of 32 training and 20 test images, for runs of a second."""
    few = {split: (images[:count], labels[:count])
           for count, (split, (images, labels)) in zip((32, 20), arrays.items(), strict=True)}
    return write_binary(tmp_path_factory.mktemp("cifar"), few)
