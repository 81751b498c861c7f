"""A model's graphs, one for each way of calling it, cut by the present flags."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastfreeze.trim.state import Watch, copied, preserved, tensors_in, unobserved
from fastfreeze.graph.cut import Cut, Dataflow, find_cut, frozen_modules
from fastfreeze.graph.fold import is_cpu_fp32
from fastfreeze.graph.modules import FrozenModules
from fastfreeze.graph.prefix import Options, Prefix, Values, gain_by_channels_last
from fastfreeze.graph.rewrite import Program, write_measured, write_program, write_proof
from fastfreeze.graph.split import CannotSplitError
from fastfreeze.graph.trace import CallPattern, UntraceableError, hooked, is_leaf, trace
from fastfreeze.trim.compare import Observation, difference, observe

_MAX_TRACES = 32
_OF_A_CUT = ("cut", "prefix", "unsplit", "hooked", "_modules", "_programs", "_proven")
Flags = tuple[bool, ...]


class Graphs:
    """What is known of a model's present structure and flags, and its graphs."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        modules = list(model.modules())
        self._model, self._options = model, options
        self._structure = Watch([m._modules for m in modules])
        self._parameters = [m._parameters for m in modules]
        self._opened = [m for m in modules if m is model or not is_leaf(m)]
        self._graphs: dict[CallPattern, TrimmedGraph | str] = {}
        self._latest: CallPattern | None = None
        self._num_traces = 0
        self._frozen_modules: tuple[Flags, FrozenModules] | None = None
        self.flags: Flags = ()

    def outdated(self) -> bool:
        """Whether modules were added, removed or replaced."""
        return self._structure.changed()

    def read_flags(self) -> Flags:
        """Whether each parameter requires grad; True where there is none."""
        return tuple([p is None or p.requires_grad for d in self._parameters for p in d.values()])

    def frozen_modules(self, outermost: CodeType) -> FrozenModules:
        """All modules whose parameters are all frozen, for a model run by code ``outermost``."""
        if self._frozen_modules is None or self._frozen_modules[0] != self.flags:
            modules = [module for _, module in frozen_modules(self._model)]
            self._frozen_modules = self.flags, FrozenModules(modules, outermost)
        return self._frozen_modules[1]

    def graph_for(self, args: Any, kwargs: Any) -> tuple[TrimmedGraph, list[Tensor]]:
        """The graph, cut and compared with the model, for a call; and the call's tensors.

        Raises:
            UntraceableError: there is none.
        """
        pattern, tensors = CallPattern.of(self._model, args, kwargs)
        self._latest = pattern
        graph = self._graph_of(pattern)
        if not graph.compared:
            if problem := graph.compare_with_model(args, kwargs):
                self._graphs[pattern] = f"its graph is not the model: {problem}"
            graph = self._graph_of(pattern)
        return graph, tensors

    def run_untrimmed(self, args: Any, kwargs: Any) -> Any:
        """The model's output, from images in the layout that it is fastest in.

        It is that in which a frozen prefix hands values on: the first freeze does not change it.
        """
        graph = self._graph_of_images(args, kwargs)
        if graph is None or not graph.takes_channels_last:
            return self._model(*args, **kwargs)
        args, kwargs = _in_channels_last((args, kwargs))
        return graph.laid_out(self._model(*args, **kwargs))

    def _graph_of_images(self, args: Any, kwargs: Any) -> TrimmedGraph | None:
        """The graph, whatever the modules' hooks, of a call whose images could be laid out."""
        if not (self._options.fold and any(map(_may_be_images, tensors_in((args, kwargs))))):
            return None
        try:
            graph = self._graphs.get(CallPattern.of(self._model, args, kwargs)[0])
            if isinstance(graph, TrimmedGraph) and graph.compared and not graph.outdated():
                return graph
            return self.graph_for(args, kwargs)[0]
        except UntraceableError:
            return None

    def latest_graph(self) -> TrimmedGraph:
        return self._graph_of(self._latest or _plainest_pattern(self._model))

    def refuse(self, graph: TrimmedGraph, reason: str) -> None:
        """Go without ``graph`` from now on."""
        self._graphs[graph.pattern] = reason

    def _graph_of(self, pattern: CallPattern) -> TrimmedGraph:
        if name := hooked(self._opened):
            raise UntraceableError(f"{name} has hooks, which its graph would not call")
        known = self._graphs.get(pattern)
        if known is None or (isinstance(known, TrimmedGraph) and known.outdated()):
            known = self._graphs[pattern] = self._traced(pattern)
        if isinstance(known, str):
            raise UntraceableError(known)
        known.cut_for(self.flags)
        return known

    def _traced(self, pattern: CallPattern) -> TrimmedGraph | str:
        if self._num_traces == _MAX_TRACES:
            return f"more than {_MAX_TRACES} ways of calling it, or changes of its attributes"
        self._num_traces += 1
        try:
            return TrimmedGraph(self._model, pattern, self._options)
        except UntraceableError as error:
            return str(error)


