"""The package's modules import only what stands above them: no cycle, imports inside functions included."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import lomo_kernels

FOLDER = Path(lomo_kernels.__file__).parent


def imports_of(folder: Path) -> dict[str, set[str]]:
    """By module: the package's modules that it imports, anywhere in its file."""
    paths = {".".join(path.relative_to(folder.parent).with_suffix("").parts): path for path in folder.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                target = ".".join([*base, alias.name])
                found[name].add(target if target in modules else ".".join(base))
        found[name] &= modules.keys() - {name, ".".join(package)}  # a package is there before its modules
    return found


def test_there_is_no_cycle() -> None:
    found = imports_of(FOLDER)
    assert len(found) > 70 and "lomo_kernels.optim.passes" in found["lomo_kernels.optim.training_step"]
    graphlib.TopologicalSorter(found).prepare()  # raises CycleError, which names one


def test_a_cycle_is_seen_also_inside_a_function(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text("from .b import two\n")
    (package / "b.py").write_text("def two():\n    from . import a\n")
    with pytest.raises(graphlib.CycleError, match=r"package\.[ab]"):
        graphlib.TopologicalSorter(imports_of(package)).prepare()


def test_only_a_forced_backend_imports_the_oracle() -> None:
    importers = {name for name, others in imports_of(FOLDER).items() if "lomo_kernels.reference" in others}
    assert importers == {"lomo_kernels.backends"}
    text = (FOLDER / "backends.py").read_text()
    assert text.count("    from . import reference") == text.count("import reference") == 1, "inside a function"
