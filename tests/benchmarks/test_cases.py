"""The cases of python -m benchmarks at toy sizes: their gate, what is timed, what is written."""

from __future__ import annotations

import itertools
import json
import sys
from functools import partial

import pytest
import torch
from torch import nn

import fastfreeze

case_module = pytest.importorskip("benchmarks.case", reason="tests run outside the source tree")
from benchmarks import __main__ as command  # noqa: E402
from benchmarks import compare, host_cases, optimizer_cases, step_cases  # noqa: E402
from benchmarks.case import Case, Rivals, difference  # noqa: E402
from benchmarks.cases import ALL_CASES, CASES  # noqa: E402
from benchmarks.shapes import shapes_of  # noqa: E402
from tests.conftest import needs_cpu_kernels  # noqa: E402

MODEL = "resnet8-w4"
TORCH = ["torch fused", "torch foreach", "torch for-loop"]
NUM_LAYERS = 8

pytestmark = pytest.mark.usefixtures("one_thread")


def sgd_case(**options):
    return optimizer_cases.optimizer_case(MODEL, **{"per_layer": False, **options})


def test_every_network_is_measured_in_one_group_and_many_with_layers_frozen():
    for model in ["resnet110", "wrn34-4", "wrn40-4", "densenet40", "vgg16", "resnet50", "vit_b_16"]:
        for groups, frozen in itertools.product(["", "-per-layer"], ["", "-frozen-50"]):
            assert f"sgd-{model}{groups}{frozen}" in CASES
    assert not any(name.endswith("compiled") for name in CASES)
    assert {"sgd-resnet110-compiled", "trim-resnet18", "norm-64-32"} < ALL_CASES.keys()


@pytest.mark.parametrize(
    ("model", "tensors"), [("resnet50", 161), ("vit_b_16", 152), ("resnet110", 329)]
)
def test_shapes_of_networks(model, tensors):
    if model != "resnet110":
        pytest.importorskip("torchvision")
    assert len(shapes_of(model)) == tensors


@needs_cpu_kernels
@pytest.mark.parametrize("per_layer", [False, True], ids=["one group", "per layer"])
@pytest.mark.parametrize("frozen", [0, 50, 90])
def test_rivals_of_a_step_do_the_same_in_all_forms(per_layer, frozen):
    case = sgd_case(per_layer=per_layer, frozen=frozen)
    assert case.left_out == {}
    assert list(case.runs) == ["fastfreeze", *TORCH]
    assert (f"{NUM_LAYERS} groups" if per_layer else "1 group") in case.name
    assert (f"{frozen}% of {NUM_LAYERS} layers frozen" in case.name) == (frozen > 0)
    total = sum(torch.Size(shape).numel() for shape in shapes_of(MODEL))
    assert (case.bytes_moved == 20 * total) == (frozen == 0)
    assert case.bytes_moved > 0


@needs_cpu_kernels
@pytest.mark.parametrize("per_layer", [False, True], ids=["one group", "per layer"])
def test_rivals_of_adamws_step_do_the_same(per_layer):
    values = optimizer_cases.ADAMW_VALUES
    case = sgd_case(per_layer=per_layer, values=values, optimizer="AdamW")
    assert case.left_out == {}
    assert list(case.runs) == ["fastfreeze", *TORCH]
    assert case.name.startswith("AdamW step, ")
    assert case.bytes_moved == 28 * sum(torch.Size(shape).numel() for shape in shapes_of(MODEL))
    assert {"adamw-resnet110-per-layer", "adamw-vit_b_16-frozen-50"} < CASES.keys()


@needs_cpu_kernels
def test_rivals_of_a_step_do_the_same_in_channels_last():
    case = sgd_case(channels_last=True)
    assert case.left_out == {}
    assert case.name.endswith(", channels_last")
    groups = optimizer_cases._groups(shapes_of(MODEL), NUM_LAYERS, 0, False, channels_last=True)
    images = [p for p in groups[0]["params"] if p.dim() == 4]
    assert images
    for t in (*images, *(p.grad for p in images)):
        assert t.is_contiguous(memory_format=torch.channels_last)


