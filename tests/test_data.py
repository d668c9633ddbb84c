"""CIFAR-100 is found, told apart, checked, downloaded and fed as promised."""

import hashlib
import http.server
import os
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NAMES, SHARED, needs_data, pack, write_binary, write_hdf5, write_python
from processes import ROOT

import data
from models import UserError


def same(dataset: data.Dataset, arrays: dict) -> bool:
    return all(
        torch.equal(part.images, torch.from_numpy(arrays[split][0]))
        and torch.equal(part.labels, torch.from_numpy(arrays[split][1]))
        for split, part in (("train", dataset.train), ("test", dataset.test))
    )


def test_a_directory_that_cannot_be_searched_is_one_line(tmp_path, monkeypatch):
    def find(_):
        raise PermissionError(13, "Permission denied")  # which root never meets

    monkeypatch.setattr(data, "find", find)
    with pytest.raises(UserError, match=r"cannot be read: .*Permission denied"):
        data.load("cifar100", tmp_path)


@pytest.mark.parametrize("layout", [
    "python/directory", "python/itself", "python/archive", "python/file", "python/protocol 4",
    "binary/directory", "binary/archive", "HDF5/uint8", "HDF5/float32", "HDF5/float64",
])
def test_every_format_is_told_apart_and_reads_equal(tmp_path, arrays, layout):
    kind, form = layout.split("/")
    data_dir = tmp_path
    if kind == "HDF5":
        dtype = {"uint8": np.uint8, "float32": np.float32, "float64": np.float64}[form]
        write_hdf5(tmp_path / "course.h5", arrays, dtype)
    else:
        directory = tmp_path / "away" / f"cifar-100-{kind}"
        protocol = {"protocol": 4} if form == "protocol 4" else {}
        write = write_python if kind == "python" else write_binary
        written = write(directory, arrays, **protocol)
        if form == "archive":
            pack(written, tmp_path / f"cifar-100-{kind}.tar.gz")
        elif form == "file":
            data_dir = pack(written, tmp_path / "mine.tar.gz")
        elif form == "itself":
            data_dir = written
        else:
            written.rename(tmp_path / written.name)
    before = sorted(tmp_path.rglob("*"))
    dataset = data.load("cifar100", data_dir, download=False)
    assert same(dataset, arrays)
    assert f"({kind} version)" in dataset.source
    assert dataset.class_names[7] == ("beetle" if kind == "HDF5" else NAMES[7])
    assert sorted(tmp_path.rglob("*")) == before, "nothing is unpacked to disk"


def test_a_pickle_of_python_2_reads(tmp_path, arrays):
    """Protocol-2 pickles of Python 2 hold byte strings, also in their arrays."""
    directory = write_python(tmp_path / "cifar-100-python", arrays)
    images = arrays["test"][0].reshape(100, -1)
    raw = (
        b"\x80\x02}q\x00(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\n"
        b"q\x03K\x00\x85U\x01b\x87Rq\x04(K\x01Kd" + b"M\x00\x0c\x86cnumpy\ndtype\nq\x05U\x02u1K\x00"
        b"K\x01\x87Rq\x06(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + images.nbytes.to_bytes(4, "little") + images.tobytes()
        + b"tbU\x0bfine_labels](" + b"".join(b"K" + bytes([v]) for v in arrays["test"][1]) + b"eu."
    )
    (directory / "test").write_bytes(raw)
    assert same(data.load("cifar100", tmp_path, download=False), arrays)


@needs_data
def test_the_real_set_is_the_published_one(caplog):
    with caplog.at_level("INFO", "cifar100"):
        dataset = data.load("cifar100", SHARED / "cifar100", download=False)
    assert dataset.train.images.shape == (50_000, 3, 32, 32)
    assert torch.bincount(dataset.test.labels).tolist() == [100] * 100
    assert (dataset.class_names[0], dataset.class_names[99]) == ("apple", "worm")
    pixels = dataset.train.images.float() / 255
    mean, std = data.CIFAR100_STATS
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(mean, abs=2e-6)
    assert pixels.std((0, 2, 3), correction=0).tolist() == pytest.approx(std, abs=2e-6)
    notes = [r.getMessage() for r in caplog.records if "not the official" in r.getMessage()]
    assert len(notes) == 1, "a checksum that is not the official one is reported in one line"


def broken(arrays: dict, fault: str) -> dict:
    images, labels = arrays["test"]
    changed = {
        "shape": (images[:, :, :28, :28], labels),
        "dtype": (images.astype(np.int32), labels),
        "floats": (images.astype(np.float32), labels),
        "label range": (images, labels + 1),
        "negative label": (images, labels - 1),
        "label count": (images, labels[:-1]),
        "label type": (images, labels + 0.5),
        "empty": (images[:0], labels[:0]),
    }[fault]
    return {**arrays, "test": changed}


