"""The API reference: every public name says what it is, in the words of its signature, and every example runs."""

import ast
import builtins
import doctest
import importlib
import inspect
import json
import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pytest

import persona_lens
from persona_lens import errors
from persona_lens.extraction import ExtractionRun
from persona_lens.models import ChatModel

ROOT = Path(persona_lens.__file__).parent
# the command line documents itself by --help, and the reproduction by its report
UNCHECKED = ("cli", "reproduction", "pocket", "pocket_lab")
WITHOUT = {"__version__"}  # says what it is
SECTION = re.compile(r"^(Attributes|Args|Returns|Raises|Example):$")

ENTRY_POINTS = {
    "models.loading": "load_model",
    "models.chat_model": "ChatModel.chat, ChatModel.generate",
    "extraction.pipeline": "extract",
    "vectors": "PersonaVectors.project, PersonaVectors.save, PersonaVectors.load",
    "steering.interventions": "add, add_increments, ablate, cap, rotate",
    "steering.plan": "steer, plan, Plan.explain",
    "sweeps": "sweep",
    "sampling.local": "sample",
    "monitoring.live": "monitor",
    "monitoring.reading": "read",
    "geometry.cosines": "cosines",
    "geometry.space": "space_of_runs",
    "finetuning.training": "finetune",
    "finetuning.shift": "shift",
    "finetuning.defences": "prevent",
    "screening.run": "screen",
    "screening.ranking": "ranking",
    "screening.flagging": "flag",
    "judges.judge": "scripted",
    "judges.endpoint": "endpoint_judge",
    "judges.checking": "check_judge",
    "exchange.files": "read_vectors, write_vectors",
    "baking.export": "bake",
    "evaluation.scores": "trait_scores",
    "traits.files": "load_trait",
}


def sources() -> Iterator[tuple[str, str]]:
    """Every module of the package with its text."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if len(parts) < 2 or parts[1] not in UNCHECKED:
            yield ".".join(parts).removesuffix(".__init__"), path.read_text(encoding="utf-8")


def documented_by(tree: ast.AST, before: str = "") -> Iterator[tuple[str, str]]:
    """Qualified names of functions and classes, with their docstrings."""
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield before + node.name, ast.get_docstring(node) or ""
            yield from documented_by(node, f"{before}{node.name}.")


# read off the sources, so that collecting the tests imports nothing
EXAMPLES = [
    f"{module}:{name}"
    for module, text in sources()
    if ">>> " in text
    for name, doc in documented_by(ast.parse(text))
    if ">>> " in doc
]


def public() -> Iterator[tuple[str, Any]]:
    """What `__all__` of the package and of its rooms names; of a room without one, what it defines."""
    rooms = [path.stem for path in sorted(ROOT.iterdir()) if path.suffix == ".py" or (path / "__init__.py").exists()]
    rooms = [room for room in rooms if not room.startswith("_") and room not in UNCHECKED]
    seen: set[int] = set()
    for name in ("persona_lens", *(f"persona_lens.{room}" for room in rooms), "persona_lens.screening.sources"):
        module = importlib.import_module(name)
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == name and key[0] != "_"]
        for key in getattr(module, "__all__", own):
            value = getattr(module, key)
            if not inspect.ismodule(value) and id(value) not in seen:
                seen.add(id(value))
                yield f"{name}.{key}", value


def function_of(member: Any) -> Any:
    """The function behind a method or property; None for anything else."""
    for kind, part in ((property, "fget"), (cached_property, "func"), (staticmethod, "__func__"), (classmethod, "__func__")):
        if isinstance(member, kind):
            return getattr(member, part)
    return member if inspect.isfunction(member) else None


def described() -> Iterator[tuple[str, Any]]:
    """Public functions and classes, and the public methods and properties of these."""
    for name, value in public():
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            yield name, value
            for key, member in vars(value).items():
                function = function_of(member)
                if function is not None and not key.startswith("_") and value.__module__.startswith("persona_lens"):
                    yield f"{name}.{key}", function


def sections(described: Any) -> dict[str, list[str]]:
    """The lines of a docstring's sections, by title; what stands before them is called ''."""
    found: dict[str, list[str]] = {"": []}
    title = ""
    for line in (inspect.getdoc(described) or "").splitlines():
        heading = SECTION.match(line)
        title = heading.group(1) if heading else title if line.startswith(" ") or not line else ""
        found.setdefault(title, [])
        if not heading:
            found[title].append(line)
    return found


def entries(described: Any, title: str) -> list[str]:
    """The names that a section's entries begin with."""
    lines = sections(described).get(title, [])
    heads = [match.group(1) for line in lines if (match := re.match(r"    (\w[\w., ]*): ", line))]
    return [name.strip() for head in heads for name in head.split(",")]


