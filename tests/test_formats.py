"""Whatever CIFAR-100 is packed in, it reads equal, and whatever else lies there is named."""

import gzip
import io
import os
import pickle
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    NAMES,
    SHARED,
    holds,
    needs_data,
    pack,
    pack_zip,
    write_binary,
    write_hdf5,
    write_parquet,
    write_python,
)

import data
from cifar100.files import read_archive
from utils import UserError

OFFICIAL = "cifar-100-python"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 169001437\n"
HTML = b"\n<!DOCTYPE HTML>\n<html><head><title>403 Forbidden</title></head></html>"


def load(path: Path) -> data.Dataset:
    """Read a data set, without a download."""
    return data.load("cifar100", path, download=False)


def tar(directory: Path, archive: Path, mode: str = "w") -> Path:
    """Write a tar archive of a folder."""
    with tarfile.open(archive, mode) as file:
        file.add(directory, directory.name)
    return archive


def pack_all(directory: Path, archive: Path) -> Path:
    """Write a zip of all folders below a folder, in the order of their names."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(directory.rglob("*")):
            file.write(path, path.relative_to(directory.parent))
    return archive


def python_in(folder: Path, arrays: dict, **options) -> Path:
    """Write the python version in a folder of its own, away from `folder`, for an archive."""
    return write_python(folder.parent / "away" / OFFICIAL, arrays, **options)


def mac_zip(directory: Path, archive: Path) -> Path:
    """Write a zip as a Mac does."""
    pack_zip(directory, archive)
    with zipfile.ZipFile(archive, "a") as file:
        for path in directory.iterdir():
            file.writestr(f"__MACOSX/{directory.name}/._{path.name}", b"\0\5\x16\7" + bytes(90))
    return archive


def kaggle_zip(directory: Path, archive: Path) -> Path:
    """Write a zip as Kaggle does: no folder, and the editor's backup of the official archive."""
    (directory / "file.txt~").write_bytes(b"")
    return pack_zip(directory, archive, inside="")


