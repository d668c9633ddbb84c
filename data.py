"""CIFAR-100: read it, hold a part of it out, and feed it to the network.

First `Dataset`, `load()`, `hold_out()`, `synthetic()` and `Batches`, then the user's own pictures,
the classes, the three file formats and their checks, and last the download.
"""

import gzip
import http.client
import io
import math
import operator
import os
import tarfile
import time
import urllib.request
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets.utils import calculate_md5
from torchvision.transforms.v2.functional import rgb_to_grayscale
from tqdm import tqdm

from utils import SIZE_LIMIT, Runtime, UserError, guard, log, try_lock, unpickle

CLASSES = 100
FULL_SIZE = {"train": 50_000, "test": 10_000}  # images
# Mean and standard deviation of the channels, pixels scaled to 0..1.
Stats = tuple[tuple[float, ...], tuple[float, ...]]
# Of the 50,000 training images; and of ImageNet, with which torchvision's ResNet-18 was trained.
CIFAR100_STATS = (0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)
IMAGENET_STATS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_PADDING = 4  # pixels on each side before the random crop, He et al. 2015, section 4.2
OPERATIONS, LEVELS = 11, 30  # of trivial_augment; the levels are those of its paper, with a sign
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".ppm", ".tif", ".tiff", ".webp")


class Split(NamedTuple):
    """Images uint8 (N, 3, 32, 32), values 0..255, and labels int64 (N,), from 0 on."""

    images: Tensor
    labels: Tensor


class Dataset(NamedTuple):
    """The splits, a name for each class, and in words where they come from."""

    name: str  # "cifar100", "synthetic", or one for the user's own images
    train: Split
    test: Split
    class_names: tuple[str, ...]
    source: str
    val: Split | None = None  # what `hold_out` took from the training set
    checksum: int = 0  # CRC-32 of all images and labels, which `hold_out` computes

    def evaluated(self) -> dict[str, Split]:
        """Return the splits to evaluate after every epoch: val, if there is one, and test."""
        return {"val": self.val, "test": self.test} if self.val else {"test": self.test}


def load(name: str, data_dir: str | Path, url: str | None = None, download: bool = True) -> Dataset:
    """Return the data set `name`, "cifar100" or "synthetic".

    CIFAR-100 comes from `data_dir`, a directory or one file; it is downloaded if it is not there.
    Raises UserError if it is not there and cannot be downloaded, or is not CIFAR-100.
    """
    if name == "synthetic":
        return synthetic()
    data_dir = Path(data_dir)
    with guard(f"{data_dir}: cannot be read", (OSError, MemoryError)):
        if data_dir.suffix in (".gz", ".tgz", ".tar", *HDF5_SUFFIXES) and not data_dir.exists():
            raise UserError(f"--data-dir {data_dir}: no such file")
        return read(find(data_dir) or fetch(url or URL, data_dir, download))


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """Check a set, compute its checksum, and move its last `count` training images into `val`.

    As many of each class are moved, and with 0 none.
    Raises UserError if `count` is not a multiple of the classes or leaves one without images, or
    if the set is not what `check` asks for.
    """
    check(dataset)
    crc = 0
    for tensor in (*dataset.train, *dataset.test, *(dataset.val or ())):
        crc = zlib.crc32(tensor.contiguous().numpy(), crc)
    dataset = dataset._replace(checksum=crc)
    if count and dataset.val:
        raise UserError(f"--val-size {count}: {dataset.name} has a validation set of its own")
    if not count:
        return dataset
    images, labels = dataset.train
    classes = len(dataset.class_names)
    per_class = count // classes
    smallest = int(torch.bincount(labels, minlength=classes).min())
    if count % classes or per_class >= smallest:
        raise UserError(f"--val-size {count}: must be a multiple of {classes} below "
                        f"{classes * smallest:,}, the same number of images from each class")
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(classes):
        held[(labels == label).nonzero()[-per_class:]] = True
    return dataset._replace(train=Split(images[~held], labels[~held]),
                            val=Split(images[held], labels[held]))


