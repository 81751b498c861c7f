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
    every_configuration,
    every_error,
    every_input,
    every_pair,
    every_scheduler,
    follow,
    parameters,
    run,
    set_gradients,
    states,
    truth_of,
)


@every_configuration
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_for_loop(pair, kwargs, dtype):
    if dtype == torch.float16 and pair.ours is not fastfreeze.SGD:
        kwargs = {**kwargs, "eps": 0.1}  # torch's for-loop would divide by 0
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer = pair.ours(ours, **copy.deepcopy(kwargs))
    rival = pair.theirs(theirs, **truth_of(copy.deepcopy(kwargs)))
    for step in range(7):
        for params, o in ((ours, optimizer), (theirs, rival)):
            run(o, params, 1, start=step)
        assert_same(optimizer, rival, dtype)
        follow(optimizer, rival)


@every_scheduler
def test_goes_the_right_way(pair, kwargs, schedulers):
    weight = torch.randn(10, 5, 2)[..., 0]
    bias = torch.randn(10)
    weight, bias, x = Parameter(weight), Parameter(bias), torch.randn(5)
    optimizer = pair.ours([weight, bias], **copy.deepcopy(kwargs))
    followed = [make(optimizer) for make in schedulers]

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(10):
        loss = optimizer.step(closure)
        for scheduler in followed:
            scheduler.step(*([loss.detach()] if isinstance(scheduler, ReduceLROnPlateau) else []))
    last = closure().item()
    assert (last > first) if kwargs.get("maximize") else (last < first)


@every_scheduler
def test_schedulers_set_what_they_set_for_torch(pair, kwargs, schedulers):
    found = []
    for make in (pair.ours, pair.theirs):
        params = parameters()
        optimizer = make(params, **copy.deepcopy(kwargs))
        followed = [scheduler(optimizer) for scheduler in schedulers]
        lrs = []
        for step in range(12):
            run(optimizer, params, 1, start=step)
            for scheduler in followed:
                scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
            lrs.append(float(optimizer.param_groups[0]["lr"]))
        found.append((optimizer, lrs))
    (ours, our_lrs), (theirs, their_lrs) = found
    assert our_lrs == their_lrs
    assert_same(ours, theirs)


@every_configuration
def test_groups_with_values_of_their_own(pair, kwargs):
    def made(make, kwargs):
        a, b, c = parameters(shapes=[(5, 5), (33,), (7,)])
        groups = [
            {"params": [a]},
            {"params": [b], "lr": 0.05},
            {"params": [c], "weight_decay": 0.3},
        ]
        optimizer = make(groups, **copy.deepcopy(kwargs))
        run(optimizer, [a, b, c], 5)
        return optimizer

    assert_same(made(pair.ours, kwargs), made(pair.theirs, truth_of(kwargs)))


@every_configuration
def test_dtypes_in_one_group(pair, kwargs):
    def made(make, kwargs):
        params = [p for dtype in (torch.float64, torch.float32) for p in parameters(dtype)]
        optimizer = make(params, **copy.deepcopy(kwargs))
        run(optimizer, params, 5)
        return optimizer

    assert_same(made(pair.ours, kwargs), made(pair.theirs, truth_of(kwargs)))


@every_pair
@pytest.mark.parametrize(
    "layout", ["channels_last", "transposed", "sliced", "unaligned", "expanded grad"]
)
def test_strides(pair, layout):
    def laid_out(seed):
        x = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(seed))
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            return x.transpose(0, 3)
        if layout == "sliced":
            return x[1:, ::2]
        return x.flatten()[1:]

    def made(make, **flags):
        params = [Parameter(laid_out(0)), Parameter(laid_out(1))]
        optimizer = make(params, **pair.keeping, **flags)
        for step in range(4):
            set_gradients(params, step)
            if layout == "expanded grad":
                for p in params:
                    p.grad = p.grad.flatten()[:1].expand(p.shape)
            optimizer.step()
        return optimizer

    ours = made(pair.ours)
    assert_same(ours, made(pair.theirs, foreach=False))
    assert ours.param_groups[0]["params"][0].stride() == laid_out(0).stride()


@every_configuration
def test_without_gradients_nothing_happens(pair, kwargs):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = pair.ours(params, **copy.deepcopy(kwargs))
    for _ in range(3):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert states(optimizer) == [{}] * len(params)


@every_configuration
def test_zero_gradients_still_decay_and_coast(pair, kwargs):
    found = []
    for make, kw in ((pair.ours, kwargs), (pair.theirs, truth_of(kwargs))):
        params = parameters()
        optimizer = make(params, **copy.deepcopy(kw))
        run(optimizer, params, 3)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            optimizer.step()
        found.append(optimizer)
    assert_same(*found)


