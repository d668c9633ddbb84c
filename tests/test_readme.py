"""The README names what exists, all of it, and what CI runs is what it prints."""

import importlib
import os
import re

import pytest
import torch
from processes import ROOT, script

import models
import utils

README = (ROOT / "README.md").read_text()


def forget_the_data() -> None:
    """Have no directory of the user's own in what --help prints."""
    os.environ.pop("CIFAR100_DIR", None)


@pytest.fixture(scope="module")
def helps():
    """What --help prints, of each script, for a user who has set no $CIFAR100_DIR."""
    return {name: script(name, "--help", before=forget_the_data).stdout
            for name in ("train_resnet", "finetune_resnet18")}


@pytest.fixture(scope="module")
def flags(helps):
    """Every flag of either script."""
    return {flag for text in helps.values() for flag in re.findall(r"--[a-z][a-z0-9-]+", text)}


def test_help_is_grouped_fits_100_columns_and_ends_with_examples(helps):
    for name, text in helps.items():
        assert re.findall(r"^(\w.*):$", text, re.MULTILINE)[1:] == [
            "data", "recipe", "output", "machine and job"]
        assert max(map(len, text.splitlines())) <= 100
        *_, examples = text.split("The bar of the course is")
        assert f"python {name}.py --data-dir PATH " in examples
        assert "None" not in text and "False" not in text, "a default is a value"


@pytest.mark.parametrize("name", ["train_resnet", "finetune_resnet18"])
def test_help_shows_every_default(helps, monkeypatch, name):
    monkeypatch.setattr(utils, "parse", lambda parser: parser)
    monkeypatch.delenv("CIFAR100_DIR", raising=False)
    shown = " ".join(helps[name].split())
    for action in importlib.import_module(name).parse_args()._actions:
        assert f"{action.option_strings[-1]} " in shown
        text = re.split(r" (?=--|-h)", shown.partition(f" {action.help} (default: ")[2])[0]
        if action.default not in (None, "==SUPPRESS==") and action.default is not False:
            assert text.startswith(f"{action.default})"), action


OF_OTHERS = {"--help", "--array", "--nodes", "--gpus-per-node", "--nproc-per-node", "--kills"}


def test_every_flag_that_the_readme_names_exists(flags):
    benchmark = set(re.findall(r"--[a-z-]+", script("tests/benchmark", "--help").stdout))
    assert set(re.findall(r"--[a-z][a-z0-9-]+", README)) - flags - benchmark <= OF_OTHERS


def test_the_model_is_reachable_from_python_as_the_readme_says(tmp_path, monkeypatch):
    (code,) = re.findall(r"```\n(import torch, models\n.*?)```", README, re.DOTALL)
    (tmp_path / "output" / "train_resnet").mkdir(parents=True)
    model = models.ResNet().eval()
    torch.save(model.state_dict(), tmp_path / "output" / "train_resnet" / "model.pt")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert torch.equal(names["logits"], model(names["images"]))


def test_the_readme_names_every_flag(flags):
    assert [flag for flag in sorted(flags - {"--help"}) if f"{flag}" not in README] == []


def test_ci_runs_the_test_command_of_the_readme():
    commands = [line for line in README.splitlines() if line.endswith("bin/pytest -q")]
    assert len(commands) == 1
    assert "bin/pytest -q$" in (ROOT / ".ci" / "run").read_text()
