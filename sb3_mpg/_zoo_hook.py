"""
Import hook: when ``rl_zoo3.utils`` is imported, ``sb3_mpg.zoo.register()`` is called.

``setup.py`` writes this text into ``sb3_mpg_zoo.pth``, which every start of the interpreter runs. It must import nothing
that is not imported anyway, must never raise, and does nothing when the environment variable SB3_MPG_NO_ZOO_HOOK is 1.
"""

import os
import sys


class SB3MPGZooHook:
    def find_spec(self, name, path=None, target=None):
        if name != "rl_zoo3.utils":
            return None
        try:
            finders = [finder for finder in sys.meta_path if finder is not self]
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)))
            execute = spec.loader.exec_module  # type: ignore[union-attr]

            def exec_module(module):
                execute(module)
                try:
                    from sb3_mpg.zoo import register

                    register()
                except Exception as error:
                    print(f"sb3_mpg is not available in RL Zoo: {error!r}", file=sys.stderr)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign, union-attr]
            return spec
        except Exception:
            return None


if os.environ.get("SB3_MPG_NO_ZOO_HOOK") != "1":
    sys.meta_path.insert(0, SB3MPGZooHook())
