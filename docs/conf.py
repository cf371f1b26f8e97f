"""Settings of the documentation: ``make docs`` builds it into docs/_build/html."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import proxy_fsm
from proxy_fsm import cli
from proxy_fsm.cli.app import make_app

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "proxy_fsm"
author = "the proxy_fsm authors"
copyright = f"2026, {author}"  # noqa: A001 - Sphinx reads it
release = version = proxy_fsm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxcontrib.mermaid",
    "proxy_fsm.sphinx",
]
exclude_patterns = ["_build"]
nitpicky = True
# What annotations name of other projects: their inventories are on the network, which a build does without.
nitpick_ignore_regex = [
    ("py:.*", r"(paramiko|structlog|hypothesis|transitions|enum|os|re|pathlib|datetime|signal|socket|subprocess)\..*"),
    ("py:.*", r"(collections|asyncio|threading|st|types)\..*"),
    ("py:.*", "(Format|ListenKind|Literal|Path|ReadyWhen|Theme|RuleBasedStateMachine|SearchStrategy|datetime)"),
]
# A default value that is made when a module is imported holds an address of memory: not the same from build to build.
autodoc_preserve_defaults = True
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
napoleon_use_ivar = True
default_role = "py:obj"

myst_heading_anchors = 3

html_theme = "furo"
html_title = "proxy_fsm"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_extra_path = ["../diagrams/run-fault.html"]  # pictures.md shows it
html_copy_source = False


def find_by_short_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element) -> Element | None:
    """Resolve `Proxy` from any module's docstring, as its reader does: by the one public object of that name."""
    domain = env.domains.python_domain
    found = [name for name in domain.objects if name.endswith(f".{node.get('reftarget')}")]
    if node.get("refdomain") != "py" or len(found) != 1:
        return None
    node["reftarget"] = found[0]
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, content)


def add_verbs(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put what each verb takes at the end of its page: what --help says."""
    if docname == "command-line":
        for file in (__file__, *Path(cli.__file__).parent.glob("*.py")):
            app.env.note_dependency(file)
        whole = make_app().generate_docs(heading_level=2)
        # Half of how this build was started gets into the usage of a verb.
        source[0] += whole[whole.index("### proxy-fsm") :].replace(" -m sphinx", "")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", add_verbs)
    app.connect("missing-reference", find_by_short_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
