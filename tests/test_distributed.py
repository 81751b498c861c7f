"""Several processes train as one does, while layers freeze and thaw."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import weakref
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastfreeze
from fastfreeze.distributed import DataParallel
from fastfreeze.schedule import FreezeOut, FreezeOutCycles
from tests.conftest import needs_cpu_kernels
from tests.covering import covering
from tests.ranks import Ranks

BATCH = 12  # samples in a step, in all processes together
SIZES = (5, 7, 11, 13, 3)
STEPS = 16
HYPERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
}
every_optimizer = pytest.mark.parametrize("name", HYPERS)
RESULT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture
def seed():
    return int(torch.randint(2**31, ()))


def net(seed, *, norms=False):
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in pairwise(SIZES):
        norm = nn.BatchNorm1d(outputs) if norms else nn.LayerNorm(outputs)
        layers.append(nn.Sequential(nn.Linear(inputs, outputs), norm, nn.Tanh()))
    return nn.Sequential(*layers).double()


def freezing():
    """Freezes layers 0, 1 and 2 at steps 1, 3 and 5, thaws them at 8, and freezes them again."""
    return FreezeOutCycles(STEPS, num_cycles=2, t_0=0.5, composition="thaw")


def plan_of(model):
    return fastfreeze.split(model, layers=[str(i) for i in range(len(model))])


def made(model, schedule, name="SGD"):
    """What freezes: an optimizer, or the scheduler of torch's."""
    groups = plan_of(model).param_groups()
    if name == "scheduler":
        return fastfreeze.FreezeScheduler(torch.optim.AdamW(groups, lr=0.01), schedule)
    return getattr(fastfreeze, name)(groups, schedule=schedule, **HYPERS[name])


def batch_of(seed, step, count=1, part=0):
    """Of one step's whole batch, part number ``part`` of ``count``."""
    generator = torch.Generator().manual_seed(seed + step)
    draw = {"generator": generator, "dtype": torch.float64}
    whole = torch.randn(BATCH, SIZES[0], **draw), torch.randn(BATCH, SIZES[-1], **draw)
    return [t.chunk(count)[part] for t in whole]


def train(network, optimizer, steps, seed, *, parts=1):
    """Steps on this process's share of each batch, which comes in ``parts`` that are added up."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    is_scheduler = isinstance(optimizer, fastfreeze.FreezeScheduler)
    stepping = [optimizer.optimizer, optimizer] if is_scheduler else [optimizer]
    for step in steps:
        stepping[0].zero_grad()
        for part in range(parts):
            last = part == parts - 1
            with nullcontext() if last or world == 1 else network.no_sync():
                images, labels = batch_of(seed, step, world * parts, rank * parts + part)
                loss = (network(images) - labels).square().mean() / parts
                loss.backward()
        for one in stepping:
            one.step()


def weights(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def in_one_process(seed, name="SGD"):
    model = net(seed)
    optimizer = made(model, freezing(), name)
    train(fastfreeze.trim(model), optimizer, range(STEPS), seed)
    return weights(model)


def trained_in_parallel(seed, parts, trimmed, keywords, name):
    model = net(seed if dist.get_rank() == 0 else seed + 1)  # rank 0's weights are everybody's
    optimizer = made(model, freezing(), name)
    network = DataParallel(fastfreeze.trim(model) if trimmed else model, optimizer, **keywords)
    frozen = []
    for step in range(STEPS):
        train(network, optimizer, [step], seed, parts=parts)
        frozen.append(optimizer.frozen_layers)
    return weights(model), frozen


TRAININGS = {
    "untrimmed": (1, False, {}, "SGD"),
    "accumulated under no_sync": (2, True, {}, "SGD"),
    "views of buckets, accumulated": (3, True, {"gradient_as_bucket_view": True}, "SGD"),
    "a bucket for each gradient": (1, True, {"bucket_cap_mb": 1e-6}, "SGD"),
    "a static graph": (1, True, {"static_graph": True}, "SGD"),
    "another optimizer": (1, True, {}, "scheduler"),
}


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
def test_processes_train_as_one_does(ranks, seed, training):
    results = ranks.run(trained_in_parallel, seed, *training)
    expected = in_one_process(seed, training[-1])
    for found, frozen in results:
        assert (frozen[0], frozen[6], frozen[7]) == ((0,), (0, 1, 2), ())
        torch.testing.assert_close(found, expected, **RESULT)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)


class SentBytes:
    """A communication hook that counts what is reduced, and reduces it."""

    def __init__(self):
        self.count = 0

    def hook(self, _, bucket):
        self.count += bucket.buffer().nbytes
        return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

    def taken(self):
        count, self.count = self.count, 0
        return count


def bytes_in_each_step(seed, keywords):
    """Of each step: what was reduced, and what trained."""
    model = net(seed)
    optimizer = made(model, freezing())
    network = DataParallel(fastfreeze.trim(model), optimizer, **keywords)
    sent = SentBytes()
    network.register_comm_hook(None, sent.hook)
    found = []
    for step in range(STEPS):
        trains = [sum(p.nbytes for p in x.parameters() if p.requires_grad) for x in model]
        train(network, optimizer, [step], seed)
        found.append((sent.taken(), trains))
    return found


@pytest.mark.parametrize("cap", [25, 1e-6], ids=["one bucket", "many buckets"])
def test_frozen_layers_send_nothing(ranks, seed, cap):
    for found in ranks.run(bytes_in_each_step, seed, {"bucket_cap_mb": cap}):
        assert all(sent == sum(trains) for sent, trains in found)
        frozen = [trains.count(0) for _, trains in found]
        assert frozen[:9] == [0, 1, 1, 2, 2, 3, 3, 3, 0]


def weights_that_rank_1_changed_before_a_freeze(seed):
    model = net(seed)
    optimizer = made(model, freezing())
    network = DataParallel(model, optimizer)
    train(network, optimizer, [0], seed)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model[0][0].weight += 1
    network(torch.ones(2, SIZES[0]).double())
    return model[0][0].weight.detach().clone()


def test_weights_are_not_sent_again_at_a_freeze(ranks, seed):
    first, second = ranks.run(weights_that_rank_1_changed_before_a_freeze, seed)
    torch.testing.assert_close(second, first + 1)


def norms_in_each_step(seed):
    """Of each step: whether layers' statistics were written to, they, and how many are sent."""
    model = conv_net(seed)
    optimizer = made(model, freezing())
    network = DataParallel(fastfreeze.trim(model), optimizer)
    found = []
    for _ in range(8):
        means = [layer[1].running_mean for layer in model]
        before = [(m._version, m.clone()) for m in means]
        images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
        optimizer.zero_grad()
        network(images).square().mean().backward()
        optimizer.step()
        written = [
            m._version != version or not m.equal(mean)
            for m, (version, mean) in zip(means, before, strict=True)
        ]
        found.append((written, [m.clone() for m in means], len(network._ddp.modules_buffers)))
    return found, network.module.prefix


