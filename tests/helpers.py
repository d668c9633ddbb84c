"""What several tests share: small CIFAR-100s in every format, marks, and scripts as processes.

Importing torch takes most of a short run. So a server (multiprocessing's forkserver) imports it
once, and `script` starts each script as a fork of that, in a fifth of the usual time. In all else
it is the process that a user starts, with arguments, directory, signals and exit status of its own.
Nothing of the project is preloaded.
"""

import csv
import hashlib
import io
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
TIMES = ("images_per_second", "seconds", "eta_seconds")  # columns that differ between equal runs
NAMES = [f"name_{label}" for label in range(100)]

needs_data = pytest.mark.skipif(
    not (SHARED / "cifar100").is_dir(), reason="the real CIFAR-100 is not in ../shared"
)
needs_weights = pytest.mark.skipif(
    not (SHARED / "weights").is_dir(), reason="the ImageNet weights are not in ../shared"
)
IS_TORCH_2_10 = torch.__version__.startswith("2.10.")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torchvision", "tqdm", "pytest",
                                 "matplotlib.figure", "matplotlib.backends.backend_agg"])


def script(name: str, *flags, **kwargs) -> CompletedProcess:
    """Run a script of the project; return its outcome with text output, -9 if signal 9 killed it.

    The keywords are those of `call`.
    """
    return call(run_script, str(ROOT / f"{name}.py"), tuple(map(str, flags)), **kwargs)


def run_script(path: str, flags: tuple) -> None:
    """Execute the script at `path` in this process."""
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


def compare_runs(*arguments) -> None:
    """Run `python -m report.compare` in this process."""
    sys.argv = ["compare", *map(str, arguments)]
    runpy.run_module("report.compare", run_name="__main__")


def without_pictures() -> None:
    """Hide matplotlib from this process, for drawing takes a third of a run of a few steps."""
    sys.modules["matplotlib.figure"] = None


def call(function: Callable, *arguments, cwd: Path = ROOT, before: Callable | None = None,
         kill_after: float | None = None) -> CompletedProcess:
    """Call a module's function in a process of its own; return status and text output.

    There `before` is called first, in the directory `cwd`. Killed after `kill_after` seconds, if
    given; else it must end within 900, which is long even on slow cores.
    """
    texts = Path(tempfile.mkdtemp())
    for name in ("stdout", "stderr"):
        (texts / name).touch()
    try:
        process = _CONTEXT.Process(target=_begin, args=(texts, cwd, before, function, arguments))
        process.start()
        process.join(900 if kill_after is None else kill_after)
        hangs = process.is_alive() and kill_after is None
        process.kill()
        process.join()
        assert not hangs, arguments
        stdout, stderr = ((texts / name).read_text() for name in ("stdout", "stderr"))
        return CompletedProcess(arguments, process.exitcode, stdout, stderr)
    finally:
        shutil.rmtree(texts)


def _begin(texts: Path, cwd: Path, before, function, arguments) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(texts / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)  # as in a script; tqdm makes locks of it
    if before:
        before()
    function(*arguments)


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


def pack_zip(directory: Path, archive: Path, inside: str | None = None) -> Path:
    """Write a .zip of the files of `directory`, in a folder of that name or `inside`."""
    inside = directory.name if inside is None else inside
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as file:
        for path in sorted(directory.iterdir()):
            file.write(path, f"{inside}/{path.name}".lstrip("/"))
    return archive


def png(pixels: np.ndarray) -> bytes:
    """Return an image, uint8 (3, H, W), as a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def write_parquet(directory: Path, arrays: dict, column: str = "img", rows: int | None = None,
                  name: str = "{split}-00000-of-00001.parquet", **options) -> Path:
    """Write Hugging Face's layout, `rows` in a group; the options are those of pyarrow."""
    pytest.importorskip("pyarrow")
    from pyarrow import parquet, table

    for split, (images, labels) in arrays.items():
        path = directory / name.format(split=split)
        path.parent.mkdir(parents=True, exist_ok=True)
        values = [{"bytes": png(image), "path": None} for image in images]
        content = {column: values, "fine_label": labels, "coarse_label": labels // 5}
        parquet.write_table(table(content), path, row_group_size=rows, **options)
    return directory


def holds(dataset, arrays: dict) -> bool:
    """Return whether a data set holds the images and labels of these arrays."""
    return all(
        torch.equal(split.images, torch.from_numpy(arrays[name][0]))
        and torch.equal(split.labels, torch.from_numpy(arrays[name][1]))
        for name, split in (("train", dataset.train), ("test", dataset.test))
    )


def contents(directory: Path) -> dict[str, bytes]:
    """Return what the files of a directory hold, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def result(directory: Path) -> tuple[str, list[dict]]:
    """Return what a resumed run ends with as an undisturbed one does, for a comparison by ==.

    The SHA-256 of model.pt, and the rows of metrics.csv without the times.
    """
    with open(directory / "metrics.csv", newline="") as file:
        rows = [{name: value for name, value in row.items() if name not in TIMES}
                for row in csv.DictReader(file)]
    return hashlib.sha256((directory / "model.pt").read_bytes()).hexdigest(), rows


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of a Markdown text's tables, without their headers."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")]
             for line in block.splitlines()[2:]] for block in blocks]


def shows_something(path: Path) -> bool:
    """Return whether a file is a picture of more than a plain page."""
    with Image.open(path) as picture:
        return picture.format == "PNG" and len(picture.convert("L").getcolors()) > 10


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
