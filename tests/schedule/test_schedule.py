"""Schedules against the papers' formulae, written out again here by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastfreeze.schedule import (
    Constant,
    Cosine,
    FreezeOut,
    FreezeOutCycles,
    Frozen,
    GradualUnfreezing,
    SegmentTable,
    SnapshotCycles,
    StepDecay,
    from_config,
)

POWERS = {"linear": 1, "squared": 2, "cubic": 3}
Cycles = partial(FreezeOutCycles, 90, num_cycles=4, t_0=0.5)
SCHEDULES = {
    "constant": Constant(90),
    "cosine": Cosine(90, eta_min=0.01),
    "cycles": SnapshotCycles(90, num_cycles=4),
    "freezeout": FreezeOut(90, t_0=0.5),
    "sticky": Cycles(),
    "sticky to the end": FreezeOutCycles(90, num_cycles=3, t_0=1.0),
    "last_k": Cycles(composition="last_k", k=2),
    "thaw": Cycles(composition="thaw", scale_lr=False),
    "staged": FreezeOut(90, t_0=0.5, stages=9),
    "staged sticky": Cycles(stages=2),
    "staged thaw": Cycles(composition="thaw", stages=3),
    "step decay": StepDecay(90, num_cycles=3),
    "frozen": Frozen(90, until=4),
    "unfreezing": GradualUnfreezing(90, unfreeze_every=9),
    "all": Cycles(warmup_steps=40, layer_decay=0.9),
}
NEEDS_LAYERS = [SCHEDULES["frozen"]]  # a head, and more than one before it
any_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def test_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; "
        "from fastfreeze.schedule import Cosine; print(Cosine(10).lr(0, 0.1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "0.1"


def by_hand(schedule, t, i, N):
    """The rate of layer ``i`` of 0..N at step ``t``, from 1: FreezeOut's, in one cycle or several.

    Snapshot Ensembles, eq. 2, t = 1..T: lr0/2 * (cos(pi * mod(t-1, L) / L) + 1), L = ceil(T/M).
    FreezeOut: t_i = T * ratio_i from the scaled, powered linear spacing; zero from t_i on.
    """
    M, composition = getattr(schedule, "num_cycles", 1), getattr(schedule, "composition", "")
    L = math.ceil(schedule.total_steps / M)
    c, t = divmod(t, L)
    first, behind = 0, N if schedule.freezes else 0  # the layers that freeze in this cycle
    if composition == "sticky":
        first, behind = (N * (x - 1) // (M - 1) if x else 0 for x in (c, c + 1))
    if composition == "last_k" and c < M - schedule.k:
        behind = 0
    ratio = 1.0
    if first <= i < behind:
        stage = [j * (schedule.stages or behind) // (behind - first) for j in range(behind - first)]
        last = max(j for j, of in enumerate(stage) if of == stage[i - first] or j == i - first)
        x = schedule.t_0 + (1 - schedule.t_0) * last / (N - first)
        ratio = x ** POWERS[schedule.how_scale]
    if i < first or t >= L * ratio:
        return 0.0
    highest = 1 / ratio if schedule.freezes and schedule.scale_lr else 1.0
    return highest / 2 * (1 + math.cos(math.pi * t / (L * ratio)))


@given(
    T=st.integers(1, 300),
    M=st.integers(1, 9),
    layers=st.integers(1, 20),
    t_0=st.floats(0.05, 1),
    how_scale=st.sampled_from(list(POWERS)),
    scale_lr=st.booleans(),
    stages=st.none() | st.integers(1, 22),
    kind=st.sampled_from(["cycles", "freezeout", "sticky", "last_k", "thaw"]),
    k=st.integers(1, 9),
)
@settings(max_examples=150)
def test_rates_equal_the_papers_closed_forms(T, M, layers, kind, k, **arguments):
    cycles = {"num_cycles": M}
    if M > T or math.ceil(T / math.ceil(T / M)) != M:
        with pytest.raises(ValueError, match="num_cycles"):
            SnapshotCycles(T, **cycles)
        return
    assume(M > 1 if kind == "sticky" else k <= M)
    if kind == "cycles":
        schedule = SnapshotCycles(T, **cycles)
    elif kind == "freezeout":
        schedule = FreezeOut(T, **arguments)
    else:
        cycles |= {"composition": kind, "k": k if kind == "last_k" else None}
        schedule = FreezeOutCycles(T, **cycles, **arguments)
    for i in {0, layers // 2, layers - 1}:
        expected = [by_hand(schedule, t, i, layers - 1) for t in range(T)]
        np.testing.assert_allclose(schedule.lr(range(T), 1.0, i, layers), expected, atol=1e-12)
        frozen = [schedule.is_frozen(t, i, layers) for t in range(T)]
        assert all(lr < 1e-12 for lr, is_frozen in zip(expected, frozen, strict=True) if is_frozen)
    if kind == "freezeout":
        found = [schedule.freeze_steps(i, layers) for i in range(layers)]
        assert len(set(found)) - 1 <= (schedule.stages or layers)


@any_schedule
def test_what_a_schedule_tells_agrees(schedule):
    """Rates, what is frozen, when that changes; numbers and arrays; a config of plain data."""
    steps = np.arange(90).reshape(6, 15)
    for layers in (1, 5, 10) if schedule not in NEEDS_LAYERS else (5, 10):
        by_step = dict(schedule.frozen_layers(layers))
        now = [{i for i in range(layers) if schedule.is_frozen(t, i, layers)} for t in range(90)]
        assert list(by_step) == [t for t in range(90) if not t or now[t] != now[t - 1]]
        assert all(now[t] == frozen for t, frozen in by_step.items())
        for i in range(layers):
            frozen = np.array([i in found for found in now])
            lrs = schedule.lr(steps, 0.1, i, layers)
            assert (lrs.ravel() > 0).tolist() == (~frozen).tolist()
            assert lrs[2].tolist() == [schedule.lr(int(t), 0.1, i, layers) for t in steps[2]]
            changes = np.diff(frozen.astype(int), prepend=0)
            assert tuple(np.flatnonzero(changes == 1)) == schedule.freeze_steps(i, layers)
            assert tuple(np.flatnonzero(changes == -1)) == schedule.thaw_steps(i, layers)
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
    assert cosine.lr([0, 1000], 0.3).tolist() == [0.3, 0.001]
    assert cosine.lr(500, 0.3) == pytest.approx(0.1505, abs=1e-15)
    cycles = SnapshotCycles(100, num_cycles=5)
    assert cycles.lr([0, 20, 40, 60, 80, 100], 0.1).tolist() == [0.1] * 5 + [0]
    assert cycles.cycle_ends == (20, 40, 60, 80, 100)
    assert 0 < cycles.lr(99, 0.1) < 0.001
    cut_short = SnapshotCycles(10, num_cycles=4)  # cycles of 3, 3, 3 and 1
    assert cut_short.cycle_ends == (3, 6, 9, 10)
    assert cut_short.lr(9, 0.1) == 0.1
    assert Constant(7).lr(range(8), 0.5).tolist() == [0.5] * 8
    decay = StepDecay(90, num_cycles=3)
    assert decay.lr([44, 45, 66, 67], 1.0).tolist() == [1, 0.1, 0.1, 0.01]
    thaw = FreezeOutCycles(400, num_cycles=4, t_0=0.5, composition="thaw")
    assert thaw.lr([0, 100, 200, 300], 0.1, 0, 5).tolist() == [0.1 / 0.125] * 4
    assert thaw.freeze_steps(0, 5) == (13, 113, 213, 313)


def test_freezeout_worked_values():
    # t_0 = 0.8, cubic, 1000 steps, 5 layers: ratios 0.512, 0.614, 0.729, 0.857, 1.
    schedule = FreezeOut(1000, t_0=0.8)
    assert [schedule.freeze_steps(i, 5) for i in range(5)] == [(512,), (615,), (729,), (858,), ()]
    assert schedule.lr(0, 0.1, 0, 5) == 0.1 / 0.8**3
    assert schedule.freeze_steps(0, 1) == ()  # the head
    assert 1000 * 0.8**2 > 640  # in floating point
    assert FreezeOut(1000, t_0=0.8, how_scale="squared").freeze_steps(0, 5) == (640,)
    # In stages layers 0 and 1 freeze together, and 2 and 3.
    staged = FreezeOut(1000, t_0=0.8, stages=2)
    assert [staged.freeze_steps(i, 5) for i in range(5)] == [(615,)] * 2 + [(858,)] * 2 + [()]
    sticky = FreezeOutCycles(1000, num_cycles=5, t_0=0.5)
    assert [sticky.first_active_layer(c, 9) for c in range(6)] == [0, 0, 2, 4, 6, 8]


@given(T=st.integers(2, 500), layers=st.integers(2, 30), stages=st.integers(1, 35))
def test_stages_are_as_equal_as_can_be(T, layers, stages):
    schedule = FreezeOut(T, t_0=0.5, stages=stages)
    rows = [schedule.segments(i, layers)[0] for i in range(layers - 1)]
    sizes = [rows.count(row) for row in dict.fromkeys(rows)]
    assert len(sizes) == min(stages, layers - 1)
    assert max(sizes) - min(sizes) <= 1


VALUES = [
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
]
TYPES = [
    (lambda: Cosine(10.5), "total_steps must be an int >= 1, got 10.5"),
    (lambda: Cosine(10, eta_min="x"), "eta_min must be a number >= 0, got 'x'"),
    (lambda: FreezeOut(10, stages=2.0), "stages must be an int >= 1, got 2.0"),
    (lambda: FreezeOut(10, t_0="x"), r"t_0 must be a number in \(0, 1\], got 'x'"),
    (lambda: FreezeOut(10, scale_lr="x"), "scale_lr must be a bool, got 'x'"),
    (lambda: Cosine(10, warmup_steps=0.5), "warmup_steps must be an int in 0..10, got 0.5"),
    (lambda: Cosine(10, layer_decay=None), r"layer_decay must be a number in \(0, 1\], got None"),
    (lambda: GradualUnfreezing(10, unfreeze_every=1.5), "unfreeze_every must be an int >= 1"),
    (lambda: Frozen(10, until=True), "until must be an int >= 1, got True"),
    (lambda: Frozen(10, until=None), r"until must be a number in \(0, 1\), a layer's"),
    (lambda: Cosine(10).lr(0, "x"), "initial_lr must be a number >= 0, got 'x'"),
]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [*((m, ValueError, text) for m, text in VALUES), *((m, TypeError, text) for m, text in TYPES)],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_table_follows_the_initial_rates():
    table = SegmentTable([Cosine(10).segments()])
    assert [table.lrs(0, np.array([lr])) for lr in (1.0, 2.0)] == [[1.0], [2.0]]


def test_numpys_numbers_are_numbers():
    narrow = FreezeOutCycles(np.int64(10), num_cycles=2, t_0=np.float32(0.5), eta_min=np.float64(0))
    plain = FreezeOutCycles(10, num_cycles=2, t_0=0.5)
    assert narrow.lr(3, np.float32(0.5)) == plain.lr(3, 0.5)
    assert json.dumps(narrow.config()) == json.dumps(plain.config())
