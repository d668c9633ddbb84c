"""CUDA graphs: a whole training step, captured once and then repeated by a single launch.

A step of part 1 starts some 650 kernels one by one, and the GPU waits for most of them.
"""

import contextlib
import dataclasses
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data import Batch
from engine.process import GPU_FAULTS
from engine.run import Run
from utils import log, one_line

EAGER_STEPS = 2  # of a kind of batch, in a row, before its graph is captured
PATIENCE = 20  # eager steps in a row, after which no graph will come
# Where the host's random numbers come from.
HOST_RANDOM = (lambda: torch.get_rng_state().tolist(), random.getstate, np.random.get_state)
# Graphs are never freed, for that frees memory of others: pytorch/pytorch#193402.
GRAPHS: list[torch.cuda.CUDAGraph] = []


class Graphs:
    """Takes the steps of a run, with one graph for each kind of batch, or else eagerly.

    The first steps of a kind are eager: they load libraries and make the momentum. The next one is
    captured, taken by the graph, and taken once more eagerly from the same state. Unless both end
    with the same bits, and if anything else is in the way, all later steps are eager. No result of
    a graph outlives its step, so all graphs share their memory.
    """

    def __init__(self, run: Run):
        self.run, self.obstacle = run, ""
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self.kind, self.in_a_row, self.eager_steps, self.pool = None, 0, 0, None
        others = [name for name, part in run.keep.items() if not isinstance(part, nn.Module)]
        if not hasattr(run.optimizer, "rates"):
            self._give_up(f"{type(run.optimizer).__name__} has its rates on the host")
        elif others:
            self._give_up(f"{', '.join(others)} in keep is no nn.Module")
        else:
            run.optimizer.rates = [torch.zeros((), device=run.runtime.device)
                                   for _ in run.optimizer.param_groups]

    def take(self, step: Callable[[Iterable], None], batch: Iterable) -> None:
        """Take a step on a batch; `step(batch)` does so eagerly."""
        if not self.obstacle and not isinstance(batch, Batch):
            self._give_up("the batches are not those of data.py")
        if hasattr(self.run.optimizer, "rates"):
            self.run.optimizer.set_rates()
        if self.obstacle:
            return step(batch)
        shapes = [(name, values.shape) for name, values in batch.drawn.items()]
        kind = batch.size, batch.weight, *shapes, *self._numbers()
        self.in_a_row = self.in_a_row + 1 if kind == self.kind else 1
        self.kind = kind
        if kind in self.graphs:
            graph, drawn = self.graphs[kind]
            torch._foreach_copy_(drawn, list(batch.drawn.values()))
            graph.replay()
            self.eager_steps = 0
        else:
            self._take_slowly(step, batch)

    def _take_slowly(self, step: Callable, batch: Batch) -> None:
        clock = self.run.clock
        if len(clock.steps) <= clock.slow:
            clock.slow = len(clock.steps) + 1
        self.eager_steps += 1
        if self.in_a_row > EAGER_STEPS:
            self._capture(step, batch)
        elif self.in_a_row == EAGER_STEPS:
            self._watch(step, batch)
        else:
            step(batch)
        if self.eager_steps == PATIENCE:
            self._give_up(f"in {PATIENCE} steps no {EAGER_STEPS + 1} in a row were alike")

    def _watch(self, step: Callable, batch: Batch) -> None:
        """Take an eager step, and look for what a graph of it would not repeat."""
        self.run.was_asked_for_step = False
        before = self._numbers(), random_state()
        with waits() as found:
            step(batch)
        if found:
            self._give_up("a step waits for the device")
        elif (self._numbers(), random_state()) != before:
            self._give_up("a step changes numbers, or draws random ones, on the host")
        elif self.run.was_asked_for_step:
            self._give_up("a step reads run.step or run.epoch")

    def _capture(self, step: Callable, batch: Batch) -> None:
        """Take a step by a new graph and eagerly, from the same state; compare the bits."""
        run, by_graph = self.run, []
        static = {name: values.clone() for name, values in batch.drawn.items()}
        before = [tensor.detach().clone() for tensor in self._tensors()]
        own = [run.generator] if run.augmentation else []
        generators = [device_generator(run.runtime.device), *own]
        seeds = [generator.get_state() for generator in generators]
        try:
            graph = capture(lambda: step(dataclasses.replace(batch, drawn=static)), self.pool, own)
            self.pool = graph.pool()
            graph.replay()
            by_graph = [tensor.detach().clone() for tensor in self._tensors()]
        except RuntimeError as error:
            if re.search(GPU_FAULTS, str(error)):
                raise
            self._give_up(one_line(error)[:200])
        with torch.no_grad():
            for tensor, value in zip(self._tensors(), before, strict=True):
                tensor.copy_(value)
        for generator, seed in zip(generators, seeds, strict=True):
            generator.set_state(seed)
        step(batch)
        if by_graph and all(map(torch.equal, self._tensors(), by_graph)):
            self.graphs[self.kind] = graph, list(static.values())
            self.eager_steps = 0
        elif by_graph:
            self._give_up("its first step ended with other bits")

    def _tensors(self) -> list[Tensor]:
        """Return all that a step changes on the device, but for random numbers."""
        parts = [self.run.model, *self.run.keep.values()]
        states = self.run.optimizer.state.values()
        return [*(tensor for part in parts for tensor in (*part.parameters(), *part.buffers())),
                *(value for state in states for value in state.values() if torch.is_tensor(value)),
                self.run.state.sums]

    def _numbers(self) -> tuple:
        """Return the numbers and addresses that a graph would keep as they are now."""
        run = self.run
        parts = [*run.model.modules(), *run.keep.values(), run.augmentation]
        plain = [value for part in parts for value in getattr(part, "__dict__", {}).values()
                 if isinstance(value, (bool, int, float, str))]
        groups = [(name, str(value)) for group in run.optimizer.param_groups
                  for name, value in group.items() if name not in ("lr", "params")]
        tensors = [(tensor.data_ptr(), tensor.requires_grad)
                   for tensor in (*run.model.parameters(), *run.model.buffers())]
        return *plain, *groups, *tensors

    def _give_up(self, obstacle: str) -> None:
        self.obstacle = obstacle
        log.info(f"note       no CUDA graphs ({obstacle}): steps take longer")


def random_state() -> list[str]:
    """Return the states of the host's random numbers."""
    return [str(state()) for state in HOST_RANDOM]


def device_generator(device: torch.device) -> torch.Generator:
    """Return torch's own generator of a CUDA device."""
    return torch.cuda.default_generators[device.index or torch.cuda.current_device()]


def capture(step: Callable[[], None], pool: Any,  # noqa: ANN401
            generators: list[torch.Generator]) -> torch.cuda.CUDAGraph:
    """Return a graph of what `step` does on the current stream; nothing of it happens yet."""
    graph = torch.cuda.CUDAGraph()
    GRAPHS.append(graph)  # also a failed one, to which torch 2.10 still points
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, pool, torch.cuda.current_stream(), "thread_local"):
        step()
    return graph


@contextlib.contextmanager
def waits() -> Iterator[list]:
    """Yield a list, which after the block holds torch's warnings of waits for the GPU in it."""
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # which itself warns that it misses some
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [warning for warning in caught if "synchronizing CUDA" in str(warning.message)]
