"""Pictures to classify: found in folders, and read as they look on a white page."""

import os
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from report.log import progress
from utils import UserError, guard, log

HIDDEN = re.compile(r"\.|__MACOSX$")
# PIL scales the pixels of such PNGs to 0..255, but not the grey or colour that is transparent.
UNITS = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
# PIL knows files of these formats, but reads no pixels of them, or not without another program.
WITHOUT_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}


def read_pictures(paths: list[Path], side: int = 32, rank: int = 0
                  ) -> tuple[Tensor, list[Path], int, int]:
    """Return pictures, uint8 (N, 3, side, side), and their files, of all folders in sorted order.

    Also return how many could not be read, each of which is logged, and how many files of other
    kinds the folders hold. Raises UserError if no picture can be read.
    """
    found, unread, empty, others = [], [], [], 0
    for path in paths:
        inside, count = _search(path, unread) if os.path.isdir(path) else ([path], 0)
        if not inside:
            empty.append(f"{path}: holds no picture ({count} files of other kinds)")
        found += inside
        others += count
    images, files = [], []
    for file in progress(found, "pictures", rank, unit="file"):
        try:
            images.append(_read(file, side))
            files.append(file)
        except UserError as error:
            unread.append(str(error))
    reasons = unread + empty
    if not images:
        rest = f"; nor can {len(reasons) - 1} more" if len(reasons) > 1 else ""
        raise UserError(f"{reasons[0]}{rest}")
    for reason in reasons:
        log.info(f"warning    {reason}")
    return torch.stack(images), files, len(unread), others


def count_passed_over(unread: int, others: int) -> None:
    """Log how many files were passed over; raises UserError if one could not be read."""
    text = f"files passed over: {unread} that could not be read, {others} of other kinds"
    if unread:
        raise UserError(text)
    if others:
        log.info(f"note       {text}")


def _search(folder: Path, unread: list[str]) -> tuple[list[Path], int]:
    """Return all pictures in a folder, and how many other files; add to `unread` what is closed."""
    readable = {suffix for suffix, kind in Image.registered_extensions().items()
                if kind not in WITHOUT_PIXELS}
    pictures, others, closed, seen = [], 0, [], set()
    for place, folders, names in os.walk(folder, onerror=closed.append, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # by a link
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not HIDDEN.match(name))
        shown = [Path(place, name) for name in names if not HIDDEN.match(name)]
        pictures += [path for path in shown if path.suffix.lower() in readable]
        others += len(shown)
    unread += [f"{error.filename}: cannot be searched ({error.strerror})" for error in closed]
    return sorted(pictures), others - len(pictures)


def _read(file: Path, side: int) -> Tensor:
    """Return the middle square of a picture, upright, as uint8 (3, side, side)."""
    # A damaged file can raise anything.
    with guard(f"{file}: cannot be read as a picture", Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if file.is_fifo():
            raise ValueError("a pipe")  # opening it would wait for a writer
        with Image.open(file) as opened:
            unit = UNITS.get(opened.tile[0][3]) if opened.format == "PNG" else None
            if unit and "transparency" in opened.info:
                clear = np.multiply(opened.info["transparency"], unit).astype(int).tolist()
                opened.info["transparency"] = tuple(clear) if unit < 1 else clear
            picture = _over_white(ImageOps.exif_transpose(opened))
        # Over white before it is scaled: else hidden colours would bleed into the visible ones.
        pixels = np.array(ImageOps.fit(picture, (side, side)))  # (side, side, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _over_white(picture: Image.Image) -> Image.Image:
    """Return a picture in RGB as it looks on a white page."""
    clear = picture.info.get("transparency")  # a grey, a colour, or the alphas of a palette
    if picture.mode.startswith("I"):  # 16 bits, which convert() would clip
        pixels = np.asarray(picture)
        pixels = np.where(pixels == clear, 255, (pixels // 256).clip(0, 255))
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    has_alpha = (picture.mode in ("LA", "PA", "RGBA", "RGBa")
                 or (picture.mode == "P" and picture.palette.mode == "RGBA"))
    if clear is None and not has_alpha:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    page = Image.new("RGB", picture.size, "white")
    page.paste(picture, mask=picture)
    return page
