"""Small faults put into the code, one at a time: whether the quick tests see each.

A mutant is the package with one operator, constant, bound or result changed. A child of this process runs those tests
of the mutated module that reach the mutated lines, the quickest first, and the mutant is killed, as the word goes, if
one fails. A change inside a function is made in a fork of a session of pytest that has collected the tests already,
by giving the function its changed code; what survives there, and every other change, is tried in a child that imports
the whole package anew. Survivors that compute the same as the code as it is stand in equivalent_mutants.txt beside
this file, with the reason.

    python tests/mutants.py                                   all, which takes hours
    python tests/mutants.py --sample 180 --seed 1             so many of them all, drawn by chance
    python tests/mutants.py --only solver windows             those of two modules
"""

import argparse
import gc
import importlib
import importlib.machinery
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType, FunctionType

import coverage
import pytest
from mutations import PACKAGE, ROOT, Mutant, at_import, functions, mutants

EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
EDGES, LEAVES, PARTS = "flow/test_edges.py", "flow/test_leaves.py", "flow/test_parts.py"
WHOLE, RUNNING = "flow/test_modeling.py", "sampling/test_running.py"
PIPELINE, NONFINITE, PROPERTIES = "sampling/test_pipeline.py", "sampling/test_nonfinite.py", "flow/test_properties.py"
TESTS = {
    "flow/bare": ["flow/test_bare.py"],
    "flow/blocks": [
        "flow/test_blocks.py",
        PARTS,
        "flow/test_precision.py",
        "flow/test_noise_conditioning.py",
        WHOLE,
        "flow/test_condition.py",
    ],
    "flow/inputs": ["flow/test_inputs.py", "flow/test_condition.py"],
    "flow/kv_cache": [PARTS, PROPERTIES, WHOLE],
    "flow/likelihood": ["flow/test_density_units.py", EDGES, LEAVES, PROPERTIES, WHOLE],
    "flow/noise": [EDGES, LEAVES, "training/test_training_noise_levels.py", "flow/test_noise_conditioning.py"],
    "flow/offloading": [PARTS, "hub/test_habits_diffusers.py", PIPELINE],
    "flow/outputs": ["flow/test_habits_transformers.py", "training/test_training_transformers.py", WHOLE],
    "flow/precision": [PARTS, "flow/test_precision.py", "flow/test_habits_torch.py"],
    "flow/pretrained": ["flow/test_pretrained.py", "hub/test_habits_diffusers.py"],
    "flow/products": ["flow/test_products.py", "flow/test_bare.py"],
    "flow/remaking": ["flow/test_remaking.py"],
    "flow/signatures": [EDGES],
    "flow/sampling/branches": ["sampling/test_branches.py"],
    "flow/sampling/compiled": ["sampling/test_compiled_sweep.py"],
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


class Session:
    """A plugin of pytest: in the place of its tests, forks in which a function of one file has the code of a mutant.

    `killed` holds the numbers of the mutants that a test saw.
    """

    def __init__(self, path: Path, mutants: list[Mutant], reach: dict) -> None:
        self.path, self.mutants, self.reach = path, mutants, reach
        self.killed: list[int] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        before = compile(self.path.read_text(encoding="utf-8"), str(self.path), "exec")
        made = [found for found in gc.get_objects() if type(found) is FunctionType]  # isinstance wakes lazy modules
        made = [function for function in made if function.__code__.co_filename == str(self.path)]
        for number, mutant in enumerate(self.mutants):
            tests, code = [items[test] for test in tests_of(mutant, self.reach)], mutant.code()
            if not tests or at_import(code) != at_import(before):
                continue
            changed = {key: new for key, new in functions(code).items() if new != functions(before)[key]}
            targets = [
                (function, changed[key])
                for function in made  # found by name and line, in whatever decorator they hide
                if (key := (function.__code__.co_qualname, function.__code__.co_firstlineno)) in changed
            ]
            if targets and not in_child(partial(self.run, targets, tests), limit_of(mutant, self.reach)):
                self.killed.append(number)
        return True

    @staticmethod
    def run(targets: list[tuple[FunctionType, CodeType]], tests: list[pytest.Item]) -> int:
        for function, code in targets:
            if len(function.__code__.co_freevars) != len(code.co_freevars):
                return 0  # cannot be exchanged
            function.__code__ = code
        for item, following in zip(tests, [*tests[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if item.session.testsfailed:
                return 1
        return 0


def survivors(name: str, mutants: list[Mutant], reach: dict) -> list[Mutant]:
    """Those of a module's mutants that no test of it sees."""
    with TemporaryDirectory() as folder:
        seen = Path(folder, "killed.json")

        def act() -> int:
            session = Session(PACKAGE / f"{name}.py", mutants, reach)
            files = [str(ROOT / "tests" / file) for file in TESTS[name]]
            code = run_tests([f"--basetemp={folder}/tests", *files], session)
            seen.write_text(json.dumps(session.killed))
            return code

        if not in_child(act, limit=30 + sum(limit_of(mutant, reach) for mutant in mutants)):
            raise RuntimeError(f"the tests of {name} were not collected, or took too long")
        killed = set(json.loads(seen.read_text()))
    left = [mutant for number, mutant in enumerate(mutants) if number not in killed]
    return [mutant for mutant in left if survives(mutant, reach)]


def limit_of(mutant: Mutant, reach: dict) -> float:
    """Seconds after which the tests of a mutant count as failed."""
    return 30 + 3 * sum(reach["seconds"][test] for test in tests_of(mutant, reach))


def survives(mutant: Mutant, reach: dict) -> bool:
    """Whether all tests that reach a mutant pass, in the package imported with the mutant in it."""
    tests = tests_of(mutant, reach)
    if not tests:
        return True

    def act() -> int:
        code, load = mutant.code(), importlib.machinery.SourceFileLoader.get_code

        def get_code(loader: importlib.machinery.SourceFileLoader, name: str) -> CodeType | None:
            return code if loader.path == str(mutant.path) else load(loader, name)

        importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
        return run_tests(tests)

    return in_child(act, limit_of(mutant, reach))


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
    same, killed, left, failing = explained(), 0, [], []
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
        alive = survivors(name, found, reach)
        killed, left = killed + len(found) - len(alive), left + alive
        print(f"{name}: {len(found) - len(alive)} of {len(found)} killed", flush=True)
        print(*(f"    survives: {mutant}" for mutant in alive), sep="\n", end="\n" if alive else "", flush=True)
    total = killed + len(left)
    if total:
        print(f"{killed} of {total} killed, {killed / total:.1%}; {len(same)} are explained as equivalent")
    return int(bool(failing) or killed < 0.95 * total)


if __name__ == "__main__":
    sys.exit(main())
