import dataclasses
import hashlib
import json

import pytest
from PIL import Image

from ldm.data import DataError, emoji
from ldm.data.check import check
from ldm.data.emoji import PACKAGES, build_emoji

from .fake_packages import ICONS, write_packages, write_tarball

resvg_py = pytest.importorskip("resvg_py")


@pytest.fixture
def packages(tmp_path):
    return write_packages(tmp_path / "tarballs")


@pytest.fixture
def built(tmp_path, packages):
    build_emoji(tmp_path / "set", tarballs=tmp_path / "tarballs", size=32, packages=packages)
    return tmp_path / "set"


def rows(root):
    return {row["file"]: row for row in map(json.loads, (root / "metadata.jsonl").read_text().splitlines())}


def test_records_have_caption_concept_variant_hint_and_split(built):
    table = rows(built)
    assert list(table)[:2] == ["images/flat/abacus.png", "images/flat/aerial-tramway.png"] and len(table) == 11
    assert table["images/flat/hand-medium-dark.png"] == {
        "file": "images/flat/hand-medium-dark.png",
        "text": "a flat emoji of a hand, medium dark skin tone",
        "style": "flat",
        "concept": "hand",
        "variant": "medium-dark",
        "lineart": "hints/lineart/hand.png",
        "split": table["images/flat/hand.png"]["split"],
    }
    assert table["images/line/abacus.png"]["lineart"] is None
    assert table["images/noto/flag-japan.png"]["lineart"] is None
    assert table["images/noto/hand-light-skin-tone.png"]["lineart"] == "hints/lineart/hand.png"


def test_a_heldout_concept_is_never_in_train(built):
    splits = {(row["concept"], row["split"]) for row in rows(built).values()}
    assert ("aerial-tramway", "heldout_concept") in splits and ("aerial-tramway", "train") not in splits


def test_pictures_are_on_white_and_hints_white_on_black(built):
    flat = Image.open(built / "images/flat/abacus.png")
    assert (flat.mode, flat.size) == ("RGB", (32, 32))
    assert flat.getpixel((0, 0)) == (255, 255, 255) and flat.getpixel((16, 16)) == (255, 0, 0)
    line, hint = Image.open(built / "images/line/hand.png"), Image.open(built / "hints/lineart/hand.png")
    assert line.getpixel((16, 4)) == (0, 0, 0) and line.getpixel((16, 28)) == (255, 255, 255)
    assert hint.getpixel((16, 4)) == 255 and hint.getpixel((16, 28)) == 0


def test_wide_icons_keep_their_shape(built):
    wide = Image.open(built / "images/noto/wide.png")  # 64 x 8 units on a square: a band of 4 pixels in the middle
    assert wide.getpixel((1, 16)) == wide.getpixel((30, 15)) == (0, 0, 255)
    assert wide.getpixel((16, 10)) == wide.getpixel((16, 21)) == (255, 255, 255)


def test_manifest_and_licences_lie_beside_the_data(built):
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["records"] == 11 and manifest["size"] == 32
    assert sum(sum(c.values()) for c in manifest["counts"].values()) == 11
    assert [s["sha256"] for s in manifest["sources"]] == [
        hashlib.sha256(p.read_bytes()).hexdigest()
        for p in (built.parent / f"tarballs/fake-{s}-1.0.0.tgz" for s in ICONS)
    ]
    assert "Permission is hereby granted" in (built / "LICENSES/flat.txt").read_text()
    assert "Licence: CC-BY-4.0" in (built / "LICENSES/noto.txt").read_text()


def test_only_the_set_is_written_and_it_passes_its_check(built):
    assert sorted(p.name for p in built.parent.iterdir()) == ["set", "tarballs"]  # no temporary folder, no escape
    assert not list(built.parent.parent.glob("escaped.txt"))
    assert check(built).ok


def test_building_twice_gives_the_same_bytes(tmp_path, built, packages):
    build_emoji(tmp_path / "again", tarballs=tmp_path / "tarballs", size=32, packages=packages)
    for path in (p for p in built.rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(built)).read_bytes()


def refused(tmp_path, packages, message):
    with pytest.raises(DataError, match=message) as caught:
        build_emoji(tmp_path / "set", tarballs=tmp_path / "tarballs", size=32, packages=packages)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists() and not list(tmp_path.glob(".set-*"))


def test_a_wrong_hash_is_refused(tmp_path, packages):
    wrong = dataclasses.replace(packages[1], sha256="0" * 64)
    refused(tmp_path, (packages[0], wrong), "fake-line-1.0.0.tgz has sha256 [0-9a-f]{64}, must be 0{64}")


def test_a_missing_tarball_is_named(tmp_path, packages):
    (tmp_path / "tarballs/fake-noto-1.0.0.tgz").unlink()
    refused(tmp_path, packages, "fake-noto-1.0.0.tgz is missing; get it with `npm pack @fake/noto@1.0.0`")


@pytest.mark.parametrize(
    "members", [{"package/other.json": b"{}"}, {"package/icons.json": b"{"}, {"package/icons.json": b"[]"}]
)
def test_a_package_without_icons_is_refused(tmp_path, packages, members):
    sha256 = write_tarball(tmp_path / "tarballs/fake-flat-1.0.0.tgz", members)
    refused(tmp_path, [dataclasses.replace(packages[0], sha256=sha256)], "icons.json|icon table")


@pytest.mark.parametrize("name", ["../abacus", "a/b", "Abacus", ""])
def test_icon_names_cannot_escape(tmp_path, name):
    icons = {"flat": {name: ICONS["flat"]["abacus"]}}
    refused(tmp_path, write_packages(tmp_path / "tarballs", icons), "icon name .* is not made of lower-case words")


def test_an_icon_that_does_not_draw_is_named(tmp_path):
    icons = {"flat": {"abacus": {"body": "<circle"}}}
    refused(tmp_path, write_packages(tmp_path / "tarballs", icons), "@fake/flat, icon 'abacus': SVG does not draw")


def test_existing_data_is_never_overwritten(built, packages):
    before = (built / "metadata.jsonl").read_bytes()
    with pytest.raises(DataError, match="exists and is not empty; nothing was written"):
        build_emoji(built, tarballs=built.parent / "tarballs", packages=packages)
    assert (built / "metadata.jsonl").read_bytes() == before


def test_an_empty_folder_may_be_filled(tmp_path, packages):
    (tmp_path / "set").mkdir()
    build_emoji(tmp_path / "set", tarballs=tmp_path / "tarballs", size=16, packages=packages)
    assert (tmp_path / "set/manifest.json").is_file()


def test_without_npm_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm was not found; fetch the tarballs elsewhere with `npm pack @iconify-json"):
        build_emoji(tmp_path / "set")


def test_npm_failure_is_one_line(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"npm pack failed with code 1 \(npm error code E404\)"):
        build_emoji(tmp_path / "set")


def test_the_real_packages_are_pinned():
    assert [p.tarball for p in PACKAGES] == [
        "iconify-json-fluent-emoji-flat-1.2.6.tgz",
        "iconify-json-fluent-emoji-high-contrast-1.2.6.tgz",
        "iconify-json-noto-1.2.9.tgz",
        "iconify-json-twemoji-1.2.5.tgz",
    ]
    assert all(len(p.sha256) == 64 for p in PACKAGES) and len({p.sha256 for p in PACKAGES}) == 4


def test_icons_json_larger_than_the_limit_is_refused(tmp_path, packages, monkeypatch):
    monkeypatch.setattr(emoji, "_MAX_MEMBER", 10)
    refused(tmp_path, packages, "package/icons.json is not a plain file of at most 10 bytes")
