"""The package's face: light to import, every public name resolves, one version."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

import persona_lens

ROOT = Path(persona_lens.__file__).parent
HEAVY = (
    "torch",
    "transformers",
    "transformer_lens",
    "sklearn",
    "scipy",
    "numpy",
    "matplotlib",
    "pandas",
    "pydantic",
    "rich",
    "typer",
)


def loaded_after(code: str) -> set[str]:
    """Top-level modules of a fresh interpreter after some code."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(json.loads(found.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_after("import persona_lens; dir(persona_lens); persona_lens.__version__")
    assert "persona_lens" in loaded
    assert not loaded & set(HEAVY)


def test_a_name_loads_what_it_needs_and_no_more() -> None:
    loaded = loaded_after("import persona_lens; persona_lens.load_trait('evil'); persona_lens.list_traits()")
    assert "pydantic" in loaded, "the control: the names of modules are seen"
    assert not loaded & {"torch", "transformers", "transformer_lens", "matplotlib", "sklearn"}


@pytest.mark.parametrize("name", persona_lens.__all__)
def test_every_public_name_resolves_and_is_then_at_hand(name: str) -> None:
    value = getattr(persona_lens, name)
    assert value is not None
    assert vars(persona_lens)[name] is value
    if name != "__version__" and not isinstance(value, ModuleType):
        assert getattr(importlib.import_module(value.__module__), name) is value
        assert value.__module__.startswith("persona_lens.")


def test_the_package_lists_its_public_names_only() -> None:
    assert dir(persona_lens) == sorted(persona_lens.__all__)
    assert len(set(persona_lens.__all__)) == len(persona_lens.__all__)


def test_what_type_checkers_see_is_what_is_public() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    names = {alias.name for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert names | {"__version__"} == set(persona_lens.__all__)


def test_an_unknown_name_is_an_error_that_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match="no attribute 'extrct'") as caught:
        persona_lens.extrct  # noqa: B018
    assert all(name in str(caught.value) for name in persona_lens.__all__)
    assert not hasattr(persona_lens, "extrct")
    with pytest.raises(ImportError):
        exec("from persona_lens import extrct")


def test_the_version_is_written_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z0-9.+-]*)", persona_lens.__version__)
    written = [p for p in ROOT.rglob("*.py") if re.search(r"^_*version_*\s*(: \w+)?=", p.read_text(encoding="utf-8"), re.MULTILINE)]
    assert written == [ROOT / "__init__.py"]
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "persona_lens/__init__.py"
    assert version("persona-lens") == persona_lens.__version__
