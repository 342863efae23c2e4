"""RL Zoo's commands as users type them, in a virtual environment with the installed wheel."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

if importlib.util.find_spec("rl_zoo3") is None:
    pytest.skip("RL Zoo is not installed: pip install 'sb3-mpg[zoo]'", allow_module_level=True)

from sb3_mpg.zoo import COMMANDS as OFFERED

ROOT = Path(__file__).parent.parent
SOURCES = ("sb3_mpg", "sb3_mpg_envs", "hyperparams", "setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")
# A smaller discount factor makes plans shorter
SMALL = ("n_envs:1", "learning_starts:50", "buffer_size:1000", "batch_size:16", "gamma:0.9")

# Runs commands one after the other in one interpreter, as `python -m` does: importing RL Zoo is what takes the time
RUN_COMMANDS = """
import json, runpy, sys
for module, *arguments in json.loads(sys.argv.pop()):
    sys.argv[1:] = arguments
    print("\\n$", module, *arguments, flush=True)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print(end, flush=True)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
"""


def run(*command, cwd, check=True, **variables):
    """Run a command, return what it writes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_", "SB3_MPG"))}
    environment |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "SDL_VIDEODRIVER": "dummy", "COLUMNS": "150", **variables}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert not check or result.returncode == 0, result.stdout
    return result.stdout


def run_all(python, commands, cwd, **variables):
    """Run commands in one interpreter, return what each of them writes."""
    output = run(python, "-c", RUN_COMMANDS, json.dumps(commands), cwd=cwd, **variables)
    return output.split("\n$ ")[1:]


def pip(*arguments):
    options = ("--quiet", "--disable-pip-version-check")
    return run(sys.executable, "-m", "pip", *arguments[:2], arguments[2], *options, *arguments[3:], cwd=ROOT)


def make_venv(folder):
    """A virtual environment that sees all packages of this one, except for ours and for what our .pth files do."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=ROOT)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    outer = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages") and Path(path).is_dir()]
    (site_packages / "outer.pth").write_text("\n".join(outer))
    return python, site_packages


def copy_sources(folder):
    """Building leaves files behind, which must not stay in the checkout."""
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)


def once(tmp_path_factory, name, make):
    """Make something once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = Path(f"{folder}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


def build(folder):
    copy_sources(folder / "sources")
    # The wheel is built from the sdist
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "sources", cwd=folder)


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    """Folder with the sdist and the wheel."""
    return once(tmp_path_factory, "distributions", build)


@pytest.fixture(scope="session")
def python(tmp_path_factory, distributions):
    """The interpreter of a virtual environment in which the wheel is installed."""

    def install(folder):
        python, _ = make_venv(folder)
        (wheel,) = distributions.glob("*.whl")
        pip("--python", python, "install", "--no-index", "--no-deps", wheel)

    folder = once(tmp_path_factory, "installed", install)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def train(folder, python):
    output = run(
        *(python, "-m", "rl_zoo3.train", "--algo", "mpg", "--env", "PathTracking-v0", "-P", "-n", 150),
        *("--eval-freq", 60, "--eval-episodes", 2, "--eval-env-kwargs", "early_reset:False"),
        *("-params", *SMALL, "prior_model:sb3_mpg_envs.path_tracking.model:PathTrackingModel"),
        *("prior_model_kwargs:dict(lateral_bias=0.1)", "critic_learning_rate:lin_8e-4"),
        cwd=folder,
    )
    (folder / "output.txt").write_text(output)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, python):
    """A folder in which an agent was trained."""
    return once(tmp_path_factory, "trained", lambda folder: train(folder, python))


AGENT = ["--algo", "mpg", "--env", "PathTracking-v0"]
COMMANDS = {
    "enjoy": ["rl_zoo3.enjoy", *AGENT, "-f", "logs/", "--no-render", "-n", "200"],
    "record_video": ["rl_zoo3.record_video", *AGENT, "-f", "logs/", "-n", "10"],
    "all_plots": ["rl_zoo3.cli", *"all_plots -a mpg -e PathTracking -f logs/ --no-display -o results".split()],
    "plot_train": ["rl_zoo3.cli", *"plot_train -a mpg -e PathTracking-v0 -f logs/ -w 2".split()],
    "plot_from_file": ["rl_zoo3.cli", *"plot_from_file -i results.pkl -o picture".split()],
    "continue": [
        *["rl_zoo3.train", "-i", "logs/mpg/PathTracking-v0_1/PathTracking-v0.zip", *AGENT],
        *["-n", "60", "--eval-freq", "-1", "-params", *SMALL],
    ],
    "optimize": [
        *["rl_zoo3.train", *AGENT, "-optimize", "--n-trials", "3", "--sampler", "tpe"],
        *["-n", "60", "--eval-episodes", "1", "--n-startup-trials", "1", "--no-optim-plots", "-params", *SMALL],
    ],
}

