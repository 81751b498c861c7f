"""What is measured: each case sets up rivals doing the same work, and checks that they do.

Rivals work on their own copies of the data. The floor, measured in the same run on the same
threads, is the time that the memory alone takes: for SGD the update of as many elements in one
flat tensor, for the rest the case's bytes at the bandwidth of a large copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fastfreeze
from benchmarks.measure import interleave
from fastfreeze.ops.affine import affine_relu_cat
from fastfreeze.ops.softmax import EnsembleStatistics, ensemble_softmax, ensemble_statistics
from fastfreeze.ops.winograd import transform_weight, winograd_conv2d
from fastfreeze.recipes.models import build_model

Run = Callable[[], object]
SGD_VALUES = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
TOTAL_STEPS = 1_000_000  # so long that no timed step reaches a freeze


@dataclass(frozen=True)
class Case:
    """Rivals for one piece of work; the first is ours.

    Attributes:
        name: for the table.
        runs: by name; each does the whole work once.
        bytes_moved: the least that can be read and written.
        floor: what takes as long as the memory alone; None: a copy of ``bytes_moved``.
    """

    name: str
    runs: dict[str, Run]
    bytes_moved: int
    floor: Run | None = None


def sgd_case(model_name: str, num_groups: int) -> Case:
    """One optimizer step with its learning-rate schedule, ``num_groups`` groups or 1."""
    results: dict[str, list[torch.Tensor]] = {}
    runs: dict[str, Run] = {}
    makers = {
        "fastfreeze": _ours,
        "torch fused": lambda g: torch_step(g, fused=True),
        "torch foreach": lambda g: torch_step(g, foreach=True),
        "torch for-loop": lambda g: torch_step(g, foreach=False),
    }
    for name, make in makers.items():
        groups = _groups(model_name, num_groups)
        runs[name] = make(groups)
        for _ in range(3):
            runs[name]()
        results[name] = [p.detach().clone() for g in groups for p in g["params"]]
    _require_equal(results, "torch for-loop")
    numel = sum(p.numel() for p in results["fastfreeze"])
    tensors, groups_text = (
        len(results["fastfreeze"]),
        f"{num_groups} group" + "s" * (num_groups > 1),
    )
    name = f"SGD step, {model_name} ({tensors} tensors, {numel / 1e6:.1f}M), {groups_text}"
    flat = torch.nn.Parameter(torch.randn(numel))
    flat.grad = torch.randn(numel)
    floor = _ours([{"params": [flat]}])
    return Case(name, runs, bytes_moved=numel * 4 * 5, floor=floor)  # read 3, write 2


def softmax_case(M: int, B: int, C: int) -> Case:
    """Mean of the softmax of M members' logits [B, C], fp32."""
    torch.manual_seed(0)
    members = [torch.randn(B, C) for _ in range(M)]
    stacked = torch.stack(members)

    def loop() -> torch.Tensor:
        total = torch.softmax(members[0], -1)
        for logits in members[1:]:
            total += torch.softmax(logits, -1)
        return total.div_(M)

    runs: dict[str, Run] = {
        "fastfreeze": lambda: ensemble_softmax(members),
        "eager loop": loop,
        "softmax(stacked).mean(0)": lambda: torch.softmax(stacked, -1).mean(0),
    }
    _add_compiled(runs, loop)
    _require_equal({k: [f()] for k, f in runs.items()}, "softmax(stacked).mean(0)")
    return Case(f"ensemble average, ({M}, {B}, {C})", runs, bytes_moved=(M + 1) * B * C * 4)


def statistics_case(M: int, B: int, C: int) -> Case:
    """That mean with its maximum, class, entropy, mutual information and the labels' NLL."""
    torch.manual_seed(0)
    members = [torch.randn(B, C) for _ in range(M)]
    labels = torch.randint(C, (B,))

    def loop() -> list[torch.Tensor]:
        return eager_statistics(members, labels)

    runs: dict[str, Run] = {
        "fastfreeze": lambda: statistics_fields(ensemble_statistics(members, labels)),
        "eager loop": loop,
    }
    _add_compiled(runs, loop)
    # Compiled sums over many classes lose digits.
    _require_equal({k: f() for k, f in runs.items()}, "eager loop", rtol=1e-3)
    name = f"ensemble statistics, ({M}, {B}, {C})"
    return Case(name, runs, bytes_moved=(M + 1) * B * C * 4 + B * (8 + 8 + 4 * 4))


def eager_statistics(members: Sequence[torch.Tensor], labels: torch.Tensor) -> list[torch.Tensor]:
    """What a user would write; in the order of ``statistics_fields``."""
    mean = torch.zeros_like(members[0])
    entropies = torch.zeros_like(mean[:, 0])
    for logits in members:
        log_p = torch.log_softmax(logits, -1)
        p = log_p.exp()
        mean += p / len(members)
        entropies -= (p * log_p).sum(-1) / len(members)
    best, _ = mean.max(-1)
    entropy = torch.special.entr(mean).sum(-1)
    nll = -mean.gather(-1, labels[:, None])[:, 0].log()
    return [mean, best, entropy, (entropy - entropies).clamp(min=0), nll]


def statistics_fields(s: EnsembleStatistics) -> list[torch.Tensor]:
    """All but the class, of which rounding may choose another where two are as likely."""
    assert s.nll is not None
    return [s.probabilities, s.max_probability, s.entropy, s.mutual_information, s.nll]


