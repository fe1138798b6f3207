"""Small faults put into the code, one at a time: whether the quick tests see each.

A mutant is the package with one operator, constant, bound or result changed. A child of this process imports it, runs
those tests of the mutated module that reach the mutated lines, the quickest first, and is killed, as the word goes, if
one fails; what no test sees survives. Survivors that compute the same as the code as it is stand in
equivalent_mutants.txt beside this file, with the reason.

    python tests/mutants.py                                   all, which takes hours
    python tests/mutants.py --sample 180 --seed 1             so many of them all, drawn by chance
    python tests/mutants.py --only solver windows             those of two modules
"""

import argparse
import ast
import copy
import importlib
import importlib.machinery
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType
from typing import NamedTuple

import coverage
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tarflow_hf"
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
EDGES, LEAVES, PARTS = "flow/test_edges.py", "flow/test_leaves.py", "flow/test_parts.py"
WHOLE, RUNNING = "flow/test_modeling.py", "sampling/test_running.py"
PIPELINE, NONFINITE, PROPERTIES = "sampling/test_pipeline.py", "sampling/test_nonfinite.py", "flow/test_properties.py"
TESTS = {
    "flow/blocks": [
        PARTS,
        "flow/test_precision.py",
        "flow/test_noise_conditioning.py",
        WHOLE,
        "flow/test_condition.py",
    ],
    "flow/inputs": [
        PIPELINE,
        "flow/test_condition.py",
        "flow/test_noise_conditioning.py",
        WHOLE,
        "package/test_bad_input.py",
    ],
    "flow/kv_cache": [PARTS, PROPERTIES, WHOLE],
    "flow/likelihood": [EDGES, LEAVES, PROPERTIES, WHOLE],
    "flow/noise": [EDGES, LEAVES, "training/test_training_noise_levels.py", "flow/test_noise_conditioning.py"],
    "flow/offloading": [PIPELINE],
    "flow/outputs": ["flow/test_precision.py", WHOLE, "flow/test_habits_transformers.py"],
    "flow/precision": [PARTS, "flow/test_precision.py", "flow/test_habits_torch.py"],
    "flow/pretrained": ["flow/test_configuration.py", "flow/test_noise_conditioning.py", WHOLE],
    "flow/signatures": [EDGES],
    "flow/sampling/branches": [EDGES, PROPERTIES, WHOLE, NONFINITE],
    "flow/sampling/compiled": ["sampling/test_compiled.py"],
    "flow/sampling/denoising": ["sampling/test_denoising_steps.py", LEAVES, "sampling/test_refinement.py"],
    "flow/sampling/guidance": [LEAVES, PROPERTIES, NONFINITE],
    "flow/sampling/memory": ["sampling/test_memory.py"],
    "flow/sampling/nonfinite": [NONFINITE],
    "flow/sampling/preparing": [PIPELINE, "flow/test_condition.py"],
    "flow/sampling/running": [RUNNING, NONFINITE, "hub/test_habits_diffusers.py"],
    "flow/sampling/settings": [EDGES, PIPELINE, "sampling/test_refinement.py"],
    "flow/sampling/solver": ["sampling/test_decoding.py", NONFINITE],
    "flow/sampling/windows": ["sampling/test_windows.py", "sampling/test_decoding.py"],
}
"""The tests that each module must pass, the quickest first."""

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


