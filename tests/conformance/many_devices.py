"""Eight devices against one: prints "check method figure" for each result.

`test_many_devices.py` runs it in a process that has eight devices."""

import functools
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conformance import cases
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_curv

MESH = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
BOTH = NamedSharding(MESH, P(("data", "model")))
SPECS = {
    "w": P("model", "data"),
    "b": P("data"),
    "scalar": P(),
    "tensor": P(None, "data"),
    "none": None,
}
LAYERS, WIDTH, TOKENS = 16, 32, 128


def report(check, name, figure):
    print(check, name, float(figure), flush=True)


def step_difference(step, reference):
    """That of two (updates, state): updates are one vector, and compared as one."""
    vectors = [
        jnp.concatenate([jnp.ravel(np.asarray(x)) for x in jax.tree.leaves(s[0])])
        for s in (step, reference)
    ]
    return max(difference(*vectors), difference(step[1], reference[1]))


def difference(tree, reference):
    """The largest difference of two trees, relative to the largest entry of each leaf."""

    def of_leaf(x, y):
        x, y = np.asarray(x), np.asarray(y)
        return np.max(np.abs(x - y), initial=0) / max(np.max(np.abs(y), initial=0), 1e-30)

    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
    return max(of_leaf(x, y) for x, y in pairs if jnp.issubdtype(x.dtype, jnp.floating))


def compare_with_one_device(name):
    """One step with sharded leaves, and one inside shard_map, against the step on one device."""
    case = cases.CASES[name]
    tx = case.make(**case.devices) if case.devices else case.transformation()
    arrays = case.extras(np.random.default_rng(0))
    params, grads = cases.tree(0), cases.tree(1)
    state = tx.init(params)

    def update(grads, state, params, arrays):
        updates, state = tx.update(grads, state, params, **arrays, **case.static())
        # Where SOAP's bases are arbitrary, see the registry, they are not compared.
        compared = state
        if case.devices and hasattr(state, "moments"):  # in bases that are arbitrary
            compared = state._replace(bases=None, moments=None)
        return updates, compared

    expected = jax.jit(update)(grads, state, params, arrays)
    placed = {k: None if x is None else NamedSharding(MESH, SPECS[k]) for k, x in params.items()}
    everywhere = jax.tree.map(lambda _: NamedSharding(MESH, P()), (state, arrays))
    sharded, (state_there, arrays_there) = (
        jax.device_put((grads, params), (placed, placed)),
        jax.device_put((state, arrays), everywhere),
    )
    step = jax.jit(update, out_shardings=(placed, NamedSharding(MESH, P())))
    report(
        "auto",
        name,
        step_difference(step(sharded[0], state_there, sharded[1], arrays_there), expected),
    )

    def member(*given):  # each device its own, here equal ones, from the start
        grads, params, arrays = jax.tree.map(lambda x: x[0], given)
        stepped = update(grads, tx.init(params), params, arrays)
        return jax.tree.map(lambda x: x[None], stepped)

    mapped = jax.jit(jax.shard_map(member, mesh=MESH, in_specs=BOTH.spec, out_specs=BOTH.spec))
    eight = jax.tree.map(lambda x: jnp.stack([x] * 8), (grads, params, arrays))
    last = jax.tree.map(lambda x: x[-1], mapped(*eight))
    report("shard_map", name, step_difference(last, expected))


def compare_capture():
    """Gradients and factors of a batch on all devices, against one device; in float64."""
    jax.config.update("jax_enable_x64", True)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"w": (5, 6), "b": (5,), "s": (5,), "v": (2, 5)}
    params = {
        name: jax.random.normal(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)
    }
    x = jax.random.normal(jax.random.key(1), (16, 6))

    def net(p, x):
        return p["v"] @ (jnp.tanh(p["w"] @ x + p["b"]) * p["s"])

    def loss(p, x):
        slope = jax.vmap(jax.jacfwd(net, argnums=1), (None, 0))(p, x)
        return jnp.mean(
            jnp.sum(slope**2, (1, 2)) + jnp.sum(jax.vmap(net, (None, 0))(p, x) ** 2, -1)
        )

    take = optax_curv.value_grad_and_curvature(loss, sharing="reduce")
    expected = jax.jit(take)(params, x)
    for way, kind in (("auto", AxisType.Auto), ("explicit", AxisType.Explicit)):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        there = jax.device_put(
            (params, x), (NamedSharding(mesh, P()), NamedSharding(mesh, P("data")))
        )
        report(way, "capture", difference(jax.jit(take)(*there), expected))

    def of_device(params, x):
        value, grads, curvature = take(jax.tree.map(lambda p: p + 0 * jnp.sum(x), params), x)
        return jax.tree.map(
            lambda x: jax.lax.pmean(x, ("data", "model")), (value, grads, drop_counts(curvature))
        )

    def drop_counts(curvature):
        return {name: factors[:2] for name, factors in curvature.items()}

    specs = P(), P(("data", "model"))
    mapped = jax.jit(jax.shard_map(of_device, mesh=MESH, in_specs=specs, out_specs=P()))(params, x)
    report("shard_map", "capture", difference(mapped, (*expected[:2], drop_counts(expected[2]))))
    jax.config.update("jax_enable_x64", False)


