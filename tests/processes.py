"""Runs the scripts as processes of their own, started in a fifth of the usual time.

Importing torch takes most of a short run. Here a server (multiprocessing's forkserver) imports it
once, and each script starts as a fork of that. In all else it is the process that a user starts,
with arguments, directory, signals and exit status of its own. Nothing of the project is preloaded.
"""

import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torchvision", "tqdm", "pytest",
                                 "matplotlib.figure", "matplotlib.backends.backend_agg"])


def script(name: str, *flags, **kwargs) -> CompletedProcess:
    """Run a script of the project; return its outcome with text output, -9 if signal 9 killed it.

    The keywords are those of `call`.
    """
    return call(run_script, str(ROOT / f"{name}.py"), tuple(map(str, flags)), **kwargs)


def run_script(path: str, flags: tuple) -> None:
    """Execute the script at `path` in this process."""
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


def call(function: Callable, *arguments, cwd: Path = ROOT, before: Callable | None = None,
         kill_after: float | None = None) -> CompletedProcess:
    """Call a module's function in a process of its own; return status and text output.

    There `before` is called first, in the directory `cwd`. Killed after `kill_after` seconds, if
    given; else it must end within 300.
    """
    texts = Path(tempfile.mkdtemp())
    for name in ("stdout", "stderr"):
        (texts / name).touch()
    try:
        process = _CONTEXT.Process(target=_begin, args=(texts, cwd, before, function, arguments))
        process.start()
        process.join(300 if kill_after is None else kill_after)
        hangs = process.is_alive() and kill_after is None
        process.kill()
        process.join()
        assert not hangs, arguments
        stdout, stderr = ((texts / name).read_text() for name in ("stdout", "stderr"))
        return CompletedProcess(arguments, process.exitcode, stdout, stderr)
    finally:
        shutil.rmtree(texts)


def _begin(texts: Path, cwd: Path, before, function, arguments) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(texts / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)  # as in a script; tqdm makes locks of it
    if before:
        before()
    function(*arguments)
