"""Runs the notebooks of docs/notebooks/ from top to bottom and stores what they show. It needs no Jupyter.

python docs/make_notebooks.py            runs all of them
python docs/make_notebooks.py digits     runs one

Their first cell of code has the sizes as names in capitals; the tests run them with smaller ones.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent / "notebooks"


def _png(data: bytes) -> dict[str, Any]:
    return {
        "data": {"image/png": base64.b64encode(data).decode()},
        "metadata": {},
        "output_type": "display_data",
    }


def _figures() -> list[dict[str, Any]]:
    """The figures that are open, which are closed."""
    found = []
    for number in plt.get_fignums():
        file = io.BytesIO()
        plt.figure(number).savefig(file, dpi=80, bbox_inches="tight", metadata={"Software": None})
        found.append(_png(file.getvalue()))
        plt.close(number)
    return found


def execute(code: str, names: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Run a cell; what it printed, the value of its last expression, and its figures, as outputs."""
    tree = ast.parse(code, where)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, where, "exec"), names)
        value = eval(compile(ast.Expression(last.value), where, "eval"), names) if last else None
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines(printed.getvalue())})
    if hasattr(value, "_repr_png_"):
        outputs.append(_png(value._repr_png_()))
    elif value is not None:
        shown = {"text/plain": lines(repr(value))}
        outputs.append(
            {"data": shown, "execution_count": None, "metadata": {}, "output_type": "execute_result"}
        )
    return outputs + _figures()


def lines(text: str) -> list[str]:
    """A text as notebooks store it."""
    return text.splitlines(keepends=True)


def run(notebook: dict[str, Any], name: str, **sizes: object) -> None:
    """Run a notebook and put the outputs into its cells.

    Args:
        notebook: As it was read from its file; it is changed.
        name: For tracebacks.
        **sizes: Other values of names that the first cell of code sets.

    Raises:
        KeyError: The first cell of code does not set one of ``sizes``.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        cell["outputs"] = execute("".join(cell["source"]), names, f"{name}, cell {number}")
        cell["execution_count"] = number
        if number == 1:
            for size, value in sizes.items():
                names[size]  # it has to be there
                names[size] = value


if __name__ == "__main__":
    for file in sorted(FOLDER.glob("*.ipynb")):
        if sys.argv[1:] and file.stem not in sys.argv[1:]:
            continue
        content = json.loads(file.read_text())
        began = time.process_time()
        run(content, file.name)
        file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        seconds, size = time.process_time() - began, file.stat().st_size >> 10
        print(f"{file.name}: {seconds:.0f} s of processor time, {size} KiB")
