"""``python -m optax_curv.demo``."""

from optax_curv.demo import main

main()
