"""The engine that both training scripts share.

In this order: errors and exit status, flags, device, precision and ranks, the `Run` (all that a
killed run needs to go on, and all that it writes), its log lines, and the two loops,
`train_one_epoch` and `evaluate`; last, what people look at: predictions, reports and pictures. What
belongs to one recipe alone stands in its script.
"""

import argparse
import contextlib
import csv
import ctypes
import datetime
import errno
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from models import USER_ERROR, DamagedFile, UserError, load_tensors, save_tensors, write_atomically

log = logging.getLogger("cifar100")

LAUNCHED = dist.is_available() and dist.is_torchelastic_launched()  # by torchrun
RANK = int(os.environ["RANK"]) if LAUNCHED else 0  # of this process
STARTED = time.monotonic()  # seconds; of this process, as near as a module can tell
CHECK_EVERY = 25  # steps between looks at the loss on the host; each costs one synchronisation
SHORTEST_SAVE = 10  # seconds; no save is taken to last less
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR2")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
OUT_OF_TIME = 1000  # a reason to stop, beside the numbers of the signals
CHECKPOINTS = ("checkpoint.pt", "checkpoint-previous.pt")  # the newest, and the one before it
RUN_FILES = ("config.json", "metrics.csv", "times.csv", *CHECKPOINTS, "model.pt")
RUN_REPORTS = ("report.md", "curves.png")
TEST_REPORTS = ("test-report.md", "confusion.csv", "confusion.png", "mistakes.png")
COMPARISON = ("comparison.md", "comparison.png")
# Okabe & Ito's colours (2008), which the colour-blind can tell apart; markers do without any.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
MARKERS = "osD^vX"  # 6 and 5 have no common factor: 30 pairs
CALIBRATION_BINS = 15  # of equal width, as in Guo et al. 2017
TIMES = ("images_per_second", "seconds", "eta_seconds")  # what two equal runs differ in
# Settings that may differ between a run and its continuation, for they do not change its course.
FREE_SETTINGS = {"data_dir", "data_url", "no_download", "output_dir", "device", "weights", "debug"}
FREE_SETTINGS |= {"resume", "overwrite", "eval_only", "predict", "compare"}
FREE_SETTINGS |= {"max_minutes", "checkpoint_minutes", "compile"}
ENVIRONMENT = ("command", "runtime", "torch", "python", "system")  # in config.json
POSITION = ("epoch", "step", "seconds", "train_seconds", "history")  # of a Run, in its checkpoint

FAILED = 1  # an exit status, as USER_ERROR and STOPPED are
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is lost, and the same command goes on


def run_script(main: Callable[[], None]) -> None:
    """Call `main` and exit with the status of what it raises, after one line on stderr."""
    with contextlib.suppress(AttributeError, OSError):  # of a stdout that is closed, or no file
        sys.stdout.reconfigure(errors="backslashreplace")  # file names can hold anything
    # In fp16 the first step may overflow and be skipped; torch then takes the order to be wrong.
    warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")
    log.addHandler(logging.StreamHandler(sys.stdout))  # it flushes after every line
    log.setLevel(logging.WARNING if RANK else logging.INFO)
    logging.raiseExceptions = False  # a full disk under the log does not end the training
    for name in STOP_SIGNALS[1:]:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _stop_before_the_run)
    message, status = "", 0
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        message, status = explain(error)
        if "--debug" in sys.argv:
            traceback.print_exc()
        if RANK and isinstance(error, UserError) and status != USER_ERROR:
            message = ""  # it is of all ranks, and rank 0 tells
    if _in_group() and status in (0, STOPPED):  # wait for the others' end, or failure
        with contextlib.suppress(RuntimeError):
            dist.all_reduce(torch.zeros(1))
    _exit_with(message, status)


