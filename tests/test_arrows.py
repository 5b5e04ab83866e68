"""Imports point one way, over all modules, and fast paths stand behind doors.

    python -m pytest tests/test_arrows.py

    storage <- tasks <- {teacher, train_loop, evaluate} <- finetune_cot -> flags
    extras/* -> anything; nothing -> extras, except doors

A door is an import of extras inside a function and under an `if` or `try`, so that the plain line
beside it runs where extras/ was deleted.
"""

import ast
import graphlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from conftest import ROOT

ANSWERS = {"candidates", "selection"}
LOW = {"distributed", "storage", "tasks", "terminal"}
STAGES = {"teacher", "train_loop", "evaluate"}  # none imports another
PARTS = {  # of stages
    "api",
    "batches",
    "chats",
    "checkpoints",
    "completions",
    "curation",
    "decoding",
    "distributed",
    "models",
    "provenance",
    "terminal",
    "tokens",
}
WIRE = {"replies", "servers"}  # of an API
ALLOWED = {  # module: modules outside extras that it may import
    "storage": set(),
    "terminal": {"storage"},
    "candidates": set(),
    "selection": {"candidates"},
    "answers": ANSWERS | {"storage"},
    "tasks": {"answers", "storage", "terminal"},
    "provenance": LOW,
    "parser": LOW | {"provenance"},
    "jobs": LOW | {"api", "chats", "completions", "data.toy", "decoding", "models"},
    "flags": LOW
    | WIRE
    | {"api", "chats", "completions", "curation", "jobs", "parser"}
    | {"provenance", "teacher"},
    "data.toy": LOW,
    "completions": LOW,
    "curation": LOW | {"answers", "completions", "provenance", "replies"},
    "data.prepare": LOW | {"completions", "terminal"},
    "refusals": {"servers"},
    "replies": LOW | {"refusals"},
    "chats": LOW | WIRE,
    "servers": LOW,
    "clients": LOW | WIRE,
    "api": LOW | WIRE | {"clients", "refusals"},
    "steps": LOW | {"answers", "api", "completions", "replies", "selection"},
    "teacher": LOW | {"api", "completions", "replies", "steps"},
    "distributed": {"storage"},
    "models": LOW,
    "tokens": LOW | {"distributed", "models"},
    "batches": {"models", "tokens"},
    "checkpoints": LOW | {"provenance"},
    "sampling": LOW | {"models"},
    "decoding": LOW | {"models", "sampling"},
    "rehearsal": LOW | {"batches", "decoding", "models", "tokens"},
    "train_loop": LOW | {"batches", "checkpoints", "rehearsal", "tokens"},
    "evaluate": LOW | {"completions", "decoding", "models", "terminal"},
    "finetune_cot": LOW | STAGES | PARTS | {"flags", "jobs", "data.toy"},
}
SLOW = {"torch", "transformers", "tokenizers", "numpy", "openai", "matplotlib", "tqdm"}


class Import(NamedTuple):
    """An import statement; the module is `a.b` both for `import a.b` and for `from a import b`."""

    module: str
    line: int
    is_at_start: bool  # it runs when the file is loaded
    is_guarded: bool  # it stands in a function, under an `if` or in a `try` that has an except


