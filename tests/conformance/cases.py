"""The one registry: every method, alias and piece, what it needs, and which suites it leaves out.

Each suite of this folder runs over `CASES` (or over `ALL`, with every other choice of a geometry,
solver or rule, where it only traces). What a suite cannot do with a case is a sentence in the place
of the field that the suite reads.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from conformance import adapters, problems, regression
from conformance.problems import SHAPES as SHAPES
from conformance.problems import TREE, Problem
from conformance.problems import tree as tree

import optax_curv

Reason = str


class Fault(NamedTuple):
    """How a method runs on the regression that faults strike.

    Attributes:
      make: damping -> transformation.
      extras_of: (parameters, inputs, targets, errors) -> extra arguments of `update`.
      damping: of the undisturbed run.
    """

    make: Callable[..., Any]
    extras_of: Callable[..., Any] = regression.nothing
    damping: float = 1e-2


class Suite(NamedTuple):
    """How a method enters the lists of Optax's own suites.

    Attributes:
      make: (learning_rate, ...) -> transformation.
      options: its arguments there.
      by_default: whether it runs by default; otherwise another one of its kind does.
    """

    make: Callable[..., Any]
    options: dict[str, Any]
    by_default: bool = False


class Case(NamedTuple):
    """One method, alias or piece.

    Attributes:
      of: (problem, **numbers) -> transformation.
      maker: the public function that makes it.
      number: the name of a number that a sweep may trace.
      value: of that number.
      extras: (numpy generator, rows) -> arrays for `update`.
      needs_objective: whether `update` needs `objective=`.
      any_tree: False where what it is made of, or its extra arguments, belong to one tree.
      complex: whether it takes complex leaves; otherwise `init` refuses them by name.
      inject: arguments that its maker needs for `optax.inject_hyperparams`, or why it is not tried.
      fault: how it runs while faults strike, or why it does not.
      suite: how it enters Optax's suites, or why it does not.
      devices: options with which eight devices are compared with one, or why they are not.
      divides: whether `sharding` divides its work.
      factors: how many factors its state shows to diagnostics on the tree of the registry.
      network: why some of its matrix products are not full ones.
    """

    of: Callable[..., Any]
    maker: str
    number: str | None = None
    value: float = 0.1
    extras: Callable[..., Any] = problems.nothing
    needs_objective: bool = False
    any_tree: bool = True
    complex: bool = False
    inject: dict[str, Any] | Reason = "its maker was tried with another case"
    fault: Fault | Reason = "not said"
    suite: Suite | Reason = "not said"
    devices: dict[str, Any] | Reason = "not said"
    divides: bool = False
    factors: int = 0
    network: Reason | None = None

    def make(self, problem: Problem = TREE, **numbers):
        """The transformation for a problem, with numbers in the place of its own."""
        return self.of(problem, **numbers)

    def transformation(self, problem: Problem = TREE):
        """The transformation with its own number."""
        return self.make(problem, **({self.number: self.value} if self.number else {}))

    def static(self, problem: Problem = TREE):
        """Extra arguments of `update` that are no arrays."""
        return {"objective": problem.objective} if self.needs_objective else {}


BY_ALIAS = "its alias, which has the same rule, is struck"
ALIAS_RUNS = "its alias runs in the suites"
RULE_COMPARED = "its rule is compared under its scale_by_ name; what follows acts leaf by leaf"
NO_NUMBERS = "it takes no numbers"
NEEDS_A_LOSS = "it needs a loss in every step"
BY_LEAF = "it acts leaf by leaf"
NETWORK = "it runs the user's own network, in the user's own precision"
RATE = {"learning_rate": 1e-3}

# Steps that do not shrink with the gradient: their rate has to, once a tenfold one has been made
# good.
FADING = optax.exponential_decay(0.15, 1, 0.4, transition_begin=34)
ADAM = {"b1": 0.7, "b2": 0.9}


def _of(method, number, **options):
    """A maker for one number, of a method that needs nothing else."""

    def make(problem, **numbers):
        del problem
        return method(**options, **numbers)

    return {"of": make, "maker": method.__name__, "number": number}


def _layered(method, number="damping", **options):
    def make(problem, **numbers):
        return method(layers=problem.layers, **options, **numbers)

    return {"of": make, "maker": method.__name__, "number": number, "any_tree": False}


def _with_objective(make, extras_of=regression.batch_of, damping=1e-2):
    """A method of the quadratic model of the regression's objective."""

    def of_objective(damping):
        tx = make(damping)
        update = functools.partial(tx.update, objective=regression.OBJECTIVE)
        return optax.GradientTransformationExtraArgs(tx.init, update)

    return Fault(of_objective, extras_of, damping)


