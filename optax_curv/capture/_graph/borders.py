"""Marks of variables as they pass the borders of bodies: calls, branches, and steps of scans."""

from optax_curv.capture._graph import views
from optax_curv.capture._graph.marks import LOST, Batch, Mark, Seed, known_batch


def at_boundary(mark: Mark) -> Mark:
    """The mark inside a body: coefficients of leaves are variables of the jaxpr outside."""
    leaves = tuple(
        views.as_made(view) if view.coefficients + view.divisors else view for view in mark.leaves
    )
    return mark._replace(output=None, leaves=leaves)


def _as_derived(mark: Mark, reason: str) -> Mark:
    """The mark of an array made of the leaves in a way no layer describes."""
    made = tuple((view.source, reason) for view in mark.leaves)
    return mark._replace(leaves=(), derived=mark.derived + made)


def any_varies(marks) -> bool:
    """Whether one of several variables may be another one at each step of a scan."""
    return any(mark.varies for mark in marks)


def carried(mark: Mark) -> Mark:
    """The mark of what a scan carries on and changes."""
    reason = "it is carried through a scan that changes it"
    return _as_derived(mark, reason)._replace(varies=True)


def either(marks) -> Mark:
    """The mark of a variable that is one of several."""
    leaves = marks[0].leaves if all(mark.leaves == marks[0].leaves for mark in marks) else ()
    derived = dict(entry for mark in marks for entry in mark.derived)
    if not leaves:
        reason = "it is one of several results of a cond"
        derived |= {view.source: reason for mark in marks for view in mark.leaves}
    uses = dict.fromkeys(seed.use for mark in marks for seed in mark.seeds)
    return Mark(
        leaves=leaves,
        joined=marks[0].joined,
        batch=known_batch(marks),
        derived=tuple(derived.items()),
        seeds=tuple(Seed(use, None) for use in uses),
        varies=any_varies(marks),
    )


def after_step(mark: Mark, depth: int) -> Mark:
    """The mark of a carry after a step; one that runs from example to example mixes them."""
    mixed = mark.batch is not None and mark.batch.loop == depth
    return mark._replace(leaves=(), output=None, batch=LOST if mixed else mark.batch)


def slice_of(mark: Mark, depth: int, by_example: bool) -> Mark:
    """The mark of one slice of the leading axis in a scan at this depth.

    With `by_example` the scan has as many steps as there are examples.
    """
    entered = [views.enter_loop(view, depth) for view in mark.leaves]
    leaves = tuple(view for view in entered if view is not None)
    batch = mark.batch
    if batch is not None and batch.axis is not None:
        one = batch.inner == 1 and by_example
        first = Batch(None, loop=depth) if one else LOST
        batch = first if batch.axis == 0 else batch._replace(axis=batch.axis - 1)
    if len(leaves) != len(mark.leaves) or len(leaves) > 1:
        return Mark(batch=batch, derived=carried(mark).derived, seeds=_unseen(mark), varies=True)
    return Mark(leaves, batch=batch, derived=mark.derived, seeds=_unseen(mark), varies=True)


def unsliced(mark: Mark, depth: int) -> Mark:
    """The mark of the results of all steps of a scan at this depth, stacked."""
    batch = mark.batch
    if batch is not None and batch.axis is not None:
        batch = batch._replace(axis=batch.axis + 1)
    elif batch is not None and batch.loop == depth:
        batch = Batch(0)
    return Mark(batch=batch, derived=carried(mark).derived, seeds=_unseen(mark))


def _unseen(mark: Mark) -> tuple[Seed, ...]:
    """The seeds of a variable that is no view of an output."""
    return tuple(Seed(seed.use, None) for seed in mark.seeds)
