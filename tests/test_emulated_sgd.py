"""The CUDA kernels of SGD, emulated under the sanitizers: memory, undefined behaviour, races.

What they compute is checked by test_sgd.py, test_optim.py and test_device_sgd.py, through the same
emulation without sanitizers. None of it is a GPU run.
"""

from __future__ import annotations

import pytest
import torch

from fastfreeze.ops.reference import sgd_reference
from fastfreeze.ops.sgd import sgd
from fastfreeze.optim import SGD
from fastfreeze.schedule import FreezeOutCycles
from tests.emulation import EmulationError
from tests.emulation.sgd import install
from tests.test_sgd import TOLERANCE

pytestmark = pytest.mark.slow
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
    install(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(("dtype", "hyper"), CASES.values(), ids=CASES)
def test_a_step(sanitizer, dtype, hyper, offset):
    def tensors(make):
        return [make(n + offset).to(dtype)[offset:] for n in SIZES]

    params, buffers = tensors(torch.rand), [None] * len(SIZES)
    truth, true_buffers = [p.double() for p in params], [None] * len(SIZES)
    for _ in range(2):  # a buffer's first step, and one after it
        grads = tensors(torch.randn)
        wide = [g.double() for g in grads]
        sgd(params, grads, buffers, lr=0.1, backend="cuda", **hyper)
        sgd_reference(truth, wide, true_buffers, lr=0.1, **hyper)
    for p, t in zip(params, truth, strict=True):
        error = (p.double() - t).abs() / t.abs().clamp(min=1)
        assert error.max() <= TOLERANCE[dtype]


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


def test_a_row_too_long_is_caught(monkeypatch):
    """The address sanitizer does see the tables' tensors: a run past one's end is reported."""
    install(monkeypatch, "address")
    from fastfreeze.ops import _device_sgd

    def longer(*args):
        rows = make_runs(*args)
        rows.view(_device_sgd._RUN)["size"][-1] += 1
        return rows

    make_runs = _device_sgd._runs
    monkeypatch.setattr(_device_sgd, "_runs", longer)
    params = [torch.rand(40)[:33]]  # within its storage, but not within the block it becomes
    with pytest.raises(EmulationError, match="heap-buffer-overflow"):
        sgd(params, [torch.rand(33)], [None], lr=0.1, momentum=0.9, backend="cuda")
