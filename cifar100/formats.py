"""Find CIFAR-100's files, tell their format, and read them into NumPy arrays."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets.utils import calculate_md5

from cifar100.classes import CLASS_NAMES, CLASSES, FULL_SIZE
from cifar100.files import (
    BINARY_FILES,
    CIFAR_10_FILES,
    PYTHON_FILES,
    describe,
    listed,
    read_archive,
    read_folder,
    version_of,
)
from cifar100.parquet import parts, read_parquet
from cifar100.unpickle import SIZE_LIMIT, unpickle
from utils import DamagedFile, UserError, guard, log

ARCHIVE_SUFFIXES, HDF5_SUFFIXES = (".tar", ".tgz", ".gz", ".zip"), (".h5", ".hdf5", ".hdf")
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
Found = tuple[Arrays, tuple[str, ...], str]  # with the class names, and where all that is from


def find(data_dir: Path) -> tuple[Found | None, list[str]]:
    """Read the first whole CIFAR-100 in `data_dir`; return it, and a line on all that is not one.

    Raises UserError if `data_dir` is a file without it, or if files of CIFAR-100 hold mistakes.
    """
    others = []
    for path in _candidates(data_dir):
        try:
            found = read(path)
        except DamagedFile as error:
            if data_dir.is_file():
                raise
            if (line := str(error)) not in others:
                others.append(line)
            continue
        for line in others:
            log.info(f"note       passed over {line}")
        return found, others
    if not others and (names := _visible(data_dir)):
        others.append(f"{data_dir}: holds {listed(names)}, none of it CIFAR-100")
    return None, others


def _candidates(data_dir: Path) -> Iterator[Path]:
    """Yield the folders and files that may hold CIFAR-100, the likeliest first."""
    def folders(names: tuple[str, ...], *places: str) -> list[Path]:
        holding = {path.parents[name.count("/")] for place in places for name in names
                   for path in data_dir.glob(place + name) if path.is_file()}
        return sorted(holding, key=lambda folder: (
            len(folder.parts), not folder.name.startswith("cifar-100"), folder))

    suffix = data_dir.suffix.lower()
    if data_dir.is_file():
        is_part = (data_dir.name in PYTHON_FILES + BINARY_FILES or suffix in (".parquet", ".mat")
                   or data_dir.name.startswith(CIFAR_10_FILES))
        yield data_dir.parent if is_part else data_dir
        return
    if suffix in (*ARCHIVE_SUFFIXES, *HDF5_SUFFIXES, ".parquet") and not data_dir.exists():
        raise UserError(f"--data-dir {data_dir}: no such file")
    yield from folders(PYTHON_FILES, "", "*/")
    yield from folders(BINARY_FILES, "", "*/")
    files = [path for name in _visible(data_dir) if (path := data_dir / name).is_file()]
    files.sort(key=lambda path: ("binary" in path.name, "cifar-100" not in path.name, path))
    yield from (path for path in files if path.suffix.lower() in ARCHIVE_SUFFIXES)
    yield from folders(("train*.parquet", "test*.parquet", "train/*.parquet", "test/*.parquet"),
                       "", "*/", "*/*/", "snapshots/*/*/")
    yield from (path for path in files if path.suffix.lower() in HDF5_SUFFIXES)
    yield from folders(PYTHON_FILES + BINARY_FILES, "*/*/")
    # What is no CIFAR-100, or is so by its name alone.
    yield from folders(("data_batch_1*", "train.mat"), "", "*/")
    yield from (path for path in files if "cifar" in path.name.lower()
                and path.suffix.lower() not in ARCHIVE_SUFFIXES + HDF5_SUFFIXES)


def _visible(folder: Path) -> list[str]:
    """Return the names in a folder, if it is one, but for hidden ones and a part of a download."""
    return sorted(path.name for path in folder.glob("*")
                  if not path.name.startswith(".") and path.suffix != ".part")


def read(path: Path) -> Found:
    """Return what a file or folder holds.

    Raises DamagedFile if that is something else or not whole, and UserError if it holds mistakes.
    """
    if path.is_file() and np.fromfile(path, np.uint8, 4).tobytes() == b"\x89HDF":
        version, arrays, names = "HDF5", _parse_hdf5(path), CLASS_NAMES
    elif (any(parts(path, split) for split in FULL_SIZE)
          and not any((path / name).is_file() for name in ("train", "train.bin"))):
        version, arrays, names = "Parquet", read_parquet(path), CLASS_NAMES
    else:
        version, arrays, names = _read_version(path)
    if [type(name) for name in names] != [str] * CLASSES:
        raise UserError(f"{path}: does not hold {CLASSES} class names")
    for split, (_, labels) in arrays.items():
        has, per_class = f"{path}: {split} has", np.unique(labels, return_counts=True)[1]
        fewest = per_class.min() if len(per_class) == CLASSES else 0
        if len(labels) != FULL_SIZE[split]:
            log.info(f"note       {has} {len(labels):,} images instead of {FULL_SIZE[split]:,}")
        elif not fewest:  # noise leaves no class empty, but the labels of superclasses do
            raise UserError(f"{has} 0 to {per_class.max()} images a class")
        elif fewest != per_class.max():
            log.info(f"note       {has} {fewest} to {per_class.max()} images a class")
    return arrays, tuple(names), f"{path} ({version} version)"


def _read_version(path: Path) -> tuple[str, Arrays, list]:
    """Read the python or the binary version; return which it was, the arrays and class names."""
    members = read_folder(path) if path.is_dir() else read_archive(path)
    version = version_of(path, members)
    arrays, names = (_parse_python if version == "python" else _parse_binary)(members, path)
    # Unpacked binary files have no known sums.
    sums = {hashlib.md5(content, usedforsecurity=False).hexdigest()
            for name, content in members.items() if name in OFFICIAL_MD5}
    if version == "binary" and path.is_file():
        sums = {calculate_md5(path)}
    if not sums <= set(OFFICIAL_MD5.values()):
        log.info(f"note       {path}: not the official md5 sum; its content is checked instead")
    return version, arrays, names


def _parse_python(members: dict[str, bytes], path: Path) -> tuple[Arrays, list]:
    arrays, names = {}, []
    for name, content in members.items():
        what = f"{path}: {name} is not a pickle of CIFAR-100"
        if not content.endswith(b"."):  # with which every pickle ends
            is_part = content.startswith(b"\x80")
            raise DamagedFile(f"{what}, but {'a part of one' if is_part else describe(content)}")
        # A damaged pickle can raise anything.
        with guard(what, Exception):
            if name == "meta":
                (names,) = unpickle(content, "fine_label_names")
                names = [name.decode() if isinstance(name, bytes) else name for name in names]
            else:
                images, labels = unpickle(content, "data", "fine_labels")
                arrays[name] = _images(images), _labels(labels, FULL_SIZE[name])
    return arrays, names


def _images(values: Any) -> np.ndarray:  # noqa: ANN401
    """Return a uint8 array as (N, 3, 32, 32), if it is (N, 3072) or (N, 32, 32, 3)."""
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8:
        kind = getattr(values, "dtype", "other values")
        raise TypeError(f"refused, for it holds an array of {kind}, not of uint8")
    if values.shape[1:] == (32, 32, 3):
        return values.transpose(0, 3, 1, 2)
    return values.reshape(len(values), 3, 32, 32) if values.ndim == 2 else values


def _labels(values: Any, most: int) -> np.ndarray:  # noqa: ANN401
    """Return a list, tuple or array of at most so many whole numbers as int64 (N,)."""
    values = values.reshape(-1) if isinstance(values, np.ndarray) else values
    if not isinstance(values, (np.ndarray, list, tuple)) or len(values) > most:
        raise TypeError("the labels are no list, or too many")
    if not all(isinstance(value, (int, np.integer)) for value in values):
        raise TypeError("the labels are not whole numbers")
    return np.fromiter(values, np.int64)


def _parse_binary(members: dict[str, bytes], path: Path) -> tuple[Arrays, list]:
    record = 2 + 3072  # bytes: coarse label, fine label, pixels
    arrays = {}
    for name in ("train", "test"):
        content = np.frombuffer(members[f"{name}.bin"], np.uint8)
        if content.size % record:
            raise DamagedFile(f"{path}: {name}.bin is not a whole number of {record}-byte records")
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
