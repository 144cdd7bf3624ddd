import importlib.util
import json
import pathlib
import re
import tomllib

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_curv
from optax_curv import diagnostics, flax, linalg, testing

ROOT = pathlib.Path(__file__).parents[1]
REFERENCE = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))

SCRIPT = ROOT / "docs" / "repeat_arguments.py"
SPEC = importlib.util.spec_from_file_location("repeat_arguments", SCRIPT)
repeat_arguments = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(repeat_arguments)


def public(module, prefix=""):
    things = vars(module).items()
    room = "optax_curv" if module in (optax_curv, linalg) else module.__name__
    return {prefix + name for name, thing in things if name[0] != "_" and is_ours(thing, room)}


def is_ours(thing, room="optax_curv"):
    return getattr(thing, "__module__", "").startswith(room)


def test_the_reference_has_every_public_name():
    blocks = re.findall(r"^```\{names\} optax_curv(\S*)\n(.*?)^```", REFERENCE, re.M | re.S)
    listed = [f"{room}.{name}"[1:] for room, names in blocks for name in names.split()]
    assert len(listed) == len(set(listed))
    rooms = {"": optax_curv, "linalg.": linalg, "flax.": flax, "testing.": testing}
    rooms["diagnostics."] = diagnostics
    assert set(listed) == set().union(*(public(rooms[prefix], prefix) for prefix in rooms))


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


def table(page):
    """The head and {first cell: other cells} of the first table of a page without a corner."""
    _, _, rest = (ROOT / "docs" / page).read_text().partition("\n| | ")
    head, _, *rows = (row.strip("| ").split(" | ") for row in rest.split("\n\n")[0].splitlines())
    return head, {name: cells for name, *cells in rows}


def test_tuned_rates_and_basins_are_those_of_the_results():
    results = ROOT / "benchmarks" / "results"
    tuned = json.loads((results / "tuned.json").read_text())
    basin = re.findall(
        r"^\| autoencoder \| `(\w+)` \| \S+ \| (\S+) \| (\S+) \| (\S+) \|",
        (results / "basin.md").read_text(),
        re.MULTILINE,
    )
    losses = {name: [float(x) for x in figures] for name, *figures in basin}
    methods, rows = table("tune.md")
    methods = [name.strip("`") for name in methods]
    for problem in ("transformer", "autoencoder", "mlp", "vision_conv", "vision_vit", "xor"):
        rates = [tuned[problem].get(name, {}).get("learning_rate", "-") for name in methods]
        assert rows[problem] == [f"{rate:g}" if rate != "-" else "-" for rate in rates]
    for row, place in (("a third adds", 0), ("three times adds", 2)):
        added = [losses[name][place] / losses[name][1] - 1 for name in methods]
        assert rows[row] == [f"{100 * share:.0f} %" for share in added]


@pytest.mark.parametrize("column", [0, 1])
def test_states_are_as_large_as_the_page_says(column):
    shapes, rows = table("choose.md")
    shape = tuple(int(n) for n in shapes[column].split(" × "))
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    batch = jax.ShapeDtypeStruct((8, shape[0]), jnp.float32)
    layers = optax_curv.find_layers(lambda p, x: jnp.mean((x @ p["w"]) ** 2), params, batch)
    for names, cells in rows.items():
        for name in re.findall(r"[\w.]+", names):
            maker = {"optax.adam": optax.adam, "optax.contrib.muon": optax.contrib.muon}.get(name)
            maker = maker or getattr(optax_curv, name)
            tx = maker(0.1, layers) if "kfac" in name else maker(0.1)
            state = jax.tree.leaves(jax.eval_shape(tx.init, params))
            copies = sum(x.size for x in state) / (shape[0] * shape[1])
            assert f"{copies:.1f}".removesuffix(".0") == cells[column], name


def test_the_lowest_versions_of_the_table_are_the_bounds_of_pyproject():
    page = (ROOT / "docs" / "guarantees.md").read_text()
    row = re.search(r"^\| (\S+) \| (\S+), lowest \| (\S+) \| (\S+) \| (\S+) \|", page, re.M)
    assert row
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python, jax_, optax_, chex_, flax_ = row.groups()
    assert project["requires-python"] == f">={python}"
    lowest = {f"jax>={jax_}", f"jaxlib>={jax_}", f"optax>={optax_}", f"chex>={chex_}"}
    assert set(project["dependencies"]) == lowest
    assert project["optional-dependencies"]["flax"] == [f"flax>={flax_}"]
