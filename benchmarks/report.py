"""From curves to figures: a summary of each method, JSON, a Markdown table and a plot."""

import datetime
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import statistics

from benchmarks import methods
from benchmarks.problems import Problem
from benchmarks.running import Compiled, Curve

REFERENCE = "adam"


def machine() -> dict:
    """Where and with what a run was made."""
    import jax

    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    packages = ("jax", "jaxlib", "optax", "flax", "numpy")
    versions = {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
    return {
        "date": datetime.date.today().isoformat(),
        "processor": model,
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "versions": versions,
    }


def spread(values) -> list[float] | None:
    """Lower quartile, median, upper quartile."""
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return None
    if len(values) == 1:
        return values * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, middle, high]


def first_at(curve: dict, metric: str, target: float) -> int | None:
    """The index of the first evaluation after the start whose metric is at most the target."""
    return next((i for i, v in enumerate(curve["metrics"][metric]) if i and v <= target), None)


def summarize(
    problem: Problem, compiled: dict[str, Compiled], runs: list[list[Curve]], seeds: list[int]
) -> dict:
    """Everything by method; times are also in units of the reference, block by block and run by
    run."""
    metric = next(iter(problem.metrics))
    by_seed = [{c.name: _plain(c) for c in curves} for curves in runs]
    failures = {c.name: c.failure for curves in runs for c in curves if c.failure}
    rows = {}
    for name, method in compiled.items():
        if name in failures:
            rows[name] = {"failure": failures[name]}
            continue
        curves = [curves[name] for curves in by_seed]
        references = [curves[REFERENCE] for curves in by_seed]
        targets = [
            r["metrics"][metric][-1] if problem.goal is None else problem.goal for r in references
        ]
        hits = [first_at(c, metric, t) for c, t in zip(curves, targets, strict=True)]
        block_ratios = [
            own / theirs
            for c, r in zip(curves, references, strict=True)
            for own, theirs in zip(_step_seconds(c), _step_seconds(r), strict=True)
        ]
        reached = [
            (c, r, h) for c, r, h in zip(curves, references, hits, strict=True) if h is not None
        ]
        first, last = compiled[REFERENCE], [c["metrics"] for c in curves]
        rows[name] = {
            "settings": method.settings,
            "steps": curves[0]["steps"][-1],
            "final": {m: [values[m][-1] for values in last] for m in problem.metrics},
            "steps_to_target": [
                None if h is None else c["steps"][h] for c, h in zip(curves, hits, strict=True)
            ],
            "seconds_to_target": [
                None if h is None else c["seconds"][h] for c, h in zip(curves, hits, strict=True)
            ],
            "time_to_target_ratio": spread(
                [c["seconds"][h] / r["seconds"][-1] for c, r, h in reached]
            ),
            "step_milliseconds": spread([1e3 * s for c in curves for s in _step_seconds(c)]),
            "step_ratio": spread(block_ratios),
            "trace_seconds": method.trace_seconds,
            "compile_seconds": method.compile_seconds,
            "trace_and_compile_ratio": _ready_seconds(method) / _ready_seconds(first),
            "state_bytes": method.state_bytes,
            "state_ratio": method.state_bytes / first.state_bytes,
            "curves": curves,
        }
    return {
        "problem": problem.definition,
        "metric": metric,
        "seeds": seeds,
        "goal": problem.goal,
        "methods": rows,
    }


def _ready_seconds(method: Compiled) -> float:
    return (method.trace_seconds or 0.0) + method.compile_seconds


def _step_seconds(curve: dict) -> list[float]:
    edges = list(zip(curve["steps"], curve["seconds"], strict=True))
    return [(t1 - t0) / (n1 - n0) for (n0, t0), (n1, t1) in itertools.pairwise(edges)]


def _plain(curve: Curve) -> dict:
    def short(values):
        return [float(f"{v:.6g}") for v in values]

    metrics = {name: short(values) for name, values in curve.metrics.items()}
    return {"steps": curve.steps, "seconds": short(curve.seconds), "metrics": metrics}


def markdown(title: str, summary: dict) -> str:
    """A paragraph on the run and a table; failures are rows of their own."""
    where, rows = summary["machine"], summary["methods"]
    metrics = list(next(row["final"] for row in rows.values() if "final" in row))
    target = "tuned Adam's last" if summary["goal"] is None else f"{summary['goal']:g}"
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"# {title}",
        "",
        f"{summary['problem']}. {len(summary['seeds'])} seeds "
        f"({', '.join(map(str, summary['seeds']))}); "
        f"{where['processor']}, {where['cores']} cores; {versions}; {where['date']}.",
        "",
        f"Learning rates: warm-up of 5 % and a cosine, {summary['tuning']}. Medians over the "
        f"seeds. Target: a "
        f"{summary['metric']} of {target}. Times and state are in units of Adam's, times of the "
        f"same interleaved run "
        "with quartiles over its blocks in brackets; trace + compile is processor time, with the "
        "ratio to Adam's.",
        "",
        f"| method | steps | {' | '.join(metrics)} | steps to target | time to target | step | "
        f"trace + compile | "
        "state | settings |",
        "|" + "---|" * (len(metrics) + 8),
    ]
    for name, row in rows.items():
        if "failure" in row:
            lines.append(
                f"| {name} | {row['failure'].replace('|', '¦')} |" + " |" * (len(metrics) + 6)
            )
            continue
        reached = [steps for steps in row["steps_to_target"] if steps is not None]
        count = f"{statistics.median(reached):g}" if reached else "-"
        count += (
            ""
            if len(reached) == len(summary["seeds"])
            else f" ({len(reached)} of {len(summary['seeds'])})"
        )
        time, step = row["time_to_target_ratio"], row["step_ratio"]
        seconds = (row["trace_seconds"] or 0) + row["compile_seconds"]
        cells = [
            name,
            f"{row['steps']}",
            *(f"{statistics.median(row['final'][m]):.4g}" for m in metrics),
            count,
            f"{time[1]:.2f}" if time else "-",
            f"{step[1]:.2f} [{step[0]:.2f}, {step[2]:.2f}]",
            f"{seconds:.1f} s ({row['trace_and_compile_ratio']:.1f})",
            f"{row['state_ratio']:.1f}",
            ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in row["settings"].items()) or "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# One hue a family: ours with a solid line, the same method in other packages dashed.
