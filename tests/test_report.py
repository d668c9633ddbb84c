"""What people look at: lines of the log, scores, the report on a run, comparisons, curves."""

import csv
import json
import re
import sys

import numpy as np
import pytest
import torch
from helpers import TIMES, shows_something, tables
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import finetune_resnet18
import report.curves
import report.log
import report.runs
import train_resnet
import utils
from report.compare import compare
from report.evaluation import write_run_report
from report.runs import read_run

COLUMNS = ("lr", "train_loss", "train_acc", "val_loss", "val_acc", "val_top5", "test_loss",
           "test_acc", "test_top5")
RECIPE = ["epochs", "lr", "weight_decay", "dropout", "seed"]
CODE = {"commit": "1a2b3c4d5e6f", "changed": False, "modules": "0123456789ab"}
NETWORK = {"name": "ResNet", "parameters": 3_559_556, "layers": [
    ["conv1", "Conv2d", 864], ["conv2_x", "2 x BasicBlock", 36_992], ["fc", "Linear", 3_521_700]]}
MEANS = ("test_acc", "test_top5", "val_acc", "val_top5")
KNOWN = {"code": CODE, "network": NETWORK, "data": 0x8f3a0c11, "in_words": {}}


def made_up_run(directory, script="train_resnet", required=60.0, seed=0, epochs=3, sizes=None,
                config=KNOWN, **settings):
    """Write the files of a run with random numbers; return them by column.

    `config` has further entries of config.json.
    """
    rng = np.random.default_rng(seed)
    directory.mkdir()
    settings |= {"seed": seed, "epochs": epochs, "output_dir": str(directory)}
    config = {"script": script, "dataset": "cifar100", "required_accuracy": required,
              "command": "a command", "runtime": "a device", "torch": "2.14.1", "python": "3.13.1",
              "system": "a system", "recipe": RECIPE, "settings": settings, **config}
    (directory / "config.json").write_text(json.dumps(config))
    numbers = rng.uniform(size=(epochs, len(COLUMNS))).round(4)
    with open(directory / "metrics.csv", "w") as file:
        writer = csv.writer(file)
        writer.writerow(["dataset", "epoch", "epochs", "image_size", *COLUMNS, *TIMES])
        for epoch, row in enumerate(numbers, 1):
            size = sizes[epoch - 1] if sizes else 32
            writer.writerow(["cifar100", epoch, epochs, size, *row, 100 * epoch, 60, 0])
    return dict(zip(COLUMNS, numbers.T, strict=True))


def curves(panel) -> list:
    """Return a panel's lines over the epochs, without what only the legend needs."""
    return [line for line in panel.lines
            if len(line.get_xdata()) and not line.get_label().startswith("required")]


def title(panel) -> str:
    """Return the title of a panel, wherever it stands."""
    return "".join(panel.get_title(place) for place in ("left", "center", "right"))


def required(panel) -> list[float]:
    """Return the heights of a panel's lines of the required accuracy."""
    return [line.get_ydata()[0] for line in panel.lines if line.get_label().startswith("required")]


def legends(figure) -> list[list[str]]:
    """Return what the legends of a figure say; long lines may be broken there."""
    boxes = [panel.get_legend() for panel in figure.axes if panel.get_legend()]
    return [[" ".join(text.get_text().split()) for text in box.get_texts()] for box in boxes]


def test_scores_equal_numpys():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (500, 100)).astype(np.float32), rng.integers(0, 100, 500)
    exp = np.exp(logits.astype(np.float64))
    order = np.argsort(-logits, 1)
    metrics = report.log.score(torch.from_numpy(logits), torch.from_numpy(labels))
    assert metrics.loss == pytest.approx(
        -np.log(exp[np.arange(500), labels] / exp.sum(1)).mean(), rel=1e-12)
    assert metrics.accuracy == (order[:, 0] == labels).mean()
    assert metrics.top5 == (order[:, :5] == labels[:, None]).any(1).mean()
    assert metrics.images == 500


