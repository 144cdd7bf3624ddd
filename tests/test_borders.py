"""The borders of the house, read from the source: who imports whom, and what stands where."""

import ast
import inspect
import io
import pathlib
import re
import tokenize

import pytest

import optax_curv
from optax_curv import diagnostics, flax, linalg, testing

PACKAGE = pathlib.Path(optax_curv.__file__).parent
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES = {name: path.read_text() for name, path in FILES.items()}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
CODE_LINES, COLUMNS, FUNCTION_LINES = 300, 100, 60

# Pieces that every method may build on, and that are no methods themselves.
PIECES = {"chain_pieces", "quadratic_model", "layer_factors"}
# Private to the package and not to one folder of it, each with the reason.
SHARED = {
    "optax_curv.linalg._compiler": "hints to XLA are needed wherever arrays are computed",
    "optax_curv.linalg._chunks": "and bounds on what is held at a time",
    "optax_curv.linalg._lapack": "so are factorisations in calls that do not deadlock",
    "optax_curv.linalg._checks": "and the dtypes that the kernels compute in",
    "optax_curv.preconditioners._stacks.names": "diagnostics read the names of stacks in a state",
}
HINTS = {"default_backend", "platform_dependent", "optimization_barrier"}
HINT_ROOMS = {"linalg/_compiler.py", "linalg/_lapack.py"}
FACTORISATIONS = {
    *("cholesky", "cho_factor", "eigh", "eigh_tridiagonal", "eigvalsh", "eig", "eigvals", "qr"),
    *("svd", "svdvals", "lu", "lu_factor", "lu_solve", "solve", "inv", "pinv", "lstsq", "expm"),
    *("slogdet", "det", "matrix_rank", "polar", "schur", "sqrtm", "householder_product"),
}
LAPACK_ROOMS = {"linalg/_lapack.py"}
MAKER_ROOMS = {"preconditioners/_transformation/transformation.py"}


def found_in(check):
    """What a check finds, by file."""
    return {name: found for name in FILES if (found := list(check(name)))}


def module_of(name):
    parts = name.removesuffix(".py").split("/")
    return ".".join(["optax_curv", *parts]).removesuffix(".__init__")


MODULES = {module_of(name) for name in FILES}


def imports(name):
    """(line, module of this package, name taken from it or None)."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("optax_curv"):
                    yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optax_curv"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = whole in MODULES
                yield node.lineno, whole if is_module else node.module, alias.name


def is_method(module):
    folder, _, name = module.rpartition(".")
    return folder == "optax_curv.preconditioners" and name[0] != "_" and name not in PIECES


def method_imports(name):
    own = module_of(name)
    if is_method(own):
        yield from (
            f"{line}: {module}"
            for line, module, _ in imports(name)
            if is_method(module) and module != own
        )


def wrong_directions(name):
    """Imports against the direction in which the rooms build on each other."""
    room, *rest = name.split("/")
    if not rest or room == "demo":  # which use the package as anybody does
        return
    allowed = {
        "linalg": ("linalg", "typing"),
        "capture": ("capture", "linalg", "layers", "curvature", "rows", "objective", "typing"),
        "preconditioners": (
            *("preconditioners", "linalg", "layers", "curvature", "rows", "objective", "typing"),
        ),
    }[room]
    for line, module, _ in imports(name):
        if module.split(".")[1:2] not in [[x] for x in allowed]:
            yield f"{line}: {module}"


def private_imports(name):
    """Imports of what another folder keeps to itself."""
    own = module_of(name)
    folder = own if name.endswith("__init__.py") else own.rpartition(".")[0]
    for line, module, taken in imports(name):
        if module in SHARED:
            continue
        parts = module.split(".")
        for place, part in enumerate(parts):
            if part[0] == "_" and not f"{folder}.".startswith(".".join(parts[:place]) + "."):
                yield f"{line}: {module}"
                break
        if taken and taken[0] == "_" and not module.endswith(f".{taken}"):
            yield f"{line}: {taken} of {module}"


def dotted(node):
    """`a.b.c` of an attribute, or nothing."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def hints(name):
    if name in HINT_ROOMS:
        return
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and node.attr in HINTS:
            yield f"{node.lineno}: {node.attr}"
        if name.startswith("preconditioners/") and dotted(node) in ("jax.jit", "jit"):
            yield f"{node.lineno}: jax.jit"


def factorisations(name):
    if name in LAPACK_ROOMS or name == "testing.py":  # oracles run outside of programs
        return
    for node in ast.walk(TREES[name]):
        owner, _, function = dotted(node).rpartition(".")
        of_jax = owner.endswith(("jnp.linalg", "scipy.linalg", "lax.linalg", "jax.numpy.linalg"))
        if of_jax and function in FACTORISATIONS:
            yield f"{node.lineno}: {owner}.{function}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax"):
            names = [*node.module.split("."), *(x.name for x in node.names)]
            if "linalg" in names:
                yield f"{node.lineno}: from {node.module}"


