"""House style that a linter has no rule for: sizes, and the list of things never done."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_SCRIPT_LINES, MAX_INIT_PARAMETERS = 400, 50, 60, 8
VAGUE_NAMES = {"utils", "helpers", "misc", "common"}
FORBIDDEN_CALLS = {"eval", "exec", "globals", "__import__", "import_module"}

LIBRARY = sorted(path for top in ("ldm", "adapters") for path in (ROOT / top).rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))  # what is called; packages below it are read like ldm
TESTS = sorted((ROOT / "tests").rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def code_lines(function: Function) -> int:
    """Lines from `def` to the end, less the docstring: documentation is not what makes a function long."""
    assert function.end_lineno is not None
    total = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        total -= first.end_lineno - first.lineno + 1
    return total


def parameters(function: Function) -> list[str]:
    """All parameter names but self."""
    arguments = function.args
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)][1:]


def calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Called names with their lines: `f(...)`, and `module.import_module(...)`, but not `model.eval()`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.func.id, node.lineno
            elif isinstance(node.func, ast.Attribute) and node.func.attr == "import_module":
                yield node.func.attr, node.lineno


def is_registered(node: ast.ClassDef | Function) -> bool:
    decorators = [item.func for item in node.decorator_list if isinstance(item, ast.Call)]
    return any(getattr(item, "id", getattr(item, "attr", "")) == "register" for item in decorators)


def factories(tree: ast.AST) -> Iterator[tuple[str, Function]]:
    """The function that each @register-ed name calls: itself, or the class's __init__."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and is_registered(node):
            yield from (
                (node.name, item) for item in node.body if isinstance(item, Function) and item.name == "__init__"
            )
        elif isinstance(node, Function) and is_registered(node):
            yield node.name, node


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS + TESTS, ids=relative)
def test_files_are_short(path: Path) -> None:
    limit = MAX_SCRIPT_LINES if path in SCRIPTS else MAX_FILE_LINES
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < limit, f"{relative(path)} has {lines} lines, the limit is {limit}; split it by subject"
    assert path.stem not in VAGUE_NAMES, f"{relative(path)}: name the file for its subject"


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS, ids=relative)
def test_functions_are_short(path: Path) -> None:
    found = [(item.name, item.lineno, code_lines(item)) for item in functions(parse(path))]
    long = [f"{name} (line {line}): {size} lines" for name, line, size in found if size >= MAX_FUNCTION_LINES]
    assert not long, f"{relative(path)}: {long}; the limit is {MAX_FUNCTION_LINES}"


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS, ids=relative)
def test_constructors_take_few_parameters(path: Path) -> None:
    inits = [item for item in functions(parse(path)) if item.name == "__init__"]
    wide = [
        f"line {item.lineno}: {len(parameters(item))}" for item in inits if len(parameters(item)) > MAX_INIT_PARAMETERS
    ]
    assert not wide, f"{relative(path)}: {wide}; the limit is {MAX_INIT_PARAMETERS}, use a frozen dataclass"


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_registered_factories_name_their_parameters(path: Path) -> None:
    loose = [name for name, factory in factories(parse(path)) if factory.args.kwarg or factory.args.vararg]
    assert not loose, f"{relative(path)}: {loose} take *args or **kwargs; build() checks YAML keys by the signature"


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS, ids=relative)
def test_no_code_from_strings(path: Path) -> None:
    found = [f"{name} (line {line})" for name, line in calls(parse(path)) if name in FORBIDDEN_CALLS]
    assert not found, f"{relative(path)}: {found}; use the registry"


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_library_logs_and_does_not_print(path: Path) -> None:
    found = [line for name, line in calls(parse(path)) if name == "print"]
    assert not found, f"{relative(path)} prints at lines {found}; use logging.getLogger(__name__)"


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS, ids=relative)
def test_exceptions_are_named(path: Path) -> None:
    tree, wrong = parse(path), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {item.id if isinstance(item, ast.Name) else "" if item is None else "named" for item in caught}
            if names & {"", "Exception", "BaseException"}:
                wrong.append(f"line {node.lineno}: catches everything")
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name) and node.exc.id == "NotImplementedError":
            wrong.append(f"line {node.lineno}: bare NotImplementedError")
    assert not wrong, f"{relative(path)}: {wrong}"


def test_every_registering_adapter_is_imported_by_the_package() -> None:
    package = ROOT / "adapters" / "__init__.py"
    if not package.exists():
        pytest.skip("no adapters yet")
    names: set[str] = set()
    for node in ast.walk(parse(package)):
        if isinstance(node, ast.ImportFrom):
            names.update(alias.name for alias in node.names)
            names.add((node.module or "").rsplit(".", 1)[-1])
        elif isinstance(node, ast.Import):
            names.update(alias.name.rsplit(".", 1)[-1] for alias in node.names)
    missing = [path.stem for path in (ROOT / "adapters").glob("*.py") if any(factories(parse(path)))]
    missing = sorted(set(missing) - names)
    assert not missing, f"adapters/__init__.py does not import {missing}, so their names are never registered"


def test_the_vae_scale_has_one_home() -> None:
    homes = [relative(path) for path in LIBRARY if "0.18215" in path.read_text(encoding="utf-8")]
    assert len(homes) <= 1, f"0.18215 is written in {homes}"
