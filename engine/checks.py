"""Check the user's own network, optimizer, state and augmentation: a misfit is one line."""

import io
import pickle
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from data import Dataset
from engine.runtime import Runtime
from utils import UserError, guard, log, plain

BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d  # which average within a process


def check_groups(model: nn.Module, groups: list[dict]) -> None:
    """Raise UserError unless every weight that is to be trained is in exactly one group."""
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("all weights of the network are frozen (requires_grad is False)")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (count := grouped.count(id(parameter))) != 1:
            raise UserError(f"the network's {name} is in {count} groups of the optimizer, not in "
                            "one: see make_optimizer")


def check_state(parts: dict[str, Any]) -> None:
    """Raise UserError unless a checkpoint can hold the states of these, and give them back."""
    for name, part in parts.items():
        with guard(f"{name} must have a state_dict() of tensors and plain values",
                   (pickle.PickleError, AttributeError, TypeError, ValueError, LookupError)):
            file = io.BytesIO()
            torch.save(plain(part.state_dict()), file)
            file.seek(0)
            torch.load(file, weights_only=True)


def check_gradients(model: nn.Module, ranks: int) -> None:
    """Name the weights that no gradient reaches; raises UserError if there are several ranks."""
    unused = [name for name, parameter in model.named_parameters()
              if parameter.requires_grad and parameter.grad is None]
    if unused and ranks > 1:
        raise UserError(f"no gradient reaches {', '.join(unused)}: the processes of torchrun "
                        "must share all; remove them, or set requires_grad = False")
    if unused:
        log.info(f"note       no gradient reaches {', '.join(unused)} in the first step")


def check_augmented(changed: tuple[Tensor, Tensor], expected: torch.Size) -> None:
    """Raise UserError unless an augmentation kept the batch's size, and returned shares."""
    if not (isinstance(changed, (tuple, list)) and len(changed) == 2
            and all(isinstance(part, Tensor) for part in changed)):
        raise UserError("the augmentation must return two tensors, images and labels")
    images, labels = changed
    sums = labels.float().sum(-1)
    is_kept = len(images) == expected[0] and labels.shape == expected
    if not (is_kept and labels.dtype == torch.float32 and (sums - 1).abs().max() < 1e-3):
        raise UserError(
            f"the augmentation returned {len(images)} images, and labels {tuple(labels.shape)} of "
            f"{labels.dtype} with sums of {sums.min():g} to {sums.max():g}; there must be "
            f"{expected[0]}, and {tuple(expected)} of torch.float32 with sums of 1")


@torch.no_grad()  # not inference mode: what a network caches would be of no use in training
def check_outputs(model: nn.Module, sizes: set[int], dataset: Dataset, runtime: Runtime) -> None:
    """Raise UserError unless the network has an output (B, C) for each class, at every size."""
    classes = len(dataset.class_names)
    model.eval()
    for size in sorted(sizes, reverse=True):
        is_small = size < max(sizes)
        advice = "; --low-res 0 trains on images of one size" if is_small else ""
        with (guard(f"the network cannot take images of {size} x {size} pixels",
                    Exception if is_small else (AssertionError, ValueError), advice),
              runtime.autocast()):
            # forward() itself is never compiled.
            logits = model.forward(torch.zeros(2, 3, size, size, device=runtime.device))
        if logits.ndim != 2 or logits.shape[1] != classes:
            raise UserError(f"the network's outputs are {tuple(logits.shape)}, and must be "
                            f"({len(logits)}, {classes}), for there are {classes} classes")


def check_single_images(model: nn.Module, still: set[nn.Module], images: int, batch_size: int,
                        epochs: Iterable[tuple[int, int]], runtime: Runtime) -> None:
    """Raise UserError if batch norm cannot train on a batch of which a process has one image.

    `still` are modules in evaluation mode, and `images` is how many there are to train on. `epochs`
    are the steps of each, and its images' side in pixels.
    """
    # Of a batch of fewer images, one process gets a single image, of its own or as a filler.
    least, last = 2 * runtime.ranks, images % batch_size or batch_size
    sizes = {size for steps, size in epochs
             if (last if steps * batch_size >= images else batch_size) < least}
    # With fewer images than that no other batch size would help.
    if not sizes or images < least:
        return

    def check_input(module: nn.Module, inputs: tuple[Tensor]) -> None:
        is_norm = isinstance(module, BATCH_NORMS) and module not in still
        if is_norm and inputs[0].numel() == inputs[0].shape[1]:  # one value a channel
            raise UserError(f"{images:,} images in batches of {batch_size:,} leave a process one "
                            "image, on which batch norm cannot train; try another --batch-size")

    model.eval()  # so that the trial leaves no trace
    with register_module_forward_pre_hook(check_input), torch.no_grad(), runtime.autocast():
        for size in sizes:
            model.forward(torch.zeros(1, 3, size, size, device=runtime.device))
