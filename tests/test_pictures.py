"""Pictures are found in folders and read as they look on a white page, whatever their format."""

import os
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from engine.pictures import read_pictures
from utils import UserError

RED, GREEN = (220, 30, 30), (0, 255, 0)
SQUARE = (8, 8, 24, 30)  # left, upper, right, lower


def cut_out(hidden=GREEN) -> Image.Image:
    """Return a red square in the middle of what is transparent, and hides a colour."""
    picture = Image.new("RGBA", (32, 32), (*hidden, 0))
    picture.paste((*RED, 255), SQUARE)
    return picture


def on_paper(colour=RED) -> np.ndarray:
    """Return how that looks, uint8 (32, 32, 3): the square in this colour on white."""
    pixels = np.full((32, 32, 3), 255, np.uint8)
    left, upper, right, lower = SQUARE
    pixels[upper:lower, left:right] = colour
    return pixels


def read(path, side=32) -> np.ndarray:
    """Return the one picture at `path`, uint8 (side, side, 3)."""
    images, files, *passed_over = read_pictures([path], side)
    assert (files, passed_over) == ([path], [0, 0])
    return images[0].permute(1, 2, 0).numpy()


def write_png(path, bits: int, colour_type: int, pixels: np.ndarray, clear: bytes) -> None:
    """Write a PNG of samples (H, W) or (H, W, C) as PIL cannot, with a tRNS chunk."""
    rows = pixels.reshape(len(pixels), -1)
    if bits == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        digits = (rows[:, :, None] >> np.arange(bits)[::-1]) & 1
        lines = [np.packbits(row.astype(np.uint8)).tobytes() for row in digits]
    header = struct.pack(">IIBBBBB", pixels.shape[1], len(pixels), bits, colour_type, 0, 0, 0)
    chunks = {b"IHDR": header, b"tRNS": clear,
              b"IDAT": zlib.compress(b"".join(b"\0" + line for line in lines)), b"IEND": b""}
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks.items() if content or name == b"IEND"))


