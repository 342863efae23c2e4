"""The layering of the library: imports go one way, common code knows no algorithm, algorithms know no environment."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lq import LinearEnv
from settings import SMALL

from sb3_mpg import DVPG, MPG, NStepADP, NStepDPG
from sb3_mpg.common.learners import LearnerSettings
from sb3_mpg.common.models.rollout_model import ModelSettings
from sb3_mpg.common.off_policy_model_algorithm import OffPolicyModelAlgorithm
from sb3_mpg.common.optimizer_steps import OptimizerSteps
from sb3_mpg.common.rollouts.model_rollout import model_rollout
from sb3_mpg.common.trust import make_weighting_rule
from sb3_mpg.common.trust.weighting import WEIGHTING_RULES
from sb3_mpg.common.value_targets import VALUE_TARGETS, make_value_target

ROOT = Path(__file__).parent.parent

# Which modules may be imported by which: those of the same or of a lower layer; the first prefix that fits counts
LAYERS = [
    ("sb3_mpg.version", 0),
    ("sb3_mpg.common.type_aliases", 0),
    ("sb3_mpg.common.checks", 1),
    ("sb3_mpg.common.spaces", 0),
    ("sb3_mpg.common.policies", 1),
    ("sb3_mpg.common.noise", 1),
    ("sb3_mpg.common.goals", 1),
    ("sb3_mpg.common.settings", 1),
    ("sb3_mpg.common.saved_object", 1),
    ("sb3_mpg.common.training_state", 1),
    ("sb3_mpg.common.randomness", 1),
    ("sb3_mpg.common.utils", 1),
    ("sb3_mpg.common.units", 1),
    ("sb3_mpg.common.torch_layers", 1),
    ("sb3_mpg.common.tables", 1),
    ("sb3_mpg.common.balance", 1),
    ("sb3_mpg.common.precision", 1),
    ("sb3_mpg.common.processes", 1),
    ("sb3_mpg.common.env_pickles", 1),
    ("sb3_mpg.common.files", 0),
    ("sb3_mpg.common.callbacks", 1),
    ("sb3_mpg.common.optimizer_steps", 1),
    ("sb3_mpg.common.batches", 1),
    # What trains imports nothing of the checker but its validation, where the model of the rollouts is made
    ("sb3_mpg.common.models.checking", 4),
    ("sb3_mpg.common.models.rollout_model", 4),
    ("sb3_mpg.common.models", 2),
    ("sb3_mpg.common.compilation.compiled_loop", 2),
    ("sb3_mpg.common.buffers", 3),
    ("sb3_mpg.common.rollouts", 3),
    ("sb3_mpg.common.compilation", 3),
    ("sb3_mpg.common.value_targets", 3),
    ("sb3_mpg.common.model_fitting", 4),
    ("sb3_mpg.common.trust", 5),
    ("sb3_mpg.common.saved_settings", 5),
    ("sb3_mpg.common.update", 5),
    ("sb3_mpg.common.learners", 6),
    ("sb3_mpg.common.planned_exploration", 6),
    ("sb3_mpg.common.export", 6),
    ("sb3_mpg.common.off_policy_model_algorithm", 7),
    ("sb3_mpg.mpg", 8),
    ("sb3_mpg.ndpg", 8),
    ("sb3_mpg.nadp", 8),
    ("sb3_mpg.dvpg", 8),
    ("sb3_mpg.hyperparams_opt", 8),
    ("sb3_mpg.zoo", 9),
    ("sb3_mpg._zoo_hook", 9),
]
# What environments may use of the library
OPEN_TO_ENVIRONMENTS = ("sb3_mpg.common.models", "sb3_mpg.common.type_aliases")
# Empty by design or gathering what lies below: no layer of their own
PACKAGES_WITHOUT_LAYER = ("sb3_mpg", "sb3_mpg.common", "sb3_mpg.common.models", "sb3_mpg.hyperparams")
#: Of this library, and of those that are to follow; the package itself is called `sb3_mpg` or `sb3-mpg`
ALGORITHM_NAMES = re.compile(r"(?<![\w-])(mpg|ndpg|nadp|dvpg|maac|ddppo|n_?step_?a?d(pg|p))", re.IGNORECASE)
#: How a docstring may cite a paper
CITATIONS = re.compile(r"MPG-v[12]\b|both MPG texts|the [A-Z]+ paper\b")
#: What makes the parts of an algorithm from arguments of its constructor: those arguments are the family's
MAKERS = (
    OffPolicyModelAlgorithm,
    ModelSettings,
    LearnerSettings,
    OptimizerSteps,
    make_weighting_rule,
    make_value_target,
    model_rollout,
    *WEIGHTING_RULES.values(),
    *VALUE_TARGETS.values(),
)
ALGORITHMS = (MPG, NStepDPG, NStepADP, DVPG)
#: Lines of files, by the beginning of their paths; the first that fits counts
MAX_LINES = [
    ("sb3_mpg/mpg/mpg.py", 380),
    ("sb3_mpg/mpg/update.py", 170),
    ("sb3_mpg/dvpg/dvpg.py", 150),
    ("sb3_mpg", 480),
]
#: What models of users choose among
CHOSEN_BY_USERS = {"UntilConverged"}
MAX_METHODS = 25
MAX_ATTRIBUTES = 65
MAX_ASSERTIONS_OF_TYPES = 10
ENVIRONMENT_NAMES = re.compile(r"path.?tracking|inverted.?pendulum", re.IGNORECASE)
HEAVY_MODULES = ("rl_zoo3", "mujoco", "matplotlib", "ray", "onnx", "onnxscript")


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
    if module_name(path) == "sb3_mpg.common.models.known_ends":
        return  # of Gymnasium's own tasks
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        assert not ENVIRONMENT_NAMES.search(line), f"{path}:{number} names an environment: {line.strip()}"


def docstrings_of(tree):
    """The nodes of all docstrings of a module."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            yield node.body[0]


