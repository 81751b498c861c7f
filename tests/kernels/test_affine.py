"""Scale, shift and ReLU per channel against fp64, over layouts, dtypes, parts and sizes."""

from __future__ import annotations

import pytest
import torch

from fastfreeze.kernels.affine import affine_relu_cat
from tests.conftest import ISAS, ON_A_GPU, needs_cpu_kernels
from tests.covering import covering
from tests.kernels.guard import SIDES, by_threads, guarded

NAN = float("nan")
FORMATS = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
# Channels of the parts, height and width.
SHAPES = [((0,), 3, 3), ((5,), 0, 4), ((1,), 1, 1), ((33,), 1, 1), ((7,), 5, 3), ((16,), 4, 8)]
SHAPES += [((31, 12, 12), 3, 3), ((4, 0, 1, 32), 2, 5), ((4097,), 1, 2), ((12,) * 9, 5, 7)]
SHAPES += [((3, 2), 65, 65), ((24, 12), 32, 31)]
# Relative and absolute: of a chain of two operations; 16-bit results are rounded once.
TOLERANCE = {
    torch.float64: (4e-16, 4e-16),
    torch.float32: (2e-7, 4e-7),
    torch.float16: (2.0**-11 * 1.01, 5e-7),
    torch.bfloat16: (2.0**-8 * 1.01, 5e-7),
}

every_format = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)


def make(shape, dtype, kind=torch.contiguous_format, batch=3):
    channels, height, width = shape
    parts = [torch.randn(batch, c, height, width, dtype=torch.float64) for c in channels]
    return [p.to(dtype).contiguous(memory_format=kind) for p in parts]


def affine_of(parts, dtype=torch.float32):
    channels = sum(p.shape[1] for p in parts)
    return torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)


def assert_near(y, parts, scale, shift, relu=True):
    x = torch.cat([p.double() for p in parts], 1)
    expected = x * scale.double()[:, None, None] + shift.double()[:, None, None]
    rtol, atol = TOLERANCE[y.dtype]
    expected = expected.relu() if relu else expected
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=atol)


@covering("isa", isa=ISAS, shape=SHAPES, kind=FORMATS, dtype=list(TOLERANCE))
def test_kernel_against_fp64(isa, shape, kind, dtype):
    parts = make(shape, dtype, kind)
    scale, shift = affine_of(parts)
    for relu in (True, False):
        y = affine_relu_cat(parts, scale, shift, relu=relu)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=kind)
        assert_near(y, parts, scale, shift, relu)


@covering(
    device=["cpu", ON_A_GPU], dtype=list(TOLERANCE), kind=FORMATS, own={"": False, "own": True}
)
def test_on_each_device_with_vectors_of_each_dtype_and_nan(kind, dtype, own, device):
    x = make(((19,), 6, 5), dtype, kind)[0].to(device)
    scale, shift = (v.to(device) for v in affine_of([x], dtype if own else torch.float32))
    y = affine_relu_cat((x,), scale, shift)
    assert y.is_contiguous(memory_format=kind)
    assert_near(y, [x], scale, shift)
    x[1, 17, 5, 4] = NAN
    assert affine_relu_cat((x,), scale, shift).isnan().nonzero().tolist() == [[1, 17, 5, 4]]
    shift[3] = NAN
    assert affine_relu_cat((x,), scale, shift)[:, 3].isnan().all()


@needs_cpu_kernels
def test_the_product_is_not_rounded():
    x = torch.full((1, 1, 1, 40), 1 + 2.0**-12)
    shift = torch.tensor([-1 - 2.0**-11])
    if torch.ops.fastfreeze.cpu_isa(-1) > 0:
        assert affine_relu_cat((x,), x[0, :, 0, 0], shift).eq(2.0**-24).all()


def last(n, c, h, w):
    return torch.full((n, c, h, w), NAN).to(memory_format=torch.channels_last)


LAYOUTS = {
    "channels of more": lambda n, c, h, w: last(n, c + 5, h, w)[:, 2 : 2 + c],
    "channels of more planes": lambda n, c, h, w: torch.full((n, c + 5, h, w), NAN)[:, 2 : 2 + c],
    "every other image": lambda n, c, h, w: last(2 * n, c, h, w)[::2],
    "a window": lambda n, c, h, w: last(n, c, h + 2, w + 3)[:, :, 1 : 1 + h, 2 : 2 + w],
    "every other column": lambda n, c, h, w: torch.full((n, c, h, 2 * w), NAN)[..., ::2],
    "transposed": lambda n, c, h, w: torch.full((w, h, n, c), NAN).permute(2, 3, 1, 0),
    "one image": lambda n, c, h, w: torch.full((1, c, h, w), NAN).expand(n, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout):
    x = layout(3, 11, 4, 5)
    for image in x:
        image.copy_(torch.randn(image.shape))
    scale, shift = affine_of([x])
    y = affine_relu_cat((x,), scale, shift)
    assert_near(y, [x], scale, shift)
    own = y.stride() == x.stride()  # without the kernels, torch keeps what strides it can
    assert y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last) or own


