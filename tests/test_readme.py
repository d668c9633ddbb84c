"""The README names what exists, all of it, and what CI runs is what it prints."""

import re

import pytest
from processes import ROOT, script

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def flags():
    """Every flag of either script, from --help."""
    texts = [script(name, "--help").stdout for name in ("train_resnet", "finetune_resnet18")]
    return {flag for text in texts for flag in re.findall(r"--[a-z][a-z0-9-]+", text)}


OF_OTHERS = {"--help", "--time", "--array", "--nodes", "--gpus-per-node", "--kills"}


def test_every_flag_that_the_readme_names_exists(flags):
    assert set(re.findall(r"--[a-z][a-z0-9-]+", README)) - flags <= OF_OTHERS


def test_the_readme_names_every_flag(flags):
    assert [flag for flag in sorted(flags - {"--help"}) if f"{flag}" not in README] == []


def test_ci_runs_the_test_command_of_the_readme():
    commands = [line for line in README.splitlines() if line.endswith("bin/pytest -q")]
    assert len(commands) == 1
    assert "bin/pytest -q$" in (ROOT / ".ci" / "run").read_text()
