"""Training of one contestant: steps are counted in gradients, and clocks stop during evaluations."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .contestants import Contestant
from .problems import Problem

__all__ = ["Record", "Trainer", "state_bytes", "train"]

EVALUATIONS, SETTLING = 20, 20
"""Evaluations after the first; mini-batches from which the statistics of averaged parameters come."""


@dataclass
class Record:
    """The record of a run; lists have an entry for each evaluation.

    Attributes
    ----------
    steps : list of int
        Gradients taken so far.
    train, test : list of float
        Losses; null in the file if they are not finite.
    seconds, cpu_seconds, optimizer_seconds : list of float
        Time so far, without evaluations: wall-clock time, CPU time, and wall-clock time within the
        optimizer's own code.
    calls : int
        Calls of `step`; methods with a closure take several gradients in each.
    parameters, state_bytes : int
        Numbers that were trained, and memory that the optimizer held after the run.
    stopped : str or None
        Why the run ended early.
    """

    steps: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    calls: int = 0
    parameters: int = 0
    state_bytes: int = 0
    stopped: str | None = None

    @property
    def diverged(self) -> bool:
        """Whether the run ended early, or with a higher training loss than it began with."""
        return self.stopped is not None or not self.train[-1] <= self.train[0]

    @property
    def final(self) -> float:
        """Training loss at the end; infinite if the run diverged."""
        return math.inf if self.diverged else self.train[-1]

    @property
    def final_test(self) -> float:
        """Test loss at the end; infinite if the run diverged."""
        return math.inf if self.diverged else self.test[-1]


class _Clock:
    """Seconds spent so far: wall-clock, CPU, optimizer."""

    def __init__(self) -> None:
        self.total = self.cpu = self.optimizer = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.total += time.perf_counter() - self._start[0]
        self.cpu += time.process_time() - self._start[1]


class Trainer:
    """Steps of a contestant on a problem, counted in gradients.

    Parameters
    ----------
    problem : Problem
    contestant : Contestant
    lr : float
        Learning rate at the start of the cosine schedule.
    steps : int
        Gradients until the schedule is at zero.
    """

    def __init__(self, problem: Problem, contestant: Contestant, lr: float, steps: int) -> None:
        self.problem, self.steps, self.lr = problem, steps, lr
        self.optimizers = contestant.optimizers(problem.model, lr)
        self.needs_closure, self.constant = contestant.needs_closure, contestant.constant
        self.spent = self.calls = 0
        self.averaging = [optimizer for optimizer in self.optimizers if hasattr(optimizer, "eval")]
        for optimizer in self.averaging:
            optimizer.train()
        self.clock = _Clock()

    def step(self) -> None:
        """One call of the optimizers' `step`."""
        with self.clock:
            if not self.constant:
                self._schedule()
            if self.needs_closure:
                self._search()
            else:
                self._gradient()
                start = time.perf_counter()
                for optimizer in self.optimizers:
                    optimizer.step()
                self.clock.optimizer += time.perf_counter() - start
        self.calls += 1

    def _schedule(self) -> None:
        """A cosine from the learning rate to zero."""
        lr = 0.5 * self.lr * (1 + math.cos(math.pi * min(self.spent / self.steps, 1.0)))
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = lr

    def evaluate(self) -> tuple[float, float]:
        """Training and test loss, of the averaged parameters where the optimizer has such."""
        for optimizer in self.averaging:
            optimizer.eval()
        if self.averaging:
            _settle(self.problem)
        losses = self.problem.evaluate()
        for optimizer in self.averaging:
            optimizer.train()
        return losses

    def _gradient(self) -> Tensor:
        self.problem.model.zero_grad()
        loss = self.problem.loss(self.calls)
        loss.backward()
        self.spent += 1
        return loss

    def _search(self) -> None:
        """A step in which the optimizer may evaluate the loss of one mini-batch as often as it likes."""
        within = 0.0

        def closure(backward: bool = True) -> Tensor:
            nonlocal within
            start = time.perf_counter()
            if backward:
                loss = self._gradient()
            else:
                loss = self.problem.loss(self.calls)
                self.spent += 1
            within += time.perf_counter() - start
            return loss

        start = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.step(closure)
        self.clock.optimizer += time.perf_counter() - start - within


@torch.no_grad()
def _settle(problem: Problem) -> None:
    """Give batch normalisation the statistics of the parameters that are evaluated."""
    norms = [module for module in problem.model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    for step in range(SETTLING if norms else 0):
        problem.loss(step)


def train(problem: Problem, contestant: Contestant, lr: float, steps: int) -> Record:
    """Train until `steps` gradients are taken or the loss is not finite.

    A method that evaluates the loss itself ends the call of `step` that it is in, and so may take a few more.
    """
    trainer = Trainer(problem, contestant, lr, steps)
    record = Record(parameters=sum(p.numel() for p in problem.model.parameters() if p.requires_grad))
    marks = sorted({round(steps * k / EVALUATIONS) for k in range(EVALUATIONS + 1)})
    while marks and record.stopped is None:
        if trainer.spent >= marks[0]:
            _evaluate(record, trainer)
            marks = [mark for mark in marks if mark > trainer.spent]
            continue
        spent = trainer.spent
        try:
            trainer.step()
        except (RuntimeError, ValueError) as error:  # raised if factors of a matrix are not finite
            record.stopped = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            if trainer.spent == spent:
                record.stopped = "a step took no gradient"
    record.calls = trainer.calls
    record.state_bytes = sum(state_bytes(optimizer) for optimizer in trainer.optimizers)
    return record


def _evaluate(record: Record, trainer: Trainer) -> None:
    losses = trainer.evaluate()
    record.steps.append(trainer.spent)
    record.train.append(losses[0])
    record.test.append(losses[1])
    record.seconds.append(trainer.clock.total)
    record.cpu_seconds.append(trainer.clock.cpu)
    record.optimizer_seconds.append(trainer.clock.optimizer)
    if not math.isfinite(losses[0]):
        record.stopped = "the training loss is not finite"


def state_bytes(optimizer: Optimizer) -> int:
    """Memory of all tensors that the optimizer holds, except parameters and gradients.

    Notes
    -----
    Memory that several tensors share counts once. Attributes are followed too, since some optimizers keep
    more than `state`.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    grads = [param.grad for param in params if param.grad is not None]
    left_out = {tensor.untyped_storage().data_ptr() for tensor in (*params, *grads)}
    sizes: dict[int, int] = {}
    for tensor in _tensors(vars(optimizer)):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _tensors(root: Any) -> Iterator[Tensor]:
    """The tensors that can be reached through containers and attributes."""
    todo, seen = [root], set()
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (str, bytes, type, ModuleType, nn.Module)):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset, deque)):
            todo.extend(item)
        elif hasattr(item, "__dict__") and not callable(item):
            todo.append(vars(item))
