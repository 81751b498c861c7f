"""Processes that run a function together, each as one rank of a gloo group.

They stay for the next test, and are forked from one that has imported what they need: the imports
take longer than what they run. After a failure nobody knows how far each of them has come: all are
killed, and the next test starts others.
"""

from __future__ import annotations

import pickle
import tempfile
import time
import traceback
import warnings
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

from fastfreeze.errors import FastfreezeWarning

CONNECT = 20.0  # seconds; it takes hundredths of one where nothing else runs
WORK = 60.0  # the longest job takes 2
REST = 0.5  # in which the others may say what they know, once one has failed


def connect(rank, world, store):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=WORK),
    )


class Ranks:
    """Starts processes when they are first needed; ``run`` gives each rank's result."""

    def __init__(self):
        self._workers = []

    def run(self, job, *args, world=2, seconds=WORK):
        """``job(*args)`` in ``world`` processes; its values, by rank.

        Raises:
            AssertionError: with what each rank says that has raised, died, or is not done in time.
        """
        with tempfile.TemporaryDirectory() as folder:
            try:
                try:
                    self._connect(world, Path(folder) / "first")
                except AssertionError:
                    self.close()
                    self._connect(world, Path(folder) / "second")
                values = self._call(job, [args] * world, seconds)
                # Not before all are done: it would break what the others still exchange.
                self._call(dist.destroy_process_group, [()] * world, CONNECT)
                return values
            except BaseException:
                self.close()
                raise

    def close(self):
        for process, pipe in self._workers:
            process.kill()
            process.join(CONNECT)
            pipe.close()
        self._workers = []

    def _connect(self, world, store):
        context = get_context("forkserver")
        context.set_forkserver_preload(["tests.test_distributed"])
        while len(self._workers) < world:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()  # so that its end is noticed
            self._workers.append((process, ours))
        self._call(connect, [(rank, world, str(store)) for rank in range(world)], CONNECT)

    def _call(self, function, arguments, seconds):
        """``function`` in as many processes as there are arguments for; its values, by rank."""
        waiting, values, problems = {}, {}, {}
        for rank, args in enumerate(arguments):
            _, pipe = self._workers[rank]
            # Tensors by value: multiprocessing would share their memory between the ranks.
            request = pickle.dumps((function, args))
            with suppress(OSError):  # it has died, which reading tells
                pipe.send_bytes(request)
            waiting[pipe] = rank
        deadline = time.monotonic() + seconds
        while waiting and (ready := wait(list(waiting), deadline - time.monotonic())):
            for pipe in ready:
                rank = waiting.pop(pipe)
                values[rank], problem = self._answer(rank)
                if problem:
                    problems[rank] = problem
                    deadline = min(deadline, time.monotonic() + REST)
        problems.update(dict.fromkeys(waiting.values(), f"still in {function}"))
        if problems:
            raise AssertionError("\n".join(f"rank {r}: {problems[r]}" for r in sorted(problems)))
        return [values[rank] for rank in sorted(values)]

    def _answer(self, rank):
        process, pipe = self._workers[rank]
        try:
            return pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            process.join(REST)
            return None, f"died, exit code {process.exitcode}"


def _work(pipe):
    """Does what is asked for, and answers with its value or with what it raised."""
    torch.set_num_threads(1)
    warnings.simplefilter("error", FastfreezeWarning)
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:  # nobody is left to ask
            return
        try:
            function, args = pickle.loads(request)
            answer = pickle.dumps((function(*args), None))
        except BaseException:  # a failure of pytest's is no Exception
            answer = pickle.dumps((None, traceback.format_exc()))
        pipe.send_bytes(answer)
