"""Describe a run: its config.json, and the first lines of its log."""

import hashlib
import platform
import re
import zlib
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from data import Dataset
from engine.flags import as_json
from engine.optim import Muon, Sizes, cutmix_by_epoch, kinds, rates
from engine.runtime import Runtime
from report import runs


def header(args: Namespace, runtime: Runtime, dataset: Dataset, model: nn.Module) -> dict:
    """Return the first lines of a log, by their first word: command, device, data and network."""
    val = f", {len(dataset.val.labels):,} validation" if dataset.val else ""
    shape = network(model)
    is_frozen = shape["trained"] < shape["parameters"]
    trained = f", of which {shape['trained']:,} are trained" if is_frozen else ""
    pixels = "" if dataset.side == 32 else f" of {dataset.side} x {dataset.side} pixels"
    return {"command": args.command, "device": f"{runtime}, torch {torch.__version__}",
            "data": f"{dataset.name}: {len(dataset.train.labels):,} training{val} and "
                    f"{len(dataset.test.labels):,} test images{pixels}, {dataset.source}",
            "network": f"{shape['name']}, {shape['parameters']:,} parameters{trained}"}


def config(args: Namespace, runtime: Runtime, dataset: Dataset, model: nn.Module,
           required: float, optimization: dict[str, Any], plan: dict[str, str]) -> dict:
    """Return the content of config.json; `plan` has lines of the log that no flag shows."""
    # They stand beside the flags; see engine.flags.Parser.read.
    not_flags = ("recipe", "trained", "is_new", "script", "command", "began", "weights_in_words")
    settings = {name: value for name, value in vars(args).items() if name not in not_flags}
    settings = as_json(settings)
    settings["precision"] = runtime.precision
    if optimization["optimizer"] != "Muon":
        settings["optimizer"] = optimization["optimizer"]
    code, lines = runs.describe_code(), header(args, runtime, dataset, model)
    if "weights_in_words" in args:
        lines["weights"] = args.weights_in_words
    lines["code"] = runs.name_of_code(code).removeprefix("code ")
    shown = settings | {"dataset": dataset.name}  # the user's own set has no flag
    lines["recipe"] = ", ".join(
        f"{name.replace('_', ' ')} {shown[name]}" for name in args.recipe
        if shown.get(name) is not None and shown[name] is not False)
    weights = Path(settings.get("weights") or "")
    has_file = weights.is_file()
    return {"script": args.script, "dataset": dataset.name,
            "required_accuracy": required if dataset.name == "cifar100" else None,
            "runtime": str(runtime), "torch": str(torch.__version__),
            "torchvision": torchvision.__version__, "numpy": np.__version__,
            "python": platform.python_version(), "system": platform.platform(),
            "processor": processor(), "processes": runtime.ranks,
            "code": code, "data": dataset.checksum, "image_side": dataset.side,
            "classes": list(map(str, dataset.class_names)), "network": network(model),
            "recipe": list(args.recipe), "settings": settings, "optimization": optimization,
            "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if has_file else "",
            "in_words": lines | plan}


def processor() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")  # of Linux, where platform knows only the architecture
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return found[1] if found else platform.processor()


def optimization(model: nn.Module, scheduler: LRScheduler,
                 total_steps: int) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the log lines of optimizer and schedule, and what a resumed run must keep of them."""
    kind_of, by_step, optimizer = kinds(model), rates(scheduler, total_steps), scheduler.optimizer
    name, schedule = type(optimizer).__name__, type(scheduler).__name__
    words, identity = [], {"optimizer": name}
    for number, group in enumerate(optimizer.param_groups):
        trained = [weight for weight in group["params"] if weight.requires_grad]
        count = sum(weight.numel() for weight in trained)
        settings = {key: value for key, value in group.items() if key != "params"}
        identity |= {f"{key} of group {number}": value
                     for key, value in {**settings, "weights": count}.items()}
        what = ", ".join(dict.fromkeys(kind_of.get(weight, "others") for weight in trained))
        called = ("Muon" if "muon" in group else "SGD") if isinstance(optimizer, Muon) else name
        peak = max(of_step[number] for of_step in by_step)
        words.append(f"{called} of {count:,} weights ({what}) at peak rate {peak:.3g}, decay "
                     f"{group.get('weight_decay', 0):g}")
    first = [of_step[0] for of_step in by_step]  # the rates of the first group
    top = first.index(max(first))
    line = (f"{schedule}: rate {first[0]:.3g} in step 1, {first[top]:.3g} in step {top + 1:,}, "
            f"{first[-1]:.3g} in step {total_steps:,}")
    identity["schedule"] = f"{schedule}, rates {zlib.crc32(repr(by_step).encode()):08x}"
    return {"optimizer": "; ".join(words), "schedule": line}, as_json(identity)


def plan(args: Namespace, model: nn.Module, sizes: Sizes, total_steps: int, steps_per_epoch: int,
         augment: object, in_evaluation_mode: set[nn.Module]) -> dict[str, str]:
    """Return other log lines for facts that no flag shows, keyed by their first word."""
    lines = {}
    if in_evaluation_mode:
        lines["modes"] = (f"{len(in_evaluation_mode)} of {len(list(model.modules()))} modules "
                          "stay in evaluation mode")
    epochs = [f"{count} of {side}px" for side, count in Counter(sizes.train).items()]
    changes = ["crop", "flip"]
    if args.cutmix:
        mixed = cutmix_by_epoch(len(sizes.train), args.cutmix)
        changes.append(f"CutMix until epoch {len(mixed) - mixed.count(0)}")
    if augment:
        changes.append(getattr(augment, "__name__", type(augment).__name__))
    return lines | {
        "output": str(args.output_dir),
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
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