def test_an_epochs_line_is_the_one_of_the_readme():
    row = {"dataset": "cifar100", "epoch": 4, "epochs": 5, "image_size": 32,
           "test_image_size": 32, "lr": 0.025,
           **report.log.metric_columns({"train": report.log.Metrics(2.184, 0.5668, np.nan, 50_000),
                                    "test": report.log.Metrics(1.541, 0.5867, 0.859, 10_000)}),
           "images_per_second": 501.2, "seconds": 104.6, "eta_seconds": 105}
    assert report.log.epoch_line(row) == (
        "epoch  4/5  32px  lr 0.0250  train loss 2.184 acc 56.68%  test loss 1.541 acc 58.67% "
        "top5 85.90%  501 img/s  104.6 s  eta 1m45s")
    row |= {"dataset": "synthetic", "val_loss": 3.0, "val_acc": 0.04, "val_top5": 0.1}
    assert report.log.epoch_line(row).startswith("[synthetic]  epoch  4/5 ")
    assert "56.68%  val loss 3.000 acc  4.00% top5 10.00%  test loss" in report.log.epoch_line(row)


@pytest.mark.parametrize("seconds, text", [
    (0.4, "0s"), (41, "41s"), (281, "4m41s"), (3599.7, "1h00m"), (3840, "1h04m"),
])
def test_durations(seconds, text):
    assert report.log.duration(seconds) == text


@pytest.mark.parametrize("accuracy, words", [(0.6, "60% is met"), (0.5999, "60% is not met")])
def test_the_required_accuracy_is_met_or_not(accuracy, words):
    assert report.log.verdict(accuracy, 60.0) == f"the course's required accuracy of {words}"
    assert report.log.verdict(accuracy, None).endswith("required accuracy does not apply")


def test_the_required_accuracies_are_those_of_the_course():
    assert (train_resnet.REQUIRED, finetune_resnet18.REQUIRED) == (60, 70)


def test_the_reported_epoch_is_the_last_not_the_best(tmp_path, drawn):
    numbers = made_up_run(tmp_path / "run", seed=4)
    accuracies = numbers["test_acc"]
    assert accuracies[-1] < 0.6 < max(accuracies)
    write_run_report(tmp_path / "run", read_run(tmp_path / "run").history)
    last = {name: f"{values[-1]:.2%}" for name, values in numbers.items()}
    (row,), *_ = tables((tmp_path / "run" / "report.md").read_text())
    assert row == [str(tmp_path / "run"), "4", "3 of 3", last["train_acc"], last["val_acc"],
                   last["test_acc"], last["test_top5"], f"{numbers['test_loss'][-1]:.3f}",
                   "the course's required accuracy of 60% is not met", "3m00s",
                   "164"], "180 s, and the images of three epochs in the time of all"


IN_WORDS = {"network": "ResNet, 3,559,556 parameters", "optimizer": "Muon: rate 0.1",
            "training": "3 epochs of 200 steps of 250 images", "seed": "0"}


def test_a_report_says_what_matters_in_words_and_no_more(tmp_path, drawn):
    last = made_up_run(tmp_path / "run", lr=0.1, dropout=False, weights=None, weight_decay=0,
                       resume=True, no_download=False, max_minutes=None, data_dir="data",
                       config={**KNOWN, "in_words": IN_WORDS})
    write_run_report(tmp_path / "run", read_run(tmp_path / "run").history)
    text = (tmp_path / "run" / "report.md").read_text()
    accuracy = f"{last['test_acc'][-1]:.2%}"
    assert text.startswith(f"# ResNet on CIFAR-100: {accuracy} after epoch 3\n\n")
    assert re.findall("^## .*", text, re.MULTILINE) == [
        "## Curves", "## Network", "## Recipe", "## Environment"]
    _, network, recipe, environment = tables(text)
    assert network == [["conv1", "Conv2d", "864"], ["conv2_x", "2 x BasicBlock", "36,992"],
                       ["fc", "Linear", "3,521,700"], ["all", "ResNet", "3,559,556"]]
    assert recipe == [*map(list, IN_WORDS.items())]
    assert environment == [["runtime", "a device"], ["torch", "2.14.1"], ["python", "3.13.1"],
                           ["system", "a system"]]
    assert "None" not in text and "False" not in text


