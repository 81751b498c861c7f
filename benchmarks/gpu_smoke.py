"""python -m benchmarks.gpu_smoke: whether anything works, in seconds, for ``benchmarks.gpu``.

Every backend of a device, and of each a few cases whose results must be near fp64.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import fastfreeze
from benchmarks.gpu_bench import BACKENDS
from benchmarks.gpu_cases import GpuCase, adamw_case, sgd_case, softmax_case, statistics_case
from benchmarks.outcomes import context_is_broken
from benchmarks.results import write_json
from benchmarks.shapes import Shapes

TENSORS = Shapes([(2049,), (64, 3, 7, 7), (1,), (33, 5), (512, 512)], num_groups=3)
LOGITS = [(3, 5, 10), (5, 33, 1000), (2, 4, 50257), (2, 257, 17)]


def checks(device: str) -> dict[str, Callable[[], GpuCase]]:
    """By name; a case's gate is the check."""
    found: dict[str, Callable[[], GpuCase]] = {}
    for backend in BACKENDS[device]:
        case = {"device": device, "backends": [backend], "rivals": False}
        sgd = partial(sgd_case, TENSORS, **case)
        mixed = {"dtype": torch.bfloat16, "momentum_dtype": torch.float32}
        found[f"{backend}: sgd"] = sgd
        found[f"{backend}: sgd, bf16, momentum fp32"] = partial(sgd, **mixed)
        adamw = partial(adamw_case, TENSORS, **case)
        found[f"{backend}: adamw"] = adamw
        for shape in LOGITS:
            found[f"{backend}: softmax {shape}"] = partial(softmax_case, *shape, **case)
            found[f"{backend}: statistics {shape}"] = partial(statistics_case, *shape, **case)
        found[f"{backend}: graph, sgd"] = partial(sgd, graph=True)
        found[f"{backend}: graph, adamw"] = partial(adamw, graph=True)
    return found


def checked(make: Callable[[], GpuCase]) -> dict:
    start = time.monotonic()
    wrong = make().left_out
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    found: dict = {"status": "failed", "reason": wrong} if wrong else {"status": "ok"}
    return {**found, "seconds": round(time.monotonic() - start, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_smoke", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", default="", help="a regular expression of checks' names")
    arguments = parser.parse_args()
    states = fastfreeze.backends()
    results: dict = {
        "backends": {name: str(state) for name, state in states.items()},
        "checks": {},
    }
    print(results["backends"], flush=True)
    good = True
    for name, make in checks(arguments.device).items():
        if not re.search(arguments.only, name):
            continue
        try:
            found = checked(make)
        except Exception as error:
            found = {"status": "failed", "reason": repr(error)}
        good &= found["status"] == "ok"
        results["checks"][name] = found
        write_json(arguments.out, results)
        print(name, found, flush=True)
        if context_is_broken():
            print("the CUDA context is broken: nothing more can be checked")
            break
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