def equal_layers():
    """Gradients of equal leaves, and with an embedding, and layers and statistics of all."""
    rng = np.random.default_rng(0)
    sizes = {f"layer{i:02d}": (WIDTH, WIDTH) for i in range(LAYERS)} | {"tokens": (TOKENS, 8)}
    grads = {name: rng.normal(size=size) for name, size in sizes.items()}
    kinds = {name: "embedding" if name == "tokens" else "dense" for name in sizes}
    layers = optax_curv.Layers(
        [optax_curv.Layer(x, kinds[x], f"['{x}']", None, *size) for x, size in sizes.items()]
    )

    def second_moment(size, kind="dense"):
        rows = rng.normal(size=(2 * WIDTH, size))
        return np.mean(rows**2, 0) if kind == "embedding" else rows.T @ rows / len(rows)

    factors = {
        x: optax_curv.KroneckerFactors(
            second_moment(rows, kinds[x]), second_moment(columns), np.int32(1)
        )
        for x, (rows, columns) in sizes.items()
    }
    equal = {name: g for name, g in grads.items() if name != "tokens"}
    return equal, grads, layers, factors


def measure_division():
    """FLOPs of one device, with sharding= over without, and what changes with it in float64."""
    jax.config.update("jax_enable_x64", True)
    equal, grads, layers, factors = equal_layers()
    moments = {x: optax_curv.EigenbasisMoments(*f, np.square(grads[x])) for x, f in factors.items()}
    of_factors, of_moments = ({"curvature": x} for x in (factors, moments))
    makers = {
        "scale_by_kfac": (
            lambda **x: optax_curv.scale_by_kfac(layers, 1e-2, invert_every=2, **x),
            *(grads, of_factors),
        ),
        "scale_by_ekfac": (
            lambda **x: optax_curv.scale_by_ekfac(layers, 1e-2, invert_every=2, **x),
            *(grads, of_moments),
        ),
        "scale_by_adam_in_basis": (
            lambda **x: optax_curv.scale_by_adam_in_basis(layers, basis_every=2, **x),
            *(grads, of_factors),
        ),
        "scale_by_input_factor": (
            lambda **x: optax_curv.scale_by_input_factor(layers, every=2, **x),
            *(grads, of_factors),
        ),
        "scale_by_kron_psgd": (
            lambda sharding: optax_curv.scale_by_kron_psgd(b1=0.9, factor_sharding=sharding),
            *(equal, {}),
        ),
        "scale_by_shampoo": (optax_curv.scale_by_shampoo, equal, {}),
        "scale_by_soap": (optax_curv.scale_by_soap, equal, {}),
    }
    for name, (make, grads, arrays) in makers.items():
        flops, results, moved = [], [], 0
        for sharding in (None, BOTH):
            tx = make(sharding=sharding)
            step = jax.jit(lambda g, state, arrays, tx=tx: tx.update(g, state, None, **arrays))
            places = (BOTH, NamedSharding(MESH, P())) if sharding else (None, None)
            rolled = [jax.tree.map(lambda x, i=i: np.roll(x, i, 1), grads) for i in range(3)]
            *steps, given = jax.device_put((*rolled, arrays), (*[places[0]] * 3, places[1]))
            state = jax.jit(tx.init)(steps[0])
            compiled, found = step.lower(steps[0], state, given).compile(), []
            flops.append(compiled.cost_analysis()["flops"])
            for gradient in steps:
                before = state
                updates, state = compiled(gradient, before, given)
                found.append(updates)
                pairs = zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True)
                moved += sum(x.sharding != y.sharding for x, y in pairs if x.ndim >= 2)
            results.append(found)
        report("flops", name, flops[1] / flops[0])
        report("divided", name, difference(results[1], results[0]))
        report("sharding", name, moved)
    jax.config.update("jax_enable_x64", False)


