"""Find CIFAR-100's files, tell their format, and read them into NumPy arrays."""

import gzip
import io
import math
import operator
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from torchvision.datasets.utils import calculate_md5

from cifar100.classes import CLASS_NAMES, CLASSES, FULL_SIZE
from cifar100.unpickle import SIZE_LIMIT, unpickle
from utils import UserError, guard, log

PYTHON_FILES = ("train", "test", "meta")
BINARY_FILES = ("train.bin", "test.bin", "fine_label_names.txt")
HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
# md5 sums of the official files, https://www.cs.toronto.edu/~kriz/cifar.html and torchvision.
OFFICIAL_MD5 = {
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
# Images and labels, int64 (N,), by split. The images have any form until `data.check` sees them.
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


def find(data_dir: Path) -> Path | None:
    """Return the directory, archive or HDF5 file that holds CIFAR-100 in `data_dir`, or None."""
    if data_dir.is_file():
        return data_dir
    if data_dir.suffix in (".gz", ".tgz", ".tar", *HDF5_SUFFIXES) and not data_dir.exists():
        raise UserError(f"--data-dir {data_dir}: no such file")
    for path in (data_dir, data_dir / "cifar-100-python", data_dir / "cifar-100-binary"):
        if any((path / name).is_file() for name in ("train", "train.bin")):
            return path
    # In reverse, for the python version before the binary one.
    files = sorted(data_dir.glob("cifar-100-*.tar.gz"), reverse=True)
    files += sorted(file for file in data_dir.glob("*") if file.suffix in HDF5_SUFFIXES)
    return files[0] if files else None


def read(path: Path) -> tuple[Arrays, tuple[str, ...], str]:
    """Return the arrays, class names and source of a file or directory; raises UserError."""
    if path.is_file() and np.fromfile(path, np.uint8, 4).tobytes() == b"\x89HDF":
        version, arrays, names = "HDF5", _parse_hdf5(path), CLASS_NAMES
    else:
        members = _read_directory(path) if path.is_dir() else _read_archive(path)
        version, files, parse = "binary", BINARY_FILES, _parse_binary
        if "train" in members:
            version, files, parse = "python", PYTHON_FILES, _parse_python
        if missing := [file for file in files if file not in members]:
            raise UserError(f"{path}: not a whole CIFAR-100, it lacks {', '.join(missing)}")
        # Unpacked binary files have no known sums.
        known = [path / file for file in files if file in OFFICIAL_MD5]
        sums = {calculate_md5(file) for file in (known if path.is_dir() else [path])}
        if not sums <= set(OFFICIAL_MD5.values()):
            log.info(f"note       {path}: not the official md5 sum; its content is checked instead")
        arrays, names = parse(members, path)
    if [type(name) for name in names] != [str] * CLASSES:
        raise UserError(f"{path}: does not hold {CLASSES} class names")
    for split, (_, labels) in arrays.items():
        has, per_class = f"{path}: {split} has", np.unique(labels, return_counts=True)[1]
        fewest = per_class.min() if len(per_class) == CLASSES else 0
        if len(labels) != FULL_SIZE[split]:
            log.info(f"note       {has} {len(labels):,} images instead of {FULL_SIZE[split]:,}")
        elif fewest != per_class.max():
            raise UserError(f"{has} {fewest} to {per_class.max()} images a class")
    return arrays, tuple(names), f"{path} ({version} version)"


def _read_directory(path: Path) -> dict[str, bytes]:
    files = [file for name in PYTHON_FILES + BINARY_FILES if (file := path / name).is_file()]
    if max(file.stat().st_size for file in files) > SIZE_LIMIT:
        raise UserError(f"{path}: holds files larger than any of CIFAR-100")
    return {file.name: file.read_bytes() for file in files}


def _read_archive(path: Path) -> dict[str, bytes]:
    """Return the files of a .tar.gz or .tar by base name; none is written to the disk."""
    members = {}
    with guard(f"{path}: not an HDF5 file, and not a whole tar archive", Exception,
               "; if it was copied or downloaded by hand, do that again"):
        with open(path, "rb") as file:
            is_packed = file.peek(2).startswith(b"\x1f\x8b")  # by gzip, which has a checksum
            content = (gzip.GzipFile(fileobj=file) if is_packed else file).read(SIZE_LIMIT + 1)
        if len(content) > SIZE_LIMIT:
            raise UserError(f"{path}: unpacks to more than all of CIFAR-100")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in filter(tarfile.TarInfo.isfile, archive):
                name = PurePosixPath(member.name).name
                if name in PYTHON_FILES + BINARY_FILES and not member.issparse():
                    members[name] = archive.extractfile(member).read()
    return members


def _parse_python(members: dict[str, bytes], path: Path) -> tuple[Arrays, list]:
    arrays, names = {}, []
    for name in PYTHON_FILES:
        # A damaged pickle can raise anything.
        with guard(f"{path}: {name} is not a pickle of CIFAR-100", Exception):
            content = unpickle(members[name])
            if name == "meta":
                names = content["fine_label_names"]
                if not isinstance(names, list):
                    raise TypeError("the names are no list")
                continue
            images, labels = content["data"].view(np.ndarray), content["fine_labels"]
            if not isinstance(labels, list) or len(labels) > FULL_SIZE[name]:
                raise TypeError("the labels are no list, or too many")
            arrays[name] = (images.reshape(len(images), 3, 32, 32) if images.ndim == 2 else images,
                            np.fromiter(map(operator.index, labels), np.int64))
    return arrays, names


def _parse_binary(members: dict[str, bytes], path: Path) -> tuple[Arrays, list]:
    record = 2 + 3072  # bytes: coarse label, fine label, pixels
    arrays = {}
    for name in ("train", "test"):
        content = np.frombuffer(members[f"{name}.bin"], np.uint8)
        if content.size % record:
            raise UserError(f"{path}: {name}.bin is not a whole number of {record}-byte records")
        rows = content.reshape(-1, record)
        arrays[name] = rows[:, 2:].reshape(-1, 3, 32, 32), rows[:, 1].astype(np.int64)
    # The official names have 900 bytes.
    return arrays, members["fine_label_names.txt"][:10_000].decode("utf-8", "replace").split()


def _parse_hdf5(path: Path) -> Arrays:
    """Read the course's layout: X_* (N, 3, 32, 32), uint8 0..255 or float 0..1, and Y_* (N,)."""
    with guard(f"{path}: reading HDF5 needs one more package: pip install h5py", ImportError):
        import h5py
    arrays = {}
    with guard(f"{path}: not HDF5 with the course's keys", Exception), h5py.File(path) as file:
        for name, count in FULL_SIZE.items():
            images = _read_hdf5(file[f"X_{name}"], "uf", count * 3072, f"{path}: {name} images")
            labels = _read_hdf5(file[f"Y_{name}"], "iu", count, f"{path}: {name} labels")
            arrays[name] = images, labels.reshape(-1).astype(np.int64)
    return arrays


def _read_hdf5(values: Any, kinds: str, most: int, what: str) -> np.ndarray:  # noqa: ANN401
    """Return an h5py.Dataset of at most so many numbers; floats 0..1 become uint8 0..255."""
    fault = f"{what} are {values.dtype} {values.shape}, not the numbers of CIFAR-100"
    kind, size = values.dtype.kind, values.dtype.itemsize
    # Floats are read 1,000 rows at a time to bound memory.
    numbers = 1000 * math.prod(values.shape[1:]) if kind == "f" else values.size
    numbers = max(numbers, math.prod(values.chunks or ()))  # in memory at once
    if kind not in kinds or values.size > most or numbers * size > SIZE_LIMIT:
        raise UserError(fault)
    if kind != "f":
        return values[:]
    pixels = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), 1000):
        part = values[start : start + 1000]
        if not (part.min() >= 0 and part.max() <= 1):
            raise UserError(f"{fault}: neither uint8 nor floats of 0..1")
        pixels[start : start + 1000] = np.rint(part * 255)
    return pixels
