"""Optimizers in the place of torch's, in all that torch says of those, by their for-loops."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fastfreeze
from tests.optim.conformance import (
    CONSTRUCTION_ERROR,
    DTYPES,
    TORCHS,
    assert_same,
    every_input,
    every_pair,
    every_scheduler,
    follow,
    parameters,
    params_of,
    run,
    set_gradients,
    tensors_of,
)


@every_input
def test_a_training_is_torchs(pair, kwargs):
    """Over dtypes and shapes; gradients are missing or zero, and a group comes late."""
    optimizers = []
    for make, flags in ((pair.ours, {}), (pair.theirs, {"foreach": False})):
        wide = [p for dtype in DTYPES if dtype != torch.float16 for p in parameters(dtype)]
        # Of fp16 with a small eps torch's for-loop would divide by 0.
        eps = {} if pair.ours is fastfreeze.SGD else {"eps": 0.1}
        half = {"params": parameters(torch.float16), "lr": 0.05, "weight_decay": 0.3, **eps}
        optimizers.append(make([{"params": wide}, half], **copy.deepcopy(kwargs), **flags))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optimizer in optimizers:
            optimizer.step()  # without gradients nothing happens
        assert not optimizers[0].state
        assert_same(*optimizers)
        for step in range(9):
            for optimizer in optimizers:
                if step == 3:
                    late = {"params": parameters(seed=1), "weight_decay": 0.2}
                    optimizer.add_param_group(late)
                params = params_of(optimizer)
                set_gradients(params, step)
                for p in params[step % 3 :: 3]:
                    p.grad = None
                if step == 6:
                    optimizer.zero_grad(set_to_none=False)
                before = [p._version for p in params]
                optimizer.step()
                # Of writes and of nothing else: what is made from a frozen weight stays good.
                written = [p._version > b for p, b in zip(params, before, strict=True) if p.numel()]
                assert written == [p.grad is not None for p in params if p.numel()]
            assert_same(*optimizers)
            if step % 3 == 2:
                follow(*optimizers)
    ours, theirs = (optimizer.state_dict() for optimizer in optimizers)
    assert ours.keys() == theirs.keys()
    for mine, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert set(mine) == {*other, "step"}
        assert mine["params"] == other["params"]
    assert {i: set(kept) for i, kept in ours["state"].items()} == {
        i: set(kept) for i, kept in theirs["state"].items()
    }


@every_scheduler
def test_schedulers_set_what_they_set_for_torch(pair, kwargs, schedulers):
    found = []
    for make in (pair.ours, pair.theirs):
        optimizer = make(parameters(), **copy.deepcopy(kwargs))
        followed = [scheduler(optimizer) for scheduler in schedulers]
        lrs = []
        for step in range(12):
            run(optimizer, 1, start=step)
            for scheduler in followed:
                scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
            lrs.append(float(optimizer.param_groups[0]["lr"]))
        found.append((optimizer, lrs))
    (ours, our_lrs), (theirs, their_lrs) = found
    assert our_lrs == their_lrs
    assert_same(ours, theirs)


@every_pair
def test_what_torch_refuses_is_refused(pair):
    """By the same type of error; of what torch's own base class raises, by the same words."""
    words = {
        "Tensor lr must be 1-element": "Tensor lr must have one element",
        "Invalid momentum value: -0.5": "momentum must be >= 0, got -0.5",
        "Invalid weight_decay value: -1": "weight_decay must be >= 0, got -1",
        "Invalid beta parameter at index 0: 1.0": r"betas\[0\] must be >= 0 and < 1, got 1.0",
    }
    for entry in pair.info.optim_error_inputs_func("cpu", torch.float32):
        given, kwargs = entry.optimizer_error_input.params, entry.optimizer_error_input.kwargs
        params = [Parameter(torch.randn(1))] if given is None else given
        assert entry.error_on is CONSTRUCTION_ERROR
        told = pytest.warns if issubclass(entry.error_type, Warning) else pytest.raises
        with told(entry.error_type, match=words.get(entry.error_regex, entry.error_regex)):
            pair.ours(params, **kwargs)
    for params, error, match in [
        ([], ValueError, "empty parameter list"),
        (torch.randn(3), TypeError, "iterable of Tensors or dicts"),
        ([1.0], TypeError, "optimizer can only optimize Tensors"),
        ([torch.randn(3, requires_grad=True) * 2], ValueError, "non-leaf Tensor"),
        ([{"params": {Parameter(torch.randn(1))}}], TypeError, "ordered collections"),
    ]:
        for make in (pair.ours, pair.theirs):
            with pytest.raises(error, match=match):
                make(params, lr=0.1)
    for flags in ({"foreach": True, "fused": True}, {"differentiable": True}):
        with pytest.raises((RuntimeError, ValueError), match="|".join(flags)):
            pair.ours(parameters(), lr=0.1, **flags)
    optimizer = pair.ours(parameters())
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": params_of(optimizer)[:1]})
    assert len(optimizer.param_groups) == 1


