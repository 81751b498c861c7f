"""Calls that are put off, the values that they give, and the chains that these make."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastfreeze.cache.rows import CannotKeepError, take_rows
from fastfreeze.trimming.bits import combined, hash_rows
from fastfreeze.trimming.pending import LOCAL, Given, Node, Pending, Run, TooLateError, settle

_STATIC = (
    *(bool, int, float, str, type(None), slice, type(...)),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)


@dataclass(eq=False)
class Outcome:
    """What a call gave the last time."""

    # Of each value: shape, dtype and device; or the number of the argument that it is; or None.
    metas: tuple[Any, ...]
    spec: TreeSpec  # how the values are nested
    repeats: bool = True  # False once such a call gave another form


@dataclass(eq=False)
class Call:
    """A call that has been put off."""

    function: Callable[..., Any]
    leaves: list[Any]  # arguments: nodes, and values that are no tensors
    spec: Any  # how these are nested
    expected: Outcome
    key: str  # of what is called, what goes in, and what modules hold: the same in every process
    ident: str  # the same but for what modules hold
    index: int  # its place in the forward
    autocast: Any  # as it was where it was called
    num_readers: int = 0  # calls that were put off and read what it gives
    held: Sequence[Given | None] = ()  # what it gave, if more than one call or value is of that

    def make(self, values: list[Any]) -> list[Any]:
        """Make it, with the values of its arguments.

        Raises:
            TooLateError: what it gives has another form than the last time.
        """
        args, kwargs = unflattened(values, self.spec)
        with ExitStack() as stack:
            if self.autocast != autocast_state():
                for device, (enabled, dtype) in zip(("cpu", "cuda"), self.autocast, strict=True):
                    stack.enter_context(torch.autocast(device, dtype, enabled))
            outputs, spec = tree_flatten(self.function(*args, **kwargs))
        outputs, expected = [settle(value) for value in outputs], self.expected
        repeats = spec == expected.spec and all(
            value is values[meta]
            if isinstance(meta, int)
            else meta == meta_of(value) and (value is None or not value.requires_grad)
            for meta, value in zip(expected.metas, outputs, strict=True)
        )
        if not repeats:
            expected.repeats = False
            raise TooLateError
        return outputs

    def hold(self, values: Sequence[Tensor | None]) -> None:
        """Keep what it gave for this step, if that is likely to be asked for again."""
        if self.num_readers > 1 or len(values) > 1:
            self.held = [None if value is None else Given(value) for value in values]


class CallNode(Node):
    """One of the values that a call gives.

    Attributes:
        root: what it is a view of, or itself; ``views`` are all of that, as they were taken.
        was_read: whether something has asked for it.
        is_out: whether what has it may write to it; else it waits, though its value may be there.
        is_exact: whether the value that it has is what the call gives, not rounded.
    """

    __slots__ = (
        *("_fill", "call", "i", "ident", "is_exact", "is_out", "key", "root", "views", "was_read"),
    )

    def __init__(
        self,
        call: Call,
        i: int,
        root: CallNode | None,
        fill: Callable[[CallNode], None],
        lock: threading.RLock,
    ) -> None:
        super().__init__(*call.expected.metas[i])
        self.call, self.i, self._fill, self.lock = call, i, fill, lock
        self.key, self.ident = f"{call.key}.{i}", f"{call.ident}.{i}"
        self.was_read, self.is_exact, self.is_out = False, True, False
        self.root, self.views = root or self, list[CallNode]()
        if root is not None:
            root.views.append(self)

    def get(self) -> Tensor:
        self.was_read = True
        value = super().get()
        group = [] if self.root.value is None else [self.root, *self.root.views]
        for node in (self, *group):
            node.is_out = True
        return value

    def look(self) -> Tensor:
        """The value, which waits on."""
        return super().get() if self.value is None else self.there()

    def _set(self) -> None:
        run = LOCAL.run
        with torch.inference_mode(False), nullcontext() if run is None else run.anew():
            self._fill(self)

    def set(self, value: Tensor, is_exact: bool = True) -> None:
        """Have this value from now on."""
        self.version, self.value, self.is_exact = value._version, value, is_exact

    def at_hand(self) -> Tensor | None:
        """What the call gave, if that is there, and was not written to since."""
        own, held = self if self.is_exact else None, self.call.held
        for node in (own, held[self.i] if held else None):
            if node and node.value is not None and node.value._version == node.version:
                return node.value
        return None

    def parted(self) -> list[CallNode]:
        """Views that have a value apart from the others' of their group."""
        root = self.root
        return [] if root.value is not None else [v for v in root.views if v.value is not None]


class Outer(Given):
    """A tensor that came from outside, the n-th of the call; perhaps an input of the model."""

    __slots__ = ("_hashes", "ident", "is_input", "key", "number")

    def __init__(self, value: Tensor, number: int, is_input: bool) -> None:
        super().__init__(value)
        self.number, self.is_input = number, is_input
        self.key = self.ident = f"<{number}>"
        self._hashes: Tensor | None = None

    def hashes(self, n: int) -> Tensor:
        """Of each of ``n`` rows, or of all."""
        if self._hashes is None:
            value = self.now()
            has_rows = value.ndim and len(value) == n
            self._hashes = hash_rows(value if has_rows else value.reshape(1, -1))
        return self._hashes


