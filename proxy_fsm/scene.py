"""Shapes and text on a page, written as SVG or PNG: light, dark, and the same bytes on every machine.

The machine's fonts are not measured: widths of text are estimated, generously. SVG names only font families; PNG is
drawn with matplotlib's own font.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass, field
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from proxy_fsm.errors import DiagramError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from matplotlib.axes import Axes

__all__ = [
    "COLOURS",
    "STATE_COLOURS",
    "Box",
    "Group",
    "Line",
    "Rules",
    "Scene",
    "Text",
    "Theme",
    "legal",
    "png",
    "rules",
    "shortened",
    "svg",
    "width_of",
]

Theme = Literal["light", "dark"]
Point = tuple[float, float]

#: Widths of characters as a share of the font size, for a wide font (DejaVu Sans, Verdana); others are 0.63.
_NARROW = dict.fromkeys(" iIjl.,:;'|!()[]ftr", 0.34) | dict.fromkeys("mwMW%@—→", 0.92)
_LETTER = 0.63
_BOLD = 1.1
#: The largest width and height that matplotlib can draw.
_PNG_PIXELS = 1 << 16
_FAMILY = "DejaVu Sans, Verdana, Arial, sans-serif"

#: The colours of all pictures: light, dark.
COLOURS = {
    "ink": ("#1f2328", "#e6edf3"),
    "paper": ("#ffffff", "#0d1117"),
    "faint": ("#59636e", "#9198a1"),
    "line": ("#59636e", "#8b949e"),
    "grid": ("#d8dee4", "#30363d"),
    "accent": ("#0550ae", "#79c0ff"),
    "box": ("#f6f8fa", "#161b22"),
    "note": ("#fff8c5", "#2d2a16"),
    "visited": ("#ddf4ff", "#0c2d6b"),
    "current": ("#ffd33d", "#9e6a03"),
    "current-line": ("#7d4e00", "#f2cc60"),
    "current-ink": ("#1f2328", "#ffffff"),
    "marked": ("#fff3b0", "#5a4500"),
    "fault": ("#b32b25", "#ff7b72"),
    "warning": ("#9a6700", "#d29922"),
    "error": ("#cf222e", "#ff7b72"),
    "to-agent": ("#54aeff", "#388bfd"),
    "from-agent": ("#e08e0b", "#d29922"),
}
#: The background of each state in pictures of a run: light, dark. They differ in lightness too, for readers with a
#: colour vision deficiency, and a state's name is readable on each.
STATE_COLOURS = {
    "idle": ("#929ba4", "#636b72"),
    "tunnelling": ("#98c6f6", "#206fae"),
    "spawning": ("#bc66f0", "#48258a"),
    "running": ("#57efa1", "#235639"),
    "stopping": ("#eab44e", "#805d1c"),
    "stopped": ("#eef1f4", "#161a1f"),
    "failed": ("#e26054", "#5b120b"),
}

Style = dict[str, str]
Rules = dict[tuple[str, str], Style]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle by its upper left corner."""

    x: float
    y: float
    width: float
    height: float
    kind: str = "box"
    radius: float = 8.0


