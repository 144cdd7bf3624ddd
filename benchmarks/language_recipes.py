"""How each method and each piece of the language model's benchmark is made."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import optax_curv
from benchmarks import methods
from benchmarks.problems import Problem


class Recipe(NamedTuple):
    """How a method is made and tuned.

    Attributes:
      make: (context, rate, settings) -> transformation.
      like: whose tuned settings it has; None: it is tuned itself.
      statistic: what `update` needs of the curvature, if anything.
    """

    make: Callable[..., Any]
    like: str | None = None
    statistic: Any = None


class Context(NamedTuple):
    """The problem and its layers."""

    problem: Problem
    layers: optax_curv.Layers

    def labels(self, params):
        """Who takes each leaf."""

        def label(path, leaf):
            return "adam" if self.problem.adam_for(path, leaf) else "matrices"

        return jax.tree_util.tree_map_with_path(label, params)

    def is_matrix(self, params):
        """Which leaves decay."""
        return jax.tree.map(lambda label: label == "matrices", self.labels(params))


def adam_direction(values):
    """Adam of all that is no matrix, before the rate of the matrices."""
    return optax.chain(
        optax.scale_by_adam(0.9, values["adam_b2"]), optax.scale(values["adam_factor"])
    )


def table_in_basis(values):
    """As `adam_direction`, but that of the tied table is Adam in the eigenbasis of its columns."""

    def labels(params):
        def label(path, _):
            return "table" if "table" in jax.tree_util.keystr(path) else "rest"

        return jax.tree_util.tree_map_with_path(label, params)

    b1, b2 = 0.9, values["adam_b2"]
    directions = {
        "table": optax_curv.scale_by_soap(b1, b2, max_dim=512),
        "rest": optax.scale_by_adam(b1, b2),
    }
    return optax.chain(optax.partition(directions, labels), optax.scale(values["adam_factor"]))


def adamw(context, rate, values):
    """AdamW, the matrices alone decayed."""
    decayed = optax.adamw(rate, 0.9, values["adam_b2"], weight_decay=values["weight_decay"])
    others = optax.chain(adam_direction(values), optax.scale_by_learning_rate(rate))
    return optax.partition({"matrices": decayed, "adam": others}, context.labels)


def muon(context, rate, values):
    """Muon with consistent RMS, Adam for the rest."""
    return optax.contrib.muon(
        rate,
        consistent_rms=methods.RMS,
        weight_decay=values["weight_decay"],
        adam_b2=values["adam_b2"],
        adam_learning_rate=lambda count: values["adam_factor"] * rate(count),
        muon_weight_dimension_numbers=optax_curv.muon_dimension_numbers(context.layers),
    )


def alias(method, rest=adam_direction, **options):
    """An alias of ours, with `layers` and no more than its defaults."""

    def make(context, rate, values):
        return method(
            rate,
            layers=context.layers,
            weight_decay=values["weight_decay"],
            weight_decay_mask=context.is_matrix,
            adam=rest(values),
            **options,
        )

    return make


def pieces(*parts, decay=None, last=(), rest=adam_direction):
    """Pieces for the matrices, `parts` being functions of the layers or transformations."""

    def make(context, rate, values):
        chain = [part(context.layers) if callable(part) else part for part in parts]
        decayed = decay or optax.add_decayed_weights
        chain += [optax_curv.normalize_by_rms(methods.RMS)]
        chain += [decayed(values["weight_decay"]), optax.scale_by_learning_rate(rate), *last]
        others = optax.chain(rest(values), optax.scale_by_learning_rate(rate))
        parted = {"matrices": optax.chain(*chain), "adam": others}
        return optax.partition(parted, context.labels)

    return make


def norm_kept(*parts, **options):
    """Pieces with weights of constant norm in the place of their decay."""
    last = [optax_curv.keep_params_norm()]
    return pieces(*parts, decay=lambda _: optax.identity(), last=last, **options)


def of_layers(method, **options):
    """A part of `pieces` that is made for the layers; gradients are bounded as in the aliases."""

    def part(layers):
        bound = optax_curv.bound_by_running_norm(3.0)
        return optax.chain(bound, method(layers=layers, **options))

    return part


def shampoo_with(**options):
    """`shampoo` with options of `scale_by_shampoo`."""
    return of_layers(optax_curv.scale_by_shampoo, **({"damping": 1e-5} | options))


def orthogonal(layers, beta=0.0):
    """Newton-Schulz as Muon has it, with Muon's momentum where `beta` is not 0."""
    numbers = optax_curv.muon_dimension_numbers(layers)
    return optax.contrib.scale_by_muon(
        beta=beta, nesterov=beta != 0.0, weight_dimension_numbers=numbers
    )


def kron_psgd(falls=False, **options):
    """Kronecker PSGD of the momentum; `falls`: its `precond_lr` does, to zero at the last step."""

    def make(context, rate, values):
        speed = optax.cosine_decay_schedule(0.5, context.problem.steps) if falls else 0.5
        method = of_layers(
            optax_curv.scale_by_kron_psgd, precond_lr=speed, b1=0.9, whiten="momentum", **options
        )
        return pieces(method)(context, rate, values)

    return make


