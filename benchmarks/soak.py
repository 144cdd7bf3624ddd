"""Long runs of every alias on a small problem, outside the tests' suite.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.soak                # 100,000 steps, an hour
    OPENBLAS_NUM_THREADS=1 python -m benchmarks.soak --moments      # 20,000 steps in short dtypes

The first trains a noisy least squares in float32 and bfloat16, a tenth of the steps in one program,
and demands that all is finite, that the loss stays at the floor that it had after a tenth, that no
second program is compiled, and that the process holds no more memory. The second feeds float32
leaves and bfloat16 ones, then float32 and float16 ones, the same gradients, which shrink a
thousandfold after a tenth of the steps, and demands that the norms of all updates agree within 1 %
in the mean of the last tenth. Gradients rounded otherwise would not do: within the 2000 steps of a
tenth `lra_psgd` wanders by a tenth of a bias's norm wherever two runs differ in rounding."""

import argparse
import functools
import resource
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_curv

FLOOR, SAME, MEMORY = 2.0, 0.01, 64  # loss to the early one, of a ratio of updates, in MiB
PARTS = 10
MAKERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "shampoo": optax_curv.shampoo,
    "soap": optax_curv.soap,
    "kron_psgd": optax_curv.kron_psgd,
    "dense_psgd": optax_curv.dense_psgd,
    "lra_psgd": functools.partial(optax_curv.lra_psgd, rank=2),
    "kfac": lambda rate: optax_curv.kfac(rate, LAYERS, 1e-3),
    "ekfac": lambda rate: optax_curv.ekfac(rate, LAYERS, 1e-3),
    "branch_fisher": lambda rate: optax_curv.branch_fisher(rate, 0.1),
    "branch_kfac": lambda rate: optax_curv.branch_kfac(rate, 0.1),
    "gauss_newton": lambda rate: optax_curv.gauss_newton(rate, 0.1, max_iters=4),
}
LAYERS = optax_curv.Layers([optax_curv.Layer("layer", "dense", "['w']", "['b']", 4, 3)])
OBJECTIVE = optax_curv.Objective(lambda p, x: x @ p["w"] + p["b"], "normal")


def extras(name: str, params: Any, state: Any, x: jax.Array, y: jax.Array) -> dict[str, Any]:
    """The extra arguments of a method's update for a batch."""
    errors = x @ params["w"] + params["b"] - y
    rows = jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1)
    a, g = rows.T @ rows / len(x), errors.T @ errors / len(x)
    if name == "kfac":
        return {"curvature": {"layer": optax_curv.KroneckerFactors(a, g, jnp.int32(1))}}
    if name == "ekfac":
        basis = optax_curv.eigenbasis(state)["layer"]
        moments = jnp.square(rows @ basis.input_basis).T @ jnp.square(errors @ basis.output_basis)
        moment = optax_curv.EigenbasisMoments(a, g, jnp.int32(1), moments=moments / len(x))
        return {"curvature": {"layer": moment}}
    if name.startswith("branch"):
        return {"branches": errors}
    return {"objective": OBJECTIVE, "batch": (x, y)} if name == "gauss_newton" else {}


def start(dtype: Any) -> dict[str, jax.Array]:
    """The parameters that every run starts from."""
    return {"w": jnp.ones((4, 3), dtype), "b": jnp.zeros(3, dtype)}


