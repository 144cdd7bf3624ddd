"""Extra arguments that a method evaluates: an objective, its batch, and whole parameters."""

from typing import Any

import jax
import optax

from optax_curv.preconditioners._transformation.trees import path_of


def require_objective(method: str, objective: Any, batch: Any, params: Any):
    """Refuses an objective that hides its curvature, no batch, and masked parameters."""
    if not hasattr(objective, "quadratic_model"):
        raise ValueError(
            f"{method}: expected the extra argument objective= to be an optax_curv.Objective, got "
            f"{objective!r}. A plain loss hides its curvature: make optax_curv.Objective("
            "predict_fn, likelihood) and call update(..., objective=objective, batch=(inputs, "
            "targets), value=value)."
        )
    require_batch(method, "batch", batch)
    require_whole(method, params)


def require_batch(method: str, name: str, batch: Any):
    """Refuses a batch that is not a pair."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        given = None if batch is None else f"a {type(batch).__name__}"
        raise ValueError(
            f"{method}: expected the extra argument {name}=(inputs, targets), got {given}."
        )


def require_whole(method: str, params: Any):
    """Refuses parameters of which some leaves are masked: no model can be evaluated in them."""
    leaves = jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    masked = [path_of(path) for path, leaf in leaves if isinstance(leaf, optax.MaskedNode)]
    if masked:
        raise ValueError(
            f"{method}: the model cannot be evaluated, as optax.masked or optax.partition has "
            f"masked its leaves {masked}. Give this method the whole tree and mask what follows, "
            "optax.chain(method, optax.masked(optax.set_to_zero(), frozen)); or train a tree of "
            "the other leaves alone, with a model that closes over the masked ones."
        )


def refuse_weight_decay(method: str, weight_decay: Any):
    """Refuses a decay where no learning rate is chosen, as the model would not know of it."""
    if isinstance(weight_decay, int | float) and weight_decay:
        raise ValueError(
            f"{method}: expected no weight decay with learning_rate=None, got {weight_decay=!r}; "
            "put it into the objective, optax_curv.Objective(..., regularizer=...), where the "
            "quadratic model sees it."
        )