def test_a_run_whose_config_is_gone_has_no_report_but_a_line(tmp_path, caplog):
    made_up_run(tmp_path / "run")
    history = read_run(tmp_path / "run").history
    (tmp_path / "run" / "config.json").write_text("{")
    with caplog.at_level("INFO", "cifar100"):
        write_run_report(tmp_path / "run", history)
    assert re.match(r"warning +no report: .*config\.json: cannot be used.*\)$", *caplog.messages)
    assert not (tmp_path / "run" / "report.md").exists()


@pytest.mark.parametrize("lacks", KNOWN)
def test_a_finished_run_of_older_code_has_no_report_but_a_line(tmp_path, caplog, lacks):
    """Resumed, it is not trained, and its config.json stays as it was."""
    made_up_run(tmp_path / "run")
    history = read_run(tmp_path / "run").history
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config[lacks]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with caplog.at_level("INFO", "cifar100"):
        write_run_report(tmp_path / "run", history)
    assert re.match(rf"warning +no report: .* of older code \(KeyError: '{lacks}'\)$",
                    *caplog.messages)


def test_curves_show_the_numbers_of_a_run_in_three_panels(tmp_path, drawn):
    numbers = made_up_run(tmp_path / "run")
    write_run_report(tmp_path / "run", read_run(tmp_path / "run").history)
    loss, accuracy, rate = drawn[0].axes
    for panel, names in ((loss, ["train_loss", "val_loss", "test_loss"]),
                         (accuracy, ["train_acc", "val_acc", "test_acc"]), (rate, ["lr"])):
        assert panel.get_xlabel() == "epoch"
        scale = 100 if panel is accuracy else 1
        for line, name in zip(curves(panel), names, strict=True):
            np.testing.assert_allclose(line.get_ydata(), scale * numbers[name])
            assert list(line.get_xdata()) == [1, 2, 3]
    assert [required(panel) for panel in (loss, accuracy, rate)] == [[], [60], []]
    assert "nats" in loss.get_ylabel() and "%" in accuracy.get_ylabel()
    assert "learning rate" in rate.get_ylabel() and title(loss) == "train_resnet.py"
    dashes = {line.get_linestyle() for line in accuracy.lines if len(line.get_xdata())}
    assert len(dashes) == 4, "to tell them apart without colours"
    (legend,) = legends(drawn[0])
    assert {"training", "validation", "test", "required: 60%"} < set(legend)


def test_each_script_has_a_row_of_panels_and_a_legend_of_its_own(tmp_path, drawn):
    """So that both rates can be read. Settings that one script has make no difference."""
    one = made_up_run(tmp_path / "one")
    two = made_up_run(tmp_path / "two", "finetune_resnet18", 70.0, seed=1, sizes=[224] * 3,
                      image_size=224)
    compare([tmp_path / "one", tmp_path / "two"], tmp_path)
    rows = np.reshape(drawn[0].axes, (2, 3))
    assert [title(row[0]) for row in rows] == ["train_resnet.py", "finetune_resnet18.py"]
    for (_, accuracy, rate), numbers, height in zip(rows, (one, two), (60, 70), strict=True):
        (line,) = curves(rate)
        np.testing.assert_allclose(line.get_ydata(), numbers["lr"])
        assert required(accuracy) == [height]
    assert [sorted(legend)[1:] for legend in legends(drawn[0])] == [
        ["test", "this recipe", "training", "validation"]] * 2
    assert ["required: 60%" in legend for legend in legends(drawn[0])] == [True, False]


