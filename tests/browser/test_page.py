"""The web page in a real browser: Debian's Chromium, the shipped models, everything on this machine."""

import contextlib
import http.client
import json
import math
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import adapters  # noqa: F401  registers them
from ldm import config as configs
from ldm.sampling import output
from scripts import sample

ROOT = Path(__file__).resolve().parents[2]
MISSING = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
MISSING += [package for package in ("gradio", "selenium") if find_spec(package) is None]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; see docs/demo.md"),
]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,1000"),
)
PATIENCE = 120.0  # seconds; a machine with nothing else to do needs one or two


class Page:
    """One visitor's window."""

    def __init__(self, driver: Any, window: str, downloads: Path) -> None:
        self.driver, self.window, self.downloads = driver, window, downloads

    def find(self, selector: str) -> Any:
        found: list[Any] = self.wait(lambda: self.driver.find_elements("css selector", selector), selector)
        return found[0]

    def wait(self, ready: Callable[[], Any], what: str) -> Any:
        """What `ready` gives, once it gives something."""
        self.driver.switch_to.window(self.window)
        end = time.monotonic() + PATIENCE
        while not (value := ready()):
            assert time.monotonic() < end, f"no {what}; the page says {self.text('body')[-500:]!r}"
            time.sleep(0.05)
        return value

    def text(self, selector: str) -> str:
        return self.driver.execute_script(f"return document.querySelector('{selector}')?.innerText ?? ''")

    def click(self, selector: str) -> None:
        element = self.find(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def fill(self, selector: str, value: object) -> None:
        from selenium.webdriver.common.keys import Keys

        self.find(selector).send_keys(Keys.CONTROL, "a", Keys.NULL, str(value), Keys.TAB)

    def open(self, place: str) -> None:
        """Unfold the accordion of that title, where it is folded."""
        self.wait(lambda: place in self.text("body"), place)
        path = f"//button[contains(., '{place}')]"
        button = self.driver.find_element("xpath", path)
        if "open" not in (button.get_attribute("class") or ""):
            button.click()

    def upload(self, ident: str, file: Path) -> None:
        button = self.find(f"#upload-{ident}")
        self.driver.execute_script("return arguments[0].previousElementSibling", button).send_keys(str(file))

    def drawing(self) -> str:
        return self.driver.execute_script("return document.querySelector('#sketch canvas').dataset.drawn")

    def circle(self) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        canvas = self.find("#sketch canvas")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        points = [(int(80 * math.cos(k * math.pi / 6)), int(80 * math.sin(k * math.pi / 6))) for k in range(13)]
        hand = ActionChains(self.driver, duration=5)
        hand.move_to_element_with_offset(canvas, *points[0]).click_and_hold()
        for point in points[1:]:
            hand.move_to_element_with_offset(canvas, *point)
        hand.release().perform()
        assert self.drawing() == "yes"

    def press(self) -> None:
        self.click("#draw")

    def done(self, figures: int) -> list[str]:
        """Captions, once so many pictures are finished and the files can be had."""

        def captions() -> list[str] | None:
            found = self.driver.find_elements("css selector", "#result figure.done figcaption")
            return [each.text for each in found] if len(found) == figures else None

        said = self.wait(captions, f"{figures} pictures")
        self.wait(lambda: self.driver.find_elements("css selector", "#png:not([disabled])"), "file")
        return said

    def download(self, selector: str) -> Path:
        before = set(self.downloads.iterdir())
        self.click(selector)

        def arrived() -> list[Path]:
            return [path for path in set(self.downloads.iterdir()) - before if path.suffix in (".png", ".yaml")]

        return self.wait(arrived, "download")[0]

    def message(self) -> str:
        """What the page complains of; read once."""
        text = self.wait(lambda: self.text(".toast-body"), "message")
        self.driver.execute_script("document.querySelectorAll('.toast-close').forEach(x => x.click())")
        self.wait(lambda: not self.text(".toast-body"), "end of the message")
        return text


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, int]]:
    """The studio of the shipped models, four steps a picture, and the port of its page."""
    from ldm.demo import page, studio

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with contextlib.chdir(ROOT):
        config = configs.load("configs/sample/emoji/demo.yaml", ["sample.sampler.steps=4"])
        room = studio.Studio(config, tmp_path_factory.mktemp("demo"))
        app = page.serve(room, "127.0.0.1", port, block=False)
        yield room, port
        app.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    downloads, options = tmp_path_factory.mktemp("downloads"), Options()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(str(shutil.which("chromedriver"))))
    yield driver, downloads
    driver.quit()


