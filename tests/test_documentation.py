"""
README and ``docs/``: their Python runs, their commands and links exist, and what they quote is what the library says.

Python blocks run as they are, one after the other, those of a page in one namespace and one folder. So that they take seconds,
the fixture ``small_budget`` makes these settings smaller, and nothing else:

- a training takes ``MAX_STEPS`` environment steps, of which ``LEARNING_STARTS`` are random;
- batches have ``BATCH_SIZE`` rows, and networks one hidden layer of ``N_UNITS`` units;
- models are fitted once where they would be fitted until they have converged;
- plans have at most ``PLANNING_HORIZON`` steps.

A block below a comment ``<!-- not run: REASON -->`` is only compiled. Commands are not run, but the programs, options,
algorithms, environments, hyperparameters and files that they name must exist.
"""

import ast
import inspect
import re
import shlex
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import pytest
import yaml
from region import Region
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

import sb3_mpg_envs  # noqa: F401
from sb3_mpg import MPG, __version__
from sb3_mpg.common import planned_exploration
from sb3_mpg.zoo import ALGORITHMS, COMMANDS, hyperparameter_folder

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES_WITH_LINKS = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]

MAX_STEPS = 60
LEARNING_STARTS = 30
BATCH_SIZE = 16
N_UNITS = 8
PLANNING_HORIZON = 10

MAX_README_LINES = 150
BASELINES = ("td3", "sac", "tqc", "crossq")
# Tables whose first column quotes the library, by its heading
QUOTING = ("message", "in the report", "verdict of a dimension", "verdict of the reward", "verdict")


class Block(NamedTuple):
    """
    :param language: what stands behind the opening fence
    :param line: number of the line of the opening fence
    :param text: what stands between the fences
    :param is_run: whether nothing says otherwise
    """

    language: str
    line: int
    text: str
    is_run: bool


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks_of(text):
    """Fenced blocks of a page in Markdown."""
    blocks, start, lines = [], None, text.splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
        else:
            is_run = start == 0 or not lines[start - 1].startswith("<!-- not run: ")
            language = lines[start].removeprefix("```").strip()
            blocks.append(Block(language, start + 1, "\n".join(lines[start + 1 : number]), is_run))
            start = None
    assert start is None, f"the block that begins in line {start} does not end"
    return blocks


def read(page):
    """A page with the files that it includes."""

    def included(match):
        return (page.parent / match.group(1)).read_text(encoding="utf-8")

    return re.sub(r"```\{include\} (\S+)\n(?::.*\n)*```", included, page.read_text(encoding="utf-8"))


def without_code(text):
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def pages_with(language):
    return [page for page in PAGES if any(block.language == language for block in blocks_of(page.read_text(encoding="utf-8")))]


@pytest.fixture
def small_budget(monkeypatch, tmp_path, models_are_fitted_once):
    """See the docstring of this file."""
    learn, init = OffPolicyAlgorithm.learn, MPG.__init__

    def learn_shortly(self, total_timesteps, *args, **kwargs):
        return learn(self, min(total_timesteps, MAX_STEPS), *args, **kwargs)

    @wraps(init)
    def init_small(self, *args, **kwargs):
        call = inspect.signature(init).bind(self, *args, **kwargs)
        call.apply_defaults()
        settings = call.arguments
        settings["learning_starts"] = min(settings["learning_starts"], LEARNING_STARTS)
        settings["batch_size"] = min(settings["batch_size"], BATCH_SIZE)
        settings["policy_kwargs"] = {"net_arch": [N_UNITS], **(settings["policy_kwargs"] or {})}
        if settings["residual"]:
            settings["residual_kwargs"] = {"net_arch": (N_UNITS,), **(settings["residual_kwargs"] or {})}
        init(**settings)

    monkeypatch.setattr(OffPolicyAlgorithm, "learn", learn_shortly)
    monkeypatch.setattr(planned_exploration, "LONGEST_HORIZON", PLANNING_HORIZON)
    # NStepDPG and NStepADP call the constructor of MPG
    monkeypatch.setattr(MPG, "__init__", init_small)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_python_runs(page, small_budget):
    # As a script: what is defined in `__main__` is sent to processes by value
    namespace = {"__name__": "__main__"}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language == "python":
            code = compile("\n" * block.line + block.text, str(page), "exec")
            if block.is_run:
                exec(code, namespace)


