"""What a researcher changes is used as it is and named as it is, or one line says why not."""

import copy
import csv
import enum
import functools
import hashlib
import importlib
import io
import json
import re
import subprocess
import sys
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import ROOT, result, script, tables, without_pictures
from PIL import Image
from test_engine import begin
from tiny import SCRIPTS, noise, plain, train
from torch import nn
from torch.optim import lr_scheduler
from torchvision.models import VisionTransformer

import data
import engine.checks
import engine.describe
import engine.inference
import engine.optim
import engine.process
import models
import report.evaluation
import report.log
import report.runs
import utils
from engine.checkpoint import Position
from engine.clock import Clock
from engine.flags import Parser, bounded
from engine.loop import evaluate, train_one_epoch
from engine.optim import frozen_modules
from engine.pictures import read_pictures
from train_resnet import train_step

SMALL = {"train_resnet": ["--batch-size", 5, "--epochs", 1, "--precision", "fp32"],
         "finetune_resnet18": ["--batch-size", 5, "--epochs", 1, "--precision", "fp32",
                               "--image-size", 32]}
both = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture
def start(parse, monkeypatch, runtime):
    """Return a function that starts a run of part 1 with these parts: the run and its batches."""
    monkeypatch.setattr(Clock, "catch_signals", lambda clock: None)

    def start_run(model, *flags, optimizer=None, steps=3):
        script, args = parse("train_resnet", "--overwrite", "--epochs", 1, *flags)
        optimizer = optimizer or script.make_optimizer(model, args, runtime)
        return begin(args, runtime, steps, runtime.place(model), optimizer, 8)

    return start_run


# Flags


class Colour(enum.Enum):
    """A value that JSON does not know."""

    RED = 1
    BLUE = 2


def with_flags(monkeypatch, name: str) -> None:
    """Have a script read flags of every kind that a user may add."""
    script = importlib.import_module(name)

    def parse_args():
        parser = Parser("Mine.\n\n", output_dir="output")
        parser.add_argument("--gain", type=float, default=1.0)
        parser.add_argument("--widths", type=bounded(int, 1), nargs="+", default=[4, 8])
        parser.add_argument("--kind", type=torch.device, default="cpu")
        parser.add_argument("--steps", type=lambda text: [int(part) for part in text.split(",")],
                            default=[1, 2], help="milestones (default: %(default)s)")
        parser.add_argument("--relu", dest="act", action="store_const", const="relu",
                            default="relu")
        parser.add_argument("--gelu", dest="act", action="store_const", const="gelu")
        parser.add_argument("--colour-of", type=Colour.__getitem__, default=Colour.RED)
        parser.add_argument_group("mine").add_argument("--bias", action="store_true")
        parser.machine_group.add_argument("--workers", type=int, default=1)
        parser.output_group.add_argument("--colour", default="red")
        parser.data_group.add_argument("--folder", default="here")
        parser.recipe_group.add_argument("--dropout", type=float)
        parser.recipe_group.add_argument("--crop-padding", type=int)
        parser.recipe_group.add_argument("--image-size", type=int)
        return parser.read({**script.RECIPE, "image_size": 32}, script.variant)

    monkeypatch.setattr(script, "parse_args", parse_args)


@both
def test_a_flag_is_of_the_recipe_unless_it_is_of_data_output_or_machine(
        name, tmp_path, monkeypatch):
    with_flags(monkeypatch, name)
    flags = [*SMALL[name], "--gain", 2, "--widths", 3, 5]
    run = functools.partial(train, name, noise(10), tmp_path / "run", *flags)
    assert run().status == 0
    config = report.runs.read_config(tmp_path / "run")
    assert {"gain", "widths", "kind", "bias"} <= {*config["recipe"]}
    assert not {"workers", "colour", "folder"} & {*config["recipe"]}
    for change, says in [(["--gain", 7], r"--gain 7.0 \(was 2.0\)"), (["--bias"], r"--bias True"),
                         (["--widths", 3], r"--widths \[3\] \(was \[3, 5\]\)"),
                         (["--kind", "meta"], r"--kind meta \(was cpu\)")]:
        other = run("--resume", *change)
        assert other.status == 2 and re.search(f"cannot go on with other settings: {says}",
                                               other.message)
    assert run("--resume", "--workers", 2, "--colour", "blue", "--folder", "there").status == 0
    assert train(name, noise(10), tmp_path / "other", *flags, "--gain", 5, "--seed", 1).status == 0
    runs = [report.runs.read_run(tmp_path / part) for part in ("run", "other")]
    assert [label.rpartition(", ")[2] for label in report.runs.group_runs(runs)] == [
        "gain 2.0", "gain 5.0"]


