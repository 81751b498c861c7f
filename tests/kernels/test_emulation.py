"""The emulator that runs CUDA kernels on the CPU: what it computes, and the bugs that it sees."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.emulation import SANITIZERS, EmulationError, Program, build

NAN = float("nan")
THREADS = 64
every_build = pytest.mark.parametrize("sanitizer", SANITIZERS, ids=["plain", "address", "thread"])
plain = pytest.mark.parametrize("sanitizer", [None], ids=["plain"])


@pytest.fixture
def bugs(sanitizer) -> Program:
    return build("seeded_bugs.cpp", sanitizer)


RACE = r"(?s)ThreadSanitizer: data race.*block \(\d, \d\) thread \d+.*seeded_bugs.cpp"
HEAP = r"(?s)AddressSanitizer: heap-buffer-overflow.*{} of size 4.*seeded_bugs.cpp"
SYNC = r"wait at __syncthreads in seeded_bugs.cpp:\d+"
SHUFFLE = r"wait at a shuffle of lanes 0xffffffff in seeded_bugs.cpp:\d+"


def same(x):
    return x


def by_pairs(x):
    return x.view(-1, 2).flip(1).flatten()


# In one block of 64 threads: the builds that see the bug, what they say, and the result without it.
ONE_BLOCK = {
    "reads_past_the_end": (["address"], HEAP.format("READ"), lambda x: 2 * x),
    "writes_past_the_end": (["address"], HEAP.format("WRITE"), lambda x: 2 * x),
    "misses_a_barrier": (["thread"], RACE, lambda x: x.flip(0)),
    "misses_the_second_barrier": (["thread"], RACE, lambda x: 3 * x.roll(-1)),
    "leaves_before_a_barrier": (
        SANITIZERS,
        rf"barrier in block \(0, 0\) of 64 threads: threads 0-60 {SYNC}; threads 61-63 exited",
        same,
    ),
    "takes_another_barrier": (
        SANITIZERS,
        rf"divergent barrier .*: threads 0, 2, .* {SYNC}; threads 1, 3, .* {SYNC}",
        same,
    ),
    "misses_a_warp_barrier": (["thread"], RACE, by_pairs),
    "shuffles_with_the_gone": (
        SANITIZERS,
        rf"divergent warp operation .*: threads 0-4, .* {SHUFFLE}; threads 5, 37 exited",
        by_pairs,
    ),
    "shuffles_outside_the_mask": (
        SANITIZERS,
        r"a lane reads one outside the mask \(.*seeded_bugs.cpp:\d+\)",
        lambda x: torch.where(torch.arange(64) % 32 < 16, x.view(-1, 2, 8).flip(1).flatten(), x),
    ),
    "is_not_in_its_mask": (
        SANITIZERS,
        r"thread \d+: a lane is not in the mask that it names \(.*seeded_bugs.cpp:\d+\)",
        lambda x: x.view(2, 32)[:, :1].expand(2, 32).flatten(),
    ),
    "loads_misaligned": (
        ["address"],
        r"seeded_bugs.cpp.*runtime error: .* misaligned address .* 16 byte alignment",
        lambda x: torch.cat([x[:60], torch.full((4,), NAN)]),
    ),
    "overflows_shared": (["address"], r"(?s)global-buffer-overflow.*seeded_bugs.cpp.*tile", same),
}


def run_bug(program, name, broken, seed=0):
    x, out = torch.rand(THREADS) + 1, torch.full((THREADS,), NAN)
    program.run(name, [out, x], [broken], seed)
    return x, out


@every_build
def test_kernels_without_a_bug_pass(bugs):
    expected = {name: result for name, (_, _, result) in ONE_BLOCK.items()}
    expected["reads_unwritten_shared"] = lambda x: x.roll(-1)
    for name, result in expected.items():
        x, out = run_bug(bugs, name, broken=False)
        torch.testing.assert_close(out, result(x), equal_nan=True, msg=name)


@pytest.mark.parametrize(
    ("name", "sanitizer", "message"),
    [
        pytest.param(name, sanitizer, message, id=f"{name}-{sanitizer or 'plain'}")
        for name, (sanitizers, message, _) in ONE_BLOCK.items()
        for sanitizer in sanitizers
    ],
)
def test_bug_is_found(bugs, name, message):
    with pytest.raises(EmulationError, match=message):
        run_bug(bugs, name, broken=True)


@plain
def test_unwritten_shared_memory_is_nan_and_a_random_schedule_shows_missing_barriers(bugs):
    x, out = run_bug(bugs, "reads_unwritten_shared", broken=True)
    assert out.isnan().nonzero().flatten().tolist() == [6]
    assert torch.equal(out[7:], x.roll(-1)[7:])
    for name in ("misses_a_barrier", "misses_a_warp_barrier"):
        assert run_bug(bugs, name, broken=True)[1].isnan().any()


# Of several blocks: buffers out, finished, parts, x.
BETWEEN_BLOCKS = ["blocks_count_themselves", "releases_alone", "acquires_alone"]
BETWEEN_BLOCKS += ["releases_too_early"]


def run_grid_bug(program, name, broken):
    out, finished = torch.full((1,), NAN), torch.zeros(1, dtype=torch.int32)
    x = torch.rand(4)
    parts = torch.full((4,), NAN)
    program.run(name, [out, finished, parts, x], [broken])
    return x, out, finished


@every_build
def test_grids_without_a_bug_pass(bugs):
    for name in BETWEEN_BLOCKS:
        x, out, finished = run_grid_bug(bugs, name, broken=False)
        if name == "blocks_count_themselves":
            assert finished.item() == 4
        else:
            assert finished.item() == 0
            torch.testing.assert_close(out[0], x.sum())


@pytest.mark.parametrize("sanitizer", ["thread"])
@pytest.mark.parametrize("name", BETWEEN_BLOCKS)
def test_race_between_blocks_is_found(bugs, sanitizer, name):
    with pytest.raises(EmulationError, match=RACE):
        run_grid_bug(bugs, name, broken=True)
