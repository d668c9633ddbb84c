"""The documents name what exists, and what they print can be run as it stands."""

import importlib
import os
import re

import pytest
import torch
from helpers import ROOT, script

import engine
import models

README = (ROOT / "README.md").read_text()
DOCUMENTS = {name: (ROOT / name).read_text()
             for name in ("README.md", "slurm/README.md", "tests/README.md")}
# Flags of sbatch, torchrun, pytest and pip, which the documents name too.
OF_OTHERS = {"--help", "--array", "--nodes", "--gpus-per-node", "--nproc-per-node", "--kills",
             "--time", "--account", "--partition", "--mem", "--requeue", "--open-mode", "--signal",
             "--output", "--device-count", "--dependency", "--durations", "--index-url"}
both = pytest.mark.parametrize("name", ["train_resnet", "finetune_resnet18"])


def forget_the_data() -> None:
    """Have no directory of the user's own in what --help prints."""
    os.environ.pop("CIFAR100_DIR", None)


@pytest.fixture(scope="module")
def helps():
    """What --help prints, of each script, for a user who has set no $CIFAR100_DIR."""
    return {name: script(name, "--help", before=forget_the_data).stdout
            for name in ("train_resnet", "finetune_resnet18")}


def code_blocks(text: str) -> list[str]:
    """Return what stands between the fences of a document."""
    return re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """Return a section of the README."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@both
def test_help_is_grouped_fits_100_columns_and_ends_with_examples(helps, name):
    text = helps[name]
    assert re.findall(r"^(\w.*):$", text, re.MULTILINE)[1:] == [
        "data", "recipe", "output", "machine and job"]
    assert max(map(len, text.splitlines())) <= 100
    *_, examples = text.split("The required accuracy is")
    assert f"python {name}.py --data-dir PATH " in examples
    assert "None" not in text and "False" not in text, "a default is a value"


@both
def test_help_shows_every_default(helps, monkeypatch, name):
    monkeypatch.setattr(engine.Parser, "read", lambda parser: parser)
    monkeypatch.delenv("CIFAR100_DIR", raising=False)
    shown = " ".join(helps[name].split())
    for action in importlib.import_module(name).parse_args()._actions:
        assert f"{action.option_strings[-1]} " in shown
        text = re.split(r" (?=--|-h)", shown.partition(f" {action.help} (default: ")[2])[0]
        if action.default not in (None, "==SUPPRESS==") and action.default is not False:
            assert text.startswith(f"{action.default})"), action


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_that_a_document_names_exists(helps, document):
    known = set(re.findall(r"--[a-z][a-z0-9-]+", "".join(helps.values())))
    known |= set(re.findall(r"--[a-z-]+", script("tests/benchmark", "--help").stdout))
    named = set(re.findall(r"(?<![-\w|])--[a-z][a-z0-9-]+", DOCUMENTS[document]))
    assert named - known - OF_OTHERS <= {"--dropout"}, "but for the example of a flag of one's own"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_links_or_names_exists(document):
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)#]+)\)", DOCUMENTS[document]):
        assert (folder / target).exists(), target
    for name in re.findall(r"`((?:tests|slurm)/[\w.]+)`", DOCUMENTS[document]):
        assert (ROOT / name).exists(), name


def test_the_readme_is_short_and_begins_with_the_results():
    lines = README.splitlines()
    assert len(lines) <= 180 and len(README.split()) <= 2200
    first = "\n".join(lines[:15])
    for word in ("63.0 %", "80.9 %", "seeds", "minutes", "CPU cores", "product-quantised"):
        assert word in first


def test_the_model_is_reachable_from_python_as_the_readme_says(tmp_path, monkeypatch):
    (code,) = (block for block in code_blocks(README) if "import torch, models" in block)
    (tmp_path / "output" / "train_resnet").mkdir(parents=True)
    model = models.ResNet().eval()
    torch.save(model.state_dict(), tmp_path / "output" / "train_resnet" / "model.pt")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("torch.rand(1, 3, 32, 32)", "torch.ones(1, 3, 32, 32)"), names)
    assert torch.equal(names["logits"], model(torch.ones(1, 3, 32, 32)))


def test_the_augmentation_of_the_readme_runs_and_resumes(tmp_path):
    """It is put into a copy of the script, as the README says, and stopped after a step."""
    (code,) = (block for block in code_blocks(section("Change it")) if "def cutout" in block)
    text = (ROOT / "train_resnet.py").read_text()
    assert text.count("train.shuffled(args.seed, epoch, start=run.step, size=sizes[epoch])") == 1
    text = text.replace("train.shuffled(args.seed, epoch, start=run.step, size=sizes[epoch])",
                        "cutout(train.shuffled(args.seed, epoch, run.step, sizes[epoch]))")
    text = text.replace("def main()", f"{code}\n\ndef main()")
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "train_resnet.py").write_text(text)
    flags = ["--dataset", "synthetic", "--device", "cpu", "--batch-size", 20, "--max-steps", 3,
             "--resume"]
    copy = tmp_path / "train_resnet"
    whole, chain = tmp_path / "whole", tmp_path / "chain"
    assert script(copy, *flags, "--output-dir", whole).returncode == 0
    assert script(copy, *flags, "--output-dir", chain, "--max-minutes", 0.001).returncode == 75
    assert script(copy, *flags, "--output-dir", chain).returncode == 0
    assert (whole / "model.pt").read_bytes() == (chain / "model.pt").read_bytes()
    plain = script("train_resnet", *flags, "--output-dir", tmp_path / "plain")
    assert plain.returncode == 0
    assert (whole / "model.pt").read_bytes() != (tmp_path / "plain" / "model.pt").read_bytes()


def test_the_flag_of_the_readme_is_a_part_of_the_recipe(monkeypatch, tmp_path):
    (code,) = (block for block in code_blocks(section("Change it")) if "--dropout" in block)
    parser = engine.Parser("a title", str(tmp_path / "run"))
    monkeypatch.setattr("sys.argv", ["train_resnet.py", "--dropout", "0.3"])
    exec("if True:\n" + code, {"recipe": parser.add_recipe, "bounded": engine.bounded})
    args = parser.read()
    assert args.dropout == 0.3 and args.recipe == ["dropout"]


def test_ci_runs_the_test_command_of_the_readme_and_the_marked_rest():
    commands = [line for line in README.splitlines() if line.endswith("bin/pytest -q")]
    assert len(commands) == 1
    ci = (ROOT / ".ci" / "run").read_text()
    assert "bin/pytest -q$" in ci and "pytest -q -m slow" in ci
