"""The images: load them, hold some out, and give them to the network in batches on the device."""

import copy
import dataclasses
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from cifar100.classes import CLASSES
from cifar100.download import URL, fetch
from cifar100.formats import find, read
from cifar100.synthetic import NAMES, draw
from utils import UserError, guard

Stats = tuple[tuple[float, ...], tuple[float, ...]]  # the channels' mean and deviation, of 0..1
# Of the 50,000 training images; and of ImageNet, with which torchvision's ResNet-18 was trained.
CIFAR100_STATS = (0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)
IMAGENET_STATS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_PADDING = 4  # pixels on each side before the random crop, He et al. 2015, section 4.2
OPERATIONS, LEVELS = 11, 30  # of trivial_augment; the levels are those of its paper, with a sign


class Split(NamedTuple):
    """Images uint8 (N, 3, S, S), values 0..255, and labels int64 (N,), from 0 on."""

    images: Tensor
    labels: Tensor


class Dataset(NamedTuple):
    """The splits, a name for each label, and where the images come from."""

    name: str  # "cifar100", "synthetic", or one for the user's own images
    train: Split
    test: Split
    class_names: tuple[str, ...]
    source: str
    val: Split | None = None  # held-out images: the user's own, or those that `hold_out` moved
    checksum: int = 0  # CRC-32 of all images and labels, which `hold_out` computes

    @property
    def side(self) -> int:
        """The side S of the images in pixels; 32 for CIFAR-100."""
        return self.train.images.shape[-1]

    def evaluated(self) -> dict[str, Split]:
        """Return the splits to evaluate after every epoch: val, if there is one, and test."""
        return {"val": self.val, "test": self.test} if self.val else {"test": self.test}


def load(name: str, data_dir: str | Path, url: str | None = None, download: bool = True) -> Dataset:
    """Return CIFAR-100 from a file, a directory or the web, or "synthetic"; raises UserError."""
    if name == "synthetic":
        return synthetic()
    data_dir = Path(data_dir)
    with guard(f"{data_dir}: cannot be read", (OSError, MemoryError, ValueError, TypeError)):
        found, others = find(data_dir)
        arrays, names, source = found or read(fetch(url or URL, data_dir, download, others))
        train, test = (Split(*map(torch.tensor, arrays[split])) for split in ("train", "test"))
    dataset = Dataset("cifar100", train, test, names, source)
    check(dataset)
    return dataset


def synthetic(train: int = 50, test: int = 10) -> Dataset:
    """Return a made-up set, the same at every call, of so many images of each of 100 classes."""
    generator = torch.Generator().manual_seed(100)
    splits = (Split(*draw(per_class, generator)) for per_class in (train, test))
    return Dataset("synthetic", *splits, NAMES, "made up, not CIFAR-100")


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """Check a set, add its checksum, and move `count` balanced training images to val."""
    check(dataset)
    crc = 0
    for tensor in (*dataset.train, *dataset.test, *(dataset.val or ())):
        crc = zlib.crc32(tensor.contiguous().numpy(), crc)
    dataset = dataset._replace(checksum=crc)
    if not count:
        return dataset
    if dataset.val:
        raise UserError(f"--val-size {count}: {dataset.name} has a validation set of its own")
    images, labels = dataset.train
    classes = len(dataset.class_names)
    per_class = count // classes
    smallest = int(torch.bincount(labels, minlength=classes).min())
    if count % classes or per_class >= smallest:
        raise UserError(f"--val-size {count}: must be a multiple of {classes} below "
                        f"{classes * smallest:,}, the same number of images from each class")
    is_val = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(classes):
        is_val[(labels == label).nonzero()[-per_class:]] = True
    return dataset._replace(train=Split(images[~is_val], labels[~is_val]),
                            val=Split(images[is_val], labels[is_val]))


def check(dataset: Dataset) -> None:
    """Raise UserError unless the splits are as `Split` says, with a name for every label."""
    classes = len(dataset.class_names)
    side = 32 if dataset.name == "cifar100" else None  # else that of the first split
    for name, (images, labels) in {"train": dataset.train, **dataset.evaluated()}.items():
        where = f"{dataset.source}: {name}"
        if isinstance(images, Tensor) and images.ndim == 4:
            side = side or images.shape[2]
        if not (isinstance(images, Tensor) and images.dtype == torch.uint8
                and images.shape[1:] == (3, side, side) and images.numel()):
            form = f"(N, 3, {side or 'S'}, {side or 'S'})"
            raise UserError(f"{where} images must be a uint8 tensor {form} of 0..255")
        if not (isinstance(labels, Tensor) and labels.dtype == torch.int64
                and labels.shape == images.shape[:1]):
            raise UserError(f"{where} labels must be an int64 tensor ({len(images)},)")
        if labels.min() < 0 or labels.max() >= classes:
            raise UserError(f"{where} labels span {labels.min()}..{labels.max()}, and there are "
                            f"{classes} class names")