def error_named(name: str) -> type[BaseException] | None:
    found = getattr(errors, name, None) or getattr(builtins, name, None)
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


def raised_in(function: Any) -> set[str]:
    """The errors that a function's own lines raise."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    return {e.func.id for e in raised if isinstance(e, ast.Call) and isinstance(e.func, ast.Name)}


def attributes_of(kind: type) -> set[str]:
    """What an object of a class has: fields, properties, and what `__init__` sets."""
    found = {name for base in kind.__mro__ for name in (*vars(base), *inspect.get_annotations(base))}
    made = inspect.unwrap(vars(kind).get("__init__", kind))
    if inspect.isfunction(made) and made.__code__.co_filename.startswith(str(ROOT)):  # not one that dataclass made
        found |= set(re.findall(r"self\.(\w+)", inspect.getsource(made)))
    return found


def test_every_public_function_and_class_says_what_it_is() -> None:
    names = dict(described())
    assert len(names) > 600, "the search for public names finds too few of them"
    silent = [
        name
        for name, value in names.items()
        if not "".join(sections(value)[""]).strip() or (value.__doc__ or "").startswith(f"{value.__name__}(")  # made by dataclass
    ]
    assert not silent, f"without a docstring: {', '.join(silent)}"


def test_every_public_value_says_what_it_is() -> None:
    """A value cannot carry a docstring: a text stands below it where it is defined."""
    values = [
        name for name, value in public() if not (inspect.isfunction(value) or inspect.isclass(value) or isinstance(value, TypeVar))
    ]
    told: set[tuple[str, str]] = set()
    for module, text in sources():
        body = ast.parse(text).body
        for node, below in pairwise(body):
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                told.add((module.split(".")[1], target.id))
    silent = [name for name in values if name.rpartition(".")[2] not in WITHOUT and tuple(name.split(".")[1:3]) not in told]
    assert values
    assert not silent, f"without a text below its definition: {', '.join(silent)}"


def test_documented_arguments_and_attributes_exist() -> None:
    wrong = []
    for name, value in described():
        if inspect.isclass(value):
            wrong += [f"{name}: {a}" for a in entries(value, "Attributes") if a not in attributes_of(value)]
        else:
            parameters = inspect.signature(value).parameters
            wrong += [f"{name}: {a}" for a in entries(value, "Args") if a not in parameters]
    assert not wrong, f"documented, but not there: {'; '.join(wrong)}"


def test_errors_that_a_function_raises_are_documented() -> None:
    wrong = []
    for name, value in described():
        told = entries(value, "Raises")
        unknown = [n for n in told if error_named(n) is None and "." not in n]
        wrong += [f"{name} documents {n}, which is no error" for n in unknown]
        known = tuple(kind for n in told if (kind := error_named(n)) is not None)
        function = vars(value).get("__post_init__") if inspect.isclass(value) else value
        if function is not None:
            kinds = {n: error_named(n) for n in raised_in(function)}
            wrong += [f"{name} raises {n}" for n, kind in kinds.items() if kind is not None and not issubclass(kind, known)]
    assert not wrong, f"not documented under Raises: {'; '.join(wrong)}"


def test_entry_points_have_examples() -> None:
    wanted = {f"persona_lens.{module}:{name}" for module, names in ENTRY_POINTS.items() for name in names.split(", ")}
    assert wanted <= set(EXAMPLES), f"without an example: {wanted - set(EXAMPLES)}"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_run: ExtractionRun) -> Path:
    """A folder to run examples in, with two finished extractions: `runs/optimism`, and another direction as `runs/politeness`."""
    for trait in ("optimism", "politeness"):
        shutil.copytree(small_run.path, tmp_path / "runs" / trait)
    other, v = tmp_path / "runs" / "politeness", small_run.vectors
    manifest = json.loads((other / "run.json").read_text())
    manifest["arguments"]["trait"] = "politeness"
    (other / "run.json").write_text(json.dumps(manifest))
    turned = replace(v, trait="politeness", directions=v.directions.flip(-1), differences=v.differences.flip(-1))
    turned.save(other / "vectors.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("place", EXAMPLES)
def test_examples(place: str, workplace: Path, pocket: ChatModel, small_run: ExtractionRun) -> None:
    module, _, qualified = place.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualified.split("."):
        found = getattr(found, part)
    given = {"pl": persona_lens, "model": pocket, "run": small_run, "v": small_run.vectors, "Path": Path}
    (example,) = doctest.DocTestFinder(recurse=False).find(found, qualified, module=False, globs=given)
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert result.attempted == len(example.examples) > 0
    assert not result.failed, "".join(said)
