"""How long do a replay of a CUDA graph and an eager step take? The answers are rows of a table.

    python results/gpu_replay.py cuda
    python results/gpu_replay.py cpu     a tape stands in for the graphs, and all is tiny

gpu_session.sh makes the table. This also prints the 25 kernels that take longest. The exit status
is 1 if a step has no graph.
"""

import importlib
import logging
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import benchmark
import torch
from gpu_bits import PARTS, TINY, in_process, prepare

import data
import models
import utils
from engine import checkpoint, loop, optim, process, run, runtime

REPLAYS, STEPS = 200, 100  # that are timed
TINY_SIZES = {"train_resnet": (20, 32), "finetune_resnet18": (32, 40)}


def milliseconds(repeat: Callable[[], object], n: int, device: str) -> float:
    """Return the mean time of what `repeat` does n times, by CUDA's events where there are any."""
    if device == "cpu":
        return 1e3 * benchmark.seconds(lambda _: repeat(), n, torch.device(device)) / n
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    repeat()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / n


def profiled(replay: Callable[[], None], device: str) -> str:
    """Print the 25 kernels that take longest in three replays; return their sum in words."""
    kind, on_device = ("cpu", "CPU") if device == "cpu" else ("device", "CUDA")
    activity = getattr(torch.profiler.ProfilerActivity, on_device)
    with torch.profiler.profile(activities=[activity]) as profile:
        milliseconds(lambda: [replay() for _ in range(3)], 3, device)
    time_of, events = f"self_{kind}_time_total", profile.key_averages()
    print(events.table(sort_by=time_of, row_limit=25, max_name_column_width=80))
    kernels = [event for event in events if getattr(event, time_of)]
    return (f"{sum(getattr(event, time_of) for event in kernels) / 3e3:.2f} ms in "
            f"{sum(event.count for event in kernels) / 3:.0f} kernels")


def measure(part: str, device: str, flag: str) -> None:
    """Print a row for each size, with `flag` --graphs or --no-graphs."""
    process.log_to(logging.StreamHandler(sys.stdout))
    utils.log.setLevel(logging.INFO)
    graphs, flags = prepare(device), ["--device", device, flag]
    replays, steps, count = REPLAYS, STEPS, benchmark.IMAGES
    if device == "cpu":
        replays, steps, count, flags = 3, 3, 1000, [*flags, *TINY[part]]
        benchmark.SIZES = TINY_SIZES
    code = SimpleNamespace(data=data, models=models, loop=loop, optim=optim, run=run,
                           checkpoint=checkpoint, runtime=runtime)
    setattr(code, part, importlib.import_module(part))
    images = data.Split(torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8),
                        torch.arange(count) % 100)
    # The last task is the evaluation.
    tasks = benchmark.our_tasks(code, part, flags, images)
    for task, size in zip(tasks, benchmark.SIZES[part], strict=False):
        began, before = time.monotonic(), len(graphs)
        task.run(6)  # loads libraries, and captures a graph
        step = milliseconds(lambda task=task: task.run(steps), steps, device)
        result = f"{step:.2f} ms a step"
        if len(graphs) > before:
            replay = graphs[-1].replay
            alone = milliseconds(lambda replay=replay: [replay() for _ in range(replays)],
                                 replays, device)
            result = f"{alone:.2f} ms a replay, {result}; {profiled(replay, device)}"
        elif flag == "--graphs":
            result = f"FAILED: no graph; {result}"
        memory = (runtime.peak_memory(torch.device(device)) if device == "cpu"
                  else torch.cuda.max_memory_reserved() / 1e9)
        print(f"row: replay: {part} at {size}, {flag} | {result}; {memory:.2f} GB reserved | "
              f"{time.monotonic() - began:.0f}", flush=True)
    sys.exit(flag == "--graphs" and len(graphs) < 2)


def main() -> None:
    """Measure on the device that the command line names, each part and way in its own process."""
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    statuses = [in_process(measure, part, device, flag)[0]
                for part in PARTS for flag in ("--no-graphs", "--graphs")]
    sys.exit(any(statuses))


if __name__ == "__main__":
    main()
