"""The files of a run: its directory, config.json, log.txt, metrics.csv, model.pt and reports."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

from torch import nn

from engine.checkpoint import RUN_FILES, Checkpoints, check_output_dir
from report.evaluation import TEST_REPORTS
from report.log import log_words
from report.run_report import RUN_REPORTS, write_run_report
from report.runs import code_has_changed, write_metrics
from report.tensorboard import TensorBoard
from report.write import write_text
from utils import UserError, log, save_tensors, try_lock


class Output:
    """The output directory of one run. Only rank 0 opens it and writes to it."""

    def __init__(self, directory: Path, tensorboard: bool):
        self.directory, self.checkpoints = directory, Checkpoints(directory)
        self.tensorboard = TensorBoard(directory) if tensorboard else None

    def open(self, config: dict, resume: bool, overwrite: bool,
             use: Callable[[Path, dict], None]) -> dict | None:
        """Take possession of the directory; return the checkpoint to go on from, if any.

        `use` gets the checkpoint and may change `config`. Raises UserError or OSError.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self.lock = (self.directory / ".lock").open("a")  # held until the process ends
        if not try_lock(self.lock):
            raise UserError(f"{self.directory}: another process is at work on this run")
        # Check again, for loading the data took a while.
        check_output_dir(self.directory, resume, overwrite, use_model=False)
        found = self.checkpoints.load(use) if resume else None
        if not found:
            for name in (*RUN_FILES, *RUN_REPORTS, *TEST_REPORTS):
                (self.directory / name).unlink(missing_ok=True)
            self.write_config(config)
        log.addHandler(logging.FileHandler(self.directory / "log.txt", errors="replace"))
        log_words(config["in_words"])
        if found:
            path, checkpoint, damaged = found
            for line in damaged:
                log.info(f"warning    {line}; the checkpoint before it is used")
            self._log_resumption(path, checkpoint, config)
            self.write_for_tensorboard(checkpoint["position"]["history"])
            return checkpoint
        if resume:
            log.info(f"resume     no checkpoint in {self.directory}, so the run begins")
        return None

    def _log_resumption(self, path: Path, checkpoint: dict, config: dict) -> None:
        """Log from where the run goes on, and what has changed since; note it in `config`."""
        epoch, step, history = (checkpoint["position"][name]
                                for name in ("epoch", "step", "history"))
        last = f" (test acc {history[-1]['test_acc']:.2%})" if history else ""
        log.info(f"resume     after {epoch} epochs{last} and {step} steps ({path})")
        before, now = (f"{where['runtime']}, torch {where['torch']}"
                       for where in (checkpoint, config))
        if before != now:
            log.info(f"note       {path} comes from {before}: the end will not be the same bits")
        note = code_has_changed(checkpoint["code"], config["code"])
        if not note or (history and epoch == history[-1]["epochs"]):
            config["code"] = checkpoint["code"]
            return
        log.info(note)
        # From now on the run is of both versions.
        modules = f"{checkpoint['code']['modules']} then {config['code']['modules']}"
        config["code"] |= {"changed": True, "modules": modules}
        config["in_words"]["code"] = f"changed while it was trained: {modules}"
        self.write_config(config)

    def write_config(self, config: dict) -> None:
        """Write config.json; raises OSError."""
        write_text(self.directory / "config.json", json.dumps(config, indent=2) + "\n")

    def save(self, checkpoint: dict, history: list[dict]) -> None:
        """Write checkpoint.pt and metrics.csv; raises OSError if there is no new checkpoint."""
        self.checkpoints.save(checkpoint)
        try:
            write_metrics(self.directory, history)
        except OSError as error:
            log.info(f"warning    metrics.csv not written ({error}); the next save tries again")

    def write_for_tensorboard(self, history: list[dict]) -> None:
        """Write the last epoch, or after a start all of them, if --tensorboard is given."""
        if self.tensorboard:
            self.tensorboard.write(history)

    def finish(self, model: nn.Module, history: list[dict]) -> None:
        """Write metrics.csv, model.pt and the report; raises OSError."""
        # metrics.csv is written again: a kill may have come between it and the checkpoint.
        write_metrics(self.directory, history)
        weights = {name: value.cpu() for name, value in model.state_dict().items()}
        save_tensors(self.directory / "model.pt", weights)
        write_run_report(self.directory, history)
