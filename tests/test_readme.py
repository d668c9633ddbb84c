"""The documents name what exists, and what they print can be run as it stands."""

import csv
import importlib
import os
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from helpers import ROOT, call, compare_runs, script
from PIL import Image

import models
from report.runs import read_run

README = (ROOT / "README.md").read_text()
DOCUMENTS = {name: (ROOT / name).read_text()
             for name in ("README.md", "engine/README.md", "results/README.md",
                          "slurm/README.md", "tests/README.md")}
# The most lines of each, and the most columns of a line outside tables and code.
LIMITS = {"README.md": (160, 100), "engine/README.md": (130, 100), "results/README.md": (250, 100),
          "slurm/README.md": (100, 100), "tests/README.md": (90, 100)}
MOST_WORDS = 1500  # of README.md
# How README.md calls the machines of accuracies.csv, by the beginning of their names there.
MACHINES = {"Intel Xeon": "xeon", "AMD Zen 4": "zen4", "H200": "h200"}
# Flags of sbatch, torchrun, pytest, pip and versions.py, which the documents name too.
OF_OTHERS = {"--help", "--array", "--nodes", "--gpus-per-node", "--nproc-per-node", "--kills",
             "--time", "--account", "--partition", "--mem", "--requeue", "--open-mode", "--signal",
             "--output", "--device-count", "--dependency", "--durations", "--envs", "--index-url",
             "--logdir", "--standalone", "--nproc_per_node"}
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


def section(title: str, document: str = "README.md") -> str:
    """Return a section of a document."""
    return DOCUMENTS[document].partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows_of(name: str) -> list[dict[str, str]]:
    """Return the rows of a CSV in results/, each of which must have all fields."""
    with open(ROOT / "results" / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        assert None not in row and None not in row.values(), f"too many or few fields: {row}"
    return rows


def todays_runs() -> list[list[dict[str, str]]]:
    """Return the runs of today's defaults; a command's seeds on one machine are together."""
    groups: dict[tuple, list] = {}
    for row in rows_of("accuracies"):
        if row["defaults"] == "today":
            key = tuple(row[name] for name in ("command", "machine", "date", "commit"))
            groups.setdefault(key, []).append(row)
    return list(groups.values())


def mean(rows: list[dict[str, str]], column: str) -> float:
    """Return the mean of a column."""
    return statistics.fmean(float(row[column]) for row in rows)


def rounds_to(value: float, shown: str) -> bool:
    """Return whether `shown` is the value, rounded to as many decimals."""
    return abs(value - float(shown)) <= 0.5 * 10 ** -len(shown.partition(".")[2]) + 1e-9


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
def test_help_shows_every_default(helps, name):
    entries = [" ".join(text.split()) for text in re.split(r"\n  (?=--)", helps[name])[1:]]
    shown = {entry.split()[0]: re.findall(r"\(default: ([^)]*)\)", entry) for entry in entries}
    defaults = {**importlib.import_module(name).RECIPE, "seed": 0, "dataset": "cifar100",
                "val_size": 0, "precision": "auto", "device": "auto", "data_dir": "data",
                "output_dir": f"output/{name}", "checkpoint_minutes": 10}
    assert {flag: values for flag, values in shown.items() if values} == {
        f"--{flag.replace('_', '-')}": [str(value)] for flag, value in defaults.items()}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_that_a_document_names_exists(helps, document):
    known = set(re.findall(r"--[a-z][a-z0-9-]+", "".join(helps.values())))
    known |= set(re.findall(r"--[a-z-]+", script("results/benchmark", "--help").stdout))
    known |= set(re.findall(r"--[a-z-]+", call(compare_runs, "--help").stdout))
    named = set(re.findall(r"(?<![-\w|])--[a-z][a-z0-9_-]+", DOCUMENTS[document]))
    assert named - known - OF_OTHERS <= {"--blocks"}, "but for the example of a flag of one's own"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_links_or_names_exists(document):
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)#]+)\)", DOCUMENTS[document]):
        assert (folder / target).exists(), target
    for name in re.findall(r"`((?:results|slurm|tests)/[\w.]+)`", DOCUMENTS[document]):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_is_short_and_its_lines_fit_the_screen(document):
    text = DOCUMENTS[document]
    most_lines, most_columns = LIMITS[document]
    assert len(text.splitlines()) <= most_lines
    for line in re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).splitlines():
        assert line.startswith("|") or len(line) <= most_columns, line


