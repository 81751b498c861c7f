"""Processes that run a function together, each as one rank of a gloo group.

They stay for the next test, and are forked from one that has imported what they need: the imports
take longer than what they run.
"""

from __future__ import annotations

import pickle
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist

from fastfreeze.errors import FastfreezeWarning

TIMEOUT = 240.0  # seconds, after which processes count as hanging; the machine may be busy


class Ranks:
    """Starts processes when they are first needed; ``run`` gives each rank's result."""

    def __init__(self):
        self._workers = []

    def run(self, job, *args, world=2):
        """``job(*args)`` in ``world`` processes; its values, by rank."""
        self._start(world)
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for rank, (_, pipe) in enumerate(self._workers[:world]):
                # Tensors by value: multiprocessing would share their memory between the ranks.
                pipe.send_bytes(pickle.dumps((job, args, rank, world, store)))
            deadline = time.monotonic() + TIMEOUT
            answers = [self._answer(job, rank, deadline) for rank in range(world)]
        failures = [f"rank {r}: {text}" for r, (_, text) in enumerate(answers) if text]
        if failures:
            raise AssertionError("\n".join(failures))
        return [value for value, _ in answers]

    def close(self):
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers = []

    def _start(self, world):
        context = get_context("forkserver")
        context.set_forkserver_preload(["tests.test_distributed"])
        while len(self._workers) < world:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()  # so that its end is noticed
            self._workers.append((process, ours))

    def _answer(self, job, rank, deadline):
        process, pipe = self._workers[rank]
        try:
            if pipe.poll(max(0.0, deadline - time.monotonic())):
                return pickle.loads(pipe.recv_bytes())
            problem = "hangs"
        except EOFError:
            process.join()
            problem = f"died, exit code {process.exitcode}"
        self.close()
        raise AssertionError(f"{job.__name__}: rank {rank} {problem}")


def _work(pipe):
    torch.set_num_threads(1)
    warnings.simplefilter("error", FastfreezeWarning)
    while True:
        try:
            job, args, rank, world, store = pickle.loads(pipe.recv_bytes())
        except EOFError:  # nobody is left to ask
            return
        try:
            answer = _as_rank(job, args, rank, world, store), None
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


def _as_rank(job, args, rank, world, store):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    try:
        return job(*args)
    finally:
        dist.destroy_process_group()
