"""The loops: train one epoch, and evaluate."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine.run import Run
from engine.runtime import Runtime
from report.log import Metrics, duration, progress, score
from utils import log

TELL_AFTER = 20  # seconds of an epoch's training after which a log gets an estimate of the time
CHECK_EVERY = 25  # steps between looks at the loss on the host; each costs one synchronisation

# The script's own: one step on images (B, 3, H, W) and labels; returns the loss and logits (B, C).
TrainStep = Callable[[Run, Tensor, Tensor], tuple[Tensor, Tensor]]


def train_one_epoch(run: Run, batches: Iterable, train_step: TrainStep) -> Metrics:
    """Train on what is left of the current epoch; return the means over the whole of it.

    `batches` yield float images (B, 3, H, W), labels and a weight, from step `run.step` on. Labels
    are int64 (B,), or float shares (B, classes), as CutMix or an augmentation makes them. Raises
    UserError if the loss stops being finite, or on a signal to stop.
    """
    run.model.train()
    if run.step == 0:
        torch.manual_seed(run.rank_seed())
    batches, end = iter(batches), run.steps_of_epochs[run.epoch]
    with progress(None, f"epoch {run.epoch + 1} train", run.runtime.rank, run.step, end) as bar:
        while run.step < end:
            # Before the batch is drawn: if it is random, it is the same after a resume.
            run.stop_or_save()
            run.clock.begin_step()
            images, labels, run.weight = next(batches)
            images, labels = run.augment(images, labels)
            loss, logits = train_step(run, images, labels)
            run.count(loss, logits, labels)
            if run.step % CHECK_EVERY == 0:
                run.check_finite()
            run.clock.end_step()
            show_time_left(run, bar)
            bar.update()
    return run.end_training()


def show_time_left(run: Run, bar: tqdm) -> None:
    """Show the time left at the bar. Without a terminal, log it once, TELL_AFTER seconds on."""
    is_due = not run.has_logged_time and sum(run.clock.steps[1:]) > TELL_AFTER
    if bar.disable and not is_due:
        return
    left = duration(run.seconds_left())
    bar.set_postfix_str(f"{left} left in all", refresh=False)
    if bar.disable:
        run.has_logged_time = True
        log.info(f"time       about {left} left, at {run.step_seconds():.3g} s a step")


@torch.inference_mode()
def infer(model: nn.Module, batches: Iterable, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Return all ranks' logits, float32 (N, classes), and labels, int64 (N,), in order, on the CPU.

    `batches` yield float images (B, 3, H, W) and labels (B,). The model runs in evaluation mode.
    """
    model.eval()
    logits, labels = [], []
    for images, targets in batches:
        with runtime.autocast():
            logits.append(model(images).float())
        labels.append(targets)
    lengths = [len(targets) for targets in labels]

    def in_order(values: list[Tensor]) -> Tensor:
        # One transfer for all batches of a rank; then the ranks take their turn, batch by batch.
        of_ranks = runtime.gather((torch.cat(values).cpu(), lengths))
        turns = zip(*(part.split(lengths) for part, lengths in of_ranks), strict=True)
        return torch.cat([batch for turn in turns for batch in turn])

    return in_order(logits), in_order(labels)


def evaluate(model: nn.Module, batches: Iterable, runtime: Runtime) -> Metrics:
    """Return cross entropy, top-1 and top-5 accuracy over the batches of all ranks."""
    return score(*infer(model, batches, runtime))
