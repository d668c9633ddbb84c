"""Find CIFAR-100's files, tell their format, and read them into checked NumPy arrays."""

import gzip
import io
import math
import operator
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

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
Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 (N, 3, 32, 32), and labels int64 (N,)


class Contents(NamedTuple):
    """What the files hold: arrays by split ("train", "test"), and a name for each label."""

    splits: dict[str, Arrays]
    class_names: list[str]
    version: str  # "python", "binary" or "HDF5"


def find(data_dir: Path) -> Path | None:
    """Return the directory, archive or HDF5 file that holds CIFAR-100 in `data_dir`, or None."""
    if data_dir.is_file():
        return data_dir
    for path in (data_dir, data_dir / "cifar-100-python", data_dir / "cifar-100-binary"):
        if any((path / name).is_file() for name in ("train", "train.bin")):
            return path
    # In reverse, for the python version before the binary one.
    files = sorted(data_dir.glob("cifar-100-*.tar.gz"), reverse=True)
    files += sorted(file for file in data_dir.glob("*") if file.suffix in HDF5_SUFFIXES)
    return files[0] if files else None


def read(path: Path) -> Contents:
    """Read CIFAR-100 from a directory, a tar archive or an HDF5 file, whichever `path` is.

    Raises UserError if it is none of them, is damaged, or has the wrong content.
    """
    if path.is_file() and np.fromfile(path, np.uint8, 4).tobytes() == b"\x89HDF":
        contents = _parse_hdf5(path)
    else:
        members = _read_directory(path) if path.is_dir() else _read_archive(path)
        is_python = "train" in members
        files = PYTHON_FILES if is_python else BINARY_FILES
        missing = [file for file in files if file not in members]
        if missing:
            raise UserError(f"{path}: not a whole CIFAR-100, it lacks {', '.join(missing)}")
        # Unpacked binary files have no known sums.
        known = [path / file for file in files if file in OFFICIAL_MD5]
        sums = {calculate_md5(file) for file in (known if path.is_dir() else [path])}
        if not sums <= set(OFFICIAL_MD5.values()):
            log.info(f"note       {path}: not the official md5 sum; its content is checked instead")
        contents = (_parse_python if is_python else _parse_binary)(members, path)
    names = contents.class_names
    if not isinstance(names, list) or [type(name) for name in names] != [str] * CLASSES:
        raise UserError(f"{path}: does not hold {CLASSES} class names")
    return contents


def _read_directory(path: Path) -> dict[str, bytes]:
    """Return the files of CIFAR-100 in a directory, by name."""
    members = {}
    for file in filter(Path.is_file, (path / name for name in PYTHON_FILES + BINARY_FILES)):
        if file.stat().st_size > SIZE_LIMIT:
            raise UserError(f"{file}: larger than any file of CIFAR-100")
        members[file.name] = file.read_bytes()
    return members


def _read_archive(path: Path) -> dict[str, bytes]:
    """Return the files of CIFAR-100 in a .tar.gz or .tar, by base name; none goes to the disk."""
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


def _parse_python(members: dict[str, bytes], path: Path) -> Contents:
    splits, fault = {}, "is not a pickle of CIFAR-100"
    # A damaged pickle can raise anything.
    with guard(f"{path}: meta {fault}", Exception):
        names = unpickle(members["meta"])["fine_label_names"]
    for name in ("train", "test"):
        with guard(f"{path}: {name} {fault}", Exception):
            content = unpickle(members[name])
            labels = content["fine_labels"]
            if not isinstance(labels, list) or len(labels) > FULL_SIZE[name]:
                raise TypeError("the labels are no list, or too many")
            labels = np.fromiter(map(operator.index, labels), np.int64)
            splits[name] = _check_split(content["data"].view(np.ndarray), labels, name, path)
    return Contents(splits, names, "python")


def _parse_binary(members: dict[str, bytes], path: Path) -> Contents:
    record = 2 + 3072  # bytes: coarse label, fine label, pixels
    splits = {}
    for name in ("train", "test"):
        content = np.frombuffer(members[f"{name}.bin"], np.uint8)
        if content.size % record:
            raise UserError(f"{path}: {name}.bin is not a whole number of {record}-byte records")
        rows = content.reshape(-1, record)
        splits[name] = _check_split(rows[:, 2:], rows[:, 1], name, path)
    # The official names have 900 bytes.
    names = members["fine_label_names.txt"][:10_000].decode("utf-8", "replace").split()
    return Contents(splits, names, "binary")


def _parse_hdf5(path: Path) -> Contents:
    """Read the course's layout: X_* (N, 3, 32, 32), uint8 0..255 or float 0..1, and Y_* (N,)."""
    with guard(f"{path}: reading HDF5 needs one more package: pip install h5py", ImportError):
        import h5py
    splits = {}
    with guard(f"{path}: not HDF5 with the course's keys", Exception), h5py.File(path) as file:
        for name, count in FULL_SIZE.items():
            images = _read_hdf5(file[f"X_{name}"], "uf", count * 3072, f"{path}: {name} images")
            labels = _read_hdf5(file[f"Y_{name}"], "iu", count, f"{path}: {name} labels")
            splits[name] = _check_split(images, labels.reshape(-1), name, path)
    return Contents(splits, list(CLASS_NAMES), "HDF5")


def _read_hdf5(values: Any, kinds: str, most: int, what: str) -> np.ndarray:  # noqa: ANN401
    """Return an h5py.Dataset of at most so many numbers; floats 0..1 become uint8 0..255."""
    fault = f"{what} are {values.dtype} {values.shape}, not the numbers of CIFAR-100"
    is_float = values.dtype.kind == "f"
    # Floats are read 1,000 rows at a time to bound memory.
    at_once = 1000 * math.prod(values.shape[1:]) if is_float else values.size
    numbers = max(at_once, math.prod(values.chunks or ()))
    too_large = values.size > most or numbers * values.dtype.itemsize > SIZE_LIMIT
    if values.dtype.kind not in kinds or too_large:
        raise UserError(fault)
    if not is_float:
        return values[:]
    pixels = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), 1000):
        part = values[start : start + 1000]
        if not (part.min() >= 0 and part.max() <= 1):
            raise UserError(f"{fault}: neither uint8 nor floats of 0..1")
        pixels[start : start + 1000] = np.rint(part * 255)
    return pixels


def _check_split(images: np.ndarray, labels: np.ndarray, name: str, path: Path) -> Arrays:
    """Return a split whose form and labels are right; raises UserError."""
    where, count = f"{path}: {name}", images.shape[0] if images.ndim else 0
    if images.dtype != np.uint8 or not count or images.shape[1:] not in ((3072,), (3, 32, 32)):
        raise UserError(f"{where} images are {images.dtype} {images.shape}, not uint8 of shape "
                        "(N, 3, 32, 32)")
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise UserError(f"{where} labels are {labels.dtype} {labels.shape}, not {count} integers")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise UserError(f"{where} labels span {labels.min()}..{labels.max()}, not 0..{CLASSES - 1}")
    labels = labels.astype(np.int64)
    per_class = np.bincount(labels, minlength=CLASSES)
    if count != FULL_SIZE[name]:
        log.info(f"note       {where} has {count:,} images instead of {FULL_SIZE[name]:,}")
    elif per_class.min() != per_class.max():
        raise UserError(f"{where} has {per_class.min()} to {per_class.max()} images a class, "
                        f"not {count // CLASSES} of each")
    return images.reshape(-1, 3, 32, 32).copy(), labels
