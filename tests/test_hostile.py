"""Whatever stands in a data or weight file: it loads equal, or is refused in one line.

Nothing of it is executed, nothing is written, and it takes less than 500 MB of memory.
"""

import argparse
import collections
import functools
import gzip
import io
import itertools
import json
import os
import pickle
import resource
import struct
import tarfile
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from helpers import (
    call,
    equal,
    pack,
    pack_zip,
    write_binary,
    write_hdf5,
    write_parquet,
    write_python,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cifar100.classes
import cifar100.files
import data
import engine.process
import engine.weights
import utils

slow = pytest.mark.slow
KINDS = ["overwrite", "insert", "delete", "cut", "repeat"]


def marked(small, large) -> list:
    """Return all parameters of a test, those of the large cases marked as slow."""
    return [*small, *(pytest.param(name, marks=slow) for name in large)]


def edited(content: bytes, edits: list) -> bytes:
    """Return a damaged copy of a file's content."""
    for kind, where, replacement in edits:
        at, length = int(where * len(content)), len(replacement)
        head, tail = content[:at], content[at:]
        content = {
            "overwrite": head + replacement + tail[length:],
            "insert": head + replacement + tail,
            "delete": head + tail[length:],
            "cut": head,
            "repeat": head + tail[: 16 * length] + tail,
        }[kind]
    return content


def fuzz(count: int, kinds: list[str]):
    """Run a test on `count` lists of edits, the same ones every time."""
    # A position is a part of the length.
    where = st.floats(0, 1, exclude_max=True)
    edit = st.tuples(st.sampled_from(kinds), where, st.binary(min_size=1, max_size=8))
    edits = st.lists(edit, min_size=1, max_size=3)

    def decorate(test):
        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        return settings(max_examples=count, derandomize=True, deadline=None, database=None,
                        suppress_health_check=checks)(given(edits)(test))

    return decorate


@pytest.fixture(scope="module")
def few(arrays):
    """Four images to train and two to test, so that much of a file is structure."""
    return {split: (images[:count], labels[:count])
            for count, (split, (images, labels)) in zip((4, 2), arrays.items(), strict=True)}


def read_or_refuse(path) -> data.Dataset | None:
    """Return what `data.load` does, or None for an error of one line; all else is a failure."""
    try:
        return data.load("cifar100", path, download=False)
    except utils.UserError as error:
        assert "\n" not in engine.process.explain(error)[0] and str(path) in str(error)
        return None


def differing(dataset: data.Dataset, arrays: dict) -> int:
    """Return how many pixels and labels are not those of `arrays`."""
    count = 0
    for split, part in (("train", dataset.train), ("test", dataset.test)):
        for ours, theirs in zip(arrays[split], part, strict=True):
            assert ours.shape == theirs.shape
            count += int((ours != theirs.numpy()).sum())
    return count


def write_again(directory, arrays: dict):
    """Write the python version with labels of NumPy's, in the latest protocol."""
    for split, (images, labels) in arrays.items():
        content = {b"data": images.reshape(len(images), -1), b"fine_labels": labels}
        (write_python(directory, arrays) / split).write_bytes(pickle.dumps(content, 5))
    return directory


# What is written, and which of its files is damaged. None stands for the only one.
DATA_FILES = {
    "pickle train": (write_python, "train"),
    "pickle test": (functools.partial(write_python, protocol=4), "test"),
    "pickle meta": (write_python, "meta"), "binary train.bin": (write_binary, "train.bin"),
    "binary names": (write_binary, "fine_label_names.txt"), "HDF5": (write_hdf5, None),
    "python archive": (write_python, "archive"), "binary archive": (write_binary, "archive"),
    "python zip": (write_python, "zip"), "pickle again": (write_again, "test"),
    "Parquet": (write_parquet, "test-00000-of-00001.parquet"),
}


@pytest.mark.parametrize("count", marked([60], [150]))
@pytest.mark.parametrize("kind", DATA_FILES)
def test_damaged_data_load_equal_or_are_refused_in_one_line(tmp_path, few, kind, count):
    """Archives have a checksum. In the other formats, what is overwritten changes and no more.

    A PNG in Parquet has a checksum, too. Labels have none, and a number can stand for many.
    """
    write, file = DATA_FILES[kind]
    path = write(tmp_path / "written", few)
    if file in ("archive", "zip"):
        path = (pack if file == "archive" else pack_zip)(path, tmp_path / f"mine.{file}")
    target = path if file in (None, "archive", "zip") else path / file
    original = target.read_bytes()
    if file == "archive":
        # The one edit that does no harm repeats gzip's header, unless its time has a byte of zero.
        original = original[:4] + b"time" + original[8:]
    counts = {"equal": 0, "changed": 0, "refused": 0}

    def check(edits):
        target.write_bytes(edited(original, edits))
        dataset = read_or_refuse(path)
        if dataset is None:
            counts["refused"] += 1
        elif changed := differing(dataset, few):
            assert file not in ("archive", "zip")
            if kind != "Parquet" and all(kind == "overwrite" for kind, *_ in edits):
                assert changed <= sum(len(new) for *_, new in edits)
            counts["changed"] += 1
        else:
            counts["equal"] += 1

    fuzz(count, KINDS)(check)()
    fuzz(count, ["overwrite"])(check)()
    print(f"{kind}: {counts}")
    assert min(counts["refused"], counts["equal"] + counts["changed"]) > 0, "both were tried"


def begin_with(path, model=None) -> None:
    """Have a layer begin with a file of weights, as a script does its network."""
    args = argparse.Namespace(is_new=True, weights=str(path))
    engine.weights.load_first(model or torch.nn.Linear(4, 3), args, head="")


@pytest.mark.parametrize("count", marked([100], [400]))
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_weights_load_equal_or_are_refused_in_one_line(tmp_path, kind, count):
    """The zip format has checksums; in the other two numbers may change."""
    torch.manual_seed(0)
    model, path = torch.nn.Linear(4, 3), tmp_path / "weights.pth"
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    original, loaded = path.read_bytes(), []

    def check(edits):
        path.write_bytes(edited(original, edits))
        try:
            begin_with(path, model)
        except utils.UserError as error:
            assert "\n" not in engine.process.explain(error)[0] and str(path) in str(error)
            return
        assert equal(dict(model.state_dict()), state) or kind != "zip"
        loaded.append(edits)

    fuzz(count, KINDS)(check)()
    fuzz(count, ["overwrite"])(check)()
    print(f"{kind}: {len(loaded)} of {2 * count} load")
    assert 0 < len(loaded) < count


@pytest.mark.parametrize("bits", marked([[4]], [range(8)]))
def test_no_flipped_bit_of_a_weight_file_changes_a_number(tmp_path, bits):
    """Of the zip directory at its end or, where it takes long, of all of the file.

    Bit 4 of an entry's attributes marks a folder, whose numbers torch.load does not read.
    """
    state, path = {"weight": torch.arange(12.0), "bias": torch.ones(3)}, tmp_path / "weights.pth"
    torch.save(state, path)
    original, loaded = path.read_bytes(), 0
    start = original.index(b"PK\x01\x02") if len(bits) == 1 else 0
    for position, bit in itertools.product(range(start, len(original)), bits):
        changed = bytearray(original)
        changed[position] ^= 1 << bit
        path.write_bytes(changed)
        try:
            assert equal(utils.load_tensors(path), state), position
            loaded += 1
        except utils.UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
    # Padding means nothing, nor do the times of entries.
    print(f"{loaded} of {(len(original) - start) * len(bits)} load")


class Call:
    """Pickled, it asks the reader to call a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def calls(value) -> bytes:
    """Return a pickle of protocol 0, which stores no lengths: PWNED in it can be replaced."""
    return pickle.dumps(value, 0)


def long_string(opcode: bytes, length: int, width: int) -> bytes:
    """Return a pickle that announces a string of `length` bytes and holds three."""
    return b"\x80\x04" + opcode + length.to_bytes(width, "little") + b"abc."


ENCODE = b"c_codecs\nencode\n"
SCALAR, FROM_BUFFER = b"cnumpy.core.multiarray\nscalar\n", b"cnumpy._core.numeric\n_frombuffer\n"
POINTER = b"C\x08PWNED..."  # eight bytes, which an object array reads as an address


def dtype(code: bytes) -> bytes:
    """Return the pickle of a numpy.dtype, without its byte order."""
    return b"cnumpy\ndtype\n(X" + len(code).to_bytes(4, "little") + code + b"K\x00K\x01tR"


PICKLES = {
    "os.system": calls(Call(os.system, "touch PWNED")),
    "eval": calls(Call(eval, "open('PWNED', 'w')")),
    "exec in a dict": calls({"data": [{"x": Call(exec, "open('PWNED', 'w')")}]}),
    "open": calls({"data": Call(io.open, "PWNED", "w")}),
    "a chain": (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'touch PWNED'\ntR."
    ),
    "object array": calls(np.array([Call(os.system, "touch PWNED")], dtype=object)),
    "protocol 4": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0btouch PWNED\x85R.",
    "instance": b"(S'touch PWNED'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'touch PWNED'\no.",
    "extension registry": b"\x80\x02\x82\x01.",
    "a long string": long_string(b"B", 2**32 - 1, 4),
    "a longer string": long_string(b"\x8e", 2**62, 8),
    "a long number": long_string(b"\x8b", 2**31 - 1, 4),
    "a long frame": long_string(b"\x95", 2**62, 8),
    "a long bytearray": long_string(b"\x96", 2**40, 8),
    "a far memo": b"\x80\x02]r\xff\xff\xff\x7f.",
    "the same memo, many times": b"\x80\x02]" + b"q\x00" * 5_000_000 + b".",
    "a far memo as text": b"]p2147483647\n.",
    "bytearray of 8 GB": b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R.",
    "a million tuples in each other": b"\x80\x02}(K\x00" + b"\x85" * 10**6 + b"K\x01u.",
    "one string encoded 10,000 times": (
        b"\x80\x02(X" + (2**20).to_bytes(4, "little") + b"x" * 2**20 + b"q\x000"
        + (ENCODE + b"h\x00U\x06latin1\x86R") * 10**4 + b"l."
    ),
    "an object": b"\x80\x03" + SCALAR + b"(" + dtype(b"O8") + POINTER + b"tR.",
    "an object array of protocol 5": pickle.dumps({"fine_labels": np.array([[], 1], object)}, 5),
    "objects in a buffer": (b"\x80\x03" + FROM_BUFFER + b"(" + POINTER + dtype(b"O8")
                            + b"K\x01\x85X\x01\x00\x00\x00CtR."),
    "one string for 1,500 arrays": (
        b"\x80\x02" + FROM_BUFFER + b"q\x010" + dtype(b"u1") + b"q\x020X\x00\x00\x10\x00"
        + b"x" * 2**20 + b"q\x000("
        + b"h\x01(h\x00h\x02J\x00\x00\x10\x00\x85X\x01\x00\x00\x00CtR" * 1500 + b"l."),
    # What find_class returns can be given attributes.
    "a function as dtype": (b"\x80\x03" + SCALAR + b"(" + SCALAR + b"}X\x05\x00\x00\x00dtype"
                            b"X\x01\x00\x00\x00Osb" + POINTER + b"tR."),
    "a class as dtype": b"\x80\x03" + SCALAR + b"(cnumpy\ndtype\n" + POINTER + b"tR.",
    "a code as dtype": b"\x80\x03" + SCALAR + b"(X\x01\x00\x00\x00O" + POINTER + b"tR.",
    "a dtype that was not made": b"\x80\x03" + SCALAR + b"(cnumpy\ndtype\n)\x81C\x01\x00tR.",
    "an array of 2^62": (b"\x80\x03" + FROM_BUFFER + b"(C\x01\x00" + dtype(b"u1") + b"\x8a\x08"
                         + (2**62).to_bytes(8, "little") + b"\x85X\x01\x00\x00\x00CtR."),
    "tuples in each other, each also an argument": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x00}K\x01\x85q\x01"
        + b"0h\x00h\x01\x85q\x01R" * 200_000 + b"0h\x01K\x01s."
    ),
    "tuples in each other, each also an argument, in protocol 4": (
        b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n\x94}K\x01\x85\x94"
        + b"".join(b"0h\x00j" + n.to_bytes(4, "little") + b"\x85\x94R" for n in range(1, 200_000))
        + b"0j" + (200_000).to_bytes(4, "little") + b"K\x01s."
    ),
    "tuples in each other by way of the memo": (
        b"\x80\x02}K\x01\x85q\x01" + b"0h\x01\x85q\x01" * 400_000 + b"K\x01s."),
    "sets": b"\x80\x04(" + b"\x8f" * 1_700_000 + b"l.",
    "no end": b"\x80\x02]",
    "nothing": b"",
}
LISTS = b"\x80\x02(" + b"]" * 2**24 + b"l."
LARGE_PICKLES = {
    "as many lists as are read": lambda: b"\x80\x02(" + b"]" * 2_190_000 + b"l.",
    "as many arrays as are read": lambda: (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x000(" + b"h\x00)R" * 730_000 + b"l."),
    "16 million lists": lambda: LISTS,
    "lists in each other": lambda: b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "100 MB of labels": lambda: pickle.dumps({"fine_labels": bytes(10**8)}, 4),
}


def zip_of(*pickles: tuple[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    """Return a weight file as torch.save lays it out, with these pickles in it, by name."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive, warnings.catch_warnings():
        # That a name is not the only one of its kind.
        warnings.simplefilter("ignore")
        for name, content in (*pickles, ("version", b"3\n"), ("data/0", bytes(16))):
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def zipped(content: bytes, kind: int = zipfile.ZIP_STORED) -> bytes:
    """Return such a file with one pickle."""
    return zip_of(("data.pkl", content), kind=kind)


def legacy(content: bytes) -> bytes:
    """Return a weight file in the format from before PyTorch 1.6."""
    heads = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
    keys = struct.pack("<q", 4) + bytes(16)
    return b"".join(pickle.dumps(h, 2) for h in heads) + content + pickle.dumps(["0"], 2) + keys


class Storage:
    """Stands in a pickle for the numbers of a tensor."""


def storage_of(numbers: int, *view) -> bytes:
    """Return the pickle of a dict of one tensor whose storage is said to hold `numbers` floats."""
    content = {"w": Call(torch._utils._rebuild_tensor_v2, Storage(), 0, (numbers,), (1,), False,
                         collections.OrderedDict())}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            place = "storage", torch.FloatStorage, "0", "cpu", numbers, *view
            return place if isinstance(value, Storage) else None

    file = io.BytesIO()
    Pickler(file, 2).dump(content)
    return file.getvalue()


def members(*infos: tuple) -> bytes:
    """Return a .tar.gz of members (name, type, link target, size), filled with zeros."""
    file = io.BytesIO()
    with gzip.open(file, "wb", 1) as packed, tarfile.open(fileobj=packed, mode="w|") as archive:
        for name, kind, target, size in infos:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, size
            archive.addfile(member, Zeros())
    return file.getvalue()


class Zeros:
    """A file that never ends."""

    def read(self, count: int) -> bytes:
        """Return `count` zeros."""
        return bytes(count)


FILE, FILES = tarfile.REGTYPE, cifar100.files.PYTHON_FILES
ARCHIVES = {
    "../": lambda: members(("../../train", FILE, "", 99), ("/tmp/PWNED", FILE, "", 9)),
    "symbolic links": lambda: members(*((n, tarfile.SYMTYPE, "/etc/passwd", 0) for n in FILES)),
    "hard links": lambda: members(*((n, tarfile.LNKTYPE, "/etc/passwd", 0) for n in FILES)),
    "links in a circle": lambda: members(
        ("train", tarfile.SYMTYPE, "test", 0), ("test", tarfile.SYMTYPE, "train", 0)),
    "devices": lambda: members(*((n, tarfile.CHRTYPE, "", 0) for n in FILES)),
    "fifos": lambda: members(*((n, tarfile.FIFOTYPE, "", 0) for n in FILES)),
}
LARGE_ARCHIVES = {
    "a member of 1 GB": lambda: members(("train", FILE, "", 2**30)),
    "100,000 members": lambda: members(*[("train", FILE, "", 0)] * 10**5),
    "a header of 200 MB": lambda: members(("x", tarfile.XHDTYPE, "", 200 * 2**20)),
    "a name of 200 MB": lambda: members(("x", tarfile.GNUTYPE_LONGNAME, "", 200 * 2**20)),
    "1 GB of zeros": lambda: gzip.compress(bytes(2**30), 1),
}
def zip_with(*files: tuple[str, int], kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip of files of so many zeros, by name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, size in files:
            with archive.open(name, "w", force_zip64=True) as file:
                for _ in range(0, size, 2**20):
                    file.write(bytes(2**20))
    return buffer.getvalue()


def understated(content: bytes, size: int) -> bytes:
    """Return a zip whose directory says that its first file has `size` bytes."""
    at = content.index(b"PK\x01\x02") + 24
    return content[:at] + struct.pack("<I", size) + content[at + 4 :]


def zip_directory(count: int) -> bytes:
    """Return a zip that is nothing but a list of so many files."""
    files = (b"PK\x01\x02" + bytes(42)) * count
    at = len(files)
    return (files + b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, at, 0)
            + b"PK\x06\x07" + struct.pack("<IQI", 0, at, 1)
            + b"PK\x05\x06" + struct.pack("<4H2IH", *[2**16 - 1] * 4, *[2**32 - 1] * 2, 0))


ZIPS = {
    "a name above the folder": lambda: zip_with(("../../train", 1), ("/tmp/PWNED", 1)),
    "another compression": lambda: zip_with(("train", 2**20), kind=zipfile.ZIP_LZMA),
    "a zip in a zip": lambda: zip_with(("cifar-100-python.zip", 2**20)),
    "a list of 20,000 files": lambda: zip_directory(20_000),
}
LARGE_ZIPS = {
    "a file of 1 GB": lambda: zip_with(("train", 2**30)),
    "a file of 1 GB that says 1 KB": lambda: understated(zip_with(("train", 2**30)), 1000),
    "a file of 1 GB that says 200 MB": lambda: understated(zip_with(("train", 2**30)), 2 * 10**8),
    "many files of 100 MB": lambda: zip_with(*((f"{n}/train", 10**8) for n in range(4))),
    "a list of 360,000 files": lambda: zip_directory(360_000),
    "a list of 6,000,000 files": lambda: zip_directory(6_000_000),
}


def huge_png(side: int, text: bytes = b"") -> bytes:
    """Return a PNG of so many pixels a side, with a compressed text."""
    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(min(side, 99) * (3 * side + 1)))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"zTXt", b"a\0\0" + text)
            + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


