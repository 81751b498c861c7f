"""MiniLM-L6 learns whether a sentence of a review is positive, as people have rated it.

Batches hold sentences of about one length, and are padded to the same length whenever a sentence
comes: nothing is computed for a padding of all to the longest, and kept values are found again.
LoRA needs the package ``peft``, and one rival ``lightning``; a method whose package is missing
fails, and the others run.
"""

from __future__ import annotations

import tarfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastfreeze
from benchmarks.worth.finetuning import FineTask, methods
from benchmarks.worth.question import Question, Run, fetch
from benchmarks.worth.training import record
from examples.finetune_text import ARCHIVE, HOW, MODEL, found_in
from fastfreeze.recipes.data import epoch_generator

LENGTHS, BATCH_SIZE = (16, 24, 32, 40, 48), 16
TRAINING = 2000  # sentences
FILES = {  # and sentences for validation and test
    "product reviews": ("amazonReviewSnippets_GroundTruth.txt", 500, 1200),
    "film reviews": ("movieReviewSnippets_GroundTruth.txt", 1000, 3000),
}


class MiniLM(FineTask):
    """Its layers are stages; the head is the pooler and the classifier.

    Tokens and masks are int64 ``[N, 2, L]``.
    """

    half, last_block = 4, 2
    optimizer = staticmethod(partial(torch.optim.AdamW, fused=True))
    ours = fastfreeze.AdamW

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        x, labels, ids = super().batch(step)
        return cut(x), labels, ids

    def pretrained(self) -> nn.Module:
        load = AutoModelForSequenceClassification.from_pretrained
        return load(self.weights, num_labels=2).train()

    def stages(self, model: nn.Module) -> list[nn.Module]:
        head = nn.ModuleList([model.bert.pooler, model.classifier])
        return [model.bert.embeddings, *model.bert.encoder.layer, head]

    def arguments(self, x: Tensor) -> tuple[Tensor, ...]:
        x = cut(x)
        return x[:, 0], x[:, 1]

    def logits(self, output: Any) -> Tensor:
        return output.logits

    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        return model.bert(*self.arguments(x)).last_hidden_state[:, 0]

    def head(self, model: nn.Module, features: Tensor) -> Tensor:
        pooled = model.bert.pooler(features.unsqueeze(1))
        return model.classifier(model.dropout(pooled))

    def lora_names(self, model: nn.Module, first: int) -> list[str]:
        """All products of the layers; ``first`` counts the embeddings."""
        return [
            f"bert.encoder.layer.{name}"
            for name, module in model.bert.encoder.layer.named_modules()
            if isinstance(module, nn.Linear) and int(name.partition(".")[0]) >= first - 1
        ]


def lengths(x: Tensor) -> Tensor:
    """To which of ``LENGTHS`` each sentence is padded, as an index."""
    return torch.bucketize(x[:, 1].sum(1), torch.tensor(LENGTHS))


def cut(x: Tensor) -> Tensor:
    """Without the padding that none of the sentences needs."""
    return x[:, :, : LENGTHS[int(lengths(x).max())]]


def order(x: Tensor, seed: int, epochs: int) -> Tensor:
    """Ids of sentences of one length in each row, int64 ``[steps, B]``.

    Of each length a few that fill no batch are left out, the same in all epochs.
    """
    alike, rows = lengths(x), []
    for epoch in range(epochs):
        generator = epoch_generator(seed, epoch)
        batches = []
        for length in range(len(LENGTHS)):
            ids = torch.nonzero(alike == length).flatten()
            ids = ids[: len(ids) // BATCH_SIZE * BATCH_SIZE]
            order = torch.randperm(len(ids), generator=generator)
            batches.append(ids[order].view(-1, BATCH_SIZE))
        found = torch.cat(batches)
        rows.append(found[torch.randperm(len(found), generator=generator)])
    return torch.cat(rows)


def sentences(archive: Path, name: str) -> list[tuple[str, int]]:
    """Sentences, and whether they are positive; those of one review follow on each other."""
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(inner)) as tar:
        text = tar.extractfile(f"hutto_ICWSM_2014/{name}").read().decode("latin-1")
    rows = [line.split("\t") for line in text.splitlines()]
    reviews: dict[str, list[tuple[str, int]]] = {}
    for number, rating, sentence in rows:
        review = reviews.setdefault(number.partition("_")[0], [])
        review.append((sentence, int(float(rating) > 0)))
    found = list(reviews.values())
    shuffled = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [row for i in shuffled for row in found[i]]


@cache
def tokens(folder: Path, task: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Tokens and labels of all three sets; kept for the next run of a process."""
    files = found_in(folder)
    name, validation, test = FILES[task]
    rows = sentences(files[ARCHIVE], name)
    tokenizer = AutoTokenizer.from_pretrained(files[MODEL].parent)
    held_out = {"validation_": rows[-test - validation : -test], "": rows[-test:]}
    by_length = {  # short ones together
        begin: sorted(part, key=lambda row: len(row[0])) for begin, part in held_out.items()
    }
    parts = {"train": rows[:TRAINING], **by_length}
    return {part: encoded(tokenizer, found) for part, found in parts.items()}


def encoded(tokenizer: Any, rows: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
    """Tokens and masks, and labels."""
    found = tokenizer(
        [text for text, _ in rows],
        padding="max_length",
        truncation=True,
        max_length=LENGTHS[-1],
        return_tensors="pt",
    )
    x = torch.stack([found["input_ids"], found["attention_mask"]], 1)
    return x, torch.tensor([label for _, label in rows])


def learn(run: Run, folder: Path, counted: bool) -> dict:
    transformers.logging.set_verbosity_error()  # the head is new, as it should be
    transformers.logging.disable_progress_bar()
    held_out = dict(tokens(folder, run.task))
    x, labels = held_out.pop("train")
    task = MiniLM(
        run.task,
        x,
        labels,
        order(x, run.seed, run.epochs),
        run.seed,
        run.lr,
        weights=found_in(folder)[MODEL].parent,
        epochs=run.epochs,
    )
    return record(QUESTION.methods[run.method], task, counted, held_out)


QUESTION = Question(
    "Fine-tuning MiniLM on sentences of reviews",
    dict.fromkeys(FILES, (1, 2, 4)),
    methods(lrs=(5e-5, 2e-4, 8e-4)),
    learn,
    partial(fetch, names=(ARCHIVE, MODEL), how=HOW),
)
