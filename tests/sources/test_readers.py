"""Readers: every row comes, or is named and counted, whatever a file holds; and any place in it can be gone on from."""
import bz2
import csv
import gzip
import io
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from cli import BadInput
from config import Source
from sources import streams
from sources.files import find_files
from sources.streams import FileStream, Notes, read


class Quiet(Notes):
    """Notes that are kept, not printed."""

    def say(self, words):
        self.said.add(words)


def chunks_of(source, position=(None, 0)):
    """(chunks that came, BadInput that ended them or None, what was said)."""
    notes, chunks = Quiet("mine"), []
    try:
        for chunk in read(FileStream(source, find_files(source).files), source, list(position), notes):
            chunks.append(chunk)
    except BadInput as error:
        assert "\n" not in str(error) and str(error)
        return chunks, str(error), notes.said
    return chunks, None, notes.said


def texts_of(source, position=(None, 0)):
    """(texts, with None for a bad row; BadInput or None; what was said)."""
    chunks, refusal, said = chunks_of(source, position)
    return [text for texts, _, _ in chunks for text in texts], refusal, said


def written(path, data):
    """A source of this file, whose name says what it is."""
    path.write_bytes(data)
    kind = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}[path.suffix]
    return Source(kind, data_files=str(path))


# -----------------------------------------------------------------------------
# plain text

def test_blank_lines_may_hold_spaces(tmp_path):
    source = written(tmp_path / "a.txt", b"\n one\ntwo \n \t \nthree\r\n\r\nfour\n\n\n\n\nfive")
    assert texts_of(source)[0] == [" one\ntwo ", "three", "four", "five"]


def test_what_is_a_document(tmp_path):
    data = b"a\n\nb\rc\r\nd"
    source = written(tmp_path / "a.txt", data)
    for sample_by, rows in (("line", ["a", "", "b", "c", "d"]), ("paragraph", ["a", "b\nc\nd"]),
                            ("document", [data.decode()])):
        source.sample_by = sample_by
        assert texts_of(source)[0] == rows
    (tmp_path / "a.txt").write_bytes(b"")
    assert texts_of(source)[0] == [""]  # a file is a document, even an empty one


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
def test_other_encodings_name_the_file(tmp_path, encoding, sample_by):
    """And the likely encoding. The good file before it is read."""
    text = "A café’s menu.\n\nAnd another line.\n".replace("’", "’" if encoding != "latin-1" else "'")
    (tmp_path / "1.txt").write_text(text, encoding="utf-8-sig")
    (tmp_path / "2.txt").write_bytes((text * 9).encode(encoding))
    source = Source("text", data_files=str(tmp_path / "*.txt"), sample_by=sample_by)
    _, refusal, _ = texts_of(source)
    likely = {"latin-1": "LATIN1", "cp1252": "WINDOWS-1252"}.get(encoding, encoding.upper().replace("-LE", "LE"))
    assert "2.txt" in refusal and "UTF-8" in refusal
    assert likely.replace("-BE", "BE") in refusal, refusal


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, data, text in (("a.txt", "word", "word"), ("a.jsonl", '{"text": "word"}', "word"),
                             ("a.csv", "text\nword\n", "word"), ("a.json", '[{"text": "word"}]', "word")):
        assert texts_of(written(tmp_path / name, data.encode("utf-8-sig")))[0] == [text], name


# -----------------------------------------------------------------------------
# JSON

def test_only_the_wanted_column_decides(rng, tmp_path):
    """Keys that come and go, and change their type, even after more than 10 MB and in another file."""
    odd = [None, 1, "a", [1, {"b": 2}], {"c": [None]}, 1e400, True]
    rows = [{"text": f"row {number}", rng.choice("xyz"): rng.choice(odd)} for number in range(300)]
    rows.insert(200, {"text": "long " * 2_500_000, "new": "key"})
    for number, some in enumerate((rows[:250], rows[250:])):
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    source = Source("json", data_files=str(tmp_path / "*.jsonl"))
    assert texts_of(source)[:2] == ([row["text"] for row in rows], None)


