"""python -m benchmarks report: from invented results of every kind, and the one in docs/."""

from __future__ import annotations

import json

import pytest

report = pytest.importorskip("benchmarks.report", reason="tests run outside the source tree")
from benchmarks import pages, picture  # noqa: E402
from benchmarks.clock import Times  # noqa: E402
from benchmarks.lines import Line, lines_of, seconds_text, spread_text  # noqa: E402

MACHINE = {
    "cpu": "Some CPU",
    "threads": 1,
    "torch": "2.14",
    "python": "3.11",
    "fastfreeze": "0.1.0",
}


def times(median, low=None, high=None):
    return {"median": median, "low": low or 0.9 * median, "high": high or 1.1 * median}


def entry(name, seconds, floor=None, spread=True, **left_out):
    """A case's; seconds are medians, or all that is known of them."""
    found = {
        rival: t if isinstance(t, dict) else times(t) if spread else times(t, t, t)
        for rival, t in seconds.items()
    }
    return {"name": name, "left_out": left_out, "floor_s": floor, "seconds": found}


IN_EVAL, NOT_FOLDED = "flags, frozen part in eval mode", "fastfreeze, not folded"
LOOP, LAST, VMAP = "torch loop", "torch loop, channels_last", "torch.func vmap"
KERNELS = {
    "machine": {**MACHINE, "copy_gb_per_s": 20},
    "command": "python -m benchmarks --out /somewhere/x.json",
    "note": "beside other work",
    "results": {
        "sgd-net": entry(
            "SGD step, net",
            {"fastfreeze": 1e-3, "torch": 4e-3, "torch fused": times(2e-3, 1e-3, 3e-3)},
            0.5e-3,
            other="no nesterov",
        ),
        "sgd-wrong": entry("SGD step, wrong", {}, fastfreeze="wrong", other="no nesterov"),
        "trim-net": entry(
            "net, half of the parameters frozen", {"fastfreeze": 0.1, "flags": 0.25, IN_EVAL: 0.2}
        ),
        "trim-other": entry("other", {"fastfreeze": 0.05, "flags": 0.2}),
        "trim-wrong": entry("wrong", {}, fastfreeze="wrong"),
        "kept-net": entry(
            "net, 3 of 4 layers frozen",
            {"fastfreeze": 0.08, "fastfreeze cache": 0.03, "flags": 0.1},
            0.025,
        ),
        "host-net": entry("host time of a step, net", {"fastfreeze": 1e-4, "torch": 2e-4}),
        "norm": entry("norm", {"fastfreeze": 2e-5, "torch": 3e-5}),
    },
}
ENSEMBLE = {
    "machine": MACHINE,
    "command": "python -m benchmarks net --out=/somewhere/y.json --rounds 9",
    "results": {
        "ensemble-resnet20-4": entry(
            "net, batch 4, 5 members, 75% of the MACs shared",
            {LOOP: 0.01, LAST: 0.02, VMAP: 0.02, "fastfreeze": 0.002, NOT_FOLDED: 0.004},
            0.004,
            vmap="1e-3 from the loop in float64",
        )
    },
}
TRAINING = {
    "machine": {**MACHINE, "threads": 2},
    "command": "python -m benchmarks.training net",
    "results": {
        "training-vgg16-0.5": entry(
            "net, t_0=0.5, 100 steps, 7 freezes",
            {"torch": 20.0, "flags": 12.0, "fastfreeze": 10.0, "fastfreeze cache": 8.0},
            8.0,
            spread=False,
        ),
        "training-bad-0.5": entry("bad", {}, fastfreeze="losses differ"),
    },
}
PEERS = {
    "machine": MACHINE,
    "command": "python -m benchmarks.peers",
    "results": {
        "peers-training": entry(
            "training", {"fastfreeze, sticky": 30.0, "torchensemble": 60.0}, spread=False
        ),
        "peers-sticky": entry(
            "prediction, fastfreeze, sticky",
            {"fastfreeze": 0.1, LOOP: 0.3, "torchensemble 0.2": 0.2},
        ),
    },
}
FILES = {"a.json": KERNELS, "b.json": ENSEMBLE, "c.json": TRAINING, "d.json": PEERS}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "results"
    path.mkdir()
    for name, data in FILES.items():
        (path / name).write_text(json.dumps(data))
    return path


