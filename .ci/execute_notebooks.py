"""Executes notebooks and keeps their outputs: execute_notebooks.py FOLDER NOTEBOOK...

One that shows no picture fails, as does one whose picture comes with the repr of an object.
"""

import pathlib
import sys
import time

import jupytext
import nbformat
from nbclient import NotebookClient

folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)


def shown(notebook):
    """What the outputs of the cells are: (media types, text)."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            yield set(output.get("data", ())), output.get("data", {}).get("text/plain", "")


for path in map(pathlib.Path, sys.argv[2:]):
    start = time.perf_counter()
    notebook = NotebookClient(jupytext.read(path), timeout=600, kernel_name="python3").execute()
    nbformat.write(notebook, folder / f"{path.stem}.ipynb")
    outputs = list(shown(notebook))
    if not any("image/png" in types for types, _ in outputs):
        sys.exit(f"{path}: no picture; is MPLBACKEND set, so that figures are not shown?")
    if stray := [text for types, text in outputs if types == {"text/plain"}]:
        sys.exit(f"{path}: a cell shows {stray[0]!r}; end it with `_ = …`")
    print(f"{path}: {time.perf_counter() - start:.0f} s")
