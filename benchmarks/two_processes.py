"""Data parallelism over two processes, one of which is killed: ``python
benchmarks/two_processes.py``.

Two processes join by `jax.distributed` on the loopback address and train a network on handwritten
digits, each on its half of every batch, with K-FAC, Kronecker PSGD, or Shampoo and SOAP, whose
state they divide by `sharding=`. Once without a disturbance; once until one of them is killed in
the middle of the run, after which both start again from the last Orbax checkpoint. Both runs end
with the same parameters, bit for bit."""

import argparse
import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

METHODS = ("kfac", "kron_psgd", "kfac_divided", "kron_psgd_divided", "shampoo", "soap")
STEPS, SAVE_EVERY, KILLED_AT = 12, 4, 10
BATCH_SIZE = 64
PATIENCE = 240  # seconds for one pair of processes, mostly for their compilation on a busy machine


def make_state(method, mesh, images, labels):
    """The training state, its loss, and the layers that it has, the same in every process.

    The state of all methods but `kfac` and `kron_psgd` is divided over the processes.
    """
    import flax.linen as nn
    import jax
    import numpy as np
    import optax

    import optax_curv
    from optax_curv.flax import TrainState

    model = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(10)])
    params = model.init(jax.random.key(0), images)

    def loss_fn(params, images, labels):
        return optax.softmax_cross_entropy_with_integer_labels(
            model.apply(params, images), labels
        ).mean()

    layers = optax_curv.find_layers(loss_fn, params, images, labels)
    options = {"sharding": None if method in ("kfac", "kron_psgd") else mesh}
    tx = {
        "kfac": lambda: optax_curv.kfac(0.1, layers, damping=0.01, invert_every=3, **options),
        "kron_psgd": lambda: optax_curv.kron_psgd(0.01, **options),
        "shampoo": lambda: optax_curv.shampoo(0.01, root_every=3, **options),
        "soap": lambda: optax_curv.soap(0.01, basis_every=3, **options),
    }[method.removesuffix("_divided")]()
    whole = jax.NamedSharding(mesh, jax.P())
    params = jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(whole, np.asarray(x)), params
    )
    state = jax.jit(functools.partial(TrainState.create, apply_fn=model.apply, tx=tx))(
        params=params
    )
    return state, loss_fn, layers


def train(method, rank, port, folder, killed_at, steps):
    """One of the two processes: trains from the last checkpoint in `folder`, if there is one, and
    saves the end."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=2, process_id=rank, initialization_timeout=PATIENCE
    )
    import numpy as np
    import orbax.checkpoint as ocp
    from jax.sharding import NamedSharding, PartitionSpec
    from sklearn.datasets import load_digits

    import optax_curv

    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype("float32"), labels.astype("int32")
    mesh = jax.make_mesh(
        (2,), ("data",), devices=jax.devices(), axis_types=(jax.sharding.AxisType.Auto,)
    )
    halves = NamedSharding(mesh, PartitionSpec("data"))
    state, loss_fn, layers = make_state(method, mesh, images[:BATCH_SIZE], labels[:BATCH_SIZE])
    held = [
        (x.addressable_shards[0].data.nbytes, x.nbytes) for x in jax.tree.leaves(state.opt_state)
    ]
    share = sum(own for own, _ in held) / sum(all_of_it for _, all_of_it in held)
    capture = optax_curv.value_grad_and_curvature(loss_fn, layers=layers)

    @jax.jit
    def step(state, images, labels):
        value, grads, curvature = capture(state.params, images, labels)
        return state.apply_gradients(grads=grads, curvature=curvature), value

    options = ocp.CheckpointManagerOptions(
        save_interval_steps=SAVE_EVERY, enable_async_checkpointing=False
    )
    with ocp.CheckpointManager(folder / "checkpoints", options=options) as checkpoints:
        first = checkpoints.latest_step() or 0
        if first:
            state = checkpoints.restore(first, args=ocp.args.StandardRestore(state))
        for count in range(first, steps):
            if count == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            chosen = np.random.default_rng(count).choice(len(images), BATCH_SIZE, replace=False)
            mine = np.split(chosen, 2)[rank]
            batch = [
                jax.make_array_from_process_local_data(halves, x[mine]) for x in (images, labels)
            ]
            state, value = step(state, *batch)
            checkpoints.save(count + 1, args=ocp.args.StandardSave(state))
    if rank == 0:
        leaves = [np.asarray(x) for x in jax.tree.leaves(state.params)]
        np.savez(folder / "end.npz", *leaves, loss=np.asarray(value), first=first, share=share)
    jax.distributed.shutdown()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_pair(method, folder, steps, killed_at=None):
    """Starts both processes, ends both when one has died, and returns their exit codes."""
    port = free_port()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    pair = []
    for rank in (0, 1):
        command = [
            sys.executable,
            __file__,
            "--method",
            method,
            "--rank",
            str(rank),
            "--port",
            str(port),
        ]
        command += ["--folder", str(folder), "--steps", str(steps)]
        command += ["--killed-at", str(killed_at)] if rank == 1 and killed_at is not None else []
        with open(folder / f"log{rank}.txt", "ab") as log:
            pair.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    deadline = time.monotonic() + PATIENCE
    try:
        while any(process.poll() is None for process in pair) and time.monotonic() < deadline:
            if any(process.poll() not in (None, 0) for process in pair):
                break  # the other one waits for it in vain
            time.sleep(0.1)
    finally:
        for process in pair:
            process.kill()
        codes = [process.wait() for process in pair]
    return codes


def compare(method, steps=STEPS, killed_at=KILLED_AT):
    """(loss, loss, whether all parameters are equal, what of the state one process holds) of an
    undisturbed and of an interrupted run."""
    import numpy as np

    with tempfile.TemporaryDirectory() as parent:
        ends = []
        for name in ("undisturbed", "interrupted"):
            folder = pathlib.Path(parent, name)
            folder.mkdir()
            if name == "interrupted":
                codes = run_pair(method, folder, steps, killed_at)
                assert codes[1] == -signal.SIGKILL, (
                    codes,
                    (folder / "log1.txt").read_text()[-2000:],
                )
                assert not (folder / "end.npz").exists(), (
                    "the run ended before the process was killed"
                )
            codes = run_pair(method, folder, steps)
            assert codes == [0, 0], (codes, (folder / "log0.txt").read_text()[-2000:])
            ends.append(dict(np.load(folder / "end.npz")))
    undisturbed, interrupted = ends
    assert interrupted.pop("first") > 0 and undisturbed.pop("first") == 0, (
        "no checkpoint was restored"
    )
    equal = all(np.array_equal(undisturbed[name], interrupted[name]) for name in undisturbed)
    share = float(interrupted["share"])
    return float(undisturbed["loss"]), float(interrupted["loss"]), equal, share


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=METHODS, help="one method; default: all")
    parser.add_argument("--steps", type=int, default=STEPS)
    for name in ("rank", "port", "killed-at"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        train(
            options.method,
            options.rank,
            options.port,
            options.folder,
            options.killed_at,
            options.steps,
        )
        return
    print(f"{'method':18} {'undisturbed':>12} {'interrupted':>12}  parameters  share of the state")
    for method in [options.method] if options.method else METHODS:
        undisturbed, interrupted, equal, share = compare(method, options.steps)
        print(
            f"{method:18} {undisturbed:12.6f} {interrupted:12.6f}  "
            f"{'equal' if equal else 'DIFFERENT':10}  {share:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