def _layerwise(method, extras_of, **options):
    def make(damping):
        # Without a bound, a first statistic of rank one makes steps of 1/damping in all other
        # directions.
        tx = method(TREE.layers, damping, kl_clip=1.0, fallback=optax.identity(), **options)
        return optax.chain(tx, optax.scale_by_learning_rate(0.3))

    return Fault(make, extras_of)


def _branches(method, extras_of, damping, **options):
    def make(damping):
        # The undamped metric of rows that have nearly vanished, as at a minimum, knows no bound
        # either.
        return optax.chain(
            method(damping, **options),
            optax.clip_by_global_norm(3.0),
            optax.scale_by_learning_rate(0.7),
        )

    return Fault(make, extras_of, damping)


def _levenberg_marquardt(problem, **numbers):
    """With a loss that every step lowers."""
    del problem
    tx = optax_curv.levenberg_marquardt(momentum=0.5, **numbers)

    def update(updates, state, params=None, **extra_args):
        rows: Any = jax.tree.map(lambda g: jnp.stack([g, -0.5 * g, 2 * g]), updates)
        if isinstance(updates, dict):
            rows = {name: x for name, x in extra_args["branches"].items() if name in updates}
        loss = lambda p: optax.tree.norm(p, squared=True)  # noqa: E731
        return tx.update(updates, state, params, branches=rows, value=1e9, value_fn=loss)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _kron_fault(**options):
    return Fault(lambda damping: optax_curv.kron_psgd(0.25, 0.7, **options))


def _basis_fault(damping):
    method = optax_curv.scale_by_adam_in_basis(TREE.layers, **ADAM, fallback=optax.identity())
    return optax.chain(method, optax.scale_by_learning_rate(FADING))


def _input_fault(damping):
    method = optax_curv.scale_by_input_factor(TREE.layers, ridge=damping)
    return optax.chain(method, optax.scale_by_learning_rate(0.3))


def _soap_fault(damping):
    return optax.chain(optax_curv.scale_by_soap(**ADAM), optax.scale_by_learning_rate(FADING))


fisher, branch_kfac = optax_curv.scale_by_branch_fisher, optax_curv.scale_by_branch_kfac
LAYERED = {"layers": TREE.layers, "fallback": optax.identity()}
IDENTITY = {"fallback": optax.identity()}
NO_BRANCHES = "the suites have no branches, without which it is branch_fisher"

