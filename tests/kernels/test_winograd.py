"""Winograd's convolution against fp64, over sizes, padding, layouts and what is fused with it."""

from __future__ import annotations

import pytest
import torch

from fastfreeze.errors import BackendUnavailableError
from fastfreeze.kernels import library
from fastfreeze.kernels.reference import winograd_conv2d_reference
from fastfreeze.kernels.winograd import pays, transform_weight, winograd_conv2d
from tests.conftest import ISAS, needs_cpu_kernels, needs_gpu
from tests.covering import covering
from tests.kernels.guard import SIDES, by_threads, guarded

NAN = float("nan")
# Relative to the largest output: that of a plain fp32 sum over 512 channels is about 2e-6.
TOLERANCE = 5e-6
# N, C, H, W, K: whole tiles and parts of tiles, of channels and of panels.
SHAPES = [(0, 4, 5, 5, 3), (1, 1, 3, 3, 1), (2, 3, 5, 7, 4), (3, 16, 8, 8, 16), (1, 64, 32, 32, 64)]
SHAPES += [(1, 19, 9, 4, 37), (2, 48, 8, 8, 12), (5, 256, 4, 4, 130), (3, 512, 3, 3, 32)]
SHAPES += [
    (1, 1, 1, 1, 1),
    (3, 512, 2, 2, 32),
    (13, 31, 3, 6, 32),
    (1, 33, 13, 31, 17),
    (1, 8, 33, 32, 49),
    (31, 70, 4, 4, 5),
]
PADDINGS = [(1, 1), (0, 1), (1, 0), (0, 0)]


def make(shape, kind=torch.channels_last):
    N, C, H, W, K = shape
    x = torch.randn(N, C, H, W).contiguous(memory_format=kind)
    return x, torch.randn(K, C, 3, 3) / (9 * C) ** 0.5


def extras(x, weight, padding):
    """What can be fused with the convolution."""
    (N, C, H, W), K = x.shape, weight.shape[0]
    return {
        "bias": torch.randn(K),
        "relu": True,
        "residual": torch.randn(N, K, H + 2 * padding[0] - 2, W + 2 * padding[1] - 2),
        "input_scale": torch.randn(C),
        "input_shift": torch.randn(C),
    }


def assert_near(y, x, weight, padding, bias=None, **options):
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    bias = None if bias is None else bias.double()
    options = {"padding": padding, **wide}
    expected = winograd_conv2d_reference(x.double(), weight.double(), bias, **options)
    assert y.dtype == torch.float32
    assert y.is_contiguous(memory_format=torch.channels_last)
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=TOLERANCE * largest)


OPTIONS = {
    "nothing": [],
    "bias": ["bias"],
    "relu": ["relu"],
    "residual": ["residual"],
    "scale": ["input_scale", "input_shift"],
    "all": ["bias", "relu", "residual", "input_scale", "input_shift"],
}


@covering("isa", isa=ISAS, shape=SHAPES, padding=PADDINGS, names=OPTIONS)
def test_kernel_against_fp64(isa, shape, padding, names):
    padding = (1, 1) if min(shape[2:4]) < 3 else padding
    x, weight = make(shape)
    every = extras(x, weight, padding)
    options = {name: every[name] for name in names}
    y = winograd_conv2d(x, transform_weight(weight), padding=padding, **options)
    assert_near(y, x, weight, padding, **options)


@needs_cpu_kernels
@pytest.mark.parametrize("channels", [64, 512])
def test_as_accurate_as_a_plain_sum(channels):
    x, weight = make((8, channels, 8, 8, 64))
    x = x.relu()
    truth = winograd_conv2d_reference(x.double(), weight.double(), None, padding=(1, 1))
    plain = winograd_conv2d_reference(x, weight, None, padding=(1, 1))
    y = winograd_conv2d(x, transform_weight(weight), padding=(1, 1))
    error, of_plain = ((z - truth).square().mean().sqrt() for z in (y, plain))
    assert error < 3 * of_plain


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels of more": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@needs_cpu_kernels
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout):
    x, weight = make((2, 20, 9, 8, 18))
    options = extras(x, weight, (1, 1))
    expected = winograd_conv2d(x, transform_weight(weight), padding=(1, 1), **options)
    options["residual"] = layout(options["residual"])
    y = winograd_conv2d(layout(x), transform_weight(weight), padding=(1, 1), **options)
    assert torch.equal(y, expected)