@dataclass(frozen=True, slots=True)
class Line:
    """Points joined by straight lines, or by cubic Bézier curves (the first point, then three for each piece).

    ``tip`` is where its arrow head ends; None for no head.
    """

    points: tuple[Point, ...]
    kind: str = "line"
    curved: bool = False
    tip: Point | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A line of text: its middle (or, anchored at the start, its left end) and its baseline."""

    x: float
    y: float
    words: str
    kind: str = "name"
    size: float = 13.0
    anchor: Literal["middle", "start"] = "middle"


@dataclass(frozen=True, slots=True)
class Group:
    """Items that are styled together; ``data`` becomes ``data-`` attributes of SVG."""

    items: tuple[Box | Line | Text, ...]
    classes: tuple[str, ...] = ()
    data: tuple[tuple[str, str], ...] = ()
    title: str = ""


@dataclass(slots=True)
class Scene:
    """A whole picture, to which groups are added; ``title`` is its text alternative."""

    width: float
    height: float
    title: str
    groups: list[Group] = field(default_factory=list)


def width_of(words: str, size: float, *, bold: bool = False) -> float:
    """Return the estimated width of a line of text."""
    # fsum, since the result of sum for floats depends on Python's version
    share = math.fsum(_NARROW.get(char, _LETTER if ord(char) < 0x1100 else 1.05) for char in words)  # noqa: PLR2004 - wide
    return share * size * (_BOLD if bold else 1.0)


def shortened(words: str, room: float, size: float, *, bold: bool = False) -> str:
    """Cut a text to fit a width, by the estimate of `width_of`."""
    if width_of(words, size, bold=bold) <= room:
        return words
    while words and width_of(words + "…", size, bold=bold) > room:
        words = words[:-1]
    return words + "…"


def rules(theme: Theme) -> Rules:
    """Return the style of each kind of shape and text (by an empty name), and of kinds within a class of groups."""
    at = 1 if theme == "dark" else 0
    colour = {name: pair[at] for name, pair in COLOURS.items()}
    ink, line, accent = colour["ink"], colour["line"], colour["accent"]
    styles = {
        ("", "paper"): {"fill": colour["paper"]},
        ("", "box"): {"fill": colour["box"], "stroke": line, "stroke-width": "1.2"},
        ("", "group"): {"fill": colour["box"], "stroke": line, "stroke-width": "1.2"},
        ("", "frame"): {"fill": "none", "stroke": line, "stroke-width": "1.2"},
        ("", "note"): {"fill": colour["note"], "stroke": line, "stroke-width": "0.8"},
        ("", "dot"): {"fill": ink},
        ("", "line"): {"fill": "none", "stroke": line, "stroke-width": "1.3"},
        ("", "aside"): {"fill": "none", "stroke": line, "stroke-width": "0.9", "stroke-dasharray": "4 3"},
        ("", "head"): {"fill": line},
        ("", "name"): {"fill": ink, "font-weight": "bold"},
        ("", "plain"): {"fill": ink},
        ("", "order"): {"fill": accent, "font-weight": "bold"},
        ("", "observation"): {"fill": ink, "font-style": "italic"},
        ("", "time"): {"fill": ink, "font-weight": "bold"},
        ("", "caption"): {"fill": colour["faint"]},
        ("", "fault"): {"fill": colour["fault"], "font-weight": "bold"},
        ("phase", "box"): {"fill": colour["paper"]},
        ("visited", "box"): {"fill": colour["visited"], "stroke": accent},
        ("visited", "group"): {"fill": colour["visited"], "stroke": accent},
        ("visited", "frame"): {"stroke": accent},
        ("taken", "line"): {"stroke": accent, "stroke-width": "2.6"},
        ("taken", "head"): {"fill": accent},
        ("current", "box"): {"fill": colour["current"], "stroke": colour["current-line"], "stroke-width": "3"},
        ("current", "group"): {"fill": colour["marked"], "stroke": colour["current-line"], "stroke-width": "3"},
        ("current", "frame"): {"stroke": colour["current-line"]},
        ("current", "name"): {"fill": colour["current-ink"]},
        ("", "dashes"): {"fill": "none", "stroke": line, "stroke-width": "1.3", "stroke-dasharray": "5 3"},
        ("", "grid"): {"fill": "none", "stroke": colour["grid"], "stroke-width": "0.8"},
        ("", "tick"): {"fill": "none", "stroke": line, "stroke-width": "0.9"},
        ("", "tick-change"): {"fill": "none", "stroke": accent, "stroke-width": "1.6"},
        ("", "tick-warning"): {"fill": "none", "stroke": colour["warning"], "stroke-width": "2"},
        ("", "tick-error"): {"fill": "none", "stroke": colour["error"], "stroke-width": "2.4"},
        ("", "flow-to"): {"fill": colour["to-agent"], "stroke": "none"},
        ("", "flow-from"): {"fill": colour["from-agent"], "stroke": "none"},
    }
    for state, pair in STATE_COLOURS.items():
        styles["", f"is-{state}"] = {"fill": pair[at], "stroke": line, "stroke-width": "0.6"}
    return styles


def svg(scene: Scene, theme: Theme | None = None) -> str:
    """Return the picture as SVG.

    Args:
        scene: The picture.
        theme: ``light`` or ``dark``; by default it follows the viewer's setting (``prefers-color-scheme``).
    """
    width, height = _number(scene.width), _number(scene.height)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="proxy-fsm" role="img" aria-label={_attribute(scene.title)}',
        f'  width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="{_FAMILY}">',
        f"<title>{_content(scene.title)}</title>",
        "<style>",
        *_css(rules(theme or "light")),
    ]
    if theme is None:
        light, dark = rules("light"), rules("dark")
        changed = {key: style for key, style in dark.items() if style != light[key]}
        lines += ["@media (prefers-color-scheme: dark) {", *_css(changed), "}"]
    lines += ["</style>", f'<rect class="paper" width="{width}" height="{height}"/>']
    for group in scene.groups:
        data = "".join(f" data-{name}={_attribute(value)}" for name, value in group.data)
        kind = f' class="{" ".join(group.classes)}"' if group.classes else ""
        lines.append(f"<g{kind}{data}>" + (f"<title>{_content(group.title)}</title>" if group.title else ""))
        lines += [element for item in group.items for element in _elements(item)]
        lines.append("</g>")
    return "\n".join([*lines, "</svg>"]) + "\n"


def _css(styles: Rules) -> list[str]:
    return [
        f".proxy-fsm {f'.{owner} ' if owner else ''}.{kind} "
        "{ " + "; ".join(f"{name}: {value}" for name, value in style.items()) + " }"
        for (owner, kind), style in styles.items()
    ]


def _number(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")


def _at(point: Point) -> str:
    return f"{_number(point[0])},{_number(point[1])}"


def _elements(item: Box | Line | Text) -> list[str]:
    match item:
        case Box():
            place = f'x="{_number(item.x)}" y="{_number(item.y)}"'
            size = f'width="{_number(item.width)}" height="{_number(item.height)}" rx="{_number(item.radius)}"'
            return [f'<rect class="{item.kind}" {place} {size}/>']
        case Line():
            rest = " ".join(map(_at, item.points[1:]))
            path = f'<path class="{item.kind}" d="M{_at(item.points[0])} {"C" if item.curved else "L"}{rest}"/>'
            corners = " ".join(map(_at, _head(item)))
            return [path, *([f'<polygon class="head" points="{corners}"/>'] if corners else [])]
        case _:
            place = f'x="{_number(item.x)}" y="{_number(item.y)}" font-size="{_number(item.size)}"'
            return [f'<text class="{item.kind}" {place} text-anchor="{item.anchor}">{_content(item.words)}</text>']


def _attribute(words: str) -> str:
    return f'"{escape(legal(words))}"'


def _content(words: str) -> str:
    return escape(legal(words), quote=False)


def legal(words: str) -> str:
    """Replace the characters that XML cannot contain."""
    return "".join(char if char.isprintable() else "�" for char in words)


def _head(line: Line) -> tuple[Point, ...]:
    if line.tip is None:
        return ()
    (x, y), (end_x, end_y) = line.points[-1], line.tip
    angle = math.atan2(end_y - y, end_x - x)
    wide, long = 3.8, max(math.hypot(end_x - x, end_y - y), 8.0)
    back = (end_x - long * math.cos(angle), end_y - long * math.sin(angle))
    side = (wide * math.sin(angle), -wide * math.cos(angle))
    return ((back[0] + side[0], back[1] + side[1]), line.tip, (back[0] - side[0], back[1] - side[1]))


def png(scene: Scene, theme: Theme = "light") -> bytes:
    """Return the picture as PNG, at two pixels per unit.

    Raises:
        DiagramError: matplotlib is not installed, or the picture is too large for it.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415 - of the extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise DiagramError('PNG needs matplotlib: pip install "proxy_fsm[timeline]".') from error
    if 2 * max(scene.width, scene.height) >= _PNG_PIXELS:
        raise DiagramError("This picture is too large for PNG: draw SVG.")
    styles = rules(theme)
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        mpl.rcdefaults()
        figure = Figure(figsize=(scene.width / 72, scene.height / 72), dpi=144, facecolor=styles["", "paper"]["fill"])
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(0, scene.width), ylim=(scene.height, 0))
        axes.set_axis_off()
        everything = [(group, item) for group in scene.groups for item in group.items]
        for at, (group, item) in enumerate(everything):
            _paint(axes, item, partial(_style, styles, group.classes), at)
        target = io.BytesIO()
        figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def _style(styles: Rules, owners: Iterable[str], kind: str) -> Style:
    style = dict(styles["", kind])
    for owner in owners:
        style |= styles.get((owner, kind), {})
    return style


