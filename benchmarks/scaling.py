"""Step and compile time against width, depth, batch and devices: ``python -m benchmarks.scaling``;
see ``--help``.

A tanh network with squared error, one size changed at a time. Beside each time stands the share of
the machine's matrix-product peak, measured in the same run, that the step's arithmetic (as XLA
counts it) amounts to."""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

import optax_curv
from benchmarks import report, running
from benchmarks.compare import METHODS, RESULTS
from benchmarks.problems import Problem
from benchmarks.problems.dense import init_dense, predict_dense

BASE = {"width": 256, "depth": 4, "batch": 256, "devices": 1}
DEVICES = (1, 2, 4, 8)
AXES = {
    "width": (64, 128, 256, 512, 1024),
    "depth": (2, 4, 8, 16),
    "batch": (64, 256, 1024),
    "devices": DEVICES,
}
DEFAULT = ("adam", "muon", "kfac", "kron_psgd", "shampoo")
ROUNDS, SECONDS = (
    7,
    0.2,
)  # of timing each method at each size, in rotation; at least so long a round


def network(width: int, depth: int, batch: int, devices: int) -> Problem:
    """`depth` layers width-width, the batch split over the devices and the parameters on all of
    them."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("examples",))
    replicated, split = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("examples"))
    )
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((batch, width), np.float32) for _ in range(2)]
    pair = tuple(jax.device_put(x, split) for x in arrays)
    loss = optax_curv.Objective(predict_dense, "normal")
    return Problem(
        definition="",
        init=lambda seed: jax.device_put(init_dense(seed, (width,) * (depth + 1)), replicated),
        loss=loss,
        batches=lambda seed, steps: (pair for _ in range(steps)),
        metrics={},
        steps=1000,
        evaluate_every=1,
        objective=loss,
    )


def seconds_of(function, *args) -> float:
    """Of one call, over as many calls as make a round."""
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        jax.block_until_ready(function(*args))
        calls += 1
    return (time.perf_counter() - start) / calls


def matmul_peak(sizes=(512, 1024, 2048)) -> float:
    """The most floating-point operations a second that a float32 matrix product reaches here."""
    product = jax.jit(jnp.matmul)
    rates = []
    for n in sizes:
        x = jnp.ones((n, n))
        product(x, x).block_until_ready()
        rates += [2 * n**3 / seconds_of(product, x, x) for _ in range(3)]
    return max(rates)


def measure(names, sizes: dict[str, int]) -> dict[str, dict]:
    """Seconds of a step and of tracing and compiling it, and its floating-point operations, by
    method."""
    problem, ready, rows = network(**sizes), {}, {}
    batch = next(iter(problem.batches(0, 1)))
    for name in names:
        try:
            method = METHODS[name](problem, problem.steps)
            params, values = problem.init(0), running.numbers(method.settings)
            state = jax.jit(method.init)(params)
            start = time.process_time()
            step = jax.jit(method.step).lower(params, state, batch, values).compile()
            seconds = time.process_time() - start
            params, state = jax.block_until_ready(step(params, state, batch, values))
            flops = (step.cost_analysis() or {}).get("flops", float("nan"))
            rows[name] = {"compile_seconds": seconds, "flops": flops, "rounds": []}
            ready[name] = functools.partial(step, params, state, batch, values)
        except Exception as error:  # a method that cannot run here is a line in the table
            rows[name] = {"failure": running.reason(error)}
    names = list(ready)
    for turn in range(ROUNDS):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            rows[name]["rounds"].append(seconds_of(ready[name]))
    return rows


def markdown(summary: dict) -> str:
    """One table an axis."""
    where = summary["machine"]
    lines = ["# scaling", ""]
    lines += [
        f"{where['processor']}, {where['cores']} cores, jax {where['versions']['jax']}; "
        f"{where['date']}.",
        "",
    ]
    lines += [
        f"Network of tanh layers; {', '.join(f'{k} {v}' for k, v in BASE.items())} but for the "
        f"size that changes. "
        f"Peak of a matrix product in this run: {summary['peak'] / 1e9:.0f} GFLOP/s. Each cell: "
        f"milliseconds a step "
        "(median of rotated rounds), share of the peak, processor seconds of trace + compile. "
        "The compiler counts "
        "what a loop does once: the share of kron_psgd, which on CPU goes through its layers in "
        "a loop, is too low.",
    ]
    for axis, values in summary["axes"].items():
        lines += [
            "",
            f"| {axis} | {' | '.join(map(str, values))} |",
            "|" + "---|" * (len(values) + 1),
        ]
        for name in summary["methods"]:
            cells = [_cell(rows[name], summary["peak"]) for rows in values.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row, peak):
    if "failure" in row:
        return row["failure"].replace("|", "¦")
    seconds = statistics.median(row["rounds"])
    share = row["flops"] / seconds / peak
    return f"{1e3 * seconds:.2f} ms, {share:.0%}, {row['compile_seconds']:.1f} s"


def plot(summary: dict, path: pathlib.Path):
    """Step time above, compile time below, one column an axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = summary["axes"]
    figure, grid = pyplot.subplots(
        2,
        len(axes),
        figsize=(3.4 * len(axes) + 1, 6),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for column, (axis, values) in enumerate(axes.items()):
        for name in summary["methods"]:
            good = {int(x): rows[name] for x, rows in values.items() if "rounds" in rows[name]}
            times = [1e3 * statistics.median(row["rounds"]) for row in good.values()]
            line = {**report.line_of(name), "marker": "o", "markersize": 4}
            grid[0, column].plot(list(good), times, label=name if not column else None, **line)
            grid[1, column].plot(
                list(good), [row["compile_seconds"] for row in good.values()], **line
            )
        if column == 0 and axis == "width":
            flops = [6 * BASE["batch"] * BASE["depth"] * int(x) ** 2 for x in values]
            ideal = [1e3 * f / summary["peak"] for f in flops]
            grid[0, 0].plot(
                [int(x) for x in values],
                ideal,
                color="black",
                linestyle=":",
                label="gradient at the peak",
            )
        grid[1, column].set(xlabel=axis, xscale="log", xticks=[int(x) for x in values])
        grid[1, column].set_xticklabels(list(values))
        grid[1, column].minorticks_off()
        grid[0, column].set_yscale("log")
    grid[0, 0].set_ylabel("step (milliseconds)")
    grid[1, 0].set_ylabel("trace + compile (processor seconds)")
    for panel in grid.flat:
        panel.grid(alpha=0.25, which="both", linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    where = summary["machine"]
    figure.suptitle(f"One step of a tanh network, {where['processor']}, {where['cores']} cores")
    figure.savefig(path, format="png", dpi=130)
    pyplot.close(figure)


def main(arguments: list[str] | None = None):
    """Parses the command line, measures, prints the tables and writes the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(DEFAULT), help="which to measure"
    )
    parser.add_argument(
        "--axes", nargs="+", choices=AXES, default=list(AXES), help="which sizes to change"
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    axes = {axis: {} for axis in options.axes}
    with tqdm(total=sum(len(AXES[axis]) for axis in axes), unit="size", file=sys.stderr) as bar:
        peak = matmul_peak()
        for axis in axes:
            for value in AXES[axis]:
                axes[axis][str(value)] = measure(options.methods, {**BASE, axis: value})
                bar.update()
    peak = max(peak, matmul_peak())
    summary = {
        "machine": report.machine(),
        "base": BASE,
        "peak": peak,
        "methods": options.methods,
        "axes": axes,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scaling.json").write_text(json.dumps(summary, indent=1) + "\n")
    table = markdown(summary)
    (options.out / "scaling.md").write_text(table)
    plot(summary, options.out / "scaling.png")
    print(table)


if __name__ == "__main__":
    main()
