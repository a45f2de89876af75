"""Static analysis of the source of a module's class: which weights it reads, which layers it feeds and returns.

Nothing is executed. Nothing is known of a class without a source.
"""

import ast
import inspect
import textwrap
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cache

__all__ = ["fed_arguments", "returned", "weights_read"]

# Where a model computes: in a forward pass, and, in timm, what is not in a checkpoint when it is loaded.
STARTS = ("forward", "init_non_persistent_buffers")
# Methods of a tensor that say something of it, and are not it in another shape.
_FACTS = frozenset({"size", "dim", "numel", "item", "tolist", "new_tensor", "new_zeros", "new_ones", "new_full"})
# As many calls inside each other as are followed from a returned value.
_DEPTH = 4

Chain = tuple[str, ...]
Chains = frozenset[Chain]


def _path(node: ast.AST, known: Mapping[str, str]) -> str | None:
    """What an expression names below `self`: "blocks.*.0" of `self.blocks[i][0]`; None for other expressions."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if not isinstance(node, ast.Attribute | ast.Subscript) or (owner := _path(node.value, known)) is None:
        return None
    if isinstance(node, ast.Attribute):
        child: object = node.attr
    else:
        child = node.slice.value if isinstance(node.slice, ast.Constant) else "*"
    return f"{owner}.{child}".removeprefix(".")


def _variables(target: ast.AST, values: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The variables of a loop, and what each of them runs over: also in `enumerate(...)` and `zip(...)`."""
    if isinstance(target, ast.Name):
        yield target.id, values
    elif isinstance(target, ast.Tuple) and isinstance(values, ast.Call):
        for each, argument in zip(target.elts[-len(values.args) :], values.args, strict=False):
            yield from _variables(each, argument)


