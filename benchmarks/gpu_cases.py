"""The kernels' cases of ``python -m benchmarks.gpu``: rivals for one piece of work, and their gate.

The gate: each run's result, near the same computed in fp64. A run that misses it, or does not run
at all, is left out and named; if it is one of ours, the case counts as refused.

Who does the same work is compared: the same dtypes, and a learning-rate schedule unless the name
says "constant lr".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastfreeze
from benchmarks.case import OURS, Rivals, Run, compiled_run
from benchmarks.clock import captured
from benchmarks.kernel_cases import eager_statistics, statistics_fields
from benchmarks.optimizer_cases import (
    ADAMW_VALUES,
    SGD_VALUES,
    TOTAL_STEPS,
    torch_step,
    with_scheduler,
)
from benchmarks.shapes import Shapes
from fastfreeze.kernels.softmax import ensemble_softmax, ensemble_statistics

# Of an element or of all elements' root mean square, whichever is larger.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
STATISTICS = 5  # times that: mutual information is what is left of two large sums
GATE_STEPS = 4  # of an optimizer; of a graph's, the first one is taken before the capture
GRAPH, CONSTANT, COMPILED = "graph", "constant lr", "torch.compile"


@dataclass(kw_only=True)
class GpuCase(Rivals):
    """Rivals on a GPU.

    Attributes:
        bytes_moved: the least that can be read and written.
        other_bytes: of runs that have to move more, by their names.
    """

    bytes_moved: int
    other_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class InTwoParts:
    """A run of which a CUDA graph can hold the second part alone."""

    outside: Run
    inside: Run

    def __call__(self) -> None:
        self.outside()
        self.inside()


Groups = list[dict]
MakeStep = Callable[[Groups], Run]


def sgd_case(
    shapes: Shapes,
    device: str,
    backends: Iterable[str],
    dtype: torch.dtype = torch.float32,
    momentum_dtype: torch.dtype | None = None,
    graph: bool = False,
    scaled: bool = False,
    compiled: bool = False,
    rivals: bool = True,
) -> GpuCase:
    """An optimizer's step with its learning-rate schedule.

    Args:
        shapes: of the parameters.
        device: where they are.
        backends: of ours.
        dtype: of the parameters and gradients.
        momentum_dtype: torch.float32: for ``dtype`` bfloat16.
        graph: replayed as a CUDA graph.
        scaled: by a GradScaler, whose scale stays at 1.
        compiled: rivals that compile, too; minutes.
        rivals: False: ours alone.
    """
    truth = _truth(shapes, device, dtype)
    numel = sum(p.numel() for p in truth)
    buffer_size = (momentum_dtype or dtype).itemsize
    case = GpuCase(bytes_moved=numel * (3 * dtype.itemsize + 2 * buffer_size))
    makers: dict[str, MakeStep] = {}
    for name in backends:
        makers[f"{OURS} {name}"] = lambda g, name=name: _ours(g, name, momentum_dtype)
        makers[f"{OURS} {name}, {CONSTANT}"] = lambda g, name=name: _ours(
            g, name, momentum_dtype, scheduled=False
        )
    if scaled:
        # It looks at all gradients first, and writes them; torch's step writes them again.
        case.bytes_moved += 2 * numel * dtype.itemsize
        case.other_bytes["torch fused"] = case.bytes_moved + numel * dtype.itemsize
        makers = {f"{OURS} {name}": lambda g, name=name: _ours_scaled(g, name) for name in backends}
        others: dict[str, MakeStep] = {"torch fused": _fused_scaled}
    elif momentum_dtype is not None:
        others = {"torch foreach": _foreach_mixed, "torch fused, weights also in fp32": _master}
        # Gradient and weights in bf16, copied from and to what fp32's step takes.
        case.other_bytes["torch fused, weights also in fp32"] = numel * (2 + 4 + 20 + 4 + 2)
    elif graph:
        others = {
            "torch fused, lr in a tensor": lambda g: _tensor_lr(g, device),
            f"torch fused, {CONSTANT}": lambda g: torch_step(g, scheduled=False, fused=True),
            f"torch foreach, {CONSTANT}": lambda g: torch_step(g, scheduled=False, foreach=True),
        }
    else:
        others = {
            "torch fused": lambda g: torch_step(g, fused=True),
            "torch foreach": lambda g: torch_step(g, foreach=True),
            f"torch fused, {CONSTANT}": lambda g: torch_step(g, scheduled=False, fused=True),
        }
    if compiled:
        others[f"{COMPILED} of foreach"] = lambda g: _compiled_step(g, device)
    for name, make in {**makers, **(others if rivals else {})}.items():
        _enter(case, name, make, shapes.groups(device, dtype), truth, device if graph else None)
    return case


def adamw_case(
    shapes: Shapes,
    device: str,
    backends: Iterable[str],
    graph: bool = False,
    rivals: bool = True,
) -> GpuCase:
    """The same of AdamW, in fp32; arguments as of :func:`sgd_case`."""
    theirs = {"values": ADAMW_VALUES, "optimizer": "AdamW"}
    truth = _truth(shapes, device, torch.float32, **theirs)
    numel = sum(p.numel() for p in truth)
    case = GpuCase(bytes_moved=numel * 4 * 7)
    makers: dict[str, MakeStep] = {
        f"{OURS} {name}": lambda g, name=name: _ours(g, name, optimizer="AdamW")
        for name in backends
    }
    if rivals and graph:
        makers["torch fused, lr in a tensor"] = lambda g: _tensor_lr(
            g, device, torch.optim.AdamW, {**ADAMW_VALUES, "capturable": device == "cuda"}
        )
    elif rivals:
        makers["torch fused"] = lambda g: torch_step(g, fused=True, **theirs)
        makers["torch foreach"] = lambda g: torch_step(g, foreach=True, **theirs)
    for name, make in makers.items():
        groups = shapes.groups(device, torch.float32)
        _enter(case, name, make, groups, truth, device if graph else None)
    return case


def _enter(
    case: GpuCase,
    name: str,
    make: MakeStep,
    groups: Groups,
    truth: list[Tensor],
    graph_device: str | None,
) -> None:
    """Enter a step that computes the truth; a graph's is captured after the first one."""

    def stepped() -> Run:
        run = make(groups)
        run()
        if graph_device is None:
            return run
        if isinstance(run, InTwoParts):
            return InTwoParts(run.outside, captured(run.inside, graph_device))
        return captured(run, graph_device)

    def check(run: Run) -> str | None:
        for _ in range(GATE_STEPS - 1):
            run()
        return difference_to_fp64([p for g in groups for p in g["params"]], truth)

    case.add(name, stepped, check)