def _paint(axes: Axes, item: Box | Line | Text, style_of: Callable[[str], Style], order: int) -> None:
    from matplotlib.patches import Circle, FancyBboxPatch, PathPatch, Polygon  # noqa: PLC0415 - of the extra
    from matplotlib.path import Path  # noqa: PLC0415

    style = style_of(item.kind)
    patch_style: dict[str, Any] = {
        "facecolor": style.get("fill", "none"),
        "edgecolor": style.get("stroke", "none"),
        "linewidth": float(style.get("stroke-width", 0)),
        "linestyle": (0, tuple(map(float, style["stroke-dasharray"].split()))) if "stroke-dasharray" in style else "-",
        "zorder": order + 1,
    }
    match item:
        case Box(kind="dot"):
            middle = (item.x + item.width / 2, item.y + item.height / 2)
            axes.add_patch(Circle(middle, item.width / 2, **patch_style))
        case Box():
            corners = f"round,pad=0,rounding_size={min(item.radius, item.width / 2, item.height / 2)}"
            axes.add_patch(FancyBboxPatch((item.x, item.y), item.width, item.height, boxstyle=corners, **patch_style))
        case Line():
            step = Path.CURVE4 if item.curved else Path.LINETO
            codes = [Path.MOVETO, *[step] * (len(item.points) - 1)]
            axes.add_patch(PathPatch(Path(item.points, codes), **patch_style))
            if head := _head(item):
                axes.add_patch(Polygon(head, facecolor=style_of("head")["fill"], linewidth=0, zorder=order + 1))
        case _:
            axes.text(
                item.x,
                item.y,
                item.words,
                parse_math=False,
                fontsize=item.size,
                color=style["fill"],
                fontweight=style.get("font-weight", "normal"),
                fontstyle=style.get("font-style", "normal"),
                horizontalalignment="center" if item.anchor == "middle" else "left",
                verticalalignment="baseline",
                zorder=order + 1,
            )
