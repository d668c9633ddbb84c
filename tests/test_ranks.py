"""Several processes train as one does: gloo on the CPU, started as torchrun starts them."""

import concurrent.futures
import functools
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import ROOT, call, result, run_script, script, without_pictures
from tiny import SCRIPTS, Watched, noise, train
from torch.nn.parallel import DistributedDataParallel

import data
import engine.loop
import engine.optim
import engine.process
import engine.runtime
import models
import report.log
import utils
from cifar100.classes import CLASS_NAMES
from engine.loop import train_one_epoch
from engine.run import Run
from engine.runtime import Runtime, choose_runtime
from train_resnet import train_step

PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
# Size and number of a batch of 100 images, and the probability of CutMix, which is the strength of
# TrivialAugment, too. 13 cannot be divided by 2 or 3, and the third is of one image for all ranks.
BATCHES = [(12, 0, 0), (13, 3, 0), (99, 1, 0), (13, 3, 0.5)]
slow = pytest.mark.slow


def in_ranks(ranks: int, function, *arguments, failing: int = -1) -> list[CompletedProcess]:
    """Call a module's function in so many processes, which believe that torchrun started them.

    All must end with status 0, but for a rank that is `failing` with status 1.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with concurrent.futures.ThreadPoolExecutor(ranks) as pool:
        begin = [functools.partial(join, rank, ranks, port) for rank in range(ranks)]
        calls = [pool.submit(call, function, *arguments, before=before) for before in begin]
        processes = [future.result() for future in calls]
    expected = [int(rank == failing) for rank in range(ranks)]
    assert [process.returncode for process in processes] == expected, processes
    for process in processes:
        # In torch 2.10 gloo says on stdout how many ranks it has connected.
        process.stdout = re.sub(r"^\[Gloo\] .*\n", "", process.stdout, flags=re.MULTILINE)
    return processes


def join(rank: int, ranks: int, port: int) -> None:
    """Set what torchrun sets."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1",
    }


def choose_cpu() -> Runtime:
    """Return the runtime of this rank, with one thread whatever their number."""
    runtime = choose_runtime("cpu", "fp32", False)
    torch.set_num_threads(1)
    return runtime


def save_gradients(path: Path) -> None:
    """Save the gradients of single steps of an epoch of 100 images."""
    runtime = choose_cpu()
    torch.manual_seed(0)
    # Batch norm sees the images of its rank alone on a CPU, so it is in evaluation mode here.
    model = models.ResNet().eval()
    network = DistributedDataParallel(model) if runtime.ranks > 1 else model
    gradients = []
    for batch_size, step, cutmix in BATCHES:
        batches = data.Batches(data.synthetic(1, 1).train, batch_size, PLAIN, runtime,
                               strength=cutmix)
        images, labels, weight = next(batches.shuffled(0, 0, step, 16, cutmix))
        model.zero_grad()
        (F.cross_entropy(network(images), labels, label_smoothing=0.1) * weight).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.save(gradients, path / f"{runtime.ranks}-{runtime.rank}")


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=slow)])
def test_the_gradient_is_that_of_one_process(tmp_path, ranks):
    """Also when the batch cannot be divided evenly, or is one image for all of them."""
    in_ranks(1, save_gradients, tmp_path)
    in_ranks(ranks, save_gradients, tmp_path)
    alone, *shared = (torch.load(path) for path in sorted(tmp_path.iterdir()))
    assert len(shared) == ranks
    for gradients in shared:
        for gradient, expected in zip(gradients, alone, strict=True):
            scale = 1e-5 * expected.abs().max()
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=scale)