@pytest.fixture
def visit(served: tuple[Any, int], browser: tuple[Any, Path]) -> Iterator[Callable[[], Page]]:
    """Opens the page in a new window: another visitor."""
    driver, downloads = browser
    first, opened = driver.window_handles[0], []

    def call() -> Page:
        driver.switch_to.new_window("tab")
        driver.get(f"http://127.0.0.1:{served[1]}/")
        opened.append(driver.current_window_handle)
        page = Page(driver, driver.current_window_handle, downloads)
        page.find("#sketch canvas[data-drawn]")
        page.find("#draw")
        return page

    yield call
    for window in opened:
        driver.switch_to.window(window)
        driver.close()
    driver.switch_to.window(first)


def pixels(file: Path) -> bytes:
    return Image.open(file).convert("RGB").tobytes()


def test_the_page_loads_from_this_machine_alone(visit: Callable[[], Page], served: tuple[Any, int]) -> None:
    page = visit()
    script = "return performance.getEntriesByType('resource').map(each => new URL(each.name).host)"
    assert set(page.driver.execute_script(script)) == {f"127.0.0.1:{served[1]}"}
    assert not [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]
    page.driver.execute_script(
        "window.told = ''; fetch('http://192.0.2.1/').catch(error => { window.told = 'refused' })"
    )
    page.wait(lambda: page.driver.execute_script("return window.told") == "refused", "refusal")
    assert any("Content Security Policy" in entry["message"] for entry in page.driver.get_log("browser"))


