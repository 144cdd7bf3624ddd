"""What a type checker sees: documented calls pass, wrong ones do not, and types are known."""

import functools
import importlib.metadata
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "typing"
KNOWN = 0.95  # of the public symbols
CALLS = 20

pytestmark = pytest.mark.skipif(
    shutil.which("pyright") is None, reason="pyright is not installed; the extra `dev` has it"
)


def pyright(*arguments):
    """What pyright reports, as it reports it to editors."""
    command = ["pyright", "--outputjson", "--pythonpath", sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    return json.loads(done.stdout)


@functools.cache
def errors():
    """{file: {line: message}} of both files."""
    found = {"usage.py": {}, "wrong.py": {}}
    for report in pyright(*(FOLDER / name for name in found))["generalDiagnostics"]:
        if report["severity"] == "error":
            name = pathlib.Path(report["file"]).name
            found[name][report["range"]["start"]["line"] + 1] = report["message"]
    return found


def test_every_documented_call_is_accepted():
    assert errors()["usage.py"] == {}


def test_wrong_calls_are_refused_at_their_lines():
    lines = (FOLDER / "wrong.py").read_text().splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if "  # wrong: " in line}
    assert len(wrong) == CALLS
    assert set(errors()["wrong.py"]) == wrong


def test_types_of_public_symbols_are_known():
    try:
        importlib.metadata.distribution("optax-curv")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pyright verifies the types of an installed package only")
    found = pyright("--verifytypes", "optax_curv", "--ignoreexternal")["typeCompleteness"]
    unknown = [x["name"] for x in found["symbols"] if x["isExported"] and not x["isTypeKnown"]]
    assert found["completenessScore"] >= KNOWN, unknown
