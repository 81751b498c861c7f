"""Tables of README.md and of docs/ that ``python -m benchmarks report`` writes from the data.

A page says where with ``<!-- table: NAME -->`` and ``<!-- end of table -->``; what lies between is
replaced.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import step_cases
from benchmarks.compare import lines_of_entry
from benchmarks.lines import Line, seconds_text, spread_text
from benchmarks.measure import Times
from benchmarks.results import hardware_of, made_by
from benchmarks.training_rivals import BEST_TORCH, FLAGS
from fastfreeze.files import write_atomic

PAGES = ("README.md", "docs/results.md", "docs/what-trim-gains.md")
TITLES = {
    "densenet-bc-40": "DenseNet-BC-40 (k=12)",
    "wrn16-2": "WRN-16-2",
    "vgg16": "VGG-16",
    "resnet20": "ResNet-20",
}
OURS, CACHE = "fastfreeze", "fastfreeze cache"
# What docs/results.md shows of steps and averages.
KERNELS = (
    "sgd-resnet110-per-layer",
    "sgd-resnet110-per-layer-channels-last",
    "sgd-resnet110",
    "sgd-resnet110-channels-last",
    "sgd-densenet-bc-100-per-layer",
    "sgd-wrn40-4-per-layer",
    "sgd-vgg16",
    "sgd-resnet50",
    "softmax-5-256-10",
    "softmax-5-1024-100",
    "softmax-6-4096-1000",
    "statistics-6-4096-1000",
    "statistics-10-64-50257",
)
STEPS = {
    "a group for each of 110 layers": "sgd-resnet110-per-layer",
    "the same, in channels_last": "sgd-resnet110-per-layer-channels-last",
    "one group": "sgd-resnet110",
    "one group, in channels_last": "sgd-resnet110-channels-last",
}
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


Trained = tuple[str, str, int, dict]  # model, t_0, steps, entry


def _trainings(results: Path) -> list[Trained]:
    """All trainings, by model, t_0 and falling length."""
    found = [
        (model, t_0, entry["steps"], at)
        for path in sorted(results.glob("training-*.json"))
        for model, entry in json.loads(path.read_text())["models"].items()
        for t_0, at in entry["t_0"].items()
    ]
    return sorted(found, key=lambda run: (list(TITLES).index(run[0]), float(run[1]), -run[2]))


def trainings(results: Path) -> Iterator[str]:
    """Every training: what is saved of the time without freezing."""
    yield from _header(
        "model, t_0",
        "steps, freezes",
        "flags",
        "torch, channels_last, fused, no freezing",
        "`trim`",
        "long run",
        "with `FeatureCache`",
        "long run",
        "limit",
        "a freeze in steps: median (highest)",
    )
    for model, t_0, steps, at in _trainings(results):
        rivals = at["rivals"]
        recuts = rivals[OURS]["recuts"]
        yield _row(
            f"{TITLES[model]}, {t_0}",
            f"{steps}, {at['freezes']}",
            _saved(rivals, FLAGS),
            _saved(rivals, BEST_TORCH),
            f"**{_saved(rivals, OURS)}**",
            f"{rivals[OURS]['saved_in_a_long_run']:.0%}",
            _saved(rivals, CACHE),
            f"{rivals[CACHE]['saved_in_a_long_run']:.0%}",
            f"{at['limit']['median']:.0%}",
            f"{statistics.median(recuts):.1f} ({max(recuts):.1f})",
        )
    for path in sorted(results.glob("training-*.json")):
        data = json.loads(path.read_text())
        yield from ("", f"{hardware_of(data)}. Made by {made_by(data, path.name)}.")


def trainings_short(results: Path) -> Iterator[str]:
    """The same for the README: flags, ours and the cache."""
    yield from _header(
        "model, `t_0`, steps", "`requires_grad=False` alone", "`trim`", "with `FeatureCache`"
    )
    for model, t_0, steps, at in _trainings(results):
        flags, own, cache = (_saved(at["rivals"], rival) for rival in (FLAGS, OURS, CACHE))
        yield _row(f"{TITLES[model]}, {t_0}, {steps}", flags, f"**{own}**", cache)


def _saved(rivals: dict, name: str) -> str:
    return f"{rivals[name]['saved']['median']:.0%}" if name in rivals else "-"


def _steps(results: Path, kind: str) -> Iterator[tuple[str, dict, list[tuple[str, dict]]]]:
    """Of each file of training steps: its name, the data, and the cases of a kind."""
    for path in sorted(results.glob("trim-*.json")):
        data = json.loads(path.read_text())
        cases = data["results"].items()
        yield path.name, data, [(key, e) for key, e in cases if key.startswith(f"{kind}-")]


def _of_flags(seconds: Mapping[str, dict], rival: str) -> str:
    """A rival's time as a share of that of flags."""
    if rival not in seconds:
        return "-"
    return f"{seconds[rival]['median'] / seconds[step_cases.FLAGS]['median']:.2f}"


