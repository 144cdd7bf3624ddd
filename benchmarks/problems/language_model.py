"""A language model of byte pairs on the documentation that Python packages ship, attention as Flax
writes it.

Three sizes: S, the problem of this name, and M train on a few cores, L is for an accelerator, where
it computes in bfloat16. The text is that of the docstrings of the packages in `SOURCES` and of
Python's own reference; every tenth file is held out."""

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import pathlib
import pydoc_data.topics
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import optax_curv
from benchmarks.cache import CACHE, complete
from benchmarks.problems import Problem, nnx_networks

SOURCES = ("numpy", "scipy", "scikit-learn", "matplotlib")
FOLDERS = {"scikit-learn": "sklearn"}
SHORTEST = 200  # characters of a docstring; shorter ones say little
HELD_OUT = 10  # every tenth file
WINDOWS = 96  # of the evaluation


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a model is, and how it is trained.

    Attributes:
      vocabulary: number of byte pairs.
      width, heads, depth: of the blocks.
      length: tokens of an example.
      batch: examples of a step.
      steps: of a run.
      dtype: of the arithmetic; parameters are float32.
    """

    vocabulary: int
    width: int
    heads: int
    depth: int
    length: int
    batch: int
    steps: int
    dtype: str = "float32"


SIZES = {
    "S": Size(1024, 96, 4, 4, 64, 8, 2000),
    "M": Size(2048, 192, 6, 6, 128, 8, 1000),
    "L": Size(16384, 768, 12, 16, 1024, 32, 5000, "bfloat16"),
}


def docstrings(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(file, docstring) of the modules, classes and functions of a package, in order of file."""
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder.parent).as_posix()
        if "/test" in name:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text is not None and len(text) >= SHORTEST:
                    yield name, text


def texts() -> tuple[str, str]:
    """(the text to train on, the text that is held out); no docstring stands in it twice."""
    found = [(f"topics/{name}", text) for name, text in sorted(pydoc_data.topics.topics.items())]
    for source in SOURCES:
        spec = importlib.util.find_spec(FOLDERS.get(source, source))
        assert spec is not None and spec.submodule_search_locations is not None
        found += docstrings(pathlib.Path(spec.submodule_search_locations[0]))
    parts: tuple[list[str], list[str]] = [], []
    seen = set()
    for name, text in found:
        if text not in seen:
            seen.add(text)
            number = int(hashlib.sha256(name.encode()).hexdigest(), 16)
            parts[number % HELD_OUT == 0].append(text)
    train, held_out = ("\n\n".join(texts) for texts in parts)
    return train, held_out


def tokens(vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens to train on and those held out, int32 [·]; the byte pairs are the former's own."""
    versions = [f"{source}-{importlib.metadata.version(source)}" for source in SOURCES]
    name = "-".join(["docstrings", *versions, str(vocabulary)])

    def make(folder):
        import tokenizers

        pairs = tokenizers.ByteLevelBPETokenizer()
        train, held_out = texts()
        pairs.train_from_iterator(train.split("\n\n"), vocab_size=vocabulary, show_progress=False)
        for part, text in (("train", train), ("held_out", held_out)):
            ids = [x.ids for x in pairs.encode_batch([t + "\n\n" for t in text.split("\n\n")])]
            np.save(folder / f"{part}.npy", np.concatenate(ids).astype(np.int32))

    folder = complete(CACHE / name, make)
    return np.load(folder / "train.npy"), np.load(folder / "held_out.npy")


def network(size: Size, rngs):
    """The model as nnx has it: a table that is embedding and head, blocks before it in a list."""
    from flax import nnx

    dtype = jnp.dtype(size.dtype)
    small = jax.nn.initializers.normal(0.02)

    class LanguageModel(nnx.Module):
        def __init__(self):
            self.table = nnx.Embed(
                size.vocabulary, size.width, embedding_init=small, dtype=dtype, rngs=rngs
            )
            self.positions = nnx.Param(small(rngs.params(), (size.length, size.width)))
            self.blocks = nnx.List(
                nnx_networks.transformer_block(size.width, size.heads, rngs, dtype)
                for _ in range(size.depth)
            )
            self.norm = nnx.LayerNorm(size.width, dtype=dtype, rngs=rngs)

        def __call__(self, tokens):
            mask = nnx.make_causal_mask(tokens)
            x = self.table(tokens) + self.positions[...].astype(dtype)
            for block in self.blocks:
                x = block(x, mask)
            return self.table.attend(self.norm(x)).astype(jnp.float32)

    return LanguageModel()


def of_size(size: Size) -> Problem:
    """The problem of a size."""
    init, predict = nnx_networks.functions(functools.partial(network, size))
    loss = optax_curv.Objective(predict, "categorical")
    train, held_out = tokens(size.vocabulary)

    def windows(part, rng, count):
        starts = rng.integers(0, len(part) - size.length, count)
        rows = part[starts[:, None] + np.arange(size.length + 1)]
        return jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:])

    def batches(seed, steps):
        rng = np.random.default_rng(seed)
        return (windows(train, rng, size.batch) for _ in range(steps))

    unseen = windows(held_out, np.random.default_rng(0), WINDOWS)
    numbers = sum(x.size for x in jax.tree.leaves(jax.eval_shape(init, 0)))
    return Problem(
        definition=f"Docstrings of {', '.join(SOURCES)} and Python's reference "
        f"({len(train) / 1e6:.1f} million byte pairs, a tenth of the files held out, vocabulary "
        f"{size.vocabulary}), nnx transformer with MultiHeadAttention and a tied table: "
        f"{size.depth} blocks, width {size.width}, {size.heads} heads, {numbers / 1e6:.2f} million "
        f"parameters, {size.length} tokens, batch {size.batch}; loss over {WINDOWS} fixed windows",
        init=init,
        loss=loss,
        batches=batches,
        metrics={"validation loss": lambda params: loss(params, *unseen)},
        steps=size.steps,
        evaluate_every=max(1, size.steps // 80),
        objective=loss,
        adam_for=nnx_networks.adam_for,
    )


def problem() -> Problem:
    """Size S."""
    return of_size(SIZES["S"])
