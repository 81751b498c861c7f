"""The CUDA kernels of Adam, emulated under the sanitizers: memory, undefined behaviour, races.

What they compute is checked by test_adam_device.py, through the same emulation without sanitizers.
None of it is a GPU run.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.adam_plans import assert_near, hypers, spec_of, step, step_truth, truth_of
from tests.kernels.emulation import EmulationError
from tests.kernels.emulation.steps import EmulatedAdam, emulated
from tests.kernels.test_adam_device import CASES, THAW, gradients, run_case

# One run each, and two: a sanitized launch of more would take long.
SIZES = [1, 33, 2048, 2049]


@pytest.fixture(params=["address", "thread"])
def plan_class(request):
    return emulated(EmulatedAdam, request.param, multiprocessors=1)  # runs of 512


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(("dtype", "options"), CASES.values(), ids=CASES)
def test_steps(plan_class, dtype, options, offset):
    params = [torch.randn(n + offset).to(dtype)[offset:] for n in SIZES]
    run_case(plan_class, params, dtype, options, steps=2)


# How many tensors of each size, and the length of the runs that all find one of 16 places: there
# are 11 of 512 for each, 7 of 1024, 5 of 2048.
RUNS = {"512": (1, 512), "1024": (2, 1024), "2048": (3, 2048)}


@pytest.mark.parametrize(("many", "elements"), RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_runs_of_each_length(dtype, many, elements):
    made = []

    class Noted(emulated(EmulatedAdam, multiprocessors=1)):
        def _make(self):
            made.append(self.run_elements)
            return super()._make()

    run_case(Noted, [torch.randn(n).to(dtype) for n in SIZES * many], dtype, {})
    assert made == [elements]


@pytest.mark.slow
def test_a_schedule_and_an_overflow(plan_class):
    sizes = (2049, 8193)  # several blocks: one would have nothing to race with
    params = [torch.randn(n) for n in sizes]
    spec = spec_of(params, groups=[0, 1], segments=THAW, warmup_steps=4)
    plan, truth, table = plan_class(spec), truth_of(spec), hypers(rows=2)
    for at in range(3):
        grads = gradients(sizes, torch.float32, "cpu")
        if at != 1:
            step_truth(truth, grads, table, at)
        step(plan, grads, table, at, None, torch.tensor(float(at == 1)))
    step(plan, gradients(sizes, torch.float32, "cpu"), table, 3, None, torch.ones(()))
    assert spec.steps.tolist() == [0, 2]  # the first layer is frozen then
    assert_near(plan, truth)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["exp_avg", "max_exp_avg_sq"])
def test_a_moment_too_short_is_caught(which):
    """The address sanitizer does see the moments: a run past one's end is reported."""
    plan_class = emulated(EmulatedAdam, "address")
    spec = spec_of([torch.rand(33)], amsgrad=True)
    spec.moments[which][0] = torch.zeros(40)[:32]  # within its storage, but not in its block
    plan = plan_class(spec)
    with pytest.raises(EmulationError, match="heap-buffer-overflow"):
        step(plan, gradients([33], torch.float32, "cpu"), hypers())
