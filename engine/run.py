"""A training run: it coordinates position, clock, checkpoints, reports and the ranks."""

import argparse
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from data import Dataset, epoch_seed
from engine import describe
from engine.checkpoint import RUN_FILES, Position, State
from engine.checks import check_gradients, check_groups, check_outputs
from engine.clock import SIZE_POWER, Clock, weigh
from engine.output import Output
from engine.runtime import Runtime, peak_memory
from report.log import Metrics, epoch_line, files_line, metric_columns, progress, verdict
from report.run_report import RUN_REPORTS
from utils import AGAIN, ELSEWHERE, FAILED, STOPPED, UserError, guard, log

SAVE_AFTER = 30  # save at an epoch's end if the last save is older than this (seconds)

# Maps images (B, 3, H, W), labels (B,) or soft (B, C), and a generator on their device.
Augmentation = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


class Run:
    """One training run and its files; `required` is the course's test accuracy, in %."""

    def __init__(self, args: argparse.Namespace, runtime: Runtime, dataset: Dataset,
                 required: float, steps_per_epoch: int):
        self.args, self.runtime = args, runtime
        self.dataset, self.required, self.steps_per_epoch = dataset, required, steps_per_epoch
        self.total_steps = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
        self.epochs = math.ceil(self.total_steps / steps_per_epoch)
        self.clock = Clock(args.began, args.checkpoint_minutes, args.max_minutes)
        self.output = Output(args.output_dir, args.tensorboard)
        self.weight = 1.0  # of this rank's share of a batch; 0 if it trains on a filler image
        self.unsaved = False  # the last save failed
        self.has_logged_time = False  # how much time is left

    @property
    def position(self) -> Position:
        """How far the run has come."""
        return self.state.position

    @property
    def epoch(self) -> int:
        """How many epochs are finished."""
        return self.position.epoch

    @property
    def step(self) -> int:
        """How many steps of the current epoch are done."""
        return self.position.step

    @property
    def steps_of_epochs(self) -> list[int]:
        """How many steps each epoch has; --max-steps may cut the last one short."""
        last = self.total_steps - (self.epochs - 1) * self.steps_per_epoch
        return [self.steps_per_epoch] * (self.epochs - 1) + [last]

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler,
              sizes: list[int], augment: Augmentation | None = None) -> None:
        """Begin, or with --resume go on; `sizes` are the sides of each epoch's images in pixels."""
        check_groups(model, optimizer.param_groups)
        check_outputs(model, sizes, self.dataset, self.runtime)
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.scaler, self.sizes, self.augmentation = self.runtime.scaler(), sizes, augment
        self.generator = torch.Generator(self.runtime.device) if augment else None
        self.network, statistics = model, []
        if self.runtime.ranks > 1:
            statistics = [tensor for tensor in model.buffers() if tensor.is_floating_point()]
            self.network = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        trained = {"model": model, "optimizer": optimizer, "scheduler": scheduler,
                   "scaler": self.scaler}
        sums = torch.zeros(3, device=self.runtime.device)
        self.state = State(trained, Position(), sums, statistics)
        plan = describe.plan(self.args, optimizer, sizes, self.total_steps, self.steps_per_epoch,
                             augment)
        self.config = describe.config(self.args, self.runtime, self.dataset, model, self.required,
                                      plan)
        self.clock.catch_signals()
        with guard(f"{self.output.directory}: cannot be written", OSError,
                   f"; {ELSEWHERE}, or make room"):
            checkpoint = None if self.runtime.rank else self.output.open(
                self.config, self.args.resume, self.args.overwrite, self._use_checkpoint)
        checkpoint = self.runtime.broadcast(checkpoint)
        if self.runtime.rank and checkpoint:
            self._restore(checkpoint)
        if self.runtime.compile:
            log.info("compile    begins with the first step, and again for images of another size")
        self.clock.lap()
        self.clock.saved_at = time.monotonic()

    def _use_checkpoint(self, path: Path, checkpoint: dict) -> None:
        self.state.check(path, checkpoint, self.config)
        self._restore(checkpoint)
        # The settings are those of the run: this start may leave out --weights.
        self.config["settings"] = checkpoint["settings"]

    def _restore(self, checkpoint: dict) -> None:
        if not self.state.restore(checkpoint, self.runtime):
            torch.manual_seed(self.rank_seed())

    def rank_seed(self) -> int:
        """Return the seed of torch's global generator for this epoch on this rank."""
        return epoch_seed(self.args.seed, self.epoch) + self.runtime.rank

    def augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return a batch as the user's own augmentation makes it, the same after a resume."""
        if not self.augmentation:
            return images, labels
        step = self.epoch * self.steps_per_epoch + self.step
        # SeedSequence ignores trailing zeros, so rank 0 would reuse an epoch's shuffling seed.
        self.generator.manual_seed(epoch_seed(self.args.seed, step, self.runtime.rank + 1))
        return self.augmentation(images, labels, self.generator)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the batch's loss, of which this rank has a share."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss * self.weight).backward()
        if not self.clock.progressed:
            check_gradients(self.model, self.runtime.ranks)

    def take_step(self) -> None:
        """Have the optimizer change the weights, and the schedule the learning rate."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()

    def count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a step, and add its images to the sums of the epoch, unless they are fillers.

        Labels are int64 (B,), or float shares (B, classes); then the largest share is the class.
        """
        if self.weight:
            classes = labels if labels.ndim == 1 else labels.argmax(1)
            self.state.sums[0].add_(loss.detach() * len(labels))
            self.state.sums[1].add_((logits.argmax(1) == classes).sum())
            self.state.sums[2].add_(len(labels))
        self.position.step += 1

    def watch(self, batches: Iterable, name: str) -> Iterator:
        """Yield the batches of an evaluation under a progress bar; stop or save before each."""
        with progress(batches, f"epoch {self.epoch + 1} {name}", self.runtime.rank) as bar:
            drawn = iter(bar)
            for _ in range(len(batches)):
                self.stop_or_save()
                self.clock.begin_step()
                yield next(drawn)
                self.clock.end_batch()

    def stop_or_save(self) -> None:
        """Stop if a rank has a reason to, or save if it is time to; the ranks agree on that."""
        clock = self.clock
        mine = torch.tensor([clock.stop_signal or 0, clock.out_of_time(), clock.save_is_due()])
        signum, must_stop, must_save = map(int, self.runtime.reduce(mine, "MAX").tolist())
        if signum:
            self._stop(signal.Signals(signum).name)
        elif must_stop:
            self._stop(f"--max-minutes {clock.max_minutes:g}")
        elif must_save:
            self._save_or_warn()

    def _stop(self, reason: str) -> NoReturn:
        where = f"{reason}: stopped in epoch {self.epoch + 1} after {self.step} steps"
        newest = self.output.checkpoints.newest
        with guard(f"{where}, but not saved", OSError, f"; make room, and {AGAIN} goes on from "
                   f"{newest}, if it is there", FAILED):
            self.save()
        raise UserError(f"{where}, saved in {newest}; {AGAIN} goes on", STOPPED)

    def seconds_left(self, evaluation: float | None = None) -> float:
        """Return an estimate of the time left, made from the steps of this epoch.

        `evaluation` is the time of this epoch's evaluation, which is over. Before it, a guess is
        used: a forward pass takes a third of a step.
        """
        steps, sizes = self.steps_of_epochs[self.epoch :], self.sizes[self.epoch :]
        steps[0] -= self.step
        evaluations, step = len(steps) - 1, self.step_seconds()
        if evaluation is None:
            images = sum(len(split.labels) for split in self.dataset.evaluated().values())
            full = (sizes[-1] / sizes[0]) ** SIZE_POWER
            evaluation = step * full / 3 * images / self.args.batch_size
            evaluations += 1
        return step * weigh(steps, sizes) + evaluations * evaluation

    def step_seconds(self) -> float:
        """Return the mean seconds of this epoch's steps."""
        return self.clock.step_seconds() or self.position.train_seconds / max(self.step, 1)

    def check_finite(self) -> None:
        """Raise UserError if a loss of this epoch was NaN or infinite; all ranks must call it."""
        self._require_finite(self.runtime.reduce(self.state.sums)[0].item())

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            step = self.epoch * self.steps_per_epoch + self.step
            raise UserError(f"the loss was not finite by step {step}; start again with --overwrite "
                            "and a lower --lr, or --precision fp32", FAILED)

    def end_training(self) -> Metrics:
        """Return the epoch's means; check the loss, and average the ranks' statistics."""
        self.check_finite()
        self.position.seconds += self.clock.lap()
        if not self.position.train_seconds:  # else done before this start
            self.position.train_seconds = self.position.seconds
            for tensor in self.state.statistics:
                torch.distributed.all_reduce(tensor)
                tensor /= self.runtime.ranks
        loss, correct, images = self.runtime.reduce(self.state.sums).tolist()
        return Metrics(loss / images, correct / images, math.nan, int(images))

    def end_epoch(self, results: dict[str, Metrics]) -> None:
        """Record the epoch, print its line, and save. `results` are by split, train first."""
        position = self.position
        position.seconds += self.clock.lap()
        self._require_finite(sum(metrics.loss for metrics in results.values()))
        row = {"dataset": self.config["dataset"], "epoch": self.epoch + 1, "epochs": self.epochs,
               "image_size": self.sizes[self.epoch], "lr": self.optimizer.param_groups[0]["lr"],
               **metric_columns(results),
               "images_per_second": results["train"].images / (self.step * self.step_seconds()),
               "seconds": position.seconds,
               "eta_seconds": self.seconds_left(position.seconds - position.train_seconds)}
        self.state.position = Position(self.epoch + 1, history=[*position.history, row])
        self.state.sums.zero_()
        self.clock.end_epoch()
        log.info(epoch_line(row))
        is_due = time.monotonic() - self.clock.saved_at > SAVE_AFTER
        if self.epoch == self.epochs or self.runtime.broadcast(is_due):
            self._save_or_warn()
        if self.runtime.rank == 0:
            self.output.write_for_tensorboard(self.position.history)

    def save(self) -> None:
        """Write checkpoint.pt and metrics.csv; raises OSError if there is no new checkpoint."""
        began = time.monotonic()
        self.position.seconds += self.clock.lap()
        self.check_finite()
        checkpoint = self.state.capture(self.config, self.runtime)
        self.clock.saved_at, self.unsaved = began, True
        if self.runtime.rank == 0:
            self.output.save(checkpoint, self.position.history)
        self.unsaved = False
        self.clock.saved_at = time.monotonic()
        self.clock.longest_save = max(self.clock.longest_save, self.clock.saved_at - began)

    def _save_or_warn(self) -> None:
        try:
            self.save()
        except OSError as error:
            log.info(f"warning    not saved ({error}); training goes on, the next save tries again")

    def finish(self) -> None:
        """Write model.pt and the report, and print the last lines."""
        with guard(f"{self.output.directory}: not all is written", OSError,
                   f"; make room, and {AGAIN} does what is left", FAILED):
            if self.runtime.broadcast(self.unsaved):
                self.save()
            if self.runtime.rank == 0:
                self.output.finish(self.model, self.position.history)
        log.info(f"peak memory {peak_memory(self.runtime.device):.2f} GB")
        log.info(files_line(self.output.directory, (*RUN_FILES, *RUN_REPORTS)))
        accuracy = self.position.history[-1]["test_acc"]
        log.info(f"final test accuracy {accuracy:.2%} "
                 f"({verdict(accuracy, self.config['required_accuracy'])})")
