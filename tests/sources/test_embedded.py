"""The embedded text: enough of every source, held out where it says so, and right."""
import re

from sources import embedded

SOURCES = ("web", "code", "math")
SPLITS = ("train", "val")


def test_there_is_enough_of_every_source(quickstart_texts):
    for source, megabytes in (("web", 5), ("code", 6), ("math", 3)):
        assert sum(map(len, quickstart_texts[source, "train"])) > megabytes * 1e6
        assert sum(map(len, quickstart_texts[source, "val"])) > 40_000


def test_held_out_text_is_in_no_training_bin(quickstart_texts):
    """Not as a document, not within one, and not in the other source that the same file went to."""
    flat = {key: "\0".join(" ".join(text.split()) for text in documents) for key, documents in quickstart_texts.items()}
    for held in ("web", "code", "math"):
        for trained in ("web", "code", "math"):
            found = [text for text in quickstart_texts[held, "val"] if " ".join(text.split()) in flat[trained, "train"]]
            assert not found, (held, trained, found[:2])
    assert not [text for text in quickstart_texts["web", "train"] if text in flat["code", "val"]]


def test_no_document_stands_twice(quickstart_texts):
    documents = [text for source in SOURCES for split in SPLITS for text in quickstart_texts[source, split]]
    assert len(documents) == len(set(documents))


def test_arithmetic_is_right_and_held_out_sums_are_unseen(quickstart_texts):
    asked = {(int(a), int(b)) for question in embedded.arithmetic_quiz()
             for a, b in re.findall(r"(\d+) \+ (\d+) =", question["prompt"])}
    assert 10 <= len(asked) <= 30
    for split in SPLITS:
        for line in "\n".join(quickstart_texts["math", split]).splitlines():
            a, b, c = map(int, re.findall(r"\d+", line))
            sign = re.search(r" ([-+*]) |(plus|get)|(minus|eat)|(times)", line)
            kind = sign[1] or ("+" if sign[2] else "-" if sign[3] else "*")
            assert c == {"+": a + b, "-": a - b, "*": a * b}[kind], line
            assert ((a, b) in asked) == (split == "val") or kind != "+", line
    for question in embedded.arithmetic_quiz():
        assert question["answer"] == str(eval(question["prompt"].rstrip("= ")))


def test_prose_leaves_doctests_and_rules_out():
    docstring = "Heading\n-------\n" + "Some words about it. " * 12 + "\n\n>>> f(1)\n2\n\nMore words."
    assert embedded.prose(docstring) == "Heading\n" + "Some words about it. " * 12 + "\nMore words."
    assert embedded.prose("Too short to learn from.") == ""


def test_documentation_is_read_without_importing(tmp_path):
    """Docstrings, and the strings that numpy and torch attach to compiled functions; broken files give nothing."""
    file = tmp_path / "module.py"
    file.write_text('"""Top."""\nraise SystemExit\nclass A:\n    """Class."""\n    def f(self):\n        """Inner."""\n'
                    'add_newdoc("numpy", "abs", """\n    Long text.\n    """)\nother("not documentation")\n')
    assert [text for text in embedded.docstrings(file) if text] == ["Top.", "Class.", "Inner.", "Long text."]
    file.write_text("this is {{ no }} python")
    assert embedded.docstrings(file) == []
