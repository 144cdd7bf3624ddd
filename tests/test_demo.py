import errno
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest

from optax_curv import demo
from optax_curv.demo import problems, results, training

STEPS = 3


AUTOENCODER = ["adam", "muon", "shampoo", "kron_psgd", "kfac(None)"]


def trained(problem, tmp_path, steps=STEPS):
    """The runs of all methods on a problem, what they print, and the picture they leave."""
    out = tmp_path / "picture.png"
    with pytest.MonkeyPatch.context() as patch:
        runs, printed = [], []
        train = training.train
        patch.setattr(training, "train", lambda *args: runs.append(train(*args)) or runs[-1])
        patch.setattr("builtins.print", lambda *args, **kwargs: printed.append(args[0]))
        demo.main(["--problem", problem, "--steps", str(steps), "--out", str(out)])
    return runs, printed, out.read_bytes()


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    return trained("autoencoder", tmp_path_factory.mktemp("demo"))


def test_every_method_trains_from_the_same_weights(shown):
    runs, _, _ = shown
    assert [run.method for run in runs] == AUTOENCODER
    assert len({run.errors[0] for run in runs}) == 1
    assert len({run.errors[-1] for run in runs}) == len(runs)
    for run in runs:
        assert run.steps.tolist() == list(range(STEPS + 1)) and len(run.params) == STEPS + 1
        assert np.isfinite(run.errors).all() and (np.diff(run.seconds) > 0).all()
        assert run.compile_seconds > 0


def test_every_method_sees_the_same_batches():
    problem = problems.autoencoder(0)
    order = training.order_of(problem, 12, seed=3)
    assert order.shape == (12, problem.batch_size)
    assert (order == training.order_of(problem, 12, seed=3)).all()
    assert len(np.unique(order[:5])) == 5 * problem.batch_size  # within an epoch none comes twice


def test_the_table_has_a_row_for_each_method(shown):
    _, (table, *_), _ = shown
    header, *rows = table.splitlines()
    assert header.split() == [
        *("method", "compile", "s", "ms", "a", "step"),
        *("steps", "to", "Adam:", "steps", "seconds", "error"),
    ]
    assert [row.split()[0] for row in rows[:-1]] == AUTOENCODER
    assert all(len(row.split()) == 7 for row in rows[:-1])


def test_the_picture_is_a_png_of_readable_size(shown):
    _, _, png = shown
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert width >= 800 and height >= 500


def test_levenberg_marquardt_solves_the_equation_in_float64(tmp_path):
    runs, (_, *_, said), _ = trained("poisson", tmp_path, steps=800)
    last = {run.method: run.errors[-1] for run in runs}
    assert list(last) == [*AUTOENCODER[:-1], "levenberg_marquardt"]
    assert runs[-1].steps[-1] == 40 and last["levenberg_marquardt"] < 2e-3
    assert last["levenberg_marquardt"] == min(last.values())
    assert "levenberg_marquardt's" in said


def run_of(method, errors, seconds=1.0):
    """A run of as many steps as it has errors, at a steady pace."""
    steps = np.arange(len(errors))
    return training.Run(method, 1.0, steps, seconds * steps, np.array(errors), [None] * len(errors))


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (
            [run_of("a", [4, 2, 1])],
            "took a 2 steps where Adam took 3, and a 2.00 s where Adam took 3.00",
        ),
        (
            [run_of("a", [4, 0.5], 9.0)],
            "in time Adam wins here. The lowest error at the end is a's",
        ),
        ([run_of("a", [4, 3]), run_of("b", [4, 1])], "Not as low as Adam's came: a."),
        ([run_of("a", [4, 3, 2])], "None of a reached Adam's last error, 1: Adam wins here."),
        ([], "have to run for a comparison"),
    ],
)
def test_the_last_line_says_what_the_numbers_are(others, said):
    assert said in results.said([run_of("adam", [4, 3, 2, 1]), *others])


def test_labels_at_the_ends_of_lines_do_not_overlap():
    heights = np.array([1.0, 0.0, 1.01, 1.02])
    places = results._spread(heights, 0.1)
    assert (np.diff(np.sort(places)) >= 0.1 - 1e-12).all()
    assert (np.argsort(places) == np.argsort(heights)).all()
    np.testing.assert_allclose(places.mean(), heights.mean())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--methods", "sgdd"], "argument --methods: invalid choice: 'sgdd'"),
        (
            ["--problem", "poisson", "--methods", "kfac(None)"],
            "poisson is not trained by kfac(None)",
        ),
        (["--steps", "0"], "argument --steps: expected a whole number above zero, got '0'"),
        (["--steps", "many"], "argument --steps: expected a whole number above zero, got 'many'"),
        (["--seed", "-1"], "argument --seed: expected a whole number from 0 to"),
        (["--out", "no/such/folder/x.png"], "argument --out: cannot write 'no/such/folder/x.png'"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(option, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(option)
    written = capsys.readouterr().err
    assert stopped.value.code == 2
    assert (
        written.startswith(f"python -m optax_curv.demo: error: {message}")
        and written.count("\n") == 1
    )


@pytest.mark.parametrize("package", ["flax", "sklearn.datasets", "tqdm", "matplotlib"])
def test_a_missing_extra_is_one_line_that_names_it(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--steps", "1"])
    written = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "pip install 'optax-curv[demo]'" in written and written.count("\n") == 1


@pytest.fixture
def quick(monkeypatch):
    """A demo whose training is instant, and is interrupted at "kron_psgd"."""

    def train(name, problem, steps, seed, rate):
        if name == "kron_psgd":
            raise KeyboardInterrupt
        return run_of(name, [1.0] * (steps + 1))._replace(params=[problem.params] * (steps + 1))

    monkeypatch.setattr(training, "train", train)


def test_an_interrupt_shows_what_has_finished_and_exits_with_130(quick, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        demo.main(["--steps", "3", "--out", str(tmp_path / "x.png")])
    table, message = capsys.readouterr()
    assert exit.value.code == 130
    assert [line.split()[0] for line in table.splitlines()[1:-1]] == AUTOENCODER[:3]
    assert message == "interrupted: 3 of 5 methods have finished\n"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_older_picture(quick, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.png"
    arguments = ["--methods", "adam", "--steps", "3", "--out", str(out)]
    demo.main(arguments)
    older = out.read_bytes()
    write = pathlib.Path.write_bytes

    def half(path, content):
        write(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", half)
    with pytest.raises(SystemExit) as exit:
        demo.main(arguments)
    assert exit.value.code == 1
    assert out.read_bytes() == older and list(tmp_path.iterdir()) == [out]
    assert f"cannot write {out}: No space left on device" in capsys.readouterr().err


def test_help_names_every_option_and_needs_no_extra():
    program = (
        "import sys; sys.modules['flax'] = None; from optax_curv import demo; demo.main(['--help'])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert all(
        option in shown
        for option in ("--problem", "--methods", "--steps", "--seed", "--out", *training.METHODS)
    )
