"""Writes the table of the zoo, a page of the documentation: `python tests/zoo/table.py`.

Names of files, such as `in_haiku`, write their rows anew and keep all others; `--rows FILE` takes
rows that a run of the tests has left in ZOO_ROWS.
"""

import argparse
import importlib
import json
import pathlib

FOLDER = pathlib.Path(__file__).parent
PAGE = FOLDER.parent.parent / "docs" / "zoo.md"
KEPT = FOLDER / "rows.json"
HEAD = """# Networks that were tried

Tiny configurations of published networks with random weights, three examples each; `.ci/run zoo`
checks them every week and `python tests/zoo/table.py` writes this page. *Leaves* and *kernels*
(leaves of two axes or more) are those that a layer covers. *Factors* is the largest difference of a
factor from the mean over single examples, relative to its largest entry; where examples meet in the
network (marked ×) it is that from the same batch given twice. *Loss* is that before and after 20
steps of `kfac(0.03, layers, invert_every=1)` on one batch, the leaves in no layer by Adam.

"""


def cells(row):
    """One network's row as text."""
    measured = row["factor_error"] is not None
    factor = f"{row['factor_error']:.0e}" if measured else "not measured"
    return (
        row["name"].replace("_", " "),
        f"{row['covered']} / {row['leaves']}",
        f"{row['covered_kernels']} / {row['kernels']}",
        factor + (" ×" if row["mixes"] else ""),
        f"{row['first']:.3g} → {row['last']:.3g}" if measured else "not measured",
    )


def page(rows):
    """The page of these rows."""
    text = HEAD
    kernels = sum(row["kernels"] for row in rows)
    covered = sum(row["covered_kernels"] for row in rows)
    measured = sum(row["factor_error"] is not None for row in rows)
    text += f"{len(rows)} networks, {measured} of them measured when this page was written; layers "
    text += f"cover {covered} of {kernels} kernels.\n"
    for source in dict.fromkeys(row["source"] for row in rows):
        own = [row for row in rows if row["source"] == source]
        text += f"\n## {source}\n\n| network | leaves | kernels | factors | loss |\n"
        text += "|---|---|---|---|---|\n"
        text += "".join("| " + " | ".join(cells(row)) + " |\n" for row in own)
        reasons = [(row["name"], reason) for row in own for reason in row["reasons"]]
        if reasons:
            text += "\nIn no layer:\n\n"
            text += "".join(f"- {name.replace('_', ' ')}: `` {r} ``\n" for name, r in reasons)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="such as in_haiku; all of them by default")
    parser.add_argument("--rows", type=pathlib.Path, help="a file of rows, one a line")
    given = parser.parse_args()
    rows = {}
    if KEPT.exists():
        rows = {(row["source"], row["name"]): row for row in json.loads(KEPT.read_text())}
    if given.rows:
        new = [json.loads(line) for line in given.rows.read_text().splitlines()]
    else:
        new = list(measured(given.files))
    rows |= {(row["source"], row["name"]): row for row in new}
    ordered = [rows[key] for key in sorted(rows)]
    KEPT.write_text("[\n" + ",\n".join(map(json.dumps, ordered)) + "\n]\n")
    PAGE.write_text(page(ordered))


def measured(files):
    """Rows of the networks in these files, or in all."""
    from zoo.catalogue import MODULES, as_json, of_source, row_of

    for name in files or MODULES:
        for network in of_source(importlib.import_module(f"zoo.{name}").SOURCE):
            print(network, flush=True)
            yield as_json(row_of(network))


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(FOLDER.parent))
    main()