def test_readme_is_short():
    n_lines = len((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
    assert n_lines <= MAX_README_LINES, f"README.md has {n_lines} lines: move details to docs/"


# Commands


def commands_of(page):
    """The commands of a page, as lists of words."""
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language == "bash" and block.is_run:
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield words


def source_of(module):
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, f"there is no module {module}"
    return Path(spec.origin).read_text(encoding="utf-8")


def extras():
    """Names of the extras in ``setup.py``."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "extras_require":
            return [ast.literal_eval(key) for key in node.value.keys]
    raise AssertionError("setup.py has no extras")


def check_options(words, source):
    for word in words:
        is_option = re.fullmatch(r"--?[a-zA-Z][\w-]*", word)
        assert not is_option or f'"{word}"' in source, f"there is no option {word}"


def check_zoo(words, source):
    """What is given to RL Zoo: each option is followed by its values."""
    check_options(words, source)
    values, option = {}, None
    for word in words:
        if re.fullmatch(r"--?[a-zA-Z][\w-]*", word):
            option = word
        else:
            values.setdefault(option, []).append(word)
    for algorithm in values.get("--algo", values.get("-a", [])):
        assert algorithm in (*ALGORITHMS, *BASELINES), f"there is no algorithm {algorithm}"
    for env_id in values.get("--env", []):
        assert env_id in gym.registry, f"there is no environment {env_id}"
        entry_point = gym.registry[env_id].entry_point
        module, _, cls = entry_point.partition(":")
        parameters = inspect.signature(getattr(import_module(module), cls)).parameters
        for keyword in (*values.get("--env-kwargs", []), *values.get("--eval-env-kwargs", [])):
            assert keyword.partition(":")[0] in parameters, f"{env_id} has no argument {keyword}"
        for keyword in values.get("-params", []):
            known = {*inspect.signature(ALGORITHMS[values["--algo"][0]]).parameters, "n_envs"}
            assert keyword.partition(":")[0] in known, f"there is no hyperparameter {keyword}"
    for file in values.get("--conf-file", []):
        assert (hyperparameter_folder() / file).is_file(), f"there is no hyperparameter file {file}"


def check_command(words):
    program, *rest = words
    if program == "pip":
        for names in re.findall(r"\[(.*?)\]", " ".join(rest)):
            assert set(names.split(",")) <= set(extras()), f"there is no extra {names}"
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in rest:
            name, is_variable, _ = word.partition("=")
            pattern = rf"^{name} \?=" if is_variable else rf"^{name}:"
            assert re.search(pattern, makefile, flags=re.MULTILINE), f"the Makefile has no {word}"
    elif program == "rl_zoo3":
        assert rest[0] in COMMANDS, f"RL Zoo has no command {rest[0]}"
        check_zoo(rest[1:], source_of(COMMANDS[rest[0]]))
    elif Path(program).name == "python" and rest[0] == "-m":
        _, module, *options = rest
        if module == "sb3_mpg.zoo":
            command, *options = options
            module = COMMANDS[command]
        assert module in COMMANDS.values(), f"{module} is not known to this test"
        check_zoo(options, source_of(module))
    elif Path(program).name == "python":
        script, *options = rest
        assert (ROOT / script).is_file(), f"there is no script {script}"
        check_options(options, (ROOT / script).read_text(encoding="utf-8"))
        # Choices: tasks, methods, algorithms. A task can be a file
        paths = sorted((ROOT / script).parent.rglob("*.py"))
        sources = "".join(f'"{path.stem}"' + path.read_text(encoding="utf-8") for path in paths)
        for word in options:
            is_choice = re.fullmatch(r"[a-z]\w*", word)
            assert not is_choice or f'"{word}"' in sources, f"{script} knows no {word}"
    else:
        assert (ROOT / program).is_file(), f"there is no program {program}"


@pytest.mark.parametrize("page", pages_with("bash"), ids=name_of)
def test_commands_exist(page):
    for words in commands_of(page):
        try:
            check_command(words)
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"{name_of(page)}: `{shlex.join(words)}`: {error}") from error


@pytest.mark.parametrize(
    "command",
    [
        "pip install '.[zoos]'",
        "make trains",
        "make train STEP=3",
        "python -m rl_zoo3.trains --algo mpg",
        "python -m rl_zoo3.train --algos mpg",
        "python -m rl_zoo3.train --algo mpgs",
        "python -m rl_zoo3.train --algo mpg --env NoSuchTracking-v0",
        "python -m rl_zoo3.train --algo mpg --env PathTracking-v0 -params n_learner:2",
        "python -m rl_zoo3.train --algo mpg --env PathTracking-v0 --eval-env-kwargs early_resets:False",
        "python -m rl_zoo3.train --algo mpg --conf-file mpg_v3.yml",
        "python benchmarks/trusts.py",
        "python benchmarks/trust.py --tasks pendulum",
        "python benchmarks/trust.py --task pendulums",
    ],
)
def test_unknown_names_in_commands_are_found(command):
    with pytest.raises((AssertionError, KeyError)):
        check_command(shlex.split(command))


# Links


def anchors_of(text):
    """The link targets of the headings, as GitHub and Sphinx name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES_WITH_LINKS, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)} links to {target}, which does not exist"
        assert not anchor or anchor in anchors_of(read(file)), f"{name_of(page)} links to {target}, which has no such heading"


