"""Draws the pictures of docs/: ``python docs/pictures.py`` writes them anew.

They show a real :class:`fastfreeze.TrimmedModel`: the operations of its model, and those that run
when its frozen modules have stand-ins. Text in the files is text, so that a test can compare it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib as mpl
import networkx as nx
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import fastfreeze
from fastfreeze.files import write_atomic
from fastfreeze.trimming.operations import Convolution

FROZEN, CROSSING, TRAINED, DATA = "#cfe2f3", "#9fc5e8", "#fce5cd", "#eeeeee"
IMAGES = "images"
_WIDTH, _ROW = 3.2, 0.42  # inches


def conv(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, 8, 3, padding=1, bias=False)


class Body(nn.Module):
    """A convolution and a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(3), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = conv(8), nn.BatchNorm2d(8)
        self.conv3, self.norm3 = conv(8), nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        """Values [B, 8, H, W] of images [B, 3, H, W]."""
        x = torch.relu(self.norm1(self.conv1(images)))
        y = torch.relu(self.norm2(self.conv2(x)))
        return torch.relu(x + self.norm3(self.conv3(y)))


class SmallNet(nn.Module):
    """A body, a second convolution and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.conv4, self.norm4, self.fc = conv(8), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 3, H, W]."""
        x = torch.relu(self.norm4(self.conv4(self.body(images))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Operation:
    """A node of a picture: its name in the graph, what to write into it, what it reads."""

    name: str
    label: str
    inputs: tuple[str, ...]
    colour: str


def trimmed_net() -> fastfreeze.TrimmedModel:
    """A :class:`SmallNet` whose body is frozen, after one forward."""
    torch.manual_seed(0)
    model = SmallNet()
    model.body.requires_grad_(False)
    network = fastfreeze.trim(model)
    network(torch.randn(8, 3, 256, 256))
    return network


def before(network: fastfreeze.TrimmedModel) -> list[Operation]:
    """The model's operations, those of its frozen part marked."""
    model = network.model
    operations: list[Operation] = []
    trains: set[str] = set()
    for node in torch.fx.symbolic_trace(model).graph.nodes:
        if node.op == "output":
            continue
        is_module = node.op == "call_module"
        name = str(node.target) if is_module else node.name.rstrip("_0123456789")
        label = name.rpartition(".")[2]
        inputs = tuple(i.name for i in node.all_input_nodes)
        own = model.get_submodule(name).parameters() if is_module else ()
        if any(p.requires_grad for p in own) or not trains.isdisjoint(inputs):
            trains.add(node.name)
        colour = TRAINED if node.name in trains else FROZEN
        operations.append(
            Operation(node.name, label, inputs, DATA if node.op == "placeholder" else colour)
        )
    return operations


def after(network: fastfreeze.TrimmedModel) -> list[Operation]:
    """What runs in training: folded convolutions, then the rest on the value of the last."""
    model = before(network)
    rest = [operation for operation in model if operation.colour == TRAINED]
    (crossing,) = {i for operation in rest for i in operation.inputs} - {o.name for o in rest}
    folded: list[Operation] = []
    names: dict[int, str] = {}
    for x, residual, relu, value in _folded_convolutions(network):
        inputs = [names.get(id(t), IMAGES) for t in (x, residual) if t is not None]
        parts = ["conv and norm", *["add"] * (len(inputs) - 1), *["relu"] * relu]
        names[id(value)] = f"folded {len(folded)}"
        folded.append(Operation(names[id(value)], ", ".join(parts), tuple(inputs), FROZEN))
    last = folded.pop()
    handed_over = Operation(crossing, last.label, last.inputs, CROSSING)
    return [Operation(IMAGES, "images", (), DATA), *folded, handed_over, *rest]


def _folded_convolutions(network: fastfreeze.TrimmedModel) -> list[tuple[Any, Any, bool, Any]]:
    """Input, residual, whether there is a ReLU, and value of each in a call of the network."""
    seen = []
    real = Convolution.__call__

    def noted(self: Convolution, x: Tensor, residual: Tensor | None, relu: bool, *more: Any) -> Any:
        value = real(self, x, residual, relu, *more)
        seen.append((x, residual, relu, value))
        return value

    with mock.patch.object(Convolution, "__call__", noted):
        network(torch.randn(8, 3, 256, 256))
    return seen


def draw_graph(operations: Sequence[Operation], key: Sequence[tuple[str, str]]) -> Figure:
    """The operations from top to bottom, an arc past those that are skipped, a key of colours."""
    graph = nx.DiGraph([(i, o.name) for o in operations for i in o.inputs])
    order = {o.name: i for i, o in enumerate(operations)}
    rows = len(operations) + 0.6 * len(key) + 0.5
    figure = Figure(figsize=(_WIDTH, _ROW * rows))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(-1, 1), ylim=(0.5 - rows, 0.5))
    axes.set_axis_off()
    for bend in (0.0, -0.5):
        edges = [e for e in graph.edges if (order[e[1]] - order[e[0]] > 1) == (bend != 0)]
        nx.draw_networkx_edges(
            graph,
            {name: (0.0, -i) for name, i in order.items()},
            edgelist=edges,
            ax=axes,
            node_size=500,
            connectionstyle=f"arc3,rad={bend}",
        )
    for o in operations:
        box = {"boxstyle": "round,pad=0.35", "facecolor": o.colour, "edgecolor": "#444444"}
        axes.text(0, -order[o.name], o.label, ha="center", va="center", fontsize=9, bbox=box)
    for i, (colour, text) in enumerate(key):
        y = -len(operations) - 0.6 * i
        corner = (-0.95, y - 0.15)
        axes.add_patch(Rectangle(corner, 0.12, 0.3, facecolor=colour, edgecolor="#444444"))
        axes.text(-0.78, y, text, va="center", fontsize=8)
    return figure


def draw_schedules() -> Figure:
    """Learning rates of five layers under six schedules."""
    steps, num_layers = 300, 5
    schedules = {
        "FreezeOut, t_0=0.5": fastfreeze.FreezeOut(steps, t_0=0.5),
        "FreezeOut, t_0=0.5, stages=2": fastfreeze.FreezeOut(steps, t_0=0.5, stages=2),
        "FreezeOutCycles, sticky": fastfreeze.FreezeOutCycles(steps, num_cycles=3, t_0=0.5),
        "FreezeOutCycles, thaw": fastfreeze.FreezeOutCycles(
            steps, num_cycles=3, t_0=0.5, composition="thaw"
        ),
        "Frozen, until=2, warmup_steps=60": fastfreeze.Frozen(steps, until=2, warmup_steps=60),
        "GradualUnfreezing, layer_decay=0.8": fastfreeze.GradualUnfreezing(
            steps, unfreeze_every=50, layer_decay=0.8
        ),
    }
    figure = Figure(figsize=(8.0, 6.9), layout="constrained")
    for axes, (title, schedule) in zip(figure.subplots(3, 2).flat, schedules.items(), strict=True):
        for layer in range(num_layers):
            rates = schedule.lr(np.arange(steps), 0.1, layer, num_layers)
            rates[[schedule.is_frozen(t, layer, num_layers) for t in range(steps)]] = np.nan
            axes.plot(rates, label=f"layer {layer}", color=mpl.colormaps["viridis"](layer / 4.5))
        axes.set(title=title, xlabel="step", ylabel="learning rate")
        axes.title.set_fontsize(9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=num_layers)
    return figure


def figures() -> dict[str, Figure]:
    """Every picture by its file's name."""
    network = trimmed_net()
    graph = [(FROZEN, "frozen"), (TRAINED, "trains: forward and backward")]
    program = [
        (FROZEN, "no autograd, eval mode, folded"),
        (CROSSING, "its value crosses the cut, detached"),
        graph[1],
    ]
    return {
        "graph-before.svg": draw_graph(before(network), graph),
        "graph-after.svg": draw_graph(after(network), program),
        "schedules.svg": draw_schedules(),
    }


def main(directory: Path) -> None:
    """Write all pictures into ``directory``."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fastfreeze",
        "font.family": "sans-serif",
    }
    with mpl.rc_context(style):
        for name, figure in figures().items():
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
            write_atomic(directory / name, "\n".join([*lines, ""]).encode())


if __name__ == "__main__":
    main(Path(__file__).parent)
