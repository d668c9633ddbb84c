"""Use the model of a run: test it, or classify pictures with it."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import data
from cifar100.classes import CLASS_NAMES
from engine import checkpoint, describe, loop, weights
from engine.checks import check_outputs
from engine.pictures import count_passed_over, read_pictures
from engine.runtime import Runtime
from report import evaluation, runs
from report.log import log_words, progress
from utils import guard, load_tensors, log


def use(model: nn.Module, args: Namespace, runtime: Runtime, load_data: Callable,
        stats: data.Stats, batch_size: int, size: int) -> None:
    """Load a run's weights into `model`; classify pictures, or report on the test set.

    Images are `size` x `size` pixels. `load_data(args)` returns a Dataset. Raises UserError.
    """
    runtime = runtime._replace(compile=False, graphs=False)  # one pass needs neither
    model = runtime.place(model)
    unfinished = _load(model, args.output_dir)
    if args.predict:
        side = args.trained.get("image_side", 32)
        images, files, *passed_over = read_pictures(args.predict, side, runtime.rank)
        split = data.Split(images, torch.zeros(len(images), dtype=torch.int64))  # labels not read
    else:
        dataset = load_data(args)
        data.check(dataset)
        check_outputs(model, {size}, dataset, runtime)
        log_words(describe.header(args, runtime, dataset, model))
        split = dataset.test
    batches = data.Batches(split, batch_size, stats, runtime, size)
    logits, _ = loop.infer(model, progress(batches, "test", runtime.rank), runtime)
    if runtime.rank:
        return
    if note := runs.code_has_changed(args.trained.get("code"), runs.describe_code()):
        log.info(note)
    if args.predict:
        evaluation.print_predictions(logits, args.trained.get("classes", CLASS_NAMES), files)
        count_passed_over(*passed_over)
    else:
        evaluation.write_test_report(logits, dataset, args.output_dir, unfinished)


def _load(model: nn.Module, directory: Path) -> str:
    """Load model.pt, or a checkpoint if the run has not written it; return a line on that."""
    path = directory / "model.pt"
    if path.exists():
        weights.load(model, load_tensors(path), path)
        return ""
    path, content = checkpoint.read(directory)
    weights.load(model, content["model"], path)
    with guard(f"{path}: not a checkpoint", Exception):
        position = checkpoint.Position(**content["position"])
    steps = f" and {position.step} steps of the next" if position.step else ""
    line = f"{path}, after epoch {position.epoch}{steps}: the run is not finished"
    if content.get("keep"):
        line += f"; the network itself, not what the run keeps ({', '.join(content['keep'])})"
    log_words({"model": line})
    return line