def compare_owners():
    """Three steps of rows that are owned, against one device in float64; and the compiled step."""
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    shapes = {**{f"w{i}": (12, 8) for i in range(5)}, "v": (9, 24), "b": (8,)}
    specs = dict.fromkeys(shapes, P("data", "model"))
    specs |= {"v": P(None, ("data", "model")), "b": P(("data", "model"))}
    placed = {name: NamedSharding(MESH, spec) for name, spec in specs.items()}
    params, *grads = ({x: rng.normal(size=s) for x, s in shapes.items()} for _ in range(4))
    for name, options in cases.OWNED.items():
        results = []
        for place, sharding in ((None, None), (placed, MESH)):
            tx = getattr(optax_curv, name)(**options, sharding=sharding)
            there = [jax.device_put(x, place) for x in (params, *grads)]
            state, found = tx.init(there[0]), []
            step = jax.jit(tx.update).lower(there[1], state, there[0]).compile()
            for gradient in there[1:]:  # which a state that lies elsewhere would end
                updates, state = step(gradient, state, there[0])
                found.append(updates)
            results.append(found)
        report("owned", name, difference(results[1], results[0]))
        arrays = jax.tree.leaves(state)
        own = [s.data.nbytes for x in arrays for s in x.addressable_shards if s.device.id == 0]
        report("share", name, sum(own) / sum(x.nbytes for x in arrays))
        kept = [updates[x].sharding.is_equivalent_to(placed[x], updates[x].ndim) for x in placed]
        report("kept", name, all(kept))
        sizes = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", step.as_text())
        report("gathers", name, sum(math.prod(map(int, size.split(","))) > 8 for size in sizes))
        known = optax_curv.state_shardings(tx, there[0])
        same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y, x.ndim), state, known)
        report("known", name, all(jax.tree.leaves(same)))
    jax.config.update("jax_enable_x64", False)


