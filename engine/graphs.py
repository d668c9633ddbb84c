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
# No graph is ever freed, for that would free memory that others use: pytorch/pytorch#193402.
GRAPHS: list[torch.cuda.CUDAGraph] = []


@dataclasses.dataclass
class Graph:
    """A captured step, and the memory from which it takes what is drawn for a batch."""

    captured: torch.cuda.CUDAGraph
    drawn: dict[str, Tensor]
    checks: int = 0  # how often it ended with the bits of an eager step
    epoch: int = -1  # in which it last did

    def replay(self, batch: Batch) -> None:
        """Take a step on a batch."""
        torch._foreach_copy_(list(self.drawn.values()), list(batch.drawn.values()))
        self.captured.replay()


class Graphs:
    """Takes the steps of a run, with one graph for each kind of batch, or else eagerly.

    The first steps of a kind are eager: they load libraries and make the momentum. Then a step is
    captured. That step, the next one, and the first one of each epoch are taken twice from the same
    state, by the graph and eagerly. A graph whose bits differ in the first two is refused, and all
    later steps are eager; one that differs later, because something was changed, is captured anew.
    No result of a graph outlives its step, so all graphs share their memory.
    """

    def __init__(self, run: Run):
        self.run, self.obstacle = run, ""
        self.by_kind: dict[tuple, Graph] = {}
        self.kind, self.in_a_row = None, 0  # of the last batch, and how many of it in a row
        self.eager_steps = 0  # since a graph last ended with the right bits
        self.pool = None  # the memory of all graphs
        others = [name for name, part in run.keep.items() if not isinstance(part, nn.Module)]
        if not hasattr(run.optimizer, "rates"):
            self._give_up(f"{type(run.optimizer).__name__} has its rates on the host")
        elif others:
            self._give_up(f"{', '.join(others)} in keep is no nn.Module")
        elif {tensor.device.type for tensor in self._tensors()} != {run.runtime.device.type}:
            self._give_up("not all that the run keeps lies on the GPU")
        else:
            run.optimizer.put_rates_on(run.runtime.device)

    def take(self, step: Callable[[Iterable], None], batch: Iterable) -> None:
        """Take a step on a batch; `step(batch)` does so eagerly."""
        if not self.obstacle and not isinstance(batch, Batch):
            self._give_up("the batches are not those of data.py")
        if self.obstacle:
            return step(batch)
        self.run.optimizer.set_rates()
        kind = self._kind_of(batch)
        self.in_a_row = self.in_a_row + 1 if kind == self.kind else 1
        self.kind = kind
        graph, epoch = self.by_kind.get(kind), self.run.state.position.epoch
        if graph and graph.checks > 1 and graph.epoch == epoch:
            graph.replay(batch)
        else:
            self._take_slowly(graph, step, batch)

    def _take_slowly(self, graph: Graph | None, step: Callable, batch: Batch) -> None:
        clock = self.run.clock
        # Slow steps at the beginning of an epoch do not count for its speed.
        if len(clock.steps) <= clock.slow:
            clock.slow = len(clock.steps) + 1
        self.eager_steps += 1
        if graph:
            self._compare(graph, step, batch)
        elif self.in_a_row > EAGER_STEPS:
            self._capture(step, batch)
        elif self.in_a_row == EAGER_STEPS:
            self._watch(step, batch)
        else:
            step(batch)
        if self.eager_steps == PATIENCE and not self.obstacle:
            self._give_up(f"in {PATIENCE} steps no {EAGER_STEPS + 1} in a row were alike")

    def _watch(self, step: Callable, batch: Batch) -> None:
        """Take an eager step, and look for what a graph of it would not repeat."""
        before, self.run.step_was_read = self._numbers(), False
        with waits() as found:
            step(batch)
        if found:
            self._give_up("a step waits for the device")
        elif self._numbers() != before:
            self._give_up("a step changes numbers, or draws random ones, on the host")
        elif self.run.step_was_read:
            self._give_up("a step reads run.step")

    def _capture(self, step: Callable, batch: Batch) -> None:
        drawn = {name: values.clone() for name, values in batch.drawn.items()}
        static, own = dataclasses.replace(batch, drawn=drawn), self._generators()[1:]
        try:
            captured = capture(lambda: step(static), self.pool, own)
        except RuntimeError as error:
            if re.search(GPU_FAULTS, str(error)):
                raise
            self._give_up(one_line(error)[:200])
            return step(batch)
        self.pool = captured.pool()
        self._compare(Graph(captured, drawn), step, batch)

    def _compare(self, graph: Graph, step: Callable, batch: Batch) -> None:
        """Take a step by a graph and then eagerly, from the same state; compare the bits."""
        before = [tensor.detach().clone() for tensor in self._tensors()]
        states = [generator.get_state() for generator in self._generators()]
        graph.replay(batch)
        by_graph = [tensor.detach().clone() for tensor in self._tensors()]
        with torch.no_grad():
            for tensor, value in zip(self._tensors(), before, strict=True):
                tensor.copy_(value)
        for generator, state in zip(self._generators(), states, strict=True):
            generator.set_state(state)
        step(batch)
        tensors = self._tensors()
        if len(tensors) == len(by_graph) and all(map(torch.equal, tensors, by_graph)):
            graph.checks, graph.epoch = graph.checks + 1, self.run.state.position.epoch
            self.by_kind[self.kind], self.eager_steps = graph, 0
        elif graph.checks > 1:
            del self.by_kind[self.kind]
            self.in_a_row = 1
        else:
            self._give_up("its first steps ended with other bits")

    def _generators(self) -> list[torch.Generator]:
        """Return torch's own generator of the device, and that of the user's augmentation."""
        own = [self.run.generator] if self.run.augmentation else []
        return [device_generator(self.run.runtime.device), *own]

    def _tensors(self) -> list[Tensor]:
        """Return all that a step changes on the device, but for random numbers."""
        parts = [self.run.model, *self.run.keep.values()]
        states = self.run.optimizer.state.values()
        return [*(tensor for part in parts for tensor in (*part.parameters(), *part.buffers())),
                *(value for state in states for value in state.values() if torch.is_tensor(value)),
                self.run.state.sums]

    def _kind_of(self, batch: Batch) -> tuple:
        """Return what a graph of a step on this batch holds: forms, numbers and addresses."""
        shapes = [(name, values.shape) for name, values in batch.drawn.items()]
        read = batch.batches.images, batch.batches.labels
        tensors = [(tensor.data_ptr(), tensor.requires_grad)
                   for tensor in (*read, *self._tensors())]
        return batch.size, batch.weight, *shapes, *tensors, *self._groups()

    def _groups(self) -> list[tuple]:
        return [(name, str(value)) for group in self.run.optimizer.param_groups
                for name, value in group.items() if name not in ("lr", "params")]

    def _numbers(self) -> list:
        """Return the numbers on the host that a step could change."""
        run = self.run
        modules = [module for part in (run.model, *run.keep.values()) for module in part.modules()]
        plain = [value for part in (*modules, run.optimizer, run.augmentation, run.args)
                 for value in getattr(part, "__dict__", {}).values()
                 if isinstance(value, (bool, int, float, str))]
        rates = [group["lr"] for group in run.optimizer.param_groups]
        return [*plain, *rates, *self._groups(), *(str(state()) for state in HOST_RANDOM)]

    def _give_up(self, obstacle: str) -> None:
        self.obstacle = obstacle
        log.info(f"note       no CUDA graphs ({obstacle}): steps take longer")


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
    """Yield a list that after the block holds torch's warnings of waits for the GPU."""
    found, mode = [], torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # which itself warns that it misses some
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    found += [warning for warning in caught if "synchronizing CUDA" in str(warning.message)]