def explain(error: BaseException) -> tuple[str, int]:
    """Return the line and the exit status for `error`; raises it if it is a fault of the code."""
    if isinstance(error, UserError):
        return " ".join(str(error).split()), error.status
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory: try a smaller --batch-size", USER_ERROR
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "out of memory: try a smaller --batch-size", USER_ERROR
    if isinstance(error, OSError):
        return f"cannot go on: {error}", FAILED
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
        return "batch norm cannot train on one image: try another --batch-size", USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if _in_group() and (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return f"another rank has ended ({' '.join(str(error).split())[:200]})", FAILED
    raise error


def _exit_with(message: str, status: int) -> None:
    for name in STOP_SIGNALS[1:]:  # too late to stop: in the interpreter's end one would kill it
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if message:
        rank = f" (rank {RANK})" if RANK else ""
        with contextlib.suppress(OSError):  # a full disk under stderr; the status still counts
            print(f"{Path(sys.argv[0]).name}{rank}: {message}", file=sys.stderr, flush=True)
    if status == STOPPED and LAUNCHED:
        status = 0  # torchrun would make a 1 and a page of text of any other
    try:
        with contextlib.suppress(RuntimeError, AttributeError):  # in the midst of a line; no stdout
            sys.stdout.flush()
    except OSError:  # a full disk or a closed pipe, of which the interpreter would tell again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if _in_group():  # the interpreter's own end aborts now and then in gloo's threads
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _in_group() -> bool:
    return LAUNCHED and dist.is_initialized()


def _stop_before_the_run(number: int, _frame) -> None:
    name = signal.Signals(number).name
    _exit_with(f"{name}: stopped before the first step; start the same command again", STOPPED)


def number(kind: type, minimum: float, maximum: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type: a finite number from `minimum` to `maximum`."""

    def parse(text: str):
        value = kind(text)
        if not (minimum <= value <= maximum and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not within {minimum} and {maximum}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, as all others are."""

    def error(self, message: str):
        """Raise UserError instead of printing the usage and exiting."""
        raise UserError(f"{message} (--help lists the flags)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """100 columns, examples as they stand, and the defaults of the flags that have one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=100)

    def _get_help_string(self, action) -> str:
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def common_parser(docstring: str) -> tuple[argparse.ArgumentParser, argparse._ArgumentGroup]:
    """Return a parser with the flags of both scripts, and its group for those of a recipe.

    Each script sets its own defaults. `docstring` is a title and, below it, examples.
    """
    title, _, examples = docstring.partition("\n\n")
    parser = OneLineParser(
        description=title, epilog=examples, allow_abbrev=False, formatter_class=HelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=("cifar100", "synthetic"), default="cifar100",
        help="synthetic: made-up images of 100 classes, which need no file")
    add("--data-dir", default=os.environ.get("CIFAR100_DIR", "data"), metavar="PATH",
        help="where CIFAR-100 is or goes: a directory, or the archive or HDF5 file itself; by "
             "default $CIFAR100_DIR")
    add("--data-url", metavar="URL", help="a mirror of the official archive")
    add("--no-download", action="store_true", help="fail rather than download (offline nodes)")
    add("--val-size", type=number(int, 0), default=0, metavar="N",
        help="hold out N training images, the same number from each class, to choose settings by")
    recipe = parser.add_argument_group("recipe")
    _add_recipe_flags(recipe.add_argument)
    _add_output_flags(parser.add_argument_group("output"))
    _add_machine_flags(parser.add_argument_group("machine and job").add_argument)
    return parser, recipe


def _add_recipe_flags(add: Callable) -> None:
    add("--epochs", type=number(int, 1), metavar="N", help="passes over the training set")
    add("--max-steps", type=number(int, 1), metavar="N",
        help="end after N optimizer steps, and anneal the learning rate over these")
    add("--batch-size", type=number(int, 2), metavar="N", help="images per optimizer step")
    add("--lr", type=number(float, 1e-9), metavar="LR",
        help="peak learning rate (part 1: of the convolutions; the rest has its own)")
    add("--weight-decay", type=number(float, 0), metavar="WD",
        help="weight decay, as a fraction of the rate (part 1: of the convolutions)")
    add("--label-smoothing", type=number(float, 0, 1), metavar="P",
        help="probability spread over all classes, in the training loss")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N",
        help="of initial weights, order, augmentation and dropout")


def _add_output_flags(output) -> None:
    output.add_argument("--output-dir", type=Path, metavar="DIR",
        help="where the files of the run go")
    existing = output.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true",
        help="go on from the checkpoint in --output-dir, if there is one")
    existing.add_argument("--overwrite", action="store_true",
        help="replace the run that is in --output-dir")
    instead = output.add_mutually_exclusive_group()
    instead.add_argument("--eval-only", action="store_true",
        help="only test the model.pt in --output-dir, and write test-report.md and its pictures")
    instead.add_argument("--predict", nargs="+", type=Path, metavar="PICTURE",
        help="only classify pictures, or folders of them, with the model.pt in --output-dir")
    instead.add_argument("--compare", nargs="+", type=Path, metavar="RUN",
        help="only draw the curves of these output directories into one comparison.png, seeds as "
             "mean and band, and write comparison.md, both in --output-dir")
    output.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_machine_flags(add: Callable) -> None:
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16, or on CUDA else fp16, where the chip computes in it; fp32 otherwise")
    add("--compile", action=argparse.BooleanOptionalAction, default=None,
        help="torch.compile; by default on one CUDA GPU of compute capability 7.0 or more, if "
             "triton, a C compiler and Python's headers are found")
    add("--checkpoint-minutes", type=number(float, 0), default=10, metavar="M",
        help="save every M minutes within an epoch, and at its end")
    add("--max-minutes", type=number(float, 0.001), metavar="M",
        help="save and stop with exit status 75 before M minutes are over (batch jobs)")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; raises UserError if it does not fit what --output-dir holds."""
    args = parser.parse_args()
    if args.compare:
        return args
    check_output_dir(args)
    if args.eval_only or args.predict:  # as it was trained, unless the command says otherwise
        try:
            args = parser.parse_args([*_flags_of_model(args), *sys.argv[1:]])
        except UserError as error:
            raise UserError(f"{args.output_dir / 'config.json'}: {error}") from error
    return args


def _flags_of_model(args: argparse.Namespace) -> list[str]:
    """Return the flags that say how the model in --output-dir was trained, if config.json does.

    Raises UserError if the other script did.
    """
    try:
        config = json.loads((args.output_dir / "config.json").read_bytes())
        script, settings = config["script"], config["settings"]
        flags = {"--dataset": "dataset", "--image-size": "image_size"}
        flags = [f"{flag}={settings[name]}" for flag, name in flags.items() if name in settings]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    if script != Path(sys.argv[0]).stem:
        raise UserError(f"of a run of {script}.py; use that script")
    return flags


def check_output_dir(args: argparse.Namespace) -> None:
    """Raise UserError if --output-dir holds a run and nothing is said of it, or no run to go on."""
    path = args.output_dir
    try:
        held = [name for name in RUN_FILES if (path / name).exists()]
        if path.exists() and not path.is_dir():
            raise UserError(f"--output-dir {path}: is a file, not a directory")
    except OSError as error:
        raise UserError(f"--output-dir {path}: cannot be read ({error})") from error
    reads = args.eval_only or args.predict
    if reads and "model.pt" not in held:
        raise UserError(f"{path}: holds no model.pt; a run writes it at its end")
    lost = args.resume and "model.pt" in held and not set(CHECKPOINTS) & set(held)
    if held and not reads and (lost or not (args.resume or args.overwrite)):
        raise UserError(
            f"{path}: already holds a run ({', '.join(held)}); --overwrite replaces it, --resume "
            f"goes on {'if there is a checkpoint.pt' if lost else 'with it'}, --output-dir names "
            "another place"
        )


PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Runtime(NamedTuple):
    """Where and how to compute, and this process's `rank` among the `ranks` of torchrun."""

    device: torch.device
    dtype: torch.dtype  # of the autocast operations; float32 switches autocast off
    compile: bool
    memory_format: torch.memory_format
    rank: int = 0
    ranks: int = 1

    def autocast(self) -> torch.autocast:
        """Return the context manager for the forward pass and the loss."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler, which does nothing but for fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def place(self, model: nn.Module) -> nn.Module:
        """Move `model` to the device, and compile it in place; its state_dict stays the same."""
        model.to(self.device, memory_format=self.memory_format)
        if self.ranks > 1 and self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place; there is none for the CPU
        if self.compile:
            model.compile(dynamic=False)
        return model

    def reduce(self, values: torch.Tensor, operation: str = "SUM") -> torch.Tensor:
        """Return `values` reduced over the ranks, in float64 on the CPU; all ranks must call it."""
        values = values.cpu().double()
        if self.ranks > 1:
            dist.all_reduce(values, getattr(dist.ReduceOp, operation))
        return values

    def gather(self, value) -> list:
        """Return the `value` of each rank; all ranks must call it."""
        values = [value] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """Return the `value` of rank 0, for which the others wait."""
        values = [value]
        if self.ranks > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def __str__(self) -> str:
        cpu = self.device.type == "cpu"
        name = f"CPU, {torch.get_num_threads()} threads" if cpu else str(self.device)
        if self.device.type == "cuda":
            name += f" ({torch.cuda.get_device_name(self.device)})"
        name = f"{self.ranks} x {name}" if self.ranks > 1 else name
        return f"{name}, {str(self.dtype).removeprefix('torch.')}" + ", compiled" * self.compile


def choose_runtime(device: str, precision: str, compile_model: bool | None) -> Runtime:
    """Return the runtime for these flags; raises UserError if the machine lacks the device.

    This sets what holds for the whole process (threads, TF32, cuDNN's determinism, how memory is
    kept) and, under torchrun, joins the other processes.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and LAUNCHED:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(device)
        torch.ones(1, device=device).sum().item()  # a chip too old for this PyTorch fails here
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {device}: not to be had ({reason}); try --device cpu") from error
    # Compute capability: bf16 arithmetic from 8.0 on, fp16 from 5.3, tensor cores and Triton (which
    # torch.compile needs) from 7.0. A K20X has 3.5: fp32, uncompiled.
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if precision == "auto":
        bf16 = (device.type == "cpu" and cpu_computes_in_bf16()) or capability >= (8, 0)
        precision = "bf16" if bf16 else "fp16" if capability >= (5, 3) else "fp32"
    dtype = {name: dtype for dtype, name in PRECISIONS.items()}[precision]
    if compile_model is None:
        compile_model = capability >= (7, 0) and not LAUNCHED and can_compile()
    if device.type == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 where there is any
    torch.backends.cudnn.deterministic = True  # a resumed run computes the same bits
    plain = device.type == "cuda" and capability < (7, 0)
    memory_format = torch.contiguous_format if plain else torch.channels_last
    return Runtime(device, dtype, compile_model, memory_format, *join_ranks(device))