def print_numbers(path: Path) -> None:
    """Save the numbers of the images that an epoch gives this rank; print what is evaluated."""
    runtime = choose_cpu()
    values = torch.arange(97, dtype=torch.uint8)
    numbered = data.Split(values.view(-1, 1, 1, 1).expand(97, 3, 32, 32), values.long())
    batches = data.Batches(numbered, 8, PLAIN, runtime)
    trained = [images[:, 0, 0, 0] for images, _, weight in batches.shuffled(1, 2) if weight]
    bar = report.log.progress(batches, "test", runtime.rank)
    tested = [images[:, 0, 0, 0] for images, _ in bar]
    assert bar.total == len(tested), "the bar ends where the batches do"
    torch.save([(torch.cat(part) * 255).round().long() for part in (trained, tested)],
               path / f"{runtime.ranks}-{runtime.rank}")
    torch.manual_seed(0)
    test = data.Batches(data.synthetic(1, 1).test, 24, data.CIFAR100_STATS, runtime, size=16)
    model = models.ResNet()
    logits, labels = engine.loop.infer(model, test, runtime)
    metrics = engine.loop.evaluate(model, test, runtime)
    print(metrics, logits.topk(3).indices.tolist(), labels.tolist())


def test_every_image_is_seen_once_and_the_evaluation_is_equal(tmp_path):
    printed = []
    for ranks in (1, 2, 3):
        printed += [process.stdout for process in in_ranks(ranks, print_numbers, tmp_path)]
        parts = [torch.load(tmp_path / f"{ranks}-{rank}") for rank in range(ranks)]
        for seen in zip(*parts, strict=True):
            assert sorted(torch.cat(seen).tolist()) == list(range(97))
    assert len(set(printed)) == 1 and "images=100" in printed[0]


@pytest.fixture(scope="module")
def small(data_dir):
    """Flags of a run of two steps, whose batches the ranks cannot share evenly."""
    return ["--data-dir", data_dir, "--device", "cpu", "--epochs", 1, "--batch-size", 17]


def torchrun(ranks: int, name: str, *flags, **environment) -> subprocess.Popen:
    """Start a script under torchrun itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               ranks, ROOT / f"{name}.py", *flags]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | environment)


def under_torchrun(name: str, *flags) -> tuple[str, str]:
    """Run a script in two ranks of torchrun, which must succeed; return stdout and stderr."""
    process = torchrun(2, name, *flags)
    stdout, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr
    return stdout, stderr


def run_without_pictures(path: str, flags: tuple) -> None:
    """Execute a script in this process, which finds no matplotlib."""
    without_pictures()
    run_script(path, flags)


def in_two_ranks(name: str, *flags) -> tuple[str, str]:
    """Run a script as `under_torchrun` does, in a fifth of the time: torch is imported already."""
    flags = tuple(map(str, flags))
    processes = in_ranks(2, run_without_pictures, str(ROOT / f"{name}.py"), flags)
    return ("".join(process.stdout for process in processes),
            "".join(process.stderr for process in processes))


@pytest.mark.parametrize("run", [in_two_ranks, pytest.param(under_torchrun, marks=slow)])
def test_ranks_stop_and_resume_to_the_same_bits_and_in_another_number(tmp_path, small, run):
    flags = ["train_resnet", *small, "--dropout", 0.1, "--resume", "--output-dir"]
    whole, chain = tmp_path / "whole", tmp_path / "chain"
    stdout, stderr = run(*flags, whole)
    assert stdout.count("epoch  1/1") == 1, "one rank prints"
    assert "Warning" not in stderr
    _, stderr = run(*flags, chain, "--max-minutes", 0.001)
    says = r"train_resnet\.py: --max-minutes 0\.001: stopped in epoch 1 after 1 steps, saved in "
    assert len(re.findall(says, stderr)) == 1
    assert "Traceback" not in stderr and not (chain / "model.pt").exists()
    first = (chain / "checkpoint.pt").read_bytes()
    run(*flags, chain)
    assert result(chain) == result(whole)
    (chain / "checkpoint.pt").write_bytes(first)
    alone = script(*flags, chain, before=without_pictures)
    assert alone.returncode == 0 and "final test accuracy" in alone.stdout
    assert re.search(r"resume     after 0 epochs.*\nnote .* comes from 2 x CPU", alone.stdout)


@slow
def test_a_run_of_one_process_goes_on_in_two(tmp_path, small):
    flags = ["train_resnet", *small, "--resume", "--output-dir", tmp_path]
    assert script(*flags, "--max-minutes", 0.001).returncode == utils.STOPPED
    stdout, _ = in_two_ranks(*flags)
    says = r"resume     after 0 epochs.*\nnote .* comes from CPU.*the end will not be the same bits"
    assert re.search(says, stdout) and "final test accuracy" in stdout


def test_part_2_runs_under_torchrun(tmp_path, small):
    flags = [*small, "--weights", "random", "--image-size", 32, "--output-dir", tmp_path / "run"]
    stdout, _ = under_torchrun("finetune_resnet18", *flags)
    assert stdout.count("final test accuracy") == 1 and (tmp_path / "run" / "model.pt").exists()


def workers_at_work(process: subprocess.Popen) -> list[int]:
    """Wait until the first epoch is told; return the process numbers of torchrun's workers."""
    timer = threading.Timer(900, process.kill)
    timer.start()
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    timer.cancel()
    find = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True)
    return sorted(map(int, find.stdout.split()))


