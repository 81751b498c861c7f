"""The CUDA kernels of the optimizers, emulated under the sanitizers: memory and races.

What they compute is checked here for each length of runs, and by test_steps.py and
test_steps_device.py, through the same emulation without sanitizers. None of it is a GPU run.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastfreeze.kernels.library import KERNEL_DTYPES
from fastfreeze.optim import SGD, AdamW
from fastfreeze.schedule import FreezeOutCycles
from tests.covering import covering
from tests.kernels.emulation.steps import EmulatedLaunch, install
from tests.kernels.steps import CASES, assert_right

# One run each, and two: a sanitized launch of more would take long.
SIZES = [1, 33, 2048, 2049]
OFFSETS = {"aligned": 0, "unaligned": 1}
FEW = ("sgd", "nesterov", "momentum, scaled", "momentum, wide")
FEW += ("adam, decays", "adam, wide", "adam, scaled")
EACH = {name: CASES[name] for name in FEW}


@pytest.fixture(params=["address", "thread"])
def sanitizer(request, monkeypatch):
    install(monkeypatch, request.param, multiprocessors=1)  # runs of 512
    return request.param


@pytest.mark.slow
@covering(
    "sanitizer", sanitizer=["address", "thread"], dtype=KERNEL_DTYPES, case=EACH, offset=OFFSETS
)
def test_a_step(sanitizer, dtype, case, offset):
    def tensors(make):
        return [make(n + offset).to(dtype)[offset:] for n in SIZES]

    assert_right("cuda", case, tensors, 2)  # a state's first step and one after it


# How many tensors of each size, and the length of the runs that all find one of 16 places: there
# are 11 of 512 for each, 7 of 1024, 5 of 2048.
RUNS = {"512": (1, 512), "1024": (2, 1024), "2048": (3, 2048)}


@covering(dtype=KERNEL_DTYPES, case=EACH, run=RUNS, offset=OFFSETS)
def test_runs_of_each_length(monkeypatch, dtype, case, run, offset):
    many, elements = run
    made, around = [], []

    def tensors(make):
        poisoned = [torch.full((n + 9,), torch.nan, dtype=dtype) for n in SIZES * many]
        around.extend(poisoned)
        for flat in poisoned:
            flat[offset : flat.numel() - 9 + offset] = make(flat.numel() - 9)
        return [flat[offset : flat.numel() - 9 + offset] for flat in poisoned]

    install(monkeypatch, multiprocessors=1)
    build = EmulatedLaunch._make
    monkeypatch.setattr(
        EmulatedLaunch, "_make", lambda self: (made.append(self.run_elements), build(self))[1]
    )
    assert_right("cuda", case, tensors, 2)
    assert set(made) == {elements}
    assert all(flat.isnan().sum() == 9 for flat in around)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [partial(SGD, lr=0.1, momentum=0.9), partial(AdamW, lr=0.01, amsgrad=True)],
    ids=["SGD", "AdamW"],
)
def test_a_schedule_and_an_overflow(sanitizer, make):
    def train(backend):
        torch.manual_seed(0)
        sizes = (33, 2049, 8193)  # two blocks: one would have nothing to race with
        params = [torch.nn.Parameter(torch.randn(n)) for n in sizes]
        groups = [{"params": [p], "layer_index": i, "num_layers": 3} for i, p in enumerate(params)]
        schedule = FreezeOutCycles(6, num_cycles=2, t_0=0.5, composition="thaw")
        optimizer = make(groups, schedule=schedule, backend=backend)
        for step in range(6):
            optimizer.found_inf = torch.tensor(float(step == 0))
            for p in params:
                p.grad = torch.randn_like(p) if p.requires_grad else None
            optimizer.step()
        return params

    torch.testing.assert_close(train("cuda"), train("reference"), rtol=1e-5, atol=1e-6)
