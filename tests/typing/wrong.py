"""Twenty calls that a type checker has to refuse: one error at each line that says so, no other."""

import jax.numpy as jnp
import optax

import optax_curv

params = {"w": jnp.ones((4, 3))}
adam = optax.scale_by_adam()


def loss_fn(params, x):
    return jnp.mean(x @ params["w"])


layers = optax_curv.find_layers(loss_fn, params, jnp.ones((8, 4)))

optax_curv.kron_psgd(1e-3, geometry="quadp4")  # wrong: no such geometry
optax_curv.scale_by_kron_psgd(criterion="whiten")  # wrong: no such criterion
optax_curv.scale_by_kron_psgd(whiten="gradients")  # wrong: no such choice
optax_curv.scale_by_shampoo(root="eig")  # wrong: no such root
optax_curv.soap(1e-3, basis="svd")  # wrong: no such basis
optax_curv.scale_by_branch_fisher(solver="lu")  # wrong: no such solver
optax_curv.scale_by_branch_kfac(projection="normal")  # wrong: no such projection
optax_curv.scale_by_kfac(layers, inverse="svd")  # wrong: no such inverse
optax_curv.scale_by_kfac(layers, damping_rule="tikhonov")  # wrong: no such rule
optax_curv.value_grad_and_curvature(loss_fn, statistic="kfac")  # wrong: no such statistic
optax_curv.value_grad_and_curvature(loss_fn, fisher="true")  # wrong: no such Fisher matrix
optax_curv.value_grad_and_curvature(loss_fn, sharing="mean")  # wrong: no such sharing
optax_curv.shampoo("3e-3")  # wrong: a string for a number
optax_curv.clip_by_max_abs("1.0")  # wrong: a string for a number
optax_curv.kfac(layers, 0.1)  # wrong: arguments swapped
optax_curv.scale_by_kfac(1e-3, layers)  # wrong: arguments swapped
optax_curv.soap(None)  # wrong: no learning rate
optax_curv.shampoo(3e-3, adam="adam")  # wrong: a name for a transformation
optax_curv.shampoo(3e-3, geometry="eq")  # wrong: another method's argument
optax_curv.Objective(loss_fn, "gaussian")  # wrong: no such likelihood
