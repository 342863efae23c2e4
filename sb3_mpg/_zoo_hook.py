"""
Import hook that calls ``sb3_mpg.zoo.register()`` as soon as ``rl_zoo3.utils`` is imported.

``setup.py`` writes this source into ``sb3_mpg_zoo.pth``. Every start of the interpreter runs the single line of that file
(twice in a virtual environment). The line adds a finder to ``sys.meta_path``, unless the environment variable
SB3_MPG_NO_ZOO_HOOK is 1. The finder compiles this source only for that one import. It must never raise.
"""

# Without types, which would have to be imported
# mypy: ignore-errors


def find_spec(name, path, target):
    import sys

    try:
        for finder in sys.meta_path:
            spec = None if type(finder).__name__ == "SB3MPGZooHook" else finder.find_spec(name, path, target)
            if spec is not None:
                break
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            try:
                from sb3_mpg.zoo import register

                register()
            except Exception as error:
                print(f"sb3_mpg is not available in RL Zoo: {error!r}", file=sys.stderr)

        spec.loader.exec_module = exec_module
        return spec
    except Exception:
        return None
