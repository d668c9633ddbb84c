"""CIFAR-100: find it, read it, check it, and feed it to the network.

`load()` finds the data set in any of its three formats, or downloads it; `synthetic()` draws a
stand-in that needs no file; `pictures()` reads the user's own. All make a `Dataset` of uint8
images. `Batches` keeps one split on the training device and does there, batch by batch, all that
other code leaves to worker processes.
"""

import gzip
import hashlib
import http.client
import logging
import math
import operator
import os
import pickle
import re
import tarfile
import time
import urllib.error
import urllib.request
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from models import Refused, UserError, check_pickle
from utils import Runtime, epoch_seed, rank_0_first, try_lock

log = logging.getLogger("cifar100")

CLASSES = 100
# Krizhevsky's superclasses and their classes; the label of a class is its place in the alphabet.
SUPERCLASSES = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}
SUPERCLASS_OF = {name: group for group, names in SUPERCLASSES.items() for name in names.split()}
CLASS_NAMES = tuple(sorted(SUPERCLASS_OF))
SYNTHETIC_NAMES = tuple(f"hue {label % 10} plaid {label // 10}" for label in range(CLASSES))
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".ppm", ".tif", ".tiff", ".webp")
URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
# md5 sums of the official files, https://www.cs.toronto.edu/~kriz/cifar.html and torchvision.
OFFICIAL_MD5 = {
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
PYTHON_FILES = ("train", "test", "meta")
BINARY_FILES = ("train.bin", "test.bin", "fine_label_names.txt")
HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
RETRY_SECONDS = 1  # before the first retry of a broken download; then twice as long each time
SIZE_LIMIT = 256 * 2**20  # bytes, of a file and of an unpacked archive; the official has 186 MB
NAMES_LIMIT = 10_000  # bytes; the official fine_label_names.txt has 900
FULL_SIZE = {"train": 50_000, "test": 10_000}

# Mean and standard deviation of the pixels, scaled to 0..1, of the 50,000 training images.
CIFAR100_STATS = ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047))
# Those of ImageNet, with which torchvision's ResNet-18 was trained.
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CROP_PADDING = 4  # pixels on each side before the random 32 x 32 crop, He et al. 2015, section 4.2


class Split(NamedTuple):
    """Images uint8 (N, 3, 32, 32), values 0..255, and labels int64 (N,), values 0..99."""

    images: Tensor
    labels: Tensor


class Dataset(NamedTuple):
    """Both splits, the 100 class names, and in words where they came from.

    Of pictures to classify, `train` is empty and the labels of `test` mean nothing.
    """

    name: str  # "cifar100" or "synthetic"
    train: Split
    test: Split
    class_names: tuple[str, ...]
    source: str

    def checksum(self) -> int:
        """Return the CRC-32 of all images and labels, in their order."""
        crc = 0
        for tensor in (*self.train, *self.test):
            crc = zlib.crc32(tensor.numpy(), crc)
        return crc


def load(name: str, data_dir: str | Path, url: str | None = None, download: bool = True) -> Dataset:
    """Return the data set `name`, "cifar100" or "synthetic".

    CIFAR-100 comes from `data_dir`, a directory or one file; it is downloaded if need be. Raises
    UserError if it is not there and cannot be downloaded, or is not CIFAR-100.
    """
    if name == "synthetic":
        return synthetic()
    data_dir = Path(data_dir)
    try:
        if data_dir.suffix in (".gz", ".tgz", ".tar", *HDF5_SUFFIXES) and not data_dir.exists():
            raise UserError(f"--data-dir {data_dir}: no such file")
        with rank_0_first():  # who downloads it, if need be
            path = find(data_dir)
            if path is None:
                if not download:
                    raise UserError(_ways_out(data_dir, "--no-download forbids to fetch it"))
                path = fetch(url or URL, data_dir)
        return read(path)
    except (OSError, MemoryError) as error:
        reason = error or "not enough memory"
        raise UserError(f"{data_dir}: cannot be read: {reason}") from error


