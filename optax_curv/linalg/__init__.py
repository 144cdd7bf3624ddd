"""Array kernels: they know arrays only."""

from optax_curv.linalg.cholesky import cholesky as cholesky
from optax_curv.linalg.cholesky import cholesky_solve as cholesky_solve
from optax_curv.linalg.cholesky import triangular_solve as triangular_solve
from optax_curv.linalg.kronecker import kron_matvec as kron_matvec
from optax_curv.linalg.krylov import ConjugateGradientInfo as ConjugateGradientInfo
from optax_curv.linalg.krylov import conjugate_gradient as conjugate_gradient
from optax_curv.linalg.roots import inverse_root as inverse_root
from optax_curv.linalg.roots import spectral_norm_bound as spectral_norm_bound
