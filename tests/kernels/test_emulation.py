"""The emulator that runs CUDA kernels on the CPU: what it computes, and the bugs that it sees."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.emulation import SANITIZERS, Addresses, EmulationError, Program, build

NAN = float("nan")
THREADS = 64
every_build = pytest.mark.parametrize("sanitizer", SANITIZERS, ids=["plain", "address", "thread"])
plain = pytest.mark.parametrize("sanitizer", [None], ids=["plain"])


@pytest.fixture
def emulator(sanitizer) -> Program:
    return build("emulator_harness.cpp", sanitizer)


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
    "trusts_a_shuffle": (["thread"], RACE, by_pairs),
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
    "overflows_an_int": (["address"], r"seeded_bugs.cpp.*: signed integer overflow", same),
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


LANES = torch.arange(THREADS)


@plain
def test_shuffles(emulator):
    for code, dtype in enumerate([torch.float32, torch.float64, torch.int32, torch.int64]):
        x = (torch.randn(THREADS) * 1e6).to(dtype)
        for amount in (0, 1, 3, 8, 16, 31):
            out = torch.zeros(2, THREADS, dtype=dtype)
            emulator.run("shuffle", [out, x], [code, amount], seed=amount)
            assert torch.equal(out, x[torch.stack([LANES ^ amount, LANES // 32 * 32 + amount])])


@every_build
def test_halves_of_a_warp_go_their_own_ways(emulator):
    rounds = torch.tensor([3, 7, 0, 5], dtype=torch.int32)
    out = torch.zeros(THREADS, dtype=torch.int32)
    emulator.run("half_warp", [out, rounds])
    expected = [sum(i ^ (1 << r % 4) for r in range(rounds[i // 16])) for i in range(THREADS)]
    assert out.tolist() == expected


@every_build
def test_atomics_come_in_an_order_that_the_seed_decides(emulator):
    places = []
    for seed in (0, 0, 1):
        places.append(torch.full((4, 32), -1, dtype=torch.int32))
        counter = torch.zeros(1, dtype=torch.int32)
        emulator.run("order_of_threads", [counter, places[-1]], seed=seed)
        assert counter.item() == 7
        assert sorted(places[-1].flatten().tolist()) == list(range(128))
        assert (places[-1].sort().values.diff() == 1).all()  # one block after the other
    assert torch.equal(places[0], places[1])
    assert not torch.equal(places[0], places[2])


@plain
def test_mask_must_lie_in_the_block_and_a_launch_be_possible(emulator):
    message = r"divergent warp operation in block \(0, 0\) of 40 threads: .*threads 32-39 wait at"
    with pytest.raises(EmulationError, match=message):
        emulator.run("half_block", [torch.zeros(40, dtype=torch.int32)])
    for shape in [(0, 1, 32), (1, 0, 32), (1, 65536, 32), (1, 1, 0), (1, 1, 1025), (-1, 1, 32)]:
        with pytest.raises(EmulationError, match=r"blocks of .* threads cannot be launched"):
            emulator.run("launch", [torch.zeros(1, dtype=torch.int64)], shape)


# What Python hands over.


@every_build
def test_addresses_in_tables(emulator):
    values, more = torch.randint(0, 1000, (7,)), torch.randint(0, 1000, (3, 5))
    places = [values, values[3:], more[2, 4:], values[6:], more]
    table = torch.tensor([[t.data_ptr(), -5] for t in places] + [[0, 9]])
    before = table.clone()
    out = torch.full((6,), 77)
    emulator.run("follow", [out, Addresses(table, columns=(0,)), values, more], [2])
    expected = [values[0], values[3], more[2, 4], values[6], more[0, 0], -1]
    assert out.tolist() == [int(v) for v in expected]
    assert torch.equal(table, before)


@every_build
def test_alignment_and_size_are_kept(emulator):
    flat = torch.zeros(64, dtype=torch.int16)
    buffers = [flat[:0], flat[3:4], flat[8:33:6], flat[40:].view(4, 6)[:, :5], None]
    out = torch.full((5, 2), -1)
    emulator.run("describe", [out, *buffers])
    assert out.tolist() == [[0, 0], [6, 2], [0, 50], [0, 46], [0, 0]]


@every_build
def test_strided_buffer_is_written_back_with_its_gaps(emulator):
    flat = torch.arange(30, dtype=torch.int16)
    emulator.run("write_last", [flat[5:22:4]])
    assert flat.tolist() == [7 if i == 21 else i for i in range(30)]


WRONG = {
    "overlap": (lambda x: [x, x[2:]], [], ValueError, "buffers 0 and 1 overlap"),
    "stray": (
        lambda x: [x, Addresses(torch.tensor([x.data_ptr() + 80]))],
        [1],
        ValueError,
        "an address of table 1 lies in none of the buffers",
    ),
    "no buffer": (lambda x: [x], [1], EmulationError, "follow: no buffer 1"),
    "scalar": (lambda x: [x, None], [1.0], EmulationError, "scalar 0 is not an int"),
}


@plain
@pytest.mark.parametrize(("buffers", "scalars", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(emulator, buffers, scalars, error, message):
    with pytest.raises(error, match=message):
        emulator.run("follow", buffers(torch.zeros(10, dtype=torch.int64)), scalars)
    with pytest.raises(EmulationError, match="nothing: no such function"):
        emulator.run("nothing", [])
