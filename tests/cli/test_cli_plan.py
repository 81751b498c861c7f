"""``fastfreeze plan``: what is typed, what is printed, and how it ends."""

import sys

import pytest

from tests import commands
from tests.commands import work_in


def invoke(*arguments):
    return commands.invoke("plan", *arguments)


def as_json(*arguments):
    return commands.printed("plan", *arguments)


@pytest.mark.parametrize("of", ["compute", "backward"])
def test_saving_finds_t_0(of):
    found = as_json("resnet20", "--saving", 0.3, "--of", of, "--steps", 5000)
    assert 0.3 <= found[f"{of}_saving"] < 0.301
    assert found["total_steps"] == 5000
    again = as_json("resnet20", "--t0", found["t_0"], "--steps", 5000)
    assert again == found
    result = invoke("resnet20", "--saving", 0.3, "--of", of, "--steps", 5000)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("layer  name")
    assert lines[-3].startswith("predicted saving: ")
    assert lines[-1] == f"t_0={found['t_0']} is the largest that saves 30.0% of the {of}"


def test_a_plan_without_a_saving():
    found = as_json("resnet20", "--steps", 1000)
    assert (found["t_0"], found["how_scale"]) == (0.8, "cubic")
    first, last = found["layers"][0], found["layers"][-1]
    assert (first["name"], first["freezes_at_step"]) == ("stem", [512])
    assert first["initial_lr"] == pytest.approx(0.1 / 0.8**3)
    assert (last["name"], last["freezes_at_step"], last["initial_lr"]) == ("head", [], 0.1)
    assert sum(layer["parameters"] for layer in found["layers"]) == 269_722
    assert sum(layer["backward_share"] for layer in found["layers"]) == pytest.approx(1)
    assert 0.2 < found["backward_saving"] < 0.5
    printed = invoke("resnet20", "--t0", 0.8, "--steps", 1000).stdout.splitlines()
    assert printed[-2].startswith("predicted saving: ")
    steps = round(1000 * (1 - found["compute_saving"]))
    assert printed[-1] == f"from scratch, its rival is a run of {steps} steps without freezing"
    assert as_json("resnet20", "--how-scale", "linear")["how_scale"] == "linear"


def test_torchvisions_network():
    found = as_json("torchvision:resnet18", "--saving", 0.2)
    assert [layer["name"] for layer in found["layers"]][:2] == ["conv1", "layer1.0"]
    assert sum(layer["parameters"] for layer in found["layers"]) == 11_689_512
    large = ("--image-size", 224, "--num-classes", 1000)
    assert found == as_json("torchvision:resnet18", "--saving", 0.2, *large)
    assert len(as_json("torchvision:regnet_x_400mf")["layers"]) > 10  # which needs values


OWN = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14**2, 10))

class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.spare = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(7, 7, 3)

    def forward(self, x):
        return self.b(self.a(x))

made = Net()
number = 3

class nested:
    @staticmethod
    def make():
        return Net()

def fails():
    raise OSError("no weights\\nhere")

def leaves():
    raise SystemExit(3)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A directory with modules, from which the command is started."""
    work_in(
        tmp_path,
        monkeypatch,
        plan_own=OWN,
        plan_broken="import package_that_is_missing\n",
        plan_typo="def make(:\n",
    )


@pytest.mark.parametrize("name", ["Net", "made", "nested.make"])
def test_own_network(own, name):
    found = as_json(f"plan_own:{name}", "--in-channels", 1, "--image-size", 16, "--saving", 0.1)
    assert [layer["name"] for layer in found["layers"]] == ["0", "3"]
    assert found["compute_saving"] >= 0.1


def test_what_split_warns_of_is_told(own):
    result = invoke("plan_own:Unused", "--in-channels", 1)
    assert result.exit_code == 0
    assert result.stderr.startswith("Warning: parameters not used in the forward")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        ("plan_broken:make", 1, "cannot import plan_broken: ModuleNotFoundError: No module"),
        ("plan_typo:make", 1, "cannot import plan_typo: SyntaxError: "),
        ("plan_own:Nett", 1, "plan_own has no Nett; did you mean Net?"),
        ("plan_own:number", 1, "plan_own:number must be a function, got int"),
        ("plan_own:fails", 1, "plan_own:fails() failed: OSError: no weights"),
        ("plan_own:leaves", 1, "plan_own:leaves() failed: SystemExit: 3"),
        ("plan_own:torch.Size", 1, "plan_own:torch.Size() must return an nn.Module, got Size"),
        ("plan_own:Net", 1, "plan_own:Net cannot be split with images of the shape [2, 3, 32, 32]"),
        ("plan_own:Net --num-classes 3", 2, "--num-classes is not for plan_own:Net"),
        (":make", 2, "must be MODULE:FUNCTION, got :make"),
        ("torchvision:resnet5", 2, "no classification network 'resnet5'; try resnet50"),
        ("torchvision:resnet18 --in-channels 1", 2, "takes images of 3 channels, not of 1"),
        ("torchvision:alexnet --image-size 16", 1, "torchvision:alexnet cannot be split"),
        ("alexnet", 2, "model must be one of resnet<6n+2>"),
        ("resnet20 --saving 0.3 --t0 0.5", 2, "--saving and --t0 exclude each other"),
        ("resnet20 --of backward", 2, "--of is for --saving"),
        ("resnet20 --saving 1", 2, "--saving"),
        ("resnet20 --saving 0.9", 2, "saving must be at most 0.5"),
    ],
)
def test_bad_input(own, arguments, exit_code, message):
    result = invoke(*arguments.split())
    assert result.exit_code == exit_code, result.output
    last = result.stderr.splitlines()[-1]
    assert message in last
    assert last.startswith("Error: ")
    assert result.stdout == ""


def test_missing_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    result = invoke("torchvision:resnet18")
    assert result.exit_code == 1
    assert 'pip install "fastfreeze[train]"' in result.stderr
