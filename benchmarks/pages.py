"""Tables of README.md and of docs/ that ``python -m benchmarks report`` writes from the data.

A page says where with ``<!-- table: NAME -->`` and ``<!-- end of table -->``; what lies between is
replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ensemble_cases, step_cases
from benchmarks.case import OURS
from benchmarks.clock import FLOOR
from benchmarks.lines import HEADER, Line, lines_of, row, spread_text, times_of
from benchmarks.results import hardware_of, made_by, read_json
from benchmarks.training_rivals import BASELINE, BEST_FLAGS, BEST_TORCH, CACHE, FLAGS
from benchmarks.worth.answer import answers, short_table
from fastfreeze.files import write_atomic

PAGES = ("README.md", "docs/results.md", "docs/what-trim-gains.md")
STEPS = {
    "a group for each of 110 layers": "sgd-resnet110-per-layer",
    "the same, in channels_last": "sgd-resnet110-per-layer-channels-last",
    "one group": "sgd-resnet110",
    "one group, in channels_last": "sgd-resnet110-channels-last",
}
KERNELS = (  # what docs/results.md shows of steps and averages
    *STEPS.values(),
    *("sgd-densenet-bc-100-per-layer", "sgd-wrn40-4-per-layer", "sgd-vgg16", "sgd-resnet50"),
    *("softmax-5-256-10", "softmax-5-1024-100", "softmax-6-4096-1000"),
    *("statistics-6-4096-1000", "statistics-10-64-50257"),
)
THREADS = {"1 thread": "cpu-xeon-1-thread.json", "2 threads": "cpu-xeon-2-threads.json"}
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def update(root: Path, results: Path) -> None:
    """Write the tables of every page anew.

    Raises:
        ValueError: a page asks for a table that is not known here.
    """
    for page in PAGES:
        path = root / page
        text = path.read_text()
        if (new := with_tables(text, results)) != text:
            write_atomic(path, new.encode())


def with_tables(text: str, results: Path) -> str:
    """The page with its tables made from the results."""

    def made(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"table must be one of {', '.join(TABLES)}, got {name!r}")
        return "".join([begin, "\n".join(TABLES[name](results)), "\n", end])

    return _TABLE.sub(made, text)


def _share(own: float, base: float) -> str:
    share = own / base
    return f"{share:.2f}" if share >= 0.1 else f"{share:.2g}"


def _times(own: float, base: float) -> str:
    return f"{base / own:.2f}x"


def _saved(own: float, base: float) -> str:
    return f"{1 - own / base:.0%}"


@dataclass(frozen=True)
class Ratios:
    """Cases of a kind: the time of one rival, and the others beside it."""

    kind: str  # how the keys of its cases begin
    first: str  # the first column's title
    base: tuple[str, str]  # the rival, and the title of its times
    columns: Mapping[str, str]  # titles of others, and of the floor; without data they are left out
    text: Callable[[float, float], str]  # of seconds, and those of the base
    bold: str = OURS  # a column
    leave_out: str = ""  # of the cases' names
    sources: bool = True  # whether it tells who made it, and who was left out

    def __call__(self, results: Path) -> Iterator[str]:
        found, notes = [], []
        for path in sorted(results.glob("*.json")):
            data = read_json(path)
            entries = data.get("results", {}).items()
            own = [entry for key, entry in entries if key.startswith(f"{self.kind}-")]
            found += own
            left_out = [(entry["name"], entry["left_out"].get(OURS)) for entry in own]
            notes += [f"{name}: {why}." for name, why in left_out if why]
            notes += [f"{hardware_of(data)}. Made by {made_by(data, path.name)}."] if own else []
        there = {FLOOR}.union(*(entry["seconds"] for entry in found))
        columns = {name: title for name, title in self.columns.items() if name in there}
        yield from _header(self.first, self.base[1], *columns.values())
        yield from (self._row(e, columns) for e in found if self.base[0] in e["seconds"])
        yield from (f"\n{note}" for note in (notes if self.sources else []))

    def _row(self, entry: dict, columns: Iterable[str]) -> str:
        times = times_of(entry)
        base = times[self.base[0]]
        seconds = {FLOOR: entry.get("floor_s"), **{name: t.median for name, t in times.items()}}
        found = {name: seconds.get(name) for name in columns}
        cells = {n: self.text(own, base.median) if own else "-" for n, own in found.items()}
        cells[self.bold] = f"**{cells[self.bold]}**"
        name = entry["name"].replace(self.leave_out, "")
        return row(name, spread_text(base), *cells.values())


def kernels(results: Path) -> Iterator[str]:
    """Steps and averages of one machine, and the fastest rival of each."""
    yield HEADER
    yield from map(str, _own_lines(results / THREADS["1 thread"], KERNELS))


def steps_short(results: Path) -> Iterator[str]:
    """How many times as long torch's fastest step takes, by threads, groups and layout."""
    yield from _header("ResNet-110, 329 tensors", *THREADS)
    runs = [_own_lines(results / file, [*STEPS.values()]) for file in THREADS.values()]
    for label, *lines in zip(STEPS, *runs, strict=True):
        yield row(label, *(f"{line.ratio:.2f}x" for line in lines))


