"""A script as a process: its command line, its exit status, and one line for what went wrong."""

import atexit
import contextlib
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

import utils
from engine.runtime import launched, process_rank
from utils import FAILED, USER_ERROR, UserError, log, one_line

# How CUDA and its libraries name faults of the GPU or its driver; most others are of the program.
GPU_FAULTS = "launch failure|EXECUTION_FAILED|uncorrectable ECC"
# Harmless warnings of torch: fp16 may skip the first step, a side of length one has any stride,
# torch 2.10 lacks the new name of broadcast_buffers, and Python 3.13.0 compiles less well.
HARMLESS = ("Detected call of .lr_scheduler.step|Grad strides do not match bucket view|"
            ".broadcast_buffers. is deprecated|Guards may run slower on Python 3.13.0")


# What a run changes in its process, to be undone at its end: a notebook may start another one.
AT_END = contextlib.ExitStack()


def log_to(handler: logging.Handler) -> None:
    """Have the log written by this handler until the run's end."""
    log.addHandler(handler)
    AT_END.callback(handler.close)
    AT_END.callback(log.removeHandler, handler)


def on_signal(number: int, handler: Callable) -> None:
    """Have a signal call this handler until the run's end."""
    AT_END.callback(signal.signal, number, signal.signal(number, handler))


def command_line() -> tuple[Path, list[str]]:
    """Return the script's path and its arguments; only this function reads sys.argv."""
    return Path(sys.argv[0]), sys.argv[1:]


def given(*flags: str) -> bool:
    """Return whether one of these flags stands on the command line."""
    return any(word.partition("=")[0] in flags for word in command_line()[1])


def run_script(main: Callable[[], None]) -> None:
    """Call `main`, then exit: with status 0, or with one line on stderr and the error's status."""
    # From here on a signal would kill a finished run, unless a notebook goes on.
    atexit.register(_ignore_signals)
    with AT_END:
        _run(main)


def _run(main: Callable[[], None]) -> None:
    warnings.filterwarnings("ignore", HARMLESS)
    # File names can hold characters that stdout cannot show; stdout may be closed, or not a file.
    with contextlib.suppress(AttributeError, OSError):
        sys.stdout.reconfigure(errors="backslashreplace")
    # With --predict stdout holds the predictions alone, for a file or a pipe.
    log_to(logging.StreamHandler(sys.stderr if given("--predict") else sys.stdout))
    log.setLevel(logging.WARNING if process_rank() else logging.INFO)
    logging.raiseExceptions = False  # a full disk under the log must not end the training
    for stop_signal in utils.STOP_SIGNALS:
        on_signal(stop_signal, _stop_before_first_step)
    message, status = "", 0
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        message, status = explain(error)
        if given("--debug"):
            traceback.print_exc()
        # Each rank reports its own input errors. What stops all ranks is reported by rank 0.
        if process_rank() and isinstance(error, UserError) and status != USER_ERROR:
            message = ""
    if _in_group() and status in (0, utils.STOPPED):  # wait until every rank is done or has failed
        with contextlib.suppress(RuntimeError):
            dist.all_reduce(torch.zeros(1))
    _exit_with(message, status)


def explain(error: BaseException) -> tuple[str, int]:
    """Return the line and the exit status for `error`; raises it if it is a fault of the code."""
    trains = not given("--eval-only", "--predict")
    smaller = ": try a smaller --batch-size" if trains else ""
    if isinstance(error, UserError):
        return one_line(error), error.status
    if utils.is_out_of_memory(error):
        memory = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        return f"out of {memory}{smaller}", USER_ERROR
    # Only the first line is for the user: torch's advice to programmers follows.
    if failure := re.match(f"(CUDA|cuDNN) error.*({GPU_FAULTS}).*", str(error)):
        again = f"; {utils.AGAIN} goes on" if trains else ""
        return f"the GPU failed ({failure[0]}){again}", FAILED
    if isinstance(error, OSError):
        is_missing = isinstance(error, FileNotFoundError)  # such as a folder of the user's own data
        return f"cannot go on: {error}", USER_ERROR if is_missing else FAILED
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
        return f"another rank has ended ({one_line(error)[-200:]})", utils.LEFT_ALONE
    # The interpreter's own end could wait forever for kernels that are under way.
    traceback.print_exception(error)
    return "a fault of the program; its traceback stands above", FAILED


def _exit_with(message: str, status: int) -> NoReturn:
    _ignore_signals()
    if message:
        rank = f" (rank {process_rank()})" if process_rank() else ""
        # The disk under stderr may be full; the status still counts.
        with contextlib.suppress(OSError):
            print(f"{command_line()[0].name}{rank}: {message}", file=sys.stderr, flush=True)
    # torchrun turns every status but 0 into 1, by which the job file finds the node that failed.
    if launched() and status in (utils.STOPPED, utils.LEFT_ALONE):
        status = 0
    # RuntimeError: a signal came while a line was being written. AttributeError: no stdout.
    with contextlib.suppress(RuntimeError, AttributeError):
        try:
            sys.stdout.flush()
        except OSError:  # a full disk or a closed pipe; the interpreter would report it once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if _in_group():
        os._exit(status)  # gloo's threads sometimes abort during the interpreter's own shutdown
    sys.exit(status)


def _ignore_signals() -> None:
    """Ignore signals during shutdown: one would kill a finished run."""
    for stop_signal in utils.STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)


def _stop_before_first_step(signum: int, _frame: object) -> NoReturn:
    _exit_with(f"{signal.Signals(signum).name}: stopped before the first step; start the same "
               "command again", utils.STOPPED)


def _in_group() -> bool:
    return launched() and dist.is_initialized()
