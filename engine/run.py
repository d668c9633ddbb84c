"""A training run: it coordinates position, clock, checkpoints, reports and the ranks."""

import argparse
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from data import Batches, Dataset, epoch_seed
from engine import checkpoint, checks, describe
from engine.checkpoint import Position, State
from engine.clock import Clock
from engine.optim import Sizes, frozen_modules
from engine.runtime import Runtime, peak_memory
from report.log import Metrics, epoch_line, metric_columns, progress, verdict
from report.tensorboard import TensorBoard
from utils import AGAIN, ELSEWHERE, FAILED, STOPPED, UserError, guard, log

SAVE_AFTER = 30  # save at an epoch's end if the last save is older than this (seconds)
SIZE_POWER = 1.6  # a step's time grows with an image's side to this power; measured: 1.4 to 1.7


# Of images, labels and a generator on the device: it returns images and labels. See Run.augment.
Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


class Run:
    """One training run and its files; `required` is the course's test accuracy, in %."""

    def __init__(self, args: argparse.Namespace, runtime: Runtime, dataset: Dataset,
                 required: float, steps_per_epoch: int):
        self.args, self.runtime = args, runtime
        self.dataset, self.required, self.steps_per_epoch = dataset, required, steps_per_epoch
        self.total_steps = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
        self.epochs = math.ceil(self.total_steps / steps_per_epoch)
        self.clock = Clock()
        self.tensorboard = TensorBoard(args.output_dir) if args.tensorboard else None
        self.loss_weight = 1.0  # of this rank's share of a batch; 0 for a filler image
        self.has_logged_time = False  # whether this start has logged the time left
        # What `start` may get: modules that stay in evaluation mode, and state of the user's own.
        self.in_evaluation_mode: set[nn.Module] = set()
        self.keep: dict[str, Any] = {}
        self.graphs = None  # the CUDA graphs of the steps, if there are any
        self.step_was_read = False  # which `step` notes, for a graph would repeat one number

    @property
    def epoch(self) -> int:
        """How many epochs are finished."""
        return self.state.position.epoch

    @property
    def step(self) -> int:
        """How many steps of the current epoch are done."""
        self.step_was_read = True
        return self.state.position.step

    def steps_in(self, epoch: int) -> int:
        """Return how many steps an epoch has; --max-steps may cut the last one short."""
        return min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler,
              sizes: Sizes, augment: Augment | None = None,
              keep: dict[str, Any] | None = None) -> None:
        """Begin, or with --resume go on.

        `augment(images, labels, generator)` changes a batch: float images (B, 3, H, W) and float
        shares (B, classes). Each object in `keep` has state_dict(), of tensors and plain values,
        and load_state_dict(): checkpoints hold its state, too.
        """
        args, runtime, self.keep = self.args, self.runtime, keep or {}
        self.in_evaluation_mode = {module for module in model.modules() if not module.training}
        checks.check_groups(model, optimizer.param_groups)
        checks.check_state({"the optimizer": optimizer, "the schedule": scheduler, **self.keep})
        checks.check_outputs(model, sizes.all, self.dataset, runtime)
        still = self.in_evaluation_mode | frozen_modules(model)
        steps = map(self.steps_in, range(self.epochs))
        checks.check_single_images(model, still, len(self.dataset.train.labels), args.batch_size,
                                   zip(steps, sizes.train, strict=False), runtime)
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.scaler, self.sizes, self.augmentation = runtime.scaler(), sizes, augment
        self.generator = torch.Generator(runtime.device) if augment else None
        self.network = model  # which several ranks wrap
        if runtime.ranks > 1:
            self.network = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        trained = {"model": model, "optimizer": optimizer, "scheduler": scheduler,
                   "scaler": self.scaler}
        sums = torch.zeros(3, device=runtime.device)
        self.state = State(trained, Position(), sums, self._own_statistics(), self.keep)
        plan = describe.plan(args, model, sizes, self.total_steps, self.steps_per_epoch, augment,
                             still)
        lines, optimization = describe.optimization(model, scheduler, self.total_steps)
        self.config = describe.config(args, runtime, self.dataset, model, self.required,
                                      optimization, lines | plan)
        self.clock.catch_signals()
        self._open_directory()
        if self.tensorboard and runtime.rank == 0:
            self.tensorboard.write(self.state.position.history)
        if runtime.compile:
            log.info("compile    begins with the first step, and again for images of another size")
        self.clock.lap_began = self.clock.saved_at = time.monotonic()

    def _open_directory(self) -> None:
        """Make or take over the output directory; go on from its checkpoint, if there is one."""
        args, found = self.args, None
        with guard(f"{args.output_dir}: cannot be written", OSError, f"; make room or {ELSEWHERE}"):
            if self.runtime.rank == 0:
                found = checkpoint.open_directory(
                    args.output_dir, self.state, self.config, args.resume, args.overwrite)
            found = self.runtime.broadcast(found)
            if found:
                self.state.restore(found, self.runtime)
                # This start may leave out --weights, and has not read them.
                self.config |= {name: found[name] for name in ("settings", "weights_sha256")}
                self.config["in_words"] |= {name: words for name, words in
                                            found["in_words"].items() if name == "weights"}
            if self.runtime.rank == 0:
                checkpoint.log_start(args.output_dir, found, self.config)

    def _own_statistics(self) -> list[Tensor]:
        """Return the float buffers, such as batch norm's averages, if each rank has its own."""
        parts = [self.model, *self.keep.values()] if self.runtime.ranks > 1 else []
        return [tensor for part in parts if isinstance(part, nn.Module)
                for tensor in part.buffers() if tensor.is_floating_point()]

    def seed_augmentation(self) -> None:
        """Have the user's own augmentation draw the same in this step after a resume."""
        if self.augmentation:
            step = self.epoch * self.steps_per_epoch + self.step
            # + 1: SeedSequence ignores trailing zeros, and (seed, step) seeds an epoch's order.
            self.generator.manual_seed(epoch_seed(self.args.seed, step, self.runtime.rank + 1))

    def augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return images, and labels as shares (B, classes), as the user's own function does."""
        if not self.augmentation:
            return images, labels
        if labels.ndim == 1:
            labels = nn.functional.one_hot(labels, len(self.dataset.class_names)).float()
        changed = self.augmentation(images, labels, self.generator)
        if not self.clock.progressed:
            checks.check_augmented(changed, labels.shape)
        return changed

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the batch's loss, of which this rank has a share."""
        self.optimizer.zero_grad()
        # In one process the weight is 1, and a product would be two kernels more.
        loss = loss if self.loss_weight == 1 else loss * self.loss_weight
        self.scaler.scale(loss).backward()
        if not self.clock.progressed:
            checks.check_gradients(self.model, self.runtime.ranks)

    def take_step(self) -> None:
        """Have the optimizer change the weights."""
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch's images, unless they are fillers; a soft label by its top class."""
        if self.loss_weight:
            classes = labels if labels.ndim == 1 else labels.argmax(1)
            self.state.sums[0].add_(loss.detach() * len(labels))
            self.state.sums[1].add_((logits.argmax(1) == classes).sum())
            self.state.sums[2].add_(len(labels))

    def watch(self, batches: Batches, name: str) -> Iterator:
        """Yield the batches of an evaluation, at the epoch's size; stop or save before each."""
        batches = batches.at(self.sizes.test[self.epoch])
        with progress(batches, f"epoch {self.epoch + 1} {name}", self.runtime.rank) as bar:
            for batch in bar:
                self.stop_or_save()
                began = time.monotonic()
                yield batch
                self.clock.longest_step = max(self.clock.longest_step, time.monotonic() - began)

    def stop_or_save(self) -> None:
        """Stop if a rank has a reason to, or save if it is time to; the ranks agree on that."""
        clock, args, now = self.clock, self.args, time.monotonic()
        left = 60 * (args.max_minutes or math.inf) - (now - args.began)
        # Each start does at least one step or evaluation, so that a chain of jobs always ends.
        is_late = clock.progressed and left < clock.longest_step + 2 * clock.longest_save
        is_due = now - clock.saved_at > 60 * args.checkpoint_minutes
        mine = torch.tensor([clock.stop_signal, is_late, is_due])
        signum, must_stop, must_save = map(int, self.runtime.reduce(mine, "MAX").tolist())
        if signum or must_stop:
            cause = signal.Signals(signum).name if signum else f"--max-minutes {args.max_minutes:g}"
            where = f"{cause}: stopped in epoch {self.epoch + 1} after {self.step} steps"
            with guard(f"{where}, but not saved", OSError,
                       f"; make room, and {AGAIN} goes on from the last save", FAILED):
                self.save()
            newest = args.output_dir / checkpoint.CHECKPOINTS[0]
            raise UserError(f"{where}, saved in {newest}; {AGAIN} goes on", STOPPED)
        if must_save:
            self._save_or_warn()

    def seconds_left(self, evaluation: float | None = None) -> float:
        """Estimate the seconds left; `evaluation` is the time of this epoch's, once it is over."""
        step_time, left = self.step_seconds(), self.epoch
        train, test = self.sizes.train[left], self.sizes.test[left]
        steps = sum((self.sizes.train[epoch] / train) ** SIZE_POWER * self.steps_in(epoch)
                    for epoch in range(self.epoch, self.epochs)) - self.step
        if evaluation is None:
            # A forward pass takes about a third of a step.
            images = sum(len(split.labels) for split in self.dataset.evaluated().values())
            evaluation = step_time / 3 * images / self.args.batch_size
            evaluation *= (test / train) ** SIZE_POWER
        else:
            left += 1
        tests = sum((other / test) ** SIZE_POWER for other in self.sizes.test[left:])
        return step_time * steps + evaluation * tests

    def step_seconds(self) -> float:
        """Return the mean seconds of this epoch's steps, without the first, which may be slow."""
        steps = self.clock.steps[self.clock.slow :] or self.clock.steps
        # After a resumption there may be nothing left to train.
        return sum(steps) / len(steps) if steps else self.state.position.train_seconds / self.step

    def check_finite(self, *losses: float) -> None:
        """Raise UserError if the epoch's loss or one of these is not finite; all ranks call it."""
        if not math.isfinite(self.runtime.reduce(self.state.sums)[0].item() + sum(losses)):
            step = self.epoch * self.steps_per_epoch + self.step
            raise UserError(f"the loss was not finite by step {step}; start again with --overwrite "
                            "and a lower --lr, or --precision fp32", FAILED)

    def end_training(self) -> Metrics:
        """Return the epoch's means; check the loss, and average the ranks' statistics."""
        began = time.monotonic()
        self.check_finite()  # waits for the last steps on the device
        if self.clock.steps:
            self.clock.steps[-1] += time.monotonic() - began
        position = self.state.position
        position.seconds += self.clock.lap()
        if not position.train_seconds:  # not so after a resume in the middle of the evaluation
            position.train_seconds = position.seconds
            for tensor in self.state.statistics:
                torch.distributed.all_reduce(tensor)
                tensor /= self.runtime.ranks
        loss, correct, images = self.runtime.reduce(self.state.sums).tolist()
        return Metrics(loss / images, correct / images, math.nan, int(images))

    def end_epoch(self, results: dict[str, Metrics]) -> None:
        """Record the epoch, print its line, save if it is time; `results` are by split."""
        position = self.state.position
        position.seconds += self.clock.lap()
        self.check_finite(*(metrics.loss for metrics in results.values()))
        train, test = self.sizes.train[self.epoch], self.sizes.test[self.epoch]
        row = {"dataset": self.dataset.name, "epoch": self.epoch + 1, "epochs": self.epochs,
               "image_size": train, "test_image_size": test,
               "lr": self.optimizer.param_groups[0]["lr"], **metric_columns(results),
               "images_per_second": results["train"].images / (self.step * self.step_seconds()),
               "seconds": position.seconds,
               "eta_seconds": self.seconds_left(position.seconds - position.train_seconds)}
        self.state.position = Position(self.epoch + 1, history=[*position.history, row])
        self.state.sums.zero_()
        self.clock.steps, self.clock.slow, self.clock.progressed = [], 1, True
        log.info(epoch_line(row))
        is_due = time.monotonic() - self.clock.saved_at > SAVE_AFTER
        if self.epoch < self.epochs and self.runtime.broadcast(is_due):
            self._save_or_warn()
        if self.tensorboard and self.runtime.rank == 0:
            self.tensorboard.write(self.state.position.history)

    def save(self) -> None:
        """Write checkpoint.pt and metrics.csv; raises OSError if there is no new checkpoint."""
        began = time.monotonic()
        self.state.position.seconds += self.clock.lap()
        self.check_finite()
        content = self.state.capture(self.config, self.runtime)
        self.clock.saved_at = began  # also if the next line fails
        if self.runtime.rank == 0:
            checkpoint.save(self.args.output_dir, content)
        self.clock.saved_at = time.monotonic()
        self.clock.longest_save = max(self.clock.longest_save, self.clock.saved_at - began)

    def _save_or_warn(self) -> None:
        try:
            self.save()
        except OSError as error:
            log.info(f"warning    not saved ({error}); training goes on, the next save tries again")

    def finish(self, model: nn.Module) -> None:
        """Save; write `model`, the one that was tested, as model.pt; write the report."""
        model = model.module if isinstance(model, AveragedModel) else model
        log.info(f"peak memory {peak_memory(self.runtime.device):.2f} GB")
        history = self.state.position.history
        with guard(f"{self.args.output_dir}: not all is written", OSError,
                   f"; make room, and {AGAIN} does what is left", FAILED):
            if self.clock.progressed:
                self.save()
            if self.runtime.rank == 0:
                checkpoint.write_results(self.args.output_dir, model, history)
        accuracy, required = history[-1]["test_acc"], self.config["required_accuracy"]
        log.info(f"final test accuracy {accuracy:.2%} ({verdict(accuracy, required)})")