def test_frozen_layers_have_no_gradient_and_the_first_ones_freeze():
    layers = optimizer_cases._groups(shapes_of(MODEL), NUM_LAYERS, num_frozen=3, per_layer=True)
    assert len(layers) == NUM_LAYERS
    for layer in layers:
        frozen = layer["layer_index"] < 3
        assert all((p.grad is None) == frozen != p.requires_grad for p in layer["params"])


@needs_cpu_kernels
def test_a_rival_that_does_something_else_is_named_and_not_timed():
    def twice(groups):
        step = optimizer_cases.torch_step(groups)
        return lambda: (step(), step())

    def missing(groups):
        raise ImportError("no such package")

    case = sgd_case(rivals={"twice": twice, "missing": missing})
    assert set(case.runs) == {"fastfreeze", *TORCH}
    assert case.left_out["missing"] == "ImportError: no such package"
    assert case.left_out["twice"].startswith("another result: tensor 0 is off by up to")
    assert not case.refused


@needs_cpu_kernels
def test_packages_that_are_not_installed_are_named(monkeypatch):
    for package in ("bitsandbytes", "optimi"):
        monkeypatch.setitem(sys.modules, package, None)
    case = sgd_case(values=optimizer_cases.PLAIN_MOMENTUM, rivals=optimizer_cases.PACKAGES)
    assert set(case.left_out) == {"bitsandbytes", "optimi"}
    assert "plain momentum" in case.name


@needs_cpu_kernels
@pytest.mark.parametrize("package", ["bitsandbytes", "optimi"])
def test_packages_compute_torchs_plain_momentum(package):
    pytest.importorskip(package)
    case = sgd_case(values=optimizer_cases.PLAIN_MOMENTUM, rivals=optimizer_cases.PACKAGES)
    assert package in case.runs, case.left_out[package]


@needs_cpu_kernels
def test_ours_computing_something_else_gets_no_numbers(monkeypatch):
    ours = optimizer_cases._ours
    wrong = lambda groups, values, optimizer: ours(groups, {**values, "lr": 0.11}, optimizer)  # noqa: E731
    monkeypatch.setattr(optimizer_cases, "_ours", wrong)
    case = sgd_case()
    assert case.refused
    entry = compare.measured(case, rounds=2, seconds=0, bandwidth=1e9)
    assert entry["seconds"] == {}
    assert "another result" in entry["left_out"]["fastfreeze"]
    assert compare.lines_of_entry("case", entry) == []


def frozen_work():
    """Two blocks of which the first is frozen, and what trains behind it."""
    torch.manual_seed(0)

    def block(inputs, *layers):
        return nn.Sequential(nn.Conv2d(inputs, 4, 3), nn.BatchNorm2d(4), *layers, nn.ReLU())

    head = (nn.Flatten(), nn.Dropout(), nn.Linear(64, 10))
    model = nn.Sequential(block(3, nn.Dropout(0.2)), block(4), *head)
    model[0].requires_grad_(False)
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
    return step_cases.Work(model, images, labels, 4, lambda model: (model[:1], model[1:]))


RIVALS = [
    "fastfreeze",
    step_cases.FLAGS,
    step_cases.IN_EVAL,
    step_cases.OURS_CHANNELS_LAST,
    step_cases.CHANNELS_LAST,
    "fastfreeze cache",
]


def test_rivals_of_a_step_with_a_frozen_part():
    case = step_cases.step_case(frozen_work(), "a case")
    assert case.left_out == {}
    assert list(case.runs) == RIVALS
    for name, run in [*case.runs.items(), ("rest alone", case.floor)]:
        model = run.training.model
        before = {name: value.clone() for name, value in model.state_dict().items()}
        run()
        now = model.state_dict()
        moved = {key for key, value in now.items() if not value.equal(before[key])}
        statistics = {"0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked"}
        assert moved & {key for key in now if key.startswith("0.")} == (
            statistics if name == step_cases.FLAGS else set()
        )
        assert {"1.0.weight", "1.1.running_mean", "4.weight"} < moved