# Values of the images' column, how many rows have each, and options of pyarrow.
PARQUETS = {
    "a PNG of 30,000 pixels a side": ([huge_png(30_000)], 1, {}),
    "a PNG of 13,000 pixels a side, of which Pillow warns": ([huge_png(13_000)], 1, {}),
    "a PNG with a text of 64 MB": ([huge_png(32, zlib.compress(bytes(2**26)))], 1, {}),
    "a value of 2 MB for 12 rows": ([b"%d" % n + bytes(2**21) for n in range(4)], 3, {}),
    "60,000 rows": ([b"x"], 60_000, {}),
}
LARGE_PARQUETS = {
    "a value of 2 MB for all rows": ([b"%d" % n + bytes(2**21) for n in range(4)], 12_500, {}),
    "a value of 150 MB": ([bytes(150 * 2**20), b""], 20_000, {"compression": "zstd"}),
    "1 GB": ([b"%d" % n + bytes(20_000) for n in range(50_000)], 1,
             {"compression": "zstd", "use_dictionary": False}),
    "a group for each row": ([b"x"], 50_000, {"row_group_size": 1}),
}


WEIGHTS = {
    "huge storage": lambda: zipped(storage_of(2**40)),
    "large storage": lambda: zipped(storage_of(2**31)),
    "negative storage": lambda: zipped(storage_of(-1)),
}


