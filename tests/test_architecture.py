"""Holds the layout: layers, cycles, who may import what, sizes.

The rules are those of docs/design/foundation.md. `check` works on any tree,
so that the last tests can show it a bad one: a checker that cannot fail
checks nothing.
"""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "legato"

# From the lowest. A module (or package) imports only from layers below its
# own, or from its own layer without a cycle.
LAYERS = [
    {"errors", "types", "version"},
    {
        "config",
        "schedule",
        "when",
        "rng",
        "storage",
        "backend_choice",
        "interrupts",
        "machine",
        "phases",
    },
    {"state", "capture", "compat", "settings"},
    {"backends", "files", "workers"},
    {"checkpoint", "data", "losses", "metrics", "run_directory"},
    {"loop", "pace", "readings"},
    {
        "task",
        "optimizers",
        "compiled",
        "evaluation",
        "on_host",
        "by_shape",
        "calls",
        "training",
        "parts",
        "identity",
        "program",
        "restoring",
        "exactness",
        "initial",
    },
    {
        "summaries",
        "sinks",
        "callbacks",
        "progress",
        "recorder",
        "recovery",
        "diff",
    },
    {"session", "trainer", "building", "experiment", "exporting", "fitting"},
    {"tasks", "verify", "profiling", "testing"},
    {"cli", "__main__"},
    {"__init__"},
]

BACKENDS = {"jax", "jaxlib", "optax", "tensorflow", "torch"}
MAY_IMPORT_BACKENDS = ("backends.", "data.adapters.", "export.")
MAY_IMPORT_KERAS_SRC = ("compat.",)

MAX_MODULE_LINES = 600
MAX_FUNCTION_LINES = 100
# Sizes are a question, and this is where it is answered:
# "module" or "module:function" -> why it is better in one piece.
LARGE: dict[str, str] = {
    "loop:run": "the whole loop is to be seen at once",
    "fitting:fit": "all arguments of keras.Model.fit, and what they do",
}


@dataclasses.dataclass(frozen=True)
class Import:
    """One import statement's target, seen from a module of the package."""

    module: str  # "legato.config.model", or "jax.numpy" from outside
    line: int
    typing_only: bool


@dataclasses.dataclass
class Module:
    name: str  # within the package: "config.model"; "" for its root
    path: Path
    tree: ast.Module
    lines: int
    imports: list[Import]

    @property
    def part(self) -> str:
        return self.name.split(".")[0] or "__init__"


def read_modules(root: Path) -> dict[str, Module]:
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        text = path.read_text("utf-8")
        tree = ast.parse(text)
        name = ".".join(parts)
        modules[name] = Module(name, path, tree, len(text.splitlines()), [])
    for module in modules.values():
        module.imports = list(find_imports(module, modules))
    return modules


def find_imports(
    module: Module, modules: dict[str, Module]
) -> Iterator[Import]:
    typing_only = {
        id(inner)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(module.tree):
        hidden = id(node) in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, hidden)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = module.path.name == "__init__.py"
                up = module.name.split(".") if module.name else []
                up = up[: len(up) - node.level + is_package]
                base = ".".join(filter(None, ["legato", *up, base]))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = inner.removeprefix("legato.") in modules
                yield Import(inner if is_module else base, node.lineno, hidden)


def layer_of(part: str) -> int | None:
    for index, layer in enumerate(LAYERS):
        if part in layer:
            return index
    return None


def check(root: Path, large: dict[str, str]) -> list[str]:
    """Returns what is wrong with a package, one line for each."""
    modules = read_modules(root)
    problems = []
    for module in modules.values():
        problems += check_layers(module, modules)
        problems += check_outside(module)
    problems += check_cycles(modules)
    problems += check_sizes(modules, large)
    return problems


def check_layers(module: Module, modules: dict[str, Module]) -> list[str]:
    own = layer_of(module.part)
    if own is None:
        return [f"{module.path.name}: {module.part!r} has no layer in LAYERS"]
    problems = []
    for found in module.imports:
        first, _, rest = found.module.partition(".")
        if first != "legato":
            continue
        where = f"{module.path.name}:{found.line} ({module.name or 'legato'})"
        if not rest:
            if module.part not in ("__init__", "cli"):
                problems.append(f"{where}: imports the package's root")
            continue
        part = rest.split(".")[0]
        other = layer_of(part)
        if other is None or part not in {m.part for m in modules.values()}:
            problems.append(f"{where}: imports legato.{rest}: no such module")
        elif other > own:
            problems.append(
                f"{where}: layer {own} imports legato.{rest} of layer {other}"
            )
    return problems


def check_outside(module: Module) -> list[str]:
    problems = []
    name = f"{module.name}."
    for found in module.imports:
        top = found.module.split(".")[0]
        where = f"{module.path.name}:{found.line} ({module.name})"
        if top in BACKENDS and not name.startswith(MAY_IMPORT_BACKENDS):
            problems.append(f"{where}: imports {found.module}")
        private = f"{found.module}.".startswith("keras.src.")
        if private and not name.startswith(MAY_IMPORT_KERAS_SRC):
            problems.append(f"{where}: imports {found.module}")
    return problems


