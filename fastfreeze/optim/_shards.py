"""Sharded parameters (``DTensor``): the part of each that this process holds, as a plain tensor.

A step is element by element, so that each process updates its own part alone. All of this is
for ``no_grad``. ``DTensor`` is imported where there are some: the import takes a second.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Any, param: Any) -> Any:
    """The part of ``tensor`` that belongs to this process's part of ``param``, in its own memory.

    A ``tensor`` that is whole is sharded as ``param`` is, and a gradient that is placed in another
    way is brought into ``param``'s: all processes must do so together.
    """
    if tensor is None or not is_sharded(param):
        return tensor
    if not is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        tensor = distribute_tensor(tensor, param.device_mesh, param.placements)
    if tensor.placements != param.placements:
        tensor = tensor.redistribute(param.device_mesh, param.placements)
    return tensor.to_local()


def sharded_as(local: Any, param: Any) -> Any:
    """The ``DTensor`` over this memory, placed as ``param`` is; ``local`` itself if it is not."""
    if local is None or not is_sharded(param):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