def compare_lazy_rows():
    """Rows that are never stored, of examples that lie on all devices: result and FLOPs."""
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(16, 32))), "v": jnp.asarray(rng.normal(size=32))}
    tx = optax_curv.scale_by_branch_fisher(0.1, solver="woodbury", momentum=0.5)

    def log_psi(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    @jax.jit
    def step(x):
        rows = optax_curv.lazy_rows(log_psi, params, x, chunk_size=64)
        return tx.update(params, tx.init(params), params, branches=rows)[0]

    x = jnp.asarray(rng.normal(size=(192, 16)))
    placed = jax.device_put(x, NamedSharding(MESH, P(("data", "model"))))
    report("lazy", "difference", difference(step(placed), step(x)))
    flops = [step.lower(y).compile().cost_analysis()["flops"] for y in (placed, x)]
    report("lazy", "flops", flops[0] / flops[1])
    jax.config.update("jax_enable_x64", False)


def compare_rows():
    """Three steps with rows of examples that lie on all devices, against one device in float64."""
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    shapes, specs = {"w": (16, 24), "v": (8,)}, {"w": P("data", "model"), "v": P("model")}
    params = {x: rng.normal(size=shape) for x, shape in shapes.items()}
    rows = {x: rng.normal(size=(64, *shape)) for x, shape in shapes.items()}
    place = {x: NamedSharding(MESH, spec) for x, spec in specs.items()}
    examples = NamedSharding(MESH, P(("data", "model")))
    loss = lambda p: sum(jnp.sum(x**2) for x in p.values())  # noqa: E731
    fisher = {"damping": 0.1, "momentum": 0.5}
    makers = {
        "woodbury": lambda **x: optax_curv.scale_by_branch_fisher(**fisher, solver="woodbury", **x),
        "auto": lambda **x: optax_curv.branch_fisher(0.1, **fisher, solver="auto", **x),
        "cholesky": lambda **x: optax_curv.scale_by_branch_fisher(0.1, solver="cholesky", **x),
        "cg": lambda **x: optax_curv.scale_by_branch_fisher(0.1, solver="cg", **x),
        "levenberg": lambda **x: optax_curv.levenberg_marquardt(momentum=0.5, **x),
        "gauss_newton": lambda **x: optax_curv.gauss_newton(0.1, max_iters=5, **x),
        "branch_kfac": lambda **x: optax_curv.branch_kfac(0.1, **x),
    }
    for name, make in makers.items():
        found = []
        for mesh in (None, MESH):
            own = make(sharding=mesh)
            there = jax.device_put(params, mesh and place)
            given = jax.device_put(rows, mesh and examples)
            of_state = jax.device_put(rows["v"], mesh and examples)

            @jax.jit
            def step(params, state, given, of_state, tx=own, name=name):
                extras = {"branches": of_state if name == "branch_kfac" else given}
                extras |= {"value": loss(params), "value_fn": loss}
                extras |= {"curvature_product": lambda v: v}
                return tx.update(params, state, params, **extras)

            state = own.init(there)
            compiled, steps = step.lower(there, state, given, of_state).compile(), []
            for _ in range(3):  # which a state that lies elsewhere would end
                updates, state = compiled(there, state, given, of_state)
                steps.append(updates)
            found.append(steps)
        report("rows", name, difference(found[1], found[0]))
        gathers = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
        largest = max([math.prod(map(int, x.split(","))) for x in gathers], default=0)
        report("row_gathers", name, largest)
    jax.config.update("jax_enable_x64", False)


def compare_resumed():
    """Micro-batches with donated state on 8 devices, resumed on 4 and on 1, against 1 alone."""
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    shapes = {"u": (4, 3), "v": (4, 3), "w": (3, 3)}
    params, *grads = ({x: rng.normal(size=s) for x, s in shapes.items()} for _ in range(5))
    rows = [{x: [rng.normal(size=(9, d)) for d in s] for x, s in shapes.items()} for _ in grads]
    layers = optax_curv.Layers(
        [optax_curv.Layer(x, "dense", f"['{x}']", None, *s) for x, s in shapes.items()]
    )
    moments = jax.tree.map(lambda x: x.T @ x / len(x), rows)
    curvatures = [
        {x: optax_curv.KroneckerFactors(*both, np.int32(1)) for x, both in m.items()}
        for m in moments
    ]

    @functools.cache
    def stepped(mesh):
        tx = optax_curv.scale_by_kfac(layers, invert_every=2, sharding=mesh)
        tx = optax.MultiSteps(tx, 2)
        return tx, jax.jit(tx.update, donate_argnums=1)

    def run(mesh, saved, steps):
        (tx, step), place = stepped(mesh), mesh and NamedSharding(mesh, P())
        there = jax.device_put(params, place)
        state = jax.jit(tx.init)(there) if saved is None else fitted(tx, saved, there)
        mean = steps[0][1]
        for count, (gradient, curvature) in enumerate(steps):
            mean = optax_curv.average_curvature(mean, curvature, count % 2)
            before, given = state, jax.device_put((gradient, mean), place)
            updates, state = step(given[0], before, there, curvature=given[1])
            assert all(x.is_deleted() for x in jax.tree.leaves(before))
        return updates, state

    def fitted(tx, saved, params):
        """The state with as many rows as another mesh wants, zeros or none, as Orbax does."""

        def of_array(x, like):
            x = x[: len(like)] if like.ndim else x
            more = [(0, n - m) for n, m in zip(like.shape, x.shape, strict=True)]
            return np.pad(x, more) if more else x

        state = jax.tree.map(of_array, saved, jax.eval_shape(tx.init, params))
        return jax.device_put(state, optax_curv.state_shardings(tx, params))

    steps = list(zip(grads, curvatures, strict=True))
    saved = jax.tree.map(np.asarray, run(MESH, None, steps[:2])[1])
    expected = run(None, None, steps)[0]
    assert all(np.any(x) for x in expected.values())
    small = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    for devices, mesh in {4: small, 1: None}.items():
        report("resumed", devices, difference(run(mesh, saved, steps[2:])[0], expected))
    jax.config.update("jax_enable_x64", False)


def compare_refusals():
    """Whether what cannot be is a ValueError that names both sides."""
    params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}
    other = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    small = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    layers = optax_curv.Layers([optax_curv.Layer("a", "dense", "['a']", None, 4, 4)])
    tx = optax_curv.soap(0.1, sharding=MESH)

    def updated(tx, state=None):
        state = tx.init(params) if state is None else state
        return jax.eval_shape(tx.update, params, state, params)

    def elsewhere():
        with jax.set_mesh(other):
            tx.init(params)

    def manual():
        jax.shard_map(lambda p: tx.init(p), mesh=MESH, in_specs=P(), out_specs=P())(params)

    def wrong(name):
        return lambda: getattr(optax_curv, name)(0.1, sharding=P("data"))

    others = "dense_psgd", "lra_psgd", "branch_fisher", "branch_kfac", "gauss_newton"
    refusals = {name: (wrong(name), [name, "sharding", "Mesh", "'data'"]) for name in others} | {
        "axis": (lambda: optax_curv.soap(0.1, sharding=NamedSharding(MESH, P("x"))), ["x", "data"]),
        "spec": (lambda: optax_curv.soap(0.1, sharding=P("data")), ["sharding", "Mesh", "'data'"]),
        "mesh": (elsewhere, ["sharding=", "data", "rows"]),
        "manual": (manual, ["sharding=", "'model'", "manual"]),
        "layers": (
            lambda: optax_curv.soap(0.1, layers=layers, sharding=MESH).init(params),
            ["['a']", "['w']"],
        ),
        "table": (
            lambda: optax_curv.soap(0.1, adam_for={"w": True}, sharding=MESH).init(params),
            ["adam_for", "['v']"],
        ),
        "geometry": (
            lambda: updated(optax_curv.soap(0.1, sharding=small), jax.eval_shape(tx.init, params)),
            ["(8, 4, 4)", "(4, 4, 4)"],
        ),
    }
    for name, (make, parts) in refusals.items():
        message = ""
        try:
            make()
        except ValueError as error:
            message = str(error)
        missing = [part for part in parts if part not in message]
        print(missing, message, file=sys.stderr) if missing else None
        report("refused", name, not missing)


