"""The layout: imports go one way, entry points load nothing heavy, files stay small and are named for what they hold."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "clipkit"
# A module imports from its own level and from lower ones; within a level without cycles. The longest prefix counts.
LEVELS = {
    "clipkit.config": 0, "clipkit.data.batch": 0,
    # of interop the mappings: pure functions on names, configurations and state dicts
    "clipkit.interop.clip_bpe": 0, "clipkit.interop.from_transformers": 0, "clipkit.interop.transformers_weights": 0,
    "clipkit.interop.to_transformers_text": 0, "clipkit.interop.to_transformers_image": 0,
    "clipkit.interop.onnx_file": 1, "clipkit.interop": 2,
    "clipkit.model": 1, "clipkit.losses": 1, "clipkit.data": 1, "clipkit.training": 1,
    "clipkit.evaluation": 2,
    "clipkit.diffusion": 3,
    "clipkit.commands": 4,
}
ENTRY_POINTS = ("clipkit", "clipkit.__main__", "clipkit.config", "clipkit.commands")  # start within a second
MAX_LINES = 330
EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def import_nodes(node: ast.AST, *, functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run: not those for type checkers; those inside functions only if asked for."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not is_type_checking(child) and (functions or not isinstance(child, ast.FunctionDef | ast.Lambda)):
            yield from import_nodes(child, functions=functions)


def imports(name: str, *, functions: bool) -> set[str]:
    """Modules that a module of clipkit imports, with the packages whose __init__ runs on the way."""
    found = set()
    for node in import_nodes(ast.parse(FILES[name].read_text(encoding="utf-8")), functions=functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{name} imports relatively; write the whole name"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one if one in FILES else str(node.module) for one in inner}
    return found - {name}


def level(name: str) -> int:
    prefixes = [prefix for prefix in LEVELS if name == prefix or name.startswith(f"{prefix}.")]
    assert prefixes, f"{name} has no level; give its package a place in LEVELS"
    return LEVELS[max(prefixes, key=len)]


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "clipkit" and name != "clipkit"}


def parts() -> list[str]:
    """All modules but the two entries, which stand above the levels."""
    return [name for name in FILES if name not in ("clipkit", "clipkit.__main__")]


def test_imports_go_to_the_same_level_or_below():
    wrong = [f"{name} imports {other}" for name in parts() for other in sorted(own(imports(name, functions=True)))
             if level(other) > level(name)]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others():
    graph = {name: {other for other in own(imports(name, functions=True)) if other in FILES} for name in parts()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "cycle: " + " -> ".join([*path[path.index(name):], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_commands_never_import_each_other():
    def command(name: str) -> str:
        return ".".join(name.split(".")[:3])  # a command is a file, or a package of its own

    commands = [name for name in FILES if name.startswith("clipkit.commands.")]
    wrong = [f"{name} imports {other}" for name in commands for other in own(imports(name, functions=True))
             if other.startswith("clipkit.commands.") and command(other) != command(name)]
    assert not wrong, "\n".join(wrong)


def test_entry_points_reach_only_the_standard_library_at_module_level():
    waiting = [(name, name) for name in FILES if name in ENTRY_POINTS or name.startswith(ENTRY_POINTS[2:])]
    seen, wrong = set(), []
    while waiting:
        name, path = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for other in imports(name, functions=False):
            if other in FILES:
                waiting.append((other, f"{path} -> {other}"))
            elif other.split(".")[0] not in sys.stdlib_module_names:
                wrong.append(f"{path} -> {other}: import it inside the function that needs it")
    assert len(seen) > 10
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("command", [["-c", "import clipkit"], ["-m", "clipkit", "--help"],
                                     ["-m", "clipkit", "pretrain", "--help"], ["-m", "clipkit", "shards", "--help"],
                                     ["-m", "clipkit", "pretrain", "optim.nmae=x"]], ids=" ".join)
def test_import_help_and_wrong_keys_load_no_library(command):
    done = subprocess.run([sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.split("|")[2].strip().split(".")[0] for line in lines}
    assert "clipkit" in loaded
    assert not loaded & {"torch", "hydra", "omegaconf", "numpy", "open_clip", "timm", "pandas", "PIL", "matplotlib"}


def test_files_stay_within_their_length():
    files = [*FILES.values(), *(ROOT / "scripts").rglob("*.py")]
    long = {str(path.relative_to(ROOT)): lines for path in files
            if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines; divide them by what they hold: {long}"


def test_no_file_has_a_name_that_says_nothing():
    named = [str(path.relative_to(ROOT)) for path in [*PACKAGE.rglob("*"), *(ROOT / "tests").rglob("*.py")]
             if path.stem.removeprefix("test_") in EMPTY_NAMES]
    assert not named


def test_every_file_says_what_it_holds():
    missing = [name for name, path in FILES.items() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert not missing, f"say in one to three lines what they hold: {missing}"