def test_the_epochs_on_small_images_are_shaded_and_named(tmp_path, drawn):
    made_up_run(tmp_path / "small", sizes=[20, 20, 32])
    made_up_run(tmp_path / "full", "finetune_resnet18", sizes=[224, 224, 224])
    compare([tmp_path / "small", tmp_path / "full"], tmp_path)
    small, full = drawn[0].axes[:3], drawn[0].axes[3:]
    for panel in small:
        (shade,) = panel.patches
        # matplotlib 3.7 and 3.8 draw a polygon where later ones draw a rectangle.
        corners = shade.get_patch_transform().transform(shade.get_path().vertices)
        assert {x for x, _ in corners} == {0.5, 2.5}
    assert not any(panel.patches for panel in full)
    named = ["trained on images of 20 pixels" in legend for legend in legends(drawn[0])]
    assert named == [True, False], "older runs were tested at full size"
    path = tmp_path / "small" / "metrics.csv"
    header, *rows = path.read_text().splitlines()
    sizes = ("test_image_size", 20, 20, 32)
    path.write_text("".join(f"{row},{size}\n" for row, size in zip(
        (header, *rows), sizes, strict=True)))
    compare([tmp_path / "small"], tmp_path)
    (legend,) = legends(drawn[1])
    assert "trained and tested on images of 20 pixels" in legend


@pytest.mark.parametrize("probabilities, label", [
    ([0.0], "training"), ([0.5], "training (partly with CutMix)"),
    ([0.0, 0.5], "training (partly with CutMix)")])
def test_the_legend_says_that_training_values_are_of_mixed_images(probabilities, label, tmp_path,
                                                                  drawn):
    """CutMix makes them worse, and they jump where it ends."""
    for cutmix in probabilities:
        made_up_run(tmp_path / str(cutmix), cutmix=cutmix,
                    config={**KNOWN, "recipe": [*RECIPE, "cutmix"]})
    compare([tmp_path / str(cutmix) for cutmix in probabilities], tmp_path)
    (legend,) = legends(drawn[0])
    assert [text for text in legend if text.startswith("training")] == [label]


def test_a_legend_says_what_differs_in_words(tmp_path, drawn):
    """By the names of flags, without a dash or an underscore."""
    for seed in range(3):
        made_up_run(tmp_path / f"a{seed}", seed=seed, epochs=20, lr=0.1, label_smoothing=0.1)
    made_up_run(tmp_path / "b", epochs=5, lr=0.2, label_smoothing=0.1)
    compare([tmp_path / name for name in ("a0", "a1", "a2", "b")], tmp_path)
    (legend,) = legends(drawn[0])
    assert {"epochs 20, lr 0.1 (3 runs)", "epochs 5, lr 0.2"} < set(legend)
    assert not any("_" in text or "smoothing" in text for text in legend)