@every_pair
def test_arguments_defaults_and_text_are_torchs(pair):
    """Each of torch's arguments is one of ours: in the same place, with the same default."""
    ours, theirs = (inspect.signature(c).parameters for c in (pair.ours, pair.theirs))
    for name, parameter in theirs.items():
        assert name in ours
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default)
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional
    ours, theirs = (make([Parameter(torch.zeros(2))]) for make in (pair.ours, pair.theirs))
    assert ours.defaults == theirs.defaults
    assert repr(ours) == repr(theirs)
    model = nn.Linear(3, 2)
    params = list(model.parameters())
    for given in (model.parameters(), tuple(params), model.named_parameters()):
        assert params_of(pair.ours(given)) == params


@every_pair
def test_hooks_of_steps(pair):
    optimizer = pair.ours(parameters(), **pair.keeping)
    called = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: called.append("all, pre")),
        optimizer.register_step_pre_hook(lambda o, a, k: called.append("pre")),
        optimizer.register_step_post_hook(lambda o, a, k: called.append("post")),
        register_optimizer_step_post_hook(lambda o, a, k: called.append("all, post")),
    ]
    run(optimizer, 1)
    assert called == ["all, pre", "pre", "post", "all, post"]
    for handle in handles:
        handle.remove()
    run(optimizer, 1)
    assert len(called) == 4
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7.0), {}))
    assert optimizer.step() == 7.0  # they may change the arguments


@every_pair
def test_closures_run_with_autograd_on(pair):
    p = Parameter(torch.ones(3))
    optimizer = pair.ours([p], **pair.keeping)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3.0
        assert not torch.is_grad_enabled()
    assert (p < 1).all()


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_sparse_gradients(momentum):
    kwargs = {**TORCHS.metadata_for_sparse[0], "momentum": momentum}
    found = []
    for make in (fastfreeze.SGD, torch.optim.SGD):
        p = parameters(shapes=[(10, 4)])[0]
        optimizer = make([p], **kwargs)
        followed = [scheduler(optimizer) for scheduler in TORCHS.metadata_for_sparse[1]]
        for step in range(4):
            dense = torch.zeros(10, 4)
            generator = torch.Generator().manual_seed(step)
            dense[[step, step + 3]] = torch.randn(2, 4, generator=generator)
            p.grad = dense.to_sparse(1)
            optimizer.step()
            for scheduler in followed:
                scheduler.step()
        found.append(optimizer)
    assert_same(*found)


@every_pair
def test_a_tensor_lr_is_the_number_and_stays(pair):
    tensor = torch.tensor(0.02)
    ours = run(pair.ours(parameters(), **{**pair.keeping, "lr": tensor}), 4)
    assert_same(ours, run(pair.ours(parameters(), **{**pair.keeping, "lr": tensor.item()}), 4))
    assert ours.param_groups[0]["lr"] is tensor
    assert tensor.item() == torch.tensor(0.02).item()
    tensor.fill_(0)
    before = [p.clone() for p in tensors_of(ours)["itself"]]
    assert all(map(torch.equal, tensors_of(run(ours, 1, start=4))["itself"], before))


@every_pair
def test_the_profiler_sees_a_step(pair):
    optimizer = pair.ours(parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(optimizer, 1)
    names = {event.key for event in profile.key_averages()}
    assert f"Optimizer.step#{pair.ours.__name__}.step" in names


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    count = 2**31 + 33
    memory = Path("/proc/meminfo")
    known = re.search(r"MemAvailable:\s+(\d+)", memory.read_text()) if memory.exists() else None
    if known is None or int(known[1]) * 1024 < 12e9:
        pytest.skip("needs 12 GB of memory")
    p = Parameter(torch.zeros(count, dtype=torch.bfloat16))
    p.grad = torch.ones(count, dtype=torch.bfloat16)
    fastfreeze.SGD([p], lr=0.5).step()
    assert all((part == -0.5).all() for part in p.detach().split(2**26))
