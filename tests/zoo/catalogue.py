"""The zoo: tiny configurations of published networks with random weights, and how each is checked.

`network(source)` registers a function that builds (loss, params, *arrays), the loss a mean over the
arrays' leading axis of three examples. `row_of` finds its layers, compares gradients and factors
with those of single examples, and trains it for 20 steps of `kfac`. The packages are optional and
are imported by the builders alone.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_curv import find_layers, kfac, value_grad_and_curvature

N, T, D, V = 3, 4, 8, 11  # examples, positions, width, words
STEPS, RATE = 20, 0.03
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
NETWORKS: dict[str, "Network"] = {}
# The modules that register networks, and the packages that these are from.
MODULES = {
    "in_flax": (),
    "in_equinox": ("equinox", "diffrax"),
    "in_flows_and_graphs": ("flowjax", "distrax", "numpyro", "jraph", "e3nn_jax", "penzai"),
    "in_haiku": ("haiku",),
    "in_keras": ("keras",),
    "in_transformers": ("transformers",),
}


@dataclasses.dataclass(frozen=True)
class Network:
    """One network.

    Attributes:
      source: the package that it is from.
      build: returns (loss, params, *arrays).
      mixes: whether examples meet in the network (batch normalisation, contrastive losses), so that
        only the batch given twice can be compared.
      tolerance: of gradients and factors, relative to the largest entry.
      rises: whether 20 steps on three examples are known to raise the loss.
    """

    source: str
    build: Callable
    mixes: bool = False
    tolerance: float = 1e-7
    rises: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found: a row of the table."""

    source: str
    name: str
    leaves: int
    covered: int
    kernels: int
    covered_kernels: int
    reasons: tuple[str, ...]
    gradient_error: float | None = None
    factor_error: float | None = None
    first: float | None = None
    last: float | None = None


# Of the largest gradient: a bias before a normalisation has none but rounding.
ROUNDED = 1e-4
SINGLE = 3e-3  # where the package computes in float32 whatever it is given


def network(source, *, mixes=False, tolerance=1e-7, rises=False):
    """Registers a builder under its own name."""

    def register(build):
        NETWORKS[f"{source}: {build.__name__}"] = Network(source, build, mixes, tolerance, rises)
        return build

    return register


def of_source(source):
    return [name for name, one in NETWORKS.items() if one.source == source]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), float)


def tokens(seed, *shape, vocabulary=V):
    return jnp.asarray(np.random.default_rng(seed).integers(1, vocabulary, shape), jnp.int32)


def filled(shapes):
    """Random parameters of these shapes: kernels of unit gain, scales near 1, all else small."""

    def leaf(k, path, x):
        name = jax.tree_util.keystr(path[-1:]).lower()
        numbers = normal(k, *x.shape)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.zeros(x.shape, x.dtype)
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            return 0.3 * (numbers + 1j * normal(k + 1000, *x.shape))
        if "scale" in name or "gamma" in name or "var" in name:
            return 1 + 0.1 * jnp.abs(numbers)
        if len(x.shape) < 2:
            return 0.1 * numbers
        return numbers / np.sqrt(np.prod(x.shape[:-1]))

    leaves = jax.tree.leaves_with_path(shapes)
    made = [leaf(k, path, x) for k, (path, x) in enumerate(leaves)]
    return jax.tree.unflatten(jax.tree.structure(shapes), made)


def mean_square(outputs):
    return jnp.mean(jnp.sum(jnp.sin(outputs + 1.0) ** 2, axis=tuple(range(1, outputs.ndim))))


def next_word(logits, ids):
    """Cross-entropy of the next of the words, a mean over examples."""
    scores = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1)
    return -jnp.mean(jnp.sum(scores, axis=(1, 2)))


def linen(module, *inputs, output=lambda x: x, rngs=None, **options):
    """A Flax module; batch statistics are those of the batch, and are dropped."""
    key = {"params": jax.random.key(0), **(rngs or {})}
    shapes = jax.eval_shape(lambda *x: module.init(key, *x, **options), *inputs)
    variables = filled(shapes)
    params = variables.pop("params")
    mutable = list(variables)

    def loss(params, *inputs):
        result = module.apply(
            {"params": params, **variables}, *inputs, mutable=mutable, rngs=rngs, **options
        )
        return mean_square(output(result[0]))

    return loss, params, *inputs


