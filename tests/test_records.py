"""Files of this package: what is damaged, foreign or made to harm is refused by file and entry."""

import io
import json
import zipfile
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import pytest
from helpers import says

from diffusers_dod import DoDTransformer2DModel
from diffusers_dod.checks import hide_secrets
from diffusers_dod.metrics.extractors import load_statistics
from diffusers_dod.records import (
    MAX_SAFETENSORS_HEADER,
    Count,
    FileName,
    Sha256,
    check_record,
    check_safetensors_header,
    find_record,
    parse_json,
    read_lines,
    read_npz_headers,
    read_record,
    read_yaml,
)


HASH = "0" * 64


class Part(TypedDict):
    file: FileName
    size: float


class Record(TypedDict):
    step: Count
    parts: list[Part]
    hashes: dict[FileName, Sha256]
    note: NotRequired[str | None]


GOOD = {"step": 3, "parts": [{"file": "a/b.bin", "size": 1}], "hashes": {"a/b.bin": HASH}, "more": [1]}

NO_JSON = {
    "empty": b"",
    "zeros": b"\0" * 9,
    "torn": b'{"step": 1',
    "no text": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "twice": b'{"step": 1, "step": 2}',
    "huge": b'{"step": 1' + b"0" * 309 + b"}",
    "huge float": b'{"step": 1e309}',
    "NaN": b'{"step": NaN}',
    "Infinity": b'{"step": -Infinity}',
}


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
def test_what_is_no_json_is_refused_by_file(tmp_path, content):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match=says("file.json", "cannot be read")):
        read_record(tmp_path / "file.json", dict)
    assert find_record(tmp_path / "file.json", dict) is None


def test_a_record_keeps_what_its_schema_does_not_name(tmp_path):
    path = tmp_path / "file.json"
    assert find_record(path, Record) is None
    with pytest.raises(OSError, match="file.json"):
        read_record(path, Record)
    path.write_text(json.dumps(GOOD))
    assert read_record(path, Record) == find_record(path, Record) == GOOD


@pytest.mark.parametrize(
    "change, fragments",
    [
        ({"step": -1}, ["`step`", "got -1"]),
        ({"step": True}, ["`step`", "int", "got True"]),
        ({"step": 1.5}, ["`step`", "int", "got 1.5"]),
        ({"step": None}, ["`step`", "got None"]),
        ({"parts": {}}, ["`parts`", "list", "got {}"]),
        ({"parts": [7]}, ["`parts[0]`", "dict", "got 7"]),
        ({"parts": [{"file": "x"}]}, ["`parts[0].size`", "must be there", "'file'"]),
        ({"parts": [{"file": "x", "size": "1"}]}, ["`parts[0].size`", "got '1'"]),
        ({"hashes": {"x": "abc"}}, ["`hashes.x`", "SHA-256", "'abc'"]),
        ({"hashes": {"../x": HASH}}, ["`hashes`", "same folder", "'../x'"]),
        ({"note": []}, ["`note`", "str", "got []"]),
    ],
)
def test_entries_of_other_types_are_refused_by_name(tmp_path, change, fragments):
    (tmp_path / "file.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=says("file.json", *fragments)):
        read_record(tmp_path / "file.json", Record)
    assert find_record(tmp_path / "file.json", Record) is None


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "../a", "a/../../b", "C:\\a", "a\\..\\b", "a\0"])
def test_names_that_leave_the_folder_are_refused(name):
    with pytest.raises(ValueError, match=says("`file`", "same folder")):
        check_record(name, FileName, "file")
    check_record("a/b.c", FileName, "file")


def test_messages_are_short_and_show_no_token():
    with pytest.raises(TypeError) as error:
        check_record({"step": ["x" * 10_000] * 10_000, "parts": [], "hashes": {}}, Record)
    assert len(str(error.value)) < 10_000
    with pytest.raises(TypeError) as error:
        check_record({"step": "hf_AbCdEfGhIjKlMnOp", "parts": [], "hashes": {}}, Record)
    assert "hf_..." in str(error.value) and "AbCd" not in str(error.value)
    assert hide_secrets("/data/hf_models/api_photos/x.png") == "/data/hf_models/api_photos/x.png"


NO_LINES = [*NO_JSON.values(), b"7", b"[]", b"null", b'{"loss": 1}', b'{"step": "2"}', b'{"step": null}']
NO_LINES += [b'{"step": true}', b'{"step": 2, "loss": "low"}', b'{"step": 2, "loss": {"a": 1}}', b'{"step": -1}']


