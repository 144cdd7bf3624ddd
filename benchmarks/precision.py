"""What float32, TF32 and bfloat16 products lose in the library's own arithmetic: ``python
benchmarks/precision.py``.

Every product inside a preconditioner asks for `jax.lax.Precision.HIGHEST`: full float32, whatever
`jax.default_matmul_precision` says, as each of them is squared, inverted, or subtracted from nearly
its equal. The network's own products stay as the user wants them. The table shows what less would
cost: the largest error relative to the largest entry, against float64. TF32 and bfloat16 products
are float32 products of operands rounded to 10 and 7 bits of mantissa, as accelerators make them, so
that the table is the same on every machine."""

import numpy as np

SEED, EXAMPLES, WIDTH, CONDITION = 0, 256, 64, 1e4
MANTISSAS = {"float32": 23, "tf32": 10, "bfloat16": 7}


def rounded(x, bits):
    """x to the nearest number with so many bits of mantissa, in float32."""
    x = np.asarray(x, np.float32)
    if bits == 23:
        return x
    exponent = np.floor(np.log2(np.where(x == 0, 1, np.abs(x))))
    unit = np.exp2(exponent - bits)
    return (np.round(x / unit) * unit).astype(np.float32)


def product(bits):
    """The matrix product of rounded operands with float32 sums; exact float64 for None."""
    if bits is None:
        return lambda x, y: np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    return lambda x, y: rounded(x, bits) @ rounded(y, bits)


def second_moment(matmul, rows):
    """K-FAC's statistic A = E[a aᵀ]."""
    return matmul(rows.T, rows) / len(rows)


def inverse_product(matmul, factor, damping, grad):
    """K-FAC's direction (A + λI)⁻¹ ∇ from an exact inverse."""
    return matmul(
        np.linalg.inv(np.asarray(factor, np.float64) + damping * np.eye(len(factor))), grad
    )


def whitening_difference(matmul, q, moment):
    """Kronecker PSGD's T1 - T2 = Q E[g gᵀ] Qᵀ - I, where Q nearly whitens: a difference of nearly
    equal matrices."""
    return matmul(matmul(q, moment), q.T) - np.eye(len(q))


def eigenbasis_moments(matmul, basis, grad):
    """EKFAC's squares in an eigenbasis, (Uᵀ ∇)²."""
    return np.square(matmul(basis.T, grad))


def table():
    """{operation: {precision: error}}."""
    rng = np.random.default_rng(SEED)
    basis = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    spectrum = np.geomspace(1, 1 / CONDITION, WIDTH)
    rows = rng.normal(size=(EXAMPLES, WIDTH)) * np.sqrt(spectrum) @ basis.T
    factor = basis * spectrum @ basis.T
    grad = factor @ rng.normal(size=(WIDTH, 8))
    nearly = basis * (1 + 1e-2 * rng.normal(size=WIDTH)) / np.sqrt(spectrum) @ basis.T
    operations = {
        "second moment E[a aᵀ]": lambda matmul: second_moment(matmul, rows),
        "inverse product (A + λI)⁻¹ ∇": lambda matmul: inverse_product(matmul, factor, 1e-5, grad),
        "eigenbasis moments (Uᵀ ∇)²": lambda matmul: eigenbasis_moments(matmul, basis, grad),
        "whitening difference Q E[g gᵀ] Qᵀ - I": lambda matmul: whitening_difference(
            matmul, nearly, factor
        ),
    }
    errors = {}
    for name, operation in operations.items():
        exact = operation(product(None))
        errors[name] = {
            precision: float(
                np.max(np.abs(operation(product(bits)) - exact)) / np.max(np.abs(exact))
            )
            for precision, bits in MANTISSAS.items()
        }
    return errors


def main():
    print("| operation | " + " | ".join(MANTISSAS) + " |")
    print("|---|" + "---|" * len(MANTISSAS))
    for name, errors in table().items():
        print(f"| {name} | " + " | ".join(f"{error:.1e}" for error in errors.values()) + " |")


if __name__ == "__main__":
    main()