def trim(results: Path) -> Iterator[str]:
    """Steps of each model with half of it frozen, those that gain most first."""
    for name, data, cases in _steps(results, "trim"):
        measured = [(key, e["seconds"]) for key, e in cases if OURS in e["seconds"]]
        measured.sort(key=lambda case: float(_of_flags(case[1], OURS)))
        shares = [float(_of_flags(seconds, OURS)) for _, seconds in measured]
        faster, slower = sum(x < 0.98 for x in shares), sum(x > 1.02 for x in shares)
        yield (
            f"{hardware_of(data)}. Of {len(shares)} models {faster} are faster than with flags by "
            f"more than 2%, {slower} slower."
        )
        yield ""
        yield from _header(
            "model",
            "flags",
            "`trim`",
            "`trim` : flags",
            "frozen part in eval mode : flags",
            "and channels_last : flags",
            "`trim`, channels_last : flags",
        )
        for key, seconds in measured:
            yield _row(
                key.removeprefix("trim-"),
                *(spread_text(Times(**seconds[rival])) for rival in (step_cases.FLAGS, OURS)),
                f"**{_of_flags(seconds, OURS)}**",
                _of_flags(seconds, step_cases.IN_EVAL),
                _of_flags(seconds, step_cases.CHANNELS_LAST),
                _of_flags(seconds, step_cases.OURS_CHANNELS_LAST),
            )
        for key, entry in cases:
            if OURS not in entry["seconds"]:
                yield from ("", f"{key.removeprefix('trim-')}: {entry['left_out'][OURS]}.")
        yield from ("", f"Made by {made_by(data, name)}.", "")


def kept(results: Path) -> Iterator[str]:
    """Steps with kept values, beside flags and beside the rest alone."""
    for name, data, cases in _steps(results, "kept"):
        yield from (f"{hardware_of(data)}.", "")
        yield from _header(
            "model, what is frozen",
            "flags",
            "frozen part in eval mode : flags",
            "`trim` : flags",
            "kept values",
            "flags : kept values",
            "the rest alone",
            "kept values : the rest alone",
        )
        for _, entry in cases:
            seconds, floor = entry["seconds"], entry.get("floor_s")
            if step_cases.CACHE not in seconds:
                yield _row(entry["name"], f"refused: {entry['left_out']}", *["-"] * 6)
                continue
            own = seconds[step_cases.CACHE]["median"]
            yield _row(
                entry["name"],
                spread_text(Times(**seconds[step_cases.FLAGS])),
                _of_flags(seconds, step_cases.IN_EVAL),
                _of_flags(seconds, OURS),
                spread_text(Times(**seconds[step_cases.CACHE])),
                f"**{seconds[step_cases.FLAGS]['median'] / own:.1f}**",
                "-" if floor is None else seconds_text(floor),
                "-" if floor is None else f"{own / floor:.2f}",
            )
        yield from ("", f"Made by {made_by(data, name)}.", "")


_ENSEMBLE_RIVALS = {
    "torch loop, channels_last": "channels_last",
    "torch.func vmap": "`torch.func` vmap",
    OURS: "fastfreeze",
    "fastfreeze, not folded": "not folded",
}


def _ensembles(results: Path, names: Sequence[str], *, bound: bool) -> Iterator[str]:
    titles = [_ENSEMBLE_RIVALS[name] for name in names]
    last = ["bound"] if bound else []
    yield from _header("model, batch size", "torch loop, ms", *titles, *last)
    cases = json.loads((results / "predict-epyc-1-thread.json").read_text())["cases"]
    for case in cases:
        seconds = {name: times["median"] for name, times in case["seconds"].items()}
        loop = seconds["torch loop"]
        ratios = [f"{loop / seconds[name]:.2f}x" for name in names]
        ratios[names.index(OURS)] = f"**{ratios[names.index(OURS)]}**"
        yield _row(
            f"{TITLES[case['model']]}, {case['batch_size']}",
            f"{1e3 * loop:.3g}",
            *ratios,
            *([f"{case['bound']:.2f}x"] if bound else []),
        )


def ensembles(results: Path) -> Iterator[str]:
    """Forward passes of ensembles, as ratios to a loop over the members."""
    return _ensembles(results, list(_ENSEMBLE_RIVALS), bound=True)


def ensembles_short(results: Path) -> Iterator[str]:
    """The same without the variants."""
    return _ensembles(results, ["torch.func vmap", OURS], bound=False)


def kernels(results: Path) -> Iterator[str]:
    """Steps and averages of one machine, in microseconds, and the fastest rival of each."""
    yield from _header(
        "case",
        "fastfreeze, µs (quartiles)",
        "best rival, µs (quartiles)",
        "ratio",
        "floor, µs",
    )
    cases = json.loads((results / THREADS["1 thread"]).read_text())["results"]
    for name in KERNELS:
        line = _line_of(name, cases[name])
        yield _row(
            line.case,
            _microseconds(line.own),
            f"{line.rival}: {_microseconds(line.best)}",
            f"{line.ratio:.2f}",
            f"{1e6 * cases[name]['floor_s']:.0f}",
        )


def steps_short(results: Path) -> Iterator[str]:
    """How many times as long torch's fastest step takes, by threads, groups and layout."""
    yield from _header("ResNet-110, 329 tensors", *THREADS)
    runs = [json.loads((results / file).read_text())["results"] for file in THREADS.values()]
    for label, name in STEPS.items():
        yield _row(label, *(f"{_line_of(name, run[name]).ratio:.2f}x" for run in runs))


def _line_of(name: str, entry: dict) -> Line:
    """Ours as it comes, without its variants."""
    return next(line for line in lines_of_entry(name, entry) if line.ours == OURS)


def _microseconds(times: Times) -> str:
    median, low, high = (1e6 * t for t in (times.median, times.low, times.high))
    return f"{median:.0f} ({low:.0f}-{high:.0f})"


def _header(*titles: str) -> Iterable[str]:
    return _row(*titles), f"|{'---|' * len(titles)}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


TABLES: dict[str, Callable[[Path], Iterator[str]]] = {
    "trainings": trainings,
    "trainings-short": trainings_short,
    "trim": trim,
    "kept": kept,
    "ensembles": ensembles,
    "ensembles-short": ensembles_short,
    "kernels": kernels,
    "steps-short": steps_short,
}
