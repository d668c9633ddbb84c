"""Read CIFAR-100 as Hugging Face ships it: Parquet files with PNGs and labels."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from cifar100.classes import FULL_SIZE
from cifar100.files import PARQUET_FILES, describe, listed
from utils import DamagedFile, UserError, guard

IMAGE_COLUMNS = ("img.bytes", "image.bytes", "img", "image")
# How a PNG of 32 x 32 pixels begins, if it is RGB of 8 bits.
PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\x20\0\0\0\x20\x08\x02"
ROW_LIMIT = 4096  # bytes; such a PNG has at most 3,200


def parts(folder: Path, split: str) -> list[Path]:
    """Return the files of a split, as the hub names them."""
    patterns = [pattern for pattern in PARQUET_FILES if pattern.startswith(split)]
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def read_parquet(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return images uint8 (N, 3, 32, 32) and labels int64 (N,) by split.

    Raises DamagedFile if the files hold something else, and UserError if they cannot be read.
    """
    files = {split: parts(folder, split) for split in FULL_SIZE}
    for split, paths in files.items():
        for path in paths:
            with open(path, "rb") as file:
                head = file.read(512)
            if not head.startswith(b"PAR1"):
                raise DamagedFile(f"{folder}: {path.name} is not Parquet, but {describe(head)}")
        if not paths:
            raise DamagedFile(f"{folder}: not a whole CIFAR-100, it lacks {split}*.parquet")
    with guard(f"{folder}: reading Parquet needs one more package: pip install 'pyarrow>=15'",
               ImportError):
        import pyarrow
        if int(pyarrow.__version__.split(".")[0]) < 15:
            raise ImportError(f"{pyarrow.__version__} executes what a file asks for")
    return {split: _read_split(folder, files[split], count) for split, count in FULL_SIZE.items()}


def _read_split(folder: Path, paths: list[Path], most: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for path in paths:
        with guard(f"{folder}: {path.name} is not a Parquet file of CIFAR-100", Exception):
            for image, label in _rows(folder, path, most - len(images)):
                if not isinstance(label, int):
                    raise TypeError(f"label {len(labels)} is not a whole number")
                if not image.startswith(PNG_START):
                    raise TypeError(f"image {len(images)} is not an RGB PNG of 32 x 32 pixels")
                Image.open(io.BytesIO(image), formats=["PNG"]).verify()  # its checksums
                pixels = np.asarray(Image.open(io.BytesIO(image), formats=["PNG"]))
                images.append(pixels.transpose(2, 0, 1))
                labels.append(label)
    return np.array(images, np.uint8), np.array(labels, np.int64)


def _rows(folder: Path, path: Path, most: int) -> Iterator[tuple[bytes, Any]]:
    """Yield the images, encoded, and labels of a file of at most so many, under a progress bar."""
    from pyarrow import BinaryScalar
    from pyarrow.parquet import ParquetFile
    limits = {"thrift_string_size_limit": 2**22, "thrift_container_size_limit": 2**18}
    with ParquetFile(path, pre_buffer=False, page_checksum_verification=True, **limits) as file:
        about = file.metadata
        columns = [about.schema.column(number).path for number in range(about.num_columns)]
        image = next((name for name in IMAGE_COLUMNS if name in columns), None)
        if not image or "fine_label" not in columns:
            raise DamagedFile(f"{folder}: {path.name} holds CIFAR-10 or other data, not CIFAR-100, "
                              f"for its columns are {listed(columns)}, not img and fine_label")
        size = sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))
        # PNGs are packed already, so a file of them is about as large as they are.
        limit = min(ROW_LIMIT * about.num_rows, 2 * path.stat().st_size) + 2**25
        if about.num_rows > most or size > limit:
            raise UserError(f"{folder}: {path.name} holds more than all of CIFAR-100")
        # One row at a time, for all rows can share one large value.
        batches = file.iter_batches(1, columns=[image, "fine_label"], use_threads=False)
        for batch in tqdm(batches, path.name, about.num_rows, disable=None, leave=False,
                          unit="image"):
            values = batch.column(image.removesuffix(".bytes"))
            value = values.field("bytes")[0] if image.endswith(".bytes") else values[0]
            buffer = value.as_buffer() if isinstance(value, BinaryScalar) else None
            content = bytes(buffer[:ROW_LIMIT]) if buffer else b""
            yield content, batch.column("fine_label")[0].as_py()
