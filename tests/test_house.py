"""The structure: packages import only from those above, importing is cheap, proofs name their tests."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import distmatch

PACKAGE = Path(distmatch.__file__).parent
ROOMS = [
    "base",
    "divergences",
    "discrepancies",
    "diffusion",
    "losses",
    "nets",
    "discrete",
    "data",
    "ratio",
    "interop",
    "methods",
    "metrics",
    "report",
    "training",
    "api",
    "cli",
]


# Files that import modules by names known only at run time, with the reason why no package is reached so.
BY_NAME = {
    "cli/main.py": "the verbs of its own table, which is read here",
    "interop/optional.py": "optional packages, none of ours",
}
_IMPORTERS = {"__import__", "import_module", "find_spec"}
_OURS = re.compile(r"distmatch(\.\w+)+")


def imported_modules(source: str, package: str) -> set[str]:
    """Modules of ours that a file reaches, at its top or inside functions, by statement or by name.

    Args:
        source: The text of the file.
        package: The package that it lies in, from which relative imports count.
    """
    found, by_name, texts = set(), False, set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, base] if base else parts)
            by_name |= any(a.name in _IMPORTERS for a in node.names)
            # `from distmatch import x`: a package, or a public name, which belongs to distmatch as a whole.
            found |= {f"{base}.{a.name}" for a in node.names} if base == "distmatch" else {base}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            by_name |= name in _IMPORTERS
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
    if by_name:
        found |= {"by name", *filter(_OURS.fullmatch, texts)}
    return {name for name in found if name.split(".")[0] in ("distmatch", "by name")}


@pytest.mark.parametrize("file", BY_NAME)
def test_what_may_import_by_name_still_does(file):
    assert "by name" in imported_modules((PACKAGE / file).read_text(), "distmatch")


def imported_rooms(file: Path) -> set[str]:
    place = file.relative_to(PACKAGE)
    modules = imported_modules(file.read_text(), ".".join(["distmatch", *place.parent.parts]))
    if place.as_posix() in BY_NAME:
        modules.discard("by name")
    return {name.split(".")[1] if "." in name else name for name in modules}


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("import torch, distmatch.nets.edm", {"distmatch.nets.edm"}),
        ("def f():\n    from distmatch.cli.main import main", {"distmatch.cli.main"}),
        ("from distmatch import api, nets", {"distmatch.api", "distmatch.nets"}),
        ("from distmatch import distill", {"distmatch.distill"}),
        ("import distmatch", {"distmatch"}),
        ("from .. import api", {"distmatch.api"}),
        ("from ..cli import main", {"distmatch.cli"}),
        ("from . import edm", {"distmatch.nets"}),
        ("import importlib\nimportlib.import_module('distmatch.api')", {"distmatch.api", "by name"}),
        ("from importlib import import_module as get\nget('distmatch.api')", {"distmatch.api", "by name"}),
        ("__import__('torch')", {"by name"}),
        ("text = 'distmatch.api'", set()),
    ],
)
def test_every_way_to_import_is_seen(source, modules):
    assert imported_modules(source, "distmatch.nets") == modules


@pytest.mark.parametrize("room", ROOMS)
def test_a_package_imports_only_from_packages_above_it(room):
    place = PACKAGE / room
    files = list(place.glob("**/*.py")) if place.is_dir() else [PACKAGE / f"{room}.py"]
    assert files
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for file in files:
        assert imported_rooms(file) <= allowed, f"{file.relative_to(PACKAGE)} reaches down"


def test_modules_do_not_import_each_other_in_a_circle():
    """Imports for types and inside functions count: modules in a circle cannot be read one by one."""
    names = {}
    for file in PACKAGE.rglob("*.py"):
        parts = ["distmatch", *file.relative_to(PACKAGE).with_suffix("").parts]
        names[".".join(parts).removesuffix(".__init__")] = file
    graph: dict[str, set[str]] = {}
    for name, file in names.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found = [f"{node.module}.{alias.name}" for alias in node.names]
                graph[name] |= {full if full in names else node.module for full in found}
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
        graph[name] &= set(names) - {name}
    reached = {name: set(graph[name]) for name in graph}
    grew = True
    while grew:
        grew = False
        for further in reached.values():
            more = further.union(*(reached[name] for name in further))
            grew |= len(more) > len(further)
            further |= more
    circles = {frozenset(m for m in reached[name] if name in reached[m]) for name in graph}
    assert not [set(circle) for circle in circles if circle]


def test_every_room_is_in_the_table():
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms <= set(ROOMS)
    table = (PACKAGE.parents[1] / "docs/architecture.md").read_text()
    assert all(f"`{room}/`" in table for room in rooms)


def test_no_asserts_and_no_unpickling_in_the_library():
    for file in PACKAGE.rglob("*.py"):
        loads = safe = 0
        for node in ast.walk(ast.parse(file.read_text())):
            assert not isinstance(node, ast.Assert), f"{file}: a user's mistake must raise a clear error"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                assert name not in {"pickle.load", "pickle.loads", "joblib.load"}, file
                loads += name == "torch.load"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe += any(ast.unparse(k) == "weights_only=True" for k in node.keywords)
        assert loads == safe, f"{file}: only tensors may be unpickled"


def test_importing_takes_no_torch_and_little_time():
    code = (
        "import time; t = time.perf_counter(); import distmatch, sys; "
        "print(time.perf_counter() - t); print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, loaded = out.splitlines()
    assert float(seconds) < 2
    assert loaded == "False False"


def test_public_names_exist():
    for name in distmatch.__all__:
        assert getattr(distmatch, name) is not None
    assert callable(distmatch.distill)
    assert callable(distmatch.train)


def test_checkers_of_users_see_our_types():
    assert (PACKAGE / "py.typed").is_file()


PROOFS = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "make_proofs.py"))


def test_the_page_of_proofs_names_tests_that_there_are():
    assert PROOFS["check"]() == []


def test_a_proof_whose_test_is_gone_is_missed():
    there, renamed = "tests/test_house.py::test_public_names_exist", "tests/test_house.py::test_none"
    moved = "tests/nowhere.py::test_public_names_exist"
    assert PROOFS["missing"]([there, renamed, moved]) == [renamed, moved]
