"""The arrows of the tree: scripts -> adapters -> ldm, and the layers inside ldm, read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for top in ("ldm", "adapters", "scripts") for path in (ROOT / top).rglob("*.py"))
FIRST_PARTY = {"ldm", "adapters", "scripts", "tests"}
MAY_IMPORT = {"ldm": {"ldm"}, "adapters": {"ldm", "adapters"}, "scripts": {"ldm", "adapters", "scripts"}}
TEST_ONLY = {"diffusers", "transformers", "pytest", "hypothesis"}
ON_DEMAND = {"wandb", "resvg_py", "matplotlib"}  # imported inside the function that needs them, once switched on
HEAVY = {"torch", "wandb", "open_clip", "timm", "diffusers", "transformers"}

# Lower layers never import higher ones. Modules of ldm that are not named here may be imported from anywhere in it.
LAYERS = (
    {"ldm.control", "ldm.registry", "ldm.schedule", "ldm.models", "ldm.data"},
    {"ldm.samplers", "ldm.guidance", "ldm.denoiser"},
    {"ldm.training", "ldm.evaluation", "ldm.generate"},
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, path: Path) -> set[str]:
    """Every module that the tree imports, absolute; `from a import b` gives a and a.b."""
    package = path.relative_to(ROOT).parent.parts
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*base, *([node.module] if node.module else [])))
            names.add(origin)
            names.update(f"{origin}.{alias.name}" for alias in node.names)
    return names


def at_import_time(tree: ast.Module) -> ast.Module:
    """The tree without function bodies: what runs when the module is imported."""

    class Prune(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

    return Prune().visit(tree)


def layer(module: str) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if ".".join(module.split(".")[:2]) in names), None)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_follow_the_arrows(path: Path) -> None:
    module, names = module_name(path), imported(parse(path), path)
    tops = {name.split(".")[0] for name in names}
    wrong = tops & FIRST_PARTY - MAY_IMPORT[module.split(".")[0]]
    assert not wrong, f"{module} imports {sorted(wrong)}: the arrows are scripts -> adapters -> ldm"
    allowed = {"diffusers", "transformers"} if module.startswith("scripts.benchmarks.") else set[str]()
    assert not (tops & TEST_ONLY) - allowed, f"{module} imports {sorted(tops & TEST_ONLY)}, which only tests may"
    own = layer(module)
    above = sorted(name for name in names if own is not None and (layer(name) or 0) > own)
    assert not above, f"{module} imports {above}, which lie in a higher layer"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_optional_packages_are_imported_on_demand(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(at_import_time(parse(path)), path)}
    assert not tops & ON_DEMAND, f"import {sorted(tops & ON_DEMAND)} inside the function that uses it"


def test_arrows_have_no_cycles() -> None:
    graph = {module_name(path): imported(at_import_time(parse(path)), path) for path in SOURCES}
    graph = {name: {target for target in targets if target in graph} for name, targets in graph.items()}
    # `from package import module` names the package too; its __init__ is loaded in any case.
    graph = {name: {t for t in targets if not name.startswith(f"{t}.")} for name, targets in graph.items()}
    while leaves := {name for name, targets in graph.items() if not targets - {name}}:
        graph = {name: targets - leaves for name, targets in graph.items() if name not in leaves}
    assert not graph, f"import cycle among {sorted(graph)}"


def loaded_after(code: str) -> set[str]:
    """The heavy packages in sys.modules after the code ran in a fresh interpreter."""
    program = f"import sys\n{code}\nprint('loaded:', *sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("loaded:", 1)[1].split())


def test_import_ldm_is_light() -> None:
    assert loaded_after("import ldm") == set()


def test_script_help_is_light_and_whole() -> None:
    scripts = [str(path) for path in sorted((ROOT / "scripts").glob("*.py")) if path.name != "__init__.py"]
    code = f"""
import argparse, runpy
bare, add = [], argparse._ActionsContainer.add_argument
def noted(self, *names, **how):
    if not how.get("help"):
        bare.append((sys.argv[0], names))
    return add(self, *names, **how)
argparse._ActionsContainer.add_argument = noted
for script in {scripts!r}:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"{{script}} --help exited with {{stop.code}}")
    else:
        raise RuntimeError(f"{{script}} --help did not exit")
if bare:
    raise RuntimeError(f"without a word of help: {{bare}}")
"""
    assert loaded_after(code) == set()


def test_every_script_begins_with_examples() -> None:
    for path in sorted((ROOT / "scripts").glob("[!_]*.py")):
        said = ast.get_docstring(parse(path)) or ""
        assert f"python scripts/{path.name}" in said, f"{path.name}: its help shows no command"