class TrimmedGraph:
    """A model's graph for one way of calling it, with the programs for the present cut.

    Attributes:
        cut: set by :meth:`cut_for`.
        compared: whether the graph has been found to compute what the model does.
        prefix: what runs first under this cut, once that is proven; None where it has no part that
            can run on its own.
        unsplit: why there is no prefix.
        takes_channels_last: whether channels_last images make it faster, and give the same.
        hooked: whether modules have hooks. These may do anything, in any call, and are called no
            more often than the model: such a graph runs with autograd on, and is looked at.
    """

    cut: Cut

    def __init__(self, model: nn.Module, pattern: CallPattern, options: Options) -> None:
        self.pattern = pattern
        self.compared = False
        self.prefix: Prefix | None = None
        self.unsplit = ""
        self.hooked = False
        self.takes_channels_last = False
        self._contiguous_outputs: list[bool] = []  # of the model's output, as it gives it
        self._model, self._options = model, options
        self._trace = trace(model, pattern)
        self._metas: dict[str, Any] = {}
        self._flags: Flags | None = None
        self._compiled: dict[Flags | None, dict[str, Any]] = {}
        self._hooks = self._watch_hooks()

    def outdated(self) -> bool:
        return self._trace.stale()

    def cut_for(self, flags: Flags) -> None:
        """Move the cut to where these ``requires_grad`` flags put it."""
        if flags == self._flags:
            return
        if self.prefix is not None:
            self.prefix.forget()
        self._flags = flags
        if flags in self._compiled:
            vars(self).update(self._compiled[flags])
            return
        self.cut = find_cut(self._trace, self._model)
        modules = [self._model.get_submodule(name) for name in self.cut.modules]
        self._modules = FrozenModules(modules, TrimmedGraph._execute.__code__)
        self._programs: dict[bool, Program] = {}
        self._proven, self.prefix = False, None

    def prove(self, tensors: list[Tensor]) -> str:
        """What the cut does not know of, in words; empty if nothing.

        A new cut is run once with autograd left on, for nothing but this, and then split. What the
        run does to buffers and random numbers is undone.
        """
        if self._hooks.changed():
            self._hooks, self._proven, self._compiled = self._watch_hooks(), False, {}
        if self._proven:
            return ""
        self.prefix, self.unsplit = None, ""
        name = hooked(self._model.modules())
        self.hooked = bool(name)
        if self.hooked:
            self.unsplit = f"{name} has hooks"
            return ""
        prefix = self._split()
        proof = write_proof(self._trace, self.cut, prefix.comparable if prefix else ())
        with preserved(self._model), unobserved():
            self._execute(proof, copied(tensors))
        if proof.escaped:
            return proof.escaped[0]
        self._proven, self.prefix = True, prefix
        if prefix is not None:
            prefix.prepare(tensors, proof.values)
        return ""

    def _split(self) -> Prefix | None:
        try:
            return Prefix(self._trace, self._model, self.cut, self._metas, self._options)
        except CannotSplitError as error:
            self.unsplit = str(error)
            return None

    @property
    def compiled(self) -> bool:
        """Whether what trains under the present cut is compiled."""
        return self._flags in self._compiled

    def compile(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put ``compiled`` of its function in the place of what trains under the present cut.

        It is there again whenever the cut comes back.
        """
        program = self.prefix.suffix if self.prefix else self._program(detach=True)
        program = replace(program, function=compiled(program.function))
        if self.prefix:
            self.prefix.suffix = program
        else:
            self._programs[True] = program
        self._compiled[self._flags] = {name: vars(self)[name] for name in _OF_A_CUT}

    def run_attached(self, tensors: list[Tensor]) -> tuple[Any, list[str]]:
        """The output with autograd on in the prefix, and what the cut does not know of."""
        program = self._program(detach=False)
        program.escaped.clear()
        return self._execute(program, tensors), program.escaped

    def run(self, tensors: list[Tensor]) -> Any:
        """The output, once the cut is proven."""
        if self.prefix is None:
            return self._execute(self._program(detach=True), tensors)
        return self.finish(tensors, self.prefix.run(tensors))

    def finish(self, tensors: list[Tensor], values: Values) -> Any:
        """The output from the tensors of a call and what the prefix made of them."""
        assert self.prefix is not None
        return self.laid_out(self._execute(self.prefix.suffix, [*tensors, *values]))

    def laid_out(self, output: Any) -> Any:
        """The output, contiguous where the model gives it so: its user may take views of it."""
        flags = iter(self._contiguous_outputs)
        return tree_map_only(Tensor, lambda t: t.contiguous() if next(flags, False) else t, output)

    def compare_with_model(self, args: Any, kwargs: Any, *, backward: bool = False) -> str:
        """What the graph, not trimmed, computes differently from the model; or empty."""
        plain = write_measured(self._trace)
        expected = self._observe(lambda a, k: self._model(*a, **k), args, kwargs, backward)
        try:
            found = self._observe(
                lambda a, k: plain(self._model, self._tensors(a, k)), args, kwargs, backward
            )
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        self._metas = plain.values
        if not self.compared:  # else the layout is known
            self.compared = True
            self._contiguous_outputs = [
                t is not None and t.is_contiguous() for t in expected.output.values()
            ]
            self.takes_channels_last = self._gains_by_channels_last() and not self._minds_layout(
                args, kwargs, expected
            )
        return difference(found, expected)

    def _gains_by_channels_last(self) -> bool:
        flow = Dataflow(self._trace.graph, self._model)
        nodes = list(flow.graph.nodes)
        written = {storage.op for node in nodes for storage in flow.stores_to(node)}
        fits = self._options.fold and "placeholder" not in written
        return fits and gain_by_channels_last(flow, nodes, self._metas) > 0

    def _minds_layout(self, args: Any, kwargs: Any, expected: Observation) -> bool:
        """Whether the model gives something else on channels_last images, or fails."""
        args, kwargs = _in_channels_last((args, kwargs))
        try:
            found = self._observe(lambda a, k: self._model(*a, **k), args, kwargs, False)
        except Exception:  # of whatever kind: it keeps the layout that it was written for
            return True
        return bool(difference(found, replace(expected, gradient={})))

    def compare(self, args: Any, kwargs: Any) -> str:
        """What the trimmed graph computes differently from the model; or empty."""
        if problem := self.compare_with_model(args, kwargs, backward=True):
            return problem

        def observed(run: Callable[[list[Tensor]], Any]) -> Observation:
            return self._observe(lambda a, k: run(self._tensors(a, k)), args, kwargs, True)

        attached = observed(lambda tensors: self.run_attached(tensors)[0])
        detached = observed(lambda tensors: self._execute(self._program(detach=True), tensors))
        if problem := difference(detached, attached) or self.prove(self._tensors(args, kwargs)):
            return problem
        if (prefix := self.prefix) is None:
            return ""
        split = observed(lambda tensors: self.finish(tensors, prefix.run(tensors, fold=False)))
        return difference(split, attached)

    def _observe(
        self, run: Callable[[Any, Any], Any], args: Any, kwargs: Any, backward: bool
    ) -> Observation:
        return observe(self._model, lambda: run(*copied((args, kwargs))), backward=backward)

    def _tensors(self, args: Any, kwargs: Any) -> list[Tensor]:
        return CallPattern.of(self._model, args, kwargs)[1]

    def _program(self, *, detach: bool) -> Program:
        if detach not in self._programs:
            self._programs[detach] = write_program(self._trace, self.cut, detach=detach)
        return self._programs[detach]

    def _execute(self, program: Program, tensors: list[Tensor]) -> Any:
        if not self.cut.modules:
            return program(self._model, tensors)
        with self._modules.in_eval():
            return program(self._model, tensors)

    def _watch_hooks(self) -> Watch:
        """Hooks of the modules that are nodes; they may do anything."""
        hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in self._model.modules()]
        return Watch([d for pair in hooks for d in pair])


def _may_be_images(tensor: Tensor) -> bool:
    """Whether it has the shape of images, in another layout than channels_last."""
    if tensor.dim() != 4 or not is_cpu_fp32(tensor):
        return False
    return not tensor.is_contiguous(memory_format=torch.channels_last)


def _in_channels_last(arguments: tuple[Any, Any]) -> tuple[Any, Any]:
    def laid_out(tensor: Tensor) -> Tensor:
        if not _may_be_images(tensor):
            return tensor
        return tensor.contiguous(memory_format=torch.channels_last)

    found: tuple[Any, Any] = tree_map_only(Tensor, laid_out, arguments)
    return found


def _plainest_pattern(model: nn.Module) -> CallPattern:
    """A call with one tensor for each argument without a default."""
    parameters = inspect.signature(model.forward).parameters.values()
    given = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    args = tuple(torch.empty(0) for p in given if p.kind is not p.KEYWORD_ONLY)
    kwargs = {p.name: torch.empty(0) for p in given if p.kind is p.KEYWORD_ONLY}
    return CallPattern.of(model, args, kwargs)[0]