SLOW_DISK = """
import os, time
if os.environ.get("RANK") == "0":
    fsync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(1), fsync(descriptor))
"""


@slow
def test_a_signal_to_one_rank_stops_them_all(tmp_path, small):
    """And the other waits for rank 0, which takes long to save."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    process = torchrun(2, "train_resnet", *small, "--max-steps", 500, "--epochs", 99,
                       "--output-dir", tmp_path / "run", PYTHONPATH=str(tmp_path))
    _, last = workers_at_work(process)
    os.kill(last, signal.SIGUSR2)
    _, stderr = process.communicate(timeout=900)
    assert process.returncode == 0 and stderr.count("SIGUSR2: stopped in epoch") == 1, stderr
    assert len(utils.load_tensors(tmp_path / "run" / "checkpoint.pt")["ranks"]) == 2


@slow
def test_a_rank_that_dies_ends_the_job(tmp_path, small):
    process = torchrun(2, "train_resnet", *small, "--max-steps", 500, "--epochs", 99,
                       "--output-dir", tmp_path)
    _, last = workers_at_work(process)
    os.kill(last, signal.SIGKILL)
    _, stderr = process.communicate(timeout=900)
    assert process.returncode == 1 and "exitcode  : -9" in stderr
    assert subprocess.run(["pgrep", "-f", f"train_resnet.py.*{tmp_path}"]).returncode == 1


@pytest.mark.parametrize("device, batch_size, synchronised", [
    ("cuda", 63, 28), ("cuda", 64, 0), ("cpu", 63, 0),
])
def test_batch_norm_is_synchronised_where_a_rank_has_few_images(
    monkeypatch, device, batch_size, synchronised
):
    """Fewer than 32; the CPU has no such layer."""
    model = models.ResNet()
    # So no GPU is needed.
    monkeypatch.setattr(model, "to", lambda *_, **__: model)
    Runtime(torch.device(device), torch.float32, ranks=2).place(model, batch_size)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(torch.nn.SyncBatchNorm) == synchronised


def start_run(runtime: Runtime, path: Path, steps: int) -> Run:
    """Start a run of part 1 of one epoch of so many steps of ten images."""
    sys.argv = ["train_resnet", "--output-dir", str(path), "--epochs", "1", "--overwrite"]
    args = importlib.import_module("train_resnet").parse_args()
    split = data.Split(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1).long())
    dataset = data.Dataset("none", split, split, CLASS_NAMES, "")
    run = Run(args, runtime, dataset, 60, steps)
    model = models.ResNet()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run.start(model, optimizer, engine.optim.one_cycle(optimizer, steps),
              engine.optim.Sizes(1, 0, 8, 8))
    return run


def save_statistics(path: Path) -> None:
    """Save the batch norm statistics before and after they are averaged, and a checkpoint's."""
    runtime = choose_cpu()
    run = start_run(runtime, path, 1)
    run.model.train()
    run.model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(runtime.rank)))
    run.state.sums[2] = 1  # image
    seen = []
    for _ in range(2):
        seen.append([tensor.clone() for tensor in run.state.statistics])
        run.end_training()
    torch.save(seen, path / f"rank{runtime.rank}")


