"""A model whose frozen modules stay as they are and cost as little as possible."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from fastfreeze.errors import warn
from fastfreeze.layers.execution import Undo, preserved
from fastfreeze.trimming.compare import check_alike
from fastfreeze.trimming.folds import Folds
from fastfreeze.trimming.pending import LOCAL, Run, TooLateError, settled
from fastfreeze.trimming.standins import Frozen

_NO_FULL_GRAPH = "a trimmed model, whose own model is compiled: fullgraph=True is not for it"
_WRITTEN = (
    "what a frozen convolution or norm reads was written to by code that torch does not show, such "
    "as TorchScript, before its value was used: expected fastfreeze.trim(model, fold=False)"
)
_RESET_NORMS = (
    "runs untrimmed while torch's update_bn estimates the statistics of all norms, which it has "
    "reset in frozen layers too; fastfreeze.ensemble.reestimate_norms(network.model, batches, "
    "snapshot=...) leaves these alone"
)


def trim(model: nn.Module, *, fold: bool = True) -> TrimmedModel:
    """A module that computes as ``model`` does, and leaves what is frozen alone.

    In training mode ``model``'s own forward runs, with its *frozen modules* in eval mode: those
    that have parameters, none of which requires grad, and all that is in them. Autograd then leaves
    out what lies below the lowest parameter that trains. See :class:`TrimmedModel`.

    Args:
        model: is shared, not copied: its parameters, buffers, submodules and training mode.
        fold: compute frozen convolutions in their fastest form, where nothing that requires grad
            goes in: with the norms, sums and ReLUs behind them. Each is compared with what torch
            computes when it is first used, and kept if no value differs by more than the square
            root of its dtype's epsilon (of TF32's or bf16's where torch may take that), relative to
            the tensor's greatest element. Without, all is computed bit for bit as by ``model`` with
            its frozen modules in eval mode.

    Raises:
        TypeError: ``model`` is no module or is trimmed already.
        ValueError: ``model`` has lazy parameters that are not initialized yet.
    """
    if not isinstance(model, nn.Module) or isinstance(model, TrimmedModel):
        raise TypeError(f"model must be an untrimmed torch.nn.Module, got {type(model).__name__}")
    if any(map(is_lazy, model.parameters())):
        raise ValueError("model must be initialized, but it has lazy parameters: run it once")
    return TrimmedModel(model, fold)


class TrimmedModel(nn.Module):
    """A model that follows its ``requires_grad`` flags; made by :func:`trim`.

    It holds the very parameters, buffers and submodules of ``model``, under the same names: state
    dicts interchange, and what is done to the one is done to the other. ``model`` is left as it is:
    forwards and ``training`` flags of frozen modules are replaced only while it is called.

    * In each call ``model``'s own forward runs once, as Python, with its inputs as they are;
      nothing of it is recorded.
    * Frozen modules are in eval mode, wherever they are: norms keep their statistics and counters
      bit for bit. A module without parameters, such as a dropout, is in eval mode if it is inside a
      frozen module and nowhere else.
    * Inside a frozen module, and a frozen part of a ``Sequential``, whose inputs hold 2**20 values
      or more (2**19 where there are 3x3 convolutions), a convolution or norm of frozen weights and
      of images that require no grad waits for a norm, a sum or a ReLU behind it, and is computed
      with these before any other function runs. Nothing waits under autocast, in inference mode,
      under a dispatch mode, in a transform of torch.func or in an activation checkpoint.
    * In an activation checkpoint, in the forward of a custom autograd function and in a generator
      that a forward returns frozen modules keep the mode that they have, which is announced in the
      first two: call ``eval()`` on them.
    * Folded weights are copies, made again when the originals have been written to: torch's count
      of writes is compared in each call, and their contents when an optimizer has stepped while
      they had gradients, else one module's in each call. On a GPU contents are not compared.
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
        self._warned = False
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
        if any(norm.momentum is None for norm in self._norms):
            if not self._warned:
                self._warned = True
                warn(f"{type(self.model).__name__} {_RESET_NORMS}")
            return self.model(*args, **kwargs)
        return self._call(frozen, self._folds, args, kwargs, keeper)

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

            def in_eval(args: Any, kwargs: Any) -> Any:
                with frozen.inside(None):
                    return self.model(*args, **kwargs)

            def waiting(args: Any, kwargs: Any) -> Any:
                return self._call(frozen, Folds(exact=True), args, kwargs)

            check_alike(self.model, waiting, in_eval, args, kwargs)

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
        own = ("_folds", "_frozen")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        """Start with nothing known of the model."""
        self._folds = Folds()
        self._frozen: Frozen | None = None

    def _now(self) -> Frozen:
        """The frozen modules under the present flags."""
        if self._frozen is None or self._frozen.outdated():
            self._frozen = Frozen(self.model, self._fold, TrimmedModel._call.__code__)
        return self._frozen

    def _compiled(self, args: Any, kwargs: Any) -> Any:
        """``model`` compiled, with its frozen modules in eval mode; what surrounds it is not."""
        frozen = torch.compiler.disable(self._now)()
        torch.compiler.disable(frozen.enter)([])
        try:
            return self.model(*args, **kwargs)
        finally:
            torch.compiler.disable(frozen.leave)()

    def _call(
        self, frozen: Frozen, folds: Folds, args: Any, kwargs: Any, keeper: Any = None
    ) -> Any:
        """``model``'s own forward with its frozen modules as they are to be."""
        known = frozen.known if frozen.folds else None
        if known is None:
            folds.check(set())
        if keeper is None:
            try:
                return self._forward(frozen, Run(folds, known), args, kwargs)
            except TooLateError:
                raise RuntimeError(_WRITTEN) from None
        asks = torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing()
        undo = Undo(frozen.buffers(), [torch.cuda.current_device()] if asks else [])
        run = Run(folds, known, keeper)
        run.look()  # not while a keeper looks at what a module does
        try:
            return self._forward(frozen, run, args, kwargs)
        except TooLateError:
            keeper.waits = False
        undo.restore()
        return self._forward(frozen, Run(folds, None), args, kwargs)

    def _forward(self, frozen: Frozen, run: Run, args: Any, kwargs: Any) -> Any:
        with frozen.inside(run):
            output = run.finish(self.model(*args, **kwargs))
            if run.keeper is not None:
                run.keeper.finish()
            return output
