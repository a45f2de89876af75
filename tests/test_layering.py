"""The layers of the package hold: packages import strictly downwards, no cycle, no import in a function, nothing too
long."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "proxbit"
FILES = sorted(SOURCE.rglob("*.py"))
LAYERS = {
    "blocks": 0,
    "deprecation": 0,
    "errors": 0,
    "foreign": 0,
    "shards": 0,
    "sign": 0,
    "extras": 1,
    "packing": 1,
    "registry": 1,
    "kernels": 2,
    "quantizers": 3,
    "nn": 4,
    "optim": 4,
    "config": 5,
    "patching": 6,
    "posttraining": 7,
    "checkpoint": 8,
    "export": 8,
    "plugin": 9,
    "analysis": 10,
    "hub": 11,
    "training": 12,
    "cli": 13,
    "": 14,
    "__main__": 15,
}
MAY_IMPORT_TRANSFORMERS = {"config", "checkpoint", "plugin", "hub", "training", "cli"}
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


MODULES = {module_of(file) for file in FILES}


def own(name: str) -> str | None:
    """The module inside the package that an import names, or None for other packages."""
    if name.split(".")[0] != "proxbit":
        return None
    parts = name.split(".")[1:]
    while ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts)


def layer_violations(module: str, source: str) -> list[str]:
    """Imports of `source`, the text of `module`, that its layer forbids."""
    part = module.split(".")[0]
    found = []
    for name in imports(ast.parse(source)):
        target = own(name)
        other = part if target is None else target.split(".")[0]
        if other != part and LAYERS[other] >= LAYERS[part]:
            found.append(f"{module} (layer {LAYERS[part]}) imports {name}")
        if name.split(".")[0] == "transformers" and part not in MAY_IMPORT_TRANSFORMERS:
            found.append(f"{module} imports {name}")
    return found


def test_imports_go_down():
    assert [found for file in FILES for found in layer_violations(module_of(file), file.read_text())] == []


def test_the_check_sees_violations():
    """The check above can fail."""
    assert layer_violations("quantizers.pairs", "from proxbit.nn import BinaryLinear") != []
    assert layer_violations("patching.replace", "import transformers") != []
    assert layer_violations("checkpoint.files", "from proxbit.plugin import binarize") != []
    assert layer_violations("nn.latent", "from proxbit.optim import ProxConnect") != [], "layers are strict"
    assert layer_violations("nn.latent", "from proxbit.quantizers import quantize") == []
    assert layer_violations("nn.latent", "from proxbit.nn.learned import learned_modules") == []


def test_every_part_has_a_layer_and_every_folder_is_a_package():
    assert {module_of(file).split(".")[0] for file in FILES} <= set(LAYERS)
    assert [file.parent for file in FILES if not (file.parent / "__init__.py").is_file()] == []


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


def style_violations(name: str, source: str) -> list[str]:
    """What of the text of a file is too long, has a name that says nothing, or is imported inside a function."""
    found = [f"{name} has {len(source.splitlines())} lines"] if len(source.splitlines()) > 400 else []
    found += [f"{name} has a name that says nothing"] if name.split(".")[-1] in BANNED_NAMES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.end_lineno - node.lineno >= 60:
                found.append(f"{name}.{node.name} has {node.end_lineno - node.lineno + 1} lines")
            if any(isinstance(inner, ast.Import | ast.ImportFrom) for inner in ast.walk(node)):
                found.append(f"{name}.{node.name} imports inside the function")
    return found


def test_files_and_functions_stay_small():
    assert [found for file in FILES for found in style_violations(module_of(file), file.read_text())] == []
    long = "def f():\n" + "    x = 1\n" * 60
    assert style_violations("nn.latent", long) == ["nn.latent.f has 61 lines"]
    assert len(style_violations("nn.utils", "x = 1\n" * 401 + "def f():\n    import torch\n")) == 3