def windows_zip(directory: Path, archive: Path) -> Path:
    """Write a zip as old programs for Windows do."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in directory.iterdir():
            info = zipfile.ZipInfo("x")
            info.filename = f"{directory.name}\\{path.name}"
            file.writestr(info, path.read_bytes())
    return archive


ARCHIVES = {
    "Safari's cifar-100-python.tar": tar,
    "cifar-100-python.tgz": pack,
    "cifar-100-python.tar": pack,  # not gunzipped, whatever its name says
    "cifar-100-python.tar.gz": tar,
    "Copy of cifar (1).tar.gz": pack,
    "mine.zip": pack_zip,
    "archive.zip": kaggle_zip,
    "CIFAR-100.ZIP": mac_zip,
    "cifar-100-python.zip": windows_zip,
    "cifar-100-python.tar.gz.1": pack,  # by wget
}


@pytest.mark.parametrize("given", ["file", "directory"])
@pytest.mark.parametrize("write", [write_python, write_binary])
@pytest.mark.parametrize("name", ARCHIVES)
def test_every_archive_reads_equal_whatever_its_name(tmp_path, arrays, name, write, given):
    folder = tmp_path / "data"
    folder.mkdir()
    archive = ARCHIVES[name](write(tmp_path / "cifar-100", arrays), folder / name.split("'s ")[-1])
    dataset = load(archive if given == "file" else folder)
    assert holds(dataset, arrays) and dataset.class_names == tuple(NAMES)
    assert list(folder.iterdir()) == [archive], "nothing is unpacked to disk"


def test_files_of_an_archive_come_from_one_folder_of_it(tmp_path, arrays):
    """An archive of several data sets also has files of these names elsewhere."""
    other = {split: (images ^ 255, labels) for split, (images, labels) in arrays.items()}
    for name, content in (("a", other), ("b", arrays), ("c", other)):
        write_python(tmp_path / "all" / name, content)
    for name in ("a", "c"):
        (tmp_path / "all" / name / "meta").unlink()
    for archive in (pack_all(tmp_path / "all", tmp_path / "all.zip"),
                    pack(tmp_path / "all", tmp_path / "all.tgz")):
        assert holds(load(archive), arrays)


@pytest.mark.parametrize("name", ["train", "test", "meta", "train.bin", "fine_label_names.txt"])
def test_one_of_the_files_stands_for_its_folder(tmp_path, arrays, name):
    write = write_binary if "." in name else write_python
    assert holds(load(write(tmp_path / "mine", arrays) / name), arrays)


@pytest.mark.parametrize("place", [
    "", "cifar-100-python", "archive", "cifar-100-python.tar/cifar-100-python", "keras/datasets"])
def test_a_folder_is_found_below(tmp_path, arrays, place):
    write_python(tmp_path / place, arrays)
    assert holds(load(tmp_path), arrays)


PARQUET = {
    "beside the code": ({}, ""),
    "the hub's repository": ({}, "cifar100"),
    "the hub's snapshot": ({}, "snapshots/aadb3af77e9048adbea6b47c21a81e47dd092ae5/cifar100"),
    "an older name": ({"name": "{split}-00000-of-00001-b2a5.parquet"}, "data"),
    "a folder for each split": ({"name": "{split}/0000.parquet"}, "cifar100"),
    "a column of another name": ({"column": "image"}, ""),
    "small groups": ({"rows": 7}, ""),
    "zstd": ({"compression": "zstd"}, ""),
    "no dictionary": ({"use_dictionary": False, "data_page_version": "2.0"}, ""),
}


@pytest.mark.parametrize("layout", PARQUET)
def test_parquet_reads_equal(tmp_path, arrays, layout, capfd):
    options, place = PARQUET[layout]
    folder = write_parquet(tmp_path / "data" / place, arrays, **options)
    dataset = load(tmp_path / "data")
    assert holds(dataset, arrays) and "(Parquet version)" in dataset.source
    assert dataset.class_names[7] == "beetle"
    if "name" not in options:
        assert holds(load(folder / "test-00000-of-00001.parquet"), arrays), "given itself"
    assert capfd.readouterr().err == "", "its progress bar is for terminals"


def test_parquet_is_read_under_a_progress_bar(tmp_path, arrays, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    load(write_parquet(tmp_path, arrays))
    shown = sys.stderr.getvalue()
    assert "/200 " in shown and "/100 " in shown and "image/s" in shown


def test_parquet_in_several_files_reads_in_their_order(tmp_path, arrays):
    images, labels = arrays["train"]
    for part in range(3):
        some = slice(part * 80, part * 80 + 80)
        write_parquet(tmp_path, {"train": (images[some], labels[some])},
                      name=f"{{split}}-0000{part}-of-00003.parquet")
    write_parquet(tmp_path, {"test": arrays["test"]})
    assert holds(load(tmp_path), arrays)


def test_parquet_whose_images_are_plain_bytes_reads_equal(tmp_path, arrays):
    pyarrow = pytest.importorskip("pyarrow")
    from helpers import png
    from pyarrow import parquet
    for split, (images, labels) in arrays.items():
        parquet.write_table(pyarrow.table({"image": list(map(png, images)), "fine_label": labels}),
                            tmp_path / f"{split}.parquet")
    assert holds(load(tmp_path), arrays)


def test_parquet_without_pyarrow_names_the_package(tmp_path, arrays, monkeypatch):
    """Before a download; but an archive beside it is used."""
    write_parquet(tmp_path, arrays)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install 'pyarrow"):
        data.load("cifar100", tmp_path)
    pack(python_in(tmp_path, arrays), tmp_path / "mine.tgz")
    assert "mine.tgz" in load(tmp_path).source


def test_an_old_pyarrow_is_not_used(tmp_path, arrays, monkeypatch):
    """Until 14.0.0 it unpickles what a file's schema holds."""
    write_parquet(tmp_path, arrays)
    monkeypatch.setattr("pyarrow.__version__", "14.0.0")
    with pytest.raises(UserError, match=r"pip install 'pyarrow>=15' \(14.0.0 "):
        data.load("cifar100", tmp_path)


