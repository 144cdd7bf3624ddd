"""A step of a transformer of width 768 and 12 layers in bfloat16 beside Adam's and Muon's, for an
accelerator.

    python -m benchmarks.large_transformer

Random tokens; parameters in float32, activations in bfloat16, matrices of one kind stacked over the
layers. Roots and bases are taken at some steps only: such a step is timed by itself ("refresh"),
and what it costs more than the others, spread over the period, is the "share" of the mean step.
Medians over rounds that run every method once."""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_curv

RMS, VOCABULARY = 0.2, 256
MATRICES = ("query", "key", "value", "out", "up", "down")


def init_params(width, depth, length):
    """Matrices drawn from N(0, 1 / rows)."""
    shapes = dict.fromkeys(MATRICES, (depth, width, width))
    shapes |= {
        "up": (depth, width, 4 * width),
        "down": (depth, 4 * width, width),
        "head": (width, VOCABULARY),
    }
    shapes |= {"embedding": (VOCABULARY, width), "positions": (length, width)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    drawn = zip(shapes.items(), keys, strict=True)
    params = {
        name: jax.random.normal(key, shape) * shape[-2] ** -0.5 for (name, shape), key in drawn
    }
    return params | {"norm_1": jnp.ones((depth, width)), "norm_2": jnp.ones((depth, width))}


def loss_fn(heads, attention, params, tokens):
    """Mean cross-entropy of the next token."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    def normed(x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)

    def block(x, layer):
        h = normed(x) * layer["norm_1"]
        q, k, v = (
            (h @ layer[name]).reshape(*h.shape[:-1], heads, -1)
            for name in ("query", "key", "value")
        )
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=attention)
        x = x + h.reshape(x.shape) @ layer["out"]
        return x + jax.nn.gelu(normed(x) * layer["norm_2"] @ layer["up"]) @ layer["down"], None

    x = params["embedding"][tokens[:, :-1]] + params["positions"]
    x, _ = jax.lax.scan(block, x, {name: params[name] for name in (*MATRICES, "norm_1", "norm_2")})
    logits = (normed(x) @ params["head"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def muon():
    """Muon for the stacked matrices, Adam for the rest."""
    dims = optax.contrib.MuonDimensionNumbers(1, 2)
    return optax.contrib.muon(
        1e-3,
        consistent_rms=RMS,
        muon_weight_dimension_numbers=lambda params: {
            name: dims if name in MATRICES else None for name in params
        },
    )


def ours(method, *after, **options):
    """A method with research options for the stacked matrices, Adam for the rest."""

    def labels(params):
        return {name: "matrix" if name in MATRICES else "rest" for name in params}

    def make():
        parts = {
            "matrix": optax.chain(method(stacked=1, **options), *after),
            "rest": optax.scale_by_adam(),
        }
        return optax.chain(optax.partition(parts, labels), optax.scale_by_learning_rate(1e-3))

    return make


def shampoo(**options):
    """Shampoo as its alias has it, with options that the alias does not take."""
    size = optax_curv.normalize_by_rms(0.2)
    return ours(optax_curv.scale_by_shampoo, size, damping=1e-5, **options)


METHODS = {
    "adam": lambda: optax.adam(1e-3),
    "muon": muon,
    "shampoo newton": shampoo(root="newton", block_size=1024),
    "shampoo newton, whole": shampoo(root="newton"),
    "shampoo qr": shampoo(root="qr", block_size=1024),
    "shampoo eigh": shampoo(block_size=1024),
    "soap": ours(optax_curv.scale_by_soap, block_size=1024),
}


class Compiled(NamedTuple):
    """A step, its arguments without a refresh and with one, the seconds it took to compile, and
    those of each call."""

    step: Callable
    arguments: list
    seconds: float
    times: list[list[float]]


def compiled(name, gradient, params, tokens):
    """A method's step, and its state late in training."""
    tx = METHODS[name]()

    def step(params, state, tokens):
        loss, grads = gradient(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = jax.jit(tx.init)(params)
    started = time.perf_counter()
    step = jax.jit(step).lower(params, state, tokens).compile()
    seconds = time.perf_counter() - started
    state = step(params, state, tokens)[1]  # the first step takes roots, too
    states = [state]
    if hasattr(optax_curv, name.split()[0]):
        states = [late(state, *steps) for steps in ((10001, 10000), (10000, 0))]
    return Compiled(
        step, [(params, state, tokens) for state in states], seconds, [[] for _ in states]
    )


def measure(runs, rounds):
    """Times every kind of step of every run in each round, after one that warms up."""
    for turn in range(rounds + 1):
        for run in runs:
            for arguments, times in zip(run.arguments, run.times, strict=True):
                started = time.perf_counter()
                jax.block_until_ready(run.step(*arguments))
                if turn:
                    times.append(time.perf_counter() - started)


def late(state, count, refreshed):
    """The state after so many steps, the last refresh of roots where it says."""
    state = optax.tree.set(state, count=jnp.int32(count))
    known = optax.tree.get_all_with_path(state, "since")
    return optax.tree.set(state, since=jnp.int32(count - refreshed)) if known else state


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, size in {
        "width": 768,
        "depth": 12,
        "heads": 12,
        "length": 1024,
        "batch": 16,
        "rounds": 7,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--period", type=int, default=100, help="steps between two refreshes, for the share"
    )
    options = parser.parse_args()

    params = init_params(options.width, options.depth, options.length)
    tokens = jax.random.randint(
        jax.random.key(1), (options.batch, options.length + 1), 0, VOCABULARY
    )
    gradient = jax.value_and_grad(functools.partial(loss_fn, options.heads, options.attention))
    runs = {}
    for name in options.methods:
        runs[name] = compiled(name, gradient, params, tokens)
        print(f"{name}: {runs[name].seconds:.1f} s to compile", file=sys.stderr, flush=True)
    measure(list(runs.values()), options.rounds)

    sizes = ", ".join(
        f"{name} {getattr(options, name)}" for name in ("width", "depth", "length", "batch")
    )
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {sizes}, attention by "
        f"{options.attention}"
    )
    print(
        f"{'':24}{'step ms':>9}{'/adam':>7}{'/muon':>7}{'refresh ms':>12}{'share':>7}"
        f"{'compile s':>11}"
    )
    medians = {
        name: [statistics.median(of_kind) for of_kind in run.times] for name, run in runs.items()
    }
    for name, run in runs.items():
        plain, *more = medians[name]
        mean = plain + (more[0] - plain) / options.period if more else plain
        ratios = "".join(
            f"{mean / medians[x][0]:7.2f}" if x in medians else f"{'':7}" for x in ("adam", "muon")
        )
        refresh = (
            f"{1e3 * (more[0] - plain):12.1f}{(mean - plain) / mean:7.1%}" if more else f"{'':19}"
        )
        print(f"{name:24}{1e3 * plain:9.2f}{ratios}{refresh}{run.seconds:11.1f}")


if __name__ == "__main__":
    main()
