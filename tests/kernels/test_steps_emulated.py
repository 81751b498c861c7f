"""The CUDA kernels of the optimizers, emulated under the sanitizers: memory and races.

What they compute is checked here for each length of runs, and by test_sgd.py, test_adam.py and
test_steps_device.py, through the same emulation without sanitizers. None of it is a GPU run.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastfreeze.kernels.adam import PLANS
from fastfreeze.kernels.reference import sgd_reference
from fastfreeze.optim import SGD, AdamW
from fastfreeze.schedule import FreezeOutCycles
from tests.covering import covering
from tests.kernels import test_adam as of_adam
from tests.kernels.adam_plans import spec_of
from tests.kernels.emulation.steps import EmulatedLaunch, install
from tests.kernels.sgd_steps import sgd
from tests.kernels.test_sgd import TOLERANCE

# One run each, and two: a sanitized launch of more would take long.
SIZES = [1, 33, 2048, 2049]
WIDE = {"wide": torch.float32}
CASES = {
    "SGD fp32": ("sgd", torch.float32, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD fp32 without momentum": ("sgd", torch.float32, {}),
    "SGD fp64": ("sgd", torch.float64, {"momentum": 0.9, "dampening": 0.3}),
    "SGD fp16": ("sgd", torch.float16, {"momentum": 0.9, "grad_scale": 8.0}),
    "SGD bf16": ("sgd", torch.bfloat16, {"momentum": 0.9, "maximize": True}),
    "SGD bf16 with fp32 momentum": (
        "sgd",
        torch.bfloat16,
        {"momentum": 0.9, "grad_scale": 8.0, "momentum_dtype": torch.float32},
    ),
    "Adam fp32": ("adam", torch.float32, {"weight_decay": 0.1, "decoupled": False}),
    "Adam fp64": ("adam", torch.float64, {"amsgrad": True, "beta2": 0.5}),
    "Adam fp16": ("adam", torch.float16, {"grad_scale": 8.0, "maximize": True}),
    "Adam bf16 with fp32 state": ("adam", torch.bfloat16, {"amsgrad": True, **WIDE}),
}


@pytest.fixture(params=["address", "thread"])
def sanitizer(request, monkeypatch):
    install(monkeypatch, request.param, multiprocessors=1)  # runs of 512
    return request.param


def assert_steps_right(tensors, kind, dtype, hyper):
    """Two steps, a state's first one and one after it.

    tensors: takes what makes one of so many elements, and makes some.
    """
    params = tensors(torch.rand)
    if kind == "sgd":
        buffers, true_buffers = [None] * len(params), [None] * len(params)
        truth = [p.double() for p in params]
        for _ in range(2):
            grads = tensors(torch.randn)
            wide = [g.double() for g in grads]
            sgd(params, grads, buffers, lr=0.1, backend="cuda", **hyper)
            sgd_reference(truth, wide, true_buffers, lr=0.1, **hyper)
        for p, t in zip(params, truth, strict=True):
            error = (p.double() - t).abs() / t.abs().clamp(min=1)
            assert error.max() <= TOLERANCE[dtype]
        return
    case = {k: v for k, v in hyper.items() if k != "wide"}
    truth, steps = of_adam.torchs(params, *([case] * len(params))), torch.zeros(len(params))
    amsgrad, scale = "amsgrad" in case, case.get("grad_scale")
    spec = spec_of(params, amsgrad=amsgrad, state_dtype=hyper.get("wide"), steps=steps)
    plan = PLANS["cuda"](spec)
    for step in range(2):
        grads = tensors(lambda n: torch.rand(n) + 0.5)
        of_adam.torch_step(truth, grads, scale or 1.0)
        of_adam.take_step(plan, grads, of_adam.hyper_rows(case), step, scale)
    of_adam.assert_plan_near(plan, steps, truth, amsgrad)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(("kind", "dtype", "hyper"), CASES.values(), ids=CASES)
def test_a_step(sanitizer, kind, dtype, hyper, offset):
    def tensors(make):
        return [make(n + offset).to(dtype)[offset:] for n in SIZES]

    assert_steps_right(tensors, kind, dtype, hyper)


# How many tensors of each size, and the length of the runs that all find one of 16 places: there
# are 11 of 512 for each, 7 of 1024, 5 of 2048.
RUNS = {"512": (1, 512), "1024": (2, 1024), "2048": (3, 2048)}


@covering(case=CASES, run=RUNS, offset={"aligned": 0, "unaligned": 1})
def test_runs_of_each_length(monkeypatch, case, run, offset):
    kind, dtype, hyper = case
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
    assert_steps_right(tensors, kind, dtype, hyper)
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