def test_a_drawing_becomes_a_picture_whose_files_draw_it_again(
    visit: Callable[[], Page], served: tuple[Any, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit()
    page.circle()
    page.click("#on-controlnet input")
    page.fill("#prompt textarea, #prompt input", "a noto emoji of an owl")
    page.fill("#seed input", 7)
    page.press()
    said = page.wait(lambda: "of 4" in page.text("#result") and page.text("#result"), "progress")
    assert "controlnet: step" in said
    assert page.done(2) == ["controlnet, seed 7", "without adapters, seed 7"]
    png, yaml = page.download("#png"), page.download("#yaml")
    made = output.read_parameters(png)
    assert (made["prompt"], made["seed"], list(made["adapters"])) == ("a noto emoji of an owl", 7, ["controlnet"])
    monkeypatch.chdir(ROOT)
    sample.main(["--config", str(yaml), f"out.dir={tmp_path / 'yaml'}"])
    assert pixels(tmp_path / "yaml" / "00000_s7.png") == pixels(png)
    sample.main(["--from", str(png), f"out.dir={tmp_path / 'from'}"])
    assert (tmp_path / "from" / png.name).read_bytes() == png.read_bytes()


def test_an_uploaded_reference_and_an_example_drawing_are_heard(visit: Callable[[], Page], tmp_path: Path) -> None:
    Image.radial_gradient("L").convert("RGB").resize((300, 200)).save(tmp_path / "mine.jpg")
    page = visit()
    page.open("Reference picture")
    page.upload("reference-picture", tmp_path / "mine.jpg")
    page.find("#reference-picture img")
    page.click("#examples-sketch .grid-container img")
    page.wait(lambda: page.drawing() == "yes", "drawing on the canvas")
    for name in ("seecoder", "t2i_sketch"):
        page.click(f"#on-{name} input")
    page.press()
    assert page.done(2)[0] == "t2i_sketch + seecoder, seed 0"
    made = output.read_parameters(page.download("#png"))
    assert (made["prompt"], set(made["adapters"])) == ("", {"seecoder", "t2i_sketch"})
    assert Image.open(made["adapters"]["seecoder"]["image"]).size == (300, 200)


def test_what_is_no_picture_is_refused_with_a_message(visit: Callable[[], Page], tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture at all")
    Image.new("1", (9000, 2)).save(tmp_path / "huge.png")
    page = visit()
    page.upload("sketch", tmp_path / "notes.png")
    assert "notes.png is not a readable image" in page.message()
    page.upload("sketch", tmp_path / "huge.png")
    assert "huge.png is 9000x2 pixels; allowed: from 2x2 up to 4096x4096" in page.message()
    page.click("#on-controlnet input")
    page.press()
    assert "controlnet is on, but has nothing to hear: draw something" in page.message()
    assert page.drawing() == ""


def test_two_visitors_get_their_own_pictures(visit: Callable[[], Page]) -> None:
    one, two = visit(), visit()
    for page, seed in ((one, 11), (two, 12)):
        page.find("#draw")
        page.fill("#seed input", seed)
        page.press()
    files: list[Path] = []
    for page, seed in ((one, 11), (two, 12)):
        page.find("#draw")
        assert page.done(1) == [f"base, seed {seed}"]
        files.append(page.download("#png"))
        assert output.read_parameters(files[-1])["seed"] == seed
    assert pixels(files[0]) != pixels(files[1])


def test_who_closes_the_page_stops_the_picture(visit: Callable[[], Page], served: tuple[Any, int]) -> None:
    page, drawn = visit(), served[0].folder / "drawn"
    page.fill("#seed input", 77)
    page.fill("#steps input", 100)
    page.press()
    page.wait(lambda: "of 100" in page.text("#result"), "progress")
    page.driver.get("about:blank")
    other = visit()
    other.press()
    other.done(1)
    assert 77 not in {output.read_parameters(file)["seed"] for file in drawn.glob("*.png")}


def request(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request(method, path, json.dumps(body), {"content-type": "application/json", **headers})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace")


def test_more_visitors_than_the_queue_holds_are_told_to_wait(
    visit: Callable[[], Page], served: tuple[Any, int]
) -> None:
    room, port = served
    page = visit()
    released = threading.Event()
    room.busy(released.wait)
    try:
        page.press()
        known = json.loads(request(port, "GET", "/config")[1])["dependencies"]
        number = next(each["id"] for each in known if each["js"] and each["backend_fn"])
        data = ["", "owl", "", 0, 1, 4, "ddim", False, *[False, 1] * 5, None, None]
        join = {"data": data, "fn_index": number, "session_hash": "visitor"}
        answers = [request(port, "POST", "/gradio_api/queue/join?", join) for _ in range(12)]
        assert 503 in {status for status, _ in answers}
        late = visit()
        late.press()
        assert "busy" in late.message() or "full" in late.message()
    finally:
        released.set()
    page.done(1)


def test_the_server_shows_none_of_its_files(visit: Callable[[], Page], served: tuple[Any, int], tmp_path: Path) -> None:
    port = served[1]
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    for file in ("/etc/passwd", str(tmp_path / "private.png"), str(ROOT / "pyproject.toml")):
        assert request(port, "GET", f"/gradio_api/file={file}")[0] in (403, 404)
    assert request(port, "GET", "/", Host="attacker.example")[0] == 400
    dependencies = json.loads(request(port, "GET", "/config")[1])["dependencies"]
    uploads = [each for each in dependencies if any(target[1] == "upload" for target in each["targets"])]
    assert uploads
    for each in uploads:
        stolen = {"path": str(tmp_path / "private.png"), "meta": {"_type": "gradio.FileData"}}
        join = {"data": [stolen], "fn_index": each["id"], "session_hash": f"thief{each['id']}"}
        request(port, "POST", "/gradio_api/queue/join?", join)
        said = request(port, "GET", f"/gradio_api/queue/data?session_hash=thief{each['id']}")[1]
        assert '"success": false' in said.replace('"success":false', '"success": false') and "data:image" not in said
