"""Averages are those of float64, frozen layers keep their bits, norms get what they see."""

from __future__ import annotations

import copy

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

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]


def plain_average(tensors):
    """In double precision, by numpy, rounded once."""
    is_complex = tensors[0].is_complex()
    real = [torch.view_as_real(t) if is_complex else t for t in tensors]
    mean = torch.from_numpy(np.asarray(sum(t.double().numpy() for t in real) / len(tensors)))
    return (torch.complex(mean[..., 0], mean[..., 1]) if is_complex else mean).to(tensors[0].dtype)


def same(a, b):
    """Whether bits, NaN and signed zeros included, and dtypes are the same."""
    a, b = (t.detach().contiguous().reshape(-1) for t in (a, b))
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def network(seed=0):
    """Norms, dropout in between, and a convolution that no norm follows."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 3)),
        *(nn.BatchNorm2d(5, momentum=0.3, affine=False), nn.Flatten(), nn.LazyLinear(6)),
        nn.BatchNorm1d(6),
    )


def trained(seed):
    """A network whose norms have seen something."""
    model = network(seed).train()
    with torch.no_grad():
        for batch in images(3, seed):
            model(batch)
    return model


def all_same(a, b):
    """Of two state dicts, or lists."""
    pairs = zip(*(x.values() if isinstance(x, dict) else x for x in (a, b)), strict=True)
    return all(same(*pair) for pair in pairs)


def images(count, seed=9, size=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 7, 7, generator=generator) * 2 + 1 for _ in range(count)]


def statistics(norm):
    return [b.clone() for b in norm.buffers(recurse=False)]


class TwoInputs(nn.BatchNorm1d):
    def forward(self, a, b=0):
        return super().forward(a + b)


class Evals(nn.Sequential):
    def forward(self, x):
        self[1].eval()
        return super().forward(x)


class TestAverageWeights:
    @covering(
        dtype=[*FLOATS, *COMPLEX],
        shape=[(), (0,), (1,), (31,), (4, 33), (3, 2, 3, 3)],
        M=[1, 2, 5],
    )
    def test_it_is_the_average_in_double_precision(self, dtype, shape, M):
        tensors = [torch.randn(shape, dtype=dtype) * 3 for _ in range(M)]
        found = average_weights([{"w": t} for t in tensors])["w"]
        assert found.dtype == dtype
        exact = dtype not in (torch.float64, torch.complex128)
        tolerance = 0 if exact else 4 * torch.finfo(dtype).eps
        expected = plain_average(tensors)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    def test_by_hand(self):
        states = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -2.0])}]
        assert average_weights(states)["w"].tolist() == [2.0, 0.0]
        # Each is half a unit of float16 short of the next number, and overflows it in sum.
        small = [{"w": torch.full((3,), v).half()} for v in (60000.0, 60032.0, 60064.0)]
        assert average_weights(small)["w"].tolist() == [60032.0] * 3
        ones = {"a": torch.ones(1), "b": torch.zeros(1)}
        found = average_weights([ones, {"b": torch.ones(1), "a": torch.ones(1)}])
        assert list(found) == ["a", "b"]  # the first one's order
        assert found["b"].item() == 0.5
        found["b"] += 7
        assert ones["b"].item() == 0
        for first in range(1, 5):  # they differ from any snapshot on
            tensors = [torch.ones(3)] * first + [torch.randn(3) for _ in range(5 - first)]
            found = average_weights({"w": t} for t in tensors)["w"]
            torch.testing.assert_close(found, plain_average(tensors), rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX], ids=str)
    def test_equal_ones_keep_their_bits(self, dtype):
        same_in_all = torch.randn(1000, dtype=dtype)
        same_in_all[:4] = torch.tensor([torch.nan, torch.inf, -0.0, torch.finfo(dtype).max])
        states = [{"frozen": same_in_all.clone(), "w": torch.randn(3)} for _ in range(7)]
        assert same(average_weights(states)["frozen"], same_in_all)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool], ids=str)
    def test_integers_are_the_last_ones(self, dtype):
        states = [{"n": torch.tensor([m, 0, 1]).to(dtype)} for m in (5, 9, 7)]
        assert same(average_weights(states)["n"], states[-1]["n"])

    def test_states_come_one_at_a_time_and_may_be_of_one_memory(self):
        """As model.state_dict() does, while training goes on."""
        model = nn.Linear(3, 2)
        kept = []

        def states():
            for _ in range(4):
                nn.init.normal_(model.weight)
                kept.append(copy.deepcopy(model.state_dict()))
                yield model.state_dict()

        found = average_weights(states())
        assert same(found["weight"], plain_average([s["weight"] for s in kept]))
        assert same(found["bias"], model.bias.detach())
        assert found["bias"].data_ptr() != model.bias.data_ptr()
        assert not any(t.requires_grad for t in found.values())

    def test_tied_tensors_and_odd_strides(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        states = []
        for _ in range(3):
            nn.init.normal_(model[0].weight)
            states.append(copy.deepcopy(model.state_dict()))
        found = average_weights(states)
        assert same(found["0.weight"], found["1.weight"])
        model.load_state_dict(found)
        assert model[0].weight is model[1].weight
        turned = average_weights([{"w": s["0.weight"].t()} for s in states])["w"]
        assert torch.equal(turned, found["0.weight"].t())

    def test_other_architectures(self):
        state = {"a": torch.ones(2), "b": torch.ones(3)}
        for other, message in [
            ({"a": torch.ones(2)}, r"states\[1\] is of another model: missing: 'b'"),
            ({**state, "c": torch.ones(1)}, "unexpected: 'c'"),
            ({**state, "a": torch.ones(4)}, r"unlike: 'a': float32 \[4\], expected float32 \[2\]"),
            ({**state, "a": torch.ones(2).half()}, "unlike: 'a': float16"),
        ]:
            with pytest.raises(SnapshotError, match=message):
                average_weights([state, other])

    def test_no_state_dicts(self):
        for states, error, message in (
            ([], ValueError, "states must hold at least one state dict, got none"),
            ([torch.ones(1)], TypeError, r"states\[0\] must be a state dict, got Tensor"),
            (
                [{"w": torch.ones(1)}, {"w": 1.0}],
                TypeError,
                r"\['w'\] must be a tensor, got float",
            ),
        ):
            with pytest.raises(error, match=message):
                average_weights(states)


class TestReestimateNorms:
    def test_as_update_bn_without_dropout(self):
        model, expected, batches = trained(0), trained(0), images(5)
        expected[3] = nn.Identity()
        update_bn(batches, expected)
        assert reestimate_norms(model, batches) == ("1", "5", "8")
        for i in (1, 5, 8):
            for a, b in zip(statistics(model[i]), statistics(expected[i]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert model[i].num_batches_tracked.item() == 5

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("count", [1, 31, 300])
    def test_the_mean_of_the_batches(self, dtype, count):
        """Of a batch: its mean, and its variance with n - 1 in the denominator."""
        norm = nn.BatchNorm1d(3, dtype=dtype)
        norm.running_mean.fill_(torch.nan)
        norm.running_var.fill_(torch.inf)
        batches = [(torch.randn(5 + i, 3) * (1 + i % 7) + i % 5).to(dtype) for i in range(count)]
        assert reestimate_norms(norm, batches) == ("",)
        each = np.stack([[b.double().mean(0), b.double().var(0)] for b in batches])
        mean, variance = torch.from_numpy(each.mean(0))
        tolerance = 2 * torch.finfo(dtype).eps
        for found, expected in ((norm.running_mean, mean), (norm.running_var, variance)):
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)

    def test_instance_norms(self):
        norm = nn.InstanceNorm1d(3, track_running_stats=True)
        batches = [torch.randn(4, 3, 11) * 2 + i for i in range(3)]
        assert reestimate_norms(norm, batches) == ("",)
        each = torch.cat(batches).double()  # of each instance; all batches are of one size
        expected = each.mean((0, 2)), each.var(2).mean(0)
        for found, value in zip((norm.running_mean, norm.running_var), expected, strict=True):
            torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-5)

    def test_a_norm_that_runs_twice(self):
        norm = nn.BatchNorm1d(3)
        model = nn.Sequential(norm, nn.Linear(3, 3), norm)
        expected = copy.deepcopy(model)
        batches = [torch.randn(6, 3) + 2 for _ in range(3)]
        update_bn(batches, expected)
        assert reestimate_norms(model, batches) == ("0",)
        torch.testing.assert_close(norm.running_mean, expected[0].running_mean)
        torch.testing.assert_close(norm.running_var, expected[0].running_var)
        assert norm.num_batches_tracked.item() == 6

    def test_a_norm_that_no_batch_reaches_keeps_its_statistics(self):
        norms = {"used": nn.BatchNorm1d(3), "spare": nn.BatchNorm1d(3)}
        model = Does(lambda m, x: m.used(x), **norms)
        nn.init.normal_(model.spare.running_mean)
        model.spare.num_batches_tracked += 4
        before = statistics(model.spare)
        assert reestimate_norms(model, [torch.randn(4, 3)]) == ("used",)
        assert all_same(statistics(model.spare), before)

    def test_what_was_frozen_keeps_its_bits_and_runs_in_eval_mode(self):
        model = trained(0)
        states = []
        for _ in range(3):  # the first two modules, and the norm in them, are frozen
            for batch in images(2):
                model[2:](nn.Sequential(*model[:2]).eval()(batch))
            model.train()
            states.append(copy.deepcopy(model.state_dict()))
            nn.init.normal_(model[4].weight)
        model.load_state_dict(average_weights(states))
        model.requires_grad_(False)  # as at the end of a FreezeOut run
        before, expected = statistics(model[1]), copy.deepcopy(model)
        batches = images(4)
        assert reestimate_norms(model, batches, snapshot=states[0]) == ("5", "8")
        assert all(map(same, statistics(model[1]), before))
        with torch.no_grad():
            reached = [expected[:5].eval()(b) for b in batches]
        mean = torch.stack([x.mean((0, 2, 3)) for x in reached]).mean(0)
        torch.testing.assert_close(model[5].running_mean, mean, rtol=1e-5, atol=1e-5)

    def test_a_snapshot_of_another_model(self):
        model = trained(0)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(SnapshotError, match="snapshot is of another model"):
            reestimate_norms(model, images(1), snapshot=nn.Linear(2, 2).state_dict())
        with pytest.raises(TypeError, match="snapshot must be a state dict, got int"):
            reestimate_norms(model, images(1), snapshot=3)
        assert all_same(model.state_dict(), before)
        assert reestimate_norms(model, iter(lambda: 1 / 0, None), snapshot=before) == ()

    @pytest.mark.parametrize("training", [True, False])
    def test_modes_momenta_and_the_rest_are_restored(self, training):
        model = trained(0).train(training)
        model[3].train(not training)
        model[5].momentum = None
        modes = [m.training for m in model.modules()]
        weights = {name: p.clone() for name, p in model.named_parameters()}
        reestimate_norms(model, images(2))
        assert [m.training for m in model.modules()] == modes
        assert [model[i].momentum for i in (1, 5, 8)] == [0.1, None, 0.1]
        assert all(same(p, weights[name]) for name, p in model.named_parameters())
        assert not any(m._forward_hooks for m in model.modules())
        assert torch.is_grad_enabled()
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("where", ["batches", "model"])
    def test_what_raises_leaves_all_as_it_was(self, error, where):
        model = trained(0)
        before = copy.deepcopy(model.state_dict())

        def fail(*_):
            raise error("no more")

        def batches():
            yield from images(2)
            if where == "model":
                model[6].register_forward_hook(fail)
                yield images(1)[0]
            fail()

        with pytest.raises(error, match="no more"):
            reestimate_norms(model, batches())
        assert all_same(model.state_dict(), before)
        assert all(m.training for m in model.modules())
        assert [model[i].momentum for i in (1, 5, 8)] == [0.1, 0.3, 0.1]
        assert not any(model[i]._forward_hooks for i in (1, 5, 8))

    def test_bad_batches(self):
        model = trained(0)
        before = copy.deepcopy(model.state_dict())
        for batches, error, message in (
            ([], ValueError, "batches must give at least one batch, got none"),
            ([*images(1), ()], ValueError, r"batches\[1\] must hold the model's input, got \(\)"),
            ([*images(1), np.ones(3)], TypeError, r"batches\[1\] must hold tensors, got .*from_nu"),
        ):
            with pytest.raises(error, match=message):
                reestimate_norms(model, batches)
        assert all_same(model.state_dict(), before)

    def test_lazy_norms_are_refused(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d())
        with pytest.raises(ValueError, match="'1' is a lazy norm: the model must run once before"):
            reestimate_norms(model, [torch.randn(4, 3)])
        assert model.training
        model(torch.randn(4, 3))
        assert reestimate_norms(model, [torch.randn(4, 3)]) == ("1",)

    def test_kinds_of_batches(self):
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

    def test_a_trimmed_model(self):
        """It is in eval mode meanwhile, in which the model itself runs."""
        model, expected, batches = trained(0), trained(0), images(3)
        model[:3].requires_grad_(False)
        trimmed = fastfreeze.trim(model)
        trimmed(batches[0])
        reestimate_norms(trimmed, batches)
        reestimate_norms(expected, batches)
        assert torch.equal(model[1].running_var, expected[1].running_var)
        assert trimmed.training
        assert model.training

    def test_a_model_that_calls_norms_in_eval_mode(self):
        """With statistics that are not there yet."""
        model, batches = Evals(*trained(0)), images(3)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"must not call '\S*1' in eval mode"):
            reestimate_norms(model, batches)
        assert all_same(model.state_dict(), before)

    def test_a_compiled_model(self):
        model, expected, batches = trained(0), trained(0), images(3)
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
        for i in (1, 5, 8):
            assert all(map(same, statistics(model[i]), statistics(expected[i])))