def safetensors(header, numbers: bytes = bytes(8), length: int | None = None) -> bytes:
    """Return a safetensors file with this header, JSON or not, which announces another length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (length or len(text)).to_bytes(8, "little") + text + numbers


def weight(**changes) -> dict:
    """Return the header of a safetensors file of one weight."""
    return {"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


SAFETENSORS = {
    "a long header": lambda: safetensors(weight(), length=2**32 - 1),
    "a header that ends behind the file": lambda: safetensors(weight(), length=2**21),
    "a header of spaces": lambda: safetensors(b"{" + b" " * 2**22 + b"}"),
    "a huge shape": lambda: safetensors(weight(shape=[2**62])),
    "a shape that overflows": lambda: safetensors(weight(shape=[2**32, 2**32, 2])),
    "a negative shape": lambda: safetensors(weight(shape=[-2])),
    "a shape of many ones": lambda: safetensors(weight(shape=[1] * 10**6 + [2])),
    "numbers behind the end": lambda: safetensors(weight(data_offsets=[2**40, 2**40 + 8])),
    "numbers that end before they begin": lambda: safetensors(weight(data_offsets=[8, 0])),
    "numbers of no kind": lambda: safetensors(weight(dtype="X")),
    "numbers used twice": lambda: safetensors({**weight(), "bias": weight()["weight"]}),
    "no tensor": lambda: safetensors({"weight": 3}),
    "nothing": lambda: safetensors({}, b""),
    "not JSON": lambda: safetensors(b"{" * 99),
    "lists in each other": lambda: safetensors(b'{"a":' + b"[" * 10**6),
    "70,000 tensors": lambda: safetensors({str(number): {
        "dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(70_000)}, b""),
}
LARGE_WEIGHTS = {
    "compressed": lambda: zipped(bytes(2**30), zipfile.ZIP_DEFLATED),
    # torch.load takes the first of two.
    "a second pickle": lambda: zip_of(("data.pkl", LISTS), ("data.pkl", storage_of(4))),
}


def read_all(reads: list) -> None:
    """Read files; print each error, and then by how many bytes the most memory in use grew.

    What torch and the tests themselves hold does not count. The system counts in KiB.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read, path in reads:
        try:
            print(f"loaded: {str(read(path))[:99]}")
        except utils.UserError as error:
            print(f"refused: {engine.process.explain(error)[0]}")
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def assert_harmless(directory, *reads: tuple) -> list[str]:
    """Assert that all files are refused in a line each, within 500 MB, and nothing else happens.

    Return the lines.
    """
    before = {file: file.stat().st_mtime for file in directory.rglob("*")}
    process = call(read_all, reads, cwd=directory)
    assert (process.returncode, process.stderr) == (0, "")
    *lines, growth = process.stdout.splitlines()
    lines = [line for line in lines if not line.startswith("note ")]
    for line, (_, path) in zip(lines, reads, strict=True):
        assert line.startswith(f"refused: {path}: "), line
    assert int(growth) < 500e6
    assert {file: file.stat().st_mtime for file in directory.rglob("*")} == before
    assert not os.path.exists("/tmp/PWNED")
    return lines


