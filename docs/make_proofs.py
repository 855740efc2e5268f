"""Writes docs/proofs.md, the statements with their tests, from docs/proofs.toml.

python docs/make_proofs.py          writes the page
python docs/make_proofs.py --check  reports errors in the table or the page, and writes nothing
"""

from __future__ import annotations

import ast
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGE, TABLE = DOCS / "proofs.md", DOCS / "proofs.toml"
HEAD = """# How the proofs work

A test that repeats the code it tests proves nothing. Here a result is compared with something that shares no
code with the library:

| held against | for example |
|---|---|
| a closed form | divergences between Gaussians; the mean and the variance of a weight |
| an exact teacher | a mixture of Gaussians has its score, density and posterior at every noise level |
| finite differences | the gradient of each objective, against integrals over densities |
| high precision | divergences at log ratios from -80 to 80, in 250 digits |
| another package | SciPy, torch.distributions, diffusers, onnxruntime |
| statistics | an error bar covers the truth as often as it states; seed and number of draws are in the test |
| another way to the same result | a run that was killed and continued, or shared out over processes |

To see what a test holds, break the formula in the code and run it. Exact teachers are there for you too:
`dm.load_teacher("ring8")`, or a `dm.GaussianMixture` of your own.

## Verified statements

Each statement below is verified by the tests in its row. Numbers in brackets are from arXiv. {count}
statements, {tests} tests; run one by its file, `pytest tests/FILE.py -k NAME`.

`docs/make_proofs.py` writes this page from [proofs.toml](proofs.toml); a test keeps both in agreement.
"""


def parts() -> list[dict[str, Any]]:
    """The table: parts with a title and identities, each with ``says``, ``source``, ``tests``, ``why``."""
    return tomllib.loads(TABLE.read_text())["part"]


@cache
def functions(file: str) -> set[str]:
    """The names of the functions of a file, given from the root of the project; none if it is missing."""
    path = DOCS.parent / file
    body = ast.parse(path.read_text()).body if path.is_file() else []
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def missing(tests: list[str]) -> list[str]:
    """Those of the tests, ``tests/FILE.py::test_NAME``, that do not exist."""
    return [test for test in tests if test.partition("::")[2] not in functions(test.partition("::")[0])]


def page() -> str:
    """The text of the page."""
    table = parts()
    identities = [identity for part in table for identity in part["identity"]]
    tests = {test for identity in identities for test in identity["tests"]}
    lines = [HEAD.format(count=len(identities), tests=len(tests))]
    for part in table:
        lines += [f"### {part['title']}", "", "| statement | source | tests |", "|---|---|---|"]
        for identity in part["identity"]:
            links = [f"[{t.partition('::test_')[2]}](../{t.partition('::')[0]})" for t in identity["tests"]]
            cells = (
                identity["says"],
                identity.get("source", ""),
                ", ".join(links) or f"none: {identity['why']}",
            )
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines).strip() + "\n"


def check() -> list[str]:
    """What is wrong, a sentence each."""
    wrong = []
    for part in parts():
        for identity in part["identity"]:
            wrong += [
                f"there is no test {test}, named for: {identity['says']}"
                for test in missing(identity["tests"])
            ]
            if bool(identity["tests"]) == bool(identity.get("why")):
                wrong.append(f"either tests or a reason why there are none: {identity['says']}")
    if not PAGE.is_file() or PAGE.read_text() != page():
        wrong.append(f"{PAGE.name} is not what {TABLE.name} says: run python docs/make_proofs.py")
    return wrong


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit("\n".join(check()) or 0)
    PAGE.write_text(page())
