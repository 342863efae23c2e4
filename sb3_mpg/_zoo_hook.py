"""
Import hook: when ``rl_zoo3.utils`` is imported, ``sb3_mpg.zoo.register()`` is called.

``setup.py`` writes this text into ``sb3_mpg_zoo.pth``, which every start of the interpreter runs (twice in a virtual
environment). It must import nothing that is not imported anyway, must never raise, and does nothing when the environment
variable SB3_MPG_NO_ZOO_HOOK is 1.
"""

# Types would have to be imported
# mypy: ignore-errors

import os
import sys


class SB3MPGZooHook:
    def find_spec(self, name, path=None, target=None):
        if name != "rl_zoo3.utils":
            return None
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


if os.environ.get("SB3_MPG_NO_ZOO_HOOK") != "1" and not any(type(f).__name__ == "SB3MPGZooHook" for f in sys.meta_path):
    sys.meta_path.insert(0, SB3MPGZooHook())