def load_data(path) -> data.Dataset:
    """Read a data set as the scripts do."""
    return data.load("cifar100", path, download=False)


def write_pickle(directory, few, content: bytes) -> tuple:
    """Write a pickle as data; return how to read it."""
    (write_python(directory, few) / "train").write_bytes(content)
    return load_data, directory


def test_hostile_pickles_are_refused_as_data(tmp_path, few):
    """All together take less than 500 MB."""
    reads = {name: write_pickle(tmp_path / str(number), few, content)
             for number, (name, content) in enumerate(PICKLES.items())}
    lines = assert_harmless(tmp_path, *reads.values())
    for name, line in zip(reads, lines, strict=True):
        assert b"PWNED" not in PICKLES[name] or "(refused, for it " in line, name


@slow
@pytest.mark.parametrize("name", LARGE_PICKLES)
def test_large_hostile_pickles_are_refused_as_data(tmp_path, few, name):
    assert_harmless(tmp_path, write_pickle(tmp_path / "python", few, LARGE_PICKLES[name]()))


@pytest.mark.parametrize("read", [utils.load_tensors, begin_with])
@pytest.mark.parametrize("pack_as", ["zip", "legacy", "plain"])
def test_a_weight_file_that_would_execute_something_is_refused(tmp_path, pack_as, read):
    """What torch.load(weights_only=True) reads is all that is read."""
    reads, wrap = [], {"zip": zipped, "legacy": legacy, "plain": bytes}[pack_as]
    for number, content in enumerate(PICKLES.values()):
        if b"PWNED" in content:
            path = tmp_path / f"{number}.pth"
            path.write_bytes(wrap(content))
            reads.append((read, path))
    assert len(reads) > 8
    assert_harmless(tmp_path, *reads)