TRAIN = ["rl_zoo3.train", *AGENT]
MISTAKES = {
    "argument --algo: invalid choice: 'mgp'": ["rl_zoo3.train", "--algo", "mgp"],
    "you maybe meant PathTracking-v0?": ["rl_zoo3.train", "--algo", "mpg", "--env", "PathTracking-v7"],
    "No model found for mpg on Path-v7": ["rl_zoo3.enjoy", "--algo", "mpg", "--env", "Path-v7", "-f", "logs"],
    "the environment offers none": ["rl_zoo3.train", "--algo", "mpg", "--env", "Pendulum-v1"],
    "there is no module 'no_such'": [*TRAIN, "-params", "n_envs:1", "prior_model:no_such:Model"],
    "`weighting_kwargs` got ['etta'], expected some of [": [*TRAIN, "-params", "n_envs:1", "weighting_kwargs:dict(etta=1)"],
    "or a schedule like lin_3e-4, got 'cos_1'": [*TRAIN, "-params", "critic_learning_rate:cos_1"],
    "missing.yml cannot be read": [*TRAIN, "--conf-file", "missing.yml"],
    "broken.yml is not a YAML file": [*TRAIN, "--conf-file", "broken.yml"],
    "list.yml must give, for each environment": [*TRAIN, "--conf-file", "list.yml"],
    "has no hyperparameter 'horizon', did you mean 'horizons'?": [*TRAIN, "--conf-file", "typo.yml"],
}


@pytest.fixture(scope="session")
def commands(tmp_path_factory, python, trained):
    """A folder in which the commands were run after the training, and what they and the mistakes wrote."""

    def run_commands(folder):
        shutil.copytree(trained / "logs", folder / "logs")
        # plot_from_file takes two runs or more
        shutil.copytree(folder / "logs/mpg/PathTracking-v0_1", folder / "logs/mpg/PathTracking-v0_2")
        (folder / "broken.yml").write_text("default: [")
        (folder / "list.yml").write_text("default: [1]")
        (folder / "typo.yml").write_text("default: {n_timesteps: 10, policy: MlpPolicy, horizon: [0]}")
        outputs = run_all(python, [*COMMANDS.values(), *MISTAKES.values()], cwd=folder)
        assert len(outputs) == len(COMMANDS) + len(MISTAKES), outputs[-1]
        (folder / "outputs.json").write_text(json.dumps(dict(zip([*COMMANDS, *MISTAKES], outputs, strict=True))))

    folder = once(tmp_path_factory, "commands", run_commands)
    return folder, json.loads((folder / "outputs.json").read_text())


def skip_without(*modules):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install 'sb3-mpg[zoo]'")


def test_train(trained):
    output = (trained / "output.txt").read_text()
    assert "150/150" in output, "no progress bar"
    assert "critic_learning_rate" in output
    folder = trained / "logs" / "mpg" / "PathTracking-v0_1"
    assert (folder / "PathTracking-v0.zip").exists()
    # The papers' evaluation: no early resets
    evaluations = np.load(folder / "evaluations.npz")
    assert evaluations["ep_lengths"].shape == (2, 2)
    assert (evaluations["ep_lengths"] == 200).all()


def test_train_in_subprocesses(python, tmp_path):
    command = ("--algo", "mpg", "--env", "InvertedPendulumConti-v0", "--vec-env", "subproc", "-n", 120, "--eval-freq", -1)
    # Two processes rather than four: each imports RL Zoo
    output = run(python, "-m", "rl_zoo3.train", *command, "-params", *SMALL[1:], "n_envs:2", cwd=tmp_path)
    assert "Using 2 environments" in output
    assert (tmp_path / "logs" / "mpg" / "InvertedPendulumConti-v0_1" / "InvertedPendulumConti-v0.zip").exists()


def test_enjoy(commands):
    assert "Episode Length" in commands[1]["enjoy"]


def test_record_video(commands):
    skip_without("moviepy", "pygame")
    folder, outputs = commands
    assert list(folder.glob("logs/mpg/PathTracking-v0_2/videos/*.mp4")), outputs["record_video"]