@pytest.mark.parametrize("fault, says", [
    ("shape", "images are"), ("dtype", "images are"), ("floats", "images are"),
    ("label range", "labels span 1..100"), ("negative label", "labels span -1..98"),
    ("label count", "labels are"), ("label type", "labels are"), ("empty", "images are"),
])
def test_wrong_content_is_named(tmp_path, arrays, fault, says):
    path = write_hdf5(tmp_path / "course.hdf5", broken(arrays, fault))
    if fault == "floats":
        write_hdf5(path, {**arrays, "test": (arrays["test"][0] * 255.0, arrays["test"][1])}, float)
    with pytest.raises(UserError, match=says) as caught:
        data.load("cifar100", tmp_path, download=False)
    assert f"{path}: test" in str(caught.value)


def test_a_full_split_must_be_balanced(tmp_path):
    images, labels = np.zeros((10_000, 3, 32, 32), np.uint8), np.arange(10_000) % 100
    write_binary(tmp_path, {"train": (images[:100], labels[:100]), "test": (images, labels)})
    assert len(data.load("cifar100", tmp_path).test.labels) == 10_000
    labels[0] = 5
    write_binary(tmp_path, {"test": (images, labels)})
    with pytest.raises(UserError, match="99 to 101 images a class"):
        data.load("cifar100", tmp_path)