METHODS = {
    "scale_by_kron_psgd": Case(
        **_of(optax_curv.scale_by_kron_psgd, "precond_lr"),
        complex=True,
        inject={"init_scale": 1.0},
        fault=BY_ALIAS,
        suite=ALIAS_RUNS,
        devices={},
        divides=True,
        factors=9,
    ),
    "scale_by_kron_psgd_sometimes": Case(
        **_of(
            optax_curv.scale_by_kron_psgd,
            "precond_lr",
            geometry="qeq",
            update_probability=0.5,
            b1=0.9,
        ),
        complex=True,
        fault=_kron_fault(geometry="qeq", update_probability=0.5),
        suite="it runs as kron_psgd_qeq, whose rule it has",
        devices={},
        factors=9,
    ),
    "scale_by_dense_psgd": Case(
        **_of(optax_curv.scale_by_dense_psgd, "precond_lr"),
        inject={},
        fault=BY_ALIAS,
        suite=ALIAS_RUNS,
        devices={},
        factors=1,
    ),
    "scale_by_lra_psgd": Case(
        **_of(optax_curv.scale_by_lra_psgd, "precond_lr", rank=2),
        inject={},
        fault=BY_ALIAS,
        suite=ALIAS_RUNS,
        devices={},
        factors=2,
    ),
    "scale_by_shampoo": Case(
        **_of(optax_curv.scale_by_shampoo, "damping", root_every=2),
        complex=True,
        value=1e-6,
        inject={},
        fault=BY_ALIAS,
        suite=ALIAS_RUNS,
        # Less damping divides rounding by the smallest eigenvalues of factors of rank one.
        devices={"damping": 1e-2},
        divides=True,
        factors=9,
    ),
    "scale_by_soap": Case(
        **_of(optax_curv.scale_by_soap, "eps", basis_every=2),
        complex=True,
        value=1e-6,
        inject={},
        fault=Fault(_soap_fault),
        suite=ALIAS_RUNS,
        # The first gradient of a matrix has no component along some axes of its square factor's
        # basis, which are arbitrary and not compared. Its update is zero; the three steps of
        # `many_devices.compare_owners` and `measure_division` are compared as well.
        devices={"eps": 1.0},
        divides=True,
        factors=9,
    ),
    "scale_by_adam_in_basis": Case(
        **_layered(optax_curv.scale_by_adam_in_basis, None, **IDENTITY),
        extras=problems.factors,
        inject=LAYERED,
        fault=Fault(_basis_fault, regression.factors_of),
        suite=Suite(adapters.adam_in_basis, {"learning_rate": 1e-2}),
        devices={},
        divides=True,
        factors=2,
    ),
    "scale_by_input_factor": Case(
        **_layered(optax_curv.scale_by_input_factor, "ridge", every=2),
        value=0.15,
        extras=problems.inputs,
        inject={"layers": TREE.layers},
        fault=Fault(_input_fault, regression.inputs_of),
        suite=Suite(adapters.input_factor, {"learning_rate": 1e-2}),
        devices={},
        divides=True,
        factors=1,
    ),
    "scale_by_branch_fisher": Case(
        **_of(fisher, "damping"),
        extras=problems.samples,
        inject={},
        fault=_branches(fisher, regression.features_of, 1.0),
        suite=ALIAS_RUNS,
        devices={},
    ),
    "scale_by_branch_fisher_complement": Case(
        **_of(fisher, "damping", projection="orthonormal", complement=True),
        extras=problems.samples,
        fault=_branches(fisher, regression.samples_of, 1.0, complement=True),
        suite=NO_BRANCHES,
        devices={},
    ),
    "scale_by_branch_kfac": Case(
        **_of(branch_kfac, "damping", blocks=2),
        extras=problems.samples,
        inject={},
        fault=_branches(branch_kfac, regression.features_of, 1.0, blocks=2),
        suite=ALIAS_RUNS,
        devices={},
    ),
    "scale_by_kfac": Case(
        **_layered(optax_curv.scale_by_kfac, invert_every=2, **IDENTITY),
        extras=problems.factors,
        inject=LAYERED,
        fault=_layerwise(optax_curv.scale_by_kfac, regression.factors_of),
        suite=ALIAS_RUNS,
        devices={},
        divides=True,
        factors=2,
    ),
    "scale_by_gauss_newton": Case(
        **_of(optax_curv.scale_by_gauss_newton, "damping", max_iters=3, backtrack=True),
        extras=problems.batch,
        needs_objective=True,
        any_tree=False,
        inject={},
        fault=BY_ALIAS,
        suite=ALIAS_RUNS,
        devices={},
        network=NETWORK,
    ),
    "scale_by_ekfac": Case(
        **_layered(optax_curv.scale_by_ekfac, **IDENTITY),
        extras=problems.moments,
        inject=LAYERED,
        fault=_layerwise(optax_curv.scale_by_ekfac, regression.moments_of),
        suite=ALIAS_RUNS,
        devices={},
        divides=True,
        factors=2,
    ),
}

