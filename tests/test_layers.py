"""The rule of the house: imports point down only, and nothing that could run someone else's code is imported at all."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("data", "model", "training", "orchestration", "runtime")
MAY_IMPORT = {
    "data": {"runtime"},
    "model": {"runtime"},
    "training": {"data", "model", "runtime"},
    "orchestration": {"runtime"},
    "runtime": set[str](),
}
MAY_IMPORT_CONFIG_OF = {"orchestration": {"data", "model", "training"}, "runtime": {"data", "model", "training", "orchestration"}}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "torchvision"}
FORBIDDEN_ARGUMENTS = {("trust_remote_code", True), ("weights_only", False), ("allow_pickle", True)}


def files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


def allowed(room: str, module: str) -> bool:
    other, _, rest = module.partition(".")
    if other not in ROOMS or other == room or other in MAY_IMPORT[room]:
        return True
    return other in MAY_IMPORT_CONFIG_OF.get(room, set()) and rest.split(".")[0] == "config"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down_only(room: str):
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in files(room)
        for line, module in imported(file)
        if not allowed(room, module)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rule_itself_refuses_what_it_should():
    assert not allowed("data", "model.vae.to_pixels") and not allowed("model", "data.loader") and not allowed("data", "training.config.X")
    assert not allowed("orchestration", "training.stages.TRAINED") and not allowed("runtime", "data.loader.Batch")
    assert (
        allowed("training", "data.loader.Batch") and allowed("orchestration", "training.config.LaunchConfig") and allowed("data", "numpy")
    )


def test_no_module_that_unpickles_is_imported():
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in files(*ROOMS, "tests")
        for line, module in imported(file)
        if module.split(".")[0] in FORBIDDEN_MODULES
    ]
    assert not wrong, "\n".join(wrong)


def test_no_call_asks_for_remote_code_or_unsafe_loading():
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno} passes {keyword.arg}={keyword.value.value}"
        for file in files(*ROOMS, "tests")
        for node in ast.walk(ast.parse(file.read_text(), str(file)))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in FORBIDDEN_ARGUMENTS
    ]
    assert not wrong, "\n".join(wrong)


def test_pyproject_packages_are_the_rooms():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [file.parent.name for file in ROOT.glob("*/__init__.py") if file.parent.name != "tests"]
    assert sorted(folders) == sorted(ROOMS)
    inner = [".".join(file.relative_to(ROOT).parent.parts) for room in ROOMS for file in ROOT.glob(f"{room}/**/__init__.py")]
    assert sorted(listed) == sorted(inner), "a package that is not listed is missing from the wheel"


def test_dagster_selection_strings_resolve_in_this_environment():
    """They break where DVC's antlr pin is installed beside Dagster."""
    from dagster import AssetSelection

    assert AssetSelection.from_string("*") is not None
    assert AssetSelection.from_string("+key:sft") is not None


def test_the_command_line_answers_without_the_heavy_imports():
    code = (
        "import sys; from orchestration.cli import app, main; sys.argv = ['deepgen', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'mlflow', 'dagster'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
