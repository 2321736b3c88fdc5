"""Files of text, JSON, CSV and Parquet as rows, from any place in them.

A row is a text, or a BadRow that says what is wrong with it, by file and line. Only the column that holds the text
decides: whatever else a row holds may differ from row to row. Each reader yields (row, at, line): where the file goes
on after the row, and the line's number. `at` is None for a row after which a reader cannot start.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO

from cli import BadInput, brief
from sources.files import File

Rows = Iterator[tuple["str | BadRow", int | None, int]]
HEAD = 1 << 16  # bytes from which we tell an encoding
# JSON's numbers are of no interest, and Python refuses integers of many digits.
DECODER = json.JSONDecoder(parse_int=float)
HALF = re.compile("[\ud800-\udfff]")  # half of a pair that stands for one character: not text by itself
KINDS = {dict: "an object", list: "a list", float: "a number", bool: "true or false", str: "text", type(None): "null"}


class BadRow(str):
    """Stands for a row that cannot be used, and says why."""


def rows(file: File, column: str, sample_by: str, at: int, line: int) -> Rows:
    """The rows of a file from a place on. Raises BadInput if it is damaged, or is not what its kind says."""
    try:
        yield from READERS[file.kind](file, column, sample_by, at, line)
    except BadInput:
        raise
    except Exception as error:
        if "://" in file.path:  # the network's, maybe: streams.read_patiently knows
            raise
        raise BadInput(f"{file.path}: {brief(error)}") from error


# ---------------------------------------------------------------------------------------------------------------
# Bytes and encodings


def open_file(path: str) -> BinaryIO:
    """A file's content as bytes, unpacked. Raises BadInput if it is an archive."""
    if "://" in path:
        from datasets.utils.file_utils import xopen  # here, as it takes long to import
        file = io.BufferedReader(xopen(path, "rb"), 1 << 20)
    else:
        file = open(path, "rb")
    magic = file.peek(6)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if magic.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile(file)
    for name, start in (("zstd", b"\x28\xb5\x2f\xfd"), ("lz4", b"\x04\x22\x4d\x18")):
        if magic.startswith(start):
            import pyarrow
            return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), name), 1 << 20)
    if magic.startswith((b"PK\x03\x04", b"Rar!", b"7z\xbc\xaf")):
        raise BadInput(f"{path} is an archive; unpack it, and name the files in it")
    return file


def open_at(file: File, at: int) -> tuple[BinaryIO, int]:
    """The file, opened at a place; and the place where its text begins, which is after a byte order mark.

    Raises BadInput if it begins with something other than UTF-8.
    """
    opened = open_file(file.path)
    head = opened.read(HEAD)
    start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or spread_nuls(head):
        raise BadInput(f"{file.path} is not UTF-8, {likely_encoding(head)}")
    if opened.seekable():
        opened.seek(max(at, start))
    else:  # some servers only send whole files, and some formats cannot be entered
        opened.close()
        opened, left = open_file(file.path), max(at, start)
        while left:
            left -= len(opened.read(min(left, 1 << 20))) or left
    return opened, start


def rich_in_nuls(text: str | bytes) -> bool:
    """Whether this is no text of ours: UTF-16 read as UTF-8 has a NUL beside every letter."""
    return text.count("\0" if isinstance(text, str) else b"\0") * 10 > len(text)


def spread_nuls(data: bytes) -> bool:
    """The same of a file's beginning, in which a long run of NULs may be damage to a single row."""
    return len(re.findall(b"(?<!\0)\0{1,3}(?!\0)", data)) * 10 > len(data)


