"""
Directives for pages that are made of docstrings.

``docstring-page`` shows a docstring that is written in Markdown, as Gymnasium writes those of its environments, and
``package-reference`` all modules of a package, so that a new module has its place without being listed::

    ```{docstring-page} package.module.Class
    ```

    ```{package-reference} package.subpackage
    :exclude: module with a page of its own
    ```
"""

import inspect
import pkgutil
from importlib import import_module
from typing import Any, ClassVar

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class GeneratedPage(SphinxDirective):
    """Parses generated Markdown as if it stood on the page, headings included."""

    required_arguments = 1

    def parse(self, text: str) -> list[nodes.Node]:
        container = nodes.section()
        container.document = self.state.document
        lines = StringList(text.splitlines(), source=f"{self.name} of {self.arguments[0]}")
        self.state.nested_parse(lines, 0, container, match_titles=True)
        return container.children


class DocstringPage(GeneratedPage):
    """The docstring of a class."""

    def run(self) -> list[nodes.Node]:
        module_name, _, name = self.arguments[0].rpartition(".")
        documented = getattr(import_module(module_name), name)
        # The page is built again when the docstring has changed
        self.env.note_dependency(inspect.getfile(documented))
        text = inspect.getdoc(documented)
        if not text:
            raise self.error(f"{self.arguments[0]} has no docstring.")
        return self.parse(text)


class PackageReference(GeneratedPage):
    """A section for each module of a package; subpackages have directives of their own."""

    option_spec: ClassVar[dict[str, Any]] = {"exclude": str.split}

    def run(self) -> list[nodes.Node]:
        package = import_module(self.arguments[0])
        names = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg]
        sections = [
            f"## {package.__name__}.{name}\n\n"
            f"```{{eval-rst}}\n.. automodule:: {package.__name__}.{name}\n   :members:\n```\n"
            for name in names
            if not name.startswith("_") and name not in self.options.get("exclude", [])
        ]
        # The page is built again when a module comes or goes
        self.env.note_reread()
        return self.parse("\n".join(sections))


def skip_members_without_docstring(
    app: Sphinx, what: str, name: str, member: Any, skip: bool, options: dict[str, Any]
) -> bool | None:
    """Methods that override others need no docstring, and those of torch and Gymnasium are no part of this reference."""
    is_named = isinstance(options.get("members"), list) and name in options["members"]
    is_inherited = what == "class" and not is_named and not getattr(member, "__doc__", None)
    return True if is_inherited else None


def escape_asterisks(app: Sphinx, what: str, name: str, obj: Any, options: dict[str, Any], lines: list[str]) -> None:
    """Comments of type aliases are plain text: the asterisk of ``*obs_shape`` begins no emphasis."""
    if what == "data":
        lines[:] = [line.replace("*", "\\*") for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("sphinx.ext.autodoc")
    app.add_directive("docstring-page", DocstringPage)
    app.add_directive("package-reference", PackageReference)
    app.connect("autodoc-skip-member", skip_members_without_docstring)
    app.connect("autodoc-process-docstring", escape_asterisks)
    return {"version": "1", "parallel_read_safe": True}
