"""python -m benchmarks.gpu_bench: a part's cases one after the other, for ``benchmarks.gpu``."""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import fastfreeze
from benchmarks.clock import Clock, CpuClock, CudaClock, ground, measure, measure_loop
from benchmarks.gpu_cases import GpuCase, adamw_case, sgd_case, softmax_case, statistics_case
from benchmarks.gpu_steps import Work, ensemble_case, freeze_events, training_case
from benchmarks.outcomes import context_is_broken
from benchmarks.results import read_json, write_json
from benchmarks.shapes import Shapes, shapes_of

PARTS = ("kernels", "steps", "rest", "profiled")
BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "reference")}
ROUNDS = {"cuda": 41, "cpu": 3}
KERNEL_SECONDS, STEP_SECONDS = 5, 8  # for measuring a case
REPEATS = {"cuda": 5, "cpu": 1}  # steps of a loop


@dataclass(frozen=True)
class Bench:
    """What cases are measured with, and seen beside.

    Attributes:
        device: "cuda" or "cpu": a dry run, small.
        backends: of ours, those that run here.
        clock: of the device.
        bandwidth: bytes per second of a large copy.
    """

    device: str
    backends: Sequence[str]
    clock: Clock
    bandwidth: float


Entry = Callable[[Bench], dict]
Cases = dict[str, Entry]


def kernel(make: Callable[..., GpuCase], *arguments: object, **options: object) -> Entry:
    """The entry of a case of :mod:`benchmarks.gpu_cases`."""

    def entry(bench: Bench) -> dict:
        case = make(*arguments, device=bench.device, backends=bench.backends, **options)
        rounds = ROUNDS[bench.device]
        runs = measure(bench.clock, case.runs, rounds, KERNEL_SECONDS)
        for name, times in runs.items():
            times["bytes"] = case.other_bytes.get(name, case.bytes_moved)
            rate = times["bytes"] / times["cold_s"]["median"]
            times["share_of_copy_bandwidth"] = rate / bench.bandwidth
        status = "refused" if case.refused else "measured"
        return {"status": status, "runs": runs, "left_out": case.left_out}

    return entry


def sgd(model: str, groups: int = 1, **options: object) -> Entry:
    return step(sgd_case, model, groups, **options)


def step(case: Callable[..., GpuCase], model: str, groups: int = 1, **options: object) -> Entry:
    def make(**more: object) -> GpuCase:
        shapes = [(100_000_000,)] if model == "flat" else shapes_of(model)
        return case(Shapes(shapes, groups), **more)

    return kernel(make, **options)


def training(work: Work, frozen: int = 0) -> Entry:
    return loop(partial(training_case, work, frozen))


def loop(make: Callable[[], object]) -> Entry:
    """The entry of a case of :mod:`benchmarks.gpu_steps`."""

    def entry(bench: Bench) -> dict:
        case = make()
        repeats, rounds = REPEATS[bench.device], ROUNDS[bench.device]
        runs = measure_loop(bench.clock, case.runs, repeats, rounds, STEP_SECONDS)
        for name, times in runs.items():
            times["peak_bytes"] = case.peak_bytes.get(name)
        status = "refused" if case.refused else "measured"
        return {"status": status, "runs": runs, "left_out": case.left_out}

    return entry


def freezing(model: str, groups: int, steps: int) -> Entry:
    return lambda bench: freeze_events(
        Shapes(shapes_of(model), groups), bench.clock, bench.device, bench.backends[0], steps
    )


