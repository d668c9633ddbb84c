"""The weights of a network arrive from any file that holds them, or a line says what is missing."""

import argparse
import copy
import functools
import pickle
import re
import shlex
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import SHARED, equal, needs_weights, script, without_pictures
from torch import nn

import data
import engine.weights
import models
from models import ResNet
from utils import UserError, load_tensors


@pytest.fixture(scope="module")
def imagenet():
    """The state of torchvision's ResNet-18 with 1000 classes, in which no two tensors are equal."""
    torch.manual_seed(1)
    state = torchvision.models.resnet18().state_dict()
    for name, value in state.items():
        value.copy_(torch.rand(value.shape) if value.is_floating_point() else len(name))
    return state


@functools.cache
def resnet18() -> nn.Module:
    """Return part 2's network, always the same one."""
    return models.resnet18()


def part_2() -> nn.Module:
    """Return a copy of part 2's network, which takes a tenth of the time to make one."""
    return copy.deepcopy(resnet18())


def few_images() -> None:
    """Have a synthetic set of 200 training and 100 test images, and draw nothing, for speed."""
    data.synthetic = functools.partial(data.synthetic, 2, 1)
    without_pictures()


def load(path: Path, model: nn.Module | None = None, head: str = "fc") -> tuple[nn.Module, str]:
    """Have a model, by default part 2's network, begin with a file, as a script does.

    Return it, and the words of the log about its weights, without the file.
    """
    model = part_2() if model is None else model
    args = argparse.Namespace(is_new=True, weights=str(path))
    engine.weights.load_first(model, args, head)
    assert args.weights_in_words.startswith(str(path))
    return model, args.weights_in_words.removeprefix(str(path)).strip()


def refused(path: Path, model: nn.Module | None = None, head: str = "fc") -> str:
    """Return the line by which a file is refused, without its path; nothing of it is loaded."""
    model = part_2() if model is None else model
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError) as caught:
        load(path, model, head)
    assert equal(before, model.state_dict()) and "\n" not in str(caught.value)
    assert not re.search("object|attribute|<class|Error", str(caught.value)), caught.value
    return str(caught.value).removeprefix(f"{path}: ")


def renamed(state: dict, prefix: str) -> dict:
    """Return a state with a prefix before each name."""
    return {f"{prefix}{name}": value for name, value in state.items()}


def but(state: dict, *ends: str) -> dict:
    """Return a state without the names that have one of these ends."""
    return {name: value for name, value in state.items() if not name.endswith(ends)}


# How people's files hold a ResNet-18, and what the log says of it.


def profiled(state: dict) -> dict:
    """Return a state with the counters that thop leaves in each module, and in the whole."""
    counters = {f"{name.rpartition('.')[0]}.{kind}": torch.zeros(1, dtype=torch.float64)
                for name in state for kind in ("total_ops", "total_params")}
    return {**state, **counters, "total_ops": torch.zeros(1), "total_params": torch.zeros(1)}


def contrastive(state: dict) -> dict:
    """Return what MoCo saves: encoders of queries and keys, with other heads, and a queue."""
    body, head = but(state, "fc.weight", "fc.bias"), {"fc.0.weight": torch.ones(9, 9),
                                                       "fc.2.weight": torch.ones(9, 9)}
    query = renamed({**body, **head}, "module.encoder_q.")
    key = renamed({name: value + 1 for name, value in {**body, **head}.items()},
                  "module.encoder_k.")
    return {"epoch": 200, "arch": "resnet18", "optimizer": {"state": {0: {"step": torch.ones(1)}}},
            "state_dict": {**query, **key, "module.queue": torch.ones(3, 3)}}


