"""Imports go down the layers of the design, never up, and the command line starts light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ganscale

PACKAGE = Path(ganscale.__file__).parent

LAYERS = (
    (
        "errors",
        "config",
        "world",
        "processes",
        "provenance",
        "run_directory",
        "atomic_files",
        "json_lines",
        "periodic",
        "user_cache",
        "storage",
    ),
    ("data", "models", "objectives", "augment", "ema", "tracking", "metrics"),
    ("generation", "checkpoint"),
    ("evaluation",),
    ("training",),
    ("launch", "rating", "report", "ray", "run"),
    ("cli", "doctor", "__main__"),
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}
ONLY_TORCH = ("models", "objectives", "augment", "ema")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
PARTS = [name for name in MODULES if name != "ganscale"]


@dataclass(frozen=True)
class Import:
    """One imported module, and whether it is imported when the importer is."""

    name: str
    lazy: bool


def imports_of(source: str) -> list[Import]:
    return list(_walk(ast.parse(source), lazy=False))


def _walk(node: ast.AST, *, lazy: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, lazy)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            yield Import(whole if whole in MODULES else str(node.module), lazy)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for statement in node.orelse:
            yield from _walk(statement, lazy=lazy)
    else:
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from _walk(child, lazy=inside)


def part_of(module: str) -> str | None:
    """The second word of a module of ganscale; None for others and for the root."""
    words = module.split(".")
    return words[1] if words[0] == "ganscale" and len(words) > 1 else None


def imports_in(module: str) -> list[Import]:
    return imports_of(MODULES[module].read_text())


def test_the_walk_sees_every_kind_of_import() -> None:
    source = (
        "import torch.nn as nn\n"
        "from ganscale import config\n"
        "from ganscale.data.order import Order\n"
        "if TYPE_CHECKING:\n    import ray\n"
        "def f():\n    from ganscale.training import loop\n"
    )
    assert imports_of(source) == [
        Import("torch.nn", lazy=False),
        Import("ganscale.config", lazy=False),
        Import("ganscale.data.order", lazy=False),
        Import("ganscale.training.loop", lazy=True),
    ]


def broken(rule: Callable[[str], set[str]], modules: Iterable[str]) -> dict[str, set[str]]:
    """What breaks a rule, by module; empty where all modules keep it."""
    return {module: found for module in modules if (found := rule(module))}


def test_every_module_has_a_layer() -> None:
    assert not {part_of(module) for module in PARTS} - set(LAYER_OF)


def test_modules_import_from_their_own_or_a_lower_layer() -> None:
    def upward(module: str) -> set[str]:
        own = LAYER_OF[str(part_of(module))]
        parts = {str(part_of(found.name)) for found in imports_in(module)} - {"None"}
        return {part for part in parts if LAYER_OF[part] > own}

    assert not broken(upward, PARTS)


def test_the_root_imports_the_rest_only_inside_functions() -> None:
    eager = [found.name for found in imports_in("ganscale") if not found.lazy]
    assert {name.split(".")[0] for name in eager} <= set(sys.stdlib_module_names)


def test_models_objectives_and_ema_import_only_torch() -> None:
    allowed = {*sys.stdlib_module_names, "torch"}

    def foreign(module: str) -> set[str]:
        return {
            found.name
            for found in imports_in(module)
            if found.name.split(".")[0] not in allowed and part_of(found.name) != part_of(module)
        }

    assert not broken(foreign, [m for m in PARTS if part_of(m) in ONLY_TORCH])


def test_only_launch_imports_ray() -> None:
    def of_ray(module: str) -> set[str]:
        return {found.name for found in imports_in(module) if found.name.split(".")[0] == "ray"}

    assert not broken(of_ray, [m for m in MODULES if part_of(m) != "launch"])


def test_the_lowest_layer_loads_without_torch() -> None:
    def of_torch(module: str) -> set[str]:
        eager = {found.name.split(".")[0] for found in imports_in(module) if not found.lazy}
        return eager & {"torch"}

    assert not broken(of_torch, [m for m in PARTS if LAYER_OF[str(part_of(m))] == 0])


def test_every_module_opens_by_saying_what_it_is() -> None:
    docstrings = {m: ast.get_docstring(ast.parse(path.read_text())) for m, path in MODULES.items()}
    assert not [m for m, text in docstrings.items() if not (text or "").split("\n")[0].strip()]


def test_the_order_and_the_configuration_need_no_torch() -> None:
    code = (
        "import ganscale.data.order, ganscale.config, ganscale.run_directory, sys;"
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_the_command_line_loads_neither_torch_nor_ray() -> None:
    code = "import ganscale.cli, sys; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_what_manages_jobs_waits_for_no_torch() -> None:
    code = "import ganscale.launch.ray_jobs, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_ray_is_started_without_waiting_for_torch_and_a_driver_needs_no_torchvision() -> None:
    code = (
        "import sys;"
        "from ganscale.cli import training;"
        "from ganscale.launch import ray_cluster;"
        "assert 'torch' not in sys.modules;"
        "from ganscale.launch import ray_train, start;"
        "assert not {'torchvision', 'torch._dynamo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_a_report_reads_files_and_needs_no_code_that_trains() -> None:
    lower = ("config", "errors", "tracking", *LAYERS[0])
    lazy_and_eager = {
        found.name
        for module in MODULES
        if part_of(module) == "report"
        for found in imports_in(module)
        if part_of(found.name) not in (None, "report", *lower)
    }
    assert not lazy_and_eager
    code = "import ganscale.report, sys; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
