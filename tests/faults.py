"""What befalls a process or a file in test_resume.py: kills, full disks, damage."""

import itertools
import os
import resource
import signal
import stat
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_hook


def at_batch(number: int, action) -> None:
    """Have `action()` called after the forward pass of batch `number` of this process, from 1."""
    batches = itertools.count(1)

    def hook(module, _, output):
        # A run first tries its network on two images.
        if isinstance(module, torch.nn.Linear) and len(output) > 2 and next(batches) == number:
            action()

    register_module_forward_hook(hook)


def kill() -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_write(moment: str, number: int, part: float) -> None:
    """Kill this process at a moment of its file number `number`, from 1.

    "torn": `part` of the temporary file is on the disk; "whole": all of it, under its temporary
    name; "renamed": under its own name, and nothing after that is done.
    """
    count = itertools.count(1)
    fsync, replace = os.fsync, os.replace

    def torn_fsync(descriptor):
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if moment == "torn" and is_file and next(count) == number:
            os.truncate(descriptor, int(part * os.fstat(descriptor).st_size))
            kill()
        fsync(descriptor)

    def cut_replace(source, target):
        reached = moment != "torn" and next(count) == number
        if reached and moment == "whole":
            kill()
        replace(source, target)
        if reached:
            kill()

    os.fsync, os.replace = torn_fsync, cut_replace


def limit_files(megabytes: int) -> None:
    """Have every write beyond a size fail in this process, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes * 2**20, megabytes * 2**20))


def spoil(path: Path, damage: str) -> None:
    """Damage a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"truncated": content[: len(content) // 2], "flipped": content,
                      "text": b"hello", "missing": b""}[damage])
    if damage == "missing":
        path.unlink()