def softmax_case(
    M: int,
    B: int,
    C: int,
    device: str,
    backends: Iterable[str],
    dtype: torch.dtype = torch.float32,
    graph: bool = False,
    compiled: bool = False,
    rivals: bool = True,
) -> GpuCase:
    """Mean of the softmax of M members' logits [B, C]; arguments as of :func:`sgd_case`."""
    torch.manual_seed(0)
    members = [torch.randn(B, C, device=device, dtype=dtype) for _ in range(M)]
    truth = [sum(torch.softmax(z.double(), -1) for z in members) / M]
    case = GpuCase(bytes_moved=(M + 1) * B * C * dtype.itemsize)

    def loop() -> Tensor:
        total = torch.softmax(members[0], -1, dtype=torch.float32)
        for logits in members[1:]:
            total += torch.softmax(logits, -1, dtype=torch.float32)
        return total.div_(M).to(dtype)

    ours: dict[str, Run] = {
        f"{OURS} {name}": lambda name=name: ensemble_softmax(members, backend=name)
        for name in backends
    }
    others: dict[str, Run] = {
        "eager loop": loop,
        "stack, softmax, mean": lambda: torch.softmax(torch.stack(members), -1).mean(0),
    }
    _enter_all(case, ours, others if rivals else {}, truth, device, graph, compiled)
    return case


