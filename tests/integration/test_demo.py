"""What draws behind the web page, without the page: wishes, uploads and what is kept; small random models."""

import base64
import io
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ldm import config as configs
from ldm.data.errors import DataError
from ldm.demo import pictures
from ldm.demo.studio import Drawn, Step, Studio, Voice, Wish
from ldm.sampling import output
from scripts import demo, sample
from tests.integration.test_sample import pixels, small_models

STEPS = 3


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    models = small_models(tmp_path_factory.mktemp("models"))
    return Studio(configs.load(models / "config.yaml"), tmp_path_factory.mktemp("demo"))


@pytest.fixture
def hint(studio: Studio) -> Path:
    lines = Image.new("RGB", (64, 32))
    lines.paste("white", (8, 8, 56, 16))
    return pictures.keep(studio.folder / "pictures", pictures.png(lines.crop((16, 0, 48, 32))))


def wish(**changes: Any) -> Wish:
    return Wish(**{"prompt": "an owl", "steps": STEPS, "guidance": 3.0} | changes)


def drawn(studio: Studio, asked: Wish) -> Drawn:
    *_, last = studio.draw(asked)
    assert isinstance(last, Drawn)
    return last


def test_a_wish_is_drawn_step_by_step_and_its_files_draw_it_again(studio: Studio, hint: Path, tmp_path: Path) -> None:
    *steps, last = studio.draw(wish(seed=5, negative="blue", voices={"net": Voice(hint, 0.5)}))
    assert [(s.done, s.steps) for s in steps if isinstance(s, Step)] == [(1, 3), (2, 3), (3, 3)]
    previews = [s.preview for s in steps if isinstance(s, Step)]
    assert [p and p.size for p in previews] == [(16, 16), (16, 16), None]  # the last is the picture itself
    assert isinstance(last, Drawn)
    made = output.read_parameters(last.file)
    assert (made["prompt"], made["negative"], made["seed"]) == ("an owl", "blue", 5)
    assert (made["adapters"]["net"]["scale"], made["adapters"]["net"]["hint"]) == (0.5, str(hint))
    sample.main(["--config", str(last.config), f"out.dir={tmp_path / 'again'}"])
    assert bytes(pixels(tmp_path / "again")["00000_s5.png"].byte().numpy()) == Image.open(last.file).tobytes()
    assert set(yaml.safe_load(last.config.read_text())) == {"device", "model", "adapters", "sample", "out"}


def test_an_adapter_that_is_off_is_not_in_the_config(studio: Studio, hint: Path) -> None:
    off, on = drawn(studio, wish()), drawn(studio, wish(voices={"net": Voice(hint)}))
    assert yaml.safe_load(off.config.read_text())["adapters"] == {}
    assert Image.open(off.file).tobytes() != Image.open(on.file).tobytes()
    assert drawn(studio, wish()) == off  # the same wish, the same file


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": -1}, "seed is -1; allowed: 0 to"),
        ({"steps": 0}, "steps is 0; allowed: 1 to 100"),
        ({"steps": 10_000}, "steps is 10000; allowed: 1 to 100"),
        ({"guidance": float("nan")}, "guidance is nan; allowed: 0 to 30"),
        ({"sampler": "ddim_inversion"}, "sampler is 'ddim_inversion'; allowed: ddim"),
        ({"prompt": "a" * 5000}, "a prompt has 5,000 letters; allowed: up to 1,000"),
        ({"voices": {"net": Voice(Path("nowhere.png"))}}, "nowhere.png, which does not exist"),
        ({"voices": {"net": Voice(Path("nowhere.png"), float("inf"))}}, "scale is inf"),
    ],
)
def test_wishes_out_of_bounds_are_refused(studio: Studio, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        list(studio.draw(wish(**changes)))


def test_who_leaves_stops_the_picture_and_the_next_one_is_drawn(studio: Studio) -> None:
    started = studio.draw(wish(steps=100, seed=8))
    assert isinstance(next(started), Step)
    started.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert drawn(studio, wish(seed=9)).file.is_file()


def test_pictures_of_two_callers_wait_for_each_other(studio: Studio) -> None:
    release, found = threading.Event(), list[Drawn]()
    studio.busy(release.wait)
    callers = [threading.Thread(target=lambda s=s: found.append(drawn(studio, wish(seed=s)))) for s in (1, 2)]
    for caller in callers:
        caller.start()
    assert not found
    release.set()
    for caller in callers:
        caller.join()
    assert sorted(output.read_parameters(each.file)["seed"] for each in found) == [1, 2]


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    data = io.BytesIO()
    image.save(data, form)
    return data.getvalue()


def test_uploads_are_cut_to_the_shape_of_the_picture_or_kept_whole() -> None:
    upload = pictures.Upload("wide.png", encoded(Image.new("RGB", (900, 300))))
    assert pictures.read(upload, (64, 64), hint=True).size == (512, 512)
    assert pictures.read(upload, (16, 32), hint=True).size == (512, 256)
    assert pictures.read(upload, None, hint=False).size == (512, 171)
    clear = pictures.Upload("clear.png", encoded(Image.new("RGBA", (4, 4))))
    assert pictures.read(clear, None, hint=True).getpixel((0, 0)) == (0, 0, 0)
    assert pictures.read(clear, None, hint=False).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"no picture", "mine.png is not a readable image"),
        (encoded(Image.new("1", (9000, 4))), "mine.png is 9000x4 pixels; allowed: from 2x2 up to 4096x4096"),
        (encoded(Image.new("1", (20_000, 20_000))), "mine.png has more than 67108864 pixels|mine.png is 20000x20000"),
        (encoded(Image.new("RGB", (1, 9))), "mine.png is 1x9 pixels"),
        (encoded(Image.effect_noise((64, 64), 9))[:900], "mine.png cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "mine.png is not a readable image"),
        (b"x" * (pictures.MAX_BYTES + 1), "mine.png has 8,388,609 bytes; allowed"),
    ],
    ids=["text", "long", "bomb", "thin", "cut", "program", "heavy"],
)
def test_uploads_that_are_no_pictures_are_refused_by_their_own_name(data: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        pictures.read(pictures.Upload("mine.png", data), (64, 64), hint=True)


def test_what_a_canvas_sends_is_checked() -> None:
    data = encoded(Image.new("RGB", (8, 8)))
    assert pictures.from_data_url(pictures.data_url(data)).data == data
    for text in ("", "/etc/passwd", "data:text/html;base64,AAAA", pictures.DATA_URL + "?", "x" * 40_000_000):
        with pytest.raises(DataError, match="the drawing"):
            pictures.from_data_url(text)
    assert base64.b64decode(pictures.data_url(data).partition(",")[2]) == data


def test_the_oldest_pictures_make_room(tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"not ours")
    files = [pictures.keep(tmp_path, bytes([i]), most=3) for i in range(3)]
    files[0].with_suffix(".yaml").write_text("of the first")
    files.append(pictures.keep(tmp_path, b"new", most=3))
    assert not files[0].exists() and not files[0].with_suffix(".yaml").exists()
    assert all(file.exists() for file in files[1:]) and (tmp_path / "mine.png").exists()


def test_the_script_prints_its_config_and_names_the_extra_that_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    demo.main(["--print-config", "sample.guidance.scale=2"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["sample"]["guidance"]["scale"] == 2 and "seecoder" in config["adapters"]
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        demo.main([])
    assert stop.value.code == 2 and "pip install -c constraints.txt -e '.[demo]'" in capsys.readouterr().err