def test_pages_are_in_the_contents():
    contents = "\n".join(block.text for block in blocks_of((ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    pages = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in PAGES if ROOT / "docs" in page.parents}
    missing = pages - {"index"} - set(contents.split())
    assert not missing, f"docs/index.md does not list {sorted(missing)}"


# Quotations


def texts_of_the_library():
    """All texts in the source, with ``...`` for what is put in when the program runs."""
    for path in (ROOT / "sb3_mpg").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)


def quotations_of(page):
    is_quoting = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            is_quoting = False
            continue
        first = line.split("|")[1].strip()
        if first in QUOTING:
            is_quoting = True
        elif is_quoting and first.startswith("`"):
            yield from re.findall(r"`([^`]+)`", first)


@pytest.mark.parametrize("name", ["faults", "trust", "checking_models"])
def test_quotations_are_what_the_library_says(name):
    texts = {re.sub(r"`|\s+$", "", text) for text in texts_of_the_library()}
    quotations = list(quotations_of(ROOT / "docs" / "guide" / f"{name}.md"))
    assert quotations
    for quotation in quotations:
        parts = [re.escape(part) for part in re.split(r"\.\.\.|\bN\b", quotation)]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        assert any(pattern.search(text) for text in texts), f"docs/guide/{name}.md quotes {quotation!r}, which nothing says"


class RecordKeys(BaseCallback):
    """Gathers the keys of the log."""

    def __init__(self):
        super().__init__()
        self.keys = set()

    def _on_step(self):
        self.keys |= {re.sub(r"_\d+", "_N", key) for key in self.logger.name_to_value}
        return True


def test_keys_of_the_log_are_documented(models_are_fitted_once):
    text = (ROOT / "docs" / "reference" / "logging.md").read_text(encoding="utf-8")
    families = ("train", "horizons", "model", "learners")
    documented = {key for key in re.findall(r"`(\w+/\w+)`", text) if key.startswith(families)}
    record = RecordKeys()
    small = {"gamma": 0.9, "batch_size": BATCH_SIZE, "policy_kwargs": {"net_arch": [N_UNITS]}}
    small["residual_kwargs"] = {"net_arch": (N_UNITS,)}
    # Enough steps for some to be held out
    model = MPG("MlpPolicy", "PathTracking-v0", learning_starts=220, n_learners=1, seed=0, **small)
    model.learn(260, callback=record)
    # A model whose derivative is blind logs one more
    MPG("MlpPolicy", Region(), horizons=(0, 5), seed=0, learning_starts=100, **small).learn(110, callback=record)
    logged = {key for key in record.keys if key.startswith(families)}
    assert logged == documented


def test_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert any("2102.11513" in reference["url"] for reference in citation["references"])
