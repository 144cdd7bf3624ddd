"""Types of the arguments that users pass: numbers, schedules, keys, choices and callables.

Every choice is listed here once, as a `Literal` for type checkers, with a tuple of its values
beside it that the run-time check and its message read. This module imports nothing of the package.
"""

from typing import Any, Literal, Protocol, TypeAlias, get_args

import jax
import optax
from jax.typing import ArrayLike

__all__ = [  # noqa: RUF022  # in the order of the file: numbers, choices, callables
    "Number",
    "Schedulable",
    "Key",
    "Sharding",
    "Tree",
    "Geometry",
    "GEOMETRIES",
    "Criterion",
    "CRITERIA",
    "Whiten",
    "WHITENS",
    "Root",
    "ROOTS",
    "RootMethod",
    "ROOT_METHODS",
    "Basis",
    "BASES",
    "DampingRule",
    "DAMPING_RULES",
    "Inverse",
    "INVERSES",
    "Solver",
    "SOLVERS",
    "ProjectionKind",
    "PROJECTION_KINDS",
    "ComplexMetric",
    "COMPLEX_METRICS",
    "StatisticName",
    "STATISTIC_NAMES",
    "Fisher",
    "FISHERS",
    "Sharing",
    "SHARINGS",
    "LikelihoodName",
    "LIKELIHOOD_NAMES",
    "Side",
    "SIDES",
    "MatVec",
    "Estimator",
    "AdamRule",
    "AdamFor",
    "StackedRule",
    "Stacked",
    "ValueFn",
]

# --- numbers, keys, places -----------------------------------------------------------------------

Number: TypeAlias = ArrayLike
"""A Python number, a NumPy or JAX array, or a tracer; nothing branches in Python on its value."""

Schedulable: TypeAlias = Number | optax.Schedule
"""A number, or a function of the step count that returns one."""

Key: TypeAlias = int | jax.Array
"""A seed, a typed key of `jax.random.key`, or a raw one of `jax.random.PRNGKey`."""

Sharding: TypeAlias = jax.sharding.Mesh | jax.sharding.NamedSharding | None
"""The mesh over whose axes the work and the state are divided; None leaves them where they are."""

Tree: TypeAlias = Any
"""A pytree; its structure is checked at run time."""

# --- choices -------------------------------------------------------------------------------------

Geometry: TypeAlias = Literal["q0.5eq1.5", "eq", "qep", "qeq", "quad", "quad4p", "right_triangular"]
"""How the factors of Kronecker PSGD move."""
GEOMETRIES: tuple[Geometry, ...] = get_args(Geometry)

Criterion: TypeAlias = Literal["whitening", "newton"]
"""What PSGD fits: the whitening of gradients, or the curvature of Hessian probes."""
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)

Whiten: TypeAlias = Literal["gradient", "momentum"]
"""What PSGD whitens."""
WHITENS: tuple[Whiten, ...] = get_args(Whiten)

Root: TypeAlias = Literal["eigh", "newton", "qr"]
"""How an inverse root is computed, by Shampoo and by `linalg.inverse_root`."""
ROOTS: tuple[Root, ...] = get_args(Root)

RootMethod: TypeAlias = Root
"""`method=` of `linalg.inverse_root`."""
ROOT_METHODS: tuple[RootMethod, ...] = ROOTS

Basis: TypeAlias = Literal["qr", "eigh"]
"""How an eigenbasis is refreshed, by SOAP."""
BASES: tuple[Basis, ...] = get_args(Basis)

DampingRule: TypeAlias = Literal["pi", "trace"]
"""How K-FAC shares the damping out between two Kronecker factors."""
DAMPING_RULES: tuple[DampingRule, ...] = get_args(DampingRule)

Inverse: TypeAlias = Literal["cholesky", "eigh", "cg"]
"""How K-FAC applies the inverse of its factors."""
INVERSES: tuple[Inverse, ...] = get_args(Inverse)

Solver: TypeAlias = Literal["cg", "woodbury", "cholesky", "auto"]
"""How `branch_fisher` solves for its direction."""
SOLVERS: tuple[Solver, ...] = get_args(Solver)

ProjectionKind: TypeAlias = Literal["gaussian", "fixed", "orthonormal"]
"""How the branch methods draw the map between states and parameters."""
PROJECTION_KINDS: tuple[ProjectionKind, ...] = get_args(ProjectionKind)

ComplexMetric: TypeAlias = Literal["real", "full"]
"""Which part of a complex metric `branch_fisher` inverts."""
COMPLEX_METRICS: tuple[ComplexMetric, ...] = get_args(ComplexMetric)

StatisticName: TypeAlias = Literal["kronecker", "diagonal", "eigenbasis", "raw", "rows", "input"]
"""What `value_grad_and_curvature` captures of each layer."""
STATISTIC_NAMES: tuple[StatisticName, ...] = get_args(StatisticName)

Fisher: TypeAlias = Literal["empirical", "sampled", "exact"]
"""Whose gradients the captured curvature is made of."""
FISHERS: tuple[Fisher, ...] = get_args(Fisher)

Sharing: TypeAlias = Literal["expand", "reduce"]
"""How several uses of one kernel enter its statistic."""
SHARINGS: tuple[Sharing, ...] = get_args(Sharing)

LikelihoodName: TypeAlias = Literal["categorical", "bernoulli", "normal", "score"]
"""The likelihoods that `Objective` knows by name."""
LIKELIHOOD_NAMES: tuple[LikelihoodName, ...] = get_args(LikelihoodName)

Side: TypeAlias = Literal["left", "right"]
"""On which side of an array a matrix is multiplied or solved for."""
SIDES: tuple[Side, ...] = get_args(Side)

# --- callables -----------------------------------------------------------------------------------


class MatVec(Protocol):
    """A linear map of `linalg.conjugate_gradient`, from a tree of arrays to a tree like it."""

    def __call__(self, x: Any, /) -> Any:
        """Returns the map of `x`."""
        ...


class Estimator(Protocol):
    """A gradient estimator of `estimate_gradients`."""

    def __call__(self, params: Any, /, *args: Any, **extra_args: Any) -> Any:
        """Returns a tree like `params`; the extra arguments of `update` come by name."""
        ...


class AdamRule(Protocol):
    """A rule that says which leaves Adam takes in an alias: `adam_for=`."""

    def __call__(self, path: tuple[Any, ...], leaf: Any, /) -> bool | str:
        """Returns whether Adam takes the leaf at this key path, or the name of who takes it."""
        ...


AdamFor: TypeAlias = AdamRule | Tree
"""A rule, or a prefix of the parameters' tree with its answers as leaves."""


class StackedRule(Protocol):
    """A rule that says how many leading axes of each leaf count layers: `stacked=`."""

    def __call__(self, params: Any, /) -> Any:
        """Returns a prefix of the parameters' tree with a count of axes at each leaf."""
        ...


Stacked: TypeAlias = StackedRule | Tree
"""A rule, or a prefix of the parameters' tree with counts of leading axes as leaves."""


class ValueFn(Protocol):
    """A loss at given parameters, as `optax.scale_by_backtracking_linesearch` takes it."""

    def __call__(self, params: Any, /, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns the loss, a number."""
        ...
