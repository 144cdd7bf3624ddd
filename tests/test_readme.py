import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
EXAMPLES = BLOCK.findall(README)
PAGES = {
    page.stem: blocks
    for page in sorted((ROOT / "docs").glob("*.md"))
    if (blocks := BLOCK.findall(page.read_text()))
}
# What the text around the fragments of a page supposes.
CONTEXT = {
    "wavefunctions": """
import jax, jax.numpy as jnp, optax, optax_curv
def log_psi(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]
params = {"w": jnp.full((3, 4), 0.1), "v": jnp.ones((4, 1))}
samples = jax.random.normal(jax.random.key(0), (6, 3))
stored, energies, rows_dtype = log_psi, samples.sum(1), jnp.float32
log_psi = lambda params, x: stored(params, x)[:, 0]
""",
    "pdes": """
import jax, jax.numpy as jnp, optax, optax_curv
interior = lambda params, x: jnp.sin(params["a"] * x) - jnp.sin(2 * x)
boundary = lambda params, x: params["a"] * x
params, points, edge = {"a": jnp.float32(1.5)}, jnp.linspace(0.1, 1, 5), jnp.zeros(1)
loss = lambda params: rows_of(params, points, edge)[0]
""",
}
BETWEEN = {("wavefunctions", 2): "log_psi, targets = stored, jnp.zeros((6, 1))"}
COMMANDS = [
    block.strip()
    for block in re.findall(r"^```sh\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_example_runs_as_printed(number):
    exec(compile(EXAMPLES[number], f"README.md, example {number}", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("name", PAGES)
def test_the_examples_of_a_page_run_one_after_the_other(name):
    namespace = {"__name__": "docs"}
    exec(CONTEXT.get(name, ""), namespace)
    for number, block in enumerate(PAGES[name]):
        exec(BETWEEN.get((name, number), ""), namespace)
        exec(compile(block, f"docs/{name}.md, example {number}", "exec"), namespace)
    if name == "pdes":
        tx, params = namespace["tx"], namespace["params"]
        namespace["step"](params, tx.init(params))


def test_measured_figures_are_those_of_the_results():
    """[problem](results) | method | steps of all | time | method | steps | time."""
    rows = re.findall(
        r"^\| \[[^]]*\]\((benchmarks/results/\S+)\) \| (.*) \|$", README, re.MULTILINE
    )
    assert len(rows) == 5
    for path, cells in rows:
        head, *table = re.findall(r"^\| (.*) \|$", (ROOT / path).read_text(), re.MULTILINE)
        names = head.split(" | ")
        found = {}
        for line in table:
            row = dict(zip(names, line.split(" | "), strict=False))
            found[row["method"]] = row
        ours, steps, time, other, *others = cells.replace("`", "").split(" | ")
        assert re.findall(r"\d+", steps) == [
            found[ours.split(",")[0]][x] for x in ("steps to target", "steps")
        ]
        assert time == found[ours.split(",")[0]]["time to target"]
        row = found[other]
        reached = row["steps to target"].replace("- (0 of 3)", "never")
        assert others == [reached, row["time to target"]]


def test_the_first_screen_has_a_short_example_and_the_two_commands():
    first_screen = "\n".join(README.splitlines()[:60])
    assert EXAMPLES[0] in first_screen and len(EXAMPLES[0].splitlines()) <= 16
    assert all(command in first_screen for command in COMMANDS[:2])
    assert "python -m optax_curv.demo" in COMMANDS[0] and "python -m pytest" in COMMANDS[1]


def test_ci_calls_the_test_command_as_printed():
    assert f"tests='{COMMANDS[1]}'\n" in (ROOT / ".ci" / "run").read_text()


def test_links_to_files_of_the_repository_lead_somewhere():
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", README)
    assert targets and all((ROOT / target).exists() for target in targets)


def test_the_table_of_methods_names_what_the_package_has():
    import optax_curv

    rows = re.findall(r"^\| \[[^]]+\]\(optax_curv/\S+\): (.*?) \|", README, flags=re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(rows) >= 7 and all(hasattr(optax_curv, name) for name in names)


def test_the_citation_names_this_version():
    import optax_curv

    assert f"\nversion: {optax_curv.__version__}\n" in (ROOT / "CITATION.cff").read_text()
