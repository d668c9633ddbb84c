"""Both scripts, run as a user runs them on the synthetic set: what they print, write, refuse."""

import csv
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, needs_cuda, script

import data
import models
import utils

SMALL = {
    "train_resnet": ["--dataset", "synthetic"],
    "finetune_resnet18": ["--dataset", "synthetic", "--weights", "random", "--image-size", "32"],
}
SIX_STEPS = ["--batch-size", "20", "--max-steps", "6", "--device", "cpu"]
TIMING = ("images_per_second", "seconds", "eta_seconds")
EPOCH_LINE = re.compile(
    r"^\[synthetic\]  epoch  1/1  lr 0\.0000  train loss \d+\.\d{3} acc +\d+\.\d\d%  "
    r"test loss \d+\.\d{3} acc +(\d+\.\d\d)% top5 +\d+\.\d\d%  \d+ img/s  \d+\.\d s  eta 0s$",
    re.MULTILINE,
)
both = pytest.mark.parametrize("name", SMALL)


def network(name):
    return models.ResNet() if name == "train_resnet" else models.resnet18("random")


def rows(output_dir):
    with open(output_dir / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run of each script: {name: (process, output directory)}."""
    runs = {}
    for name, flags in SMALL.items():
        output_dir = tmp_path_factory.mktemp(name) / "run"
        runs[name] = script(name, *flags, *SIX_STEPS, "--output-dir", output_dir), output_dir
    return runs


@both
def test_the_log_has_header_epoch_line_and_verdict(finished, name):
    process, output_dir = finished[name]
    assert (process.returncode, process.stderr) == (0, ""), "no bar without a terminal"
    for start in ("command ", "device     CPU", "data       synthetic", "model "):
        assert re.search(f"^{start}", process.stdout, re.MULTILINE), start
    assert len(EPOCH_LINE.findall(process.stdout)) == 1
    accuracy = EPOCH_LINE.search(process.stdout)[1]
    assert f"final test accuracy {accuracy}% (on synthetic images, so the" in process.stdout
    assert str(output_dir) in process.stdout.splitlines()[-1]


@both
def test_the_files_say_the_same(finished, name):
    process, output_dir = finished[name]
    assert sorted(contents(output_dir)) == sorted(utils.RUN_FILES), "and no temporary file"
    (row,) = rows(output_dir)
    assert (row["dataset"], row["epoch"], row["epochs"]) == ("synthetic", "1", "1")
    assert f"{float(row['test_acc']):.2%}" == EPOCH_LINE.search(process.stdout)[1] + "%"
    config = json.loads((output_dir / "config.json").read_text())
    assert config["script"] == name and config["dataset"] == "synthetic"
    assert config["settings"]["max_steps"] == 6


@both
def test_the_weights_load_strictly_and_the_state_safely(finished, name):
    _, output_dir = finished[name]
    weights = torch.load(output_dir / "model.pt", weights_only=True)
    network(name).load_state_dict(weights, strict=True)
    state = torch.load(output_dir / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(state["model"][k], weights[k]) for k in weights)
    assert state["scheduler"]["last_epoch"] == 6, "one step of the schedule per optimizer step"
    assert state["optimizer"]["param_groups"][0]["lr"] < 1e-4, "and it ends at its end"


@both
def test_eval_only_prints_the_same_test_accuracy(finished, name):
    process, output_dir = finished[name]
    flags = [*SMALL[name], "--eval-only", "--output-dir", output_dir, "--device", "cpu"]
    evaluated = script(name, *flags)
    assert evaluated.returncode == 0
    test_part = re.search(r"test loss .* top5 +[\d.]+%", process.stdout)[0]
    assert evaluated.stdout.splitlines()[-1] == f"{test_part}  (1,000 synthetic images)"


def test_a_held_out_split_is_printed_beside_the_test_set(tmp_path):
    process = script("train_resnet", *SMALL["train_resnet"], *SIX_STEPS, "--val-size", 100,
                     "--low-res-epochs", 1, "--output-dir", tmp_path / "run")
    assert "4,900 training, 100 validation and 1,000 test images" in process.stdout
    assert re.search(r"train loss .*  val loss .* top5 .*  test loss .* top5 ", process.stdout)
    assert {"val_acc", "test_acc"} <= set(rows(tmp_path / "run")[0])


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_gets_a_progress_bar(monkeypatch, terminal):
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    run = types.SimpleNamespace(epoch=0, stop_signal="")
    assert list(utils.Run.watch(run, range(10), "train", 2, 5)) == [0, 1, 2]
    assert ("epoch 1 train" in stderr.getvalue()) is terminal


@needs_cuda
@both
def test_the_defaults_run_on_a_gpu(tmp_path, name):
    process = script(name, *SMALL[name], "--max-steps", 5, "--output-dir", tmp_path / "run")
    assert process.returncode == 0 and "device     cuda" in process.stdout


@both
def test_a_run_is_not_overwritten_unless_asked(finished, name, tmp_path):
    _, output_dir = finished[name]
    before = contents(output_dir)
    again = script(name, *SMALL[name], *SIX_STEPS, "--output-dir", output_dir)
    assert (again.returncode, again.stdout) == (2, "")
    assert re.fullmatch(r".*already holds a run .*--overwrite.*--resume.*\n", again.stderr)
    assert contents(output_dir) == before
    copy = shutil.copytree(output_dir, tmp_path / "copy")
    other = script(name, *SMALL[name], *SIX_STEPS, "--seed", 1, "--overwrite", "--output-dir", copy)
    assert other.returncode == 0
    first, second = (torch.load(d / "model.pt") for d in (output_dir, copy))
    assert not torch.equal(first["fc.weight"], second["fc.weight"]), "another seed, another run"


INTERRUPTED = """
import os, runpy, signal, sys, utils
script, stage, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.argv = [script, *sys.argv[4:]]
watch = utils.Run.watch
def interrupt(self, batches, what, start, end):
    for number, item in enumerate(watch(self, batches, what, start, end)):
        if (what, number) == (stage, batch):
            os.kill(os.getpid(), signal.SIGINT)
        yield item
utils.Run.watch = interrupt
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("stage, batch, steps", [("train", 2, 3), ("test", 0, 6)])
@both
def test_an_interrupted_run_goes_on_to_the_same_weights(
    finished, name, tmp_path, stage, batch, steps
):
    """Also when it was interrupted in the middle of the evaluation."""
    flags = [*SMALL[name], *SIX_STEPS, "--resume", "--output-dir", tmp_path]
    command = [sys.executable, "-c", INTERRUPTED, ROOT / f"{name}.py", stage, batch, *flags]
    cut = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    says = f"{name}.py: SIGINT: stopped in epoch 1 after {steps} steps; go on by the same command "
    assert (cut.returncode, cut.stderr) == (75, says + "and --resume\n")
    assert sorted(contents(tmp_path)) == ["checkpoint.pt", "config.json"]
    resumed = script(name, *flags)
    assert resumed.returncode == 0
    assert f"resume     after 0 epochs and {steps} steps" in resumed.stdout
    whole = finished[name][1]
    first, second = (torch.load(d / "model.pt") for d in (whole, tmp_path))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert rows(whole) == rows(tmp_path)


def test_a_finished_run_is_not_trained_again(finished):
    process, output_dir = finished["train_resnet"]
    before = contents(output_dir)
    flags = [*SMALL["train_resnet"], *SIX_STEPS, "--resume", "--output-dir", output_dir]
    again = script("train_resnet", *flags)
    assert again.returncode == 0 and not EPOCH_LINE.search(again.stdout)
    assert contents(output_dir) == before
    final = [line for line in process.stdout.splitlines() if line.startswith("final")]
    assert final and final[0] in again.stdout


def test_other_settings_are_refused_by_name(finished):
    _, output_dir = finished["train_resnet"]
    flags = [*SMALL["train_resnet"], *SIX_STEPS, "--resume", "--output-dir", output_dir]
    process = script("train_resnet", *flags, "--lr", 0.2, "--seed", 5)
    assert process.returncode == 2
    assert "--lr 0.2 (was 0.1), --seed 5 (was 0)" in process.stderr


@pytest.mark.parametrize("fault", ["truncated", "text", "part 2's", "another dict"])
def test_a_bad_checkpoint_is_one_line(finished, tmp_path, fault):
    whole = (finished["train_resnet"][1] / "checkpoint.pt").read_bytes()
    other = (finished["finetune_resnet18"][1] / "checkpoint.pt").read_bytes()
    content = {"truncated": whole[: len(whole) // 2], "text": b"hello", "part 2's": other}
    if fault == "another dict":
        torch.save({"script": "train_resnet"}, tmp_path / "checkpoint.pt")
    else:
        (tmp_path / "checkpoint.pt").write_bytes(content[fault])
    flags = [*SMALL["train_resnet"], *SIX_STEPS, "--resume", "--output-dir", tmp_path]
    process = script("train_resnet", *flags)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and str(tmp_path / "checkpoint.pt") in process.stderr


@both
def test_a_diverging_run_stops_and_names_the_step(name, tmp_path):
    flags = [*SMALL[name], *SIX_STEPS, "--lr", "1e30", "--output-dir", tmp_path / "run"]
    process = script(name, *flags)
    assert process.returncode == 1
    says = r".*not finite at step [1-6]; start again with --overwrite and a lower --lr.*\n"
    assert re.fullmatch(says, process.stderr)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_run_can_be_as_short_as_one_step(tmp_path, steps):
    flags = [*SMALL["train_resnet"], "--batch-size", 20, "--max-steps", steps]
    assert script("train_resnet", *flags, "--output-dir", tmp_path / "run").returncode == 0


def test_a_run_whose_last_step_diverges_is_not_saved(tmp_path):
    flags = [*SMALL["train_resnet"], "--max-steps", 1, "--lr", "1e30"]
    process = script("train_resnet", *flags, "--output-dir", tmp_path / "run")
    assert process.returncode == 1 and "not finite at step 1" in process.stderr
    assert sorted(contents(tmp_path / "run")) == ["config.json"]


@pytest.mark.parametrize("flags, says", [
    (["--epochs", "0"], "--epochs: 0 is not within 1 and inf"),
    (["--epochs", "many"], "--epochs: invalid whole number value: 'many'"),
    (["--lr", "nan"], "--lr: nan is not within"),
    (["--label-smoothing", "1.1"], "--label-smoothing: 1.1 is not within 0 and 1"),
    (["--batchsize", "3"], "--batchsize"),
    (["--precision", "fp8"], "--precision"),
    (["--device", "abacus"], "--device abacus"),
    (["--val-size", "150"], "--val-size 150"),
    (["--resume", "--overwrite"], "not allowed with"),
    (["--eval-only"], "holds no model.pt"),
    (["--dataset", "cifar100", "--data-dir", "nowhere", "--no-download"], "Three ways out"),
    (["--dataset", "cifar100", "--data-dir", "gone.tar.gz"], "gone.tar.gz: no such file"),
    (["--output-dir", "file"], "is a file"),
])
def test_bad_input_is_one_line_and_status_2(tmp_path, flags, says):
    (tmp_path / "file").write_text("")
    process = script("train_resnet", "--dataset", "synthetic", *flags, cwd=tmp_path)
    assert (process.returncode, process.stderr.count("\n")) == (2, 1), process.stderr
    assert process.stderr.startswith("train_resnet.py: ") and says in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_one_line(tmp_path):
    process = script("train_resnet", *SMALL["train_resnet"], "--device", "cuda", cwd=tmp_path)
    assert process.returncode == 2 and "try --device cpu" in process.stderr


def test_bad_weights_are_one_line(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"not weights")
    flags = ["--dataset", "synthetic", "--weights", tmp_path / "weights.pth"]
    process = script("finetune_resnet18", *flags, cwd=tmp_path)
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)
    assert "weights.pth: not a PyTorch file" in process.stderr


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    resource = pytest.importorskip("resource")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))  # bytes; a checkpoint has 28 MB

    flags = [*SMALL["train_resnet"], *SIX_STEPS, "--output-dir", tmp_path / "run"]
    process = script("train_resnet", *flags, preexec_fn=limit)
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert "not saved" in process.stdout and EPOCH_LINE.search(process.stdout)
    assert sorted(contents(tmp_path / "run")) == ["config.json"]


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_evaluation_counts_every_image_once(runtime, batch_size):
    torch.manual_seed(0)
    split = data.synthetic(1, 1).test
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 100), torch.nn.Dropout())
    batches = data.Batches(split, batch_size, data.CIFAR100_STATS, runtime)
    result = utils.evaluate(model, batches.in_order(), runtime)
    images, labels = next(data.Batches(split, 100, data.CIFAR100_STATS, runtime).in_order())
    with torch.no_grad():
        logits = model.eval()(images)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    counts = result.accuracy * 100, result.top5 * 100, result.images
    assert counts == pytest.approx((int((ranks < 1).sum()), int((ranks < 5).sum()), 100))


