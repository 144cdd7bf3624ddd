"""Arguments that are numbers, choices, flags, dtypes or keys: what is refused, and their values."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

COUNTER_LIMIT = 2**31 - 1  # int32 counters stay there, see `optax.safe_increment`


class StaticInt(np.int32):
    """A default that decides shapes; `optax.inject_hyperparams` traces Python's numbers only."""

    def __repr__(self) -> str:
        return str(int(self))


class StaticFloat(np.float32):
    """A default that decides the structure of a state, shown as a plain number; see `StaticInt`."""

    def __repr__(self) -> str:
        return str(float(self))


def static(number: int | float) -> Any:
    """A default number that `optax.inject_hyperparams` leaves alone, shown as a plain number."""
    return StaticInt(number) if isinstance(number, int) else StaticFloat(number)


def value_at(value: Any, count: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """The number, array, tracer or schedule `value` at step `count`, in float32 at least.

    Numbers are cast here because bfloat16 parameters turn an injected 0.999 into 1.0.
    """
    dtype = jnp.promote_types(jnp.float32, dtype)
    return jnp.asarray(value(count) if callable(value) else value, dtype)


def is_python_number(x: Any, value: float) -> bool:
    """Whether `x` is this number and that is known while tracing."""
    return isinstance(x, int | float | np.number) and bool(x == value)


def require_numbers(
    method: str,
    *,
    above: float | None = None,
    below: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    schedule: bool = False,
    or_none: bool = False,
    **numbers: Any,
):
    """Refuses what is no number, and Python numbers outside a range.

    Arrays and tracers pass unseen, as their values are not known while tracing; so do functions of
    the step count where `schedule` allows them, and None where `or_none` does.
    """
    limits: Any = (
        (above, ">", operator.gt),
        (below, "<", operator.lt),
        (at_least, ">=", operator.ge),
        (at_most, "<=", operator.le),
    )
    for name, value in numbers.items():
        if (value is None and or_none) or (schedule and callable(value)):
            continue
        if isinstance(value, bool) or not _is_number(value):
            wanted = "a number or a function of the step count" if schedule else "a number"
            raise ValueError(
                f"{method}: expected {name} to be {wanted}{' or None' if or_none else ''}, got "
                f"{name}={value!r}{_advice(value)}."
            )
        for limit, sign, holds in limits if isinstance(value, int | float) else ():
            if limit is not None and not holds(value, limit):
                raise ValueError(f"{method}: expected {name} {sign} {limit}, got {name}={value!r}.")


def _is_number(value: Any) -> bool:
    if isinstance(value, int | float | complex | np.number):
        return True
    return isinstance(value, jax.Array | np.ndarray | Tracer) and not jnp.issubdtype(
        value.dtype, np.str_
    )


def _advice(value: Any) -> str:
    return "; convert it with float(...)" if isinstance(value, str) else ""


def require_learning_rate(method: str, learning_rate: Any):
    """Refuses a learning rate that is neither a number nor a schedule, None above all."""
    if learning_rate is None:
        raise ValueError(
            f"{method}: expected learning_rate to be a number or a function of the step count, got "
            "learning_rate=None. Only optax_curv.kfac and optax_curv.gauss_newton choose a step's "
            "length themselves."
        )
    require_numbers(method, learning_rate=learning_rate, schedule=True)


def require_choice(method: str, choices: tuple, **choice: Any):
    """Refuses a value that is not one of `choices`."""
    for name, value in choice.items():
        if not any(value is x or (isinstance(value, str) and value == x) for x in choices):
            raise ValueError(
                f"{method}: unknown {name}={value!r}; expected one of {tuple(choices)}."
            )


def require_flags(method: str, **flags: Any):
    """Refuses what is not a bool: the string "no" would count as True."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(
                f"{method}: expected {name} to be True or False, got {name}={value!r}."
            )


def require_dtype(method: str, **dtypes: Any):
    """Refuses what is not the name of a dtype of floating-point numbers."""
    for name, value in dtypes.items():
        try:
            fits = jnp.issubdtype(jnp.dtype(value), jnp.floating)
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{method}: expected {name} to be a floating-point dtype such as 'float32' or "
                f"'bfloat16', got {name}={value!r}."
            )


def structural(method: str, **numbers: Any):
    """Refuses a traced value, or one that is no whole number, where it decides shapes."""
    for name, value in numbers.items():
        if isinstance(value, Tracer):
            raise ValueError(
                f"{method}: {name} decides the shapes of the state and must be a Python number, "
                f"got a traced {value}; with optax.inject_hyperparams pass static_args=({name!r},)."
            )
        if value is not None and not isinstance(value, int | float | np.number):
            raise ValueError(
                f"{method}: expected {name} to be a Python number, got {name}={value!r}."
            )


# A key's data are kept in the state, as any checkpoint can hold them. Their shape tells the kind,
# because the default kind of the process that resumes a run may be another one.
_KEY_SHAPES = {"threefry2x32": (2,), "rbg": (4,), "unsafe_rbg": (1, 4)}


def raw_key(method: str, key: Any) -> jax.Array:
    """The data of an integer seed, a typed key or a raw key, uint32, in the shape of its kind.

    Every seed from 0 to 2⁶⁴ - 1 has a key of its own; below 2³² it is `jax.random.key(seed)`.
    """
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        key = _seeded(method, int(key))
    elif not isinstance(key, jax.Array | np.ndarray | Tracer):
        raise ValueError(f"{method}: expected key to be an int or a JAX PRNG key, got key={key!r}.")
    elif not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if jnp.ndim(key):
            return _with_shape_of_kind(method, jnp.array(key, jnp.uint32), None)
        key = jax.random.key(jnp.asarray(key).astype(jnp.uint32))
    return _with_shape_of_kind(method, jax.random.key_data(key), str(jax.random.key_impl(key)))


def _seeded(method: str, seed: int) -> jax.Array:
    """The key of an integer seed, of the default kind."""
    if not -(2**31) <= seed < 2**64:
        raise ValueError(f"{method}: expected a seed from 0 to 2**64 - 1, got key={seed}.")
    if seed < 2**32:  # without float64 JAX itself takes no larger seeds
        return jax.random.key(jnp.uint32(seed % 2**32))
    key = jax.random.key(jnp.uint32(0))
    halves = np.array([seed >> 32, seed % 2**32], np.uint32)
    shape = jax.random.key_data(key).shape
    data = jnp.asarray(np.resize(halves, shape))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def _with_shape_of_kind(method: str, data: jax.Array, kind: str | None) -> jax.Array:
    if kind is None and data.shape in _KEY_SHAPES.values():
        return data
    if kind not in _KEY_SHAPES:
        raise ValueError(
            f"{method}: expected a PRNG key of one of the kinds {tuple(_KEY_SHAPES)}, got "
            f"{'key data of shape ' + str(data.shape) if kind is None else kind}."
        )
    return data.reshape(_KEY_SHAPES[kind])


def is_key_data(x: Any) -> bool:
    """Whether `x` has the shape of a key's data as a state keeps them."""
    return jnp.shape(x) in _KEY_SHAPES.values()


def typed_key(data: jax.Array) -> jax.Array:
    """The typed key of the data that a state keeps."""
    kind = next(kind for kind, shape in _KEY_SHAPES.items() if shape == data.shape)
    return jax.random.wrap_key_data(data.reshape(-1), impl=kind)


def key_data(key: jax.Array) -> jax.Array:
    """The data of a typed key as a state keeps them."""
    return jax.random.key_data(key).reshape(_KEY_SHAPES[str(jax.random.key_impl(key))])


def split_key(data: jax.Array, count: int) -> tuple[jax.Array, ...]:
    """The data for the next step, and `count - 1` typed keys for this one."""
    following, *keys = jax.random.split(typed_key(data), count)
    return (key_data(following), *keys)
