"""What all other modules build on: errors, the command line, files, and the `Runtime`.

Files are written whole and read safely. A Runtime is the device, the precision and the processes.
"""

import argparse
import contextlib
import ctypes
import datetime
import errno
import io
import logging
import math
import os
import pickle
import pickletools
import platform
import re
import signal
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

log = logging.getLogger("cifar100")

# Exit statuses. 75 is EX_TEMPFAIL of sysexits.h: nothing is lost, and the same command goes on.
FAILED, USER_ERROR, LEFT_ALONE, STOPPED = 1, 2, 3, 75

# What schedulers and the job files send, beside Ctrl-C. Windows has no SIGUSR2.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR2") if hasattr(signal, name)]
# A rank with at least so many images has a batch norm of its own, Wu & He 2018, arXiv:1803.08494.
FEW_IMAGES = 32
# Right by hand and in a job, whose file passes --resume.
AGAIN = "the same command with --resume"
# How CUDA and its libraries name faults of the GPU or its driver; most others are of the program.
GPU_FAULTS = "launch failure|EXECUTION_FAILED|uncorrectable ECC"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class UserError(Exception):
    """Reported in one line on stderr, without a traceback; `status` is the exit status."""

    def __init__(self, message: str, status: int = USER_ERROR):
        super().__init__(message)
        self.status = status


class DamagedFile(UserError):
    """A file whose content is not whole, or not what its place asks for."""


class Refused(pickle.UnpicklingError):
    """A pickle asks for what no file of this project needs."""


@contextlib.contextmanager
def guard(what: str, errors: type[Exception] | tuple, advice: str = "",
          status: int = USER_ERROR) -> Iterator[None]:
    """Raise a UserError, "what (error)" and the advice, in place of such errors in the block."""
    try:
        yield
    except UserError:
        raise
    except errors as error:
        reason = one_line(error)[:300] or type(error).__name__  # a MemoryError says nothing
        raise UserError(f"{what} ({reason}){advice}", status) from error


def one_line(text: object) -> str:
    """Return a text with all white space folded into single spaces."""
    return " ".join(str(text).split())


def given(*flags: str) -> bool:
    """Return whether one of these flags stands on the command line."""
    return any(word.partition("=")[0] in flags for word in sys.argv)


def run_script(main: Callable[[], None]) -> None:
    """Call `main`, then exit: with status 0, or with one line on stderr and the error's status."""
    # File names can hold characters that stdout cannot show; stdout may be closed, or not a file.
    with contextlib.suppress(AttributeError, OSError):
        sys.stdout.reconfigure(errors="backslashreplace")
    # Four warnings of torch that need nothing done. In fp16 the first step may be skipped, which
    # looks like a wrong order of calls. Strides of 1x1 convolutions may differ in sides of length
    # one. The new name of broadcast_buffers is unknown to torch 2.10. And compiled code is a little
    # slower on Python 3.13.0.
    for message in ("Detected call of .lr_scheduler.step", "Grad strides do not match bucket view",
                    ".broadcast_buffers. is deprecated", "Guards may run slower on Python 3.13.0"):
        warnings.filterwarnings("ignore", message)
    # With --predict stdout holds the predictions alone, for a file or a pipe.
    stream = sys.stderr if given("--predict") else sys.stdout
    log.addHandler(logging.StreamHandler(stream))
    log.setLevel(logging.WARNING if process_rank() else logging.INFO)
    # A full disk under the log must not end the training.
    logging.raiseExceptions = False
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, _stop_before_first_step)
    message, status = "", 0
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        message, status = explain(error)
        if "--debug" in sys.argv:
            traceback.print_exc()
        # Each rank reports its own input errors. What stops all ranks is reported by rank 0.
        if process_rank() and isinstance(error, UserError) and status != USER_ERROR:
            message = ""
    if _in_group() and status in (0, STOPPED):
        # Wait until every rank is done, or has failed.
        with contextlib.suppress(RuntimeError):
            dist.all_reduce(torch.zeros(1))
    _exit_with(message, status)


