"""The cases of ``python -m benchmarks.gpu``: rivals for one piece of work, and their gate.

The gate: each run's result, near the same computed in fp64. A run that misses it, or does not run
at all, is left out and named; if it is one of ours, the case counts as refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fastfreeze
from benchmarks.case import OURS, Rivals, Run, compiled_run
from benchmarks.kernel_cases import eager_statistics, statistics_fields
from benchmarks.sgd_cases import GATE_STEPS, SGD_VALUES, TOTAL_STEPS, torch_step
from benchmarks.shapes import Shapes
from fastfreeze.ops.softmax import ensemble_softmax, ensemble_statistics

# Of an element or of all elements' root mean square, whichever is larger.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(kw_only=True)
class GpuCase(Rivals):
    """Rivals on a GPU.

    Attributes:
        bytes_moved: the least that can be read and written.
    """

    bytes_moved: int


def sgd_case(
    shapes: Shapes,
    device: str,
    backends: Iterable[str],
    dtype: torch.dtype = torch.float32,
    momentum_dtype: torch.dtype | None = None,
    graph: bool = False,
) -> GpuCase:
    """An optimizer's step with its learning-rate schedule; ``graph``: replayed as a CUDA graph."""
    truth = _sgd_truth(shapes, device, dtype)
    numel = sum(p.numel() for p in truth)
    buffer_size = (momentum_dtype or dtype).itemsize
    case = GpuCase(bytes_moved=numel * (3 * dtype.itemsize + 2 * buffer_size))
    makers: dict[str, Callable[[list[dict]], Run]] = {
        f"{OURS} {name}": lambda g, name=name: _ours(g, name, momentum_dtype) for name in backends
    }
    makers["torch fused"] = lambda g: torch_step(g, scheduled=not graph, fused=True)
    makers["torch foreach"] = lambda g: torch_step(g, scheduled=not graph, foreach=True)
    if not graph:
        makers["torch fused, constant lr"] = lambda g: torch_step(g, scheduled=False, fused=True)
    for name, make in makers.items():
        groups = shapes.groups(device, dtype)

        def check(run: Run, groups=groups) -> str | None:
            for _ in range(GATE_STEPS - 1):
                run()
            return _difference([p for g in groups for p in g["params"]], truth)

        def stepped(make=make, groups=groups) -> Run:
            run = make(groups)
            run()
            return _captured(run) if graph else run

        case.add(name, stepped, check)
    return case


def softmax_case(
    M: int,
    B: int,
    C: int,
    device: str,
    backends: Iterable[str],
    dtype: torch.dtype = torch.float32,
    compiled: bool = True,
) -> GpuCase:
    """Mean of the softmax of M members' logits [B, C]."""
    torch.manual_seed(0)
    members = [torch.randn(B, C, device=device, dtype=dtype) for _ in range(M)]
    truth = [sum(torch.softmax(z.double(), -1) for z in members) / M]
    case = GpuCase(bytes_moved=(M + 1) * B * C * dtype.itemsize)

    def loop() -> Tensor:
        total = torch.softmax(members[0], -1, dtype=torch.float32)
        for logits in members[1:]:
            total += torch.softmax(logits, -1, dtype=torch.float32)
        return total.div_(M).to(dtype)

    runs: dict[str, Run] = {
        f"{OURS} {name}": lambda name=name: ensemble_softmax(members, backend=name)
        for name in backends
    }
    runs["eager loop"] = loop
    runs["stack, softmax, mean"] = lambda: torch.softmax(torch.stack(members), -1).mean(0)
    if compiled:
        runs["torch.compile of the loop"] = compiled_run(loop)
    for name, run in runs.items():
        case.add(name, lambda run=run: run, lambda run: _difference([run()], truth))
    return case


def statistics_case(
    M: int, B: int, C: int, device: str, backends: Iterable[str], compiled: bool = True
) -> GpuCase:
    """That mean with its maximum, entropy, mutual information and the labels' NLL."""
    torch.manual_seed(0)
    members = [torch.randn(B, C, device=device) for _ in range(M)]
    labels = torch.randint(C, (B,), device=device)
    truth = eager_statistics([z.double() for z in members], labels)
    case = GpuCase(bytes_moved=(M + 1) * B * C * 4 + B * (8 + 8 + 4 * 4))
    runs: dict[str, Run] = {
        f"{OURS} {name}": lambda name=name: statistics_fields(
            ensemble_statistics(members, labels, backend=name)
        )
        for name in backends
    }
    runs["eager loop"] = lambda: eager_statistics(members, labels)
    if compiled:
        runs["torch.compile of the loop"] = compiled_run(lambda: eager_statistics(members, labels))
    for name, run in runs.items():
        case.add(name, lambda run=run: run, lambda run: _difference(run(), truth))
    return case


def _ours(groups: list[dict], backend: str, momentum_dtype: torch.dtype | None) -> Run:
    return fastfreeze.SGD(
        groups,
        schedule=fastfreeze.Cosine(TOTAL_STEPS),
        momentum_dtype=momentum_dtype,
        backend=backend,
        **SGD_VALUES,
    ).step


def _captured(run: Run) -> Run:
    """A run as a CUDA graph; making it takes no step."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(_owner: Run = run) -> None:  # whose tensors the graph reads and writes
        graph.replay()

    return replay


def _sgd_truth(shapes: Shapes, device: str, dtype: torch.dtype) -> list[Tensor]:
    """The parameters after the gate's steps, in fp64."""
    groups = shapes.groups(device, dtype)
    for group in groups:
        group["params"] = [_in_fp64(p) for p in group["params"]]
    step = torch_step(groups, scheduled=True, foreach=False)
    for _ in range(GATE_STEPS):
        step()
    return [p for g in groups for p in g["params"]]


def _in_fp64(param: Tensor) -> torch.nn.Parameter:
    double = torch.nn.Parameter(param.detach().double())
    assert param.grad is not None
    double.grad = param.grad.double()
    return double


def _difference(results: Sequence[Tensor], truth: Sequence[Tensor]) -> str | None:
    """What keeps the results from passing; None if they are near the truth."""
    for i, (ours, true) in enumerate(zip(results, truth, strict=True)):
        expected = true.double()
        scale = expected.abs().clamp(min=expected.square().mean().sqrt())
        error = ((ours.double() - expected).abs() / scale).max().item() if ours.numel() else 0.0
        if not error <= TOLERANCE[ours.dtype]:
            return f"result {i} is {error:.1e} from fp64, allowed {TOLERANCE[ours.dtype]:.0e}"
    return None
