"""The one file that touches JAX internals: what equations are called, where their bodies are, how to run them again.

Everything here rests on `jax.extend.core` and on the names and parameters of primitives, which change between releases
of JAX; `tests/capture/test_jaxpr.py` fails loudly when one did.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Literal = core.Literal

# Primitives that run one body on their own operands, by the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
REMAT = {"remat2", "checkpoint"}
# Primitives with one array operand and one result of the same entries in the same places.
SAME_PLACES = {
    "convert_element_type",
    "copy",
    "copy_p",
    "name",
    "optimization_barrier",
    "sharding_constraint",
    "pvary",
    "pcast",
    "mesh_cast",
    "reshard",
    "reduce_precision",
    "device_put",
}
# Primitives whose results are entries of their operand.
KEEP_ENTRIES = SAME_PLACES | {
    "reshape",
    "transpose",
    "squeeze",
    "broadcast_in_dim",
    "expand_dims",
    "tile",
    "rev",
    "slice",
}


def closed(jaxpr) -> core.ClosedJaxpr:
    """A jaxpr with its constants (bodies of remat come without)."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def inlined(jaxpr) -> core.ClosedJaxpr:
    """The same jaxpr, with the contents of calls such as `jnp.take` and `jnp.einsum` in place of the calls.

    Only where nothing is lost: a call that computes a single array of floating-point numbers has nothing to fuse.
    """
    jaxpr = closed(jaxpr)
    eqns = [inner for eqn in jaxpr.jaxpr.eqns for inner in _spliced(eqn)]
    return core.ClosedJaxpr(jaxpr.jaxpr.replace(eqns=eqns), jaxpr.consts)


def _spliced(eqn):
    """The equations that do what a thin call does; the equation itself if it is no thin call."""
    if eqn.primitive.name not in ("jit", "pjit"):
        return [eqn]
    body = inlined(eqn.params[CALLS[eqn.primitive.name]])
    arithmetic = [e for e in body.jaxpr.eqns if e.primitive.name not in KEEP_ENTRIES and any(map(_is_float, e.outvars))]
    results = body.jaxpr.outvars
    made = {v for e in body.jaxpr.eqns for v in e.outvars}
    if body.consts or len(arithmetic) > 1 or not made.issuperset(results) or len(set(results)) != len(results):
        return [eqn]
    names = dict(zip(body.jaxpr.invars, eqn.invars, strict=True))
    names |= dict(zip(results, eqn.outvars, strict=True))
    spliced = []
    for inner in body.jaxpr.eqns:
        for v in inner.outvars:
            if v not in names:
                names[v] = core.Var(v.aval)
        operands = [v if isinstance(v, Literal) else names[v] for v in inner.invars]
        spliced.append(inner.replace(invars=operands, outvars=[names[v] for v in inner.outvars]))
    return spliced


def _is_float(variable) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.inexact)


def bodies(eqn) -> tuple[core.ClosedJaxpr, ...]:
    """The bodies of a call, a scan or a cond that can be run again with taps inside; () for every other equation."""
    name = eqn.primitive.name
    if name in CALLS:
        return (inlined(eqn.params[CALLS[name]]),)
    if name == "scan":
        return (inlined(eqn.params["jaxpr"]),)
    if name == "cond":
        return tuple(map(inlined, eqn.params["branches"]))
    return ()


def hidden_bodies(eqn) -> tuple[core.ClosedJaxpr, ...]:
    """The bodies of an equation that cannot: its own derivative rule, or a loop of unknown length, would be lost."""
    if eqn.primitive.name in (*CALLS, "scan", "cond"):
        return ()
    params = [v for value in eqn.params.values() for v in (value if isinstance(value, tuple) else (value,))]
    return tuple(closed(v) for v in params if isinstance(v, core.Jaxpr | core.ClosedJaxpr))


def output_shapes(eqn) -> list[tuple[int, ...]]:
    """Shape of each result."""
    return [tuple(getattr(v.aval, "shape", ())) for v in eqn.outvars]


def run(eqn, operands) -> list[Any]:
    """Runs one equation unchanged."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # a pair before JAX 0.8
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*functions, *operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def run_call(eqn, operands, body: Callable) -> list[Any]:
    """Runs a call with `body(*operands) -> results` in place of its own, still checkpointed or compiled as one."""
    if eqn.primitive.name in REMAT:
        prevent, policy = eqn.params["prevent_cse"], eqn.params["policy"]
        return jax.checkpoint(body, prevent_cse=prevent, policy=policy)(*operands)
    return jax.jit(body)(*operands)


def run_cond(eqn, operands, branches) -> list[Any]:
    """Runs a cond with other branches."""
    return lax.switch(operands[0], branches, *operands[1:])


def run_scan(eqn, operands, probes, body: Callable) -> list[Any]:
    """Runs a scan with `body(operands of one step, slice of probes) -> results` in place of its own."""
    params = eqn.params
    consts, carry = params["num_consts"], params["num_carry"]

    def step(state, slices):
        xs, probe = slices
        results = body([*operands[:consts], *state, *xs], probe)
        return results[:carry], results[carry:]

    state, ys = lax.scan(
        step,
        list(operands[consts : consts + carry]),
        (list(operands[consts + carry :]), probes),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*state, *ys]


def varying_like(tree, arrays):
    """The tree with types that say it varies over the devices of a `jax.shard_map` as all of `arrays` do."""
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return tree
    numbers = [x for x in arrays if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    nothing = [jnp.any(jnp.ravel(x)[:0] != 0) for x in numbers]
    # A choice between equals varies as all that it depends on; the names of JAX's own casts change with its versions.
    return jax.tree.map(lambda x: jnp.where(functools.reduce(jnp.logical_or, nothing), x, x), tree)


def with_automatic_sharding(function: Callable, *args):
    """`function(*args)` where the compiler chooses shardings that are part of the arguments' types.

    Such types (of a mesh with `AxisType.Explicit`) would have to be given at reshapes and products. The results are the
    same on all devices.
    """
    meshes = {jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args)}
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None:
        return function(*args)
    explicit = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit]
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.sharding.auto_axes(function, axes=tuple(explicit), out_sharding=replicated)(*args)