@pytest.fixture
def text(folder):
    return report.markdown(report.collect(folder)).splitlines()


def test_each_kind_of_result_has_its_line(text):
    rows = [line for line in text if line.startswith("| ") and not line.startswith("| case")]
    assert len(rows) == 13
    for row in [
        "| SGD step, net | 1 ms (0.9-1.1) | torch fused: 2 ms (1-3) | 2.00 | 500 µs |",
        "| net, half of the parameters frozen | 100 ms (90-110) "
        "| flags, frozen part in eval mode: 200 ms (180-220) | 2.00 | - |",
        "| net, 3 of 4 layers frozen | fastfreeze cache: 30 ms (27-33) | flags: 100 ms (90-110) "
        "| 3.33 | 25 ms |",
        "| host time of a step, net | 100 µs (90-110) | torch: 200 µs (180-220) | 2.00 | - |",
        "| norm | 20 µs (18-22) | torch: 30 µs (27-33) | 1.50 | - |",
        "| net, batch 4, 5 members, 75% of the MACs shared | fastfreeze, not folded: 4 ms (3.6-4.4)"
        " | torch loop: 10 ms (9-11) | 2.50 | 4 ms |",
        "| net, t_0=0.5, 100 steps, 7 freezes | fastfreeze cache: 8 s | flags: 12 s | 1.50 | 8 s |",
        "| training | fastfreeze, sticky: 30 s | torchensemble: 60 s | 2.00 | - |",
        "| prediction, fastfreeze, sticky | 100 ms (90-110) | torchensemble 0.2: 200 ms (180-220) "
        "| 2.00 | - |",
    ]:
        assert row in rows


def test_who_has_no_numbers_and_who_made_them_are_told(text):
    for line in [
        "- other: no nesterov (2 cases)",
        "- fastfreeze: wrong (1 case)",
        "- vmap: 1e-3 from the loop in float64 (1 case)",
        "Some CPU, 2 threads; torch 2.14, Python 3.11, fastfreeze 0.1.0",
        "- `python -m benchmarks`; beside other work ([data](../benchmarks/results/a.json))",
        "- `python -m benchmarks net --rounds 9` ([data](../benchmarks/results/b.json))",
    ]:
        assert line in text


def test_one_machine_has_one_table_of_a_kind_and_another_its_own(folder):
    more = {**KERNELS, "results": {"sgd-more": {**KERNELS["results"]["sgd-net"], "name": "more"}}}
    (folder / "e.json").write_text(json.dumps(more))
    other = {**more, "machine": {**MACHINE, "cpu": "Another CPU"}}
    (folder / "f.json").write_text(json.dumps(other))
    (folder / "d.json").rename(folder / "z.json")  # the order of kinds does not depend on it
    tables = report.collect(folder)
    assert list(dict.fromkeys(table.title for table in tables)) == list(report.KINDS)
    steps = [t for t in tables if t.title == "Optimizer step"]
    assert [[line.case for line in table.lines] for table in steps] == [
        ["SGD step, net", "more"],
        ["more"],
    ]
    assert list(steps[0].made_by) == ["a.json", "e.json"]


def test_a_file_of_another_kind_is_refused(folder):
    (folder / "x.json").write_text(json.dumps({"machine": MACHINE, "numbers": []}))
    with pytest.raises(ValueError, match=r"x\.json must hold results; it holds machine, numbers"):
        report.collect(folder)


def test_the_command_writes_the_same_files_each_time(folder, tmp_path):
    pytest.importorskip("matplotlib")
    written = []
    for run in ("first", "second"):
        out = tmp_path / run
        out.mkdir()
        assert report.main([f"--results={folder}", f"--out={out}"]) == 0
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1]
    assert written[0].keys() == {"benchmarks.md", "benchmarks.png"}
    assert written[0]["benchmarks.png"].startswith(b"\x89PNG")


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([f"--results={tmp_path}"])
    assert "--results must be a folder with results" in capsys.readouterr().err


@pytest.mark.skipif(
    not (report.REPOSITORY / "README.md").exists(), reason="tests run outside the source tree"
)
def test_the_committed_file_is_what_the_committed_data_give():
    committed = (report.DOCS / "benchmarks.md").read_bytes().decode()
    assert committed == report.markdown(report.collect(report.RESULTS)), (
        "run python -m benchmarks report"
    )
    assert (report.DOCS / "benchmarks.png").exists()


