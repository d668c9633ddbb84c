"""How fast both parts train and evaluate, beside the machine's matrix product and a plain loop.

    python results/benchmark.py                  10 s for each number in each of 3 rounds
    python results/benchmark.py --device cuda    adds the time in which the device is busy
    python results/benchmark.py --against ../before --parts train_resnet
                                               the ratios to the code of another checkout
    python results/benchmark.py --time python train_resnet.py --epochs 5
                                               minutes of a command, also normalised: those of a
                                               machine that multiplies matrices at 184 GFLOP/s

The numbers of a round are measured one after the other and the table shows medians over the rounds,
so that a machine whose speed drifts changes all of them alike. The limit is the product of two
matrices of 2048 x 2048, in float32 (on CUDA in TF32, as in the scripts) and in the precision used.
The plain loop is what people write first: part 1's network and batch size, a DataLoader with a
worker for each core, PIL transforms, float32, SGD, no compilation.
"""

import argparse
import functools
import importlib
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import models
from cifar100.classes import CLASS_NAMES, CLASSES
from engine.runtime import choose_runtime, peak_memory

ROOT = Path(__file__).parents[1]
NORMAL = 184e9  # FLOP/s of the product of two float32 matrices of 2048 x 2048
IMAGES = 50_000  # of random pixels; as many as in an epoch, so orders are drawn as rarely
# For a pixel of the input; where a map's side is odd there are a few more.
MULTIPLY_ADDS = {"train_resnet": 214.8e6 / 32**2, "finetune_resnet18": 1814e6 / 224**2}
# The small and the full side of the training images, in pixels; the test images are of full size.
SIZES = {"train_resnet": (20, 32), "finetune_resnet18": (112, 224)}


class Task(NamedTuple):
    """`run(n)` does n batches of `batch_size` images, of `flop` operations each."""

    name: str
    run: Callable[[int], None]
    batch_size: int
    flop: float