def statistics_case(
    M: int,
    B: int,
    C: int,
    device: str,
    backends: Iterable[str],
    graph: bool = False,
    compiled: bool = False,
    rivals: bool = True,
) -> GpuCase:
    """That mean with its maximum, entropy, mutual information and the labels' NLL."""
    torch.manual_seed(0)
    members = [torch.randn(B, C, device=device) for _ in range(M)]
    labels = torch.randint(C, (B,), device=device)
    truth = eager_statistics([z.double() for z in members], labels)
    case = GpuCase(bytes_moved=(M + 1) * B * C * 4 + B * (8 + 8 + 4 * 4))
    ours: dict[str, Run] = {
        f"{OURS} {name}": lambda name=name: statistics_fields(
            ensemble_statistics(members, labels, backend=name)
        )
        for name in backends
    }
    others: dict[str, Run] = {"eager loop": lambda: eager_statistics(members, labels)}
    others = others if rivals else {}
    _enter_all(case, ours, others, truth, device, graph, compiled, factor=STATISTICS)
    return case


def _enter_all(
    case: GpuCase,
    ours: dict[str, Run],
    others: dict[str, Run],
    truth: Sequence[Tensor],
    device: str,
    graph: bool,
    compiled: bool,
    factor: float = 1,
) -> None:
    """Enter runs that read the same tensors each time; those of graphs and compilers beside."""
    makes: dict[str, Callable[[], Run]] = {
        name: lambda run=run: run for name, run in {**ours, **others}.items()
    }
    if graph:
        for name, run in {**ours, "eager loop": others.get("eager loop")}.items():
            if run is not None:
                makes[f"{name}, {GRAPH}"] = lambda run=run: _captured_value(run, device)
    if compiled:
        loop = others["eager loop"]
        makes[f"{COMPILED} of the loop"] = lambda: compiled_run(loop)
        makes[f"{COMPILED} of the loop, reduce-overhead"] = lambda: compiled_run(
            loop, mode="reduce-overhead"
        )
    for name, make in makes.items():
        case.add(name, make, lambda run: difference_to_fp64(_listed(run()), truth, factor))


def _captured_value(run: Run, device: str) -> Run:
    """The run as a graph, which gives the captured run's result."""
    result = None

    def kept() -> None:
        nonlocal result
        result = run()

    for _ in range(3):
        kept()
    replay = captured(kept, device)

    def replayed() -> object:
        replay()
        return result

    return replayed


def _listed(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _optimizer(
    groups: Groups,
    backend: str,
    momentum_dtype: torch.dtype | None = None,
    scheduled: bool = True,
    optimizer: str = "SGD",
) -> torch.optim.Optimizer:
    schedule = fastfreeze.Cosine(TOTAL_STEPS) if scheduled else None
    if optimizer == "AdamW":
        return fastfreeze.AdamW(groups, schedule=schedule, backend=backend, **ADAMW_VALUES)
    return fastfreeze.SGD(
        groups, schedule=schedule, momentum_dtype=momentum_dtype, backend=backend, **SGD_VALUES
    )


def _ours(*arguments: object, **options: object) -> Run:
    return _optimizer(*arguments, **options).step


def _ours_scaled(groups: Groups, backend: str) -> Run:
    return _scaled(_optimizer(groups, backend), lambda: None)


def _fused_scaled(groups: Groups) -> Run:
    optimizer = torch.optim.SGD(groups, **SGD_VALUES, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL_STEPS)
    return _scaled(optimizer, scheduler.step)


def _scaled(optimizer: torch.optim.Optimizer, after: Run) -> Run:
    """Step and update of a GradScaler; a scale of 1, or the gradients would shrink each time."""
    device = optimizer.param_groups[0]["params"][0].device
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**30)
    scaler.scale(torch.zeros((), device=device))  # makes the scale's tensor

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()
        after()

    return step


