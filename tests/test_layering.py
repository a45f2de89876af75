"""The layers of the package hold: no upward import, no cycle, no import inside a function, nothing too long."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "proxbit"
FILES = sorted(SOURCE.rglob("*.py"))
LAYERS = {
    "blocks": 0,
    "errors": 0,
    "foreign": 0,
    "registry": 0,
    "shards": 0,
    "sign": 0,
    "packing": 1,
    "kernels": 2,
    "quantizers": 3,
    "optim": 4,
    "nn": 4,
    "config": 5,
    "patching": 6,
    "posttraining": 7,
    "analysis": 8,
    "export": 8,
    "hub": 8,
    "training": 9,
    "cli": 10,
    "": 11,
    "__main__": 12,
}
MAY_IMPORT_TRANSFORMERS = {"config", "hub", "training", "cli"}
BANNED_NAMES = {"utils", "helpers", "common", "misc", "core", "engine", "manager"}


def module_of(file: Path) -> str:
    """`proxbit/nn/latent.py` -> `nn.latent`; the package itself is the empty string."""
    parts = list(file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> set[str]:
    """Absolute names of everything a module imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(name: str) -> str | None:
    """The module inside the package that an import names, or None for other packages."""
    known = {module_of(file) for file in FILES}
    if name.split(".")[0] != "proxbit":
        return None
    parts = name.split(".")[1:]
    while ".".join(parts) not in known:
        parts.pop()
    return ".".join(parts)


def layer_violations(module: str, source: str) -> list[str]:
    """Imports of `source`, the text of `module`, that its layer forbids."""
    part = module.split(".")[0]
    found = []
    for name in imports(ast.parse(source)):
        target = own(name)
        if target is not None and LAYERS[target.split(".")[0]] > LAYERS[part]:
            found.append(f"{module} (layer {LAYERS[part]}) imports {name}")
        if name.split(".")[0] == "transformers" and part not in MAY_IMPORT_TRANSFORMERS:
            found.append(f"{module} imports {name}")
    return found


@pytest.mark.parametrize("file", FILES, ids=[module_of(file) or "proxbit" for file in FILES])
def test_imports_go_down(file):
    assert layer_violations(module_of(file), file.read_text()) == []


def test_the_check_sees_violations():
    """The check above can fail."""
    assert layer_violations("quantizers.pairs", "from proxbit.nn import BinaryLinear") != []
    assert layer_violations("patching.replace", "import transformers") != []
    assert layer_violations("nn.latent", "from proxbit.quantizers import quantize") == []


def test_every_part_has_a_layer():
    assert {module_of(file).split(".")[0] for file in FILES} <= set(LAYERS)


def test_no_import_cycles():
    """A package's `__init__` stands for its modules, so only imports between files count."""
    graph = {
        module_of(file): {own(name) for name in imports(ast.parse(file.read_text()))} - {None, module_of(file)}
        for file in FILES
        if file.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' -> '.join((*path, module))}"
        if module in done or module not in graph:
            return
        for target in sorted(graph[module]):
            visit(target, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())
    assert done == set(graph)


@pytest.mark.parametrize("file", FILES, ids=[module_of(file) or "proxbit" for file in FILES])
def test_files_and_functions_stay_small(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    assert file.stem not in BANNED_NAMES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
            inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not inner, f"{node.name} imports inside the function"
