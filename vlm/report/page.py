"""The frame of a page that needs no other file: style, escaping, pictures as text."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image, UnidentifiedImageError

MAX_EDGE = 448
"""Larger pictures are embedded at this size, in pixels."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1c232d; --faint: #667180; --line: #e2e6eb;
  --accent: #2563a8; --accent-back: #e6effa; --right: #1a7f4b; --right-back: #e3f4ea; --wrong: #b3362b;
  --wrong-back: #fbe7e4; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1a2028; --ink: #e4e8ee; --faint: #93a0b0;
  --line: #2b333e; --accent: #7db4ee; --accent-back: #17293f; --right: #63cd95; --right-back: #16352a;
  --wrong: #f09186; --wrong-back: #43211e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { margin: 0 0 6px; font-size: 27px; line-height: 1.2; letter-spacing: -.01em; }
h2 { margin: 44px 0 4px; font-size: 19px; }
p { margin: 0; max-width: 68ch; color: var(--faint); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 16px;
  margin-top: 18px; }
.card { display: grid; grid-template-columns: 150px minmax(0, 1fr); gap: 18px; align-items: start; padding: 16px;
  background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
.pictures img + img { margin-top: 8px; }
.pictures img { display: block; width: 100%; border-radius: 8px; border: 1px solid var(--line); }
.pictures img.small { image-rendering: pixelated; }
.words { min-width: 0; overflow-wrap: anywhere; }
.asked { margin-bottom: 10px; font-weight: 600; }
.options { margin: -4px 0 10px; padding: 0; list-style: none; color: var(--faint); }
.options .answer { color: var(--right); font-weight: 600; }
dl { margin: 0; }
dt { margin-top: 8px; font-size: 12px; color: var(--faint); }
dt:first-child { margin-top: 0; }
dd { margin: 0; }
dt.last { color: var(--accent); font-weight: 600; }
dd.last { font-weight: 600; }
.reference { padding-bottom: 10px; margin-bottom: 10px; border-bottom: 1px solid var(--line); }
.dialogue { display: flex; flex-direction: column; gap: 6px; margin-top: 14px; padding-top: 14px;
  border-top: 1px solid var(--line); font-size: 13.5px; }
.dialogue dt, .dialogue dd { max-width: 88%; margin: 0; padding: 5px 12px; border-radius: 14px; white-space: pre-line; }
.dialogue dt { align-self: flex-start; border-bottom-left-radius: 4px; font-size: inherit; background: var(--page); }
.dialogue dd { align-self: flex-end; border-bottom-right-radius: 4px; color: var(--accent);
  background: var(--accent-back); }
.dialogue dd + dt { margin-top: 4px; }
details { color: var(--faint); font-size: 13px; }
summary { cursor: pointer; }
details ul { margin: 4px 0 0; padding-left: 18px; }
mark { background: none; color: var(--wrong); text-decoration: underline; text-decoration-thickness: 2px;
  text-underline-offset: 3px; }
.said { display: grid; grid-template-columns: max-content 1fr; gap: 4px 14px; align-items: baseline; }
.said dt { margin: 0; }
.verdict { display: inline-block; margin-right: 8px; padding: 0 8px; border-radius: 99px; font-size: 12px; }
.right { color: var(--right); background: var(--right-back); }
.wrong { color: var(--wrong); background: var(--wrong-back); }
.nothing { color: var(--faint); font-style: italic; }
@media (max-width: 480px) { .card { grid-template-columns: minmax(0, 1fr); } .pictures { max-width: 220px; } }
"""


def page(title: str, body: str) -> str:
    """A whole document around `body`."""
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<main>\n{body}</main>\n</html>\n"
    )


def picture(source: Path | bytes, name: str) -> str:
    """An `<img>` that carries its picture; one larger than MAX_EDGE is made smaller.

    Raises:
        ValueError: the picture is missing or does not decode, named.
    """
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            kind, edge = Image.MIME[opened.format or "PNG"], max(opened.size)
            if edge > MAX_EDGE:
                opened.thumbnail((MAX_EDGE, MAX_EDGE))
                stream = io.BytesIO()
                opened.convert("RGB").save(stream, "JPEG", quality=85)
                data, kind = stream.getvalue(), "image/jpeg"
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{name}: not a picture that can be shown: {error}") from None
    small = ' class="small"' if edge < 150 else ""
    encoded = base64.b64encode(data).decode()
    return f'<img{small} src="data:{kind};base64,{encoded}" alt="{escape(Path(name).name)}">'