def likely_encoding(data: bytes) -> str:
    """What bytes that are no UTF-8 may be, and how to convert them."""
    nuls = [data[place::4].count(0) * 4 > len(data) // 2 for place in range(4)]
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        name = "UTF-16"
    elif sum(nuls) == 3:
        name = "UTF-32BE" if nuls[0] else "UTF-32LE"
    elif rich_in_nuls(data):
        even, odd = data[::2].count(0), data[1::2].count(0)
        if min(even, odd) * 4 > max(even, odd):
            return "binary data; leave it out, or name the files of text with data_files"
        name = "UTF-16LE" if odd > even else "UTF-16BE"
    else:
        name = "WINDOWS-1252" if re.search(b"[\x80-\x9f]", data) else "LATIN1"
    return f"perhaps {name}: convert it with iconv -f {name} -t UTF-8"


def not_utf8(place: str, error: UnicodeDecodeError) -> str:
    """What to say of bytes that are no UTF-8."""
    return f"{place}, is not UTF-8 (byte 0x{error.object[error.start]:02x}), {likely_encoding(error.object)}"


def lines(file: File, at: int, number: int) -> Iterator[tuple[bytes, int, int]]:
    """The lines of a file from a place on: (line, place after it, its number)."""
    opened, start = open_at(file, at)
    with opened:
        end = max(at, start)
        for place, line in enumerate(opened, number + 1):
            end += len(line)
            yield line, end, place


# ---------------------------------------------------------------------------------------------------------------
# Plain text


def text_rows(file: File, column: str, sample_by: str, at: int, line: int) -> Rows:
    """Documents of plain text. A blank line may hold spaces."""
    if column != "text":
        raise BadInput(f"there is no column {column!r}: the column of plain text is called text")
    if sample_by == "document":
        if not at:  # else it has been read
            text = "".join(decoded(file, data, number) for data, _, number in lines(file, 0, 0))
            yield checked(text, file, 1), 1, 1
        return
    collected, number, end = [], line, at
    for data, end, number in lines(file, at, line):
        text = decoded(file, data, number)
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        pieces = text.removesuffix("\n").split("\n")
        for place, piece in enumerate(pieces, 1):
            if sample_by == "line" or (collected and not piece.strip()):
                document = piece if sample_by == "line" else "\n".join(collected)
                yield checked(document, file, number), end if place == len(pieces) else None, number
                collected = []
            elif piece.strip():
                collected.append(piece)
    if collected:
        yield checked("\n".join(collected), file, number), end, number


def decoded(file: File, data: bytes, line: int) -> str:
    """The text of a line. Raises BadInput, and says what its encoding may be, if it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(not_utf8(f"{file.path}, line {line}", error)) from None


def checked(text: str, file: File, line: int) -> str:
    """The text. Raises BadInput if it is rich in NULs."""
    if rich_in_nuls(text):
        raise BadInput(f"{file.path}, line {line}, is not UTF-8, {likely_encoding(text.encode())}")
    return text


# ---------------------------------------------------------------------------------------------------------------
# JSON


def json_rows(file: File, column: str, sample_by: str, at: int, line: int) -> Rows:
    """JSON, a row a line; or one list of rows, or one row, over many lines."""
    if is_one_value(file):
        for number, row in enumerate(whole_json(file, column)[at:], at + 1):
            yield text_in(row, column, f"{file.path}, row {number},"), number, number
        return
    for data, end, number in lines(file, at, line):
        if not data.strip():
            continue
        place = f"{file.path}, line {number},"
        try:
            row, stop = DECODER.raw_decode(text := data.decode().strip())
            problem = "holds more than one value" if text[stop:].strip() else ""
        except UnicodeDecodeError as error:
            problem = not_utf8(place, error).removeprefix(f"{place} ")
        except ValueError as error:
            problem = f"is not JSON: {brief(error)}"
        except RecursionError:
            problem = "is nested too deep"
        yield BadRow(f"{place} {problem}") if problem else text_in(row, column, place), end, number


def is_one_value(file: File) -> bool:
    """Whether a file is one list or object of JSON over many lines, not a row a line: the first line is unfinished."""
    first, second = [*islice((data.strip() for data, _, _ in lines(file, 0, 0) if data.strip()), 2), b"", b""][:2]
    if not first.startswith(b"["):
        return first.startswith(b"{") and first.endswith((b",", b"{", b"[", b":")) and len(first) < 1000
    try:
        DECODER.decode(first.decode())
    except (ValueError, RecursionError):
        return True
    return not second


def whole_json(file: File, column: str) -> list:
    """The rows of a file that is one JSON value. Raises BadInput if it is not."""
    opened, _ = open_at(file, 0)
    with opened:
        data = opened.read()
    try:
        value, stop = DECODER.raw_decode(text := data.decode().strip())
        if text[stop:].strip():
            raise json.JSONDecodeError("Extra data", text, stop)
    except UnicodeDecodeError as error:
        raise BadInput(not_utf8(f"{file.path}, byte {error.start}", error)) from None
    except ValueError as error:
        raise BadInput(f"{file.path} is not JSON: {brief(error)}") from None
    except RecursionError:
        raise BadInput(f"{file.path} is nested too deep") from None
    if isinstance(value, dict) and isinstance(value.get(column), list):  # a table, column by column
        return [{column: text} for text in value[column]]
    return [{column: row} if isinstance(row, str) else row for row in value] if isinstance(value, list) else [value]


def text_in(row: Any, column: str, place: str) -> str:
    """The text of a row of JSON, or a BadRow."""
    if not isinstance(row, dict):
        return BadRow(f"{place} is {KINDS[type(row)]}, not an object")
    if column not in row:
        return BadRow(f"{place} has no {column!r}" + (f"; it has {repr([*row][:9]).strip('[]')[:80]}" if row else ""))
    return text_or_bad(row[column], column, place)


def text_or_bad(text: Any, column: str, place: str) -> str:
    """A text; "" for None; a BadRow for anything else."""
    if text is None:
        return ""
    if not isinstance(text, str):
        return BadRow(f"{place} has {KINDS.get(type(text), type(text).__name__)} as its {column!r}, not text")
    if not text.isascii() and HALF.search(text):
        return BadRow(f"{place} has half of a character (a lone surrogate) in its {column!r}")
    if rich_in_nuls(text):
        return BadRow(f"{place} has a {column!r} of NULs")
    return text


# ---------------------------------------------------------------------------------------------------------------
# CSV


def csv_rows(file: File, column: str, sample_by: str, at: int, line: int) -> Rows:
    """CSV whose first line names the columns. A text may be any word, such as NA, and may go over several lines."""
    names, body, header = next(csv_records(file, 0, 0), ([], 0, 0))
    if isinstance(names, str) or column not in names:
        raise BadInput(f"{file.path}: there is no column {column!r}; its first line names "
                       f"{repr(names).strip('[]')[:200] or 'none'}")
    index, after = names.index(column), max(line, header)
    for fields, end, number in csv_records(file, max(at, body), after):
        first, after = after + 1, number
        place = f"{file.path}, line {first}," if number <= first else f"{file.path}, lines {first} to {number},"
        if isinstance(fields, str):
            yield BadRow(f"{place} is not CSV: {fields}"), end, number
        elif len(fields) > len(names) or index >= len(fields) > 0:
            yield BadRow(f"{place} has {len(fields)} fields and not {len(names)}"), end, number
        elif fields and HALF.search(fields[index]):
            yield BadRow(f"{place} is not UTF-8"), end, number
        elif fields:
            yield text_or_bad(fields[index], column, place), end, number


def csv_records(file: File, at: int, line: int) -> Iterator[tuple[list[str] | str, int, int]]:
    """The records of a CSV file: (fields, place after it, its last line); what is wrong instead of the fields.

    Raises BadInput if a quotation mark is never closed: the rest of the file would count as one record.
    """
    csv.field_size_limit(2**31 - 1)
    place = [at, line]

    def fed() -> Iterator[str]:
        for data, *place[:] in lines(file, at, line):
            yield data.decode(errors="surrogateescape")

    reader = csv.reader(fed(), delimiter=file.separator, strict=True)
    while True:
        first = place[1] + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise BadInput(f"{file.path}: a quotation mark at or after line {first} is never closed") from None
            fields = str(error)
        yield fields, *place


# ---------------------------------------------------------------------------------------------------------------
# Parquet


def parquet_rows(file: File, column: str, sample_by: str, at: int, line: int) -> Rows:
    """The rows of a Parquet file, of which no other column is read."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path) as table:
        if column not in table.schema_arrow.names:
            raise BadInput(f"{file.path}: there is no column {column!r}; name the one that holds the text (column) of "
                           f"{repr(table.schema_arrow.names).strip('[]')[:200]}")
        type_ = table.schema_arrow.field(column).type
        if not re.match(r"(dictionary<values=)?(large_)?(string|null)", str(type_)):
            raise BadInput(f"{file.path}: the column {column!r} holds {type_}, not text")
        group, first = 0, 0  # the first group that holds rows from `at` on, and its first row
        while group < table.num_row_groups and first + table.metadata.row_group(group).num_rows <= at:
            first += table.metadata.row_group(group).num_rows
            group += 1
        number = first
        for batch in table.iter_batches(1024, range(group, table.num_row_groups), columns=[column]):
            for text in parquet_texts(batch.column(0)):
                number += 1
                if number > at:
                    yield text_or_bad(text, column, f"{file.path}, row {number},"), number, number
        if number != table.metadata.num_rows:
            raise BadInput(f"{file.path} is damaged: it has {number} rows and says {table.metadata.num_rows}")


def parquet_texts(array: Any) -> list:
    """The texts of an Arrow array; bytes for one that is not UTF-8."""
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        texts = []
        for value in array:
            try:
                texts.append(value.as_py())
            except UnicodeDecodeError as error:
                texts.append(error.object)
        return texts


READERS = {"text": text_rows, "json": json_rows, "csv": csv_rows, "parquet": parquet_rows}
