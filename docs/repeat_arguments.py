"""An alias explains an argument in the words of the transformation that it is made of.

`python docs/repeat_arguments.py` writes the text of every argument that `METHOD` shares with
`scale_by_METHOD` from the docstring of the latter into that of the former. An alias may say more: a
text that begins with the source's stays. `OWN` lists those that differ on purpose.
"""

import inspect
import pathlib
import re
import sys
import textwrap

import optax_curv

WIDTH = 100
# (alias, argument): why its text is not that of its source.
OWN: dict[tuple[str, str], str] = {
    ("ekfac", "kl_clip"): "it bounds the step at the learning rate",
    ("kfac", "damping"): "its default depends on the mode",
    ("kfac", "invert_every"): "its default depends on the mode",
    ("kfac", "kl_clip"): "it bounds the step at the learning rate",
    ("shampoo", "b1"): "only the matrices have this momentum",
    ("shampoo", "layers"): "without them an alias goes by names and shapes",
    ("soap", "layers"): "without them an alias goes by names and shapes",
    ("soap", "b1"): "only the matrices have this momentum",
    ("soap", "b2"): "it is the decay of the factors, too",
    ("soap", "eps"): "V is not a letter of the alias's docstring",
    ("soap", "basis"): "the alias's docstring does not have the step of orthogonal iteration",
}


def pairs():
    """(alias, transformation) of every alias of the package."""
    for name, function in vars(optax_curv).items():
        source = getattr(optax_curv, f"scale_by_{name}", None)
        if source is not None:
            yield function, source


def arguments(function):
    """The text of each argument in a docstring's section `Args:`, on one line."""
    documentation = inspect.getdoc(function) or ""
    found = re.search(r"^Args:\n((?:  .*\n|\n)+)", documentation + "\n", re.MULTILINE)
    texts = {}
    for entry in re.split(r"\n  (?=\S)", "\n" + (found[1] if found else ""))[1:]:
        name, _, text = entry.partition(":")
        texts[name.strip()] = " ".join(text.split())
    return texts


def differing():
    """(alias, argument, text of the source) where the alias does not begin with that text."""
    for alias, source in pairs():
        own, texts = arguments(alias), arguments(source)
        for name in own.keys() & texts.keys():
            is_own = (alias.__name__, name) in OWN
            if not is_own and not own[name].startswith(texts[name].removesuffix(".")):
                yield alias, name, texts[name]


def with_text(source, alias, name, text):
    """The source of a file, with this text for an argument of an alias."""
    start = source.index(f"\ndef {alias}(")
    place = re.compile(rf"^      {re.escape(name)}:(?:.*\n)(?:        .*\n)*", re.MULTILINE)
    wrapped = textwrap.fill(
        f"{name}: {text}",
        WIDTH,
        initial_indent=" " * 6,
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )
    found = place.search(source, source.index("    Args:\n", start))
    return source[: found.start()] + wrapped + "\n" + source[found.end() :]


def main():
    """Rewrites the files of all aliases that differ, and names what was rewritten."""
    for alias, name, text in list(differing()):
        path = pathlib.Path(inspect.getsourcefile(alias))
        path.write_text(with_text(path.read_text(), alias.__name__, name, text))
        print(f"{path.name}: {alias.__name__}({name})")


if __name__ == "__main__":
    sys.exit(main())
