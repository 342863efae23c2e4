from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
README = ROOT / "README.md"


# A single line, because .pth files are executed line by line. It only imports modules that every start of the interpreter has
# loaded already, and compiles the source of sb3_mpg/_zoo_hook.py only when RL Zoo is imported
ZOO_HOOK = (
    "import os, sys; os.environ.get('SB3_MPG_NO_ZOO_HOOK') == '1' "
    "or any(type(finder).__name__ == 'SB3MPGZooHook' for finder in sys.meta_path) "
    "or sys.meta_path.insert(0, type('SB3MPGZooHook', (), {{'find_spec': "
    "lambda self, name, path=None, target=None, scope={{}}, source={source!r}: "
    "(exec(source, scope), scope['find_spec'](name, path, target))[1] if name == 'rl_zoo3.utils' else None}})())\n"
)


class BuildWithZooHook(build_py):
    """
    Adds ``sb3_mpg_zoo.pth`` to the installed files, because RL Zoo has no plugin interface. Every start of the interpreter
    executes the lines of such a file in site-packages. ``pip uninstall`` removes it, since it is a file of the wheel.
    """

    def run(self):
        super().run()
        # An editable wheel has no build folder: files in the install folder are packed into it
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        source = (ROOT / "sb3_mpg" / "_zoo_hook.py").read_text(encoding="utf-8")
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "sb3_mpg_zoo.pth").write_text(ZOO_HOOK.format(source=source), encoding="ascii")


setup(
    name="sb3-mpg",
    version=(ROOT / "sb3_mpg" / "version.txt").read_text(encoding="utf-8").strip(),
    description="Mixed Policy Gradient for Stable-Baselines3: learns from data and from a differentiable model",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="sb3-mpg contributors",
    license="MIT",
    license_files=["LICENSE"],
    keywords="reinforcement-learning model-based-rl mixed-policy-gradient stable-baselines3 gymnasium pytorch",
    # The YAML files are at the top of the repository, where RL Zoo users look for them; the wheel contains them as a package
    packages=[*find_packages(include=["sb3_mpg*"]), "sb3_mpg.hyperparams"],
    package_dir={"sb3_mpg.hyperparams": "hyperparams"},
    package_data={
        "sb3_mpg": ["py.typed", "version.txt"],
        "sb3_mpg.hyperparams": ["*.yml"],
        "sb3_mpg_envs": ["py.typed"],
        "sb3_mpg_envs.inverted_pendulum": ["assets/*.xml"],
    },
    cmdclass={"build_py": BuildWithZooHook},
    python_requires=">=3.10",
    install_requires=[
        # The lower bounds are tested together, see .ci/constraints-oldest.txt. SB3: RL Zoo reads `default` entries of
        # hyperparameter files from 2.8 on and goes with SB3 of its version; Gymnasium: `AutoresetMode`; MuJoCo: `Rollout`
        "stable_baselines3>=2.8,<3.0",
        "gymnasium>=1.1,<2.0",
        "torch>=2.4,<3.0",
        "numpy>=1.24,<3.0",
        "mujoco>=3.3",
    ],
    extras_require={
        # setuptools, filelock: the tests of the RL Zoo integration build and install the wheel, once for all processes
        "tests": [
            *["pytest", "pytest-xdist", "pytest-cov", "mypy", "ruff", "black", "build", "types-PyYAML"],
            *["setuptools>=77", "filelock"],
        ],
        # RL Zoo, and what its commands need but it does not install: enjoy, record_video, the plots
        "zoo": [
            *["rl_zoo3>=2.8,<3.0", "sb3_contrib>=2.8,<3.0"],
            *["requests", "moviepy", "pygame", "matplotlib", "pandas", "scipy", "seaborn"],
        ],
        "plots": ["matplotlib", "pandas"],
        "render": ["pygame", "imageio"],
        "progress": ["tqdm", "rich"],
        # The lower bounds are tested. onnxruntime runs what was exported
        "export": ["torch>=2.8", "onnx>=1.18", "onnxscript>=0.6.2", "onnxruntime>=1.20"],
        "docs": ["sphinx", "furo", "myst-parser", "sphinx-copybutton"],
        # The tasks and methods of benchmarks/outside. dm_control loads no task with MuJoCo 4. pcgym needs Python 3.11, and
        # brings jax and do-mpc along, which the benchmark does not import
        "outside": [
            *["mujoco<4", "gymnasium[mujoco]", "shimmy[dm-control]>=2.0", "dm_control>=1.0.50,<1.1"],
            *["gym-electric-motor>=3.0.3", "highway-env>=1.12", "pcgym>=0.1.8; python_version >= '3.11'"],
            *["rl_zoo3>=2.8,<3.0", "sb3_contrib>=2.8,<3.0", "matplotlib", "pandas"],
        ],
        # Reserved for learners on many machines
        "ray": ["ray[default]"],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