def test_a_model_is_used_with_flags_of_ones_own_as_they_were_read(tmp_path, monkeypatch):
    with_flags(monkeypatch, "train_resnet")
    parse_args = importlib.import_module("train_resnet").parse_args

    def used(*flags):
        monkeypatch.setattr(sys, "argv", [
            "train_resnet.py", "--eval-only", "--output-dir", str(tmp_path), *flags])
        args = parse_args()
        return args.kind, args.widths, args.gain, args.steps, args.act, args.colour_of

    train("train_resnet", noise(10), tmp_path, *SMALL["train_resnet"], "--kind", "meta")
    meta = torch.device("meta")
    assert used() == (meta, [4, 8], 1.0, [1, 2], "relu", Colour.RED)
    train("train_resnet", noise(10), tmp_path, *SMALL["train_resnet"], "--overwrite", "--steps",
          "3,4", "--widths", 5, "--gelu", "--colour-of", "BLUE")
    with pytest.raises(utils.UserError, match=r"--colour_of .*BLUE.*; give it again"):
        used()
    cpu = torch.device("cpu")
    assert used("--colour-of", "BLUE") == (cpu, [5], 1.0, [3, 4], "gelu", Colour.BLUE)


def test_a_flag_that_differs_from_the_model_s_run_is_said(tmp_path, monkeypatch, caplog):
    with_flags(monkeypatch, "train_resnet")
    train("train_resnet", noise(10), tmp_path, *SMALL["train_resnet"], "--gain", 2)
    for flags, notes in ((["--gain", 2], []), (["--gain", 3], [
            "note       --gain 3.0, not 2.0 as in training"])):
        monkeypatch.setattr(sys, "argv", [
            "train_resnet.py", "--eval-only", "--output-dir", str(tmp_path), *map(str, flags)])
        caplog.clear()
        with caplog.at_level("INFO", "cifar100"):
            importlib.import_module("train_resnet").parse_args()
        assert caplog.messages == notes


# What is trained


class Stages(nn.Module):
    """A frozen stage with all that differs between the modes, a frozen weight, and a head."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5),
                                    nn.BatchNorm2d(4, affine=False)).requires_grad_(False)
        self.still = nn.BatchNorm2d(4).eval()
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 100)
        self.modes = []

    def forward(self, images):
        self.modes.append({name for name, module in self.named_modules() if module.training})
        return self.fc(self.norm(self.still(self.frozen(images))).mean((2, 3)))


def test_what_is_frozen_or_in_evaluation_mode_stays_so_in_every_step(start):
    run, batches = start(Stages())
    before = copy.deepcopy(run.model.state_dict())
    run.model.modes.clear()

    train_one_epoch(run, batches.shuffled(0, 0, 0, 8), train_step)
    assert run.model.modes == [{"", "norm", "fc"}] * 3
    after = run.model.state_dict()
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert same >= {"frozen.1.running_mean", "frozen.3.running_var", "still.running_mean"}
    assert not {"norm.running_mean", "still.weight", "fc.weight"} & same
    evaluate(run.model, batches, run.runtime)
    run.model.modes.clear()
    run.model.frozen.train()  # as a step may leave it
    run.state.position = Position()
    train_one_epoch(run, batches.shuffled(0, 1, 0, 8), train_step)
    assert run.model.modes == [{"", "norm", "fc"}] * 3
    assert run.config["in_words"]["modes"] == "6 of 9 modules stay in evaluation mode"
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert run.config["in_words"]["network"].endswith(f", of which {trained} are trained")


def test_a_module_is_frozen_if_all_weights_inside_are():
    attention = nn.MultiheadAttention(8, 2)
    attention.in_proj_weight.requires_grad = attention.in_proj_bias.requires_grad = False
    assert frozen_modules(attention) == set()
    attention.out_proj.requires_grad_(False)
    assert frozen_modules(attention) == {attention, attention.out_proj}
    assert frozen_modules(nn.Sequential(nn.ReLU(), nn.Linear(2, 2))) == set()


@pytest.mark.parametrize("how", ["trained", "frozen", "still"])
def test_a_batch_norm_that_stays_as_it_is_takes_one_image(start, how):
    """The last of 30, in batches of 29."""
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 8), norm, nn.Flatten(), nn.Linear(4, 100))
    if how == "frozen":
        norm.requires_grad_(False)
    elif how == "still":
        norm.eval()
    if how == "trained":
        with pytest.raises(utils.UserError, match="leave a process one image"):
            start(model, "--batch-size", 29)
    else:
        start(model, "--batch-size", 29)


def test_a_network_that_is_frozen_as_a_whole_is_one_line(start):
    with pytest.raises(utils.UserError, match="all weights of the network are frozen"):
        start(nn.Sequential(nn.Flatten(), nn.Linear(192, 100)).requires_grad_(False))


class Kinds(nn.Module):
    """A weight of each kind."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.point = nn.Conv2d(8, 8, 1, bias=False)
        self.depth = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.linear = nn.Linear(8, 8, bias=False)
        self.heads = nn.Linear(8, 4)


