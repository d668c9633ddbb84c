"""A run's files and its checkpoints: what they hold, and which of them are refused."""

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import utils
from data import epoch_seed
from engine.process import AT_END, log_to
from engine.runtime import Runtime
from engine.weights import difference
from report import evaluation, runs
from report.log import files_line, log_words
from report.write import write_text
from utils import ELSEWHERE, UserError, guard, log, plain

CHECKPOINTS = ("checkpoint.pt", "checkpoint-previous.pt")
CONTENT = {"script", "settings", "data", "position", "ranks",
           "model", "optimizer", "scheduler", "scaler"}  # of a checkpoint, beside others
RUN_FILES = ("config.json", "code.zip", "log.txt", "metrics.csv", *CHECKPOINTS, "model.pt")


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
    """All that a resume restores; `sums` and `statistics` are this rank's own."""

    trained: dict[str, Any]  # model, optimizer, scheduler and scaler
    position: Position
    sums: Tensor  # of this epoch so far: loss, right predictions and images, float32 (3,)
    statistics: list[Tensor]  # batch norm's averages, if each rank has its own
    keep: dict[str, Any] = dataclasses.field(default_factory=dict)  # see Run.start

    def capture(self, config: dict, runtime: Runtime) -> dict:
        """Return a checkpoint: tensors, numbers, strings, lists and dicts. All ranks must call."""
        cuda = runtime.device.type == "cuda"
        of_rank = {"sums": self.sums.cpu(), "cpu_rng": torch.get_rng_state(),
                   "cuda_rng": torch.cuda.get_rng_state(runtime.device) if cuda else None,
                   "statistics": [tensor.cpu() for tensor in self.statistics]}
        return {**config, "position": dataclasses.asdict(self.position),
                "ranks": runtime.gather(of_rank),
                "keep": {name: plain(part.state_dict()) for name, part in self.keep.items()},
                **{name: plain(part.state_dict()) for name, part in self.trained.items()}}

    def restore(self, checkpoint: dict, runtime: Runtime) -> None:
        """Take over a checkpoint; with another number of ranks the end is not the same bits."""
        with guard("the checkpoint is of another optimizer", ValueError, f"; {ELSEWHERE}"):
            for name, part in self.trained.items():
                part.load_state_dict(checkpoint[name])
        for name in {**self.keep, **checkpoint["keep"]}:  # one of them may lack it
            with guard(f"run and checkpoint differ in keep: {name}", Exception, f"; {ELSEWHERE}"):
                self.keep[name].load_state_dict(checkpoint["keep"][name])
        self.position, by_rank = Position(**checkpoint["position"]), checkpoint["ranks"]
        if len(by_rank) != runtime.ranks:
            if runtime.rank == 0:  # it takes the sums of all ranks, so that each image counts once
                self.sums.copy_(sum(of_rank["sums"] for of_rank in by_rank))
            seed = epoch_seed(checkpoint["settings"]["seed"], self.position.epoch)
            torch.manual_seed(seed + runtime.rank)
            return
        of_rank = by_rank[runtime.rank]
        self.sums.copy_(of_rank["sums"])
        for tensor, value in zip(self.statistics, of_rank["statistics"], strict=True):
            tensor.copy_(value)
        torch.set_rng_state(of_rank["cpu_rng"])
        if of_rank["cuda_rng"] is not None and runtime.device.type == "cuda":
            torch.cuda.set_rng_state(of_rank["cuda_rng"], runtime.device)

    def check(self, path: Path, checkpoint: dict, config: dict) -> None:
        """Raise UserError if a checkpoint is of another run than `config` describes."""
        before, now = checkpoint["settings"], config["settings"]
        if checkpoint["script"] != config["script"]:
            raise UserError(f"{path}: written by {checkpoint['script']}.py; {ELSEWHERE}")
        has_position = checkpoint["position"].keys() == vars(self.position).keys()
        is_whole = checkpoint.keys() >= {*config, "keep"} and before.keys() >= {*config["recipe"]}
        if not (has_position and is_whole):
            raise UserError(f"{path}: of older code; finish the run with that, or {ELSEWHERE}")
        changed = [f"--{name.replace('_', '-')} {now[name]} (was {before[name]})"
                   for name in config["recipe"] if now[name] != before[name]]
        if changed:
            raise UserError(f"{path}: cannot go on with other settings: {', '.join(changed)}; "
                            f"use the old ones, or {ELSEWHERE}")
        if checkpoint["data"] != config["data"]:
            raise UserError(f"{path}: of a run on other images; --data-dir must hold the same")
        if misfit := difference(checkpoint["model"], self.trained["model"].state_dict()):
            raise UserError(f"{path}: of another network: {misfit}; {ELSEWHERE}")
        was, is_now = checkpoint["optimization"], config["optimization"]
        changed = [f"{name} {is_now.get(name)} (was {was.get(name)})"
                   for name in {**was, **is_now} if was.get(name) != is_now.get(name)]
        if changed:
            raise UserError(f"{path}: cannot go on with another optimizer or schedule: "
                            f"{', '.join(changed[:5])}; {ELSEWHERE}")