def _foreach_mixed(groups: Groups) -> Run:
    """torch's foreach with momentum in fp32: buffers of zeros, which it takes as it finds them."""
    optimizer = torch.optim.SGD(groups, **SGD_VALUES, foreach=True)
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=torch.float32)
    return with_scheduler(optimizer)


def _master(groups: Groups) -> Run:
    """torch's fused step of weights in fp32, which the weights in use are copied from."""
    used = [p for group in groups for p in group["params"]]
    own = {p: torch.nn.Parameter(p.detach().float()) for p in used}
    for p in own.values():
        p.grad = torch.empty_like(p)
    step = torch_step(
        [{**group, "params": [own[p] for p in group["params"]]} for group in groups], fused=True
    )
    weights, masters = [p.detach() for p in used], [p.detach() for p in own.values()]
    grads, wide_grads = [p.grad for p in used], [p.grad for p in own.values()]

    def both() -> None:
        torch._foreach_copy_(wide_grads, grads)
        step()
        torch._foreach_copy_(weights, masters)

    return both


def _tensor_lr(
    groups: Groups,
    device: str,
    make: type[torch.optim.Optimizer] = torch.optim.SGD,
    values: Mapping[str, float] = SGD_VALUES,
) -> Run:
    """torch's fused step with learning rates that are read on the device, where a graph reads them.

    Its own scheduler would launch a kernel for each group: the rates are copied there all at once.
    """
    lrs = torch.empty(len(groups), device=device)
    own = [{**group, "lr": lrs[i]} for i, group in enumerate(groups)]
    optimizer = make(own, **values, fused=True)
    steps = itertools.count()

    def rates() -> None:
        lr = values["lr"] / 2 * (1 + math.cos(math.pi * next(steps) / TOTAL_STEPS))
        host = torch.full((len(groups),), lr, device="cpu", pin_memory=device == "cuda")
        lrs.copy_(host, non_blocking=True)

    return InTwoParts(rates, optimizer.step)


def _compiled_step(groups: Groups, device: str) -> Run:
    """torch's step compiled; learning rates are tensors, or each would compile it anew."""
    torch._dynamo.reset()
    values = {**SGD_VALUES, "lr": torch.tensor(SGD_VALUES["lr"], device=device)}
    return with_scheduler(torch.optim.SGD(groups, **values, foreach=True), compiled=True)


def _truth(shapes: Shapes, device: str, dtype: torch.dtype, **options: object) -> list[Tensor]:
    """The parameters after the gate's steps, in fp64."""
    groups = shapes.groups(device, dtype)
    for group in groups:
        group["params"] = [_in_fp64(p) for p in group["params"]]
    step = torch_step(groups, scheduled=True, foreach=False, **options)
    for _ in range(GATE_STEPS):
        step()
    return [p for g in groups for p in g["params"]]


def _in_fp64(param: Tensor) -> torch.nn.Parameter:
    double = torch.nn.Parameter(param.detach().double())
    assert param.grad is not None
    double.grad = param.grad.double()
    return double


def difference_to_fp64(
    results: Sequence[Tensor], truth: Sequence[Tensor], factor: float = 1
) -> str | None:
    """What keeps the results from passing; None if they are near the truth."""
    for i, (ours, true) in enumerate(zip(results, truth, strict=True)):
        expected = true.double()
        scale = expected.abs().clamp(min=expected.square().mean().sqrt())
        error = ((ours.double() - expected).abs() / scale).max().item() if ours.numel() else 0.0
        allowed = factor * TOLERANCE[ours.dtype]
        if not error <= allowed:
            return f"result {i} is {error:.1e} from fp64, allowed {allowed:.0e}"
    return None
