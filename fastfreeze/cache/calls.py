"""Calls that are put off, the values that they give, and chains of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastfreeze.cache.rows import (
    CannotKeepError,
    Fetched,
    by_sample,
    row_numbers,
    take_rows,
)
from fastfreeze.trimming.bits import hash_rows
from fastfreeze.trimming.pending import LOCAL, Given, Node, Pending, Run, TooLateError, settle

if TYPE_CHECKING:
    from fastfreeze.cache.chain import Chains

_STATIC = (
    *(bool, int, float, str, type(None), slice, type(...)),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)
_LEAVES = (Tensor, *_STATIC)


@dataclass(frozen=True)
class Outcome:
    """What a call gave the last time.

    Attributes:
        metas: shape, dtype and device of each tensor; the number of the argument that it is; None.
        spec: how they are nested.
        keys: keys and idents of such calls, by what the module holds and keys of what goes in.
    """

    metas: tuple[Any, ...]
    spec: TreeSpec
    keys: dict[Any, tuple[str, str]] = field(default_factory=dict)


@dataclass(eq=False)
class Call:
    """A call that has been put off.

    Attributes:
        function: makes it.
        leaves: arguments: nodes, and values that are no tensors.
        spec: how they are nested.
        expected: what it gives.
        key: what it is called, with what, what went in there and what the modules hold; the same
            in every process.
        ident: the same but for what the modules hold.
        index: its place in the forward.
        autocast: as it was where it was called.
        outputs: while they are there.
    """

    function: Callable[..., Any]
    leaves: list[Any]
    spec: Any
    expected: Outcome
    key: str
    ident: str
    index: int
    autocast: Any
    outputs: list[Given | None] | None = None

    def make(self, values: list[Any], reader: Chains) -> list[Any]:
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
        if spec != expected.spec or not all(
            value is values[meta]
            if isinstance(meta, int)
            else meta == meta_of(value) and (value is None or not value.requires_grad)
            for meta, value in zip(expected.metas, outputs, strict=True)
        ):
            reader.forget(expected)
            raise TooLateError
        return outputs


class CallNode(Node):
    """One of the values that a call gives.

    Attributes:
        root: what it is a view of, or itself.
        views: all of this one, in the order in which they were taken.
    """

    __slots__ = ("call", "chains", "i", "ident", "key", "root", "views")

    def __init__(
        self, call: Call, i: int, meta: tuple[Any, ...], chains: Chains, root: CallNode | None
    ) -> None:
        shape, dtype, device = meta
        super().__init__(shape, dtype, device)
        self.call, self.i, self.chains, self.lock = call, i, chains, chains.lock
        self.key, self.ident = f"{call.key}.{i}", f"{call.ident}.{i}"
        self.root, self.views = root or self, list[CallNode]()
        if root is not None:
            root.views.append(self)

    def get(self) -> Tensor:
        self.chains.note(self)
        return super().get()

    def compute(self) -> Tensor:
        return self.chains.read(self)

    def set(self, value: Tensor) -> None:
        """Have this value from now on."""
        self.version, self.value = value._version, value

    def parted(self) -> list[CallNode]:
        """Views that have a value apart from the others' of their group."""
        root = self.root
        return [] if root.value is not None else [v for v in root.views if v.value is not None]


class Outer(Given):
    """A tensor that came from outside, the n-th of the call."""

    __slots__ = ("ident", "key", "number")

    def __init__(self, value: Tensor, number: int) -> None:
        super().__init__(value)
        self.number, self.key = number, f"<{number}>"
        self.ident = self.key


