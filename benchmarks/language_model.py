"""Trains the language model of `benchmarks.problems.language_model` by the baselines, by ours, and
by each piece alone; keeps every run, and writes the table.

    python -m benchmarks.language_model tune adamw muon shampoo    # from seed 100
    python -m benchmarks.language_model train adamw muon --seeds 0 1
    python -m benchmarks.language_model time                       # in one interleaved run
    python -m benchmarks.language_model table

Each tuned method gets the same budget of `BUDGET` runs: one setting after another is walked along
its grid, the learning rate along 1, 2, 5, …, until no neighbour is better. A piece has the settings
of the method that it belongs to. Runs that are kept are not made again."""

import argparse
import itertools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator

import jax

import optax_curv
from benchmarks import methods, report, running
from benchmarks.language_recipes import RECIPES, Context
from benchmarks.problems import language_model

RESULTS = pathlib.Path(__file__).parent / "results"
TUNING_SEED, BUDGET = 100, 11
MISSED = ("not reached", "-")
EARLY = 4  # blocks that are not timed
NOTCHES = {
    "weight_decay": (0.0, 0.1, 0.5, 1.0),
    "adam_factor": (0.25, 1.0, 4.0, 16.0, 64.0),
}
START = {"learning_rate": 0.005, "weight_decay": 0.1, "adam_factor": 1.0, "adam_b2": 0.99}


def compiled(name: str, context: Context) -> running.Compiled:
    """A method that is ready to run with any settings."""
    recipe, problem = RECIPES[name], context.problem
    measure = None
    if recipe.statistic is not None:
        capture = optax_curv.value_grad_and_curvature(
            problem.loss, layers=context.layers, statistic=recipe.statistic
        )

        def measure(params, state, batch, key):
            _, grads, curvature = capture(params, *batch)
            return grads, {"curvature": curvature}

    method = methods.from_optax(
        problem,
        problem.steps,
        lambda rate, values: recipe.make(context, rate, values),
        measure,
        **START,
    )
    return running.compile_method(method, problem, dict(START))


def neighbour(settings: dict[str, float], name: str, step: int) -> dict[str, float]:
    """The settings with one of them a notch higher or lower, or the same at the end of its grid."""
    if name == "learning_rate":
        value = running.on_grid(round(math.log10(settings[name]) * 3) + step, 3)
    else:
        notches = NOTCHES[name]
        value = notches[min(max(notches.index(settings[name]) + step, 0), len(notches) - 1)]
    return settings | {name: value}


