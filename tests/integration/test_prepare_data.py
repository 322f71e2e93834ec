import json

import pytest
from PIL import Image

from ldm.data.emoji import build_emoji
from scripts.prepare_data import main
from tests.unit.data.fake_packages import write_packages


def exit_code(*args) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    return stop.value.code


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    node = {"name": "folder", "root": str(tmp_path / "set"), "size": 16, "hints": {"lineart": "lineart"}}
    path.write_text(json.dumps({"data": node}))  # JSON is YAML
    return path


def test_build_check_and_preview(tmp_path, config, monkeypatch, capsys):
    pytest.importorskip("resvg_py")
    packages = write_packages(tmp_path / "tarballs")
    monkeypatch.setitem(build_emoji.__kwdefaults__, "packages", packages)
    main(["emoji", "--out", str(tmp_path / "set"), "--tarballs", str(tmp_path / "tarballs"), "--size", "24"])
    assert "11 images" in capsys.readouterr().out
    assert exit_code("check", tmp_path / "set") == 0
    main(["preview", str(config), "data.where.style=flat", "--out", str(tmp_path / "preview.png")])
    assert "4 samples" in capsys.readouterr().out
    assert Image.open(tmp_path / "preview.png").width > 256
    (tmp_path / "set/images/flat/hand.png").unlink()
    assert exit_code("check", tmp_path / "set") == 2
    assert "missing: images/flat/hand.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["emoji", "--out", "TMP", "--tarballs", "TMP"], "exists and is not empty"),
        (["emoji", "--out", "TMP/set", "--tarballs", "TMP"], "tgz is missing"),
        (["emoji", "--out", "TMP/set", "--size", "3"], "size is 3; allowed: 16 to 1024"),
        (["check", "TMP/nowhere"], "is not a folder"),
        (["preview", "TMP/nothing.yaml"], "does not exist"),
        (["preview", "TMP/config.yaml"], "is not a folder"),
        (["preview", "TMP/config.yaml", "data.name=foldre"], "did you mean 'folder'"),
        (["preview", "TMP/config.yaml", "data=null"], "has no data node"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, config, capsys, args, message):
    before = sorted(tmp_path.rglob("*"))
    assert exit_code(*(a.replace("TMP", str(tmp_path)) for a in args)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_help_names_the_subcommands(capsys):
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("emoji", "check", "preview"))
