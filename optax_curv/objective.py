"""Objectives: a network and a likelihood, whose Hessian is known."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from optax_curv.linalg._checks import widen


class Likelihood(Protocol):
    """What an `Objective` asks of a likelihood; `outputs` are [*leading, O], and rows are independent.

    It may also have ``hessian_product(outputs, v)``, H v, as a shorter way than by the columns of
    `hessian_sqrt`.
    """

    def loss(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The negative log-likelihood of each row, summed over the last axis: [*leading]."""
        ...

    def sample_cotangent(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        """The gradient of each row's loss at a target drawn from the model: [*leading, O]."""
        ...

    def hessian_sqrt(self, outputs: jax.Array) -> jax.Array:
        """B with B Bᵀ = the Hessian of each row's loss in its outputs, columns first: [columns, *leading, O]."""
        ...


def _diagonal_columns(entries):
    """Those of diag(entries): [O, *leading, O] from [*leading, O]."""
    one_hot = jnp.eye(entries.shape[-1], dtype=entries.dtype)
    return one_hot.reshape(len(one_hot), *(1,) * (entries.ndim - 1), -1) * entries


def _require_targets(likelihood: str, targets, outputs):
    if jnp.shape(targets) != outputs.shape:
        raise ValueError(
            f"Objective: likelihood={likelihood!r} expects targets in the shape of the outputs, {outputs.shape}, "
            f"got {jnp.shape(targets)}; reshape them (a [N] target of one output is [N, 1])."
        )


@dataclasses.dataclass(frozen=True)
class Categorical:
    """Softmax cross-entropy."""

    def loss(self, outputs, targets):
        """−log softmax(outputs)[target], or −Σ targets · log softmax(outputs)."""
        log_p, targets = jax.nn.log_softmax(widen(outputs)), jnp.asarray(targets)
        if targets.shape == outputs.shape:
            # what has probability zero costs nothing, also where its logit is -inf
            return -jnp.sum(jnp.where(targets == 0, 0, targets * log_p), -1)
        if targets.shape != outputs.shape[:-1] or not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(
                f"Objective: likelihood='categorical' expects integer targets of shape {outputs.shape[:-1]} or one-hot "
                f"targets of shape {outputs.shape}, got {targets.dtype} of shape {targets.shape}."
            )
        return -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]

    def sample_cotangent(self, key, outputs):
        """The gradient p − onehot(y), y ~ Categorical(p)."""
        outputs = widen(outputs)
        drawn = jax.random.categorical(key, outputs)
        return jax.nn.softmax(outputs) - jax.nn.one_hot(
            drawn, outputs.shape[-1], dtype=outputs.dtype
        )

    def hessian_sqrt(self, outputs):
        """B = diag(√p) − p √pᵀ, for which B Bᵀ = diag(p) − p pᵀ."""
        p = jax.nn.softmax(widen(outputs))
        root = jnp.sqrt(p)
        return _diagonal_columns(root) - p * jnp.moveaxis(root, -1, 0)[..., None]

    def hessian_product(self, outputs, v):
        """(diag(p) − p pᵀ) v."""
        p = jax.nn.softmax(widen(outputs))
        return p * (v - jnp.sum(p * v, -1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Sigmoid cross-entropy."""

    def loss(self, outputs, targets):
        """−Σ targets · log σ(outputs) + (1 − targets) · log σ(−outputs)."""
        _require_targets("bernoulli", targets, outputs)
        outputs = widen(outputs)
        return jnp.sum(
            targets * jax.nn.softplus(-outputs) + (1 - targets) * jax.nn.softplus(outputs), -1
        )

    def sample_cotangent(self, key, outputs):
        """The gradient p − y, y ~ Bernoulli(p)."""
        p = jax.nn.sigmoid(widen(outputs))
        return p - jax.random.bernoulli(key, p).astype(p.dtype)

    def hessian_sqrt(self, outputs):
        """diag(√(p (1 − p)))."""
        return _diagonal_columns(jnp.sqrt(self.hessian_product(outputs, 1)))

    def hessian_product(self, outputs, v):
        """The product p (1 − p) v."""
        outputs = widen(outputs)
        return jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs) * v


@dataclasses.dataclass(frozen=True)
class Normal:
    """Of unit variance, without the loss's constant."""

    def loss(self, outputs, targets):
        """½ Σ (outputs − targets)²."""
        _require_targets("normal", targets, outputs)
        return 0.5 * jnp.sum(jnp.square(widen(outputs) - targets), -1)

    def sample_cotangent(self, key, outputs):
        """The gradient outputs − y, y ~ N(outputs, I)."""
        return jax.random.normal(key, outputs.shape, jnp.promote_types(outputs.dtype, jnp.float32))

    def hessian_sqrt(self, outputs):
        """The identity."""
        return _diagonal_columns(jnp.ones_like(widen(outputs)))

    def hessian_product(self, outputs, v):
        """The product I v."""
        return v


LIKELIHOODS = {"categorical": Categorical(), "bernoulli": Bernoulli(), "normal": Normal()}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss whose curvature is known: a network, the likelihood of its outputs, and a regularizer.

    With outputs z = predict_fn(params, inputs) of shape [*leading, O] and the loss ℓ of one row
    (the negative log-likelihood, summed over the last axis),

      L(params) = Σ_r w_r ℓ(z_r, t_r) / Σ_r w_r + regularizer(params),

    a mean over all leading axes where no weights are given. ``jax.value_and_grad``, Optax and
    `value_grad_and_curvature` take it as an ordinary loss function. What a plain loss hides, it
    knows: targets drawn from the model, and the Hessian H_r = B_r B_rᵀ of a row's loss in its
    outputs, hence the Gauss-Newton matrix Σ_r w_r J_rᵀ H_r J_r / Σ_r w_r, which for the three
    built-in likelihoods is the Fisher matrix.

    It is hashable, and a pytree without leaves: it may be an argument of a jitted function.

    Args:
      predict_fn: ``predict_fn(params, inputs) -> outputs``, outputs floating [*leading, O]; the
        first leading axis counts the examples.
      likelihood: "categorical" (outputs are logits, targets integers [*leading] or probabilities
        [*leading, O]), "bernoulli" (outputs are logits, targets [*leading, O] in [0, 1]), "normal"
        (½ Σ (output − target)²), or an object with the methods of `Likelihood`.
      regularizer: ``regularizer(params) -> scalar`` added to the loss; it does not enter the
        curvature of layers.

    Raises:
      ValueError: for an unknown likelihood, an object that lacks one of its methods, or a
        `predict_fn` or `regularizer` that cannot be called; when called, for targets or weights
        whose shape does not fit the outputs.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_curv
      >>> objective = optax_curv.Objective(lambda w, x: x @ w, "categorical")
      >>> round(float(objective(jnp.zeros((3, 4)), jnp.eye(3), jnp.array([0, 1, 2]))), 4)  # log 4
      1.3863

    References:
      Martens, *New Insights and Perspectives on the Natural Gradient Method*, 2014,
      arXiv:1412.1193, §9.2.
    """

    predict_fn: Callable[[Any, Any], jax.Array]
    likelihood: Any
    regularizer: Callable[[Any], jax.Array] | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        for name in ("predict_fn", "regularizer"):
            function = getattr(self, name)
            if not callable(function) and (name, function) != ("regularizer", None):
                raise ValueError(f"Objective: expected a function as {name}, got {function!r}.")
        if isinstance(self.likelihood, str) and self.likelihood in LIKELIHOODS:
            object.__setattr__(self, "likelihood", LIKELIHOODS[self.likelihood])
        methods = ("loss", "sample_cotangent", "hessian_sqrt")
        missing = [name for name in methods if not callable(getattr(self.likelihood, name, None))]
        if missing or isinstance(self.likelihood, type):
            why = f"lacks {missing}" if missing else "is a class: give an instance of it"
            raise ValueError(
                f"Objective: unknown likelihood={self.likelihood!r}, which {why}; expected one of "
                f"{tuple(LIKELIHOODS)} or an object with the methods {methods}."
            )

    def __call__(self, params, inputs, targets, *, weights=None) -> jax.Array:
        """The loss.

        Args:
          params: first argument of `predict_fn`.
          inputs: the second.
          targets: in the shape the likelihood asks for.
          weights: a mask or weight for each example, [N], or each row, [*leading]; fewer axes are
            broadcast over the later ones. The mean is over their sum, as if masked rows (which must
            be finite) were not in the batch; where all are zero it is zero.

        Returns:
          The mean loss plus the regularizer, a scalar, float32 at least.
        """
        return self.value_and_outputs(params, inputs, targets, weights=weights)[0]

    def value_and_outputs(
        self, params, inputs, targets, *, weights=None
    ) -> tuple[jax.Array, jax.Array]:
        """The loss and the outputs of `predict_fn`."""
        outputs = self.predict_fn(params, inputs)
        value = self.loss_of_outputs(outputs, targets, weights)
        return value if self.regularizer is None else value + self.regularizer(params), outputs

    def loss_of_outputs(self, outputs, targets, weights=None) -> jax.Array:
        """The mean loss of outputs already computed, without the regularizer."""
        shares = self.row_shares(outputs, weights)
        losses = self.likelihood.loss(outputs, targets)
        if jnp.shape(losses) != shares.shape:
            raise ValueError(
                f"Objective: expected {self.likelihood!r}.loss to give one number a row, shape {shares.shape}, for "
                f"outputs of shape {outputs.shape}, got {jnp.shape(losses)}."
            )
        return jnp.mean(losses) if weights is None else jnp.sum(shares * losses)

    def row_shares(self, outputs, weights=None) -> jax.Array:
        """w_r / Σ w, the share of each row of the outputs in the mean: [*leading], float32 at least."""
        leading = outputs.shape[:-1]
        if not outputs.ndim or not math.prod(outputs.shape):
            raise ValueError(
                f"Objective: expected outputs [*leading, O] with at least one row, got shape {outputs.shape}."
            )
        dtype = jnp.promote_types(outputs.dtype, jnp.float32)
        if weights is None:
            return jnp.full(leading, 1 / math.prod(leading), dtype)
        weights = jnp.asarray(weights, dtype)
        if weights.shape != leading[: weights.ndim]:
            raise ValueError(
                f"Objective: expected weights of shape {leading} or of its first axes (outputs have shape "
                f"{outputs.shape}), got {weights.shape}."
            )
        weights = jnp.broadcast_to(
            weights.reshape(weights.shape + (1,) * (len(leading) - weights.ndim)), leading
        )
        total = jnp.sum(weights)
        return weights / jnp.where(total == 0, 1, total)

    def sampled_cotangents(self, key, outputs, *, samples=1, weights=None) -> jax.Array:
        """[samples, *outputs.shape] of √(w_r / Σw / samples) times the gradient of a row's loss at a drawn target."""
        # E[Σ_c Jᵀ c (Jᵀ c)ᵀ] is the Gauss-Newton matrix
        draw = jax.vmap(self.likelihood.sample_cotangent, in_axes=(0, None))
        scale = jnp.sqrt(self.row_shares(outputs, weights) / samples)[..., None]
        return (scale * draw(jax.random.split(key, samples), outputs)).astype(outputs.dtype)

    def exact_cotangents(self, outputs, *, weights=None) -> jax.Array:
        """[columns, *outputs.shape] of √(w_r / Σw) times the columns of B_r."""
        # Σ_c Σ_r (J_rᵀ c_r)(J_rᵀ c_r)ᵀ is the Gauss-Newton matrix: rows that meet are to be pulled
        # back apart
        scale = jnp.sqrt(self.row_shares(outputs, weights))[..., None]
        return (scale * self.likelihood.hessian_sqrt(outputs)).astype(outputs.dtype)

    def hessian_product(self, outputs, v, *, weights=None) -> jax.Array:
        """H v in the shape of `outputs`, H the Hessian of the mean loss in them."""
        if hasattr(self.likelihood, "hessian_product"):
            curved = self.likelihood.hessian_product(outputs, v)
        else:
            columns = self.likelihood.hessian_sqrt(outputs)
            curved = jnp.sum(columns * jnp.sum(columns * v, -1, keepdims=True), 0)
        return self.row_shares(outputs, weights)[..., None] * curved

    def gauss_newton_product(self, params, inputs, v, *, weights=None):
        """Jᵀ H J v of the mean loss, without the regularizer: a tree like `params` and `v`, in their dtypes."""
        return self._gauss_newton(params, inputs, weights)(v)

    def curvature_operator(self, params, inputs, *, weights=None) -> Callable[[Any], Any]:
        """The map v ↦ C v of trees like `params`, C = Jᵀ H J + the regularizer's Hessian, by linear passes alone."""
        gauss_newton = self._gauss_newton(params, inputs, weights)
        if self.regularizer is None:
            return gauss_newton
        _, regularizer_product = jax.linearize(jax.grad(self.regularizer), params)
        return lambda v: optax.tree.add(gauss_newton(v), regularizer_product(v))

    def _gauss_newton(self, params, inputs, weights):
        outputs, push_forward = jax.linearize(lambda p: self.predict_fn(p, inputs), params)
        pull_back = jax.linear_transpose(push_forward, params)

        def product(v):
            curved = self.hessian_product(outputs, push_forward(v), weights=weights)
            return pull_back(curved.astype(outputs.dtype))[0]

        return product

    def quadratic_model(
        self, params, inputs, targets, directions, *, weights=None
    ) -> tuple[jax.Array, jax.Array]:
        """The objective along some directions d_i: L(params + Σ c_i d_i) ≈ L + cᵀ slopes + ½ cᵀ curvature c.

        It costs one Jacobian product a direction.

        Args:
          params: the parameters.
          inputs: the inputs.
          targets: the targets.
          directions: k trees like `params`.
          weights: as in a call of the objective.

        Returns:
          slopes ⟨∇L, d_i⟩ [k] and curvature ⟨d_i, C d_j⟩ [k, k], C as above, float32 at least.
        """
        outputs, push_forward = jax.linearize(lambda p: self.predict_fn(p, inputs), params)
        tangents = jnp.stack([widen(push_forward(d)) for d in directions])
        outputs = widen(outputs)
        pull = jax.grad(self.loss_of_outputs)(outputs, targets, weights)
        curved = jax.vmap(lambda v: self.hessian_product(outputs, v, weights=weights))(tangents)
        axes = tuple(range(1, tangents.ndim))
        slopes, curvature = (
            jnp.tensordot(tangents, pull, pull.ndim),
            jnp.tensordot(tangents, curved, (axes, axes)),
        )
        if self.regularizer is not None:
            hessian_products = [
                jax.jvp(jax.grad(self.regularizer), (params,), (d,)) for d in directions
            ]
            slopes += jnp.stack([optax.tree.vdot(hessian_products[0][0], d) for d in directions])
            of_regularizer = [
                [optax.tree.vdot(d, product) for _, product in hessian_products] for d in directions
            ]
            curvature += jnp.stack(list(map(jnp.stack, of_regularizer)))
        return slopes, curvature
