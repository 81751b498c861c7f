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

import fastfreeze
from benchmarks.measure import interleave
from fastfreeze.ops.softmax import EnsembleStatistics, ensemble_softmax, ensemble_statistics
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


def _require_equal(results: dict[str, list[torch.Tensor]], truth: str, rtol: float = 1e-5) -> None:
    """No number without the same result: raise where a rival computes something else."""
    for name, tensors in results.items():
        for ours, expected in zip(tensors, results[truth], strict=True):
            torch.testing.assert_close(
                ours, expected, rtol=rtol, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


def copy_bandwidth() -> float:
    """Bytes per second of a copy of 256 MB, counting what is read and what is written."""
    source = torch.randn(64 * 2**20)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, rounds=9)["copy"]
    return 2 * source.numel() * 4 / times.median