def check(dataset: Dataset) -> None:
    """Raise UserError unless the splits are as `Split` says, with a name for every label."""
    for name, (images, labels) in {"train": dataset.train, **dataset.evaluated()}.items():
        where = f"the {name} set of {dataset.name}"
        if not (isinstance(images, Tensor) and images.dtype == torch.uint8
                and images.shape[1:] == (3, 32, 32) and len(images)):
            raise UserError(f"{where}: its images must be a uint8 tensor (N, 3, 32, 32) of 0..255")
        if not (isinstance(labels, Tensor) and labels.dtype == torch.int64
                and labels.shape == images.shape[:1]):
            raise UserError(f"{where}: its labels must be an int64 tensor ({len(images)},)")
        if labels.min() < 0 or labels.max() >= len(dataset.class_names):
            raise UserError(f"{where}: its labels span {labels.min()}..{labels.max()}, and there "
                            f"are names of {len(dataset.class_names)} classes")


def synthetic(train_per_class: int = 50, test_per_class: int = 10) -> Dataset:
    """Draw a CIFAR-100-shaped set of 100 classes: 10 hues times 10 plaids, at random phases.

    Every call returns the same set, and a flip keeps the class. A number obtained on it says only
    that the code works.
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
        plaid = torch.cos(y)[:, None, :, None] * torch.cos(x)[:, None, None]  # (count, 1, 32, 32)
        noise = 0.1 * torch.randn(count, 3, 32, 32, generator=generator)
        images = hues[labels % 10][:, :, None, None] + 0.3 * plaid + noise
        return Split((images.clamp(0, 1) * 255).byte(), labels)

    train, test = draw(train_per_class), draw(test_per_class)
    return Dataset("synthetic", train, test, SYNTHETIC_NAMES, "drawn by data.py, not CIFAR-100")


class Batches:
    """One split as uint8 on the training device, given out in batches of float32 images.

    Images come normalised by `stats` and resized (bilinear) to `size` x `size` pixels, without
    worker processes, a copy of the set at that size, or host-device synchronisation in between.
    A random crop is one of 32 x 32 pixels out of the image padded by `padding` pixels on each side,
    by reflection. A `strength` above 0 adds `trivial_augment()`; resizing follows.
    Iterating yields images (B, 3, size, size) and labels (B,) in the order of the split.
    """

    def __init__(self, split: Split, batch_size: int, stats: Stats, runtime: Runtime,
                 size: int = 32, classes: int = CLASSES, padding: int = CROP_PADDING,
                 strength: float = 0.0):
        device = runtime.device
        # A pixel's channels lie side by side, as the convolutions want them.
        images = split.images.contiguous(memory_format=torch.channels_last)
        self.images, self.labels = images.to(device), split.labels.to(device)
        self.batch_size, self.size, self.strength = batch_size, size, strength
        self.classes = torch.arange(classes, device=device)
        self.pixels = torch.arange(32, device=device)
        self.rank, self.ranks = runtime.rank, runtime.ranks
        self.steps_per_epoch = math.ceil(len(split.labels) / batch_size)
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in stats)
        self.scale, self.shift = 1 / (255 * std), -mean / std
        # The rows, or columns, that each offset of a crop takes, and then the same ones flipped.
        padded = np.pad(np.arange(32), padding, mode="reflect")
        crops = torch.tensor(padded).unfold(0, 32, 1)
        self.offsets = len(crops)  # how many a crop has in each direction
        self.crops = torch.cat([crops, crops.flip(1)]).to(device)  # (2 x offsets, 32)
        eager = self._augment_eagerly
        self._augment = torch.compile(eager, dynamic=False) if runtime.compile else eager

    def __len__(self) -> int:
        """Return how many batches iterating yields on this rank."""
        return math.ceil(self.steps_per_epoch / self.ranks)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every image once, unchanged but for normalisation and size.

        Rank r of R yields batches r, r + R, and so on. The last one may be empty, so that all ranks
        yield the same number.
        """
        for step in range(len(self)):
            start = (step * self.ranks + self.rank) * self.batch_size
            part = slice(start, start + self.batch_size)
            yield self._finish(self.images[part], self.size), self.labels[part]

    def shuffled(self, seed: int, epoch: int, start: int = 0, size: int = 32,
                 cutmix: float = 0.0) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Yield every image once, randomly cropped and flipped, from batch number `start` on.

        With probability `cutmix` an image gets a box of another image, and their labels are mixed
        by area (Yun et al. 2019, arXiv:1905.04899); all labels are then float32 (B, classes).
        Random numbers are drawn on the CPU and depend on (seed, epoch) alone. Each rank gets its
        share of every batch, and the weight len(share) x ranks / len(batch): the mean over the
        ranks of weight x mean loss of the share is the mean loss of the batch. A rank without a
        share gets one image of weight 0.
        """
        count = len(self.labels)
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        order = torch.randperm(count, generator=generator)
        down, right = torch.randint(self.offsets, (2, count), generator=generator)
        flips = torch.randint(2, (count,), generator=generator)
        draws = [order, down, right + self.offsets * flips]
        if cutmix:
            # The box's area is uniform in 0..1 of the image's; what sticks out is cut off.
            sides = 32 * torch.rand(count, generator=generator).sqrt()
            sides[torch.rand(count, generator=generator) >= cutmix] = 0
            centres = 32 * torch.rand(2, count, generator=generator)
            edges = torch.cat([centres - sides / 2, centres + sides / 2])  # (4, count)
            draws += [order.roll(1), *edges.round().clamp(0, 32).long()]
        if self.strength:
            draws += [torch.randint(OPERATIONS, (count,), generator=generator),
                      torch.randint(-LEVELS, LEVELS + 1, (count,), generator=generator)]
        draws = torch.stack(draws).to(self.images.device)  # (3, 5, 8 or 10, count)
        for batch in draws.split(self.batch_size, dim=1)[start:]:
            share = batch.tensor_split(self.ranks, dim=1)[self.rank]
            weight = share.shape[1] * self.ranks / batch.shape[1]
            share = share if weight else batch[:, :1]
            labels = self._mixed_labels(share) if cutmix else self.labels[share[0]]
            yield self._augment(share, size, cutmix > 0), labels, weight

    def _augment_eagerly(self, draws: Tensor, size: int, mixed: bool = False) -> Tensor:
        """Pick, reflect-pad, crop, flip and mix (B,) images in one gather; return them finished.

        Of `draws` the first three (B,) are the image and its crop's offset down and right. If it is
        `mixed`, the other image follows, and its box's top, left, bottom and right in pixels. If
        there is a `strength`, the last two are operation and level of the change.
        """
        rows, columns = self.crops[draws[1]], self.crops[draws[2]]  # (B, 32)
        sources = draws[0, :, None, None]
        if mixed:
            within = (self.pixels >= draws[4:6, :, None]) & (self.pixels < draws[6:8, :, None])
            in_rows, in_columns = within  # (B, 32) each
            inside = in_rows[:, :, None] & in_columns[:, None]
            sources = torch.where(inside, draws[3, :, None, None], sources)
        images = self.images[sources, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
        if self.strength:
            levels = draws[-1] * (self.strength / LEVELS)
            images = 255 * trivial_augment(images / 255, draws[-2], levels)
        return self._finish(images, size)

    def _mixed_labels(self, draws: Tensor) -> Tensor:
        """Return float32 (B, classes): each class's share of the image's area."""
        labels = self.labels[torch.stack([draws[0], draws[3]])]  # (2, B)
        own, others = (labels[:, :, None] == self.classes).float()
        height, width = draws[6:8] - draws[4:6]
        return own.lerp(others, (height * width / 32**2)[:, None])

    def _finish(self, images: Tensor, size: int) -> Tensor:
        """Return images (B, 3, 32, 32) of 0..255 as normalised float32 (B, 3, size, size)."""
        images = images.float() * self.scale + self.shift
        if size == images.shape[-1]:
            return images
        return F.interpolate(images, (size, size), mode="bilinear", antialias=size < 32)


def trivial_augment(images: Tensor, operation: Tensor, level: Tensor) -> Tensor:
    """Change each image in one way (TrivialAugment, Müller & Hutter 2021, arXiv:2103.10158).

    `images` are float32 (B, 3, H, W) in 0..1, as are those returned. `operation` int64 (B,) is 0
    for none, 1 or 2 for shear, 3 or 4 for shift (along x or y), 5 for rotation, 6 for brightness, 7
    for saturation, 8 for contrast, 9 for fewer bits and 10 for solarisation. `level` float32 (B,)
    in -1..1 is the share of the greatest change, about that of torchvision's TrivialAugmentWide.
    Outside an image lies its reflection. Sharpness and equalisation are left out.
    """
    def only(number: int, value: Tensor) -> Tensor:
        return (operation == number) * value

    turn = only(5, math.radians(135) * level)
    rows = [turn.cos(), only(1, level) - turn.sin(), only(3, 2 * level),
            turn.sin() + only(2, level), turn.cos(), only(4, 2 * level)]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), images.shape, align_corners=False)
    images = F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)

    operation, level = operation.view(-1, 1, 1, 1), level.view(-1, 1, 1, 1)
    grey = rgb_to_grayscale(images)
    # Toward or away from black, from the pixel's own grey, or from that of the whole image.
    start = only(7, grey) + only(8, grey.mean((2, 3), keepdim=True))
    is_blend = (operation >= 6) & (operation <= 8)
    images = torch.where(is_blend, start.lerp(images, 1 + level), images)
    steps = 2 ** (8 - 6 * level.abs()).round()
    coarse = (steps * images).floor().minimum(steps - 1) / steps
    images = torch.where(operation == 9, coarse, images)
    is_bright = (operation == 10) & (images > 1 - level.abs())  # none at level 0
    images = torch.where(is_bright, 1 - images, images).clamp(0, 1)
    return images.contiguous(memory_format=torch.channels_last)


def epoch_seed(*numbers: int) -> int:
    """Return 63 well-mixed bits that depend on these numbers alone: seed and epoch, for example."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def pictures(paths: list[Path]) -> tuple[Tensor, list[Path]]:
    """Return the user's own pictures, uint8 (N, 3, 32, 32), and their files.

    `paths` are files that pillow reads, or folders of them. Each picture is turned by its EXIF tag,
    and its largest middle square becomes 32 x 32. Raises UserError if a folder holds none, or one
    is unreadable.
    """
    files = []
    for path in paths:
        inside = sorted(file for file in path.glob("[!.]*")
                        if file.suffix.lower() in PICTURE_SUFFIXES)
        if path.is_dir() and not inside:
            raise UserError(f"{path}: holds no picture ({' '.join(PICTURE_SUFFIXES)})")
        files += inside or [path]
    return torch.stack([_read_picture(file) for file in files]), files


