"""What one outlier costs: the gradient of step 50 times 10 to 1e8, for every alias beside AdamW and
Muon.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.outliers                  # quadratic mlp
    OPENBLAS_NUM_THREADS=1 python -m benchmarks.outliers transformer      # an hour of two cores

Where a method takes a statistic (K-FAC's factors, branches), that of step 50 is multiplied, too.
All runs of a method start from the same weights and see the same batches. Two figures for each:

- the lag: the last step of the undisturbed run at which its loss was no lower than what the
  disturbed run ends at, counted from the end;
- the worst loss from the outlier on, as a multiple of the undisturbed run's worst one there.

The losses are those of fixed data, after every step; the end is the mean of the last five."""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_curv
from benchmarks import problems
from benchmarks.methods import RMS, _layers

STRUCK, STEPS, END = 50, 200, 5
FACTORS = (1e1, 1e2, 1e3, 1e4, 1e6, 1e8)
RESULTS = pathlib.Path(__file__).parent / "results"


class Contender(NamedTuple):
    """A method for one problem.

    Attributes:
      tx: the transformation.
      measure: (params, state, batch) -> (gradients, what is multiplied with them, other arguments).
    """

    tx: optax.GradientTransformationExtraArgs
    measure: Callable[..., tuple[Any, dict, dict]]


def of_gradients(tx: optax.GradientTransformation, problem: problems.Problem) -> Contender:
    def measure(params, state, batch):
        return jax.grad(problem.loss)(params, *batch), {}, {}

    return Contender(optax.with_extra_args_support(tx), measure)


def layerwise(make: Callable, statistic: Any, problem: problems.Problem) -> Contender:
    layers = _layers(problem)
    capture = optax_curv.value_grad_and_curvature(problem.loss, layers=layers, statistic=statistic)

    def measure(params, state, batch):
        basis = {"basis": optax_curv.eigenbasis(state)} if statistic == "eigenbasis" else {}
        _, grads, curvature = capture(params, *batch, **basis)
        return grads, {"curvature": curvature}, {}

    return Contender(make(layers), measure)


def branch_fisher(rate: float, problem: problems.Problem) -> Contender:
    rows = optax_curv.per_example_grads(problem.loss)

    def measure(params, state, batch):
        grads = jax.grad(problem.loss)(params, *batch)
        return grads, {"branches": rows(params, *batch)}, {}

    return Contender(optax_curv.branch_fisher(rate, 1e-2, solver="auto"), measure)


def branch_kfac(rate: float, problem: problems.Problem) -> Contender:
    def measure(params, state, batch):
        grads = jax.grad(problem.loss)(params, *batch)
        return grads, {"branches": batch[0].reshape(len(batch[0]), -1)[:16, :12]}, {}

    return Contender(optax_curv.branch_kfac(rate, 0.1), measure)


def gauss_newton(problem: problems.Problem) -> Contender:
    def measure(params, state, batch):
        grads = jax.grad(problem.loss)(params, *batch)
        return grads, {}, {"objective": problem.objective, "batch": batch}

    return Contender(optax_curv.gauss_newton(0.3, 0.1, max_iters=10), measure)


def scaled_factors(curvature: Any, factor: jax.Array) -> Any:
    """Statistics of gradients that are `factor` times as large."""
    names = ("output_factor", "moments", "output_grads")
    return {
        layer: x._replace(**{n: getattr(x, n) * factor for n in names if n in x._fields})
        for layer, x in curvature.items()
    }


def contenders(name: str, problem: problems.Problem) -> dict[str, Callable[[], Contender]]:
    """The methods of a problem; the rates are those of its table, or near them."""
    small, attends = name == "quadratic", name == "transformer"
    adam_for, rates = problem.adam_for, {"quadratic": 0.05, "mlp": 0.02, "transformer": 0.01}
    rate = rates[name]

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: "adam" if adam_for(path, leaf) else "matrices", params
        )

    muon = {
        "matrices": optax.contrib.muon(rate, consistent_rms=RMS),
        "adam": optax.adam(rate),
    }
    plain = {
        "adamw": lambda: optax.adamw(rate),
        "muon": lambda: optax.partition(muon, labels),
        "shampoo": lambda: optax_curv.shampoo(2 * rate, adam_for=adam_for),
        "soap": lambda: optax_curv.soap(rate, adam_for=adam_for),
        "kron_psgd": lambda: optax_curv.kron_psgd(rate),
        "lra_psgd": lambda: optax_curv.lra_psgd(rate / 2),
    }
    if small:
        plain["dense_psgd"] = lambda: optax_curv.dense_psgd(rate / 2)
    fallback = optax.scale_by_adam()
    kfac = lambda layers: optax_curv.kfac(  # noqa: E731
        2 * rate, layers, 1e-2, kl_clip=1e-3, fallback=fallback
    )
    ekfac = lambda layers: optax_curv.ekfac(rate, layers, 1e-2, fallback=fallback)  # noqa: E731
    found = {n: lambda tx=tx: of_gradients(tx(), problem) for n, tx in plain.items()}
    if not attends:
        found |= {
            "kfac": lambda: layerwise(kfac, "kronecker", problem),
            "ekfac": lambda: layerwise(ekfac, "eigenbasis", problem),
            "branch_fisher": lambda: branch_fisher(rate, problem),
            "branch_kfac": lambda: branch_kfac(rate, problem),
            "gauss_newton": lambda: gauss_newton(problem),
        }
    return found


