"""Schedules against the papers' formulae, written out again here by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastfreeze.schedule import (
    Constant,
    Cosine,
    FreezeOut,
    FreezeOutCycles,
    Frozen,
    GradualUnfreezing,
    Segment,
    SnapshotCycles,
    StepDecay,
    freezeout_ratio,
    from_config,
)

SCHEDULES = {
    "constant": Constant(90),
    "cosine": Cosine(90, eta_min=0.01),
    "cycles": SnapshotCycles(90, num_cycles=4),
    "freezeout": FreezeOut(90, t_0=0.5),
    "sticky": FreezeOutCycles(90, num_cycles=4, t_0=0.5),
    "last_k": FreezeOutCycles(90, num_cycles=4, t_0=0.5, composition="last_k", k=2),
    "thaw": FreezeOutCycles(90, num_cycles=4, t_0=0.5, composition="thaw", scale_lr=False),
    "staged": FreezeOut(90, t_0=0.5, stages=9),
    "staged sticky": FreezeOutCycles(90, num_cycles=4, t_0=0.5, stages=2),
    "staged thaw": FreezeOutCycles(90, num_cycles=4, t_0=0.5, composition="thaw", stages=3),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
FINE_TUNING = {
    "step decay": StepDecay(90, num_cycles=3),
    "frozen": Frozen(90, until=4),
    "unfreezing": GradualUnfreezing(90, unfreeze_every=9),
    "warm": FreezeOut(90, t_0=0.5, warmup_steps=7),
    "decayed": SnapshotCycles(90, num_cycles=4, layer_decay=0.5),
    "all": FreezeOutCycles(90, num_cycles=4, t_0=0.5, warmup_steps=40, layer_decay=0.9),
}
ALL = {**SCHEDULES, **FINE_TUNING}
any_schedule = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)


def test_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; "
        "from fastfreeze.schedule import Cosine; print(Cosine(10).lr(0, 0.1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "0.1"


# Snapshot Ensembles, eq. 2, t = 1..T: lr0/2 * (cos(pi * mod(t-1, ceil(T/M)) / ceil(T/M)) + 1).
def paper_snapshot_lr(t, T, M, lr0):
    L = math.ceil(T / M)
    return lr0 / 2 * (math.cos(math.pi * ((t - 1) % L) / L) + 1)


# FreezeOut: t_i from the scaled, powered linear spacing; zero from t_i on.
def paper_freezeout_lr(t, T, i, N, t_0, power, scale, lr0):
    ratio = (t_0 + (1 - t_0) * i / N) ** power
    if t >= T * ratio:
        return 0.0
    return 0.5 * (lr0 / ratio if scale else lr0) * (1 + math.cos(math.pi * t / (T * ratio)))


@given(st.integers(1, 400), st.integers(1, 12), st.floats(1e-4, 10))
def test_cycles_equal_the_papers_closed_form(T, M, lr0):
    if M > T or math.ceil(T / math.ceil(T / M)) != M:
        with pytest.raises(ValueError, match="num_cycles"):
            SnapshotCycles(T, num_cycles=M)
        return
    ours = SnapshotCycles(T, num_cycles=M).lr(range(T), lr0)
    np.testing.assert_allclose(
        ours, [paper_snapshot_lr(t, T, M, lr0) for t in range(1, T + 1)], rtol=1e-12, atol=1e-14
    )


@given(
    st.integers(2, 500),
    st.integers(2, 20),
    st.floats(0.05, 1),
    st.sampled_from(["linear", "squared", "cubic"]),
    st.booleans(),
)
def test_freezeout_equals_the_papers_closed_form(T, layers, t_0, how_scale, scale):
    power = ["linear", "squared", "cubic"].index(how_scale) + 1
    schedule = FreezeOut(T, t_0=t_0, how_scale=how_scale, scale_lr=scale)
    for i in {0, layers // 2, layers - 1}:
        ours = schedule.lr(range(T), 0.1, i, layers)
        paper = [paper_freezeout_lr(t, T, i, layers - 1, t_0, power, scale, 0.1) for t in range(T)]
        np.testing.assert_allclose(ours, paper, rtol=1e-9, atol=1e-12)


@every_schedule
def test_range_and_freezing_agree(schedule):
    for layer in (0, 3, 9):
        lrs = schedule.lr(range(91), 0.1, layer, 10)
        frozen = [schedule.is_frozen(s, layer, 10) for s in range(90)]
        assert (lrs >= 0).all()
        assert (lrs[:90][frozen] == 0).all()
        assert (lrs[:90][~np.array(frozen)] > 0).all()
        assert np.mean(frozen) == pytest.approx(schedule.frozen_share(layer, 10))
        became = [s for s in range(1, 90) if frozen[s] and not frozen[s - 1]]
        assert became == list(schedule.freeze_steps(layer, 10))
        ratios = [freezeout_ratio(i, 9, 0.5, "cubic") for i in range(10)]
        later = ratios[layer:] if getattr(schedule, "stages", None) else ratios[layer : layer + 1]
        assert lrs[0] == 0.1 or any(lrs[0] == pytest.approx(0.1 / ratio) for ratio in later)
        for begin, end in itertools.pairwise((0, *schedule.cycle_ends)):
            assert (np.diff(lrs[begin:end]) <= 1e-15).all()


@any_schedule
def test_scalar_and_array_agree_and_so_does_a_config(schedule):
    steps = np.arange(90).reshape(6, 15)
    lrs = schedule.lr(steps, 0.1, 2, 10)
    assert lrs.shape == (6, 15)
    assert lrs.ravel().tolist() == [schedule.lr(int(s), 0.1, 2, 10) for s in range(90)]
    assert from_config(json.loads(json.dumps(schedule.config()))) == schedule


@any_schedule
@given(warmup_steps=st.integers(0, 90), decay=st.floats(0.1, 1), layer=st.integers(0, 9))
def test_warm_up_and_decay_multiply_every_rate(schedule, warmup_steps, decay, layer):
    plain = dataclasses.replace(schedule, warmup_steps=0, layer_decay=1.0)
    decay = 1.0 if plain.eta_min else decay
    ours = dataclasses.replace(plain, warmup_steps=warmup_steps, layer_decay=decay)
    warm = [min(1, (t + 1) / warmup_steps) if warmup_steps else 1 for t in range(91)]
    expected = plain.lr(range(91), 0.1, layer, 10) * warm * decay ** (9 - layer)
    np.testing.assert_allclose(ours.lr(range(91), 0.1, layer, 10), expected, rtol=1e-12)
    assert ours.frozen_layers(10) == plain.frozen_layers(10)


@given(st.integers(1, 400), st.integers(1, 30), st.integers(1, 12), st.floats(0.2, 1))
def test_unfreezing_is_a_cosine_from_each_layers_start(T, every, layers, decay):
    schedule = GradualUnfreezing(T, unfreeze_every=every, layer_decay=decay)
    if (layers - 1) * every >= T:
        with pytest.raises(ValueError, match=f"layer 0 of {layers} at step .* total_steps={T}"):
            schedule.segments(0, layers)
        return
    for i in {0, layers // 2, layers - 1}:
        start = (layers - 1 - i) * every
        lr0 = 0.1 * decay ** (layers - 1 - i)
        expected = [
            0 if t < start else lr0 / 2 * (1 + math.cos(math.pi * (t - start) / (T - start)))
            for t in range(T)
        ]
        np.testing.assert_allclose(schedule.lr(range(T), 0.1, i, layers), expected, rtol=1e-9)
        assert schedule.thaw_steps(i, layers) == ((start,) if start else ())


def test_frozen_is_a_prefix_and_a_cosine():
    schedule = Frozen(100, until=2, layer_decay=0.5)
    assert schedule.frozen_layers(5) == ((0, frozenset({0, 1})),)
    assert [schedule.frozen_share(i, 5) for i in range(5)] == [1, 1, 0, 0, 0]
    assert schedule.lr(50, 0.4, 2, 5) == pytest.approx(Cosine(100).lr(50, 0.1))


NAMES = ["stem", "layer1.0", "layer1.1", "layer2.0", "head"]
COSTS = [10, 40, 20, 25, 5]
UNTIL = {"layer1": 1, "layer1.1": 2, "head": 4, 0.1: 1, 0.5: 2, 0.69: 2, 0.7: 3, 0.99: 4, 3: 3}
UNTIL |= {np.int64(2): 2, np.float32(0.25): 1}


@pytest.mark.parametrize(("until", "index"), UNTIL.items(), ids=map(str, UNTIL))
def test_a_plan_resolves_a_name_or_a_share(until, index):
    resolved = Frozen(10, until=until, warmup_steps=2).for_layers(NAMES, COSTS)
    assert resolved == Frozen(10, until=index, warmup_steps=2)
    json.dumps(Frozen(10, until=until).config())


def test_exact_at_ends_and_restarts():
    cosine = Cosine(1000, eta_min=0.001)
    assert cosine.lr(0, 0.3) == 0.3
    assert cosine.lr(1000, 0.3) == 0.001
    assert cosine.lr(500, 0.3) == pytest.approx(0.1505, abs=1e-15)
    cycles = SnapshotCycles(100, num_cycles=5)
    assert cycles.lr([0, 20, 40, 60, 80], 0.1).tolist() == [0.1] * 5
    assert 0 < cycles.lr(99, 0.1) < 0.001
    assert cycles.lr(100, 0.1) == 0
    assert cycles.cycle_ends == (20, 40, 60, 80, 100)
    cut_short = SnapshotCycles(10, num_cycles=4)  # cycles of 3, 3, 3 and 1
    assert cut_short.cycle_ends == (3, 6, 9, 10)
    assert cut_short.lr(9, 0.1) == 0.1
    assert Constant(7).segments() == (Segment(0, math.inf),)
    assert Constant(7).lr(range(8), 0.5).tolist() == [0.5] * 8


def test_freezeout_worked_values():
    # t_0 = 0.8, cubic, 1000 steps, 5 layers: ratios 0.512, 0.614, 0.729, 0.857, 1.
    schedule = FreezeOut(1000, t_0=0.8)
    assert [schedule.freeze_steps(i, 5) for i in range(5)] == [(512,), (615,), (729,), (858,), ()]
    assert schedule.lr(0, 0.1, 0, 5) == 0.1 / 0.8**3
    assert schedule.lr(256, 0.1, 0, 5) == pytest.approx(0.5 * 0.1 / 0.512)
    assert schedule.lr(1000, 0.1, 4, 5) == 0
    assert schedule.freeze_steps(0, 1) == ()  # the head
    assert 1000 * 0.8**2 > 640  # in floating point
    assert FreezeOut(1000, t_0=0.8, how_scale="squared").freeze_steps(0, 5) == (640,)
    # In stages layers 0 and 1 freeze together, and 2 and 3.
    staged = FreezeOut(1000, t_0=0.8, stages=2)
    assert [staged.freeze_steps(i, 5) for i in range(5)] == [(615,)] * 2 + [(858,)] * 2 + [()]
    assert staged.lr(0, 0.1, 0, 5) == staged.lr(0, 0.1, 1, 5) == pytest.approx(0.1 / 0.85**3)
    assert 0 < staged.lr(614, 0.1, 0, 5) < 1e-4
    for stages in (None, 2):
        unscaled = FreezeOut(1000, t_0=0.8, stages=stages, scale_lr=False)
        assert unscaled.lr(0, 0.1, 0, 5) == 0.1


def test_sticky_freezes_a_growing_prefix():
    schedule = FreezeOutCycles(1000, num_cycles=5, t_0=0.5)
    first = [schedule.first_active_layer(c, 9) for c in range(6)]
    assert first == [0, 0, 2, 4, 6, 8]
    for cycle in range(5):
        frozen = [schedule.is_frozen(200 * cycle, i, 9) for i in range(9)]
        assert frozen == [i < first[cycle] for i in range(9)]
    # Once frozen, frozen for good; and the whole prefix but the head by the end.
    for i in range(8):
        states = [schedule.is_frozen(s, i, 9) for s in range(1000)]
        assert states == sorted(states)
        assert states[-1]
    assert not schedule.is_frozen(999, 8, 9)


def test_sticky_stretch_follows_freezeout_within_its_cycle():
    schedule = FreezeOutCycles(1000, num_cycles=5, t_0=0.5)
    within = FreezeOut(200, t_0=0.5)
    ours = schedule.lr(range(400, 600), 0.1, 3, 9)  # layers 2 and 3 freeze in the third cycle
    np.testing.assert_allclose(ours, within.lr(range(200), 0.1, 1, 7))  # 7 layers trained before


def test_thaw_restarts_every_layer():
    schedule = FreezeOutCycles(400, num_cycles=4, t_0=0.5, composition="thaw")
    assert schedule.freeze_steps(0, 5) == (13, 113, 213, 313)
    assert schedule.thaw_steps(0, 5) == (100, 200, 300)
    assert schedule.thaw_steps(4, 5) == Frozen(9, until=1).thaw_steps(0, 2) == ()
    assert schedule.lr([0, 100, 200, 300], 0.1, 0, 5).tolist() == [0.1 / 0.125] * 4


def test_last_k_freezes_in_the_last_cycles_alone():
    schedule = FreezeOutCycles(400, num_cycles=4, t_0=0.5, composition="last_k", k=1)
    assert schedule.freeze_steps(0, 5) == (313,)
    plain = SnapshotCycles(400, num_cycles=4)
    steps = range(300)
    assert (schedule.lr(steps, 0.1, 0, 5) == plain.lr(steps, 0.1)).all()


@given(
    st.integers(2, 500),
    st.integers(1, 30),
    st.integers(1, 35),
    st.floats(0.05, 0.99),
    st.sampled_from(["linear", "squared", "cubic"]),
    st.booleans(),
)
def test_a_stage_takes_the_ratio_of_its_last_layer(T, layers, stages, t_0, how_scale, scale):
    paper = FreezeOut(T, t_0=t_0, how_scale=how_scale, scale_lr=scale)
    ours = dataclasses.replace(paper, stages=stages)
    own = [paper.segments(i, layers)[0] for i in range(layers)]
    grouped = [ours.segments(i, layers)[0] for i in range(layers)]
    runs = [list(run) for _, run in itertools.groupby(range(layers - 1), lambda i: grouped[i])]
    assert len(runs) == min(stages, layers - 1)
    for run in runs:
        assert {grouped[i] for i in run} == {own[run[-1]]}
    sizes = [len(run) for run in runs]
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert grouped[-1] == own[-1]
    steps = {s for i in range(layers) for s in ours.freeze_steps(i, layers)}
    assert len(steps) <= stages


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_cycles_have_so_many_stages_each(stages):
    sticky = FreezeOutCycles(1000, num_cycles=3, t_0=0.5, stages=stages)
    own = FreezeOutCycles(1000, num_cycles=3, t_0=0.5)
    for cycle in (1, 2):
        first, behind = (sticky.first_active_layer(c, 11) for c in (cycle, cycle + 1))
        freezing = [sticky.freeze_steps(i, 11)[0] for i in range(first, behind)]
        assert len(set(freezing)) == stages
        assert freezing[-1] == own.freeze_steps(behind - 1, 11)[0]
    thaw = FreezeOutCycles(1000, num_cycles=2, t_0=0.5, composition="thaw", stages=stages)
    once = FreezeOut(500, t_0=0.5, stages=stages)
    for i in range(11):
        assert thaw.freeze_steps(i, 11) == tuple(
            step + start for start in (0, 500) for step in once.freeze_steps(i, 11)
        )


@every_schedule
def test_what_is_frozen_when(schedule):
    for layers in (1, 2, 10):
        found = dict(schedule.frozen_layers(layers))
        assert min(found) == 0
        frozen = None
        for step in range(90):
            now = {i for i in range(layers) if schedule.is_frozen(step, i, layers)}
            assert (step in found) == (now != frozen)
            frozen = found.get(step, frozen)
            assert now == frozen


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(0), "total_steps must be >= 1, got 0"),
        (lambda: Cosine(10, eta_min=-1.0), "eta_min must be finite and >= 0, got -1.0"),
        (lambda: SnapshotCycles(3, num_cycles=4), "num_cycles must be at most total_steps=3"),
        (lambda: SnapshotCycles(10, num_cycles=6), "use num_cycles=5"),
        (lambda: FreezeOut(10, t_0=0.0), r"t_0 must be in \(0, 1\], got 0.0"),
        (lambda: FreezeOut(10, t_0=math.nan), r"t_0 must be in \(0, 1\], got nan"),
        (lambda: FreezeOut(10, how_scale="quartic"), "how_scale must be one of"),
        (lambda: FreezeOut(10, stages=0), "stages must be >= 1, got 0"),
        (lambda: FreezeOutCycles(10, num_cycles=2, composition="melt"), "composition must be"),
        (lambda: FreezeOutCycles(10, num_cycles=2, composition="last_k"), "needs k"),
        (lambda: FreezeOutCycles(10, num_cycles=2, composition="last_k", k=3), "k must be in 1..2"),
        (lambda: FreezeOutCycles(10, num_cycles=2, k=1), "k is for composition='last_k' alone"),
        (lambda: FreezeOutCycles(10, num_cycles=1), "from the second cycle on"),
        (lambda: Cosine(10, warmup_steps=11), "warmup_steps must be in 0..10, got 11"),
        (lambda: Constant(10, layer_decay=1.1), r"layer_decay must be in \(0, 1\], got 1.1"),
        (lambda: Cosine(10, layer_decay=0.5, eta_min=0.1), "eta_min must be 0 where layer_decay"),
        (lambda: GradualUnfreezing(10, unfreeze_every=0), "unfreeze_every must be >= 1, got 0"),
        (lambda: Frozen(10, until=0), "until must be >= 1, got 0"),
        (lambda: Frozen(10, until=1.5), r"until must be a share in \(0, 1\), .* got 1.5"),
        (lambda: Frozen(10, until=3).segments(0, 3), "until must be in 1..2, as the head trains"),
        (lambda: Frozen(10, until="a").lr(0, 0.1, 0, 3), "until='a' is for a plan to resolve"),
        (lambda: Frozen(10, until="layer").for_layers(NAMES, COSTS), "got 'layer'"),
        (lambda: Frozen(10, until="stem").for_layers(NAMES, COSTS), "'stem' freezes no layer"),
        (lambda: Frozen(10, until=0.09).for_layers(NAMES, COSTS), "alone has 0.100 of the comp"),
        (lambda: Frozen(10, until=0.5).for_layers(NAMES, None), "give split an example input"),
        (lambda: Cosine(10).lr(11, 0.1), "step must be in 0..10"),
        (lambda: Cosine(10).lr(math.nan, 0.1), r"step must be in 0..10 \(total_steps\), got nan"),
        (lambda: Cosine(10).lr([1, math.nan], 0.1), "step must be in 0..10"),
        (lambda: Cosine(10).lr(0, math.inf), "initial_lr must be finite"),
        (lambda: Cosine(10, eta_min=0.2).lr(0, 0.1), "eta_min must not exceed"),
        (lambda: FreezeOut(10).lr(0, 0.1, 3, 3), "layer_index must be in 0..2, got 3"),
        (lambda: from_config({"name": "Linear"}), "schedule name must be one of"),
        (lambda: from_config({"name": "Cosine", "steps": 1}), "bad arguments for schedule Cosine"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(10.5), "total_steps must be an int >= 1, got 10.5"),
        (lambda: Cosine(10, eta_min="x"), "eta_min must be a number >= 0, got 'x'"),
        (lambda: FreezeOut(10, stages=2.0), "stages must be an int >= 1, got 2.0"),
        (lambda: FreezeOut(10, t_0="x"), "t_0 must be a number in (0, 1], got 'x'"),
        (lambda: FreezeOut(10, scale_lr="x"), "scale_lr must be a bool, got 'x'"),
        (lambda: Cosine(10, warmup_steps=0.5), "warmup_steps must be an int in 0..10, got 0.5"),
        (lambda: Cosine(10, layer_decay=None), "layer_decay must be a number in (0, 1], got None"),
        (lambda: GradualUnfreezing(10, unfreeze_every=1.5), "unfreeze_every must be an int >= 1"),
        (lambda: Frozen(10, until=True), "until must be an int >= 1, got True"),
        (lambda: Frozen(10, until=None), "until must be a number in (0, 1), a layer's index or"),
        (lambda: Cosine(10).lr(0, "x"), "initial_lr must be a number >= 0, got 'x'"),
    ],
)
def test_values_of_another_type(make, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        make()


def test_what_is_as_good_as_a_float_is_a_number():
    narrow = FreezeOutCycles(10, num_cycles=2, t_0=np.float32(0.5), eta_min=np.float64(0))
    assert narrow.lr(3, np.float32(0.5)) == FreezeOutCycles(10, num_cycles=2, t_0=0.5).lr(3, 0.5)