def conv_net(seed):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 6, 1), nn.Conv2d(6, 3, 1)]
    blocks = [nn.Sequential(c, nn.BatchNorm2d(c.out_channels), nn.ReLU()) for c in layers]
    return nn.Sequential(*blocks)


def test_statistics_of_frozen_norms_are_sent_once(ranks, seed):
    (first, prefix), (second, _) = ranks.run(norms_in_each_step, seed)
    for step, layer in [(2, 0), (4, 1), (6, 2)]:  # a step behind the first one without it
        for written, means, _ in (*first[step:], *second[step:]):
            assert not written[layer]
            assert written[-1]
            torch.testing.assert_close(means[layer], first[-1][1][layer], rtol=0, atol=0)
    assert [sent for *_, sent in first] == [12, 9, 9, 6, 6, 3, 3, 3]
    assert "as they are" not in prefix  # it is folded once, not at each step


def errors_of(what, when):
    """What each rank is told when rank 1 differs from the start, or after two steps."""
    model = net(0)
    different = dist.get_rank() == 1
    schedule = FreezeOut(20 if different and what == "schedule" else 16, t_0=0.5)
    optimizer = made(model, schedule)
    if when == "start" and different:
        CHANGES[what](model, optimizer)
    try:
        network = DataParallel(model, optimizer)
        train(network, optimizer, [0, 1], 0)
        if different:
            CHANGES[what](model, optimizer)
        train(network, optimizer, [2], 0)
    except RuntimeError as error:
        return str(error)
    return ""


CHANGES = {
    "schedule": lambda model, optimizer: None,
    "step": lambda model, optimizer: setattr(optimizer, "current_step", 1),
    "flags": lambda model, optimizer: model[2][0].bias.requires_grad_(False),
    "lr": lambda model, optimizer: optimizer.param_groups[1].update(weight_decay=0.5),
    "model": lambda model, optimizer: model.append(nn.Linear(3, 3)),
}
DIFFERENT = [
    ("schedule", "start", r"rank 1 has .*'total_steps': 20.*rank 0 has .*'total_steps': 16"),
    ("step", "start", "rank 1 has 'step 1', rank 0 has 'step 0'"),
    ("step", "later", "rank 1 has 'step 1', rank 0 has 'step 2'"),
    ("flags", "later", r"parameter 2.0.bias: frozen.*parameter 2.0.bias: trains"),
    ("lr", "start", r"group 1.*'weight_decay': 0.5.*group 1.*'weight_decay': 0.001"),
    ("model", "start", "parameter 4.weight.*'nothing more'"),
]


