from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

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
    # The YAML files lie at the top of the repository, where RL Zoo users look for them, and travel with the package
    packages=[*find_packages(include=["sb3_mpg*"]), "sb3_mpg.hyperparams"],
    package_dir={"sb3_mpg.hyperparams": "hyperparams"},
    package_data={
        "sb3_mpg": ["py.typed", "version.txt"],
        "sb3_mpg.hyperparams": ["*.yml"],
        "sb3_mpg_envs": ["py.typed"],
        "sb3_mpg_envs.inverted_pendulum": ["assets/*.xml"],
    },
    python_requires=">=3.10",
    install_requires=[
        # 2.7 brought n-step returns to off-policy algorithms (`n_steps`, `ReplayBufferSamples.discounts`)
        "stable_baselines3>=2.7,<3.0",
        "gymnasium>=1.0,<2.0",
        "torch>=2.3,<3.0",
        "numpy>=1.24,<3.0",
        "mujoco>=3.2",
    ],
    extras_require={
        "tests": ["pytest", "pytest-xdist", "pytest-cov", "mypy", "ruff", "black", "build", "types-PyYAML"],
        # RL Zoo's enjoy needs requests, which nothing else asks for
        "zoo": ["rl_zoo3>=2.7,<3.0", "sb3_contrib>=2.7,<3.0", "requests"],
        "plots": ["matplotlib", "pandas"],
        "render": ["pygame", "imageio"],
        "progress": ["tqdm", "rich"],
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