def lines_without_citations(path):
    """Docstrings may cite papers; all else must not name an algorithm."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in docstrings_of(ast.parse(text)):
        for number in range(node.lineno - 1, node.end_lineno):
            lines[number] = CITATIONS.sub("", lines[number])
    return lines


@pytest.mark.parametrize("path", source_files("sb3_mpg/common"), ids=module_name)
def test_common_names_no_algorithm(path):
    for number, line in enumerate(lines_without_citations(path), start=1):
        assert not ALGORITHM_NAMES.search(line), f"{path}:{number} names an algorithm: {line.strip()}"


def identifiers(tree):
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield name, getattr(node, "lineno", 0)


def arguments_of_algorithms_alone():
    """Of their constructors, without those that the family has."""
    of_family = {name for make in MAKERS for name in inspect.signature(make).parameters}
    of_algorithms = {name for algorithm in ALGORITHMS for name in inspect.signature(algorithm).parameters}
    return of_algorithms - of_family - {"_init_setup_model"}


@pytest.mark.parametrize("path", source_files("sb3_mpg/common"), ids=module_name)
def test_common_knows_no_setting_of_one_algorithm(path):
    alone = arguments_of_algorithms_alone()
    assert "policy_delay" in alone and "gamma" not in alone
    for name, number in identifiers(ast.parse(path.read_text(encoding="utf-8"))):
        assert name not in alone, f"{path}:{number} knows `{name}`, which is an argument of an algorithm alone"


def public_definitions(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name


def names_used(path):
    """Names that a file reads, outside of the definition of the same name and of what it imports."""

    def visit(node, within):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            within = within | {node.name}
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            # An annotation in quotes
            name = node.value
        if name is not None and name not in within:
            used.add(name)
        for child in ast.iter_child_nodes(node):
            visit(child, within)

    used: set[str] = set()
    visit(ast.parse(path.read_text(encoding="utf-8")), frozenset())
    return used


def test_everything_in_common_is_used():
    """By the library, by environments or by benchmarks; that tests use it is not enough."""
    used = set()
    for package in ("sb3_mpg", "sb3_mpg_envs", "benchmarks"):
        for path in source_files(package):
            used |= names_used(path)
    definitions = [(path, name) for path in source_files("sb3_mpg/common") for name in public_definitions(path)]
    unused = {f"{module_name(path)}.{name}" for path, name in definitions if name not in used | CHOSEN_BY_USERS}
    assert not unused, f"nobody but tests uses {sorted(unused)}"


@pytest.mark.parametrize("path", source_files("sb3_mpg"), ids=module_name)
def test_files_and_classes_stay_small(path):
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    limit = next(limit for prefix, limit in MAX_LINES if name.startswith(prefix))
    assert len(text.splitlines()) <= limit, f"{name} has {len(text.splitlines())} lines, more than {limit}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            n_methods = sum(isinstance(member, ast.FunctionDef) for member in node.body)
            assert n_methods <= MAX_METHODS, f"{name}: {node.name} has {n_methods} methods, more than {MAX_METHODS}"


def test_an_algorithm_has_few_attributes():
    model = MPG("MlpPolicy", LinearEnv(), horizons=(0, 2), **SMALL).learn(50)
    assert len(vars(model)) <= MAX_ATTRIBUTES, sorted(vars(model))


def test_few_assertions_are_for_the_type_checker():
    """Each of them is an object that exists before it is ready."""
    pattern = re.compile(r"^\s*assert .*(is not None|isinstance\()")
    found = [
        f"{module_name(path)}: {line.strip()}"
        for path in source_files("sb3_mpg")
        for line in path.read_text(encoding="utf-8").splitlines()
        if pattern.search(line)
    ]
    assert len(found) <= MAX_ASSERTIONS_OF_TYPES, found


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


def test_rules_find_algorithms(tmp_path, monkeypatch):
    """Names in code, comments and messages are found; citations in docstrings are not."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "sb3_mpg" / "common" / "parts.py"
    path.parent.mkdir(parents=True)
    allowed = (
        '"""As in MPG-v1, in both MPG texts and in the DVPG paper: eq. 6. Install sb3-mpg."""\nimport sb3_mpg.common.checks\n'
    )
    path.write_text(allowed)
    test_common_names_no_algorithm(path)
    test_common_knows_no_setting_of_one_algorithm(path)
    for line in (
        "# As MPG does",
        "message = 'use MPG-v1'",
        "class MPGUpdate: ...",
        "name = 'mpg'",
        "import sb3_mpg.ndpg",
        "NStepADP = 1",
        '"""MPG regresses on it."""',
        "x = n_step_dpg",
    ):
        path.write_text(f"{allowed}{line}\n" if not line.startswith('"') else f"{line}\n")
        with pytest.raises(AssertionError, match="names an algorithm"):
            test_common_names_no_algorithm(path)
    for line in ("x.policy_delay", "def f(policy_delay): ...", "f(policy_delay=1)", "class A:\n    policy_delay: int"):
        path.write_text(f"{line}\n")
        with pytest.raises(AssertionError, match="knows `policy_delay`"):
            test_common_knows_no_setting_of_one_algorithm(path)