def quadratic() -> problems.Problem:
    """Least squares whose Hessian's eigenvalues cover 1.5 decades."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 12)) * np.logspace(0, -0.75, 12), jnp.float32)
    y = x @ jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)
    y = y + 0.1 * jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    objective = optax_curv.Objective(lambda p, x: x @ p["w"], "normal")

    def batches(seed, steps):
        order = np.random.default_rng(seed)
        return ((x[i], y[i]) for i in (order.integers(0, 256, 32) for _ in range(steps)))

    return problems.Problem(
        definition="least squares, 12 × 8, 256 examples, batch 32",
        init=lambda seed: {"w": jnp.zeros((12, 8))},
        loss=objective,
        batches=batches,
        metrics={"training loss": lambda params: objective(params, x, y)},
        steps=STEPS,
        evaluate_every=1,
        objective=objective,
    )


def losses(contender: Contender, problem: problems.Problem) -> Callable[[float], np.ndarray]:
    """A function of the outlier's size: the loss after every step, from one compilation."""
    evaluate = next(iter(problem.metrics.values()))
    batches = jax.tree.map(lambda *x: jnp.stack(x), *problem.batches(0, STEPS))

    def step(outlier, carry, given):
        params, state = carry
        count, batch = given
        factor = jnp.where(count == STRUCK, outlier, 1.0)
        grads, struck, others = contender.measure(params, state, batch)
        grads = jax.tree.map(lambda g: g * factor, grads)
        if "curvature" in struck:
            struck = {"curvature": scaled_factors(struck["curvature"], factor)}
        else:
            struck = jax.tree.map(lambda x: x * factor, struck)
        updates, state = contender.tx.update(grads, state, params, **struck, **others)
        params = optax.apply_updates(params, updates)
        return (params, state), evaluate(params)

    @jax.jit
    def run(outlier):
        params = problem.init(0)
        carry = params, contender.tx.init(params)
        given = jnp.arange(STEPS), batches
        return jax.lax.scan(functools.partial(step, outlier), carry, given)[1]

    return lambda outlier: np.nan_to_num(np.asarray(run(outlier)), nan=np.inf)


def figures(plain: np.ndarray, struck: np.ndarray) -> tuple[int, float]:
    """(lag, worst loss) of a disturbed run beside the undisturbed one."""
    above = np.flatnonzero(plain >= struck[-END:].mean())
    lag = STEPS - END // 2 - 1 - (above[-1] if len(above) else -1)
    return max(0, int(lag)), float(struck[STRUCK:].max() / plain[STRUCK:].max())


def measured(contender: Contender, problem: problems.Problem) -> dict[str, Any]:
    """The figures of a method on a problem."""
    run = losses(contender, problem)
    plain = run(1.0)
    return {
        "first": float(plain[0]),
        "last": float(plain[-END:].mean()),
        "runs": {f"{factor:.0e}": figures(plain, run(factor)) for factor in FACTORS},
    }


def row(method: str, figures: dict[str, Any]) -> str:
    """A line of the table: lag / worst loss for every outlier."""
    cells = [f"{lag} / {worst:.3g}" for lag, worst in figures["runs"].values()]
    ends = f"{figures['first']:.3g} to {figures['last']:.3g}"
    return f"| {method} | {ends} | " + " | ".join(cells) + " |"


def report(found: dict[str, Any]) -> str:
    """The tables as Markdown."""
    heads = " | ".join(f"×{factor:.0e}" for factor in FACTORS)
    lines = ["# What one outlier costs", "", "By `python -m benchmarks.outliers`: lag in steps /"]
    lines += ["worst loss, both beside the undisturbed run.", ""]
    for name, of_problem in found.items():
        lines += [f"## {name}", "", f"| method | undisturbed loss | {heads} |"]
        lines += ["|---" * (2 + len(FACTORS)) + "|"]
        lines += [row(method, x) for method, x in of_problem.items()] + [""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Runs the problems that are named, and writes their figures beside those of the others."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outliers")
    names = ("quadratic", "mlp", "transformer")
    parser.add_argument("problems", nargs="*", default=["quadratic", "mlp"], choices=names)
    parser.add_argument("--methods", nargs="+", help="which of them (default: all)")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    file = options.out / "outliers.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for name in options.problems:
        problem = quadratic() if name == "quadratic" else problems.load(name)[1]
        for method, make in contenders(name, problem).items():
            if options.methods is None or method in options.methods:
                found.setdefault(name, {})[method] = measured(make(), problem)
                print(row(method, found[name][method]), file=sys.stderr, flush=True)
                file.write_text(json.dumps(found, indent=1) + "\n")
                (options.out / "outliers.md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
