"""scripts/terms.py: what it reports and what it lets pass."""

from __future__ import annotations

import pytest
import terms


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# the colours of a neighbour", ["colours", "neighbour"]),
        ("nearest_neighbours = HEARD_TWICE", ["neighbours", "HEARD"]),
        ("Licence: so many\nlevels were told.", ["Licence", "so many", "told"]),
        ("unlabelled, normalised and analysed", ["unlabelled", "normalised", "analysed"]),
        ("colors, neighbors, license, normalized, labeled", []),
        ("shoulder, outdoors, analyses, promise, otherwise, shear, heart, exercise", []),
    ],
)
def test_words_of_a_text(text, words):
    violations = sorted(terms.check_words(text), key=lambda violation: text.index(violation[1]))
    assert [word for _, word, _ in violations] == words


def test_lines_are_counted_from_one():
    assert [line for line, *_ in terms.check_words("a\nb\ncolour\n")] == [3]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("found = 1", ["found"]),
        ("for each in x: pass", ["each"]),
        ("y = [kept for kept in x]", ["kept"]),
        ("def f(given, *, seen): pass", ["given", "seen"]),
        ("class Turns: pass", ["Turns"]),
        ("def mask_of(x): pass", ["mask_of"]),
        ("def place(x): pass", ["place"]),
        ("masks = other.found; text.join(masks); x.place", []),
        ("out_of = 3", []),
    ],
)
def test_names_of_code(code, words):
    assert [word for _, word, _ in terms.check_code(code)] == words


@pytest.mark.parametrize(
    ("docstring", "decorator", "words"),
    [
        ("Every mask of a photo.", "", ["Every"]),
        ("Whether a mask is drawn.", "", ["Whether"]),
        ("Return the masks of a photo.", "", []),
        ("One more than the masks.", "@property", []),
        ("One folder.", "@pytest.fixture(scope='module')", []),
    ],
)
def test_openings_of_docstrings(docstring, decorator, words):
    code = f'{decorator}\ndef f():\n    """{docstring}"""\n'
    assert [word for _, word, _ in terms.check_code(code)] == words


def test_a_file_is_reported_by_line_and_an_allowed_word_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(terms, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("x = 1\n# grey\nfound = 2\n")
    (tmp_path / "b.bin").write_text("grey")
    monkeypatch.setattr("sys.argv", ["terms.py", str(tmp_path / "a.py"), str(tmp_path / "b.bin")])
    assert terms.main() == 1
    assert [line.partition(" ")[0] for line in capsys.readouterr().out.splitlines()] == ["a.py:2:", "a.py:3:"]
    monkeypatch.setattr(terms, "ALLOWED", (("*.py", "grey"), ("a.*", "found")))
    assert terms.main() == 0
    assert capsys.readouterr().out == "2 files use the project's words\n"


def test_tracked_files_hold_this_one():
    assert terms.ROOT / "tests" / "test_terms.py" in terms.tracked_files()