def test_seeds_are_compared_as_mean_range_and_table(tmp_path, drawn, caplog):
    three = [made_up_run(tmp_path / f"a{seed}", seed=seed, lr=0.1, device=f"cuda:{seed}")
            for seed in (0, 1, 2)]
    other = made_up_run(tmp_path / "b", seed=0, lr=0.2, device="cpu")
    directories = [tmp_path / name for name in ("a0", "a1", "a2", "b")]
    into = tmp_path / "new" / "dir"
    with caplog.at_level("INFO", "cifar100"):
        compare([*directories, directories[0]], into)
    loss = drawn[0].axes[0]
    values = np.stack([numbers["test_loss"] for numbers in three])
    np.testing.assert_allclose(curves(loss)[2].get_ydata(), values.mean(0))
    np.testing.assert_allclose(curves(loss)[5].get_ydata(), other["test_loss"])
    *_, band = loss.collections
    for epoch, column in enumerate(values.T, 1):
        ys = [y for x, y in band.get_paths()[0].vertices if x == epoch]
        np.testing.assert_allclose((min(ys), max(ys)), (min(column), max(column)))

    means = [f"{np.mean(last):.2f}% ({np.std(last, ddof=1):.2f}%)" for last in (
        [100 * numbers[name][-1] for numbers in three] for name in MEANS)]
    text, label = (into / "comparison.md").read_text(), "train_resnet, lr 0.1"
    header, first, second, files = caplog.messages
    assert header in text and "the sample standard deviation (n - 1)" in header
    assert first == (f"{label}: n 3, test accuracy {means[0]}, test top-5 {means[1]}, "
                     f"val accuracy {means[2]}, val top-5 {means[3]}")
    assert "| runs | n | test accuracy | test top-5 | val accuracy | val top-5 |" in text
    assert second.startswith(f"train_resnet, lr 0.2: n 1, test accuracy "
                             f"{other['test_acc'][-1]:.2%}, test top-5 ")
    assert files == f"files      comparison.md, comparison.png in {into}"
    runs, seeds = tables(text)
    assert [row[0] for row in runs] == [str(name) for name in directories], "each once"
    assert seeds[0] == [label, "3", *means]
    assert seeds[1][1:] == ["1", *(f"{other[name][-1]:.2%}" for name in MEANS)]


def test_without_a_validation_set_there_is_no_mean_of_one(tmp_path, drawn, caplog):
    last = made_up_run(tmp_path / "run")
    text = (tmp_path / "run" / "metrics.csv").read_text()
    (tmp_path / "run" / "metrics.csv").write_text(text.replace("val_", "other_"))
    with caplog.at_level("INFO", "cifar100"):
        compare([tmp_path / "run"], tmp_path)
    means = [f"{last[name][-1]:.2%}" for name in MEANS[:2]]
    assert caplog.messages[1] == "train_resnet: n 1, test accuracy {}, test top-5 {}".format(*means)
    _, groups = tables((tmp_path / "comparison.md").read_text())
    assert groups == [["train_resnet", "1", *means, "-", "-"]]


def test_a_band_goes_as_far_as_the_shortest_run(tmp_path, drawn):
    for seed in (0, 1):
        made_up_run(tmp_path / str(seed), seed=seed)
    forget_the_last_epoch(tmp_path / "1")
    compare([tmp_path / "0", tmp_path / "1"], tmp_path)
    assert {tuple(line.get_xdata()) for panel in drawn[0].axes for line in curves(panel)} == {
        (1, 2)}


def forget_the_last_epoch(directory) -> None:
    """Take the last row out of metrics.csv."""
    lines = (directory / "metrics.csv").read_text().splitlines()
    (directory / "metrics.csv").write_text("\n".join(lines[:-1]) + "\n")


def test_an_unfinished_run_is_drawn_but_not_in_the_mean(tmp_path, drawn):
    last = made_up_run(tmp_path / "whole", seed=0)
    made_up_run(tmp_path / "half", seed=1)
    forget_the_last_epoch(tmp_path / "half")
    for _ in range(2):  # what the first leaves behind is not in the way of the second
        compare([tmp_path / "whole", tmp_path / "half"], tmp_path)
    runs, groups = tables((tmp_path / "comparison.md").read_text())
    assert [row[2] for row in runs] == ["3 of 3", "2 of 3"]
    assert groups == [["train_resnet", "1", *(f"{last[name][-1]:.2%}" for name in MEANS)]]


