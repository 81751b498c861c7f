"""An ensemble and its members on labelled data, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastfreeze.ensemble._checks import call_and_labels
from fastfreeze.ensemble.metrics import (
    ace_of_rows,
    brier_of_rows,
    check_like_first,
    checked_predictions,
    ece_of_rows,
    nll_of_rows,
    num_differing,
)
from fastfreeze.ops.reference import entropy_reference
from fastfreeze.snapshots.base import check_count
from fastfreeze.text import format_table


class GivesMemberProbabilities(Protocol):
    """What can be evaluated: a SnapshotEnsemble, or anything with this method."""

    @property
    def member_probabilities(self) -> Callable[..., Iterable[Tensor]]:
        """A method that gives the probabilities [B, C] of each member in turn."""


@dataclass(frozen=True)
class PredictionScores:
    """How good the predictions of a member, or of the ensemble, are.

    Attributes:
        error: share of rows, in 0..1; see :func:`~fastfreeze.ensemble.error_rate`.
        nll: in nats; see :func:`~fastfreeze.ensemble.nll`.
        brier: in 0..2; see :func:`~fastfreeze.ensemble.brier_score`.
        ece: in 0..1; see :func:`~fastfreeze.ensemble.expected_calibration_error`.
        ace: in 0..1; see :func:`~fastfreeze.ensemble.adaptive_calibration_error`.
        entropy: mean over rows, in nats.
    """

    error: float
    nll: float
    brier: float
    ece: float
    ace: float
    entropy: float


@dataclass(frozen=True, eq=False)
class EnsembleEvaluation:
    """What :func:`evaluate` finds; ``print`` gives a table.

    Attributes:
        members: the scores of each member.
        ensemble: those of the mean of their probabilities.
        mutual_information: mean over rows, in nats: what of the ensemble's entropy is disagreement
            of the members, the rest being the mean of their own entropies. Never negative.
        disagreement: [M, M], float64, on the CPU; see :func:`~fastfreeze.ensemble.disagreement`.
        num_rows: how many rows there were.
        num_bins: bins of the calibration errors.
    """

    members: tuple[PredictionScores, ...]
    ensemble: PredictionScores
    mutual_information: float
    disagreement: Tensor
    num_rows: int
    num_bins: int

    @property
    def mean_disagreement(self) -> float:
        """Mean over pairs of different members, in 0..1; 0 for a single member."""
        M = len(self.members)
        return self.disagreement.sum().item() / max(1, M * (M - 1))

    def to_dict(self) -> dict[str, Any]:
        """Numbers, lists and dicts alone, for JSON."""
        return {
            "members": [asdict(scores) for scores in self.members],
            "ensemble": asdict(self.ensemble),
            "mutual_information": self.mutual_information,
            "disagreement": self.disagreement.tolist(),
            "num_rows": self.num_rows,
            "num_bins": self.num_bins,
        }

    def __str__(self) -> str:
        named = {f"member {m}": scores for m, scores in enumerate(self.members)}
        named["ensemble"] = self.ensemble
        headers = ["", "error %", "NLL", "Brier", "ECE", "ACE", "entropy"]
        rows = [
            [name, f"{100 * s.error:.2f}", *(f"{x:.4f}" for x in list(asdict(s).values())[1:])]
            for name, s in named.items()
        ]
        return (
            f"{format_table(headers, rows)}\n\n"
            f"{self.num_rows} rows; two members differ on {100 * self.mean_disagreement:.2f}% of "
            f"them; mutual information {self.mutual_information:.4f} nats"
        )


@torch.no_grad()
def evaluate(
    ensemble: GivesMemberProbabilities, batches: Iterable[Any], *, num_bins: int = 15
) -> EnsembleEvaluation:
    """Score each member of an ensemble, and the mean of their probabilities, on labelled data.

    One pass over the data and one call per batch. Between batches it keeps sums and, of each row
    and member, the highest probability and whether it is right: nine bytes. All is summed in
    float64. The members' mean is taken with equal weights; its NLL has the floor of the members'
    dtype, as theirs.

    Args:
        ensemble: anything whose ``member_probabilities(*inputs)`` gives the probabilities [B, C] of
            each member in turn, as those of :func:`~fastfreeze.ensemble.error_rate`: always the
            same members.
        batches: pairs (inputs, labels), or dicts of which one item is "labels", on the ensemble's
            device, such as a ``DataLoader`` gives; labels are integers [B] in 0..C-1. A tuple or
            list of inputs is passed as several arguments, a dict by name.
        num_bins: of the calibration errors, >= 1.

    Raises:
        TypeError, ValueError: no batch, a batch or a prediction that is not such, or ``num_bins``
            is not a count; the message names the member and the row.
    """
    check_count("num_bins", num_bins, minimum=1)
    totals: _Totals | None = None
    for i, batch in enumerate(batches):
        (inputs, keywords), labels = call_and_labels(f"batches[{i}]", batch)
        if labels is None:
            raise TypeError(
                f'batches must give pairs (inputs, labels), or dicts with "labels", '
                f"got {_described(batch)}"
            )
        members = list(ensemble.member_probabilities(*inputs, **keywords))
        if totals is None:
            totals = _Totals(len(members))
        totals.add(members, labels)
    if totals is None:
        raise ValueError("batches must give at least one batch, got none")
    return totals.evaluation(num_bins)


def _described(batch: Any) -> str:
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"a {kind} of {', '.join(map(repr, batch))}"
    return f"a {kind} of {len(batch)}" if isinstance(batch, (tuple, list)) else f"a {kind}"


class _Totals:
    """Sums over rows; index M is the ensemble, those below it the members."""

    def __init__(self, num_members: int) -> None:
        if num_members == 0:
            raise ValueError("ensemble must have at least one member, got none")
        self._num_members = num_members
        self._num_rows = 0
        self._sums = torch.zeros(num_members + 1, 3, dtype=torch.float64, device="cpu")
        self._mutual_information = 0.0
        pairs = (num_members, num_members)
        self._num_differing = torch.zeros(pairs, dtype=torch.int64, device="cpu")
        self._confidence: list[Tensor] = []  # of each batch, [M + 1, B]
        self._correct: list[Tensor] = []

    def add(self, members: list[Tensor], labels: Tensor) -> None:
        """Take in a batch."""
        if len(members) != self._num_members:
            raise ValueError(
                f"ensemble must give the same members for every batch: expected "
                f"{self._num_members} as for the first, got {len(members)}"
            )
        rows: list[_Scored] = []
        total: Tensor | None = None
        for m, member in enumerate(members):
            p, y = checked_predictions(member, labels, f"members[{m}]")
            check_like_first(f"members[{m}]", member, members[0])
            total = p if total is None else total + p
            rows.append(_scored(p, y, member.dtype))
        assert total is not None
        rows.append(_scored(total / len(members), y, members[0].dtype))
        entropies = torch.stack([row.entropy for row in rows])
        classes = torch.stack([row.predicted for row in rows[:-1]])
        self._num_rows += len(y)
        self._sums += torch.stack([row.sums() for row in rows]).cpu()
        information = (entropies[-1] - entropies[:-1].mean(0)).clamp(min=0)
        self._mutual_information += information.sum().item()
        self._num_differing += num_differing(classes).cpu()
        self._confidence.append(torch.stack([row.confidence for row in rows]).cpu())
        self._correct.append(torch.stack([row.predicted == y for row in rows]).cpu())

    def evaluation(self, num_bins: int) -> EnsembleEvaluation:
        confidence, correct = torch.cat(self._confidence, 1), torch.cat(self._correct, 1)
        scores = []
        for row, c, right in zip(self._sums / self._num_rows, confidence, correct, strict=True):
            nll, brier, entropy = row.tolist()
            scores.append(
                PredictionScores(
                    error=right.logical_not().double().mean().item(),
                    nll=nll,
                    brier=brier,
                    ece=ece_of_rows(c, right, num_bins),
                    ace=ace_of_rows(c, right, num_bins),
                    entropy=entropy,
                )
            )
        return EnsembleEvaluation(
            members=tuple(scores[:-1]),
            ensemble=scores[-1],
            mutual_information=self._mutual_information / self._num_rows,
            disagreement=self._num_differing.double() / self._num_rows,
            num_rows=self._num_rows,
            num_bins=num_bins,
        )


@dataclass(frozen=True, eq=False)
class _Scored:
    """A batch of one predictor, each [B]."""

    nll: Tensor
    brier: Tensor
    entropy: Tensor
    confidence: Tensor
    predicted: Tensor

    def sums(self) -> Tensor:
        return torch.stack([self.nll.sum(), self.brier.sum(), self.entropy.sum()])


def _scored(p: Tensor, y: Tensor, dtype: torch.dtype) -> _Scored:
    confidence, predicted = p.max(-1)
    return _Scored(
        nll_of_rows(p, y, dtype), brier_of_rows(p, y), entropy_reference(p), confidence, predicted
    )