class Chain:
    """The calls behind the value of a node."""

    def __init__(self, node: CallNode, samples: Sequence[int]) -> None:
        self.node, self.samples = node, samples

    @cached_property
    def _leaves(self) -> list[Any]:
        return [leaf for call in _behind(self.node, lambda _: False) for leaf in call.leaves]

    @cached_property
    def nodes(self) -> dict[str, CallNode]:
        """Those on the way to the node, by their keys."""
        return {leaf.key: leaf for leaf in self._leaves if isinstance(leaf, CallNode)}

    @cached_property
    def outer(self) -> list[Outer]:
        """What goes in, in order."""
        outer = {leaf.number: leaf for leaf in self._leaves if isinstance(leaf, Outer)}
        return [outer[number] for number in sorted(outer)]

    @cached_property
    def inputs(self) -> list[Tensor]:
        """The tensors that go in, one of them with a row for each sample.

        Raises:
            CannotKeepError: that is not so.
        """
        inputs, n = [outer.now() for outer in self.outer], len(self.samples)
        if not any(t.ndim and len(t) == n for t in inputs):
            raise CannotKeepError(f"no tensor with a row for each of {n} samples goes in")
        return inputs

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @cached_property
    def digests(self) -> list[int]:
        """For each sample one number for the bits of all that goes in; a GPU is waited for."""
        hashes = combined([outer.hashes(len(self.samples)) for outer in self.outer])
        on_host = hashes.to("cpu", non_blocking=True)
        if hashes.is_cuda:
            torch.cuda.current_stream(hashes.device).record_event().synchronize()
        numbers: list[int] = on_host.tolist()
        return numbers

    def reads(self, node: CallNode, given: dict[str, Tensor]) -> bool:
        """Whether the value of ``node`` is needed beside those ``given`` and those at hand."""

        def is_there(node: CallNode) -> bool:
            return node.key in given or node.at_hand() is not None

        leaves = [leaf for call in _behind(self.node, is_there) for leaf in call.leaves]
        return not is_there(node) and any(leaf is node for leaf in leaves)

    def compute(self, rows: Sequence[int] = (), given: dict[str, Tensor] | None = None) -> Tensor:
        """The value.

        Args:
            rows: which samples of the inputs to take, as many as there are; empty for all in
                order: then it is computed from values that are there.
            given: values of nodes on the way that are known, by their keys.
        """
        known, value = given or {}, None if rows else self.node.at_hand()
        if value is not None:
            return value

        def is_there(node: CallNode) -> bool:
            return node.key in known or not (rows or node.at_hand() is None)

        needed = _behind(self.node, is_there)
        last = {n.call: call for call in needed for n in call.leaves if isinstance(n, CallNode)}
        made: dict[Call, list[Any]] = {}

        def value_of(leaf: Any) -> Any:
            if isinstance(leaf, Outer):
                return _rows_of(leaf.now(), rows)
            if not isinstance(leaf, CallNode):
                return leaf
            if leaf.key in known:
                return known[leaf.key]
            return made[leaf.call][leaf.i] if leaf.call in made else leaf.at_hand()

        run = LOCAL.run or Run(None, None)  # of this thread
        outer, run.keeper = run.keeper, None
        try:
            for call in needed:
                made[call] = call.make([value_of(leaf) for leaf in call.leaves])
                if not rows:
                    call.hold(made[call])
                for done in [c for c in made if last.get(c) is call]:
                    del made[done]
            made_here: Tensor = made[self.node.call][self.node.i]
            return made_here
        finally:
            run.keeper = outer


def _rows_of(value: Tensor, rows: Sequence[int]) -> Tensor:
    """Some samples of a tensor that came from outside; all where it has no row for each."""
    if not (rows and value.ndim and len(value) == len(rows)):
        return value
    return take_rows(value, rows)


def _behind(node: CallNode, is_there: Callable[[CallNode], bool]) -> list[Call]:
    """The calls behind a node, but for those of values that are there, in order."""
    found = {node.call}
    queue = [node.call]
    while queue:
        for leaf in queue.pop().leaves:
            is_new = isinstance(leaf, CallNode) and leaf.call not in found
            if is_new and not is_there(leaf):
                found.add(leaf.call)
                queue.append(leaf.call)
    return sorted(found, key=lambda call: call.index)


def flattened(args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    """Arguments in a row, and how they are nested: of most, how many have which name."""
    leaves = [*args, *kwargs.values()]
    if all(isinstance(leaf, (Tensor, *_STATIC)) for leaf in leaves):
        return leaves, (len(args), *kwargs)
    return tree_flatten((args, kwargs))


def unflattened(leaves: Sequence[Any], spec: Any) -> Any:
    if isinstance(spec, TreeSpec):
        return tree_unflatten(leaves, spec)
    n, *names = spec
    return leaves[:n], dict(zip(names, leaves[n:], strict=True))


def autocast_state() -> tuple[Any, ...]:
    return tuple(
        [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    )


def is_put_off(value: Any) -> bool:
    """Whether something is the value of a call that nobody has read yet."""
    return type(value) is Pending and isinstance(value.node, CallNode) and not value.node.is_out


def meta_of(value: Any) -> Any:
    if type(value) is Pending:
        value = value.node
    elif not isinstance(value, Tensor):
        return None if value is None else type(value)
    return value.shape, value.dtype, value.device


def is_static(value: Any) -> bool:
    if type(value) is slice:
        return all(type(v) in (int, type(None)) for v in (value.start, value.stop, value.step))
    return type(value) in _STATIC