def cases_on_gpu() -> dict[str, Cases]:
    """What is measured, in parts; the most telling first, since time may run out."""
    bf16, fp32 = torch.bfloat16, torch.float32
    resnet50 = Work("resnet50", 256, 224, "cuda", bf16=True, channels_last=True)
    resnet110 = Work("resnet110", 128, 32, "cuda")
    resnet110_bf16 = Work("resnet110", 128, 32, "cuda", bf16=True, channels_last=True)
    vit = Work("vit_b_16", 128, 224, "cuda", bf16=True)
    kernels = {
        "sgd resnet110, 110 groups": sgd("resnet110", 110),
        "sgd resnet110, 110 groups, graph": sgd("resnet110", 110, graph=True),
        "sgd resnet50": sgd("resnet50"),
        "adamw resnet110, 110 groups": step(adamw_case, "resnet110", 110),
        "adamw resnet50": step(adamw_case, "resnet50"),
        "softmax (5, 4096, 1000)": kernel(softmax_case, 5, 4096, 1000),
        "statistics (5, 4096, 1000)": kernel(statistics_case, 5, 4096, 1000),
        "sgd resnet110, 1 group": sgd("resnet110"),
        "softmax (5, 256, 10), graph": kernel(softmax_case, 5, 256, 10, graph=True),
        "statistics (5, 256, 10), graph": kernel(statistics_case, 5, 256, 10, graph=True),
        "sgd flat 100M": sgd("flat"),
        "sgd resnet50, bf16, momentum fp32": sgd("resnet50", dtype=bf16, momentum_dtype=fp32),
        "sgd resnet110, 1 group, GradScaler": sgd("resnet110", scaled=True),
        "freezing, sgd resnet110, 110 groups": freezing("resnet110", 110, 300),
    }
    steps = {
        "training resnet110, 128 images": training(resnet110),
        "training resnet50, bf16, 256 images": training(resnet50),
        "training resnet50, bf16, 256 images, 50% frozen": training(resnet50, 50),
        "training resnet110, bf16, 128 images, 50% frozen": training(resnet110_bf16, 50),
        "training resnet50, bf16, 256 images, 90% frozen": training(resnet50, 90),
        "ensemble of 5 resnet110, 256 images": loop(
            partial(ensemble_case, Work("resnet110", 256, 32, "cuda"), 5)
        ),
        "training vit_b_16, bf16, 128 images": training(vit),
        "training resnet110, bf16, 128 images, 90% frozen": training(resnet110_bf16, 90),
    }
    rest = {
        "adamw resnet110, 110 groups, graph": step(adamw_case, "resnet110", 110, graph=True),
        "sgd resnet50, graph": sgd("resnet50", graph=True),
        "softmax (10, 64, 50257), bf16": kernel(softmax_case, 10, 64, 50257, dtype=bf16),
        "statistics (10, 64, 50257)": kernel(statistics_case, 10, 64, 50257),
        "softmax (5, 1024, 100), graph": kernel(softmax_case, 5, 1024, 100, graph=True),
        "statistics (5, 1024, 100), graph": kernel(statistics_case, 5, 1024, 100, graph=True),
        "sgd resnet50, bf16": sgd("resnet50", dtype=bf16),
        "sgd vit_b_16": sgd("vit_b_16"),
        "sgd resnet50, GradScaler": sgd("resnet50", scaled=True),
        "softmax (10, 64, 50257)": kernel(softmax_case, 10, 64, 50257),
        **{
            f"{name} {shape}, torch.compile": kernel(make, *shape, compiled=True)
            for shape in [(5, 4096, 1000), (5, 256, 10), (5, 1024, 100), (10, 64, 50257)]
            for name, make in (("softmax", softmax_case), ("statistics", statistics_case))
        },
        "sgd resnet50, torch.compile": sgd("resnet50", compiled=True),
        "sgd resnet110, 1 group, torch.compile": sgd("resnet110", compiled=True),
    }
    profiled = {
        "sgd resnet50": once(sgd_case, Shapes(shapes_of("resnet50"))),
        "softmax (5, 4096, 1000)": once(softmax_case, 5, 4096, 1000),
    }
    return {"kernels": kernels, "steps": steps, "rest": rest, "profiled": profiled}