WRAPPINGS = {
    "plain": (lambda s: s, "(its head of 1000 left out)"),
    "parameters": (lambda s: {name: nn.Parameter(value) if value.is_floating_point() else value
                              for name, value in s.items()}, "(its head of 1000 left out)"),
    "data parallel": (lambda s: renamed(s, "module."),
                      "(without the prefix 'module.', its head of 1000 left out)"),
    "compiled": (lambda s: renamed(s, "_orig_mod."),
                 "(without the prefix '_orig_mod.', its head of 1000 left out)"),
    "compiled data parallel": (
        lambda s: renamed(s, "_orig_mod.module."),
        "(without the prefix '_orig_mod.module.', its head of 1000 left out)"),
    "the example": (lambda s: {"epoch": 90, "arch": "resnet18", "best_acc1": torch.tensor(69.7),
                               "state_dict": renamed(s, "module.")},
                    "(from its 'state_dict', without the prefix 'module.', its head of 1000 left "
                    "out)"),
    "the reference": (lambda s: {"model": s, "epoch": 89},
                      "(from its 'model', its head of 1000 left out)"),
    "net": (lambda s: {"acc": 95.1, "epoch": 3, "net": s},
            "(from its 'net', its head of 1000 left out)"),
    "with a number beside": (lambda s: {**s, "epoch": 3, "lr": [0.1]},
                             "(its head of 1000 left out)"),
    "a list": (lambda s: [3, {"nested": (s,)}],
               "(from its '1/nested/0', its head of 1000 left out)"),
    "lightning": (lambda s: {"epoch": 1, "hyper_parameters": {"lr": 0.1},
                             "state_dict": renamed(s, "model.")},
                  "(from its 'state_dict', without the prefix 'model.', its head of 1000 left "
                  "out)"),
    "openmmlab": (lambda s: {"meta": {}, "state_dict": renamed(
        but(s, "fc.weight", "fc.bias"), "backbone.") | {"head.fc.weight": torch.ones(7, 512)}},
                  "(from its 'state_dict', without the prefix 'backbone.', it has no head, "
                  "'head.fc.weight' left out)"),
    "moco": (contrastive,
             "(from its 'state_dict', without the prefix 'module.encoder_q.', its head left out, "
             "'module.encoder_k.conv1.weight' and 102 more left out)"),
    "a larger teacher": (lambda s: {"teacher": torchvision.models.resnet34().state_dict(),
                                    "student": s}, "(from its 'student', its head of 1000 left "
                         "out)"),
    "an average": (lambda s: {"keep": {"average": renamed({n: v + 1 for n, v in s.items()},
                                                          "module.")}, "model": s},
                   "(from its 'model', its head of 1000 left out)"),
    "no head": (lambda s: but(s, "fc.weight", "fc.bias"), "(it has no head)"),
    "a head of two layers": (lambda s: but(s, "fc.weight", "fc.bias") | {
        "fc.0.weight": torch.ones(9, 512), "fc.2.weight": torch.ones(9, 9)},
                             "(its head left out)"),
    "a projector": (lambda s: s | {"projector.0.weight": torch.ones(3, 512)},
                    "(its head of 1000 left out, 'projector.0.weight' left out)"),
    "no counters": (lambda s: but(s, "num_batches_tracked"), "(its head of 1000 left out)"),
    "profiled": (profiled, "(its head of 1000 left out)"),
    "half a head": (lambda s: but(s, "fc.bias"), "(its head of 1000 left out)"),
}


@pytest.mark.parametrize("kind", WRAPPINGS)
def test_a_resnet18_arrives_whole_from_any_wrapping_and_the_log_says_from_which(
        tmp_path, imagenet, kind):
    wrap, words = WRAPPINGS[kind]
    path = tmp_path / "weights.pth"
    torch.save(wrap(imagenet), path)
    model, said = load(path)
    assert said == words
    now = model.state_dict()
    for name, value in imagenet.items():
        if name.startswith("fc."):
            assert now[name].shape != value.shape
        elif kind != "no counters" or not name.endswith("num_batches_tracked"):
            assert torch.equal(now[name], value), name