def test_batch_norm_statistics_are_averaged_over_the_ranks(tmp_path):
    """Once: a second time, after a resumption, could change the last bit."""
    in_ranks(2, save_statistics, tmp_path)
    (one, after), (other, same) = (torch.load(tmp_path / f"rank{rank}") for rank in range(2))
    assert len(one) == 2 * 28 and not torch.equal(one[0], other[0])
    for parts in zip(one, other, after, same, strict=True):
        torch.testing.assert_close((parts[0] + parts[1]) / 2, parts[2])
        assert torch.equal(parts[2], parts[3])


def count_collectives(path: Path) -> None:
    """Print which collectives the third and fourth steps of an epoch of five do.

    The second one's also order the gradients anew, once and for all.
    """
    runtime = choose_cpu()
    run = start_run(runtime, path, 5)
    images = torch.zeros(50, 3, 32, 32, dtype=torch.uint8)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def profiled(batches):
        for step, batch in enumerate(batches):
            if step == 2:
                profiler.start()
            if step == 4:
                profiler.stop()
            yield batch

    split = data.Split(images, torch.arange(50))
    batches = data.Batches(split, 10, PLAIN, runtime).shuffled(0, 0, 0, 8)
    train_one_epoch(run, profiled(batches), train_step)
    print([(event.key, event.count) for event in profiler.key_averages() if "gloo" in event.key])


def test_a_step_costs_two_collectives_for_gradients_and_one_to_agree(tmp_path):
    """The gradients come in two buckets. No buffer is broadcast."""
    printed = {process.stdout for process in in_ranks(2, count_collectives, tmp_path)}
    assert printed == {"[('gloo:all_reduce', 6)]\n"}


def raise_in_one_rank() -> None:
    """As a script: rank 1 meets a fault of the code while rank 0 waits for it."""
    def main():
        if choose_cpu().rank:
            raise ZeroDivisionError("a fault")
        dist.all_reduce(torch.zeros(1))

    engine.process.run_script(main)


def test_a_fault_in_one_rank_ends_all_at_once():
    """With its traceback, and without the interpreter's own end, which could hang.

    The other has the status of a run that can go on, so that torchrun names the faulty one.
    """
    began = time.monotonic()
    waiting, faulty = in_ranks(2, raise_in_one_rank, failing=1)
    assert time.monotonic() - began < 60
    assert "Traceback" in faulty.stderr and "ZeroDivisionError: a fault" in faulty.stderr
    assert faulty.stderr.endswith("(rank 1): a fault of the program; its traceback stands above\n")
    assert "another rank has ended (" in waiting.stderr and waiting.stderr.count("\n") == 1


def test_of_a_long_message_the_end_is_kept(monkeypatch):
    """There NCCL names the cause."""
    monkeypatch.setattr(engine.process, "_in_group", lambda: True)
    error = dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:4300, " + 50 * "internal "
                                  + "Last error: socketProgress: Connection closed by remote peer")
    line, status = engine.process.explain(error)
    assert line.endswith("Connection closed by remote peer)") and len(line) < 250
    assert status == utils.LEFT_ALONE


def test_the_group_is_not_joined_without_torchrun():
    assert engine.runtime.join_ranks(torch.device("cpu")) == (0, 1) and not dist.is_initialized()


