"""Flax: a linen `TrainState` that hands extra arguments to the optimizer.

`nnx.Optimizer.update` does so by itself. A checkpoint of either is an ordinary one, from which a
run continues bit for bit: every state of this library is a tree of arrays, its random keys raw key
data.
"""

import dataclasses
import functools
from typing import Any

import optax

try:
    from flax.training import train_state
except ImportError as error:  # Flax is an extra
    raise ImportError("optax_curv.flax needs Flax: pip install 'optax-curv[flax]'.") from error


class TrainState(train_state.TrainState):
    """Flax's linen `TrainState` that hands extra arguments to the optimizer's `update`.

    Flax's own `apply_gradients` takes every further argument for a field to replace. Here arguments
    that are fields (such as batch statistics of a subclass) are replaced, and others reach
    `tx.update`: `curvature=`, `branches=`, `probe=`, `value=`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> import flax.linen as nn
      >>> from optax_curv.flax import TrainState
      >>> model, batch = nn.Dense(2), (jnp.ones((4, 3)), jnp.ones((4, 2)))
      >>> params = model.init(jax.random.key(0), batch[0])
      >>> loss_fn = lambda params, x, y: jnp.mean((model.apply(params, x) - y) ** 2)
      >>> layers = optax_curv.find_layers(loss_fn, params, *batch)
      >>> tx = optax_curv.kfac(0.1, layers)
      >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
      >>> take = optax_curv.value_grad_and_curvature(loss_fn, layers=layers)
      >>> value, grads, curvature = take(state.params, *batch)
      >>> state = state.apply_gradients(grads=grads, curvature=curvature)
      >>> state.step
      1
    """

    def apply_gradients(self, *, grads: Any, **extra_args: Any) -> "TrainState":
        """Returns the state after one update, its `step` one higher.

        Args:
          grads: gradients of `params`.
          **extra_args: fields to replace, and extra arguments of the optimizer's `update`.

        Returns:
          The new state.
        """
        names = {field.name for field in dataclasses.fields(self)}
        fields = {name: extra_args.pop(name) for name in names & extra_args.keys()}
        update = functools.partial(optax.with_extra_args_support(self.tx).update, **extra_args)
        told = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        return super(TrainState, told).apply_gradients(grads=grads, **fields).replace(tx=self.tx)
