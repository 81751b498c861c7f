"""Rows: hashed, laid out as flat tensors, and stored in memory and in files that may be damaged."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from fastfreeze.cache.rows import CannotKeepError, Form, take_rows
from fastfreeze.cache.store import Stores
from fastfreeze.trimming.bits import _factors, checksum, hash_rows
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_hash_is_a_weighted_sum_of_words(dtype):
    for width in (1, 3, 8, 31, 33):
        rows = some((5, width), dtype)
        for row, value in zip(rows, hash_rows(rows).tolist(), strict=True):
            data = bytes(bits(row).numpy())
            data += bytes(-len(data) % 4)
            words = [
                int.from_bytes(data[i : i + 4], "little", signed=True)
                for i in range(0, len(data), 4)
            ]
            factors = _factors(len(words), torch.device("cpu")).tolist()
            total = sum(w * f for w, f in zip(words, factors, strict=True))
            assert (value - total) % 2**64 == 0


def test_factors_are_part_of_the_format():
    factors = _factors(3, torch.device("cpu")).tolist()
    assert factors == _factors(1000, torch.device("cpu"))[:3].tolist()
    for i, factor in enumerate(factors, start=1):  # the same in plain integers
        x = i * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ x >> 31) * 0xBF58476D1CE4E5B9 % 2**64
        assert factor % 2**64 == (x ^ x >> 31) | 1


def test_hash_notices_each_bit_and_the_order_and_nothing_else():
    rows = some((1, 40), torch.uint8).expand(321, 40).clone()
    for i in range(320):
        rows[i, i // 8] ^= 1 << i % 8
    hashes = hash_rows(rows).tolist()
    assert hashes[-1] not in hashes[:-1]
    assert len(set(hashes)) > 300  # the top bits of two words count the same
    x = torch.randn(4, 3, 5, 5)
    assert hash_rows(x.to(memory_format=torch.channels_last)).equal(
        hash_rows(x.movedim(1, -1).contiguous())
    )
    assert not hash_rows(x).equal(hash_rows(x.flip(-1)))
    assert not hash_rows(x, x.flip(-1)).equal(hash_rows(x.flip(-1), x))
    shifted = bits(x).clone().new_empty(x.numel() * 4 + 3)[3:]
    shifted.copy_(bits(x))
    assert hash_rows(shifted.view(4, -1)).equal(hash_rows(x))
    assert hash_rows(x[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksum_notices_each_bit_and_the_order_and_nothing_else(dtype):
    for size in (0, 1, 100, 4097, 30_000):
        x = some((size,), dtype)
        assert checksum(x) == checksum(x.clone()) == checksum(x.view(-1, 1).T)
        assert size < 2 or checksum(x) != checksum(x.roll(1)) or len(x.unique()) == 1
        for at in {i % size for i in (0, 4095, 4096, -1)} if size else ():
            data = bits(x.clone())
            data[at * x.element_size()] ^= 1
            assert checksum(data.view(dtype)) != checksum(x)
    for element in (torch.tensor(3.0), torch.randn(3, dtype=torch.complex64).conj()):
        assert checksum(element) == checksum(element.clone())
    assert checksum(torch.empty(3, device="meta")) is None


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
def test_rows_are_taken_with_their_strides(form):
    for n in (2, 7):
        x, dense = forms(n)[form]
        rows = [len(x) - 1, 0, 0]
        taken = take_rows(x, rows)
        assert taken.equal(x[rows])
        assert not dense or taken.stride() == x.stride()


@pytest.mark.parametrize("name", forms(2))
def test_forms_give_values_back(name):
    for dtype in DTYPES:
        x, _ = forms(5, dtype)[name]
        n = len(x)
        form = Form.of(x, n, None)
        rows = form.flat(x, n)
        assert rows.shape == (n, x[0].numel())
        assert form.column == (dtype, x[0].numel())
        for i in range(n):
            assert form.flat(x[i : i + 1], 1).equal(rows[i : i + 1])
        back = form.value(rows.clone())
        assert bits(back).equal(bits(x))
        assert back.stride() == x.stride()
        assert bits(form.flat(x.contiguous(), n)).equal(bits(rows))


def test_forms_narrow_what_is_wider():
    for value, stored in (
        (torch.randn(4, 50), torch.bfloat16),
        (torch.randn(4, 3).half(), torch.float16),
        (torch.arange(4), torch.int64),
    ):
        form = Form.of(value, 4, torch.bfloat16)
        assert form.column == (stored, value[0].numel())
        back = form.value(form.flat(value, 4))
        assert back.dtype == value.dtype
        assert ((back - value).abs() <= value.abs() * 2**-8).all()
        assert form.flat(back, 4).equal(form.flat(value, 4))
    form = Form.of(torch.ones(2, 2), 2, torch.float16)
    form.flat(torch.tensor([[1.0, float("inf")], [float("nan"), -65504.0]]), 2)
    with pytest.raises(CannotKeepError, match=r"do not fit into torch\.float16"):
        form.flat(torch.tensor([[1.0, 65520.0]]), 1)


def test_forms_refuse():
    x = torch.randn(4, 6)
    for value, message in (
        (x.to_sparse(), "cannot be kept in rows"),
        (x[:, :0], r"shape \(4, 0\) cannot be kept"),
        (torch.randn(6, 4).T, "do not lie one after the other"),
        (torch.randn(3).expand(4, 3), "do not lie one after the other"),
    ):
        with pytest.raises(CannotKeepError, match=message):
            Form.of(value, 4, None)
    for other in (x[:, :5], x.double()):
        with pytest.raises(CannotKeepError, match="another shape or dtype"):
            Form.of(x, 4, None).flat(other, 4)


COLUMN = torch.bfloat16, 71
ROW = 24 + 71 * 2
OTHER = torch.bool, 71
WIDE = torch.float32, 3000  # more than a page each


def rows_of(keys, column=COLUMN):
    """The digests and rows that belong to keys."""
    dtype, n = column
    seeds = [torch.Generator().manual_seed(key) for key in keys]
    values = torch.stack([torch.randint(0, 2, (n,), generator=g) for g in seeds]).to(dtype)
    return [key * 31 - 7 for key in keys], values


def add(store, keys, column=COLUMN):
    return store.add(list(keys), *rows_of(keys, column))


def held(store, keys, column=COLUMN):
    """Which keys a store has; all of what it has is right."""
    found = {k: s for k, s in zip(keys, store.find(list(keys)), strict=True) if s >= 0}
    for key, slot in found.items():
        (digest,), expected = rows_of([key], column)
        rows = store.get([slot])
        if rows is None:
            assert store.find([key]) == [-1]
            continue
        assert store.digest(slot) == digest
        assert rows.dtype == expected.dtype
        assert bits(rows).equal(bits(expected))
    return {key for key in found if store.find([key]) != [-1]}


@pytest.fixture(params=["memory", "files"])
def path(request, tmp_path):
    return None if request.param == "memory" else tmp_path


def written(tmp_path, keys=range(12)):
    """The file of a store that has been closed."""
    stores = Stores(PLENTY, tmp_path)
    add(stores.open(NAME, COLUMN), keys)
    stores.close()
    return tmp_path / f"{NAME}.rows"


@pytest.mark.parametrize("seed", range(3))
def test_store_is_a_dictionary(path, seed):
    rng = random.Random(seed)
    stores, model = Stores(PLENTY, path), set()
    store = stores.open(NAME, COLUMN)
    for _ in range(30):
        chosen = rng.sample(range(60), rng.randint(1, 15))
        if rng.random() < 0.55:
            chosen += chosen[: rng.randint(0, 2)]
            assert add(store, chosen) == len(set(chosen) - model)
            model |= set(chosen)
        else:
            store.forget(chosen)
            model -= set(chosen)
        assert len(store) == len(model)
        assert held(store, range(60)) == model
        if path is not None and rng.random() < 0.2:
            forgotten = {k for k in range(60) if k not in model}
            stores.close()
            stores = Stores(PLENTY, path)
            store = stores.open(NAME, COLUMN)
            assert model <= held(store, range(60))
            store.forget(forgotten)
    stores.close()


def test_rows_found_are_told_from_rows_written_and_a_smaller_budget_takes_what_fits(tmp_path):
    written(tmp_path, range(20))
    stores = Stores(7 * ROW, tmp_path)
    store = stores.open(NAME, COLUMN)
    assert held(store, range(20)) == set(range(7))
    assert (tmp_path / f"{NAME}.rows").stat().st_size == 32 + 7 * ROW
    stores.close()
    store = Stores(PLENTY, tmp_path).open(NAME, COLUMN)
    add(store, [30])
    assert [store.was_found(slot) for slot in store.find([1, 2, 30])] == [True, True, False]


def test_budget_is_kept_and_what_is_there_stays(path):
    stores = Stores(10 * ROW + 5, path)
    store = stores.open(NAME, COLUMN)
    assert store.row_bytes == ROW
    assert add(store, range(4)) == 4
    assert add(store, range(20)) == 6
    assert add(store, range(20)) == 0
    assert store.nbytes == 10 * ROW
    assert held(store, range(20)) == set(range(10))
    other = stores.open(NAME[::-1], COLUMN)
    assert add(other, range(4)) == 0
    stores.drop(NAME)
    assert add(other, range(4)) == 4
    assert path is None or len(list(path.iterdir())) == 2


def test_a_full_device_only_ends_growth(tmp_path, monkeypatch):
    store = Stores(PLENTY, tmp_path).open(NAME, COLUMN)
    add(store, range(10))
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: 3 * ROW + 7], at))
    assert add(store, range(20)) == 10  # in several writes
    end = store.nbytes + 2 * ROW + 50

    def full(fd, data, at):
        if at >= end:
            raise OSError(28, "No space left on device")
        return real(fd, data[: end - at], at)

    monkeypatch.setattr(os, "pwrite", full)
    assert add(store, range(30)) == 2
    monkeypatch.undo()
    add(store, range(30))
    assert held(store, range(30)) == set(range(30))


def test_old_stores_make_room_and_nothing_else_does(tmp_path):
    names = [f"{i:032x}" for i in range(4)]
    stores = Stores(PLENTY, tmp_path)
    for name in names[:3]:
        add(stores.open(name, COLUMN), range(10))
    stores.close()
    for i, name in enumerate(names[:3]):
        os.utime(tmp_path / f"{name}.rows", (i, i))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a").write_bytes(bytes(10_000))
    (tmp_path / f"{'f' * 32}.rows").symlink_to(tmp_path / "photos" / "a")

    stores = Stores(32 * ROW + 3 * 32, tmp_path)
    store = stores.open(names[3], COLUMN)
    assert add(store, range(2)) == 2
    assert (tmp_path / f"{names[0]}.rows").exists()
    assert add(store, range(4)) == 2
    assert not (tmp_path / f"{names[0]}.rows").exists()
    again = stores.open(names[1], COLUMN)
    assert held(again, range(10)) == set(range(10))
    assert add(store, range(40)) == 18
    assert not (tmp_path / f"{names[2]}.rows").exists()
    assert held(again, range(10)) == set(range(10))
    assert (tmp_path / "photos" / "a").exists()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("part", [slice(8, 16), slice(16, None)], ids=["digest", "rest"])
def test_altered_rows_are_gone(tmp_path, part, seed):
    rng = random.Random(seed)
    file = written(tmp_path)
    data = bytearray(file.read_bytes())
    at = rng.choice([32 + ROW * row + i for row in range(12) for i in range(ROW)[part]])
    data[at] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    store = Stores(PLENTY, tmp_path).open(NAME, COLUMN)
    row = (at - 32) // ROW
    left = held(store, range(12))
    assert left == set(range(12)) - {row}
    add(store, [row])
    assert held(store, range(12)) == set(range(12))


def test_files_cut_short_keep_their_whole_rows(tmp_path):
    file = written(tmp_path)
    data = file.read_bytes()
    for length in (len(data) * 5 // 12 + 1, 40, 1, 0):
        file.write_bytes(data[:length])
        stores = Stores(PLENTY, tmp_path)
        whole = max(length - 32, 0) // ROW
        assert held(stores.open(NAME, COLUMN), range(12)) == set(range(whole))
        stores.close()


@pytest.mark.parametrize(
    "content", [bytes, lambda n: random.Random(0).randbytes(n), lambda n: b"fastfreeze rows 999\n"]
)
def test_files_of_something_else(tmp_path, content):
    file = written(tmp_path)
    file.write_bytes(content(file.stat().st_size))
    store = Stores(PLENTY, tmp_path).open(NAME, COLUMN)
    assert held(store, range(12)) == set()
    assert add(store, range(12)) == 12
    assert held(store, range(12)) == set(range(12))


def test_stores_of_another_column_are_made_anew(tmp_path):
    written(tmp_path)
    store = Stores(PLENTY, tmp_path).open(NAME, OTHER)
    assert len(store) == 0
    assert add(store, [3], OTHER) == 1
    assert held(store, [3], OTHER) == {3}


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
@pytest.mark.parametrize("again", [False, True], ids=["written", "found"])
def test_files_that_are_damaged_while_they_are_in_use(tmp_path, damage, again):
    stores = Stores(PLENTY, tmp_path)
    store = stores.open(NAME, WIDE)
    add(store, range(12), WIDE)
    if again:
        stores.close()
        store = Stores(PLENTY, tmp_path).open(NAME, WIDE)
    damage(tmp_path / f"{NAME}.rows")
    assert add(store, [12], WIDE) == 1  # which makes the file longer again
    assert store.get(store.find(range(12))) is None
    assert set() < held(store, range(13), WIDE) < set(range(13))
    add(store, range(13), WIDE)
    assert held(store, range(13), WIDE) == set(range(13))


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to], ids=["symbolic", "hard"])
def test_files_that_are_also_elsewhere_are_not_written_to(tmp_path, link):
    file, outside = written(tmp_path), tmp_path / "precious"
    outside.write_bytes(file.read_bytes())
    before = outside.read_bytes()
    file.unlink()
    link(file, outside)
    store = Stores(PLENTY, tmp_path).open(NAME, COLUMN)
    assert len(store) == 0
    add(store, range(3, 20))
    assert held(store, range(20)) == set(range(3, 20))
    assert outside.read_bytes() == before


def write_on_and_on(path, ready):
    store = Stores(PLENTY, path).open(NAME, WIDE)
    ready()
    for i in range(10**6):
        add(store, range(10 * i, 10 * i + 10), WIDE)


def test_killed_while_writing(tmp_path):
    for i in range(3):
        killed(write_on_and_on, tmp_path, after=0.03 * (i + 1))
        stores = Stores(PLENTY, tmp_path)
        store = stores.open(NAME, WIDE)
        found = held(store, range(30), WIDE)
        assert len(found) >= 10 or i == 0
        add(store, range(30), WIDE)
        assert held(store, range(30), WIDE) == set(range(30))
        stores.close()


@pytest.mark.parametrize("late", [False, True])
def test_going_on_after_an_interrupt(tmp_path, late, monkeypatch):
    store = Stores(PLENTY, tmp_path).open(NAME, COLUMN)
    add(store, range(10))
    real = os.pwrite

    def interrupted(*arguments):
        if late:
            real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add(store, range(15))
    monkeypatch.undo()
    assert held(store, range(15)) == set(range(10))
    add(store, range(5, 20))
    assert held(store, range(20)) == set(range(20))


def lock_with_a_worker(path, workers, ready):
    stores = Stores(PLENTY, path)
    worker = os.fork()
    if worker == 0:  # outlives its parent
        time.sleep(60)
    workers.write_text(str(worker))
    ready()
    time.sleep(60)
    stores.close()


def try_to_open(path, result, ready):
    try:
        Stores(PLENTY, path)
    except RuntimeError as error:
        result.write_text(str(error))
    ready()
    time.sleep(60)


def test_one_process_at_a_time(tmp_path):
    directory = tmp_path / "cache"
    killed(lock_with_a_worker, directory, tmp_path / "worker")
    locked = Stores(PLENTY, directory)  # though the worker is still there
    os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"in use by another cache of this process"):
        Stores(PLENTY, directory / ".." / "cache")
    killed(try_to_open, directory, tmp_path / "result")
    assert (tmp_path / "result").read_text() == f"{directory} is in use by another process"
    locked.close()
    locked.close()
    Stores(PLENTY, directory)
    Stores(PLENTY, directory).close()  # the one before has been let go of