class Reach:
    """A plugin of pytest: which tests reach which lines of a file, and how long each of them takes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.coverage = coverage.Coverage(data_file=None, include=[str(path)], config_file=False)
        self.seconds: dict[str, float] = {}
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        began = time.monotonic()
        result = yield
        self.seconds[item.nodeid] = time.monotonic() - began
        return result

    def write(self, path: Path) -> None:
        self.coverage.stop()
        lines = self.coverage.get_data().contexts_by_lineno(str(self.path))
        path.write_text(json.dumps({"lines": lines, "seconds": self.seconds}))


def tests_of(mutant: Mutant, reach: dict) -> list[str]:
    """The tests that reach a mutant, the quickest first; all, where its lines run when the module is imported."""
    found = set()
    for line in range(mutant.line, mutant.last_line + 1):
        found.update(reach["lines"].get(str(line), []))
    named = reach["seconds"].keys() if "" in found else found
    return sorted(named, key=reach["seconds"].__getitem__)


def in_child(act: Callable[[], int], limit: float) -> bool:
    """Whether a function returns 0 within so many seconds, in a child of this process that prints nothing."""
    child = os.fork()
    if child == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os._exit(act())
    until = time.monotonic() + limit
    while time.monotonic() < until:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def run_tests(tests: list[str], *plugins: object) -> int:
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return int(pytest.main([*options, f"--rootdir={ROOT}", *tests], plugins=list(plugins)))


def look(name: str) -> dict | None:
    """Which tests of a module reach which of its lines, and their times; None where one fails."""
    with TemporaryDirectory() as folder:
        seen = Path(folder, "reach.json")

        def act() -> int:
            reach = Reach(PACKAGE / f"{name}.py")
            code = run_tests([str(ROOT / "tests" / file) for file in TESTS[name]], reach)
            reach.write(seen)
            return code

        return json.loads(seen.read_text()) if in_child(act, limit=900) else None


def survives(mutant: Mutant, reach: dict) -> bool:
    """Whether all tests that reach a mutant pass, in the package with the mutant in it."""
    tests = tests_of(mutant, reach)
    if not tests:
        return True

    def act() -> int:
        code, load = mutant.code(), importlib.machinery.SourceFileLoader.get_code

        def get_code(loader: importlib.machinery.SourceFileLoader, name: str) -> CodeType | None:
            return code if loader.path == str(mutant.path) else load(loader, name)

        importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
        return run_tests(tests)

    return in_child(act, limit=30 + 3 * sum(reach["seconds"][test] for test in tests))


def explained() -> set[tuple[str, str, str]]:
    """(file, line, change) of each survivor that computes the same; three lines and a reason each, then a blank."""
    parts = EQUIVALENT.read_text(encoding="utf-8").split("\n\n")[1:]
    entries = [[line.strip() for line in part.strip().splitlines()] for part in parts if part.strip()]
    return {(file, line, change) for file, line, change, *reason in entries if reason}


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutates the flow and its sampling, and counts what the tests see.")
    parser.add_argument("--only", nargs="+", metavar="MODULE", help="names such as solver or flow/sampling/solver")
    parser.add_argument("--sample", type=int, help="so many of these mutants, drawn by chance")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    options = parser.parse_args()
    modules = [name for name in TESTS if not options.only or {name, name.rsplit("/", 1)[1]} & set(options.only)]
    same, killed, survivors, failing = explained(), 0, [], []
    if not options.list:
        for library in ("accelerate", "diffusers", "transformers"):  # once, for every child
            importlib.import_module(library)
    every = [mutant for name in modules for mutant in mutants(PACKAGE / f"{name}.py")]
    every = [m for m in every if (str(m.path.relative_to(PACKAGE)), m.text, m.change_text) not in same]
    if options.sample is not None:
        drawn = set(random.Random(options.seed).sample(every, min(options.sample, len(every))))
        every = [mutant for mutant in every if mutant in drawn]
    for name in modules:
        found = [mutant for mutant in every if mutant.path == PACKAGE / f"{name}.py"]
        if not found:
            continue
        if options.list:
            print(*found, sep="\n")
            continue
        reach = look(name)
        if reach is None:
            failing.append(name)
            print(f"{name}: its tests fail as the code is, nothing was mutated", flush=True)
            continue
        alive = [mutant for mutant in found if survives(mutant, reach)]
        killed, survivors = killed + len(found) - len(alive), survivors + alive
        print(f"{name}: {len(found) - len(alive)} of {len(found)} killed", flush=True)
        print(*(f"    survives: {mutant}" for mutant in alive), sep="\n", end="\n" if alive else "", flush=True)
    total = killed + len(survivors)
    if total:
        print(f"{killed} of {total} killed, {killed / total:.1%}; {len(same)} are explained as equivalent")
    return int(bool(failing) or killed < 0.95 * total)


if __name__ == "__main__":
    sys.exit(main())