class Chain:
    """The calls behind some nodes.

    Attributes:
        wanted: the nodes.
        keys: of these.
        chains: that they belong to.
        samples: numbers of those in the batch.
        outer: the tensors that go in, by their number.
        nodes: those that are wanted, and all on the way to them, by their keys.
    """

    def __init__(self, wanted: Sequence[CallNode], chains: Chains) -> None:
        self.wanted, self.chains, self.samples = list(wanted), chains, chains.samples
        self.keys = [node.key for node in wanted]
        leaves = [leaf for call in _behind(wanted) for leaf in call.leaves]
        self.outer = {leaf.number: leaf for leaf in leaves if isinstance(leaf, Outer)}
        self.nodes = {n.key: n for n in (*leaves, *wanted) if isinstance(n, CallNode)}

    @cached_property
    def inputs(self) -> list[Tensor]:
        """The tensors that go in, one of them with a row for each sample.

        Raises:
            CannotKeepError: that is not so.
        """
        inputs, n = [self.outer[number].now() for number in sorted(self.outer)], len(self.samples)
        if not any(t.ndim and len(t) == n for t in inputs):
            raise CannotKeepError(f"no tensor with a row for each of {n} samples goes in")
        return inputs

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @cached_property
    def digests(self) -> Fetched:
        """For each sample one number for the bits of all that goes in."""
        n = len(self.samples)
        rows = [t if t.ndim and len(t) == n else t.reshape(1, -1) for t in self.inputs]
        return Fetched(hash_rows(*rows))

    def compute(
        self,
        keep: bool = False,
        rows: Sequence[int] = (),
        given: dict[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """The values of the nodes.

        Args:
            keep: also keep all that is computed on the way, for who reads it later in this step.
            rows: which samples of the inputs to take, as many as there are; empty for all in order.
            given: values of nodes on the way that are known, by their keys.
        """
        given = given or {}
        needed = _behind(self.wanted, given)
        ends = {node.call for node in self.wanted}
        last = {n.call: call for call in needed for n in call.leaves if isinstance(n, CallNode)}
        made: dict[Call, list[Any]] = {}
        run = LOCAL.run or Run(None, None)  # of this thread
        outer, run.keeper = run.keeper, None
        try:
            for call in needed:
                if call.outputs is None:
                    values = [self._value(leaf, made, rows, given) for leaf in call.leaves]
                    made[call] = call.make(values, self.chains)
                else:
                    made[call] = [node and node.there() for node in call.outputs]
                if keep:
                    call.outputs = [None if v is None else Given(v) for v in made[call]]
                for done in [c for c in made if last.get(c) is call and c not in ends]:
                    del made[done]
            return [made[node.call][node.i] for node in self.wanted]
        finally:
            run.keeper = outer

    def _value(
        self, leaf: Any, made: dict[Call, list[Any]], rows: Sequence[int], given: dict[str, Tensor]
    ) -> Any:
        if not isinstance(leaf, Node):
            return leaf
        if isinstance(leaf, CallNode) and leaf.value is None:
            return given[leaf.key] if leaf.key in given else made[leaf.call][leaf.i]
        value, n = leaf.there(), len(rows)
        may_have_rows = value.ndim > 0 and n > 0 and len(value) % n == 0
        if not may_have_rows or (len(value) > n and isinstance(leaf, Outer)):
            return value
        taken = take_rows(by_sample(value, n), row_numbers(rows, value.device))
        return taken if len(value) == n else taken.flatten(0, 1)


def _behind(wanted: Sequence[CallNode], given: dict[str, Tensor] | None = None) -> list[Call]:
    """The calls behind some nodes; not those behind values that are ``given`` or there."""
    found: set[Call] = set()
    queue = [node.call for node in wanted]
    while queue:
        call = queue.pop()
        if call in found:
            continue
        found.add(call)
        nodes = [leaf for leaf in call.leaves if isinstance(leaf, CallNode)]
        queue += [
            n.call for n in nodes if given is None or (n.value is None and n.key not in given)
        ]
    return sorted(found, key=lambda call: call.index)


def flattened(args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    """Arguments in a row, and how they are nested: of most, how many have which name."""
    leaves = [*args, *kwargs.values()]
    if all(isinstance(leaf, _LEAVES) for leaf in leaves):
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
    if type(value) is not Pending or not isinstance(value.node, CallNode):
        return False
    return value.node.value is None


def meta_of(value: Any) -> Any:
    if type(value) is Pending:
        node = value.node
        return node.shape, node.dtype, node.device
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    return None if value is None else type(value)


def is_static(value: Any) -> bool:
    if type(value) is slice:
        return all(type(v) in (int, type(None)) for v in (value.start, value.stop, value.step))
    return type(value) in _STATIC
