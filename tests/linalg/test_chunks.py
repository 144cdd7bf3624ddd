"""Stacks that are worked through part by part are what they are as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_curv.linalg import _chunks as chunks


def step(moved, x):
    return {"sum": moved["sum"] + jnp.sum(x, axis=1), "x": 2 * moved["x"]}, jnp.max(x, axis=1)


@pytest.mark.parametrize("entries", [1, 20, 40, 1000])
@pytest.mark.parametrize("read_once", [False, True])
def test_parts_are_put_together_again(entries, read_once):
    x = jnp.arange(24.0).reshape(6, 4)
    moved = {"sum": jnp.ones(6), "x": -x}
    options = {"entries": entries, "read_once": read_once}

    def in_parts(moved, x):
        return chunks.moved_in_chunks(step, moved, x, **options)

    for function in (in_parts, jax.jit(in_parts)):
        jax.tree.map(np.testing.assert_array_equal, function(moved, x), step(moved, x))
    batched = jax.vmap(in_parts)(jax.tree.map(lambda x: x[None], moved), x[None])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y), batched, step(moved, x))


def test_parts_have_at_most_so_many_entries_of_all_arrays():
    arrays = jnp.zeros((12, 3)), jnp.zeros((12, 2, 2))
    assert [chunks.rows_at_once(arrays, n) for n in (1, 7, 14, 28, 41, 83, 84)] == [
        *(1, 1, 2, 4, 4, 6, 12)
    ]


def test_short_stacks_go_together_and_long_ones_alone():
    seen = []

    def doubled(moved, other):
        seen.append({name: len(x) for name, x in moved.items()})
        return {name: 2 * x + other[name] for name, x in moved.items()}, {}

    sizes = {"a": (3, 2), "long": (4, 2**22), "b": (2, 5)}
    moved = {name: jnp.ones(size, jnp.int8) for name, size in sizes.items()}
    new, _ = chunks.each_in_chunks(doubled, moved, moved)
    assert seen[0] == {"a": 3, "b": 2}
    assert seen[1:] and all(x == {"long": 1} for x in seen[1:])
    assert all(np.all(new[name] == 3) and new[name].shape == sizes[name] for name in sizes)
