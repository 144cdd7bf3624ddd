"""The one file that touches JAX internals: names, parameters and bodies of equations, and runs.

Names and parameters of primitives change between releases of JAX. So only this file reads
`eqn.params`: other files ask the readers below (`product`, `convolution`, `look_up`, `sliced`, …),
which return small named tuples. `tests/capture/test_jaxpr.py` fails when a release changed one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

REMAT = {"remat2", "checkpoint"}
# Primitives with a derivative rule of their own.
CUSTOM_RULES = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
# Primitives that run one body on their own operands, unchanged.
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


# Primitives of one operand that act entry by entry, and of several of one shape (or scalars).
ENTRYWISE = SAME_PLACES | {
    *("abs", "acos", "acosh", "and", "asin", "asinh", "atan", "atanh", "atan2", "bessel_i0e"),
    *("bessel_i1e", "cbrt", "ceil", "clamp", "complex", "conj", "cos", "cosh", "digamma", "div"),
    *("eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma"),
    *("igammac", "imag", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic"),
    *("lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pow", "real", "rem"),
    *("round", "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh"),
    *("xor", "add", "add_any", "stop_gradient"),
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
    """Returns a closed jaxpr in which thin calls, as of `jnp.take`, are replaced by their contents.

    A call is thin if it computes at most one array of floating-point numbers: then it holds nothing
    that the compiler could fuse, and nothing is lost.
    """
    core = _core()
    if not isinstance(jaxpr, core.ClosedJaxpr):  # the bodies of `jax.checkpoint` are open
        jaxpr = core.ClosedJaxpr(jaxpr, ())
    eqns = [inner for eqn in jaxpr.jaxpr.eqns for inner in _spliced(eqn)]
    return core.ClosedJaxpr(jaxpr.jaxpr.replace(eqns=eqns), jaxpr.consts)


def _spliced(eqn):
    """The equations in a thin call; the equation alone if it is no thin call."""
    if eqn.primitive.name not in ("jit", "pjit"):
        return [eqn]
    (body,) = bodies(eqn)
    arithmetic = [
        e
        for e in body.jaxpr.eqns
        if e.primitive.name not in KEEP_ENTRIES and any(map(_is_float, e.outvars))
    ]
    results = body.jaxpr.outvars
    if any(map(is_literal, results)):  # a constant is no variable that could be renamed
        return [eqn]
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
    """Returns the bodies of a call, a scan or a cond, which can run again with taps inside."""
    if eqn.primitive.name == "cond":
        return tuple(map(inlined, eqn.params["branches"]))
    if eqn.primitive.name in (*CALLS, "scan"):
        return (inlined(eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]),)
    return ()


def name_of(eqn) -> str:
    """The name of a primitive, or of the function that a call runs."""
    if eqn.primitive.name not in CUSTOM_RULES:
        return eqn.primitive.name
    body = getattr(next(iter(hidden_bodies(eqn)), None), "jaxpr", None)
    info = getattr(body, "debug_info", None)
    return str(getattr(info, "func_name", None) or eqn.primitive.name).split(" ")[0]


def hidden_bodies(eqn) -> list:
    """Returns bodies that cannot run with taps inside, as a derivative rule would be lost."""
    if bodies(eqn):
        return []
    params = [
        v
        for value in eqn.params.values()
        for v in (value if isinstance(value, tuple) else (value,))
    ]
    return [v for v in params if isinstance(v, _core().Jaxpr | _core().ClosedJaxpr)]


def is_entrywise(eqn) -> bool:
    """Whether every entry of the results depends on the same entry of the operands alone."""
    if eqn.primitive.name in ENTRYWISE:
        return True
    inner = hidden_bodies(eqn) if eqn.primitive.name in CUSTOM_RULES else bodies(eqn)
    if len(inner) != 1 or eqn.primitive.name in ("scan", "cond"):
        return False
    rank = len(shape_of(eqn.outvars[0]))
    body = getattr(inner[0], "jaxpr", inner[0])
    spread = [e for e in body.eqns if e.primitive.name == "broadcast_in_dim"]
    if any(shape_of(e.invars[0]) or len(shape_of(e.outvars[0])) != rank for e in spread):
        return False
    return all(is_entrywise(e) or e.primitive.name == "broadcast_in_dim" for e in body.eqns)


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
    """Counts the operands of a scan that stay the same at every step, and those it carries on."""
    if "num_consts" in eqn.params:  # before JAX 0.11
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def run_scan(eqn, operands, probes, body: Callable) -> list[Any]:
    """Runs a scan with `body(operands of a step, slice of probes) -> results` as its body."""
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
    """Returns the places of a scan's carry that count its steps 0, 1, …, as in `fori_loop`."""
    body, (consts, carry) = eqn.params["jaxpr"].jaxpr, scan_sizes(eqn)

    def counts(k):
        step = maker(body, body.outvars[k])
        next_one = (
            step is not None
            and step.primitive.name == "add"
            and step.invars[0] is body.invars[consts + k]
            and _is_number(step.invars[1], 1)
        )
        return next_one and _is_number(eqn.invars[consts + k], 0) and not eqn.params["reverse"]

    return set(filter(counts, range(carry)))


