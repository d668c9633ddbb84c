"""The loops: train one epoch, and evaluate."""

import functools
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from data import epoch_seed
from engine.graphs import Graphs
from engine.optim import frozen_modules
from engine.run import Run
from engine.runtime import Runtime
from report.log import Metrics, duration, progress, score
from utils import log

TELL_AFTER = 20  # seconds of training in an epoch, after which the log estimates the time left
CHECK_EVERY = 25  # steps between looks at the loss on the host; each costs one synchronisation


def train_one_epoch(run: Run, batches: Iterable, train_step: Callable) -> Metrics:
    """Train on what is left of the current epoch; return the means over the whole of it.

    `batches` yield float images (B, 3, H, W), labels, int64 (B,) or float shares (B, classes), and
    a weight, from step `run.step` on. `train_step(run, images, labels)` returns loss and logits.
    Frozen modules, and those in evaluation mode at run.start, stay in evaluation mode.
    Raises UserError if the loss is not finite, or if the run must stop.
    """
    take = functools.partial(train_on, run, train_step)
    if run.runtime.graphs:
        run.graphs = run.graphs or Graphs(run)
        take = functools.partial(run.graphs.take, take)
    run.model.train()
    in_evaluation_mode = run.in_evaluation_mode | frozen_modules(run.model)
    if run.step == 0:
        torch.manual_seed(epoch_seed(run.args.seed, run.epoch) + run.runtime.rank)
    batches, end = iter(batches), run.steps_in(run.epoch)
    with progress(None, f"epoch {run.epoch + 1} train", run.runtime.rank, run.step, end) as bar:
        while run.step < end:
            # Save before the batch is drawn: a resumed run then draws the same random batch.
            run.stop_or_save()
            began = time.monotonic()
            run.seed_augmentation()
            for module in in_evaluation_mode:
                module.training = False
            # Held until the next step: if all memory is free by then, a CPU is up to 3 % slower.
            _held = take(next(batches))
            run.scheduler.step()
            run.state.position.step += 1
            if run.step % CHECK_EVERY == 0:
                run.check_finite()
            run.clock.end_step(began)
            bar.update()
            if not run.has_logged_time and sum(run.clock.steps[1:]) > TELL_AFTER:
                run.has_logged_time = True
                bar.clear()
                log.info(f"time       about {duration(run.seconds_left())} left")
    return run.end_training()


def train_on(run: Run, train_step: Callable, batch: Iterable) -> tuple[Tensor, Tensor]:
    """Take a step on a batch; return its loss and the logits.

    A CUDA graph repeats what this does on the device, and no more.
    """
    images, labels, run.loss_weight = batch
    images, labels = run.augment(images, labels)
    loss, logits = train_step(run, images, labels)
    run.count(loss, logits, labels)
    return loss, logits


@torch.inference_mode()
def infer(model: nn.Module, batches: Iterable, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Return logits, float32 (N, classes), and labels, int64 (N,), of all ranks, on the CPU."""
    model.eval()
    all_logits, all_labels = [], []
    for images, labels in batches:
        with runtime.autocast():
            all_logits.append(model(images).float())
        all_labels.append(labels)

    def in_order(values: list[Tensor]) -> Tensor:
        # One transfer for all batches of a rank; then the ranks take their turn, batch by batch.
        of_ranks = runtime.gather((torch.cat(values).cpu(), [len(value) for value in values]))
        turns = zip(*(part.split(lengths) for part, lengths in of_ranks), strict=True)
        return torch.cat([batch for turn in turns for batch in turn])

    return in_order(all_logits), in_order(all_labels)


def evaluate(model: nn.Module, batches: Iterable, runtime: Runtime) -> Metrics:
    """Return cross entropy, top-1 and top-5 accuracy over the batches of all ranks."""
    return score(*infer(model, batches, runtime))
