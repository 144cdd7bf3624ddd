"""Trains the language model of `benchmarks.problems.language_model` by the baselines, by ours, and
by each piece alone; keeps every run, and writes the table.

    python -m benchmarks.language_model tune adamw muon shampoo    # from seed 100
    python -m benchmarks.language_model train adamw muon --seeds 0 1
    python -m benchmarks.language_model time                       # in one interleaved run
    python -m benchmarks.language_model table

Each tuned method gets the same budget: at most four learning rates of the grid 1, 2, 5, …, then
the other weight decay, then four times the rate for what is no matrix. A piece has the settings of
the method that it belongs to. Runs that are kept are not made again."""

import argparse
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax

import optax_curv
from benchmarks import methods, report, running
from benchmarks.problems import Problem, language_model

RESULTS = pathlib.Path(__file__).parent / "results"
TUNING_SEED, RATES = 100, 4
CHOICES = {"weight_decay": (0.0, 0.1), "adam_factor": (1.0, 4.0)}
START = {"learning_rate": 0.005, "weight_decay": 0.1, "adam_b2": 0.99, "adam_factor": 1.0}


class Recipe(NamedTuple):
    """How a method is made and tuned.

    Attributes:
      make: (context, rate, settings) -> transformation.
      like: whose tuned settings it has; None: it is tuned itself.
      statistic: what `update` needs of the curvature, if anything.
      factor: of the learning rate of `like`.
    """

    make: Callable[..., Any]
    like: str | None = None
    statistic: Any = None
    factor: float = 1.0


class Context(NamedTuple):
    """The problem and its layers."""

    problem: Problem
    layers: optax_curv.Layers

    def labels(self, params):
        """Who takes each leaf."""

        def label(path, leaf):
            return "adam" if self.problem.adam_for(path, leaf) else "matrices"

        return jax.tree_util.tree_map_with_path(label, params)

    def is_matrix(self, params):
        """Which leaves decay."""
        return jax.tree.map(lambda label: label == "matrices", self.labels(params))


def adam(rate, values):
    """Adam of all that is no matrix, at a rate of its own."""
    return optax.chain(adam_direction(values), optax.scale_by_learning_rate(rate))


def adam_direction(values):
    """Adam of all that is no matrix, before the rate of the matrices."""
    return optax.chain(
        optax.scale_by_adam(0.9, values["adam_b2"]), optax.scale(values["adam_factor"])
    )


def adamw(context, rate, values):
    """AdamW, the matrices alone decayed."""
    decayed = optax.adamw(rate, 0.9, values["adam_b2"], weight_decay=values["weight_decay"])
    return optax.partition({"matrices": decayed, "adam": adam(rate, values)}, context.labels)


def muon(context, rate, values):
    """Muon with consistent RMS, Adam for the rest."""
    return optax.contrib.muon(
        rate,
        consistent_rms=methods.RMS,
        weight_decay=values["weight_decay"],
        adam_b2=values["adam_b2"],
        adam_learning_rate=lambda count: values["adam_factor"] * rate(count),
        muon_weight_dimension_numbers=optax_curv.muon_dimension_numbers(context.layers),
    )


def alias(method, **options):
    """An alias of ours, with `layers` and no more than its defaults."""

    def make(context, rate, values):
        return method(
            rate,
            layers=context.layers,
            weight_decay=values["weight_decay"],
            weight_decay_mask=context.is_matrix,
            adam=adam_direction(values),
            **options,
        )

    return make


def pieces(*parts, decay=None, size=True, last=()):
    """Pieces for the matrices, `parts` being functions of the layers or transformations."""

    def make(context, rate, values):
        chain = [part(context.layers) if callable(part) else part for part in parts]
        chain += [optax_curv.normalize_by_rms(methods.RMS)] if size else []
        decayed = decay or optax.add_decayed_weights
        chain += [decayed(values["weight_decay"]), optax.scale_by_learning_rate(rate), *last]
        parted = {"matrices": optax.chain(*chain), "adam": adam(rate, values)}
        return optax.partition(parted, context.labels)

    return make


def of_layers(method, **options):
    """A part of `pieces` that is made for the layers; gradients are bounded as in the aliases."""

    def part(layers):
        bound = optax_curv.bound_by_running_norm(3.0)
        return optax.chain(bound, method(layers=layers, **options))

    return part


def shampoo_with(**options):
    """`shampoo` with options of `scale_by_shampoo`."""
    return of_layers(optax_curv.scale_by_shampoo, **({"damping": 1e-5} | options))


def orthogonal(layers):
    """Newton-Schulz as Muon has it, without Muon's momentum."""
    numbers = optax_curv.muon_dimension_numbers(layers)
    return optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=numbers)


def before(make):
    """The input side of K-FAC before another method."""

    def made(context, rate, values):
        first = optax_curv.scale_by_input_factor(context.layers)
        return optax.chain(first, make(context, rate, values))

    return made


