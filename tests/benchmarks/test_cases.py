"""The cases of python -m benchmarks at toy sizes: their gate, what is timed, what is written."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import fastfreeze

case_module = pytest.importorskip("benchmarks.case", reason="tests run outside the source tree")
from benchmarks import __main__ as command  # noqa: E402
from benchmarks import (  # noqa: E402
    clock,
    ensemble_cases,
    kernel_cases,
    optimizer_cases,
    step_cases,
)
from benchmarks.case import Case, difference, refused  # noqa: E402
from benchmarks.cases import cases  # noqa: E402
from benchmarks.lines import lines_of  # noqa: E402
from benchmarks.optimizer_cases import parameter_groups, shapes_of  # noqa: E402
from tests.conftest import needs_cpu_kernels  # noqa: E402

MODEL = "resnet8-w4"
TORCH = ["torch fused", "torch foreach", "torch for-loop"]
NUM_LAYERS = 8
CASES = cases()

pytestmark = pytest.mark.usefixtures("one_thread")


def sgd_case(**options):
    return optimizer_cases.optimizer_case(MODEL, **options)


def test_every_network_is_measured_in_one_group_and_many_with_layers_frozen():
    for model in ["resnet110", "wrn34-4", "wrn40-4", "densenet40", "vgg16", "resnet50", "vit_b_16"]:
        for groups, frozen in itertools.product(["", "-per-layer"], ["", "-frozen-50"]):
            assert f"sgd-{model}{groups}{frozen}" in CASES
    assert {"norm-64-32", "ensemble-resnet20-64", "adamw-vit_b_16"} < CASES.keys()
    assert sum(name.startswith("trim-") for name in CASES) == 19
    assert sum(name.startswith("kept-") for name in CASES) == 5
    assert not any(name.endswith("compiled") for name in CASES)
    assert "sgd-resnet110-compiled" in cases(compiling=True)
    assert {"sgd-resnet110-per-layer-graph", "sgd-resnet50-bf16"} < cases("cuda").keys()


@pytest.mark.parametrize(
    ("model", "tensors"), [("resnet50", 161), ("vit_b_16", 152), ("resnet110", 329)]
)
def test_shapes_of_networks(model, tensors):
    if model != "resnet110":
        pytest.importorskip("torchvision")
    assert len(shapes_of(model)) == tensors


ADAMW = {"rule": optimizer_cases.ADAMW}
IN_A_TENSOR = ["torch fused, lr in a tensor"]
STEPS = [  # options, a part of the name, bytes for each element, and torch's rivals
    ({"per_layer": True}, f", {NUM_LAYERS} groups", 20, TORCH),
    ({"frozen": 50}, f", 1 group, 50% of {NUM_LAYERS} layers frozen", None, TORCH),
    ({"frozen": 90, "per_layer": True}, f"90% of {NUM_LAYERS} layers frozen", None, TORCH),
    (ADAMW, "AdamW step, ", 28, TORCH),
    ({"channels_last": True}, ", 1 group, channels_last", 20, TORCH),
    ({"dtype": torch.bfloat16}, ", bf16", 10, TORCH[:1]),
    ({"in_graph": True, "per_layer": True}, ", CUDA graph", 20, IN_A_TENSOR),
    ({"in_graph": True, **ADAMW}, "AdamW", 28, IN_A_TENSOR),
    ({"rule": optimizer_cases.MOMENTUM}, "plain momentum", 20, TORCH),
]


@needs_cpu_kernels
@pytest.mark.parametrize(("options", "name", "bytes_each", "rivals"), STEPS)
def test_rivals_of_a_step_do_the_same_in_all_forms(options, name, bytes_each, rivals):
    case = sgd_case(**options)
    assert case.left_out == {} or "dtype" in options
    assert list(case.runs)[: 1 + len(rivals)] == ["fastfreeze", *rivals]
    assert name in case.name
    total = sum(torch.Size(shape).numel() for shape in shapes_of(MODEL))
    if bytes_each is None:
        assert 0 < case.bytes_moved < 20 * total
    else:
        assert case.bytes_moved == bytes_each * total


def test_channels_last_is_of_weights_and_gradients():
    groups = parameter_groups(shapes_of(MODEL), NUM_LAYERS, per_layer=False, channels_last=True)
    images = [p for p in groups[0]["params"] if p.dim() == 4]
    assert images
    for t in (*images, *(p.grad for p in images)):
        assert t.is_contiguous(memory_format=torch.channels_last)


def test_frozen_layers_have_no_gradient_and_the_first_ones_freeze():
    layers = parameter_groups(shapes_of(MODEL), NUM_LAYERS, num_frozen=3)
    assert len(layers) == NUM_LAYERS
    for i, layer in enumerate(layers):
        frozen = i < 3
        assert all((p.grad is None) == frozen != p.requires_grad for p in layer["params"])


@needs_cpu_kernels
def test_a_rival_that_does_something_else_is_named_and_not_timed(monkeypatch):
    torch_step = optimizer_cases.torch_step

    def other(groups, rule, fused=False, foreach=False):
        if fused:
            raise ImportError("no such step\nmore")
        step = torch_step(groups, rule, foreach=foreach)
        return (lambda: (step(), step())) if foreach else step

    monkeypatch.setattr(optimizer_cases, "torch_step", other)
    case = sgd_case()
    assert set(case.runs) == {"fastfreeze", "torch for-loop"}
    assert case.left_out["torch fused"] == "ImportError: no such step"
    assert case.left_out["torch foreach"].startswith("another result: tensor 0 is off by up to")
    assert not refused(case.left_out)


@needs_cpu_kernels
def test_ours_computing_something_else_gets_no_numbers(monkeypatch):
    ours = optimizer_cases._ours

    def wrong(groups, rule, backend):
        return ours(groups, rule._replace(values={**rule.values, "lr": 0.11}), backend)

    monkeypatch.setattr(optimizer_cases, "_ours", wrong)
    case = sgd_case()
    assert refused(case.left_out)
    entry = clock.measured(case, rounds=2, seconds=0, bandwidth=1e9)
    assert entry["seconds"] == {}
    assert "another result" in entry["left_out"]["fastfreeze"]
    assert lines_of("case", entry) == []


@needs_cpu_kernels
@pytest.mark.parametrize("kind", ["softmax", "statistics"])
def test_averages_that_are_wrong_are_refused(monkeypatch, kind):
    monkeypatch.setattr(kernel_cases, "compiled_run", lambda run: run)
    make = getattr(kernel_cases, f"{kind}_case")
    right = make(3, 8, 10)
    assert right.left_out == {}
    assert right.runs.keys() > {"fastfreeze", "eager loop"}
    function = getattr(kernel_cases, f"ensemble_{kind}")
    monkeypatch.setattr(
        kernel_cases,
        f"ensemble_{kind}",
        lambda members, *a, **k: function([1.01 * z for z in members], *a, **k),
    )
    assert "another result" in make(3, 8, 10).left_out["fastfreeze"]


def test_members_share_what_the_floor_leaves_out(monkeypatch):
    case = ensemble_cases.ensemble_case(MODEL, 2)
    assert case.left_out == {}
    assert list(case.runs)[:4] == [
        "torch loop",
        "torch loop, channels_last",
        "torch.func vmap",
        "fastfreeze",
    ]
    _, states, share = ensemble_cases.members(MODEL, 3)
    first, *_, last = (name for name in states[0] if name.endswith("weight"))
    assert torch.equal(states[0][first], states[2][first])
    assert not torch.equal(states[0][last], states[2][last])
    assert 0 < share <= 0.75
    assert case.share == ("torch loop", pytest.approx(1 - share + share / 5))
    entry = clock.measured(case, rounds=2, seconds=0, bandwidth=1e9)
    loop = entry["seconds"]["torch loop"]["median"]
    assert entry["floor_s"] == pytest.approx(loop * case.share[1])
    monkeypatch.setattr(
        ensemble_cases,
        "SnapshotEnsemble",
        lambda model, states, **_: ensemble_cases.loop_of(model, states[:4]),
    )
    assert set(ensemble_cases.ensemble_case(MODEL, 2).left_out) == {
        "fastfreeze",
        "fastfreeze, not folded",
    }


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
    return step_cases.Step(work, model, lambda x, ids: model(x))


def forgets_momentum(work):
    step = step_cases.by_hand(work)
    step.training.after_step = lambda taken: step.training.optimizer.state.clear()
    return step


def takes_other_samples(work):
    return step_cases.by_hand(replace(work, inputs=work.inputs.flip(0)))


@pytest.mark.parametrize(
    ("maker", "made", "rival", "reason"),
    [
        ("by_trim", trains_all, "fastfreeze", "0.0.weight has changed"),
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
    assert refused(case.left_out) == rival.startswith("fastfreeze")
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
    assert difference([torch.empty(0)], [torch.empty(0)]) is None
    message = difference([torch.tensor(found)], [torch.tensor([1.0, 2.0])])
    assert message is None if wrong is None else wrong in message


def test_a_step_on_the_host_is_that_of_a_device_plan_without_its_launch(monkeypatch):
    launched = []
    monkeypatch.setattr(optimizer_cases.HostPlan, "_launch", lambda self, *_: launched.append(self))
    case = optimizer_cases.host_case("resnet20", 20)
    assert not refused(case.left_out)
    launched.clear()
    for run in case.runs.values():
        run()
    assert [type(plan) for plan in launched] == [
        optimizer_cases.HostPlan
    ] * 2  # with the schedule, too


def test_a_rival_that_fails_when_it_runs_is_left_out():
    case = Case(name="a case")
    case.add("fails", lambda: lambda: 1 / 0, lambda run: run())
    assert case.left_out == {"fails": "ZeroDivisionError: division by zero"}


def counted(calls, name):
    return lambda: calls.append(name)


@pytest.mark.parametrize(
    ("clock_step", "seconds", "pace"),
    [
        pytest.param(0.001, 10, (3, 50), id="as many as asked for"),
        pytest.param(0.01, 1, (3, 12), id="as many as fit"),
        pytest.param(0.1, 1, (1, clock.LEAST_ROUNDS), id="long runs one by one, but some"),
    ],
)
def test_rounds_fit_in_the_time(monkeypatch, clock_step, seconds, pace):
    now = itertools.count()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now) * clock_step)
    runs = {"a": lambda: None, "b": lambda: None}
    assert clock.pace(runs, 50, seconds) == pace


def test_an_entry_holds_what_was_timed():
    calls = []
    case = Case(
        name="a case",
        runs={name: counted(calls, name) for name in ("fastfreeze", "torch")},
        left_out={"other": "why"},
        bytes_moved=1000,
    )
    entry = clock.measured(case, rounds=2, seconds=1, bandwidth=1e6)
    assert entry["seconds"].keys() == {"fastfreeze", "torch"}
    assert entry["floor_s"] == 1e-3
    assert entry["left_out"] == {"other": "why"}
    assert calls.count("fastfreeze") == calls.count("torch") > 0
    (line,) = lines_of("key", entry)
    assert (line.key, line.case, line.rival, line.floor) == ("key", "a case", "torch", 1e-3)


def test_a_floor_of_its_own_is_timed_too():
    calls = []
    case = Case(
        name="a case",
        runs={"fastfreeze": lambda: None, "torch": lambda: None},
        floor=counted(calls, "floor"),
    )
    entry = clock.measured(case, rounds=2, seconds=1, bandwidth=1e6)
    assert calls
    assert entry["bytes"] is None
    assert 0 < entry["floor_s"] < 1
    assert "floor" not in entry["seconds"]


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setattr(command, "copy_bandwidth", lambda device: 1e10)

    def made(**makes):
        monkeypatch.setattr(command, "cases", lambda device, compiling: makes)

    return made


@needs_cpu_kernels
def test_the_command_prints_a_line_and_writes_the_results(tmp_path, toys, capsys):
    out = tmp_path / "results.json"
    toys(toy=sgd_case)
    assert command.main(["toy", "--rounds=3", "--seconds=1", f"--out={out}"]) == 0
    results = json.loads(out.read_text())
    assert results["machine"]["torch"] == torch.__version__
    assert results["machine"]["copy_gb_per_s"] == 10
    assert results["command"].startswith("python -m benchmarks toy ")
    assert results["results"]["toy"]["seconds"].keys() == {"fastfreeze", *TORCH}
    assert f"| SGD step, {MODEL} (" in capsys.readouterr().out


def fine():
    return Case(name="a case", runs={"fastfreeze": lambda: None, "torch": lambda: None})


def test_the_command_fails_if_ours_is_wrong_and_goes_on(toys, tmp_path, capsys):
    out, seen = tmp_path / "results.json", []

    def broken():
        seen.append(json.loads(out.read_text())["results"]["broken"]["left_out"])
        raise RuntimeError("no\nmore")

    wrong = Case(name="a case", left_out={"fastfreeze": "wrong"})
    toys(wrong=lambda: wrong, broken=broken, fine=fine)
    assert command.main(["--rounds=2", "--seconds=0", f"--out={out}"]) == 1
    assert "wrong: fastfreeze: wrong" in capsys.readouterr().out
    assert seen == [{"fastfreeze": "has not ended"}]
    found = json.loads(out.read_text())["results"]
    assert found["broken"]["left_out"] == {"fastfreeze": "RuntimeError: no"}
    assert found["fine"]["seconds"].keys() == {"fastfreeze", "torch"}


def test_the_command_goes_on_behind_what_the_file_has(toys, tmp_path):
    out = tmp_path / "results.json"
    toys(first=fine)
    assert command.main(["--rounds=0", f"--out={out}"]) == 0
    assert json.loads(out.read_text())["results"]["first"]["seconds"] == {}
    toys(first=None, second=fine)
    assert command.main(["--rounds=2", "--seconds=0", "--go-on", f"--out={out}"]) == 0
    found = json.loads(out.read_text())["results"]
    assert [bool(found[name]["seconds"]) for name in ("first", "second")] == [False, True]


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        pytest.param([], list(CASES), id="all"),
        pytest.param(["--compile"], list(cases(compiling=True)), id="those that compile, too"),
        pytest.param(["norm-64-32", "sgd-vgg16"], ["norm-64-32", "sgd-vgg16"], id="names"),
        pytest.param(["norm-*", "norm-64-32"], ["norm-64-32", "norm-7-tensors-16"], id="pattern"),
    ],
)
def test_which_cases_are_run(argv, names):
    assert list(command._arguments(argv).cases) == names


def test_an_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["sgd-nothing"])
    assert "case must be one of sgd-resnet110," in capsys.readouterr().err
