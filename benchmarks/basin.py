"""How wide the basin of good learning rates is: ``python -m benchmarks.basin [PROBLEM ...]``.

Every method runs at a third of its tuned rate (`results/tuned.json`), at the rate, and at three
times the rate, on the same weights and batches. Prints the last value of the problem's first
metric, the median over seeds; ``--save`` writes it to `results/basin.md`.
"""

import argparse
import json
import pathlib

import numpy as np

from benchmarks import methods, problems, running

RESULTS = pathlib.Path(__file__).parent / "results"
METHODS = ("adam", "muon", "shampoo", "soap", "kron_psgd_rms", "kfac")
PROBLEMS = ("mlp", "autoencoder", "transformer")
FACTORS = (1 / 3, 1.0, 3.0)


def last_values(problem, name, settings, seeds, evaluate):
    """The medians over the seeds of the last value of the first metric, one for each factor."""
    method = (methods.OURS | methods.OPTAX)[name](problem, problem.steps)
    compiled = running.compile_method(method, problem, settings)
    whole, metric = problem._replace(evaluate_every=problem.steps), next(iter(problem.metrics))
    medians = []
    for factor in FACTORS:
        rate = factor * settings["learning_rate"]
        trial = {name: compiled._replace(settings=settings | {"learning_rate": rate})}
        ends = []
        for seed in seeds:
            runs = running.train(whole, trial, seed, problem.steps, evaluate, lambda _: None)
            ends.append(runs[0].metrics[metric][-1])
        medians.append(float(np.median(ends)))
    return medians


def main():
    """Parses the command line, trains, prints and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.basin")
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help=f"default: {PROBLEMS}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    tuned = json.loads((RESULTS / "tuned.json").read_text())
    lines = [
        "| problem | method | tuned rate | at a third | at the rate | at three times |",
        "|---|---|---|---|---|---|",
    ]
    for title in options.problems or PROBLEMS:
        problem = problems.load(title)[1]
        evaluate = running.evaluator(problem)
        for name in options.methods:
            settings = tuned[title].get(name)
            if settings is None:
                continue
            found = last_values(problem, name, settings, options.seeds, evaluate)
            cells = [f"{x:.3g}" for x in found]
            row = (title, f"`{name}`", f"{settings['learning_rate']:g}", *cells)
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    if options.save:
        said = (
            f"Last training losses, medians over {len(options.seeds)} seeds, at a third of the "
            "tuned rate, at it and at three times it: `python -m benchmarks.basin --save`."
        )
        text = f"# How wide the basin is\n\n{said}\n\n" + "\n".join(lines) + "\n"
        (RESULTS / "basin.md").write_text(text)


if __name__ == "__main__":
    main()
