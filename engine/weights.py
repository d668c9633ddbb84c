"""Find and download the first weights of a network, and fit those of a file to it."""

from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from engine import weight_files
from utils import UserError, guard

ROOT = Path(__file__).resolve().parents[1]  # where the scripts lie
# The ImageNet file of the course (2018) and the one that torchvision downloads today.
RESNET18_FILES = ("resnet18-5c106cde.pth", "resnet18-f37072fd.pth")
# Of batch norms, which did not count before PyTorch 0.4.1, and of a profiler, thop.
COUNTERS = ("num_batches_tracked", "total_ops", "total_params")
CONTAINERS = dict, list, tuple


class Found(NamedTuple):
    """A dict of tensors in a file, and the prefix that leads to the names of a network."""

    place: str  # the keys that lead to the dict, joined by "/"
    tensors: dict[str, Tensor]
    prefix: str

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors whose names have the prefix, without it."""
        return {name[len(self.prefix):]: value for name, value in self.tensors.items()
                if name.startswith(self.prefix)}

    def origin(self) -> list[str]:
        """Say where the tensors stand, in no, one or two phrases."""
        phrases = ("from its", self.place), ("without the prefix", self.prefix)
        return [f"{phrase} {text!r:.99}" for phrase, text in phrases if text]


def find_imagenet(download: bool) -> str:
    """Return a file of ResNet-18's ImageNet weights; raises UserError.

    It is the first of RESNET18_FILES that lies beside the scripts or in torch's cache, else
    torchvision's own hash-checked download.
    """
    cache = Path(torch.hub.get_dir(), "checkpoints")
    known = (folder / name for folder in (ROOT, cache) for name in RESNET18_FILES)
    if path := next(filter(Path.is_file, known), None):
        return str(path)
    path, official = cache / RESNET18_FILES[1], ResNet18_Weights.IMAGENET1K_V1
    ways_out = (f"; put {path.name} beside the scripts, or name a file with --weights, or make "
                "a dry run with --weights random")
    if not download:
        raise UserError(f"no ImageNet weights (--no-download forbids to fetch them){ways_out}")
    with guard(f"no ImageNet weights: downloading {official.url} failed", Exception, ways_out):
        official.get_state_dict(check_hash=True, weights_only=True)
    return str(path)


def load_first(model: nn.Module, args: Namespace, head: str) -> None:
    """Have a run that begins start from --weights, if there are any; raises UserError.

    `args.weights_in_words` then says which they are.
    """
    if not args.is_new or not args.weights:
        return
    args.weights_in_words = args.weights
    if args.weights == "random":
        return
    path = Path(args.weights)
    weights, words = fit(path, model, head)
    with guard(f"{path}: weights of another network", Exception):
        model.load_state_dict(weights, strict=False)
    args.weights_in_words += f" ({words})" if words else ""


def fit(path: Path, model: nn.Module, head: str) -> tuple[dict[str, Tensor], str]:
    """Return the weights of a file that a model takes, by its names, and how they were found.

    It takes all but those of the layer `head`, and these, too, if they fit. Raises UserError if
    the file has no dict of tensors that has all of them, and no others in the model's layers.
    """
    now = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    needed = {name: value for name, value in now.items()
              if not (_is_counter(name) or _is_in(name, head))}
    layers = {name.split(".")[0] for name in needed} | dict(model.named_children()).keys()
    misfits = []
    for found in _find(weight_files.read(path), needed):
        weights = {name: value for name, value in found.weights().items()
                   if name.split(".")[0] in layers and not _is_in(name, head)}
        misfit = difference(weights, needed)
        if not misfit:
            return _take(found, now, head)
        misfits.append(", ".join([misfit[:300], *found.origin()]))
    if not misfits:
        raise UserError(f"{path}: holds no dict of tensors")
    raise UserError(f"{path}: weights of another network: {misfits[0]}")


def _find(content: Any, needed: dict) -> list[Found]:  # noqa: ANN401
    """Return where a file's content has all these names, or else where it has most of them."""
    queue, seen, places = [("", content)], set(), []
    for place, container in queue:  # which grows meanwhile, so that outer ones come first
        if id(container) in seen or not isinstance(container, CONTAINERS):
            continue
        seen.add(id(container))
        items = container if isinstance(container, dict) else dict(enumerate(container))
        queue += [(f"{place}/{key}" if place else str(key), each) for key, each in items.items()
                  if isinstance(each, CONTAINERS)]
        tensors = {key: value for key, value in items.items()
                   if isinstance(key, str) and isinstance(value, Tensor)}
        counts = Counter(name[: len(name) - len(wanted)] for name in tensors for wanted in needed
                         if f".{name}".endswith(f".{wanted}"))
        places += [(count, Found(place, tensors, prefix))
                   for prefix, count in (counts or {"": 0}).items() if tensors]
    places.sort(key=lambda place: place[0], reverse=True)
    whole = [found for count, found in places if count == len(needed)]
    return whole or [found for _, found in places[:1]]


def _take(found: Found, now: dict[str, Tensor], head: str) -> tuple[dict[str, Tensor], str]:
    """Return what `fit` does of the tensors that it found, for a model with the state `now`."""
    weights = found.weights()
    its_head, head_now = ({name: value for name, value in state.items() if _is_in(name, head)}
                          for state in (weights, now))
    keeps_head = not difference(its_head, head_now)
    taken = {name: value for name, value in weights.items()
             if name in now and value.shape == now[name].shape
             and (keeps_head or name not in its_head)}
    phrases, last = found.origin(), its_head.get(f"{head}.weight")
    if its_head:
        size = f" of {len(last)}" if last is not None and last.ndim else ""
        phrases.append(f"its head{size} {'kept' if keeps_head else 'left out'}")
    elif head_now:
        phrases.append("it has no head")
    used = {found.prefix + name for name in (*taken, *its_head)}
    others = [name for name in found.tensors if name not in used and not _is_counter(name)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        phrases.append(f"{others[0]!r:.99}{more} left out")
    return taken, ", ".join(phrases)


def load(model: nn.Module, state: dict, path: Path) -> None:
    """Load a state_dict that was read from `path`; raises UserError unless all of it fits."""
    with guard(f"{path}: weights of another network", Exception):
        if misfit := difference(state, model.state_dict()):
            raise UserError(f"{path}: weights of another network: {misfit}")
        model.load_state_dict(state, strict=False)


def difference(state: dict, now: dict) -> str:
    """Describe the first difference of two state_dicts in names or shapes; "" if there is none."""
    for name in {**state, **now}:
        was, has = (_describe(each, name) for each in (state, now))
        if was != has and not _is_counter(name):
            return f"it has {was}, where this one has {has}"
    return ""


def _describe(state: dict, name: str) -> str:
    if name not in state:
        return f"no {name}"
    value = state[name]
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return f"{name}, which is no plain tensor"
    kind = "" if value.is_floating_point() else f" of {str(value.dtype).removeprefix('torch.')}"
    return f"{name} {tuple(value.shape)}{kind}"


def _is_counter(name: str) -> bool:
    return str(name).rpartition(".")[2] in COUNTERS


def _is_in(name: str, layer: str) -> bool:
    return bool(layer) and name.startswith(f"{layer}.")