@every_configuration
def test_some_gradients_are_missing_or_empty(pair, kwargs):
    found = []
    for make, kw in ((pair.ours, kwargs), (pair.theirs, truth_of(kwargs))):
        params = parameters()
        optimizer = make(params, **copy.deepcopy(kw))
        for step in range(6):
            set_gradients(params, step)
            for i, p in enumerate(params):
                if (step + i) % 3 == 0:
                    p.grad = None
            optimizer.step()
        found.append(optimizer)
    assert_same(*found)


@every_error
def test_what_torch_refuses_is_refused(pair, entry):
    """By the same type of error; of what torch's own base class raises, by the same words."""
    given, kwargs = entry.optimizer_error_input.params, entry.optimizer_error_input.kwargs
    params = [Parameter(torch.randn(1))] if given is None else given
    words = {"Tensor lr must be 1-element": "Tensor lr must have one element"}
    words["Invalid momentum value: -0.5"] = "momentum must be >= 0, got -0.5"
    words["Invalid weight_decay value: -1"] = "weight_decay must be >= 0, got -1"
    words["Invalid beta parameter at index 0: 1.0"] = r"betas\[0\] must be >= 0 and < 1, got 1.0"
    match = words.get(entry.error_regex, entry.error_regex)
    assert entry.error_on is CONSTRUCTION_ERROR
    told = pytest.warns if issubclass(entry.error_type, Warning) else pytest.raises
    with told(entry.error_type, match=match):
        pair.ours(params, **kwargs)


@every_pair
@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ([], ValueError, "empty parameter list"),
        (torch.randn(3), TypeError, "iterable of Tensors or dicts"),
        ([1.0], TypeError, "optimizer can only optimize Tensors"),
        ([torch.randn(3, requires_grad=True) * 2], ValueError, "non-leaf Tensor"),
        ([{"params": {Parameter(torch.randn(1))}}], TypeError, "ordered collections"),
    ],
    ids=["empty", "a tensor", "a number", "not a leaf", "a set"],
)
def test_parameters_that_are_none(pair, params, error, match):
    for make in (pair.ours, pair.theirs):
        with pytest.raises(error, match=match):
            make(params, lr=0.1)


@every_pair
@pytest.mark.parametrize("kind", ["generator", "dict", "tuple", "names"])
def test_parameters_in_any_container(pair, kind):
    model = nn.Linear(3, 2)
    given = {
        "generator": model.parameters(),
        "dict": {"params": list(model.parameters())}["params"],
        "tuple": tuple(model.parameters()),
        "names": model.named_parameters(),
    }[kind]
    optimizer = pair.ours(given, lr=0.1)
    assert optimizer.param_groups[0]["params"] == list(model.parameters())


@every_pair
def test_the_signature_is_torchs(pair):
    """Each of its arguments is one of ours: in the same place, with the same default."""
    ours, theirs = (inspect.signature(c).parameters for c in (pair.ours, pair.theirs))
    for name, parameter in theirs.items():
        assert name in ours
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default)
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional


@every_pair
def test_defaults_and_text_are_torchs(pair):
    ours, theirs = (make([Parameter(torch.zeros(2))]) for make in (pair.ours, pair.theirs))
    assert ours.defaults == theirs.defaults
    assert repr(ours) == repr(theirs)


@every_pair
def test_hooks_of_steps(pair):
    params = parameters()
    optimizer = pair.ours(params, **pair.keeping)
    called = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: called.append("all, pre")),
        optimizer.register_step_pre_hook(lambda o, a, k: called.append("pre")),
        optimizer.register_step_post_hook(lambda o, a, k: called.append("post")),
        register_optimizer_step_post_hook(lambda o, a, k: called.append("all, post")),
    ]
    run(optimizer, params, 1)
    assert called == ["all, pre", "pre", "post", "all, post"]
    for handle in handles:
        handle.remove()
    run(optimizer, params, 1)
    assert len(called) == 4


@every_pair
def test_hooks_may_change_the_arguments(pair):
    optimizer = pair.ours([Parameter(torch.zeros(1))], lr=0.1)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7.0), {}))
    assert optimizer.step() == 7.0


@every_pair
def test_closures_run_with_autograd_on(pair):
    p = Parameter(torch.ones(3))
    optimizer = pair.ours([p], **pair.keeping)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3.0
        assert not torch.is_grad_enabled()


@every_configuration
def test_a_group_added_on_the_way(pair, kwargs):
    found = []
    for make, kw in ((pair.ours, kwargs), (pair.theirs, truth_of(kwargs))):
        first, second = parameters(), parameters(seed=1)
        optimizer = make(first, **copy.deepcopy(kw))
        run(optimizer, first, 3)
        optimizer.add_param_group({"params": second, "weight_decay": 0.2})
        run(optimizer, [*first, *second], 3, start=3)
        found.append(optimizer)
        with pytest.raises(ValueError, match="more than one parameter group"):
            optimizer.add_param_group({"params": first[:1]})
        assert len(optimizer.param_groups) == 2
    assert_same(*found)