def introspection(name):
    for node in ast.walk(TREES[name]):
        called = getattr(node.func, "id", None) if isinstance(node, ast.Call) else None
        if called in ("locals", "globals"):
            yield f"{node.lineno}: {called}()"
        named = getattr(node, "id", None) or getattr(node, "attr", None)
        if named == "SimpleNamespace" or dotted(node) == "inspect.signature":
            yield f"{node.lineno}: {named}"


def makers(name):
    if name in MAKER_ROOMS:
        return
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
            if called == "GradientTransformationExtraArgs":
                yield f"{node.lineno}: {called}"


FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
DOCUMENTED = (*FUNCTIONS, ast.ClassDef, ast.Module)


def docstrings(name):
    """(node, docstring's node) of everything documented in a file."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            yield node, node.body[0]


def lines_of(node):
    return set(range(node.lineno, node.end_lineno + 1))


def code_lines(name):
    """Lines with code, where docstrings and signatures are free."""
    tokens = tokenize.generate_tokens(io.StringIO(SOURCES[name]).readline)
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = set()
    for token in tokens:
        if token.type not in (*blank, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for _, text in docstrings(name):
        lines -= lines_of(text)
    for node in ast.walk(TREES[name]):
        if isinstance(node, FUNCTIONS):
            lines -= set(range(node.lineno, node.body[0].lineno))
    return len(lines)


def long_files(name):
    if (count := code_lines(name)) > CODE_LINES:
        yield f"{count} lines of code"


def long_functions(name):
    texts = dict(docstrings(name))
    for node in ast.walk(TREES[name]):
        if isinstance(node, FUNCTIONS):
            count = len(lines_of(node)) - len(lines_of(texts[node]) if node in texts else ())
            if count > FUNCTION_LINES:
                yield f"{node.name}: {count} lines"


def wide_lines(name):
    for number, line in enumerate(SOURCES[name].splitlines(), 1):
        if len(line) > COLUMNS:
            yield f"{number}: {len(line)} columns"


def riddles(name):
    """Docstrings without a subject of their own, or that send the reader elsewhere."""
    for node, text in docstrings(name):
        words = ast.get_docstring(node)
        label = f"{text.lineno}: {getattr(node, 'name', 'the module')}"
        if re.match(r"(The same|As|What|Whether all)\b", words):
            yield f"{label} begins with {words.split()[0]!r}"
        if re.search(r"\bsee there\b", words):
            yield f"{label} says 'see there'"


CHECKS = [
    *(method_imports, wrong_directions, private_imports, hints, factorisations, introspection),
    *(makers, long_files, long_functions, wide_lines, riddles),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_border_holds(check):
    assert found_in(check) == {}


def test_the_checks_see_what_they_look_for():
    """Each check, on a file that breaks its border once."""
    wrong = {
        method_imports: "from optax_curv.preconditioners.soap import soap",
        wrong_directions: "from optax_curv.capture.gradients import find_layers",
        private_imports: "from optax_curv.capture._graph.walk import Walk",
        hints: "backend = jax.default_backend()",
        factorisations: "q, r = jnp.linalg.qr(a)",
        introspection: "options = locals()",
        makers: "tx = optax.GradientTransformationExtraArgs(init, update)",
        long_files: "x = 1\n" * (CODE_LINES + 1),
        long_functions: "def f():\n" + "  x = 1\n" * FUNCTION_LINES,
        wide_lines: "# " + "x" * COLUMNS,
        riddles: 'def f():\n  """The same of g."""',
    }
    assert set(wrong) == set(CHECKS)
    name = "preconditioners/shampoo.py"
    for check, source in wrong.items():
        kept = SOURCES[name], TREES[name]
        SOURCES[name], TREES[name] = source, ast.parse(source)
        found = list(check(name))
        SOURCES[name], TREES[name] = kept
        assert len(found) == 1, (check.__name__, found)


def exported():
    """Every function, and every method that users call, by name."""
    for module in (optax_curv, linalg, diagnostics, flax, testing):
        for name, value in vars(module).items():
            if name[0] == "_" or not getattr(value, "__module__", "").startswith("optax_curv"):
                continue
            if inspect.isfunction(value) or not inspect.isclass(value):
                if callable(value):
                    yield f"{module.__name__}.{name}", value
            else:
                for method, function in vars(value).items():
                    is_ours = inspect.isfunction(function) and method[0] != "_"
                    if is_ours and function.__module__.startswith("optax_curv"):
                        yield f"{module.__name__}.{name}.{method}", function


def test_every_parameter_of_every_exported_function_has_a_type():
    untyped = {
        f"{name}({parameter.name})"
        for name, function in exported()
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self" and parameter.annotation is inspect.Parameter.empty
    }
    assert untyped == set()


def test_defaults_are_shown_as_plain_numbers():
    shown = {name: str(inspect.signature(function)) for name, function in exported()}
    tricky = {name for name, text in shown.items() if re.search(r"=\s*np\.", text)}
    assert tricky == set()