def once(make: Callable[..., GpuCase], *arguments: object) -> Entry:
    """Ours alone, not timed: for a profiler."""

    def entry(bench: Bench) -> dict:
        case = make(*arguments, device=bench.device, backends=bench.backends[:1], rivals=False)
        for run in case.runs.values():
            run()
        status = "refused" if case.refused else "measured"
        return {"status": status, "runs": dict.fromkeys(case.runs), "left_out": case.left_out}

    return entry


def cases_on_cpu() -> dict[str, Cases]:
    """The same kinds, small: a dry run."""
    work = Work("resnet8-w4", 4, 8, "cpu", channels_last=True)
    tiny = Shapes([(7, 5), (64,), (3, 3, 3)], num_groups=2)
    mixed = {"dtype": torch.bfloat16, "momentum_dtype": torch.float32}
    return {
        "kernels": {
            "sgd": kernel(sgd_case, tiny),
            "sgd, graph": kernel(sgd_case, tiny, graph=True),
            "sgd, bf16, momentum fp32": kernel(sgd_case, tiny, **mixed),
            "sgd, GradScaler": kernel(sgd_case, tiny, scaled=True),
            "adamw": kernel(adamw_case, tiny),
            "adamw, graph": kernel(adamw_case, tiny, graph=True),
            "softmax, graph": kernel(softmax_case, 3, 8, 10, graph=True),
            "statistics": kernel(statistics_case, 3, 8, 10),
            "freezing": freezing("resnet8-w4", 8, 40),
        },
        "steps": {
            "training": training(work),
            "training, bf16, 50% frozen": training(Work("resnet8-w4", 4, 8, "cpu", bf16=True), 50),
            "training, 90% frozen": training(work, 90),
            "ensemble": loop(partial(ensemble_case, work, 3)),
        },
        "rest": {"softmax, bf16": kernel(softmax_case, 3, 8, 10, dtype=torch.bfloat16)},
        "profiled": {"sgd": once(sgd_case, tiny), "softmax": once(softmax_case, 3, 8, 10)},
    }


def measured(entry: Entry, bench: Bench) -> dict:
    """A case's entry; what goes wrong is in it, and not the end."""
    try:
        return entry(bench)
    except Exception as error:
        return {"status": "failed", "reason": repr(error), "traceback": traceback.format_exc()}


def run_all(cases: Cases, bench: Bench, facts: dict, out: Path, deadline: float) -> dict:
    """Measure the cases in turn until the deadline, and write before and after each what there is.

    Those that the file has already are left as they are: an earlier process has measured them, or
    died of them.

    Raises:
        SystemExit: a case has broken the CUDA context. Another process can do the rest.
    """
    results = {**facts, "cases": read_json(out).get("cases", {})}
    for name, entry in cases.items():
        if name in results["cases"]:
            continue
        start = time.monotonic()
        results["cases"][name] = {"status": "has not ended"}
        write_json(out, results)
        case = {"status": "no time left"} if start > deadline else measured(entry, bench)
        results["cases"][name] = {**case, "seconds": round(time.monotonic() - start, 1)}
        write_json(out, results)
        print(name, case["status"], case.get("left_out", case.get("traceback", "")), flush=True)
        if context_is_broken():
            sys.exit(f"{name} has broken the CUDA context")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_bench", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    on_gpu = arguments.device == "cuda"
    clock = CudaClock() if on_gpu else CpuClock()
    backends = fastfreeze.backends()
    wanted = [name for name in BACKENDS[arguments.device] if backends[name].available]
    facts: dict = {"backends": {name: str(state) for name, state in backends.items()}}
    if arguments.part != "profiled":
        facts |= ground(clock, arguments.device, 2**28 if on_gpu else 2**20)
    bench = Bench(arguments.device, wanted, clock, facts.get("copy_bytes_per_s", 1.0))
    cases = (cases_on_gpu if on_gpu else cases_on_cpu)()[arguments.part]
    run_all(cases, bench, facts, arguments.out, deadline)


if __name__ == "__main__":
    main()