@pytest.mark.parametrize("seconds, text", [
    (0.4, "0s"), (41, "41s"), (281, "4m41s"), (3599.7, "1h00m"), (3840, "1h04m"),
])
def test_durations(seconds, text):
    assert utils.duration(seconds) == text


@pytest.mark.parametrize("capability, expected", [
    ((3, 5), (torch.float32, False, torch.contiguous_format)),  # K20X
    ((6, 0), (torch.float16, False, torch.contiguous_format)),  # P100
    ((7, 0), (torch.float16, True, torch.channels_last)),  # V100
    ((8, 0), (torch.bfloat16, True, torch.channels_last)),  # A100
])
def test_each_gpu_generation_gets_what_it_computes_fast(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(utils.importlib.util, "find_spec", lambda name: True)
    runtime = utils.choose_runtime("cuda", "auto", None)
    assert (runtime.dtype, runtime.compile, runtime.memory_format) == expected


def training_bytes(model: torch.nn.Module, batch_size: int, size: int) -> int:
    """Return the bytes of float32 training: data set, weights, gradients, momentum, activations.

    Activations are the storages that autograd saves in a forward pass on the meta device.
    """
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    model.to("meta").train()
    images = torch.empty(batch_size, 3, size, size, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.cross_entropy(model(images), torch.empty(batch_size, dtype=torch.long, device="meta"))
    weights = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}
    saved = sum(s.nbytes() for key, s in storages.items() if key not in weights)
    return 60_000 * 3072 + 3 * sum(s.nbytes() for s in weights.values()) + saved


@both
def test_the_default_batch_fits_a_gpu_of_5700_mib(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    args = importlib.import_module(name).parse_args()
    size = getattr(args, "image_size", 32)
    needed = training_bytes(network(name), args.batch_size, size)
    print(f"{name}: {needed / 1e9:.2f} GB at batch size {args.batch_size} and {size} x {size}")
    assert 0.3e9 < needed < 0.8 * 5700 * 2**20  # the rest is for cuDNN's workspace and the context
