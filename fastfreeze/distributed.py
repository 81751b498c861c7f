"""Training in several processes while layers freeze, on top of ``torch.distributed``.

``DistributedDataParallel`` decides once, when it is made, which gradients it reduces. A parameter
that freezes later leaves its bucket waiting for ever; one that thaws later is not reduced, and the
processes drift apart. :class:`DataParallel` makes it anew when other parameters train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastfreeze.layers.freeze import FreezeScheduler
from fastfreeze.optim import FusedOptimizer
from fastfreeze.text import some
from fastfreeze.trimming.trimmed import TrimmedModel

_LEAVE_HOOKS = ("mixed_precision", "delay_all_reduce_named_params", "param_to_hook_all_reduce")
_requires_grad = attrgetter("requires_grad")


class DataParallel(nn.Module):
    """A model whose gradients are averaged over processes, those of the layers that train alone.

    Takes the place of ``torch.nn.parallel.DistributedDataParallel``, which it holds, and which does
    the reduction. When the optimizer, or anybody else, has frozen or thawed parameters, the next
    forward makes it anew over those that train: frozen ones are in no bucket, and nothing is sent
    for them; ``find_unused_parameters`` is not needed. The weights are not sent again for that.

    * Before a forward whose gradients are reduced or that sends buffers, the processes compare the
      optimizer's step and their ``requires_grad`` flags, in one small message between CPUs. If they
      differ, that is raised in every process, and none waits for another. A forward that one
      process alone makes, to evaluate, is to be the model's own.
    * Buffers are those of the first process, as with ``DistributedDataParallel``. Those of frozen
      modules of a trimmed model, which do not change, are sent once more at the freeze, then not.
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
        self._all_parameters = list(module.parameters())
        self._comm_hooks: list[tuple[Any, Callable[..., Any]]] = []
        _compare(self._description(), self._group)
        init_sync = ddp_keywords.pop("init_sync", True)
        self._ddp_keywords = ddp_keywords
        self._make(init_sync)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``module``'s output; gradients are reduced in the backward.

        Raises:
            RuntimeError: processes differ in the step or in what is frozen.
        """
        reduces = torch.is_grad_enabled() and self.require_backward_grad_sync
        if reduces or self._ddp.will_sync_module_buffers():
            self._follow()
        ddp = self._ddp
        ddp.require_backward_grad_sync = self.require_backward_grad_sync
        return ddp(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, each process adds its gradients up, and none are reduced.

        The backward of the next forward outside of it reduces the sums: put each forward, too,
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

    def _make(self, init_sync: bool) -> None:
        ddp = DistributedDataParallel(self.module, init_sync=init_sync, **self._ddp_keywords)
        if isinstance(self.module, TrimmedModel):  # else they may write in training mode
            ddp.parameters_to_ignore.update(_frozen_buffers(self.module))
            ddp._assign_modules_buffers()
        for state, hook in self._comm_hooks:
            ddp.register_comm_hook(state, hook)
        vars(self)["_held"] = ddp  # a registered child would give each parameter a second name
        self._flags = self._current_flags()

    def _current_flags(self) -> bytes:
        return bytes(map(_requires_grad, self._all_parameters))

    def _follow(self) -> None:
        """Make sure that all processes are at one point, and follow the flags."""
        flags = self._current_flags()
        own = self._optimizer.current_step.to_bytes(8, "little") + flags
        if any(row != own for row in _gather(own, self._group)):
            _compare(self._description(), self._group)
        if flags != self._flags and any(flags):
            if self._ddp.broadcast_buffers and self._ddp.modules_buffers:
                self._ddp._sync_buffers()  # for the last time those of what has frozen
            del vars(self)["_held"]  # with its buckets, and its hooks on the parameters
            self._make(init_sync=False)

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


def _frozen_buffers(network: TrimmedModel) -> set[str]:
    """Names of the buffers that its frozen modules hold."""
    return {
        f"{name}.{own}".lstrip(".")
        for module, name in network.frozen_names().items()
        for own in module._buffers
    }


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