def test_optimize(commands):
    folder, outputs = commands
    assert "Number of finished trials:  3" in outputs["optimize"]
    assert "horizon:" in outputs["optimize"]
    (report,) = folder.glob("logs/mpg/report_*.csv")
    states = report.read_text()
    assert states.count("COMPLETE") + states.count("PRUNED") == 3


def test_plots(commands):
    skip_without("seaborn", "scipy", "pandas")
    folder, outputs = commands
    assert "|PathTracking|-" in outputs["all_plots"]
    assert not any("Traceback" in outputs[name] for name in ("all_plots", "plot_train", "plot_from_file"))
    assert "keys: ['MPG-logs" in outputs["plot_from_file"]
    assert list(folder.glob("picture*"))


def test_continue_training(commands):
    folder, outputs = commands
    assert "Loading pretrained agent" in outputs["continue"]
    assert (folder / "logs" / "mpg" / "PathTracking-v0_3" / "PathTracking-v0.zip").exists(), outputs["continue"]


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_get_one_message(commands, message):
    output = commands[1][message]
    assert message in output
    assert "Traceback" not in output


def test_without_the_hook(python, tmp_path):
    """
    Another algorithm, whose agent stays what it was when training is continued, a baseline, and all commands that are offered.
    RL Zoo has others, which do not run by themselves with the packages that it requires.
    """
    common = ["--eval-freq", "-1", "-n", "60", "--verbose", "0"]
    ndpg = ["train", "--algo", "ndpg", "--env", "InvertedPendulumConti-v0", *common, "-params", *SMALL, "n_steps:2"]
    agent = "logs/ndpg/InvertedPendulumConti-v0_1/InvertedPendulumConti-v0.zip"
    commands = [
        ["sb3_mpg.zoo", *ndpg],
        ["sb3_mpg.zoo", *ndpg, "-i", agent],
        ["sb3_mpg.zoo", "train", "--algo", "td3", "--env", "PathTracking-v0", *common, "-params", *SMALL],
        ["sb3_mpg.zoo", "fly"],
        ["sb3_mpg.zoo", "push_to_hub", "--help"],
        *(["sb3_mpg.zoo", command, "--help"] for command in OFFERED),
    ]
    new, continued, td3, unknown, not_offered, *helps = run_all(python, commands, cwd=tmp_path, SB3_MPG_NO_ZOO_HOOK="1")
    assert "Saving to" in new
    assert "Ignored, because the saved agent keeps its own values: n_steps" in continued
    assert "Saving to" in continued
    assert "sb3_mpg.zoo.ScaleReward" in td3
    assert "Saving to" in td3
    assert "unknown command 'fly'" in unknown
    assert "unknown command 'push_to_hub'" in not_offered
    assert all("usage:" in text and "show this help message" in text for text in helps), helps


def test_missing_prior_model_as_typed(python, tmp_path):
    command = ("--algo", "mpg", "--env", "Pendulum-v1", "--eval-freq", -1)
    output = run(python, "-m", "rl_zoo3.train", *command, cwd=tmp_path, check=False)
    assert "error: No `prior_model` was given and the environment offers none" in output
    assert "-params prior_model:package.module:MyModel" in output
    assert "Traceback" not in output


