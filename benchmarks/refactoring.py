"""What a change does to programs and times: ``python -m benchmarks.refactoring OLD NEW``.

OLD and NEW are folders that hold the package `optax_curv`. Six update steps of each are compiled
and timed in processes of their own, side by side: instructions of the optimised program, processor
time of tracing and compiling it, and the time of a step (the mean one has new roots and bases).
Printed are the ratios new / old, their medians and ranges; or, of one folder alone, its figures.
``--growth`` tells how tracing and compiling grows with the unrolled blocks of a transformer.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
import optax

import optax_curv

CASES = ("shampoo", "soap", "kron_psgd", "kfac", "ekfac", "branch_fisher")
INSTRUCTION = r"(?m)^\s+(?:ROOT )?%?[\w.-]+ = "
METRICS = ("instructions", "compile s", "median step ms", "mean step ms")
WIDTH, BLOCKS, LAYERS, ROWS = 128, 6, 4, 8
WARM_UP, STEPS, ROUNDS = 8, 12, 4  # Shampoo takes roots at nearly every step at first.
GROWING = ("shampoo", "soap", "kron_psgd", "muon")
LARGEST, GROWTH_WIDTH = 48, 256


def transformer(blocks, width):
    """Shapes of the leaves, ten a block."""
    block = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    block |= {"up": (width, 4 * width), "down": (4 * width, width), "up_bias": (4 * width,)}
    block |= dict.fromkeys(("norm_1", "norm_2", "down_bias"), (width,))
    return {f"block_{i}": block for i in range(blocks)}


def each(function, shapes):
    """A tree with `function` of every shape."""
    return jax.tree.map(function, shapes, is_leaf=lambda x: isinstance(x, tuple))


def drawn(shapes, seed, *leading):
    """Normal arrays of these shapes."""
    rng = np.random.default_rng(seed)
    return each(lambda shape: rng.standard_normal((*leading, *shape), np.float32), shapes)


def layerwise(method, moments):
    """A method for dense layers, the shapes of their leaves, and their statistics."""
    layers, shapes, curvature = [], {}, {}
    for i in range(LAYERS):
        name, kernel, bias = f"dense_{i}", f"kernel_{i}", f"bias_{i}"
        sizes = {"in_dim": WIDTH, "out_dim": WIDTH}
        layers.append(optax_curv.Layer(name, "dense", f"['{kernel}']", f"['{bias}']", **sizes))
        shapes |= {kernel: (WIDTH, WIDTH), bias: (WIDTH,)}
        rows = drawn([(2 * WIDTH, WIDTH + 1), (2 * WIDTH, WIDTH)], i)
        factors = *(x.T @ x / len(x) for x in rows), np.int32(1)
        curvature[name] = optax_curv.KroneckerFactors(*factors)
        if moments:
            squares = np.square(drawn((WIDTH + 1, WIDTH), 100 + i))
            curvature[name] = optax_curv.EigenbasisMoments(*factors, squares)
    return method(1e-3, optax_curv.Layers(layers)), shapes, {"curvature": curvature}


def case(name):
    """A transformation, the shapes of its parameters, and its extra arguments."""
    shapes, method = transformer(BLOCKS, WIDTH), getattr(optax_curv, name)
    if name in ("kfac", "ekfac"):
        return layerwise(method, moments=name == "ekfac")
    if name == "branch_fisher":
        return method(1e-3, solver="auto"), shapes, {"branches": drawn(shapes, 2, ROWS)}
    return method(1e-3), shapes, {}


def compiled(tx, *given):
    """A step, compiled, and the processor seconds that took."""

    def step(params, state, grads, extras):
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state

    jax.jit(lambda x: x @ x).lower(np.ones((2, 2), np.float32)).compile()  # starts the compiler
    start = time.process_time()
    step = jax.jit(step).lower(*given).compile()
    return step, time.process_time() - start


def work(name):
    """Compiles a case; then, for each line of input, times some of its steps."""
    tx, shapes, extras = case(name)
    params, grads = drawn(shapes, 0), drawn(shapes, 1)
    state = jax.jit(tx.init)(params)
    step, seconds = compiled(optax.with_extra_args_support(tx), params, state, grads, extras)
    for _ in range(WARM_UP):
        params, state = jax.block_until_ready(step(params, state, grads, extras))
    first = params, state
    print(json.dumps([len(re.findall(INSTRUCTION, step.as_text())), seconds]), flush=True)
    for _ in sys.stdin:
        (params, state), times = first, []
        for _ in range(STEPS):
            start = time.perf_counter()
            params, state = jax.block_until_ready(step(params, state, grads, extras))
            times.append(1e3 * (time.perf_counter() - start))
        print(json.dumps([statistics.median(times), statistics.mean(times)]), flush=True)


def grow(name, blocks):
    """Prints the seconds of tracing and compiling a step for so many blocks."""
    theirs = {"adamw": optax.adamw, "muon": optax.contrib.muon}
    tx = (theirs.get(name) or getattr(optax_curv, name))(1e-3)
    shapes = transformer(int(blocks), GROWTH_WIDTH)
    params = each(lambda shape: jax.ShapeDtypeStruct(shape, np.float32), shapes)
    print(json.dumps(compiled(tx, params, jax.eval_shape(tx.init, params), params, {})[1]))


def started(tree, *arguments):
    """A process that imports the package from a folder."""
    if not (tree / "optax_curv").is_dir():
        sys.exit(f"no package optax_curv in {tree}")
    env = os.environ | {"PYTHONPATH": str(tree.resolve()), "OPENBLAS_NUM_THREADS": "1"}
    command, pipe = [sys.executable, "-P", __file__, *map(str, arguments)], subprocess.PIPE
    return subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe)


def answer(process):
    """The next line of a process."""
    line = process.stdout.readline()
    return json.loads(line) if line else sys.exit(f"a measurement failed: {process.args[3:]}")


def measured(name, trees, repeats):
    """For each metric a list of the figures of all trees, measured side by side."""
    figures, workers, answers = {metric: [] for metric in METRICS}, {}, {}

    def note(metrics):
        for k, metric in enumerate(metrics):
            figures[metric].append([answers[i][k] for i in range(len(trees))])

    for repeat in range(repeats):
        order = list(range(len(trees)))[:: 1 if repeat % 2 == 0 else -1]
        for i in order:  # One compiles after the other.
            workers[i] = started(trees[i], "--work", name)
            answers[i] = answer(workers[i])
        note(METRICS[:2])
        for turn in range(ROUNDS + 1):
            for i in order:
                print(file=workers[i].stdin, flush=True)
                answers[i] = answer(workers[i])
            if turn:  # The first one warms up.
                note(METRICS[2:])
        for worker in workers.values():
            worker.communicate()
    return figures


def cell(pairs):
    """Median and range of the ratios, or of the figures of a single tree."""
    values = [x[-1] / x[0] if len(x) > 1 else x[0] for x in pairs]
    middle, digits = statistics.median(values), 3 if len(pairs[0]) > 1 else 1
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main():
    """Parses the command line, measures, prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refactoring")
    parser.add_argument("trees", nargs="*", type=pathlib.Path, help="OLD and NEW, or one alone")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--blocks", nargs="+", type=int, default=[6, 24, LARGEST])
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--grow", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if hidden := options.work or options.grow:
        return grow(*hidden) if options.grow else work(hidden)
    if len(options.trees) not in (1, 2):
        parser.error("expected one folder or two")
    if options.growth:
        print(f"trace + compile, in units of AdamW's for {LARGEST} blocks, then that in seconds")
        for name in GROWING:
            unit = answer(started(options.trees[0], "--grow", "adamw", LARGEST))
            for n in options.blocks:
                times = [answer(started(x, "--grow", name, n)) / unit for x in options.trees]
                print(f"{name:10}{n:4}", *(f"{x:8.2f}" for x in [*times, unit]), flush=True)
        return None
    print(f"{'':14}" + "".join(f"{metric:>28}" for metric in METRICS), flush=True)
    for name in options.cases:
        figures = measured(name, options.trees, options.repeats)
        print(f"{name:14}" + "".join(f"{cell(figures[x]):>28}" for x in METRICS), flush=True)


if __name__ == "__main__":
    main()
