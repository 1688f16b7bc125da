"""Seals: what is lost, cut short or changed beside a marker is found, and what is not is not."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from grasp_lora.base.files import damage, damage_words, put_aside, write_json, write_sealed
from grasp_lora.base.seal import broken


def sealed(folder: Path) -> Path:
    """Return the marker of a folder with three files, one of them below it."""
    (folder / "below").mkdir()
    for name in ("a.bin", "b.txt", "below/c.txt"):
        (folder / name).write_bytes(name.encode())
    write_sealed(folder / "marker.json", {"loss": float("nan"), "steps": {2: 1, 10: 2}})
    return folder / "marker.json"


def test_a_marker_has_the_size_and_the_hash_of_every_file(tmp_path):
    marker = sealed(tmp_path)
    content = json.loads(marker.read_text())
    assert content["files"] == {
        name: {"bytes": len(name), "sha256": sha256(name.encode()).hexdigest()}
        for name in ("a.bin", "b.txt", "below/c.txt")
    }
    assert content["steps"] == {"2": 1, "10": 2}
    assert damage(marker) == {}
    (tmp_path / "more.txt").touch()
    assert damage(marker) == {}, "what came in later is nobody's loss"


def test_a_name_that_the_locale_does_not_know_is_sealed_as_it_will_be_read(tmp_path):
    """Python has the bytes of such a name as halves of surrogate pairs."""
    marker = tmp_path / "marker.json"
    write_sealed(marker, {"path": "مدينة".encode().decode("ascii", "surrogateescape")})
    assert json.loads(marker.read_text(encoding="utf-8"))["path"] == "مدينة"
    assert damage(marker) == {}


def test_each_damage_is_told_by_the_name_of_its_file(tmp_path):
    marker = sealed(tmp_path)
    (tmp_path / "a.bin").unlink()
    (tmp_path / "b.txt").write_text("b.t")
    (tmp_path / "below" / "c.txt").write_text("BELOW/c.txt")
    found = damage(marker)
    assert found == {
        "a.bin": "is missing",
        "b.txt": "has 3 bytes, not 5",
        "below/c.txt": "has another content",
    }
    words = "'a.bin' is missing, 'b.txt' has 3 bytes, not 5, 'below/c.txt' has another content"
    assert damage_words(found) == words
    assert damage_words(found | {"d": "is missing"}) == f"{words}, and 1 more"


def test_only_the_files_that_are_named_are_sealed(tmp_path):
    sealed(tmp_path)
    write_sealed(tmp_path / "two.json", {}, ["below/c.txt"])
    (tmp_path / "a.bin").unlink()
    assert damage(tmp_path / "two.json") == {}
    (tmp_path / "below" / "c.txt").unlink()
    assert damage(tmp_path / "two.json") == {"below/c.txt": "is missing"}
    write_sealed(tmp_path / "none.json", {"x": 1}, ())
    assert damage(tmp_path / "none.json") == {}


def test_a_marker_is_damaged_if_anything_in_it_is_another(tmp_path):
    marker = sealed(tmp_path)
    content = json.loads(marker.read_text())
    assert not broken(content)
    for name in content:
        assert broken({n: one for n, one in content.items() if n != name}), name
        assert broken(content | {name: 5}), name
    assert broken(content | {"more": 1})
    marker.write_text(marker.read_text()[:-20])
    assert damage(marker) == {"marker.json": "is damaged"}
    marker.unlink()
    assert damage(marker) == {"marker.json": "is missing"}


@pytest.mark.parametrize("content", [[], "text", 3, None])
def test_what_is_no_object_is_no_marker(tmp_path, content):
    write_json(tmp_path / "marker.json", content)
    assert damage(tmp_path / "marker.json") == {"marker.json": "is damaged"}


def test_a_marker_of_an_earlier_version_says_nothing_of_the_files(tmp_path):
    write_json(tmp_path / "marker.json", {"key": 1})
    assert damage(tmp_path / "marker.json") == {}


def test_what_is_put_aside_takes_nobodys_place(tmp_path):
    places = []
    for text in ("one", "two", "three"):
        (tmp_path / "x").write_text(text)
        places.append(put_aside(tmp_path / "x").name)
    assert places == ["x.damaged", "x.damaged-2", "x.damaged-3"]
    assert [(tmp_path / name).read_text() for name in places] == ["one", "two", "three"]
