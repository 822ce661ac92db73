"""One reader of JSON: what the standard has not is one stated error, in every command that reads some."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from workshop import Workshop

from ebm_prior.errors import CheckpointError, ConfigurationError, few, shown
from ebm_prior.plain import NotPlainError, all_printable, parse_json, printable, read_json
from ebm_prior.storage.checkpoint import load_prior, save_prior

WRONG: dict[str, bytes] = {
    "lists 100,000 deep": b"[" * 100_000,
    "objects 100,000 deep": b'{"a":' * 100_000,
    "closed, 900 deep": b"[" * 900 + b"]" * 900,
    "NaN": b'{"seed": NaN}',
    "Infinity": b'{"seed": -Infinity}',
    "a number beyond all": b'{"seed": 1e999}',
    "5,000 digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "400 digits": b'{"seed": ' + b"9" * 400 + b"}",
    "a key twice": b'{"seed": 1, "seed": 2}',
    "half a character": b'{"seed": "\\ud800"}',
    "half a character as key": b'{"\\udfff": 1}',
    "not UTF-8": b'{"seed": "\xff"}',
    "UTF-16": '{"seed": 1}'.encode("utf-16"),
    "nothing": b"",
    "cut short": b'{"seed": ',
    "two values": b"{} {}",
    "zeros": b"\0" * 100,
}


@pytest.mark.parametrize("what", WRONG)
def test_no_json_of_ours_is_one_error_everywhere(
    workshop: Workshop, fitted: Path, fit_words: list[object], tmp_path: Path, what: str
) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(WRONG[what])
    with pytest.raises(CheckpointError, match=r"file\.json cannot be read.*expected a thing: do so"):
        read_json(file, "a thing", advice="do so")
    new = ("--out", tmp_path / "out")
    for words in (
        [*fit_words, *new, "--config", file],
        ["pretrain", "--backbone", "toy", "--architecture", file, "--data", workshop.images, *new],
        ["report", fitted, "--eval", file, "--out", tmp_path / "page.html"],
        ["report", fitted, "--ood", file, "--out", tmp_path / "page.html"],
        ["report", fitted, "--doctor", file, "--out", tmp_path / "page.html"],
    ):
        assert "file.json cannot be read" in workshop.error(*words)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes(WRONG[what])
    assert "found no config.json of one" in workshop.error("report", tmp_path / "run")
    assert "config.json cannot be read" in workshop.error(*fit_words, "--out", tmp_path / "run", "--resume")
    assert "not a run of ebm-prior" in workshop.error(*fit_words, "--out", tmp_path / "run")


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json", "x") == {"a": 1}
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_json("a\0b", "x", error=ConfigurationError)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_what_is_json_is_read(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False)
    if not any("\ud800" <= letter <= "\udfff" for letter in text):
        assert parse_json(text) == value


@given(st.text())
def test_what_is_no_json_is_an_error_of_its_own(text: str) -> None:
    with contextlib.suppress(NotPlainError):
        parse_json(text)


# What reaches a terminal.


@given(st.text())
def test_a_terminal_obeys_no_file(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(text).encode().decode() == printable(text)
    assert not text.isprintable() or printable(text) == text


def test_texts_in_messages_are_printable_and_short() -> None:
    assert printable("a\x1b[2Jb\n\u202e\U000e0001") == r"a\x1b[2Jb\x0a\u202e\U000e0001"
    assert all_printable({"\x07": ["\r", (1, "ä")]}) == {r"\x07": [r"\x0d", [1, "ä"]]}
    assert few(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert len(shown("x" * 1000)) == 201


def test_escape_sequences_in_a_record_are_spelled_out(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    evil, path = "\x1b]0;owned\x07\x1b[2J\nwritten by root", tmp_path / "prior.safetensors"
    loaded = load_prior(prior)
    loaded.record["data"]["name"] = evil
    save_prior(loaded, path, checkpoint=evil)
    for words in (["info", path], ["info", path, "--json"]):
        out = workshop.run(*words).stdout
        assert "owned" in out
        assert all(letter == "\n" or letter.isprintable() for letter in out)
        assert "\nwritten by root" not in out
    message = workshop.error("sample", path, "--out", tmp_path / "x.png")
    assert "owned" in message
    assert message.isprintable()