def coverage_of(name):
    """The row of a network of which nothing is computed, as its layers are found without that."""
    one = NETWORKS[name]
    with jax.enable_x64(True):
        loss, params, *arrays = one.build()
        return coverage(one, params, find_layers(loss, params, *arrays))


def coverage(one, params, layers):
    """A row without its figures."""
    leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(params)}
    kernels = {path for path, x in leaves.items() if x.ndim > 1}
    covered = {path for layer in layers for path in layer.paths}
    return Row(
        source=one.source,
        name=one.build.__name__,
        leaves=len(leaves),
        covered=len(covered),
        kernels=len(kernels),
        covered_kernels=len(kernels & covered),
        reasons=tuple(sorted(f"{path}: {reason}" for path, reason in layers.uncovered.items())),
    )


def row_of(name):
    """Checks a network and returns its row of the table."""
    one = NETWORKS[name]
    with jax.enable_x64(True):
        loss, params, *arrays = one.build()
        layers = find_layers(loss, params, *arrays)
        values, grads, right, curvature = trained(loss, layers, params, arrays)
        right = jax.tree.leaves(right)
        measure = jax.jit(value_grad_and_curvature(loss, layers=layers), compiler_options=QUICK)
        if one.mixes:
            parts = [measure(params, *(jnp.concatenate([x, x]) for x in arrays))[2]]
        else:
            parts = [measure(params, *(x[k : k + 1] for x in arrays))[2] for k in range(N)]
        mean = jax.tree.map(lambda *x: sum(x) / len(x), *parts)
        pairs = [
            pair
            for x in layers
            for pair in zip(factors(curvature, x), factors(mean, x), strict=True)
        ]
    return dataclasses.replace(
        coverage(one, params, layers),
        gradient_error=largest(jax.tree.leaves(grads), right, ROUNDED * max(map(size, right))),
        factor_error=largest(*zip(*pairs, strict=True)) if pairs else 0.0,
        first=values[0],
        last=values[-1],
    )


def factors(curvature, layer):
    """A and G of a layer, also of one whose kernel is made of a leaf."""
    statistic = curvature[layer.name]
    return getattr(statistic, "statistic", statistic)[:2]


def size(x):
    """The largest entry."""
    return float(jnp.max(jnp.abs(x), initial=0))


def largest(given, right, floor=1e-9):
    """The largest difference of several arrays, each relative to its largest entry + floor."""
    errors = [size(a - b) / (size(b) + floor) for a, b in zip(given, right, strict=True)]
    return max(errors, default=0.0)


def trained(loss, layers, params, arrays):
    """The losses of some steps of `kfac` on one batch, and what the first step was made of."""
    measure = value_grad_and_curvature(loss, layers=layers)
    fallback = optax.scale_by_adam() if layers.uncovered else None
    tx = kfac(RATE, layers, invert_every=1, fallback=fallback)  # one program, not two

    def step(params, state):
        value, grads, curvature = measure(params, *arrays)
        right = jax.grad(loss)(params, *arrays)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, (value, grads, right, curvature)

    step, state = jax.jit(step, compiler_options=QUICK), tx.init(params)
    params, state, first = step(params, state)
    values = [float(first[0])]
    for _ in range(STEPS):
        params, state, made = step(params, state)
        values.append(float(made[0]))
    return values, *first[1:]


def as_json(row):
    """A row as it is kept in a file."""
    one = NETWORKS[f"{row.source}: {row.name}"]
    return dataclasses.asdict(row) | {"mixes": one.mixes}


def kept_row(row):
    """The committed row of this network, or None."""
    kept = json.loads((pathlib.Path(__file__).parent / "rows.json").read_text())
    return next((x for x in kept if (x["source"], x["name"]) == (row.source, row.name)), None)


def check(name):
    """Asserts that a row is right: no silent fault, no blow-up, covered as the table says."""
    one, row = NETWORKS[name], row_of(name)
    if "ZOO_ROWS" in os.environ:
        with open(os.environ["ZOO_ROWS"], "a") as file:
            file.write(json.dumps(as_json(row)) + "\n")
    assert row.gradient_error <= one.tolerance, row
    assert row.factor_error <= one.tolerance, row
    assert np.isfinite(row.last), row
    assert one.rises or row.last <= row.first + 0.05 * abs(row.first), row
    kept = kept_row(row)
    if kept is None:
        print("no row in the table yet; python tests/zoo/table.py writes", row)
    else:
        assert (row.covered, row.leaves) == (kept["covered"], kept["leaves"]), row
