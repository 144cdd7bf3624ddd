import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [
    block.strip()
    for block in re.findall(r"^```sh\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_example_runs_as_printed(number):
    exec(compile(EXAMPLES[number], f"README.md, example {number}", "exec"), {"__name__": "readme"})


def test_the_first_screen_has_a_short_example_and_the_two_commands():
    first_screen = "\n".join(README.splitlines()[:60])
    assert EXAMPLES[0] in first_screen and len(EXAMPLES[0].splitlines()) <= 16
    assert all(command in first_screen for command in COMMANDS[:2])
    assert "python -m optax_curv.demo" in COMMANDS[0] and "python -m pytest" in COMMANDS[1]


def test_ci_calls_the_test_command_as_printed():
    assert f"tests='{COMMANDS[1]}'\n" in (ROOT / ".ci" / "run").read_text()


def test_links_to_files_of_the_repository_lead_somewhere():
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", README)
    assert targets and all((ROOT / target).exists() for target in targets)


def test_the_table_of_methods_names_what_the_package_has():
    import optax_curv

    rows = re.findall(r"^\| \[[^]]+\]\(optax_curv/\S+\): (.*?) \|", README, flags=re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(rows) >= 7 and all(hasattr(optax_curv, name) for name in names)
