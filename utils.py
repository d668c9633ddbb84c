"""The log, errors with their exit statuses, and files: written whole, read safely, locked."""

import contextlib
import errno
import io
import logging
import os
import pickle
import signal
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

log = logging.getLogger("cifar100")

# Exit statuses. 3 means that another rank has ended. 75 is EX_TEMPFAIL of sysexits.h: nothing is
# lost, and the same command goes on.
FAILED, USER_ERROR, LEFT_ALONE, STOPPED = 1, 2, 3, 75
# Schedulers and the job files send these, beside Ctrl-C. Windows has no SIGUSR2.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR2") if hasattr(signal, name)]
# Advice that is right by hand and in a job, whose file passes --resume.
AGAIN = "the same command with --resume"
ELSEWHERE = "choose another output directory"


class UserError(Exception):
    """Reported in one line on stderr, without a traceback; `status` is the exit status."""

    def __init__(self, message: str, status: int = USER_ERROR):
        super().__init__(message)
        self.status = status


class DamagedFile(UserError):
    """A file that is damaged, or holds something else than expected."""


@contextlib.contextmanager
def guard(what: str, errors: type[Exception] | tuple, advice: str = "",
          status: int = USER_ERROR, kind: type[UserError] = UserError) -> Iterator[None]:
    """Raise a UserError, with "what (error)" and the advice, in place of these errors."""
    try:
        yield
    except UserError:
        raise
    except errors as error:
        reason = one_line(error)[:300] or type(error).__name__  # a MemoryError has no text
        raise kind(f"{what} ({reason}){advice}", status) from error


def one_line(text: object) -> str:
    """Return a text with all white space folded into single spaces."""
    return " ".join(str(text).split())


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory did not suffice; torch reports it in RuntimeErrors of several kinds."""
    text = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text


def user_path(text: str) -> Path:
    """Return the path that a user names; `~` and `~name` at its beginning are home directories."""
    return Path(os.path.expanduser(text))


def write_atomically(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write `path` whole or not at all, also in a power cut; keep the old file as `previous`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    # A rename is on the disk once its directory is, which some network file systems cannot sync.
    if os.name == "posix":
        directory = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.fsync(directory)
        os.close(directory)


def save_tensors(path: Path, content: dict, previous: Path | None = None) -> None:
    """Write a dict of tensors, numbers, strings, lists and dicts as `write_atomically` does."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer(), previous)


def plain(state: Any) -> Any:  # noqa: ANN401
    """Return a state with Python's numbers for NumPy's, which load_tensors would refuse."""
    if isinstance(state, np.generic):
        return state.item()
    if type(state) in (list, tuple):
        return type(state)(map(plain, state))
    return {name: plain(value) for name, value in state.items()} if type(state) is dict else state


def load_tensors(path: Path | str) -> dict:
    """Read a dict as `read_tensors` does; raises DamagedFile if it is another thing."""
    content = read_tensors(path)
    if not isinstance(content, dict):
        raise DamagedFile(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    return content


def read_tensors(path: Path | str) -> Any:  # noqa: ANN401
    """Read a .pt or .pth file onto the CPU without executing anything that it holds.

    Raises UserError if it cannot be read, and DamagedFile if it is not whole or not plain.
    """
    is_whole = False
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            is_whole = _verify_checksums(file)
            return torch.load(file, map_location="cpu", weights_only=True)
    # A damaged file can raise anything. An errno is about the disk, except EIO, of a bad sector.
    except Exception as error:
        if is_whole and is_out_of_memory(error):
            raise UserError(f"{path}: asks for more memory than there is") from error
        if isinstance(error, OSError) and error.errno not in (None, errno.EIO):
            raise UserError(f"{path}: cannot be read ({error.strerror.lower()})") from error
        reason = f"not a PyTorch file, or a damaged one ({type(error).__name__})"
        if is_whole and isinstance(error, pickle.UnpicklingError):
            reason = "refused, for it holds more than tensors and plain values, and could run code"
        raise DamagedFile(f"{path}: {reason}") from error


def _verify_checksums(file: io.BufferedReader) -> bool:
    """Verify the checksums of a zip file, which torch.load does not; return whether it is one.

    Raises BadZipFile. Files from before PyTorch 1.6 are no zip files and have no checksums.
    """
    if not file.peek(4).startswith(b"PK\x03\x04"):
        return False
    with zipfile.ZipFile(file) as archive:
        # torch.save never compresses. torch.load leaves the numbers of an entry that is marked as
        # a directory uninitialised, ignores the case of names, and takes the first of two.
        sound = {entry.filename.lower() for entry in archive.infolist()
                 if entry.compress_type == zipfile.ZIP_STORED and not entry.external_attr & 0x10}
        if len(sound) < len(archive.infolist()) or archive.testzip():
            raise zipfile.BadZipFile("not as torch.save wrote it")
    file.seek(0)
    return True


def try_lock(file: io.IOBase | int) -> bool:
    """Lock an open file until it is closed, also by a kill; return False if another has it."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        # Windows and some cluster file systems have no such locks.
        return not isinstance(error, BlockingIOError)
    return True