@pytest.mark.parametrize(
    "schedulers", [[], TORCHS.metadata_for_sparse[1]], ids=["plain", "scheduled"]
)
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_sparse_gradients(schedulers, momentum):
    kwargs = {**TORCHS.metadata_for_sparse[0], "momentum": momentum}
    found = []
    for make in (fastfreeze.SGD, torch.optim.SGD):
        p = parameters(shapes=[(10, 4)])[0]
        optimizer = make([p], **kwargs)
        followed = [scheduler(optimizer) for scheduler in schedulers]
        for step in range(4):
            dense = torch.zeros(10, 4)
            dense[[step, step + 3]] = torch.randn(
                2, 4, generator=torch.Generator().manual_seed(step)
            )
            p.grad = dense.to_sparse(1)
            optimizer.step()
            for scheduler in followed:
                scheduler.step()
        found.append(optimizer)
    assert_same(*found)


@every_input
def test_complex_is_the_real_in_pairs(pair, kwargs):
    complex_params = parameters(torch.complex64, shapes=[(5,), (33,), (2, 3)])
    real_params = [Parameter(torch.view_as_real(p.detach()).clone()) for p in complex_params]
    optimizers = [pair.ours(p, **copy.deepcopy(kwargs)) for p in (complex_params, real_params)]
    for step in range(4):
        set_gradients(complex_params, step)
        for p, q in zip(complex_params, real_params, strict=True):
            q.grad = torch.view_as_real(p.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(complex_params, real_params, strict=True):
        torch.testing.assert_close(torch.view_as_real(p.detach()), q.detach())


@every_configuration
def test_a_tensor_lr_is_the_number_and_stays(pair, kwargs):
    lr = 0.02
    tensor = torch.tensor(lr)
    kwargs = truth_of(kwargs)  # torch's foreach takes no tensor
    params, others = parameters(), parameters()
    ours = pair.ours(params, **{**kwargs, "lr": tensor})
    number = pair.ours(others, **{**kwargs, "lr": tensor.item()})
    for o, p in ((ours, params), (number, others)):
        run(o, p, 4)
    assert_same(ours, number)
    assert ours.param_groups[0]["lr"] is tensor
    assert tensor.item() == torch.tensor(lr).item()
    tensor.fill_(0)
    before = [p.detach().clone() for p in params]
    run(ours, params, 1, start=4)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@every_configuration
def test_a_step_is_deterministic(pair, kwargs):
    found = []
    for _ in range(2):
        params = parameters()
        run(pair.ours(params, **copy.deepcopy(kwargs)), params, 4)
        found.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


@every_configuration
def test_versions_tell_of_the_writes(pair, kwargs):
    """Of all writes, and of nothing else: what is made from a frozen weight stays good."""
    params = parameters(shapes=[(5,), (4097,), (7,)])
    optimizer = pair.ours(params, **copy.deepcopy(kwargs))
    run(optimizer, params, 1)
    before = [p._version for p in params]
    set_gradients(params, 1)
    params[1].grad = None
    optimizer.step()
    assert [p._version > b for p, b in zip(params, before, strict=True)] == [True, False, True]


@every_pair
def test_the_profiler_sees_a_step(pair):
    params = parameters()
    optimizer = pair.ours(params, lr=0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(optimizer, params, 1)
    assert f"Optimizer.step#{pair.ours.__name__}.step" in {
        event.key for event in profile.key_averages()
    }


@every_pair
def test_zero_grad(pair):
    params = parameters()
    optimizer = pair.ours(params, lr=0.1)
    set_gradients(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@every_pair
@pytest.mark.parametrize("flags", [{"foreach": True, "fused": True}, {"differentiable": True}])
def test_flags_that_cannot_be(pair, flags):
    with pytest.raises((RuntimeError, ValueError), match="|".join(flags)):
        pair.ours(parameters(), lr=0.1, **flags)


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


@every_pair
@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averaged_models(pair, kind):
    average = torch.optim.swa_utils
    model = nn.Linear(3, 2)
    options = {"swa": {}, "ema": {"multi_avg_fn": average.get_ema_multi_avg_fn(0.9)}}[kind]
    averaged = average.AveragedModel(model, **options)
    optimizer = pair.ours(model.parameters(), lr=0.1)
    scheduler = average.SWALR(optimizer, swa_lr=0.05)
    for step in range(3):
        run(optimizer, list(model.parameters()), 1, start=step)
        averaged.update_parameters(model)
        scheduler.step()
    assert averaged.n_averaged == 3


@every_configuration
def test_nothing_warns(pair, kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = parameters()
        run(pair.ours(params, **copy.deepcopy(kwargs)), params, 2)