@torch.no_grad()
def convolution_case(C: int, size: int, K: int) -> Case:
    """A frozen 3x3 convolution with bias and ReLU, 32 channels_last images."""
    torch.manual_seed(0)
    last = torch.channels_last
    x = torch.randn(32, C, size, size).relu().to(memory_format=last)
    weight = (torch.randn(K, C, 3, 3) / (9 * C) ** 0.5).to(memory_format=last)
    bias, transformed = torch.randn(K), transform_weight(weight)
    how = ((1, 1), (1, 1), (1, 1), 1, "relu", [], "")
    runs: dict[str, Run] = {
        "fastfreeze": lambda: winograd_conv2d(x, transformed, bias, padding=(1, 1), relu=True),
        "torch conv2d, relu_": lambda: F.conv2d(x, weight, bias, padding=1).relu_(),
        "oneDNN, fused": lambda: torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *how),
    }
    results = {k: [f()] for k, f in runs.items()}
    _require_equal(results, "torch conv2d, relu_", atol=2e-5)
    name = f"3x3 convolution, {C} to {K} channels, 32 images of {size}x{size}"
    return Case(name, runs, bytes_moved=4 * (9 * C * K + 32 * size * size * (C + K)))


@torch.no_grad()
def norm_case(channels: Sequence[int], size: int) -> Case:
    """A frozen norm and ReLU of tensors side by side, 32 channels_last images."""
    torch.manual_seed(0)
    images = [torch.randn(32, c, size, size) for c in channels]
    parts = [x.to(memory_format=torch.channels_last) for x in images]
    C = sum(channels)
    scale, shift = torch.randn(C), torch.randn(C)
    statistics = (torch.zeros(C), torch.ones(C))

    def norm() -> torch.Tensor:
        x = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return F.batch_norm(x, *statistics, scale, shift, eps=0.0).relu_()

    runs: dict[str, Run] = {
        "fastfreeze": lambda: affine_relu_cat(parts, scale, shift),
        "torch cat, batch_norm, relu_": norm,
    }
    _require_equal({k: [f()] for k, f in runs.items()}, "torch cat, batch_norm, relu_")
    tensors = f"{len(channels)} tensor" + "s" * (len(channels) > 1)
    name = f"norm and ReLU, {tensors}, {C} channels, 32 images of {size}x{size}"
    return Case(name, runs, bytes_moved=2 * 4 * 32 * size * size * C)


def _add_compiled(runs: dict[str, Run], loop: Run) -> None:
    try:
        compiled = torch.compile(loop)
        compiled()
        runs["torch.compile of the loop"] = compiled
    except Exception as error:
        print(f"no torch.compile here: {str(error).splitlines()[0]}")


CASES: dict[str, Callable[[], Case]] = {
    "sgd-resnet110-per-layer": lambda: sgd_case("resnet110", 110),
    "sgd-resnet110": lambda: sgd_case("resnet110", 1),
    "sgd-wrn40-4-per-layer": lambda: sgd_case("wrn40-4", 40),
    "sgd-vgg16": lambda: sgd_case("vgg16", 1),
    "softmax-5-256-10": lambda: softmax_case(5, 256, 10),
    "softmax-5-1024-100": lambda: softmax_case(5, 1024, 100),
    "softmax-6-4096-1000": lambda: softmax_case(6, 4096, 1000),
    "statistics-5-1024-100": lambda: statistics_case(5, 1024, 100),
    "statistics-6-4096-1000": lambda: statistics_case(6, 4096, 1000),
    "statistics-10-64-50257": lambda: statistics_case(10, 64, 50257),
    "convolution-64-64-16": lambda: convolution_case(64, 16, 64),
    "convolution-256-256-8": lambda: convolution_case(256, 8, 256),
    "convolution-512-512-4": lambda: convolution_case(512, 4, 512),
    "convolution-48-12-16": lambda: convolution_case(48, 16, 12),
    "norm-64-32": lambda: norm_case([64], 32),
    "norm-7-tensors-16": lambda: norm_case([96] + [12] * 6, 16),
}


def _groups(model_name: str, num_groups: int) -> list[dict]:
    torch.manual_seed(0)
    params = list(build_model(model_name).parameters())
    for p in params:
        p.grad = torch.randn_like(p)
    ends = [round(i * len(params) / num_groups) for i in range(num_groups + 1)]
    return [
        {"params": params[a:b], "layer_index": i, "num_layers": num_groups}
        for i, (a, b) in enumerate(itertools.pairwise(ends))
    ]


def _ours(groups: list[dict]) -> Run:
    schedule = fastfreeze.Cosine(TOTAL_STEPS)
    return fastfreeze.SGD(groups, schedule=schedule, backend="cpu", **SGD_VALUES).step


def torch_step(groups: list[dict], scheduled: bool = True, **implementation: bool) -> Run:
    """torch's step and, if ``scheduled``, its scheduler's."""
    optimizer = torch.optim.SGD(groups, **SGD_VALUES, **implementation)
    if not scheduled:
        return optimizer.step
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL_STEPS)

    def step() -> None:
        optimizer.step()
        scheduler.step()

    return step


def _require_equal(
    results: dict[str, list[torch.Tensor]], truth: str, rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """No number without the same result: raise where a rival computes something else."""
    for name, tensors in results.items():
        for ours, expected in zip(tensors, results[truth], strict=True):
            torch.testing.assert_close(
                ours, expected, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
            )


def copy_bandwidth() -> float:
    """Bytes per second of a copy of 256 MB, counting what is read and what is written."""
    source = torch.randn(64 * 2**20)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, rounds=9)["copy"]
    return 2 * source.numel() * 4 / times.median
