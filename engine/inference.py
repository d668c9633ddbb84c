"""Use a finished model: test it, or classify pictures with it."""

import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

import data
from cifar100.classes import CLASS_NAMES
from engine import describe, loop, weights
from engine.checks import check_outputs
from engine.runtime import Runtime
from report import evaluation, runs
from report.log import log_words, progress
from utils import UserError, guard, log

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".ppm", ".tif", ".tiff", ".webp")


def use(model: nn.Module, args: Namespace, runtime: Runtime, load_data: Callable,
        stats: data.Stats, batch_size: int, size: int) -> None:
    """Load a run's model.pt into `model`; classify pictures, or report on the test set.

    Images are `size` x `size` pixels. `load_data(args)` returns a Dataset. Raises UserError.
    """
    runtime = runtime._replace(compile=False)  # which takes longer than one pass over the images
    model = runtime.place(model)
    weights.load(model, args.output_dir / "model.pt")
    if args.predict:
        images, files = pictures(args.predict, args.trained.get("image_side", 32))
        split = data.Split(images, torch.zeros(len(images), dtype=torch.int64))  # labels not read
    else:
        dataset = load_data(args)
        data.check(dataset)
        check_outputs(model, {size}, dataset, runtime)
        log_words(describe.header(args, runtime, dataset, model))
        split = dataset.test
    batches = data.Batches(split, batch_size, stats, runtime, size)
    logits, _ = loop.infer(model, progress(batches, "test", runtime.rank), runtime)
    if runtime.rank:
        return
    note = runs.code_has_changed(args.trained.get("code"), runs.describe_code())
    if note and args.trained:
        log.info(note)
    if args.predict:
        evaluation.print_predictions(logits, args.trained.get("classes", CLASS_NAMES), files)
    else:
        evaluation.write_test_report(logits, dataset, args.output_dir)


def pictures(paths: list[Path], side: int = 32) -> tuple[Tensor, list[Path]]:
    """Return pictures, and folders of them, as uint8 (N, 3, side, side), and their files."""
    files = []
    for path in paths:
        inside = sorted(file for file in path.glob("[!.]*")
                        if file.suffix.lower() in PICTURE_SUFFIXES)
        if path.is_dir() and not inside:
            raise UserError(f"{path}: holds no picture ({' '.join(PICTURE_SUFFIXES)})")
        files += inside or [path]
    return torch.stack([_read_picture(file, side) for file in files]), files


def _read_picture(file: Path, side: int) -> Tensor:
    """Return the middle square of a picture, upright, as uint8 (3, side, side)."""
    # A damaged file can raise anything.
    with guard(f"{file}: cannot be read as a picture", Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16 bits, which convert() would clip
                pixels = (np.asarray(picture) // 256).clip(0, 255)
                picture = Image.fromarray(pixels.astype(np.uint8))
            picture = picture.convert("RGB")
    pixels = np.array(ImageOps.fit(picture, (side, side)))  # (side, side, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)
