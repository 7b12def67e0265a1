"""List files: every unambiguous form is read alike, the rest is refused with file, line and reason."""

import codecs
import csv
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sst_fast import data
from sst_fast.data.lists import read_list

ROWS = [("p0/0.png", "7"), ("p0/1.png", "7"), ("p 3/2.png", "9"), ("p0/2.PNG", "7"), ("p4/0.jpg", "Zoë")]
TABLE = [(f"{i}", path, label, "0.5") for i, (path, label) in enumerate(ROWS)]


def lines(rows, separator):
    return "".join(separator.join(row) + "\n" for row in rows)


def table(rows, header=(), **options):
    buffer = io.StringIO()
    csv.writer(buffer, **options).writerows([header, *rows] if header else rows)
    return buffer.getvalue()


def turned(rows):
    return [row[::-1] for row in rows]


FORMS = {
    "path label": lines(ROWS, " "),
    "label path": lines(turned(ROWS), " "),
    "tabs": lines(ROWS, "\t"),
    "label, tab, path": lines(turned(ROWS), "\t"),
    "tabs and blanks": lines(ROWS, " \t "),
    "several blanks": lines(ROWS, "   "),
    "no last line end": lines(ROWS, " ").rstrip("\n"),
    "empty lines": "\n\n" + lines(ROWS, " ").replace("\n", "\n \n"),
    "windows": lines(ROWS, " ").replace("\n", "\r\n"),
    "old mac": lines(ROWS, " ").replace("\n", "\r"),
    "commas": table(ROWS),
    "comma, blank": lines(ROWS, ", "),
    "label, path": table(turned(ROWS)),
    "all quoted": table(ROWS, quoting=csv.QUOTE_ALL),
    "semicolons": table(ROWS, delimiter=";"),
    "header": table(ROWS, ("path", "label")),
    "header, turned": table(turned(ROWS), ("Identity", "Image")),
    "header, blanks": "path label\n" + lines(ROWS, " "),
    "header, label and blanks": "label path\n" + lines(turned(ROWS), " "),
    "header, tabs": table(ROWS, ("filename", "class"), delimiter="\t"),
    "header, more columns": table(TABLE, ("id", "path", "label", "quality")),
    "header, weak label": table([row[1:] for row in TABLE], ("file", "name", "quality")),
    "header, quoted": table(TABLE, ("", "path", "label", "quality"), quoting=csv.QUOTE_ALL),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_form_says_the_same(tmp_path, form, encoding):
    file = tmp_path / "list.txt"
    file.write_bytes(FORMS[form].encode(encoding))
    names, paths, identities = read_list(file)
    assert names == ["7", "9", "Zoë"]
    assert paths == [path for path, _ in ROWS]
    assert identities.tolist() == [0, 0, 1, 0, 2]


def test_utf16_of_the_other_end(tmp_path):
    (tmp_path / "list.txt").write_bytes(codecs.BOM_UTF16_BE + FORMS["path label"].encode("utf-16-be"))
    assert read_list(tmp_path / "list.txt")[0] == ["7", "9", "Zoë"]


def test_quoted_commas_belong_to_the_path(tmp_path):
    rows = [("Smith, John/0.png", "Smith, John"), ('a "b"/1.png', "b")]
    (tmp_path / "list.csv").write_text(table(rows))
    names, paths, _ = read_list(tmp_path / "list.csv")
    assert (list(paths), list(names)) == ([row[0] for row in rows], [row[1] for row in rows])


def test_commas_in_paths_do_not_make_a_table(tmp_path):
    (tmp_path / "list.txt").write_text("Smith, John/0.png 4\nDoe,Jane/1.png 5\n")
    names, paths, _ = read_list(tmp_path / "list.txt")
    assert (list(paths), list(names)) == (["Smith, John/0.png", "Doe,Jane/1.png"], ["4", "5"])


REFUSED = {
    "": r"is an empty list",
    "\n \n": r"is an empty list",
    "p0/0.png\n": r"line 1: expected 'relative/path label', got 'p0/0.png'",
    "p0/0.png 1\np0/1.png\n": r"line 2: .* got 'p0/1.png', as the lines before \(path first, separated by blanks\)",
    "p0/0.png 1\n\n2 p0/1.png\n": r"line 3: .* as the lines before",
    "p0/0.png 1\np0/1.png\t1\n": r"line 2: .* as the lines before",
    "p0/0.png,1\np0/1.png 1\n": r"line 2: .* as the lines before \(path first, separated by commas\)",
    "p0/0.png p1/1.png\n": r"line 1: .*two of its words are images",
    "0\t7\tp0/0.png\n": r"line 1: .*more than two columns need a first line with their names",
    "p0/0.png,7,1\n": r"line 1: .*more than two columns",
    "Abel 1 4\n": r"line 1: .*no path in it ends in one of \.bmp",
    "p0/0 7\n": r"line 1: .*no path in it ends in one of",
    "foo,bar\np0/0.png,7\n": r"line 1: .*no path in it",
    "id,name,path\n1,a,p0/0.png\n": r"line 1: the columns id and name may both be the label",
    "image,path,label\na.png,b.png,1\n": r"line 1: the columns image and path may both be the path",
    "path,label\np0/0.png,1\np0/1.png\n": r"line 3: .* as the lines before",
    "path,label\np0/0.png,\n": r"line 2: .* as the lines before",
    'path,label\n"p0/0.png,1\n': r"line 2: ",
    "7 a,b.png\n8 c,d.png\n": r"line 1: .* may be read as .* or as .*; write the columns' names",
    "p0/0.png \x00 1\n": r"line 1: holds a null byte",
}


@pytest.mark.parametrize("content", REFUSED)
def test_the_rest_is_refused_with_file_line_and_reason(tmp_path, content):
    file = tmp_path / "list.txt"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"list.txt.*{REFUSED[content]}") as caught:
        data.faces(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le", "gb18030"])
def test_other_encodings_are_refused_with_file_and_line(tmp_path, encoding):
    file = tmp_path / "list.txt"
    file.write_bytes("p0/0.png 1\nJos\u00e9\u4e2d/0.png 2\n".encode(encoding, errors="ignore"))
    with pytest.raises(ValueError, match=r"list.txt, line [12]: .*save the list as UTF-8"):
        data.faces(file)


def test_an_invalid_byte_of_utf16_is_named(tmp_path):
    (tmp_path / "list.txt").write_bytes(codecs.BOM_UTF16_LE + "a.png 1\n".encode("utf-16-le") + b"\x00\xd8")
    with pytest.raises(ValueError, match=r"expected UTF-16, got the bytes"):
        data.faces(tmp_path / "list.txt")


def test_files_that_do_not_exist_are_named_before_training(faces):
    (faces / "list.txt").write_text("p0/0.png 1\np1/9.png 2\n")
    with pytest.raises(ValueError, match=r"list.txt: there is no file .*p1/9.png"):
        data.faces(faces / "list.txt")


@pytest.mark.parametrize("suffix", ["txt", "lst", "csv", "tsv", "CSV"])
def test_a_list_is_known_by_its_suffix(faces, suffix):
    file = faces / f"list.{suffix}"
    file.write_text("p0/0.png 7\np3/2.png 9\np0/1.png 7\n")
    found = data.faces(file)
    assert found.names == ["7", "9"]
    assert [[path.name for path in paths] for paths in found.paths] == [["0.png", "1.png"], ["2.png"]]
    np.testing.assert_array_equal(found.counts, [2, 1])


WORDS = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=6)


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=5), st.sampled_from(" \t,;"), st.booleans())
def test_whatever_is_read_is_what_was_written(tmp_path_factory, rows, separator, path_first):
    file = tmp_path_factory.mktemp("list") / "list.txt"
    rows = [(f"{a} {b}/0.png", label) for a, b, label in rows]
    file.write_text(lines(rows if path_first else turned(rows), separator), encoding="utf-8")
    names, paths, identities = read_list(file)
    assert [(paths[i], names[int(identity)]) for i, identity in enumerate(identities)] == rows
