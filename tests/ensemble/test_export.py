"""The ensemble as one exported artefact, which is then run."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch

from fastfreeze.ensemble import SnapshotEnsemble
from tests.ensemble.members import Convolutions, assert_mean, chain
from tests.nets import Does, Many, Residual

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = torch.export.Dim("batch", min=1, max=64)


def made():
    ensemble = SnapshotEnsemble(Residual(), chain(Residual, ("stem", "blocks.0"), 3))
    return ensemble, torch.randn(2, 3, 8, 8)


def assert_runs(module, ensemble, convolutions=15):
    """With any batch size."""
    for batch in (1, 7):
        x = torch.randn(batch, 3, 8, 8)
        with Convolutions() as ran, torch.no_grad():
            found = module(x)
        assert_mean(found, ensemble.members, x)
        assert ran.count == convolutions


def test_a_module_runs_what_is_shared_once():
    ensemble, x = made()
    module = ensemble.as_module(x)
    for how in (lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        assert_runs(how(module), ensemble)
    assert sum(map(torch.numel, module.parameters())) == sum(
        map(torch.numel, ensemble.parameters())
    )
    module.train().half()
    assert_mean(ensemble(x), ensemble.members, x)
    assert not any(m.training for member in ensemble.members for m in member.modules())


def test_arguments_by_name():
    ensemble = SnapshotEnsemble(Many(), chain(Many, ("a",), 3))
    x, y, z = torch.randn(5, 3), torch.randn(5, 4), torch.randn(5, 4)
    module = ensemble.as_module(x, y, scale=2.0, extra=z)
    torch.testing.assert_close(module(x, y, z), ensemble(x, y, scale=2.0, extra=z))


RUN_EXPORTED = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
x, expected = torch.load(sys.argv[2])
with torch.no_grad():
    torch.testing.assert_close(program(x), expected, rtol=0, atol=1e-6)
assert "fastfreeze" not in sys.modules
"""


@pytest.mark.parametrize(
    ("whole", "strict"),
    [
        (False, False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 1), (1, 0), (1, 1)]),
    ],
)
def test_exported(tmp_path, whole, strict):
    """The module, or the ensemble itself, saved and loaded, with another batch size."""
    ensemble, x = made()
    exported = ensemble if whole else ensemble.as_module(x)
    dynamic = {"inputs": ({0: BATCH},)} if whole else ({0: BATCH},)
    program = torch.export.export(exported, (x,), dynamic_shapes=dynamic, strict=bool(strict))
    torch.export.save(program, tmp_path / "ensemble.pt2")
    loaded = torch.export.load(tmp_path / "ensemble.pt2").module()
    assert_runs(loaded, ensemble, 21 if whole else 15)
    if not whole:  # the module needs no fastfreeze
        torch.save((x, ensemble(x)), tmp_path / "example.pt")
        files = [tmp_path / name for name in ("ensemble.pt2", "example.pt")]
        command = [sys.executable, "-c", RUN_EXPORTED, *files]
        subprocess.run(command, cwd=tmp_path, timeout=120, check=True)


def test_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    ensemble, x = made()
    path, sizes = tmp_path / "ensemble.onnx", ({0: BATCH},)
    module = ensemble.as_module(x)
    torch.onnx.export(module, (x,), path, dynamo=True, dynamic_shapes=sizes, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = [i.name for i in session.get_inputs()]
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        (found,) = session.run(None, {name: x.numpy()})
        assert_mean(torch.from_numpy(found), ensemble.members, x)


@pytest.mark.parametrize("which", ["ensemble", "module"])
def test_compiles_in_one_graph(which):
    ensemble, x = made()
    whole = ensemble if which == "ensemble" else ensemble.as_module(x)
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_mean(compiled(x), ensemble.members, x)


def test_a_module_under_autocast_and_inference_mode():
    ensemble, x = made()
    module, x = ensemble.as_module(x), x.requires_grad_()
    gradients = [torch.autograd.grad(m(x)[:, 0].sum(), x)[0] for m in (ensemble, module)]
    torch.testing.assert_close(*gradients)
    with torch.inference_mode():
        assert_mean(module(x), ensemble.members, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), ensemble(x))


def test_a_part_of_another_module():
    ensemble, x = made()
    model = Does(lambda m, x: m.inner(x * 2).log(), inner=ensemble.as_module(x))
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), ensemble(x * 2).log(), rtol=1e-5, atol=1e-5)