def can_compile() -> bool:
    """Return whether torch.compile finds what it needs on CUDA: triton, a C compiler, Python.h.

    The last two are sought as triton does.
    """
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    return bool(importlib.util.find_spec("triton") and any(map(shutil.which, compilers))
                and header.exists())


def cpu_computes_in_bf16() -> bool:
    """Return whether this CPU multiplies bf16 faster than fp32, as far as torch can tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def join_ranks(device: torch.device) -> tuple[int, int]:
    """Join the other processes of torchrun; return (rank, ranks), which is (0, 1) without it."""
    if not LAUNCHED:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif hasattr(os, "sched_getaffinity"):  # Linux; torchrun itself leaves one thread to each
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    # With gloo beside NCCL, what the hosts agree on does not wait for the devices. The others wait
    # for rank 0's download, which can take an hour; torchrun sees at once when a rank dies.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            timeout=datetime.timedelta(hours=3))
    return dist.get_rank(), dist.get_world_size()


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Have the other ranks wait until rank 0 has done what is in the block."""
    if _in_group() and RANK:
        dist.broadcast_object_list([None])
    yield
    if _in_group() and not RANK:
        dist.broadcast_object_list([None])


def keep_freed_memory() -> None:
    """Have glibc keep big blocks for reuse rather than return them to the system at every free.

    Each activation at 224 x 224 is such a block, and the page faults cost as much as the
    convolutions. The parameters are those of mallopt(3); elsewhere than on glibc nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes


def epoch_seed(seed: int, epoch: int) -> int:
    """Return 63 well-mixed bits that depend on (seed, epoch) alone."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0] >> 1)