def test_metadata_of_a_state_without_counters_does_no_harm(tmp_path, imagenet):
    """A state_dict that lost its counters keeps `_metadata`, which says that it has them."""
    state = copy.copy(imagenet)
    for name in [name for name in state if name.endswith("num_batches_tracked")]:
        del state[name]
    assert state._metadata
    torch.save(state, tmp_path / "weights.pth")
    now = load(tmp_path / "weights.pth")[0].state_dict()
    assert all(torch.equal(now[name], value) for name, value in state.items()
               if not name.startswith("fc."))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_of_another_precision_are_converted(tmp_path, imagenet, dtype):
    state = {name: value.to(dtype) if value.is_floating_point() else value
             for name, value in imagenet.items()}
    torch.save(state, tmp_path / "weights.pth", _use_new_zipfile_serialization=False)
    now = load(tmp_path / "weights.pth")[0].state_dict()
    for name, value in state.items():
        if not name.startswith("fc."):
            assert now[name].dtype == imagenet[name].dtype and torch.equal(now[name].to(
                value.dtype), value)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_head_that_fits_is_kept(tmp_path, prefix):
    torch.manual_seed(2)
    state = {name: torch.rand(value.shape).to(value.dtype)
             for name, value in models.resnet18().state_dict().items()}
    torch.save(renamed(state, prefix), tmp_path / "weights.pth")
    model, words = load(tmp_path / "weights.pth")
    assert equal(dict(model.state_dict()), state) and "its head of 100 kept)" in words
    model, words = load(tmp_path / "weights.pth", models.resnet18(10))
    assert "its head of 100 left out)" in words
    assert torch.equal(model.state_dict()["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])


class Headed(nn.Module):
    """A network whose head stands within a sequence, as those of torchvision's MobileNets do."""

    def __init__(self, classes: int, hidden: int = 4):
        super().__init__()
        self.features = nn.Conv2d(3, hidden, 3)
        self.classifier = nn.Sequential(nn.Linear(hidden, 5), nn.ReLU(), nn.Linear(5, classes))


@pytest.mark.parametrize("classes, words", [(100, "kept"), (7, "left out")])
def test_a_head_of_several_dotted_parts_is_told_from_the_layers_beside_it(
        tmp_path, classes, words):
    file, model = Headed(classes).state_dict(), Headed(100)
    before = copy.deepcopy(model.state_dict())
    torch.save(renamed(file, "model."), tmp_path / "weights.pth")
    _, said = load(tmp_path / "weights.pth", model, "classifier.2")
    assert said == f"(without the prefix 'model.', its head of {classes} {words})"
    for name, value in model.state_dict().items():
        is_kept = not name.startswith("classifier.2.") or classes == 100
        assert torch.equal(value, (file if is_kept else before)[name])
    torch.save(Headed(100, hidden=3).state_dict(), tmp_path / "weights.pth")
    assert "it has features.weight (3, 3, 3, 3), where this one has features.weight (4, 3, 3" in (
        refused(tmp_path / "weights.pth", model, "classifier.2"))


def test_a_network_without_the_named_head_must_fit_as_a_whole(tmp_path):
    for classes in (100, 7):
        torch.save(Headed(classes).state_dict(), tmp_path / f"{classes}.pth")
    file = load_tensors(tmp_path / "100.pth")
    assert equal(dict(load(tmp_path / "100.pth", Headed(100))[0].state_dict()), file)
    assert "it has classifier.2.weight (7, 5), where" in refused(tmp_path / "7.pth", Headed(100))


def test_part_1_begins_with_its_own_model_for_other_classes(tmp_path):
    torch.manual_seed(3)
    file = ResNet().state_dict()
    torch.save({"model": file}, tmp_path / "checkpoint.pt")
    now = load(tmp_path / "checkpoint.pt", ResNet(10))[0].state_dict()
    assert now["fc.weight"].shape == (10, 256)
    assert all(torch.equal(now[name], value) for name, value in file.items()
               if not name.startswith("fc."))


# Other networks, by the first weight in which they differ.


def changed(name: str, *shape: int):
    """Return a function that puts a tensor of this shape into a state."""
    return lambda s: {**s, name: torch.ones(shape)}


OTHERS = {
    "resnet34": (lambda s: torchvision.models.resnet34().state_dict(),
                 "it has layer1.2.conv1.weight (64, 64, 3, 3), where this one has no layer1.2.co"),
    "resnet50": (lambda s: torchvision.models.resnet50().state_dict(),
                 "it has layer1.0.conv1.weight (64, 64, 1, 1), where this one has layer1.0.conv1"),
    "part 1": (lambda s: ResNet().state_dict(),
               "it has conv1.weight (32, 3, 3, 3), where this one has conv1.weight (64, 3, 7, 7)"),
    "for small images": (changed("conv1.weight", 64, 3, 3, 3), "it has conv1.weight (64, 3, 3, 3)"),
    "a bias": (changed("layer2.0.conv1.bias", 128),
               "it has layer2.0.conv1.bias (128,), where this one has no layer2.0.conv1.bias"),
    "a weight in what has none": (changed("relu.weight", 1), "it has relu.weight (1,), where"),
    "another width": (changed("layer3.0.conv1.weight", 512, 128, 3, 3),
                      "it has layer3.0.conv1.weight (512, 128, 3, 3), where this one has"),
    "one missing": (lambda s: but(s, "layer4.1.bn2.running_var"),
                    "it has no layer4.1.bn2.running_var, where this one has layer4.1.bn2.running"),
    "the first missing, in a wrapping": (
        lambda s: {"net": renamed(but(s, "conv1.weight") | {
            "layer1.0.conv1.weight": torch.ones(64, 64, 3, 3)}, "module.")},
        "it has no conv1.weight, where this one has conv1.weight (64, 3, 7, 7), from its 'net', "
        "without the prefix 'module.'"),
    "a transformer": (lambda s: {"cls_token": torch.ones(1, 1, 8)}, "it has no conv1.weight,"),
    "whole numbers": (lambda s: {name: value.to(torch.int8) for name, value in s.items()},
                      "it has conv1.weight (64, 3, 7, 7) of int8, where this one has conv1.weight"),
    "sparse": (lambda s: {name: value.to_sparse() for name, value in s.items()},
               "it has conv1.weight, which is no plain tensor, where"),
    "no numbers": (lambda s: {name: value.to("meta") for name, value in s.items()},
                   "it has conv1.weight, which is no plain tensor, where"),
    "a long name": (changed(f"conv1.{'x' * 10**6}", 1), "it has conv1.xxx"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_network_is_refused_by_the_name_of_a_weight(tmp_path, imagenet, kind):
    wrap, says = OTHERS[kind]
    torch.save(wrap(imagenet), tmp_path / "weights.pth")
    line = refused(tmp_path / "weights.pth")
    assert line.startswith(f"weights of another network: {says}") and len(line) < 999


@pytest.mark.parametrize("content", [
    torch.ones(3), {}, [], 3, {"state": {0: [torch.ones(1)]}}, {0: torch.ones(2)}])
def test_a_file_without_names_of_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    assert refused(tmp_path / "weights.pth") == "holds no dict of tensors"


def test_a_dict_that_holds_itself_is_searched_once(tmp_path, imagenet):
    content = {}
    content["self"] = [content]
    content["model"] = imagenet
    torch.save(content, tmp_path / "weights.pth")
    assert load(tmp_path / "weights.pth")[1].startswith("(from its 'model', ")


# Finished runs.

SHORT = ["--dataset", "synthetic", "--batch-size", 50, "--max-steps", 2, "--device", "cpu"]
MORE = {"train_resnet": [], "finetune_resnet18": ["--weights", "random", "--image-size", 32]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output directory of a short run of each script, by its name."""
    directories = {}
    for name, more in MORE.items():
        directories[name] = tmp_path_factory.mktemp(name) / "run"
        process = script(name, *SHORT, *more, "--output-dir", directories[name], before=few_images)
        assert process.returncode == 0, process.stderr
    return directories


@pytest.mark.parametrize("file, words", [
    ("model.pt", "its head of 100 kept"),
    ("checkpoint.pt", "from its 'model', its head of 100 kept")])
@pytest.mark.parametrize("name", MORE)
def test_a_finished_run_is_where_the_next_one_begins(finished, tmp_path, name, file, words):
    """All is equal, also after a run at a rate of nothing; log and report say so, once."""
    path, network = finished[name] / file, ResNet() if name == "train_resnet" else part_2()
    before = load_tensors(finished[name] / "model.pt")
    assert load(path, network)[1] == f"({words})"
    assert equal(dict(network.state_dict()), before)
    if file == "checkpoint.pt":
        return
    process = script(name, *SHORT, *MORE[name], "--weights", path, "--lr", 1e-9,
                     "--weight-decay", 0, "--output-dir", tmp_path / "run", before=few_images)
    assert process.returncode == 0, process.stderr
    log = (tmp_path / "run" / "log.txt").read_text()
    for text in (process.stdout, log):
        assert text.count(f"\nweights    {path} ({words})\n") == 1 == text.count("\nweights ")
    assert f"| weights | {path} ({words}) |" in (tmp_path / "run" / "report.md").read_text()
    after = load_tensors(tmp_path / "run" / "model.pt")
    assert all(torch.allclose(value, before[name], atol=1e-6)
               for name, value in after.items() if value.ndim == 4)


@pytest.mark.parametrize("name", MORE)
def test_model_pt_is_contiguous_and_other_tools_take_it(finished, tmp_path, name):
    safetensors = pytest.importorskip("safetensors.torch")
    state, checkpoint = (torch.load(finished[name] / file, weights_only=True)
                         for file in ("model.pt", "checkpoint.pt"))
    assert [key for key, value in state.items() if not value.is_contiguous()] == []
    assert all(value.view(-1).numel() == value.numel() for value in state.values())
    assert equal(dict(state), dict(checkpoint["model"])), "the numbers are those that were trained"
    safetensors.save_file(state, tmp_path / "model.safetensors")
    model = ResNet() if name == "train_resnet" else part_2()
    assert load(tmp_path / "model.safetensors", model)[1] == "(its head of 100 kept)"
    assert equal(dict(model.state_dict()), dict(state))


@pytest.mark.parametrize("content, says", [
    (lambda s: {"model": s}, "it has model, which is no plain tensor, where this one has no model"),
    (lambda s: renamed(s, "module."), "it has module.conv1.weight (32, 3, 3, 3), where this one"),
    (lambda s: but(s, "fc.bias"), "it has no fc.bias, where this one has fc.bias (100,)"),
    (lambda s: {**s, "fc.weight": torch.ones(10, 256)}, "it has fc.weight (10, 256), where this"),
])
def test_a_runs_own_model_must_fit_as_it_stands(tmp_path, content, says):
    torch.save(content(ResNet().state_dict()), tmp_path / "model.pt")
    with pytest.raises(UserError) as caught:
        engine.weights.load(ResNet(), load_tensors(tmp_path / "model.pt"), tmp_path / "model.pt")
    assert f"model.pt: weights of another network: {says}" in str(caught.value)


# safetensors.


@pytest.mark.parametrize("file, prefix, words", [
    ("model.safetensors", "", "(its head of 1000 left out)"),
    ("model.bin", "resnet.", "(without the prefix 'resnet.', its head of 1000 left out)")])
def test_safetensors_are_known_by_their_content(tmp_path, imagenet, file, prefix, words):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(renamed(imagenet, prefix), tmp_path / file, {"format": "pt"})
    model, said = load(tmp_path / file)
    now = model.state_dict()
    assert said == words and all(torch.equal(now[name], value) for name, value in imagenet.items()
                                 if not name.startswith("fc."))


def test_a_pytorch_file_may_have_the_name_of_the_other_format(tmp_path, imagenet):
    torch.save(imagenet, tmp_path / "model.safetensors")
    model, _ = load(tmp_path / "model.safetensors")
    assert torch.equal(model.conv1.weight, imagenet["conv1.weight"])


def test_one_line_says_which_package_reads_safetensors(tmp_path, imagenet, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(dict(imagenet), tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"model\.safetensors: .*: pip install safetensors"):
        load(tmp_path / "model.safetensors")


# Files that would run code. Each command that a line names is followed.


def traced(state, path):
    model = torchvision.models.resnet18()
    model.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        torch.jit.trace(model.eval(), torch.zeros(1, 3, 32, 32)).save(path)


def exported(state, path):
    model = torchvision.models.resnet18()
    model.load_state_dict(state)
    torch.export.save(torch.export.export(model.eval(), (torch.zeros(1, 3, 32, 32),)), path)


def module(state) -> nn.Module:
    model = torchvision.models.resnet18()
    model.load_state_dict(state)
    return model


PARSED = argparse.Namespace(lr=0.1)
CODE = {
    "TorchScript": (traced, "a TorchScript archive, and"),
    "torch.export": (exported, "an archive of torch.export, and"),
    "a module": (lambda s, path: torch.save(module(s), path),
                 "a pickled torchvision.models.resnet.ResNet, and"),
    "a module, before PyTorch 1.6": (
        lambda s, path: torch.save(module(s), path, _use_new_zipfile_serialization=False),
        "a pickled torchvision.models.resnet.ResNet, and"),
    "a module in parallel": (lambda s, path: torch.save(nn.DataParallel(module(s)), path),
                             "a pickled torch.nn.parallel.data_parallel.DataParallel, and"),
    "a module in a dict": (lambda s, path: torch.save({"epoch": 3, "model": module(s)}, path),
                           "it holds torchvision.models.resnet.ResNet, and"),
    "a namespace": (lambda s, path: torch.save({"args": PARSED, "model": s, "epoch": 3}, path),
                    "it holds argparse.Namespace, and"),
    "a namespace, before PyTorch 1.6": (
        lambda s, path: torch.save({"state_dict": s, "opt": PARSED}, path,
                                   _use_new_zipfile_serialization=False),
        "it holds argparse.Namespace, and"),
    "hyperparameters": (lambda s, path: torch.save(
        {"hyper_parameters": {"net": module(s), "all": PARSED}, "state_dict": s}, path),
                        "it holds torchvision.models.resnet.ResNet, and"),
    "a number of NumPy": (lambda s, path: torch.save({"net": s, "acc": np.float64(95)}, path),
                          r"it holds numpy\._?core\.multiarray\.scalar, and"),
    "a newer protocol": (lambda s, path: torch.save(s, path, pickle_protocol=4),
                         "a pickle of a newer protocol, and"),
    "a module in a newer protocol": (lambda s, path: torch.save(module(s), path, pickle_protocol=5),
                                     "a pickle of a newer protocol, and"),
    "pickle.dump": (lambda s, path: path.write_bytes(pickle.dumps(s)),
                    "a pickle that torch.save did not write, and"),
}


@pytest.mark.parametrize("kind", CODE)
def test_a_file_that_could_run_code_is_refused_with_a_command_that_saves_its_weights(
        tmp_path, imagenet, kind):
    write, says = CODE[kind]
    path = tmp_path / f"it's mine.{'pt2' if kind == 'torch.export' else 'pth'}"
    write(imagenet, path)
    line = refused(path)
    assert re.match(f"{says} reading it could run code; if you trust it, make a state_dict of it: "
                    "python -c ", line), line
    *_, code = shlex.split(line)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        exec(code, {})
    model, _ = load(tmp_path / "it's mine-weights.pth")
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in imagenet.items()
               if not name.startswith("fc."))


# Where the default weights come from.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch's cache of weights, empty; the scripts lie in its parent, with nothing beside them."""
    monkeypatch.setattr(engine.weights, "ROOT", tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("folder", [".", ".."])
@pytest.mark.parametrize("name", engine.weights.RESNET18_FILES)
def test_the_known_files_are_found_beside_the_code_or_in_the_cache(
        cache, imagenet, parse, name, folder):
    torch.save(imagenet, cache / folder / name)
    script, args = parse("finetune_resnet18", "--no-download")
    model = script.make_model(args)
    engine.weights.load_first(model, args, script.HEAD)
    assert Path(args.weights).samefile(cache / folder / name)
    assert torch.equal(model.conv1.weight, imagenet["conv1.weight"])
    assert args.weights_in_words == f"{args.weights} (its head of 1000 left out)"


def test_no_weights_and_no_download_name_the_ways_out(cache):
    with pytest.raises(UserError, match=r"resnet18-f37072fd\.pth.*--weights"):
        engine.weights.find_imagenet(download=False)


def test_a_failed_download_of_weights_names_the_reason_and_the_ways_out(cache, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UserError, match=r"failed \(no route to host\).*--weights random"):
        engine.weights.find_imagenet(download=True)


@pytest.mark.parametrize("fault, says", [
    ("missing", "cannot be read (no such file"), ("a folder", "cannot be read (is a directory)"),
    ("cut", "not a PyTorch file, or a damaged one "),
    ("a page", "not a PyTorch file, or a damaged one "),
])
def test_a_file_that_cannot_be_read_is_named(tmp_path, imagenet, fault, says):
    path = tmp_path / "weights.pth"
    if fault == "cut":
        torch.save(imagenet, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif fault == "a page":
        path.write_text("<!DOCTYPE html>")
    with pytest.raises(UserError) as caught:
        load(tmp_path if fault == "a folder" else path)
    assert says in str(caught.value) and str(tmp_path) in str(caught.value)
    assert fault not in ("cut", "a page") or str(caught.value).endswith("; get or make it again")


@needs_weights
def test_the_shared_imagenet_weights_load():
    path = SHARED / "weights" / "resnet18-imagenet-hybrid.pth"
    model, words = load(path)
    assert words == "(its head of 1000 left out)"
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in load_tensors(path).items()
               if not name.startswith("fc."))
