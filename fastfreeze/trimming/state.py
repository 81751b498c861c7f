"""Tensors in what models are given and give, and what is noticed of the calls around them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function
from torch.utils import checkpoint

# Attributes of a module that hold its hooks.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def requires_grad(value: Any) -> bool:
    """Whether a tensor in ``value`` requires grad."""
    return any(tensor.requires_grad for tensor in tensors_in(value))


def fp32_precision(device: torch.device) -> tuple[str, str, str]:
    """In what torch computes convolutions, matrix products and recurrent layers of fp32.

    "tf32" or "bf16"; in fp32 where it is another word.
    """
    # One by one: asked for all at once, torch raises where they have been set one by one.
    backends, on_gpu = torch.backends, device.type == "cuda"
    library = backends.cudnn if on_gpu else backends.mkldnn
    products = (backends.cuda if on_gpu else backends.mkldnn).matmul
    return tuple(x.fp32_precision for x in (library.conv, products, library.rnn))


def is_run_again(outermost: CodeType) -> bool:
    """Whether a call between here and the function of code ``outermost`` is checkpointed.

    Or in a custom autograd function, which may be a checkpoint of its own.
    """
    files = checkpoint.__file__, function.__file__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not outermost:
        if frame.f_code.co_filename in files:
            return True
        frame = frame.f_back
    return False