def find(data_dir: Path) -> Path | None:
    """Return the directory, archive or HDF5 file that holds CIFAR-100 in `data_dir`, or None."""
    if data_dir.is_file():
        return data_dir
    for path in (data_dir, data_dir / "cifar-100-python", data_dir / "cifar-100-binary"):
        if any((path / name).is_file() for name in ("train", "train.bin")):
            return path
    files = sorted(data_dir.glob("cifar-100-*.tar.gz"), reverse=True)  # python before binary
    files += sorted(file for file in data_dir.glob("*") if file.suffix in HDF5_SUFFIXES)
    return files[0] if files else None


def read(path: Path) -> Dataset:
    """Read CIFAR-100 from a directory, a tar archive or an HDF5 file, whichever `path` is.

    Raises UserError if it is none of them, is damaged, or has the wrong content.
    """
    if path.is_file() and _starts_with(path, b"\x89HDF\r\n\x1a\n"):
        kind, parts = "HDF5", _parse_hdf5(path)
    else:
        members = _read_directory(path) if path.is_dir() else _read_archive(path)
        names = PYTHON_FILES if "train" in members else BINARY_FILES
        missing = [name for name in names if name not in members]
        if missing:
            raise UserError(f"{path}: not a whole CIFAR-100, it lacks {', '.join(missing)}")
        parse = _parse_python if names is PYTHON_FILES else _parse_binary
        kind, parts = "python" if names is PYTHON_FILES else "binary", parse(members, path)
    train = _check_split(*parts["train"], "train", path)
    test = _check_split(*parts["test"], "test", path)
    class_names = parts["class_names"]
    named = isinstance(class_names, list) and len(class_names) == CLASSES
    if not named or not all(isinstance(name, str) for name in class_names):
        raise UserError(f"{path}: does not hold {CLASSES} class names")
    return Dataset("cifar100", train, test, tuple(class_names), f"{path} ({kind} version)")


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _read_directory(path: Path) -> dict[str, bytes]:
    members = {}
    for name in PYTHON_FILES + BINARY_FILES:
        file = path / name
        if file.is_file():
            if file.stat().st_size > SIZE_LIMIT:
                raise UserError(f"{file}: larger than any file of CIFAR-100")
            members[name] = file.read_bytes()
    official = {name: md5 for name, md5 in OFFICIAL_MD5.items() if name in members}
    if any(_md5(BytesIO(members[name])) != md5 for name, md5 in official.items()):
        log.info(f"note       {path}: not the official md5 sums; its content is checked instead")
    return members


def _read_archive(path: Path) -> dict[str, bytes]:
    """Return the archive's members of interest by base name; nothing is unpacked to disk."""
    members = {}
    try:
        with tarfile.open(fileobj=_gunzip(path), mode="r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                wanted = name in PYTHON_FILES + BINARY_FILES
                if wanted and member.isfile() and not member.issparse():
                    members[name] = archive.extractfile(member).read()
    except UserError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise UserError(
            f"{path}: not an HDF5 file, and not a whole tar archive ({error}); if it was copied or "
            "downloaded by hand, do that again"
        ) from error
    official = OFFICIAL_MD5[f"cifar-100-{'python' if 'train' in members else 'binary'}.tar.gz"]
    with open(path, "rb") as file:
        if _md5(file) != official:
            log.info(f"note       {path}: not the official md5 sum; its content is checked instead")
    return members


def _gunzip(path: Path) -> BytesIO:
    """Return the content of a .tar or .tar.gz; gzip's checksum is verified at its end."""
    unpacked = BytesIO()
    is_gzip = _starts_with(path, b"\x1f\x8b")
    with gzip.open(path) if is_gzip else open(path, "rb") as file:
        while chunk := file.read(2**20):
            unpacked.write(chunk)
            if unpacked.tell() > SIZE_LIMIT:
                raise UserError(f"{path}: unpacks to more than all of CIFAR-100")
    unpacked.seek(0)
    return unpacked


def _md5(file) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for chunk in iter(lambda: file.read(2**20), b""):
        digest.update(chunk)
    return digest.hexdigest()


def _parse_python(members: dict[str, bytes], path: Path) -> dict:
    parts = {}
    try:
        for name in ("train", "test", "meta"):
            content = _unpickle(members[name])
            if name == "meta":
                parts["class_names"] = content["fine_label_names"]
            else:
                labels = content["fine_labels"]
                if not isinstance(labels, list) or len(labels) > FULL_SIZE[name]:
                    raise TypeError("the labels are no list, or too many")
                labels = np.fromiter(map(operator.index, labels), np.int64)
                parts[name] = content["data"].pixels(), labels
    except Exception as error:  # a damaged pickle can raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{path}: {name} is not a pickle of CIFAR-100 ({reason})") from error
    return parts


def _parse_binary(members: dict[str, bytes], path: Path) -> dict:
    names = members["fine_label_names.txt"][:NAMES_LIMIT].decode("utf-8", "replace")
    parts = {"class_names": names.split()}
    record = 2 + 3072  # bytes: coarse label, fine label, pixels
    for name in ("train", "test"):
        content = np.frombuffer(members[f"{name}.bin"], np.uint8)
        if content.size % record:
            raise UserError(f"{path}: {name}.bin is not a whole number of {record}-byte records")
        rows = content.reshape(-1, record)
        parts[name] = rows[:, 2:], rows[:, 1]
    return parts


def _parse_hdf5(path: Path) -> dict:
    """The course's layout: X_* (N, 3, 32, 32), uint8 0..255 or float 0..1, and Y_* (N,)."""
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path}: reading HDF5 needs one more package: pip install h5py") from error
    parts = {"class_names": list(CLASS_NAMES)}
    try:
        with h5py.File(path) as file:
            for name in ("train", "test"):
                images, labels = file[f"X_{name}"], file[f"Y_{name}"]
                for part in (images, labels):
                    numbers = part.dtype.kind in "iuf" and part.dtype.itemsize <= 8
                    chunk = math.prod(part.chunks or (1,)) * part.dtype.itemsize
                    if not numbers or part.size > FULL_SIZE[name] * 3072 or chunk > SIZE_LIMIT:
                        raise UserError(f"{path}: {part.name} is {part.dtype} {part.shape}, not "
                                        "the numbers of CIFAR-100")
                if labels.size > FULL_SIZE[name]:
                    raise UserError(f"{path}: {labels.name} has more labels than CIFAR-100")
                parts[name] = _read_pixels(images, name, path), labels[:].reshape(-1)
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path}: not an HDF5 file with the course's keys ({error})") from error
    return parts