def test_what_tells_runs_apart_is_the_recipe_that_they_name(tmp_path):
    """Also by a flag of one's own; and other weights, but no setting beside these."""
    made_up_run(tmp_path / "a", lr=0.1, dropout=0.1, weights="one", resume=False)
    made_up_run(tmp_path / "b", seed=1, lr=0.1, dropout=0.1, weights="one", resume=True)
    made_up_run(tmp_path / "c", lr=0.1, dropout=0.2, weights="one")
    made_up_run(tmp_path / "d", lr=0.1, dropout=0.1, weights="two")
    records = [read_run(tmp_path / name) for name in "abcd"]
    names = {label: [record.directory.name for record in group]
             for label, group in report.runs.group_runs(records).items()}
    assert names == {
        "train_resnet, dropout 0.1, weights one": ["a", "b"],
        "train_resnet, dropout 0.2, weights one": ["c"],
        "train_resnet, dropout 0.1, weights two": ["d"],
    }


def changed(**config) -> dict:
    """Return what config.json says of a changed run."""
    return {name: {**KNOWN[name], **entry} if isinstance(entry, dict) else entry
            for name, entry in {**KNOWN, **config}.items()}


@pytest.mark.parametrize("config, words", [
    ({"code": {"modules": "a" * 12}}, ("code 0123456789ab", "code aaaaaaaaaaaa")),
    ({"network": {"name": "Mine"}}, (r"ResNet of 3,559,556 parameters \(\w{8}\)",
                                     r"Mine of 3,559,556 parameters \(\w{8}\)")),
    ({"network": {"parameters": 9}}, (r"ResNet of 3,559,556 parameters \(\w{8}\)",
                                      r"ResNet of 9 parameters \(\w{8}\)")),
    ({"data": 0x1}, ("images 8f3a0c11", "images 00000001")),
])
def test_runs_of_other_code_network_or_images_are_no_seeds_of_one(tmp_path, drawn, config, words):
    """They have a mean each, and the table and the legend say why."""
    for seed, name in enumerate("abc"):
        made_up_run(tmp_path / name, seed=seed, config=changed(**config) if name == "c" else KNOWN)
    compare([tmp_path / name for name in "abc"], tmp_path)
    rows = tables((tmp_path / "comparison.md").read_text())[1]
    handles = legends(drawn[0])[0]
    for word, row, n, runs in zip(words, rows, "21", (r" \(2 runs\)", ""), strict=True):
        assert re.fullmatch(f"train_resnet, {word}", row[0]) and row[1] == n
        assert any(re.fullmatch(word + runs, text) for text in handles)


def test_networks_are_told_apart_by_their_layers(tmp_path):
    """Also if they have one name and as many parameters."""
    layers = {"layers": NETWORK["layers"][::-1]}
    for name, network in (("a", {}), ("b", layers)):
        made_up_run(tmp_path / name, config=changed(network=network))
    groups = report.runs.group_runs([read_run(tmp_path / name) for name in "ab"])
    assert len(groups) == 2 and all("ResNet of 3,559,556 parameters (" in name for name in groups)


def test_another_commit_with_the_same_modules_is_the_same_code(tmp_path, drawn, caplog):
    """Only what was imported matters; and the code of another script is no reason, either."""
    made_up_run(tmp_path / "a")
    made_up_run(tmp_path / "b", seed=1, config=changed(code={"commit": "9f8e7d6c5b4a"}))
    made_up_run(tmp_path / "c", "finetune_resnet18", config=changed(code={"modules": "a" * 12}))
    with caplog.at_level("INFO", "cifar100"):
        compare([tmp_path / name for name in "abc"], tmp_path)
    assert [line.partition(",")[0] for line in caplog.messages[1:3]] == [
        "train_resnet: n 2", "finetune_resnet18: n 1"]


def test_a_seed_that_is_there_twice_is_told(tmp_path, drawn, caplog):
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        made_up_run(tmp_path / name, seed=seed, lr=0.1)
    made_up_run(tmp_path / "d", seed=1, lr=0.2)
    with caplog.at_level("INFO", "cifar100"):
        compare([tmp_path / name for name in "abcd"], tmp_path)
    told = [line for line in caplog.messages if "warning" in line]
    assert told == ["warning    train_resnet, lr 0.1: not independent, for the seeds are 0, 1, 0"]
    assert " ".join(told[0].split()) in (tmp_path / "comparison.md").read_text()


