"""Each script trains as its command line says: every flag arrives where it matters, by number."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, equal
from PIL import Image
from tiny import SCRIPTS, Tiny, Watched, noise, plain, train
from torch import nn

import data
import models
import utils
from engine.runtime import PRECISIONS, Runtime
from report.runs import read_config

both = pytest.mark.parametrize("name", SCRIPTS)
CIFAR100 = (0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATS = dict(zip(SCRIPTS, (CIFAR100, IMAGENET), strict=True))
# The side of the images, in the first epochs and later, of runs with the flags beside it.
SMALL = {"train_resnet": (20, 32, []), "finetune_resnet18": (40, 80, ["--image-size", 80])}


def test_the_statistics_are_the_published_ones():
    assert (data.CIFAR100_STATS, data.IMAGENET_STATS) == (CIFAR100, IMAGENET)


@both
def test_images_are_normalised_for_the_part_wherever_they_enter(name, tmp_path, capsys):
    *_, size = SMALL[name]
    flags = [*size, "--cutmix", 0.5, "--epochs", 2, "--low-res", 0.5, "--val-size", 10]
    run = train(name, plain(20), tmp_path, *flags)
    assert {len(run.trained), len(run.tested)} == {2, 4}
    Image.new("RGB", (32, 32), (51, 51, 51)).save(tmp_path / "grey.png")
    used = [train(name, plain(20), tmp_path, *flags) for flags in (
        ["--eval-only"], ["--predict", tmp_path / "grey.png"])]
    mean, std = (torch.tensor(values) for values in STATS[name])
    for shown in (*run.trained, *run.tested, *used[0].tested, *used[1].tested):
        for channel, value in enumerate((0.2 - mean) / std):
            torch.testing.assert_close(shown.images[:, channel], torch.full_like(
                shown.images[:, channel], value.item()), rtol=0, atol=1e-5)
    sides = [shown.images.shape[-1] for one in (run, *used) for shown in one.tested]
    low, full = SMALL[name][:2]
    assert sides == [low] * 2 + [full] * 4, "each epoch at its size, the model at full size"
    assert [len(one.tested[0].images) for one in used] == [30, 1]
    assert "grey.png,1,class " in capsys.readouterr().out


@both
def test_the_last_epoch_is_tested_at_full_size_whatever_it_trains_on(name, tmp_path, caplog):
    low, full, size = SMALL[name]
    with caplog.at_level("INFO", "cifar100"):
        run = train(name, noise(10), tmp_path, *size, "--epochs", 2, "--low-res", 1,
                    "--batch-size", 10)
    assert [shown.images.shape[-1] for shown in run.trained] == [low, low]
    assert [shown.images.shape[-1] for shown in run.tested] == [low, full]
    assert [row["test_image_size"] for row in run.rows()] == [low, full]
    lines = [line for line in caplog.messages if " img/s" in line]
    assert f"1/2  {low}px  lr" in lines[0] and f"2/2  {low}px tested at {full}px  lr" in lines[1]
    words = read_config(tmp_path)["in_words"]["images"]
    assert words.startswith(f"epochs: 2 of {low}px; ")


@both
def test_each_epoch_is_drawn_as_the_command_line_says(name, tmp_path):
    low, full, size = SMALL[name]
    run = train(name, noise(70), tmp_path, *size, "--epochs", 4, "--low-res", 0.5, "--cutmix",
                0.25, "--seed", 7, "--batch-size", 25, "--val-size", 10)
    assert run.status == 0 and run.first_seed == 7, "the first weights are those of the seed"
    assert run.drawn == [
        {"seed": 7, "epoch": 0, "start": 0, "size": low, "cutmix": 0.25},
        {"seed": 7, "epoch": 1, "start": 0, "size": low, "cutmix": 0.25},
        {"seed": 7, "epoch": 2, "start": 0, "size": full, "cutmix": 0.25},
        {"seed": 7, "epoch": 3, "start": 0, "size": full, "cutmix": 0}]
    assert [tuple(shown.images.shape) for shown in run.trained] == [
        (count, 3, side, side) for side in (low, low, full, full) for count in (25, 25, 10)]
    assert [len(shown.images) for shown in run.tested] == [10, 30] * 4, "validation, then test"
    assert [shown.images.shape[-1] for shown in run.tested] == [low] * 4 + [full] * 4
    for column in ("image_size", "test_image_size"):
        assert [row[column] for row in run.rows()] == [low, low, full, full]
    seeds = [shown.seed for shown in run.trained]
    assert len(set(seeds)) == 4, "the network draws anew in each epoch"
    _, shares, _ = run.batches[0]
    assert shares.shape == (25, 10), "soft labels have a share for each class"
    for row, *shown in zip(run.rows(), run.tested[::2], run.tested[1::2], strict=True):
        for split, (_, logits, *_) in zip(("val", "test"), shown, strict=True):
            expected = F.cross_entropy(logits.float(), torch.arange(len(logits)) % 10).item()
            assert row[f"{split}_loss"] == pytest.approx(expected, rel=2e-5)


@both
def test_the_test_images_come_in_the_batches_of_the_part(name, tmp_path):
    dataset = plain(2)
    many = data.Split(dataset.test.images[:1].expand(520, -1, -1, -1), torch.arange(520) % 10)
    flags = ["--image-size", 32] if name == "finetune_resnet18" else []
    run = train(name, dataset._replace(test=many), tmp_path, *flags, "--epochs", 1)
    tested = train(name, dataset._replace(test=many), tmp_path, "--eval-only")
    expected = [500, 20] if name == "train_resnet" else [*[100] * 5, 20]
    for one in (run, tested):
        assert [len(shown.images) for shown in one.tested] == expected


@pytest.mark.parametrize("name, epochs, low_epochs, flags", [
    ("train_resnet", 3, 0, []), ("train_resnet", 5, 1, []), ("train_resnet", 30, 9, []),
    ("train_resnet", 50, 29, ["--low-res", 0.58]), ("finetune_resnet18", 1, 0, []),
    ("finetune_resnet18", 2, 1, []), ("finetune_resnet18", 4, 2, []),
    ("finetune_resnet18", 2, 1, ["--image-size", 48]),
])
def test_a_run_of_any_length_trains_at_full_size_in_the_end(
        name, epochs, low_epochs, flags, tmp_path):
    run = train(name, plain(2), tmp_path, "--epochs", epochs, *flags)
    low, full = (20, 32) if name == "train_resnet" else (112, 224)
    if "--image-size" in flags:
        low, full = 32, 48  # never below 32
    sides = [low] * low_epochs + [full] * (epochs - low_epochs)
    assert [shown.images.shape[-1] for shown in run.trained] == sides
    assert [shown.images.shape[-1] for shown in run.tested] == [*sides[:-1], full]


def loop_that_people_write(run, smoothing: float, groups: list[dict], rates: list[float]):
    """Train the first weights of a run on its batches by torch's SGD; return them."""
    model = Tiny(10, Watched(run.output_dir))
    model.load_state_dict(run.first_weights)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(
        [{**group, "params": [parameters[name] for name in group["params"]]} for group in groups],
        momentum=0.9, nesterov=True)
    peaks = [group["lr"] for group in groups]
    for (images, labels, _), rate in zip(run.batches, rates, strict=True):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels, label_smoothing=smoothing).backward()
        optimizer.step()
    return model.state_dict()


