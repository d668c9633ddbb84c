"""What several tests need: small CIFAR-100s in every format, and the shared data."""

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ROOT

import utils

SHARED = ROOT.parent / "shared"
NAMES = [f"name_{label}" for label in range(100)]

needs_data = pytest.mark.skipif(
    not (SHARED / "cifar100").is_dir(), reason="the real CIFAR-100 is not in ../shared"
)
needs_weights = pytest.mark.skipif(
    not (SHARED / "weights").is_dir(), reason="the ImageNet weights are not in ../shared"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def runtime():
    return utils.Runtime(torch.device("cpu"), torch.float32, False, torch.channels_last)


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


def write_python(directory: Path, arrays: dict, protocol: int = 2) -> Path:
    """Write the official python version."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in arrays.items():
        content = {
            "data": images.reshape(len(images), -1),
            "fine_labels": labels.tolist(),
            "coarse_labels": [0] * len(labels),
            "filenames": [f"{split}_{i}.png" for i in range(len(labels))],
            "batch_label": f"{split} batch 1 of 1",
        }
        (directory / split).write_bytes(pickle.dumps(content, protocol))
    meta = {"fine_label_names": NAMES, "coarse_label_names": ["all"]}
    (directory / "meta").write_bytes(pickle.dumps(meta, protocol))
    return directory


def write_binary(directory: Path, arrays: dict) -> Path:
    """Write the official binary version."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in arrays.items():
        coarse = np.zeros(len(labels), np.uint8)
        heads = np.stack([coarse, labels.astype(np.uint8)], 1)
        rows = np.concatenate([heads, images.reshape(len(images), -1)], 1)
        (directory / f"{split}.bin").write_bytes(rows.tobytes())
    (directory / "fine_label_names.txt").write_text("\n".join(NAMES) + "\n")
    return directory


def write_hdf5(path: Path, arrays: dict, dtype=np.uint8) -> Path:
    """Write the course's HDF5 layout; floating-point pixels are scaled to 0..1."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for split, (images, labels) in arrays.items():
            pixels = images if dtype is np.uint8 else (images / 255).astype(dtype)
            file[f"X_{split}"], file[f"Y_{split}"] = pixels, labels
    return path


def pack(directory: Path, archive: Path) -> Path:
    """Write a .tar.gz of `directory`, as the official archives are laid out."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(directory, directory.name)
    return archive


def contents(directory: Path) -> dict[str, bytes]:
    """Return what the files of a directory hold, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def equal(one, two) -> bool:
    """Return whether two states are the same, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        same = isinstance(two, dict) and list(one) == list(two)
        return same and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        same = type(one) is type(two) and len(one) == len(two)
        return same and all(map(equal, one, two))
    return type(one) is type(two) and one == two


def pytest_addoption(parser):
    """Add --kills."""
    parser.addoption("--kills", type=int, default=26, help="SIGKILLs of the fault-injection test")