def try_lock(file) -> bool:
    """Lock an open file until it is closed, also by a kill; return False if another has it.

    Where there are no such locks (Windows, some cluster file systems) nothing is held.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


class Metrics(NamedTuple):
    """Means over `images` images; accuracies are fractions of 1, and top5 is NaN in training."""

    loss: float
    accuracy: float
    top5: float
    images: int


class Run:
    """One training run: its position, its history, and the files in its output directory.

    `bar` is the course's test accuracy, in %. `parts` are the objects with a state_dict: model,
    optimizer, scheduler, scaler. `sizes` are the sides of the training images, epoch by epoch, in
    pixels; they serve to estimate the time left.
    """

    def __init__(self, args, bar: float, runtime: Runtime, dataset, steps_per_epoch: int,
                 total_steps: int, sizes: list[int], parts: dict):
        self.args = args
        self.bar = bar if dataset.name == "cifar100" else None
        self.settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        self.settings["precision"] = PRECISIONS[runtime.dtype]
        self.settings["compile"] = runtime.compile
        self.script = Path(sys.argv[0]).stem
        self.output_dir = args.output_dir
        self.runtime = runtime
        self.dataset = dataset.name
        self.checksum = dataset.checksum()
        self.parts = parts
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps
        self.epochs = -(-total_steps // steps_per_epoch)  # --max-steps may cut the last one short
        # The time to train, but for a factor; the exponent was measured: 1.4 to 1.7, not 2.
        self.epoch_costs = [size**1.6 for size in sizes[: self.epochs]]
        self.epoch_costs[-1] *= total_steps / steps_per_epoch - (self.epochs - 1)
        self.epoch = 0  # epochs that are finished
        self.step = 0  # optimizer steps done in the current epoch
        self.seconds = 0.0  # spent in the current epoch, evaluation included
        self.train_seconds = 0.0  # those of its training part, once that is done
        self.history: list[dict] = []
        self.sums = torch.zeros(3, device=runtime.device)  # of the epoch: loss, correct, images
        self.unsaved = False  # the last save failed
        self.stop_signal = 0
        self.network = parts["model"]  # what a training step calls
        if runtime.ranks > 1:
            self.network = DistributedDataParallel(self.network)
        # For --max-minutes: seconds at most so far, and whether this process has come any further.
        self.step_seconds, self.save_seconds, self.progressed = 0.0, SHORTEST_SAVE, False
        self._clock = self._saved = time.monotonic()

    def start(self) -> None:
        """Go on from the checkpoint if `--resume` finds one, else begin; catch stop signals."""
        for name in STOP_SIGNALS:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._on_signal)
        state = self.runtime.broadcast(None if self.runtime.rank else self._open())
        if self.runtime.rank and state:
            self._set_state(state)
        self._clock = self._saved = time.monotonic()

    def _open(self) -> dict | None:
        """Take possession of the output directory; return the state to go on from, if any."""
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.lock = (self.output_dir / ".lock").open("a")
            if not try_lock(self.lock):
                raise UserError(f"{self.output_dir}: another process is at work on this run")
            check_output_dir(self.args)  # again: loading the data took a while
            found = [self.output_dir / name for name in CHECKPOINTS]
            found = [path for path in found if path.exists()]
            if self.settings["resume"] and found:
                return self._resume(found)
            return self._begin()
        except OSError as error:
            raise UserError(f"{self.output_dir}: cannot be written ({error}); name another place "
                            "with --output-dir, or make room") from error

    def _begin(self) -> None:
        config = {"script": self.script, "dataset": self.dataset, "bar": self.bar,
                  "command": shlex.join(sys.argv), "runtime": str(self.runtime),
                  "torch": str(torch.__version__), "python": platform.python_version(),
                  "system": platform.platform(), "settings": self.settings}
        for name in (*RUN_FILES, *RUN_REPORTS, *TEST_REPORTS):
            (self.output_dir / name).unlink(missing_ok=True)
        write_text(self.output_dir / "config.json", json.dumps(config, indent=2) + "\n")

    def _on_signal(self, number: int, _frame) -> None:
        if number == signal.SIGINT == self.stop_signal:
            raise KeyboardInterrupt
        self.stop_signal = number

    def watch(self, batches: Iterable, what: str, start: int, end: int) -> Iterator:
        """Yield `batches`, the first of which is the epoch's batch `start`, up to batch `end`.

        Under a progress bar. Before each batch, save or stop if it is time to.
        """
        bar = tqdm(itertools.islice(batches, end - start), f"epoch {self.epoch + 1} {what}",
                   initial=start, total=end, leave=False, unit="batch",
                   disable=True if RANK else None)  # None: without a terminal
        with bar:
            for batch in bar:
                self._stop_or_save()
                began = time.monotonic()
                yield batch
                self.progressed |= what == "train"
                self.step_seconds = max(self.step_seconds, time.monotonic() - began)

    def _stop_or_save(self) -> None:
        """Stop if a rank has a reason to, or save if it is time to; the ranks agree on that."""
        now = time.monotonic()
        reason = self.stop_signal or OUT_OF_TIME * self._out_of_time(now)
        due = now - self._saved > 60 * self.settings["checkpoint_minutes"]
        reason, due = self.runtime.reduce(torch.tensor([reason, due]), "MAX").tolist()
        if reason == OUT_OF_TIME:
            self._stop(f"--max-minutes {self.settings['max_minutes']:g}")
        elif reason:
            self._stop(signal.Signals(int(reason)).name)
        elif due:
            self._save_or_warn()

    def _out_of_time(self, now: float) -> bool:
        """Return whether --max-minutes leaves no time for one more step and a slow save.

        One step, or one evaluation, is done at each start: a chain of jobs always comes to an end.
        """
        minutes = self.settings["max_minutes"]
        if not minutes or not self.progressed:
            return False
        return 60 * minutes - (now - STARTED) < self.step_seconds + 2 * self.save_seconds

    def _stop(self, reason: str) -> None:
        where = f"{reason}: stopped in epoch {self.epoch + 1} after {self.step} steps"
        newest = self.output_dir / CHECKPOINTS[0]
        try:
            self.save()
        except OSError as error:
            raise UserError(f"{where}, but not saved ({error}); make room, and the same command "
                            f"with --resume goes on from what {newest} holds, if it is there",
                            FAILED) from error
        raise UserError(f"{where}, saved in {newest}; the same command with --resume goes on",
                        STOPPED)

    def rank_seed(self) -> int:
        """Return what seeds the dropout of this epoch on this rank."""
        return epoch_seed(self.settings["seed"], self.epoch) + self.runtime.rank

    def check_finite(self) -> None:
        """Raise UserError if a loss of this epoch was NaN or infinite."""
        self._require_finite(self.runtime.reduce(self.sums)[0].item())

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            step = self.epoch * self.steps_per_epoch + self.step
            raise UserError(f"the loss was not finite by step {step}; start again with "
                            "--overwrite and a lower --lr, or --precision fp32", FAILED)

    def tick(self) -> float:
        """Add the time since the last call to the current epoch's, and return that in seconds."""
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        return self.seconds

    def end_epoch(self, results: dict[str, Metrics]) -> None:
        """Record the epoch, print its line, and save. `results` are by split, train first."""
        self.tick()
        self._require_finite(sum(metrics.loss for metrics in results.values()))
        lr = self.parts["optimizer"].param_groups[0]["lr"]  # what the next step would take
        trained = results["train"].images
        self.epoch += 1
        left = sum(self.epoch_costs[self.epoch :]) / self.epoch_costs[self.epoch - 1]
        row = {"dataset": self.dataset, "epoch": self.epoch, "epochs": self.epochs, "lr": lr}
        for split, metrics in results.items():
            row |= {f"{split}_loss": metrics.loss, f"{split}_acc": metrics.accuracy}
            if split != "train":
                row[f"{split}_top5"] = metrics.top5
        row |= {"images_per_second": trained / self.train_seconds, "seconds": self.seconds,
                "eta_seconds": self.train_seconds * left
                + (self.seconds - self.train_seconds) * (self.epochs - self.epoch)}
        self.history.append(row)
        self.step, self.seconds, self.train_seconds = 0, 0.0, 0.0
        self.sums.zero_()
        self.progressed = True
        self._save_or_warn()
        log.info(epoch_line(row))  # once saved, or a killed run would print it again

    def finish(self) -> None:
        """Write model.pt and the report, and print the last lines."""
        weights = self.parts["model"].state_dict()
        try:
            if self.runtime.broadcast(self.unsaved):
                self.save()
            if self.runtime.rank == 0:
                self._write_tables()  # a kill can have come between the checkpoint and its tables
                save_tensors(self.output_dir / "model.pt", {k: v.cpu() for k, v in weights.items()})
                try:
                    write_report([self.output_dir], self.output_dir, *RUN_REPORTS)
                except UserError as error:  # a lost config.json, say
                    log.info(f"warning    no report: {error}")
        except OSError as error:
            raise UserError(f"{self.output_dir}: not all is written ({error}); make room, and "
                            "the same command with --resume does what is left",
                            FAILED) from error
        log.info(f"peak memory {peak_memory(self.runtime.device):.2f} GB")
        log.info(files_line(self.output_dir, (*RUN_FILES, *RUN_REPORTS)))
        accuracy = self.history[-1]["test_acc"]
        log.info(f"final test accuracy {accuracy:.2%} ({verdict(accuracy, self.bar)})")

    def save(self) -> None:
        """Write checkpoint.pt and the tables.

        Raises OSError if there is no new checkpoint; then the newest old one is left.
        """
        began = time.monotonic()
        self.tick()
        self.check_finite()
        newest, previous = (self.output_dir / name for name in CHECKPOINTS)
        state = self.state_dict()
        self._saved, self.unsaved = began, True
        if self.runtime.rank == 0:
            try:
                save_tensors(newest, state, previous)
            except OSError as error:
                if error.errno not in NO_SPACE or not (newest.exists() and previous.exists()):
                    raise
                previous.unlink()  # there is room for two
                save_tensors(newest, state, previous)
            try:
                self._write_tables()
            except OSError as error:
                log.info(f"warning    tables not written ({error}); the next save tries again")
        self.unsaved = False
        self._saved = time.monotonic()
        self.save_seconds = max(self.save_seconds, self._saved - began)

    def _save_or_warn(self) -> None:
        try:
            self.save()
        except OSError as error:
            log.info(f"warning    not saved ({error}); training goes on, the next save tries again")

    def _write_tables(self) -> None:
        for name, of_time in (("metrics.csv", False), ("times.csv", True)):
            if not self.history:
                continue
            columns = [k for k in self.history[0] if k == "epoch" or (k in TIMES) == of_time]
            table = io.StringIO()
            writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                             for row in self.history)
            write_atomically(self.output_dir / name, table.getvalue().encode())

    def state_dict(self) -> dict:
        """Return all that a continuation needs: tensors, numbers, strings, lists and dicts."""
        cuda = self.runtime.device.type == "cuda"
        own = {
            "sums": self.sums.cpu(),
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.runtime.device) if cuda else None,
        }
        return {
            "script": self.script,
            "settings": self.settings,
            "torch": str(torch.__version__),
            "runtime": str(self.runtime),
            "data": self.checksum,
            "position": {name: getattr(self, name) for name in POSITION},
            "ranks": self.runtime.gather(own),
            **{name: part.state_dict() for name, part in self.parts.items()},
        }

    def _set_state(self, state: dict) -> None:
        fused = self.parts["optimizer"].param_groups[0]["fused"]  # of this device, not of the old
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for group in self.parts["optimizer"].param_groups:
            group["fused"] = fused
        for name in POSITION:
            setattr(self, name, state["position"][name])
        if len(state["ranks"]) != self.runtime.ranks:  # the sums still count, once
            total = sum(own["sums"] for own in state["ranks"])
            self.sums.copy_(total if self.runtime.rank == 0 else torch.zeros(3))
            torch.manual_seed(self.rank_seed())
            return
        own = state["ranks"][self.runtime.rank]
        self.sums.copy_(own["sums"])
        torch.set_rng_state(own["cpu_rng"])
        if own["cuda_rng"] is not None and self.runtime.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"], self.runtime.device)

    def _resume(self, paths: list[Path]) -> dict:
        """Go on from the first of `paths` that is whole; raises UserError if none is."""
        damaged = []
        for path in paths:
            try:
                state = self._restore(path)
            except DamagedFile as error:
                damaged.append(str(error))
                continue
            for line in damaged:
                log.info(f"warning    {line}; the checkpoint before it is used")
            if path.name != CHECKPOINTS[0]:  # or the next save would put a damaged one in its place
                os.replace(path, self.output_dir / CHECKPOINTS[0])
            last = f" (test acc {self.history[-1]['test_acc']:.2%})" if self.history else ""
            log.info(f"resume     after {self.epoch} epochs{last} and {self.step} steps ({path})")
            return state
        raise UserError(f"{'; '.join(damaged)}; --overwrite starts again")

    def _restore(self, path: Path) -> dict:
        state = load_tensors(path)
        try:
            self._check_settings(path, state["script"], state["settings"])
            if state["data"] != self.checksum:
                raise UserError(f"{path}: of a run on other images; --data-dir must hold the same")
            self._set_state(state)
            before = f"{state['runtime']}, torch {state['torch']}"
        except (UserError, OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # what is not a checkpoint can raise anything
            reason = f"not a whole checkpoint of this script ({' '.join(str(error).split())[:200]})"
            raise DamagedFile(f"{path}: {reason}") from error
        if before != f"{self.runtime}, torch {torch.__version__}":
            log.info(f"note       {path} comes from {before}: the end will not be the same bits")
        return state

    def _check_settings(self, path: Path, script: str, settings: dict) -> None:
        if script != self.script:
            raise UserError(f"{path}: written by {script}.py; name another --output-dir")
        changed = [
            f"--{name.replace('_', '-')} {value} (was {settings.get(name)})"
            for name, value in self.settings.items()
            if name not in FREE_SETTINGS and value != settings.get(name)
        ]
        if changed:
            raise UserError(f"{path}: cannot go on with other settings: {', '.join(changed)}; use "
                            "the old ones, or --overwrite, or another --output-dir")


def peak_memory(device: torch.device) -> float:
    """Return the most GB held so far: on CUDA on the device, elsewhere resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def print_header(runtime: Runtime, dataset, model: nn.Module, val_size: int) -> None:
    """Print what runs where on what; `dataset` is a data.Dataset."""
    parameters = sum(p.numel() for p in model.parameters())
    train_size = len(dataset.train.labels) - val_size
    held = f", {val_size:,} validation" if val_size else ""
    log.info(f"command    {shlex.join(['python', *sys.argv])}")
    log.info(f"device     {runtime}, torch {torch.__version__}")
    log.info(f"data       {dataset.name}: {train_size:,} training{held} and "
             f"{len(dataset.test.labels):,} test images, {dataset.source}")
    log.info(f"model      {type(model).__name__}, {parameters:,} parameters")


def epoch_line(row: dict) -> str:
    """Format one row of metrics.csv as the line for the log."""
    width = max(2, len(str(row["epochs"])))
    fields = [f"epoch {row['epoch']:{width}}/{row['epochs']}", f"lr {row['lr']:.4f}"]
    if row["dataset"] != "cifar100":
        fields.insert(0, f"[{row['dataset']}]")
    for split in ("train", "val", "test"):
        if f"{split}_loss" in row:
            field = f"{split} loss {row[f'{split}_loss']:.3f} acc {row[f'{split}_acc']:6.2%}"
            top5 = f" top5 {row[f'{split}_top5']:6.2%}" if split != "train" else ""
            fields.append(field + top5)
    fields += [f"{row['images_per_second']:.0f} img/s", f"{row['seconds']:.1f} s"]
    return "  ".join([*fields, f"eta {duration(row['eta_seconds'])}"])


def duration(seconds: float) -> str:
    """Format seconds as 41s, 4m41s or 1h04m."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def train_one_epoch(run: Run, batches: Iterable, label_smoothing: float) -> Metrics:
    """Train on what is left of the current epoch; return the means over the whole of it.

    `batches` yield float images (B, 3, H, W), int64 labels (B,) and a weight from step `run.step`
    on, see data.Batches.shuffled. The loss is cross entropy with label smoothing (Szegedy et al.
    2016, arXiv:1512.00567, section 7). Raises UserError if it stops being finite, or on a signal to
    stop.
    """
    model, optimizer, scheduler, scaler = (
        run.parts[name] for name in ("model", "optimizer", "scheduler", "scaler")
    )
    model.train()
    if run.step == 0:
        torch.manual_seed(run.rank_seed())
    end = min(run.steps_per_epoch, run.total_steps - run.epoch * run.steps_per_epoch)
    for images, labels, weight in run.watch(batches, "train", run.step, end):
        with run.runtime.autocast():
            logits = run.network(images)  # (B, classes)
            loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        scaler.scale(loss * weight).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        loss = loss.detach().float()
        correct = (logits.argmax(1) == labels).sum()
        count = torch.full_like(loss, len(labels))
        run.sums += torch.stack([loss * len(labels), correct, count]) * bool(weight)
        run.step += 1
        if run.step % CHECK_EVERY == 0:
            run.check_finite()
    run.check_finite()
    run.train_seconds = run.train_seconds or run.tick()
    if run.runtime.ranks > 1:
        for buffer in model.buffers():  # batch norm's, where it is not synchronised
            dist.broadcast(buffer, 0)
    loss_sum, correct, count = run.runtime.reduce(run.sums).tolist()
    return Metrics(loss_sum / count, correct / count, math.nan, int(count))


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable, runtime: Runtime) -> Metrics:
    """Return cross entropy, top-1 and top-5 accuracy over the batches of all ranks.

    In evaluation mode. The sums over each batch are added in float64, exactly in any order.
    """
    model.eval()
    sums = [torch.zeros(4, device=runtime.device)]  # loss, correct, correct in first 5, images
    for images, labels in batches:
        with runtime.autocast():
            logits = model(images)
        hits = logits.topk(5).indices == labels[:, None]  # (B, 5)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        count = torch.full_like(loss, len(labels))
        sums.append(torch.stack([loss, hits[:, 0].sum(), hits.sum(), count]))
    loss, correct, top5, count = runtime.reduce(torch.stack(sums)).sum(0).tolist()
    return Metrics(loss / count, correct / count, top5 / count, int(count))


