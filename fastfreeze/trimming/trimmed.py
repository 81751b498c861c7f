"""A model whose frozen modules stay as they are and cost as little as possible."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from fastfreeze.errors import FastfreezeWarning
from fastfreeze.execution import arguments
from fastfreeze.trimming.compare import difference, observe
from fastfreeze.trimming.folds import Folds
from fastfreeze.trimming.layout import Layouts, are_channels_last, in_channels_last
from fastfreeze.trimming.pending import LOCAL, Run, TooLateError, settled
from fastfreeze.trimming.standins import Frozen, folds_now
from fastfreeze.trimming.state import Undo, Watch, copied, preserved

_NO_FULL_GRAPH = "a trimmed model, whose own model is compiled: fullgraph=True is not for it"
_RESET_NORMS = (
    "runs untrimmed while torch's update_bn estimates the statistics of all norms, which it has "
    "reset in frozen layers too; fastfreeze.ensemble.reestimate_norms(network.model, batches, "
    "snapshot=...) leaves these alone"
)


def trim(model: nn.Module, example_inputs: Any = None, *, fold: bool = True) -> TrimmedModel:
    """A module that computes as ``model`` does, and leaves what is frozen alone.

    In training mode ``model``'s own forward runs, with its *frozen modules* in eval mode: those
    that have parameters, none of which requires grad, and all that is in them. Autograd then leaves
    out what lies below the lowest parameter that trains. See :class:`TrimmedModel`.

    Args:
        model: is shared, not copied: its parameters, buffers, submodules and training mode.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
            With them ``model`` is run at once for what the first call would else find out: in which
            layout it takes images.
        fold: compute frozen convolutions in their fastest form, where nothing that requires grad
            goes in: with the norms, sums and ReLUs behind them, in channels_last. Each is compared
            with its modules when it is first computed, and used if no value differs by more than
            the square root of its dtype's epsilon (of TF32's or bf16's where torch may take that),
            relative to the tensor's greatest element. Without, all is computed bit for bit as by
            ``model`` with its frozen modules in eval mode.

    Raises:
        TypeError: ``model`` is no module or is trimmed already, or ``example_inputs`` is of another
            type than those above.
        ValueError: ``model`` has lazy parameters that are not initialized yet.
    """
    if not isinstance(model, nn.Module) or isinstance(model, TrimmedModel):
        raise TypeError(f"model must be an untrimmed torch.nn.Module, got {type(model).__name__}")
    if any(map(is_lazy, model.parameters())):
        raise ValueError("model must be initialized, but it has lazy parameters: run it once")
    trimmed = TrimmedModel(model, fold)
    if example_inputs is not None:
        args, kwargs = arguments("example_inputs", example_inputs)
        trimmed.choose_layout(*args, **kwargs)
    return trimmed


class TrimmedModel(nn.Module):
    """A model that follows its ``requires_grad`` flags; made by :func:`trim`.

    It holds the very parameters, buffers and submodules of ``model``, under the same names: state
    dicts interchange, and what is done to the one is done to the other. ``model`` is left as it is:
    forwards and ``training`` flags of frozen modules are replaced only while it is called.

    * In each call ``model``'s own forward runs, as Python. Nothing of it is recorded.
    * Frozen modules are in eval mode, wherever they are: norms keep their statistics and counters
      bit for bit. A module without parameters, such as a dropout, is in eval mode if it is inside a
      frozen module and nowhere else.
    * A frozen convolution or norm whose input requires no grad waits for what is done to its value:
      a norm, a sum or a ReLU behind it is computed with it. Anything else gets the value. If it
      turns out that what it reads has been written to in place meanwhile, ``model`` is called
      again, with random numbers and the buffers of what trains as before, and that module no
      longer waits.
    * It does not wait where it has hooks, under autocast, in inference mode, under a dispatch mode,
      in a transform of torch.func or in an activation checkpoint.
    * Folded weights are copies, made again when the originals have been written to: torch's count
      of writes is compared in each call, and their contents when an optimizer has stepped while
      they had gradients, else one module's in each call. On a GPU contents are not compared.
    * While nothing is frozen, and with ``fold``, images are given to ``model`` in channels_last
      where that gives the same and is faster: on a CPU, where there are many values for each
      weight of a convolution, and few products with each value.
    * In eval mode of ``model`` it is called as it is. So it is while
      ``torch.optim.swa_utils.update_bn`` estimates statistics anew, which it resets in frozen norms
      too, and that is announced.
    * ``torch.compile`` of it compiles ``model`` with its frozen modules in eval mode, without
      folding, again after each freeze and without ``fullgraph=True``.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, fold: bool) -> None:
        super().__init__()
        # The same dictionaries: a registered child would prefix every name.
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            vars(self)[name] = getattr(model, name)
        vars(self)["model"] = model
        self._fold = fold
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self._norms = [norm for norm in norms if norm.momentum is not None]
        self._announced: set[str] = set()
        self._forget()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``self.model(*args, **kwargs)``, with what is frozen left alone."""
        if not self.model.training:
            return self.model(*args, **kwargs)
        return self.run(args, kwargs, None)

    @torch.compiler.disable(recursive=False, reason=_NO_FULL_GRAPH)  # type: ignore[untyped-decorator]
    def run(self, args: Any, kwargs: Any, keeper: Any) -> Any:
        """A call in training mode; ``keeper``, if any, may put off calls of frozen modules."""
        if eval_frame.get_eval_frame_callback() is not None:
            return self._compiled(args, kwargs)
        if LOCAL.run is not None:  # called by a trimmed model
            args, kwargs = settled(args), settled(kwargs)
        frozen = self._now()
        if self._resets_norms():
            self._warn(_RESET_NORMS)
            return self.model(*args, **kwargs)
        layout = self._layouts.of(args, kwargs) if self._fold else None
        if layout is None or not layout.channels_last:
            run = Run(self._folds, not are_channels_last(args, kwargs), keeper)
            return self._call(frozen, run, args, kwargs)
        args, kwargs = in_channels_last(args, kwargs)
        run = Run(self._folds, False, keeper)
        return layout.given_back(self._call(frozen, run, args, kwargs))

    def choose_layout(self, *args: Any, **kwargs: Any) -> None:
        """Find out ahead of the first call like this one in which layout it takes its images.

        Hooks that are put on modules later do not change that.
        """
        if self._fold and self.model.training:
            self._layouts.of(args, kwargs)

    def frozen_names(self) -> dict[nn.Module, str]:
        """The frozen modules, and what they are called."""
        return self._now().names

    @property
    def folding(self) -> bool:
        """Whether it was asked for."""
        return self._fold

    @property
    def prefix(self) -> str:
        """What is frozen by the present flags and how it is computed, in words."""
        frozen = self._now()
        if not frozen.modules:
            return "nothing is frozen"
        text = f"{len(frozen.modules)} modules are frozen and in eval mode"
        if not self._fold:
            return f"{text}; nothing is folded (fold=False)"
        text += f"; {len(self._folds)} convolutions and norms are folded"
        reasons = self._folds.refusals()
        return text + (f", others are not: {'; '.join(reasons)}" if reasons else "")

    def verify(self, *args: Any, **kwargs: Any) -> None:
        """Compare with the model whose frozen modules are in eval mode, on these inputs.

        Compared are outputs, buffers and the gradients of all parameters that require grad. Both
        runs start from the same random numbers. Folding is not part of it: it is compared whenever
        something is folded. Gradients, buffers, training flags and random number generators are
        left as they were.

        Raises:
            RuntimeError: they differ by more than rounding: relative to the tensor's greatest
                element, by more than the square root of its dtype's epsilon (of TF32's or
                bf16's where torch may take that). The message names the worst.
        """
        with preserved(self.model):
            if not self.model.training:
                self.model.train()
            frozen = self._now()

            def in_eval() -> Any:
                new_args, new_kwargs = copied((args, kwargs))
                with frozen.inside(None):
                    return self.model(*new_args, **new_kwargs)

            def waiting() -> Any:
                new_args, new_kwargs = copied((args, kwargs))
                return self._call(frozen, Run(self._folds, False), new_args, new_kwargs)

            expected = observe(self.model, in_eval, backward=True)
            with self._folds.as_modules_compute():
                problem = difference(observe(self.model, waiting, backward=True), expected)
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
        own = ("_folds", "_layouts", "_known", "_careful")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        """Start with nothing known of the model."""
        self._folds = Folds(exact=not self._fold)
        self._layouts = Layouts(self.model)
        self._known: _Known | None = None
        self._careful = True  # something may turn out to be too late

    def _now(self) -> Frozen:
        """The frozen modules under the present flags."""
        if self._known is None or self._known.outdated():
            self._known = _Known(self.model)
        known = self._known
        flags = known.read_flags()
        if flags != known.flags or known.frozen.outdated():
            known.flags, self._careful = flags, True
            self._folds.clear()
            code = TrimmedModel._call.__code__
            known.frozen = Frozen(self.model, self._fold, self._folds, code)
        return known.frozen

    def _compiled(self, args: Any, kwargs: Any) -> Any:
        """``model`` compiled, with its frozen modules in eval mode; what surrounds it is not."""
        frozen = torch.compiler.disable(self._now)()
        torch.compiler.disable(frozen.enter)([])
        try:
            return self.model(*args, **kwargs)
        finally:
            torch.compiler.disable(frozen.leave)()

    def _call(self, frozen: Frozen, run: Run, args: Any, kwargs: Any) -> Any:
        """``model``'s own forward with its frozen modules as they are to be."""
        if run.keeper is not None:
            run.keeper.begin(args, kwargs)
        waits = run.keeper is not None or (frozen.folds and self._folds.usable)
        if not (waits and frozen.modules and folds_now()):
            with frozen.inside(None):
                return self.model(*args, **kwargs)
        self._folds.check()
        undo = Undo(frozen.buffers() + (frozen.waiting_tensors() if self._careful else []))
        try:
            with frozen.inside(run):
                output = run.finish(self.model(*args, **kwargs))
            self._careful = False
            return output
        except TooLateError as error:
            self._folds.too_late(error.reader)
            self._careful = True
        undo.restore()
        with frozen.inside(None):
            return self.model(*args, **kwargs)

    def _resets_norms(self) -> bool:
        return any(norm.momentum is None for norm in self._norms)

    def _warn(self, text: str) -> None:
        if text in self._announced:
            return
        self._announced.add(text)
        warnings.warn(f"{type(self.model).__name__} {text}", FastfreezeWarning, stacklevel=3)


class _Known:
    """What is known of a model's present structure and flags.

    Attributes:
        flags: for which ``frozen`` is.
    """

    frozen: Frozen

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._structure = Watch([m._modules for m in modules])
        self._parameters = [m._parameters for m in modules if m._parameters]
        self.flags: tuple[bool, ...] | None = None

    def outdated(self) -> bool:
        """Whether modules were added, removed or replaced."""
        return self._structure.changed()

    def read_flags(self) -> tuple[bool, ...]:
        """Whether each parameter requires grad; True where there is none."""
        return tuple([p is None or p.requires_grad for d in self._parameters for p in d.values()])
