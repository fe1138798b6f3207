"""Mutants of a file: the file with one operator, constant, bound or result changed, and the functions they concern."""

import ast
import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tarflow_hf"

OPERATORS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult, ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"max": "min", "min": "max", "any": "all", "all": "any", "amax": "amin", "amin": "amax", "sin": "cos"}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node, one change each."""

    def with_(**fields: object) -> ast.AST:
        other = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    match node:
        case ast.Compare(ops=ops):
            for index, op in enumerate(ops):
                if type(op) in OPERATORS:
                    yield with_(ops=[*ops[:index], OPERATORS[type(op)](), *ops[index + 1 :]])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OPERATORS:
            yield with_(op=OPERATORS[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield with_(value=not value)
        case ast.Constant(value=int() | float() as value):
            yield from (with_(value=value + 1), with_(value=value - 1))
        case ast.Slice(lower=lower, upper=upper) if lower or upper:
            yield from ([with_(lower=None)] if lower else [])
            yield from ([with_(upper=None)] if upper else [])
        case ast.Name(id=name) if name in NAMES:
            yield with_(id=NAMES[name])
        case ast.Attribute(attr=name) if name in NAMES:
            yield with_(attr=NAMES[name])
        case ast.Call(func=ast.Attribute(value=value, attr="to" | "clamp" | "flip" | "clone" | "detach")):
            yield value
        case ast.Return(value=value) if value is not None and not (
            isinstance(value, ast.Constant) and not value.value
        ):
            yield with_(value=ast.Constant(None))
        case ast.If(test=test):
            yield with_(test=ast.UnaryOp(ast.Not(), test))


def skipped(tree: ast.AST) -> set[ast.AST]:
    """Nodes that no test could see changed: types, messages of errors, `__all__`, protocols, `stacklevel`."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parts = [node.returns, *(arg.annotation for arg in ast.walk(node.args) if isinstance(arg, ast.arg))]
        elif isinstance(node, ast.AnnAssign):
            parts = [node.annotation]
        elif isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert):
            parts = [node]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp) and node in tree.body:
            parts = [node] if isinstance(node.value, ast.Subscript) else []  # names of types
        elif isinstance(node, ast.keyword) and node.arg == "stacklevel":
            parts = [node]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "cast":
            parts = [node.args[0]]
        found.update(inner for part in parts if part is not None for inner in ast.walk(part))
    return found


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


class Mutant(NamedTuple):
    """Change number `change` of node number `node` of a file, as `ast.walk` meets them."""

    path: Path
    node: int
    change: int
    line: int
    last_line: int
    text: str
    change_text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.text}   [{self.change_text}]"

    def code(self) -> CodeType:
        tree = ast.parse(self.path.read_text(encoding="utf-8"))
        old = list(ast.walk(tree))[self.node]
        new = ast.copy_location(list(changes(old))[self.change], old)
        return compile(ast.fix_missing_locations(_Replace(old, new).visit(tree)), str(self.path), "exec")


def mutants(path: Path) -> list[Mutant]:
    """Every mutant of a file, from its first line to its last."""
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    left_out, found = skipped(tree), []
    for index, node in enumerate(ast.walk(tree)):
        for number, new in enumerate([] if node in left_out else changes(node)):
            line, last = getattr(node, "lineno", 0), getattr(node, "end_lineno", 0)
            shown = [ast.unparse(part).splitlines()[0].strip() for part in (node, new)]
            found.append(Mutant(path, index, number, line, last, lines[line - 1].strip(), " -> ".join(shown)))
    return sorted(found, key=lambda mutant: mutant.line)


def functions(code: CodeType) -> dict[tuple[str, int], CodeType]:
    """The code of every function of a module or class body by (qualified name, first line), without those inside."""
    found: dict[tuple[str, int], CodeType] = {}
    for part in code.co_consts:
        if isinstance(part, CodeType):
            inner = part.co_flags & inspect.CO_OPTIMIZED
            found.update({(part.co_qualname, part.co_firstlineno): part} if inner else functions(part))
    return found


def at_import(code: CodeType) -> tuple:
    """What a module or class body does when it is imported, apart from what its functions do."""
    parts = [
        (part.co_qualname, () if part.co_flags & inspect.CO_OPTIMIZED else at_import(part))
        if isinstance(part, CodeType)
        else (type(part), part)
        for part in code.co_consts
    ]
    return code.co_code, code.co_names, tuple(parts)