def soak(name: str, steps: int, dtype: Any) -> list[str]:
    """What is wrong with a long run; nothing."""
    tx = optax.with_extra_args_support(MAKERS[name](optax.constant_schedule(1e-3)))
    solution = jnp.arange(12.0).reshape(4, 3) / 6

    def step(carry, _):
        params, state, count = carry
        kx, ky = jax.random.split(jax.random.fold_in(jax.random.key(0), count))
        x = jax.random.normal(kx, (16, 4))
        y = x @ solution + 0.1 * jax.random.normal(ky, (16, 3))
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        value, grads = jax.value_and_grad(OBJECTIVE)(wide, x, y)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        given = extras(name, wide, state, x, y)
        updates, state = tx.update(grads, state, params, **given)
        return (optax.apply_updates(params, updates), state, count + 1), value

    part = jax.jit(lambda carry: jax.lax.scan(step, carry, None, max(1, steps // PARTS)))
    carry = start(dtype), tx.init(start(dtype)), jnp.int32(0)
    means, held = [], []
    for _ in range(PARTS):
        carry, values = part(carry)
        means.append(float(jnp.mean(values[-100:])))
        held.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    finite = all(
        bool(jnp.all(jnp.isfinite(x)))
        for x in jax.tree.leaves(carry)
        if jnp.issubdtype(x.dtype, jnp.floating)
    )
    wrong = [] if finite else ["not finite"]
    if not means[-1] < FLOOR * max(means[1], 0.015):
        wrong.append(f"loss {means[1]:.3g} after a tenth, {means[-1]:.3g} at the end")
    if part._cache_size() != 1:
        wrong.append(f"{part._cache_size()} programs")
    if held[-1] > held[1] + MEMORY:
        wrong.append(f"memory grows from {held[1]} to {held[-1]} MiB")
    return wrong


def moments(name: str, steps: int) -> list[str]:
    """What differs between the updates of short leaves and those of float32."""
    tx = MAKERS[name](1.0)

    def norms(dtype, short):
        """The norms of all updates of leaves of a dtype, for gradients rounded to a short one."""

        def step(carry, count):
            params, state = carry
            noise = jax.random.split(jax.random.fold_in(jax.random.key(1), count), 4)
            size = jnp.where(count < steps // PARTS, 1.0, 1e-3)
            grads = {
                "w": (size * jax.random.normal(noise[0], (4, 3))).astype(short).astype(dtype),
                "b": (size * jax.random.normal(noise[1], (3,))).astype(short).astype(dtype),
            }
            x = size * jax.random.normal(noise[2], (16, 4))
            wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
            y = size * jax.random.normal(noise[3], (16, 3)) + x @ wide["w"] + wide["b"]
            given = extras(name, wide, state, x, y)
            updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **given)
            squares = [jnp.sum(jnp.square(u.astype(jnp.float32))) for u in updates.values()]
            return (params, state), jnp.sqrt(jnp.stack(squares))

        first = start(dtype), tx.init(start(dtype))
        return np.asarray(jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps))[1])(first))

    wrong = []
    for dtype in (jnp.bfloat16, jnp.float16):
        long, found = norms(jnp.float32, dtype), norms(dtype, dtype)
        ratio = found[-steps // PARTS :].mean(0) / long[-steps // PARTS :].mean(0)
        if not np.all(np.abs(ratio - 1) < SAME):
            wrong.append(f"updates of {jnp.dtype(dtype).name} are {ratio.round(4)} of float32's")
    return wrong


def main(arguments: list[str] | None = None) -> None:
    """Runs all, a line for each; exits with 1 where anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--steps", type=int, help="default: 100,000, and 20,000 for moments")
    parser.add_argument("--moments", action="store_true", help="short dtypes against float32")
    parser.add_argument("--methods", nargs="+", default=list(MAKERS), choices=MAKERS)
    options = parser.parse_args(arguments)
    failed = False
    for name in options.methods:
        if options.moments:
            found = {"": moments(name, options.steps or 20_000)}
        else:
            dtypes = jnp.float32, jnp.bfloat16
            found = {
                f" {jnp.dtype(d).name}": soak(name, options.steps or 100_000, d) for d in dtypes
            }
        for kind, wrong in found.items():
            print(f"{name}{kind}: {'; '.join(wrong) or 'right'}", flush=True)
            failed |= bool(wrong)
    sys.exit(failed)


if __name__ == "__main__":
    main()