@pytest.mark.parametrize("content", NO_LINES, ids=range(len(NO_LINES)))
def test_lines_that_are_none_are_left_out(tmp_path, caplog, content):
    assert read_lines(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + content + b'\n{"step": 2, "loss": null}\n' + content)
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2, "loss": None}]
    assert ("2 lines" in caplog.text) == bool(content)  # an empty line says nothing


NO_YAML = {
    "alias": ("a: &a [1]\nb: *a", "alias"),
    "endless": ("\n".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}' if i else '1'] * 9)}]" for i in range(9)), "alias"),
    "twice": ("a: 1\na: 2", "twice"),
    "deep": ("[" * 20_000, "deep"),
    "torn": ("a: [1", "YAML"),
    "no text": (b"\xff\xfe\x81", "YAML"),
}


@pytest.mark.parametrize("content, fragment", NO_YAML.values(), ids=NO_YAML)
def test_yaml_that_is_refused(tmp_path, content, fragment):
    (tmp_path / "file.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says("file.yaml", fragment)):
        read_yaml(tmp_path / "file.yaml")


def test_yaml_with_a_byte_order_mark(tmp_path):
    (tmp_path / "file.yaml").write_bytes(b"\xef\xbb\xbfa: [1, b]\nc: {d: true}")
    assert read_yaml(tmp_path / "file.yaml") == {"a": [1, "b"], "c": {"d": True}}


def write_npz(path: Path, name: str, shape: tuple[int, ...], dtype: str = "<f8", content: bytes = b"") -> None:
    """An archive whose array has a header that says anything, and any content."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", header.getvalue() + content)


def test_headers_of_npz_files(tmp_path):
    np.savez_compressed(tmp_path / "good.npz", a=np.zeros((2000, 300)), b=np.array("name"))
    assert read_npz_headers(tmp_path / "good.npz") == {"a": ((2000, 300), np.dtype("f8")), "b": ((), np.dtype("<U4"))}
    write_npz(tmp_path / "bad.npz", "a", (10**7, 10**7))
    with pytest.raises(ValueError, match=says("bad.npz", "`a.npy`", "(10000000, 10000000)", "cannot hold")):
        read_npz_headers(tmp_path / "bad.npz")
    for content in (b"", b"PK", (tmp_path / "good.npz").read_bytes()[:-30]):
        (tmp_path / "torn.npz").write_bytes(content)
        with pytest.raises(ValueError, match=says("torn.npz", "no npz file")):
            read_npz_headers(tmp_path / "torn.npz")


def test_statistics_of_absurd_size_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "load", lambda *_: pytest.fail("It is read."))
    path = tmp_path / "statistics.npz"
    np.savez_compressed(path, mu=np.zeros(20_000, np.int8), sigma=np.zeros((20_000, 20_000), np.int8))
    with pytest.raises(ValueError, match=says("`mu` (d,)", "d <= 16384", "20000")):
        load_statistics(path)
    np.savez_compressed(path, mu=np.zeros(4), sigma=np.zeros(10**7))
    with pytest.raises(ValueError, match=says("`sigma` (d, d)", "10000000")):
        load_statistics(path)


def test_every_published_file_can_be_read():
    root = Path(__file__).parents[1]
    files = [path for folder in ("docs", "checkpoints") for path in (root / folder).rglob("*.json")]
    assert len(files) > 20
    for path in files:
        parse_json(path.read_bytes())
    assert len(read_lines(root / "checkpoints" / "dod-desk" / "metrics.jsonl")) > 10


def test_a_byte_order_mark_is_no_part_of_json():
    assert parse_json("\ufeff{}".encode()) == {}


def test_headers_of_safetensors_are_of_bounded_size(tmp_path):
    """Weights too: a header of 300,000 tensors takes most of a minute."""
    path = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    path.parent.mkdir()
    size = MAX_SAFETENSORS_HEADER + 1
    path.write_bytes(size.to_bytes(8, "little") + b"{}".ljust(size))
    (path.parent / "config.json").write_text('{"_class_name": "DoDTransformer2DModel"}')
    with pytest.raises(ValueError, match=says("with a header of at most 8 MiB, got 8388609 bytes.")):
        check_safetensors_header(path)
    with pytest.raises(ValueError, match="with a header of at most 8 MiB"):
        DoDTransformer2DModel.from_pretrained(path.parent)
    path.write_bytes(b"no safetensors")
    check_safetensors_header(path)  # whoever loads it says what is wrong