def test_muon_takes_convolutions_and_one_function_and_the_log_say_so(caplog):
    model = Kinds()
    names = {weight: name for name, weight in model.named_parameters()}
    groups = [[names[weight] for weight in group] for group in engine.optim.split(model, "heads")]
    assert groups == [["conv.weight", "point.weight"],
                      ["token", "depth.weight", "linear.weight"],
                      ["conv.bias", "norm.weight", "norm.bias"], ["heads.weight", "heads.bias"]]
    kinds = {names[weight]: kind for weight, kind in engine.optim.kinds(model).items()}
    assert kinds == {
        "conv.weight": "convolutions", "point.weight": "1x1 convolutions",
        "depth.weight": "grouped convolutions", "token": "other matrices",
        "linear.weight": "linear layers", "heads.weight": "linear layers",
        **dict.fromkeys(("conv.bias", "norm.weight", "norm.bias", "heads.bias"),
                        "norms and biases")}
    assert not caplog.messages


def test_part_2_says_if_the_head_has_another_name(parse, runtime, caplog):
    script, args = parse("finetune_resnet18")
    model = Kinds()
    with caplog.at_level("INFO", "cifar100"):
        optimizer = script.make_optimizer(model, args, runtime)
    assert caplog.messages == ["note       no layer 'fc' is trained (HEAD in the script): no "
                               "weight has the rate of the head"]
    assert {group["lr"] for group in optimizer.param_groups} == {args.lr, script.SGD_LR}


def test_a_probe_says_that_lr_has_no_effect_by_muon(parse, runtime, caplog):
    script, args = parse("finetune_resnet18")
    model = Kinds()
    model.fc = nn.Linear(8, 4)
    for name, weight in model.named_parameters():
        weight.requires_grad = name.startswith("fc")
    with caplog.at_level("INFO", "cifar100"):
        (group,) = script.make_optimizer(model, args, runtime).param_groups
        assert group["lr"] == script.HEAD_RATE * script.SGD_LR
        args.optimizer = "sgd"
        script.make_optimizer(model, args, runtime)
    assert caplog.messages == ["note       Muon has no weight to train, so --lr has no effect; "
                               "--optimizer sgd uses it"]


# What is said of it


def words_of(model, scheduler, steps: int = 100) -> dict[str, str]:
    words, identity = engine.describe.optimization(model, scheduler, steps)
    assert identity["schedule"].startswith(f"{type(scheduler).__name__}, rates ")
    return words


@pytest.mark.parametrize("make, says, schedule", [
    (lambda o: lr_scheduler.CosineAnnealingLR(o, 100), "0.5",
     "CosineAnnealingLR: rate 0.5 in step 1, 0.5 in step 1, 0.000123 in step 100"),
    (lambda o: lr_scheduler.SequentialLR(o, [
        lr_scheduler.LinearLR(o, 0.01, total_iters=10),
        lr_scheduler.CosineAnnealingLR(o, 90)], [10]), "0.5",
     "SequentialLR: rate 0.005 in step 1, 0.5 in step 11, 0.000152 in step 100"),
    (lambda o: lr_scheduler.LambdaLR(o, lambda step: 3 if step == 7 else 2), "1.5",
     "LambdaLR: rate 1 in step 1, 1.5 in step 8, 1 in step 100"),
    (lambda o: engine.optim.one_cycle(o, 100), "0.495",
     "OneCycleLR: rate 0.02 in step 1, 0.495 in step 21, 0.00619 in step 100"),
])
def test_optimizer_peak_rate_and_schedule_are_named_as_they_are(make, says, schedule):
    model = Kinds()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.3)
    scheduler = make(optimizer)
    before = copy.deepcopy((scheduler.state_dict(), optimizer.state_dict()))
    words = words_of(model, scheduler)
    count = sum(weight.numel() for weight in model.parameters())
    assert words["optimizer"] == (
        f"AdamW of {count} weights (other matrices, convolutions, norms and biases, "
        "1x1 convolutions, grouped convolutions, linear layers) at peak rate "
        f"{says}, decay 0.3")
    assert words["schedule"] == schedule
    after = scheduler.state_dict(), optimizer.state_dict()
    assert str(after) == str(before), "the look at the schedule leaves it as it was"


