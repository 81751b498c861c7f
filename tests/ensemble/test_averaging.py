"""Averages are those of float64, frozen layers keep their bits, norms get what they see."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import fastfreeze
from fastfreeze.ensemble.average import average_weights, reestimate_norms
from fastfreeze.errors import SnapshotError
from tests.covering import covering
from tests.nets import Does
from tests.snapshots.stores import raw, raw_state

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]


def plain_average(tensors):
    """In double precision, by numpy, rounded once."""
    is_complex = tensors[0].is_complex()
    real = [torch.view_as_real(t) if is_complex else t for t in tensors]
    mean = torch.from_numpy(np.asarray(sum(t.double().numpy() for t in real) / len(tensors)))
    return (torch.complex(mean[..., 0], mean[..., 1]) if is_complex else mean).to(tensors[0].dtype)


def trained():
    """Norms that have seen something, dropout in between, a convolution that no norm follows."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 3)),
        *(nn.BatchNorm2d(5, momentum=0.3, affine=False), nn.Flatten(), nn.LazyLinear(6)),
        nn.BatchNorm1d(6),
    )
    with torch.no_grad():
        for batch in images(3, seed=0):
            model(batch)
    return model


def images(count, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 7, 7, generator=generator) * 2 + 1 for _ in range(count)]


class TwoInputs(nn.BatchNorm1d):
    def forward(self, a, b=0):
        return super().forward(a + b)


class Evals(nn.Sequential):
    def forward(self, x):
        self[1].eval()
        return super().forward(x)


@covering(dtype=[*FLOATS, *COMPLEX], shape=[(3, 2, 3, 3), (), (0,), (1,), (31,), (4, 33)])
def test_it_is_the_average_in_double_precision(dtype, shape):
    for count, alike in itertools.product((1, 2, 5), range(4)):  # so many first ones
        tensors = [torch.randn(shape, dtype=dtype) * 3 for _ in range(count)]
        tensors[:alike] = tensors[:1] * min(alike, count)
        found = average_weights([{"w": t} for t in tensors])["w"]
        assert found.dtype == dtype
        tolerance = 4 * torch.finfo(dtype).eps if found.element_size() >= 8 else 0
        expected = plain_average(tensors)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_by_hand():
    # Each is half a unit of float16 short of the next number, and overflows it in sum.
    small = [{"w": torch.full((3,), v).half()} for v in (60000.0, 60032.0, 60064.0)]
    assert average_weights(small)["w"].tolist() == [60032.0] * 3
    first = {"a": torch.ones(1), "b": torch.zeros(1)}
    found = average_weights([first, {"b": torch.ones(1), "a": torch.ones(1)}])
    assert list(found) == ["a", "b"]  # the first one's order
    assert found["b"].item() == 0.5
    found["b"] += 7
    assert first["b"].item() == 0


def test_equal_ones_keep_their_bits_and_integers_are_the_last_ones():
    for dtype in (*FLOATS, *COMPLEX):
        same_in_all = torch.randn(1000, dtype=dtype)
        same_in_all[:4] = torch.tensor([torch.nan, torch.inf, -0.0, torch.finfo(dtype).max])
        states = [{"frozen": same_in_all.clone(), "w": torch.randn(3)} for _ in range(7)]
        assert raw(average_weights(states)["frozen"]) == raw(same_in_all)
    for dtype in (torch.int64, torch.int8, torch.uint8, torch.bool):
        states = [{"n": torch.tensor([m, 0, 1]).to(dtype)} for m in (5, 9, 7)]
        assert raw_state(average_weights(states)) == raw_state(states[-1])


