"""Names of classes: what mistakes put into them, and what no pipeline can have."""

import pytest
from helpers import says

from diffusers_dod.data.class_names import clean_class_names, read_class_names
from diffusers_dod.pipeline_inputs import check_id2label


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("cat,", "cat"),
        (" cat\n", "cat"),
        ("\ufeffcat", "cat"),
        ("tench, Tinca tinca", "tench, Tinca tinca"),
        ("a,b", "a,b"),
        (",a,, b ,", "a, b"),
        ("two  blanks", "two  blanks"),
        ("two\r\nlines", "two lines"),
        ("Ba\u0308r", "B\u00e4r"),
    ],
)
def test_what_only_a_mistake_puts_into_a_name_is_removed_and_said(name, cleaned, caplog):
    assert clean_class_names(["dog", name]) == ("dog", cleaned)
    assert (f"{name!r} to {cleaned!r}" in caplog.text) == (name != cleaned)
    assert check_id2label({0: cleaned}, 1) == {0: cleaned}  # what a pipeline accepts


@pytest.mark.parametrize(
    ("names", "fragments"),
    [
        (["dog", " "], ["must not be blank", "got ' ' for class 1"]),
        (["dog", ",\n,"], ["must not be blank", "for class 1"]),
        (["cat", "cat,"], ["must differ", "got 'cat' and 'cat,'"]),
        (["dog", "caf\udce9"], ["must be UTF-8", "for class 1"]),
    ],
)
def test_names_that_no_pipeline_can_have(names, fragments):
    with pytest.raises(ValueError, match=says("`class_names`", *fragments)):
        clean_class_names(names)


def test_two_classes_may_share_a_name():
    assert clean_class_names(["crane", "crane"]) == ("crane", "crane")


@pytest.mark.parametrize("content", ["ant\nnewt", "ant\r\nnewt\r\n\r\n", "\ufeffant\nnewt\n \n"])
def test_class_names_of_a_file(tmp_path, content):
    (tmp_path / "classes.txt").write_bytes(content.encode())
    assert read_class_names(tmp_path / "classes.txt") == ["ant", "newt"]


@pytest.mark.parametrize(
    ("content", "fragments"),
    [(b"ant\n \nnewt", ["none in line 2"]), (b"", ["none in line 1"]), (b"caf\xe9", ["UTF-8"])],
)
def test_a_file_without_a_name_in_each_line(tmp_path, content, fragments):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=says("`class_names_file`", "classes.txt", *fragments)):
        read_class_names(tmp_path / "classes.txt")