# Of ten steps, as shares of the peak: up to it in a fifth of the steps, from 1/25, and down to 0.
RATES = [0.04, 0.84, 0.90909, 0.79546, 0.68182, 0.56818, 0.45455, 0.34091, 0.22728, 0.11364]
BY_SGD = {
    "train_resnet": [{"params": ["conv.weight", "fc.weight"], "lr": 0.3, "weight_decay": 0.02},
                     {"params": ["conv.bias", "fc.bias"], "lr": 0.3}],
    "finetune_resnet18": [{"params": ["conv.weight", "conv.bias"], "lr": 0.3, "weight_decay": 0.02},
                          {"params": ["fc.weight", "fc.bias"], "lr": 3.0, "weight_decay": 0.02}]}


@pytest.mark.parametrize("precision, tolerance", [("fp32", 5e-4), ("bf16", 0.05), ("fp16", 0.01)])
@both
def test_a_run_by_sgd_is_the_loop_that_people_write_in_any_precision(
        name, precision, tolerance, tmp_path):
    *_, size = SMALL[name]
    run = train(name, noise(31), tmp_path, *size, "--optimizer", "sgd", "--lr", 0.3,
                "--weight-decay", 0.02, "--label-smoothing", 0.3, "--cutmix", 0.4, "--epochs", 4,
                "--max-steps", 10, "--batch-size", 15, "--precision", precision, "--val-size", 0)
    assert run.status == 0
    expected = loop_that_people_write(run, 0.3, BY_SGD[name], RATES)
    for key, value in run.model.state_dict().items():
        moved, error = expected[key] - run.first_weights[key], value - expected[key]
        assert error.norm() < tolerance * moved.norm(), key
    assert {shown.logits.dtype for shown in (*run.trained, *run.tested)} == {
        PRECISIONS[precision]}
    assert not any(shown.needs_graph for shown in run.tested), "evaluation keeps no graph"
    assert_metrics_are_of_what_was_shown(run, 0.3, [15, 15, 1])


