"""The layering of the library: imports go one way, and the algorithms know no environment."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Which modules may be imported by which: those of the same or of a lower layer; the first prefix that fits counts
LAYERS = [
    ("sb3_mpg.common.type_aliases", 0),
    ("sb3_mpg.common.checks", 1),
    ("sb3_mpg.common.randomness", 1),
    ("sb3_mpg.common.utils", 1),
    ("sb3_mpg.common.units", 1),
    ("sb3_mpg.common.tables", 1),
    ("sb3_mpg.common.torch_layers", 1),
    ("sb3_mpg.common.balance", 1),
    ("sb3_mpg.common.precision", 1),
    ("sb3_mpg.common.processes", 1),
    ("sb3_mpg.common.callbacks", 1),
    # What trains imports nothing of the checker but its validation, which the algorithms call
    ("sb3_mpg.common.models.checking", 4),
    ("sb3_mpg.common.models", 2),
    ("sb3_mpg.common.buffers", 3),
    ("sb3_mpg.common.rollouts", 3),
    ("sb3_mpg.common.compilation", 3),
    ("sb3_mpg.common.value_targets", 3),
    ("sb3_mpg.common.trust", 4),
    ("sb3_mpg.common.learners", 4),
    ("sb3_mpg.common.off_policy_model_algorithm", 5),
    ("sb3_mpg.mpg", 6),
    ("sb3_mpg.ndpg", 6),
    ("sb3_mpg.nadp", 6),
    ("sb3_mpg.zoo", 7),
    ("sb3_mpg._zoo_hook", 7),
]
# What environments may use of the library
OPEN_TO_ENVIRONMENTS = ("sb3_mpg.common.models", "sb3_mpg.common.type_aliases")
# Empty by design or gathering what lies below: no layer of their own
PACKAGES_WITHOUT_LAYER = ("sb3_mpg", "sb3_mpg.common", "sb3_mpg.common.models", "sb3_mpg.hyperparams")
ENVIRONMENT_NAMES = re.compile(r"path.?tracking|inverted.?pendulum", re.IGNORECASE)
HEAVY_MODULES = ("rl_zoo3", "mujoco", "matplotlib", "ray")


def source_files(package):
    """Files of the zoo may touch everything, see ``zoo.py`` in the layers."""
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_within(module, package):
    return module == package or module.startswith(package + ".")


def layer_of(module):
    if module in PACKAGES_WITHOUT_LAYER:
        return None
    return next((layer for prefix, layer in LAYERS if is_within(module, prefix)), None)


def imported_modules(path):
    """Modules of this repository that a file imports, at the top or inside of functions."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level > 0:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            for alias in node.names:
                # `from package import module` is an import of the module
                name = f"{base}.{alias.name}"
                is_module = (ROOT / name.replace(".", "/")).with_suffix(".py").exists() or (
                    ROOT / name.replace(".", "/")
                ).is_dir()
                yield name if is_module else base


def test_every_module_has_a_layer():
    without = {module_name(path) for path in source_files("sb3_mpg") if layer_of(module_name(path)) is None} - set(
        PACKAGES_WITHOUT_LAYER
    )
    assert not without, f"give these modules a place in LAYERS: {sorted(without)}"


@pytest.mark.parametrize("path", source_files("sb3_mpg"), ids=module_name)
def test_imports_go_one_way(path):
    layer = layer_of(module_name(path))
    if layer is None:
        return
    for imported in imported_modules(path):
        # The top packages import the upper layers: nobody below may go through them
        assert imported not in PACKAGES_WITHOUT_LAYER, f"{path} imports {imported}, import the module itself"
        imported_layer = layer_of(imported)
        assert imported_layer is None or imported_layer <= layer, f"{path} imports {imported}, which lies above it"


@pytest.mark.parametrize("path", source_files("sb3_mpg_envs"), ids=module_name)
def test_environments_use_models_only(path):
    for imported in imported_modules(path):
        if is_within(imported, "sb3_mpg"):
            assert any(is_within(imported, module) for module in OPEN_TO_ENVIRONMENTS), f"{path} imports {imported}"


@pytest.mark.parametrize("path", source_files("sb3_mpg"), ids=module_name)
def test_library_knows_no_environment(path):
    if is_within(module_name(path), "sb3_mpg.zoo"):
        return
    for imported in imported_modules(path):
        assert not is_within(imported, "sb3_mpg_envs"), f"{path} imports {imported}"
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        assert not ENVIRONMENT_NAMES.search(line), f"{path}:{number} names an environment: {line.strip()}"


@pytest.mark.parametrize("package", ["sb3_mpg", "sb3_mpg_envs"])
def test_import_is_light(package):
    # What SB3 itself brings in is not ours to spare (before 2.9 it imports matplotlib)
    code = "import sys, stable_baselines3; before = set(sys.modules);"
    code += f"import {package}; print(*sorted((set(sys.modules) - before) & set({HEAVY_MODULES})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [], f"`import {package}` should not bring in {result.stdout}"


def test_rules_find_offenders(tmp_path, monkeypatch):
    """The rules read the files as Python does, relative imports included."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "sb3_mpg" / "common" / "models" / "base.py"
    path.parent.mkdir(parents=True)
    (tmp_path / "sb3_mpg" / "common" / "buffers.py").touch()
    path.write_text("from ..buffers import x\nfrom sb3_mpg.common import buffers\ndef f():\n    import sb3_mpg.mpg.mpg\n")
    assert sorted(imported_modules(path)) == [
        "sb3_mpg.common.buffers",
        "sb3_mpg.common.buffers",
        "sb3_mpg.mpg.mpg",
    ]
    with pytest.raises(AssertionError, match="lies above it"):
        test_imports_go_one_way(path)