def _names(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """What the variables of a method name below `self`: its parts, and, in loops, those of its lists."""
    known = {"self": ""}
    for node in nodes:
        if isinstance(node, ast.For | ast.comprehension):
            found, index = list(_variables(node.target, node.iter)), ".*"
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found, index = [(node.targets[0].id, node.value)], ""
        else:
            continue
        for name, values in found:
            if (path := _path(values, known)) is not None:
                known.setdefault(name, path + index)
    return known


@cache
def _definition(kind: Hashable, method: str) -> ast.FunctionDef | None:
    """A method, parsed; None if it has no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(kind, method))))
    except (AttributeError, OSError, TypeError, SyntaxError):
        return None
    return next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)


def _is_method(kind: Hashable, name: str) -> bool:
    return inspect.isfunction(getattr(kind, name, None))


@cache
def weights_read(kind: Hashable) -> frozenset[tuple[str, str]]:
    """The modules, by name, of which a class names the weight, `self.wo.weight`, where it computes: in `STARTS`, and in
    methods called there; and what of the weight, as "dtype".
    """
    found, methods = set(), list(STARTS)
    for method in methods:
        definition = _definition(kind, method)
        nodes = [] if definition is None else list(ast.walk(definition))
        known = _names(nodes)
        attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
        of_weights = {id(node.value): node.attr for node in attributes}
        for node in attributes:
            owner = _path(node.value, known)
            if owner and node.attr == "weight":
                found.add((owner, of_weights.get(id(node), "")))
            elif owner == "" and node.attr not in methods and _is_method(kind, node.attr):
                methods.append(node.attr)
    return frozenset(found)


def _argument(node: ast.AST, given: set[str]) -> bool:
    """Whether an expression is one of the arguments, whole or in part, in any shape and dtype."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr not in _FACTS:
            node = node.func.value
        else:
            return False
    return node.id in given


def _parameters(definition: ast.FunctionDef) -> list[str]:
    """The names of what a method takes, `self` first."""
    arguments = definition.args
    return [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


@cache
def fed_arguments(kind: Hashable) -> frozenset[str]:
    """The modules, by name, that a class calls in its forward pass on what it was given itself: `self.words(ids)`."""
    start = _definition(kind, "forward")
    if start is None:
        return frozenset()
    found: set[str] = set()
    visits = [("forward", frozenset(_parameters(start)[1:]))]
    for method, arguments in visits:
        definition, given = _definition(kind, method), set(arguments)
        nodes = [] if definition is None else list(ast.walk(definition))
        known = _names(nodes)
        for node in nodes:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _argument(node.value, given):
                given.add(node.targets[0].id)
        for node in nodes:
            if not isinstance(node, ast.Call) or not (path := _path(node.func, known)):
                continue
            if not _is_method(kind, path):
                found |= {path for each in node.args[:1] if _argument(each, given)}
                continue
            callee = _definition(kind, path)
            names = [] if callee is None else _parameters(callee)[1:]
            passed = [*zip(names, node.args, strict=False), *((each.arg, each.value) for each in node.keywords)]
            visit = (path, frozenset(name for name, value in passed if name and _argument(value, given)))
            if visit not in visits:
                visits.append(visit)
    return frozenset(found)


class _Returns:
    """Follows a method statement by statement: which modules made what each variable holds, and what is returned."""

    def __init__(self, kind: Hashable, definition: ast.FunctionDef, within: tuple[str, ...]) -> None:
        self.kind, self.known, self.within = kind, _names(ast.walk(definition)), within
        self.found: set[Chain] = set()
        self.run(definition.body, {})

    def run(self, body: list[ast.stmt], held: dict[str, Chains]) -> dict[str, Chains]:
        for statement in body:
            if isinstance(statement, ast.Assign):
                made = self.made(statement.value, held)
                for target in statement.targets:
                    held |= {node.id: made for node in ast.walk(target) if isinstance(node, ast.Name)}
            elif isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
                held[statement.target.id] = frozenset()
            elif isinstance(statement, ast.If):
                either, other = self.run(statement.body, dict(held)), self.run(statement.orelse, dict(held))
                held = {name: either.get(name, frozenset()) | other.get(name, frozenset()) for name in either | other}
            elif isinstance(statement, ast.For | ast.While | ast.With | ast.Try):
                held = self.run(statement.body, held)
            elif isinstance(statement, ast.Return) and statement.value is not None:
                self.found |= self.made(statement.value, held)
        return held

    def made(self, node: ast.AST, held: Mapping[str, Chains]) -> Chains:
        """The modules whose outputs an expression holds: each with those whose outputs went into it."""
        if isinstance(node, ast.Name):
            return held.get(node.id, frozenset())
        if isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
            return self.made(node.value, held)
        if isinstance(node, ast.Tuple | ast.List):
            return self.all(node.elts, held)
        if isinstance(node, ast.Dict):
            return self.all(node.values, held)
        if isinstance(node, ast.IfExp):
            return self.all([node.body, node.orelse], held)
        if not isinstance(node, ast.Call):
            return frozenset()
        inner = self.all([*node.args, *(each.value for each in node.keywords)], held)
        path = _path(node.func, self.known)
        if path and _is_method(self.kind, path):
            return frozenset() if path in self.within else returned(self.kind, path, self.within)
        if path:
            return frozenset((path, *chain)[:_DEPTH] for chain in inner) or frozenset({(path,)})
        return inner | (self.made(node.func, held) if isinstance(node.func, ast.Attribute) else frozenset())

    def all(self, nodes: Iterable[ast.AST], held: Mapping[str, Chains]) -> Chains:
        return frozenset().union(*(self.made(node, held) for node in nodes))


@cache
def returned(kind: Hashable, method: str = "forward", within: tuple[str, ...] = ()) -> Chains:
    """The modules, by name, whose outputs a method returns, alone, in a container or through functions. After each of
    them come those whose output it was given: ("softmax", "answer") of `return self.softmax(self.answer(x))`.

    A sum of outputs is none of them.

    Args:
        kind: a class of modules.
        method: of the class.
        within: the methods that call this one, which are not followed again.
    """
    definition = _definition(kind, method)
    return frozenset() if definition is None else frozenset(_Returns(kind, definition, (*within, method)).found)
