"""Every documented call: pyright has to accept this file, which is read and never run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_curv
from optax_curv import linalg

schedule = optax.cosine_decay_schedule(1e-2, 100)
array = jnp.float32(0.1)
number = np.float32(0.1)
key = jax.random.key(0)
mesh = jax.make_mesh((1,), ("data",))
placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
x, y = jnp.ones((8, 4)), jnp.ones((8, 3))
adam = optax.scale_by_adam()


def loss_fn(params, x, y):
    return jnp.mean(jnp.square(x @ params["w"] + params["b"] - y))


def apply_fn(params, x):
    return x @ params["w"] + params["b"]


def of_output(path: tuple, leaf: jax.Array) -> bool:
    return "output" in jax.tree_util.keystr(path) or leaf.ndim != 2


layers = optax_curv.find_layers(loss_fn, params, x, y)
objective = optax_curv.Objective(apply_fn, "normal")

# Capture: value, gradients and curvature have types of their own.
value, grads, curvature = optax_curv.value_grad_and_curvature(loss_fn, layers=layers)(params, x, y)
loss: jax.Array = value
factors: optax_curv.KroneckerFactors = curvature["dense"]
optax_curv.value_grad_and_curvature(loss_fn, statistic="diagonal", sharing="reduce")
optax_curv.value_grad_and_curvature(loss_fn, has_aux=True)
optax_curv.value_grad_and_curvature(objective, fisher="sampled")(params, x, y, key=key)
optax_curv.value_grad_and_curvature(objective, fisher="exact", batch_size=8)
optax_curv.find_layers(loss_fn, params, x, y, batch_size=8)
optax_curv.hessian_probe(loss_fn, params, x, y, key=key)
optax_curv.per_example_grads(loss_fn)(params, x, y)
optax_curv.jacobian_rows(apply_fn)(params, x)
optax_curv.row_diagnostics(params, 1e-3, branches=params)
optax_curv.levenberg_marquardt(1e-3, max_tries=4, max_norm=1.0, momentum=0.9)
optax_curv.lazy_rows(apply_fn, params, x, chunk_size=8)
optax_curv.residual_rows(apply_fn)(params, x)

# Shampoo and SOAP.
optax_curv.shampoo(schedule)
optax_curv.shampoo(3e-3, schedule, weight_decay=array, rms=None)
optax_curv.shampoo(array, adam_for={"w": False, "b": True}, adam=adam, stacked=1)
optax_curv.shampoo(3e-3, adam_for=of_output, decay=schedule, root_every=jnp.array(3))
optax_curv.shampoo(3e-3, weight_decay_mask={"w": True, "b": False}, layers=layers)
optax_curv.shampoo(3e-3, 0.0, nesterov=False, rms=array, damping=array)
optax_curv.soap(schedule, 0.9, b2=schedule, rms=0.2)
optax_curv.soap(3e-3, basis="eigh", basis_every=jnp.array(3), layers=layers)
optax_curv.scale_by_shampoo(schedule, root="newton", exponent=0.25, max_dim=1024)
optax_curv.scale_by_shampoo(root="qr", precond_dtype="bfloat16", block_size=256, kl=True)
optax_curv.scale_by_shampoo(root="qr", fresh_values=True, drop_below=array)
optax_curv.scale_by_soap(kl=True)
optax_curv.scale_by_soap(schedule, schedule, decay=None, stacked={"w": 1, "b": 0})
optax_curv.scale_by_adam_in_basis(layers, fallback=adam)
optax_curv.scale_by_input_factor(layers, 1.0, array, every=number, decay=schedule, sharding=mesh)
_, _, inputs = optax_curv.value_grad_and_curvature(loss_fn, statistic="input")(params, x, y)
a: jax.Array = inputs["dense"].input_factor

# PSGD.
optax_curv.kron_psgd(schedule, precond_lr=schedule, max_rms=None, key=key)
optax_curv.kron_psgd(1e-3, b1=array, geometry="quad4p", update_probability=schedule)
optax_curv.kron_psgd(1e-3, key=jax.random.PRNGKey(0), weight_decay=number)
optax_curv.kron_psgd(1e-3, key=2**63, stacked=lambda params: {"w": 1, "b": 0})
optax_curv.scale_by_kron_psgd(schedule, criterion="newton", init_scale=None, update_last=True)
optax_curv.scale_by_kron_psgd(whiten="momentum", b1=0.9, block_size=256, max_skew=float("inf"))
optax_curv.scale_by_kron_psgd(damping=array, lipschitz_decay=0.9, precond_dtype="bfloat16")
optax_curv.dense_psgd(schedule, precond_lr=schedule, criterion="newton", key=key)
optax_curv.scale_by_dense_psgd(schedule, geometry="quad")
optax_curv.lra_psgd(schedule, rank=10, update_probability=schedule, key=key)
optax_curv.lra_psgd(0.1, sharding=None)
optax_curv.scale_by_lra_psgd(0.1, rank=5, init_scale=1.0)

# K-FAC and its relatives.
optax_curv.kfac(0.1, layers)
optax_curv.kfac(schedule, layers, schedule, decay=schedule, invert_every=jnp.array(3))
optax_curv.kfac(0.1, layers, fallback=adam, kl_clip=1e-3, momentum=0.9, weight_decay=1e-4)
optax_curv.kfac(None, layers, damping=1.0)
optax_curv.scale_by_kfac(layers, schedule, damping_rule="trace", inverse="eigh")
optax_curv.scale_by_kfac(layers, array, inverse="cg", fallback=None)
optax_curv.kfac(0.1, layers, factor_sharding=placed)
optax_curv.kfac(0.1, layers, sharding=mesh)
optax_curv.shampoo(0.1, sharding=mesh, transport_dtype="bfloat16")
optax_curv.state_shardings(optax_curv.soap(0.1, sharding=placed), params)
optax_curv.ekfac(schedule, layers, schedule, kl_clip=None)
optax_curv.scale_by_ekfac(layers, 1e-3, decay=schedule)
optax_curv.init_factors(4, 3)
updated = optax_curv.update_factors(optax_curv.init_factors(4, 3), x, y, decay=0.95)
direction: jax.Array = optax_curv.natural_gradient(updated, jnp.ones((4, 3)), rule="trace")

# Gauss-Newton and branches.
optax_curv.gauss_newton(None)
optax_curv.gauss_newton(schedule, array, max_iters=20, layers=layers, backtrack=True)
optax_curv.scale_by_gauss_newton(schedule, warm_start=0.9)
optax_curv.branch_fisher(schedule, schedule, solver="auto", momentum=0.9, key=key)
optax_curv.branch_fisher(1e-2, complement=False, centered=False, param_bound=20.0)
optax_curv.scale_by_branch_fisher(1e-3, projection="orthonormal", tol=1e-6, complex_metric="full")
optax_curv.branch_kfac(schedule, array, blocks=2, projection="fixed", param_bound=None)
optax_curv.scale_by_branch_kfac(schedule, blocks=2, key=3)
optax_curv.scale_by_quadratic_model(1e-3)
table_of_axes: str = str(optax_curv.matrix_axes(params, layers, adam_for=of_output))
optax_curv.muon_dimension_numbers(layers)

# Pieces, and what they are chained with.
tx = optax.chain(
    optax_curv.scale_by_shampoo(),
    optax_curv.normalize_by_rms(0.2),
    optax_curv.clip_by_max_abs(array),
    optax_curv.add_cautious_weight_decay(array),
    optax_curv.keep_params_in_box(20.0),
    optax_curv.keep_params_norm(),
    optax_curv.normalize_by_reference(adam),
    optax_curv.estimate_gradients(lambda params, **extra_args: params),
)
state = tx.init(params)
updates, state = tx.update(grads, state, params, curvature=curvature)
adaptive: optax.GradientTransformationExtraArgs = optax_curv.adapt_damping(
    lambda damping: optax_curv.scale_by_kfac(layers, damping), 1.0, adapt_every=jnp.array(5)
)

# Diagnostics and kernels.
table: str = optax_curv.diagnostics.curvature_table(state)
by_layer: dict[str, dict[str, float]] = optax_curv.layer_diagnostics(state, as_dict=True)
figure: float = optax_curv.diagnostics.curvature_table(state, as_dict=True)["w"]["axis 0"]["mean"]
optax_curv.diagnostics.plot_curvature(state, axes=None)
names = [spectrum.name for spectrum in optax_curv.diagnostics.factor_spectra(state)]
factor, damping_used = linalg.cholesky(jnp.eye(3), damping=1e-3)
solved: jax.Array = linalg.cholesky_solve(factor, jnp.ones(3))
linalg.triangular_solve(factor, jnp.ones((3, 1)), lower=True, transpose=True, side="left")
solution, info = linalg.conjugate_gradient(lambda v: 2 * v, jnp.ones(3), max_iters=5, atol=1e-6)
root: jax.Array = linalg.inverse_root(jnp.eye(3), 2, damping=1e-3)
linalg.kron_matvec((jnp.eye(4), jnp.eye(3)), jnp.ones((4, 3)))
linalg.spectral_norm_bound(jnp.eye(3))
