"""The documentation: its code runs, its links and pictures hold, the reference is whole."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import re
import runpy
import shutil
import xml.etree.ElementTree as ET
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastfreeze
import fastfreeze.distributed
import fastfreeze.ensemble
import fastfreeze.schedule
import fastfreeze.trimming
from tests import snippets
from tests.snippets import ROOT

DOCS = ROOT / "docs"
HERE = (ROOT / "README.md").exists()
pytestmark = [
    pytest.mark.skipif(not HERE, reason="tests run outside the source tree"),
    pytest.mark.usefixtures("one_thread"),
]
PAGES = sorted(DOCS.glob("*.md"))
# Run elsewhere: under torchrun by test_distributed.py; by test_integrations_docs.py.
ELSEWHERE = {"distributed.md", "integrations.md"}
# What would take long, without which the code says the same.
TRIMMED = "torch.compile(fastfreeze.trim(model)"
REPLACED = [("num_workers=2", "num_workers=0"), (f"{TRIMMED})", f"{TRIMMED}, backend='eager')")]
NOT_RUN = {"backends.md": ["needs a GPU"]}


def page(name):
    return pytest.param(DOCS / name, id=name.removesuffix(".md"))


every_page = pytest.mark.parametrize("path", [page(path.name) for path in PAGES])


@pytest.mark.parametrize("path", [page(p.name) for p in PAGES if p.name not in ELSEWHERE])
def test_the_code_of_a_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets.run(path, snippets.names, REPLACED)


def test_the_network_of_how_it_works_prints_what_the_page_says(capsys):
    path = DOCS / "how-it-works.md"
    snippets.run(path, snippets.names)
    assert f"\n```\n{capsys.readouterr().out}```\n" in path.read_text()


def test_what_is_not_run_is_known():
    found = {p.name: [s.not_run for s in snippets.snippets(p) if s.not_run] for p in PAGES}
    assert {name: reasons for name, reasons in found.items() if reasons} == NOT_RUN


def prose(path):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path):
    """The headings of a page, as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize(
    "path", [*PAGES, *(ROOT / f for f in ("README.md", "CONTRIBUTING.md"))], ids=lambda p: p.stem
)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    for target in targets:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_map_has_every_page():  # and its toctree, as Sphinx checks
    text = (DOCS / "index.md").read_text()
    pages = {path.name for path in PAGES} - {"index.md"}
    assert not [name for name in pages if f"({name})" not in text]


def texts(picture):
    """What is written in an SVG file, in order."""
    return [t.text for t in ET.parse(picture).iter("{http://www.w3.org/2000/svg}text")]


