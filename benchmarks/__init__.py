"""Comparisons with other optimizers: ``python -m benchmarks.compare`` and ``python -m
benchmarks.scaling``.

They run from a clone; the wheel does not hold them. SciPy's LAPACK, which JAX calls on a CPU,
competes with XLA's own threads for the cores, so it gets one."""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"