@torch.inference_mode()
def compute_logits(model: nn.Module, batches, size: int, runtime: Runtime) -> torch.Tensor:
    """Return logits, float32 (N, classes), of the images of all ranks in their order, on the CPU.

    `batches` is a data.Batches, whose images are resized to `size` x `size` pixels.
    """
    model.eval()
    logits = []
    for images, _ in tqdm(batches.in_order(size), "test", -(-len(batches) // runtime.ranks),
                          leave=False, unit="batch", disable=True if RANK else None):
        with runtime.autocast():
            logits.append(model(images).float())
    ranks = runtime.gather([batch.cpu() for batch in logits])
    return torch.cat([batch for step in zip(*ranks, strict=True) for batch in step])


def print_predictions(logits: torch.Tensor, class_names: Sequence[str], files: list[Path]) -> None:
    """Print the five likeliest classes of each of N files, of logits (N, classes).

    Aligned on a terminal, elsewhere as CSV.
    """
    if RANK:
        return
    rows = [(str(file), rank, class_names[label], probability)
            for file, shares in zip(files, logits.softmax(1), strict=True)
            for rank, (probability, label) in enumerate(zip(*shares.topk(5), strict=True), 1)]
    text = io.StringIO()
    if sys.stdout and sys.stdout.isatty():
        width = max(len(name) for name, *_ in rows)
        for name, rank, label, probability in rows:
            text.write(f"{name if rank == 1 else '':{width}}  {label:13} {probability:6.1%}\n")
    else:
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("file", "rank", "class", "probability"))
        table.writerows((*row, f"{probability:.4f}") for *row, probability in rows)
    print(text.getvalue(), end="", flush=True)


