"""Writes docs/flow.svg: the README's picture of the data flow."""

from html import escape
from pathlib import Path

BOXES = {
    "images": (10, 95, "images", "tars, folders, parquet"),
    "cache": (230, 20, "teacher-service cache", "frozen ViT, once per view"),
    "store": (480, 20, "store (zarr v3)", "features, logits, views, later blocks"),
    "train": (480, 170, "student-trainer train", "replays the same views; no teacher"),
    "student": (740, 170, "student", "plain timm checkpoint"),
    "serve": (740, 20, "teacher-service serve", "rows, zarr, live teacher over HTTP"),
}
"""Left, top, title and second line by name."""
ARROWS = [
    ((180, 110), (230, 55)), ((180, 140), (480, 205)), ((430, 50), (480, 50)), ((585, 80), (585, 170)),
    ((690, 200), (740, 200)), ((690, 50), (740, 50)), ((760, 80), (670, 170)),
]  # fmt: skip
WIDTH, HEIGHT = 210, 60


def text() -> str:
    """The picture."""
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 250" font-family="sans-serif" role="img">',
        "<title>Images go through the teacher once into a store; students train from the store</title>",
        '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        '<path d="M0,0 L9,4 L0,8 z" fill="#4a5568"/></marker></defs>',
        '<rect width="960" height="250" fill="#ffffff"/>',
    ]
    for (x1, y1), (x2, y2) in ARROWS:
        lines.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#4a5568" stroke-width="2" marker-end="url(#head)"/>'
        )
    for name, (x, y, title, below) in BOXES.items():
        width = 170 if name == "images" else 200 if name == "cache" else WIDTH
        at = f'x="{x + width / 2}" text-anchor="middle"'
        lines += [
            f'<rect x="{x}" y="{y}" width="{width}" height="{HEIGHT}" rx="8" fill="#edf2f7" stroke="#2b6cb0"/>',
            f'<text {at} y="{y + 26}" font-size="15" fill="#1a202c">{escape(title)}</text>',
            f'<text {at} y="{y + 46}" font-size="11" fill="#4a5568">{escape(below)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    (Path(__file__).parent / "flow.svg").write_text(text(), encoding="utf-8")
