"""SGD beside torch's for-loop through random sequences of steps and edits.

``HYPOTHESIS_MAX_EXAMPLES=20000 pytest tests/optim/test_optim_stateful.py`` runs as many sequences.
"""

from __future__ import annotations

import copy
import os
import threading

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from torch import nn

from fastfreeze.optim import SGD

SHAPES = {
    "number": lambda make: make(()),
    "empty": lambda make: make((0, 3)),
    "vector": lambda make: make((37,)),
    "matrix": lambda make: make((5, 7)),
    "like the matrix": lambda make: make((5, 7)),
    "transposed": lambda make: make((7, 5)).t(),
    "images": lambda make: make((3, 4, 5, 5)).to(memory_format=torch.channels_last),
    "with gaps": lambda make: make((20,))[::2],
    "for two threads": lambda make: make((33_000,)),
}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
HYPERS = {
    "lr": [0.0, 0.1, 0.5],
    "momentum": [0.0, 0.5, 0.9],
    "dampening": [0.0, 0.5],
    "weight_decay": [0.0, 0.1],
    "maximize": [False, True],
}


def tensor_maker(seed, dtype):
    generator = torch.Generator("cpu").manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, dtype=dtype, device="cpu")


def other_of_same_kind(params, p):
    """Another parameter's memory in the place of a gradient."""
    others = [q for q in params if q is not p and q.shape == p.shape and q.dtype == p.dtype]
    return (others or [p])[-1].detach()


def negated(x):
    if x.dtype not in (torch.float32, torch.float64):
        return torch._neg_view(x)
    return torch.complex(torch.zeros_like(x), x).conj().imag


GRADS = {
    "none": lambda x, p, side: None,
    "dense": lambda x, p, side: x,
    "in the parameter's layout": lambda x, p, side: torch.empty_like(p).copy_(x),
    "negated": lambda x, p, side: negated(x),
    "conjugated": lambda x, p, side: x.conj(),
    "one number": lambda x, p, side: x.flatten()[:1].sum().expand(p.shape),
    "zeros by a flag": lambda x, p, side: torch._efficientzerotensor(p.shape, dtype=p.dtype),
    "a parameter": lambda x, p, side: other_of_same_kind(side.params, p),
    "momentum": lambda x, p, side: side.buffer(p, x),
    "anothers": lambda x, p, side: side.gradient_of_another(p, x),
}
BUFFERS = {
    "doubled": lambda b: b.mul_(2),
    "copied": lambda b: b.clone(),
    "negated": torch._neg_view,
    "wider": lambda b: b.to(torch.promote_types(b.dtype, torch.float32)),
    "narrower": lambda b: b if b.is_complex() else b.to(torch.bfloat16),
    "none": lambda b: None,
}
DATA = {
    "copied": torch.clone,
    "transposed": lambda d: d.t().contiguous().t() if d.ndim == 2 else d,
    "gone and back": lambda d: d.double().to(d.dtype) if not d.is_complex() else d,
}