def verdict(accuracy: float, bar: float | None) -> str:
    """Say whether a test accuracy, a fraction of 1, meets the course's bar, in %."""
    if bar is None:
        return "on synthetic images, so the course's bar does not apply"
    return f"the course's bar of {bar:.0f}% is {'met' if 100 * accuracy >= bar else 'not met'}"


def markdown_table(header: Sequence[str], rows: Iterable[Iterable]) -> str:
    """Return a table in Markdown, with an empty line after it."""
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def write_text(path: Path, text: str) -> None:
    """Write a text whole or not at all; raises OSError."""
    write_atomically(path, text.encode(errors="replace"))  # paths can hold any bytes


def write_picture(path: Path, caption: str, draw: Callable, *content) -> str:
    """Write what `draw(figure, *content)` makes of a matplotlib figure; return its Markdown.

    Where that fails, as without matplotlib, a line says so instead. Raises OSError.
    """
    png = io.BytesIO()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # or it tells of its font cache
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from matplotlib.figure import Figure

            figure = Figure(layout="constrained")
            draw(figure, *content)
            figure.savefig(png, format="png", dpi=150)
    except Exception as error:  # no picture is worth a run
        remedy = ": pip install 'matplotlib>=3.7'" * isinstance(error, ImportError)
        log.info(f"note       {path.name} is not drawn ({error}){remedy}")
        path.unlink(missing_ok=True)
        return ""
    write_atomically(path, png.getvalue())
    return f"{caption}\n\n![{path.stem}]({path.name})\n\n"


def files_line(directory: Path, names: Iterable[str]) -> str:
    """Return the log line that says which of these files there are."""
    there = [name for name in names if (directory / name).exists()]
    return f"files      {', '.join(there)} in {directory}"