def test_a_path_with_a_vertical_bar_does_not_break_the_table(tmp_path, drawn):
    made_up_run(tmp_path / "a|b")
    compare([tmp_path / "a|b"], tmp_path)
    assert "a\\|b | 0 | 3 of 3 |" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize("broken, content", [
    ("config.json", None), ("config.json", ""), ("config.json", "[1]"),
    ("config.json", '{"settings": []}'), ("metrics.csv", None), ("metrics.csv", ""),
    ("metrics.csv", "epoch,epochs\n1,1\n"), ("config.json", json.dumps({
        "script": "a script", "recipe": [], "settings": {"seed": 0}, "required_accuracy": None,
        "network": "no network"})),
])
def test_what_is_no_run_is_refused_in_a_line(tmp_path, drawn, caplog, broken, content):
    made_up_run(tmp_path / "run")
    (tmp_path / "run" / broken).unlink()
    if content is not None:
        (tmp_path / "run" / broken).write_text(content)
    with pytest.raises(utils.UserError, match="run: holds no run with a finished epoch"):
        compare([tmp_path / "run"], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    # Beside another run it is a warning, and that one is compared.
    made_up_run(tmp_path / "whole")
    with caplog.at_level("INFO", "cifar100"):
        compare([tmp_path / "run", tmp_path / "whole"], tmp_path / "new")
    assert caplog.messages[0].startswith(
        f"warning    {tmp_path / 'run'}: holds no run with a finished epoch, or one of ")
    assert " ".join(caplog.messages[0].split()) in (tmp_path / "new" / "comparison.md").read_text()
    assert caplog.messages[2].startswith("train_resnet: n 1, ")


def test_a_comparison_that_cannot_be_written_names_the_directory(tmp_path, drawn):
    made_up_run(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(utils.UserError, match=f"--output-dir {tmp_path / 'file'}: cannot be writ"):
        compare([tmp_path / "run"], tmp_path / "file")


def test_without_matplotlib_a_line_says_what_to_install(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    made_up_run(tmp_path / "run")
    (tmp_path / "run" / "curves.png").touch()  # of an earlier report
    with caplog.at_level("INFO", "cifar100"):
        write_run_report(tmp_path / "run", read_run(tmp_path / "run").history)
    (line,) = caplog.messages
    assert re.search(r"curves.png is not drawn .*: pip install 'matplotlib>=3.7'$", line)
    assert not (tmp_path / "run" / "curves.png").exists(), "none is better than an old one"
    assert "png" not in (tmp_path / "run" / "report.md").read_text()


def test_groups_are_told_apart_without_colours_and_their_legend_is_on_the_page(tmp_path):
    """No colour is too light for paper, either."""
    count = 10
    for i in range(count):
        made_up_run(tmp_path / str(i), lr=i, weight_decay=0.005 * i, sizes=[20, 20, 32])
    records = [read_run(tmp_path / str(i)) for i in range(count)]
    figure = Figure(layout="constrained")
    report.curves.draw_curves(figure, report.runs.group_runs(records))
    figure.savefig(tmp_path / "curves.png", dpi=figure.dpi)
    assert shows_something(tmp_path / "curves.png")
    legend, page = figure.axes[2].get_legend().get_window_extent(), figure.bbox
    assert legend.x1 <= page.x1 and legend.y0 >= page.y0, "pixels"
    assert all(min(panel.bbox.width, panel.bbox.height) > 200 for panel in figure.axes)
    looks = [(line.get_color(), line.get_marker()) for line in curves(figure.axes[2])]
    assert len(set(looks)) == count and len({colour for colour, _ in looks}) == 5
    assert all(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)) < 0.7 for colour, _ in looks)
