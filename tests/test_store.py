"""Rows: hashed, laid out as flat tensors, and stored in memory and in files that may be damaged."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from fastfreeze.cache import store as store_module
from fastfreeze.cache.rows import CannotKeepError, Layout, _factors, hash_rows, take_rows
from fastfreeze.cache.store import Budget, RowStore, StoreDirectory
from tests.killed import killed

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.complex64]
PLENTY = 2**30
NAME = "0123456789abcdef" * 2


def some(shape, dtype):
    if dtype in (torch.uint8, torch.bool):
        return torch.randint(0, 2 if dtype == torch.bool else 256, shape).to(dtype)
    return torch.randn(shape, dtype=dtype)


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


# --- hashes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 8, 31, 33])
def test_hash_is_a_weighted_sum_of_words(dtype, width):
    rows = some((5, width), dtype)
    found = hash_rows(rows).tolist()
    for row, value in zip(rows, found, strict=True):
        data = bytes(bits(row).numpy())
        data += bytes(-len(data) % 4)
        words = [
            int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, len(data), 4)
        ]
        factors = _factors(len(words), torch.device("cpu")).tolist()
        total = sum(w * f for w, f in zip(words, factors, strict=True)) % 2**64
        assert value % 2**64 == total


def test_factors_are_part_of_the_format():
    factors = _factors(3, torch.device("cpu")).tolist()
    assert factors == _factors(1000, torch.device("cpu"))[:3].tolist()
    assert all(f % 2 for f in factors)
    assert factors == [FACTOR % 2**64 - (2**64 if FACTOR >= 2**63 else 0) for FACTOR in FACTORS]


def mixed(i):
    """The same in plain integers."""
    x = i * 0x9E3779B97F4A7C15 % 2**64
    x = (x ^ x >> 31) * 0xBF58476D1CE4E5B9 % 2**64
    return (x ^ x >> 31) | 1


FACTORS = [mixed(i) for i in (1, 2, 3)]


def test_hash_notices_each_bit_and_the_order_and_nothing_else():
    rows = some((1, 40), torch.uint8).expand(321, 40).clone()
    for i in range(320):
        rows[i, i // 8] ^= 1 << i % 8
    hashes = hash_rows(rows).tolist()
    assert hashes[-1] not in hashes[:-1]
    assert len(set(hashes)) > 300  # the top bits of two words count the same
    x = torch.randn(4, 3, 5, 5)
    assert hash_rows(x).equal(hash_rows(x.to(memory_format=torch.channels_last)))
    assert not hash_rows(x).equal(hash_rows(x.flip(-1)))
    shifted = bits(x).clone().new_empty(x.numel() * 4 + 3)[3:]
    shifted.copy_(bits(x))
    assert hash_rows(shifted.view(4, -1)).equal(hash_rows(x))
    assert hash_rows(x[:0]).shape == (0,)


# --- layouts -----------------------------------------------------------------------------------


def forms(n, dtype=torch.float32):
    """Tensors of ``n`` rows in memory of many forms; whether rows are dense."""
    x = some((n, 3, 4, 5), dtype)
    return {
        "contiguous": (x, True),
        "channels_last": (x.to(memory_format=torch.channels_last), True),
        "transposed": (x.transpose(1, 3), True),
        "vector": (x[:, 0, 0, 0].clone(), True),
        "single": (some((n, 4, 1, 1), dtype).to(memory_format=torch.channels_last), True),
        "slice": (x[:, :2], False),
        "column": (x[:, 0, 0, 0], False),
        "channels": (x.to(memory_format=torch.channels_last)[:, 1:], False),
        "every other": (x[::2, :, ::2], False) if n > 2 else (x[:, :, ::2], False),
    }


@pytest.mark.parametrize("form", forms(2))
@pytest.mark.parametrize("n", [2, 7])
def test_rows_are_taken_with_their_strides(form, n):
    x, dense = forms(n)[form]
    rows = torch.tensor([len(x) - 1, 0, 0])
    taken = take_rows(x, rows)
    assert taken.equal(x[rows])
    if dense:
        assert taken.stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", forms(2))
def test_layouts_give_values_back(form, dtype):
    x, _ = forms(5, dtype)[form]
    n = len(x)
    layout = Layout.of([x], n, [], None)
    (rows,) = layout.flat([x])
    assert rows.shape == (n, x[0].numel())
    assert layout.columns == ((dtype, x[0].numel()),)
    for i in range(n):
        (other,) = layout.flat([x[i : i + 1]])
        assert other.equal(rows[i : i + 1])
    (back,) = layout.values([rows.clone()], ())
    assert bits(back).equal(bits(x))
    assert back.stride() == x.stride()
    (again,) = layout.flat([x.contiguous()])
    assert bits(again).equal(bits(rows))


def test_layouts_narrow_what_is_wider():
    wide, half, whole = torch.randn(4, 50), torch.randn(4, 3).half(), torch.arange(4)
    layout = Layout.of([wide, half, whole], 4, [], torch.bfloat16)
    assert layout.narrows
    assert not Layout.of([half, whole], 4, [], torch.bfloat16).narrows
    assert [d for d, _ in layout.columns] == [torch.bfloat16, torch.float16, torch.int64]
    back = layout.values(layout.flat([wide, half, whole]), ())
    assert back[0].dtype == torch.float32
    assert ((back[0] - wide).abs() <= wide.abs() * 2**-8).all()
    assert back[1].equal(half)
    assert back[2].equal(whole)
    assert all(a.equal(b) for a, b in zip(layout.values(layout.flat(back), ()), back, strict=True))


def test_constants_keep_their_places():
    size, y = torch.Size([4, 6]), torch.arange(4)
    layout = Layout.of([size, x, True, y, (2, 0.5)], 4, [], None)
    flat = layout.flat([size, x, True, y, (2, 0.5)])
    assert len(flat) == len(layout.columns) == 2
    constants = layout.constants([torch.Size([3, 6]), x[:3], False, y[:3], (1, 0.5)])
    back = layout.values([column[:3] for column in flat], constants)
    assert (back[0], back[2], back[4]) == ((3, 6), False, (1, 0.5))
    assert back[1].equal(x[:3])
    assert back[3].equal(y[:3])


def test_parts_of_a_nested_value():
    x = torch.randn(4, 6, 2, 2)
    values = [x.chunk(2, 1), {"sizes": [3, x.shape]}, x.sum((2, 3))]
    layout = Layout.of(values, 4, [], None)
    flat = layout.flat(values)
    assert [column.shape for column in flat] == [(4, 12), (4, 12), (4, 6)]
    back = layout.values(flat, layout.constants(values))
    assert isinstance(back, tuple)
    assert back[1] == {"sizes": [3, x.shape]}
    assert torch.cat(back[0], 1).equal(x)
    assert back[2].equal(x.sum((2, 3)))
    with pytest.raises(CannotKeepError, match="share memory"):
        Layout.of([x[:, :4], x[:, 3:]], 4, [], None)


def test_what_a_narrow_dtype_cannot_hold_is_refused():
    layout = Layout.of([torch.ones(2, 2)], 2, [], torch.float16)
    layout.flat([torch.tensor([[1.0, float("inf")], [float("nan"), -65504.0]])])
    with pytest.raises(CannotKeepError, match=r"do not fit into torch\.float16"):
        layout.flat([torch.tensor([[1.0, 65520.0]])])


x = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        ([x, {3}], [], "a set crosses"),
        ([3, (4, True)], [], "nothing but sizes crosses"),
        ([x, x.view(torch.int32)], [], "share memory"),
        ([x.to_sparse()], [], "a Tensor crosses, not a plain tensor"),
        ([torch.tensor(1.0)], [], r"shape \(\) crosses, without a row for each of 4"),
        ([x.T], [], r"shape \(6, 4\) crosses"),
        ([x[:, :0]], [], r"shape \(4, 0\) crosses"),
        ([x, x.relu(), x[:, :2]], [], "share memory"),
        ([x.view(4, 2, 3)], [x], "share memory"),
        ([torch.randn(6, 4).T], [], "do not lie one after the other"),
        ([torch.randn(4, 1).expand(4, 3)], [], "do not lie one after the other"),
        ([torch.randn(3).expand(4, 3)], [], "do not lie one after the other"),
    ],
)
def test_layouts_refuse(values, given, message):
    with pytest.raises(CannotKeepError, match=message):
        Layout.of(values, 4, given, None)


@pytest.mark.parametrize("other", [x[:, :5], x.double(), 3])
def test_layouts_refuse_other_values(other):
    with pytest.raises(CannotKeepError, match="another shape or dtype"):
        Layout.of([x], 4, [], None).flat([other])
    with pytest.raises(CannotKeepError, match="other values"):
        Layout.of([x], 4, [], None).flat([x, other])


# --- the store, against a dictionary -----------------------------------------------------------

COLUMNS = ((torch.float32, 33), (torch.bool, 5), (torch.bfloat16, 2))


def row_of(key, columns=COLUMNS):
    """The row that belongs to a key, and its digest."""
    g = torch.Generator().manual_seed(key)
    row = [torch.randint(0, 2, (1, n), generator=g).to(dtype) for dtype, n in columns]
    return row, key * 31 - 7


def rows_of(keys, columns=COLUMNS):
    rows = [row_of(key, columns) for key in keys]
    values = [torch.cat(column) for column in zip(*(row for row, _ in rows), strict=True)]
    return torch.tensor([digest for _, digest in rows]), values


def add(store, keys, columns=COLUMNS):
    return store.add(keys, *rows_of(keys, columns))


def held(store, keys, columns=COLUMNS):
    """Which keys a store has; all of what it has is right."""
    slots = store.find(list(keys))
    found = {k: s for k, s in zip(keys, slots, strict=True) if s >= 0}
    if found:
        digests, values = rows_of(found, columns)
        assert store.digests(list(found.values())).equal(digests)
        for a, b in zip(store.get(list(found.values())), values, strict=True):
            assert a.dtype == b.dtype
            assert bits(a).equal(bits(b))
    return set(found)


@pytest.fixture(params=["memory", "files"])
def path(request, tmp_path):
    return None if request.param == "memory" else tmp_path / NAME


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(store_module, "_CHUNK_BYTES", 700)


@pytest.mark.parametrize("seed", range(5))
def test_store_is_a_dictionary(path, seed, small_chunks):
    rng = random.Random(seed)
    store, model = RowStore(COLUMNS, Budget(PLENTY), path), set()
    for _ in range(150):
        chosen = rng.sample(range(60), rng.randint(1, 15))
        if rng.random() < 0.55:
            chosen += chosen[: rng.randint(0, 2)]
            assert add(store, chosen) == len(set(chosen) - model)
            model |= set(chosen)
        else:
            store.discard([s for s in store.find(chosen) if s >= 0])
            model -= set(chosen)
        assert len(store) == len(model)
        assert held(store, range(60)) == model
        assert len(store) * store.row_bytes <= store.nbytes <= 30_000
        latest = store.keys(10)
        assert len(set(latest)) == len(latest) == min(10, len(model))
        assert set(latest) <= model
        if path is not None and rng.random() < 0.2:
            store.close()
            store = RowStore(COLUMNS, Budget(PLENTY), path)
    store.shrink()
    assert store.nbytes == len(model) * store.row_bytes
    assert held(store, range(60)) == model


def test_gathered_rows_are_copies(path):
    store = RowStore(COLUMNS, Budget(PLENTY), path)
    add(store, [1, 2])
    for column in store.get([0, 1]):
        column.zero_()
    assert held(store, [1, 2]) == {1, 2}


def test_rows_found_are_told_from_rows_written(tmp_path):
    store = RowStore(COLUMNS, Budget(PLENTY), tmp_path / NAME)
    add(store, [1, 2, 3])
    store.close()
    store = RowStore(COLUMNS, Budget(PLENTY), tmp_path / NAME)
    add(store, [4])
    assert store.found_here(store.find([1, 2, 3, 4])) == [True, True, True, False]
    store.discard(store.find([1]))
    assert store.found_here(store.find([2, 3, 4])) == [True, True, False]


# --- the budget --------------------------------------------------------------------------------


def test_budget_is_kept_and_what_is_there_stays(path, small_chunks):
    bytes_of_row = RowStore(COLUMNS, Budget(1)).row_bytes
    budget = Budget(10 * bytes_of_row + 5)
    store = RowStore(COLUMNS, budget, path)
    assert add(store, [1, 2, 3, 4]) == 4
    assert add(store, range(20)) == 6
    assert add(store, range(20)) == 0
    assert budget.used == store.nbytes == 10 * bytes_of_row
    assert held(store, range(20)) == {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}
    store.discard(store.find([3, 0]))
    assert add(store, [15, 16, 17]) == 2
    store.close()
    assert budget.used == 0


def test_a_store_gives_back_what_another_needs(path, small_chunks):
    budget = Budget(60 * RowStore(COLUMNS, Budget(1)).row_bytes)
    first = RowStore(COLUMNS, budget, path)
    second = RowStore(COLUMNS, budget, path and path.with_name(NAME[::-1]))
    add(first, range(60))
    assert add(second, [1]) == 0
    moved = set()
    while held(first, range(60)):
        keys = first.keys(7)
        first.discard(first.find(keys))
        moved |= set(keys)
        assert add(second, keys) == len(keys)
        assert budget.used == first.nbytes + second.nbytes <= budget.max_bytes
        assert held(second, range(60)) == moved
        assert held(first, range(60)) == set(range(60)) - moved


def test_a_smaller_budget_takes_over_what_fits(tmp_path):
    store = RowStore(COLUMNS, Budget(PLENTY), tmp_path / NAME)
    add(store, range(20))
    store.close()
    store = RowStore(COLUMNS, Budget(7 * store.row_bytes), tmp_path / NAME)
    assert held(store, range(20)) == set(range(7))


def test_a_full_device_only_ends_growth(path, small_chunks, monkeypatch):
    store = RowStore(COLUMNS, Budget(PLENTY), path)
    add(store, range(10))
    before = store.nbytes
    real, calls = os.posix_fallocate, []

    def full(fd, offset, length):
        calls.append(fd)
        if len(calls) % 3 == 0:
            raise OSError(28, "No space left on device")
        real(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", full)
    added = add(store, range(100))
    assert added == before // store.row_bytes - 10
    assert store.nbytes == before
    assert held(store, range(100)) == set(range(10 + added))
    monkeypatch.undo()
    add(store, range(100))
    assert len(store) == 100


# --- files that are not as they were written ---------------------------------------------------


def written(tmp_path, keys=range(12)):
    store = RowStore(COLUMNS, Budget(PLENTY), tmp_path / NAME)
    add(store, list(keys))
    store.shrink()
    store.close()
    return sorted((tmp_path / NAME).iterdir())


@pytest.mark.parametrize("file", range(4))
@pytest.mark.parametrize("seed", range(8))
def test_altered_rows_are_gone(tmp_path, file, seed):
    rng = random.Random(seed)
    files = [f for f in written(tmp_path) if f.suffix == ".rows"]
    data = bytearray(files[file].read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    files[file].write_bytes(data)
    store = RowStore(COLUMNS, Budget(PLENTY), tmp_path / NAME)
    row = at * 12 // len(data)
    assert held(store, range(12)) == set(range(12)) - {row}
    add(store, [row])
    assert held(store, range(12)) == set(range(12))


@pytest.mark.parametrize("file", range(4))
def test_files_cut_short_keep_their_whole_rows(tmp_path, file):
    files = [f for f in written(tmp_path) if f.suffix == ".rows"]
    data = files[file].read_bytes()
    for length in (len(data) * 5 // 12 + 1, 1, 0):
        files[file].write_bytes(data[:length])
        store = RowStore(COLUMNS, Budget(PLENTY), tmp_path / NAME)
        assert held(store, range(12)) == set(range(length * 12 // len(data)))
        store.close()
    files[file].unlink()
    assert len(RowStore(COLUMNS, Budget(PLENTY), tmp_path / NAME)) == 0


def test_exchanged_and_repeated_rows(tmp_path):
    files = [f for f in written(tmp_path) if f.suffix == ".rows"]
    for file in (files[0], files[2]):  # of row 3, a second one in the place of row 8
        data = bytearray(file.read_bytes())
        width = len(data) // 12
        data[8 * width : 9 * width] = data[3 * width : 4 * width]
        file.write_bytes(data)
    store = RowStore(COLUMNS, Budget(PLENTY), tmp_path / NAME)
    assert len(store) == 11
    assert held(store, range(12)) == set(range(12)) - {8}


def zeros(data):
    return bytes(len(data))


def noise(data):
    return random.Random(0).randbytes(len(data))


@pytest.mark.parametrize("content", [zeros, noise])
def test_files_of_something_else(tmp_path, content):
    for file in written(tmp_path):
        if file.suffix == ".rows":
            file.write_bytes(content(file.read_bytes()))
    store = RowStore(COLUMNS, Budget(PLENTY), tmp_path / NAME)
    assert held(store, range(12)) == set()
    assert add(store, list(range(12))) == 12
    assert held(store, range(12)) == set(range(12))


@pytest.mark.parametrize("text", [None, "", "fastfreeze rows 999\n", "\xff"])
def test_stores_without_their_header_are_made_anew(tmp_path, text):
    written(tmp_path)
    header = tmp_path / NAME / "header"
    header.unlink() if text is None else header.write_bytes(text.encode("latin1"))
    assert len(RowStore(COLUMNS, Budget(PLENTY), tmp_path / NAME)) == 0


def test_stores_of_other_columns_are_made_anew(tmp_path):
    written(tmp_path)
    store = RowStore(COLUMNS[:2], Budget(PLENTY), tmp_path / NAME)
    assert len(store) == 0
    assert add(store, [3], COLUMNS[:2]) == 1
    assert held(store, [3], COLUMNS[:2]) == {3}


def cut(file):
    os.truncate(file, file.stat().st_size * 5 // 12 + 1)


def emptied(file):
    os.truncate(file, 0)


def with_a_hole(file):
    size = file.stat().st_size
    os.truncate(file, 0)
    os.truncate(file, size)


def altered(file):
    with file.open("r+b") as opened:
        opened.write(random.Random(0).randbytes(file.stat().st_size))


@pytest.mark.parametrize("damage", [cut, emptied, with_a_hole, altered])
@pytest.mark.parametrize("files", [[0], [1], [3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("again", [False, True], ids=["written", "found"])
def test_files_that_are_damaged_while_they_are_in_use(tmp_path, damage, files, again):
    """A row is right, or gone with a word; the process goes on."""
    columns = ((torch.float32, 3000), *COLUMNS[1:])  # more than a page each
    store = RowStore(columns, Budget(PLENTY), tmp_path / NAME)
    add(store, range(12), columns)
    store.shrink()
    if again:
        store.close()
        store = RowStore(columns, Budget(PLENTY), tmp_path / NAME)
    slots = range(12) if again else store.find(range(12))
    for i in files:
        damage(tmp_path / NAME / f"{i}.rows")
    assert add(store, [12], columns) == 1  # which makes the files longer again
    if files != [0] and not again:
        with pytest.raises(CannotKeepError, match="rows of a file were damaged while it was in"):
            store.get(slots)
    left = held(store, range(12), columns)
    assert (left == set(range(12))) == (files == [0])  # stamps are also in memory
    add(store, range(13), columns)
    assert held(store, range(13), columns) == set(range(13))


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to], ids=["symbolic", "hard"])
def test_files_that_are_also_elsewhere_are_not_written_to(tmp_path, link):
    outside = tmp_path / "precious"
    file = next(f for f in written(tmp_path) if f.name == "1.rows")
    outside.write_bytes(file.read_bytes())
    before = outside.read_bytes()
    file.unlink()
    link(file, outside)
    store = RowStore(COLUMNS, Budget(PLENTY), tmp_path / NAME)
    assert len(store) == 0
    add(store, range(3, 20))
    assert held(store, range(20)) == set(range(3, 20))
    assert outside.read_bytes() == before


def test_a_directory_elsewhere_is_no_store(tmp_path):
    written(tmp_path)
    outside, link = tmp_path / NAME, tmp_path / "cache" / NAME
    before = sorted(outside.iterdir())
    directory = StoreDirectory(tmp_path / "cache")
    link.symlink_to(outside)
    assert directory.other_bytes() == 0
    assert not directory.remove_oldest()
    store = RowStore(COLUMNS, Budget(PLENTY), directory.open(NAME))
    assert len(store) == 0
    add(store, [1])
    assert not link.is_symlink()
    assert sorted(outside.iterdir()) == before
    directory.close()


WIDE = ((torch.float32, 3000), *COLUMNS[1:])


def write_on_and_on(path, seed, ready):
    store = RowStore(WIDE, Budget(PLENTY), path)
    batches = [range(i, i + 10) for i in range(0, 40, 10)]
    rows = [rows_of(batch, WIDE) for batch in batches]
    rng = random.Random(seed)
    ready()
    while True:
        i = rng.randrange(4)
        store.add(batches[i], *rows[i])
        store.discard(rng.sample(range(len(store)), rng.randrange(min(len(store), 15))))


def test_killed_while_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_CHUNK_BYTES", 3000)
    for i in range(6):
        killed(write_on_and_on, tmp_path / NAME, i, after=random.Random(i).uniform(0.02, 0.1))
        store = RowStore(WIDE, Budget(PLENTY), tmp_path / NAME)
        length = len(store)
        found = held(store, range(40), WIDE)
        assert length - len(found) <= 15  # at most what one call was about
        assert len(store) == len(found)
        add(store, range(40), WIDE)
        assert held(store, range(40), WIDE) == set(range(40))
        store.close()


def stop_at(monkeypatch, nth):
    """Have the ``nth`` change of an array raise, as if the process ended there."""
    count = 0
    real = torch.Tensor.__setitem__

    def setitem(self, index, value):
        nonlocal count
        count += 1
        if count == nth:
            raise KeyboardInterrupt
        real(self, index, value)

    real_write = os.pwrite

    def pwrite(*arguments):
        nonlocal count
        count += 1
        if count == nth:
            raise KeyboardInterrupt
        return real_write(*arguments)

    monkeypatch.setattr(torch.Tensor, "__setitem__", setitem)
    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("nth", range(1, 30))
def test_stopped_at_any_write(tmp_path, nth, monkeypatch, small_chunks):
    store = RowStore(COLUMNS, Budget(PLENTY), tmp_path / NAME)
    add(store, range(10))
    values = rows_of(range(10, 15))
    stop_at(monkeypatch, nth)
    try:
        store.add(range(10, 15), *values)
        store.discard([2, 5, 14])
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    assert held(store, range(15)) >= {0, 1, 3, 4, 6, 7, 8, 9}
    again = RowStore(COLUMNS, Budget(PLENTY), tmp_path / NAME)
    found = held(again, range(15))
    assert found >= {0, 1, 3, 4, 6, 7, 8, 9}
    assert len(again) == len(found)


@pytest.mark.parametrize("nth", range(1, 30, 2))
def test_going_on_after_an_interrupt(path, nth, monkeypatch, small_chunks):
    store = RowStore(COLUMNS, Budget(PLENTY), path)
    add(store, range(10))
    values = rows_of(range(10, 15))
    stop_at(monkeypatch, nth)
    try:
        store.discard([2, 5])
        store.add(range(10, 15), *values)
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    rng = random.Random(nth)
    for _ in range(20):
        found = held(store, range(15))
        store.discard(store.find(rng.sample(sorted(found), len(found) // 2)))
        add(store, rng.sample(range(15), 8))
    add(store, range(15))
    assert held(store, range(15)) == set(range(15))


# --- directories -------------------------------------------------------------------------------


def lock_with_a_worker(path, workers, ready):
    directory = StoreDirectory(path)
    worker = os.fork()
    if worker == 0:  # outlives its parent
        time.sleep(60)
    workers.write_text(str(worker))
    ready()
    time.sleep(60)
    directory.close()


def try_to_open(path, result, ready):
    try:
        StoreDirectory(path)
    except RuntimeError as error:
        result.write_text(str(error))
    ready()
    time.sleep(60)


def test_one_process_at_a_time(tmp_path):
    directory = tmp_path / "cache"
    killed(lock_with_a_worker, directory, tmp_path / "worker")
    locked = StoreDirectory(directory)  # though the worker is still there
    os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"in use by another cache of this process"):
        StoreDirectory(directory / ".." / "cache")
    killed(try_to_open, directory, tmp_path / "result")
    assert (tmp_path / "result").read_text() == f"{directory} is in use by another process"
    locked.close()
    locked.close()
    StoreDirectory(directory).close()


def test_a_directory_that_is_forgotten_is_unlocked(tmp_path):
    StoreDirectory(tmp_path / "new")
    StoreDirectory(tmp_path / "new").close()


def test_old_stores_make_room_and_nothing_else_does(tmp_path, small_chunks):
    directory = StoreDirectory(tmp_path)
    names = [f"{i:032x}" for i in range(4)]
    for i, name in enumerate(names[:3]):
        store = RowStore(COLUMNS, Budget(PLENTY), directory.open(name))
        add(store, range(10))
        store.shrink()
        store.close()
        for file in (tmp_path / name).iterdir():
            os.utime(file, (i, i))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a").write_bytes(bytes(10_000))
    directory.close()

    directory = StoreDirectory(tmp_path)
    overhead = directory.other_bytes() - 30 * store.row_bytes
    budget = Budget(32 * store.row_bytes + overhead, directory)
    store = RowStore(COLUMNS, budget, directory.open(names[3]))
    assert add(store, range(2)) == 2
    assert len(list(tmp_path.iterdir())) == 6
    assert add(store, range(4)) == 2
    assert not (tmp_path / names[0]).exists()
    again = RowStore(COLUMNS, budget, directory.open(names[1]))
    assert held(again, range(10)) == set(range(10))
    assert add(store, range(40)) == budget.max_bytes // store.row_bytes - 14
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *sorted([names[1], names[3]]),
        "lock",
        "photos",
    ]
    assert held(again, range(10)) == set(range(10))
    directory.close()