def explain(error: BaseException) -> tuple[str, int]:
    """Return the line and the exit status for `error`; raises it if it is a fault of the code."""
    if isinstance(error, UserError):
        return one_line(error), error.status
    trains = not given("--eval-only", "--predict")
    smaller = ": try a smaller --batch-size" if trains else ""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory{smaller or ': try --device cpu'}", USER_ERROR
    if is_out_of_memory(error):
        return f"out of memory{smaller}", USER_ERROR
    # One line of it: the others are torch's advice to programmers.
    if failure := re.match(f"(CUDA|cuDNN) error.*({GPU_FAULTS}).*", str(error)):
        again = f"; {AGAIN} goes on" if trains else ""
        return f"the GPU failed ({failure[0]}){again}", FAILED
    if isinstance(error, OSError):
        return f"cannot go on: {error}", FAILED
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
        return "batch norm cannot train on one image: try another --batch-size", USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile failed ({one_line(error)[:200]}); leave it out", USER_ERROR
    if not _in_group():
        raise error
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        # The cause stands at the end of NCCL's message.
        return f"another rank has ended ({one_line(error)[-200:]})", LEFT_ALONE
    # The interpreter's own end could wait forever for kernels that are under way.
    traceback.print_exception(error)
    return "a fault of the program; its traceback stands above", FAILED


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory did not suffice; torch says so in RuntimeErrors of several kinds."""
    text = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text


def _exit_with(message: str, status: int) -> NoReturn:
    # Ignore signals during shutdown: one would kill a finished run.
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)
    if message:
        rank = f" (rank {process_rank()})" if process_rank() else ""
        # The disk under stderr may be full; the status still counts.
        with contextlib.suppress(OSError):
            print(f"{Path(sys.argv[0]).name}{rank}: {message}", file=sys.stderr, flush=True)
    # torchrun turns any status but 0 into 1 and prints a traceback. It must do so only on the node
    # of the rank that failed: by that the job file tells an error from a lost node.
    if status in (STOPPED, LEFT_ALONE) and launched():
        status = 0
    try:
        # RuntimeError: a signal came while a line was being written. AttributeError: no stdout.
        with contextlib.suppress(RuntimeError, AttributeError):
            sys.stdout.flush()
    except OSError:
        # A full disk or a closed pipe, which the interpreter would report once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if _in_group():
        # gloo's threads sometimes abort during the interpreter's own shutdown.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _stop_before_first_step(signum: int, _frame: object) -> NoReturn:
    _exit_with(f"{signal.Signals(signum).name}: stopped before the first step; start the same "
               "command again", STOPPED)


def bounded(kind: type, minimum: float, maximum: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type: a finite `int` or `float` from `minimum` to `maximum`."""

    def convert(text: str) -> float:
        value = kind(text)
        if not minimum <= value <= maximum or value > sys.float_info.max:
            raise argparse.ArgumentTypeError(f"{text} is not between {minimum} and {maximum}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"  # for argparse's message
    return convert


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """100 columns wide; leaves examples as they are, and shows the defaults that say something."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=100)

    def _get_help_string(self, action: argparse.Action) -> str:
        is_silent = action.default is None or action.default is False
        return action.help if is_silent else super()._get_help_string(action)


MOST_OPCODES = 1_000_000  # in a pickle; the official training set has 0.4 million
MOST_TUPLES = 10_000  # in a pickle
# What a pickle of CIFAR-100 may call, with _codecs.encode, of which Python 3 makes bytes.
UINT8_GLOBALS = re.compile(r"numpy (dtype|ndarray)|numpy\._?core\.multiarray _reconstruct|"
                           r"_codecs encode")
SIZE_LIMIT = 256 * 2**20  # bytes, of a file and of all that it unpacks to; the official has 186 MB


def write_atomically(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write `path` whole or not at all, also across a power cut; raises OSError.

    With `previous`, the old content of `path` is kept under that name.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
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


def load_tensors(path: Path | str) -> dict:
    """Read a .pt or .pth file onto the CPU without executing anything that it holds.

    Raises UserError if it cannot be read, and DamagedFile if it is not whole or not a plain dict.
    """
    has_checksums = False
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            has_checksums = _verify_checksums(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
    # A damaged file can raise anything. An errno is about the disk, save EIO, of a bad sector.
    except Exception as error:
        if has_checksums and is_out_of_memory(error):
            raise UserError(f"{path}: asks for more memory than there is") from error
        if isinstance(error, OSError) and error.errno not in (None, errno.EIO):
            raise UserError(f"{path}: cannot be read ({error.strerror.lower()})") from error
        if has_checksums and isinstance(error, pickle.UnpicklingError):
            raise DamagedFile(f"{path}: refused, for it holds more than tensors, numbers, strings, "
                              "lists and dicts, and reading that could execute code") from error
        raise DamagedFile(f"{path}: not a PyTorch file, or a damaged one "
                          f"({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    return content


def _verify_checksums(file: io.BufferedReader) -> bool:
    """Verify the checksums of a zip file, which torch.load does not; return whether it is one.

    Raises BadZipFile. Files from before PyTorch 1.6 are no zip files and have no checksums.
    """
    if not file.peek(4).startswith(b"PK\x03\x04"):
        return False
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = {entry.filename.lower() for entry in entries}
        # torch.save never compresses. torch.load leaves the numbers of an entry that is marked as
        # a directory uninitialised, ignores the case of names, and takes the first of two.
        is_odd = any(entry.compress_type != zipfile.ZIP_STORED or entry.external_attr & 0x10
                     for entry in entries)
        if is_odd or len(names) < len(entries) or archive.testzip():
            raise zipfile.BadZipFile("not as torch.save wrote it")
    file.seek(0)
    return True


def _check_pickle(content: bytes) -> None:
    """Read through a pickle, before anything is built from it; raises Refused or ValueError.

    Unpicklers believe what they read: each byte can cost them an empty list, a memo index of 2^31
    costs 32 GB, and the hash of tuples nested a million deep overflows the stack.
    """
    tuples = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        tuples += "TUPLE" in opcode.name
        memo_index = int(argument) if "PUT" in opcode.name else 0
        if tuples > MOST_TUPLES or max(count, memo_index) > MOST_OPCODES:
            raise Refused("refused, for it is too large or too deeply nested")


class Uint8Array(np.ndarray):
    """A pickled array; as a plain one it could be given a dtype that reads bytes as pointers."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, _, fortran_order, content = state
        super().__setstate__((1, shape, np.dtype(np.uint8), fortran_order, content))


class Uint8Dtype:
    """Stands in for numpy.dtype: accepts uint8 alone, and ignores later changes."""

    def __init__(self, code: str, *_: object):
        if code not in ("u1", "|u1", "uint8"):
            raise Refused(f"refused, for it holds an array of {code!r}, not of uint8")

    def __setstate__(self, state: tuple) -> None:
        pass


class _Uint8Unpickler(pickle.Unpickler):
    encoded = 0  # bytes made so far: a short pickle could ask for the same ones many times

    def find_class(self, module: str, name: str) -> Callable:
        if not UINT8_GLOBALS.fullmatch(f"{module} {name}"):
            raise Refused(f"refused, for it asks for {module}.{name}")
        # numpy.ndarray is only ever an argument of _reconstruct, which is not looked at.
        return {"dtype": Uint8Dtype, "encode": self._encode,
                "_reconstruct": lambda *_: Uint8Array(0, np.uint8)}.get(name)

    def _encode(self, text: str, _encoding: str) -> bytes:
        self.encoded += len(text)
        if self.encoded > SIZE_LIMIT:
            raise Refused("refused, for it is larger than all of CIFAR-100")
        return text.encode("latin1")


def unpickle(content: bytes) -> dict:
    """Return a pickled dict of Uint8Arrays and plain containers whose keys are str.

    Strings of Python 2 are read as latin-1. Raises UnpicklingError, or for a damaged one anything.
    """
    _check_pickle(content)
    loaded = _Uint8Unpickler(io.BytesIO(content), encoding="latin1").load()
    return {k.decode() if isinstance(k, bytes) else k: value for k, value in loaded.items()}


def try_lock(file: Any) -> bool:  # noqa: ANN401, an open file or its descriptor
    """Lock an open file until it is closed, also by a kill; return False if another has it."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass  # Windows and some cluster file systems have no such locks
    return True


class Runtime(NamedTuple):
    """Where and how to compute, and this process's `rank` among the `ranks` of torchrun."""

    device: torch.device
    dtype: torch.dtype  # of the autocast operations; float32 switches autocast off
    compile: bool = False
    rank: int = 0
    ranks: int = 1

    @property
    def precision(self) -> str:
        """The name of `dtype` on the command line: fp32, bf16 or fp16."""
        return next(name for name, dtype in PRECISIONS.items() if dtype == self.dtype)

    def autocast(self) -> torch.autocast:
        """Return the context manager for the forward pass."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler, which does nothing unless the precision is fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def place(self, model: nn.Module, batch_size: int = 0) -> nn.Module:
        """Move `model` to the device, and compile it in place; its state_dict stays the same.

        Batch norm uses each rank's own images, if its share of `batch_size` is large enough.
        """
        # SyncBatchNorm, made in place, waits for the device three times a layer, so it is used
        # only if a rank has few images. The CPU does not have it.
        is_few = self.ranks > 1 and 0 < batch_size < FEW_IMAGES * self.ranks
        if self.device.type == "cuda" and is_few:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # Batch norms count their batches: on the host, without a kernel, unless compiled.
        counters = [(module, module.num_batches_tracked) for module in model.modules()
                    if hasattr(module, "num_batches_tracked")]
        model.to(self.device, memory_format=torch.channels_last)
        if self.compile:
            model.compile(dynamic=False)
        else:
            for module, counter in counters:
                module.num_batches_tracked = counter
        return model

    def reduce(self, values: torch.Tensor, operation: str = "SUM") -> torch.Tensor:
        """Return `values` reduced over the ranks, in float64 on the CPU; all ranks must call it."""
        values = values.cpu().double()
        if self.ranks > 1:
            dist.all_reduce(values, getattr(dist.ReduceOp, operation))
        return values

    def gather(self, value: Any) -> list:  # noqa: ANN401
        """Return the `value` of each rank; all ranks must call it."""
        values = [value] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:  # noqa: ANN401
        """Return the `value` of rank 0, for which the others wait."""
        values = [value]
        if self.ranks > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def __str__(self) -> str:
        name = str(self.device)
        if self.device.type == "cpu":
            name = f"CPU, {torch.get_num_threads()} threads"
        elif self.device.type == "cuda":
            name += f" ({torch.cuda.get_device_name(self.device)})"
        ranks = f"{self.ranks} x " if self.ranks > 1 else ""
        compiled = ", compiled" if self.compile else ""
        return f"{ranks}{name}, {str(self.dtype).removeprefix('torch.')}{compiled}"


def choose_runtime(device: str, precision: str, compile_model: bool) -> Runtime:
    """Set up this process for these flags and return its Runtime; raises UserError.

    CUDA then computes the same bits each time, so that a resumed run ends as it would have.
    """
    device = find_device(device)
    dtype = fastest_dtype(device) if precision == "auto" else PRECISIONS[precision]
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        # cuBLAS reads it when it starts; torch asks for it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # An operation without a deterministic kernel warns instead of failing. The compiler no
        # longer chooses the kernels of reductions by timing them.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_float32_matmul_precision("high")  # TF32, where the chip has it
    return Runtime(device, dtype, compile_model, *join_ranks(device))


def find_device(name: str) -> torch.device:
    """Return the device of this process that --device names; raises UserError if it is missing."""
    if name == "auto":
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if told:
            reason = one_line(told[0].message)
            log.info(f"note       the GPU is not used ({reason[:200]}){_remedy(reason)}")
    if name.startswith("cuda:") and launched():
        raise UserError(f"--device {name}: torchrun gives each process a GPU; say --device cuda")
    if name == "cuda" and launched():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            # First of all, or each process would take memory of the first GPU, too.
            torch.cuda.set_device(device)
        # This fails on a chip that this PyTorch does not support.
        torch.ones(1, device=device).sum().item()
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0][:200]
        remedy = _remedy(reason) or "; try --device cpu"
        raise UserError(f"--device {name}: is not available ({reason}){remedy}") from error


def _remedy(reason: str) -> str:
    """Return what to do if torch is too new for the GPU or its driver, else nothing."""
    if re.search("driver.* too old|no kernel image", reason):
        return "; install a torch for CUDA 12 (README.md, 'On a GPU'), or say --device cpu"
    return ""


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Return the precision that the chip computes fastest in, as far as torch can tell."""
    if device.type == "cuda":
        # The A100, of compute capability 8.0, was the first to compute in bf16.
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float16
    # torch 2.10 does not tell what the CPU can do.
    abilities = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    has_bf16 = abilities.get("avx512_bf16") or abilities.get("amx_bf16")
    return torch.bfloat16 if has_bf16 else torch.float32


def launched() -> bool:
    """Return whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def process_rank() -> int:
    """Return the rank of this process, also before there is a Runtime that knows it."""
    return int(os.environ["RANK"]) if launched() else 0


def join_ranks(device: torch.device) -> tuple[int, int]:
    """Join the other processes of torchrun; return (rank, ranks), which is (0, 1) without it."""
    if not launched():
        return 0, 1
    # torchrun itself leaves one thread to each process. This is Linux only.
    if device.type == "cpu" and hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    # gloo beside NCCL: what the hosts agree on does not wait for the devices. A node that is gone
    # is noticed after this time at the latest; torchrun notices at once when a process dies.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            timeout=datetime.timedelta(minutes=10))
    return dist.get_rank(), dist.get_world_size()


def _in_group() -> bool:
    return launched() and dist.is_initialized()


def keep_freed_memory() -> None:
    """Have glibc keep big blocks for reuse rather than return them to the system at every free.

    At 224 x 224 the page faults cost as much as the convolutions. See mallopt(3).
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes


def peak_memory(device: torch.device) -> float:
    """Return the peak memory in GB, allocated on CUDA, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes: macOS counts them, others count KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