def test_the_readme_has_few_words_and_begins_with_the_results():
    assert len(README.split()) <= MOST_WORDS
    first = "\n".join(README.splitlines()[:17])
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
        # A flag comes before another line, a function takes the place of what is there.
        old = r"(?=^    return parser.read)" if part == "add_argument" else rf"^{part}.*?\n\n(?=\n)"
        text = re.sub(old, block, text, flags=re.MULTILINE | re.DOTALL)
        assert block in text
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for folder in ("cifar100", "engine", "report"):
        shutil.copytree(ROOT / folder, tmp_path / folder, dirs_exist_ok=True)
    (tmp_path / "train_mine.py").write_text(text)
    return tmp_path / "train_mine"


def test_a_network_a_flag_and_an_augmentation_of_ones_own_run_and_resume(tmp_path):
    mine = changed_script(tmp_path, "add_argument", "def make_model", "def make_augment")
    flags = ["--dataset", "synthetic", "--device", "cpu", "--batch-size", 20, "--max-steps", 3,
             "--blocks", 1, "--resume", "--output-dir"]
    whole, chain, plain = tmp_path / "whole", tmp_path / "chain", tmp_path / "plain"
    process = script(mine, *flags, whole)
    assert (process.returncode, process.stderr) == (0, "")
    for told in ("network    ResNet, 3,540,996 parameters", ", blocks 1\n",
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
    changed_script(tmp_path / "a", "add_argument", "def make_model")
    assert script(tmp_path / "a" / "train_mine", *flags, plain).returncode == 0
    assert (whole / "model.pt").read_bytes() != (plain / "model.pt").read_bytes()
    compared = call(compare_runs, whole, chain, plain, "--output-dir", tmp_path)
    assert compared.stdout.count("train_mine, code ") >= 2, "other code has a mean of its own"
    assert "not independent, for the seeds are 0, 0\n" in compared.stdout


def test_images_of_ones_own_are_trained_on_tested_and_named(tmp_path):
    mine = changed_script(tmp_path, "def load_data")
    text = mine.with_suffix(".py").read_text()
    mine.with_suffix(".py").write_text(text.replace("models.ResNet(", "models.ResNet(10, "))
    flags = ["--device", "cpu", "--output-dir", tmp_path / "run"]
    process = script(mine, *flags, "--batch-size", 20, "--max-steps", 2, "--val-size", 100,
                     "--cutmix", 0.5)
    assert (process.returncode, process.stderr) == (0, "")
    assert ("mine: 900 training, 100 validation and 1,000 test images of 48 x 48 pixels, made by"
            in process.stdout)
    assert "not on CIFAR-100" in process.stdout.splitlines()[-1]
    tested = script(mine, *flags, "--eval-only")
    assert (tested.returncode, tested.stderr) == (0, "") and "1,000 mine images" in tested.stdout
    Image.new("RGB", (32, 32)).save(tmp_path / "grey.png")
    named = script(mine, *flags, "--predict", tmp_path / "grey.png")
    assert set(re.findall(r"png,\d,(\w),", named.stdout)) < set("abcdefghij")


def test_the_tensorboard_of_the_readme(tmp_path):
    pytest.importorskip("tensorboard")
    (command,) = re.findall(r"^python (.*--tensorboard) ", README, re.MULTILINE)
    name, *flags = command.split()
    process = script(name.removesuffix(".py"), *flags, "--max-steps", 2, "--batch-size", 20,
                     "--dataset", "synthetic", "--device", "cpu", "--output-dir", tmp_path / "out")
    assert (process.returncode, process.stderr) == (0, "")
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))


def described_machines() -> list[str]:
    """Return the names in the table of machines."""
    return re.findall(r"^\| (\w[\w-]*) \|", section("Speed by machine", "results/README.md"),
                      re.MULTILINE)


def test_every_trial_has_flags_that_the_scripts_take_and_a_machine_that_is_described(parse):
    """A row of trials.csv can be made again, and read without asking anyone."""
    scripts = {"1": "train_resnet", "2": "finetune_resnet18"}
    for row in rows_of("trials"):
        _, args = parse(scripts[row["part"]], "--val-size", 5000, *row["flags"].split())
        assert args.epochs == int(row["epochs"])
        assert 0 < float(row["val_acc"]) < 100 and 0 <= float(row["train_acc"] or 0) < 100
        assert float(row["seconds"] or 1) > 0 and row["seed"] and row["date"] and row["commit"]
        assert row["machine"] in described_machines()
        assert row["verdict"] in {"", "kept", "dropped", "no difference"}


