"""The engine that both training scripts share.

In this order: errors and exit status, flags, device and precision, files, the `Run` (all that a
killed run needs to go on, and all that it writes), its log lines, and the two loops,
`train_one_epoch` and `evaluate`. What belongs to one recipe alone stands in its script.
"""

import argparse
import contextlib
import csv
import ctypes
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import platform
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

log = logging.getLogger("cifar100")

CHECK_EVERY = 25  # steps between looks at the loss on the host; each costs one synchronisation
RUN_FILES = ("config.json", "metrics.csv", "checkpoint.pt", "model.pt")
# Settings that may differ between a run and its continuation, for they do not change its course.
FREE_SETTINGS = {"data_dir", "data_url", "no_download", "output_dir", "device", "weights"}
FREE_SETTINGS |= {"resume", "overwrite", "eval_only"}
POSITION = ("epoch", "step", "seconds", "train_seconds", "history")  # of a Run, in its checkpoint


DIVERGED = 1
USER_ERROR = 2
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the state is saved, and the same command goes on


class UserError(Exception):
    """Reported in one line on stderr, without a traceback; `status` is the exit status."""

    def __init__(self, message: str, status: int = USER_ERROR):
        super().__init__(message)
        self.status = status


def run_script(main: Callable[[], None]) -> None:
    """Call `main` and exit with the status of what it raises, after one line on stderr."""
    log.addHandler(logging.StreamHandler(sys.stdout))  # it flushes after every line
    log.setLevel(logging.INFO)
    try:
        return main()
    except UserError as error:
        message, status = " ".join(str(error).split()), error.status
    except torch.OutOfMemoryError:
        message, status = "out of GPU memory: try a smaller --batch-size", 2
    except OSError as error:
        message, status = f"cannot go on: {error}", 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


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


def common_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags of both scripts; each script sets its own defaults."""
    parser = OneLineParser(
        description=description.partition("\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", choices=("cifar100", "synthetic"), default="cifar100",
        help="synthetic: made-up images of 100 classes, which need no file")
    add("--data-dir", default=os.environ.get("CIFAR100_DIR", "data"), metavar="PATH",
        help="where CIFAR-100 is or goes: a directory, or the archive or HDF5 file itself")
    add("--data-url", metavar="URL", help="a mirror of the official archive")
    add("--no-download", action="store_true", help="fail rather than download (offline nodes)")
    add("--output-dir", type=Path, metavar="DIR", help="where the files of the run go")
    add("--epochs", type=number(int, 1), metavar="N", help="passes over the training set")
    add("--max-steps", type=number(int, 1), metavar="N",
        help="end after N optimizer steps, and anneal the learning rate over these")
    add("--batch-size", type=number(int, 2), metavar="N", help="images per optimizer step")
    add("--lr", type=number(float, 1e-9), metavar="LR", help="peak learning rate")
    add("--weight-decay", type=number(float, 0), metavar="WD", help="L2 penalty on all parameters")
    add("--label-smoothing", type=number(float, 0, 1), metavar="P",
        help="probability spread over all classes, in the training loss")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N",
        help="of initial weights, order, augmentation and dropout")
    add("--val-size", type=number(int, 0), default=0, metavar="N",
        help="hold out N training images, the same number from each class, to choose settings by")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: on CUDA bf16 or else fp16 where the chip computes in it, fp32 otherwise")
    add("--compile", action=argparse.BooleanOptionalAction, default=None,
        help="torch.compile; by default on CUDA from compute capability 7.0 on")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true",
        help="go on from the checkpoint in --output-dir, if there is one")
    existing.add_argument("--overwrite", action="store_true",
        help="replace the run that is in --output-dir")
    add("--eval-only", action="store_true", help="only test the model.pt in --output-dir")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; raises UserError if it does not fit what --output-dir holds."""
    args = parser.parse_args()
    path = args.output_dir
    held = [name for name in RUN_FILES if (path / name).exists()]
    if path.exists() and not path.is_dir():
        raise UserError(f"--output-dir {path}: is a file, not a directory")
    if args.eval_only and "model.pt" not in held:
        raise UserError(f"{path}: holds no model.pt to test; a run writes it at its end")
    lost = args.resume and "model.pt" in held and "checkpoint.pt" not in held
    if held and (lost or not (args.resume or args.overwrite or args.eval_only)):
        raise UserError(
            f"{path}: already holds a run ({', '.join(held)}); --overwrite replaces it, --resume "
            f"goes on {'if there is a checkpoint.pt' if lost else 'with it'}, --output-dir names "
            "another place"
        )
    return args


