"""Curvature for Optax: second-order methods as pure gradient transformations."""

# From a loss to gradients and curvature.
from optax_curv.objective import (
    Likelihood as Likelihood,
    Objective as Objective,
)
from optax_curv.layers import (
    Layer as Layer,
    Layers as Layers,
)
from optax_curv.curvature import (
    EigenbasisMoments as EigenbasisMoments,
    FactorRows as FactorRows,
    InputFactor as InputFactor,
    InputRows as InputRows,
    KroneckerFactors as KroneckerFactors,
    MadeKernelStatistic as MadeKernelStatistic,
    RawSamples as RawSamples,
    SplitRows as SplitRows,
)
from optax_curv.rows import (
    LazyRows as LazyRows,
)
from optax_curv.capture.gradients import (
    find_layers as find_layers,
    value_grad_and_curvature as value_grad_and_curvature,
)
from optax_curv.capture.micro_batches import (
    average_curvature as average_curvature,
)
from optax_curv.capture.probes import (
    hessian_probe as hessian_probe,
)
from optax_curv.capture.branches import (
    jacobian_rows as jacobian_rows,
    lazy_rows as lazy_rows,
    per_example_grads as per_example_grads,
    residual_rows as residual_rows,
)

# Methods that take gradients alone.
from optax_curv.preconditioners.matrix_axes import (
    LeafAxes as LeafAxes,
    MatrixAxes as MatrixAxes,
    matrix_axes as matrix_axes,
    muon_dimension_numbers as muon_dimension_numbers,
)
from optax_curv.preconditioners.state_shardings import state_shardings as state_shardings
from optax_curv.preconditioners.shampoo import (
    ScaleByShampooState as ScaleByShampooState,
    scale_by_shampoo as scale_by_shampoo,
    shampoo as shampoo,
)
from optax_curv.preconditioners.soap import (
    ScaleBySoapState as ScaleBySoapState,
    scale_by_soap as scale_by_soap,
    soap as soap,
)
from optax_curv.preconditioners.kron_psgd import (
    ScaleByKronPsgdState as ScaleByKronPsgdState,
    axis_factors as axis_factors,
    flat_then_decay as flat_then_decay,
    kron_psgd as kron_psgd,
    scale_by_kron_psgd as scale_by_kron_psgd,
    with_axis_factors as with_axis_factors,
)
from optax_curv.preconditioners.dense_psgd import (
    dense_psgd as dense_psgd,
    scale_by_dense_psgd as scale_by_dense_psgd,
)
from optax_curv.preconditioners.lra_psgd import (
    ScaleByLRAPsgdState as ScaleByLRAPsgdState,
    lra_psgd as lra_psgd,
    scale_by_lra_psgd as scale_by_lra_psgd,
)

# Methods that take the curvature of layers.
from optax_curv.preconditioners.kfac import (
    LayerDiagnostics as LayerDiagnostics,
    ScaleByKFACState as ScaleByKFACState,
    kfac as kfac,
    layer_diagnostics as layer_diagnostics,
    scale_by_kfac as scale_by_kfac,
)
from optax_curv.preconditioners.input_factor import (
    ScaleByInputFactorState as ScaleByInputFactorState,
    scale_by_input_factor as scale_by_input_factor,
)
from optax_curv.preconditioners.ekfac import (
    Eigenbasis as Eigenbasis,
    ScaleByEKFACState as ScaleByEKFACState,
    eigenbasis as eigenbasis,
    ekfac as ekfac,
    scale_by_ekfac as scale_by_ekfac,
)
from optax_curv.preconditioners.adam_in_basis import (
    ScaleByAdamInBasisState as ScaleByAdamInBasisState,
    scale_by_adam_in_basis as scale_by_adam_in_basis,
)
from optax_curv.preconditioners.layer_factors import (
    init_factors as init_factors,
    natural_gradient as natural_gradient,
    update_factors as update_factors,
)

# Methods that take branches, rows or a quadratic model.
from optax_curv.preconditioners.branch_fisher import (
    RowDiagnostics as RowDiagnostics,
    ScaleByBranchFisherState as ScaleByBranchFisherState,
    branch_fisher as branch_fisher,
    row_diagnostics as row_diagnostics,
    scale_by_branch_fisher as scale_by_branch_fisher,
)
from optax_curv.preconditioners.levenberg_marquardt import (
    LevenbergMarquardtState as LevenbergMarquardtState,
    levenberg_marquardt as levenberg_marquardt,
)
from optax_curv.preconditioners.branch_kfac import (
    ScaleByBranchKFACState as ScaleByBranchKFACState,
    branch_kfac as branch_kfac,
    scale_by_branch_kfac as scale_by_branch_kfac,
)
from optax_curv.preconditioners.gauss_newton import (
    ScaleByGaussNewtonState as ScaleByGaussNewtonState,
    gauss_newton as gauss_newton,
    scale_by_gauss_newton as scale_by_gauss_newton,
)
from optax_curv.preconditioners.quadratic_model import (
    AdaptDampingState as AdaptDampingState,
    ScaleByQuadraticModelState as ScaleByQuadraticModelState,
    adapt_damping as adapt_damping,
    scale_by_quadratic_model as scale_by_quadratic_model,
)

# Pieces to chain with any of them.
from optax_curv.preconditioners.chain_pieces import (
    BoundByRunningNormState as BoundByRunningNormState,
    add_cautious_weight_decay as add_cautious_weight_decay,
    bound_by_running_norm as bound_by_running_norm,
    clip_by_max_abs as clip_by_max_abs,
    estimate_gradients as estimate_gradients,
    keep_params_in_box as keep_params_in_box,
    keep_params_norm as keep_params_norm,
    normalize_by_reference as normalize_by_reference,
    normalize_by_rms as normalize_by_rms,
)

# Modules with names of their own.
from optax_curv import (
    diagnostics as diagnostics,
    linalg as linalg,
)

__version__ = "0.1.0"