def captured(method, *parts, **options):
    """A method that is given the curvature, for the matrices; the rest receives its gradients."""

    def make(context, rate, values):
        first = method(context.layers, fallback=optax.identity(), **options)

        def update(grads, state, params=None, **extra_args):
            moved, state = first.update(grads, state, params, **extra_args)
            of_matrix = context.is_matrix(grads)
            return jax.tree.map(lambda ours, *x: x[not ours], of_matrix, moved, grads), state

        alone = optax.GradientTransformationExtraArgs(first.init, update)
        return optax.chain(alone, pieces(*parts)(context, rate, values))

    return make


def before(make):
    """The input side of K-FAC before another method."""

    def made(context, rate, values):
        first = optax_curv.scale_by_input_factor(context.layers)
        return optax.chain(first, make(context, rate, values))

    return made


RECIPES = {
    "adamw": Recipe(adamw),
    "muon": Recipe(muon),
    "shampoo": Recipe(alias(optax_curv.shampoo)),
    "soap": Recipe(alias(optax_curv.soap)),
    "soap, rms": Recipe(alias(optax_curv.soap, rms=methods.RMS), "shampoo"),
    "exponent 1/3": Recipe(pieces(shampoo_with(exponent=1 / 3)), "shampoo"),
    "exponent 0.6": Recipe(pieces(shampoo_with(exponent=0.6)), "shampoo"),
    "exponent 0.75": Recipe(pieces(shampoo_with(exponent=0.75)), "shampoo"),
    "roots every 5 steps": Recipe(alias(optax_curv.shampoo, root_every=5), "shampoo"),
    "kl": Recipe(pieces(shampoo_with(kl=True)), "shampoo"),
    "fresh eigenvalues": Recipe(pieces(shampoo_with(root="qr", fresh_values=True)), "shampoo"),
    "pseudo-inverse roots": Recipe(pieces(shampoo_with(drop_below=1e-3)), "shampoo"),
    "refresh by the criterion alone": Recipe(
        pieces(shampoo_with(root_every=500, refresh_growth=2.0)), "shampoo"
    ),
    "cautious decay": Recipe(
        pieces(shampoo_with(), decay=optax_curv.add_cautious_weight_decay), "shampoo"
    ),
    "norm kept": Recipe(norm_kept(shampoo_with()), "shampoo"),
    "norm kept, table in basis": Recipe(norm_kept(shampoo_with(), rest=table_in_basis), "shampoo"),
    "norm kept, kl, table in basis": Recipe(
        norm_kept(shampoo_with(kl=True), rest=table_in_basis), "shampoo"
    ),
    "muon, norm kept": Recipe(norm_kept(functools.partial(orthogonal, beta=0.95)), "muon"),
    "shampoo, then Newton-Schulz": Recipe(pieces(shampoo_with(), orthogonal), "shampoo"),
    "soap, then Newton-Schulz": Recipe(
        pieces(of_layers(optax_curv.scale_by_soap), orthogonal), "shampoo"
    ),
    "soap, kl, rms": Recipe(pieces(of_layers(optax_curv.scale_by_soap, kl=True)), "shampoo"),
    "momentum 0.9": Recipe(alias(optax_curv.shampoo, b1=0.9), "shampoo"),
    "momentum 0.98": Recipe(alias(optax_curv.shampoo, b1=0.98), "shampoo"),
    "no Nesterov": Recipe(alias(optax_curv.shampoo, nesterov=False), "shampoo"),
    "factors' decay 0.9": Recipe(alias(optax_curv.shampoo, decay=0.9), "shampoo"),
    "factors' decay 0.98": Recipe(alias(optax_curv.shampoo, decay=0.98), "shampoo"),
    "damping 1e-3": Recipe(alias(optax_curv.shampoo, damping=1e-3), "shampoo"),
    "kron_psgd": Recipe(kron_psgd(), "shampoo"),
    "kron_psgd, P before Q": Recipe(kron_psgd(update_last=True), "shampoo"),
    "kron_psgd, falling precond_lr": Recipe(kron_psgd(falls=True), "shampoo"),
    "kfac": Recipe(
        captured(optax_curv.scale_by_kfac, optax.trace(0.9), damping=1e-6, invert_every=20),
        "shampoo",
        "kronecker",
    ),
    "adam in K-FAC's basis": Recipe(
        captured(optax_curv.scale_by_adam_in_basis, b1=0.95, b2=0.95),
        "shampoo",
        "kronecker",
    ),
    "shampoo, table in basis": Recipe(alias(optax_curv.shampoo, table_in_basis), "shampoo"),
    "muon, table in basis": Recipe(
        pieces(functools.partial(orthogonal, beta=0.95), rest=table_in_basis), "muon"
    ),
    "input factor, muon": Recipe(before(muon), "muon", "input"),
    "input factor, adamw": Recipe(before(adamw), "adamw", "input"),
    "input factor, shampoo": Recipe(before(alias(optax_curv.shampoo)), "shampoo", "input"),
}