@pytest.mark.parametrize("content", [zipped(storage_of(4)), legacy(storage_of(4, None))])
def test_the_same_files_with_nothing_hostile_in_them_load(tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    assert utils.load_tensors(tmp_path / "weights.pth")["w"].tolist() == [0] * 4


@pytest.mark.parametrize("fault", ["labels of a megabyte", "many labels", "long numbers"])
def test_hostile_hdf5_is_refused(tmp_path, fault):
    """Values that are nowhere in the file cost it nothing."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "course.h5", "w") as file:
        for split, count in cifar100.classes.FULL_SIZE.items():
            kind = {"labels of a megabyte": "S1000000", "long numbers": "f16"}.get(fault, "i8")
            shape = (count, 3072) if fault == "many labels" else (count,)
            file.create_dataset(f"Y_{split}", shape, kind)
            file.create_dataset(f"X_{split}", (count, 3, 32, 32), "u1")
    assert_harmless(tmp_path, (load_data, tmp_path / "course.h5"))


@pytest.mark.parametrize("name", marked(ARCHIVES, LARGE_ARCHIVES))
def test_hostile_archives_are_refused(tmp_path, name):
    (tmp_path / "mine.tar.gz").write_bytes({**ARCHIVES, **LARGE_ARCHIVES}[name]())
    assert_harmless(tmp_path, (load_data, tmp_path / "mine.tar.gz"))


@pytest.mark.parametrize("name", marked(ZIPS, LARGE_ZIPS))
def test_hostile_zips_are_refused(tmp_path, name):
    (tmp_path / "mine.zip").write_bytes({**ZIPS, **LARGE_ZIPS}[name]())
    assert_harmless(tmp_path, (load_data, tmp_path / "mine.zip"), (load_data, tmp_path))


@pytest.mark.parametrize("name", marked(PARQUETS, LARGE_PARQUETS))
def test_hostile_parquet_is_refused(tmp_path, few, name):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    write_parquet(tmp_path, few)
    values, count, options = {**PARQUETS, **LARGE_PARQUETS}[name]
    numbers = np.arange(len(values) * count, dtype=np.int32) % len(values)
    images = pyarrow.DictionaryArray.from_arrays(pyarrow.array(numbers), pyarrow.array(values))
    images = images if len(values) < 9 < count else images.dictionary_decode()
    table = pyarrow.table({"img": images, "fine_label": np.zeros(len(numbers), np.int64)})
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet", **options)
    (line,) = assert_harmless(tmp_path, (load_data, tmp_path))
    assert "more than all of" in line or "is not a Parquet file of CIFAR-100 (" in line


@pytest.mark.parametrize("name", marked(WEIGHTS, LARGE_WEIGHTS))
def test_hostile_weights_are_refused(tmp_path, name):
    (tmp_path / "weights.pth").write_bytes({**WEIGHTS, **LARGE_WEIGHTS}[name]())
    assert_harmless(tmp_path, (utils.load_tensors, tmp_path / "weights.pth"))


def test_hostile_safetensors_are_refused(tmp_path):
    """All together take less than 500 MB."""
    pytest.importorskip("safetensors")
    reads = []
    for number, make in enumerate(SAFETENSORS.values()):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(make())
        reads.append((begin_with, path))
    for name, line in zip(SAFETENSORS, assert_harmless(tmp_path, *reads), strict=True):
        assert len(line) < 999, name