def set_column(tmp_path: Path, arrays: dict, **columns) -> None:
    """Write a set as Parquet, with other columns in its test images."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    path = write_parquet(tmp_path, arrays) / "test-00000-of-00001.parquet"
    table = parquet.read_table(path).to_pydict() | columns
    parquet.write_table(pyarrow.table({k: v for k, v in table.items() if v is not None}), path)


@pytest.mark.parametrize("fault, says", [
    ("grey", "image 3 is not an RGB PNG of 32 x 32 pixels"),
    ("large", "image 3 is not an RGB PNG of 32 x 32 pixels"),
    ("JPEG", "image 3 is not an RGB PNG of 32 x 32 pixels"),
    ("path", "image 3 is not an RGB PNG of 32 x 32 pixels"),
    ("numbers", "image 0 is not an RGB PNG of 32 x 32 pixels"),
    ("cut", "not a Parquet file of CIFAR-100"),
    ("changed", "not a Parquet file of CIFAR-100"),
    ("names", "label 0 is not a whole number"), ("no label", "label 5 is not a whole number"),
    ("label 100", "labels span 0..100"),
])
def test_parquet_of_other_images_is_refused(tmp_path, arrays, fault, says):
    from helpers import png
    from PIL import Image
    images, labels = arrays["test"]
    values = [{"bytes": png(image), "path": None} for image in images]
    columns, file = {"img": values}, io.BytesIO()
    if fault in ("grey", "JPEG"):
        Image.fromarray(images[3][0]).convert("L" if fault == "grey" else "RGB").save(
            file, "PNG" if fault == "grey" else "JPEG")
        values[3]["bytes"] = file.getvalue()
    elif fault == "large":
        values[3]["bytes"] = png(np.zeros((3, 33, 32), np.uint8))
    elif fault == "numbers":
        columns["img"] = labels
    elif fault == "path":
        values[3] = {"bytes": None, "path": "train/3.png"}
    elif fault == "cut":
        values[3]["bytes"] = values[3]["bytes"][:-100]
    elif fault == "changed":
        content = bytearray(values[3]["bytes"])
        content[1000] ^= 1
        values[3]["bytes"] = bytes(content)
    else:
        changed = labels.tolist()
        changed[5] = {"no label": None, "label 100": 100}.get(fault, 5)
        columns["fine_label"] = list(map(str, labels)) if fault == "names" else changed
    set_column(tmp_path, arrays, **columns)
    with pytest.raises(UserError, match=f"^{tmp_path}.*{says}"):
        load(tmp_path)


def cifar_10(folder: Path) -> Path:
    """Write the file names of CIFAR-10's python version."""
    folder.mkdir(parents=True)
    content = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(content, 2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": ["airplane"]}, 2))
    return folder


def cifar_10_binary(folder: Path) -> Path:
    """Write the file names of CIFAR-10's binary version."""
    folder.mkdir(parents=True)
    for name in ("data_batch_1.bin", "test_batch.bin", "batches.meta.txt"):
        (folder / name).write_bytes(bytes(3073))
    return folder


def matlab(folder: Path) -> Path:
    """Write the file names of CIFAR-100 for MATLAB."""
    folder.mkdir(parents=True)
    for name in ("train.mat", "test.mat", "meta.mat"):
        (folder / name).write_bytes(b"MATLAB 5.0 MAT-file, Platform: GLNXA64" + bytes(999))
    return folder


def notes(folder: Path) -> Path:
    """Write a file of other things."""
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("nothing")
    return folder


def a_file(content: bytes):
    """Return a function that writes this instead of an archive."""
    return lambda path: path.write_bytes(content)


def packed(make, pack_it=pack):
    """Return a function that writes an archive of a folder that `make` writes."""
    return lambda path: pack_it(make(path.parent.parent / "away" / "files"), path)


WHOLE = "do that again"  # what must not be said of a file that is not damaged
# The name of the file, what makes it, and what is said.
OTHERS = {
    "CIFAR-10": ("cifar-10-python.tar.gz", packed(cifar_10), "holds CIFAR-10, not CIFAR-100"),
    "CIFAR-10 renamed": ("cifar-100-python.tar.gz", packed(cifar_10), "holds CIFAR-10, not CIFAR"),
    "CIFAR-10 binary": ("cifar-10-binary.tar.gz", packed(cifar_10_binary), "holds CIFAR-10, not"),
    "CIFAR-10 zip": ("c.zip", packed(cifar_10, pack_zip), "holds CIFAR-10, not CIFAR-100"),
    "MATLAB": ("cifar-100-matlab.tar.gz", packed(matlab), "holds CIFAR-100 for MATLAB"),
    "a wrong tar": ("cifar-100-python.tar.gz", packed(notes), "holds files, notes.txt, none of it"),
    "a wrong zip": ("cifar-100-python.zip", packed(notes, pack_zip), "holds notes.txt, none of it"),
    "HTML": ("cifar-100-python.tar.gz", a_file(HTML), "an HTML page"),
    "gzipped HTML": ("cifar-100-python.tar.gz", a_file(gzip.compress(HTML)), "an HTML page"),
    "text": ("cifar-100-python.zip", a_file(b"404: Not Found"), "a text, '404: Not Found'"),
    "LFS pointer": ("cifar-100-python.tar.gz", a_file(LFS), "a Git LFS pointer"),
    "LFS of Parquet": ("train-00000-of-00001.parquet", a_file(LFS), "a Git LFS pointer"),
    "empty": ("cifar-100-python.tar.gz", a_file(b""), "an empty file"),
    "xz": ("cifar-100-python.tar.xz", packed(notes, lambda *both: tar(*both, "w:xz")),
           "an xz archive"),
    "archive in an archive": ("archive.zip", packed(
        lambda folder: pack(notes(folder), folder / "cifar-100-python.tar.gz").parent, pack_zip),
        "holds cifar-100-python.tar.gz, to be unpacked first"),
}


@pytest.mark.parametrize("given", ["file", "directory"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_cifar_100_is_named(tmp_path, kind, given):
    name, make, says = OTHERS[kind]
    (tmp_path / "data").mkdir()
    make(tmp_path / "data" / name)
    with pytest.raises(UserError) as caught:
        load(tmp_path / "data" / name if given == "file" else tmp_path / "data")
    message = str(caught.value)
    assert says in message and f"{tmp_path / 'data'}" in message and WHOLE not in message
    assert ("Three ways out" in message) == (given == "directory")


@pytest.mark.parametrize("make, says", [
    (lambda folder: cifar_10(folder / "cifar-10-batches-py"), "batches-py: holds CIFAR-10, not"),
    (cifar_10_binary, "data: holds CIFAR-10, not CIFAR-100"),
    (lambda folder: matlab(folder / "cifar-100-matlab"), "matlab: holds CIFAR-100 for MATLAB"),
    (notes, "data: holds notes.txt, none of it CIFAR-100"),
    (lambda folder: (folder / "train" / "apple").mkdir(parents=True), "data: holds train, none of"),
])
def test_a_folder_that_is_not_cifar_100_is_named_before_a_download_and_if_that_fails(
        tmp_path, caplog, make, says):
    make(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"{says}.*Three ways out"):
        load(tmp_path / "data")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match=f"{says}.*Three ways out"), caplog.at_level("INFO"):
        data.load("cifar100", tmp_path / "data", "nonsense")
    told, download = caplog.messages
    assert says in told and download.startswith("download ")


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "train.mat"])
def test_a_file_of_another_data_set_is_named(tmp_path, name):
    make = matlab if name == "train.mat" else cifar_10
    with pytest.raises(UserError, match=r"MATLAB|CIFAR-10, not"):
        load(make(tmp_path / "data") / name)


