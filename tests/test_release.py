"""What a release consists of: one version, its texts, its files, and the same checks before a commit."""

import fnmatch
import re
import tomllib
from pathlib import Path

import distmatch

ROOT = Path(__file__).parents[1]
PACKAGE = Path(distmatch.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_the_same_everywhere() -> None:
    assert (ROOT / PROJECT["tool"]["hatch"]["version"]["path"]).read_text().count(distmatch.__version__) == 1
    assert f"\nversion: {distmatch.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[:2] == ["Unreleased", distmatch.__version__]


def test_the_licence_is_whole_and_named() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability." in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert PROJECT["project"]["license-files"] == ["LICENSE"]


def test_a_wheel_holds_all_files_of_the_package() -> None:
    """hatchling takes what lies in the package and is neither excluded nor ignored by git."""
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["src/distmatch"]}
    lines = (ROOT / ".gitignore").read_text().splitlines()
    patterns = [line.strip("/") for line in lines if line and not line.startswith(("#", "/", "__pycache__"))]
    data = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert {"py.typed", "style.css", "template.html.j2", "compare.html.j2"} <= {p.name for p in data}
    for path in data:
        parts = path.relative_to(PACKAGE).parts
        assert not any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in patterns), path


def test_a_commit_is_checked_by_what_ci_runs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    checks = re.findall(r"^\t\$\(BIN\)/((?:ruff|mypy).*)$", makefile, re.MULTILINE)
    hooks = re.findall(r"entry: \.venv/bin/(.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks == checks
