"""Shared fixtures, and a compiler that hurries."""

import contextlib
import gc
import importlib.metadata
import os
import pathlib

# Most of the suite's time goes to compiling programs that run once, so what makes programs fast is
# left out, and a program is not split for threads, which took a third of its compilation and gains
# nothing where each core has a worker. The notebooks and the demo compile as users do. A flag that
# XLA does not know ends the process, so only releases that were tried get these; your own XLA_FLAGS
# come later and win.
if (release := importlib.metadata.version("jaxlib").split(".")[1]) in ("10", "11", "12"):
    hurry = ["backend_optimization_level=0", "llvm_disable_expensive_passes=true"]
    hurry += ["cpu_parallel_codegen_split_count=1"]
    hurry += ["cpu_use_fusion_emitters=false"] if release == "10" else []
    os.environ["XLA_FLAGS"] = " ".join(
        [*(f"--xla_{x}" for x in hurry), os.environ.get("XLA_FLAGS", "")]
    )

import jax
import pytest

# Tracing makes many small objects that live for long; looking for garbage among them took a tenth
# of the suite's time.
gc.set_threshold(200_000, 20, 100)

collect_ignore = [
    "conformance/many_devices.py",  # a program for eight devices, run by its test
    "conformance/threads.py",  # a program of eight threads, run by `test_no_deadlock.py`
    "typing/usage.py",  # read by a type checker
    "typing/wrong.py",
]
# The networks of other packages take half an hour; `.ci/run zoo` asks for them.
collect_ignore_glob = [] if os.environ.get("OPTAX_CURV_ZOO") else ["zoo/*"]


# Modules whose tests all read what one program printed, or share a long computation.
ONE_PROGRAM = {"test_many_devices", "test_no_deadlock", "test_demo", "test_benchmarks"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keeps in one worker what shares a program or a compiled step.

    It is `--dist loadgroup`, which names groups in a way that pytest 9.2 no longer sees.
    """
    from conformance import cases
    from xdist.scheduler import LoadScopeScheduling

    class ByWhatIsShared(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = pathlib.Path(nodeid.partition("::")[0])
            if path.stem in ONE_PROGRAM:
                return path.stem
            if path.parent.name != "conformance":
                return nodeid
            parameters = nodeid.partition("[")[2].rstrip("]").split("-")
            return f"{path.stem} {next((x for x in parameters if x in cases.ALL), nodeid)}"

    return ByWhatIsShared(config, log)


@pytest.fixture
def x64():
    """float64 inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def eagerly():
    """A context in which JAX evaluates one equation after the other, as capture does outside jit.

    From 0.12 on JAX compiles some functions of its own there, too, and their derivatives are
    rounded differently."""
    return jax.disable_jit() if jax.__version_info__ >= (0, 12) else contextlib.nullcontext()