@both
def test_another_optimizer_stands_in_the_recipe(name, tmp_path, monkeypatch):
    script = importlib.import_module(name)
    assert train(name, noise(10), tmp_path / "own", *SMALL[name]).status == 0
    monkeypatch.setattr(script, "make_optimizer", lambda model, args, runtime: torch.optim.AdamW(
        model.parameters(), args.lr))
    assert train(name, noise(10), tmp_path / "adam", *SMALL[name]).status == 0
    optimizers = [report.runs.read_config(tmp_path / part)["settings"]["optimizer"]
                  for part in ("own", "adam")]
    assert optimizers == ["muon", "AdamW"]


def test_hooks_of_the_optimizer_are_called_once_a_step(start):
    run, batches = start(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 100)))
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # patches SGD.step
    calls = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: calls.append("before"))
    run.optimizer.register_step_post_hook(lambda optimizer, *_: calls.append("after"))
    train_one_epoch(run, batches.shuffled(0, 0, 0, 8), train_step)
    assert calls == ["before", "after"] * 3


# Augmentations


@both
@pytest.mark.parametrize("cutmix", [0, 0.5])
def test_an_augmentation_always_gets_each_class_s_share(name, cutmix, tmp_path):
    seen = []

    def look(images, labels, generator):
        seen.append((images.dtype, images.shape, labels.dtype, labels.shape))
        assert torch.allclose(labels.sum(1), torch.ones(5))
        return images, labels

    run = train(name, noise(10), tmp_path, *SMALL[name], "--epochs", 4, "--low-res", 0,
                "--cutmix", cutmix, augment=look)
    assert run.status == 0
    expected = torch.float32, (5, 3, 32, 32), torch.float32, (5, 10)
    assert seen == [expected] * 8, "with CutMix and in the last epochs without"


@pytest.mark.parametrize("change, says", [
    (lambda images, labels: (images, 0.9 * labels), "5 images, and labels .5, 10. of torch.float32 "
     "with sums of 0.9 to 0.9; there must be 5, and .5, 10. of torch.float32 with sums of 1"),
    (lambda images, labels: (images[:3], labels[:3]), "3 images, and labels .3, 10."),
    (lambda images, labels: (images[:3], labels), "3 images, and labels .5, 10."),
    (lambda images, labels: (images, labels.argmax(1)), "labels .5,. of torch.int64"),
    (lambda images, labels: (images, labels.double()), "labels .5, 10. of torch.float64"),
    (lambda images, labels: (images, labels / 0), "with sums of nan"),
    (lambda images, labels: None, None), (lambda images, labels: images, None),
    (lambda images, labels: (images, labels, labels), None),
    (lambda images, labels: (images, labels.numpy()), None),
])
def test_what_an_augmentation_returns_is_checked_in_the_first_step(change, says, tmp_path):
    run = train("train_resnet", noise(10), tmp_path, *SMALL["train_resnet"],
                augment=lambda images, labels, generator: change(images, labels))
    says = f"the augmentation returned .*{says}" if says else "must return two tensors, images and"
    assert run.status == 2 and re.search(says, run.message)
    assert not run.trained and not (tmp_path / "checkpoint.pt").exists()


def test_it_is_checked_in_the_first_step_of_each_start_alone(tmp_path):
    calls = []

    def fail_later(images, labels, generator):
        calls.append(1)
        return images, labels if len(calls) != 2 else 0.5 * labels

    flags = ["train_resnet", noise(15), tmp_path, *SMALL["train_resnet"]]
    assert train(*flags, "--max-minutes", 0.001, augment=fail_later).status == utils.STOPPED
    assert len(calls) == 1
    assert "sums of 0.5" in train(*flags, "--resume", augment=fail_later).message
    assert train(*flags, "--resume", augment=fail_later).status == 0


# Scores


def test_of_equal_logits_the_first_class_counts_everywhere(tmp_path, capsys):
    torch.manual_seed(0)
    logits = torch.randint(3, (1000, 100)).float()
    labels = logits.argmax(1)
    metrics = report.log.score(logits, labels)
    assert (metrics.accuracy, metrics.top5) == (1.0, 1.0)
    classes = report.log.top5(logits)
    assert torch.equal(classes[:, 0], labels)
    assert torch.equal(logits.gather(1, classes), logits.topk(5).values)
    names = tuple(map(str, range(100)))
    dataset = data.Dataset("mine", *[data.Split(torch.zeros(1000, 3, 32, 32).byte(), labels)] * 2,
                           names, "here")
    report.evaluation.write_test_report(logits, dataset, tmp_path)
    rows = list(csv.reader((tmp_path / "confusion.csv").read_text().splitlines()))[1:]
    assert sum(int(row[1 + i]) for i, row in enumerate(rows)) == 1000
    report.evaluation.print_predictions(logits[:20], names, [tmp_path] * 20)
    printed = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [int(row["class"]) for row in printed if row["rank"] == "1"] == labels[:20].tolist()


