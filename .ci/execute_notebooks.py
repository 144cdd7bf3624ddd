"""Executes notebooks and keeps their outputs: execute_notebooks.py FOLDER NOTEBOOK..."""

import pathlib
import sys
import time

import jupytext
import nbformat
from nbclient import NotebookClient

folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for path in map(pathlib.Path, sys.argv[2:]):
    start = time.perf_counter()
    notebook = NotebookClient(jupytext.read(path), timeout=600, kernel_name="python3").execute()
    nbformat.write(notebook, folder / f"{path.stem}.ipynb")
    print(f"{path}: {time.perf_counter() - start:.0f} s")