@pytest.mark.parametrize("columns, says", [
    ({"fine_label": None, "coarse_label": None, "label": [1] * 100}, "img.bytes, img.path, label"),
    ({"img": None, "pixels": [1] * 100}, "coarse_label, fine_label, pixels"),
])
def test_parquet_of_another_data_set_is_named(tmp_path, arrays, columns, says):
    set_column(tmp_path, arrays, **columns)
    with pytest.raises(UserError, match=f"CIFAR-10 or other data, .* are {says}, not img and"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["train", "test", "meta"])
def test_a_pointer_of_git_lfs_in_a_folder_is_named(tmp_path, arrays, file):
    (write_python(tmp_path / OFFICIAL, arrays) / file).write_bytes(LFS)
    with pytest.raises(UserError, match=f"{file} is not a pickle of CIFAR-100, but a Git LFS"):
        load(tmp_path)


@pytest.mark.parametrize("cut, says", [
    (tar, "unexpected end of data"), (pack, "ended before"), (pack_zip, "not a zip file")])
def test_a_damaged_archive_shall_be_copied_again(tmp_path, arrays, cut, says):
    archive = cut(python_in(tmp_path, arrays), tmp_path / "cifar-100-python.tar")
    os.truncate(archive, archive.stat().st_size // 2)
    for path in (archive, tmp_path):
        with pytest.raises(UserError, match=f"{archive}: .*not a whole tar.*{says}.*do that again"):
            load(path)


def unpack_half(folder: Path, arrays: dict, lacks: str) -> None:
    """Write a folder as it is if unpacking was stopped."""
    if lacks == "half of test.bin":
        os.truncate(write_binary(folder / "cifar-100-binary", arrays) / "test.bin", 9999)
        return
    write_python(folder / OFFICIAL, arrays)
    if lacks == "half of train":
        os.truncate(folder / OFFICIAL / "train", 99_999)
    else:
        for name in lacks.split():
            (folder / OFFICIAL / name).unlink()


@pytest.mark.parametrize("lacks", ["meta", "test meta", "train", "half of train",
                                   "half of test.bin"])
@pytest.mark.parametrize("name", ["cifar-100-python.tar.gz", "mine.zip"])
def test_a_half_unpacked_folder_gives_way_to_a_whole_archive(tmp_path, arrays, caplog, lacks, name):
    unpack_half(tmp_path, arrays, lacks)
    with pytest.raises(UserError, match=str(tmp_path)):
        load(tmp_path)
    (pack_zip if name == "mine.zip" else pack)(python_in(tmp_path, arrays), tmp_path / name)
    with caplog.at_level("INFO"):
        dataset = load(tmp_path)
    assert holds(dataset, arrays) and name in dataset.source
    assert [line for line in caplog.messages if "passed over" in line and str(tmp_path) in line]


def test_of_several_the_python_version_is_read_first_and_folders_before_archives(tmp_path, arrays):
    """What is read stays the same, whatever else is put beside it."""
    away = python_in(tmp_path, arrays)
    steps = (
        (lambda: write_hdf5(tmp_path / "a.h5", arrays), "a.h5"),
        (lambda: write_parquet(tmp_path / "a", arrays), "a (Parquet"),
        (lambda: pack(write_binary(tmp_path.parent / "away" / "x", arrays),
                      tmp_path / "cifar-100-binary.tar.gz"), "binary.tar.gz"),
        (lambda: pack_zip(away, tmp_path / "z.zip"), "z.zip"),
        (lambda: pack(away, tmp_path / "cifar-100-python.tar.gz"), "python.tar.gz"),
        (lambda: write_binary(tmp_path / "cifar-100-binary", arrays), "cifar-100-binary (binary"),
        (lambda: write_python(tmp_path / "b", arrays), "b (python"),
        (lambda: write_python(tmp_path / OFFICIAL, arrays), f"{OFFICIAL} (python"),
        (lambda: write_python(tmp_path, arrays), f"{tmp_path} (python"),
    )
    for write, source in steps:
        write()
        assert source in load(tmp_path).source


def test_a_mistake_in_the_users_own_files_is_not_passed_over(tmp_path, arrays):
    """Else a run would silently be on the official images."""
    pack(python_in(tmp_path, arrays), tmp_path / "cifar-100-python.tar.gz")
    meta = {"fine_label_names": NAMES[:99]}
    (write_python(tmp_path / "noisy", arrays) / "meta").write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match="noisy: does not hold 100 class names"):
        data.load("cifar100", tmp_path)


