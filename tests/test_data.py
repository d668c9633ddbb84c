"""CIFAR-100 is found, told apart, checked and fed to the network as promised."""

import functools
import gzip
import math
import os
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    NAMES,
    SHARED,
    holds,
    needs_data,
    pack,
    write_binary,
    write_hdf5,
    write_python,
)
from torchvision.transforms.v2 import functional

import cifar100.formats
import cifar100.unpickle
import data
from cifar100 import formats
from cifar100.classes import CLASS_NAMES, SUPERCLASS_OF, SUPERCLASSES
from utils import UserError


def test_a_directory_that_cannot_be_searched_is_one_line(tmp_path, monkeypatch):
    def find(_):
        raise PermissionError(13, "Permission denied")  # which root never meets

    monkeypatch.setattr(data, "find", find)
    with pytest.raises(UserError, match=r"cannot be read \(.*Permission denied"):
        data.load("cifar100", tmp_path)


@pytest.mark.parametrize("layout", [
    "python/directory", "python/itself", "python/archive", "python/file", "python/protocol 4",
    "binary/directory", "binary/archive", "binary/unpacked",
    "HDF5/uint8", "HDF5/float32", "HDF5/float64",
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
        elif form == "unpacked":  # as some browsers do with what they download
            packed = pack(written, tmp_path / "cifar.tar.gz")
            data_dir = tmp_path / "cifar-100-binary.tar"
            data_dir.write_bytes(gzip.decompress(packed.read_bytes()))
            packed.unlink()
        elif form == "itself":
            data_dir = written
        else:
            written.rename(tmp_path / written.name)
    before = sorted(tmp_path.rglob("*"))
    dataset = data.load("cifar100", data_dir, download=False)
    assert holds(dataset, arrays)
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
    assert holds(data.load("cifar100", tmp_path, download=False), arrays)


@pytest.fixture(scope="module")
def real():
    """The real set, and the files that it was read from."""
    read, files = formats.read_members, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "read_members", lambda path: files.update(read(path)) or files)
        return data.load("cifar100", SHARED / "cifar100", download=False), files


@needs_data
def test_the_real_set_is_the_published_one(real):
    dataset, _ = real
    assert dataset.train.images.shape == (50_000, 3, 32, 32)
    assert torch.bincount(dataset.test.labels).tolist() == [100] * 100
    # How often each channel has each of the values 0 to 255.
    counts = np.stack([torch.bincount(channel.flatten(), minlength=256)
                       for channel in dataset.train.images.transpose(0, 1)])
    shares, values = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = shares @ values
    std = (shares @ values**2 - mean**2) ** 0.5
    np.testing.assert_allclose((mean, std), data.CIFAR100_STATS, rtol=0, atol=2e-6)


@needs_data
def test_the_classes_and_superclasses_are_those_of_the_real_set(real):
    dataset, files = real
    assert dataset.class_names == CLASS_NAMES
    assert (CLASS_NAMES[0], CLASS_NAMES[99]) == ("apple", "worm")
    labels = cifar100.unpickle.unpickle(files["test"], "fine_labels", "coarse_labels")
    pairs = set(zip(*labels, strict=True))
    assert len(pairs) == 100
    for fine, coarse in pairs:
        group = SUPERCLASS_OF[CLASS_NAMES[fine]]
        assert list(SUPERCLASSES).index(group) == coarse, "the official order, too"


# Of each class in the order of the alphabet, the place of its superclass in that order: the column
# coarse_labels of the official files.
COARSE = [
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3,
    15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0,
    17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19,
    2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13]


def test_the_classes_and_superclasses_are_the_published_ones():
    assert len(CLASS_NAMES) == 100 and list(CLASS_NAMES) == sorted(CLASS_NAMES)
    groups = list(SUPERCLASSES)
    assert [groups.index(SUPERCLASS_OF[name]) for name in CLASS_NAMES] == COARSE
    assert (groups[0], groups[9], groups[19]) == (
        "aquatic mammals", "large man-made outdoor things", "vehicles 2")
    known = {0: "apple", 8: "bicycle", 29: "dinosaur", 51: "mushroom", 69: "rocket", 88: "tiger",
             99: "worm"}
    assert {label: CLASS_NAMES[label] for label in known} == known


@pytest.mark.parametrize("form", ["directory", "archive"])
def test_a_checksum_that_is_not_the_official_one_is_noted_once(tmp_path, arrays, caplog, form):
    path = write_python(tmp_path / "mine", arrays)
    if form == "archive":
        path = pack(path, tmp_path / "mine.tar.gz")
    with caplog.at_level("INFO", "cifar100"):
        data.load("cifar100", path)
    assert len([line for line in caplog.messages if "not the official md5 sum" in line]) == 1


def test_the_checksum_is_of_the_images_as_they_were_loaded(tmp_path, arrays):
    """A run that holds images out is on the same images, whatever the format they came in."""
    images, labels = arrays["test"]
    sets = [data.hold_out(data.load("cifar100", path), 0) for path in (
        write_binary(tmp_path / "binary", arrays), write_python(tmp_path / "python", arrays),
        write_binary(tmp_path / "pixels", {**arrays, "test": (images ^ 1, labels)}),
        write_binary(tmp_path / "labels", {**arrays, "test": (images, labels[::-1])}),
    )]
    checksums = [dataset.checksum for dataset in sets]
    assert checksums[0] == checksums[1] == data.hold_out(sets[0], 100).checksum
    sets.append(data.hold_out(sets[0]._replace(val=sets[0].test), 0))
    assert len({dataset.checksum for dataset in sets}) == 4


def broken(arrays: dict, fault: str) -> dict:
    """Return the arrays with a fault in the test set."""
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
    ("shape", "images must be"), ("dtype", "images are"), ("floats", "images are"),
    ("label range", "labels span 1..100"), ("negative label", "labels span -1..98"),
    ("label count", "labels must be"), ("label type", "labels are"), ("empty", "images must be"),
])
def test_wrong_content_is_named(tmp_path, arrays, fault, says):
    path = write_hdf5(tmp_path / "course.hdf5", broken(arrays, fault))
    if fault == "floats":
        write_hdf5(path, {**arrays, "test": (arrays["test"][0] * 255.0, arrays["test"][1])}, float)
    with pytest.raises(UserError, match=f"^{path}.*: test {says}"):
        data.load("cifar100", tmp_path, download=False)