def fine_tuning_short(results: Path) -> Iterator[str]:
    """Fine-tuning on few images: errors, and what they cost."""
    (answer, *_) = answers(read_json(results / "worth-finetune-images.json"))
    titles = ["method", "lowest error %", "in", "CPU s", "CPU s to the mark", "saved"]
    yield from short_table(answer, titles)


def _own_lines(path: Path, names: Sequence[str]) -> list[Line]:
    """Ours as it comes, without its variants."""
    cases = read_json(path)["results"]
    return [x for name in names for x in lines_of(name, cases[name]) if x.ours == OURS]


def _header(*titles: str) -> tuple[str, str]:
    return row(*titles), f"|{'---|' * len(titles)}"


_LOOP = ensemble_cases.LOOP, "torch loop"
TABLES: dict[str, Callable[[Path], Iterator[str]]] = {
    "trainings": Ratios(
        "training",
        "model",
        (BASELINE, "torch"),
        {
            FLAGS: "flags",
            OURS: "`trim`",
            CACHE: "with `FeatureCache`",
            BEST_TORCH: "torch, channels_last, fused, no freezing",
            BEST_FLAGS: "flags, channels_last, fused",
            f"{OURS} channels_last": "`trim`, channels_last",
            f"{OURS} channels_last cache": "with `FeatureCache`, channels_last",
            FLOOR: "limit",
        },
        _saved,
    ),
    "trim": Ratios(
        "trim",
        "model",
        (step_cases.FLAGS, "flags"),
        {
            OURS: "`trim`",
            step_cases.IN_EVAL: "frozen part in eval mode",
            step_cases.CHANNELS_LAST: "and channels_last",
            step_cases.OURS_CHANNELS_LAST: "`trim`, channels_last",
        },
        _share,
        leave_out=", half of the parameters frozen",
    ),
    "kept": Ratios(
        "kept",
        "model, what is frozen",
        (step_cases.FLAGS, "flags"),
        {
            step_cases.IN_EVAL: "frozen part in eval mode",
            OURS: "`trim`",
            CACHE: "kept values",
            FLOOR: "the rest alone",
        },
        _share,
        bold=CACHE,
    ),
    "ensembles": Ratios(
        "ensemble",
        "model",
        _LOOP,
        {
            ensemble_cases.CHANNELS_LAST: "channels_last",
            ensemble_cases.VMAP: "`torch.func` vmap",
            OURS: "fastfreeze",
            ensemble_cases.NOT_FOLDED: "not folded",
            FLOOR: "bound",
        },
        _times,
    ),
    "ensembles-short": Ratios(
        "ensemble",
        "model",
        _LOOP,
        {ensemble_cases.VMAP: "`torch.func` vmap", OURS: "fastfreeze"},
        _times,
        sources=False,
    ),
    "fine-tuning-short": fine_tuning_short,
    "kernels": kernels,
    "steps-short": steps_short,
}