def line(own, best, **options):
    return Line("key", "case", "fastfreeze", Times(*own), "torch", Times(*best), **options)


def test_a_ratio_and_what_it_lies_between():
    found = line((2.0, 1.0, 4.0), (6.0, 5.0, 8.0))
    assert found.ratio == 3
    assert picture.ratio_spread(found) == (5 / 4, 8 / 1)


def test_the_best_rival_is_none_of_ours():
    seconds = {"fastfreeze": 2.0, "a": 3.0, "b": 2.5, "fastfreeze b": 1.0}
    found = lines_of("key", entry("case", seconds))
    assert [(x.ours, x.rival, x.ratio) for x in found] == [
        ("fastfreeze", "b", 1.25),
        ("fastfreeze b", "b", 2.5),
    ]
    assert lines_of("key", entry("case", {"fastfreeze": 1.0})) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(29.4e-6, "29.4 µs"), (12.21e-3, "12.2 ms"), (0.4528, "453 ms"), (1, "1 s"), (258.4, "258 s")],
)
def test_units(seconds, text):
    assert seconds_text(seconds) == text
    assert spread_text(Times(seconds, seconds, seconds)) == text


def table_of(count):
    return report.Table("Kernels", "machine", [line((1.0,) * 3, (2.0,) * 3)] * count)


@pytest.mark.parametrize(
    ("counts", "left"), [([3], 0), ([5, 5], 1), ([9, 1, 1], 1), ([1, 1, 9], 2), ([2, 2, 2, 2], 2)]
)
def test_columns_are_about_equal_in_height(counts, left):
    tables = [table_of(count) for count in counts]
    columns = picture.halves(tables)
    assert [*columns[0], *columns[1]] == tables
    assert len(columns[0]) in (left, len(tables) - left)


def test_the_tables_of_the_pages_are_up_to_date():
    for page in pages.PAGES:
        text = (report.REPOSITORY / page).read_text()
        assert text.count("<!-- table: ") >= 2
        assert text.count("<!-- table: ") == text.count("<!-- end of table -->")
        assert pages.with_tables(text, report.RESULTS) == text, (
            f"run python -m benchmarks report: {page}"
        )


def test_a_table_is_replaced_and_nothing_else(folder, tmp_path):
    for page in pages.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(
            "before\n<!-- table: trainings -->\nold\n<!-- end of table -->\nafter\n"
        )
    pages.update(tmp_path, folder)
    for page in pages.PAGES:
        text = (tmp_path / page).read_text()
        row = "| net, t_0=0.5, 100 steps, 7 freezes | 20 s | 40% | **50%** | 60% | 60% |"
        assert text.startswith("before\n<!-- table: trainings -->\n| model | torch |")
        assert f"\n{row}\n\nbad: losses differ.\n\nSome CPU, 2 threads; torch 2.14," in text
        assert text.endswith("c.json)).\n<!-- end of table -->\nafter\n")
        assert "old" not in text


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        (
            "trim",
            [
                "| net | 250 ms (225-275) | **0.40** | 0.80 |",
                "| other | 200 ms (180-220) | **0.25** | - |",
            ],
        ),
        (
            "kept",
            ["| net, 3 of 4 layers frozen | 100 ms (90-110) | 0.80 | **0.30** | 0.25 |"],
        ),
        (
            "ensembles",
            [
                "| net, batch 4, 5 members, 75% of the MACs shared | 10 ms (9-11) | 0.50x | 0.50x "
                "| **5.00x** | 2.50x | 2.50x |"
            ],
        ),
        (
            "trainings",
            ["| net, t_0=0.5, 100 steps, 7 freezes | 20 s | 40% | **50%** | 60% | 60% |"],
        ),
    ],
)
def test_tables_of_ratios(folder, table, rows):
    header, _, *found = "\n".join(pages.TABLES[table](folder)).splitlines()
    assert [line for line in found if line.startswith("|")] == rows
    assert {header.count("|")} == {row.count("|") for row in rows}
    notes = [line for line in found if line and not line.startswith("|")]
    assert len(notes) == {"trim": 2, "trainings": 2}.get(table, 1)
    assert table != "trim" or notes[0] == "wrong: wrong."


def test_an_unknown_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"table must be one of trainings, .* got 'x'"):
        pages.with_tables("<!-- table: x -->\n<!-- end of table -->", tmp_path)