class Runtime(NamedTuple):
    """Where and how to compute."""

    device: torch.device
    dtype: torch.dtype  # of the autocast operations; float32 switches autocast off
    compile: bool
    memory_format: torch.memory_format

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
        if self.compile:
            model.compile(dynamic=False)
        return model

    def __str__(self) -> str:
        name = "CPU" if self.device.type == "cpu" else str(self.device)
        if self.device.type == "cuda":
            name += f" ({torch.cuda.get_device_name(self.device)})"
        elif self.device.type == "cpu":
            name += f", {torch.get_num_threads()} threads"
        return f"{name}, {str(self.dtype).removeprefix('torch.')}" + ", compiled" * self.compile


def choose_runtime(device: str, precision: str, compile_model: bool | None) -> Runtime:
    """Return the runtime for these flags; raises UserError if the machine lacks the device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
        precision = "bf16" if capability >= (8, 0) else "fp16" if capability >= (5, 3) else "fp32"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if compile_model is None:
        compile_model = capability >= (7, 0) and bool(importlib.util.find_spec("triton"))
    if device.type == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 where there is any
    torch.backends.cudnn.benchmark = True
    plain = device.type == "cuda" and capability < (7, 0)
    memory_format = torch.contiguous_format if plain else torch.channels_last
    return Runtime(device, dtype, compile_model, memory_format)


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


def write_atomically(path: Path, content: bytes) -> None:
    """Write `path` whole or not at all, also across a power cut; raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename is on disk once the directory is
        directory = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # which some network file systems cannot do
            os.fsync(directory)
        os.close(directory)


