from __future__ import annotations

from normtune.studies.page.html import Html, join_children, tag


def test_text_and_attributes_are_escaped_once() -> None:
    inner = tag("b", "a < b & c")
    assert tag("p", inner, "<script>", title='"quoted" & more') == (
        '<p title="&quot;quoted&quot; &amp; more"><b>a &lt; b &amp; c</b>&lt;script&gt;</p>'
    )


def test_void_elements_have_no_end_tag_and_none_attributes_are_left_out() -> None:
    assert tag("input", type="radio", checked=True, disabled=False, id=None) == '<input type="radio" checked>'


def test_attribute_names_are_written_as_in_html() -> None:
    assert tag("line", class_="grid", stroke_width=1.5, x1=2.0) == (
        '<line class="grid" stroke-width="1.5" x1="2"></line>'
    )


def test_none_children_are_left_out() -> None:
    assert join_children([None, "a", Html("<br>"), None]) == "a<br>"
