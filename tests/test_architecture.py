"""The house rules that a test can keep: directions of imports, sizes, what must import without torch."""

from __future__ import annotations

import ast
import gc
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("protocol", "runtime", "worker", "coordinator", "manyhands")
MAY_IMPORT = {
    "protocol": {"protocol"},
    "runtime": {"runtime", "protocol"},
    "worker": {"worker", "runtime", "protocol"},
    "coordinator": {"coordinator", "protocol"},
    "manyhands": {"manyhands", "protocol"},
}
# The command starts the daemons, lazily: only inside functions of its command-line folder.
LAZILY = {"manyhands": {"worker", "coordinator"}}
WITHOUT_TORCH = ("protocol", "coordinator", "manyhands")
MAX_LINES = 350


def modules(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "demo_model" not in p.parts)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield (top-level package, stands inside a function) for each import of a module."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name.split(".")[0], inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                yield (child.module or "").split(".")[0], inside
            else:
                yield from walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    return walk(ast.parse(path.read_text()), False)


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """A collection while CPython 3.11 builds a syntax tree may end it with a SystemError."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_run_downwards(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(folder)
        for name, inside in imports(path)
        if name in FOLDERS
        and name not in MAY_IMPORT[folder]
        and not (inside and name in LAZILY.get(folder, set()) and "cli" in path.relative_to(ROOT).as_posix())
    ]
    assert not wrong


@pytest.mark.parametrize("folder", WITHOUT_TORCH)
def test_no_torch_where_none_is_needed(folder: str) -> None:
    wrong = [str(path) for path in modules(folder) for name, _ in imports(path) if name in {"torch", "transformers"}]
    assert not wrong


def test_runtime_opens_no_socket() -> None:
    wrong = [str(p) for p in modules("runtime") for name, _ in imports(p) if name in {"socket", "zmq", "asyncio"}]
    assert not wrong


@pytest.mark.parametrize("folder", FOLDERS)
def test_modules_hold_one_noun(folder: str) -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules(folder)}
    assert not {name: size for name, size in sizes.items() if size > MAX_LINES}


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_module_says_what_it_does(folder: str) -> None:
    assert not [str(path) for path in modules(folder) if not ast.get_docstring(ast.parse(path.read_text()))]


def test_nothing_is_unpickled() -> None:
    wrong = [
        str(path)
        for folder in FOLDERS
        for path in modules(folder)
        for name, _ in imports(path)
        if name in {"pickle", "marshal", "shelve"}
    ]
    assert not wrong


def test_no_foreign_distribution_owns_our_folders() -> None:
    owners = importlib.metadata.packages_distributions()
    for folder in FOLDERS:
        assert set(owners.get(folder, ["manyhands"])) == {"manyhands"}


BLOCK = "import sys; blocked = {blocked}\nfor name in blocked: sys.modules[name] = None\nimport {module}"


@pytest.mark.parametrize(
    ("module", "blocked"),
    [
        ("manyhands", ["torch", "tokenizers", "jinja2", "safetensors", "transformers", "huggingface_hub"]),
        ("manyhands.cli", ["torch", "tokenizers", "jinja2", "safetensors", "transformers", "huggingface_hub"]),
        ("coordinator.daemon", ["torch", "safetensors", "transformers"]),
        ("worker.daemon", ["safetensors", "tokenizers", "uvloop", "jinja2", "transformers", "huggingface_hub"]),
    ],
)
def test_imports_with_packages_absent(module: str, blocked: list[str]) -> None:
    code = BLOCK.format(blocked=blocked, module=module)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_architecture_page_names_each_module(folder: str) -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    missing = [
        path.stem for path in modules(folder) if not path.stem.startswith("__") and f"| `{path.stem}` |" not in page
    ]
    assert not missing
