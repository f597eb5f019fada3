"""Jinja templates in the package's folders: pages (`*.html.j2`), style sheets, and model cards (`*.md.j2`)."""

from __future__ import annotations

from typing import Any


def render_template(path: str, **values: Any) -> str:
    """Render a template of the package.

    Args:
        path: the file, such as "studies/page/page.html.j2". In `.html.j2` files every value is escaped that is not
            `markupsafe.Markup`.
        values: the template's variables; a variable that is missing is an error.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("normtune", ""),
        autoescape=path.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(path).render(**values)
