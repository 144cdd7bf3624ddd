import errno
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest

from optax_curv import demo

STEPS = 3


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What all methods print, and the plot they leave."""
    out = tmp_path_factory.mktemp("demo") / "curves.png"
    with pytest.MonkeyPatch.context() as patch:
        runs = []
        train = demo._train
        patch.setattr(demo, "_train", lambda *args: runs.append(train(*args)) or runs[-1])
        printed = []
        patch.setattr("builtins.print", lambda *args, **kwargs: printed.append(args[0]))
        demo.main(["--steps", str(STEPS), "--out", str(out)])
    return runs, printed[0], out.read_bytes()


def test_every_method_trains_from_the_same_weights_on_the_same_batches(shown):
    runs, _, _ = shown
    assert [run.method for run in runs] == list(demo.METHODS)
    assert len({float(run.losses[0]) for run in runs}) == 1
    assert len({float(run.losses[-1]) for run in runs}) == len(runs)
    for run in runs:
        assert run.losses.shape == (STEPS,) and np.isfinite(run.losses).all()
        assert 0 <= run.accuracy <= 1 and run.seconds > 0


def test_the_table_has_a_row_for_each_method(shown):
    _, table, _ = shown
    header, *rows = table.splitlines()
    assert header.split() == ["method", "steps", "loss", "test", "accuracy", "seconds"]
    assert [row.split()[:2] for row in rows[: len(demo.METHODS)]] == [
        [name, str(STEPS)] for name in demo.METHODS
    ]


def test_the_plot_is_a_png_of_readable_size(shown):
    _, _, png = shown
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert width >= 800 and height >= 500


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--method", "sgdd"], "argument --method: invalid choice: 'sgdd'"),
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
    """A demo whose training is instant, and is interrupted at "kfac"."""

    def train(name, problem, steps, seed):
        if name == "kfac":
            raise KeyboardInterrupt
        return demo.Run(name, np.ones(steps), 0.5, 0.9, 1.0)

    monkeypatch.setattr(demo, "_train", train)
    monkeypatch.setattr(demo, "_problem", lambda seed: None)


def test_an_interrupt_shows_what_has_finished_and_exits_with_130(quick, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        demo.main(["--steps", "3", "--out", str(tmp_path / "x.png")])
    table, message = capsys.readouterr()
    assert exit.value.code == 130
    assert [line.split()[0] for line in table.splitlines()[1:-1]] == ["adam", "muon", "kron_psgd"]
    assert message == "interrupted: 3 of 5 methods have finished\n"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_older_picture(quick, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.png"
    arguments = ["--method", "adam", "--steps", "3", "--out", str(out)]
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
        option in shown for option in ("--method", "--steps", "--seed", "--out", *demo.METHODS)
    )
