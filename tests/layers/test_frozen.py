"""Notes on parameters: what a schedule froze, and what a plan said of them."""

import copy

import torch
from torch import nn

from fastfreeze.layers.frozen import frozen_by_schedule, note_frozen, note_plan, planned
from fastfreeze.layers.split import split
from fastfreeze.schedule import Cosine, FreezeOut


def test_a_mark_lasts_until_a_thaw_by_anyone():
    a, b, c = (nn.Parameter(torch.zeros(2)).requires_grad_(False) for _ in range(3))
    note_frozen([a, c])
    c.requires_grad_(True)
    assert frozen_by_schedule([a, b]) == [a]
    assert not frozen_by_schedule([copy.deepcopy(a)])
    assert not frozen_by_schedule([a, b, c])  # one was thawed by hand: the user knows
    assert not frozen_by_schedule([a])


def test_the_latest_plan_counts_and_two_plans_are_none():
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    assert planned([a]) is None
    note_plan([a, b], Cosine(3), 0.1)
    note_plan([a, b], FreezeOut(5), None)
    assert planned([c, a, b]) == (FreezeOut(5).config(), None)
    note_plan([c], FreezeOut(5), 0.1)
    assert planned([a, c]) is None


def test_notes_hinder_neither_swaps_nor_safe_loading(tmp_path):
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    note_frozen([a])
    note_plan([a], FreezeOut(5), 0.1)
    torch.utils.swap_tensors(a, b)
    torch.save([a, b], tmp_path / "parameters.pt")
    assert torch.load(tmp_path / "parameters.pt", weights_only=True)[0].sum() == 2


def test_a_plan_is_noted_where_its_groups_are_taken():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first = split(model, schedule=FreezeOut(5), lr=0.2)
    split(model)  # looked at, not trained by
    assert planned(model.parameters()) is None
    first.param_groups()
    assert planned(model.parameters()) == (FreezeOut(5).config(), 0.2)