@pytest.mark.parametrize(
    ("what", "when", "message"), DIFFERENT, ids=[f"{a}, {b}" for a, b, _ in DIFFERENT]
)
def test_a_process_that_differs_is_named_in_all_of_them(ranks, what, when, message):
    for text in ranks.run(errors_of, what, when, world=3):
        assert text.startswith("all processes must train the same model")
        assert "ranks 1 differ from rank 0" in text
        assert re.search(message, text)


def frozen_while_accumulating(seed):
    """Flags are changed by hand between the two halves of a step."""
    model = net(seed)
    optimizer = made(model, None)
    network = DataParallel(model, optimizer)
    for step in range(4):
        optimizer.zero_grad()
        for part in range(2):
            images, labels = batch_of(seed, step, 4, dist.get_rank() * 2 + part)
            with nullcontext() if part else network.no_sync():
                loss = (network(images) - labels).square().mean() / 2
                loss.backward()
            if part == 0 and step in (1, 2):
                model[0].requires_grad_(step == 2)
                optimizer.zero_grad()
        optimizer.step()
    return weights(model)


def test_flags_may_change_inside_a_no_sync_window(ranks, seed):
    first, second = ranks.run(frozen_while_accumulating, seed)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def old_ones_after_many_freezes():
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 1))
    optimizer = fastfreeze.SGD(model.parameters(), lr=0.1)
    network, held = DataParallel(model, optimizer), []
    network.register_comm_hook(None, SentBytes().hook)
    for step in range(10):
        model[0].requires_grad_(step % 2 == 0)
        optimizer.zero_grad(set_to_none=True)
        network(torch.ones(1, 9)).sum().backward()
        held.append(weakref.ref(network._ddp))
    return [ref() is not None for ref in held]


def test_nothing_is_left_of_the_old_buckets(ranks):
    for alive in ranks.run(old_ones_after_many_freezes):
        assert alive == [False] * 9 + [True]


def saved_after(seed, steps):
    model = net(seed)
    optimizer = made(model, freezing())
    train(DataParallel(fastfreeze.trim(model), optimizer), optimizer, range(steps), seed)
    return weights(model), optimizer.state_dict()


def resumed(seed, state, optimizer_state, steps):
    model = net(seed + 1)
    optimizer = made(model, freezing())
    model.load_state_dict(state)
    optimizer.load_state_dict(optimizer_state)
    network = fastfreeze.trim(model)
    if dist.is_initialized():
        network = DataParallel(network, optimizer)
    train(network, optimizer, steps, seed)
    return weights(model)


@pytest.mark.parametrize("stop", [2, 6, 8], ids=["one frozen", "all but the head", "at a thaw"])
def test_two_processes_checkpoint_is_resumed_by_one_and_by_three(ranks, seed, stop):
    state, optimizer_state = ranks.run(saved_after, seed, stop)[0]
    expected, rest = in_one_process(seed), range(stop, STEPS)
    arguments = seed, state, optimizer_state, rest
    # The last one goes on with the very tensors of the state.
    for found in (*ranks.run(resumed, *arguments, world=3), resumed(*arguments)):
        torch.testing.assert_close(found, expected, **RESULT)


def names_of_states():
    model = net(0, norms=True)
    ours = DataParallel(fastfreeze.trim(model), made(model, freezing()))
    theirs = DistributedDataParallel(net(0, norms=True))
    ours.load_state_dict(theirs.state_dict())
    return list(ours.state_dict()), list(theirs.state_dict()), list(ours.module.state_dict())


def test_state_dicts_have_the_names_of_torchs_and_of_the_model(ranks):
    ours, theirs, own = ranks.run(names_of_states)[0]
    assert ours == theirs
    assert own == list(net(0, norms=True).state_dict())


def refused(arguments):
    model = net(0)
    optimizer = made(model, freezing())
    arguments = {"module": model, "optimizer": optimizer, **arguments}
    try:
        DataParallel(**arguments)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