def test_states_may_come_one_at_a_time_out_of_one_memory_tied_and_strided():
    """As model.state_dict() does, while training goes on."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    kept = []

    def states():
        for _ in range(4):
            nn.init.normal_(model[0].weight)
            kept.append(copy.deepcopy(model.state_dict()))
            yield {**model.state_dict(), "turned": model[0].weight.t()}

    found = average_weights(states())
    assert raw(found["0.weight"]) == raw(plain_average([s["0.weight"] for s in kept]))
    assert raw(found["0.bias"]) == raw(model[0].bias)
    assert found["0.bias"].data_ptr() != model[0].bias.data_ptr()
    assert not any(t.requires_grad for t in found.values())
    assert torch.equal(found.pop("turned"), found["0.weight"].t())
    assert raw(found["0.weight"]) == raw(found["1.weight"])
    model.load_state_dict(found)
    assert model[0].weight is model[1].weight


def test_refused_states():
    state = {"a": torch.ones(2), "b": torch.ones(3)}
    for states, error, match in [
        ([state, {"a": state["a"]}], SnapshotError, r"states\[1\] is of .* model: missing: 'b'"),
        ([], ValueError, "states must hold at least one state dict, got none"),
        ([torch.ones(1)], TypeError, r"states\[0\] must be a state dict, got Tensor"),
        ([state, {**state, "b": 1.0}], TypeError, r"\['b'\] must be a tensor, got float"),
    ]:
        with pytest.raises(error, match=match):
            average_weights(states)


def test_as_update_bn_without_dropout():
    plain, pairs = trained(), [torch.randn(6, 4, 2, 2) + 2 for _ in range(5)]
    twice = nn.Sequential(plain[1], nn.Conv2d(4, 4, 1), plain[1])  # a norm runs two times
    for model, names, batches in [(plain, ("1", "5", "8"), images(5)), (twice, ("0",), pairs)]:
        expected = copy.deepcopy(model)
        for module in expected.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        update_bn(batches, expected)
        assert reestimate_norms(model, batches) == names
        found, wanted = model.state_dict(), expected.state_dict()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", [1, 31, 100])
def test_the_mean_of_the_batches(dtype, count):
    """Of a batch: its mean, and its variance with n - 1 in the denominator."""
    norm = nn.BatchNorm1d(3, dtype=dtype)
    norm.running_mean.fill_(torch.nan)
    norm.running_var.fill_(torch.inf)
    batches = [(torch.randn(5 + i, 3) * (1 + i % 7) + i % 5).to(dtype) for i in range(count)]
    assert reestimate_norms(norm, batches) == ("",)
    each = np.stack([[b.double().mean(0), b.double().var(0)] for b in batches])
    tolerance = 2 * torch.finfo(dtype).eps
    found = torch.stack([norm.running_mean, norm.running_var]).double().numpy()
    torch.testing.assert_close(found, each.mean(0), rtol=tolerance, atol=tolerance)


def test_instance_norms():
    norm = nn.InstanceNorm1d(3, track_running_stats=True)
    batches = [torch.randn(4, 3, 11) * 2 + i for i in range(3)]
    assert reestimate_norms(norm, batches) == ("",)
    each = torch.cat(batches)  # of each instance; all batches are of one size
    torch.testing.assert_close(norm.running_mean, each.mean((0, 2)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var, each.var(2).mean(0), rtol=1e-5, atol=1e-5)


def test_a_norm_that_no_batch_reaches_keeps_its_statistics():
    model = Does(lambda m, x: m.used(x), used=nn.BatchNorm1d(3), spare=nn.BatchNorm1d(3))
    nn.init.normal_(model.spare.running_mean)
    model.spare.num_batches_tracked += 4
    before = raw_state(model.spare.state_dict())
    assert reestimate_norms(model, [torch.randn(4, 3)]) == ("used",)
    assert raw_state(model.spare.state_dict()) == before


def test_what_was_frozen_keeps_its_bits_and_runs_in_eval_mode():
    model = trained()
    states = []
    for _ in range(3):  # the first two modules, and the norm in them, are frozen
        for batch in images(2):
            model[2:](nn.Sequential(*model[:2]).eval()(batch))
        model.train()
        states.append(copy.deepcopy(model.state_dict()))
        nn.init.normal_(model[4].weight)
    model.load_state_dict(average_weights(states))
    model.requires_grad_(False)  # as at the end of a FreezeOut run
    expected, batches = copy.deepcopy(model), images(4)
    assert reestimate_norms(model, batches, snapshot=states[0]) == ("5", "8")
    assert raw_state(model[1].state_dict()) == raw_state(expected[1].state_dict())
    with torch.no_grad():
        reached = [expected[:5].eval()(b) for b in batches]
    mean = torch.stack([x.mean((0, 2, 3)) for x in reached]).mean(0)
    torch.testing.assert_close(model[5].running_mean, mean, rtol=1e-5, atol=1e-5)
    frozen = model.state_dict()
    assert reestimate_norms(model, iter(lambda: 1 / 0, None), snapshot=frozen) == ()


@pytest.mark.parametrize("training", [True, False])
def test_modes_momenta_and_the_rest_are_restored(training):
    model = trained().train(training)
    model[3].train(not training)
    model[5].momentum = None
    modes = [m.training for m in model.modules()]
    weights = raw_state(dict(model.named_parameters()))
    reestimate_norms(model, images(2))
    assert [m.training for m in model.modules()] == modes
    assert [model[i].momentum for i in (1, 5, 8)] == [0.1, None, 0.1]
    assert raw_state(dict(model.named_parameters())) == weights
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


def batches_that_fail(model, where, error):
    def fail(*_):
        raise error("no more")

    yield from images(2)
    if where == "model":
        model[6].register_forward_hook(fail)
        yield images(1)[0]
    fail()


FAILURES = [  # batches, or where something fails, a snapshot, and what is raised
    ("batches", None, RuntimeError, "no more"),
    ("model", None, KeyboardInterrupt, "no more"),
    ([], None, ValueError, "batches must give at least one batch, got none"),
    ([*images(1), ()], None, ValueError, r"batches\[1\] must hold the model's input, got \(\)"),
    ([np.ones(3)], None, TypeError, r"batches\[0\] must hold tensors, got .*from_nu"),
    (images(1), {"w": torch.ones(1)}, SnapshotError, "snapshot is of another model"),
    (images(1), 3, TypeError, "snapshot must be a state dict, got int"),
]


def test_what_raises_leaves_all_as_it_was():
    for given, snapshot, error, match in FAILURES:
        model = trained()
        before = raw_state(model.state_dict())
        failing = isinstance(given, str)
        batches = batches_that_fail(model, given, error) if failing else given
        with pytest.raises(error, match=match):
            reestimate_norms(model, batches, snapshot=snapshot)
        assert raw_state(model.state_dict()) == before
        assert all(m.training for m in model.modules())
        assert [model[i].momentum for i in (1, 5, 8)] == [0.1, 0.3, 0.1]
        assert not any(model[i]._forward_hooks for i in (1, 5, 8))


def test_norms_that_are_lazy_or_in_eval_mode_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="'1' is a lazy norm: the model must run once before"):
        reestimate_norms(model, [torch.randn(4, 3)])
    assert model.training
    model(torch.randn(4, 3))
    assert reestimate_norms(model, [torch.randn(4, 3)]) == ("1",)
    model = Evals(*trained())  # with statistics that are not there yet
    before = raw_state(model.state_dict())
    with pytest.raises(ValueError, match=r"must not call '\S*1' in eval mode"):
        reestimate_norms(model, images(3))
    assert raw_state(model.state_dict()) == before


def test_kinds_of_batches():
    model, x, y = TwoInputs(3), torch.randn(4, 3), torch.randn(4, 3) + 5
    labels = torch.arange(4)
    for batch, expected in [
        (x, x),
        ((x,), x),
        ([x, labels], x),
        ((x, labels, labels), x),
        (((x, y), labels), x + y),
        ([[x, y], labels], x + y),
        ({"a": x, "b": y, "labels": labels}, x + y),
        (({"a": x}, labels), x),
    ]:
        reestimate_norms(model, [batch])
        torch.testing.assert_close(model.running_mean, expected.mean(0))


def test_a_trimmed_model():
    """It is in eval mode meanwhile, in which the model itself runs."""
    model, expected, batches = trained(), trained(), images(3)
    model[:3].requires_grad_(False)
    trimmed = fastfreeze.trim(model)
    trimmed(batches[0])
    reestimate_norms(trimmed, batches)
    reestimate_norms(expected, batches)
    assert torch.equal(model[1].running_var, expected[1].running_var)
    assert trimmed.training
    assert model.training


def test_a_compiled_model():
    torch.compiler.reset()  # of what other tests have had compiled, up to torch's limit
    model, expected, batches = trained(), trained(), images(3)
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    compiled(batches[0])
    model.load_state_dict(expected.state_dict())
    for _ in range(2):
        assert len(reestimate_norms(compiled, batches)) == 3
    assert len(compilations) == 1
    reestimate_norms(expected, batches)
    assert raw_state(model.state_dict()) == raw_state(expected.state_dict())
