"""How sure a model was, in colours."""
from web import html


def test_shades():
    """Green from 80%, red under 35%."""
    assert [html.shade(p) for p in (1, 0.8, 0.7999, 0.35, 0.3499, 0)] == [
        "sure", "sure", "unsure", "unsure", "surprised", "surprised"]
