"""Find CIFAR-100's files, read them out of a folder or an archive, and say what others are."""

import functools
import gzip
import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from cifar100.unpickle import SIZE_LIMIT
from utils import DamagedFile, UserError, guard, one_line

PYTHON_FILES = ("train", "test", "meta")
BINARY_FILES = ("train.bin", "test.bin", "fine_label_names.txt")
PARQUET_FILES = ("train*.parquet", "train/*.parquet", "test*.parquet", "test/*.parquet")
ARCHIVES = ["*.tar", "*.tgz", "*.gz", "*.zip", "*.TAR", "*.TGZ", "*.GZ", "*.ZIP"]
HDF5 = ["*.h5", "*.hdf5", "*.hdf", "*.H5", "*.HDF5", "*.HDF"]
CIFAR_10_FILES = ("data_batch_", "test_batch")  # how the names of these begin
# Where files of CIFAR-100 lie in --data-dir, the likeliest first.
PLACES = (
    [place + name for place in ("", "*/") for name in PYTHON_FILES],
    [place + name for place in ("", "*/") for name in BINARY_FILES],
    ARCHIVES,
    [place + name for place in ("", "*/", "*/*/", "snapshots/*/*/") for name in PARQUET_FILES],
    HDF5,
    ["*/*/" + name for name in PYTHON_FILES + BINARY_FILES],
    # Other data sets, and files that only their names call CIFAR.
    ["data_batch_1*", "*/data_batch_1*", "train.mat", "*/train.mat",
     "*cifar*", "*Cifar*", "*CIFAR*"],
)
MOST_FILES = 10_000  # in an archive
PIECE = 16 * 2**20  # bytes read at once: a zip's list of files costs 15 times as much memory
# What files are by their first bytes.
KINDS = {
    b"version https://git-lfs": "a Git LFS pointer in place of the file (git lfs pull fetches it)",
    b"<": "an HTML page", b"\x80": "a pickle or a part of one", b"PAR1": "a Parquet file",
    b"Rar!": "a RAR archive", b"7z\xbc\xaf": "a 7z archive", b"\xfd7zXZ": "an xz archive",
    b"BZh": "a bzip2 archive",
}


def candidates(data_dir: Path) -> Iterator[Path]:
    """Yield the folders and files that may hold CIFAR-100, the likeliest first."""
    if data_dir.is_file():
        yield _whole(data_dir)
        return
    if not data_dir.exists() and any(map(data_dir.match, [*ARCHIVES, *HDF5, "*.parquet"])):
        raise UserError(f"--data-dir {data_dir}: no such file")
    for patterns in PLACES:
        found = {_whole(path) for pattern in patterns for path in data_dir.glob(pattern)
                 if path.is_file() and not path.name.startswith(".")}
        yield from sorted(found, key=lambda path: (
            len(path.parts), "binary" in path.name, "cifar-100" not in path.name, path))


def _whole(file: Path) -> Path:
    """Return the folder whose files are read together with this one, or else the file itself."""
    if file.suffix == ".parquet":
        return file.parents[1 if file.parent.name in ("train", "test") else 0]
    is_part = file.name in PYTHON_FILES + BINARY_FILES or file.suffix == ".mat"
    return file.parent if is_part or file.name.startswith(CIFAR_10_FILES) else file


def version_of(path: Path, names: Collection[str]) -> tuple[str, ...]:
    """Return the names of a whole version's files; raises DamagedFile, which says what is there."""
    version = min(PYTHON_FILES, BINARY_FILES, key=lambda files: len(set(files).difference(names)))
    lacks = [name for name in version if name not in names]
    if not lacks:
        return version
    if len(lacks) < len(version):
        raise DamagedFile(f"{path}: not a whole CIFAR-100, it lacks {', '.join(lacks)}")
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


def read_members(path: Path) -> dict[str, bytes]:
    """Return the files of one version; raises DamagedFile if neither is whole."""
    if path.is_file():
        return read_archive(path)
    names = [file.name for file in path.iterdir() if file.is_file()]
    files = [path / name for name in version_of(path, names)]
    if sum(file.stat().st_size for file in files) > SIZE_LIMIT:
        raise DamagedFile(f"{path}: holds more than all of CIFAR-100")
    return {file.name: file.read_bytes() for file in files}


def read_archive(path: Path) -> dict[str, bytes]:
    """Return CIFAR-100's files in a .zip or .tar, gzipped or not; none is written to the disk."""
    folders: dict[str, dict[str, bytes]] = {}
    names, left = [], SIZE_LIMIT
    with (_Limited(io.FileIO(str(path))) as file,
          guard(f"{path}: not an HDF5 file, and not a whole tar archive or zip", Exception,
                "; if it was copied or downloaded by hand, do that again", kind=DamagedFile)):
        entries = (_zip_entries if file.peek().startswith(b"PK") else _tar_entries)(file)
        for entry, size, open_entry in entries:
            folder, _, name = entry.replace("\\", "/").rpartition("/")
            names.append(name or folder)
            is_wanted = open_entry and name in PYTHON_FILES + BINARY_FILES
            left -= size if is_wanted else 0
            if left < 0 or len(names) > MOST_FILES:
                raise DamagedFile(f"{path}: holds more than all of CIFAR-100: {listed(names)}")
            if is_wanted:
                buffer = io.BytesIO()
                shutil.copyfileobj(open_entry(), buffer, 2**20)
                folders.setdefault(folder, {})[name] = buffer.getvalue()
    # Of several folders the fullest, and the python version before the binary one.
    members = max(folders.values(), key=lambda files: (len(files), "train" in files), default={})
    version = version_of(path, members or set(names).difference(PYTHON_FILES, BINARY_FILES))
    return {name: members[name] for name in version}


class _Limited(io.BufferedReader):
    """A file of which little is read at once, and no more in all than CIFAR-100 has."""

    left = SIZE_LIMIT

    def read(self, count: int = -1) -> bytes:
        content = super().read(count if 0 <= count < PIECE else PIECE)
        self.left -= len(content)
        if self.left < 0:
            raise DamagedFile(f"{self.name}: holds more than all of CIFAR-100")
        return content


def _tar_entries(file: _Limited) -> Iterator[tuple[str, int, Callable | None]]:
    """Yield the name, the size in bytes and what opens it, if it is a file, of each member."""
    if file.peek().startswith(b"\x1f\x8b"):
        file = _Limited(gzip.GzipFile(file.name, fileobj=file))
    head = file.peek()[:tarfile.BLOCKSIZE]
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise DamagedFile(f"{file.name}: not an HDF5 file, tar archive or zip, but "
                          f"{describe(head)}") from None
    with tarfile.open(fileobj=file, mode="r|", bufsize=2**20) as archive:
        for member in archive:
            open_member = functools.partial(archive.extractfile, member)
            yield member.name, member.size, open_member if member.isfile() else None
    while file.read(2**20):  # to its end, where gzip has a checksum
        pass


def _zip_entries(file: _Limited) -> Iterator[tuple[str, int, Callable]]:
    """Yield what `_tar_entries` does, of a zip."""
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            # Others are unpacked without a limit, or need a password.
            is_plain = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if not is_plain or entry.flag_bits & 1:
                raise DamagedFile(f"{file.name}: is encrypted or compressed in an unusual way; "
                                  "give the folder that it unpacks to")
            yield entry.filename, entry.file_size, functools.partial(archive.open, entry)
