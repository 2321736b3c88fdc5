"""What goes wrong is said in the page, in a line; gradio shows it, and no browser is needed."""
import pytest

from tests.web.models import Page
from web import page, tabs

pytestmark = pytest.mark.skipif(page.gr is None, reason="gradio is not installed")


@pytest.mark.parametrize("damage", ["no database " * 9, None], ids=["text", "folder"])
def test_damaged_votes(shelf, tmp_path, damage):
    """A file of votes that cannot be read does not keep the page from opening, and is said there in a line."""
    votes = tmp_path / "<b>"
    votes.mkdir() if damage is None else votes.write_text(damage)
    page.page(shelf, votes)
    [line] = Page(tabs.scores(votes)).elements
    assert line[0] == "p" and "<b> cannot be read: " in line[2]


def test_errors_are_one_line_of_the_page(shelf):
    """Whatever goes wrong in a tab becomes gradio's own error, on one line and escaped."""
    def broken():
        yield 1
        raise KeyError("<b>\nline")

    steps = page.in_page(broken)()
    assert next(steps) == 1
    with pytest.raises(page.gr.Error) as error:
        next(steps)
    assert "\n" not in error.value.message and "<" not in error.value.message and "KeyError" in error.value.message
    with pytest.raises(page.gr.Error, match="max_new_tokens is -1"):
        list(page.in_page(tabs.sweep, shelf)("a", "x", 0.5, 0.7, 1, 2, -1, "0"))