def test_uneven_classes_of_a_full_split_are_noted_and_empty_ones_are_an_error(tmp_path, caplog):
    """Noisy labels are uneven. The superclasses' labels leave classes empty."""
    images, labels = np.zeros((10_000, 3, 32, 32), np.uint8), np.arange(10_000) % 100
    write_binary(tmp_path, {"train": (images[:100], labels[:100]), "test": (images, labels)})
    caplog.set_level("INFO", "cifar100")
    assert len(data.load("cifar100", tmp_path).test.labels) == 10_000
    assert [line for line in caplog.messages if "test has" in line] == []
    labels[:40] = 5
    write_binary(tmp_path, {"test": (images, labels)})
    assert data.load("cifar100", tmp_path).test.labels.tolist() == labels.tolist()
    assert caplog.messages[-1] == (
        f"note       {tmp_path}: test has 10,000 of 10,000 images, 99 to 139 of a class")
    write_binary(tmp_path, {"test": (images, labels // 5)})
    with pytest.raises(UserError, match="images, 0 to 535 of a class"):
        data.load("cifar100", tmp_path)


@pytest.mark.parametrize("fault, says", [
    ("truncated", "not a whole tar archive"), ("text", "zip, but an HTML page"),
    ("without test", "lacks test"), ("other pickle", "not a pickle of CIFAR-100"),
    ("torn record", "whole number of 3074-byte records"), ("too large", "more than all of"),
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


def test_float_images_of_an_hdf5_file_stay_in_their_order_however_many_there_are(tmp_path, arrays):
    rng = np.random.default_rng(1)
    many = rng.integers(0, 256, (2100, 3, 32, 32), np.uint8), np.arange(2100) % 100
    whole = {**arrays, "train": many}
    write_hdf5(tmp_path / "course.h5", whole, np.float32)
    assert holds(data.load("cifar100", tmp_path, download=False), whole)


def test_hdf5_without_h5py_names_the_package(tmp_path, arrays, monkeypatch):
    write_hdf5(tmp_path / "course.h5", arrays)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="pip install h5py"):
        data.load("cifar100", tmp_path)


@pytest.mark.parametrize("dtype", ["O", "f8", "i4"])
def test_pickled_images_must_be_of_uint8(tmp_path, arrays, dtype):
    """numpy's own unpickling would take an object array's bytes for pointers."""
    directory = write_python(tmp_path / "cifar-100-python", arrays)
    content = pickle.dumps({"data": np.zeros((1, 3072), dtype), "fine_labels": [0]}, 2)
    (directory / "train").write_bytes(content)
    refusal = "the images are no array of uint8" if dtype == "i4" else "refused, for it holds an"
    with pytest.raises(UserError, match=refusal):
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


def test_the_synthetic_set_is_deterministic_and_balanced():
    first, second = data.synthetic(), data.synthetic()
    assert first.name == "synthetic" and "not CIFAR-100" in first.source
    assert first.train.images.dtype == torch.uint8 and first.train.images.shape[1:] == (3, 32, 32)
    assert torch.equal(first.train.images, second.train.images)
    assert torch.bincount(first.train.labels).tolist() == [50] * 100
    assert torch.bincount(first.test.labels).tolist() == [10] * 100
    assert len(set(first.class_names)) == 100


def test_the_held_out_images_are_balanced_and_apart():
    held = data.hold_out(data.synthetic(5, 1), 200)
    train, val = held.train, held.val
    assert torch.bincount(val.labels).tolist() == [2] * 100
    assert torch.bincount(train.labels).tolist() == [3] * 100
    rejoined = torch.cat([train.images, val.images]).flatten(1)
    assert len(torch.unique(rejoined, dim=0)) == 500


def test_a_data_set_is_evaluated_on_val_where_there_is_one_and_on_test():
    whole = data.synthetic(5, 1)
    assert data.hold_out(whole, 0).train is whole.train
    assert list(whole.evaluated()) == ["test"]
    held = data.hold_out(whole, 100)
    assert list(held.evaluated().items()) == [("val", held.val), ("test", whole.test)]


@pytest.mark.parametrize("count", [50, 150, 500, 600])
def test_a_val_size_that_cannot_be_balanced_is_refused(count):
    with pytest.raises(UserError, match="--val-size"):
        data.hold_out(data.synthetic(5, 1), count)


PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def numbered(count: int) -> data.Split:
    """Images that are each of one value, their number."""
    values = torch.arange(count, dtype=torch.uint8)
    return data.Split(values.view(-1, 1, 1, 1).expand(count, 3, 32, 32), values.long() % 100)


def test_an_epoch_visits_every_image_once_with_its_label(runtime):
    batches = data.Batches(numbered(250), 64, PLAIN, runtime)
    got = list(batches.shuffled(seed=1, epoch=2))
    assert [len(labels) for _, labels, _ in got] == [64, 64, 64, 58]
    assert batches.steps_per_epoch == 4
    numbers = torch.cat([images[:, 0, 0, 0] * 255 for images, *_ in got]).round().long()
    labels = torch.cat([labels for _, labels, _ in got])
    assert sorted(numbers.tolist()) == list(range(250))
    assert torch.equal(numbers % 100, labels)


@pytest.mark.parametrize("cutmix, strength", [(0, 0), (0.5, 0), (0, 0.5), (0.5, 0.5)])
def test_an_epoch_is_a_function_of_seed_and_epoch_alone(runtime, cutmix, strength):
    def draw(seed, epoch, start=0):
        batches = data.Batches(data.synthetic(2, 1).train, 32, PLAIN, runtime, strength=strength)
        drawn = list(batches.shuffled(seed, epoch, start, cutmix=cutmix))
        return [tensor for images, labels, _ in drawn for tensor in (images, labels)]

    whole = draw(3, 5)
    torch.rand(10)  # the global generator plays no part
    assert all(map(torch.equal, whole, draw(3, 5)))
    assert all(map(torch.equal, whole[8:], draw(3, 5, start=4)))
    for other in (draw(3, 6), draw(4, 5)):
        assert not torch.equal(whole[0], other[0]) and not torch.equal(whole[1], other[1])


@pytest.mark.parametrize("probability, fewest, most", [
    (0.5, 35, 65), (0.2, 70, 92), (0.8, 8, 35)])
def test_cutmix_pastes_a_box_of_another_image_and_mixes_the_labels_by_its_area(
        runtime, probability, fewest, most):
    batches = data.Batches(numbered(100), 25, PLAIN, runtime)
    order = torch.cat([labels for _, labels, _ in batches.shuffled(1, 2)])
    mixed = list(batches.shuffled(1, 2, cutmix=probability))
    images = torch.cat([(255 * images[:, 0]).round().long() for images, *_ in mixed])
    labels = torch.cat([labels for _, labels, _ in mixed])
    assert labels.dtype == torch.float32 and labels.shape == (100, 100)
    whole = 0
    for image, label, own, other in zip(images, labels, order, order.roll(1), strict=True):
        assert set(image.unique().tolist()) <= {own.item(), other.item()}
        pasted = image == other
        share = pasted.float().mean()
        assert torch.equal(pasted, pasted.any(1)[:, None] & pasted.any(0)), "a rectangle"
        expected = F.one_hot(own, 100) * (1 - share) + F.one_hot(other, 100) * share
        torch.testing.assert_close(label, expected)
        whole += share == 0
    assert fewest < whole < most, "images that stay as they are"


@pytest.mark.parametrize("level", [-0.75, -0.25, 0, 0.5, 1])
@pytest.mark.parametrize("operation", range(data.OPERATIONS))
def test_trivial_augment_changes_an_image_as_torchvision_does(operation, level):
    """But for what comes from outside the image, which torchvision makes black.

    It also turns about the centre, and solarises white at no strength, and all but black at 1.
    """
    images = 0.01 + 0.98 * data.synthetic(1, 1).train.images / 255
    shear = math.degrees(math.atan(level))
    moves = {1: {"shear": [shear, 0]}, 2: {"shear": [0, shear]}, 3: {"translate": [-32 * level, 0]},
             4: {"translate": [0, -32 * level]}, 5: {"angle": -135 * level}}

    def move(images):
        still = {"angle": 0, "translate": [0, 0], "scale": 1, "shear": [0, 0]}
        return functional.affine(images, **still | moves.get(operation, {}),
                                 interpolation=functional.InterpolationMode.BILINEAR)

    colours = {6: functional.adjust_brightness, 7: functional.adjust_saturation,
               8: functional.adjust_contrast}
    if operation in colours:
        expected = colours[operation](images, 1 + level)
    elif operation == 9:
        expected = functional.posterize(images, round(8 - 6 * abs(level)))
    elif operation == 10:
        expected = functional.solarize(images, 1 - abs(level))
    else:
        expected = move(images)
    ones = torch.ones(len(images))
    got = data.trivial_augment(images, operation * ones.long(), level * ones)
    assert got.is_contiguous(memory_format=torch.channels_last)
    inside = move(torch.ones_like(images)) > 0.999
    torch.testing.assert_close(got * inside, expected * inside, rtol=0, atol=1e-5)
    assert operation == 0 or level == 0 or not torch.equal(got, images)


@pytest.mark.parametrize("strength", [0.25, 1])
def test_trivial_augment_draws_an_operation_and_a_level_for_each_image(
        runtime, monkeypatch, strength):
    drawn, change = [], data.trivial_augment

    def tell(images, *operation_and_level):
        drawn.append(operation_and_level)
        return change(images, *operation_and_level)

    monkeypatch.setattr(data, "trivial_augment", tell)
    split = data.Split(data.synthetic(1, 1).train.images[:1].expand(1000, -1, -1, -1),
                       torch.arange(1000))
    batches = data.Batches(split, 1000, PLAIN, runtime, padding=0, strength=strength)
    ((images, *_),) = batches.shuffled(0, 0)
    ((operation, level),) = drawn
    assert sorted(operation.unique().tolist()) == list(range(data.OPERATIONS))
    expected = strength * torch.arange(-data.LEVELS, data.LEVELS + 1) / data.LEVELS
    torch.testing.assert_close(level.unique(), expected)
    assert len({*zip(operation.tolist(), level.tolist(), strict=True)}) > 400, "independent"
    # Flipped or not; eight operations change with the level.
    assert len(torch.unique(images, dim=0)) > 300


@pytest.mark.parametrize("flip, padding", [(0, 4), (1, 4), (1, 2), (0, 0)])
def test_the_gather_equals_reflect_padding_crop_and_flip(runtime, flip, padding):
    split = data.synthetic(1, 1).train
    batches = data.Batches(split, 10, PLAIN, runtime, padding=padding)
    padded = F.pad(split.images.float(), [padding] * 4, mode="reflect").byte()
    chosen, ones = torch.tensor([3, 99, 0]), torch.ones(3, dtype=torch.long)
    offsets = 2 * padding + 1
    for down in range(offsets):
        for right in range(offsets):
            expected = padded[chosen, :, down : 32 + down, right : 32 + right]
            expected = expected.flip(3) if flip else expected
            crop = torch.stack([down * ones, (right + offsets * flip) * ones])
            got = batches._augment({"image": chosen[None], "crop": crop}, 32)
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal((255 * got).round().byte(), expected)


@pytest.mark.parametrize("padding", [2, 4])
def test_crops_and_flips_differ_from_image_to_image(runtime, padding):
    ramp = torch.arange(32, dtype=torch.uint8).expand(100, 3, 32, 32)
    split = data.Split(ramp, torch.arange(100))
    images, *_ = next(data.Batches(split, 100, PLAIN, runtime, padding=padding).shuffled(0, 0))
    offsets = 2 * padding + 1
    assert len(torch.unique(images[:, 0, 0], dim=0)) == 2 * offsets  # flipped or not


@pytest.mark.parametrize("cutmix, strength", [(0, 0), (0.5, 0), (0.5, 0.5)])
def test_augmentation_compiles_whole_to_the_same_images(runtime, monkeypatch, cutmix, strength):
    """Crops, flips, normalisation and size, without a break; this backend needs no compiler."""
    torch.compiler.reset()  # what the other cases compiled
    monkeypatch.setattr(torch, "compile", functools.partial(
        torch.compile, backend="aot_eager", fullgraph=True))
    split = data.Split(torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8), torch.arange(12))
    eager, compiled = (data.Batches(split, 8, data.CIFAR100_STATS, runtime._replace(compile=how),
                                    strength=strength) for how in (False, True))
    for size in (20, 32):
        drawn = (batches.shuffled(0, 0, 0, size, cutmix) for batches in (eager, compiled))
        for one, other in zip(*drawn, strict=True):
            torch.testing.assert_close(tuple(one), tuple(other), rtol=1e-4, atol=1e-4)
    assert compiled._augment != eager._augment


@pytest.mark.parametrize("size", [16, 32, 224])
def test_images_come_normalised_and_resized(runtime, size):
    split = data.synthetic(1, 1).test
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in data.IMAGENET_STATS)
    expected = (split.images / 255 - mean) / std
    if size != 32:
        expected = F.interpolate(expected, (size, size), mode="bilinear", antialias=size < 32)
    batches = list(data.Batches(split, 30, data.IMAGENET_STATS, runtime, size))
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected)
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels)


@pytest.mark.parametrize("count", [1, 90, 91, 250])
def test_three_ranks_get_as_many_batches_each_and_every_image_once(runtime, count):
    """As many as len() says, for which a progress bar waits, though the last may be empty."""
    seen = []
    for rank in range(3):
        batches = data.Batches(numbered(count), 10, PLAIN, runtime._replace(rank=rank, ranks=3))
        got = list(batches)
        assert len(got) == len(batches) == -(-count // 30)
        seen += [images[:, 0, 0, 0] * 255 for images, _ in got]
    assert sorted(torch.cat(seen).round().tolist()) == list(range(count))