class Side:
    """An optimizer and its parameters; the other side has the same in memory of its own."""

    def __init__(self, make):
        self.make, self.params, self.optimizer = make, [], None

    def add(self, shape, dtype, seed, alias, hyper):
        like = [p for p in self.params if p.dtype == dtype]
        if alias == "shared" and like:
            data = like[-1].data
        elif alias == "part" and like and like[-1].ndim and len(like[-1]):
            data = like[-1].data[: len(like[-1]) // 2 + 1]
        else:
            data = SHAPES[shape](tensor_maker(seed, dtype))
        self.params.append(nn.Parameter(data))
        group = {"params": [self.params[-1]], **hyper}
        if self.optimizer is None:
            self.optimizer = self.make([group])
        else:
            self.optimizer.add_param_group(group)

    def give_gradients(self, kinds, seed):
        for i, (p, kind) in enumerate(zip(self.params, kinds, strict=False)):
            p.grad = None
            p.grad = GRADS[kind](tensor_maker(seed + i, p.dtype)(p.shape), p, self)

    def buffer(self, p, default):
        buffers = [self.optimizer.state.get(q, {}).get("momentum_buffer") for q in self.params]
        fit = [b for b in buffers if b is not None and (b.shape, b.dtype) == (p.shape, p.dtype)]
        return fit[-1].detach() if fit else default

    def gradient_of_another(self, p, default):
        grads = [q.grad for q in self.params if q is not p and q.grad is not None]
        fit = [g for g in grads if (g.shape, g.dtype) == (p.shape, p.dtype)]
        return fit[0] if fit else default

    def edit_buffer(self, i, change):
        state = self.optimizer.state.get(self.params[i], {})
        if state.get("momentum_buffer") is not None:
            state["momentum_buffer"] = BUFFERS[change](state["momentum_buffer"])

    def replace(self, i, seed):
        p = self.params[i]
        new = nn.Parameter(tensor_maker(seed, p.dtype)(p.shape))
        group = next(g for g in self.optimizer.param_groups if any(q is p for q in g["params"]))
        group["params"] = [new if q is p else q for q in group["params"]]
        self.optimizer.state.pop(p, None)  # torch cannot save it without its parameter
        self.params[i] = new

    def reload(self, state):
        groups = [{"params": g["params"]} for g in self.optimizer.param_groups]
        self.optimizer = self.make(groups)
        self.optimizer.load_state_dict(copy.deepcopy(state))

    def clone(self):
        self.params, self.optimizer = copy.deepcopy((self.params, self.optimizer))


indices = st.integers(0, 7)
seeds = st.integers(0, 10_000)


class BesideTorch(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.ours = Side(lambda groups: SGD(groups, lr=0.1))
        self.theirs = Side(lambda groups: torch.optim.SGD(groups, lr=0.1, foreach=False))
        self.both(lambda s: s.add("matrix", torch.float32, 0, "own", {"momentum": 0.9}))

    def both(self, act):
        act(self.ours)
        act(self.theirs)
        self.compare()

    def compare(self):
        for p, q in zip(self.ours.params, self.theirs.params, strict=True):
            assert_same(p.data, q.data, p.dtype)
            own, other = (s.optimizer.state.get(x, {}).get("momentum_buffer")
                          for s, x in ((self.ours, p), (self.theirs, q)))  # fmt: skip
            assert (own is None) == (other is None)
            if own is not None:
                assert_same(own, other, p.dtype)

    @rule(
        shape=st.sampled_from(list(SHAPES)),
        dtype=st.sampled_from(DTYPES),
        seed=seeds,
        alias=st.sampled_from(["own", "own", "shared", "part"]),
        hyper=st.fixed_dictionaries({k: st.sampled_from(v) for k, v in HYPERS.items()}),
    )
    def add_group(self, shape, dtype, seed, alias, hyper):
        if len(self.ours.params) < 6:
            self.both(lambda s: s.add(shape, dtype, seed, alias, hyper))

    @rule(
        kinds=st.lists(st.sampled_from(list(GRADS)), min_size=1, max_size=6),
        seed=seeds,
        how=st.sampled_from(["plain", "plain", "thread", "meta", "closure"]),
    )
    def step(self, kinds, seed, how):
        self.both(lambda s: s.give_gradients(kinds, seed))
        self.both(lambda s: STEPS[how](s.optimizer))

    @rule(i=indices, name=st.sampled_from(list(HYPERS)), at=st.integers(0, 2))
    def change_hyper(self, i, name, at):
        def act(s):
            groups = s.optimizer.param_groups
            groups[i % len(groups)][name] = HYPERS[name][at % len(HYPERS[name])]

        self.both(act)

    @rule(i=indices, change=st.sampled_from(list(BUFFERS)))
    def change_buffer(self, i, change):
        self.both(lambda s: s.edit_buffer(i % len(s.params), change))

    @rule(i=indices, change=st.sampled_from(list(DATA)))
    def change_data(self, i, change):
        def act(s):
            p = s.params[i % len(s.params)]
            p.data = DATA[change](p.data)

        self.both(act)

    @rule(dtype=st.sampled_from(DTYPES[:4]))
    def change_dtype(self, dtype):
        def act(s):
            for p in s.params:
                if not p.is_complex():
                    p.grad, p.data = None, p.data.to(dtype)

        self.both(act)

    @rule(i=indices, seed=seeds)
    def replace_parameter(self, i, seed):
        self.both(lambda s: s.replace(i % len(s.params), seed))

    @rule(i=indices)
    def forget_state(self, i):
        self.both(lambda s: s.optimizer.state.pop(s.params[i % len(s.params)], None))

    @rule(i=indices, on=st.booleans())
    def require_grad(self, i, on):
        self.both(lambda s: s.params[i % len(s.params)].requires_grad_(on))

    @rule(how=st.sampled_from(["own", "torch's", "clone"]))
    def checkpoint(self, how):
        if how == "clone":
            self.both(lambda s: s.clone())
            return
        state = self.theirs.optimizer.state_dict() if how == "torch's" else None
        self.both(lambda s: s.reload(state or s.optimizer.state_dict()))


def in_a_thread(optimizer):
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    thread.join()


def under_meta(optimizer):
    with torch.device("meta"):
        optimizer.step()


STEPS = {
    "plain": lambda optimizer: optimizer.step(),
    "closure": lambda optimizer: optimizer.step(lambda: 0.0),
    "thread": in_a_thread,
    "meta": under_meta,
}


def assert_same(own, other, dtype):
    """Equal but for the rounding of one step, which is then taken over.

    torch's for-loop itself rounds once or twice, as a gradient's strides are.
    """
    assert own.dtype == other.dtype
    eps = max(torch.finfo(own.dtype).eps, torch.finfo(dtype).eps)
    size = max(1.0, other.abs().nan_to_num(0, 0, 0).max().item()) if other.numel() else 1.0
    torch.testing.assert_close(own, other, rtol=4 * eps, atol=4 * eps * size, equal_nan=True)
    own.copy_(other)


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def test_random_sequences():
    run_state_machine_as_test(
        BesideTorch,
        settings=settings(
            max_examples=int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", "100")),
            stateful_step_count=15,
            deadline=None,
            derandomize="HYPOTHESIS_MAX_EXAMPLES" not in os.environ,
            suppress_health_check=list(HealthCheck),
        ),
    )