LINES = {
    "adam": ("black", "-"),
    "muon": ("#7f7f7f", "--"),
    "sophia": ("#b0a080", "-."),
    "lbfgs": ("#9a9a9a", ":"),
    "kfac": ("#4c9be8", "-"),
    "kfac_rms": ("#00b3b3", "-"),
    "kfac_adaptive": ("#1546a0", "-"),
    "ekfac": ("#8a63d2", "-"),
    "kfac_jax": ("#1546a0", "--"),
    "kfac_jax_fixed": ("#4c9be8", "--"),
    "kron_psgd": ("#f5a623", "-"),
    "kron_psgd_rms": ("#d9480f", "-"),
    "psgdax": ("#f5a623", "--"),
    "psgdax_rms": ("#d9480f", "--"),
    "distributed_kron": ("#f5a623", ":"),
    "shampoo": ("#2b8a3e", "-"),
    "soap": ("#94c11f", "-"),
    "branch_fisher": ("#c2255c", "-"),
    "gauss_newton": ("#e599c0", "-"),
    "somax": ("#c2255c", "--"),
}


def line_of(name: str) -> dict:
    """How a method is drawn, in every plot alike."""
    color, style = LINES.get(name, ("#d6336c", "-."))
    return {"color": color, "linestyle": style, "linewidth": 2.2 if name in methods.OURS else 1.5}


def plot(title: str, summary: dict, path: pathlib.Path):
    """The first metric against steps and against seconds: the median over the seeds, and the range
    of all of them."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    metric = summary["metric"]
    rows = {name: row for name, row in summary["methods"].items() if "curves" in row}
    values = {
        name: np.array([c["metrics"][metric] for c in row["curves"]]) for name, row in rows.items()
    }
    figure, panels = pyplot.subplots(1, 2, figsize=(12.5, 5.4), sharey=True, layout="constrained")
    for name in sorted(
        rows, key=lambda name: np.nan_to_num(np.median(values[name][:, -1]), nan=np.inf)
    ):
        curves = rows[name]["curves"]
        seconds = np.median([curve["seconds"] for curve in curves], 0)
        for axes, x in zip(panels, (curves[0]["steps"], seconds), strict=True):
            axes.plot(
                x,
                np.median(values[name], 0),
                label=name if axes is panels[0] else None,
                **line_of(name),
            )
            axes.fill_between(
                x,
                values[name].min(0),
                values[name].max(0),
                color=line_of(name)["color"],
                alpha=0.1,
                lw=0,
            )
    adam = np.median(values[REFERENCE], 0)
    target = adam[-1] if summary["goal"] is None else summary["goal"]
    lowest = min([np.nanmin(v) for v in values.values()] + [target])
    # The first tenth of Adam's run is cut off above: all the methods differ by comes after it.
    top = 1.02 * np.nanmax(adam[len(adam) // 10 :])
    panels[0].set(
        xlabel="step", ylabel=metric, yscale="log", ylim=(lowest / (top / lowest) ** 0.04, top)
    )
    panels[1].set(
        xlabel="seconds of training, without compilation and evaluation",
        xlim=(0, 1.5 * np.median([c["seconds"][-1] for c in rows[REFERENCE]["curves"]])),
    )
    if top / lowest < 20:  # numbers also between the decades
        panels[0].yaxis.set_minor_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        panels[0].yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    for axes in panels:
        axes.axhline(target, color="black", linewidth=0.8, linestyle=(0, (2, 3)))
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    name = "tuned Adam's last" if summary["goal"] is None else "goal"
    panels[1].annotate(
        f"{name}: {target:.3g}",
        (1, target),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    figure.legend(
        loc="outside right center",
        frameon=False,
        title="lowest last value first;\nours solid",
        fontsize=10,
    )
    where = summary["machine"]
    figure.suptitle(
        f"{title}: median and range of {len(summary['seeds'])} seeds ({where['processor']}, "
        f"{where['cores']} cores)"
    )
    figure.savefig(path, format="png", dpi=130)
    pyplot.close(figure)


def save(title: str, summary: dict, folder: pathlib.Path) -> str:
    """Writes TITLE.json, .md and .png and returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    table = markdown(title, summary)
    (folder / f"{title}.json").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / f"{title}.md").write_text(table)
    plot(title, summary, folder / f"{title}.png")
    return table