@pytest.mark.parametrize("fault, says", [
    ("truncated", "not a whole tar archive"), ("text", "not a whole tar archive"),
    ("without test", "lacks test"), ("other pickle", "not a pickle of CIFAR-100"),
    ("torn record", "whole number of 3074-byte records"), ("too large", "larger than any file"),
    ("other HDF5", "the course's keys"),
])
def test_damaged_files_are_named(tmp_path, arrays, fault, says):
    directory = write_python(tmp_path / "cifar-100-python", arrays)
    if fault in ("truncated", "text"):
        archive = pack(directory, tmp_path / "mine.tar.gz")
        whole = archive.read_bytes()
        archive.write_bytes(whole[: len(whole) // 2] if fault == "truncated" else b"<html>")
        data_dir = archive
    elif fault == "torn record":
        data_dir = write_binary(tmp_path / "binary", arrays)
        (data_dir / "test.bin").write_bytes(b"x" * 3075)
    elif fault == "other HDF5":
        h5py = pytest.importorskip("h5py")
        data_dir = tmp_path / "other.h5"
        with h5py.File(data_dir, "w") as file:
            file["images"] = np.zeros(3)
    else:
        data_dir = directory
        if fault == "without test":
            (directory / "test").unlink()
        elif fault == "too large":
            os.truncate(directory / "test", 2**40)
        else:
            (directory / "test").write_bytes(pickle.dumps([1, 2, 3]))
    with pytest.raises(UserError, match=says) as caught:
        data.load("cifar100", data_dir, download=False)
    assert str(data_dir) in str(caught.value)


def test_hdf5_without_h5py_names_the_package(tmp_path, arrays, monkeypatch):
    write_hdf5(tmp_path / "course.h5", arrays)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="pip install h5py"):
        data.load("cifar100", tmp_path)


@pytest.mark.parametrize("dtype", ["O", "f8", "i4"])
def test_a_pickled_array_must_be_of_uint8(tmp_path, arrays, dtype):
    """numpy's own unpickling would take an object array's bytes for pointers."""
    directory = write_python(tmp_path / "cifar-100-python", arrays)
    content = pickle.dumps({"data": np.zeros((1, 3072), dtype), "fine_labels": [0]}, 2)
    (directory / "train").write_bytes(content)
    with pytest.raises(UserError, match="refused, for it holds an array"):
        data.load("cifar100", tmp_path, download=False)


@pytest.mark.parametrize("content", [
    {"data": 5, "fine_labels": [1]}, {"data": None}, {}, {"data": [[1, 2], [3]], "fine_labels": []},
    {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [[1, 2], [3]]},
    {"data": np.zeros((2, 3072), np.uint8), "fine_labels": ["a", "b"]},
])
def test_a_pickle_of_other_things_is_named(tmp_path, arrays, content):
    directory = write_python(tmp_path / "cifar-100-python", arrays)
    (directory / "train").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(UserError, match="train"):
        data.load("cifar100", tmp_path, download=False)


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`, by range where asked for; breaks off `breaks` times after half of it.

    Between the halves it pauses for `pause` seconds. Before all that, it answers with `errors`.
    """

    def __init__(self, content: bytes, breaks: int = 0, pause: float = 0, errors: tuple = ()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.breaks, self.pause, self.ranges = content, breaks, pause, []
        self.errors = list(errors)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/cifar-100-python.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        if self.server.errors:
            return self.send_error(self.server.errors.pop(0))
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start >= len(self.server.content):
            return self.send_error(416)
        rest = self.server.content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        half = len(rest) // 2
        self.wfile.write(rest[:half])
        time.sleep(self.server.pause)
        if not self.server.breaks:
            self.wfile.write(rest[half:])
        self.server.breaks = max(0, self.server.breaks - 1)

    def log_message(self, *_):
        pass


@pytest.fixture
def archive(tmp_path, arrays, monkeypatch):
    """The content of an archive that the code takes for the official one."""
    written = pack(write_python(tmp_path / "src" / "cifar-100-python", arrays), tmp_path / "a.tgz")
    content = written.read_bytes()
    md5 = hashlib.md5(content).hexdigest()
    monkeypatch.setitem(data.OFFICIAL_MD5, "cifar-100-python.tar.gz", md5)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return content


def test_a_download_is_checked_and_read(tmp_path, archive, arrays):
    server = Server(archive)
    assert same(data.load("cifar100", tmp_path / "new" / "data", server.url), arrays)
    names = sorted(path.name for path in (tmp_path / "new" / "data").iterdir())
    assert names == [".cifar-100.lock", "cifar-100-python.tar.gz"]
    data.load("cifar100", tmp_path / "new" / "data", server.url)
    assert server.ranges == [None], "the second time nothing is asked for"


def test_a_broken_download_is_resumed(tmp_path, archive, arrays, monkeypatch):
    monkeypatch.setattr(data, "RETRY_SECONDS", 0)
    server = Server(archive, breaks=2)
    assert same(data.load("cifar100", tmp_path / "data", server.url), arrays)
    half = len(archive) // 2
    quarter = (len(archive) - half) // 2
    assert server.ranges == [None, f"bytes={half}-", f"bytes={half + quarter}-"]


def test_a_busy_server_is_asked_again_and_a_refusal_is_final(tmp_path, archive, arrays,
                                                             monkeypatch):
    monkeypatch.setattr(data, "RETRY_SECONDS", 0)
    server = Server(archive, errors=(503, 429))
    assert same(data.load("cifar100", tmp_path / "data", server.url), arrays)
    server = Server(archive, errors=(404,))
    with pytest.raises(UserError, match=r"404.*Three ways out"):
        data.load("cifar100", tmp_path / "other", server.url)
    assert server.ranges == [None]


def test_a_download_killed_at_its_end_is_resumed(tmp_path, archive, arrays):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-100.tar.gz.part").write_bytes(archive)
    assert same(data.load("cifar100", tmp_path / "data", Server(archive).url), arrays)


def test_the_rest_of_another_file_is_not_in_the_way(tmp_path, archive, arrays):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-100.tar.gz.part").write_bytes(b"of another mirror")
    assert same(data.load("cifar100", tmp_path / "data", Server(archive).url), arrays)


def test_a_wrong_archive_is_not_kept(tmp_path, archive):
    server = Server(archive + b"x")
    with pytest.raises(UserError, match=r"not official.*Three ways out.*--data-url.*synthetic"):
        data.load("cifar100", tmp_path / "data", server.url)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".cifar-100.lock"]


@pytest.mark.parametrize("download, url", [
    (True, "http://127.0.0.1:9/none"), (True, "nonsense"), (True, "http://127.0.0.1:x/none"),
    (True, "http://127.0.0.1/a b"), (False, None),
])
def test_no_data_names_three_ways_out(tmp_path, monkeypatch, download, url):
    monkeypatch.setattr(data, "RETRY_SECONDS", 0)
    with pytest.raises(UserError, match=r"put .*--data-url.*--dataset synthetic"):
        data.load("cifar100", tmp_path / "data", url, download)


def test_of_two_processes_one_downloads(tmp_path, archive):
    server = Server(archive, pause=5)
    code = (
        "import sys, data, hashlib; data.OFFICIAL_MD5['cifar-100-python.tar.gz'] = sys.argv[3]\n"
        "data.load('cifar100', sys.argv[1], sys.argv[2])"
    )
    command = [sys.executable, "-c", code, tmp_path / "data", server.url]
    command.append(hashlib.md5(archive).hexdigest())
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert server.ranges == [None]


def test_the_synthetic_set_is_deterministic_and_balanced():
    first, second = data.synthetic(), data.synthetic()
    assert first.name == "synthetic" and "not CIFAR-100" in first.source
    assert first.train.images.dtype == torch.uint8 and first.train.images.shape[1:] == (3, 32, 32)
    assert torch.equal(first.train.images, second.train.images)
    assert torch.bincount(first.train.labels).tolist() == [50] * 100
    assert torch.bincount(first.test.labels).tolist() == [10] * 100
    assert len(set(first.class_names)) == 100


def test_the_held_out_images_are_balanced_and_apart():
    whole = data.synthetic(5, 1).train
    train, held = data.hold_out(whole, 200)
    assert torch.bincount(held.labels).tolist() == [2] * 100
    assert torch.bincount(train.labels).tolist() == [3] * 100
    rejoined = torch.cat([train.images, held.images]).flatten(1)
    assert len(torch.unique(rejoined, dim=0)) == 500
    unsplit, none = data.hold_out(whole, 0)
    assert (len(unsplit.labels), len(none.labels)) == (500, 0)


@pytest.mark.parametrize("count", [50, 150, 500, 600])
def test_a_val_size_that_cannot_be_balanced_is_refused(count):
    with pytest.raises(UserError, match="--val-size"):
        data.hold_out(data.synthetic(5, 1).train, count)


PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def numbered(count: int) -> data.Split:
    """Images that are each of one value, their number."""
    values = torch.arange(count, dtype=torch.uint8)
    return data.Split(values.view(-1, 1, 1, 1).expand(count, 3, 32, 32), values.long() % 100)


def test_an_epoch_visits_every_image_once_with_its_label(runtime):
    batches = data.Batches(numbered(250), 64, PLAIN, runtime)
    got = list(batches.shuffled(seed=1, epoch=2))
    assert [len(labels) for _, labels, _ in got] == [64, 64, 64, 58] and len(batches) == 4
    numbers = torch.cat([images[:, 0, 0, 0] * 255 for images, *_ in got]).round().long()
    labels = torch.cat([labels for _, labels, _ in got])
    assert sorted(numbers.tolist()) == list(range(250))
    assert torch.equal(numbers % 100, labels)


def test_an_epoch_is_a_function_of_seed_and_epoch_alone(runtime):
    def draw(seed, epoch, start=0):
        batches = data.Batches(data.synthetic(2, 1).train, 32, PLAIN, runtime)
        return [images for images, *_ in batches.shuffled(seed, epoch, start)]

    whole = draw(3, 5)
    torch.rand(10)  # the global generator plays no part
    assert all(map(torch.equal, whole, draw(3, 5)))
    assert all(map(torch.equal, whole[4:], draw(3, 5, start=4)))
    assert not torch.equal(whole[0], draw(3, 6)[0])
    assert not torch.equal(whole[0], draw(4, 5)[0])


@pytest.mark.parametrize("flip", [0, 1])
def test_the_gather_equals_reflect_padding_crop_and_flip(runtime, flip):
    split = data.synthetic(1, 1).train
    batches = data.Batches(split, 10, PLAIN, runtime)
    padded = F.pad(split.images.float(), (4, 4, 4, 4), mode="reflect").byte()
    chosen, ones = torch.tensor([3, 99, 0]), torch.ones(3, dtype=torch.long)
    for down in range(-4, 5):
        for right in range(-4, 5):
            expected = padded[chosen, :, 4 + down : 36 + down, 4 + right : 36 + right]
            expected = expected.flip(3) if flip else expected
            got = batches._augment(chosen, down * ones, right * ones, flip * ones, 32)
            assert torch.equal((255 * got).round().byte(), expected)


def test_crops_and_flips_differ_from_image_to_image(runtime):
    ramp = torch.arange(32, dtype=torch.uint8).expand(100, 3, 32, 32)
    batches = data.Batches(data.Split(ramp, torch.arange(100)), 100, PLAIN, runtime)
    images, *_ = next(batches.shuffled(0, 0))
    assert len(torch.unique(images[:, 0, 0], dim=0)) == 18  # 9 offsets, flipped or not


def test_images_come_normalised_and_resized(runtime):
    split = data.synthetic(1, 1).test
    plain = (split.images / 255).float()
    batches = data.Batches(split, 30, data.IMAGENET_STATS, runtime)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in data.IMAGENET_STATS)
    expected = (plain - mean) / std
    images = torch.cat([images for images, _ in batches.in_order()])
    torch.testing.assert_close(images, expected)
    large = torch.cat([images for images, _ in batches.in_order(224)])
    torch.testing.assert_close(large, F.interpolate(expected, scale_factor=7, mode="bilinear"))
    small = torch.cat([images for images, _ in batches.in_order(16)])
    torch.testing.assert_close(
        small, F.interpolate(expected, (16, 16), mode="bilinear", antialias=True)
    )