def open_directory(directory: Path, state: State, config: dict, resume: bool,
                   overwrite: bool) -> dict | None:
    """Lock the output directory, clear it or find its checkpoint, and return that."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = AT_END.enter_context((directory / ".lock").open("a"))
    if not utils.try_lock(lock):
        raise UserError(f"{directory}: another process is at work on this run")
    # Check again, for loading the data took a while.
    check_output_dir(directory, resume, overwrite, use_model=False)
    if not (resume and exists(directory)):
        for name in (*RUN_FILES, *evaluation.RUN_REPORTS, *evaluation.TEST_REPORTS):
            (directory / name).unlink(missing_ok=True)
    log_to(logging.FileHandler(directory / "log.txt", "a", "utf-8", errors="replace"))
    if not exists(directory):
        return None
    path, checkpoint = read(directory)
    with guard(f"{path}: not a checkpoint", Exception, "; --overwrite starts again"):
        state.check(path, checkpoint, config)
    # Else the next save would keep a damaged file as the previous one.
    os.replace(path, directory / CHECKPOINTS[0])
    return checkpoint


def read(directory: Path) -> tuple[Path, dict]:
    """Return the newest whole checkpoint's file and content; log how a newer one is damaged.

    Another process may be writing checkpoints. Raises UserError if there is none.
    """
    damaged = []
    for path in (directory / name for name in CHECKPOINTS):
        try:
            checkpoint = utils.load_tensors(path)
            if missing := CONTENT - checkpoint.keys():
                raise utils.DamagedFile(f"{path}: no checkpoint, it lacks {min(missing)}")
            for problem in damaged:
                log.info(f"warning    {problem}; the checkpoint before it is used")
            return path, checkpoint
        except utils.DamagedFile as error:
            damaged.append(str(error))
        except UserError as error:
            # A save renames the newest one before it puts the next in its place.
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    raise UserError(f"{'; '.join(damaged) or f'{directory}: holds no checkpoint'}; --overwrite "
                    "starts again")


def log_start(directory: Path, found: dict | None, config: dict) -> None:
    """Log what the run is and where it goes on; write config.json if it is new or of new code."""
    log_words(config["in_words"])
    if found:
        position = Position(**found["position"])
        log.info(f"resume     after {position.epoch} epochs and {position.step} steps")
        before, now = (f"{source['runtime']}, torch {source['torch']}"
                       for source in (found, config))
        if before != now:
            log.info(f"note       it comes from {before}: the end will not be the same bits")
        note = runs.code_has_changed(found["code"], config["code"])
        history = position.history
        if not note or (history and position.epoch == history[-1]["epochs"]):  # it is finished
            config["code"] = found["code"]
            return
        log.info(note)
        # From now on the run is of both versions.
        modules = f"{found['code']['modules']} then {config['code']['modules']}"
        config["code"] |= {"changed": True, "modules": modules}
        config["in_words"]["code"] = f"changed while it was trained: {modules}"
    else:
        if config["settings"]["resume"]:
            log.info(f"resume     no checkpoint in {directory}, so the run begins")
        utils.write_atomically(directory / "code.zip", runs.zip_code())
    write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")


def save(directory: Path, checkpoint: dict) -> None:
    """Write checkpoint.pt and metrics.csv; raises OSError if there is no new checkpoint."""
    newest, previous = (directory / name for name in CHECKPOINTS)
    utils.save_tensors(newest, checkpoint, previous)
    try:
        runs.write_metrics(directory, checkpoint["position"]["history"])
    except OSError as error:
        log.info(f"warning    metrics.csv not written ({error}); the next save tries again")


def write_results(directory: Path, model: nn.Module, history: list[dict]) -> None:
    """Write model.pt, the report, and metrics.csv, which a kill can leave old; raises OSError."""
    runs.write_metrics(directory, history)
    # Contiguous, which safetensors and .view() want, unlike the network's own (channels last).
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    utils.save_tensors(directory / "model.pt", weights)
    evaluation.write_run_report(directory, history)
    log.info(files_line(directory, (*RUN_FILES, *evaluation.RUN_REPORTS)))


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
        if not {"model.pt", *CHECKPOINTS} & {*present}:
            raise UserError(f"{path}: holds no model.pt, which a run writes at its end, and no "
                            "checkpoint, which it writes before")
        return
    # A finished run whose checkpoint is gone cannot be resumed, and is not replaced unasked.
    is_stuck = resume and "model.pt" in present and not exists(path)
    if present and (is_stuck or not (resume or overwrite)):
        ways = "no checkpoint is left to go on from" if is_stuck else "--resume goes on with it"
        raise UserError(f"{path}: already holds a run ({', '.join(present)}); {ways}, --overwrite "
                        f"replaces it, or {ELSEWHERE}")
