"""The ensemble that snapshots make.

Source of the method: Snapshot Ensembles (Huang et al., ICLR 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastfreeze.checks import check_int
from fastfreeze.ensemble._checks import check_no_arrays, logits_of, warn_of_probabilities
from fastfreeze.ensemble.graphs.trace import Call, NoGraphError
from fastfreeze.ensemble.members import CannotCopyError, new_member, share, unshare
from fastfreeze.ensemble.merge import merged_module
from fastfreeze.ensemble.run import MAX_KEPT, Prepared, one_by_one, prepare
from fastfreeze.kernels.softmax import EnsembleAverage, ensemble_softmax
from fastfreeze.kernels.softmax_arguments import check_logits
from fastfreeze.layers.execution import preserved
from fastfreeze.snapshots.base import last_of, load_into
from fastfreeze.snapshots.memory import MemorySnapshots
from fastfreeze.snapshots.store import SnapshotStore

How = Literal["loop", "shared"]
_Take = Callable[[Any], None]


class SnapshotEnsemble(nn.Module):
    """Averages the probabilities of snapshots of one model.

    The members are copies of the model, always in eval mode and without gradients of their own;
    ``to``, ``state_dict`` and so on work as for any module. Members whose tensors have the same
    bits hold them once, and what they compute from the same values runs once. A write to a member's
    tensors is noticed at the next call, except through ``.data``. The first call of a kind (these
    arguments, this image size and layout; one row, or any number of them) traces the model and runs
    members to compare: make it before several threads call at once.

    Args:
        model: a model of the snapshots' architecture, of whatever weights, which is copied and not
            changed. Or a function that makes a new one at each call, such as its class: for models
            that cannot be copied, since they hold a lock, a file, or functions that use them.
        snapshots: state dicts.
        dim: the dimension of the classes in the model's output, 1 for [B, C, H, W]. None: the last,
            of outputs of up to three dimensions; of more it has to be given.
        how: "shared": as one graph, in which what members have in common runs once; "loop": one
            member after the other. None: the graph where there is one, else the loop.
        fold: fold norms into convolutions, and so on, as :func:`fastfreeze.trim` does: faster, and
            equal up to rounding. False: the bits of the members called one by one.

    Attributes:
        members: the copies.
        fold, how: as above; may be set.
        how_it_ran: how the latest call ran, in words: how much ran once, and why the rest did not.

    Raises:
        TypeError: one of ``snapshots`` is not a state dict; ``model`` cannot be copied, or is
            neither a module nor a function that makes one.
        ValueError: there is no snapshot; ``how`` is none of these; ``model`` gives tensors that it
            gave before.
        SnapshotError: a snapshot is of another architecture.

    Warns:
        FastfreezeWarning: the first outputs ever are probabilities, not logits.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        snapshots: Iterable[Mapping[str, Tensor]],
        *,
        dim: int | None = None,
        fold: bool = True,
        how: How | None = None,
    ) -> None:
        super().__init__()
        _check_how(how)
        self.members = nn.ModuleList()
        with torch.inference_mode(False):  # else writes to the tensors would go unnoticed
            for i, state in enumerate(snapshots):
                member = new_member(model, list(self.members))
                load_into(member, state, f"snapshots[{i}]")
                self.members.append(member.eval().requires_grad_(False))
            if not self.members:
                raise ValueError("snapshots must hold at least one state dict, got none")
            share(list(self.members))
        self.fold, self.how, self.dim = fold, how, dim
        self._looked = False
        self._prepared: dict[tuple[Any, ...], Prepared] = {}  # by kind of call
        self.how_it_ran = f"{len(self.members)} members, not called yet"

    @classmethod
    def from_store(
        cls,
        model: nn.Module | Callable[[], nn.Module],
        store: SnapshotStore | MemorySnapshots,
        last: int | None = None,
        *,
        members: Iterable[int] | None = None,
        dim: int | None = None,
        fold: bool = True,
        how: How | None = None,
    ) -> SnapshotEnsemble:
        """The ensemble of a store's snapshots.

        Args:
            last: use only so many, the latest. Early snapshots of short cycles can hurt.
            members: which of these, by their positions from 0, as ``select_members`` gives them; a
                member that comes again weighs more. None: all.

        Raises:
            TypeError, ValueError: there are fewer than ``last``, or one of ``members`` is no
                position of a snapshot.
        """
        chosen = tuple(store) if last is None else last_of("last", last, tuple(store))
        if members is not None:
            positions = tuple(members)
            for i, position in enumerate(positions):
                check_int(f"members[{i}]", position, minimum=0, maximum=len(chosen) - 1)
            chosen = tuple(chosen[position] for position in positions)
        states = (store.load(snapshot) for snapshot in chosen)
        return cls(model, states, dim=dim, fold=fold, how=how)

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        """The mean of the members' probabilities.

        Where members differ they run one after the other. Only a sum of their probabilities is
        kept, unless gradients are to flow.

        Args:
            inputs, keywords: the model's. It must return logits [..., C], or an object or a dict
                that holds ``logits``.

        Returns:
            Probabilities [..., C], of the logits' shape and dtype.

        Raises:
            TypeError, ValueError: the model's output is not what
                :func:`~fastfreeze.ensemble_softmax` takes.
            ValueError: ``how`` is "shared" and the members cannot be one graph; the message says
                why.
        """
        average = EnsembleAverage(dim=self.dim)
        logits: list[Tensor] = []
        # A strict export takes no change of grad mode, which the running average makes.
        exporting = torch.compiler.is_exporting()

        def take(z: Tensor) -> None:
            if exporting or z.requires_grad:
                logits.append(z)
            else:
                average.update(z)

        self._run(take, inputs, keywords)
        if not logits:
            return average.mean()
        mean = ensemble_softmax(logits, dim=self.dim)
        if average.count:  # members that need no gradients
            share = len(logits) / (len(logits) + average.count)
            mean = share * mean + (1 - share) * average.mean()
        return mean

    def member_probabilities(self, *inputs: Any, **keywords: Any) -> Iterator[Tensor]:
        """The probabilities [..., C] of each member in turn."""
        found: list[Tensor] = []
        dim = -1 if self.dim is None else self.dim
        self._run(lambda z: found.append(torch.softmax(z, dim=dim)), inputs, keywords)
        yield from found

    def as_module(self, *inputs: Any, **keywords: Any) -> nn.Module:
        """The ensemble as it is now, as one graph of plain torch operations.

        For ``torch.compile``, ``torch.export``, ONNX and ``torch.cuda.make_graphed_callables``,
        which do not see which members are equal, and would run all of each.

        Args:
            inputs, keywords: an example of a call; its tensors stand for any of their kind, of
                other batch sizes too.

        Returns:
            A module that takes the example's tensors, in order, and returns what the ensemble
            would. It holds copies of the ensemble's tensors.

        Raises:
            ValueError: the members cannot be had as one graph; the message says why.
            TypeError, ValueError: as from :meth:`forward`, for this example.
        """
        check_no_arrays("inputs", [*inputs, *keywords.values()])
        prepared, _ = self._prepare(inputs, keywords)
        if prepared.graph is None:
            raise ValueError(f"the ensemble cannot be one graph: {prepared.text}")
        try:
            module = merged_module(prepared.graph, self.members, self.dim)
        except CannotCopyError as error:
            raise ValueError(f"the ensemble cannot be one graph: {error}") from error
        with preserved(self.members), torch.no_grad():  # which looks at the outputs
            self._run(lambda _: None, *tree_map_only(Tensor, torch.clone, (inputs, keywords)))
        return module

    def train(self, mode: bool = True) -> SnapshotEnsemble:
        """Set the flag ``training``; the members stay in eval mode."""
        super().train(mode)
        self.members.eval()
        return self

    def _run(self, take: _Take, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Have each member's logits taken in turn."""
        check_no_arrays("inputs", [*inputs, *keywords.values()])
        _check_how(self.how)
        # When compiled a member's values cannot be looked at, which a graph is made by.
        compiling = torch.compiler.is_compiling()
        if compiling and self.how == "shared":
            raise ValueError("how='shared' cannot run: compile what as_module gives instead")
        if compiling or self.how == "loop":
            self.how_it_ran = f"{len(self.members)} members, one by one, as asked for"
        else:
            prepared, tensors = self._prepare(inputs, keywords)
            if program := prepared.choose(tensors):
                program(self, lambda output: take(self._logits(output)), *tensors)
                return
            if self.how is not None:
                raise ValueError(f"how='shared' cannot run: {prepared.text}")
        *others, last = self.members
        for member in others:  # each on inputs that no other member has written to
            args, kwargs = tree_map_only(Tensor, torch.clone, (inputs, keywords))
            take(self._logits(member(*args, **kwargs)))
        take(self._logits(last(*inputs, **keywords)))

    def _logits(self, output: Any) -> Tensor:
        """The logits in a member's output, checked; of the first ever the values too."""
        logits: Tensor = logits_of(output)
        check_logits("logits", logits, self.dim)
        if not (self._looked or logits.is_meta or torch.compiler.is_compiling()):
            self._looked = True  # once: on a GPU, to look is to wait
            warn_of_probabilities(logits, self.dim)
        return logits

    def _prepare(
        self, inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[Prepared, list[Tensor]]:
        """What runs for a call of this kind, and the call's tensors."""
        try:
            call = Call.of(self.members[0], inputs, keywords)
        except NoGraphError as error:
            self.how_it_ran = one_by_one(self.members, error)
            return Prepared(self.how_it_ran), []
        kind = (*call.kind, self.fold)
        found = self._prepared.get(kind)
        if found is None or not found.fits(self.members):
            found = prepare(self, self.members, call, self.fold)
            others = [item for item in self._prepared.items() if item[0] != kind]
            # Replaced, not changed: other threads may be looking.
            self._prepared = dict([*others, (kind, found)][-MAX_KEPT:])
        self.how_it_ran = found.text
        return found, call.tensors

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        unshare(list(self.members))
        self._prepared = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": {}}


def _check_how(how: How | None) -> None:
    if how not in (None, "loop", "shared"):
        raise ValueError(f"how must be None, 'loop' or 'shared', got {how!r}")
