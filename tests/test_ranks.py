"""A test of several processes that goes wrong leaves nothing to the next one."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Ranks

HOUR = 3600


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks()
    yield pool
    pool.close()


def together():
    """What takes all ranks, and this one's process."""
    total = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(total)
    return int(total), os.getpid()


def works(ranks, world=2):
    """The processes of a good test."""
    totals, processes = zip(*ranks.run(together, world=world), strict=True)
    assert totals == (world * (world + 1) // 2,) * world
    return set(processes)


def split_up(rank_0, rank_1):
    return rank_1() if dist.get_rank() else rank_0()


def rank():
    return dist.get_rank()


def raises():
    raise ValueError("not this one")


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps():
    time.sleep(HOUR)


FAILURES = {
    "one raises": (together, raises, "rank 0: still in .*rank 1: .*ValueError: not this one"),
    "one is killed": (together, is_killed, "rank 1: died, exit code -9"),
    "one hangs": (rank, sleeps, "^rank 1: still in "),
    "an answer cannot be sent": (rank, threading.Lock, "^rank 1: .*cannot pickle"),
}


@pytest.mark.parametrize(("rank_0", "rank_1", "message"), FAILURES.values(), ids=FAILURES)
def test_a_failed_group_is_replaced(ranks, rank_0, rank_1, message):
    before = works(ranks)
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        ranks.run(split_up, rank_0, rank_1, seconds=0.5)
    after = works(ranks)
    assert before.isdisjoint(after)
    assert after < works(ranks, world=3)