def test_parts_of_different_formats_give_contiguous_planes():
    parts = make(((5, 6), 3, 4), torch.float32)
    parts[1] = parts[1].to(memory_format=torch.channels_last)
    scale, shift = affine_of(parts)
    y = affine_relu_cat(parts, scale, shift)
    assert y.is_contiguous()
    assert_near(y, parts, scale, shift)


@covering("isa", isa=ISAS, dtype=list(TOLERANCE), kind=FORMATS, side=SIDES)
def test_reads_nothing_beside_its_arguments(isa, dtype, kind, side):
    for shape in [((5, 12), 3, 3), ((33,), 1, 1), ((1, 2), 31, 1)]:
        parts = []
        for channels in shape[0]:
            sizes = (2, *shape[1:], channels) if kind == torch.channels_last else (2, channels, -1)
            x = guarded(torch.randn(2, channels * shape[1] * shape[2]).to(dtype), side)
            x = x.view(sizes) if kind == torch.channels_last else x.view(2, channels, *shape[1:])
            parts.append(x.permute(0, 3, 1, 2) if kind == torch.channels_last else x)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scale, shift = (guarded(v.to(wide), side) for v in affine_of(parts))
        assert_near(affine_relu_cat(parts, scale, shift), parts, scale, shift)


@needs_cpu_kernels
@every_format
def test_same_bits_for_every_number_of_threads(kind):
    parts = make(((12, 40), 31, 33), torch.float32, kind, batch=5)
    scale, shift = affine_of(parts)
    results = by_threads(lambda: affine_relu_cat(parts, scale, shift))
    assert all(torch.equal(results[0], other) for other in results)


def test_gradients_flow_where_they_are_wanted():
    parts = [p.requires_grad_() for p in make(((3, 4), 2, 2), torch.float64)]
    scale, shift = (v.double().requires_grad_() for v in affine_of(parts))
    assert torch.autograd.gradcheck(
        lambda a, b, s, t: affine_relu_cat([a, b], s, t, relu=False), (*parts, scale, shift)
    )


@needs_cpu_kernels
@every_format
def test_opcheck_and_compile(kind):
    parts = make(((3, 4), 2, 2), torch.float32, kind)
    scale, shift = affine_of(parts)
    operator = torch.ops.fastfreeze.affine_relu_cat.default
    torch.library.opcheck(operator, (parts, scale, shift, kind == torch.channels_last, True))
    torch.compiler.reset()
    compiled = torch.compile(affine_relu_cat, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(parts, scale, shift), affine_relu_cat(parts, scale, shift))


X = torch.zeros(2, 3, 4, 4)
V = torch.zeros(3)
REFUSED = {
    "nothing": ([], V, V, ValueError, "parts must be one tensor or more"),
    "integers": ([X.int()], V, V, TypeError, "floating-point, of 16, 32 or 64 bits, got torch.int"),
    "no images": ([X[0]], V, V, ValueError, r"images \[N, C, H, W\], got shape \(3, 4, 4\)"),
    "sizes": ([X, X[..., :3]], V, V, ValueError, r"nothing but their channels, got \(2, 3, 4, 3\)"),
    "dtypes": ([X, X.double()], V, V, ValueError, "nothing but their channels"),
    "devices": ([X, X.to("meta")], V, V, ValueError, "on meta beside"),
    "scale": ([X], V[:2], V, ValueError, r"scale must have shape \[3\], got \(2,\)"),
    "shift": ([X], V, V[None], ValueError, r"shift must have shape \[3\], got \(1, 3\)"),
    "scale's dtype": ([X], V.double(), V, ValueError, "scale must be torch.float32 or"),
    "shift's device": ([X], V, V.to("meta"), ValueError, "shift must be .* on cpu, got .* on meta"),
}


@pytest.mark.parametrize(
    ("parts", "scale", "shift", "error", "match"), REFUSED.values(), ids=REFUSED
)
def test_refuses(parts, scale, shift, error, match):
    with pytest.raises(error, match=match):
        affine_relu_cat(parts, scale, shift)


UNSAFE = {
    "integers": ([X.int()], V, V, "parts must be float16"),
    "dimensions": ([X[0]], V, V, r"parts must be images \[N, C, H, W\]"),
    "sizes": ([X, X[:1]], V, V, "parts must differ in nothing but"),
    "dtypes": ([X, X.half()], V, V, "parts must differ in nothing but"),
    "scale": ([X], V[:2], V, r"scale must have shape \[3\]"),
    "shift": ([X], V, V.half(), "shift must be float32, got float16"),
    "strides": ([X], torch.zeros(6)[::2], V, "scale must be contiguous"),
}


@needs_cpu_kernels
@pytest.mark.parametrize(("parts", "scale", "shift", "match"), UNSAFE.values(), ids=UNSAFE)
def test_the_operator_itself_refuses_what_would_be_unsafe(parts, scale, shift, match):
    with pytest.raises(RuntimeError, match=match):
        torch.ops.fastfreeze.affine_relu_cat(parts, scale, shift, True, True)