def assert_metrics_are_of_what_was_shown(run, smoothing: float, lengths: list[int]) -> None:
    """Compute the losses in float32 whatever the precision, and that of the test unsmoothed."""
    labels = torch.arange(30) % 10
    for epoch, row in enumerate(run.rows()):
        steps = slice(len(lengths) * epoch, len(lengths) * (epoch + 1))
        loss = right = count = 0
        for shown, (_, targets, _) in zip(run.trained[steps], run.batches[steps], strict=True):
            logits = shown.logits.float()
            loss += len(targets) * F.cross_entropy(logits, targets, label_smoothing=smoothing)
            classes = targets if targets.ndim == 1 else targets.argmax(1)
            right += (logits.argmax(1) == classes).sum().item()
            count += len(targets)
        assert row["train_loss"] == pytest.approx(loss.item() / count, rel=2e-5)
        assert row["train_acc"] == pytest.approx(right / count, rel=1e-5)
        logits = run.tested[epoch].logits.float()
        assert row["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=2e-5)


@both
def test_the_rates_of_all_weights_rise_and_fall_while_the_momentum_stays(name, tmp_path):
    run = train(name, noise(20), tmp_path, *SMALL[name][2], "--epochs", 5, "--batch-size", 8,
                "--max-steps", 10, "--lr", 0.5)
    steps = [shown.groups for shown in run.trained]
    for number, peak in enumerate([0.5, 0.1, 0.1] if name == "train_resnet" else
                                  [0.5, 0.003, 0.03]):
        rates = [groups[number]["lr"] / peak for groups in steps]
        assert rates == pytest.approx(RATES, abs=1e-4)
        assert {groups[number]["momentum"] for groups in steps} == {0.9 if number else 0}
    # An epoch tells the convolutions' rate, of the step that follows.
    told = [0.5 * rate for rate in (RATES[3], RATES[6], RATES[9], 0)]
    assert [row["lr"] for row in run.rows()] == pytest.approx(told, abs=1e-4)


PART_1, PART_2 = SCRIPTS
OTHER = ["--lr", 0.04, "--weight-decay", 0.002]
SGD = ["--optimizer", "sgd"]


@pytest.mark.parametrize("name, flags, convolution, norm, head, bias", [
    (PART_1, [], (0.1, 0.01), (0.1, 0), (0.1, 5e-4), (0.1, 0)),
    (PART_1, OTHER, (0.04, 0.002), (0.1, 0), (0.1, 5e-4), (0.1, 0)),
    (PART_1, SGD, (0.2, 5e-4), (0.2, 0), (0.2, 5e-4), (0.2, 0)),
    (PART_1, [*SGD, *OTHER], (0.04, 0.002), (0.04, 0), (0.04, 0.002), (0.04, 0)),
    (PART_2, [], (0.002, 5e-4), (0.003, 5e-4), (0.03, 5e-4), (0.03, 5e-4)),
    (PART_2, OTHER, (0.04, 0.002), (0.003, 0.002), (0.03, 0.002), (0.03, 0.002)),
    (PART_2, SGD, (0.003, 5e-4), (0.003, 5e-4), (0.03, 5e-4), (0.03, 5e-4)),
    (PART_2, [*SGD, *OTHER], (0.04, 0.002), (0.04, 0.002), (0.4, 0.002), (0.4, 0.002)),
])
def test_each_weight_has_the_rate_and_decay_of_its_kind(
        parse, name, flags, convolution, norm, head, bias):
    script, args = parse(name, *flags)
    model = models.ResNet() if name == PART_1 else models.resnet18()
    by_muon = "sgd" not in flags
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        runtime = Runtime(torch.device(device), dtype)
        optimizer = script.make_optimizer(model, args, runtime)
        assert (optimizer.dtype, optimizer.pad) == (dtype, device == "cuda")
        assert optimizer.iterations == (5 if name == PART_1 else 3)
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for key, parameter in model.named_parameters():
        kind = norm
        if parameter.ndim == 4:
            kind = convolution
        elif key.startswith("fc."):
            kind = head if key == "fc.weight" else bias
        group = groups[parameter]
        assert (group["lr"], group["weight_decay"]) == pytest.approx(kind), key
        moved_by_muon = by_muon and parameter.ndim == 4
        assert ("muon" in group) == moved_by_muon, key
        momentum = group["muon"] if moved_by_muon else group["momentum"]
        assert (momentum, group["nesterov"]) == (0.9, not moved_by_muon), key


def ramp(count: int) -> data.Dataset:
    """Return training images whose pixels grow from left to right."""
    dataset = plain(count)
    images = torch.arange(0, 256, 8, dtype=torch.uint8).expand(count, 3, 32, 32)
    return dataset._replace(train=dataset.train._replace(images=images))


@pytest.mark.parametrize("name, flags, padding", [
    (PART_1, ["--epochs", 1], 2), (PART_1, ["--epochs", 11, "--max-steps", 1], 4),
    (PART_1, ["--epochs", 1, "--crop-padding", 1], 1),
    (PART_2, ["--epochs", 1, "--image-size", 32, "--low-res", 0], 4)])
def test_crops_move_an_image_as_far_as_the_script_says(name, flags, padding, tmp_path):
    run = train(name, ramp(250), tmp_path, *flags, "--low-res", 0, "--batch-size", 250,
                "--cutmix", 0)
    (shown,) = run.trained
    # Each distance in both directions, flipped or not.
    assert len(torch.unique(shown.images[:, 0, 0], dim=0)) == 2 * (2 * padding + 1)


@both
@pytest.mark.parametrize("strength", [0, 0.25])
def test_trivial_augment_is_as_strong_as_the_flag_says(name, strength, tmp_path, monkeypatch):
    levels, change = [], data.trivial_augment

    def tell(images, operation, level):
        levels.append(level.abs().max().item())
        return change(images, operation, level)

    monkeypatch.setattr(data, "trivial_augment", tell)
    train(name, noise(250), tmp_path, *SMALL[name][2], "--epochs", 1, "--batch-size", 250,
          "--trivial-augment", strength)
    assert levels == ([pytest.approx(strength, rel=0.05)] if strength else [])


@both
def test_an_augmentation_of_ones_own_changes_the_training_images_of_either_part(name, tmp_path):
    blocks = re.findall(r"^```\n(.*?)^```$", (ROOT / "README.md").read_text(),
                        re.MULTILINE | re.DOTALL)
    # It greys out a square.
    (block,) = (block for block in blocks if "def make_augment" in block)
    names = {"torch": torch}
    exec(block, names)
    run = train(name, plain(10), tmp_path, *SMALL[name][2], "--epochs", 2, "--low-res", 0.5,
                augment=names["make_augment"](None, None, None))
    grey = [(shown.images == 0).all(1).flatten(1).sum(1) for shown in run.trained]
    assert len(grey) == 2 and all(pixels.gt(0).all() and pixels.le(64).all() for pixels in grey)
    assert not any((shown.images == 0).any() for shown in run.tested)


@pytest.mark.parametrize("name, required", [(PART_1, 60), (PART_2, 70)])
def test_the_verdict_is_by_the_accuracy_that_the_course_requires_of_the_part(
        name, required, tmp_path, caplog):
    dataset = plain(10)._replace(name="cifar100")
    with caplog.at_level("INFO", "cifar100"):
        train(name, dataset, tmp_path, *SMALL[name][2], "--epochs", 1)
    assert caplog.messages[-1] == ("final test accuracy 10.00% (the course's required accuracy of "
                                   f"{required}% is not met)")


@both
def test_compile_compiles_the_network_and_the_augmentation_and_nothing_does_without_it(
        name, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compiled.append(type(module)))
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append("batches")
                        or function)
    for number, flags in enumerate(([], ["--compile"])):
        train(name, noise(10), tmp_path / str(number), *SMALL[name][2], "--epochs", 1, *flags)
        assert bool(compiled) == bool(flags)
    assert {getattr(one, "__name__", one) for one in compiled} == {"Tiny", "batches"}