def test_every_measured_run_has_flags_that_the_scripts_take_and_a_described_machine(parse):
    """A row of accuracies.csv can be made again, and read without asking anyone."""
    for row in rows_of("accuracies"):
        name, *flags = row["command"].split()
        _, args = parse(name.removesuffix(".py"), *flags)
        assert args.epochs == int(row["epochs"])
        assert 0 < float(row["test_acc"]) < 100 and 0 <= float(row["train_acc"] or 0) < 100
        for column in ("minutes", "normalised_minutes", "memory_gb"):
            assert float(row[column] or 1) > 0
        assert int(row["seed"]) and row["date"] and row["commit"]
        assert row["machine"] in described_machines()
        assert row["defaults"] in {"today", "older"}
        assert bool(row["weights"]) == (name == "finetune_resnet18.py")


def test_the_table_of_accuracies_is_computed_from_the_runs():
    rows = []
    for runs in todays_runs():
        accuracies = [float(run["test_acc"]) for run in runs]
        deviation = f"{statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
        times = []
        for column in ("minutes", "normalised_minutes"):
            # Equal figures stand as they were measured, with as many decimals.
            values = {run[column] for run in runs}
            times.append(values.pop() if len(values) == 1 else f"{mean(runs, column):.1f}")
        rows.append([f"`{runs[0]['command']}`", f"{mean(runs, 'test_acc'):.2f}", deviation,
                     str(len(runs)), *times, *(runs[0][name] for name in
                                               ("machine", "date", "commit"))])
    shown = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in section("Accuracies", "results/README.md").splitlines()
             if re.match(r"\| `\w+\.py", line)]
    assert shown == rows


def test_the_first_table_of_the_readme_shows_the_measured_accuracies_and_minutes():
    lines = [line for line in README.splitlines() if re.match(r"\| part \d, `", line)]
    assert lines
    for line in lines:
        label, _, accuracy, seeds, minutes = (cell.strip() for cell in line.split("|")[1:-1])
        (command,) = re.findall(r"`(.+?)`", label)
        groups = [runs for runs in todays_runs() if runs[0]["command"] == command]
        # The mean, and with several seeds the lowest and the highest.
        shown, *ends = re.findall(r"\d+\.\d+", accuracy)
        (runs,) = (runs for runs in groups if seeds == ", ".join(run["seed"] for run in runs)
                   and rounds_to(mean(runs, "test_acc"), shown))
        accuracies = [float(run["test_acc"]) for run in runs]
        assert len(ends) == (2 if len(runs) > 1 else 0)
        for value, end in zip((min(accuracies), max(accuracies)), ends, strict=False):
            assert rounds_to(value, end), line
        for time in minutes.split(", "):
            (machine,) = (MACHINES[name] for name in MACHINES if name in time)
            shown = re.search(r"\d+(\.\d+)?", time)[0]
            assert any(rounds_to(mean(runs, "minutes"), shown) for runs in groups
                       if runs[0]["machine"].startswith(machine)), time


def test_each_run_that_is_kept_ended_with_the_accuracy_of_its_row():
    rows = {row["run"]: row for row in rows_of("accuracies") if row["run"]}
    folders = {path.name: path for path in (ROOT / "results" / "runs").iterdir()}
    assert rows.keys() == folders.keys()
    for name, row in rows.items():
        run = read_run(folders[name])
        last, code = run.history[-1], run.config["code"]
        assert last["epoch"] == last["epochs"] == int(row["epochs"]) and not code["changed"]
        assert (row["commit"], row["seed"]) == (
            code["commit"][:7], str(run.config["settings"]["seed"]))
        assert row["command"].startswith(f"{run.config['script']}.py")
        assert row["test_acc"] == f"{100 * last['test_acc']:.2f}"
        assert row["train_acc"] == f"{100 * last['train_acc']:.1f}"


def test_ci_runs_the_test_command_of_the_readme_and_the_marked_rest():
    commands = [line for line in README.splitlines() if line.endswith("bin/pytest -q")]
    assert len(commands) == 1
    ci = (ROOT / ".ci" / "run").read_text()
    assert "bin/pytest -q$" in ci and "pytest -q -m slow" in ci