def read_explicit_states():
    """Factors, figures and bases of states whose shardings are part of their types."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    params = jax.device_put({"w": jnp.ones((16, 8))}, NamedSharding(mesh, P("data")))
    layers = optax_curv.Layers([optax_curv.Layer("w", "dense", "['w']", None, 16, 8)])
    kfac, ekfac = (
        make(layers, sharding=mesh).init(params)
        for make in (optax_curv.scale_by_kfac, optax_curv.scale_by_ekfac)
    )
    with jax.set_mesh(mesh):
        read = jax.jit(lambda x, y: (x.factors, x.diagnostics, optax_curv.eigenbasis(y)))
        found = read(kfac, ekfac)
    assert found[0]["w"].input_factor.shape == found[2]["w"].input_basis.shape == (16, 16)
    tables = optax_curv.layer_diagnostics(kfac), optax_curv.diagnostics.curvature_table(ekfac)
    report("read", "explicit", all("w" in table for table in tables))


def count_compilations():
    """Of three steps on explicit axes, of equal leaves that are sharded in two ways."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"w": P("data", "model"), "v": P("model", "data"), "b": P("model")}
    place = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    arrays = {"w": jnp.eye(8) + 0.1, "v": jnp.eye(8), "b": jnp.ones(8)}  # of full rank
    params = jax.device_put(arrays, place)
    layers = optax_curv.Layers(
        [optax_curv.Layer(x, "dense", f"['{x}']", None, 8, 8) for x in ("w", "v")]
        + [optax_curv.Layer("b", "shift", None, "['b']", 0, 8)]
    )
    statistics = {
        x: optax_curv.KroneckerFactors(jnp.eye(1 if x == "b" else 8), jnp.eye(8), jnp.int32(1))
        for x in specs
    }
    makers = {
        "scale_by_kfac": lambda **x: optax_curv.scale_by_kfac(layers, **x),
        "shampoo": lambda **x: optax_curv.shampoo(0.1, **x),
        "scale_by_kron_psgd": optax_curv.scale_by_kron_psgd,
        "scale_by_lra_psgd": optax_curv.scale_by_lra_psgd,
    }
    for name, make in makers.items():
        alone = make(sharding=None)
        given = {"curvature": statistics}
        expected, _ = jax.jit(alone.update)(arrays, alone.init(arrays), arrays, **given)
        for sharding in (None, mesh):
            tx = make(sharding=sharding)
            state, step = tx.init(params), jax.jit(tx.update)
            given = {"curvature": jax.device_put(statistics, NamedSharding(mesh, P()))}
            for _ in range(3):
                _, state = step(params, state, params, **given)
            report("compiled", f"{name},{sharding is not None}", step._cache_size())
            first, _ = step(params, tx.init(params), params, **given)
            report("typed", f"{name},{sharding is not None}", difference(first, expected))


COMPARED = [x for x, case in cases.CASES.items() if not isinstance(case.devices, str)]

if __name__ == "__main__":
    assert jax.device_count() == 8, "set XLA_FLAGS=--xla_force_host_platform_device_count=8"
    jax.config.update("jax_disable_most_optimizations", True)
    others = {"division": measure_division, "capture": compare_capture, "owners": compare_owners}
    others |= {"lazy": compare_lazy_rows, "resumed": compare_resumed, "refused": compare_refusals}
    others |= {"read": read_explicit_states, "compiled": count_compilations}
    others["rows"] = compare_rows
    for name in sys.argv[1:] or [*COMPARED, *others]:
        if name in others:
            others[name]()
        else:
            compare_with_one_device(name)
