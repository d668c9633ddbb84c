"""Find CIFAR-100's files, tell their format, and read them into NumPy arrays."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from cifar100.classes import CLASS_NAMES, CLASSES, FULL_SIZE
from cifar100.files import candidates, describe, listed, read_members
from cifar100.parquet import parts, read_parquet
from cifar100.unpickle import INTEGERS, SIZE_LIMIT, unpickle
from utils import DamagedFile, UserError, guard, log

PIXELS = ("u1", "f2", "f4", "f8")  # NumPy's names of what the course's images can be
# md5 sums of the official files, https://www.cs.toronto.edu/~kriz/cifar.html and torchvision.
OFFICIAL_MD5 = {"train": "16019d7e3df5f24257cddd939b257f8d",
                "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
                "meta": "7973b15100ade9c7d40fb424638fde48"}
# Images and labels, int64 (N,), by split. The images have any form until `data.check` sees them.
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]
Found = tuple[Arrays, tuple[str, ...], str]  # with the class names, and where all that is from


def find(data_dir: Path) -> tuple[Found | None, list[str]]:
    """Read the first whole CIFAR-100 in `data_dir`; return it, and a line on all that is not one.

    Raises UserError if `data_dir` is a file without it, or if files of CIFAR-100 hold mistakes.
    """
    others = []
    for path in candidates(data_dir):
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
    names = [path.name for path in data_dir.glob("[!.]*")]
    if names and not others:
        others.append(f"{data_dir}: holds {listed(names)}, none of it CIFAR-100")
    return None, others


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
        members = read_members(path)
        is_python = "train" in members
        version, parse = ("python", _parse_python) if is_python else ("binary", _parse_binary)
        arrays, names = parse(members, path)
    if [type(name) for name in names] != [str] * CLASSES:
        raise UserError(f"{path}: does not hold {CLASSES} class names")
    for split, (_, labels) in arrays.items():
        whole, per_class = FULL_SIZE[split], np.unique(labels, return_counts=True)[1]
        fewest = per_class.min() if len(per_class) == CLASSES else 0
        has = (f"{path}: {split} has {len(labels):,} of {whole:,} images, "
               f"{fewest} to {per_class.max(initial=0)} of a class")
        if len(labels) == whole and not fewest:  # the labels of superclasses, but not noisy ones
            raise UserError(has)
        if per_class.tolist() != [whole // CLASSES] * CLASSES:
            log.info(f"note       {has}")
    return arrays, tuple(names), f"{path} ({version} version)"


def _parse_python(members: dict[str, bytes], path: Path) -> tuple[Arrays, list]:
    arrays, names = {}, []
    for name, content in members.items():
        what = f"{path}: {name} is not a pickle of CIFAR-100"
        if not content.endswith(b"."):  # with which every pickle ends
            raise DamagedFile(f"{what}, but {describe(content)}")
        # A damaged pickle can raise anything.
        with guard(what, Exception):
            if name == "meta":
                (names,) = unpickle(content, "fine_label_names")
                names = [name.decode() if isinstance(name, bytes) else name for name in names]
            else:
                images, labels = unpickle(content, "data", "fine_labels")
                arrays[name] = _images(images), _labels(labels, FULL_SIZE[name])
    if any(hashlib.md5(content, usedforsecurity=False).hexdigest() != OFFICIAL_MD5[name]
           for name, content in members.items()):
        log.info(f"note       {path}: not the official md5 sum; its content is checked instead")
    return arrays, names


def _images(values: Any) -> np.ndarray:  # noqa: ANN401
    """Return a uint8 array as (N, 3, 32, 32), if it is (N, 3072) or (N, 32, 32, 3)."""
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8:
        raise TypeError("the images are no array of uint8")
    if values.shape[1:] == (32, 32, 3):
        return values.transpose(0, 3, 1, 2)
    return values.reshape(len(values), 3, 32, 32) if values.ndim == 2 else values


def _labels(values: Any, most: int) -> np.ndarray:  # noqa: ANN401
    """Return a list, tuple or array of at most so many whole numbers as int64 (N,)."""
    values = values.reshape(-1) if isinstance(values, np.ndarray) else values
    if not (isinstance(values, (np.ndarray, list, tuple)) and len(values) <= most
            and all(isinstance(value, (int, np.integer)) for value in values)):
        raise TypeError(f"the labels are no list of {most:,} whole numbers or fewer")
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
            images = _read_hdf5(file[f"X_{name}"], PIXELS, count * 3072, f"{path}: {name} images")
            labels = _read_hdf5(file[f"Y_{name}"], INTEGERS, count, f"{path}: {name} labels")
            arrays[name] = images, labels.reshape(-1).astype(np.int64)
    return arrays


def _read_hdf5(values: Any, kinds: tuple, most: int, what: str) -> np.ndarray:  # noqa: ANN401
    """Return an h5py.Dataset of at most so many numbers; floats 0..1 become uint8 0..255."""
    fault = f"{what} are {values.dtype} {values.shape}, not the numbers of CIFAR-100"
    # To bound memory, 1,000 rows are read at a time, but no less than a chunk.
    numbers = max(1000 * math.prod(values.shape[1:]), math.prod(values.chunks or ()))
    if (values.dtype.str[1:] not in kinds or values.size > most
            or numbers * values.dtype.itemsize > SIZE_LIMIT):
        raise UserError(fault)
    is_float = values.dtype.kind == "f"
    result = np.empty(values.shape, np.uint8 if is_float else values.dtype)
    for start in range(0, len(values), 1000):
        part = values[start : start + 1000]
        if is_float and not (part.min() >= 0 and part.max() <= 1):
            raise UserError(f"{fault}: neither uint8 nor floats of 0..1")
        result[start : start + 1000] = np.rint(part * 255) if is_float else part
    return result
