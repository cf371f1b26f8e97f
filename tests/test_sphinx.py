"""The Sphinx directive draws a client's machine when its documentation is built."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from proxy_fsm import PHASES

from .helpers.wait import PROGRAM_S

ROOT = Path(__file__).parent.parent
CLIENT = """
from proxy_fsm import Proxy
from proxy_fsm.diagram import Arrow, Chart

class MyProxy(Proxy):
    pass

class Odd:
    __chart__ = Chart(
        title="Odd",
        states=("*a|b*", "`c`"),
        initial="*a|b*",
        finals=frozenset(),
        triggers=("**on|off**",),
        arrows=(Arrow("**on|off**", "*a|b*", "`c`", "x|y"),),
    )
"""


def build(source: Path, text: str, builder: str = "html", suffix: str = "rst") -> subprocess.CompletedProcess[str]:
    (source / "below").mkdir(parents=True, exist_ok=True)
    extensions = ["proxy_fsm.sphinx", *(["myst_parser"] if suffix == "md" else [])]
    (source / "conf.py").write_text(f"extensions = {extensions}\nproject = 'client'\nauthor = 'somebody'\n")
    (source / "client_docs.py").write_text(CLIENT)
    (source / "index.rst").write_text("Client\n======\n\n.. toctree::\n\n   below/page\n")
    (source / "below" / f"page.{suffix}").write_text(f"Page\n====\n\n{text}\n")
    return subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "-b", builder, ".", f"_build/{builder}"],
        cwd=source,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{source}", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        check=False,
    )


def test_html_gets_svg_with_the_readers_theme(tmp_path: Path) -> None:
    built = build(tmp_path, ".. proxy-fsm-diagram:: client_docs:MyProxy\n   :highlight: running\n   :width: 300px\n")
    assert (built.returncode, built.stderr) == (0, "")
    page = (tmp_path / "_build/html/below/page.html").read_text()
    assert 'alt="State diagram of MyProxy"' in page
    assert "width: 300px" in page
    (picture,) = (tmp_path / "_build/html/_images").iterdir()
    assert picture.suffix == ".svg"
    assert f"../_images/{picture.name}" in page
    root = ET.fromstring(picture.read_text())  # noqa: S314 - our own output
    assert root.get("aria-label") == "MyProxy"
    assert "prefers-color-scheme: dark" in picture.read_text()
    assert [g.get("data-state") for g in root.iter() if "current" in g.get("class", "").split()] == ["running"]


def test_latex_gets_png(tmp_path: Path) -> None:
    built = build(tmp_path, ".. proxy-fsm-diagram::\n", "latex")
    assert (built.returncode, built.stderr) == (0, "")
    (picture,) = (tmp_path / "_build/latex").glob("proxy-fsm-*")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("rst", ".. proxy-fsm-diagram::\n   :table:\n   :highlight: running"),
        ("md", "```{proxy-fsm-diagram}\n:table:\n:highlight: running\n```"),
    ],
    ids=["reStructuredText", "Markdown"],
)
def test_tables_are_native_nodes(tmp_path: Path, suffix: str, text: str) -> None:
    built = build(tmp_path, text, suffix=suffix)
    assert (built.returncode, built.stderr) == (0, "")
    page = (tmp_path / "_build/html/below/page.html").read_text()
    assert (page.count("<table"), page.count("<tr"), page.count("<th ")) == (2, 9 + 1 + len(PHASES), 8 + 5)
    assert "closed_after_fault</span>" in page
    assert "<strong>running</strong>" in page


def test_highlighted_phase_is_marked_in_the_picture(tmp_path: Path) -> None:
    built = build(tmp_path, ".. proxy-fsm-diagram::\n   :highlight: stopping/draining\n")
    assert (built.returncode, built.stderr) == (0, "")
    (picture,) = (tmp_path / "_build/html/_images").iterdir()
    root = ET.fromstring(picture.read_text())  # noqa: S314 - our own output
    marked = [g for g in root.iter() if "current" in g.get("class", "").split()]
    assert [g.get("data-phase", g.get("data-state")) for g in marked] == ["stopping", "stopping/draining"]


def test_highlighted_phase_is_bold_in_the_tables(tmp_path: Path) -> None:
    built = build(tmp_path, ".. proxy-fsm-diagram::\n   :table:\n   :highlight: running/established\n")
    assert (built.returncode, built.stderr) == (0, "")
    page = (tmp_path / "_build/html/below/page.html").read_text()
    assert page.count("<strong>running</strong>") == 2
    assert page.count("<strong>established</strong>") == 1


@pytest.mark.parametrize("options", ["", "\n   :table:"])
def test_no_phases_option_omits_phases(tmp_path: Path, options: str) -> None:
    built = build(tmp_path, f".. proxy-fsm-diagram::\n   :no-phases:\n   :highlight: stopping/draining{options}\n")
    assert (built.returncode, built.stderr) == (0, "")
    output = "".join(
        file.read_text() for file in (tmp_path / "_build/html").rglob("*") if file.suffix in {".svg", ".html"}
    )
    assert "stopping" in output
    assert "draining" not in output.replace("_static", "")


def test_markup_in_names_is_kept_literally(tmp_path: Path) -> None:
    built = build(tmp_path, ".. proxy-fsm-diagram:: client_docs:Odd\n   :table:\n")
    assert (built.returncode, built.stderr) == (0, "")
    page = (tmp_path / "_build/html/below/page.html").read_text()
    table = page.partition("<table")[2].partition("</table>")[0]
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd] .*?</t[hd]>|<td>.*?</td>", table, re.DOTALL)]
    assert cells == ["trigger", "*a|b*", "`c`", "**on|off**", "`c` [x|y]", "·"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (".. proxy-fsm-diagram:: client_docs:Gone", "The module client_docs has no Gone"),
        (".. proxy-fsm-diagram::\n   :highlight: gone", "Lifecycle has no state 'gone'"),
        (".. proxy-fsm-diagram::\n   :highlight: running/gone", "State 'running' has no phase 'gone'"),
        (".. proxy-fsm-diagram::\n   :theme: pink", '"pink" unknown'),
    ],
)
def test_invalid_directive_fails_the_build_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    built = build(tmp_path, text)
    assert built.returncode != 0
    assert message in built.stderr
    assert "page.rst:4" in built.stderr