def loaders(dataset: Dataset, batch_size: int, eval_batch: int, stats: Stats, place: NamedTuple,
            size: int, **augmentation: float) -> tuple["Batches", dict[str, "Batches"]]:
    """Return the training batches, and by split the evaluation batches, of `size` pixels a side."""
    train = Batches(dataset.train, batch_size, stats, place, classes=len(dataset.class_names),
                    **augmentation)
    return train, {name: Batches(split, eval_batch, stats, place, size)
                   for name, split in dataset.evaluated().items()}


@dataclasses.dataclass(frozen=True)
class Batch:
    """A training batch, which is made when it is unpacked: images, labels and a weight."""

    batches: "Batches"
    drawn: dict[str, Tensor]  # int64 (1 or 2, B) each, on the device: see `Batches._draw`
    size: int
    weight: float

    def __iter__(self) -> Iterator:
        """Yield images float32 (B, 3, size, size), labels and weight: see `Batches.shuffled`."""
        yield self.batches._augment(self.drawn, self.size)
        yield self.batches._labels(self.drawn)
        yield self.weight


class Batches:
    """One split on the device of `place`, a Runtime, as batches of float32 (B, 3, size, size)."""

    def __init__(self, split: Split, batch_size: int, stats: Stats, place: NamedTuple,
                 size: int = 32, classes: int = CLASSES, padding: int = CROP_PADDING,
                 strength: float = 0.0):
        device = place.device
        # The convolutions want a pixel's channels side by side.
        images = split.images.contiguous(memory_format=torch.channels_last)
        self.images, self.labels = images.to(device), split.labels.to(device)
        self.batch_size, self.size, self.strength = batch_size, size, strength
        self.classes = torch.arange(classes, device=device)
        self.side = images.shape[-1]
        self.pixels = torch.arange(self.side, device=device)
        self.rank, self.ranks = place.rank, place.ranks
        self.steps_per_epoch = math.ceil(len(split.labels) / batch_size)
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in stats)
        self.scale, self.shift = 1 / (255 * std), -mean / std
        reach = round(padding * self.side / 32)  # padding is given for 32 pixels
        self.offsets = 2 * reach + 1  # of a crop, in each direction
        # The rows, or columns, that a crop takes at each offset, and then the same ones flipped.
        padded = np.pad(np.arange(self.side), reach, "reflect")
        crops = torch.tensor(padded).unfold(0, self.side, 1)
        self.crops = torch.cat([crops, crops.flip(1)]).to(device)  # (2 x offsets, side)
        if place.compile:
            self._augment = torch.compile(self._augment, dynamic=False)

    def __len__(self) -> int:
        """Return how many batches iterating yields on this rank."""
        return math.ceil(self.steps_per_epoch / self.ranks)

    def at(self, size: int) -> "Batches":
        """Return these batches with images of `size` pixels a side."""
        batches = copy.copy(self)
        batches.size = size
        return batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels (B,) in order; a rank's last batch may be empty."""
        for step in range(len(self)):
            start = (step * self.ranks + self.rank) * self.batch_size
            part = slice(start, start + self.batch_size)
            yield self._finish(self.images[part], self.size), self.labels[part]

    def shuffled(self, seed: int, epoch: int, start: int = 0, size: int = 32,
                 cutmix: float = 0.0) -> Iterator[Batch]:
        """Yield batches of augmented images, labels and a weight, from batch number `start` on.

        All is drawn on the CPU from (seed, epoch) alone. With probability `cutmix` an image gets a
        box of another (Yun et al. 2019, arXiv:1905.04899); labels are then float32 (B, classes).
        The weight is that of this rank's share of the batch, if ranks are averaged.
        """
        draws = self._draw(epoch_seed(seed, epoch), cutmix)
        counts = [len(values) for values in draws.values()]
        # One transfer for the whole epoch.
        table = torch.cat(list(draws.values())).to(self.images.device)  # (3 to 10, images)
        for batch in table.split(self.batch_size, dim=1)[start:]:
            share = batch.tensor_split(self.ranks, dim=1)[self.rank]
            weight = share.shape[1] * self.ranks / batch.shape[1]
            share = share if weight else batch[:, :1]  # all ranks must take a step
            yield Batch(self, dict(zip(draws, share.split(counts), strict=True)), size, weight)

    def _draw(self, seed: int, cutmix: float) -> dict[str, Tensor]:
        """Draw what happens to each image of an epoch, int64 (1 or 2, count) each, on the CPU."""
        count, generator = len(self.labels), torch.Generator().manual_seed(seed)
        order = torch.randperm(count, generator=generator)
        offsets = torch.randint(self.offsets, (2, count), generator=generator)  # down, right
        # The flipped columns follow the others in self.crops.
        offsets[1] += self.offsets * torch.randint(2, (count,), generator=generator)
        draws = {"image": order[None], "crop": offsets}
        if cutmix:
            # The box's area is uniform in 0..1 of the image's. The box is clipped to the image.
            sides = self.side * torch.rand(count, generator=generator).sqrt()
            sides[torch.rand(count, generator=generator) >= cutmix] = 0
            centres = self.side * torch.rand(2, count, generator=generator)
            draws["other"] = order.roll(1)[None]
            start, end = centres - sides / 2, centres + sides / 2  # row, column
            draws["box_start"] = start.round().clamp(0, self.side).long()
            draws["box_end"] = end.round().clamp(0, self.side).long()
        if self.strength:
            draws["operation"] = torch.randint(OPERATIONS, (1, count), generator=generator)
            draws["level"] = torch.randint(-LEVELS, LEVELS + 1, (1, count), generator=generator)
        return draws

    def _augment(self, drawn: dict[str, Tensor], size: int) -> Tensor:
        """Crop, flip and mix images in one gather; `drawn` is this batch's part of `_draw`."""
        (chosen,), (down, right) = drawn["image"], drawn["crop"]
        rows, columns = self.crops[down], self.crops[right]  # (B, side)
        sources = chosen[:, None, None]
        if "other" in drawn:
            in_rows, in_columns = ((self.pixels >= drawn["box_start"][:, :, None])
                                   & (self.pixels < drawn["box_end"][:, :, None]))  # (B, side)
            is_inside = in_rows[:, :, None] & in_columns[:, None]
            sources = torch.where(is_inside, drawn["other"][0, :, None, None], sources)
        images = self.images[sources, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
        if self.strength:
            levels = drawn["level"][0] * (self.strength / LEVELS)
            images = 255 * trivial_augment(images / 255, drawn["operation"][0], levels)
        return self._finish(images, size)

    def _labels(self, drawn: dict[str, Tensor]) -> Tensor:
        """Return int64 (B,), or with CutMix the classes' shares of the area, float32 (B, C)."""
        if "other" not in drawn:
            return self.labels[drawn["image"][0]]
        labels = self.labels[torch.cat([drawn["image"], drawn["other"]])]  # (2, B)
        own, others = (labels[:, :, None] == self.classes).float()
        height, width = drawn["box_end"] - drawn["box_start"]
        return own.lerp(others, (height * width / self.side**2)[:, None])

    def _finish(self, images: Tensor, size: int) -> Tensor:
        """Return images (B, 3, S, S) of 0..255 as normalised float32 (B, 3, size, size)."""
        images = images.float() * self.scale + self.shift
        if size == images.shape[-1]:
            return images
        return F.interpolate(images, (size, size), mode="bilinear", antialias=size < self.side)


def trivial_augment(images: Tensor, operation: Tensor, level: Tensor) -> Tensor:
    """Change each image in one way (TrivialAugment, Müller & Hutter 2021, arXiv:2103.10158).

    `images` are float32 (B, 3, H, W) in 0..1. `operation` int64 (B,) is 0 for none, 1 and 2 for
    shear, 3 and 4 for shift (along x, y), 5 for rotation, 6 for brightness, 7 for saturation, 8 for
    contrast, 9 for fewer bits, 10 for solarisation. `level` float32 (B,) in -1..1 is the share of
    the greatest change, about that of torchvision's TrivialAugmentWide.
    """
    def only(number: int, value: Tensor) -> Tensor:
        return torch.where(operation == number, value, 0)

    turn = only(5, math.radians(135) * level)
    rows = [turn.cos(), only(1, level) - turn.sin(), only(3, 2 * level),
            turn.sin() + only(2, level), turn.cos(), only(4, 2 * level)]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), images.shape, align_corners=False)
    images = F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)

    operation, level = operation.view(-1, 1, 1, 1), level.view(-1, 1, 1, 1)
    grey = rgb_to_grayscale(images)
    # Brightness blends with black, saturation with the pixel's grey, contrast with the mean grey.
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
    """Return a 63-bit seed that depends only on these numbers, such as seed and epoch."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