FIRST = {"learning_rate": 0.1}
DECAYED = FIRST | {"weight_decay": 1e-2}
ALIASES = {
    "kron_psgd": Case(
        **_of(optax_curv.kron_psgd, "precond_lr", **DECAYED),
        complex=True,
        inject=FIRST,
        fault=_kron_fault(),
        # Whitened steps are as long as the rate, and end that far from the minimum.
        suite=Suite(optax_curv.kron_psgd, {"learning_rate": 5e-3}, True),
        devices=RULE_COMPARED,
        factors=9,
    ),
    "dense_psgd": Case(
        **_of(optax_curv.dense_psgd, "precond_lr", **DECAYED),
        inject=FIRST,
        fault=Fault(lambda damping: optax_curv.dense_psgd(0.2, 0.8)),
        suite=Suite(optax_curv.dense_psgd, {"learning_rate": 1e-2}),
        devices=RULE_COMPARED,
        factors=1,
    ),
    "lra_psgd": Case(
        **_of(optax_curv.lra_psgd, "precond_lr", rank=2, **DECAYED),
        inject=FIRST,
        fault=Fault(lambda damping: optax_curv.lra_psgd(0.2, 0.8, rank=2)),
        suite=Suite(optax_curv.lra_psgd, {"learning_rate": 1e-2}, True),
        devices=RULE_COMPARED,
        factors=2,
    ),
    "shampoo": Case(
        **_of(optax_curv.shampoo, "damping", root_every=2, **DECAYED),
        complex=True,
        value=1e-6,
        inject=FIRST,
        # Less damping spends most of a step's fixed size on whitening the noise at the minimum.
        fault=Fault(
            lambda damping: optax_curv.shampoo(
                FADING, 0.7, rms=1.0, damping=damping, adam=optax.scale_by_adam(0.7, 0.9)
            ),
            damping=0.1,
        ),
        suite=Suite(optax_curv.shampoo, {"learning_rate": 1e-2}, True),
        devices=RULE_COMPARED,
        factors=4,
    ),
    "soap": Case(
        **_of(optax_curv.soap, "eps", basis_every=2, **DECAYED),
        complex=True,
        value=1e-6,
        inject=FIRST,
        fault=Fault(
            lambda damping: optax_curv.soap(FADING, 0.7, b2=0.9, adam=optax.scale_by_adam(0.7, 0.9))
        ),
        suite=Suite(optax_curv.soap, {"learning_rate": 1e-2}),
        devices=RULE_COMPARED,
        factors=4,
    ),
    "branch_fisher": Case(
        **_of(optax_curv.branch_fisher, "damping", **DECAYED),
        extras=problems.samples,
        inject=FIRST,
        fault="its rule is struck as scale_by_branch_fisher, within a bound",
        suite=Suite(adapters.branch(optax_curv.branch_fisher), RATE, True),
        devices=RULE_COMPARED,
    ),
    "levenberg_marquardt": Case(
        of=_levenberg_marquardt,
        maker="levenberg_marquardt",
        number="damping",
        extras=problems.parameter_rows,
        needs_objective=True,
        any_tree=False,
        complex=True,
        inject=NEEDS_A_LOSS,
        fault="a step that raises the loss is refused, which has a test of its own",
        suite="the suites have no rows",
        devices={},
        network=NETWORK,
    ),
    "branch_kfac": Case(
        **_of(optax_curv.branch_kfac, "damping", blocks=2, param_bound=20.0, **DECAYED),
        extras=problems.samples,
        inject=FIRST,
        fault="its rule is struck as scale_by_branch_kfac, within a bound",
        suite=Suite(adapters.branch(optax_curv.branch_kfac, param_bound=20.0), RATE),
        devices=RULE_COMPARED,
    ),
    "kfac": Case(
        **_layered(optax_curv.kfac, fallback=optax.scale_by_adam(), **DECAYED),
        extras=problems.factors,
        inject=FIRST | LAYERED,
        fault="its rule is struck as scale_by_kfac, within a bound",
        suite=Suite(adapters.kfac, {"learning_rate": 0.1}, True),
        devices=RULE_COMPARED,
        factors=2,
    ),
    "kfac_adaptive": Case(
        **_layered(optax_curv.kfac, learning_rate=None, **IDENTITY),
        extras=problems.batch_and_factors,
        needs_objective=True,
        inject="learning_rate=None is no number",
        fault=_with_objective(
            lambda damping: optax_curv.kfac(None, TREE.layers, damping, **IDENTITY),
            regression.batch_and_factors_of,
        ),
        suite="the suites' losses are plain functions, and it needs an Objective",
        devices=RULE_COMPARED,
        factors=2,
        network=NETWORK,
    ),
    "ekfac": Case(
        **_layered(optax_curv.ekfac, fallback=optax.scale_by_adam(), **DECAYED),
        extras=problems.moments,
        inject=FIRST | LAYERED,
        fault="its rule is struck as scale_by_ekfac, within a bound",
        suite=Suite(adapters.ekfac, {"learning_rate": 1e-2, "damping": 1.0}),
        devices=RULE_COMPARED,
        factors=2,
    ),
    "gauss_newton": Case(
        **_of(optax_curv.gauss_newton, "damping", max_iters=3, **DECAYED),
        extras=problems.batch,
        needs_objective=True,
        any_tree=False,
        inject=FIRST,
        fault=_with_objective(lambda damping: optax_curv.gauss_newton(1.0, damping)),
        suite=Suite(adapters.gauss_newton, {"learning_rate": 0.15}, True),
        devices=RULE_COMPARED,
        network=NETWORK,
    ),
    "gauss_newton_adaptive": Case(
        **_of(optax_curv.gauss_newton, "damping", max_iters=3, learning_rate=None),
        extras=problems.batch,
        needs_objective=True,
        any_tree=False,
        inject="learning_rate=None is no number",
        fault=_with_objective(lambda damping: optax_curv.gauss_newton(None, damping)),
        suite="the suites' losses are plain functions, and it needs an Objective",
        devices=RULE_COMPARED,
        network=NETWORK,
    ),
}