def load_run(directory: Path) -> dict:
    """Return what config.json, metrics.csv and times.csv say of a run.

    "history" holds the numbers of each epoch, "row" the cells of its row in a report, "bar" the
    course's, in %, or None. Raises UserError if the directory holds no run with a finished epoch.
    """
    try:
        config = json.loads((directory / "config.json").read_text())
        tables = [csv.DictReader(io.StringIO((directory / name).read_text()))
                  for name in ("metrics.csv", "times.csv")]
        history = [{name: float(value) for name, value in (metrics | times).items()
                    if name != "dataset"} for metrics, times in zip(*tables, strict=False)]
        last, bar = history[-1], config.get("bar")
        rate = statistics.harmonic_mean([row["images_per_second"] for row in history])
        row = (directory, config["settings"]["seed"],
               f"{last['epoch']:.0f} of {last['epochs']:.0f}", f"{last['train_acc']:.2%}",
               f"{last['val_acc']:.2%}" if "val_acc" in last else "-", f"{last['test_acc']:.2%}",
               f"{last['test_top5']:.2%}", f"{last['test_loss']:.3f}",
               verdict(last["test_acc"], bar) if "bar" in config else "-",
               duration(sum(epoch["seconds"] for epoch in history)), f"{rate:.0f}")
        environment = {name: config[name] for name in ENVIRONMENT if name in config}
        return {"script": config["script"], "settings": dict(config["settings"]), "bar": bar,
                "environment": environment, "history": history, "row": row}
    except Exception as error:  # what is no run can raise anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{directory}: holds no run with a finished epoch ({reason})") from error