def guarded_images(value, side):
    if not isinstance(value, torch.Tensor):
        return value
    if value.ndim < 4:
        return guarded(value, side)
    return guarded(value.permute(0, 2, 3, 1), side).permute(0, 3, 1, 2)


@covering("isa", isa=ISAS, padding=PADDINGS, side=SIDES)
def test_reads_nothing_beside_its_arguments(isa, padding, side):
    for shape in [(2, 19, 6, 7, 21), (1, 16, 4, 5, 16), (3, 70, 3, 4, 33), (1, 128, 12, 12, 1)]:
        x, weight = make(shape)
        options = {k: guarded_images(v, side) for k, v in extras(x, weight, padding).items()}
        x, transformed = guarded_images(x, side), guarded(transform_weight(weight), side)
        y = winograd_conv2d(x, transformed, padding=padding, **options)
        assert_near(y, x, weight, padding, **options)


@needs_cpu_kernels
@pytest.mark.parametrize("shape", [(37, 48, 8, 8, 12), (9, 70, 9, 5, 40), (29, 256, 4, 4, 256)])
def test_same_bits_in_any_batch_and_with_any_number_of_threads(isa, shape):
    x, weight = make(shape)
    transformed = transform_weight(weight)
    results = by_threads(lambda: winograd_conv2d(x, transformed, padding=(1, 1)))
    assert all(torch.equal(results[0], other) for other in results)
    for images in (slice(0, 1), slice(3, 8), slice(1, None)):
        y = winograd_conv2d(x[images], transformed, padding=(1, 1))
        assert torch.equal(y, results[0][images])


@needs_cpu_kernels
def test_nan_stays_in_its_image(isa):
    x, weight = make((3, 16, 8, 8, 16))
    clean = winograd_conv2d(x, transform_weight(weight), padding=(1, 1), relu=True)
    x[1, 3, 6, 6] = NAN
    y = winograd_conv2d(x, transform_weight(weight), padding=(1, 1), relu=True)
    assert y[1, :, 5:8, 5:8].isnan().all()
    assert torch.equal(y[::2], clean[::2])


@needs_cpu_kernels
def test_whether_it_pays_is_a_rule_of_shapes_where_there_are_vector_instructions(isa):
    for shape in ((64, 32, 32, 64), (48, 8, 8, 12), (512, 4, 4, 512)):
        assert pays(*shape) == (isa != "baseline")
    for shape in ((3, 32, 32, 64), (64, 1, 1, 64), (64, 0, 4, 64)):
        assert not pays(*shape)


def test_without_the_library(monkeypatch):
    states = {**library.backends(), "cpu": library.Availability(False, "not built")}
    monkeypatch.setattr(library, "_BACKENDS", states)
    x, weight = make((1, 16, 4, 4, 16))
    assert not pays(64, 32, 32, 64)
    with pytest.raises(BackendUnavailableError, match=r"'cpu' cannot run here .*not built"):
        winograd_conv2d(x, transform_weight(weight), padding=(1, 1))


@needs_cpu_kernels
def test_opcheck_and_compile():
    x, weight = make((2, 5, 6, 7, 3))
    options = extras(x, weight, (1, 0))
    operator = torch.ops.fastfreeze.winograd_conv2d.default
    names = ("bias", "residual", "input_scale", "input_shift")
    transformed = transform_weight(weight)
    torch.library.opcheck(operator, (x, transformed, *(options[n] for n in names), 1, 0, True))
    torch.library.opcheck(operator, (x, transformed, None, None, None, None, 1, 0, False))
    torch.compiler.reset()

    def convolved(x):
        if pays(64, 8, 8, 64):
            return winograd_conv2d(x, transformed, padding=(1, 0), **options)
        return x

    with torch.no_grad():
        compiled = torch.compile(convolved, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), convolved(x))


