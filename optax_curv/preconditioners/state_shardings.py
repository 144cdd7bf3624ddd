"""Where the arrays of an optimizer's state lie, known without making them."""

from typing import Any

import optax

from optax_curv.linalg._compiler import compiled_once
from optax_curv.typing import Tree


def state_shardings(tx: optax.GradientTransformation, params: Tree) -> Tree:
    """Returns the shardings of the arrays of `tx.init(params)`, without making any array.

    A state is placed by its `init`, so that only what makes it otherwise needs them: `jax.jit` with
    `out_shardings`, and a checkpoint that is restored.

    Args:
      tx: any transformation, alone or in a chain; methods of this package divide their states with
        `sharding=`, and shard those of Adam as the parameters are.
      params: parameters, or `jax.ShapeDtypeStruct`s with the parameters' `sharding`.

    Returns:
      A tree like the state with a `jax.sharding.Sharding` for every array.

    Raises:
      ValueError: as `tx.init` for these parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> rows = jax.NamedSharding(mesh, jax.P("data"))
      >>> params = {"w": jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=rows)}
      >>> tx = optax_curv.shampoo(0.02, sharding=mesh)
      >>> optax_curv.state_shardings(tx, params)[0].momentum["['w']"].mesh.axis_names
      ('data',)
    """
    init: Any = compiled_once(tx.init)
    return init.lower(params).compile().output_shardings