def _doubled(params, **extra_args):
    """An estimator of gradients."""
    del extra_args
    return optax.tree.scale(2, params)


NO_CURVATURE = "it keeps no curvature that a fault could poison"
PIECES = {
    "clip_by_max_abs": Case(
        **_of(optax_curv.clip_by_max_abs, "max_abs"),
        complex=True,
        inject={"max_abs": 1.0},
        fault=NO_CURVATURE,
        suite=Suite(
            adapters.with_learning_rate(optax_curv.clip_by_max_abs(10.0), optax.trace(0.9)), RATE
        ),
        devices=BY_LEAF,
    ),
    "bound_by_running_norm": Case(
        **_of(optax_curv.bound_by_running_norm, "factor"),
        value=3.0,
        complex=True,
        inject={"factor": 3.0},
        fault=NO_CURVATURE,
        suite=Suite(
            adapters.with_learning_rate(optax_curv.bound_by_running_norm(), optax.trace(0.9)), RATE
        ),
        devices=BY_LEAF,
    ),
    "normalize_by_rms": Case(
        **_of(optax_curv.normalize_by_rms, "target"),
        complex=True,
        inject={"target": 1.0},
        fault=NO_CURVATURE,
        suite=Suite(adapters.with_learning_rate(optax_curv.normalize_by_rms(1.0)), RATE, True),
        devices=BY_LEAF,
    ),
    "normalize_by_reference": Case(
        **_of(optax_curv.normalize_by_reference, None, tx=optax.scale_by_adam()),
        complex=True,
        inject=NO_NUMBERS,
        fault=NO_CURVATURE,
        suite=Suite(
            adapters.with_learning_rate(optax_curv.normalize_by_reference(optax.scale_by_adam())),
            {"learning_rate": 1e-2},
        ),
        devices=BY_LEAF,
    ),
    "keep_params_in_box": Case(
        **_of(optax_curv.keep_params_in_box, "bound"),
        inject={"bound": 1.0},
        fault=NO_CURVATURE,
        suite="it runs within branch_kfac, as param_bound",
        devices=BY_LEAF,
    ),
    "add_cautious_weight_decay": Case(
        **_of(optax_curv.add_cautious_weight_decay, "weight_decay"),
        complex=True,
        inject={"weight_decay": 0.1},
        fault=NO_CURVATURE,
        suite=Suite(
            adapters.with_learning_rate(
                optax.scale_by_adam(), optax_curv.add_cautious_weight_decay(1e-3)
            ),
            {"learning_rate": 1e-2},
        ),
        devices=BY_LEAF,
    ),
    "keep_params_norm": Case(
        **_of(optax_curv.keep_params_norm, None),
        complex=True,
        inject=NO_NUMBERS,
        fault=NO_CURVATURE,
        suite="the suites' minima have other norms than their starts",
        devices=BY_LEAF,
    ),
    "estimate_gradients": Case(
        **_of(optax_curv.estimate_gradients, None, estimator=_doubled),
        complex=True,
        inject=NO_NUMBERS,
        fault=NO_CURVATURE,
        suite="it replaces the gradients by an estimate from the loss, which the suites keep",
        devices=BY_LEAF,
    ),
    "scale_by_quadratic_model": Case(
        **_of(optax_curv.scale_by_quadratic_model, "damping"),
        extras=problems.batch,
        needs_objective=True,
        any_tree=False,
        inject={},
        fault=_with_objective(
            lambda damping: optax.chain(
                optax_curv.scale_by_quadratic_model(damping), optax.scale_by_learning_rate(1.0)
            )
        ),
        suite="the suites' losses are plain functions, and it needs an Objective",
        devices="its sums over all leaves are XLA's own",
        network=NETWORK,
    ),
}
CASES = METHODS | ALIASES | PIECES


