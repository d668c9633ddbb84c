"""Check a network and an optimizer of one's own, so that a mistake is one line."""

import torch
from torch import nn

from data import Dataset
from engine.runtime import Runtime
from utils import UserError, log


def check_groups(model: nn.Module, groups: list[dict]) -> None:
    """Raise UserError unless every weight that is to be trained is in exactly one group."""
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (count := grouped.count(id(parameter))) != 1:
            raise UserError(f"the network's {name} is in {count} groups of the optimizer, not in "
                            "one: see make_optimizer")


def check_gradients(model: nn.Module, ranks: int) -> None:
    """Name the weights that no gradient reaches; raises UserError if there are several ranks."""
    unused = [name for name, parameter in model.named_parameters()
              if parameter.requires_grad and parameter.grad is None]
    if unused and ranks > 1:
        raise UserError(f"no gradient reaches {', '.join(unused)}: the processes of torchrun "
                        "must share all; remove them, or set requires_grad = False")
    if unused:
        log.info(f"note       no gradient reaches {', '.join(unused)} in the first step")


@torch.inference_mode()
def check_outputs(model: nn.Module, sizes: list[int], dataset: Dataset, runtime: Runtime) -> None:
    """Raise UserError unless the network has an output (B, C) for each class, at every size."""
    classes, was_training = len(dataset.class_names), model.training
    model.eval()
    for size in dict.fromkeys(sizes):
        with runtime.autocast():
            # forward() itself is never compiled.
            logits = model.forward(torch.zeros(2, 3, size, size, device=runtime.device))
        if logits.ndim != 2 or logits.shape[1] != classes:
            raise UserError(f"the network's outputs are {tuple(logits.shape)}, and must be "
                            f"({len(logits)}, {classes}), for there are {classes} classes")
    model.train(was_training)
