"""python -m benchmarks.predict [MODEL ...]: ensembles with a shared prefix, against a plain loop.

Five members have the weights of their first modules in common, by default up to 75% of the MACs.
Every rival returns the mean of the members' probabilities for the same images; one that is further
than 1e-6 from the loop in float64 is told of and not timed. They are timed in turns. The bound is
how many times fewer MACs there are to do, if what is shared is done once.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from benchmarks.measure import Times, interleave, machine
from benchmarks.results import write_json
from fastfreeze import SnapshotEnsemble
from fastfreeze.recipes.models import build_model

TOLERANCE = 1e-6
BASELINE = "torch loop"
State = dict[str, Tensor]
Run = Callable[[Tensor], Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    command = shlex.join(
        ["python", "-m", "benchmarks.predict", *(sys.argv[1:] if argv is None else argv)]
    )
    facts: dict = {"machine": machine(), "command": command, "cases": []}
    print(f"{facts['machine']}\n\n{HEADER}", flush=True)
    for name in arguments.models:
        for batch in arguments.batch_size:
            entry = measured(name, batch, arguments)
            facts["cases"].append(entry)
            print("\n".join(lines(entry)), flush=True)
            if arguments.out:
                write_json(arguments.out, facts)
    return int(any(entry["wrong"] for entry in facts["cases"]))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", default=["resnet20", "densenet-bc-40", "wrn16-2"])
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 4, 64])
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--shared", type=float, default=0.75, help="of the MACs, 0..1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="torch.compile too: minutes each")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file")
    return parser.parse_args(argv)


def macs(model: nn.Module, x: Tensor) -> dict[str, int]:
    """MACs of a sample in each convolution and linear module, in the order of execution."""
    found: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):

            def count(module, inputs, output, name=name):
                found[name] = module.weight.numel() * output[0].numel() // output.shape[1]

            hooks.append(module.register_forward_hook(count))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def members(
    name: str, count: int, shared: float, x: Tensor
) -> tuple[nn.Module, list[State], float]:
    """A model, state dicts that begin alike, and the share of the MACs in which they do."""
    torch.manual_seed(0)
    model = build_model(name).eval()
    costs = macs(model, x[:1])
    total, done, own = sum(costs.values()), 0, None
    order = [n for n, _ in model.named_modules()]
    for module, cost in costs.items():
        if (done + cost) / total > shared:
            own = module
            break
        done += cost
    first = _trained(model)
    later = set() if own is None else set(order[order.index(own) :])
    states = [first]
    for _ in range(count - 1):
        other = _trained(build_model(name))
        states.append({n: (other if n.rpartition(".")[0] in later else first)[n] for n in first})
    return model, states, done / total


def _trained(model: nn.Module) -> State:
    """Weights of a model whose norms have seen images."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(16, 3, 32, 32))
    model.eval()
    return copy.deepcopy(model.state_dict())


def loop_of(model: nn.Module, states: Sequence[State]) -> Run:
    models = [copy.deepcopy(model).eval() for _ in states]
    for m, state in zip(models, states, strict=True):
        m.load_state_dict(state)

    def run(x: Tensor) -> Tensor:
        return torch.stack([m(x).softmax(-1) for m in models]).mean(0)

    return run


def vmap_of(model: nn.Module, states: Sequence[State]) -> Run:
    models = [copy.deepcopy(model).eval().requires_grad_(False) for _ in states]
    for m, state in zip(models, states, strict=True):
        m.load_state_dict(state)
    stacked, skeleton = stack_module_state(models), copy.deepcopy(model).eval().to("meta")
    call = vmap(lambda state, x: functional_call(skeleton, state, (x,)), in_dims=(0, None))
    return lambda x: call(stacked, x).softmax(-1).mean(0)


def rivals(
    model: nn.Module, states: Sequence[State], x: Tensor, with_compile: bool
) -> dict[str, Run]:
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    runs: dict[str, Run] = {
        BASELINE: loop_of(model, states),
        "torch loop, channels_last": loop_of(last, states),
        "torch.func vmap": vmap_of(model, states),
        "fastfreeze": SnapshotEnsemble(model, states),
        "fastfreeze, not folded": SnapshotEnsemble(model, states, fold=False),
    }
    if with_compile:
        runs["torch.compile of the loop"] = torch.compile(loop_of(model, states))
        module = SnapshotEnsemble(model, states).as_module(x)
        runs["fastfreeze compiled"] = torch.compile(module)
    return runs


@torch.no_grad()
def measured(name: str, batch: int, arguments: argparse.Namespace) -> dict:
    x = torch.randn(batch, 3, 32, 32)
    model, states, share = members(name, arguments.members, arguments.shared, x)
    runs = rivals(model, states, x, arguments.compile)
    truth = loop_of(copy.deepcopy(model).double(), states)(x.double())
    wrong = {}
    for rival in list(runs):
        error = (runs[rival](x).double() - truth).abs().max().item()
        if not error <= TOLERANCE:
            wrong[rival] = f"{error:.1e} from the loop in float64"
            del runs[rival]
    times = interleave({k: lambda f=f: f(x) for k, f in runs.items()}, arguments.rounds)
    count = arguments.members
    return {
        "model": name,
        "batch_size": batch,
        "members": count,
        "shared": share,
        "bound": count / (share + count * (1 - share)),
        "wrong": wrong,
        "seconds": {rival: asdict(t) for rival, t in times.items()},
    }


HEADER = (
    "| model, batch size, shared MACs | rival | ms (quartiles) | times as fast as the loop "
    "| bound |\n"
    "|---|---|---|---|---|"
)


def lines(entry: dict) -> list[str]:
    """The table's lines for one case."""
    times = {rival: Times(**t) for rival, t in entry["seconds"].items()}
    case = f"{entry['model']}, {entry['batch_size']}, {entry['shared']:.0%}"
    found = [
        f"| {case} | {rival} | {1e3 * t.median:.2f} ({1e3 * t.low:.2f}-{1e3 * t.high:.2f}) "
        f"| {times[BASELINE].median / t.median:.2f} | {entry['bound']:.2f} |"
        for rival, t in times.items()
    ]
    return found + [
        f"| {case} | {rival} | wrong: {why} | | |" for rival, why in entry["wrong"].items()
    ]


if __name__ == "__main__":
    sys.exit(main())
