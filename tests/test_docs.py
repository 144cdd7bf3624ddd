import importlib.util
import pathlib
import re

import optax_curv
from optax_curv import diagnostics, linalg

REFERENCE = (pathlib.Path(__file__).parents[1] / "docs" / "api.md").read_text()

SCRIPT = pathlib.Path(__file__).parents[1] / "docs" / "repeat_arguments.py"
SPEC = importlib.util.spec_from_file_location("repeat_arguments", SCRIPT)
repeat_arguments = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(repeat_arguments)


def public(module, prefix=""):
    things = vars(module).items()
    room = "optax_curv.diagnostics" if module is diagnostics else "optax_curv"
    return {prefix + name for name, thing in things if name[0] != "_" and is_ours(thing, room)}


def is_ours(thing, room="optax_curv"):
    return getattr(thing, "__module__", "").startswith(room)


def test_the_reference_has_every_public_name():
    listed = {
        name.removeprefix("optax_curv.")
        for name in re.findall(r"auto(?:function|class):: (\S+)", REFERENCE)
    }
    assert listed == public(optax_curv) | public(linalg, "linalg.") | public(
        diagnostics, "diagnostics."
    )


def test_an_alias_explains_an_argument_in_the_words_of_its_source():
    """Otherwise: python docs/repeat_arguments.py."""
    differing = [(alias.__name__, name) for alias, name, _ in repeat_arguments.differing()]
    assert differing == []


def test_what_an_alias_says_in_its_own_words_exists_and_differs():
    texts = {
        (alias.__name__, name): (text, repeat_arguments.arguments(source).get(name))
        for alias, source in repeat_arguments.pairs()
        for name, text in repeat_arguments.arguments(alias).items()
    }
    assert len(texts) > 30
    for place in repeat_arguments.OWN:
        own, of_source = texts[place]
        assert of_source is not None and own != of_source, place
