"""The CUDA softmax kernels, compiled for the CPU (emulation/), at their own edges: not a GPU run.

What they compute otherwise is checked by test_softmax.py, through the same emulation.
"""

from __future__ import annotations

import pytest
import torch

from tests.covering import covering
from tests.kernels.emulation import SANITIZERS
from tests.kernels.emulation.softmax import emulated_softmax
from tests.kernels.softmax_cases import (
    DTYPES,
    NAN,
    assert_near,
    assert_right,
    assert_statistics_near,
    make,
    statistics_by,
    true_statistics,
    truth,
)

# [classes, dtype]: the most that a kernel takes and one more, in whole vectors and not.
FEW = [1, 128, 129, 304, 512, 513, 1024, 1025, 2064]
SIZES = [(c, dtype) for c in FEW for dtype in DTYPES]
SIZES += [(c, torch.float64) for c in (6144, 6145)]
SIZES += [(c, dtype) for c in (12288, 12296) for dtype in (torch.float32, torch.bfloat16)]


@pytest.fixture(scope="module")
def plain():
    return emulated_softmax()


@pytest.mark.parametrize(("classes", "dtype"), SIZES, ids=str)
def test_sizes(plain, classes, dtype):
    assert_right(plain, make((2 if classes > 2000 else 19, classes), 2, dtype))


@pytest.mark.parametrize("classes", [10, 100, 999, 2001, 12289])
def test_fewer_blocks_than_work_and_as_many_members_as_a_launch_takes(classes):
    few = emulated_softmax(blocks=2)
    assert_right(few, make((40 if classes < 2000 else 3, classes), 2, torch.float32), False)
    if classes < 2000:
        assert_right(few, make((1, classes), 128, torch.float32))


# Elements from a multiple of 16 bytes to the first member, the second, the output and what is added
# to; and from one row of a member to the next beside its classes.
OFFSETS = {
    "all alike": ((1, 1), 1, 1, 0),
    "members alike": ((3, 3), 0, 0, 0),
    "a member apart": ((2, 5), 2, 2, 0),
    "output apart": ((0, 0), 3, 0, 0),
    "total apart": ((5, 5), 5, 3, 0),
    "padded rows": ((7, 7), 1, 0, 3),
    "even rows": ((4, 4), 0, 0, None),
}
# Just below and above what a kernel takes, less a vector's worth: 128, 512, 1024, 12288 and a part.
EDGES = [129, 509, 1021, 2001, 12285, 12289, 18433]


def placed(values, offset, gap=0):
    """The same values at an offset from a multiple of 16 bytes, NaN around them; and all of it."""
    rows, columns = values.shape
    unit = 16 // values.element_size()
    width = columns + (-columns % unit if gap is None else gap)
    flat = torch.full((rows * width + 2 * unit,), NAN, dtype=values.dtype)
    start = (-flat.data_ptr() // values.element_size()) % unit + offset
    view = flat[start : start + rows * width].as_strided((rows, columns), (width, 1))
    return view.copy_(values), flat


@covering(offsets=OFFSETS, classes=EDGES, dtype=[torch.float32, torch.bfloat16])
def test_rows_between_vectors(plain, classes, dtype, offsets):
    of_members, of_out, of_total, gap = offsets
    rows = 9 if classes < 2000 else 2
    logits = make((rows, classes), 2, dtype)
    members = [placed(z, o, gap)[0] for z, o in zip(logits, of_members, strict=True)]
    assert_statistics_near(statistics_by(plain, members), true_statistics(logits), dtype)
    out, around = placed(torch.full((rows, classes), NAN, dtype=dtype), of_out)
    plain.launch(0, members, None, 1.0, out=out)
    assert_near(out, truth(logits))
    result, also_around = placed(torch.full((rows, classes), NAN), of_out % 4)
    total, _ = placed(torch.rand(rows, classes), of_total % 4)
    plain.softmax_add(result, None, total, members[0], 1.0, 1.0)
    assert_near(result, total.double() + truth(logits[:1]))
    for flat in (around, also_around):
        assert flat.isnan().sum() == flat.numel() - rows * classes


SANITIZED = [(10, torch.float16), (99, torch.float32), (512, torch.bfloat16), (1000, torch.float32)]
SANITIZED += [(1021, torch.float16), (2048, torch.float32), (2047, torch.float64)]
SANITIZED += [(12304, torch.bfloat16), (12289, torch.float32)]


@pytest.mark.slow
@covering(
    size={f"{classes}-{dtype}": (classes, dtype) for classes, dtype in SANITIZED},
    sanitizer=SANITIZERS[1:],
)
def test_touches_and_orders(sanitizer, size):
    classes, dtype = size
    operators = emulated_softmax(sanitizer=sanitizer, blocks=3)
    assert_right(operators, make((5 if classes < 2000 else 2, classes), 2, dtype))
