"""A run's checkpoints: what they hold, how they are written, and which of them are refused."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.runtime import Runtime
from engine.weights import difference
from utils import (
    ELSEWHERE,
    DamagedFile,
    UserError,
    guard,
    is_out_of_memory,
    load_tensors,
    one_line,
    save_tensors,
)

CHECKPOINTS = ("checkpoint.pt", "checkpoint-previous.pt")
RUN_FILES = ("config.json", "log.txt", "metrics.csv", *CHECKPOINTS, "model.pt")
ORIGIN = ("script", "settings", "torch", "runtime", "data", "network", "code")  # of config.json


@dataclasses.dataclass
class Position:
    """How far a run has come. A checkpoint stores it."""

    epoch: int = 0  # epochs that are finished
    step: int = 0  # optimizer steps done in the current epoch
    seconds: float = 0.0  # spent in the current epoch, evaluation included
    train_seconds: float = 0.0  # of its training part; 0 until that is done
    history: list[dict] = dataclasses.field(default_factory=list)  # the rows of metrics.csv


@dataclasses.dataclass
class State:
    """All that a run goes on from: `trained` has state_dicts; the rest is of this rank."""

    trained: dict[str, Any]  # model, optimizer, scheduler and scaler
    position: Position
    sums: Tensor  # of this epoch so far: loss, right predictions and images, float32 (3,)
    statistics: list[Tensor]  # batch norm's averages, if each rank has its own

    def capture(self, config: dict, runtime: Runtime) -> dict:
        """Return a checkpoint: tensors, numbers, strings, lists and dicts. All ranks must call."""
        cuda = runtime.device.type == "cuda"
        of_rank = {"sums": self.sums.cpu(), "cpu_rng": torch.get_rng_state(),
                   "cuda_rng": torch.cuda.get_rng_state(runtime.device) if cuda else None,
                   "statistics": [tensor.cpu() for tensor in self.statistics]}
        return {**{name: config[name] for name in ORIGIN},
                "position": dataclasses.asdict(self.position), "ranks": runtime.gather(of_rank),
                **{name: part.state_dict() for name, part in self.trained.items()}}

    def restore(self, checkpoint: dict, runtime: Runtime) -> bool:
        """Take over a checkpoint; return whether the random numbers of this rank were in it."""
        for name, part in self.trained.items():
            part.load_state_dict(checkpoint[name])
        # A momentum that is not laid out in memory as its weight is would slow every step down.
        for weight, buffers in self.trained["optimizer"].state.items():
            for name, buffer in buffers.items():
                if getattr(buffer, "shape", None) == weight.shape:
                    buffers[name] = torch.empty_like(weight).copy_(buffer)
        self.position = Position(**checkpoint["position"])
        ranks = checkpoint["ranks"]
        if len(ranks) != runtime.ranks:
            # With another number of ranks, rank 0 takes the sums of all, so that they count once.
            total = sum(of_rank["sums"] for of_rank in ranks)
            self.sums.copy_(total if runtime.rank == 0 else torch.zeros(3))
            return False
        of_rank = ranks[runtime.rank]
        self.sums.copy_(of_rank["sums"])
        for tensor, value in zip(self.statistics, of_rank["statistics"], strict=False):
            tensor.copy_(value)
        torch.set_rng_state(of_rank["cpu_rng"])
        if of_rank["cuda_rng"] is not None and runtime.device.type == "cuda":
            torch.cuda.set_rng_state(of_rank["cuda_rng"], runtime.device)
        return True

    def check(self, path: Path, checkpoint: dict, config: dict) -> None:
        """Raise UserError if a checkpoint is of another run than `config` describes."""
        before, now = checkpoint["settings"], config["settings"]
        if checkpoint["script"] != config["script"]:
            raise UserError(f"{path}: written by {checkpoint['script']}.py; {ELSEWHERE}")
        fields = {field.name for field in dataclasses.fields(Position)}
        if set(checkpoint["position"]) != fields or not set(config["recipe"]) <= set(before):
            raise UserError(f"{path}: of older code; finish it with that, or {ELSEWHERE}")
        changed = [f"--{name.replace('_', '-')} {now[name]} (was {before[name]})"
                   for name in config["recipe"] if now[name] != before[name]]
        if changed:
            raise UserError(f"{path}: cannot go on with other settings: {', '.join(changed)}; "
                            f"use the old ones, or {ELSEWHERE}")
        if checkpoint["data"] != config["data"]:
            raise UserError(f"{path}: of a run on other images; --data-dir must hold the same")
        if misfit := difference(checkpoint["model"], self.trained["model"].state_dict()):
            raise UserError(f"{path}: of another network: {misfit}; {ELSEWHERE}")
        ours, saved = ([len(group["params"]) for group in optimizer["param_groups"]] for optimizer
                       in (self.trained["optimizer"].state_dict(), checkpoint["optimizer"]))
        if ours != saved:
            raise UserError(f"{path}: of another optimizer, with groups of {saved} weights, not "
                            f"{ours}; {ELSEWHERE}")


class Checkpoints:
    """checkpoint.pt in an output directory, and the checkpoint before it."""

    def __init__(self, directory: Path):
        self.newest, self.previous = (directory / name for name in CHECKPOINTS)

    def save(self, checkpoint: dict) -> None:
        """Write a checkpoint; raises OSError if that fails, and leaves the old ones."""
        save_tensors(self.newest, checkpoint, self.previous)

    def load(self, use: Callable[[Path, dict], None]) -> tuple[Path, dict, list[str]] | None:
        """Call `use(path, checkpoint)` with the newest whole checkpoint, if there is one.

        Return both, and a message for each newer file that is damaged. If `use` fails otherwise
        than by a UserError or for want of memory, the file is damaged, too. Raises UserError if
        there are files and none is whole.
        """
        damaged = []
        for path in filter(Path.exists, (self.newest, self.previous)):
            try:
                checkpoint = load_tensors(path)
                _use(use, path, checkpoint)
            except DamagedFile as error:
                damaged.append(str(error))
                continue
            if path == self.previous:
                # Promote it, or the next save would keep the damaged file as the previous one.
                os.replace(path, self.newest)
            return path, checkpoint, damaged
        if damaged:
            raise UserError(f"{'; '.join(damaged)}; --overwrite starts again")
        return None


def _use(use: Callable[[Path, dict], None], path: Path, checkpoint: dict) -> None:
    try:
        use(path, checkpoint)
    except (UserError, OSError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # what is no checkpoint can raise anything
        if is_out_of_memory(error):
            raise UserError(f"{path}: asks for more memory than there is") from error
        reason = f"not a whole checkpoint of this script ({one_line(error)[:200]})"
        raise DamagedFile(f"{path}: {reason}") from error


def exists(directory: Path) -> bool:
    """Return whether a directory holds a checkpoint."""
    return any((directory / name).exists() for name in CHECKPOINTS)


def check_output_dir(path: Path, resume: bool, overwrite: bool, use_model: bool) -> None:
    """Raise UserError if what --output-dir holds does not fit the command's other flags."""
    with guard(f"--output-dir {path}: cannot be read", OSError):
        present = [name for name in RUN_FILES if (path / name).exists()]
        if path.exists() and not path.is_dir():
            raise UserError(f"--output-dir {path}: is a file, not a directory")
    if use_model:
        if "model.pt" not in present:
            raise UserError(f"{path}: holds no model.pt; a run writes it at its end")
        return
    # A finished run whose checkpoint is gone cannot be resumed, and is not replaced unasked.
    is_stuck = resume and "model.pt" in present and not exists(path)
    if present and (is_stuck or not (resume or overwrite)):
        ways = "no checkpoint is left to go on from" if is_stuck else "--resume goes on with it"
        raise UserError(f"{path}: already holds a run ({', '.join(present)}); {ways}, --overwrite "
                        f"replaces it, or {ELSEWHERE}")
