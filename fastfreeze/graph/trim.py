"""A model whose frozen prefix stays as it is and costs no backward."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastfreeze.errors import FastfreezeWarning
from fastfreeze.graph._state import copied, preserved, requires_grad
from fastfreeze.graph.cut import Cut, find_module_cut
from fastfreeze.graph.graphs import Graphs
from fastfreeze.graph.modules import EvalForward, frozen_in_eval, replayed
from fastfreeze.graph.trace import UntraceableError
from fastfreeze.graph.verify import difference, observe


def trim(model: nn.Module, example_inputs: Any = None) -> TrimmedModel:
    """A module that computes as ``model`` does, and leaves what is frozen alone.

    In training mode, the *frozen prefix* of the model is run under ``no_grad``, with its norms and
    dropouts in eval mode, and its results are detached. The frozen prefix is everything, in the
    order of execution, before the first parameter that requires grad: see :class:`TrimmedModel`.

    Args:
        model: is shared, not copied: parameters, buffers, submodules and training mode.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments,
            to find out now whether the model can be traced. It is run, without a trace of that
            in it. Default: with the first call in which something is frozen.

    Raises:
        TypeError: ``model`` is no module or already trimmed, or ``example_inputs`` is of another
            type than those above.

    Warns:
        FastfreezeWarning: the model cannot be traced with ``example_inputs``.
    """
    if not isinstance(model, nn.Module) or isinstance(model, TrimmedModel):
        raise TypeError(f"model must be an untrimmed torch.nn.Module, got {type(model).__name__}")
    if any(map(is_lazy, model.parameters())):
        raise ValueError("model must be initialized, but it has lazy parameters: run it once")
    trimmed = TrimmedModel(model)
    if example_inputs is None:
        return trimmed
    try:
        trimmed._now().graph_for(*_arguments(example_inputs))
    except UntraceableError as error:
        trimmed._announce(str(error), stacklevel=3)
    return trimmed


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, dict):
        return (), example_inputs
    raise TypeError(
        "example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword "
        f"arguments, got {type(example_inputs).__name__}"
    )


class TrimmedModel(nn.Module):
    """A model that follows its ``requires_grad`` flags; made by :func:`trim`.

    It holds the model's own submodules, parameters and buffers: their names, and so state dicts,
    are the model's, and what is done to the one is done to the other.

    * In eval mode (of the model), and while no parameter is frozen, the model itself is run.
    * Otherwise its graph is, with the *cut* where the flags put it. Frozen norms and dropouts are
      those in the frozen prefix that hold a frozen parameter, or come before or after such: they
      run in eval mode for as long as they are in it, whatever ``train()`` says. The modules' own
      ``training`` flags change during their call only.
    * If an input requires grad, autograd stays on in the prefix.
    * A model that cannot be traced is announced with :class:`~fastfreeze.errors.FastfreezeWarning`
      and trimmed at module level: a module all of whose parameters are frozen runs in eval mode
      when no input of it requires grad; if an input of the model requires grad, none does.
      Norms and dropouts without parameters keep their mode unless they are inside such a module.

    The first call of each kind runs the model twice more, to compare it with its graph; what that
    does to buffers and random numbers is undone. Python values that a forward reads from anywhere
    but the call's arguments and its modules' attributes are taken as constant.
    """

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # The same dictionaries: a registered child would prefix every name.
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            vars(self)[name] = getattr(model, name)
        vars(self)["model"] = model
        self.training = model.training
        self._graphs: Graphs | None = None
        self._announced: set[str] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``self.model(*args, **kwargs)``, with the frozen prefix left alone."""
        graphs = self._now()
        if not self.model.training or all(graphs.flags):
            return self.model(*args, **kwargs)
        try:
            graph, tensors = graphs.graph_for(args, kwargs)
        except UntraceableError as error:
            self._announce(str(error), stacklevel=5)
            with self._modules_in_eval(args, kwargs):
                return self.model(*args, **kwargs)
        if not (graph.cut.frozen or graph.cut.modules):
            return self.model(*args, **kwargs)
        output = graph.run(tensors)
        if graph.escaped:
            self._announce(graphs.refuse(graph), stacklevel=5)
        return output

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

    def verify(self, *args: Any, **kwargs: Any) -> None:
        """Compare with the untrimmed model, in training mode, on these inputs.

        Compared are outputs, buffers and the gradients of all parameters that require grad: of the
        graph with the model, and of the trimmed graph with the graph whose frozen norms and
        dropouts are in eval mode; at module level, of the trimmed model with the model when hooks
        put the same modules in eval mode. All runs start from the same random numbers.
        Gradients, buffers, training flags and random number generators are left as they were.

        Raises:
            RuntimeError: they differ by more than rounding: relative to the tensor's greatest
                element, by more than the square root of its dtype's epsilon. The message names
                the worst.
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
                problem = self._compare_modules(args, kwargs)
        if problem:
            raise RuntimeError(f"trimmed {type(self.model).__name__}: {problem}")

    def train(self, mode: bool = True) -> TrimmedModel:
        self.model.train(mode)
        self.training = mode
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
        return {**vars(self), "_graphs": None}

    def _now(self) -> Graphs:
        if self._graphs is None or self._graphs.outdated():
            self._graphs = Graphs(self.model)
        self._graphs.flags = self._graphs.read_flags()
        return self._graphs

    def _modules_in_eval(
        self, args: Any, kwargs: Any
    ) -> AbstractContextManager[dict[nn.Module, EvalForward]]:
        if requires_grad((args, kwargs)):
            return nullcontext({})
        return frozen_in_eval(self._now().frozen_modules(), TrimmedModel.forward.__code__)

    def _compare_modules(self, args: Any, kwargs: Any) -> str:
        stand_ins: dict[nn.Module, EvalForward] = {}

        def trimmed() -> Any:
            new_args, new_kwargs = copied((args, kwargs))
            with self._modules_in_eval(new_args, new_kwargs) as used:
                stand_ins.update(used)
                return self.model(*new_args, **new_kwargs)

        def by_hand() -> Any:
            new_args, new_kwargs = copied((args, kwargs))
            with replayed(stand_ins):
                return self.model(*new_args, **new_kwargs)

        found = observe(self.model, trimmed, backward=True)
        return difference(found, observe(self.model, by_hand, backward=True))

    def _announce(self, reason: str, stacklevel: int) -> None:
        if reason in self._announced:
            return
        self._announced.add(reason)
        warnings.warn(
            f"{type(self.model).__name__} is trimmed at module level, not on its graph: {reason}",
            FastfreezeWarning,
            stacklevel=stacklevel,
        )