def as_bytes(value):
    """Return what the data set's page reads by encoding="bytes"."""
    if isinstance(value, dict):
        return {key.encode(): as_bytes(part) for key, part in value.items()}
    if isinstance(value, list):
        return list(map(as_bytes, value))
    return value.encode() if isinstance(value, str) else value


def test_pickles_made_again_read_equal(tmp_path, arrays):
    """By each protocol, with keys and names of bytes, and with arrays of each form."""
    forms = {
        "list": np.ndarray.tolist, "scalars": list, "tuple": lambda labels: tuple(labels.tolist()),
        **{kind: lambda labels, kind=kind: labels.astype(kind)
           for kind in ("i8", "i4", "u1", "i2", ">i8", ">u4", "u8", "i1")},
        "column": lambda labels: labels[:, None], "scalars of int32": lambda labels: list(
            labels.astype(np.int32)), "strided": lambda labels: np.repeat(labels, 2)[::2],
    }
    images_as = {
        "rows": lambda images: images.reshape(len(images), -1),
        "Fortran's order": lambda images: np.asfortranarray(images.reshape(len(images), -1)),
        "channels first": lambda images: images,
        "channels last": lambda images: np.ascontiguousarray(images.transpose(0, 2, 3, 1)),
        "a view": lambda images: images.transpose(0, 2, 3, 1),
        "every second": lambda images: np.repeat(images, 2, axis=0)[::2],
    }
    meta = {"fine_label_names": NAMES, "coarse_label_names": ["all"]}
    for protocol in range(2, 6):
        cases = [(form, "rows") for form in forms] + [("i8", form) for form in images_as]
        for labels_form, images_form in cases:
            for encode in (as_bytes, lambda value: value):
                for split, (images, labels) in arrays.items():
                    content = {"data": images_as[images_form](images),
                               "fine_labels": forms[labels_form](labels),
                               "filenames": [f"{split}.png"] * len(labels)}
                    (tmp_path / split).write_bytes(pickle.dumps(encode(content), protocol))
                (tmp_path / "meta").write_bytes(pickle.dumps(encode(meta), protocol))
                dataset = load(tmp_path)
                assert holds(dataset, arrays), (protocol, labels_form, images_form)
                assert dataset.class_names == tuple(NAMES)


