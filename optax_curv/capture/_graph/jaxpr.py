"""The one file that touches JAX internals: what equations are called, where their bodies are, how to run them again.

Names and parameters of primitives change between releases of JAX: `tests/capture/test_jaxpr.py`
fails when one did.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

REMAT = {"remat2", "checkpoint"}
# Primitives that run one body on their own operands.
CALLS = {"jit", "pjit", "closed_call", "core_call", *REMAT}
# Primitives whose one result has the entries of their one array operand in the same places.
SAME_PLACES = {
    "convert_element_type",
    "copy",
    "copy_p",
    "name",
    "optimization_barrier",
    "sharding_constraint",
    "pvary",
}
SAME_PLACES |= {"pcast", "mesh_cast", "reshard", "reduce_precision", "device_put"}
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


def _core() -> Any:
    """`jax.extend.core`; only a capture imports it, as it brings all of Pallas with it."""
    from jax.extend import core

    return core


def is_literal(variable) -> bool:
    """Whether a variable of an equation is a number written into it."""
    return isinstance(variable, _core().Literal)


def shape_of(variable) -> tuple[int, ...]:
    """Shape of a variable or literal."""
    return tuple(getattr(variable.aval, "shape", ()))


def inlined(jaxpr) -> Any:
    """The same jaxpr, with the contents of calls such as `jnp.take` and `jnp.einsum` in place of the calls.

    Only where nothing is lost: a call that computes a single array of floating-point numbers has
    nothing to fuse.
    """
    core = _core()
    jaxpr = (
        jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())
    )  # as the bodies of remat come
    eqns = [inner for eqn in jaxpr.jaxpr.eqns for inner in _spliced(eqn)]
    return core.ClosedJaxpr(jaxpr.jaxpr.replace(eqns=eqns), jaxpr.consts)


def _spliced(eqn):
    """The equations that do what a thin call does; the equation itself if it is no thin call."""
    if eqn.primitive.name not in ("jit", "pjit"):
        return [eqn]
    (body,) = bodies(eqn)
    arithmetic = [
        e
        for e in body.jaxpr.eqns
        if e.primitive.name not in KEEP_ENTRIES and any(map(_is_float, e.outvars))
    ]
    results = body.jaxpr.outvars
    made = {v for e in body.jaxpr.eqns for v in e.outvars}
    if (
        body.consts
        or len(arithmetic) > 1
        or not made.issuperset(results)
        or len(set(results)) != len(results)
    ):
        return [eqn]
    names = {v: _core().Var(v.aval) for v in made}
    names.update(zip((*body.jaxpr.invars, *results), (*eqn.invars, *eqn.outvars), strict=True))

    def named(variables):
        return [v if is_literal(v) else names[v] for v in variables]

    return [
        inner.replace(invars=named(inner.invars), outvars=named(inner.outvars))
        for inner in body.jaxpr.eqns
    ]


def _is_float(variable) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.inexact)


def bodies(eqn) -> tuple:
    """The bodies of a call, a scan or a cond, which can be run again with taps inside."""
    if eqn.primitive.name == "cond":
        return tuple(map(inlined, eqn.params["branches"]))
    if eqn.primitive.name in (*CALLS, "scan"):
        return (inlined(eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]),)
    return ()


def hidden_bodies(eqn) -> list:
    """Bodies that cannot: a derivative rule, or a loop of unknown length, would be lost."""
    if bodies(eqn):
        return []
    params = [
        v
        for value in eqn.params.values()
        for v in (value if isinstance(value, tuple) else (value,))
    ]
    return [v for v in params if isinstance(v, _core().Jaxpr | _core().ClosedJaxpr)]


def run(eqn, operands) -> list[Any]:
    """Runs one equation unchanged."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = (
        params if isinstance(params, tuple) else ((), params)
    )  # a pair before JAX 0.8
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*functions, *operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def run_call(eqn, operands, body: Callable) -> list[Any]:
    """Runs a call with `body(*operands) -> results` in place of its own."""
    if eqn.primitive.name in REMAT:
        prevent, policy = eqn.params["prevent_cse"], eqn.params["policy"]
        return jax.checkpoint(body, prevent_cse=prevent, policy=policy)(*operands)
    return jax.jit(body)(*operands)


def scan_sizes(eqn) -> tuple[int, int]:
    """How many operands of a scan are the same at every step, and how many are carried from one to the next."""
    if "num_consts" in eqn.params:  # before JAX 0.11
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def run_scan(eqn, operands, probes, body: Callable) -> list[Any]:
    """Runs a scan with `body(operands of one step, slice of probes) -> results` in place of its own."""
    consts, carry = scan_sizes(eqn)

    def step(state, slices):
        xs, probe = slices
        results = body([*operands[:consts], *state, *xs], probe)
        return results[:carry], results[carry:]

    state, xs = list(operands[consts : consts + carry]), list(operands[consts + carry :])
    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    state, ys = lax.scan(step, state, (xs, probes), **options)
    return [*state, *ys]


def counters_carried(eqn) -> set[int]:
    """Places of a scan's carry that hold the number of the step, 0, 1, …, by which `fori_loop` picks slices."""
    body, (consts, carry) = eqn.params["jaxpr"].jaxpr, scan_sizes(eqn)

    def counts(k):
        maker = _maker(body, body.outvars[k], "add")
        next_one = (
            maker and maker.invars[0] is body.invars[consts + k] and _is_number(maker.invars[1], 1)
        )
        return next_one and _is_number(eqn.invars[consts + k], 0) and not eqn.params["reverse"]

    return set(filter(counts, range(carry)))


def is_range(jaxpr, variable) -> bool:
    """Whether a variable is 0, 1, … along its only axis."""
    maker = _maker(jaxpr, variable, "iota")
    return maker is not None and len(maker.params["shape"]) == 1


def same_integers(jaxpr, eqn) -> int | None:
    """Which operand's non-negative integers the result has too."""
    if eqn.primitive.name == "convert_element_type":
        return 0
    if eqn.primitive.name == "select_n":  # as in x[i], which adds the size to a negative index
        test = _maker(jaxpr, eqn.invars[0], "lt")
        if test and test.invars[0] is eqn.invars[1] and _is_number(test.invars[1], 0):
            return 1
    return None


def _maker(jaxpr, variable, name: str):
    """The equation that makes a variable, if its primitive has this name."""
    return next(
        (eqn for eqn in jaxpr.eqns if variable in eqn.outvars and eqn.primitive.name == name), None
    )


def _is_number(variable, number) -> bool:
    return is_literal(variable) and jnp.ndim(variable.val) == 0 and variable.val == number


def varying_like(tree, arrays):
    """The tree, in its types varying over the devices of a `jax.shard_map` as all of `arrays` do."""
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return tree
    numbers = [x for x in arrays if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    nothing = [jnp.any(jnp.ravel(x)[:0] != 0) for x in numbers]
    # a choice between equals varies as all that it depends on; JAX's own casts change names
    return jax.tree.map(lambda x: jnp.where(functools.reduce(jnp.logical_or, nothing), x, x), tree)


def with_automatic_sharding(function: Callable, *args):
    """`function(*args)`, its results the same on all devices, with shardings of the compiler's choice.

    Explicit ones, which are part of types, would have to be given at reshapes and products.
    """
    meshes = {jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args)}
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None:
        return function(*args)
    explicit = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    ]
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.sharding.auto_axes(function, axes=tuple(explicit), out_sharding=replicated)(*args)
