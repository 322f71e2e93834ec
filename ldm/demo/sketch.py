"""The canvas of the web page: white strokes on black, as in the data. Plain HTML and JavaScript, no library."""

from html import escape
from pathlib import Path
from typing import Final

ID: Final = "sketch"

SCRIPT: Final = Path(__file__).with_name("sketch.js")

SHOW: Final = "url => { if (url) document.querySelector('#sketch canvas').show(url); }"
"""A data URL onto the canvas."""

SEND: Final = """(...values) => {
  const canvas = document.querySelector('#sketch canvas');
  values[0] = canvas && canvas.dataset.drawn ? canvas.toDataURL('image/png') : '';
  return values;
}"""
"""Puts the canvas's data URL, or nothing, in place of the first input."""


def markup(size: tuple[int, int], label: str) -> str:
    """The canvas and its tools, for pictures of (height, width) pixels."""
    times = max(256 // max(size), 1)
    return (
        f'<canvas width="{size[1] * times}" height="{size[0] * times}" aria-label="{escape(label)}"></canvas>'
        '<div class="tools"><button type="button" name="undo">Undo</button>'
        '<button type="button" name="clear">Clear</button>'
        '<label>pen <input type="range" min="1" max="8" step="0.5" value="3" aria-label="pen width"></label></div>'
    )