BAD_LINES = [
    (b'{"text": 5}', "a number"), (b'{"text": ["a"]}', "a list"), (b'{"text": {"a": 1}}', "an object"),
    (b'{"body": "a"}', "has no 'text'; it has 'body'"), (b'["text"]', "a list, not an object"), (b"5", "a number"),
    (b'{"text": "a', "not JSON"), (b'{"text": "a"} {"text": "b"}', "more than one value"), (b"prose", "not JSON"),
    (b'{"text": "caf\xe9"}', "UTF-8"), (b'{"text": "half \\ud83d of it"}', "surrogate"),
    (b'{"text": "a", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deep"),
    (b'{"deep": ' * 100_000, "too deep"), (b'{"text": "\\u0000\\u0000a"}', "NULs"), (b"\0" * 50, "not JSON"),
    (b'{"n": ' + b"9" * 10_000 + b', "text": false}', "true or false"),
]


@pytest.mark.parametrize("line, words", BAD_LINES)
def test_a_bad_line_of_json(rng, tmp_path, line, words):
    """Named by file and line, left out and counted, or refused; the others come."""
    rows = [b'{"text": "row %d"}' % number for number in range(rng.randint(5, 50))]
    place = rng.choice([0, rng.randrange(len(rows))])
    rows.insert(place, line)
    source = written(tmp_path / "a.jsonl", b"\n".join(rows))
    texts, refusal, said = texts_of(source)
    assert texts == [None if number == place else f"row {number - (number > place)}" for number in range(len(rows))]
    (note,) = said
    assert refusal is None and f"a.jsonl, line {place + 1}," in note and words in note, note
    source.bad_rows = "refuse"
    _, refusal, _ = texts_of(source)
    assert f"a.jsonl, line {place + 1}," in refusal and "--sources.mine.bad_rows skip" in refusal


def test_a_null_is_an_empty_document(tmp_path):
    assert texts_of(written(tmp_path / "a.jsonl", b'{"text": null}\n\n{"text": "a"}'))[0] == ["", "a"]


@pytest.mark.parametrize("form", ["list", "indented", "strings", "columns", "one"])
def test_json_over_many_lines(tmp_path, form):
    rows = [{"text": f"row {number}", "n": number} for number in range(20)]
    value = {"list": rows, "indented": rows, "strings": [row["text"] for row in rows], "one": rows[0],
             "columns": {"text": [row["text"] for row in rows], "n": list(range(20))}}[form]
    source = written(tmp_path / "a.json", json.dumps(value, indent=None if form == "list" else 2).encode())
    assert texts_of(source)[0] == [row["text"] for row in rows][:1 if form == "one" else 20]


@pytest.mark.parametrize("data, words", [
    (b"[" * 100_000, "too deep"), (b'[{"text": "a"}, {"text"', "not JSON"), (b'[{"text": "a"}] more', "not JSON"),
    (b'[{"text": "\xe9"}]', "UTF-8"), ('{"text": "a"}\n'.encode("utf-16-le"), "UTF-16LE"),
])
def test_a_bad_file_of_json(tmp_path, data, words):
    _, refusal, _ = texts_of(written(tmp_path / "a.jsonl", data))
    assert "a.jsonl" in refusal and words in refusal


def test_a_hundred_bad_rows_are_no_odd_ones(tmp_path):
    """The wrong column, or no JSON at all, is not read to its end."""
    source = written(tmp_path / "a.jsonl", b'{"body": "a"}\n' * 1000)
    _, refusal, _ = texts_of(source)
    assert "100 rows" in refusal and "'text'" in refusal and "line 100," in refusal


# -----------------------------------------------------------------------------
# CSV

def test_csv_holds_text(rng, tmp_path):
    """NA and null are words; a text may hold quotes, separators and line breaks; the header may be anywhere."""
    words = ["NA", "null", "NaN", "", "-", "1e5", "True", 'a "word"', "one, two", "two\nlines", "a\r\nb", "é😀", "#n/a"]
    rows = [(rng.choice(words), rng.choice(words), number) for number in range(500)]
    for separator, name in ((",", "a.csv"), ("\t", "a.tsv")):
        text = io.StringIO(newline="")
        csv.writer(text, delimiter=separator).writerows([("id", "text", "n"), *rows])
        (tmp_path / name).write_text(text.getvalue(), newline="")
        source = Source("csv", data_files=str(tmp_path / name))
        assert texts_of(source)[:2] == ([row[1] for row in rows], None)


@pytest.mark.parametrize("data, words", [
    (b"body\na\n", "no column 'text'"), (b"", "no column 'text'"), (b"id;text\n1;a\n", "id;text"),
    (b'text\na\n"b\nc\n', "never closed"), ("text\nabc\n".encode("utf-16"), "UTF-16"),
])
def test_a_bad_file_of_csv(tmp_path, data, words):
    _, refusal, _ = texts_of(written(tmp_path / "a.csv", data))
    assert "a.csv" in refusal and words in refusal


@pytest.mark.parametrize("row, words", [(b"1,a,b", "3 fields"), (b"1", "1 fields"), (b"1,caf\xe9", "UTF-8"),
                                        (b'1,"a"b', "not CSV")])
def test_a_bad_row_of_csv(tmp_path, row, words):
    texts, refusal, said = texts_of(written(tmp_path / "a.csv", b"id,text\n1,x\n" + row + b"\n2,y\n"))
    assert (texts, refusal) == (["x", None, "y"], None) and "a.csv, line 3," in str(said) and words in str(said)


# -----------------------------------------------------------------------------
# Parquet

def test_parquet_of_any_string_type(tmp_path):
    for type_ in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": pyarrow.array(["a", None, "b"], type_)}),
                                    tmp_path / "a.parquet")
        assert texts_of(Source("parquet", data_files=str(tmp_path / "a.parquet")))[0] == ["a", "", "b"]


