"""One pass over batches finds what the metrics find on all rows at once."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref

import pytest
import torch
from torch import nn

from fastfreeze.ensemble import SnapshotEnsemble, evaluate, prediction_scores
from tests.covering import covering

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Given:
    """An ensemble whose inputs are its members' probabilities, [B, M, C]."""

    def member_probabilities(self, inputs):
        yield from inputs.unbind(1)


def in_batches(probabilities, labels, sizes):
    return zip(probabilities.split(sizes), labels.split(sizes), strict=True)


def exact_probabilities(rows, members, classes):
    """Multiples of 1/64, which every dtype holds."""
    chances = torch.randn(rows * members, classes).mul(2).softmax(-1)
    chosen = torch.multinomial(chances, 64 - classes, replacement=True)
    counts = nn.functional.one_hot(chosen, classes).sum(1) + 1
    return counts.double().div(64).unflatten(0, (rows, members))


def entropy(p):
    return -(p * p.log()).sum(-1)


def test_a_default_device_changes_nothing():
    given, labels = exact_probabilities(16, 3, 4), torch.randint(4, (16,))
    expected = evaluate(Given(), in_batches(given, labels, [7, 9]))
    with torch.device("meta"):
        found = evaluate(Given(), in_batches(given, labels, [7, 9]))
        assert prediction_scores(given.mean(1), labels).ece == expected.ensemble.ece
    assert (found.members, found.ensemble) == (expected.members, expected.ensemble)
    assert found.disagreement == expected.disagreement


@covering(dtype=DTYPES, members=[1, 3], sizes=[[1], [33], [1, 31, 32, 33]])
def test_as_the_metrics_of_all_rows(dtype, members, sizes):
    rows = sum(sizes)
    given = exact_probabilities(rows, members, 4).to(dtype)
    labels = torch.randint(4, (rows,))
    found = evaluate(Given(), in_batches(given, labels, sizes), num_bins=7)

    each = [*given.unbind(1), given.double().mean(1)]
    for scores, p in zip([*found.members, found.ensemble], each, strict=True):
        close = {"rel": 1e-12, "abs": 1e-14}
        alone = dataclasses.asdict(prediction_scores(p, labels, num_bins=7))
        assert dataclasses.asdict(scores) == pytest.approx(alone, **close)
        assert scores.entropy == pytest.approx(entropy(p.double()).mean().item(), **close)
    p = given.double()
    information = (entropy(p.mean(1)) - entropy(p).mean(1)).clamp(min=0).mean().item()
    assert found.mutual_information == pytest.approx(information, abs=1e-12)
    classes = given.argmax(-1).T
    differing = [[(a != b).double().mean().item() for b in classes] for a in classes]
    assert found.disagreement == tuple(map(tuple, differing))
    assert (found.num_rows, found.num_bins) == (rows, 7)


def test_by_hand():
    """Two members, both sure; they differ on one of two rows, where the ensemble knows nothing."""
    given = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    found = evaluate(Given(), [(given, torch.tensor([0, 0]))])
    right, wrong = found.members
    assert (right.error, right.nll, right.brier, right.ece) == (0, 0, 0, 0)
    assert (wrong.error, wrong.brier, wrong.ece) == (0.5, 1, 0.5)
    assert wrong.nll == pytest.approx(-math.log(torch.finfo(torch.float32).tiny) / 2)
    assert found.ensemble.error == 0  # the first if tied
    assert found.ensemble.nll == pytest.approx(math.log(2) / 2)
    assert found.ensemble.brier == 0.25
    assert found.ensemble.ece == 0.25
    assert found.ensemble.entropy == pytest.approx(math.log(2) / 2)
    assert found.mutual_information == pytest.approx(math.log(2) / 2)
    assert found.disagreement == ((0, 0.5), (0.5, 0))
    assert (
        str(found)
        == """\
          error %      NLL   Brier     ECE  entropy
---------------------------------------------------
member 0     0.00   0.0000  0.0000  0.0000   0.0000
member 1    50.00  43.6683  1.0000  0.5000   0.0000
ensemble     0.00   0.3466  0.2500  0.2500   0.3466

2 rows; two members differ on 50.00% of them; mutual information 0.3466 nats"""
    )
    content = json.loads(json.dumps(dataclasses.asdict(found), allow_nan=False))
    assert content["members"][1]["brier"] == 1
    assert content["ensemble"]["ece"] == 0.25
    assert content["disagreement"] == [[0, 0.5], [0.5, 0]]
    assert (content["num_rows"], content["num_bins"]) == (2, 15)