def test_a_picture_is_turned_cut_and_scaled(tmp_path):
    """A wide red picture with green ends, taken with the camera turned by 90 degrees."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :, 0], pixels[:, :32], pixels[:, 96:] = 200, (0, 99, 0), (0, 99, 0)
    pixels[:32, 32:96, 2] = 255  # the upper half, blue: the right one when it is turned
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    images, files, *_ = read_pictures([tmp_path / "turned.png"])
    red, green, blue = images[0]
    assert (images.shape, images.dtype) == ((1, 3, 32, 32), torch.uint8)
    assert files == [tmp_path / "turned.png"]
    assert int(green[2:-2].max()) == 0 and int(red[2:-2].min()) == 200, "the ends are cut off"
    assert int(blue[2:-2, :12].max()) == 0 and int(blue[2:-2, 20:].min()) > 240


@pytest.mark.parametrize("name", ["grey.png", "grey.pgm", "grey.tiff"])
def test_a_picture_of_16_bits_is_not_clipped(tmp_path, name):
    if name == "grey.pgm":
        (tmp_path / name).write_bytes(b"P5 9 9 65535\n" + np.full(81, 25_700, ">u2").tobytes())
    else:
        Image.fromarray(np.full((9, 9), 25_700, np.uint16)).save(tmp_path / name)
    assert np.unique(read(tmp_path / name)).tolist() == [100]


@pytest.mark.parametrize("mode, name, expected", [
    ("CMYK", "a.jpg", [255, 0, 0]), ("L", "a.png", [76] * 3), ("P", "a.gif", [255, 0, 0]),
    ("LAB", "a.tif", [255, 0, 0]), ("YCbCr", "a.tif", [255, 0, 0])])
def test_a_picture_without_transparency_keeps_its_colours(tmp_path, mode, name, expected):
    Image.new("RGB", (32, 32), "red").convert(mode).save(tmp_path / name)
    assert np.abs(read(tmp_path / name).astype(int) - expected).max() <= 5


# Name of the file, mode in which it is saved, and further arguments.
FORMATS = {
    "RGBA png": ("a.png", "RGBA", {}), "RGBA webp": ("a.webp", "RGBA", {"exact": True}),
    "RGBA tiff": ("a.tiff", "RGBA", {}), "RGBA tga": ("a.tga", "RGBA", {}),
    "RGBA ico": ("a.ico", "RGBA", {"sizes": [(32, 32)]}), "RGBA jp2": ("a.jp2", "RGBA", {}),
    "animated": ("a.png", "RGBA", {"save_all": True, "append_images": [cut_out(RED)]}),
    "palette png": ("a.png", "P", {}), "gif": ("a.gif", "RGBA", {}),
    "animated gif": ("a.gif", "RGBA", {"save_all": True, "append_images": [cut_out(RED)]}),
}


@pytest.mark.parametrize("kind, turned", [
    *((kind, False) for kind in FORMATS),
    *((kind, True) for kind in ("RGBA png", "RGBA webp", "RGBA tiff", "palette png"))])
def test_a_cut_out_is_laid_over_white(tmp_path, kind, turned):
    """Two that look the same are the same, whatever colour hides in them; also when turned."""
    name, mode, keywords = FORMATS[kind]
    for hidden in (GREEN, (0, 0, 0), (255, 255, 255)):
        picture = cut_out(hidden)
        if turned:
            exif = Image.Exif()
            exif[0x0112] = 6
            keywords, picture = {**keywords, "exif": exif}, picture.rotate(90)
        if mode == "P":
            picture = picture.quantize(8)
        lossless = {"lossless": True} if name.endswith("webp") else {}
        picture.save(tmp_path / name, **lossless, **keywords)
        assert np.array_equal(read(tmp_path / name), on_paper()), hidden


def test_grey_with_alpha_is_laid_over_white(tmp_path):
    for mode, name in (("LA", "a.png"), ("LA", "a.tiff")):
        cut_out().convert(mode).save(tmp_path / name)
        grey = cut_out().convert("L").getpixel((10, 10))
        assert np.array_equal(read(tmp_path / name), on_paper(grey))


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (9, 9), (0, 100, 200, 51)).save(tmp_path / "a.png")
    assert np.abs(read(tmp_path / "a.png") - [204.0, 224, 244]).max() <= 1
    palette = Image.new("P", (9, 9))
    palette.putpalette([0, 100, 200])
    palette.save(tmp_path / "p.png", transparency=bytes([51]))
    assert np.array_equal(read(tmp_path / "p.png"), read(tmp_path / "a.png"))


@pytest.mark.parametrize("bits, colour_type, square, clear", [
    (1, 0, 0, 1), (1, 0, 1, 0), (2, 0, 1, 3), (2, 0, 1, 0), (4, 0, 5, 15), (8, 0, 85, 255),
    (8, 0, 85, 7), (16, 0, 85 * 257, 65535), (16, 0, 85 * 257, 85 * 257 + 1),
    (8, 2, RED, GREEN), (16, 2, [257 * value for value in RED], (513, 65535, 3)),
])
def test_a_transparent_colour_of_a_png_is_white(tmp_path, bits, colour_type, square, clear):
    """The colour is given in the units of the file."""
    left, upper, right, lower = SQUARE
    pixels = np.empty((32, 32, 3 if colour_type else 1), int)
    pixels[:] = clear
    pixels[upper:lower, left:right] = square
    write_png(tmp_path / "a.png", bits, colour_type, pixels,
              np.array(clear, ">u2").reshape(-1).tobytes())
    shown = np.array(square) * 255 // (2**bits - 1)
    assert np.array_equal(read(tmp_path / "a.png"), on_paper(shown))


@pytest.mark.parametrize("colour_type, pixel", [(4, (85, 255)), (6, (*RED, 255))])
def test_16_bits_with_alpha_are_laid_over_white(tmp_path, colour_type, pixel):
    left, upper, right, lower = SQUARE
    pixels = np.full((32, 32, len(pixel)), 5000)
    pixels[:, :, -1] = 0
    pixels[upper:lower, left:right] = 257 * np.array(pixel)
    write_png(tmp_path / "a.png", 16, colour_type, pixels, b"")
    assert np.array_equal(read(tmp_path / "a.png"), on_paper(pixel[:-1]))


def test_no_hidden_colour_shines_through_where_a_picture_is_scaled(tmp_path):
    for name, picture in (("a.png", cut_out()), ("b.png", Image.fromarray(on_paper()))):
        picture.resize((300, 300), Image.Resampling.NEAREST).save(tmp_path / name)
    assert np.array_equal(read(tmp_path / "a.png"), read(tmp_path / "b.png"))


@pytest.fixture
def folder(tmp_path):
    """A folder as people have it: folders in it, hidden files, other files, links in circles."""
    folder = tmp_path / "pictures"
    for name in ("b/deep/1.JPG", "b/2.jfif", "a.png", "c.d/3.pgm", "c.d/4.WebP", "5.mpo", "6.qoi",
                 ".hidden.png", "._a.png", ".git/7.png", "__MACOSX/b/8.png", "b/.thumbs/9.png"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        kinds = {".mpo": "JPEG", ".jfif": "JPEG", ".pgm": "PPM"}
        Image.new("RGB", (8, 8), "red").save(file, kinds.get(file.suffix))
    for name in ("notes.txt", "b/data.h5", "film.mpg", "paper.pdf", "drawing.eps", "c.d/LICENSE",
                 ".DS_Store"):
        (folder / name).write_text("no picture")
    (folder / "empty.png").mkdir()
    (folder / "b/up").symlink_to(folder)
    (folder / "b/self").symlink_to("self")
    (folder / "c.d/across").symlink_to(folder / "b")
    (tmp_path / "other").mkdir()
    shutil.copy(folder / "a.png", tmp_path / "other/linked.png")
    (folder / "z").symlink_to(tmp_path / "other")
    return folder


FOUND = ["5.mpo", "6.qoi", "a.png", "b/2.jfif", "b/deep/1.JPG", "c.d/3.pgm", "c.d/4.WebP",
         "z/linked.png"]


def test_a_folder_is_searched_through(folder, caplog):
    """In sorted order, without what is hidden, each file once; the others are counted."""
    images, files, unread, others = read_pictures([folder])
    assert [str(file.relative_to(folder)) for file in files] == FOUND
    assert images.shape == (8, 3, 32, 32) and (unread, others) == (0, 7)
    assert not caplog.messages


def test_what_is_named_is_tried_whatever_its_name(folder):
    named = [folder / name for name in (".git", "._a.png", "c.d", "a.png")]
    plain = shutil.copy(folder / "a.png", folder.parent / "picture")
    _, files, unread, others = read_pictures([*named, plain])
    assert files.pop() == plain
    assert [str(file.relative_to(folder)) for file in files] == [
        ".git/7.png", "._a.png", "c.d/3.pgm", "c.d/4.WebP",
        "c.d/across/2.jfif", "c.d/across/deep/1.JPG", "c.d/across/up/5.mpo",
        "c.d/across/up/6.qoi", "c.d/across/up/a.png", "c.d/across/up/z/linked.png",
        "a.png"]
    assert (unread, others) == (0, 7)


def test_what_cannot_be_read_is_named_and_passed_over(folder, caplog):
    caplog.set_level("INFO", "cifar100")
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:-30])
    (folder / "b/empty.gif").touch()
    (folder / "b/broken.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    bad = ["b/broken.jpg", "b/empty.gif", "cut.png", "pipe.png"]
    images, files, unread, others = read_pictures([folder, folder / "missing.png"])
    assert [str(file.relative_to(folder)) for file in files] == FOUND and len(images) == 8
    assert (unread, others) == (5, 7)
    for name, line in zip([*bad, "missing.png"], caplog.messages, strict=True):
        assert line.startswith(f"warning    {folder / name}: cannot be read as a picture (")


def test_a_folder_that_is_closed_is_named(folder, caplog, monkeypatch):
    caplog.set_level("INFO", "cifar100")
    scan = os.scandir

    def refuse(path):
        if os.path.basename(path) == "c.d":
            raise PermissionError(13, "Permission denied", str(path))  # which root never meets
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    _, files, unread, _ = read_pictures([folder])
    assert len(files) == 6 and unread == 1
    assert caplog.messages == [f"warning    {folder / 'c.d'}: cannot be searched "
                               "(Permission denied)"]


@pytest.mark.parametrize("name, words", [
    ("missing.png", "cannot be read as a picture"), ("notes.txt", "cannot be read as a picture"),
    ("cut.png", "cannot be read as a picture"),
    ("folder", "holds no picture (2 files of other kinds)")])
def test_where_nothing_can_be_read_that_is_the_error(tmp_path, name, words, caplog):
    Image.effect_noise((32, 32), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-500])
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder/below").mkdir(parents=True)
    for other in ("folder/notes.txt", "folder/below/weights.pt"):
        (tmp_path / other).touch()
    with pytest.raises(UserError, match="^" + re.escape(f"{tmp_path / name}: {words}")) as error:
        read_pictures([tmp_path / name])
    assert "more" not in str(error.value) and not caplog.messages
    with pytest.raises(UserError, match=r"; nor can 2 more$"):
        read_pictures([tmp_path / name, tmp_path / "none", tmp_path / "gone"])


def test_the_memory_of_large_pictures_is_given_back(tmp_path):
    """What is kept of each is the small square."""
    import resource

    Image.new("RGB", (3000, 3000), "red").save(tmp_path / "a.png")  # 36 MB in PIL
    for number in range(12):
        (tmp_path / f"{number}.png").symlink_to("a.png")
    read_pictures([tmp_path / "a.png"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images, *_ = read_pictures([tmp_path])
    assert len(images) == 13
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
