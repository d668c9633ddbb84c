"""Read CIFAR-100's files out of a folder or an archive, and say what other files are."""

import functools
import gzip
import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import IO

from cifar100.unpickle import SIZE_LIMIT
from utils import DamagedFile, guard, one_line

PYTHON_FILES = ("train", "test", "meta")
BINARY_FILES = ("train.bin", "test.bin", "fine_label_names.txt")
VERSIONS = {"python": PYTHON_FILES, "binary": BINARY_FILES}
CIFAR_10_FILES = ("data_batch_", "test_batch")  # how the names of these begin
MOST_FILES = 10_000  # in an archive
NOT_WHOLE = "not an HDF5 file, and not a whole tar archive or zip"
DIRECTORY_LIMIT = 16 * 2**20  # bytes of a zip's list of files, which costs 15 times as much memory
# What files are by their first bytes.
KINDS = {
    b"version https://git-lfs": "a Git LFS pointer in place of the file (git lfs pull fetches it)",
    b"<": "an HTML page", b"\x89PNG": "a picture", b"\xff\xd8": "a picture", b"\x80": "a pickle",
    b"MATLAB": "a MATLAB file", b"PAR1": "a Parquet file", b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7z archive", b"\xfd7zXZ": "an xz archive", b"BZh": "a bzip2 archive",
}


def version_of(path: Path, names: Collection[str]) -> str:
    """Return which version of CIFAR-100 such files are; raises DamagedFile, which names them."""
    lacks = {version: [file for file in files if file not in names]
             for version, files in VERSIONS.items()}
    version = min(lacks, key=lambda version: len(lacks[version]))
    if not lacks[version]:
        return version
    if len(lacks[version]) < len(VERSIONS[version]):
        raise DamagedFile(f"{path}: not a whole CIFAR-100, it lacks {', '.join(lacks[version])}")
    if any(name.startswith(CIFAR_10_FILES) for name in names):
        raise DamagedFile(f"{path}: holds CIFAR-10, not CIFAR-100")
    if "train.mat" in names:
        raise DamagedFile(f"{path}: holds CIFAR-100 for MATLAB, not the python or binary version")
    if packed := [name for name in names if name.endswith((".tar", ".tgz", ".gz", ".zip"))]:
        raise DamagedFile(f"{path}: holds {listed(packed)}, to be unpacked first")
    raise DamagedFile(f"{path}: holds {listed(names)}, none of it CIFAR-100")


def listed(names: Iterable[str]) -> str:
    """Return the first names as a text, and how many there are more."""
    names = sorted(names)
    shown = one_line(", ".join(names[:3]))[:100] or "nothing"
    return shown + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def describe(content: bytes) -> str:
    """Say what a file is by its first bytes."""
    start = content[:512].lstrip(b"\xef\xbb\xbf \r\n\t")
    for magic, kind in KINDS.items():
        if start.startswith(magic):
            return kind
    text = one_line(start[:60].decode("ascii", "replace"))[:40]
    is_text = text.isprintable() and text.isascii()
    return "an empty file" if not text else f"a text, {text!r}" if is_text else "another file"


def read_folder(path: Path) -> dict[str, bytes]:
    """Return the files of one version; raises DamagedFile if neither is whole."""
    names = [file.name for file in path.iterdir() if file.is_file()]
    files = [path / name for name in VERSIONS[version_of(path, names)]]
    if sum(file.stat().st_size for file in files) > SIZE_LIMIT:
        raise DamagedFile(f"{path}: holds files larger than any of CIFAR-100")
    return {file.name: file.read_bytes() for file in files}


def read_archive(path: Path) -> dict[str, bytes]:
    """Return CIFAR-100's files in a .zip or .tar, gzipped or not; none is written to the disk."""
    folders: dict[str, dict[str, bytes]] = {}
    names, left = set(), SIZE_LIMIT
    with (open(path, "rb") as file,
          guard(f"{path}: {NOT_WHOLE}", Exception,
                "; if it was copied or downloaded by hand, do that again", kind=DamagedFile)):
        is_zip = file.peek(2).startswith(b"PK")
        entries = _zip_entries(path) if is_zip else _tar_entries(path, file)
        for count, (entry, size, source) in enumerate(entries):
            folder, _, name = entry.replace("\\", "/").rpartition("/")
            names.add(name or folder)
            if count == MOST_FILES:
                raise DamagedFile(f"{path}: holds {listed(names)}, which is not CIFAR-100")
            if name in PYTHON_FILES + BINARY_FILES and source:
                left -= size
                if left < 0:
                    raise DamagedFile(f"{path}: unpacks to more than all of CIFAR-100")
                buffer = io.BytesIO()
                shutil.copyfileobj(source(), buffer, 2**20)
                folders.setdefault(folder, {})[name] = buffer.getvalue()
    # Of several folders the fullest, and the python version before the binary one.
    members = max(folders.values(), key=lambda files: (len(files), "train" in files), default={})
    version = version_of(path, members or names.difference(PYTHON_FILES, BINARY_FILES))
    return {name: members[name] for name in VERSIONS[version]}


# Of a member the name with its folders, the size in bytes, and how to open it if it is a file.
Entry = tuple[str, int, Callable[[], IO[bytes]] | None]


def _tar_entries(path: Path, file: IO[bytes]) -> Iterator[Entry]:
    if file.peek(2).startswith(b"\x1f\x8b"):
        file = gzip.GzipFile(fileobj=file)
    head = file.read(tarfile.BLOCKSIZE)
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise DamagedFile(f"{path}: {NOT_WHOLE}, but {describe(head)}") from None
    file.seek(0)
    with tarfile.open(fileobj=_Limited(path, file), mode="r|", bufsize=2**20) as archive:
        for member in archive:
            is_file = member.isfile() and not member.issparse()
            open_member = functools.partial(archive.extractfile, member) if is_file else None
            yield member.name, member.size, open_member
    while file.read(2**20):  # to its end, where gzip has a checksum
        pass


class _Limited:
    """A file that is read from its start to SIZE_LIMIT at most."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.path, self.file, self.left = path, file, SIZE_LIMIT

    def read(self, count: int) -> bytes:
        content = self.file.read(count)
        self.left -= len(content)
        if self.left < 0:
            raise DamagedFile(f"{self.path}: unpacks to more than all of CIFAR-100")
        return content


def _zip_entries(path: Path) -> Iterator[Entry]:
    with zipfile.ZipFile(_InPieces(io.FileIO(path))) as archive:
        for entry in archive.infolist():
            # Others are unpacked without a limit.
            is_read = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if not is_read or entry.flag_bits & 1:
                raise DamagedFile(f"{path}: is encrypted or compressed in an unusual way; give the "
                                  "folder that it unpacks to")
            yield entry.filename, entry.file_size, functools.partial(archive.open, entry)


class _InPieces(io.BufferedReader):
    """A file of which one read returns a part: zipfile reads a list of all files at once."""

    def read(self, count: int | None = -1) -> bytes:
        return super().read(count if 0 <= count < DIRECTORY_LIMIT else DIRECTORY_LIMIT)