def save_tensors(path: Path, content: dict) -> None:
    """Write a dict of tensors, numbers, strings and dicts for `load_tensors`; raises OSError."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def load_tensors(path: Path) -> dict:
    """Read a .pt or .pth file onto the CPU without executing anything that it holds.

    Raises UserError if it is missing, damaged, or asks for more than tensors and plain containers.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:  # a damaged file can raise anything
        if "GLOBAL" in str(error):
            reason = "refused, for it holds more than tensors and might execute code"
        else:
            reason = f"not a PyTorch file, or a damaged one ({type(error).__name__}); get it again"
        raise UserError(f"{path}: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    return content


class Metrics(NamedTuple):
    """Means over `images` images; accuracies are fractions of 1."""

    loss: float
    accuracy: float
    top5: float
    images: int


class Run:
    """One training run: its position, its history, and the files in its output directory.

    `parts` are the objects with a state_dict: model, optimizer, scheduler, scaler. `sizes` are the
    sides of the training images, epoch by epoch, in pixels; they serve to estimate the time left.
    """

    def __init__(self, args, runtime: Runtime, dataset: str, steps_per_epoch: int,
                 total_steps: int, sizes: list[int], parts: dict):
        self.settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        self.script = Path(sys.argv[0]).stem
        self.output_dir = args.output_dir
        self.runtime = runtime
        self.dataset = dataset
        self.parts = parts
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps
        self.epochs = -(-total_steps // steps_per_epoch)  # --max-steps may cut the last one short
        self.epoch_costs = [size**2 for size in sizes[: self.epochs]]
        self.epoch_costs[-1] *= total_steps / steps_per_epoch - (self.epochs - 1)
        self.epoch = 0  # epochs that are finished
        self.step = 0  # optimizer steps done in the current epoch
        self.seconds = 0.0  # spent in the current epoch, evaluation included
        self.train_seconds = 0.0  # those of its training part, once that is done
        self.history: list[dict] = []
        # Over the current epoch: loss, correct, images; and the step of the first bad loss.
        self.sums = torch.zeros(3, device=runtime.device)
        self.first_bad = torch.full((), math.inf, device=runtime.device)
        self.stop_signal = ""
        self._clock = time.perf_counter()

    def start(self) -> None:
        """Go on from the checkpoint if `--resume` finds one, else begin; catch stop signals."""
        for name in ("SIGINT", "SIGTERM", "SIGUSR2"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._on_signal)
        checkpoint = self.output_dir / "checkpoint.pt"
        if self.settings["resume"] and checkpoint.exists():
            self._restore(checkpoint)
            log.info(f"resume     after {self.epoch} epochs and {self.step} steps ({checkpoint})")
        else:
            self._begin()
        self._clock = time.perf_counter()

    def _begin(self) -> None:
        config = {"script": self.script, "dataset": self.dataset, "settings": self.settings,
                  "torch": str(torch.__version__), "runtime": str(self.runtime),
                  "command": shlex.join(sys.argv)}
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            for name in RUN_FILES:
                (self.output_dir / name).unlink(missing_ok=True)
            content = json.dumps(config, indent=2) + "\n"
            write_atomically(self.output_dir / "config.json", content.encode())
        except OSError as error:
            raise UserError(f"{self.output_dir}: cannot be written ({error}); name another place "
                            "with --output-dir") from error

    def _on_signal(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self.stop_signal == "SIGINT":
            raise KeyboardInterrupt
        self.stop_signal = signal.Signals(number).name

    def watch(self, batches: Iterable, what: str, start: int, end: int) -> Iterator:
        """Pass on batches `start` to `end` under a progress bar; save and stop when asked to."""
        bar = tqdm(itertools.islice(batches, end - start), f"epoch {self.epoch + 1} {what}",
                   initial=start, total=end, leave=False, disable=None, unit="batch")
        for batch in bar:
            if self.stop_signal:
                bar.close()
                self.save()
                where = f"in epoch {self.epoch + 1} after {self.step} steps"
                raise UserError(f"{self.stop_signal}: stopped {where}; go on by the same command "
                                "and --resume", STOPPED)
            yield batch

    def check_finite(self) -> None:
        """Raise UserError if a loss of this epoch was NaN or infinite."""
        step = self.first_bad.item()
        if math.isfinite(step):
            raise UserError(f"the loss was not finite at step {int(step) + 1}; start again with "
                            "--overwrite and a lower --lr, or --precision fp32", DIVERGED)

    def tick(self) -> float:
        """Add the time since the last call to the current epoch's, and return that in seconds."""
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        return self.seconds

    def end_epoch(self, results: dict[str, Metrics]) -> None:
        """Record the epoch, print its line, and save. `results` are by split, train first."""
        self.tick()
        if not all(math.isfinite(metrics.loss) for metrics in results.values()):
            self.first_bad.fill_(self.epoch * self.steps_per_epoch + self.step - 1)
            self.check_finite()
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
                "eta_seconds": self.seconds * left}
        self.history.append(row)
        log.info(epoch_line(row))
        self.step, self.seconds, self.train_seconds = 0, 0.0, 0.0
        self.sums.zero_()
        try:
            self.save()
        except OSError as error:
            log.info(f"warning    not saved ({error}); trying again at the end of the next epoch")

    def finish(self, bar: float) -> None:
        """Write model.pt and print the last lines; `bar` is the course's test accuracy, in %."""
        weights = self.parts["model"].state_dict()
        save_tensors(self.output_dir / "model.pt", {k: v.cpu() for k, v in weights.items()})
        self._write_metrics()  # a kill can have come between the checkpoint and its table
        accuracy = 100 * self.history[-1]["test_acc"]
        if self.dataset == "cifar100":
            verdict = f"the course's bar of {bar:.0f}% is {'met' if accuracy >= bar else 'not met'}"
        else:
            verdict = f"on {self.dataset} images, so the course's bar does not apply"
        log.info(f"final test accuracy {accuracy:.2f}% ({verdict})")
        log.info(f"peak memory {peak_memory(self.runtime.device):.2f} GB")
        log.info(f"files      {', '.join(RUN_FILES)} in {self.output_dir}")

    def save(self) -> None:
        """Write checkpoint.pt and metrics.csv; raises OSError, and then the old ones are left."""
        self.tick()
        self.check_finite()
        save_tensors(self.output_dir / "checkpoint.pt", self.state_dict())
        self._write_metrics()

    def _write_metrics(self) -> None:
        if self.history:
            table = io.StringIO()
            writer = csv.DictWriter(table, self.history[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                             for row in self.history)
            write_atomically(self.output_dir / "metrics.csv", table.getvalue().encode())

    def state_dict(self) -> dict:
        """Return all that a continuation needs: tensors, numbers, strings, lists and dicts."""
        cuda = self.runtime.device.type == "cuda"
        return {
            "script": self.script,
            "settings": self.settings,
            "torch": str(torch.__version__),
            "total_steps": self.total_steps,
            "position": {name: getattr(self, name) for name in POSITION},
            "sums": self.sums,
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.runtime.device) if cuda else None,
            **{name: part.state_dict() for name, part in self.parts.items()},
        }

    def _restore(self, path: Path) -> None:
        state = load_tensors(path)
        try:
            self._check_settings(path, state["script"], state["settings"])
            if state["total_steps"] != self.total_steps:
                raise UserError(f"{path}: of a run on a data set of another size")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            for name in POSITION:
                setattr(self, name, state["position"][name])
            self.sums.copy_(state["sums"])
            torch.set_rng_state(state["cpu_rng"])
            if state["cuda_rng"] is not None and self.runtime.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], self.runtime.device)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path}: not a whole checkpoint of this script ({error})") from error

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
    if resource is None:
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