# One line for what does not fit


@both
@pytest.mark.parametrize("first, then, says", [
    (lambda p: torch.optim.AdamW(p, 0.1), lambda p: torch.optim.SGD(p, 0.1), "--optimizer SGD"),
    (lambda p: torch.optim.AdamW(p, 0.1), lambda p: torch.optim.Adam(p, 0.1), "--optimizer Adam "),
    (lambda p: torch.optim.AdamW(p, 0.1), lambda p: torch.optim.AdamW(p, 0.2),
     r"cannot go on with another optimizer or schedule: lr of group 0 [.\d]+ \(was [.\d]+\), "),
    (lambda p: torch.optim.AdamW(p, 0.1), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0),
     r"weight_decay of group 0 0 \(was 0.01\); choose another"),
    (lambda p: torch.optim.AdamW(p, 0.1), lambda p: torch.optim.AdamW(p, 0.1, (0.9, 0.95)),
     r"betas of group 0 \[0.9, 0.95\] \(was \[0.9, 0.999\]\)"),
    (lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.SGD(
        [{"params": p[:2]}, {"params": p[2:]}], 0.1), "weights of group 0 112 .was 162."),
])
def test_a_resume_with_another_optimizer_is_one_line(
        name, first, then, says, tmp_path, monkeypatch):
    script = importlib.import_module(name)
    for make, more in ((first, ["--max-minutes", 0.001]), (then, ["--resume"])):
        monkeypatch.setattr(script, "make_optimizer", lambda model, *_, make=make: make(
            list(model.parameters())))
        run = train(name, noise(15), tmp_path, *SMALL[name], *more)
    assert run.status == 2 and re.search(f"checkpoint.pt: .*{says}", run.message), run.message


def test_a_resume_with_another_schedule_is_one_line(tmp_path, monkeypatch):
    flags = ["train_resnet", noise(15), tmp_path, *SMALL["train_resnet"]]
    for milestone, more in ((1, ["--max-minutes", 0.001]), (2, ["--resume"])):
        monkeypatch.setattr(engine.optim, "one_cycle", lambda optimizer, _, at=milestone:
                            lr_scheduler.MultiStepLR(optimizer, [at]))
        run = train(*flags, *more)
    assert run.status == 2 and re.search(r"or schedule: schedule MultiStepLR, rates \w{8} \(was "
                                         r"MultiStepLR, rates \w{8}\)", run.message)


@pytest.mark.parametrize("make", [
    lambda optimizer, _: lr_scheduler.ReduceLROnPlateau(optimizer), lambda *_: None])
def test_a_schedule_that_does_not_go_by_steps_is_one_line(make, tmp_path, monkeypatch):
    monkeypatch.setattr(engine.optim, "one_cycle", make)
    run = train("train_resnet", noise(10), tmp_path, *SMALL["train_resnet"])
    assert run.status == 2 and "the schedule must" in run.message


def test_numbers_of_numpy_in_a_state_are_given_back(tmp_path, monkeypatch):
    """A schedule by numpy's cosine had checkpoints that could not be read."""
    monkeypatch.setattr(engine.optim, "one_cycle", lambda optimizer, _: lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + np.cos(np.pi * step / 10))))
    ends = []
    for part, stops in (("whole", []), ("chain", [["--max-minutes", 0.001]] * 2)):
        for more in (*stops, []):
            run = train("train_resnet", noise(15), tmp_path / part, *SMALL["train_resnet"],
                        "--resume", *more)
            assert run.status == (utils.STOPPED if more else 0), run.message
        ends.append(result(tmp_path / part))
    assert ends[0] == ends[1]


def test_a_network_of_one_size_is_one_line_before_the_first_step(runtime):
    """A vision transformer takes images of one size alone."""
    model = VisionTransformer(32, 16, 1, 1, 8, 8, num_classes=10)
    engine.checks.check_outputs(model, [32, 32], plain(10), runtime)
    with pytest.raises(utils.UserError, match=r"cannot take images of 16 x 16 pixels \(Wrong image "
                       r"height.*\); --low-res 0 trains on images of one size"):
        engine.checks.check_outputs(model, [16, 32], plain(10), runtime)
    with pytest.raises(utils.UserError, match=r"cannot take images of 48 x 48 pixels"):
        engine.checks.check_outputs(model, [48], plain(10), runtime)