RECIPES = {
    "adamw": Recipe(adamw),
    "muon": Recipe(muon),
    "shampoo": Recipe(alias(optax_curv.shampoo)),
    "soap": Recipe(alias(optax_curv.soap)),
    "soap, rms": Recipe(alias(optax_curv.soap, rms=methods.RMS), "shampoo"),
    "exponent 1/3": Recipe(pieces(shampoo_with(exponent=1 / 3)), "shampoo"),
    "exponent 0.6": Recipe(pieces(shampoo_with(exponent=0.6)), "shampoo"),
    "exponent 0.75": Recipe(pieces(shampoo_with(exponent=0.75)), "shampoo"),
    "roots every 5 steps": Recipe(alias(optax_curv.shampoo, root_every=5), "shampoo"),
    "kl": Recipe(pieces(shampoo_with(kl=True)), "shampoo"),
    "fresh eigenvalues": Recipe(pieces(shampoo_with(root="qr", fresh_values=True)), "shampoo"),
    "pseudo-inverse roots": Recipe(pieces(shampoo_with(drop_below=1e-3)), "shampoo"),
    "refresh by the criterion alone": Recipe(
        pieces(shampoo_with(root_every=500, refresh_growth=2.0)), "shampoo"
    ),
    "cautious decay": Recipe(
        pieces(shampoo_with(), decay=optax_curv.add_cautious_weight_decay), "shampoo"
    ),
    "norm kept": Recipe(
        pieces(
            shampoo_with(), decay=lambda _: optax.identity(), last=[optax_curv.keep_params_norm()]
        ),
        "shampoo",
    ),
    "shampoo, then Newton-Schulz": Recipe(pieces(shampoo_with(), orthogonal), "shampoo"),
    "soap, then Newton-Schulz": Recipe(
        pieces(of_layers(optax_curv.scale_by_soap), orthogonal), "shampoo"
    ),
    "soap, kl, rms": Recipe(pieces(of_layers(optax_curv.scale_by_soap, kl=True)), "shampoo"),
    "input factor, muon": Recipe(before(muon), "muon", "input"),
    "input factor, adamw": Recipe(before(adamw), "adamw", "input"),
    "input factor, shampoo": Recipe(before(alias(optax_curv.shampoo)), "shampoo", "input"),
}


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
        recipe = RECIPES[name]
        tuned = dict(self.data["tuned"][recipe.like or name])
        return tuned | {"learning_rate": float(f"{tuned['learning_rate'] * recipe.factor:.3g}")}

    def tune(self, name: str):
        """Walks the learning rate, then tries every other choice once."""

        def loss(settings):
            last = self.run(name, settings, TUNING_SEED)["losses"][-1]
            return last if math.isfinite(last) else math.inf

        best, tried = dict(START), 1
        index = round(math.log10(best["learning_rate"]) * 3)
        for direction in (1, -1):
            moved = False
            for k in range(1, RATES):
                rate = running.on_grid(index + direction * k, 3)
                if tried == RATES or not loss(best | {"learning_rate": rate}) < loss(best):
                    tried += tried < RATES
                    break
                best, tried, moved = best | {"learning_rate": rate}, tried + 1, True
            if moved:
                break
        for setting, choices in CHOICES.items():
            for choice in choices:
                if choice != best[setting] and loss(best | {setting: choice}) < loss(best):
                    best = best | {setting: choice}
                    break
        self.data["tuned"][name] = best
        self.write()

    def time(self, names: list[str], rounds: int = 4, steps: int = 20):
        """The median step of every method, in one interleaved run."""
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
                for batch in batches:
                    params, state = self.method(name).step(params, state, batch, values)
                jax.block_until_ready(params)
                states[name] = params, state, values
                if turn:  # the first takes more roots
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


def rows(kept: Kept) -> Iterator[str]:
    """The lines of the table, best first."""
    data = kept.data

    def reported(name):
        settings = kept.settings(name)
        return {
            run["seed"]: run
            for run in data["runs"].get(name, ())
            if run["settings"] == settings and run["seed"] != TUNING_SEED
        }

    found = {
        name: reported(name) for name in RECIPES if (RECIPES[name].like or name) in data["tuned"]
    }
    found = {name: runs for name, runs in found.items() if runs}

    def last(name):
        return statistics.mean(run["losses"][-1] for run in found[name].values())

    def share(name, reference):
        """Steps to a reference's last loss, as a share of its steps."""
        shares = []
        for seed, run in found[name].items():
            if seed in found.get(reference, ()):
                other = found[reference][seed]
                steps = first_at(run, other["losses"][-1])
                shares.append(math.inf if steps is None else steps / other["steps"][-1])
        middle = statistics.median(shares) if shares else math.inf
        return middle

    for name in sorted(found, key=last):
        runs = found[name]
        losses = ", ".join(f"{run['losses'][-1]:.3f}" for _, run in sorted(runs.items()))
        ratio = data["steps"].get(name, {}).get("ratio")
        cells = [name, f"{last(name):.3f}", losses]
        for reference in ("muon", "adamw"):
            steps = share(name, reference)
            cells.append(f"{steps:.2f}" if math.isfinite(steps) else "not reached")
            base = data["steps"].get(reference, {}).get("ratio")
            timed = ratio and base and math.isfinite(steps)
            cells.append(f"{steps * ratio[1] / base[1]:.2f}" if timed else "-")
        cells.append("{1:.2f} [{0:.2f}, {2:.2f}]".format(*ratio) if ratio else "-")
        settings = kept.settings(name)
        cells.append(", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in settings.items()))
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
        f"these steps from seed {TUNING_SEED}, each with the same budget; all other lines have the "
        "settings of the method that they belong to. `loss` is the mean of the last validation "
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