def fail(rank: int, status: int) -> None:
    """Fail as a rank of torchrun, before it has joined the others."""
    def main():
        raise utils.UserError("a mistake", status)

    join(rank, 2, 0)
    engine.process.run_script(main)


def test_a_mistake_of_one_rank_is_told_by_it_and_what_befalls_all_by_rank_0():
    for rank, status, says in ((1, 2, True), (1, utils.STOPPED, False), (0, utils.STOPPED, True)):
        process = call(fail, rank, status)
        # torchrun takes any other status for a failure.
        assert process.returncode == (0 if status == utils.STOPPED else status)
        assert process.stderr.endswith("(rank 1): a mistake\n" if rank else ": a mistake\n") == says


# Three batches of five images, shared by 3 and 2, and one of a single image for all.
TINY = ["--batch-size", 5, "--epochs", 2, "--label-smoothing", 0.2, "--seed", 3,
        "--checkpoint-minutes", 0]


def train_tiny(name: str, directory: Path, *flags, act=None) -> Watched:
    """Train a network without batch norm by a script on 16 images."""
    size = ["--image-size", 64] if name == "finetune_resnet18" else []
    return train(name, noise(16), directory, *size, *TINY, "--precision", "fp32", *flags, act=act)


def stop_at(step: int, run: Watched) -> None:
    """Stop a run after a step by a signal to the last of its processes."""
    is_last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    if len(run.trained) == step and is_last:
        signal.raise_signal(signal.SIGTERM)


def train_parts_in_ranks(path: Path) -> None:
    """By each script do a whole run, stop one, and go on with one; print the whole one's seeds."""
    signal.alarm(120)  # seconds; ends a rank that waits for the other in vain
    choose_cpu()
    dist.init_process_group = lambda *_, **__: None  # the ranks have joined, for all runs
    seeds = {}
    for name in SCRIPTS:
        for part, flags, act in (("whole", [], None), ("two then one", [], 2),
                                 ("one then two", ["--resume"], None)):
            act = functools.partial(stop_at, act) if act else None
            run = train_tiny(name, path / f"{name} {part}", *flags, act=act)
            assert run.status == (utils.STOPPED if act else 0), run.message
            if part == "whole":
                seeds[name] = [shown.seed for shown in run.trained]
    print(json.dumps(seeds))


def test_a_script_trains_alike_in_one_process_and_in_two_also_if_their_number_changes(tmp_path):
    for name in SCRIPTS:
        assert train_tiny(name, tmp_path / name).status == 0
        stopped = train_tiny(name, tmp_path / f"{name} one then two",
                             act=functools.partial(stop_at, 2))
        assert stopped.status == utils.STOPPED
    processes = in_ranks(2, train_parts_in_ranks, tmp_path)
    for name in SCRIPTS:
        resumed = train_tiny(name, tmp_path / f"{name} two then one", "--resume")
        assert (resumed.status, resumed.drawn[0]["start"]) == (0, 2)
        alone = Watched(tmp_path / name)
        weights = utils.load_tensors(tmp_path / name / "model.pt")
        for part in ("whole", "two then one", "one then two"):
            other = Watched(tmp_path / f"{name} {part}")
            for row, expected in zip(other.rows(), alone.rows(), strict=True):
                for column in ("train_loss", "train_acc", "test_loss", "test_acc", "lr"):
                    assert row[column] == pytest.approx(expected[column], rel=1e-4), part
            for key, value in utils.load_tensors(other.output_dir / "model.pt").items():
                torch.testing.assert_close(value, weights[key], rtol=1e-3, atol=1e-5)
        # Two epochs of four steps on each of two ranks.
        seeds = [json.loads(process.stdout)[name] for process in processes]
        assert [len(of_rank) for of_rank in seeds] == [8, 8]
        assert len({seed for of_rank in seeds for seed in of_rank}) == 4, "dropout differs"