@both
def test_a_short_run_tries_the_small_images_of_a_longer_one(name, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(engine.checks, "check_outputs", lambda _, found, *__: sizes.append(found))
    low, full = (20, 32) if name == "train_resnet" else (112, 224)
    for flags in ([], ["--low-res", 0]):
        train(name, noise(10), tmp_path, "--max-steps", 1, "--overwrite", *flags)
    assert sizes == [{low, full}, {full}]


def test_a_folder_of_ones_own_that_is_missing_is_bad_input(tmp_path):
    message, status = engine.process.explain(FileNotFoundError(2, "No such file", "data/train"))
    assert message == "cannot go on: [Errno 2] No such file: 'data/train'" and status == 2
    assert engine.process.explain(OSError(28, "No space left"))[1] == 1


# State of one's own


class Counter:
    """Counts steps; its state is a number and a tensor."""

    def __init__(self):
        self.count, self.total = 0, torch.zeros(2)

    def add(self, loss):
        self.count += 1
        self.total += loss.detach()

    def state_dict(self):
        return {"count": self.count, "total": self.total}

    def load_state_dict(self, state):
        self.count, self.total = state["count"], state["total"]


def keeping(monkeypatch, name: str, **keep) -> None:
    """Have a script keep these, and its training step tell them the loss."""
    script = importlib.import_module(name)
    begin_run, step = script.Run.start, script.train_step
    monkeypatch.setattr(script.Run, "start", lambda run, *arguments: begin_run(
        run, *arguments, keep=keep))

    def train_and_tell(run, images, labels):
        loss, logits = step(run, images, labels)
        for part in run.keep.values():
            part.add(loss)
        return loss, logits

    monkeypatch.setattr(script, "train_step", train_and_tell)


@both
def test_what_is_kept_goes_on_after_a_resume(name, tmp_path, monkeypatch):
    ends = []
    for part, stops in (("whole", []), ("chain", [["--max-minutes", 0.001]] * 2)):
        for more in (*stops, []):
            counter = Counter()
            with monkeypatch.context() as patch:
                keeping(patch, name, counter=counter)
                run = train(name, noise(15), tmp_path / part, *SMALL[name], "--resume", *more)
            assert run.status == (utils.STOPPED if more else 0)
        ends.append((counter.count, counter.total.tolist()))
    assert ends[0] == ends[1] and ends[0][0] == 3
    assert utils.load_tensors(tmp_path / "chain" / "checkpoint.pt")["keep"]["counter"]["count"] == 3


@pytest.mark.parametrize("first, then", [
    ({"a": Counter()}, {}), ({}, {"a": Counter()}), ({"a": Counter()}, {"a": nn.Linear(2, 2)})])
def test_a_resume_that_keeps_something_else_is_one_line(first, then, tmp_path, monkeypatch):
    monkeypatch.setattr(nn.Linear, "add", lambda *_: None, raising=False)
    for keep, more in ((first, ["--max-minutes", 0.001]), (then, ["--resume"])):
        with monkeypatch.context() as patch:
            keeping(patch, "train_resnet", **keep)
            run = train("train_resnet", noise(15), tmp_path, *SMALL["train_resnet"], *more)
    says = r"run and checkpoint differ in keep: a \(.*; choose"
    assert run.status == 2 and re.search(says, run.message), run.message


class Odd(Counter):
    """Its state cannot be read back without executing what it asks for."""

    def state_dict(self):
        return {"when": Namespace(now=1)}


def test_what_has_no_state_is_one_line(tmp_path, monkeypatch):
    keeping(monkeypatch, "train_resnet", rows=[])
    run = train("train_resnet", noise(15), tmp_path, *SMALL["train_resnet"])
    assert run.status == 2 and "rows must have a state_dict() of" in run.message


def test_a_state_that_no_checkpoint_can_give_back_is_one_line(tmp_path, monkeypatch):
    keeping(monkeypatch, "train_resnet", odd=Odd())
    run = train("train_resnet", noise(15), tmp_path, *SMALL["train_resnet"])
    assert run.status == 2
    assert "odd must have a state_dict() of tensors and plain values" in run.message


def test_ranks_average_the_statistics_of_a_kept_network_too(start):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 100), nn.BatchNorm1d(100))
    run, _ = start(model)
    run.keep = {"average": torch.optim.swa_utils.AveragedModel(model), "counter": Counter()}
    run.runtime = run.runtime._replace(ranks=2)
    names = ("running_mean", "running_var")
    expected = [getattr(norm, name) for norm in (model[2], run.keep["average"].module[2])
                for name in names]
    assert [id(tensor) for tensor in run._own_statistics()] == [id(tensor) for tensor in expected]


