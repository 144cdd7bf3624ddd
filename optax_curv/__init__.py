"""Curvature for Optax: second-order methods as pure gradient transformations."""

from optax_curv import diagnostics as diagnostics
from optax_curv import linalg as linalg
from optax_curv.capture.branches import jacobian_rows as jacobian_rows
from optax_curv.capture.branches import per_example_grads as per_example_grads
from optax_curv.capture.branches import residual_rows as residual_rows
from optax_curv.capture.gradients import find_layers as find_layers
from optax_curv.capture.gradients import value_grad_and_curvature as value_grad_and_curvature
from optax_curv.capture.micro_batches import average_curvature as average_curvature
from optax_curv.capture.probes import hessian_probe as hessian_probe
from optax_curv.curvature import EigenbasisMoments as EigenbasisMoments
from optax_curv.curvature import FactorRows as FactorRows
from optax_curv.curvature import KroneckerFactors as KroneckerFactors
from optax_curv.curvature import RawSamples as RawSamples
from optax_curv.curvature import SplitRows as SplitRows
from optax_curv.layers import Layer as Layer
from optax_curv.layers import Layers as Layers
from optax_curv.objective import Likelihood as Likelihood
from optax_curv.objective import Objective as Objective
from optax_curv.preconditioners.adam_in_basis import (
    ScaleByAdamInBasisState as ScaleByAdamInBasisState,
)
from optax_curv.preconditioners.adam_in_basis import (
    scale_by_adam_in_basis as scale_by_adam_in_basis,
)
from optax_curv.preconditioners.branch_fisher import (
    ScaleByBranchFisherState as ScaleByBranchFisherState,
)
from optax_curv.preconditioners.branch_fisher import branch_fisher as branch_fisher
from optax_curv.preconditioners.branch_fisher import (
    scale_by_branch_fisher as scale_by_branch_fisher,
)
from optax_curv.preconditioners.branch_kfac import ScaleByBranchKFACState as ScaleByBranchKFACState
from optax_curv.preconditioners.branch_kfac import branch_kfac as branch_kfac
from optax_curv.preconditioners.branch_kfac import scale_by_branch_kfac as scale_by_branch_kfac
from optax_curv.preconditioners.chain_pieces import (
    BoundByRunningNormState as BoundByRunningNormState,
)
from optax_curv.preconditioners.chain_pieces import bound_by_running_norm as bound_by_running_norm
from optax_curv.preconditioners.chain_pieces import clip_by_max_abs as clip_by_max_abs
from optax_curv.preconditioners.chain_pieces import estimate_gradients as estimate_gradients
from optax_curv.preconditioners.chain_pieces import keep_params_in_box as keep_params_in_box
from optax_curv.preconditioners.chain_pieces import normalize_by_reference as normalize_by_reference
from optax_curv.preconditioners.chain_pieces import normalize_by_rms as normalize_by_rms
from optax_curv.preconditioners.dense_psgd import dense_psgd as dense_psgd
from optax_curv.preconditioners.dense_psgd import scale_by_dense_psgd as scale_by_dense_psgd
from optax_curv.preconditioners.ekfac import Eigenbasis as Eigenbasis
from optax_curv.preconditioners.ekfac import ScaleByEKFACState as ScaleByEKFACState
from optax_curv.preconditioners.ekfac import eigenbasis as eigenbasis
from optax_curv.preconditioners.ekfac import ekfac as ekfac
from optax_curv.preconditioners.ekfac import scale_by_ekfac as scale_by_ekfac
from optax_curv.preconditioners.gauss_newton import (
    ScaleByGaussNewtonState as ScaleByGaussNewtonState,
)
from optax_curv.preconditioners.gauss_newton import gauss_newton as gauss_newton
from optax_curv.preconditioners.gauss_newton import scale_by_gauss_newton as scale_by_gauss_newton
from optax_curv.preconditioners.kfac import LayerDiagnostics as LayerDiagnostics
from optax_curv.preconditioners.kfac import ScaleByKFACState as ScaleByKFACState
from optax_curv.preconditioners.kfac import kfac as kfac
from optax_curv.preconditioners.kfac import layer_diagnostics as layer_diagnostics
from optax_curv.preconditioners.kfac import scale_by_kfac as scale_by_kfac
from optax_curv.preconditioners.kron_psgd import ScaleByKronPsgdState as ScaleByKronPsgdState
from optax_curv.preconditioners.kron_psgd import axis_factors as axis_factors
from optax_curv.preconditioners.kron_psgd import flat_then_decay as flat_then_decay
from optax_curv.preconditioners.kron_psgd import kron_psgd as kron_psgd
from optax_curv.preconditioners.kron_psgd import scale_by_kron_psgd as scale_by_kron_psgd
from optax_curv.preconditioners.kron_psgd import with_axis_factors as with_axis_factors
from optax_curv.preconditioners.layer_factors import init_factors as init_factors
from optax_curv.preconditioners.layer_factors import natural_gradient as natural_gradient
from optax_curv.preconditioners.layer_factors import update_factors as update_factors
from optax_curv.preconditioners.lra_psgd import ScaleByLRAPsgdState as ScaleByLRAPsgdState
from optax_curv.preconditioners.lra_psgd import lra_psgd as lra_psgd
from optax_curv.preconditioners.lra_psgd import scale_by_lra_psgd as scale_by_lra_psgd
from optax_curv.preconditioners.matrix_axes import LeafAxes as LeafAxes
from optax_curv.preconditioners.matrix_axes import MatrixAxes as MatrixAxes
from optax_curv.preconditioners.matrix_axes import matrix_axes as matrix_axes
from optax_curv.preconditioners.matrix_axes import (
    muon_dimension_numbers as muon_dimension_numbers,
)
from optax_curv.preconditioners.quadratic_model import AdaptDampingState as AdaptDampingState
from optax_curv.preconditioners.quadratic_model import (
    ScaleByQuadraticModelState as ScaleByQuadraticModelState,
)
from optax_curv.preconditioners.quadratic_model import adapt_damping as adapt_damping
from optax_curv.preconditioners.quadratic_model import (
    scale_by_quadratic_model as scale_by_quadratic_model,
)
from optax_curv.preconditioners.shampoo import ScaleByShampooState as ScaleByShampooState
from optax_curv.preconditioners.shampoo import scale_by_shampoo as scale_by_shampoo
from optax_curv.preconditioners.shampoo import shampoo as shampoo
from optax_curv.preconditioners.soap import ScaleBySoapState as ScaleBySoapState
from optax_curv.preconditioners.soap import scale_by_soap as scale_by_soap
from optax_curv.preconditioners.soap import soap as soap

__version__ = "0.1.0"