def trains_all(work):
    model = work.start().requires_grad_(True)
    return step_cases.Step(step_cases._training(model, lambda x, ids: model(x)), work, work.inputs)


def forgets_momentum(work):
    step = step_cases.by_hand(work)
    step.training.after_step = step.training.optimizer.state.clear
    return step


def takes_other_samples(work):
    return step_cases.Step(step_cases.by_hand(work).training, work, work.inputs.flip(0))


@pytest.mark.parametrize(
    ("maker", "made", "rival", "reason"),
    [
        ("by_trim", trains_all, "fastfreeze", "0.0.bias is frozen and has changed"),
        ("by_trim", forgets_momentum, "fastfreeze", "weights are "),
        ("by_trim", takes_other_samples, "fastfreeze", "weights are "),
        ("rest_alone", takes_other_samples, "rest alone", "weights are "),
        ("by_cache", "off", "fastfreeze cache", "not all values are found"),
    ],
)
def test_a_step_of_another_training_is_not_timed(monkeypatch, maker, made, rival, reason):
    if made == "off":
        cache = partial(fastfreeze.FeatureCache, enabled=False)
        monkeypatch.setattr(
            step_cases.fastfreeze, "FeatureCache", lambda network, enabled: cache(network)
        )
    else:
        monkeypatch.setattr(step_cases, maker, lambda work, **layout: made(work))
    case = step_cases.step_case(frozen_work(), "a case")
    both = [rival, step_cases.OURS_CHANNELS_LAST] if maker == "by_trim" else [rival]
    assert list(case.left_out) == both
    assert reason in case.left_out[rival]
    assert case.refused == rival.startswith("fastfreeze")
    assert (case.floor is None) == (rival == "rest alone")


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


@pytest.mark.parametrize(
    ("package", "make", "name", "kept"),
    [
        ("timm", partial(step_cases.trim_case, "test_resnet", 2), "test_resnet, half", False),
        ("torchvision", partial(step_cases.mobilenet_case, 15, 4), "15 of 19 blocks", True),
        (
            "transformers",
            partial(step_cases.bert_case, 1, 2, 6, **TINY),
            "embeddings and 1 of 2 layers",
            True,
        ),
        ("transformers", partial(step_cases.bert_case, None, 2, 6, **TINY), "but the head", True),
    ],
)
def test_models_of_others_with_a_frozen_part(package, make, name, kept):
    pytest.importorskip(package)
    case = make()
    assert case.left_out == {}
    assert name in case.name
    assert (case.floor is not None) == kept == ("fastfreeze cache" in case.runs)
    flags = case.runs[step_cases.FLAGS].training.model
    assert len({p.requires_grad for p in flags.parameters()}) == 2


def test_what_is_frozen_has_cases():
    assert sum(name.startswith("trim-") for name in CASES) == 19
    assert sum(name.startswith("kept-") for name in CASES) == 5


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        pytest.param([1.0, 2.0], None, id="equal"),
        pytest.param([1.0, 2.0 + 1e-5], None, id="rounding"),
        pytest.param([1.0, 2.1], "off by up to 1.0e-01", id="another value"),
        pytest.param([1.0, float("nan")], "off by up to nan", id="nan"),
    ],
)
def test_what_counts_as_the_same(found, wrong):
    message = difference([torch.tensor(found)], [torch.tensor([1.0, 2.0])])
    assert message is None if wrong is None else wrong in message


def test_a_step_on_the_host_is_that_of_a_device_plan_without_its_launch(monkeypatch):
    launched = []
    monkeypatch.setattr(host_cases.HostPlan, "_launch", lambda self, *_: launched.append(self))
    case = host_cases.host_case("resnet20", 20)
    assert not case.refused
    launched.clear()
    for run in case.runs.values():
        run()
    assert [type(plan) for plan in launched] == [host_cases.HostPlan] * 2  # with the schedule, too


def test_empty_tensors_are_the_same():
    assert difference([torch.empty(0)], [torch.empty(0)]) is None


def test_a_rival_that_fails_when_it_runs_is_left_out():
    rivals = Rivals()
    rivals.add("fails", lambda: lambda: 1 / 0, lambda run: run())
    assert rivals.left_out == {"fails": "ZeroDivisionError: division by zero"}