def group_runs(runs: list[dict]) -> dict[str, list[dict]]:
    """Group the runs that differ in nothing but the seed, under the settings that differ."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        of_script = [other["settings"] for other in runs if other["script"] == run["script"]]
        differing = [
            f"{name} {value}" for name, value in run["settings"].items()
            if name not in (FREE_SETTINGS - {"weights"}) | {"seed"}
            and any(other.get(name) != value for other in of_script)
        ]
        groups.setdefault(" ".join([run["script"], *differing]), []).append(run)
    return groups


def draw_curves(figure, groups: dict[str, list[dict]]) -> None:
    """Draw loss, accuracy and rate over the epochs; of each group's runs the mean and the range."""
    panels = dict(zip(("loss", "acc", "lr"), figure.subplots(1, 3), strict=True))
    looks = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS))
    for (label, runs), (colour, marker) in zip(groups.items(), looks, strict=False):
        epochs = min(len(run["history"]) for run in runs)  # some may still be running
        look = {"color": colour, "marker": marker, "markersize": 4, "markevery": -(-epochs // 10)}
        for name in runs[0]["history"][0]:
            split, _, quantity = name.rpartition("_")
            if quantity not in panels:
                continue
            curves = np.array([[row[name] for row in run["history"][:epochs]] for run in runs])
            curves *= 100 if quantity == "acc" else 1  # (runs, epochs)
            x = np.arange(1, epochs + 1)
            dashes = {"train": "--", "val": ":"}.get(split, "-")
            panels[quantity].plot(x, curves.mean(0), dashes, label=f"{label} {split}", **look)
            if len(runs) > 1:
                panels[quantity].fill_between(x, curves.min(0), curves.max(0), color=colour,
                                              alpha=0.25)
    bars = sorted({run["bar"] for runs in groups.values() for run in runs if run["bar"]})
    for bar, dashes in zip(bars, itertools.cycle(("-.", (0, (1, 4)))), strict=False):
        panels["acc"].axhline(bar, color="0.3", linestyle=dashes, label=f"the course's {bar:.0f}%")
    titles = {"loss": "cross entropy, nats (train: smoothed)",
              "acc": "accuracy, %", "lr": "learning rate at the end of the epoch"}
    for quantity, panel in panels.items():
        panel.set(xlabel="epoch", ylabel=titles[quantity])
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels["acc"].set_ylim(0, 100)
    lines = {line.get_label(): line for name in ("loss", "acc") for line in panels[name].lines}
    columns = max(1, 120 // max(map(len, lines)))
    figure.set_size_inches(12, 4 + 0.25 * -(-len(lines) // columns))
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=columns)


def write_report(directories: list[Path], into: Path, report: str, picture: str) -> list[str]:
    """Write a report on one run or several, and a picture of their curves, into a directory.

    Returns, for each group of runs that differ in nothing but the seed, a line with the mean of the
    finished ones. Raises UserError if a directory holds no run, and OSError.
    """
    runs = [load_run(directory) for directory in directories]
    groups = group_runs(runs)
    into.mkdir(parents=True, exist_ok=True)
    text = "Numbers are those of the last epoch, not of the best.\n\n"
    text += markdown_table(
        ("run", "seed", "epochs", "train accuracy", "val accuracy", "test accuracy", "top 5",
         "test loss", "verdict", "time", "training images/s"), [run["row"] for run in runs])
    text += write_picture(into / picture, "", draw_curves, groups)
    rows = []
    for label, group in groups.items():
        last = [run["history"][-1] for run in group]
        accuracies = [row["test_acc"] for row in last if row["epoch"] == row["epochs"]]
        rows.append((label, len(accuracies),
                     f"{statistics.mean(accuracies):.2%}" if accuracies else "-",
                     f"{statistics.stdev(accuracies):.2%}" if len(accuracies) > 1 else "-"))
    if len(runs) > 1:
        text += markdown_table(
            ("settings", "finished runs", "mean test accuracy", "standard deviation"), rows)
    else:
        text += markdown_table(("environment", ""), runs[0]["environment"].items())
        text += markdown_table(("setting", ""), runs[0]["settings"].items())
    write_text(into / report, text)
    return [f"{label}: finished runs {count}, mean test accuracy {mean}, standard deviation "
            f"{deviation}" for label, count, mean, deviation in rows]


def compare(directories: list[Path], into: Path) -> None:
    """Write comparison.md and comparison.png on these runs, and print the means."""
    if RANK:
        return
    try:
        for line in write_report(list(dict.fromkeys(directories)), into, *COMPARISON):
            log.info(line)
    except OSError as error:
        raise UserError(f"--output-dir {into}: cannot be written ({error})") from error
    log.info(files_line(into, COMPARISON))


class TestResult(NamedTuple):
    """What logits (N, C) for labels (N,) are worth; confidences and accuracies of 0..1."""

    metrics: Metrics  # the loss in nats
    confusion: np.ndarray  # int64 (C, C): images of class [row] that were taken for [column]
    bins: np.ndarray  # (15, 3), by confidence: images, mean confidence, accuracy; NaN without any
    calibration_error: float  # expected, Guo et al. 2017, arXiv:1706.04599, equation 3
    mistakes: list[tuple[int, int, float]]  # 30 surest: image, class it was taken for, confidence


def assess(logits: torch.Tensor, labels: torch.Tensor) -> TestResult:
    """Return what float32 logits (N, C) are worth, given int64 labels (N,)."""
    classes = logits.shape[1]
    likeliest = logits.topk(5).indices  # as in evaluate, for those of bf16 hold ties
    predicted, confidence = likeliest[:, 0], logits.softmax(1).amax(1)
    right = predicted == labels
    top5 = (likeliest == labels[:, None]).any(1)
    pairs = torch.bincount(labels * classes + predicted, minlength=classes**2)
    bin_of = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    counts, confidences, rights = (
        torch.bincount(bin_of, weights, CALIBRATION_BINS).double()
        for weights in (None, confidence.double(), right.double())
    )
    wrong = (~right).nonzero()[:, 0]
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][:30]
    return TestResult(
        Metrics(F.cross_entropy(logits.double(), labels).item(), right.double().mean().item(),
                top5.double().mean().item(), len(labels)),
        pairs.view(classes, classes).numpy(),
        torch.stack([counts, confidences / counts, rights / counts], 1).numpy(),
        ((rights - confidences).abs().sum() / len(labels)).item(),
        list(zip(wrong.tolist(), predicted[wrong].tolist(), confidence[wrong].tolist(),
                 strict=True)),
    )


def draw_confusion(figure, confusion: np.ndarray, superclasses: dict[str, list[int]]) -> None:
    """Draw a confusion matrix (C, C), the classes of a superclass side by side."""
    figure.set_size_inches(9, 8)
    order = [label for members in superclasses.values() for label in members]
    shares = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    panel = figure.subplots()
    image = panel.imshow(shares[np.ix_(order, order)], "Greys", vmin=0, vmax=25)
    figure.colorbar(image, label="% of the class's images", shrink=0.8, extend="max")
    edges = np.cumsum([0, *map(len, superclasses.values())])
    middles = (edges[1:] + edges[:-1] - 1) / 2
    panel.set(xlabel="taken for", ylabel="class")
    panel.set_xticks(middles, superclasses, rotation=90)
    panel.set_yticks(middles, superclasses)
    for edge in edges[1:-1] - 0.5:
        panel.axhline(edge, color=COLOURS[0], linewidth=0.3)
        panel.axvline(edge, color=COLOURS[0], linewidth=0.3)


def draw_mistakes(figure, mistakes: list[tuple[int, int, float]], split, class_names) -> None:
    """Draw a TestResult's mistakes with both names; `split` is a data.Split."""
    figure.set_size_inches(12, 12)
    for panel in figure.subplots(5, 6).flat:
        panel.axis("off")
    for panel, (image, taken, confidence) in zip(figure.axes, mistakes, strict=False):
        panel.imshow(split.images[image].permute(1, 2, 0).numpy())
        panel.set_title(f"{class_names[split.labels[image]]}\ntaken for {class_names[taken]},\n"
                        f"{confidence:.0%} sure", fontsize="small")


def report_test(logits: torch.Tensor, dataset, superclass_of: dict[str, str], into: Path) -> None:
    """Print what logits (N, classes) of the test images are worth; write TEST_REPORTS into `into`.

    `dataset` is a data.Dataset; `superclass_of` maps class names to superclasses.
    """
    if RANK:
        return
    names = dataset.class_names
    result = assess(logits, dataset.test.labels)
    loss, top1, top5, count = result.metrics
    log.info(f"test loss {loss:.3f} acc {top1:6.2%} top5 {top5:6.2%}  "
             f"({count:,} {dataset.name} images)")
    superclasses: dict[str, list[int]] = {}  # their labels
    for label, name in enumerate(names):
        superclasses.setdefault(superclass_of.get(name, "other"), []).append(label)
    table = io.StringIO()
    rows = zip(names, result.confusion.tolist(), strict=True)
    csv.writer(table, lineterminator="\n").writerows(
        [["class", *names], *([name, *row] for name, row in rows)])
    try:
        write_text(into / "confusion.csv", table.getvalue())
        text = _result_tables(result, dataset, superclasses)
        text += write_picture(into / "confusion.png", "## Confusion (numbers: confusion.csv)",
                              draw_confusion, result.confusion, superclasses)
        text += write_picture(into / "mistakes.png", "## The surest mistakes", draw_mistakes,
                              result.mistakes, dataset.test, names)
        write_text(into / "test-report.md", text)
    except OSError as error:
        raise UserError(f"{into}: the report cannot be written ({error})") from error
    log.info(files_line(into, TEST_REPORTS))


def _result_tables(result: TestResult, dataset, superclasses: dict[str, list[int]]) -> str:
    def share(part: float, whole: float) -> str:
        return f"{part / whole:.1%}" if whole else "-"

    confusion, totals, right = result.confusion, result.confusion.sum(1), np.diag(result.confusion)
    names = dataset.class_names
    loss, top1, top5, count = result.metrics
    text = f"# The test set of {dataset.name}\n\n" + markdown_table(
        ("top-1 accuracy", "top-5 accuracy", "cross entropy", "images"),
        [(f"{top1:.2%}", f"{top5:.2%}", f"{loss:.3f} nats", f"{count:,}")])

    text += "## Superclasses\n\n" + markdown_table(
        ("superclass", "right class", "right superclass"),
        [(name, share(right[members].sum(), totals[members].sum()),
          share(confusion[np.ix_(members, members)].sum(), totals[members].sum()))
         for name, members in superclasses.items()])

    mistaken = confusion - np.diag(right)
    worst_first = (right / np.maximum(totals, 1)).argsort(kind="stable")
    text += "## Classes, the worst first\n\n" + markdown_table(
        ("class", "accuracy", "most often taken for"),
        [(names[label], share(right[label], totals[label]),
          f"{names[row.argmax()]} ({row.max()})" if (row := mistaken[label]).any() else "-")
         for label in worst_first])

    both = np.triu(mistaken + mistaken.T)
    worst = [divmod(index, len(names)) for index in (-both).argsort(axis=None, kind="stable")[:20]]
    text += "## The most confused pairs\n\n" + markdown_table(
        ("one", "other", "one taken for the other", "other for the one"),
        [(names[a], names[b], mistaken[a, b], mistaken[b, a]) for a, b in worst if both[a, b]])

    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    text += ("## Calibration\n\nThe expected calibration error is "
             f"{result.calibration_error:.4f} (Guo et al. 2017): the mean distance of confidence "
             "and accuracy in these bins, weighted by their images.\n\n")
    return text + markdown_table(
        ("confidence", "images", "mean confidence", "accuracy"),
        [(f"{low:.3f} to {high:.3f}", f"{images:.0f}", f"{confidence:.1%}", f"{accuracy:.1%}")
         for low, high, (images, confidence, accuracy) in
         zip(edges[:-1], edges[1:], result.bins, strict=True) if images])