def _variant(case, fault: Fault | Reason = "another choice of its rule is struck", **changes):
    """Another choice of a case, which only runs through the tests that trace."""
    said = {
        "inject": "its maker was tried with another case",
        "suite": "another choice of its rule runs there",
        "devices": "another choice of its rule is compared",
        "divides": False,
    }
    return case._replace(**said | {"fault": fault} | changes)


def _options(case, method, number, **options):
    return _variant(case, **_of(method, number, **options))


KRON, SHAMPOO, SOAP = (METHODS[f"scale_by_{x}"] for x in ("kron_psgd", "shampoo", "soap"))
DENSE, LRA = METHODS["scale_by_dense_psgd"], METHODS["scale_by_lra_psgd"]
FISHER, BRANCH_KFAC = METHODS["scale_by_branch_fisher"], METHODS["scale_by_branch_kfac"]
KFAC, EKFAC = METHODS["scale_by_kfac"], METHODS["scale_by_ekfac"]
kron, dense, lra = (
    *(optax_curv.scale_by_kron_psgd, optax_curv.scale_by_dense_psgd, optax_curv.scale_by_lra_psgd),
)


def _kron(fault: Fault | Reason = "another choice of its rule is struck", **options):
    return _variant(KRON, fault, **_of(kron, "precond_lr", **options))


