"""The kernels' cases: averages of an ensemble, and what the frozen forward is made of.

The floor is the case's bytes at the bandwidth of a large copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import OURS, Case, Run, compiled_run, difference, graphed, own_backends
from fastfreeze.kernels.affine import affine_relu_cat
from fastfreeze.kernels.softmax import ensemble_softmax, ensemble_statistics
from fastfreeze.kernels.winograd import transform_weight, winograd_conv2d


def softmax_case(M: int, B: int, C: int, device: str = "cpu") -> Case:
    """Mean of the softmax of M members' logits [B, C], fp32."""
    members = _logits(M, B, C, device)
    stacked = torch.stack(members)

    def loop() -> Tensor:
        total = torch.softmax(members[0], -1)
        for logits in members[1:]:
            total += torch.softmax(logits, -1)
        return total.div_(M)

    def own(backend: str) -> Tensor:
        return ensemble_softmax(members, backend=backend)

    rivals = {"softmax(stacked).mean(0)": lambda: torch.softmax(stacked, -1).mean(0)}
    name, moved = f"ensemble average, ({M}, {B}, {C})", (M + 1) * B * C * 4
    return _averages(name, moved, own, loop, rivals, device)


def statistics_case(M: int, B: int, C: int, device: str = "cpu") -> Case:
    """That mean with its maximum, class, entropy, mutual information and the labels' NLL."""
    members = _logits(M, B, C, device)
    labels = torch.randint(C, (B,), device=device)

    def own(backend: str) -> list[Tensor]:
        """All but the class, of which rounding may choose another where two are as likely."""
        s = ensemble_statistics(members, labels, backend=backend)
        return [s.probabilities, s.max_probability, s.entropy, s.mutual_information, s.nll]

    name = f"ensemble statistics, ({M}, {B}, {C})"
    moved = (M + 1) * B * C * 4 + B * (8 + 8 + 4 * 4)
    loop = partial(eager_statistics, members, labels)
    # Compiled sums over many classes lose digits.
    return _averages(name, moved, own, loop, {}, device, rtol=1e-3)


def _logits(M: int, B: int, C: int, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, C, device=device) for _ in range(M)]


def eager_statistics(members: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """What a user would write; in the order of ours."""
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


def _averages(
    name: str,
    bytes_moved: int,
    own: Callable[[str], object],
    loop: Run,
    rivals: dict[str, Run],
    device: str,
    **tolerance: float,
) -> Case:
    """Ours by backend, and the loop; on a GPU both also as graphs, on a CPU it also compiled."""
    runs = {name: partial(own, backend) for name, backend in own_backends(device).items()}
    runs["eager loop"] = loop
    graphs = {f"{rival}, graph": graphed(run) for rival, run in runs.items() if device == "cuda"}
    runs |= {**rivals, **graphs}
    return _case(name, bytes_moved, runs, loop, compiling=device == "cpu", **tolerance)


@torch.no_grad()
def convolution_case(C: int, size: int, K: int) -> Case:
    """A frozen 3x3 convolution with bias and ReLU, 32 channels_last images."""
    torch.manual_seed(0)
    last = torch.channels_last
    x = torch.randn(32, C, size, size).relu().to(memory_format=last)
    weight = (torch.randn(K, C, 3, 3) / (9 * C) ** 0.5).to(memory_format=last)
    bias, transformed = torch.randn(K), transform_weight(weight)
    how = ((1, 1), (1, 1), (1, 1), 1, "relu", [], "")

    def by_torch() -> Tensor:
        return F.conv2d(x, weight, bias, padding=1).relu_()

    runs: dict[str, Run] = {
        OURS: lambda: winograd_conv2d(x, transformed, bias, padding=(1, 1), relu=True),
        "torch conv2d, relu_": by_torch,
        "oneDNN, fused": lambda: torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *how),
    }
    name = f"3x3 convolution, {C} to {K} channels, 32 images of {size}x{size}"
    moved = 4 * (9 * C * K + 32 * size * size * (C + K))
    return _case(name, moved, runs, by_torch, atol=2e-5)


@torch.no_grad()
def norm_case(channels: Sequence[int], size: int) -> Case:
    """A frozen norm and ReLU of tensors side by side, 32 channels_last images."""
    torch.manual_seed(0)
    images = [torch.randn(32, c, size, size) for c in channels]
    parts = [x.to(memory_format=torch.channels_last) for x in images]
    C = sum(channels)
    scale, shift, mean, var = torch.randn(C), torch.randn(C), torch.zeros(C), torch.ones(C)

    def norm() -> Tensor:
        x = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return F.batch_norm(x, mean, var, scale, shift, eps=0.0).relu_()

    runs: dict[str, Run] = {
        OURS: lambda: affine_relu_cat(parts, scale, shift),
        "torch cat, batch_norm, relu_": norm,
    }
    tensors = f"{len(channels)} tensor" + "s" * (len(channels) > 1)
    name = f"norm and ReLU, {tensors}, {C} channels, 32 images of {size}x{size}"
    return _case(name, 2 * 4 * 32 * size * size * C, runs, norm)


def _case(
    name: str,
    bytes_moved: int,
    runs: dict[str, Run],
    truth: Run,
    compiling: bool = False,
    **tolerance: float,
) -> Case:
    """Those of the runs that agree with ``truth``; if ``compiling``, that compiled is one, too."""
    case = Case(name=name, bytes_moved=bytes_moved)
    expected = _listed(truth())
    makes: dict[str, Callable[[], Run]] = {k: lambda run=run: run for k, run in runs.items()}
    if compiling:
        makes["torch.compile of the loop"] = partial(compiled_run, truth)

    def wrong(run: Run) -> str | None:
        run()  # a graph is captured at the second call
        return difference(_listed(run()), expected, **tolerance)

    for rival, make in makes.items():
        case.add(rival, make, wrong)
    return case


def _listed(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def kernel_cases(device: str = "cpu") -> dict[str, Callable[[], Case]]:
    """By name."""
    found: dict[str, Callable[[], Case]] = {}
    for M, B, C in [(2, 33, 17), (5, 256, 10), (5, 1024, 100), (6, 4096, 1000)]:
        found[f"softmax-{M}-{B}-{C}"] = partial(softmax_case, M, B, C, device)
    for M, B, C in [(2, 33, 17), (5, 1024, 100), (6, 4096, 1000), (10, 64, 50257)]:
        found[f"statistics-{M}-{B}-{C}"] = partial(statistics_case, M, B, C, device)
    if device == "cpu":
        for C, K, size in [(64, 64, 16), (256, 256, 8), (512, 512, 4), (48, 12, 16)]:
            found[f"convolution-{C}-{K}-{size}"] = partial(convolution_case, C, size, K)
        found["norm-64-32"] = partial(norm_case, [64], 32)
        found["norm-7-tensors-16"] = partial(norm_case, [96] + [12] * 6, 16)
    return found
