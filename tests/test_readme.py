"""The documents name what exists, and what they print can be run as it stands."""

import csv
import importlib
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, script
from PIL import Image

import engine
import models
import report

README = (ROOT / "README.md").read_text()
DOCUMENTS = {name: (ROOT / name).read_text()
             for name in ("README.md", "slurm/README.md", "tests/README.md")}
# Flags of sbatch, torchrun, pytest and pip, which the documents name too.
OF_OTHERS = {"--help", "--array", "--nodes", "--gpus-per-node", "--nproc-per-node", "--kills",
             "--time", "--account", "--partition", "--mem", "--requeue", "--open-mode", "--signal",
             "--output", "--device-count", "--dependency", "--durations", "--index-url", "--logdir"}
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
    parsers = []

    def read(parser):
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(engine.Parser, "read", read)
    monkeypatch.delenv("CIFAR100_DIR", raising=False)
    with pytest.raises(SystemExit):
        importlib.import_module(name).parse_args()
    shown = " ".join(helps[name].split())
    for action in parsers[0]._actions:
        assert f"{action.option_strings[-1]} " in shown
        text = re.split(r" (?=--|-h)", shown.partition(f" {action.help} (default: ")[2])[0]
        if action.default not in (None, "==SUPPRESS==") and action.default is not False:
            assert text.startswith(f"{action.default})"), action


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_that_a_document_names_exists(helps, document):
    known = set(re.findall(r"--[a-z][a-z0-9-]+", "".join(helps.values())))
    known |= set(re.findall(r"--[a-z-]+", script("results/benchmark", "--help").stdout))
    named = set(re.findall(r"(?<![-\w|])--[a-z][a-z0-9-]+", DOCUMENTS[document]))
    assert named - known - OF_OTHERS <= {"--blocks"}, "but for the example of a flag of one's own"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_links_or_names_exists(document):
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)#]+)\)", DOCUMENTS[document]):
        assert (folder / target).exists(), target
    for name in re.findall(r"`((?:results|slurm|tests)/[\w.]+)`", DOCUMENTS[document]):
        assert (ROOT / name).exists(), name


def test_the_readme_is_short_and_begins_with_the_results():
    lines = README.splitlines()
    assert len(lines) <= 180 and len(README.split()) <= 2200
    first = "\n".join(lines[:15])
    for word in ("65.9 %", "81.9 %", "seeds", "minutes", "CPU cores", "product-quantised"):
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


def changed_script(tmp_path, *parts) -> Path:
    """Return a copy of part 1 in which blocks of "Change it" stand where the README says."""
    text = (ROOT / "train_resnet.py").read_text()
    for part in parts:
        (block,) = (block for block in code_blocks(section("Change it")) if part in block)
        assert block.count("\n") <= 10
        # A flag comes before another line, all else takes the place of what is there.
        old = {"recipe(": r"(?=^    parser.add_shared_recipe)",
               "AUGMENT": r"^AUGMENT = None.*?\n"}.get(part, rf"^{part}.*?\n\n(?=\n)")
        text = re.sub(old, block, text, flags=re.MULTILINE | re.DOTALL)
        assert block in text
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "train_mine.py").write_text(text)
    return tmp_path / "train_mine"


def test_a_network_a_flag_and_an_augmentation_of_ones_own_run_and_resume(tmp_path):
    mine = changed_script(tmp_path, "recipe(", "def make_model", "AUGMENT")
    flags = ["--dataset", "synthetic", "--device", "cpu", "--batch-size", 20, "--max-steps", 3,
             "--blocks", 1, "--resume", "--output-dir"]
    whole, chain, plain = tmp_path / "whole", tmp_path / "chain", tmp_path / "plain"
    process = script(mine, *flags, whole)
    assert (process.returncode, process.stderr) == (0, "")
    for told in ("network    ResNet, 3,540,996 parameters", ", blocks 1,",
                 ", flip, CutMix until epoch 1, cutout\n"):
        assert told in process.stdout
    assert script(mine, *flags, chain, "--max-minutes", 0.001).returncode == 75
    assert script(mine, *flags, chain).returncode == 0
    assert (whole / "model.pt").read_bytes() == (chain / "model.pt").read_bytes()
    other = script(mine, *flags, chain, "--blocks", 2)
    assert other.returncode == 2 and "--blocks 2 (was 1)" in other.stderr
    accuracy = re.search(r"final test accuracy (\S+)", process.stdout)[1]
    tested = script(mine, "--eval-only", "--device", "cpu", "--output-dir", whole)
    assert f" acc {accuracy:>6} " in tested.stdout, "the network is that of the run"
    (tmp_path / "a").mkdir()
    changed_script(tmp_path / "a", "recipe(", "def make_model")
    assert script(tmp_path / "a" / "train_mine", *flags, plain).returncode == 0
    assert (whole / "model.pt").read_bytes() != (plain / "model.pt").read_bytes()
    compared = script(mine, "--compare", whole, chain, plain, "--output-dir", tmp_path)
    assert "kept apart from runs of other code" in compared.stdout
    assert f"not independent: seed 0 in {whole}, seed 0 in {chain}" in compared.stdout