def _geometry(geometry, **changes):
    """A geometry of Kronecker PSGD, which runs in Optax's suites if these are asked for all."""

    def make(learning_rate: optax.ScalarOrSchedule):
        return optax.chain(
            optax_curv.scale_by_kron_psgd(geometry=geometry),
            optax_curv.clip_by_max_abs(10.0),
            optax.trace(0.9),
            optax.scale_by_learning_rate(learning_rate),
        )

    rate = 1e-3 if geometry == "right_triangular" else 1e-2
    return _kron(geometry=geometry)._replace(suite=Suite(make, {"learning_rate": rate}), **changes)


def _layered_variant(case, method, fault: Fault | Reason, extras, **options):
    changes = _layered(method, **IDENTITY, **options)
    return _variant(case, fault, extras=extras, **changes)


def _gauss_newton_fault(extras_of, **options):
    return _with_objective(
        lambda damping: optax_curv.gauss_newton(1.0, damping, **options), extras_of
    )


TRACED = "another choice of its rule is struck"
# Every other choice of a geometry, solver, rule and the like.
VARIANTS = {
    **{f"kron_psgd_{geometry}": _geometry(geometry) for geometry in ("qep", "qeq", "quad")},
    "kron_psgd_eq": _geometry("eq", fault=_kron_fault(geometry="eq")),
    "kron_psgd_quad4p": _geometry("quad4p", fault=_kron_fault(geometry="quad4p")),
    "kron_psgd_right_triangular": _geometry("right_triangular", complex=False),
    "kron_psgd_newton": _kron(criterion="newton")._replace(extras=problems.probes, any_tree=False),
    "kron_psgd_newton_eq": _kron(criterion="newton", geometry="eq")._replace(
        extras=problems.probes, any_tree=False
    ),
    "kron_psgd_momentum": _kron(whiten="momentum", b1=0.9),
    "kron_psgd_bfloat16": _kron(precond_dtype="bfloat16", block_size=2),
    "dense_psgd_newton": _options(
        DENSE, dense, "precond_lr", criterion="newton", geometry="quad"
    )._replace(extras=problems.probes, any_tree=False),
    "lra_psgd_newton": _options(LRA, lra, "precond_lr", criterion="newton", rank=1)._replace(
        extras=problems.probes
    ),
    **{
        f"branch_fisher_{solver}": _options(FISHER, fisher, "damping", solver=solver)
        for solver in ("woodbury", "cholesky", "auto")
    },
    "branch_fisher_fixed": _options(FISHER, fisher, "damping", projection="fixed", centered=False),
    **{
        f"branch_fisher_rows_{solver}": _options(FISHER, fisher, "damping", solver=solver)._replace(
            extras=problems.parameter_rows, any_tree=False, complex=True
        )
        for solver in ("cg", "woodbury", "cholesky")
    },
    "branch_fisher_rows_auto": _options(FISHER, fisher, "damping", solver="auto")._replace(
        extras=problems.parameter_rows,
        any_tree=False,
        complex=True,
        fault=_branches(fisher, regression.rows_of, 1.0, solver="auto", centered=False),
    ),
    "branch_fisher_rows_momentum": _options(
        FISHER, fisher, "damping", solver="auto", momentum=0.9, centered=False
    )._replace(extras=problems.parameter_rows, any_tree=False, complex=True),
    "branch_kfac_complement": _options(
        BRANCH_KFAC, branch_kfac, "damping", projection="orthonormal", complement=True
    ),
    "branch_kfac_fixed": _options(BRANCH_KFAC, branch_kfac, "damping", projection="fixed"),
    "kfac_trace": _layered_variant(
        KFAC,
        optax_curv.scale_by_kfac,
        TRACED,
        problems.factors,
        damping_rule="trace",
        kl_clip=1.0,
    ),
    "kfac_rows": _layered_variant(
        KFAC,
        optax_curv.scale_by_kfac,
        _layerwise(optax_curv.scale_by_kfac, regression.layer_rows_of, invert_every=4),
        problems.factor_rows,
        update_every=2,
        invert_every=4,
    ),
    "kfac_seldom": _layered_variant(
        KFAC,
        optax_curv.scale_by_kfac,
        _layerwise(optax_curv.scale_by_kfac, regression.factors_of, invert_every=4),
        problems.factors,
        invert_every=4,
    ),
    "kfac_eigh": _layered_variant(
        KFAC,
        optax_curv.scale_by_kfac,
        _layerwise(
            optax_curv.scale_by_kfac, regression.factors_of, inverse="eigh", damping_rule="trace"
        ),
        problems.factors,
        inverse="eigh",
        update_every=2,
    ),
    "kfac_cg": _layered_variant(
        KFAC,
        optax_curv.scale_by_kfac,
        _layerwise(optax_curv.scale_by_kfac, regression.factors_of, inverse="cg"),
        problems.factors,
        inverse="cg",
    ),
    "shampoo_qr": _options(
        SHAMPOO, optax_curv.scale_by_shampoo, "damping", root_every=2, root="qr"
    ),
    "shampoo_fresh": _options(
        SHAMPOO,
        optax_curv.scale_by_shampoo,
        "drop_below",
        root_every=2,
        root="qr",
        fresh_values=True,
    )._replace(value=1e-6),
    "soap_kl": _options(SOAP, optax_curv.scale_by_soap, "eps", basis_every=2, kl=True),
    "soap_eigh": _options(SOAP, optax_curv.scale_by_soap, "eps", basis_every=2, basis="eigh"),
    "ekfac_seldom": _layered_variant(
        EKFAC,
        optax_curv.scale_by_ekfac,
        TRACED,
        problems.moments,
        invert_every=5,
        kl_clip=1.0,
    ),
    "gauss_newton_backtracking": _variant(
        METHODS["scale_by_gauss_newton"],
        _gauss_newton_fault(regression.batch_and_diagonal_of, backtrack=True),
    ),
    "gauss_newton_layers": _variant(
        METHODS["scale_by_gauss_newton"],
        _gauss_newton_fault(regression.batch_and_factors_of, layers=TREE.layers),
        **_layered(optax_curv.scale_by_gauss_newton, max_iters=3),
        extras=problems.batch_and_factors,
        factors=2,
    ),
}
ALL = CASES | VARIANTS