class Kept:
    """All runs that were made, in a JSON file that is written after each."""

    def __init__(self, path: pathlib.Path, context: Context):
        self.path, self.context, self.ready = path, context, {}
        self.data = {"runs": {}, "tuned": {}, "steps": {}}
        if path.exists():
            self.data = json.loads(path.read_text())
        self.evaluate = running.evaluator(context.problem)

    def method(self, name: str) -> running.Compiled:
        """The compiled method."""
        if name not in self.ready:
            self.ready[name] = compiled(name, self.context)
        return self.ready[name]

    def write(self):
        """Writes the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.data["definition"] = self.context.problem.definition
        self.data["machine"] = report.machine()
        self.path.write_text(json.dumps(self.data, indent=1, sort_keys=True) + "\n")

    def run(self, name: str, settings: dict[str, float], seed: int) -> dict:
        """The run of these settings, made now if it is not kept."""
        runs = self.data["runs"].setdefault(name, [])
        for kept in runs:
            if kept["settings"] == settings and kept["seed"] == seed:
                return kept
        problem = self.context.problem
        if seed == TUNING_SEED:  # the last loss is all that counts
            problem = problem._replace(evaluate_every=problem.steps)
        method = self.method(name)._replace(settings=settings)
        start = time.perf_counter()
        (curve,) = running.train(
            problem, {name: method}, seed, problem.steps, self.evaluate, lambda _: None
        )
        if curve.failure:
            raise RuntimeError(curve.failure)
        losses = [float(f"{x:.5g}") for x in curve.metrics["validation loss"]]
        made = {"settings": settings, "seed": seed, "steps": curve.steps, "losses": losses}
        runs.append(made)
        self.write()
        seconds = time.perf_counter() - start
        numbers = ", ".join(f"{k} {v:g}" for k, v in settings.items())
        print(f"{name} {numbers}, seed {seed}: {losses[-1]:.4f} ({seconds:.0f} s)", flush=True)
        return made

    def settings(self, name: str) -> dict[str, float]:
        """The settings with which a method is reported."""
        return dict(self.data["tuned"][RECIPES[name].like or name])

    def tune(self, name: str):
        """Walks one setting after another until no neighbour is lower or the budget is spent."""
        known: dict[tuple, float] = {}

        def loss(settings):
            key = tuple(settings.values())
            if key not in known:
                if len(known) == BUDGET:
                    return math.inf
                last = self.run(name, settings, TUNING_SEED)["losses"][-1]
                known[key] = last if math.isfinite(last) else math.inf
            return known[key]

        best, before = dict(START), {}
        while best != before:
            before = best
            for setting, step in itertools.product(("learning_rate", *NOTCHES), (1, -1)):
                while loss(near := neighbour(best, setting, step)) < loss(best):
                    best = near
        self.data["tuned"][name] = best
        self.write()

    def time(self, names: list[str], rounds: int = 4, steps: int = 20):
        """The median step of every method in one interleaved run, after the first steps, in which
        roots are taken more often."""
        problem = self.context.problem
        batches = list(problem.batches(TUNING_SEED, steps))
        states = {}
        for name in names:
            method = self.method(name)
            params = problem.init(0)
            states[name] = params, method.init(params), running.numbers(self.settings(name))
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds + 1):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                params, state, values = states[name]
                start = time.perf_counter()
                for batch in batches if turn else EARLY * batches:
                    params, state = self.method(name).step(params, state, batch, values)
                jax.block_until_ready(params)
                states[name] = params, state, values
                if turn:
                    seconds[name].append((time.perf_counter() - start) / steps)
        of_adamw = seconds["adamw"]
        for name, found in seconds.items():
            ratios = [x / y for x, y in zip(found, of_adamw, strict=True)]
            self.data["steps"][name] = {
                "milliseconds": 1e3 * statistics.median(found),
                "ratio": report.spread(ratios),
            }
        self.write()


def first_at(run: dict, target: float) -> int | None:
    """The steps after which the loss is first at most the target."""
    found = zip(run["steps"], run["losses"], strict=True)
    return next((steps for steps, loss in found if steps and loss <= target), None)


def lines(kept: Kept) -> dict[tuple, dict[int, dict]]:
    """The runs by seed of every method and settings, but those that only tuned."""
    found: dict[tuple, dict[int, dict]] = {}
    for name, runs in kept.data["runs"].items():
        for run in runs:
            if run["seed"] != TUNING_SEED:
                found.setdefault((name, numbered(run["settings"])), {})[run["seed"]] = run
    return found


def numbered(settings: dict[str, float]) -> tuple:
    """Settings as a key."""
    return tuple(sorted(settings.items()))


def rows(kept: Kept) -> Iterator[str]:
    """The lines of the table, best first."""
    data, found = kept.data, lines(kept)
    tuned = {name: found.get((name, numbered(x)), {}) for name, x in data["tuned"].items()}

    def last(key):
        return statistics.mean(run["losses"][-1] for run in found[key].values())

    def share(runs, reference):
        """Steps to a reference's last loss, as a share of its steps."""
        shares = []
        for seed, other in tuned[reference].items():
            if seed in runs:
                steps = first_at(runs[seed], other["losses"][-1])
                shares.append(math.inf if steps is None else steps / other["steps"][-1])
        return statistics.median(shares) if shares else math.nan

    for name, settings in sorted(found, key=last):
        runs = found[name, settings]
        losses = ", ".join(f"{run['losses'][-1]:.3f}" for _, run in sorted(runs.items()))
        base = found.get((RECIPES[name].like, settings), {})
        apart = [runs[x]["losses"][-1] - base[x]["losses"][-1] for x in runs if x in base]
        ratio = data["steps"].get(name, {}).get("ratio")
        cells = [name, f"{last((name, settings)):.3f}", losses]
        cells.append(f"{statistics.mean(apart):+.3f} {RECIPES[name].like}" if apart else "-")
        for reference in ("muon", "adamw"):
            steps = share(runs, reference)
            cells.append(f"{steps:.2f}" if math.isfinite(steps) else MISSED[math.isnan(steps)])
            of = data["steps"].get(reference, {}).get("ratio")
            timed = ratio and of and math.isfinite(steps)
            cells.append(f"{steps * ratio[1] / of[1]:.2f}" if timed else "-")
        cells.append("{1:.2f} [{0:.2f}, {2:.2f}]".format(*ratio) if ratio else "-")
        cells.append(", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in settings))
        yield f"| {' | '.join(cells)} |"


def table(kept: Kept) -> str:
    """The report."""
    data, problem = kept.data, kept.context.problem
    seeds = sorted({r["seed"] for runs in data["runs"].values() for r in runs} - {TUNING_SEED})
    versions = data["machine"]["versions"]
    where = f"{data['machine']['processor']}, {data['machine']['cores']} cores"
    numbers = ", ".join(f"{name} {version}" for name, version in versions.items())
    columns = (
        "method",
        "loss",
        "by seed",
        "beside its own",
        "steps to Muon's",
        "time",
        "steps to AdamW's",
        "time",
        "step",
        "settings",
    )
    head = [
        "# language_model",
        "",
        f"{data['definition']}. {problem.steps} steps; seeds {', '.join(map(str, seeds))}; {where};"
        f" {numbers}.",
        "",
        f"Warm-up of 5 % and a cosine to 1 %. {', '.join(sorted(data['tuned']))} are tuned at "
        f"these steps from seed {TUNING_SEED}, each with the same budget; all other lines have "
        "settings of the method that they belong to, and `beside its own` is the loss less that of "
        "this method with the same settings and seeds. `loss` is the mean of the last validation "
        "losses. Steps and time to the last loss of tuned Muon and AdamW are shares of the whole "
        "run of that method; a step is in units of AdamW's, median and quartiles of one "
        "interleaved run.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    return "\n".join([*head, *rows(kept)]) + "\n"


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("tune", "train", "time", "table"))
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--size", choices=language_model.SIZES, default="S")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.methods if name not in RECIPES]
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}; expected some of {', '.join(RECIPES)}")
    problem = language_model.of_size(language_model.SIZES[options.size])
    steps = options.steps or problem.steps
    problem = problem._replace(steps=steps, evaluate_every=max(1, steps // 40))
    batch = next(iter(problem.batches(0, 1)))
    layers = optax_curv.find_layers(problem.loss, jax.eval_shape(problem.init, 0), *batch)
    title = "language_model" if options.size == "S" else f"language_model_{options.size}"
    kept = Kept(options.out / f"{title}.json", Context(problem, layers))
    if options.what == "time":
        kept.time(options.methods or list(kept.data["runs"]))
    for name in options.methods if options.what in ("tune", "train") else ():
        try:
            if options.what == "tune":
                kept.tune(name)
            else:
                for seed in options.seeds:
                    kept.run(name, kept.settings(name), seed)
        except Exception as error:
            print(f"{name}: {running.reason(error)}", file=sys.stderr, flush=True)
            raise
        kept.ready.pop(name, None)
    if options.what == "table":
        text = table(kept)
        (options.out / f"{title}.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
