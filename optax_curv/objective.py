"""Objectives: a network and a likelihood, whose Hessian is known."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_curv.linalg._checks import widen
from optax_curv.typing import LIKELIHOOD_NAMES, LikelihoodName, Tree


class Likelihood(Protocol):
    """The methods that an `Objective` needs of a likelihood.

    `outputs` are [*leading, O], and their rows are independent.

    A likelihood may also have ``hessian_product(outputs, v)``, H v, where that is shorter than by
    the columns of `hessian_sqrt`.
    """

    def loss(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """Returns each row's negative log-likelihood, summed over the last axis, [*leading]."""
        ...

    def sample_cotangent(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        """Returns each row's gradient at a target drawn from the model, [*leading, O]."""
        ...

    def hessian_sqrt(self, outputs: jax.Array) -> jax.Array:
        """Returns B with B Bᵀ the Hessian of each row's loss, [columns, *leading, O]."""
        ...


def _diagonal_columns(entries: jax.Array) -> jax.Array:
    """The columns of diag(entries): [O, *leading, O] from [*leading, O]."""
    one_hot = jnp.eye(entries.shape[-1], dtype=entries.dtype)
    return one_hot.reshape(len(one_hot), *(1,) * (entries.ndim - 1), -1) * entries


def _require_targets(likelihood: str, targets: Any, outputs: jax.Array):
    if jnp.shape(targets) != outputs.shape:
        raise ValueError(
            f"Objective: likelihood={likelihood!r} expects targets in the shape of the outputs, "
            f"{outputs.shape}, got {jnp.shape(targets)}; reshape them (a [N] target of one output "
            "is [N, 1])."
        )


@dataclasses.dataclass(frozen=True)
class Categorical:
    """Softmax cross-entropy."""

    def loss(self, outputs: jax.Array, targets: Any) -> jax.Array:
        """Returns −log softmax(outputs)[target], or −Σ targets · log softmax(outputs)."""
        log_p, targets = jax.nn.log_softmax(widen(outputs)), jnp.asarray(targets)
        if targets.shape == outputs.shape:
            # A class of probability zero costs nothing, also where its logit is -inf.
            return -jnp.sum(jnp.where(targets == 0, 0, targets * log_p), -1)
        if targets.shape != outputs.shape[:-1] or not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(
                "Objective: likelihood='categorical' expects integer targets of shape "
                f"{outputs.shape[:-1]} or one-hot targets of shape {outputs.shape}, got "
                f"{targets.dtype} of shape {targets.shape}."
            )
        return -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]

    def sample_cotangent(self, key: Any, outputs: jax.Array) -> jax.Array:
        """Returns the gradient p − onehot(y), with y ~ Categorical(p)."""
        outputs = widen(outputs)
        drawn = jax.random.categorical(key, outputs)
        return jax.nn.softmax(outputs) - jax.nn.one_hot(
            drawn, outputs.shape[-1], dtype=outputs.dtype
        )

    def hessian_sqrt(self, outputs: jax.Array) -> jax.Array:
        """Returns B = diag(√p) − p √pᵀ, for which B Bᵀ = diag(p) − p pᵀ."""
        p = jax.nn.softmax(widen(outputs))
        root = jnp.sqrt(p)
        return _diagonal_columns(root) - p * jnp.moveaxis(root, -1, 0)[..., None]

    def hessian_product(self, outputs: jax.Array, v: ArrayLike) -> jax.Array:
        """Returns (diag(p) − p pᵀ) v."""
        p = jax.nn.softmax(widen(outputs))
        return p * (v - jnp.sum(p * v, -1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Sigmoid cross-entropy."""

    def loss(self, outputs: jax.Array, targets: Any) -> jax.Array:
        """Returns −Σ targets · log σ(outputs) + (1 − targets) · log σ(−outputs)."""
        _require_targets("bernoulli", targets, outputs)
        outputs = widen(outputs)
        return jnp.sum(
            targets * jax.nn.softplus(-outputs) + (1 - targets) * jax.nn.softplus(outputs), -1
        )

    def sample_cotangent(self, key: Any, outputs: jax.Array) -> jax.Array:
        """Returns the gradient p − y, with y ~ Bernoulli(p)."""
        p = jax.nn.sigmoid(widen(outputs))
        return p - jax.random.bernoulli(key, p).astype(p.dtype)

    def hessian_sqrt(self, outputs: jax.Array) -> jax.Array:
        """Returns diag(√(p (1 − p)))."""
        return _diagonal_columns(jnp.sqrt(self.hessian_product(outputs, 1)))

    def hessian_product(self, outputs: jax.Array, v: ArrayLike) -> jax.Array:
        """Returns p (1 − p) v."""
        outputs = widen(outputs)
        return jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs) * v


@dataclasses.dataclass(frozen=True)
class Normal:
    """The normal distribution of unit variance; its loss lacks the constant."""

    def loss(self, outputs: jax.Array, targets: Any) -> jax.Array:
        """Returns ½ Σ (outputs − targets)²."""
        _require_targets("normal", targets, outputs)
        return 0.5 * jnp.sum(jnp.square(widen(outputs) - targets), -1)

    def sample_cotangent(self, key: Any, outputs: jax.Array) -> jax.Array:
        """Returns the gradient outputs − y, with y ~ N(outputs, I)."""
        return jax.random.normal(key, outputs.shape, jnp.promote_types(outputs.dtype, jnp.float32))

    def hessian_sqrt(self, outputs: jax.Array) -> jax.Array:
        """Returns the columns of the identity."""
        return _diagonal_columns(jnp.ones_like(widen(outputs)))

    def hessian_product(self, outputs: jax.Array, v: ArrayLike) -> jax.Array:
        """Returns I v."""
        return jnp.asarray(v)


@dataclasses.dataclass(frozen=True)
class Score(Normal):
    """A wavefunction: gradients are those of its energy, the curvature that of log ψ itself."""

    def loss(self, outputs: jax.Array, targets: Any) -> jax.Array:
        """Returns Σ targets · outputs, whose mean has half of the energy's gradient."""
        _require_targets("score", targets, outputs)
        if outputs.ndim < 2:
            raise ValueError(
                "Objective: likelihood='score' expects log ψ as [N, 1], or [N, 2] of its modulus "
                f"and phase, got outputs of shape {outputs.shape}."
            )
        return jnp.sum(jax.lax.stop_gradient(targets) * widen(outputs), -1)


LIKELIHOODS: dict[LikelihoodName, Likelihood] = {
    "categorical": Categorical(),
    "bernoulli": Bernoulli(),
    "normal": Normal(),
    "score": Score(),
}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False)
class Objective:
    """A loss whose curvature is known: a network, the likelihood of its outputs, and a regularizer.

    With outputs z = predict_fn(params, inputs) of shape [*leading, O] and the loss ℓ of one row
    (the negative log-likelihood, summed over the last axis),

      L(params) = Σ_r w_r ℓ(z_r, t_r) / Σ_r w_r + regularizer(params),

    a mean over all leading axes where no weights are given. ``jax.value_and_grad``, Optax and
    `value_grad_and_curvature` take it as an ordinary loss function. What a plain loss hides, it
    knows: targets drawn from the model, and the Hessian H_r = B_r B_rᵀ of a row's loss in its
    outputs, hence the Gauss-Newton matrix Σ_r w_r J_rᵀ H_r J_r / Σ_r w_r, which for the built-in
    likelihoods is the Fisher matrix.

    **Wavefunctions** have the likelihood "score". Outputs are log ψ of samples drawn from |ψ|², and
    targets the local energies less their mean, a real [N, 1], or [N, 2] of real and imaginary parts
    beside log |ψ| and the phase. The loss Σ_r w_r ⟨t_r, z_r⟩ / Σ_r w_r is no energy, but its
    gradient is half of the energy's, and with ``fisher="exact"`` or "sampled" the curvature is the
    metric E[∂z ∂zᵀ] of stochastic reconfiguration, not centred. "empirical" would square the
    energies.

    It is hashable, and a pytree without leaves: it may be an argument of a jitted function.

    Args:
      predict_fn: ``predict_fn(params, inputs) -> outputs``, outputs floating [*leading, O]; the
        first leading axis counts the examples.
      likelihood: "categorical" (outputs are logits, targets integers [*leading] or probabilities
        [*leading, O]), "bernoulli" (outputs are logits, targets [*leading, O] in [0, 1]), "normal"
        (½ Σ (output − target)²), "score" (see above), or an object with the methods of
        `Likelihood`.
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
    likelihood: Any  # a `Likelihood`, which may have `hessian_product`
    regularizer: Callable[[Any], jax.Array] | None = None

    def __init__(
        self,
        predict_fn: Callable[[Any, Any], jax.Array],
        likelihood: Likelihood | LikelihoodName,
        *,
        regularizer: Callable[[Any], jax.Array] | None = None,
    ):
        functions = {"predict_fn": predict_fn, "regularizer": regularizer}
        for name, function in functions.items():
            if not callable(function) and (name, function) != ("regularizer", None):
                raise ValueError(f"Objective: expected a function as {name}, got {function!r}.")
        known: Any = LIKELIHOODS.get(likelihood) if isinstance(likelihood, str) else None
        model: Any = likelihood if known is None else known
        methods = ("loss", "sample_cotangent", "hessian_sqrt")
        missing = [name for name in methods if not callable(getattr(model, name, None))]
        if missing or isinstance(model, type):
            why = f", which lacks {missing}" if missing else ", which is a class: give an instance"
            why = "" if isinstance(likelihood, str) else why
            raise ValueError(
                f"Objective: unknown likelihood={likelihood!r}{why}; expected one of "
                f"{LIKELIHOOD_NAMES} or an object with the methods {methods}. Take 'normal' for a "
                "squared error, 'categorical' or 'bernoulli' for softmax or sigmoid cross-entropy."
            )
        fields = {"predict_fn": predict_fn, "likelihood": model, "regularizer": regularizer}
        for name, value in fields.items():  # the dataclass is frozen
            object.__setattr__(self, name, value)

    def __call__(
        self, params: Tree, inputs: Tree, targets: Any, *, weights: ArrayLike | None = None
    ) -> jax.Array:
        """Returns the loss.

        Args:
          params: first argument of `predict_fn`.
          inputs: the second.
          targets: the targets, in the shape the likelihood asks for.
          weights: a mask or weight for each example, [N], or each row, [*leading]; fewer axes are
            broadcast over the later ones. The mean is over their sum, as if masked rows (which must
            be finite) were not in the batch; where all are zero it is zero.

        Returns:
          The mean loss plus the regularizer, a scalar, float32 at least.
        """
        return self.value_and_outputs(params, inputs, targets, weights=weights)[0]

    def value_and_outputs(
        self, params: Tree, inputs: Tree, targets: Any, *, weights: ArrayLike | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the loss and the outputs of `predict_fn`."""
        outputs = self.predict_fn(params, inputs)
        value = self.loss_of_outputs(outputs, targets, weights)
        return value if self.regularizer is None else value + self.regularizer(params), outputs

    def loss_of_outputs(
        self, outputs: jax.Array, targets: Any, weights: ArrayLike | None = None
    ) -> jax.Array:
        """Returns the mean loss of outputs already computed, without the regularizer."""
        shares = self.row_shares(outputs, weights)
        losses = self.likelihood.loss(outputs, targets)
        if jnp.shape(losses) != shares.shape:
            raise ValueError(
                f"Objective: expected {self.likelihood!r}.loss to give one number a row, shape "
                f"{shares.shape}, for outputs of shape {outputs.shape}, got {jnp.shape(losses)}."
            )
        return jnp.mean(losses) if weights is None else jnp.sum(shares * losses)

    def row_shares(self, outputs: jax.Array, weights: ArrayLike | None = None) -> jax.Array:
        """Returns w_r / Σ w, the share of each row in the mean: [*leading], float32 at least."""
        leading = outputs.shape[:-1]
        if not outputs.ndim or not math.prod(outputs.shape):
            raise ValueError(
                "Objective: expected outputs [*leading, O] with at least one row, got shape "
                f"{outputs.shape}."
            )
        dtype = jnp.promote_types(outputs.dtype, jnp.float32)
        if weights is None:
            return jnp.full(leading, 1 / math.prod(leading), dtype)
        weights = jnp.asarray(weights, dtype)
        if weights.shape != leading[: weights.ndim]:
            raise ValueError(
                f"Objective: expected weights of shape {leading} or of its first axes (outputs "
                f"have shape {outputs.shape}), got {weights.shape}."
            )
        weights = jnp.broadcast_to(
            weights.reshape(weights.shape + (1,) * (len(leading) - weights.ndim)), leading
        )
        total = jnp.sum(weights)
        return weights / jnp.where(total == 0, 1, total)

    def sampled_cotangents(
        self, key: Any, outputs: jax.Array, *, samples: int = 1, weights: ArrayLike | None = None
    ) -> jax.Array:
        """Draws cotangents c with E[Σ_c Jᵀ c (Jᵀ c)ᵀ] the Gauss-Newton matrix.

        Args:
          key: PRNG key.
          outputs: the outputs, [*leading, O].
          samples: how many targets are drawn for each row.
          weights: as in a call of the objective.

        Returns:
          Gradients of each row's loss at the drawn targets, times √(w_r / Σw / samples), [samples,
          *outputs.shape].
        """
        draw = jax.vmap(self.likelihood.sample_cotangent, in_axes=(0, None))
        scale = jnp.sqrt(self.row_shares(outputs, weights) / samples)[..., None]
        return (scale * draw(jax.random.split(key, samples), outputs)).astype(outputs.dtype)

    def exact_cotangents(
        self, outputs: jax.Array, *, weights: ArrayLike | None = None
    ) -> jax.Array:
        """Returns cotangents c with Σ_c Σ_r (J_rᵀ c_r)(J_rᵀ c_r)ᵀ the Gauss-Newton matrix.

        They are √(w_r / Σw) times the columns of B_r, [columns, *outputs.shape]. Rows that meet
        inside the network are to be pulled back apart.
        """
        scale = jnp.sqrt(self.row_shares(outputs, weights))[..., None]
        return (scale * self.likelihood.hessian_sqrt(outputs)).astype(outputs.dtype)

    def hessian_product(
        self, outputs: jax.Array, v: jax.Array, *, weights: ArrayLike | None = None
    ) -> jax.Array:
        """Returns H v in the shape of `outputs`, with H the Hessian of the mean loss in them."""
        if hasattr(self.likelihood, "hessian_product"):
            curved = self.likelihood.hessian_product(outputs, v)
        else:
            columns = self.likelihood.hessian_sqrt(outputs)
            curved = jnp.sum(columns * jnp.sum(columns * v, -1, keepdims=True), 0)
        return self.row_shares(outputs, weights)[..., None] * curved

    def gauss_newton_product(
        self, params: Tree, inputs: Tree, v: Tree, *, weights: ArrayLike | None = None
    ) -> Tree:
        """Returns Jᵀ H J v of the mean loss, without the regularizer: a tree like `params`."""
        return self._gauss_newton(params, inputs, weights)(v)

    def curvature_operator(
        self, params: Tree, inputs: Tree, *, weights: ArrayLike | None = None
    ) -> Callable[[Tree], Tree]:
        """Returns the map v ↦ C v of trees like `params`, by linear passes alone.

        C = Jᵀ H J + the regularizer's Hessian.
        """
        gauss_newton = self._gauss_newton(params, inputs, weights)
        if self.regularizer is None:
            return gauss_newton
        _, regularizer_product = jax.linearize(jax.grad(self.regularizer), params)
        return lambda v: optax.tree.add(gauss_newton(v), regularizer_product(v))

    def _gauss_newton(
        self, params: Tree, inputs: Tree, weights: ArrayLike | None
    ) -> Callable[[Tree], Tree]:
        outputs, push_forward = jax.linearize(lambda p: self.predict_fn(p, inputs), params)
        pull_back = jax.linear_transpose(push_forward, params)

        def product(v):
            curved = self.hessian_product(outputs, push_forward(v), weights=weights)
            return pull_back(curved.astype(outputs.dtype))[0]

        return product

    def quadratic_model(
        self,
        params: Tree,
        inputs: Tree,
        targets: Any,
        directions: Sequence[Tree],
        *,
        weights: ArrayLike | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Computes the quadratic model of the objective along some directions d_i.

        L(params + Σ c_i d_i) ≈ L + cᵀ slopes + ½ cᵀ curvature c. It costs one Jacobian product a
        direction.

        Args:
          params: the parameters.
          inputs: the inputs.
          targets: the targets.
          directions: the d_i, k trees like `params`.
          weights: as in a call of the objective.

        Returns:
          slopes ⟨∇L, d_i⟩ [k] and curvature ⟨d_i, C d_j⟩ [k, k], float32 at least, with C as in
          `curvature_operator`.
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