def _read_picture(file: Path) -> Tensor:
    """Return one picture, uint8 (3, 32, 32)."""
    from PIL import Image, ImageOps  # on which torchvision depends

    # A damaged file can raise anything.
    with guard(f"{file}: cannot be read as a picture", Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16 bits, which convert() would clip
                pixels = (np.asarray(picture) // 256).clip(0, 255)
                picture = Image.fromarray(pixels.astype(np.uint8))
            picture = picture.convert("RGB")
    pixels = np.array(ImageOps.fit(picture, (32, 32)))  # (32, 32, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)


# Krizhevsky's superclasses and their classes. The label of a class is its place in the alphabet.
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
URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
WAYS_OUT = (". Three ways out: put cifar-100-python.tar.gz (or the binary version or an HDF5 file) "
            "there; name a mirror with --data-url; or try made-up images with --dataset synthetic")
RETRY_SECONDS = 1  # before the first retry of a broken download; then twice as long each time


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


def read(path: Path) -> Dataset:
    """Read CIFAR-100 from a directory, a tar archive or an HDF5 file, whichever `path` is.

    Raises UserError if it is none of them, is damaged, or has the wrong content.
    """
    if path.is_file() and np.fromfile(path, np.uint8, 4).tobytes() == b"\x89HDF":
        version, (splits, names) = "HDF5", _parse_hdf5(path)
    else:
        members = _read_directory(path) if path.is_dir() else _read_archive(path)
        version, files, parse = "binary", BINARY_FILES, _parse_binary
        if "train" in members:
            version, files, parse = "python", PYTHON_FILES, _parse_python
        missing = [file for file in files if file not in members]
        if missing:
            raise UserError(f"{path}: not a whole CIFAR-100, it lacks {', '.join(missing)}")
        # Unpacked binary files have no known sums.
        known = [path / file for file in files if file in OFFICIAL_MD5]
        sums = {calculate_md5(file) for file in (known if path.is_dir() else [path])}
        if not sums <= set(OFFICIAL_MD5.values()):
            log.info(f"note       {path}: not the official md5 sum; its content is checked instead")
        splits, names = parse(members, path)
    if not isinstance(names, list) or [type(name) for name in names] != [str] * CLASSES:
        raise UserError(f"{path}: does not hold {CLASSES} class names")
    return Dataset("cifar100", splits["train"], splits["test"], tuple(names),
                   f"{path} ({version} version)")


def _read_directory(path: Path) -> dict[str, bytes]:
    """Return the files of interest by name."""
    members = {}
    for file in filter(Path.is_file, (path / name for name in PYTHON_FILES + BINARY_FILES)):
        if file.stat().st_size > SIZE_LIMIT:
            raise UserError(f"{file}: larger than any file of CIFAR-100")
        members[file.name] = file.read_bytes()
    return members


def _read_archive(path: Path) -> dict[str, bytes]:
    """Return the members of interest of a .tar.gz or .tar by base name; none goes to the disk."""
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


def _parse_python(members: dict[str, bytes], path: Path) -> tuple[dict[str, Split], list[str]]:
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
    return splits, names


def _parse_binary(members: dict[str, bytes], path: Path) -> tuple[dict[str, Split], list[str]]:
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
    return splits, names


def _parse_hdf5(path: Path) -> tuple[dict[str, Split], list[str]]:
    """The course's layout: X_* (N, 3, 32, 32), uint8 0..255 or float 0..1, and Y_* (N,)."""
    with guard(f"{path}: reading HDF5 needs one more package: pip install h5py", ImportError):
        import h5py
    splits = {}
    with guard(f"{path}: not HDF5 with the course's keys", Exception), h5py.File(path) as file:
        for name, count in FULL_SIZE.items():
            images = _read_hdf5(file[f"X_{name}"], "uf", count * 3072, f"{path}: {name} images")
            labels = _read_hdf5(file[f"Y_{name}"], "iu", count, f"{path}: {name} labels")
            splits[name] = _check_split(images, labels.reshape(-1), name, path)
    return splits, list(CLASS_NAMES)


def _read_hdf5(values: Any, kinds: str, most: int, what: str) -> np.ndarray:  # noqa: ANN401
    """Return an h5py.Dataset of at most so many numbers; floats 0..1 become uint8 0..255."""
    fault = f"{what} are {values.dtype} {values.shape}, not the numbers of CIFAR-100"
    is_float = values.dtype.kind == "f"
    # What is in memory at a time: of floats a thousand rows.
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


def _check_split(images: np.ndarray, labels: np.ndarray, name: str, path: Path) -> Split:
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
    images = images.reshape(-1, 3, 32, 32).copy()
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def fetch(url: str, data_dir: Path, allowed: bool) -> Path:
    """Download an official archive into `data_dir` and return its path.

    One process at a time downloads, the others wait for it. A broken transfer is resumed, in this
    run and in the next. Raises UserError if the download is not `allowed`, fails, or gives a file
    of another md5.
    """
    note = "" if data_dir.exists() else ", which did not exist"
    partial = data_dir / "cifar-100.tar.gz.part"
    names = {md5: name for name, md5 in OFFICIAL_MD5.items() if name.endswith(".tar.gz")}
    with guard(f"CIFAR-100 is not in {data_dir}, and was not downloaded from {url}",
               (OSError, ValueError, http.client.HTTPException), WAYS_OUT):
        if not allowed:
            raise OSError("--no-download forbids it")
        data_dir.mkdir(parents=True, exist_ok=True)
        with open(data_dir / ".cifar-100.lock", "w") as lock:
            if not try_lock(lock):
                log.info(f"download   waiting for another process, which holds {lock.name}")
                while not try_lock(lock):
                    time.sleep(0.1)
            if found := find(data_dir):
                return found
            log.info(f"download   {url} to {data_dir.resolve()}{note}")
            # What is there may be a part of another file: then start afresh, once.
            for _ in range(2 if partial.exists() else 1):
                _complete(partial, url)
                md5 = calculate_md5(partial)
                if md5 in names:
                    return partial.replace(data_dir / names[md5])
                partial.unlink()
            raise OSError(f"its md5 sum, {md5}, is not official")


def _complete(partial: Path, url: str) -> None:
    """Transfer what `partial` lacks; a broken connection, or a busy server, is tried again."""
    for attempt in range(5):
        try:
            return _append(partial, url)
        except (OSError, http.client.HTTPException) as error:
            status = getattr(error, "code", 500)
            if status == 416:  # range not satisfiable: everything is here already
                return
            if attempt == 4 or (status < 500 and status not in (408, 429)):
                raise
            log.info(f"download   broke off ({error}), trying again")
            time.sleep(RETRY_SECONDS * 2**attempt)


def _append(partial: Path, url: str) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:  # seconds without a byte
        if response.status != 206:  # the server does not resume
            have = 0
        total = have + int(response.headers.get("Content-Length") or 0)
        # A terminal gets a moving bar, a batch log a line a minute.
        bar = tqdm(total=total or None, initial=have, unit="B", unit_scale=True,
                   mininterval=0.1 if os.isatty(2) else 60)
        with open(partial, "ab" if have else "wb") as file, bar:
            while chunk := response.read(2**18):
                bar.update(file.write(chunk))
    if total and partial.stat().st_size < total:
        raise OSError(f"connection closed after {partial.stat().st_size:,} of {total:,} bytes")