def _read_pixels(images, name: str, path: Path) -> np.ndarray:
    """Return an HDF5 dataset as uint8, a thousand images at a time; floats 0..1 are scaled."""
    if images.dtype == np.uint8:
        return images[:]
    pixels = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), 1000):
        part = images[start : start + 1000]
        if part.dtype.kind != "f" or not (part.min() >= 0 and part.max() <= 1):
            raise UserError(f"{path}: {name} images are {part.dtype}, but neither uint8 nor floats "
                            "of 0..1")
        pixels[start : start + 1000] = np.rint(part * 255)
    return pixels


def _unpickle(content: bytes) -> dict:
    """Return a pickled dict whose keys are str; Python-2 strings are decoded as latin-1.

    Builds uint8 arrays and plain containers; raises UnpicklingError on anything else.
    """
    check_pickle(BytesIO(content), PICKLE_GLOBALS)
    loaded = _Unpickler(BytesIO(content), encoding="latin1").load()
    return {k.decode() if isinstance(k, bytes) else k: value for k, value in loaded.items()}


class _Array:
    """Stands in for numpy's own unpickling, which trusts any dtype, pointers included."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, _, fortran_order, self.content = state
        if fortran_order or not isinstance(self.content, (bytes, str)):
            raise Refused("refused, for it holds an array that is not of uint8")

    def pixels(self) -> np.ndarray:
        content = self.content
        content = content.encode("latin1") if isinstance(content, str) else content
        return np.frombuffer(content, np.uint8).reshape(self.shape)


class _Dtype:
    def __setstate__(self, state: tuple) -> None:
        pass


def _dtype(code: str, *_) -> _Dtype:
    if code not in ("u1", "|u1", "uint8"):
        raise Refused(f"refused, for it holds an array of {code!r}, not of uint8")
    return _Dtype()


PICKLE_NAMES = {
    "numpy dtype": _dtype,
    "numpy ndarray": "ndarray",  # only ever named as an argument of _reconstruct
    "numpy.core.multiarray _reconstruct": lambda *_: _Array(),
    "numpy._core.multiarray _reconstruct": lambda *_: _Array(),
    "_codecs encode": None,  # makes Python 3's bytes in a protocol-2 pickle
}
PICKLE_GLOBALS = re.compile("|".join(map(re.escape, PICKLE_NAMES)))


class _Unpickler(pickle.Unpickler):
    encoded = 0  # bytes made so far; a short pickle could ask for the same ones many times

    def find_class(self, module: str, name: str):
        if f"{module} {name}" not in PICKLE_NAMES:
            raise Refused(f"refused, for it asks for {module}.{name}")
        return PICKLE_NAMES[f"{module} {name}"] or self._encode

    def _encode(self, text: str, _) -> bytes:
        self.encoded += len(text)
        if self.encoded > SIZE_LIMIT:
            raise Refused("refused, for it is larger than all of CIFAR-100")
        return text.encode("latin1")


def _check_split(images, labels, name: str, path: Path) -> Split:
    where, count = f"{path}: {name}", images.shape[0] if images.ndim else 0
    if images.dtype != np.uint8 or not count or images.shape[1:] not in ((3072,), (3, 32, 32)):
        raise UserError(f"{where} images are {images.dtype} {images.shape}, not uint8 of shape "
                        "(N, 3, 32, 32)")
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise UserError(f"{where} labels are {labels.dtype} {labels.shape}, not whole ({count},)")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise UserError(f"{where} labels span {labels.min()}..{labels.max()}, not 0..{CLASSES - 1}")
    labels = labels.astype(np.int64)
    per_class = np.bincount(labels, minlength=CLASSES)
    if count != FULL_SIZE[name]:
        log.info(f"note       {where} has {count:,} images instead of {FULL_SIZE[name]:,}")
    elif per_class.min() != per_class.max():
        raise UserError(f"{where} has {per_class.min()} to {per_class.max()} images a class, "
                        f"not {count // CLASSES} of each")
    images = torch.from_numpy(images.reshape(-1, 3, 32, 32).copy())
    return Split(images, torch.from_numpy(labels))


def _ways_out(data_dir, reason: str) -> str:
    return (
        f"CIFAR-100 is not in {data_dir} ({reason}). Three ways out: put cifar-100-python.tar.gz "
        f"(or the binary version, or an HDF5 file) into {data_dir}; name a mirror with --data-url; "
        "or try the script on made-up images with --dataset synthetic"
    )


def fetch(url: str, data_dir: Path, attempts: int = 5) -> Path:
    """Download an official archive into `data_dir` and return its path.

    One process at a time downloads, the others wait for it. A broken transfer is resumed, in this
    run and in the next; the archive gets its name only after its md5 has been checked.
    Raises UserError if it cannot be had.
    """
    part = data_dir / "cifar-100.tar.gz.part"
    names = {md5: name for name, md5 in OFFICIAL_MD5.items() if name.endswith(".tar.gz")}
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with open(data_dir / ".cifar-100.lock", "w") as lock:
            if not try_lock(lock):
                log.info(f"download   waiting for another process, which holds {lock.name}")
                while not try_lock(lock):
                    time.sleep(0.1)
            found = find(data_dir)
            if found:
                return found
            log.info(f"download   {url} to {data_dir}")
            leftover = part.exists()
            md5 = _transfer_with_retries(url, part, attempts)
            if md5 not in names and leftover:  # it was perhaps another file's
                md5 = _transfer_with_retries(url, part, attempts)
            if md5 not in names:
                raise UserError(_ways_out(data_dir, f"what {url} sent, md5 {md5}, is not official"))
            os.replace(part, data_dir / names[md5])
            return data_dir / names[md5]
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(_ways_out(data_dir, f"downloading {url} failed: {error}")) from error


def _transfer_with_retries(url: str, part: Path, attempts: int) -> str:
    """Complete `part` and return its md5; it is deleted if that is no official archive's."""
    for attempt in range(attempts):
        try:
            _transfer(url, part)
            break
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", 500)  # 5xx, 408 and 429 are a busy server's
            if attempt + 1 == attempts or (code < 500 and code not in (408, 429)):
                raise
            log.info(f"download   broke off ({error}), trying again")
            time.sleep(RETRY_SECONDS * 2**attempt)
    with open(part, "rb") as file:
        md5 = _md5(file)
    if md5 not in OFFICIAL_MD5.values():
        part.unlink()
    return md5


