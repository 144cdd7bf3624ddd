"""Executes percent-format notebooks from top to bottom: python .ci/execute_notebooks.py NOTEBOOK..."""

import sys
import time

import jupytext
from nbclient import NotebookClient

for path in sys.argv[1:]:
    start = time.perf_counter()
    NotebookClient(jupytext.read(path), timeout=600, kernel_name="python3").execute()
    print(f"{path}: {time.perf_counter() - start:.0f} s")
