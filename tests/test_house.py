"""The structure: rooms import only from rooms above them, and importing the package is cheap."""

import ast
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
    "discrete",
    "nets",
    "data",
    "ratio",
    "interop",
    "methods",
    "metrics",
    "training",
    "report",
    "api",
    "cli",
]


def imported_rooms(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("distmatch.")}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_above_it(room):
    place = PACKAGE / room
    files = list(place.glob("**/*.py")) if place.is_dir() else [PACKAGE / f"{room}.py"]
    assert files
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for file in files:
        assert imported_rooms(file) <= allowed, f"{file.relative_to(PACKAGE)} reaches down"


def test_every_room_is_in_the_table():
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms <= set(ROOMS)
    table = (PACKAGE.parents[1] / "docs/architecture.md").read_text()
    assert all(f"`{room}/`" in table for room in rooms)


def test_no_asserts_and_no_unpickling_in_the_library():
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            assert not isinstance(node, ast.Assert), f"{file}: a user's mistake must raise a clear error"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                assert name not in {"pickle.load", "pickle.loads", "torch.load", "joblib.load"}, file


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