def matrix_product(device: torch.device, dtype: torch.dtype, size: int = 2048) -> Task:
    """Return the task of multiplying matrices; its images are products."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)

    def run(n: int) -> None:
        for _ in range(n):
            a @ b

    name = str(dtype).removeprefix("torch.")
    return Task(f"matrix product, {name}", run, 1, 2 * size**3)


def modules_of(checkout: Path) -> SimpleNamespace:
    """Import the modules of a checkout, beside those of others of the same names."""
    folders = ("utils", "models", "data", "cifar100", "report", "engine", *SIZES)
    others = {name: sys.modules.pop(name) for name in list(sys.modules)
              if name.partition(".")[0] in folders}
    sys.path.insert(0, str(checkout))
    names = ("data", "models", "engine.loop", "engine.optim", "engine.run", "engine.checkpoint",
             "engine.runtime", *SIZES)
    found = {name.rpartition(".")[2]: importlib.import_module(name) for name in names}
    sys.path.pop(0)
    sys.modules.update(others)
    return SimpleNamespace(**found)


def our_tasks(code: SimpleNamespace, name: str, flags: list[str], images: data.Split) -> list[Task]:
    """Return the training of a script at each of its sizes, and its evaluation."""
    sys.argv = [name, *flags, "--output-dir", tempfile.gettempdir() + "/no run is here"]
    script = getattr(code, name)
    args = script.parse_args()
    # Older code has no graphs.
    graphs = [args.graphs] if "graphs" in args else []
    runtime = code.runtime.choose_runtime(args.device, args.precision, args.compile, *graphs)
    network = code.models.ResNet() if name == "train_resnet" else code.models.resnet18()
    model = runtime.place(network)
    optimizer = script.make_optimizer(model, args, runtime)
    scheduler = code.optim.one_cycle(optimizer, 10**6)
    small, full = SIZES[name]
    batches = code.data.Batches(images, args.batch_size, script.STATS, runtime)
    tested = code.data.Batches(images, script.EVAL_BATCH, script.STATS, runtime, full)
    dataset = code.data.Dataset("random", images, images, CLASS_NAMES, "")

    # This run is not started, so it writes no file.
    run = code.run.Run(args, runtime, dataset, script.REQUIRED, steps_per_epoch=1)
    run.model, run.network, run.optimizer, run.scheduler = model, model, optimizer, scheduler
    run.scaler, run.augmentation, run.has_logged_time = runtime.scaler(), None, True
    sums = torch.zeros(3, device=runtime.device)
    run.state = code.checkpoint.State({}, code.checkpoint.Position(), sums, [])

    def train(size: int, n: int) -> None:
        # The first epoch again, now of n steps; CUDA graphs stay as they are.
        run.steps_per_epoch = run.total_steps = n
        run.state.position, run.clock.steps = code.checkpoint.Position(), []
        run.state.sums.zero_()
        forever = itertools.chain.from_iterable(
            batches.shuffled(0, epoch, 0, size) for epoch in itertools.count())
        code.loop.train_one_epoch(run, forever, script.train_step)

    def evaluate(n: int) -> None:
        forever = itertools.chain.from_iterable(itertools.repeat(tested))
        code.loop.evaluate(model, itertools.islice(forever, n), runtime)

    flop = {size: 2 * MULTIPLY_ADDS[name] * size**2 for size in SIZES[name]}
    tasks = [Task(f"{name}, training at {size}", functools.partial(train, size), args.batch_size,
                  3 * flop[size]) for size in (small, full)]
    return [*tasks, Task(f"{name}, evaluation at {full}", evaluate, script.EVAL_BATCH, flop[full])]


class PilImages(Dataset):
    """Images through PIL, as torchvision's CIFAR100 gives them."""

    def __init__(self, images: data.Split):
        self.pixels = images.images.permute(0, 2, 3, 1).numpy()
        self.labels = images.labels.tolist()
        self.transform = transforms.Compose([
            transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize(*data.CIFAR100_STATS),
        ])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def plain_loop(device: torch.device, images: data.Split, batch_size: int) -> Task:
    """Return part 1's training as people write it first."""
    model = models.ResNet().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True)
    # Of the images, batch by batch; no more are loaded than are used.
    order: list[list[int]] = []
    loader = DataLoader(PilImages(images), batch_sampler=order, pin_memory=device.type == "cuda",
                        num_workers=torch.get_num_threads(), persistent_workers=True)

    def run(n: int) -> None:
        order[:] = torch.randint(IMAGES, (n, batch_size)).tolist()
        for pixels, labels in loader:
            loss = F.cross_entropy(model(pixels.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Task("plain loop, training at 32", run, batch_size,
                3 * 2 * MULTIPLY_ADDS["train_resnet"] * 32**2)


def seconds(run: Callable[[int], None], n: int, device: torch.device) -> float:
    """Return the time that n batches take, to their end on the device."""
    began = time.perf_counter()
    run(n)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def busy(task: Task, n: int, device: torch.device) -> float:
    """Return the fraction of the time in which kernels run on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        wall = seconds(task.run, n, device)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / wall


def time_command(command: list[str]) -> int:
    """Run a command between two measurements of the machine's speed; return its exit status."""
    product = matrix_product(torch.device("cpu"), torch.float32)

    def speed() -> float:
        # A warm-up comes first.
        seconds(product.run, 20, torch.device("cpu"))
        return 100 * product.flop / seconds(product.run, 100, torch.device("cpu"))

    before, began = speed(), time.perf_counter()
    status = subprocess.run(command).returncode
    minutes, after = (time.perf_counter() - began) / 60, speed()
    print(f"{minutes:.1f} min at {before / 1e9:.0f} GFLOP/s before and {after / 1e9:.0f} after: "
          f"{minutes * (before + after) / 2 / NORMAL:.1f} normalised min")
    return status


def measure(
    tasks: list[Task], args: argparse.Namespace, device: torch.device
) -> tuple[list[float], list[str]]:
    """Return the median images/s of each task, and its last columns in the table."""
    rates: list[list[float]] = [[] for _ in tasks]
    counts, columns = [], []
    for task in tasks:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        # A warm-up; a compilation or the capture of a graph, where there is one.
        seconds(task.run, 6, device)
        counts.append(max(1, round(args.seconds / seconds(task.run, 1, device))))
        column = f"{peak_memory(device):9.2f} GB"
        if device.type == "cuda":
            column += f"{busy(task, min(counts[-1], 50), device):8.0%}"
        columns.append(column)
    for _ in range(args.rounds):
        for task, count, rate in zip(tasks, counts, rates, strict=True):
            rate.append(count * task.batch_size / seconds(task.run, count, device))
    return [statistics.median(rate) for rate in rates], columns


def print_table(tasks: list[Task], products: list[Task], rates: list[float], columns: list[str],
                device: torch.device) -> None:
    """Print a line for each task. The first ones are the products, which are the limits."""
    limits = [rate * task.flop for rate, task in zip(rates, products, strict=False)]
    shares = "".join(f"{'of ' + product.name.split()[-1]:>12}" for product in products)
    header = f"{'':36} {'images/s':>10} {'GFLOP/s':>9} {shares} {'peak so far':>12}"
    print(f"{header}{'busy':>7}" if device.type == "cuda" else header)
    for task, rate, column in zip(tasks, rates, columns, strict=True):
        shown = f"{rate:10.1f}" if task.batch_size > 1 else " " * 10
        flop = rate * task.flop
        shares = "".join(f"{flop / limit:12.2f}" for limit in limits)
        print(f"{task.name:36} {shown} {flop / 1e9:9.0f} {shares} {column}")


def compare(flags: list[str], images: data.Split, args: argparse.Namespace,
            device: torch.device) -> None:
    """Print how many times as fast each task of the scripts is as in the other checkout."""
    for name in args.parts:
        before, after = (our_tasks(modules_of(checkout), name, flags, images)
                         for checkout in (args.against, ROOT))
        rates, _ = measure([*before, *after], args, device)
        for task, old, new in zip(after, rates, rates[len(before):], strict=False):
            print(f"{task.name:36} batch {task.batch_size:4}  {old:8.1f} -> {new:8.1f} images/s"
                  f"  ratio {new / old:.3f}", flush=True)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="of both scripts; auto: theirs")
    parser.add_argument("--seconds", type=float, default=10, help="for a number in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", help="of training in both scripts; else theirs")
    parser.add_argument("--graphs", action="store_true", help="train by CUDA graphs")
    parser.add_argument("--parts", nargs="+", choices=SIZES, default=list(SIZES),
                        help="the scripts that --against compares")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="only compare with it")
    parser.add_argument("--time", nargs=argparse.REMAINDER, help="only time this command")
    args = parser.parse_args()
    if args.time:
        sys.exit(time_command(args.time))
    runtime = choose_runtime(args.device, args.precision, compile_model=False)
    device = runtime.device
    images = data.Split(torch.randint(256, (IMAGES, 3, 32, 32), dtype=torch.uint8),
                        torch.arange(IMAGES) % CLASSES)
    flags = ["--device", args.device, "--precision", args.precision]
    flags += ["--batch-size", args.batch_size] if args.batch_size else []
    flags += ["--graphs"] if args.graphs else []
    if args.against:
        return compare(flags, images, args, device)
    part1, part2 = (our_tasks(modules_of(ROOT), name, flags, images) for name in SIZES)
    products = [matrix_product(device, dtype)
                for dtype in dict.fromkeys((torch.float32, runtime.dtype))]
    plain, (_, ours, _) = plain_loop(device, images, part1[0].batch_size), part1
    tasks = [*products, *part1, plain, *part2]

    rates, columns = measure(tasks, args, device)
    print(f"{runtime}, torch {torch.__version__}, {args.rounds} rounds")
    print_table(tasks, products, rates, columns, device)
    ratio = rates[tasks.index(ours)] / rates[tasks.index(plain)]
    print(f"part 1 at 32 trains {ratio:.2f} times as fast as the plain loop")


if __name__ == "__main__":
    main()
