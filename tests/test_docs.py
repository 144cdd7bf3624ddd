import pathlib
import re

import optax_curv
from optax_curv import diagnostics, linalg

REFERENCE = (pathlib.Path(__file__).parents[1] / "docs" / "api.md").read_text()


def public(module, prefix=""):
    things = vars(module).items()
    return {prefix + name for name, thing in things if name[0] != "_" and is_ours(thing)}


def is_ours(thing):
    return getattr(thing, "__module__", "").startswith("optax_curv")


def test_the_reference_has_every_public_name():
    listed = {
        name.removeprefix("optax_curv.")
        for name in re.findall(r"auto(?:function|class):: (\S+)", REFERENCE)
    }
    assert listed == public(optax_curv) | public(linalg, "linalg.") | public(
        diagnostics, "diagnostics."
    )
