"""The README names what exists, all of it, and what CI runs is what it prints."""

import re

import pytest
from processes import ROOT, script

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def helps():
    """What --help prints, of each script."""
    return {name: script(name, "--help").stdout for name in ("train_resnet", "finetune_resnet18")}


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
        assert "(default: 0.1)" in text


OF_OTHERS = {"--help", "--time", "--array", "--nodes", "--gpus-per-node", "--nproc-per-node",
             "--kills", "--seconds"}


def test_every_flag_that_the_readme_names_exists(flags):
    assert set(re.findall(r"--[a-z][a-z0-9-]+", README)) - flags <= OF_OTHERS


def test_the_readme_names_every_flag(flags):
    assert [flag for flag in sorted(flags - {"--help"}) if f"{flag}" not in README] == []


def test_ci_runs_the_test_command_of_the_readme():
    commands = [line for line in README.splitlines() if line.endswith("bin/pytest -q")]
    assert len(commands) == 1
    assert "bin/pytest -q$" in (ROOT / ".ci" / "run").read_text()