def test_parquet_with_a_text_that_is_not_utf8(tmp_path):
    buffers = pyarrow.array([b"good", b"caf\xe9", b"too"], pyarrow.binary()).buffers()
    array = pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), tmp_path / "a.parquet")
    texts, _, said = texts_of(Source("parquet", data_files=str(tmp_path / "a.parquet")))
    assert texts == ["good", None, "too"] and "a.parquet, row 2," in str(said)


# -----------------------------------------------------------------------------
# packed files, and places in files

@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress,
                                  lambda data: pyarrow.compress(data, "zstd", asbytes=True),
                                  lambda data: data])
def test_every_place_can_be_gone_on_from(rng, tmp_path, monkeypatch, pack):
    """Of every kind of file, packed or not: after any chunk, and from any document within one."""
    monkeypatch.setattr(streams, "CHUNK", 60)
    texts = ["".join(rng.choices("ab é\n\r,\"", k=rng.randint(0, 40))) for _ in range(60)]
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("text", "n"), *((text, 1) for text in texts)])
    files = {"a.jsonl": "".join(json.dumps({"text": text}) + "\n" * rng.randint(1, 2) for text in texts),
             "b.json": json.dumps([{"text": text} for text in texts], indent=1), "c.csv": table.getvalue(),
             "d.txt": "\n \n".join(texts)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(pack(content.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "e.parquet", row_group_size=7)
    sources = [Source(str(tmp_path))] + [Source("text", data_files=str(tmp_path / "d.txt"), sample_by=sample_by)
                                         for sample_by in ("line", "document")]
    for source in sources:
        chunks, refusal, _ = chunks_of(source)
        whole = [text for some, _, _ in chunks for text in some]
        assert refusal is None and (len(whole) > 4 * 60 or source is not sources[0])
        done = 0
        for some, before, after in chunks:
            used = rng.randint(0, len(some))
            assert texts_of(source, (before[0], before[1] + used))[0] == whole[done + used:]
            done += len(some)
            assert texts_of(source, json.loads(json.dumps(after)))[0] == whole[done:]


def test_a_torn_or_packed_file_is_named(rng, tmp_path):
    data = gzip.compress(rng.randbytes(4000).hex().encode())
    torn, damaged = data[:-500], data[:50] + b"x" * 50 + data[100:]
    for name, content, words in (("a.txt", torn, "a.txt"), ("b.txt", damaged, "b.txt"),
                                 ("c.txt", b"PK\x03\x04" + data, "unpack")):
        _, refusal, _ = texts_of(written(tmp_path / name, content))
        assert refusal and words in refusal


# -----------------------------------------------------------------------------
# a thousand mutated files of each kind

def mutated(rng, data):
    """A few bytes changed, cut out, doubled or put in: at random, or such as readers stumble over."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 8, 40])
        odd = rng.choice([b'"', b"\n", b"\r", b"\0", b"\\", b"\xe9", b"{", b"[", b",", b"\xef\xbb\xbf", b"\xff\xfe",
                          b"\\ud800", b"null", b"[" * 2000, rng.randbytes(4), b"\n\n", b" \n", b'""', b"PAR1"])
        kind = rng.randrange(6)
        if kind == 5:
            data = data[:start] if rng.random() < 0.2 else data + odd
        else:
            end = start + (length, length, 0, 0, 1)[kind]
            data[start:end] = (rng.randbytes(length), b"", data[start:start + 3 * length], odd, odd)[kind]
    return bytes(data)


def seed_file(rng, kind):
    """A good file of a kind."""
    texts = ["".join(rng.choices('ab cé😀\n",', k=rng.randint(0, 60))) for _ in range(20)]
    if kind == "jsonl":
        rows = [{"id": number, "text": text, "x": [number, {"y": None}]} for number, text in enumerate(texts)]
        return "".join(json.dumps(row, ensure_ascii=row["id"] % 2 == 0) + "\n" for row in rows).encode()
    if kind == "csv":
        table = io.StringIO(newline="")
        csv.writer(table).writerows([("id", "text"), *enumerate(texts)])
        return table.getvalue().encode()
    if kind == "parquet":
        table = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"id": range(20), "text": texts}), table, row_group_size=6,
                                    compression=rng.choice(["snappy", "none", "zstd"]))
        return table.getvalue()
    return "\n\n".join(texts).encode()


def rows_in(path, kind):
    """How many rows a file has, told in another way; None if that cannot be told."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if kind == "jsonl":
        lines = [line for line in data.split(b"\n") if line.strip()]
        whole = lines and (lines[0].strip().startswith(b"[") or lines[0].strip()[-1:] in b",{[:")
        return None if whole else len(lines)
    if kind == "parquet":
        return pyarrow.parquet.read_metadata(path).num_rows
    return None


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_mutated_files(rng, tmp_path, monkeypatch, kind):
    """A thousand of each: no exception but BadInput in one line, no row lost, and the rest comes from any place."""
    monkeypatch.setattr(streams, "CHUNK", 100)
    path, refused = tmp_path / f"a.{kind}", 0
    for number in range(1000):
        if number % 50 == 0:
            seed = seed_file(rng, kind)
        path.write_bytes(data := mutated(rng, seed))
        source = Source({"txt": "text", "jsonl": "json"}.get(kind, kind), data_files=str(path),
                        sample_by=rng.choice(["line", "paragraph", "document"]))
        chunks, refusal, said = chunks_of(source)
        texts = [text for some, _, _ in chunks for text in some]
        refused += refusal is not None or None in texts
        assert refusal is None or "a." + kind in refusal, refusal
        assert (None in texts) <= bool(said)
        if refusal is None and (rows := rows_in(path, kind)) is not None:
            assert len(texts) == rows
        if refusal is None and kind == "txt":  # every word of it has come, and in its order
            words = data.decode().removeprefix("\ufeff").split()
            assert words == " ".join(texts).split()
        if chunks:
            some, before, after = rng.choice(chunks)
            done = sum(len(earlier) for earlier, _, place in chunks[:[id(c[0]) for c in chunks].index(id(some)) + 1])
            assert texts_of(source, after)[0] == texts[done:]
    assert 0 < refused < 1000