def test_tables(python, trained):
    """What the hook changed in RL Zoo, that a second time changes nothing, and what its scripts make of it."""
    code = """
import sys
sys.argv = ["enjoy", *"--algo mpg --env PathTracking-v0 -f logs --no-render -n 2".split()]
import runpy, rl_zoo3
from rl_zoo3 import exp_manager, hyperparams_opt
from sb3_mpg import MPG, NStepADP, NStepDPG
from sb3_mpg.zoo import SCRIPTS_WITH_LISTS, register
import rl_zoo3.enjoy

def state():
    manager = exp_manager.ExperimentManager
    return [dict(rl_zoo3.ALGOS), dict(hyperparams_opt.HYPERPARAMS_SAMPLER), dict(vars(manager)), list(sys.meta_path),
            sys.excepthook, rl_zoo3.enjoy.enjoy.__code__]

before = state()
register()
assert all(list(a) == list(b) if isinstance(a, list) else a == b for a, b in zip(before, state()))
assert (rl_zoo3.ALGOS["mpg"], rl_zoo3.ALGOS["ndpg"], rl_zoo3.ALGOS["nadp"]) == (MPG, NStepDPG, NStepADP)
assert {"mpg", "ndpg", "nadp"} <= hyperparams_opt.HYPERPARAMS_SAMPLER.keys() & hyperparams_opt.HYPERPARAMS_CONVERTER.keys()

def constants(code):
    for constant in code.co_consts:
        yield from constants(constant) if hasattr(constant, "co_consts") else [constant]

for name in SCRIPTS_WITH_LISTS:
    loader = __import__("importlib.util").util.find_spec(name).loader
    lists = [constant for constant in constants(loader.get_code(name)) if isinstance(constant, tuple) and "tqc" in constant]
    assert lists and all({"mpg", "ndpg", "nadp"} <= set(names) and len(names) == len(set(names)) for names in lists), name

load = MPG.load.__func__

def spy(cls, *args, **kwargs):
    model = load(cls, *args, **kwargs)
    print("buffer:", model.buffer_size, model.replay_buffer.buffer_size)
    print("critic learning rate:", model.critic_learning_rate(0.5), end=" ")
    print("prior model:", model.prior_model, model.prior_model_kwargs)
    return model

MPG.load = classmethod(spy)
sys.modules.pop("rl_zoo3.enjoy")
runpy.run_module("rl_zoo3.enjoy", run_name="__main__", alter_sys=True)
"""
    output = run(python, "-c", code, cwd=trained)
    assert "buffer: 1 1" in output
    model = "sb3_mpg_envs.path_tracking.model:PathTrackingModel {'lateral_bias': 0.1}"
    assert f"critic learning rate: 0.0004 prior model: {model}" in output


def test_hook_imports_nothing(python, tmp_path):
    code = "import sys; print(*sorted(sys.modules)); print([type(finder).__name__ for finder in sys.meta_path])"
    modules, finders = run(python, "-c", code, cwd=tmp_path).splitlines()
    modules_without, finders_without = run(python, "-c", code, cwd=tmp_path, SB3_MPG_NO_ZOO_HOOK="1").splitlines()
    assert modules == modules_without
    assert finders.count("SB3MPGZooHook") == 1
    assert "SB3MPGZooHook" not in finders_without
    assert not any(name.startswith("sb3_mpg") for name in modules.split())


@pytest.mark.parametrize("contents", ["raise ImportError('no torch')", "def register(): raise AttributeError('new RL Zoo')"])
def test_hook_never_raises(python, tmp_path, contents):
    for package in ("rl_zoo3", "sb3_mpg"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "rl_zoo3" / "utils.py").write_text("ALGOS = {}")
    (tmp_path / "sb3_mpg" / "zoo.py").write_text(contents)
    code = "import rl_zoo3.utils, importlib.util; print(rl_zoo3.utils.ALGOS); print(importlib.util.find_spec('rl_zoo3.none'))"
    output = run(python, "-c", code, cwd=tmp_path)
    assert output.startswith("sb3_mpg is not available in RL Zoo: ")
    assert output.endswith("{}\nNone\n")
    (tmp_path / "rl_zoo3" / "utils.py").unlink()
    output = run(python, "-c", "import rl_zoo3.utils", cwd=tmp_path, check=False)
    assert "ModuleNotFoundError: No module named 'rl_zoo3.utils'" in output


def test_distributions_are_complete(distributions):
    import tarfile
    import zipfile

    (wheel,) = distributions.glob("*.whl")
    (sdist,) = distributions.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    files = {path.name for path in (ROOT / "hyperparams").iterdir() if path.suffix == ".yml"}
    assert files == {name.rpartition("/")[2] for name in in_wheel if name.startswith("sb3_mpg/hyperparams/")} - {"__init__.py"}
    assert {f"hyperparams/{name}" for name in files} <= in_sdist
    assert "sb3_mpg_zoo.pth" in in_wheel


def test_editable_install_and_uninstall(tmp_path):
    copy_sources(tmp_path / "sources")
    python, site_packages = make_venv(tmp_path / "venv")
    before = {path.name for path in site_packages.iterdir()}
    pip("--python", python, "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", tmp_path / "sources")
    code = "import sys; print([type(finder).__name__ for finder in sys.meta_path].count('SB3MPGZooHook'));"
    code += "import sb3_mpg.zoo as zoo; print(zoo.hyperparameter_folder())"
    count, folder = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert count == "1"
    assert Path(folder) == tmp_path / "sources" / "hyperparams"
    pip("--python", python, "uninstall", "--yes", "sb3-mpg")
    assert {path.name for path in site_packages.iterdir()} - {"__pycache__"} == before
