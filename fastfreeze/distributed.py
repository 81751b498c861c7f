"""Training in several processes while layers freeze, on top of ``torch.distributed``.

``DistributedDataParallel`` decides once, when it is made, which gradients it reduces. A parameter
that freezes later leaves its bucket waiting for ever; one that thaws later is not reduced, and the
processes drift apart. :class:`DataParallel` makes it anew when other parameters train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastfreeze.layers.freeze import FreezeScheduler
from fastfreeze.optim import FusedOptimizer
from fastfreeze.text import some

_LEAVE_HOOKS = ("mixed_precision", "delay_all_reduce_named_params", "param_to_hook_all_reduce")
_requires_grad = attrgetter("requires_grad")


class DataParallel(nn.Module):
    """A model whose gradients are averaged over processes, those of the layers that train alone.

    Takes the place of ``torch.nn.parallel.DistributedDataParallel``, which it holds, and which does
    the reduction. When the optimizer, or anybody else, has frozen or thawed parameters, the next
    forward makes it anew over those that train: frozen ones are in no bucket, and nothing is sent
    for them; ``find_unused_parameters`` is not needed. The weights are not sent again for that.

    * At each forward that is followed by a reduction, and with buffers at the first one of a step,
      the processes compare the optimizer's step and their ``requires_grad`` flags, in one small
      message between CPUs. If they differ, that is raised in every process, and none waits for
      another. A forward that one process alone makes, to evaluate, is to be the model's own.
    * Buffers are those of the first process, as with ``DistributedDataParallel``, but only those
      of modules that train or have written to them are sent: not the statistics of frozen norms.
    * Names are ``DistributedDataParallel``'s (``module.`` before each): state dicts interchange.
      ``module.state_dict()`` has them without it, as a run in one process.
    * Accumulate gradients as ever, within :meth:`no_sync`. All processes must take as many steps:
      there is no ``join``.

    Args:
        module: the model, or what :func:`fastfreeze.trim` made of it; on its device already.
        optimizer: what freezes it: a :class:`fastfreeze.SGD`, ``Adam`` or ``AdamW``, or a
            :class:`fastfreeze.FreezeScheduler` for another optimizer.
        ddp_keywords: for ``DistributedDataParallel``, each time it is made.

    Raises:
        TypeError: ``module`` or ``optimizer`` is of another type.
        ValueError: ``torch.distributed`` is not initialized, or a keyword that makes
            ``DistributedDataParallel`` leave hooks in the model, which it cannot take back.
        RuntimeError: parameters, buffers, schedule or parameter groups are not the same in all
            processes. Later, in a forward: the step or the flags are not.

    Example:
        >>> network = DataParallel(fastfreeze.trim(model), optimizer)
    """

    module: nn.Module

    def __init__(
        self, module: nn.Module, optimizer: FusedOptimizer | FreezeScheduler, **ddp_keywords: Any
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if not isinstance(optimizer, (FusedOptimizer, FreezeScheduler)):
            raise TypeError(
                "optimizer must be a fastfreeze.SGD, Adam, AdamW or FreezeScheduler, got "
                f"{type(optimizer).__name__}"
            )
        for name in _LEAVE_HOOKS:
            if ddp_keywords.get(name) is not None:
                raise ValueError(
                    f"{name} must be left out, got {ddp_keywords[name]!r}: its hooks would stay in "
                    "the model when layers freeze"
                )
        self.module = module
        self.require_backward_grad_sync = True
        self._optimizer = optimizer
        self._group = _cpu_group(ddp_keywords)
        self._parameters_of_module = list(module.parameters())
        self._comm_hooks: list[tuple[Any, Callable[..., Any]]] = []
        self._first_in_step = True
        _compare(self._description(), self._group)
        init_sync = ddp_keywords.pop("init_sync", True)
        self._ddp_keywords = ddp_keywords
        ddp = self._make(init_sync)
        self._buffers_of_module = _WrittenBuffers(
            module, set(ddp.parameters_to_ignore) if ddp.broadcast_buffers else None
        )
        self._hold(ddp)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``module``'s output; gradients are reduced in the backward.

        Raises:
            RuntimeError: processes differ in the step or in what is frozen.
        """
        reduces = torch.is_grad_enabled() and self.require_backward_grad_sync
        if reduces or (self._first_in_step and self._buffers_of_module):
            self._follow()
        self._first_in_step = reduces
        ddp = self._ddp
        ddp.require_backward_grad_sync = self.require_backward_grad_sync
        return ddp(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, gradients are added up in each process and not reduced.

        The first backward of a forward behind it reduces the sums. The forward counts: it belongs
        inside.
        """
        before = self.require_backward_grad_sync
        self.require_backward_grad_sync = False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before

    def register_comm_hook(self, state: Any, hook: Callable[..., Any]) -> None:
        """As ``DistributedDataParallel``'s; it is registered anew when layers freeze.

        Buckets are others then: a ``state`` that keeps something for each bucket, such as
        PowerSGD's with error feedback, must be told so by its owner.
        """
        self._ddp.register_comm_hook(state, hook)
        self._comm_hooks.append((state, hook))

    @property
    def _ddp(self) -> DistributedDataParallel:
        ddp: DistributedDataParallel = vars(self)["_held"]
        return ddp

    def _hold(self, ddp: DistributedDataParallel) -> None:
        ddp.broadcast_buffers = False  # this class sends them, if need be
        vars(self)["_held"] = ddp  # a registered child would give each parameter a second name
        self._flags = self._current_flags()

    def _make(self, init_sync: bool) -> DistributedDataParallel:
        return DistributedDataParallel(self.module, init_sync=init_sync, **self._ddp_keywords)

    def _current_flags(self) -> bytes:
        return bytes(map(_requires_grad, self._parameters_of_module))

    def _follow(self) -> None:
        """Make sure that all processes are at one point, send buffers, and follow the flags."""
        flags = self._current_flags()
        own = self._optimizer.current_step.to_bytes(8, "little") + flags
        written = self._buffers_of_module.written()
        rows = _gather(own + written, self._group)
        if any(row[: len(own)] != own for row in rows):
            _compare(self._description(), self._group)
        anywhere = [any(column) for column in zip(*(row[len(own) :] for row in rows), strict=True)]
        self._buffers_of_module.send(anywhere, self._ddp.process_group)
        if flags != self._flags and any(flags):
            self._make_anew()

    def _make_anew(self) -> None:
        del vars(self)["_held"]  # with its buckets, and its hooks on the parameters
        self._hold(self._make(init_sync=False))
        for state, hook in self._comm_hooks:
            self._ddp.register_comm_hook(state, hook)

    def _description(self) -> list[str]:
        """What must be the same in all processes, in words."""
        optimizer, schedule = self._optimizer, self._optimizer.schedule
        lines = [f"step {optimizer.current_step}"]
        lines.append(f"schedule {None if schedule is None else schedule.config()}")
        groups = optimizer if isinstance(optimizer, FusedOptimizer) else optimizer.optimizer
        for g, group in enumerate(groups.param_groups):
            options = {k: v for k, v in group.items() if k != "params"}
            lines.append(f"parameter group {g}: {len(group['params'])} parameters, {options}")
        for name, p in self.module.named_parameters():
            state = "trains" if p.requires_grad else "frozen"
            lines.append(f"parameter {name}: {state}, {p.dtype}, {tuple(p.shape)}")
        for name, b in self.module.named_buffers():
            lines.append(f"buffer {name}: {b.dtype}, {tuple(b.shape)}")
        return lines


class _WrittenBuffers:
    """A model's buffers, and which modules have written to theirs since they were last sent.

    Batch norm's kernels write to its statistics without PyTorch's counting it. A module's buffers
    are therefore taken together, with its counter of batches, and as written to while it trains.

    Args:
        ignored: names of those that stay each process's own; None: all of them.
    """

    def __init__(self, module: nn.Module, ignored: set[str] | None) -> None:
        held = {
            m: [n for n in m._buffers if f"{p}.{n}".lstrip(".") not in (ignored or ())]
            for p, m in module.named_modules()
        }
        self._places = [] if ignored is None else [(m, names) for m, names in held.items() if names]
        self._sent = self._now()

    def __len__(self) -> int:
        return len(self._places)

    def _now(self) -> list[list[tuple[Tensor, int]]]:
        """Each module's buffers with their version counters; a buffer may be replaced, too."""
        found = [[m._buffers.get(name) for name in names] for m, names in self._places]
        return [[(b, b._version) for b in buffers if b is not None] for buffers in found]

    def written(self) -> bytes:
        """One byte for each module with buffers: 1 if they are to be sent."""
        trains = [
            any(p.requires_grad for p in m.parameters(recurse=False)) for m, _ in self._places
        ]
        pairs = zip(self._now(), self._sent, trains, strict=True)
        return bytes(trains or not _same(now, sent) for now, sent, trains in pairs)

    def send(self, wanted: Sequence[bool], group: dist.ProcessGroup) -> None:
        """Give the buffers of the modules that are ``wanted`` the first process's values."""
        chosen = [b for bs, want in zip(self._now(), wanted, strict=True) if want for b, _ in bs]
        _broadcast(chosen, group)
        self._sent = self._now()


def _same(a: list[tuple[Tensor, int]], b: list[tuple[Tensor, int]]) -> bool:
    return len(a) == len(b) and all(x is y and m == n for (x, m), (y, n) in zip(a, b, strict=True))


@torch.no_grad()
def _broadcast(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Give tensors the values of the group's first process, in one message for each dtype."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.broadcast(flat, group=group, group_src=0)
        if dist.get_rank(group) != 0:
            for t, values in zip(same, flat.split([t.numel() for t in same]), strict=True):
                t.copy_(values.view(t.shape))


def _cpu_group(ddp_keywords: dict[str, Any]) -> dist.ProcessGroup:
    """The processes that train together, as a group whose messages do not wait for a GPU."""
    mesh = ddp_keywords.get("device_mesh")
    group = ddp_keywords.get("process_group") if mesh is None else mesh.get_group(0)
    ranks = dist.get_process_group_ranks(group)
    made = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)  # this process is one of them
    return made


def _gather(row: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """The rows of all processes, which must be of equal length."""
    own = torch.frombuffer(bytearray(row), dtype=torch.uint8)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, own, group=group)
    return [bytes(r.tolist()) for r in rows]


def _compare(lines: list[str], group: dist.ProcessGroup) -> None:
    """Raise RuntimeError, in all processes, unless they give the same lines."""
    gathered: list[list[str]] = [[]] * dist.get_world_size(group)
    dist.all_gather_object(gathered, lines, group=group)
    first = gathered[0]
    others = [r for r, theirs in enumerate(gathered) if theirs != first]
    if not others:
        return
    pairs = zip_longest(gathered[others[0]], first, fillvalue="nothing more")
    theirs, firsts = next((a, b) for a, b in pairs if a != b)
    raise RuntimeError(
        f"all processes must train the same model in the same way, but ranks "
        f"{some(list(map(str, others)), 8)} differ from rank 0: rank {others[0]} has "
        f"{theirs!r}, rank 0 has {firsts!r}"
    )