# Numbers that the program of a step does not have, by maker: {name: reason}.
OF_GAUSS_NEWTON = {
    "decay": "it is of K-FAC's factors, which need layers=",
    "diagonal_power": "it is of the diagonal preconditioner, which needs diagonal=",
    "refresh_every": "it is of the sketch, which needs nystrom_rank=",
}
OF_BRANCH_FISHER = dict.fromkeys(
    ("max_iters", "tol"), "complement=True, the default, decomposes branches that are samples"
)
IGNORED: dict[str, dict[str, Reason]] = {
    "scale_by_branch_fisher": OF_BRANCH_FISHER,
    "branch_fisher": OF_BRANCH_FISHER,
    "scale_by_kron_psgd": {"eps": 'it is the floor of the normaliser of "right_triangular"'},
    "scale_by_gauss_newton": OF_GAUSS_NEWTON,
    "gauss_newton": OF_GAUSS_NEWTON,
}

# With which owners of rows are compared with one device.
OWNED = {
    "shampoo": {"learning_rate": 0.1, "root_every": 2},
    "soap": {"learning_rate": 0.1, "eps": 1.0},
    "scale_by_kron_psgd": {"b1": 0.9, "update_probability": 0.5, "block_size": 5},
    "dense_psgd": {"learning_rate": 0.1},
    "lra_psgd": {"learning_rate": 0.1, "rank": 3},
}
