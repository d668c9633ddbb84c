"""Each block of engine/README.md trains as it is printed, also killed and resumed."""

import ast
import functools
import itertools
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import kill
from helpers import ROOT, result, script, without_pictures
from PIL import Image

import models
from report.runs import read_config

DOCUMENT = (ROOT / "engine" / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
# Four steps of 8 images, and 20 test images, of the set that each test has.
SMALL = ["--device", "cpu", "--precision", "fp32", "--batch-size", 8, "--epochs", 1,
         "--checkpoint-minutes", 0, "--resume"]
PART_1 = ("train_resnet", [])
PART_2 = ("finetune_resnet18", ["--weights", "random", "--image-size", 32])
# A text in the block, the script that it is for, and lines of the log that it brings about.
CASES = {
    "loss": ("losses = ", PART_1, []),
    "clipping": ("clip_grad_norm_", PART_1, []),
    "distillation": ("run.teacher", PART_1, []),
    "mixup": ("def mixup", PART_1, ["crop, flip, mixup"]),
    "AdamW": ("AdamW", PART_1, [
        "recipe     .*, optimizer AdamW, ",
        r"optimizer  AdamW of 3,559,556 weights \(.*\) at peak rate 0.1, decay 0.01\n",
        "schedule   CosineAnnealingLR: rate 0.1 in step 1, 0.1 in step 1, 0.0146 in step 4\n"]),
    "EMA": ("AveragedModel", PART_1, []),
    "backbone": ("mobilenet_v3_small", PART_2, [
        "network    MobileNetV3, 1,620,356 parameters",
        r"Muon of [\d,]+ weights \(convolutions, 1x1 convolutions\) at peak rate 0.00167",
        r"SGD of 102,500 weights \(linear layers, norms and biases\) at peak rate 0.025"]),
    "probe": ("weight.requires_grad", PART_2, [
        "note       Muon has no weight to train, so --lr has no effect",
        "network    ResNet, 11,227,812 parameters, of which 51,300 are trained\n",
        "modes      63 of 68 modules stay in evaluation mode\n"]),
    "superclasses": ("SUPERCLASSES", PART_1, ["dataset superclasses", "superclasses: 32 training"]),
    "CIFAR-10": ("CIFAR10", PART_1, ["dataset cifar10", "cifar10: 32 training and 20 test images"]),
    "folders": ("ImageFolder", (PART_2[0], [*PART_2[1][:-1], 40]), [
        "dataset mine", "mine: 32 training and 20 test images of 40 x 40 pixels"]),
}


def block_of(text: str) -> str:
    """Return the block that holds a text."""
    (block,) = (block for block in BLOCKS if text in block)
    return block


def statements(block: str) -> list[str]:
    """Return the functions and the other statements of a block, each with its indentation."""
    parts, lines = [], []
    for line in block.splitlines():
        lines.append(line)
        if lines[0].startswith("def "):
            is_whole = line.startswith("    return ")
        else:
            try:
                ast.parse(textwrap.dedent("\n".join(lines)).replace("return ", ""))
                is_whole = True
            except SyntaxError:
                is_whole = False
        if is_whole:
            parts.append("\n".join(lines))
            lines = []
    assert not lines
    return parts


def place(lines: list[str], statement: str) -> int | None:
    """Return the number of the line that begins like a statement, or None."""
    first = statement.splitlines()[0].partition("  # ")[0]
    for beginning in (f"{first.partition('(')[0]}(", f"{first.partition(' = ')[0]} = "):
        found = [i for i, line in enumerate(lines) if line.startswith(beginning)]
        if beginning.rstrip("( =") != first and len(found) == 1:
            return found[0]
    return lines.index(first) if first in lines else None


def changed(text: str, block: str) -> str:
    """Return a script's text with the statements of a block where engine/README.md says."""
    new = []
    for statement in statements(block):
        if statement.startswith(("import ", "from ")):
            text = text.replace("import torch\n", f"{statement}\nimport torch\n", 1)
        elif not statement.startswith(" "):
            name = re.match(r"def \w+\(|\w+ = ", statement)[0]
            end = r"\n\n(?=\n)" if name.startswith("def") else r"\n"
            (old,) = re.findall(rf"^{re.escape(name)}.*?{end}", text, re.MULTILINE | re.DOTALL)
            text = text.replace(old, f"{statement}\n")
        else:
            lines = text.splitlines()
            number = place(lines, statement)
            if number is None:
                new.append(statement)
                continue
            lines[number : number + 1] = [*new, statement]
            text, new = "\n".join(lines) + "\n", []
    assert not new, "the next line of the block shows the place of a new one"
    return text


def make_inputs(name: str, directory: Path, data_dir: Path) -> Path:
    """Write what a block reads; return --data-dir."""
    rng = np.random.default_rng(0)
    if name == "distillation":
        (directory / "output" / "finetune_resnet18").mkdir(parents=True)
        torch.save(models.resnet18().state_dict(), directory / "output/finetune_resnet18/model.pt")
    elif name == "CIFAR-10":
        data_dir, labels = directory / "cifar10", [*range(10)] * 4
        files = {f"data_batch_{i}": labels[:size] for i, size in enumerate((8, 8, 8, 7, 1), 1)}
        (data_dir / "cifar-10-batches-py").mkdir(parents=True)
        for file, some in {**files, "test_batch": labels[:20]}.items():
            pixels = rng.integers(0, 256, (len(some), 3072), np.uint8)
            content = pickle.dumps({"data": pixels, "labels": some})
            (data_dir / "cifar-10-batches-py" / file).write_bytes(content)
        meta = pickle.dumps({"label_names": list("abcdefghij")})
        (data_dir / "cifar-10-batches-py" / "batches.meta").write_bytes(meta)
    elif name == "folders":
        data_dir = directory / "folders"
        for part, count in (("train", 32), ("test", 20)):
            for i in range(count):
                folder = data_dir / part / "abcde"[i % 5]
                folder.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return data_dir


def prepare(kill_in: int | None = None) -> None:
    """Take CIFAR-10's files as they are, draw no pictures; be killed in a step, from 1."""
    import torchvision.datasets.cifar

    from engine.run import Run

    torchvision.datasets.cifar.check_integrity = lambda *_: True
    without_pictures()
    steps, take_step = itertools.count(1), Run.take_step

    def take_or_kill(run):
        if next(steps) == kill_in:
            kill()
        take_step(run)

    Run.take_step = take_or_kill


@pytest.fixture(scope="module")
def plain(tmp_path_factory, data_dir):
    """Return, by script, the end of a run of the unchanged one."""
    ends = {}
    for name, flags in (PART_1, PART_2):
        run = tmp_path_factory.mktemp(name)
        process = script(name, *SMALL, *flags, "--data-dir", data_dir, "--output-dir", run,
                         before=prepare)
        assert process.returncode == 0, process.stderr
        ends[name] = result(run)
    return ends


@pytest.mark.parametrize("name", [
    name if name in ("clipping", "EMA", "probe") else pytest.param(name, marks=pytest.mark.slow)
    for name in CASES])
def test_a_block_trains_and_a_killed_run_ends_with_the_same_bits(name, tmp_path, data_dir, plain):
    text, (part, flags), logged = CASES[name]
    mine = tmp_path / "train_mine"
    mine.with_suffix(".py").write_text(changed((ROOT / f"{part}.py").read_text(), block_of(text)))
    flags = [*SMALL, *flags, "--data-dir", make_inputs(name, tmp_path, data_dir), "--output-dir"]
    whole, chain = tmp_path / "whole", tmp_path / "chain"
    process = script(mine, *flags, whole, cwd=tmp_path, before=prepare)
    assert (process.returncode, process.stderr) == (0, "")
    for line in logged:
        assert re.search(line, process.stdout), process.stdout
    killed = script(mine, *flags, chain, cwd=tmp_path, before=functools.partial(prepare, 3))
    assert killed.returncode == -9
    resumed = script(mine, *flags, chain, cwd=tmp_path, before=prepare)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert "resume     after 0 epochs and 2 steps" in resumed.stdout
    assert result(chain) == result(whole)
    assert result(whole)[0] != plain[part][0], "the block changes the model"
    if name == "clipping":
        rows = (whole / "steps.csv").read_text().splitlines()
        assert [row.split(",")[:2] for row in rows] == [["1", str(i)] for i in range(1, 5)]
        assert set((chain / "steps.csv").read_text().splitlines()) == set(rows)


def test_every_block_is_tested_and_has_at_most_twelve_lines():
    assert sorted(BLOCKS) == sorted(block_of(text) for text, *_ in CASES.values())
    assert max(block.count("\n") for block in BLOCKS) <= 12


@pytest.mark.slow
def test_two_processes_share_the_batches(tmp_path, data_dir):
    (command,) = re.findall(r"`torchrun (.*?)`", DOCUMENT)
    flags = [*SMALL, "--data-dir", data_dir, "--output-dir", tmp_path / "run"]
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command.split(), *map(str, flags)],
        cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "device     2 x CPU" in process.stdout
    assert read_config(tmp_path / "run")["processes"] == 2