def counted(calls, name):
    return lambda: calls.append(name)


@pytest.mark.parametrize(
    ("clock_step", "seconds", "pace"),
    [
        pytest.param(0.001, 10, (3, 50), id="as many as asked for"),
        pytest.param(0.01, 1, (3, 12), id="as many as fit"),
        pytest.param(0.1, 1, (1, compare.LEAST_ROUNDS), id="long runs one by one, but some"),
    ],
)
def test_rounds_fit_in_the_time(monkeypatch, clock_step, seconds, pace):
    now = itertools.count()
    monkeypatch.setattr(compare.time, "perf_counter", lambda: next(now) * clock_step)
    runs = {"a": lambda: None, "b": lambda: None}
    assert compare.pace(runs, 50, seconds) == pace


def test_an_entry_holds_what_was_timed():
    calls = []
    case = Case(
        name="a case",
        runs={name: counted(calls, name) for name in ("fastfreeze", "torch")},
        left_out={"other": "why"},
        bytes_moved=1000,
    )
    entry = compare.measured(case, rounds=2, seconds=1, bandwidth=1e6)
    assert entry["seconds"].keys() == {"fastfreeze", "torch"}
    assert entry["floor_s"] == 1e-3
    assert entry["left_out"] == {"other": "why"}
    assert calls.count("fastfreeze") == calls.count("torch") > 0
    (line,) = compare.lines_of_entry("key", entry)
    assert (line.label, line.case, line.rival, line.floor) == ("key", "a case", "torch", 1e-3)


def test_a_floor_of_its_own_is_timed_too():
    calls = []
    case = Case(
        name="a case",
        runs={"fastfreeze": lambda: None, "torch": lambda: None},
        floor=counted(calls, "floor"),
    )
    entry = compare.measured(case, rounds=2, seconds=1, bandwidth=1e6)
    assert calls
    assert entry["bytes"] is None
    assert 0 < entry["floor_s"] < 1
    assert "floor" not in entry["seconds"]


@needs_cpu_kernels
def test_the_command_prints_a_line_and_writes_the_results(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    monkeypatch.setattr(command, "copy_bandwidth", lambda: 1e10)
    monkeypatch.setattr(command, "ALL_CASES", {"sgd-vgg16": sgd_case})
    argv = ["sgd-vgg16", "--rounds=3", "--seconds=1", "--threads=1", f"--out={out}"]
    assert command.main(argv) == 0
    results = json.loads(out.read_text())
    assert results["machine"]["torch"] == torch.__version__
    assert results["machine"]["copy_gb_per_s"] == 10
    assert results["command"].startswith("python -m benchmarks sgd-vgg16 ")
    assert results["results"]["sgd-vgg16"]["seconds"].keys() == {"fastfreeze", *TORCH}
    assert f"| SGD step, {MODEL} (" in capsys.readouterr().out


@needs_cpu_kernels
def test_the_command_fails_if_ours_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(command, "copy_bandwidth", lambda: 1e10)
    wrong = Case(name="a case", left_out={"fastfreeze": "wrong"})
    monkeypatch.setattr(command, "ALL_CASES", {"sgd-vgg16": lambda: wrong})
    assert command.main(["sgd-vgg16", "--threads=1"]) == 1
    assert "sgd-vgg16: fastfreeze: wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "cases"),
    [
        pytest.param([], list(CASES), id="all"),
        pytest.param(["--compile"], list(ALL_CASES), id="those that compile, too"),
        pytest.param(["norm-64-32", "sgd-vgg16"], ["norm-64-32", "sgd-vgg16"], id="names"),
        pytest.param(["norm-*", "norm-64-32"], ["norm-64-32", "norm-7-tensors-16"], id="pattern"),
        pytest.param(["*compiled", "--compile"], list(ALL_CASES)[-2:], id="only those"),
    ],
)
def test_which_cases_are_run(argv, cases):
    assert command._arguments(argv).cases == cases


def test_an_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["sgd-nothing"])
    assert "case must be one of sgd-resnet110," in capsys.readouterr().err
