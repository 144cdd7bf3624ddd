"""Array kernels: they know arrays only."""

from optax_curv.linalg.cholesky import (
    cholesky as cholesky,
    cholesky_solve as cholesky_solve,
    triangular_solve as triangular_solve,
)
from optax_curv.linalg.kronecker import (
    kron_matvec as kron_matvec,
)
from optax_curv.linalg.krylov import (
    ConjugateGradientInfo as ConjugateGradientInfo,
    conjugate_gradient as conjugate_gradient,
)
from optax_curv.linalg.roots import (
    inverse_root as inverse_root,
    spectral_norm_bound as spectral_norm_bound,
)