def test_pictures_are_those_of_today(tmp_path):
    pytest.importorskip("matplotlib")
    script = shutil.copy(DOCS / "pictures.py", tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    drawn = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert drawn == ["graph-after.svg", "graph-before.svg", "schedules.svg"]
    for name in drawn:
        assert texts(DOCS / name) == texts(tmp_path / name)
    assert texts(tmp_path / "graph-after.svg").count("conv and norm, relu") == 2


# The reference


def own_names(module):
    """Public functions and classes that a module without ``__all__`` defines."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (getattr(value, "__module__", None) or "").startswith(module.__name__)
    ]


MODULES = ["lightning", "transformers", "tensorboard"]


def public():
    """Each public object by its name, with the module that it is a name of."""
    found = {}
    for module in (fastfreeze.trimming, fastfreeze.cache, fastfreeze.ensemble, fastfreeze):
        found |= {n: (module.__name__, getattr(module, n)) for n in module.__all__ if n[0] != "_"}
    for module in (fastfreeze.distributed, fastfreeze.schedule):
        for name in own_names(module):
            found.setdefault(name, (module.__name__, getattr(module, name)))
    return found


PUBLIC = public()
INTERNAL = {"check_initial_lr"}  # of fastfreeze.schedule
MADE_BY_FUNCTIONS = {"TrimmedModel"}  # whose docstrings tell the arguments


DIRECTIVE = re.compile(r"^\.\. (auto\w+|data|currentmodule):: (\S+)\n((?:   :.*\n)*)", re.MULTILINE)


def described():
    """Qualified names of what the pages of the reference describe."""
    for path in sorted((DOCS / "reference").glob("*.rst")):
        current = ""
        for kind, name, options in DIRECTIVE.findall(path.read_text()):
            if kind == "currentmodule":
                current = name
            elif kind == "automodule":
                listed = re.findall(r":members: (.+)", options)
                members = listed[0].split(", ") if listed else own_names(import_module(name))
                yield from (f"{name}.{member}" for member in members)
            else:
                yield name if name.startswith("fastfreeze.") else f"{current}.{name}"


DESCRIBED = set(described())


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - INTERNAL))
def test_a_public_name_is_in_the_reference(name):
    module, value = PUBLIC[name]
    homes = {module, getattr(value, "__module__", "")}
    if module == "fastfreeze":
        homes |= {"fastfreeze.ensemble", "fastfreeze.schedule"}
    assert DESCRIBED & {f"{home}.{name}" for home in homes}


@pytest.mark.parametrize("name", MODULES)
def test_the_integrations_are_in_the_reference(name):
    tree = (ROOT / "fastfreeze" / "integrations" / f"{name}.py").read_text()
    names = re.findall(r"^(?:def|class) ([A-Za-z]\w*)", tree, re.MULTILINE)
    assert {f"fastfreeze.integrations.{name}.{n}" for n in names} <= DESCRIBED


def lacking(name, function, text):
    """The parameters of a function that a docstring does not speak of."""
    parameters = inspect.signature(function).parameters.values()
    plain = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [f"{name}: {p}" for p in plain if p != "self" and not re.search(rf"\b{p}\b", text)]


def members(cls):
    """Public methods and properties that a class of ours defines, with its bases of ours."""
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("fastfreeze"):
            for name, value in vars(base).items():
                if not name.startswith("_"):
                    yield name, value


@pytest.mark.parametrize("name", sorted(n for n, (_, v) in PUBLIC.items() if callable(v)))
def test_a_docstring_says_what_it_needs_to(name):
    value = PUBLIC[name][1]
    if not hasattr(value, "__mro__") and not inspect.isfunction(value):
        return  # an alias of a type, which holds no docstring
    text = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
    assert text, "no docstring"
    if inspect.isfunction(value):
        assert not lacking(name, value, text)
        return
    parents = " ".join(base.__doc__ or "" for base in value.__mro__)
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value) if not f.name.startswith("_")]
        assert not [f for f in fields if not re.search(rf"\b{f}\b", parents)]
    elif "__init__" in vars(value) and name not in MADE_BY_FUNCTIONS:
        assert not lacking(name, value.__init__, text)
    for member, attribute in members(value):
        function = getattr(attribute, "__func__", attribute)
        if isinstance(attribute, property) or inspect.isfunction(function):
            said = inspect.getdoc(getattr(value, member))
            assert said, f"{member} has no docstring"


# Examples in docstrings


OTHER_PACKAGES = {"integrations", "cli", "__main__"}  # in whose docstrings are no examples


def modules():
    """The names of fastfreeze's modules, none of which is imported for that."""
    package = Path(fastfreeze.__file__).parent
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        if not OTHER_PACKAGES.intersection(parts) and not parts[-1].startswith("_triton"):
            yield ".".join(parts).removesuffix(".__init__")


def docstring_examples():
    """Each example by its name; of a module that cannot be imported, the reason by its name."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for name in modules():
        try:
            module = import_module(name)
        except (Exception, SystemExit) as error:  # one test of many
            found[name] = error
            continue
        found |= {test.name: test for test in finder.find(module, name) if test.examples}
    return found


EXAMPLES = docstring_examples()


class Blocks(nn.Module):
    """Blocks in a list."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def names_of_docstrings():
    """The names that docstrings use for the reader's own."""
    names = snippets.names()
    model, images, store = names["model"], names["images"], fastfreeze.MemorySnapshots()
    schedule = fastfreeze.SnapshotCycles(4, num_cycles=2)
    for step in (1, 2, 3):
        with torch.no_grad():
            next(model.parameters()).add_(1)
        store.save(model, step=step, cycle=step)
    return names | {
        "DataParallel": fastfreeze.distributed.DataParallel,
        "cache": lambda images, samples: model(images),
        "batches": [(images, names["labels"])] * 2,
        "criterion": names["loss_function"],
        "ensemble": fastfreeze.SnapshotEnsemble.from_store(model, store),
        "inputs": images,
        "models": [model, model],
        "network": fastfreeze.trim(model),
        "optimizer": fastfreeze.SGD(model.parameters(), lr=0.1),
        "schedule": schedule,
        "snapshots": [store.load(snapshot) for snapshot in store],
        "store": store,
        "train_step": lambda: None,
        "x": images,
        "x_test": images,
    }


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_example_of_a_docstring_runs(name, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if isinstance(EXAMPLES[name], BaseException):
        pytest.fail(f"{name} cannot be imported: {EXAMPLES[name]!r}")
    test, names = EXAMPLES[name], names_of_docstrings()
    if name.startswith("fastfreeze.distributed"):
        request.getfixturevalue("one_process")
    if name.endswith("param_groups"):
        names |= {"model": Blocks(), "images": torch.randn(2, 4)}
    if "samples in loader" in test.docstring:
        data = fastfreeze.RepeatableViews(names["dataset"], num_views=1)
        names["loader"] = torch.utils.data.DataLoader(data, batch_size=4)
    test.globs.update(names)
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
