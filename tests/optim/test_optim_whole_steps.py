"""A step is there as a whole or not at all: for other threads, after Ctrl-C, in a handler."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

import fastfreeze
from fastfreeze.optim import SGD
from fastfreeze.optim._signals import SignalsDeferred
from fastfreeze.schedule import Cosine, FreezeOut
from tests.conftest import needs_cpu_kernels

PACKAGE = str(Path(fastfreeze.__file__).parent)
BACKENDS = [pytest.param("cpu", marks=needs_cpu_kernels), "reference"]


@pytest.fixture(autouse=True)
def _handlers():
    """Ctrl-C interrupts, as in a terminal; afterwards each handler is again what it was."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = list(map(signal.getsignal, numbers))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


class Run:
    """Three layers under a schedule that freezes them; their gradients are of the step."""

    def __init__(self, backend, schedule=None):
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(3)) for _ in range(3)]
        groups = [
            {"params": [p], "layer_index": i, "num_layers": 3} for i, p in enumerate(self.params)
        ]
        self.optimizer = SGD(groups, lr=0.1, momentum=0.9, schedule=schedule, backend=backend)

    def give_gradients(self):
        generator = torch.Generator().manual_seed(self.optimizer.current_step)
        for p in self.params:
            grad = torch.randn(3, generator=generator)
            p.grad = grad if p.requires_grad else None

    def step(self):
        self.give_gradients()
        self.optimizer.step()

    def everything(self):
        state = self.optimizer.state_dict()
        weights = [p.tolist() for p in self.params]
        buffers = {i: s["momentum_buffer"].tolist() for i, s in state["state"].items()}
        flags = [p.requires_grad for p in self.params]
        return weights, buffers, flags, state["param_groups"]


@contextmanager
def signals_at(number, at):
    """Sends a signal before those lines of the package for whose number ``at`` is true."""
    seen = count(1)

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and at(next(seen)):
            signal.raise_signal(number)
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def in_threads(*acts):
    """The errors of some acts, each in a thread of its own and so many times."""
    errors = []

    def run(act, times):
        try:
            for _ in range(times):
                act()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=act) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return errors


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a callback
@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_at_any_line_leaves_a_step_whole(backend):
    schedule = FreezeOut(600, t_0=0.3, scale_lr=False)
    interrupted, calm = Run(backend, schedule), Run(backend, schedule)
    interrupted.step()
    calm.step()
    whole = 0
    for line in range(1, 400):  # more than a step without a new plan has
        interrupted.give_gradients()
        before = interrupted.optimizer.current_step
        try:
            with signals_at(signal.SIGINT, line.__eq__):
                interrupted.optimizer.step()
        except KeyboardInterrupt:
            whole += interrupted.optimizer.current_step != before
        if interrupted.optimizer.current_step != before:
            calm.step()
        assert interrupted.everything() == calm.everything(), line
    assert whole > 10
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_deferred_signals_come_in_order_once_and_leave_their_handlers():
    came = []
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    for number in numbers:
        signal.signal(number, lambda number, _: came.append(number))
    mine = list(map(signal.getsignal, numbers))
    with SignalsDeferred():
        for number in reversed(numbers):
            signal.raise_signal(number)
        with SignalsDeferred():
            signal.raise_signal(numbers[0])
        assert came == []
    assert came == [numbers[1], numbers[0], numbers[0]]
    with pytest.raises(KeyError), SignalsDeferred():  # an error of the stretch itself
        raise KeyError
    with pytest.raises(KeyboardInterrupt), SignalsDeferred():  # a handler's error
        [signal.raise_signal(number) for number in (signal.SIGINT, numbers[1])]
    assert came[3:] == [numbers[1]]
    assert list(map(signal.getsignal, numbers)) == mine


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_step_one_after_the_other(backend):
    params = [nn.Parameter(torch.zeros(500)) for _ in range(20)]
    theirs = [nn.Parameter(torch.zeros(500)) for _ in range(20)]
    optimizer = SGD(params, lr=1.0, momentum=0.5, backend=backend)
    expected = torch.optim.SGD(theirs, lr=1.0, momentum=0.5, foreach=False)
    for p in params + theirs:
        p.grad = torch.ones(500)

    def look():
        state = optimizer.state_dict()
        assert len(state["state"]) == (0 if state["param_groups"][0]["step"] == 0 else 20)

    looks = (look, 25), (lambda: copy.deepcopy(optimizer), 3)
    assert in_threads(*[(optimizer.step, 25)] * 4, *looks) == []
    assert optimizer.current_step == 100
    for _ in range(100):
        expected.step()
    for p, q in zip(params, theirs, strict=True):
        assert torch.equal(p, q)


def test_a_forked_child_needs_no_thread_of_its_parents():
    run = Run("reference", Cosine(20))
    held, done = threading.Event(), threading.Event()

    def hold():
        with run.optimizer._lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        run.optimizer.state_dict()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    done.set()
    thread.join()
    assert status == 0


def test_a_load_keeps_other_threads_out():
    run, seen = Run("reference", Cosine(20)), []
    state = Run("reference", Cosine(20)).optimizer.state_dict()

    def step_elsewhere(_):
        thread = threading.Thread(target=lambda: seen.append(run.optimizer.state_dict()))
        thread.start()
        thread.join(0.2)
        assert seen == []
        threads.append(thread)

    threads = []
    run.optimizer.register_load_state_dict_post_hook(step_elsewhere)
    run.optimizer.load_state_dict(state)
    threads[0].join(60)
    assert len(seen) == 1


def test_a_handler_finds_a_whole_step():
    """As one that saves a checkpoint when the cluster warns it does."""
    run, found = Run("reference", Cosine(50)), []
    signal.signal(signal.SIGTERM, lambda *_: found.append(run.everything()))
    run.step()
    old = copy.deepcopy(run.everything())
    run.give_gradients()
    with signals_at(signal.SIGTERM, bool):  # at each
        run.optimizer.step()
    assert found
    assert {str(f) for f in found} <= {str(old), str(run.everything())}


def test_threads_share_the_last_step():
    run = Run("reference", Cosine(20))
    run.give_gradients()
    errors = in_threads(*[(run.optimizer.step, 10)] * 3)
    assert run.optimizer.current_step == 20
    assert all("total_steps=20" in str(error) for error in errors)
    assert errors  # of those who came for one of the ten steps that were too many
