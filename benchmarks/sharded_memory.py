"""What a step holds, moves and factorises on each of many devices; it is compiled and never run.

``python -m benchmarks.sharded_memory --methods shampoo soap --models gpt2 llama --devices 1 8 64``

Each line is one compiled `update` with a donated state, of one of the devices of XLA's CPU:

* state: what the state takes there, and that times the devices over the whole state of one device;
* temporaries: the largest that a step holds beside its arguments and results;
* moved: bytes of all results of collectives, over the bytes of the parameters a device holds, for
  each mesh axis over which these are split;
* gathered: the largest result of an all-gather;
* factorised: the matrices that a device decomposes where a step renews all of them, and the least
  number, were those of every width divided evenly;
* instructions of the optimised program, and these over those on the fewest devices of several.

Meshes are ``fsdp``, every leaf split over all devices, and ``megatron``, kernels split in rows and
columns over (devices / 2, 2). Gradients are float32; embeddings and output layers go to Adam.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_curv

METHODS = ("shampoo", "soap", "kron_psgd")
BYTES = {"f64": 8, "f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FACTORISES = re.compile(r'custom_call_target="\w*(?:syevd|geqrf|potrf|Eigh|Qr|Cholesky)')
COLUMNS = ("method", "model", "mesh", "devices", "state MB", "of its share", "temporaries MB")
COLUMNS += ("moved", "gathered MB", "factorised", "at least", "instructions", "growth", "compile s")


def gpt2():
    """Shapes of GPT-2 with 124 million parameters."""
    d, block = 768, {}
    block |= {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
    block |= {"norm_1": (d,), "norm_2": (d,), "qkv_bias": (3 * d,), "up_bias": (4 * d,)}
    blocks = {f"block_{i}": block | {"out_bias": (d,), "down_bias": (d,)} for i in range(12)}
    return blocks | {"embedding": (50257, d), "positions": (1024, d)}


def llama():
    """Shapes of Llama with 7 billion parameters."""
    d, width = 4096, 11008
    block = dict.fromkeys(("query", "key", "value", "out"), (d, d))
    block |= {"gate": (d, width), "up": (d, width), "down": (width, d)}
    blocks = {f"block_{i}": block | {"norm_1": (d,), "norm_2": (d,)} for i in range(32)}
    return blocks | {"embedding": (32000, d), "head": (d, 32000)}


MODELS = {"gpt2": gpt2, "llama": llama}


def spec_of(name, shape, kind, devices):
    """How a leaf is split."""
    axes = ("data", "model") if kind == "megatron" else "data"
    if len(shape) == 1:
        return P() if kind == "megatron" else P("data")
    if shape[0] % devices:
        return P(None, axes)
    if kind == "fsdp":
        return P("data")
    return P("model", "data") if name in ("out", "down", "embedding") else P("data", "model")


def parsed(text):
    """({name: lines} of a program's computations, the entry's name)."""
    bodies, name, entry = {}, "", ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name, bodies[head[2]] = head[2], []
            entry = head[2] if head[1] else entry
        elif " = " in line:
            bodies[name].append(line.split(" = ", 1)[1])
    return bodies, entry


def shapes_in(text):
    """Pairs (dtype, sizes) of the arrays of a result."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", text)
    return [(x, [int(d) for d in dims.split(",") if d]) for x, dims in found if x in BYTES]


