"""Find, download and read the weights of a network, and fit them to it."""

import hashlib
from pathlib import Path

import torch
from torch import nn
from torchvision.models import ResNet18_Weights

from utils import DamagedFile, UserError, guard, load_tensors, log

ROOT = Path(__file__).resolve().parents[1]  # where the scripts lie
# The ImageNet file of the course (2018) and the one that torchvision downloads today.
RESNET18_FILES = ("resnet18-5c106cde.pth", "resnet18-f37072fd.pth")


def load_pretrained(model: nn.Module, head: str, weights: str | None, download: bool) -> str:
    """Load ImageNet weights into all layers but `head`; return their file; raises UserError.

    `weights` is a file. By default it is the first of RESNET18_FILES that lies beside the scripts
    or in torch's cache, else torchvision's own hash-checked download.
    """
    cache = Path(torch.hub.get_dir(), "checkpoints")
    known = (folder / name for folder in (ROOT, cache) for name in RESNET18_FILES)
    path = Path(weights) if weights else next(filter(Path.is_file, known), None)
    if not path:
        path, official = cache / RESNET18_FILES[1], ResNet18_Weights.IMAGENET1K_V1
        ways_out = (f"; put {path.name} beside the scripts, or name a file with --weights, or make "
                    "a dry run with --weights random")
        if not download:
            raise UserError(f"no ImageNet weights (--no-download forbids to fetch them){ways_out}")
        with guard(f"no ImageNet weights: downloading {official.url} failed", Exception, ways_out):
            official.get_state_dict(check_hash=True, weights_only=True)
    load(model, path, head)
    if path.name in RESNET18_FILES:
        # The name holds 8 digits of the SHA-256; the format has no checksum of its own.
        digest = path.stem.rpartition("-")[2]
        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
            log.info(f"note       {path}: not the official SHA-256; only its form is checked")
    log.info(f"weights    {path}")
    return str(path)


def load(model: nn.Module, path: Path | str, head: str = "") -> None:
    """Load a file's state_dict, but for the layer `head`; raises UserError if it does not fit."""
    if path is None:
        raise UserError("no weights: name their file, for example with --weights")
    try:
        state = load_tensors(path)
    except DamagedFile as error:
        raise UserError(f"{error}; get or make it again") from error
    with guard(f"{path}: weights of another network", Exception):
        now = model.state_dict()
        kept = {name: now[name] for name in now if head and name.startswith(f"{head}.")}
        if misfit := difference({**state, **kept}, now):
            raise UserError(f"{path}: weights of another network: {misfit}")
        model.load_state_dict({**state, **kept}, strict=False)


def difference(state: dict, now: dict) -> str:
    """Describe the first difference of two state_dicts in names or shapes; "" if there is none."""
    for name in {**state, **now}:
        if name.endswith("num_batches_tracked"):
            continue  # PyTorch before 0.4.1 did not count batches
        was, has = (f"{name} {tuple(each[name].shape)}" if name in each else f"no {name}"
                    for each in (state, now))
        if was != has:
            return f"it has {was}, where this one has {has}"
    return ""
