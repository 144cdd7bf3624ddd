"""Complex rows and parameters: the way to real coordinates and back."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.curvature import SplitRows


def is_split(x: Any) -> bool:
    """Whether rows of a complex leaf are kept by its real and imaginary parts."""
    return isinstance(x, SplitRows)


def has_split(rows: Any) -> bool:
    """Whether any rows of the tree are kept by real and imaginary parts."""
    return any(map(is_split, jax.tree.leaves(rows, is_leaf=is_split)))


def real_parts(tree: Any) -> list[Any]:
    """The leaves of a tree; a complex one becomes the pair of its real and imaginary part."""
    return [(x.real, x.imag) if jnp.iscomplexobj(x) else x for x in jax.tree.leaves(tree)]


def real_rows(rows: Any, like: Any) -> list[Any]:
    """The rows over the coordinates of `real_parts(like)`.

    The rows of a function ψ are its derivatives A along the real parts and B along the imaginary
    parts of a complex leaf; for a holomorphic one B = iA. A complex row counts as the two real ones
    of its real and its imaginary part, as it does in the real part of the metric Re(AᴴA).
    """
    leaves, treedef = jax.tree.flatten(like)
    entries = treedef.flatten_up_to(rows)
    halves = any(map(jnp.iscomplexobj, jax.tree.leaves(rows)))

    def real(a):
        return jnp.concatenate([a.real, a.imag]) if halves else a

    def over_coordinates(entry, leaf):
        if not jnp.iscomplexobj(leaf):
            return real(entry)
        along_real, along_imag = entry if is_split(entry) else (entry, 1j * entry)
        return real(along_real), real(along_imag)

    halves |= any(
        jnp.iscomplexobj(x) and not is_split(e) for e, x in zip(entries, leaves, strict=True)
    )
    return [over_coordinates(*pair) for pair in zip(entries, leaves, strict=True)]


def complex_again(parts: list[Any], like: Any) -> Any:
    """The tree like `like` whose complex leaves are given by pairs of real and imaginary parts."""
    leaves = [x[0] + 1j * x[1] if isinstance(x, tuple) else x for x in parts]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