REFUSED = {
    "module": ({"module": "net"}, "TypeError: module must be a torch.nn.Module, got str"),
    "optimizer": ({"optimizer": None}, "TypeError: optimizer must be a fastfreeze.SGD, Adam"),
    "mixed precision": ({"mixed_precision": "bf16"}, "ValueError: mixed_precision must be left"),
    "unknown": ({"bucket_size": 3}, "TypeError: .*bucket_size"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused(ranks, arguments, message):
    for text in ranks.run(refused, arguments):
        assert re.search(message, text)


def test_without_a_process_group_that_is_said():
    model = net(0)
    with pytest.raises(ValueError, match="init_process_group"):
        DataParallel(model, made(model, freezing()))


def sharded(seed, name="SGD", **extra):
    """A model sharded layer by layer, as FSDP2 does it, and its optimizer."""
    model = net(seed)
    plan = plan_of(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    with pytest.raises(ValueError, match="split before sharding"):
        plan_of(model)
    make = getattr(fastfreeze, name)
    return model, make(plan.param_groups(), schedule=freezing(), **HYPERS[name], **extra)


def whole(model):
    options = StateDictOptions(full_state_dict=True)
    return get_model_state_dict(model, options=options)


def trained_in_shards(seed, backend, trimmed, name):
    model, optimizer = sharded(seed, name, backend=backend)
    network = fastfreeze.trim(model) if trimmed else model
    gradients = []
    for step in range(STEPS):
        train(network, optimizer, [step], seed)
        with_gradient = [any(p.grad is not None for p in layer.parameters()) for layer in model]
        gradients.append(with_gradient)
    return whole(model), gradients


@covering(
    name=list(HYPERS),
    backend=[None, "reference", pytest.param("cpu", marks=needs_cpu_kernels, id="cpu")],
    trimmed={"untrimmed": False, "trimmed": True},
)
def test_sharded_layers_freeze_and_train_as_in_one_process(ranks, seed, backend, trimmed, name):
    expected = in_one_process(seed, name)
    for found, gradients in ranks.run(trained_in_shards, seed, backend, trimmed, name):
        torch.testing.assert_close(found, expected, **RESULT)
        assert gradients[0] == [False, True, True, True]  # layer 0 has just been frozen
        assert gradients[5] == [False, False, False, True]
        assert gradients[8] == [False, True, True, True]


def shards_saved_after(seed, stop, name):
    model, optimizer = sharded(seed, name)
    options = StateDictOptions(full_state_dict=True)
    if stop == 0:  # nothing is known yet, and asking must not move the schedule
        get_optimizer_state_dict(model, optimizer, options=options)
    train(model, optimizer, range(stop), seed)
    return whole(model), get_optimizer_state_dict(model, optimizer, options=options)


def shards_resumed(seed, state, optimizer_state, steps, name, whole_state=True):
    model, optimizer = sharded(seed + 1, name) if dist.is_initialized() else (net(seed + 1), None)
    optimizer = optimizer or made(model, freezing(), name)
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, state, options=options)
    if whole_state:
        set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)
    else:
        optimizer.load_state_dict(optimizer_state)
    train(model, optimizer, steps, seed)
    return whole(model)


@pytest.mark.parametrize("stop", [0, 2, 8], ids=["at the start", "one frozen", "at a thaw"])
@every_optimizer
def test_a_consolidated_state_is_resumed_by_one_and_by_three(ranks, seed, stop, name):
    state, optimizer_state = ranks.run(shards_saved_after, seed, stop, name)[0]
    expected, rest = in_one_process(seed, name), range(stop, STEPS)
    arguments = seed, state, optimizer_state, rest, name
    for found in (*ranks.run(shards_resumed, *arguments, world=3), shards_resumed(*arguments)):
        torch.testing.assert_close(found, expected, **RESULT)


@every_optimizer
def test_shards_resume_what_one_process_has_saved(ranks, seed, name):
    model = net(seed)
    optimizer = made(model, freezing(), name)
    train(model, optimizer, range(2), seed)
    arguments = seed, weights(model), optimizer.state_dict(), range(2, STEPS), name, False
    for found in ranks.run(shards_resumed, *arguments):
        torch.testing.assert_close(found, in_one_process(seed, name), **RESULT)


DOCS = Path(__file__).parent.parent / "docs" / "distributed.md"
# Seen once on a busy machine, torch 2.15: a thread of torch's was still there as a process ended.
TORN_DOWN = "terminate called without an active exception"


@pytest.mark.skipif(not DOCS.exists(), reason="tests run outside the source tree")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["train.py", "shard.py"])
def test_the_recipes_run_under_torchrun(tmp_path, name):
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / name).write_text(next(b for b in blocks if b.startswith(f"# {name}")))
    flags = "--standalone", "--nproc-per-node", "2"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *flags, name],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(DOCS.parent.parent)},
            check=False,
            timeout=120,
            capture_output=True,
            text=True,
        )
        if TORN_DOWN not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    if name == "train.py":
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert [g["step"] for g in state["optimizer"]["param_groups"]] == [16, 16, 16]
