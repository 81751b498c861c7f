"""The frozen prefix and the rest of a trimmed graph, as two functions."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from fastfreeze.errors import FastfreezeWarning
from fastfreeze.trim.state import Held, HeldState, preserved, tensors_in
from fastfreeze.graph.cut import Cut, Dataflow, called_name, minds_layout
from fastfreeze.graph.fold import CannotFoldError, Folded, check_unchanged, fold
from fastfreeze.graph.rewrite import Piece, Program, write_piece, write_suffix
from fastfreeze.graph.split import CannotSplitError, draws_random_numbers, find_split, find_stretch
from fastfreeze.graph.trace import Trace
from fastfreeze.trim.compare import excess

Values = tuple[Any, ...]
_MAX_FOLDS = 16


@dataclass(frozen=True)
class Options:
    """How the frozen prefix may run; see :func:`fastfreeze.trim`."""

    fold: bool = True
    dtype: torch.dtype | None = None
    max_error: float = 0.0
    compile_prefix: bool = False

    @property
    def faster(self) -> bool:
        """Whether anything is to be done to the prefix."""
        return self.fold or self.dtype is not None or self.compile_prefix


class Part:
    """Frozen nodes in eval mode: as they are, or in a faster form that gives the same.

    Attributes:
        unfolded: why the nodes run as they are; empty if in the faster form, or not known yet.
        held: what they compute with.
    """

    def __init__(self, piece: Piece, options: Options, contiguous: bool) -> None:
        self.unfolded = "" if options.faster else "asked for by fold=False"
        self.held = _held_by(piece)
        self._piece, self._model = piece, piece.flow.model
        self._options, self._contiguous = options, contiguous
        self._fast: Folded | None = None
        self._num_folds = 0
        self._compared_run: tuple[list[Any], Values] | None = None  # what the comparison gave

    @cached_property
    def _plain(self) -> Program:
        return write_piece(self._piece)

    def __call__(self, values: Sequence[Any], *, fold: bool = True) -> Values:
        """The results' values, without autograd, for the call's tensors and the values given."""
        with torch.no_grad():
            if not (fold and self.prepare(values, None)):
                return self._run_plain(values)
            assert self._fast is not None
            compared, self._compared_run = self._compared_run, None
            if compared and all(a is b for a, b in zip(compared[0], values, strict=True)):
                return compared[1]
            return self._run_fast(self._fast, values)

    def forget(self) -> None:
        """Give up the faster form, unless it is compiled; it is made again with the next call."""
        if not self._options.compile_prefix:
            self._fast = None

    def prepare(self, values: Sequence[Any], expected: Values | None) -> bool:
        """Whether the faster form is to run; it is made and compared if need be.

        Args:
            expected: what the nodes give as they are; None to run them for it.
        """
        if self.unfolded or autocasts(values):
            return False
        if self._fast is not None and self._fast.fits():
            return self._fast.has_weights or self.held.states() is not None
        if self.held.states() is None:
            return False
        if expected is None:
            with preserved(self._model):
                expected = self._run_plain(values)
        if not all(map(_is_finite, tensors_in(expected))):
            return False  # nothing to compare by; the next call may do
        try:
            self._fast = self._compared(values, expected)
        except CannotFoldError as error:
            self.unfolded, self._fast = str(error), None
        return not self.unfolded

    def _compared(self, values: Sequence[Any], expected: Values) -> Folded:
        """The faster form, if it gives the same; or CannotFoldError."""
        self._num_folds += 1
        if self._num_folds > _MAX_FOLDS:
            raise CannotFoldError("its weights change again and again")
        with torch.inference_mode(False), torch.no_grad():
            fast = self._faster()
        try:
            with preserved(self._model):
                found = self._run_fast(fast, values)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if self._options.compile_prefix:
                raise RuntimeError(f"the frozen prefix cannot be compiled: {text}") from error
            raise CannotFoldError(text) from error
        self._judge(excess(found, expected, self._options.max_error))
        self._compared_run = list(values), found
        return fast

    def _judge(self, times: float) -> None:
        """CannotFoldError if values change by too many times what they may."""
        dtype, bound = self._options.dtype, self._options.max_error
        if dtype is None:
            check_unchanged(times)
        if times <= 1:
            return
        text = f"{dtype} changes values by {times * bound:.1e}, max_error is {bound:.1e}"
        warnings.warn(
            f"the frozen prefix keeps its dtype: {text}", FastfreezeWarning, stacklevel=12
        )
        raise CannotFoldError(text)

    def _faster(self) -> Folded:
        fast = self._folded()
        if self._options.compile_prefix:
            function = torch.compile(fast.program.function, fullgraph=True)
            fast.program = replace(fast.program, function=function)
        return fast

    def _folded(self) -> Folded:
        if self._options.fold:
            try:
                return fold(self._piece, self._options.dtype)
            except CannotFoldError:
                if self._options.dtype is None and not self._options.compile_prefix:
                    raise
        return Folded(self._plain, [])

    def _run_plain(self, values: Sequence[Any]) -> Values:
        result: Values = self._plain(self._model, values)
        return result

    def _run_fast(self, fast: Folded, values: Sequence[Any]) -> Values:
        result = self._run_in_dtype(fast, values)
        if not self._contiguous:
            return result
        contiguous: Values = tree_map(
            lambda v: v.contiguous() if isinstance(v, Tensor) else v, result
        )
        return contiguous

    def _run_in_dtype(self, fast: Folded, values: Sequence[Any]) -> Values:
        dtype = self._options.dtype
        if dtype is None:
            result: Values = fast.program(self._model, values)
            return result
        with torch.autocast(_device_type(values), dtype, cache_enabled=False):
            result = fast.program(self._model, values)
        pairs = zip(result, self._piece.results, strict=True)
        return tuple(_like(value, self._piece.metas.get(node.name)) for value, node in pairs)


class Prefix:
    """What runs first under a cut, for one way of calling the model, and what runs on its values.

    Attributes:
        flow: of the graph.
        split: the nodes, and what crosses.
        inputs: which of the call's tensors the prefix reads.
        suffix: the model's output from the call's tensors and the values that cross.
    """

    def __init__(
        self,
        trace: Trace,
        model: nn.Module,
        cut: Cut,
        metas: Mapping[str, Any],
        options: Options,
    ) -> None:
        self.flow = flow = Dataflow(trace.graph, model)
        self.split = split = find_split(flow, cut, metas)
        self._metas, self._options = dict(metas), options
        self._contiguous = gain_by_channels_last(flow, split.rest, metas) < 0
        self._part = self._part_of(split.prefix, ())
        self.suffix = write_suffix(trace.graph, cut, split)
        self._stretches: dict[Prefix, Part] = {}
        self._key: tuple[HeldState, str] | None = None
        places = [node for node in trace.graph.nodes if node.op == "placeholder"]
        read = {i for node in split.prefix for i in node.all_input_nodes}
        self.inputs = tuple(i for i, node in enumerate(places) if node in read)

    def __str__(self) -> str:
        split, names = self.split, ", ".join(node.name for node in self.split.crossing)
        text = f"{len(split.prefix)} nodes run first, "
        text += f"as they are ({self.unfolded})" if self.unfolded else "folded"
        text += f"; crossing: {names}, {split.nbytes / 2**20:.2f} MiB"
        return text + (f"; {len(split.recomputed)} run again" if split.recomputed else "")

    @property
    def unfolded(self) -> str:
        """Why the prefix runs as it is; empty if its norms are folded."""
        return self._part.unfolded

    def state(self) -> HeldState:
        """What it computes with, as that is now."""
        return HeldState(self._part.held)

    @property
    def key(self) -> str:
        """Digest of all that the crossing values depend on besides the inputs."""
        if self._key is None or not self._key[0].lasts():
            held = self._part.held
            lines = [str(self._options), *(n.format_node() or "" for n in self.split.prefix)]
            lines += [repr(module) for module in held.modules]
            digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=16)
            for tensor in held.tensors():
                digest.update(_bytes_of(tensor))
            self._key = self.state(), digest.hexdigest()
        return self._key[1]

    def run(self, tensors: Sequence[Tensor], *, fold: bool = True) -> Values:
        """The values that cross, for the tensors of a call; without autograd."""
        return self._part(tensors, fold=fold)

    @property
    def comparable(self) -> tuple[fx.Node, ...]:
        """The nodes that cross, if nothing writes to them in place in a run of the whole graph."""
        flow = self.flow
        written = {storage for node in flow.graph.nodes for storage in flow.stores_to(node)}
        crossing = self.split.crossing
        safe = all(written.isdisjoint(flow.storages[node]) for node in crossing)
        return crossing if safe else ()

    def prepare(self, tensors: Sequence[Tensor], seen: Mapping[str, Any]) -> None:
        """Fold, and compare with what a run of the graph has shown, for the tensors of a call."""
        names = [node.name for node in self.split.crossing]
        expected = tuple(seen[name] for name in names) if seen.keys() >= set(names) else None
        with torch.no_grad():
            self._part.prepare(tensors, expected)

    def forget(self) -> None:
        """Give up folded weights; they are made again when the prefix runs."""
        self._part.forget()
        for part in self._stretches.values():
            part.forget()

    def advance(self, earlier: Prefix, tensors: Sequence[Tensor], values: Values) -> Values:
        """The values that cross, from those that crossed under an earlier cut.

        Raises:
            LookupError: ``earlier`` is no earlier cut of the same graph.
        """
        if earlier not in self._stretches:
            if earlier.flow.graph is not self.flow.graph:
                raise LookupError("the cut is that of another graph")
            try:
                nodes = find_stretch(self.flow, earlier.split, self.split)
            except CannotSplitError as error:
                raise LookupError(str(error)) from error
            self._stretches[earlier] = self._part_of(nodes, earlier.split.crossing)
        return self._stretches[earlier]([*tensors, *values])

    def _part_of(self, nodes: Sequence[fx.Node], given: Sequence[fx.Node]) -> Part:
        piece = Piece(self.flow, nodes, given, self.split.crossing, self._metas)
        return Part(piece, self._options, self._contiguous)


def gain_by_channels_last(
    flow: Dataflow, nodes: Sequence[fx.Node], metas: Mapping[str, Any]
) -> float:
    """Whether nodes are faster on channels_last values (> 0), as fast (0), or slower (< 0).

    Convolutions whose weights are in the usual layout reorder them for such values, forward and
    backward. That pays where the weights are fewer than what is computed with them, for a batch of
    32: what the batch really holds must not matter, or a resumed run would not give the same bits.
    What may not work on such values at all counts as slower, and so does what draws a random number
    for each element, in the order in which they lie in memory.
    """
    modules = {n: flow.module(n) for n in nodes if n.op == "call_module"}
    kinds = [type(module).__module__ for module in modules.values()]
    if not all(kind.startswith("torch.nn.modules") for kind in kinds):
        return -math.inf
    if any(map(minds_layout, nodes)):
        return -math.inf
    if any(_may_drop_elements(flow, node, metas.get(node.name)) for node in nodes):
        return -math.inf
    weights = values = 0
    for node, module in modules.items():
        value = metas.get(node.name)
        if isinstance(module, nn.Conv2d) and isinstance(value, Tensor) and len(value):
            if not module.weight.is_contiguous():
                return math.inf
            weights += module.weight.numel()
            values += 32 * value[0].numel()
    return values - weights


def _may_drop_elements(flow: Dataflow, node: fx.Node, value: Any) -> bool:
    """Whether a node is a dropout of images, or draws random numbers of its own."""
    if node.op == "call_module":
        module = flow.module(node)
        name = type(module).__name__ if getattr(module, "p", 1) else ""
    else:
        name = called_name(node) if node.op in ("call_function", "call_method") else ""
    random = "dropout" in name.lower() or name.lower() == "rrelu" or draws_random_numbers(node)
    return random and isinstance(value, Tensor) and value.dim() > 3


def _held_by(piece: Piece) -> Held:
    """What nodes compute with: of a tensor that a node names itself, all that is beside it."""
    found = [n for node in piece.nodes for n in (node, *node.all_input_nodes)]
    paths = [str(n.target) for n in found if n.op == "call_module"]
    paths += [str(n.target).rpartition(".")[0] for n in found if n.op == "get_attr"]
    return Held(piece.flow.model.get_submodule(path) for path in paths)


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().data) if flat.numel() else b""


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _device_type(values: Sequence[Any]) -> str:
    return next((v.device.type for v in values if isinstance(v, Tensor)), "cpu")


def _like(value: Any, meta: Any) -> Any:
    """``value`` in the dtype that was measured."""
    return value.to(meta.dtype) if isinstance(value, Tensor) and isinstance(meta, Tensor) else value


def autocasts(values: Sequence[Any]) -> bool:
    """Whether autocast is on, on a device of a tensor among ``values``."""
    return any(torch.is_autocast_enabled(v.device.type) for v in values if isinstance(v, Tensor))