def test_the_model_that_counts_becomes_model_pt(start, tmp_path):
    run, batches = start(nn.Sequential(nn.Flatten(), nn.Linear(192, 100)), "--output-dir", tmp_path)
    average = copy.deepcopy(run.model)
    results = {"train": train_one_epoch(run, batches.shuffled(0, 0, 0, 8), train_step)}
    results["test"] = evaluate(average, [(torch.zeros(4, 3, 8, 8), torch.zeros(4).long())],
                               run.runtime)
    run.end_epoch(results)
    wrapped = torch.optim.swa_utils.AveragedModel(average)
    run.finish(wrapped)
    kept = utils.load_tensors(tmp_path / "model.pt")
    assert all(torch.equal(kept[name], value) for name, value in average.state_dict().items())
    assert not torch.equal(kept["1.weight"], run.model.state_dict()["1.weight"])


# Images of one's own


def of_side(side: int, count: int = 40) -> data.Dataset:
    """Return random images of this side."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, side, side), generator=generator).byte()
    split = data.Split(images, torch.arange(count) % 10)
    return data.Dataset("mine", split, split, tuple("abcdefghij"), "here")


@pytest.mark.parametrize("side", [8, 32, 33, 64])
def test_images_of_any_side_are_cropped_and_flipped_as_those_of_32_pixels_are(side, runtime):
    split = of_side(side).train
    stats = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # which leaves the numbers as they are
    batches = data.Batches(split, 40, stats, runtime, size=side, padding=4)
    (images, labels, _), = batches.shuffled(0, 0, size=side)
    reach = round(4 * side / 32)
    padded = nn.functional.pad(split.images.float(), [reach] * 4, mode="reflect")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(data.epoch_seed(0, 0)))
    offsets = set()
    for image, source in zip(images.round(), padded[order], strict=True):
        crops = {(down, right, flip) for down in range(2 * reach + 1)
                 for right in range(2 * reach + 1) for flip in (False, True)
                 if torch.equal(image, source[:, down:down + side, right:right + side].flip(
                     [2] if flip else []))}
        assert crops, "each is a crop, or a flipped one, of the padded image"
        offsets |= crops
    assert torch.equal(labels, split.labels[order])
    assert {flip for *_, flip in offsets} == {False, True}
    assert max(down for down, *_ in offsets) >= 1.5 * reach
    (tested, _), = data.Batches(split, 40, stats, runtime, size=side)
    assert torch.equal(tested.round(), split.images.float())


def test_cutmix_of_larger_images_mixes_labels_by_the_area(runtime):
    images = torch.arange(8)[:, None, None, None].expand(8, 3, 64, 64).byte()
    stats = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
    split = data.Split(images, torch.arange(8))
    batches = data.Batches(split, 8, stats, runtime, size=64, classes=8)
    (mixed, labels, _), = batches.shuffled(0, 0, size=64, cutmix=1.0)
    areas = torch.stack([(mixed[:, 0].round() == label).double().mean((1, 2))
                         for label in range(8)], 1)
    assert torch.allclose(labels.double(), areas, atol=1e-6)
    assert ((labels > 0).sum(1) == 2).sum() >= 6


@both
@pytest.mark.parametrize("side", [20, 64])
def test_both_parts_train_on_images_of_another_side(name, side, tmp_path):
    run = train(name, of_side(side), tmp_path, *SMALL[name], "--low-res", 0)
    assert run.status == 0 and run.trained[0].images.shape == (5, 3, 32, 32)
    config = report.runs.read_config(tmp_path)
    assert config["image_side"] == side and config["dataset"] == "mine"
    assert f" test images of {side} x {side} pixels, here" in config["in_words"]["data"]
    assert "dataset mine" in config["in_words"]["recipe"]


def test_part_2_takes_images_of_its_own_size_as_they_are(tmp_path):
    run = train("finetune_resnet18", of_side(64), tmp_path, *SMALL["finetune_resnet18"],
                "--image-size", 64)
    mean, std = (torch.tensor(values)[:, None, None] for values in data.IMAGENET_STATS)
    pixels = torch.cat([255 * (shown.images * std + mean) for shown in run.tested])
    assert torch.allclose(pixels, of_side(64).test.images.float(), atol=1e-3)


def test_splits_of_two_sides_are_one_line():
    dataset = of_side(64)._replace(test=of_side(32).test)
    says = r"here: test images must be a uint8 tensor \(N, 3, 64, 64\)"
    with pytest.raises(utils.UserError, match=says):
        data.check(dataset)


def test_a_picture_is_read_at_the_side_of_the_images_that_the_model_was_trained_on(
        tmp_path, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (64, 64, 3), generator=rng).byte()
    Image.fromarray(pixels.numpy()).save(tmp_path / "noise.png")
    images, *_ = read_pictures([tmp_path / "noise.png"], 64)
    assert torch.equal(images[0], pixels.permute(2, 0, 1))
    train("finetune_resnet18", of_side(64), tmp_path / "run", *SMALL["finetune_resnet18"])
    sides = []
    monkeypatch.setattr(engine.inference, "read_pictures", lambda _, side, rank: sides.append(
        side) or (images, ["noise.png"], 0, 0))
    train("finetune_resnet18", of_side(64), tmp_path / "run", "--predict", "noise.png")
    assert sides == [64]


# An output directory is enough


def test_the_code_in_an_output_directory_makes_the_same_model(tmp_path):
    flags = ["--dataset", "synthetic", "--device", "cpu", "--precision", "fp32", "--batch-size",
             20, "--max-steps", 2]
    first, second, code = tmp_path / "first", tmp_path / "second", tmp_path / "code"
    assert script("train_resnet", *flags, "--output-dir", first,
                  before=without_pictures).returncode == 0
    with zipfile.ZipFile(first / "code.zip") as archive:
        archive.extractall(code)
        assert {"train_resnet.py", "data.py", "engine/run.py"} < {*archive.namelist()}
    again = subprocess.run([sys.executable, "train_resnet.py", *map(str, flags), "--output-dir",
                            second], cwd=code, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert result(first) == result(second)
    one, other = (report.runs.read_config(path)["code"]["modules"] for path in (first, second))
    assert one == other


def import_from(directory) -> None:
    """Have modules found in a directory, as Python does in that of a script."""
    sys.path.insert(0, str(directory))


def test_modules_beside_a_script_that_lies_elsewhere_belong_to_the_code(tmp_path):
    (tmp_path / "helper.py").write_text("NAME = 'mine'\n")
    text = (ROOT / "train_resnet.py").read_text()
    text = text.replace("import data\n", "import data\nimport helper\n")
    (tmp_path / "train_mine.py").write_text(text)
    flags = ["--dataset", "synthetic", "--device", "cpu", "--batch-size", 20, "--max-steps", 1]
    hashes = set()
    for name in ("mine", "other"):
        (tmp_path / "helper.py").write_text(f"NAME = {name!r}\n")
        process = script(tmp_path / "train_mine", *flags, "--output-dir", tmp_path / name,
                         before=functools.partial(import_from, tmp_path))
        assert process.returncode == 0, process.stderr
        with zipfile.ZipFile(tmp_path / name / "code.zip") as archive:
            assert name in archive.read("helper.py").decode()
            assert "train_mine.py" in archive.namelist()
        hashes.add(report.runs.read_config(tmp_path / name)["code"]["modules"])
    assert len(hashes) == 2


def test_a_resume_with_other_code_names_both_and_keeps_the_first(tmp_path):
    text = (ROOT / "train_resnet.py").read_text()
    mine, hashes = tmp_path / "train_mine", []
    flags = ["--dataset", "synthetic", "--device", "cpu", "--batch-size", 20, "--max-steps", 2,
             "--output-dir", tmp_path / "run", "--resume"]
    for more, status in ((["--max-minutes", 0.001], utils.STOPPED), ([], 0)):
        mine.with_suffix(".py").write_text(text)
        process = script(mine, *flags, *more, before=without_pictures)
        assert process.returncode == status, process.stderr
        hashes.append(report.runs.read_config(tmp_path / "run")["code"]["modules"])
        text += "# changed\n"
    assert len(hashes[0]) == 12 and re.fullmatch(rf"{hashes[0]} then \w{{12}}", hashes[1])
    with zipfile.ZipFile(tmp_path / "run/code.zip") as opened:
        assert not opened.read("train_mine.py").endswith(b"# changed\n")


def test_config_json_says_with_what_a_run_was_made(tmp_path):
    torch.save(models.resnet18().state_dict(), tmp_path / "weights.pth")
    flags = ["--dataset", "synthetic", "--device", "cpu", "--image-size", 32, "--batch-size", 20,
             "--max-steps", 2, "--output-dir", tmp_path / "run", "--resume"]
    for more in (["--weights", tmp_path / "weights.pth", "--max-minutes", 0.001], []):
        script("finetune_resnet18", *flags, *more, before=without_pictures)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    versions = {name: importlib.import_module(name).__version__
                for name in ("torch", "torchvision", "numpy")}
    assert config.items() >= versions.items()
    assert config["processes"] == 1 and config["processor"]
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    assert config["weights_sha256"] == digest
    kept = utils.load_tensors(tmp_path / "run" / "checkpoint.pt")
    assert kept["weights_sha256"] == digest, "also after a resume without the file"
    words = f"{tmp_path / 'weights.pth'} (its head of 100 kept)"
    *_, recipe, environment = tables((tmp_path / "run" / "report.md").read_text())
    assert ["weights_sha256", digest] in environment and ["weights", words] in recipe
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count(f"weights    {words}\n") == 2, "also after a resume without it"