def counted(bodies, name):
    """(bytes moved, largest gather, matrices factorised) of a computation with all that it calls.

    Loops count by their trips, and of a conditional's branches the one that factorises most.
    """
    moved = gathered = factorised = 0
    for line in bodies[name]:
        result, _, rest = line.partition(") " if line.startswith("(") else " ")
        kind = re.match(r"[\w\-]+", rest)
        kind = kind[0].removesuffix("-start") if kind else ""
        if kind in COLLECTIVES:
            size = sum(BYTES[x] * math.prod(dims) for x, dims in shapes_in(result))
            moved, gathered = moved + size, max(gathered, size * (kind == "all-gather"))
        if FACTORISES.search(line):
            factorised += max(math.prod(d[:-2]) for _, d in shapes_in(result) if len(d) > 1)
        called = [counted(bodies, x) for x in re.findall(r"%([\w.\-]+)", rest) if x in bodies]
        if not called:
            continue
        trips = re.search(r"known_trip_count\":\{\"n\":\"(\d+)", rest)
        times = int(trips[1]) if trips else 1
        if kind == "conditional":
            called = [max(called, key=lambda x: x[2])]
        moved += times * sum(x[0] for x in called)
        gathered = max(gathered, *(x[1] for x in called))
        factorised += times * sum(x[2] for x in called)
    return moved, gathered, factorised


def made(method, **options):
    """The transformation; embeddings and the output layer go to Adam where it takes them."""
    if method != "kron_psgd":
        options["adam_for"] = lambda path, leaf: "block" not in jax.tree_util.keystr(path)
    return getattr(optax_curv, method)(1e-2, **options)


def held(structs):
    """Bytes of the largest part that a device holds of arrays with these shardings."""
    return sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)
        for x in jax.tree.leaves(structs)
    )


def least_factorised(method, state, devices):
    """The matrices that a device decomposes where those of every width are divided evenly."""
    if method == "kron_psgd":
        return 0
    counts = {}
    for x in jax.tree.leaves(state[0].factors):
        if x.ndim == 3:  # a factor, or a pair of a factor and its root
            counts[x.shape[1]] = counts.get(x.shape[1], 0) + x.shape[0]
    return sum(-(-count // devices) for count in counts.values())


def measured(method, model, kind):
    """One line of the table, on the devices of this process."""
    devices = jax.device_count()
    shape = (devices // 2, 2) if kind == "megatron" else (devices,)
    names = ("data", "model")[: len(shape)]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))

    def placed(path, shape):
        spec = spec_of(path[-1].key, shape, kind, devices)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    params = jax.tree.map_with_path(placed, MODELS[model](), is_leaf=is_shape)
    tx = made(method, sharding=mesh if devices > 1 else None)
    state = jax.tree.map(
        lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y),
        jax.eval_shape(tx.init, params),
        optax_curv.state_shardings(tx, params),
    )
    start = time.perf_counter()
    compiled = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    seconds = time.perf_counter() - start
    moved, gathered, factorised = counted(*parsed(compiled.as_text()))
    of_one = jax.eval_shape(made(method).init, params)
    alone = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(of_one))
    return {
        "method": method,
        "model": model,
        "mesh": kind if devices > 1 else "-",
        "devices": devices,
        "state MB": round(held(state) / 1e6),
        "of its share": round(held(state) * devices / alone, 2),
        "temporaries MB": round(compiled.memory_analysis().temp_size_in_bytes / 1e6),
        "moved": round(moved / held(params) / len(shape), 2),
        "gathered MB": round(gathered / 1e6, 1),
        "factorised": factorised,
        "at least": least_factorised(method, of_one, devices),
        "instructions": compiled.as_text().count(" = "),
        "compile s": round(seconds),
    }


def in_process(devices, *arguments):
    """`measured` in a process with so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "benchmarks.sharded_memory", "--one", *arguments]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Prints the table, line by line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["gpt2"])
    parser.add_argument("--meshes", nargs="+", choices=("fsdp", "megatron"), default=["fsdp"])
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(*options.one)))
        return
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for model in options.models:
        for kind in options.meshes:
            for method in options.methods:
                first = None
                for devices in options.devices:
                    line = in_process(devices, method, model, kind)
                    if devices > 1:
                        first = first or line["instructions"]
                    line["growth"] = "-" if devices == 1 else round(line["instructions"] / first, 2)
                    print("| " + " | ".join(str(line[x]) for x in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
    main()
