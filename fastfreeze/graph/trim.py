"""A model whose frozen prefix stays as it is and costs no backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from fastfreeze.errors import FastfreezeWarning
from fastfreeze.execution import arguments
from fastfreeze.trim.state import copied, preserved, requires_grad
from fastfreeze.graph.ahead import Ahead
from fastfreeze.graph.call import Call
from fastfreeze.graph.cut import Cut, find_module_cut
from fastfreeze.graph.graphs import Graphs, TrimmedGraph
from fastfreeze.graph.prefix import Options
from fastfreeze.graph.trace import UntraceableError
from fastfreeze.trim.compare import difference, observe

_Batch = TypeVar("_Batch")
_END: Any = object()

_NOT_FROM_OUTSIDE = (
    "a trimmed model cannot be compiled from outside, where a moved cut would be missed: use "
    "fastfreeze.compile_stages(network, plan, inputs), and no torch.compile around its call"
)
_RESET_NORMS = (
    "runs untrimmed while torch's update_bn estimates the statistics of all norms, which it has "
    "reset in frozen layers too; fastfreeze.ensemble.reestimate_norms(network.model, batches, "
    "snapshot=...) leaves these alone"
)
_UNCOMPILED = (
    "runs uncompiled: compile_stages has compiled no stage with these requires_grad flags, called "
    "in this way"
)


def trim(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    fold: bool = True,
    dtype: torch.dtype | None = None,
    max_error: float = 0.01,
    compile_prefix: bool = False,
) -> TrimmedModel:
    """A module that computes as ``model`` does, and leaves what is frozen alone.

    In training mode the *frozen prefix* runs under ``no_grad``, with its norms and dropouts in eval
    mode, and what it hands on is detached: autograd covers the rest only. The frozen prefix is
    whatever does not depend on a parameter that requires grad. See :class:`TrimmedModel`.

    Args:
        model: is shared, not copied: its parameters, buffers, submodules and training mode.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
            With them the model is traced at once, or it is announced that it cannot be; without,
            when it is first called while something is frozen.
        fold: run the prefix in its fastest form: norms folded into convolutions, channels_last. It
            is compared with the prefix as it is when the cut moves, and used if no value differs by
            more than the square root of its dtype's epsilon (of TF32's or bf16's where torch may
            take that), relative to the tensor's greatest element. Without, the prefix computes bit
            for bit as in eval mode.
        dtype: ``torch.bfloat16`` or ``torch.float16``, for the prefix to run in (under autocast,
            and with folded weights of that dtype); what it hands on is in the model's own dtype.
        max_error: > 0; of a ``dtype``: by how much values may differ, relative to the tensor's
            greatest element, in the comparison when the cut moves. Where they differ by more the
            prefix keeps its own dtype, and that is announced.
        compile_prefix: also give the prefix to :func:`torch.compile`, whenever the cut moves: for
            long trainings on a GPU. See :func:`fastfreeze.compile_stages` for what trains.

    Raises:
        TypeError: ``model`` is no module or is trimmed already, or ``example_inputs`` or ``dtype``
            is of another type than those above.
        ValueError: ``model`` has lazy parameters that are not initialized yet, or ``max_error`` is
            not as above.
        RuntimeError: later, in a call: the prefix was to be compiled and cannot be.

    Warns:
        FastfreezeWarning: the model cannot be traced with ``example_inputs``.
    """
    if not isinstance(model, nn.Module) or isinstance(model, TrimmedModel):
        raise TypeError(f"model must be an untrimmed torch.nn.Module, got {type(model).__name__}")
    if any(map(is_lazy, model.parameters())):
        raise ValueError("model must be initialized, but it has lazy parameters: run it once")
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype must be torch.bfloat16, torch.float16 or None, got {dtype}")
    if not max_error > 0:
        raise ValueError(f"max_error must be > 0, got {max_error}")
    options = Options(fold, dtype, max_error if dtype else 0.0, compile_prefix)
    trimmed = TrimmedModel(model, options)
    if example_inputs is None:
        return trimmed
    args, kwargs = arguments("example_inputs", example_inputs)
    if reason := trimmed.trace(*args, **kwargs):
        trimmed._announce(reason, stacklevel=3)
    return trimmed


class TrimmedModel(nn.Module):
    """A model that follows its ``requires_grad`` flags; made by :func:`trim`.

    It holds the very parameters, buffers and submodules of ``model``, under the same names: state
    dicts interchange, and what is done to the one is done to the other. ``model`` itself stays
    untouched: nothing in it is replaced, and modules' ``training`` flags change only while they are
    called.

    * In eval mode of ``model``, and while nothing is frozen, ``model`` itself runs; in training
      its images are in channels_last, where :func:`trim` is to fold and that is faster (on a CPU,
      if there are more values than weights).
    * Otherwise its graph runs, cut where the present flags put it (:attr:`cut`). A node of the
      frozen prefix is in eval mode if it holds a frozen parameter, or comes before or after one
      that does; a dropout in front of a part that trains is not. Norms keep their statistics
      bit for bit. A ``train()`` in between changes none of this.
    * What of the prefix depends on the inputs alone runs first, in the form that :func:`trim` was
      asked for, and hands over the fewest bytes that the rest can be computed from; norms,
      activations and the like may run again for that (:attr:`prefix`). The weights it was folded
      from are watched; writes through ``.data`` into their memory, which PyTorch does not count,
      go unnoticed.
    * If an input requires grad, or a module has hooks, autograd stays on in the prefix, and it is
      not run first.
    * While ``torch.optim.swa_utils.update_bn`` estimates statistics anew, which it resets in frozen
      norms too, ``model`` itself runs, and that is announced.
    * ``torch.compile`` does not take it; :func:`fastfreeze.compile_stages` compiles what trains.
    * A model without a graph is announced by a :class:`~fastfreeze.errors.FastfreezeWarning` and
      trimmed at module level: a module whose parameters are all frozen runs in eval mode, with
      all that is in it, where none of its inputs requires grad (under ``no_grad`` that is
      everywhere). Norms and dropouts that have no parameters and are in no such module keep
      their mode. If an input of the model requires grad, ``model`` itself runs.

    The first call of each kind traces the model, which is for one thread alone, and runs it once
    more, and its graph, to compare them; the first under each cut runs the cut graph and its
    prefix. What that does to buffers and random numbers is undone. A forward's Python runs when the
    graph is made and not again, except in modules without submodules: it is made again when an
    attribute that was read has changed, but globals count as constant, and ``if self.training``
    stays as it is in a prefix. Functions that take ``training`` as an argument are switched off
    there.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__()
        # The same dictionaries: a registered child would prefix every name.
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            vars(self)[name] = getattr(model, name)
        vars(self)["model"] = model
        self._options = options
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self._norms = [norm for norm in norms if norm.momentum is not None]
        self._graphs: Graphs | None = None
        self._ahead: Ahead | None = None
        self._compiled = False
        self._announced: set[str] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``self.model(*args, **kwargs)``, with the frozen prefix left alone.

        Raises:
            TypeError: it is called from what ``torch.compile`` compiles.
        """
        if torch.compiler.is_dynamo_compiling() or eval_frame.get_eval_frame_callback() is not None:
            raise TypeError(_NOT_FROM_OUTSIDE)
        call = self._begin(args, kwargs, stacklevel=6)
        return call.run() if self._ahead is None else self._ahead.run(call, self._begin)

    def trace(self, *args: Any, **kwargs: Any) -> str:
        """Make the graph for calls like this one ahead of the first; why there is none, or empty.

        Hooks that are put on modules later do not change in what layout such calls run.
        """
        try:
            self._now().graph_for(args, kwargs)
        except UntraceableError as error:
            return str(error)
        return ""

    def ahead(
        self, batches: Iterable[_Batch], inputs: Callable[[Any], Any] = itemgetter(0)
    ) -> Iterator[_Batch]:
        """``batches`` unchanged, with the next one's frozen prefix run during a backward.

        On a GPU it runs in a stream of its own, beside the backward of the part that trains. On
        the CPU, which is busy anyway, it runs after the forward, and nothing is gained. What was
        computed is dropped if the cut moves or a frozen weight changes before it is used.

        Args:
            batches: are asked for one ahead, each in memory of its own, and are on the network's
                device; the network is called once for each.
            inputs: what the network is called with for a batch: a tensor, a tuple of positional
                arguments or a dict of keyword arguments, the very tensors. The batch's first item
                if not given.

        Example:
            >>> for images, labels in network.ahead(batches):
            ...     loss = criterion(network(images), labels)
        """
        self._ahead = Ahead()
        try:
            iterator = iter(batches)
            batch = next(iterator, _END)
            while batch is not _END:
                following = next(iterator, _END)
                self._ahead.following = (
                    None if following is _END else arguments("inputs", inputs(following))
                )
                yield batch
                batch = following
        finally:
            self._ahead = None

    @property
    def cut(self) -> Cut:
        """The cut for the present flags, for the latest way of calling the model.

        Before the first call: for one tensor for each argument without a default.
        """
        graphs = self._now()
        try:
            return graphs.latest_graph().cut
        except UntraceableError as error:
            return find_module_cut(self.model, str(error))

    @property
    def prefix(self) -> str:
        """How the frozen prefix ran in the latest call, and what crossed, in words."""
        try:
            graph = self._now().latest_graph()
        except UntraceableError as error:
            return f"nothing runs first: {error}"
        return str(graph.prefix or f"nothing runs first: {graph.unsplit or 'not called yet'}")

    def verify(self, *args: Any, **kwargs: Any) -> None:
        """Compare with the untrimmed model, in training mode, on these inputs.

        Compared are outputs, buffers and the gradients of all parameters that require grad: of the
        graph with the model, and of the trimmed graph, as a whole and in two parts, with the graph
        whose frozen norms and dropouts are in eval mode; at module level, of the trimmed model with
        the model when hooks put the same modules in eval mode. All runs start from the same random
        numbers. Folding is not part of it: it is compared whenever the cut moves.
        Gradients, buffers, training flags and random number generators are left as they were.

        Raises:
            RuntimeError: they differ by more than rounding: relative to the tensor's greatest
                element, by more than the square root of its dtype's epsilon (of TF32's or
                bf16's where torch may take that). The message names the worst.
        """
        with preserved(self.model):
            if not self.model.training:
                self.model.train()
            graphs = self._now()
            if all(graphs.flags):
                return
            try:
                graph, _ = graphs.graph_for(args, kwargs)
                problem = graph.compare(args, kwargs)
            except UntraceableError:
                problem = self._compare_modules(graphs, args, kwargs)
        if problem:
            raise RuntimeError(f"trimmed {type(self.model).__name__}: {problem}")

    @property
    def training(self) -> bool:
        """The model's own flag, which some frameworks set without a call of ``train``."""
        return self.model.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "model" in vars(self):  # nn.Module sets it before there is one
            self.model.training = mode

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(
                f"{error}; the wrapped model, which may have it, is the attribute .model"
            ) from None

    def train(self, mode: bool = True) -> TrimmedModel:
        self.model.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.model._load_from_state_dict(*args, **kwargs)  # when a parent module loads

    def _apply(self, *args: Any, **kwargs: Any) -> TrimmedModel:
        self.model._apply(*args, **kwargs)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_graphs": None, "_ahead": None, "_compiled": False}

    def _now(self) -> Graphs:
        if self._graphs is None or self._graphs.outdated():
            self._graphs = Graphs(self.model, self._options)
        self._graphs.flags = self._graphs.read_flags()
        return self._graphs

    def _begin(self, args: Any, kwargs: Any, stacklevel: int = 4) -> Call:
        """What a call will do; announcements point ``stacklevel`` frames up."""
        graphs = self._now()
        if untrimmed := self._begin_untrimmed(graphs, args, kwargs, stacklevel):
            return untrimmed
        try:
            graph, tensors = graphs.graph_for(args, kwargs)
            if self._compiled and not graph.compiled:
                self._warn(_UNCOMPILED, stacklevel)
            if not (graph.cut.frozen or graph.cut.modules or graph.compiled):
                return Call(lambda: self.model(*args, **kwargs), str(graph.cut))
            if requires_grad(tensors):
                return Call(lambda: graph.run_attached(tensors)[0], "an input requires grad")
            if problem := graph.prove(tensors):
                graphs.refuse(graph, problem)
                raise UntraceableError(problem)
        except UntraceableError as error:
            self._announce(str(error), stacklevel)
            return Call(lambda: self._run_modules(graphs, args, kwargs), str(error))
        if graph.hooked:
            return Call(lambda: self._run_hooked(graphs, graph, tensors, stacklevel), graph.unsplit)
        return Call(lambda: graph.run(tensors), graph.unsplit, tensors, graph)

    def _begin_untrimmed(
        self, graphs: Graphs, args: Any, kwargs: Any, stacklevel: int
    ) -> Call | None:
        """What a call will do for which the model itself runs; None for others."""
        if not self.model.training:
            return Call(lambda: self.model(*args, **kwargs), "the model is in eval mode")
        if all(graphs.flags) and not self._compiled:
            return Call(lambda: graphs.run_untrimmed(args, kwargs), "nothing is frozen")
        if any(norm.momentum is None for norm in self._norms):
            self._warn(_RESET_NORMS, stacklevel + 1)
            return Call(lambda: self.model(*args, **kwargs), _RESET_NORMS)
        return None

    def _run_hooked(
        self, graphs: Graphs, graph: TrimmedGraph, tensors: list[Tensor], stacklevel: int
    ) -> Any:
        output, escaped = graph.run_attached(tensors)
        if escaped and torch.is_grad_enabled():
            graphs.refuse(graph, escaped[0])
            self._announce(escaped[0], stacklevel + 2)
        return output

    def _run_modules(self, graphs: Graphs, args: Any, kwargs: Any) -> Any:
        if requires_grad((args, kwargs)):
            return self.model(*args, **kwargs)
        with graphs.frozen_modules(TrimmedModel._run_modules.__code__).in_eval():
            return self.model(*args, **kwargs)

    def _compare_modules(self, graphs: Graphs, args: Any, kwargs: Any) -> str:
        frozen = graphs.frozen_modules(TrimmedModel._run_modules.__code__)

        def trimmed() -> Any:
            return self._run_modules(graphs, *copied((args, kwargs)))

        def by_hand() -> Any:
            new_args, new_kwargs = copied((args, kwargs))
            with frozen.replayed():
                return self.model(*new_args, **new_kwargs)

        found = observe(self.model, trimmed, backward=True)
        return difference(found, observe(self.model, by_hand, backward=True))

    def _announce(self, reason: str, stacklevel: int) -> None:
        self._warn(f"is trimmed at module level, not on its graph: {reason}", stacklevel + 1)

    def _warn(self, text: str, stacklevel: int) -> None:
        if text in self._announced:
            return
        self._announced.add(text)
        warnings.warn(
            f"{type(self.model).__name__} {text}", FastfreezeWarning, stacklevel=stacklevel
        )