def test_mutual_information_is_never_negative():
    """Members that agree have none, but for rounding."""
    for row in torch.randn(100, 1, 4, dtype=torch.float64).softmax(-1):
        found = evaluate(Given(), [(row.expand(1, 3, 4), torch.tensor([0]))])
        assert 0 <= found.mutual_information < 1e-14


def test_the_floor_of_the_nll_is_that_of_the_members_dtype():
    given = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float16)
    found = evaluate(Given(), [(given, torch.tensor([1]))])
    assert found.ensemble.nll == found.members[0].nll == pytest.approx(9.7, abs=0.05)


@pytest.mark.parametrize("pair", [tuple, list])
def test_several_inputs(pair):
    class OfTwo:
        def member_probabilities(self, x, y):
            yield (x + y).softmax(-1)

    x, y, labels = torch.randn(6, 3), torch.randn(6, 3), torch.randint(3, (6,))
    found = evaluate(OfTwo(), [pair([pair([x, y]), labels])])
    assert found.ensemble.nll == pytest.approx(prediction_scores((x + y).softmax(-1), labels).nll)
    assert found.disagreement == ((0.0,),)


def test_one_pass_that_keeps_no_predictions():
    seen = []

    class Watched:
        def member_probabilities(self, inputs):
            assert not torch.is_grad_enabled()
            for batch in seen[:-1]:  # the latest may still have a name
                assert all(reference() is None for reference in batch)
            members = [inputs.softmax(-1), inputs.flip(-1).softmax(-1)]
            seen.append([weakref.ref(p) for p in members])
            return members

    batches = iter([(torch.randn(4, 3), torch.randint(3, (4,))) for _ in range(5)])
    assert evaluate(Watched(), batches).num_rows == 20
    assert len(seen) == 5


def test_batches_by_name():
    """As a tokenizer's and a Trainer's collator give them, for models that return such outputs."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, values, mask=None):
            return {"loss": None, "logits": self.linear(values if mask is None else values * mask)}

    ensemble = SnapshotEnsemble(Named(), [Named().state_dict() for _ in range(3)])
    x, mask, y = torch.randn(7, 3), torch.randint(2, (7, 3)), torch.randint(4, (7,))
    expected = evaluate(
        Given(), [(torch.stack(list(ensemble.member_probabilities(x, mask)), 1), y)]
    )
    for batch in ({"values": x, "labels": y, "mask": mask}, ({"values": x, "mask": mask}, y)):
        assert evaluate(ensemble, [batch]) == expected
    with pytest.raises(TypeError, match=r"batches must give .* got a dict of 'values', 'mask'"):
        evaluate(ensemble, [{"values": x, "mask": mask}])


HALF = torch.full((2, 2, 2), 0.5)
Y = torch.tensor([0, 1])
REFUSED = {
    "no batch": ([], ValueError, "batches must give at least one batch, got none"),
    "no labels": ([HALF], TypeError, r"pairs \(inputs, labels\), or .* got a Tensor"),
    "a triple": ([(HALF, Y, Y)], TypeError, r"pairs \(inputs, labels\), or .* got a tuple of 3"),
    "an array": ([(HALF.numpy(), Y)], TypeError, r"batches\[0\] must hold tensors, got a NumPy"),
    "labels in an array": ([(HALF, Y), (HALF, Y.numpy())], TypeError, r"batches\[1\] .*from_numpy"),
    "no members": ([(HALF[:, :0], Y)], ValueError, "at least one: expected 1, got 0"),
    "fewer members": ([(HALF, Y), (HALF[:, :1], Y)], ValueError, "same members .* 2, got 1"),
    "logits": ([(HALF * torch.tensor([[1.0], [2]]), Y)], ValueError, r"members\[1\]\[0\] must su"),
    "label too high": ([(HALF, Y + 1)], ValueError, r"labels\[1\] must be in 0\.\.1, got 2"),
    "an empty batch": ([(HALF[:0], Y[:0])], ValueError, r"members\[0\] must have shape \[B, C\]"),
}


@pytest.mark.parametrize(("batches", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refused(batches, error, match):
    with pytest.raises(error, match=match):
        evaluate(Given(), batches)


def test_refused_members_and_bins():
    class Uneven:
        def member_probabilities(self, inputs):
            return [torch.full((2, 2), 0.5), torch.full((2, 4), 0.25)]

    with pytest.raises(ValueError, match=r"members\[1\] must be like the first member, \[2, 2\]"):
        evaluate(Uneven(), [(HALF, Y)])
    with pytest.raises(ValueError, match="num_bins must be >= 1, got 0"):  # before anything runs
        evaluate(Given(), iter(lambda: 1 / 0, None), num_bins=0)
