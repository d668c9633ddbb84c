"""Networks, augmentations and flags of one's own work, and nothing about a run stays silent."""

import argparse
import json
import logging
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, script
from test_engine import begin
from torch import nn

import data
import engine.checks
import engine.describe
import engine.flags
import engine.optim
import engine.run
import models
import report.evaluation
import report.log
import report.runs
import utils
from engine.checkpoint import Position
from engine.clock import Clock
from engine.loop import train_one_epoch
from report.evaluation import write_test_report
from train_resnet import train_step

SMALL = ["--device", "cpu", "--precision", "fp32", "--batch-size", 16, "--max-steps", 3]


class Own(nn.Module):
    """A network with all that ours lacks: no `fc`, other matrices, odd convolutions and weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False)
        self.scale = nn.Parameter(torch.ones(1, 16, 1, 1))  # four dimensions, and no convolution
        self.squeeze = nn.Linear(16, 4)
        self.excite = nn.Linear(4, 16)
        self.temperature = nn.Parameter(torch.ones(()))
        self.nothing = nn.Parameter(torch.zeros(0, 8))
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(16, 100)

    def forward(self, images):
        x = self.grouped(self.depthwise(self.stem(images)).relu()) * self.scale
        gates = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        x = self.frozen((x * gates[:, :, None, None]).amax((2, 3))) + self.nothing.sum()
        return self.head(x) * self.temperature


@pytest.fixture
def start(parse, monkeypatch, runtime):
    """Return a function that starts a run of a script with a network: run and batches."""
    monkeypatch.setattr(Clock, "catch_signals", lambda clock: None)

    def start_run(model, *flags, name="train_resnet", runtime=runtime, pad=None):
        script, args = parse(name, "--overwrite", *flags)
        optimizer = script.make_optimizer(model, args, runtime)
        if pad is not None:
            optimizer.pad = pad
        return begin(args, runtime, 3, runtime.place(model), optimizer, 8)

    return start_run


@pytest.mark.parametrize("name, pad", [
    ("train_resnet", False), ("train_resnet", True),
    ("finetune_resnet18", False), ("finetune_resnet18", True)])
def test_all_weights_of_a_network_of_ones_own_are_trained(start, name, pad, caplog):
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    run, batches = start(Own(), name=name, pad=pad)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    train_one_epoch(run, batches.shuffled(0, 0, 0, 8), train_step)
    same = {name for name, value in run.model.state_dict().items()
            if torch.equal(value, before[name])}
    assert same == {"nothing", "frozen.weight", "frozen.bias", "unused.weight", "unused.bias"}
    assert all(value.isfinite().all() for value in run.model.state_dict().values())
    notes = [line for line in caplog.messages if "no gradient" in line]
    assert notes == ["note       no gradient reaches unused.weight, unused.bias in the first step"]


def test_part_1_trains_a_network_without_convolutions(start):
    run, batches = start(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 100)))
    train_one_epoch(run, batches.shuffled(0, 0, 0, 8), train_step)
    assert run.state.position.train_seconds


def test_a_network_with_another_number_of_outputs_is_named(start):
    with pytest.raises(utils.UserError, match=r"outputs are \(2, 10\), and must be \(2, 100\)"):
        start(models.ResNet(10))


@pytest.mark.parametrize("change, says", [
    ({"images": torch.rand(20, 3, 32, 32)}, "images must be a uint8 tensor"),
    ({"images": torch.zeros(20, 32, 32, 3, dtype=torch.uint8)}, "images must be a uint8 tensor"),
    ({"images": np.zeros((20, 3, 32, 32), np.uint8)}, "images must be a uint8 tensor"),
    ({"labels": torch.zeros(19, dtype=torch.int64)}, r"labels must be an int64 tensor \(20,\)"),
    ({"labels": torch.zeros(20, dtype=torch.int32)}, r"labels must be an int64 tensor \(20,\)"),
    ({"labels": torch.full((20,), 3)}, r"labels span 3\.\.3, and there are 3 class names"),
])
def test_images_of_ones_own_that_are_not_as_they_must_be_are_named(change, says):
    right = data.Split(torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.arange(20) % 3)
    data.check(data.Dataset("mine", right, right, ("a", "b", "c"), "here"))
    with pytest.raises(utils.UserError, match="has a validation set of its own"):
        data.hold_out(data.Dataset("mine", right, right, ("a", "b", "c"), "", right), 3)
    wrong = data.Dataset("mine", right, right._replace(**change), ("a", "b", "c"), "here")
    with pytest.raises(utils.UserError, match=f"here: test {says}"):
        data.hold_out(wrong, 0)


def test_images_of_ones_own_may_have_two_classes_and_come_as_numpy_lays_them_out(start, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    split = data.Split(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.arange(20) % 2)
    dataset = data.hold_out(data.Dataset("mine", split, split, ("a", "b"), "here"), 0)
    assert dataset.checksum == zlib.crc32(
        split.labels.numpy(), zlib.crc32(pixels.transpose(0, 3, 1, 2).copy(), zlib.crc32(
            split.labels.numpy(), zlib.crc32(pixels.transpose(0, 3, 1, 2).copy()))))
    logits = torch.tensor([[0.0, 1.0]]).repeat(20, 1)
    metrics = report.log.score(logits, split.labels)
    assert (metrics.accuracy, metrics.top5) == (0.5, 1.0)
    write_test_report(logits, dataset, tmp_path)
    report.evaluation.print_predictions(logits[:1], ("a", "b"), [Path("x.png")])


def test_the_layers_of_a_network_are_named_by_what_they_hold():
    model = nn.ModuleDict({"empty": nn.Sequential(), "mixed": nn.Sequential(nn.Linear(2, 1),
                           nn.ReLU()), "same": nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))})
    assert engine.describe.network(model)["layers"] == [
        ["empty", "Sequential", 0], ["mixed", "Sequential", 3], ["same", "2 x Linear", 5]]


def test_a_model_is_used_with_the_recipe_of_its_run_whatever_its_kind(tmp_path, monkeypatch):
    settings = {"norm": False, "wide": True, "widths": [8, 16], "lr": 0.5, "precision": "fp32"}
    (tmp_path / "config.json").write_text(json.dumps({"script": "own", "settings": settings}))
    (tmp_path / "model.pt").touch()

    def read(*flags):
        monkeypatch.setattr(sys, "argv", ["own.py", "--output-dir", str(tmp_path), *flags])
        parser = engine.flags.Parser("Own.\n\n", "output")
        add = parser.recipe_group.add_argument
        add("--norm", action=argparse.BooleanOptionalAction, default=True)
        add("--wide", action="store_true")
        add("--widths", type=int, nargs="+", default=[4])
        return vars(parser.read({"lr": 0.1}, lambda epochs, optimizer: {}))

    expected = {**settings, "precision": "auto"}
    assert read("--eval-only").items() >= expected.items()
    assert read("--eval-only", "--norm", "--lr", "1").items() >= {
        **expected, "norm": True, "lr": 1.0}.items()
    assert read("--overwrite")["norm"]


def test_part_1_trains_convolutions_by_muon_matrices_with_decay_and_the_rest_without(start):
    run, _ = start(Own())
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in run.optimizer.param_groups]
    assert groups == [
        {"stem.weight"},
        {"depthwise.weight", "grouped.weight", "scale", "squeeze.weight", "excite.weight",
         "nothing", "unused.weight", "head.weight"},
        {"stem.bias", "squeeze.bias", "excite.bias", "temperature", "unused.bias", "head.bias"}]
    muon, matrices, vectors = run.optimizer.param_groups
    assert "muon" in muon and "muon" not in matrices and "muon" not in vectors
    assert matrices["weight_decay"] > 0 and vectors["weight_decay"] == 0


def test_a_weight_in_no_group_or_in_two_is_named(start):
    model = models.ResNet()
    head = list(model.fc.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("fc.")]
    engine.checks.check_groups(model, [{"params": rest}, {"params": head}])
    for groups, says in (([rest], "fc.weight is in 0 groups"), ([rest, head, head[:1]],
                         "fc.weight is in 2 groups")):
        with pytest.raises(utils.UserError, match=says):
            engine.checks.check_groups(model, [{"params": group} for group in groups])
    run, _ = start(model)
    del run.optimizer.param_groups[1]["params"][0]
    with pytest.raises(utils.UserError, match=r"fc.weight is in 0 groups"):
        run.start(model, run.optimizer, run.scheduler, run.sizes)


def test_several_processes_refuse_a_weight_without_a_gradient(start, runtime):
    run, _ = start(Own())
    with pytest.raises(utils.UserError, match=r"no gradient reaches scale, "):
        engine.checks.check_gradients(run.model, 2)


def mixed(images, labels, generator):
    """Blend each image with another one, and its label too (Zhang et al. 2017)."""
    other = torch.randperm(len(images), generator=generator, device=images.device)
    return 0.7 * images + 0.3 * images[other], 0.7 * labels + 0.3 * labels[other]


def test_soft_labels_are_trained_on_and_counted_by_their_likeliest_class(start):
    run, batches = start(models.ResNet())
    run.augmentation, run.generator = mixed, torch.Generator()
    run.seed_augmentation()
    run.epochs, run.total_steps = 1, 1
    images, labels, weight = next(batches.shuffled(0, 0, 0, 8))
    _, soft = run.augment(images, labels)
    run.network = lambda images: 5 * soft + 0 * run.model(images)  # it knows the answers
    metrics = train_one_epoch(run, [(images, labels, weight)], train_step)
    expected = nn.functional.cross_entropy(5 * soft, soft, label_smoothing=0.1).item()
    assert metrics.loss == pytest.approx(expected)
    assert (metrics.accuracy, metrics.images) == (1.0, 10)


def test_a_file_that_another_rank_cannot_see_keeps_it_from_no_save(start, monkeypatch):
    """Else it would leave the save before the collective calls in which the others wait for it."""
    run, _ = start(models.ResNet())
    run.runtime = run.runtime._replace(rank=1)

    def fail(*_, **__):
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", fail)
        run.save()


def test_an_augmentation_draws_the_same_after_a_resume_and_other_numbers_in_each_step(start):
    run, _ = start(models.ResNet())
    seeds = []

    def mixed_and_noted(images, labels, generator):
        seeds.append(generator.initial_seed())
        return mixed(images, labels, generator)

    def augmented():
        run.seed_augmentation()
        return run.augment(torch.ones(10, 3, 8, 8) * torch.arange(10)[:, None, None, None],
                           torch.arange(10))

    run.augmentation, run.generator = mixed_and_noted, torch.Generator()
    first, again = augmented(), augmented()
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    drawn = [first[0]]
    for position, rank in ((Position(step=1), 0), (Position(1), 0),
                           (Position(), 1)):
        run.state.position, run.runtime = position, run.runtime._replace(rank=rank)
        drawn.append(augmented()[0])
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert data.epoch_seed(run.args.seed, 0) not in seeds, "the order's"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, data_dir):
    """A run of part 1 that was stopped after a step: its flags, and its directory."""
    flags = [*SMALL, "--data-dir", data_dir, "--resume",
             "--output-dir", tmp_path_factory.mktemp("stopped")]
    process = script("train_resnet", *flags, "--max-minutes", 0.001)
    assert process.returncode == utils.STOPPED
    assert f"resume     no checkpoint in {flags[-1]}, so the run begins" in process.stdout
    return flags, flags[-1]


@pytest.mark.parametrize("change, says", [
    (lambda state: state["model"].pop("fc.weight"),
     r"of another network: it has no fc.weight, where this one has fc.weight \(100, 256\)"),
    (lambda state: state["model"].update({"fc.weight": torch.zeros(10, 256)}),
     r"of another network: it has fc.weight \(10, 256\), where this one has fc.weight \(100, 256"),
    (lambda state: state["model"].update({"more": torch.zeros(2)}),
     r"of another network: it has more \(2,\), where this one has no more"),
    (lambda state: state["optimizer"]["param_groups"][1]["params"].pop(),
     r"of another optimizer \(loaded state dict contains a parameter group that doesn't match"),
])
def test_another_network_is_not_called_a_damaged_file(stopped, change, says):
    flags, directory = stopped
    whole = (directory / "checkpoint.pt").read_bytes()
    state = utils.load_tensors(directory / "checkpoint.pt")
    change(state)
    torch.save(state, directory / "checkpoint.pt")
    process = script("train_resnet", *flags)
    (directory / "checkpoint.pt").write_bytes(whole)
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)
    with pytest.raises(utils.UserError, match=says):
        raise utils.UserError(process.stderr)


def test_what_a_run_is_of_stands_in_its_files(stopped):
    _, directory = stopped
    config = json.loads((directory / "config.json").read_text())
    state = utils.load_tensors(directory / "checkpoint.pt")
    for name in ("code", "network", "data"):
        assert state[name] == config[name]
    assert config["network"]["name"] == "ResNet" and config["network"]["parameters"] == 3_559_556
    assert ["conv3_x", "4 x BasicBlock", 279_680] in config["network"]["layers"]
    assert sum(count for *_, count in config["network"]["layers"]) == 3_559_556
    assert set(config["code"]) == {"commit", "changed", "modules"}


def test_a_resumed_run_says_that_the_code_has_changed(stopped):
    flags, directory = stopped
    state = utils.load_tensors(directory / "checkpoint.pt")
    state["code"] = {"commit": "", "changed": False, "modules": "0123456789ab"}
    torch.save(state, directory / "checkpoint.pt")
    process = script("train_resnet", *flags)
    assert process.returncode == 0
    assert "the code has changed since: it was code 0123456789ab (0123456789ab), and is " \
        in process.stdout
    config = json.loads((directory / "config.json").read_text())
    assert config["code"]["changed"] and config["code"]["modules"].startswith("0123456789ab then ")
    again = script("train_resnet", *flags)
    assert again.returncode == 0 and "the code has changed" not in again.stdout, "it was told once"


def test_a_finished_run_is_of_the_code_that_finished_it(stopped):
    flags, directory = stopped
    before = (directory / "config.json").read_text()
    state = utils.load_tensors(directory / "checkpoint.pt")
    state["code"] = {"commit": "", "changed": False, "modules": "0123456789ab"}
    torch.save(state, directory / "checkpoint.pt")
    assert script("train_resnet", *flags).returncode == 0
    assert (directory / "config.json").read_text() == before
    config = json.loads(before)
    config["code"] = state["code"]
    (directory / "config.json").write_text(json.dumps(config))
    tested = script("train_resnet", "--eval-only", "--device", "cpu", "--data-dir",
                    config["settings"]["data_dir"], "--output-dir", directory)
    assert tested.returncode == 0 and "note       the code has changed since" in tested.stdout


def test_the_identity_of_the_code(monkeypatch, tmp_path):
    """The commit where there is git, and always a hash, which any change of a module changes."""
    answers = iter(["1a2b3c4d5e6f7890\n", " M models.py\n", "1a2b3c4d5e6f7890\n", ""])
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(
        command, 0, next(answers)))
    changed, clean = report.runs.describe_code(), report.runs.describe_code()
    assert changed["commit"] == "1a2b3c4d5e6f"
    assert changed["changed"] and not clean["changed"]
    assert report.runs.name_of_code(clean) == "code 1a2b3c4"
    assert report.runs.name_of_code(changed) == "changed code of 1a2b3c4"

    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    without = report.runs.describe_code()
    assert without == {"commit": "", "changed": False, "modules": clean["modules"]}
    assert report.runs.name_of_code(without) == f"code {clean['modules']}"
    monkeypatch.setattr(models, "__file__", str(ROOT / "no such file"))
    assert report.runs.describe_code()["modules"] != clean["modules"]
    # A project in a directory of its own, whose network lies in a folder.
    own = types.ModuleType("nets.own")
    own.__file__ = str(tmp_path / "nets" / "own.py")
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "own.py").write_text("width = 64")
    monkeypatch.setattr(report.runs, "ROOT", tmp_path)
    changed = report.runs.describe_code()["modules"]
    monkeypatch.setitem(sys.modules, "nets.own", own)
    assert report.runs.describe_code()["modules"] != changed, "modules of folders count"
    # Packages of an environment within the project do not: which are loaded depends on the flags.
    library = tmp_path / "env" / "site-packages"
    library.mkdir(parents=True)
    (tmp_path / "nets" / "own.py").rename(library / "own.py")
    own.__file__ = str(library / "own.py")
    assert report.runs.describe_code()["modules"] == changed


def test_the_identity_does_not_depend_on_where_the_project_lies(monkeypatch, tmp_path):
    here = tmp_path / "tests"
    here.mkdir()
    own = types.ModuleType("own")
    own.__file__ = str(here / "own.py")
    monkeypatch.setattr(report.runs, "ROOT", here)
    monkeypatch.setitem(sys.modules, "own", own)
    hashes = set()
    for text in ("a = 1", "a = 2"):
        (here / "own.py").write_text(text)
        hashes.add(report.runs.describe_code()["modules"])
    assert len(hashes) == 2


def test_a_log_tells_the_time_left_once_and_before_the_first_epoch_ends(start, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    run, batches = start(models.ResNet())
    train_one_epoch(run, batches.shuffled(0, 0, 0, 8), train_step)
    assert not [line for line in caplog.messages if line.startswith("time  ")], "it took no minute"
    monkeypatch.setattr(engine.loop, "TELL_AFTER", 0)
    run.state.position = Position()
    train_one_epoch(run, batches.shuffled(0, 0, 0, 8), train_step)
    (line,) = [line for line in caplog.messages if line.startswith("time  ")]
    assert line.startswith("time       about ") and line.endswith(" left")


def test_the_time_left_is_of_all_epochs_and_their_evaluations(start):
    run, _ = start(models.ResNet(), "--epochs", 4, "--batch-size", 10)
    run.sizes = engine.optim.Sizes(4, 0.75, 16, 32)
    run.sizes.test = [16, 16, 32, 32]
    run.steps_per_epoch, run.total_steps = 100, 400
    run.state.position, run.clock.steps = Position(epoch=1, step=40), [9.0, 0.5, 0.5]
    # A step at 32 takes 2^1.6 times as long as one at 16, and 30 images are to be tested.
    evaluation = 0.5 / 3 * 30 / 10
    expected = 160 * 0.5 + 100 * 0.5 * 2**1.6 + evaluation * (1 + 2 * 2**1.6)
    assert run.seconds_left() == pytest.approx(expected)


def test_a_line_says_when_compilation_begins(start, runtime, caplog):
    caplog.set_level(logging.INFO)
    start(models.ResNet(), runtime=runtime._replace(compile=True))
    assert any(line.startswith("compile    begins with the first step") for line in caplog.messages)