def test_images_of_ones_own_are_trained_on_tested_and_named(tmp_path):
    mine = changed_script(tmp_path, "def load_data")
    text = mine.with_suffix(".py").read_text()
    mine.with_suffix(".py").write_text(text.replace("models.ResNet(", "models.ResNet(10, "))
    flags = ["--device", "cpu", "--output-dir", tmp_path / "run"]
    process = script(mine, *flags, "--batch-size", 20, "--max-steps", 2, "--val-size", 100,
                     "--cutmix", 0.5)
    assert (process.returncode, process.stderr) == (0, "")
    assert "mine: 900 training, 100 validation and 1,000 test images, made by" in process.stdout
    assert "not on CIFAR-100" in process.stdout.splitlines()[-1]
    tested = script(mine, *flags, "--eval-only")
    assert (tested.returncode, tested.stderr) == (0, "") and "1,000 mine images" in tested.stdout
    Image.new("RGB", (32, 32)).save(tmp_path / "grey.png")
    named = script(mine, *flags, "--predict", tmp_path / "grey.png")
    assert set(re.findall(r"png,\d,(\w),", named.stdout)) < set("abcdefghij")


def test_the_tensorboard_of_the_readme(tmp_path):
    pytest.importorskip("tensorboard")
    (command,) = re.findall(r"`python (.*--tensorboard)`", section("Change it"))
    name, *flags = command.split()
    process = script(name.removesuffix(".py"), *flags, "--max-steps", 2, "--batch-size", 20,
                     "--dataset", "synthetic", "--device", "cpu", "--output-dir", tmp_path / "out")
    assert (process.returncode, process.stderr) == (0, "")
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))


def test_every_trial_has_flags_that_the_scripts_take_and_a_machine_that_is_described(
        monkeypatch, tmp_path):
    """A row of trials.csv can be made again, and read without asking anyone."""
    scripts = {"1": "train_resnet", "2": "finetune_resnet18"}
    described = DOCUMENTS["tests/README.md"].partition("## The machines")[2].partition("\n## ")[0]
    machines = re.findall(r"^\| (\w[\w-]*) \|", described, re.MULTILINE)
    with open(ROOT / "results" / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert None not in row and None not in row.values(), f"too many or few fields: {row}"
        flags = ["--val-size", "5000", "--output-dir", str(tmp_path), *row["flags"].split()]
        monkeypatch.setattr(sys, "argv", [f"{scripts[row['part']]}.py", *flags])
        args = importlib.import_module(scripts[row["part"]]).parse_args()
        assert args.epochs == int(row["epochs"])
        assert 0 < float(row["val_acc"]) < 100 and 0 <= float(row["train_acc"] or 0) < 100
        assert float(row["seconds"] or 1) > 0 and row["seed"] and row["date"] and row["commit"]
        assert row["machine"] in machines
        assert row["verdict"] in {"", "kept", "dropped", "no difference"}
    assert rows


def test_each_run_that_is_kept_ended_with_the_accuracy_of_its_row():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in DOCUMENTS["tests/README.md"].splitlines() if line.startswith("| `")]
    runs = [report.read_run(path) for path in (ROOT / "results" / "runs").iterdir()]
    assert runs
    for run in runs:
        last, code = run.history[-1], run.config["code"]
        assert last["epoch"] == last["epochs"] and not code["changed"]
        (row,) = (row for row in rows if f"`{run.config['script']}.py" in row[0]
                  and row[-1] == code["commit"][:7] and f"{100 * last['test_acc']:.2f} " in row[2])
        assert row[1] == str(run.config["settings"]["seed"])
        assert f"(training {100 * last['train_acc']:.1f})" in row[2]


def test_ci_runs_the_test_command_of_the_readme_and_the_marked_rest():
    commands = [line for line in README.splitlines() if line.endswith("bin/pytest -q")]
    assert len(commands) == 1
    ci = (ROOT / ".ci" / "run").read_text()
    assert "bin/pytest -q$" in ci and "pytest -q -m slow" in ci
