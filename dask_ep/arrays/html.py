"""How does a notebook show an object?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from typing import Any

from dask.utils import format_bytes


def html_table(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """Write names and values as a table in HTML.

    Examples
    --------
    >>> html_table("plan", [("rows", "6")])
    '<table><caption>plan</caption><tr><th>rows</th><td>6</td></tr></table>'
    """
    lines = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>"
        for name, value in rows
    )
    return f"<table><caption>{escape(title)}</caption>{lines}</table>"


def shows(*names: str) -> Callable[[Any], str]:
    """Make a `_repr_html_` that shows these attributes, those that are None or False left out.

    Examples
    --------
    >>> class Box:
    ...     label, nbytes = None, 2048
    ...     _repr_html_ = shows("label", "nbytes")
    >>> Box()._repr_html_()
    '<table><caption>Box</caption><tr><th>nbytes</th><td>2.00 kiB</td></tr></table>'
    """

    def _repr_html_(self: Any) -> str:
        values = {name: getattr(self, name) for name in names}
        return html_table(
            type(self).__name__,
            [
                (name.replace("_", " "), format_bytes(value) if name == "nbytes" else value)
                for name, value in values.items()
                if value is not None and value is not False
            ],
        )

    return _repr_html_