def _transfer(url: str, part: Path) -> None:
    """Append to `part` what it lacks of the file at `url`."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)  # seconds without a byte
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # range not satisfiable: everything is here already
            return
        raise
    with response:
        if response.status != 206:  # the server does not resume
            have = 0
        total = have + int(response.headers.get("Content-Length") or 0)
        bar = tqdm(total=total or None, initial=have, unit="B", unit_scale=True,
                   mininterval=0.1 if os.isatty(2) else 60)  # seconds; a batch log gets few lines
        with open(part, "ab" if have else "wb") as file, bar:
            while chunk := response.read(2**18):
                bar.update(file.write(chunk))
    if total and part.stat().st_size < total:
        raise OSError(f"connection closed after {part.stat().st_size:,} of {total:,} bytes")


def synthetic(train_per_class: int = 50, test_per_class: int = 10) -> Dataset:
    """Draw a CIFAR-100-shaped set of 100 classes: 10 hues times 10 plaids, at random phases.

    Deterministic, and unchanged by a horizontal flip. A number obtained on it says that the code
    works, and nothing about CIFAR-100.
    """
    generator = torch.Generator().manual_seed(100)
    angles = torch.arange(10) * (2 * torch.pi / 10)
    hues = 0.5 + 0.3 * torch.stack([torch.cos(angles - k * 2 * torch.pi / 3) for k in range(3)], 1)
    # Cycles over the image; fine enough to be told apart by the first layers' small fields of view.
    waves = 3 * torch.tensor([(x, y) for x in range(3) for y in range(4) if 0 < x + y < 5])
    pixels = torch.arange(32) * (2 * torch.pi / 32)

    def draw(per_class: int) -> Split:
        labels = torch.arange(CLASSES).repeat(per_class)
        count = len(labels)
        phases = torch.rand(2, count, 1, generator=generator) * 2 * torch.pi
        x, y = (waves[labels // 10][:, axis, None] * pixels + phases[axis] for axis in (0, 1))
        plaid = (torch.cos(y)[:, :, None] * torch.cos(x)[:, None, :])[:, None]
        noise = 0.1 * torch.randn(count, 3, 32, 32, generator=generator)
        images = hues[labels % 10][:, :, None, None] + 0.3 * plaid + noise
        return Split((images.clamp(0, 1) * 255).byte(), labels)

    train, test = draw(train_per_class), draw(test_per_class)
    return Dataset("synthetic", train, test, SYNTHETIC_NAMES, "drawn by data.py, not CIFAR-100")


def pictures(name: str, paths: list[Path]) -> tuple[Dataset, list[Path]]:
    """Return pictures as the test split of a Dataset, with their files.

    `name` is that of the data set with the classes. `paths` are files of any format that pillow
    reads, and folders, of which those of the usual suffixes are taken. Turned as the camera says,
    the largest square in the middle is scaled to 32 x 32. Raises UserError if there is none, or one
    cannot be read.
    """
    from PIL import Image, ImageOps  # on which torchvision itself depends

    files = []
    for path in paths:
        inside = sorted(file for file in path.glob("[!.]*")
                        if file.suffix.lower() in PICTURE_SUFFIXES)
        if path.is_dir() and not inside:
            raise UserError(f"{path}: holds no picture ({' '.join(PICTURE_SUFFIXES)})")
        files += inside or [path]
    images = []
    for file in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(file) as opened:
                    picture = ImageOps.exif_transpose(opened)
                    if picture.mode.startswith("I"):  # 16 bits, which convert() would clip
                        pixels = (np.asarray(picture) // 256).clip(0, 255)
                        picture = Image.fromarray(pixels.astype(np.uint8))
                    picture = picture.convert("RGB")
        except Exception as error:  # a damaged picture can raise anything
            raise UserError(f"{file}: cannot be read as a picture ({error})") from error
        picture = np.array(ImageOps.fit(picture, (32, 32)))  # (32, 32, 3)
        images.append(torch.from_numpy(picture).permute(2, 0, 1))
    test = Split(torch.stack(images), torch.zeros(len(images), dtype=torch.int64))
    names = SYNTHETIC_NAMES if name == "synthetic" else CLASS_NAMES
    return Dataset(name, Split(test.images[:0], test.labels[:0]), test, names, "pictures"), files


def hold_out(train: Split, count: int) -> tuple[Split, Split]:
    """Split off the last `count` / 100 images of each class: (training set, validation set).

    Raises UserError if `count` is not a multiple of 100 or leaves a class without images.
    """
    if not count:
        return train, Split(train.images[:0], train.labels[:0])
    per_class = count // CLASSES
    smallest = int(torch.bincount(train.labels, minlength=CLASSES).min())
    if count % CLASSES or per_class >= smallest:
        raise UserError(
            f"--val-size {count}: must be a multiple of {CLASSES} below {CLASSES * smallest:,}, "
            "the same number of images from each class"
        )
    held = torch.zeros(len(train.labels), dtype=torch.bool)
    for label in range(CLASSES):
        held[(train.labels == label).nonzero()[-per_class:]] = True
    return Split(*(part[~held] for part in train)), Split(*(part[held] for part in train))


class Batches:
    """One split as uint8 on the training device, given out in batches of float32 images.

    Images come normalised by `stats` = (mean, standard deviation) of the channels and resized
    (bilinear) to `size` x `size`. There is no worker process, no copy of the set at that size, and
    no host-device synchronisation between the batches.
    """

    def __init__(self, split: Split, batch_size: int, stats, runtime: Runtime):
        device = runtime.device
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.batch_size = batch_size
        self.memory_format = runtime.memory_format
        self.rank, self.ranks = runtime.rank, runtime.ranks
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in stats)
        self.scale, self.shift = 1 / (255 * std), -mean / std
        self.channels = torch.arange(3, device=device).view(1, 3, 1, 1)
        self.pixels = torch.arange(32, device=device)
        self._augment = self._augment_eagerly
        if runtime.compile:
            self._augment = torch.compile(self._augment, dynamic=False)

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def in_order(self, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every image once, unchanged but for normalisation and size.

        Of several ranks each gets every so many batches; the last ones may be empty, so that all
        get as many.
        """
        for start in range(self.rank, -(-len(self) // self.ranks) * self.ranks, self.ranks):
            part = slice(start * self.batch_size, (start + 1) * self.batch_size)
            yield self._finish(self.images[part], size), self.labels[part]

    def shuffled(
        self, seed: int, epoch: int, start: int = 0, size: int = 32
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Yield every image once, randomly cropped and flipped, from batch number `start` on.

        Order, crops and flips are a function of (seed, epoch) alone: all of an epoch's random
        numbers are drawn on the CPU at its beginning, the same on every device.

        Of several ranks each gets its share of every batch, and with it the weight that makes the
        mean over the ranks of weight x mean loss the mean over the batch. A share of no images is
        one image of weight 0.
        """
        count = len(self.labels)
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        order = torch.randperm(count, generator=generator)
        offsets = torch.randint(2 * CROP_PADDING + 1, (2, count), generator=generator)
        flips = torch.randint(2, (count,), generator=generator)
        columns = torch.stack([order, *offsets - CROP_PADDING, flips]).to(self.images.device)
        for batch in columns.split(self.batch_size, dim=1)[start:]:
            share = batch.tensor_split(self.ranks, dim=1)[self.rank]
            weight = share.shape[1] * self.ranks / batch.shape[1]
            share = share if weight else batch[:, :1]
            yield self._augment(*share, size), self.labels[share[0]], weight

    def _augment_eagerly(self, chosen, down, right, flip, size: int) -> Tensor:
        """Pick, reflect-pad, crop and flip (B,) images in one gather; normalise and resize.

        Returns float32 (B, 3, size, size).
        """
        rows = _reflect(self.pixels + down[:, None])  # (B, 32)
        columns = _reflect(self.pixels + right[:, None])
        columns = torch.where(flip[:, None] == 1, columns.flip(1), columns)
        index = chosen[:, None, None, None], self.channels, rows[:, None, :, None]
        return self._finish(self.images[(*index, columns[:, None, None, :])], size)

    def _finish(self, images: Tensor, size: int) -> Tensor:
        images = images.float() * self.scale + self.shift
        images = images.contiguous(memory_format=self.memory_format)
        if size == images.shape[-1]:
            return images
        return F.interpolate(images, (size, size), mode="bilinear", antialias=size < 32)


def _reflect(positions: Tensor) -> Tensor:
    """Map pixel positions -31..62 into 0..31 by reflection at the outermost pixels."""
    return 31 - (31 - positions.abs()).abs()
