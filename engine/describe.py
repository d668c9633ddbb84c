"""Describe a run: its config.json, and the first lines of its log."""

import platform
from argparse import Namespace
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from data import Dataset
from engine.optim import cutmix_by_epoch
from engine.runtime import Runtime
from report import runs


def header(args: Namespace, runtime: Runtime, dataset: Dataset, model: nn.Module) -> dict:
    """Return the first lines of a log, by their first word: command, device, data and network."""
    val = f", {len(dataset.val.labels):,} validation" if dataset.val else ""
    return {"command": args.command, "device": f"{runtime}, torch {torch.__version__}",
            "data": f"{dataset.name}: {len(dataset.train.labels):,} training{val} and "
                    f"{len(dataset.test.labels):,} test images, {dataset.source}",
            "network": "{name}, {parameters:,} parameters".format(**network(model))}


def config(args: Namespace, runtime: Runtime, dataset: Dataset, model: nn.Module,
           required: float, plan: dict[str, str]) -> dict:
    """Return the content of config.json; `plan` has lines of the log that no flag shows."""
    # They stand beside the flags; see engine.flags.Parser.read.
    not_flags = ("recipe", "trained", "script", "command", "began")
    settings = {name: str(value) if isinstance(value, Path) else value
                for name, value in vars(args).items() if name not in not_flags}
    settings["precision"] = runtime.precision
    code, lines = runs.describe_code(), header(args, runtime, dataset, model)
    lines["code"] = runs.name_of_code(code).removeprefix("code ")
    lines["recipe"] = ", ".join(
        f"{name.replace('_', ' ')} {settings[name]}" for name in (*args.recipe, "weights")
        if settings.get(name) is not None and settings[name] is not False)
    return {"script": args.script, "dataset": dataset.name,
            "required_accuracy": required if dataset.name == "cifar100" else None,
            "runtime": str(runtime), "torch": str(torch.__version__),
            "python": platform.python_version(), "system": platform.platform(),
            "code": code, "data": dataset.checksum, "classes": list(map(str, dataset.class_names)),
            "network": network(model), "recipe": list(args.recipe), "settings": settings,
            "in_words": lines | plan}


def plan(args: Namespace, optimizer: torch.optim.Optimizer, sizes: list[int],
         total_steps: int, steps_per_epoch: int, augment: object) -> dict[str, str]:
    """Return log lines for facts that no flag shows, keyed by their first word."""
    groups = []
    for group in optimizer.param_groups:
        count = sum(parameter.numel() for parameter in group["params"])
        groups.append(f"{'Muon' if 'muon' in group else 'SGD'} of {count:,} weights at rate "
                      f"{group.get('max_lr', group['lr']):g}, decay {group['weight_decay']:g}")
    epochs = [f"{count} of {size}px" for size, count in Counter(sizes).items()]
    changes = ["crop", "flip"]
    if args.cutmix:
        mixed = cutmix_by_epoch(len(sizes), args.cutmix)
        changes.append(f"CutMix until epoch {len(mixed) - mixed.count(0)}")
    if augment:
        changes.append(getattr(augment, "__name__", "AUGMENT"))
    return {"optimizer": "; ".join(groups), "output": str(args.output_dir),
            "steps": f"{total_steps:,}, {steps_per_epoch:,} an epoch",
            "images": f"epochs: {', '.join(epochs)}; random {', '.join(changes)}"}


def network(model: nn.Module) -> dict:
    """Return the network's name, its number of parameters, and the rows of its layers' table."""
    layers = []
    for name, layer in model.named_children():
        kind = type(layer).__name__
        parts = {type(part).__name__ for part in layer.children()}
        if isinstance(layer, nn.Sequential) and len(parts) == 1:
            kind = f"{len(layer)} x {parts.pop()}"
        layers.append([name, kind, sum(p.numel() for p in layer.parameters())])
    return {"name": type(model).__name__, "layers": layers,
            "parameters": sum(p.numel() for p in model.parameters())}