@both
def test_the_network_is_placed_for_the_size_of_its_batches(name, tmp_path, monkeypatch):
    # By that several GPUs choose their batch norm.
    placed, place = [], Runtime.place

    def tell(runtime, model, batch_size=0):
        placed.append(batch_size)
        return place(runtime, model, batch_size)

    monkeypatch.setattr(Runtime, "place", tell)
    train(name, noise(10), tmp_path, *SMALL[name][2], "--epochs", 1, "--batch-size", 7)
    assert placed == [7]


@both
def test_the_data_come_from_the_mirror_and_never_if_downloads_are_forbidden(
        name, parse, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.delenv("CIFAR100_DIR", raising=False)
    mirror = (tmp_path / "no mirror.tar.gz").as_uri()
    for flags, says in ((["--data-url", mirror], f"not downloaded from {mirror} "),
                        (["--data-url", mirror, "--no-download"], "--no-download forbids it")):
        script, args = parse(name, "--data-dir", tmp_path / "none", *flags)
        with pytest.raises(utils.UserError, match=re.escape(says)):
            script.load_data(args)
    script, args = parse(name, "--dataset", "synthetic")
    assert script.load_data(args).name == "synthetic"


def test_part_1_makes_the_network_with_the_dropout_of_the_flag(parse):
    for flags, dropout in (([], 0), (["--dropout", 0.25], 0.25)):
        script, args = parse(PART_1, *flags)
        layers = [layer for layer in script.make_model(args).modules()
                  if isinstance(layer, nn.Dropout)]
        assert [layer.p for layer in layers] == [dropout]


@both
def test_a_run_begins_with_the_file_of_weights_until_there_is_a_checkpoint(
        name, tmp_path, caplog):
    caplog.set_level("INFO", "cifar100")
    state = {key: torch.rand(value.shape) for key, value in Tiny(10, None).state_dict().items()}
    file = tmp_path / "weights.pth"
    torch.save(state, file)
    firsts = []  # the weights in the first step of each start

    def start(*flags):
        seen = []
        run = train(name, noise(10), tmp_path / "run", *SMALL[name][2], "--batch-size", 5,
                    "--epochs", 1, "--resume", *flags,
                    act=lambda run: seen.append(copy.deepcopy(run.model.state_dict())))
        firsts.extend(seen[:1])
        return run.status

    # Every job passes --resume, the first one, too.
    assert start("--weights", file, "--max-minutes", 0.001) == utils.STOPPED
    file.unlink()
    assert start("--weights", file) == 0, "the checkpoint has all weights"
    assert equal(dict(firsts[0]), state) and not equal(dict(firsts[1]), state)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count(f"\nweights    {file} (its head of 10 kept)\n") == 2


@both
def test_a_run_without_weights_begins_with_those_of_the_seed(name, tmp_path, caplog):
    """Part 2's default weights come from make_model(), in whose place a `Tiny` is made here."""
    caplog.set_level("INFO", "cifar100")
    for number, flags in enumerate(([], ["--weights", "random"])):
        firsts = []
        run = train(name, noise(10), tmp_path / str(number), *SMALL[name][2], "--epochs", 1, *flags,
                    act=lambda run, firsts=firsts: firsts.append(
                        copy.deepcopy(run.model.state_dict())))
        assert run.status == 0 and equal(dict(run.first_weights), dict(firsts[0]))
        log = (tmp_path / str(number) / "log.txt").read_text()
        assert log.count("\nweights    random\n") == number == log.count("\nweights ")


def test_part_2_fetches_no_weights_if_downloads_are_forbidden(parse, tmp_path, monkeypatch):
    if list(ROOT.glob("resnet18-*.pth")):
        pytest.skip("the weights lie beside the code")

    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    for flags, says in (([], "no route to host"), (["--no-download"], "--no-download forbids")):
        script, args = parse(PART_2, *flags)
        with pytest.raises(utils.UserError, match=says):
            script.make_model(args)
