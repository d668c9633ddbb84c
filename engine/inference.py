"""Use a finished model: test it, or classify pictures with it."""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import data
from cifar100.classes import CLASS_NAMES
from engine import describe, weights
from engine.checks import check_outputs
from engine.loop import infer
from engine.runtime import Runtime
from report.evaluation import print_predictions, write_test_report
from report.log import log_words, progress
from report.runs import code_has_changed, describe_code
from utils import UserError, guard, log

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".ppm", ".tif", ".tiff", ".webp")


def use(model: nn.Module, args: argparse.Namespace, runtime: Runtime,
        load_data: Callable[[argparse.Namespace], data.Dataset], stats: data.Stats,
        batch_size: int, size: int) -> None:
    """Classify pictures with a run's model.pt, or report on it with the test set.

    `model` is the network, with any weights; images are `size` x `size` pixels. Raises UserError.
    """
    runtime = runtime._replace(compile=False)  # which takes longer than one pass over the images
    model = runtime.place(model)
    weights.load(model, args.output_dir / "model.pt")
    if args.predict:
        images, files = pictures(args.predict)
        split = data.Split(images, torch.zeros(len(images), dtype=torch.int64))  # labels not read
    else:
        dataset = load_data(args)
        data.check(dataset)
        check_outputs(model, [size], dataset, runtime)
        log_words(describe.header(args, runtime, dataset, model))
        split = dataset.test
    batches = data.Batches(split, batch_size, stats, runtime, size)
    logits, _ = infer(model, progress(batches, "test", runtime.rank), runtime)
    if runtime.rank:
        return
    note = code_has_changed(args.trained.get("code"), describe_code())
    if note and args.trained:
        log.info(note)
    if args.predict:
        print_predictions(logits, args.trained.get("classes", CLASS_NAMES), files)
    else:
        write_test_report(logits, dataset, args.output_dir)


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
