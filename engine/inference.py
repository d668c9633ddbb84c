"""Use a finished model: test it, or classify pictures with it."""

from argparse import Namespace
from collections.abc import Callable

import torch
from torch import nn

import data
from cifar100.classes import CLASS_NAMES
from engine import describe, loop, weights
from engine.checks import check_outputs
from engine.pictures import count_passed_over, read_pictures
from engine.runtime import Runtime
from report import evaluation, runs
from report.log import log_words, progress
from utils import log


def use(model: nn.Module, args: Namespace, runtime: Runtime, load_data: Callable,
        stats: data.Stats, batch_size: int, size: int) -> None:
    """Load a run's model.pt into `model`; classify pictures, or report on the test set.

    Images are `size` x `size` pixels. `load_data(args)` returns a Dataset. Raises UserError.
    """
    runtime = runtime._replace(compile=False)  # which takes longer than one pass over the images
    model = runtime.place(model)
    weights.load(model, args.output_dir / "model.pt")
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
    note = runs.code_has_changed(args.trained.get("code"), runs.describe_code())
    if note and args.trained:
        log.info(note)
    if args.predict:
        evaluation.print_predictions(logits, args.trained.get("classes", CLASS_NAMES), files)
        count_passed_over(*passed_over)
    else:
        evaluation.write_test_report(logits, dataset, args.output_dir)