def number(variable) -> float | None:
    """The number that a literal is; None for variables and arrays."""
    if not is_literal(variable) or jnp.ndim(variable.val):
        return None
    return float(variable.val)


def is_range(jaxpr, variable) -> bool:
    """Whether a variable is 0, 1, … along its only axis."""
    made_by = maker(jaxpr, variable)
    return (
        made_by is not None
        and made_by.primitive.name == "iota"
        and len(made_by.params["shape"]) == 1
    )


def same_integers(jaxpr, eqn) -> int | None:
    """Returns the operand whose non-negative integers the result has too, or None."""
    if eqn.primitive.name == "convert_element_type":
        return 0
    if eqn.primitive.name == "select_n":  # as in x[i], which adds the size to a negative index
        test = maker(jaxpr, eqn.invars[0])
        if test is None or test.primitive.name != "lt":
            return None
        if test.invars[0] is eqn.invars[1] and _is_number(test.invars[1], 0):
            return 1
    return None


def maker(jaxpr, variable):
    """The equation of a jaxpr that makes a variable, or None for operands and literals."""
    if is_literal(variable):
        return None
    return next((eqn for eqn in jaxpr.eqns if variable in eqn.outvars), None)


def _is_number(variable, number) -> bool:
    return is_literal(variable) and jnp.ndim(variable.val) == 0 and variable.val == number