def imported_modules(node: ast.Import | ast.ImportFrom, module: str) -> list[str]:
    """Return what a statement of a module may import: of `from a import b` that is a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:  # `from . import b` in extras.a is extras.b
        package = module.split(".")[: -node.level]
        base = ".".join([*package, base]).rstrip(".")
    return [f"{base}.{alias.name}" for alias in node.names]


def is_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) or (isinstance(node, ast.Try) and bool(node.handlers))


def is_skipped(node: ast.AST) -> bool:
    """Tell whether a block does not run when the file is imported."""
    if not isinstance(node, ast.If):
        return False
    return ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")


def imports(source: str, module: str = "") -> Iterator[Import]:
    """Yield the imports of a source, wherever they stand in it."""

    def visit(node: ast.AST, at_start: bool, guarded: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                for name in imported_modules(child, module):
                    yield Import(name, child.lineno, at_start, guarded and not at_start)
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from visit(child, False, False)
            else:
                starts = at_start and not is_skipped(child)
                yield from visit(child, starts, guarded or is_guard(child))

    return visit(ast.parse(source), True, False)


def is_in_extras(module: str) -> bool:
    return module.split(".")[0] == "extras"


def import_graph(sources: dict[str, str], only_at_start: bool = False) -> dict[str, set[str]]:
    """Return {module: modules of the project that it imports}; doors are left out.

    An import of a name (`from tasks import load`) counts as one of its module.
    """
    graph = {}
    for module, source in sources.items():
        found = set()
        for one in imports(source, module):
            if only_at_start and not one.is_at_start:
                continue
            found |= {one.module, one.module.rpartition(".")[0]} & set(sources)
        if not is_in_extras(module):
            found = {name for name in found if not is_in_extras(name)}
        graph[module] = found - {module}  # evaluate imports itself when it is run as a script
    return graph


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of a circle of imports, or []."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        return e.args[1]
    return []


def unguarded_doors(sources: dict[str, str]) -> list[str]:
    """Return "module:line" of the imports of extras by other modules that are no doors."""
    found = []
    for module, source in sources.items():
        for one in imports(source, module):
            if is_in_extras(one.module) and not is_in_extras(module) and not one.is_guarded:
                found.append(f"{module}:{one.line}")
    return found


def modules_at_start(graph: dict[str, set[str]], module: str) -> set[str]:
    """Return the modules that are loaded before the first line of a script runs.

    graph: of imports at the start of modules.
    """
    reached = set()
    waiting = {module}
    while waiting:
        reached |= waiting
        waiting = set().union(*(graph[name] for name in waiting)) - reached
    return reached


def read_sources(*patterns: str) -> dict[str, str]:
    """Return {module: source} of the files of the project that match."""
    sources = {}
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        sources[module.removesuffix(".__init__")] = path.read_text()
    return sources


SOURCES = read_sources("*.py", "data/*.py", "extras/*.py")
GRAPH = import_graph(SOURCES)
START_GRAPH = import_graph(SOURCES, only_at_start=True)
TESTS = read_sources("tests/*.py", "tests/extras/*.py")


# ---- the project


MODULES = [module for module in SOURCES if module != "data" and not is_in_extras(module)]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    """A module imports no other module of the project than those in its row of ALLOWED."""
    assert GRAPH[module] - {"data"} <= ALLOWED[module]


def test_imports_make_no_circle():
    """No modules import each other, extras included, wherever in the file they do."""
    assert find_circle(GRAPH) == []


def test_imports_of_extras_are_doors():
    """Outside extras, nothing imports it at the top of a file, or without a condition."""
    assert unguarded_doors(SOURCES) == []


@pytest.mark.parametrize("script", ["finetune_cot", "evaluate", "data.prepare"])
def test_imports_at_start_are_fast(script):
    """What a script loads before it reads its flags imports nothing large."""
    found = set()
    for module in modules_at_start(START_GRAPH, script):
        for one in imports(SOURCES[module], module):
            if one.is_at_start and one.module.split(".")[0] in SLOW:
                found.add(f"{module}:{one.line}")
    assert found == set()


def test_imports_of_extras_by_tests():
    """The tests of the main modules import nothing of extras, so that they pass without it."""
    main = {name: source for name, source in TESTS.items() if not name.startswith("tests.extras")}
    assert unguarded_doors(main) == []


@pytest.mark.parametrize("name", TESTS)
def test_imports_between_tests(name):
    """What several test files need stands in conftest.py: none imports from another."""
    modules = {one.module.split(".")[0] for one in imports(TESTS[name])}
    assert {module for module in modules if module.startswith("test_")} == set()


# ---- the checks themselves, on small sources

CIRCLES = [
    ({"a": "import b", "b": "import c", "c": "def f():\n    from a import g"}, {"a", "b", "c"}),
    ({"extras.a": "from extras import b", "extras.b": "from . import a"}, {"extras.a", "extras.b"}),
    ({"a": "from a import main"}, set()),
    ({"a": "import b", "b": "import json", "c": "import a, b"}, set()),
    ({"a": "def f():\n    from extras import b", "extras.b": "import a"}, set()),
]
DOORS = [  # source of module a, the lines of imports that are no doors
    ("from extras import b", ["a:1"]),
    ("if True:\n    import extras.b", ["a:2"]),
    ("try:\n    import extras.b\nexcept ImportError:\n    pass", ["a:2"]),
    ("def f():\n    import extras.b as b", ["a:2"]),
    ("if True:\n    def f():\n        from extras.b import g", ["a:3"]),
    ("def f():\n    try:\n        from extras import b\n    finally:\n        pass", ["a:3"]),
    ("class A:\n    from extras import b", ["a:2"]),
    ("def f(fast):\n    if fast:\n        from extras import b", []),
    ("def f(fast):\n    if fast:\n        pass\n    else:\n        from extras import b", []),
    (
        "def f():\n    try:\n        from extras import b\n    except ImportError:\n        b = 1",
        [],
    ),
    ("async def f(fast):\n    for _ in fast:\n        if _:\n            import extras", []),
    ("import extraslike", []),
]


@pytest.mark.parametrize("sources, circle", CIRCLES)
def test_find_circle(sources, circle):
    """A circle is found through imports in functions, and not where a door is part of it."""
    assert set(find_circle(import_graph(sources))) == circle


@pytest.mark.parametrize("source, lines", DOORS)
def test_unguarded_doors(source, lines):
    """A door stands inside a function and under an `if` or a `try` with an except."""
    assert unguarded_doors({"a": source}) == lines


def test_modules_at_start():
    """Loaded at the start is what imports at the top lead to."""
    sources = {
        "a": "import b\nif __name__ == '__main__':\n    import e",
        "b": "from c import f\nif TYPE_CHECKING:\n    import d",
        "c": "def f():\n    import d",
        "d": "",
        "e": "",
    }
    assert modules_at_start(import_graph(sources, only_at_start=True), "a") == {"a", "b", "c"}
