"""What runs when: a model's modules and parameters in the order of one execution.

The order comes from a run on example inputs, or from the graph that torch.fx traces. Either gives
:class:`Event` s, from which :mod:`fastfreeze.freezing` makes layers.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class Event:
    """A module started to run, or one of its operations read a parameter.

    Attributes:
        module: the innermost module that was running.
        parameter: the parameter that was read, None where a module started.
        upstream: bits of the trainable parameters on which the operations up to the next event
            depend.
        forward_flops, backward_flops: of the operations up to the next event.
    """

    module: str
    parameter: str | None = None
    upstream: int = 0
    forward_flops: int = 0
    backward_flops: int = 0


def parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def gradient_bits(model: nn.Module) -> dict[str, int]:
    """A bit for each parameter that requires a gradient, 0 for the others."""
    return {
        name: 1 << k if p.requires_grad else 0
        for k, (name, p) in enumerate(model.named_parameters())
    }


class _Recorder(TorchDispatchMode):
    """Records the events of one run, and follows which parameters each tensor depends on."""

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events = [Event("")]
        self._counter = counter
        self._running = [""]
        self._names = parameter_names(model)
        self._bits = gradient_bits(model)
        self._upstream = WeakTensorKeyDictionary()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Within the context, the model's modules tell when they start and return."""

        def returned(*_: Any) -> None:
            self._running.pop()

        with ExitStack() as hooks:
            for name, module in model.named_modules():

                def started(*_: Any, name: str = name) -> None:
                    self._running.append(name)
                    self.events.append(Event(name))

                before = module.register_forward_pre_hook(started)
                hooks.callback(before.remove)
                after = module.register_forward_hook(returned, always_call=True)
                hooks.callback(after.remove)
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        upstream = matrices = 0
        for tensor in tensors:
            bits = self._upstream.get(tensor, 0)
            name = self._names.get(id(tensor))
            if name is not None:
                self.events.append(Event(self._running[-1], name))
                bits = self._bits[name]
            upstream |= bits
            matrices += bits != 0 and tensor.ndim >= 2
        before = self._counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        flops = self._counter.get_total_flops() - before
        event = self.events[-1]
        event.upstream |= upstream
        event.forward_flops += flops
        event.backward_flops += flops * min(matrices, 2)
        for result in tree_leaves(out):
            if isinstance(result, torch.Tensor):
                self._upstream[result] = self._upstream.get(result, 0) | upstream
        return out


def arguments(name: str, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with, of the argument ``name`` that says so."""
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, tuple):
        return inputs, {}
    if isinstance(inputs, dict):
        return (), inputs
    raise TypeError(
        f"{name} must be a tensor, a tuple of positional arguments or a dict of keyword "
        f"arguments, got {type(inputs).__name__}"
    )


def run_events(model: nn.Module, example_inputs: Any) -> list[Event]:
    """The events of a run on the inputs."""
    args, keywords = arguments("example_inputs", example_inputs)
    with ExitStack() as stack:
        stack.enter_context(_left_as_found(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())  # the FLOP counter's hooks are short-lived
        warnings.filterwarnings("ignore", "Using `torch.compile.* global hooks")
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):  # fused, they are not counted
            mkldnn = torch.backends.mkldnn
            stack.enter_context(mkldnn.flags(enabled=False, allow_tf32=mkldnn.allow_tf32))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        args, keywords = tree_map_only(torch.Tensor, lambda x: x.detach().clone(), (args, keywords))
        recorder = _Recorder(model, stack.enter_context(FlopCounterMode(display=False)))
        stack.enter_context(recorder.watching(model))
        stack.enter_context(recorder)
        try:
            model(*args, **keywords)
        except Exception as error:
            raise ValueError(
                f"model does not run on example_inputs in training mode (single modules in eval "
                f"mode): {type(error).__name__}: {error}"
            ) from error
    return recorder.events


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Training mode without its traces: afterwards modules, buffers and generators are as before.

    Only modules with submodules are in training mode: they decide what runs, while a norm in
    training mode would refuse a batch of one.
    """
    found = [(module, dict(vars(module))) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
            for module, attributes in found:
                vars(module)["training"] = any(True for _ in module.children())
                vars(module)["_buffers"] = {
                    name: None if buffer is None else buffer.clone()
                    for name, buffer in attributes["_buffers"].items()
                }
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, attributes in found:
            vars(module).clear()
            vars(module).update(attributes)


def graph_events(model: nn.Module) -> list[Event]:
    """The events in the order of the model's graph, without FLOPs."""
    try:
        with _left_as_found(model):
            graph = fx.Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"the order of the model's layers needs example_inputs: torch.fx cannot trace "
            f"{type(model).__name__} ({type(error).__name__}: {error})"
        ) from error
    names, bits = parameter_names(model), gradient_bits(model)
    events = [Event("")]
    upstream: dict[fx.Node, int] = {}
    owned = dict(model.named_parameters(remove_duplicate=False))
    attributes: dict[fx.Node, str] = {}
    for node in graph.nodes:
        target, module, read = str(node.target), _module_of(node), []
        if node.op == "get_attr" and target in owned:
            attributes[node] = names[id(owned[target])]
        elif node.op == "call_module":
            module = target
            events.append(Event(module))
            read = [names[id(p)] for p in model.get_submodule(target).parameters()]
        read += [attributes[n] for n in node.all_input_nodes if n in attributes]
        events += [Event(module, name) for name in read]
        upstream[node] = reduce(or_, (upstream[n] for n in node.all_input_nodes), 0)
        upstream[node] |= reduce(or_, (bits[name] for name in read), 0)
        events[-1].upstream |= upstream[node]
    return events


def _module_of(node: fx.Node) -> str:
    """Name of the innermost module whose forward made the node."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""