def check_cycles(modules: dict[str, Module]) -> list[str]:
    """Finds import cycles; an import inside a function counts too."""
    graph = {
        name: {
            target
            for found in module.imports
            if not found.typing_only
            and found.module.startswith("legato.")
            and (target := known(found.module, modules)) not in (None, name)
        }
        for name, module in modules.items()
    }
    problems: list[str] = []
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            cycle = [*trail[trail.index(name) :], name]
            problems.append(f"import cycle: {' -> '.join(cycle)}")
            return
        if name in done:
            return
        for target in sorted(graph[name]):
            visit(target, [*trail, name])
        done.add(name)

    for name in graph:
        visit(name, [])
    return problems


def known(target: str, modules: dict[str, Module]) -> str | None:
    name = target.removeprefix("legato.")
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def check_sizes(modules: dict[str, Module], large: dict[str, str]) -> list[str]:
    found = {}
    for name, module in modules.items():
        if module.lines > MAX_MODULE_LINES:
            found[name] = f"{module.lines} lines"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    found[f"{name}:{node.name}"] = f"{lines} lines"
    problems = [
        f"{name}: {size}; split it, or give a reason in LARGE"
        for name, size in found.items()
        if not large.get(name)
    ]
    problems += [
        f"{name}: is in LARGE and not large (any more)"
        for name in large.keys() - found.keys()
    ]
    return problems


def test_the_package_keeps_its_layout():
    problems = check(SOURCE, LARGE)
    assert not problems, "\n" + "\n".join(problems)


def test_public_names_have_docstrings_and_annotations():
    legato = pytest.importorskip("legato")
    problems = []
    for name in getattr(legato, "__all__", []):
        value = getattr(legato, name)
        if not callable(value):
            continue
        if not (value.__doc__ or "").strip():
            problems.append(f"{name} has no docstring")
        functions = {name: value} if inspect.isfunction(value) else {}
        if inspect.isclass(value):
            functions |= {
                f"{name}.{attribute}": method
                for attribute, method in vars(value).items()
                if inspect.isfunction(method) and not attribute.startswith("_")
            }
        for label, function in functions.items():
            problems += missing_annotations(label, function)
            if not (inspect.getdoc(function) or "").strip():
                problems.append(f"{label} has no docstring")
    assert not problems, "\n" + "\n".join(problems)


def missing_annotations(label: str, function) -> list[str]:
    signature = inspect.signature(function)
    problems = [
        f"{label}: {parameter.name} has no annotation"
        for parameter in signature.parameters.values()
        if parameter.annotation is parameter.empty and parameter.name != "self"
    ]
    if signature.return_annotation is signature.empty:
        problems.append(f"{label} has no return annotation")
    return problems


def write_package(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return root


GOOD = {
    "__init__.py": "from legato.loop import run\n",
    "errors.py": "class LegatoError(Exception): pass\n",
    "storage/__init__.py": "from legato.storage.commit import commit\n",
    "storage/commit.py": "from legato.errors import LegatoError\ncommit = 1\n",
    "backends/__init__.py": "import keras\n",
    "backends/jax.py": "import jax\n",
    "compat/__init__.py": "from keras.src import tree\n",
    "loop.py": "from legato import storage\nfrom legato import backends\n",
}


def test_a_good_tree_passes(tmp_path):
    assert check(write_package(tmp_path, GOOD), {}) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("errors.py", "import legato.loop\n", "layer 0 imports"),
        (
            "errors.py",
            "def f():\n    from legato.loop import run\n",
            "layer 0 imports",
        ),
        (
            "errors.py",
            "if TYPE_CHECKING:\n    from legato.loop import run\n",
            "layer 0 imports",
        ),
        ("storage/commit.py", "from . import files\n", "import cycle"),
        (
            "storage/commit.py",
            "from legato.storage import commit as c, other\n",
            "import cycle: storage -> storage.commit -> storage",
        ),
        ("loop.py", "import legato\n", "imports the package's root"),
        ("loop.py", "from legato import run\n", "imports the package's root"),
        ("loop.py", "from legato import gone\n", "imports the package's root"),
        ("loop.py", "import legato.gone\n", "no such module"),
        ("loop.py", "def f():\n    import jax.numpy\n", "imports jax.numpy"),
        ("loop.py", "from torch import nn\n", "imports torch"),
        ("loop.py", "import keras.src.backend\n", "imports keras.src"),
        ("loop.py", "from keras.src import tree\n", "imports keras.src"),
        ("helpers.py", "", "has no layer"),
        ("loop.py", "#\n" * 601, "601 lines; split it"),
        (
            "loop.py",
            "def f():\n" + "    pass\n" * 100,
            "loop:f: 101 lines; split it",
        ),
    ],
)
def test_a_bad_tree_fails(tmp_path, name, text, expected):
    root = write_package(tmp_path, GOOD | {name: text})
    problems = check(root, {})
    assert any(expected in problem for problem in problems), problems


def test_an_entry_of_the_allow_list_excuses_and_must_be_needed(tmp_path):
    root = write_package(tmp_path, GOOD | {"loop.py": "#\n" * 601})
    assert check(root, {"loop": "it is the loop"}) == []
    (root / "loop.py").write_text("")
    assert any("not large" in each for each in check(root, {"loop": "why"}))


def test_missing_annotations_are_found():
    def bare(a, b: int): ...

    assert missing_annotations("bare", bare) == [
        "bare: a has no annotation",
        "bare has no return annotation",
    ]
