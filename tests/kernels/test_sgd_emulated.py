"""The CUDA kernels of SGD, emulated under the sanitizers: memory, undefined behaviour, races.

What they compute is checked here for each length of runs, and by test_sgd.py, test_optim.py and
test_sgd_device.py, through the same emulation without sanitizers. None of it is a GPU run.
"""

from __future__ import annotations

import pytest
import torch

from fastfreeze.kernels.reference import sgd_reference
from fastfreeze.kernels.sgd import sgd
from fastfreeze.optim import SGD
from fastfreeze.schedule import FreezeOutCycles
from tests.kernels.emulation import EmulationError
from tests.kernels.emulation.steps import install
from tests.kernels.test_sgd import TOLERANCE

# One run each, and two: a sanitized launch of more would take long.
SIZES = [1, 33, 2048, 2049]
CASES = {
    "fp32": (torch.float32, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "fp32 without momentum": (torch.float32, {}),
    "fp64": (torch.float64, {"momentum": 0.9, "dampening": 0.3}),
    "fp16": (torch.float16, {"momentum": 0.9, "grad_scale": 8.0}),
    "bf16": (torch.bfloat16, {"momentum": 0.9, "maximize": True}),
    "bf16 with fp32 momentum": (
        torch.bfloat16,
        {"momentum": 0.9, "grad_scale": 8.0, "momentum_dtype": torch.float32},
    ),
}


@pytest.fixture(params=["address", "thread"])
def sanitizer(request, monkeypatch):
    install(monkeypatch, request.param, multiprocessors=1)  # runs of 512
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(("dtype", "hyper"), CASES.values(), ids=CASES)
def test_a_step(sanitizer, dtype, hyper, offset):
    def tensors(make):
        return [make(n + offset).to(dtype)[offset:] for n in SIZES]

    assert_steps_right(tensors, dtype, hyper)


def assert_steps_right(tensors, dtype, hyper):
    """tensors: takes what makes one of so many elements, and makes some."""
    params = tensors(torch.rand)
    buffers, true_buffers = [None] * len(params), [None] * len(params)
    truth = [p.double() for p in params]
    for _ in range(2):  # a buffer's first step, and one after it
        grads = tensors(torch.randn)
        wide = [g.double() for g in grads]
        sgd(params, grads, buffers, lr=0.1, backend="cuda", **hyper)
        sgd_reference(truth, wide, true_buffers, lr=0.1, **hyper)
    for p, t in zip(params, truth, strict=True):
        error = (p.double() - t).abs() / t.abs().clamp(min=1)
        assert error.max() <= TOLERANCE[dtype]


# How many tensors of each size, and the length of the runs that all find one of 16 places: there
# are 11 of 512 for each, 7 of 1024, 5 of 2048.
RUNS = {"512": (1, 512), "1024": (2, 1024), "2048": (3, 2048)}


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(("many", "elements"), RUNS.values(), ids=RUNS)
@pytest.mark.parametrize(("dtype", "hyper"), CASES.values(), ids=CASES)
def test_runs_of_each_length(monkeypatch, dtype, hyper, many, elements, offset):
    made, around = [], []

    def tensors(make):
        poisoned = [torch.full((n + 9,), torch.nan, dtype=dtype) for n in SIZES * many]
        around.extend(poisoned)
        for flat in poisoned:
            flat[offset : flat.numel() - 9 + offset] = make(flat.numel() - 9)
        return [flat[offset : flat.numel() - 9 + offset] for flat in poisoned]

    plan = install(monkeypatch, multiprocessors=1)
    make = plan._make
    monkeypatch.setattr(plan, "_make", lambda self: (made.append(self.run_elements), make(self))[1])
    assert_steps_right(tensors, dtype, hyper)
    assert made == [elements] * 2
    assert all(flat.isnan().sum() == 9 for flat in around)


@pytest.mark.slow
def test_a_schedule_and_an_overflow(sanitizer):
    def train(backend):
        torch.manual_seed(0)
        sizes = (33, 2049, 8193)  # two blocks: one would have nothing to race with
        params = [torch.nn.Parameter(torch.randn(n)) for n in sizes]
        groups = [{"params": [p], "layer_index": i, "num_layers": 3} for i, p in enumerate(params)]
        schedule = FreezeOutCycles(6, num_cycles=2, t_0=0.5, composition="thaw")
        optimizer = SGD(groups, lr=0.1, momentum=0.9, schedule=schedule, backend=backend)
        for step in range(6):
            optimizer.found_inf = torch.tensor(float(step == 0))
            for p in params:
                p.grad = torch.randn_like(p) if p.requires_grad else None
            optimizer.step()
        return params

    for ours, theirs in zip(train("cuda"), train("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_row_too_long_is_caught(monkeypatch):
    """The address sanitizer does see the tables' tensors: a run past one's end is reported."""
    install(monkeypatch, "address")
    from fastfreeze.kernels import device_plan

    def longer(*args):
        rows = make_runs(*args)
        rows.view(device_plan.runs_dtype(1))["size"][-1] += 1
        return rows

    make_runs = device_plan._runs
    monkeypatch.setattr(device_plan, "_runs", longer)
    params = [torch.rand(40)[:33]]  # within its storage, but not within the block it becomes
    with pytest.raises(EmulationError, match="heap-buffer-overflow"):
        sgd(params, [torch.rand(33)], [None], lr=0.1, momentum=0.9, backend="cuda")
