"""Compares optimizers on one problem: ``python -m benchmarks.compare PROBLEM``; see ``--help``.

All methods start from the same weights, see the same batches and take their steps in one interleaved run, block by
block in an order that rotates; a table, a JSON file and a plot say what came of it. Adam always runs: it is the unit.
"""

import argparse
import contextlib
import functools
import io
import json
import pathlib
import sys

from tqdm import tqdm

from benchmarks import methods, peers, problems, report, running

METHODS = {**methods.OPTAX, **methods.OURS, **peers.METHODS}
RESULTS = pathlib.Path(__file__).parent / "results"
TUNING_SEED = 100


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m benchmarks.compare", description="Compares optimizers on one problem.")
    names = ", ".join(problems.NAMES)
    parser.add_argument("problem", help=f"{names}, or the path of a Python file with a function problem()")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument(
        "--seeds",
        nargs="*",
        type=int,
        default=[0, 1, 2],
        help="of weights and batches (default: 0 1 2); none: tune only",
    )
    parser.add_argument("--steps", type=int, help="steps of each method (default: the problem's)")
    parser.add_argument(
        "--out", type=pathlib.Path, default=RESULTS, help="folder of the results (default: %(default)s)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--tune", action="store_true", help=f"tune the settings first, from seed {TUNING_SEED}, and keep them"
    )
    how.add_argument("--tuned", action="store_true", help="the kept settings (default: those each walk starts from)")
    return parser


def _compile(names, problem, steps, note) -> tuple[dict, dict]:
    """Methods ready to run, and the reason for each that is not."""
    made, ready, failures = {}, {}, {}

    def attempt(name, function):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some peers print while they are traced
                return function()
        except methods.Absent as error:
            failures[name] = f"absent: {error}"
        except Exception as error:  # whatever a peer raises is a line in the table
            failures[name] = f"failed: {running.reason(error)}"

    for name in names:
        made[name] = attempt(name, functools.partial(METHODS[name], problem, steps))
    # Those that compile themselves come last: the others start by clearing what JAX has compiled so far.
    for name, method in sorted(made.items(), key=lambda item: item[1] is not None and item[1].host):
        if method is not None:
            note(f"compiling {name}")
            ready[name] = attempt(name, functools.partial(running.compile_method, method, problem, method.settings))
    return {name: ready[name] for name in names if ready.get(name)}, failures


def _tuned_file(folder: pathlib.Path) -> pathlib.Path:
    return folder / "tuned.json"


def _kept(folder: pathlib.Path) -> dict:
    path = _tuned_file(folder)
    return json.loads(path.read_text()) if path.exists() else {}


def _tune(title, problem, ready, failures, steps, folder, note) -> dict:
    """Tunes every method and keeps what was found, method by method."""
    for name in list(ready):
        note(f"tuning {name}")
        try:
            settings = running.tune(problem, ready[name], name, TUNING_SEED, steps, note)
        except Exception as error:
            failures[name] = f"failed: {running.reason(error)}"
            del ready[name]
            continue
        ready[name] = ready[name]._replace(settings=settings)
        kept = _kept(folder)
        kept.setdefault(title, {})[name] = settings
        folder.mkdir(parents=True, exist_ok=True)
        _tuned_file(folder).write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    return ready


def main(arguments: list[str] | None = None):
    """Parses the command line, tunes if asked to, trains, prints the table and writes the results."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        title, problem = problems.load(options.problem)
    except (ValueError, ImportError, RuntimeError) as error:
        parser.error(str(error))
    unknown = [name for name in options.methods or () if name not in METHODS]
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}; expected some of {', '.join(METHODS)}")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps: expected a whole number above zero, got {options.steps}")
    names = list(dict.fromkeys([report.REFERENCE, *(options.methods or METHODS)]))
    steps = options.steps or problem.steps

    ready, failures = _compile(names, problem, steps, tqdm.write)
    tuning = "untuned"
    if options.tune:
        ready = _tune(title, problem, ready, failures, steps, options.out, tqdm.write)
    if options.tuned:
        kept = _kept(options.out).get(title, {})
        for name in set(ready) - set(kept):
            if ready[name].settings:
                tqdm.write(f"{name}: no settings kept, taking its first ones")
        ready = {name: m._replace(settings=kept.get(name, m.settings)) for name, m in ready.items()}
    if not options.seeds:
        return
    if options.tune or options.tuned:
        tuning = (
            f"tuned from seed {TUNING_SEED} on the grid 1, 3, 10, … (other settings: powers of ten) until the "
            "best is inside"
        )
    with tqdm(total=steps * len(options.seeds), unit="step", desc=title, file=sys.stderr) as bar:
        evaluate = running.evaluator(problem)
        runs = [running.train(problem, ready, seed, steps, evaluate, bar.update) for seed in options.seeds]
    summary = report.summarize(problem, ready, runs, options.seeds)
    summary["methods"] |= {name: {"failure": reason} for name, reason in failures.items()}
    summary |= {"machine": report.machine(), "tuning": tuning}
    print(report.save(title, summary, options.out))
    print(f"written: {options.out}/{title}.json, .md and .png", file=sys.stderr)


if __name__ == "__main__":
    main()
