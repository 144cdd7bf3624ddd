"""Table, picture and last line of the demo."""

import io
import itertools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from optax_curv.demo.problems import Problem
from optax_curv.demo.training import EVALUATIONS, Run


def _reached(run: Run, target: float) -> int | None:
    """The first evaluation at which the error was as low as that."""
    found = np.flatnonzero(run.errors <= target)
    return int(found[0]) if len(found) else None


def _target(runs: list[Run]) -> float:
    """Adam's error at its end; not a number where Adam has not run."""
    return next((float(run.errors[-1]) for run in runs if run.method == "adam"), np.nan)


def table(runs: list[Run], problem: Problem) -> str:
    """Lines of figures, one for each method."""
    header = (
        f"{'method':19}  {'compile s':>9}  {'ms a step':>9}  {'steps':>6}  "
        f"{'to Adam: steps':>14}  {'seconds':>7}  {'error':>9}"
    )
    rows = []
    for run in runs:
        k = _reached(run, _target(runs))
        steps, seconds = ("-", "-") if k is None else (run.steps[k], f"{run.seconds[k]:.2f}")
        pace = 1e3 * run.seconds[-1] / run.steps[-1]
        rows.append(
            f"{run.method:19}  {run.compile_seconds:9.1f}  {pace:9.2f}  {run.steps[-1]:6}  "
            f"{steps:>14}  {seconds:>7}  {run.errors[-1]:9.3g}"
        )
    footer = (
        f"error: {problem.measure}; to Adam: until it is as low as Adam's at the end, looked at "
        f"{EVALUATIONS} times; seconds: without compilation"
    )
    return "\n".join((header, *rows, footer))


def said(runs: list[Run]) -> str:
    """Says in words how Adam fared, whoever wins."""
    target, others = _target(runs), [run for run in runs if run.method != "adam"]
    if np.isnan(target) or not others:
        return "Adam and another method have to run for a comparison."
    adam = next(run for run in runs if run.method == "adam")
    own = _reached(adam, target) or 0
    reached = [(run, _reached(run, target)) for run in others]
    there = [(run, k) for run, k in reached if k is not None]
    missed = ", ".join(run.method for run, k in reached if k is None)
    if not there:
        return f"None of {missed} reached Adam's last error, {target:.3g}: Adam wins here."
    steps, in_steps = min((int(run.steps[k]), run.method) for run, k in there)
    seconds, in_time = min((float(run.seconds[k]), run.method) for run, k in there)
    text = (
        f"Adam's last error, {target:.3g}, took {in_steps} {steps} steps where Adam took "
        f"{adam.steps[own]}, and {in_time} {seconds:.2f} s where Adam took "
        f"{adam.seconds[own]:.2f} s"
    )
    text += "." if seconds < adam.seconds[own] else ": in time Adam wins here."
    best = min(runs, key=lambda run: run.errors[-1])
    text += f" The lowest error at the end is {best.method}'s, {best.errors[-1]:.3g}."
    return text + (f" Not as low as Adam's came: {missed}." if missed else "")


def _spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """Heights in the same order and around the same mean, `gap` from each other at least."""
    order, moved = np.argsort(heights), heights.astype(float)
    for lower, upper in itertools.pairwise(order):
        moved[upper] = max(moved[upper], moved[lower] + gap)
    return moved - np.mean(moved - heights)


def _lines(axes: Any, runs: list[Run], x_of: Callable, label: str, measure: str):
    """Errors over steps or seconds, each line with its name at its end."""
    for i, run in enumerate(runs):
        axes.plot(x_of(run), run.errors, color=f"C{i}")
    axes.set(xlabel=label, ylabel=measure, yscale="log")
    axes.grid(alpha=0.3, which="both")
    low, high = np.log10(axes.get_ylim())
    ends = np.log10([run.errors[-1] for run in runs])
    places = 10 ** _spread(np.where(np.isfinite(ends), ends, high), 0.05 * (high - low))
    for i, (run, place) in enumerate(zip(runs, places, strict=True)):
        axes.annotate(
            run.method,
            (x_of(run)[-1], place),
            xytext=(4, 0),
            textcoords="offset points",
            color=f"C{i}",
            va="center",
            annotation_clip=False,
        )


def plot(runs: list[Run], problem: Problem, out: pathlib.Path):
    """Draws the errors, and below them what each network does after the same time of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.5), layout="constrained")
    rows: Any = figure.subfigures(2, 1)
    above, below = rows
    by_step, by_time = above.subplots(1, 2, sharey=True)
    _lines(by_step, runs, lambda run: run.steps, "step", problem.measure)
    _lines(by_time, runs, lambda run: run.seconds, "seconds, without compilation", "")
    above.suptitle(f"{problem.name}: every method from the same weights, on the same batches")

    shared = min(run.seconds[-1] for run in runs)
    images = {}
    for run in runs:
        k = np.flatnonzero(run.seconds <= shared)[-1]
        name = f"{run.method}, {run.steps[k]} steps, {run.errors[k]:.3g}"
        images[name] = np.asarray(problem.picture(run.params[k]))
    top = max(float(np.max(image)) for image in images.values())
    if problem.truth is not None:
        images = {"as they are": problem.truth} | images
    height, width = next(iter(images.values())).shape
    wide = width > 2 * height
    layout = (len(images), 1) if wide else (1, len(images))
    for axes, (name, image) in zip(np.ravel(below.subplots(*layout)), images.items(), strict=True):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=top)
        axes.set(xticks=[], yticks=[])
        axes.set_title(name if wide else name.replace(", ", "\n"), loc="left", fontsize=9)
    below.suptitle(f"{problem.caption}, after {shared:.2f} s of training each")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    _replace(out, picture.getvalue())


def _replace(out: pathlib.Path, content: bytes):
    """Writes a file whole or, where that fails, leaves the older one as it is."""
    if out.exists() and not out.is_file():  # a pipe or a device
        out.write_bytes(content)
        return
    target = out.resolve()
    new = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        new.write_bytes(content)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)