WEIGHTS = {
    "dtype": (torch.zeros(4, 4, 3, 3).double(), TypeError, "must be torch.float32, got .*float64"),
    "kernel": (torch.zeros(4, 4, 1, 1), ValueError, r"\[K, C, 3, 3\], got \(4, 4, 1, 1\)"),
    "dimensions": (torch.zeros(4, 3, 3), ValueError, r"\[K, C, 3, 3\], got \(4, 3, 3\)"),
    "nothing": (torch.zeros(0, 4, 3, 3), ValueError, r"\[K, C, 3, 3\], got \(0, 4, 3, 3\)"),
    "device": (torch.zeros(4, 4, 3, 3, device="meta"), ValueError, "on the CPU, got meta"),
}


@pytest.mark.parametrize(("weight", "error", "match"), WEIGHTS.values(), ids=WEIGHTS)
def test_refuses_weights(weight, error, match):
    with pytest.raises(error, match=match):
        transform_weight(weight)


X = torch.zeros(2, 3, 5, 5)
U = transform_weight(torch.zeros(4, 3, 3, 3))
REFUSED = {
    "integers": ({"input": X.int()}, "input must be float32"),
    "fp64": ({"input": X.double()}, "input must be float32"),
    "dimensions": ({"input": X[0]}, r"input must be images \[N, C, H, W\]"),
    "no channels": ({"input": X[:, :0]}, r"input must be images \[N, C, H, W\]"),
    "too small": ({"input": X[..., :2], "padding": (0, 0)}, "5x2 pixels is too small for padding"),
    "channels": ({"input": X[:, :2]}, "transformed is not for input of 2 channels"),
    "a plain weight": ({"transformed": torch.zeros(4, 3, 3, 3)}, "transformed must be what"),
    "other rows": ({"transformed": U[:2]}, "transformed is not for"),
    "padding": ({"padding": (1, 2)}, r"padding must be 0 or 1, got \(1, 2\)"),
    "bias": ({"bias": torch.zeros(3)}, r"bias must have shape \[4\]"),
    "bias's dtype": ({"bias": torch.zeros(4).half()}, "bias must be float32, got float16"),
    "bias's strides": ({"bias": torch.zeros(8)[::2]}, "bias must be contiguous"),
    "residual": ({"residual": torch.zeros(2, 4, 5, 4)}, "residual must have the shape"),
    "residual's dtype": ({"residual": torch.zeros(2, 4, 5, 5).half()}, "residual must be float32"),
    "scale alone": ({"input_scale": torch.zeros(3)}, "must both be given, or neither"),
    "scale": (
        {"input_scale": torch.zeros(4), "input_shift": torch.zeros(3)},
        r"input_scale must have shape \[3\]",
    ),
    "shift": (
        {"input_scale": torch.zeros(3), "input_shift": torch.zeros(3).double()},
        "input_shift must be float32, got float64",
    ),
}


@needs_cpu_kernels
@pytest.mark.parametrize(("change", "match"), REFUSED.values(), ids=REFUSED)
def test_refuses(change, match):
    with pytest.raises(RuntimeError, match=match):
        winograd_conv2d(**{"input": X, "transformed": U, "padding": (1, 1), **change})


@needs_gpu
@needs_cpu_kernels
@pytest.mark.parametrize("names", [["input"], ["transformed"], ["input", "transformed"]])
def test_refuses_what_is_on_a_gpu(names):
    given = {"input": X, "transformed": U}
    given |= {name: given[name].cuda() for name in names}
    with pytest.raises(RuntimeError, match="'fastfreeze::winograd_conv2d'"):
        winograd_conv2d(**given, padding=(1, 1))
    with pytest.raises(ValueError, match="weight must be on the CPU, got cuda:0"):
        transform_weight(torch.zeros(4, 4, 3, 3).cuda())


@needs_cpu_kernels
def test_refuses_gradients():
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="no gradient flows through winograd_conv2d"):
        winograd_conv2d(x, U, padding=(1, 1))
    with torch.no_grad():
        assert not winograd_conv2d(x, U, padding=(1, 1)).requires_grad