def pickled(data=None, fine_labels=(1, 2)) -> dict:
    """Return what a pickle holds, two black images if nothing else is given."""
    return {"data": np.zeros((2, 3072), "u1") if data is None else data,
            "fine_labels": fine_labels}


@pytest.mark.parametrize("names, says", [
    (5, "not iterable"), (NAMES[:99], "does not hold 100 class names"),
    ([1] * 100, "does not hold 100 class names"), ([b"\xff"] * 100, "decode byte"),
])
def test_class_names_must_be_100_texts(tmp_path, arrays, names, says):
    meta = write_python(tmp_path, arrays) / "meta"
    meta.write_bytes(pickle.dumps({"fine_label_names": names}))
    with pytest.raises(UserError, match=f"^{tmp_path}: .*{says}"):
        load(tmp_path)


@pytest.mark.parametrize("content, says", [
    (pickled(np.zeros((2, 3072), "i4")), "the images are no array of uint8"),
    (pickled(np.zeros((2, 3072))), "an array of 'f8', not of integers"),
    (pickled([[0] * 3072] * 2), "the images are no array of uint8"),
    (pickled(np.zeros((2, 32, 3, 32), "u1")), "images must be a uint8 tensor"),
    (pickled(np.zeros((2, 3073), "u1")), "cannot reshape"),
    (pickled(fine_labels=[1.0, 2.0]), "labels are no list of 10,000 whole numbers or fewer"),
    (pickled(fine_labels=[1, None]), "labels are no list of 10,000 whole numbers or fewer"),
    (pickled(fine_labels=np.ones(2)), "an array of 'f8', not of integers"),
    (pickled(fine_labels=np.array([1, None])), "an array of 'O8', not of integers"),
    (pickled(fine_labels=np.array(["1", "2"])), "an array of 'U1', not of integers"),
    (pickled(fine_labels={1, 2}), "refused, for it holds a set"),
    (pickled(fine_labels="ab"), "the labels are no list"),
    (pickled(fine_labels=np.eye(100, dtype=int)[:2]), "labels must be an int64"),
    (pickled(fine_labels=np.zeros(50_001, "i8")), "labels are no list of 10,000 whole numbers or"),
    ({"data": np.zeros((2, 3072), "u1"), "labels": [1, 2]}, "it holds data, labels, not data, f"),
    ([1, 2], "it holds no dict"),
])
@pytest.mark.parametrize("protocol", [4, 5])
def test_a_pickle_that_is_not_cifar_100_is_refused_and_says_why(
        tmp_path, arrays, content, says, protocol):
    (write_python(tmp_path, arrays) / "test").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(UserError, match=f"^{tmp_path}.*: test .*{says}"):
        load(tmp_path)


@needs_data
@pytest.mark.slow
def test_the_real_set_is_equal_in_every_format(tmp_path):
    """To the byte, and within a minute each."""
    (archive,) = (SHARED / "cifar100").glob("*.tar.gz")
    real = load(archive)
    arrays = {"train": tuple(tensor.numpy() for tensor in real.train),
              "test": tuple(tensor.numpy() for tensor in real.test)}
    folder = tmp_path / OFFICIAL
    folder.mkdir()
    for name, content in read_archive(archive).items():
        (folder / name).write_bytes(content)
    for name, write in (("a.tar", tar), ("b.zip", kaggle_zip), ("c", write_parquet)):
        path = tmp_path / name
        write(path, arrays) if name == "c" else write(folder, path)
        start = time.monotonic()
        dataset = load(path)
        assert time.monotonic() - start < 60
        assert holds(dataset, arrays), name
        assert dataset.class_names == real.class_names
        assert data.hold_out(dataset, 0).checksum == data.hold_out(real, 0).checksum
        if path.is_file():
            path.unlink()
