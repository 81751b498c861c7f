"""python -m benchmarks.gpu_bench: the cases one after the other, for ``benchmarks.gpu``."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

import fastfreeze
from benchmarks.clock import Clock, CpuClock, CudaClock, copy_bandwidth, measure
from benchmarks.gpu_cases import GpuCase, sgd_case, softmax_case, statistics_case
from benchmarks.results import write_json
from benchmarks.shapes import Shapes, shapes_of

ROUNDS = 41
SOFTMAX_SHAPES = [
    (5, 4096, 1000),
    (5, 256, 10),
    (5, 1024, 100),
    (6, 4096, 1000),
    (10, 64, 50257),
]
Cases = dict[str, Callable[[], GpuCase]]


def cases_on_gpu(backends: Sequence[str]) -> Cases:
    """What is measured, the most telling first: time may run out."""
    bf16, fp32 = torch.bfloat16, torch.float32

    def sgd(model: str, groups: int = 1, **options: object) -> GpuCase:
        shapes = [(100_000_000,)] if model == "flat" else shapes_of(model)
        return sgd_case(Shapes(shapes, groups), "cuda", backends, **options)

    cases: Cases = {
        "sgd resnet110, 110 groups": lambda: sgd("resnet110", 110),
        "sgd resnet110, 1 group": lambda: sgd("resnet110"),
        "sgd resnet50": lambda: sgd("resnet50"),
        "softmax (5, 4096, 1000)": lambda: softmax_case(5, 4096, 1000, "cuda", backends),
        "statistics (5, 4096, 1000)": lambda: statistics_case(5, 4096, 1000, "cuda", backends),
        "sgd resnet110, 110 groups, graph": lambda: sgd("resnet110", 110, graph=True),
        "sgd flat 100M": lambda: sgd("flat"),
        "sgd wrn40-4, 40 groups": lambda: sgd("wrn40-4", 40),
        "sgd vgg16": lambda: sgd("vgg16"),
        "sgd resnet50, bf16, momentum fp32": lambda: sgd(
            "resnet50", dtype=bf16, momentum_dtype=fp32
        ),
        "sgd resnet50, bf16": lambda: sgd("resnet50", dtype=bf16),
        "sgd flat 100M, bf16, momentum fp32": lambda: sgd("flat", dtype=bf16, momentum_dtype=fp32),
        "sgd resnet50, graph": lambda: sgd("resnet50", graph=True),
        "softmax (10, 64, 50257), bf16": lambda: softmax_case(
            10, 64, 50257, "cuda", backends, dtype=bf16
        ),
    }
    for shape in SOFTMAX_SHAPES:
        for name, make in (("softmax", softmax_case), ("statistics", statistics_case)):
            cases.setdefault(f"{name} {shape}", partial(make, *shape, "cuda", backends))
    return cases


def cases_on_cpu(backends: Sequence[str]) -> Cases:
    """The same kinds, small: a dry run."""
    shapes = Shapes([(7, 5), (64,), (3, 3, 3)], num_groups=2)
    sgd = partial(sgd_case, shapes, "cpu", backends)
    return {
        "sgd": sgd,
        "sgd bf16, momentum fp32": partial(sgd, dtype=torch.bfloat16, momentum_dtype=torch.float32),
        "softmax": partial(softmax_case, 3, 8, 10, "cpu", backends, compiled=False),
        "statistics": partial(statistics_case, 3, 8, 10, "cpu", backends, compiled=False),
    }


def measured(case: GpuCase, clock: Clock, bandwidth: float, rounds: int) -> dict:
    """A case's entry in the results."""
    runs = {} if case.refused else measure(clock, case.runs, rounds)
    for times in runs.values():
        rate = case.bytes_moved / times["device_s"]["median"]
        times["share_of_copy_bandwidth"] = rate / bandwidth
    return {
        "status": "refused" if case.refused else "measured",
        "bytes": case.bytes_moved,
        "runs": runs,
        "left_out": case.left_out,
    }


def entry(make: Callable[[], GpuCase], clock: Clock, bandwidth: float, rounds: int) -> dict:
    """Measure a case; what goes wrong is its entry, not the end."""
    try:
        return measured(make(), clock, bandwidth, rounds)
    except Exception as error:
        return {"status": "failed", "reason": repr(error), "traceback": traceback.format_exc()}


def run_all(
    cases: Cases, clock: Clock, bandwidth: float, rounds: int, out: Path, deadline: float
) -> dict:
    """Measure the cases in turn until the deadline, and write after each what there is."""
    results: dict = {
        "backends": {name: str(state) for name, state in fastfreeze.backends().items()},
        "copy_gb_per_s": bandwidth / 1e9,
        "rounds": rounds,
        "cases": {},
    }
    for name, make in cases.items():
        if time.monotonic() > deadline:
            results["cases"][name] = {"status": "no time left"}
        else:
            results["cases"][name] = entry(make, clock, bandwidth, rounds)
        write_json(out, results)
        print(name, results["cases"][name]["status"], flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_bench", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    on_gpu = arguments.device == "cuda"
    clock = CudaClock() if on_gpu else CpuClock()
    available = [name for name, state in fastfreeze.backends().items() if state.available]
    wanted = [b for b in (("cuda", "triton") if on_gpu else ("cpu", "reference")) if b in available]
    bandwidth = copy_bandwidth(clock, arguments.device, 2**28 if on_gpu else 2**20)
    cases = (cases_on_gpu if on_gpu else cases_on_cpu)(wanted)
    run_all(cases, clock, bandwidth, arguments.rounds, arguments.out, deadline)


if __name__ == "__main__":
    main()