def print_test(result: Metrics, dataset: str) -> None:
    """Print what --eval-only found."""
    log.info(f"test loss {result.loss:.3f} acc {result.accuracy:6.2%} top5 {result.top5:6.2%}  "
             f"({result.images:,} {dataset} images)")


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


def train_one_epoch(run: Run, batches: Iterable, label_smoothing: float, seed: int) -> Metrics:
    """Train on what is left of the current epoch; return the means over the whole of it.

    `batches` yield float images (B, 3, H, W) and int64 labels (B,) from step `run.step` on. The
    loss is cross entropy with label smoothing (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    Raises UserError if it stops being finite, or on a signal to stop.
    """
    model, optimizer, scheduler, scaler = (
        run.parts[name] for name in ("model", "optimizer", "scheduler", "scaler")
    )
    model.train()
    if run.step == 0:
        torch.manual_seed(epoch_seed(seed, run.epoch))
    first = run.epoch * run.steps_per_epoch
    end = min(run.steps_per_epoch, run.total_steps - first)
    for images, labels in run.watch(batches, "train", run.step, end):
        with run.runtime.autocast():
            logits = model(images)  # (B, classes)
            loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        loss = loss.detach().float()
        correct = (logits.argmax(1) == labels).sum()
        count = torch.full_like(loss, len(labels))
        run.sums += torch.stack([loss * len(labels), correct, count])
        here = torch.full_like(loss, first + run.step)
        run.first_bad = torch.minimum(run.first_bad, here.where(~loss.isfinite(), math.inf))
        run.step += 1
        if run.step % CHECK_EVERY == 0:
            run.check_finite()
    run.check_finite()
    run.train_seconds = run.train_seconds or run.tick()
    loss_sum, correct, count = run.sums.tolist()
    return Metrics(loss_sum / count, correct / count, math.nan, int(count))


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable, runtime: Runtime) -> Metrics:
    """Return cross entropy, top-1 and top-5 accuracy over all of `batches`, in evaluation mode."""
    model.eval()
    sums = torch.zeros(3, device=runtime.device)  # loss, correct, correct in the first five
    count = 0
    for images, labels in batches:
        with runtime.autocast():
            logits = model(images)
        hits = logits.topk(5).indices == labels[:, None]  # (B, 5)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        sums += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
        count += len(labels)
    loss, correct, top5 = sums.tolist()
    return Metrics(loss / count, correct / count, top5 / count, count)