def varying_like(tree, arrays):
    """Returns the tree with types that vary over the devices of a `shard_map` as `arrays` do."""
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return tree
    numbers = [x for x in arrays if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    nothing = [jnp.any(jnp.ravel(x)[:0] != 0) for x in numbers]
    # A choice between equals varies as everything it depends on. JAX has casts for this, but their
    # names change from release to release.
    return jax.tree.map(lambda x: jnp.where(functools.reduce(jnp.logical_or, nothing), x, x), tree)


def with_automatic_sharding(function: Callable, *args):
    """Runs `function(*args)` with shardings of the compiler's choice; its results are replicated.

    Explicit shardings are part of an array's type and would have to be given at every reshape and
    product.
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


# --- parameters of primitives -----------------------------------------------------------------


class Reshape(NamedTuple):
    """The parameters of `reshape`: the axes are first put in `order`, None where they stay."""

    sizes: tuple[int, ...]
    order: tuple[int, ...] | None


def reshaped(eqn) -> Reshape:
    """Reads a `reshape`."""
    order = eqn.params.get("dimensions")
    return Reshape(tuple(eqn.params["new_sizes"]), None if order is None else tuple(order))


def permutation(eqn) -> tuple[int, ...]:
    """Reads the order of axes of a `transpose`."""
    return tuple(map(int, eqn.params["permutation"]))


class Broadcast(NamedTuple):
    """The parameters of `broadcast_in_dim`: operand axis k becomes axis `dimensions[k]`."""

    shape: tuple[int, ...]
    dimensions: tuple[int, ...]


def broadcast(eqn) -> Broadcast:
    """Reads a `broadcast_in_dim`."""
    # `vmap` writes NumPy's integers here and in a reduction, which are no axes to `vmap` itself.
    dimensions = tuple(map(int, eqn.params["broadcast_dimensions"]))
    return Broadcast(tuple(eqn.params["shape"]), dimensions)


def axes_of(eqn) -> tuple[int, ...] | None:
    """Reads the axes that `squeeze`, `rev` or a reduction names; None where none are named."""
    axes = eqn.params.get("axes", eqn.params.get("dimensions"))
    return None if axes is None else tuple(map(int, axes))


def reduced(eqn) -> tuple[int, ...] | None:
    """The axes that a reduction sums, maximises, … over; None for other primitives."""
    name = eqn.primitive.name
    return axes_of(eqn) if name.startswith("reduce_") or name in ("argmax", "argmin") else None


def repetitions(eqn) -> tuple[int, ...]:
    """Reads how often a `tile` repeats each axis."""
    return tuple(eqn.params["reps"])


def axis_of(eqn) -> int:
    """Reads the axis of `stack`, `unstack`, `split` and `concatenate`."""
    return eqn.params["dimension" if "dimension" in eqn.params else "axis"]


def pieces_of(eqn) -> tuple[int, ...]:
    """Reads the sizes of the results of a `split`."""
    return tuple(map(int, eqn.params["sizes"]))


class Slice(NamedTuple):
    """The parameters of `slice`, one entry an axis."""

    starts: tuple[int, ...]
    limits: tuple[int, ...]
    steps: tuple[int, ...]


def sliced(eqn) -> Slice:
    """Reads a `slice`."""
    starts, limits = tuple(eqn.params["start_indices"]), tuple(eqn.params["limit_indices"])
    return Slice(starts, limits, tuple(eqn.params["strides"] or (1,) * len(starts)))


def window_of(eqn) -> tuple[int, ...]:
    """Reads the sizes of what a `dynamic_slice` takes."""
    return tuple(eqn.params["slice_sizes"])


class Product(NamedTuple):
    """The parameters of `dot_general`, a pair (left, right) of axes each."""

    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batched: tuple[tuple[int, ...], tuple[int, ...]]

    def free(self, side: int, rank: int) -> list[int]:
        """The axes of one operand that stay, in order."""
        gone = (*self.contracted[side], *self.batched[side])
        return [axis for axis in range(rank) if axis not in gone]


def product(eqn) -> Product:
    """Reads a `dot_general`."""
    contracted, batched = eqn.params["dimension_numbers"]
    left, right = (tuple(map(tuple, pair)) for pair in (contracted, batched))
    return Product((left[0], left[1]), (right[0], right[1]))


class Convolution(NamedTuple):
    """The parameters of `conv_general_dilated`; a spec is (batch or outputs, channels, *space)."""

    input_spec: tuple[int, ...]
    kernel_spec: tuple[int, ...]
    output_spec: tuple[int, ...]
    feature_groups: int
    batch_groups: int
    geometry: tuple  # strides, padding, input dilation, kernel dilation
    numbers: Any  # JAX's own, for `conv_general_dilated_patches`


def convolution(eqn) -> Convolution:
    """Reads a `conv_general_dilated`."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    return Convolution(
        tuple(numbers.lhs_spec),
        tuple(numbers.rhs_spec),
        tuple(numbers.out_spec),
        params["feature_group_count"],
        params["batch_group_count"],
        tuple(tuple(params[name]) for name in names),
        numbers,
    )


class LookUp(NamedTuple):
    """The parameters of `gather`, named as in `jax.lax.GatherDimensionNumbers`."""

    offset_dims: tuple[int, ...]
    collapsed: tuple[int, ...]
    start_index_map: tuple[int, ...]
    operand_batching: tuple[int, ...]
    indices_batching: tuple[int, ...]
    sizes: tuple[int, ...]
    clips: bool  # whether ids outside the operand are moved to its border


def look_up(eqn) -> LookUp:
    """Reads a `gather`."""
    numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    return LookUp(
        tuple(numbers.offset_dims),
        tuple(numbers.collapsed_slice_dims),
        tuple(numbers.start_index_map),
        tuple(numbers.operand_batching_dims),
        tuple(numbers.start_indices_batching_dims),
        tuple(eqn.params["slice_sizes"]),
        mode is not None and lax.GatherScatterMode.from_any(mode) == lax.GatherScatterMode.CLIP,
    )


def scan_length(eqn) -> int:
    """Reads the number of steps of a scan."""
    return eqn.params["length"]


class While(NamedTuple):
    """The parts of a `while`: operands of the condition, of the body, and the body."""

    condition_consts: int
    body_consts: int
    body: Any


def while_loop(eqn) -> While:
    """Reads a `while`."""
    params = eqn.params
    return While(params["cond_nconsts"], params["body_nconsts"], inlined(params["body_jaxpr"]))
