"""The web page (gradio, extra `demo`): controls on the left, the picture beside that of the base on the right.

Nothing is fetched from elsewhere: fonts are the system's, telemetry and sharing are off, and a Content-Security-Policy
makes the browser refuse any other host. What the page sends names no path of the server; the files that
it gives to download say which weights drew them.
"""

import ipaddress
import logging
import os
import re
from collections.abc import Awaitable, Callable, Generator, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, Final, cast

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read when it is imported

import gradio  # pyright: ignore[reportMissingImports]

from ldm.data.errors import DataError
from ldm.demo import pictures, sketch
from ldm.demo.studio import MAX_STEPS, MAX_TEXT, Drawn, Step, Studio, Voice, Wish
from ldm.prompts import Prompt

gr = cast("Any", gradio)  # its own types are looser than what it takes

WAITING: Final = 8  # requests in line; more are turned away
POLICY: Final = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; font-src 'self' data:; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; connect-src 'self'; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
STYLE: Final = Path(__file__).with_name("page.css")
IMAGE: Final = re.compile("<img[^>]*>")
log = logging.getLogger(__name__)

HEARS: Final = {"drawing": "Line drawing", "reference": "Reference picture", "picture": "Picture for"}


@dataclass
class _Slot:
    """A place for one picture, and the adapters that hear it."""

    title: str
    hint: bool  # transparent parts are black
    whole: bool  # not cut to the shape of the picture to draw
    names: list[str] = field(default_factory=list[str])
    state: Any = None  # gr.State with the file, or for the drawing the textbox that the canvas is sent in
    drawn: bool = False


def build(studio: Studio) -> Any:
    """The page as gradio Blocks, not yet served."""
    with gr.Blocks(title="ldm-adapters", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("## ldm-adapters\nOne text-to-image model, and adapters that tell it more than words.")
        with gr.Row():
            with gr.Column(scale=4, min_width=360):
                values = _texts(studio)
                slots = _slots(studio)
                voices = _voices(studio, slots)
            with gr.Column(scale=5, min_width=360):
                button = gr.Button("Draw", variant="primary", elem_id="draw")
                result = gr.HTML(_empty(), elem_id="result")
                with gr.Row():
                    downloads = [
                        gr.DownloadButton(label, interactive=False, elem_id=ident, size="sm")
                        for label, ident in (("PNG with its parameters", "png"), ("YAML that draws it again", "yaml"))
                    ]
                for slot in slots:
                    _place(studio, slot)
        drawing = next((slot.state for slot in slots if slot.drawn), None) or gr.Textbox(visible=False)
        others = [slot.state for slot in slots if not slot.drawn]
        boxes = [control for _, on, scale in voices for control in (on, scale)]

        def draw(canvas: str, *given: Any) -> Iterator[Any]:
            yield from _answer(studio, [name for name, *_ in voices], slots, canvas, given)

        inputs = [drawing, *values, *boxes, *others]
        button.click(
            draw, inputs, [result, *downloads], js=sketch.SEND, show_progress="minimal", api_visibility="private"
        )
    return page


def _texts(studio: Studio) -> list[Any]:
    """Prompt, negative, seed, steps, guidance, sampler, side by side."""
    s, examples = studio.config.sample, studio.examples
    prompt = gr.Textbox(examples[0].text, label="Prompt", elem_id="prompt", lines=1, max_length=MAX_TEXT)
    if texts := list(dict.fromkeys(example.text for example in examples if example.text)):
        gr.Examples([[text] for text in texts[:6]], [prompt], label="For example", api_visibility="private")
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=90)
        first = s.sampler.get("steps", 30)
        steps = gr.Number(
            first, label="Steps", precision=0, minimum=1, maximum=MAX_STEPS, elem_id="steps", min_width=90
        )
        scale = s.guidance.scale
        guidance = gr.Number(scale, label="Guidance", minimum=0, maximum=30, elem_id="guidance", min_width=90)
        sampler = gr.Dropdown(
            studio.samplers, value=s.sampler["name"], label="Sampler", elem_id="sampler", min_width=140
        )
    with gr.Accordion("More", open=False):
        negative = gr.Textbox("", label="Negative prompt", elem_id="negative", max_length=MAX_TEXT)
        beside = gr.Checkbox(True, label="Draw the same without adapters beside it", elem_id="beside")
    return [prompt, negative, seed, steps, guidance, sampler, beside]


def _slots(studio: Studio) -> list[_Slot]:
    """Places for what the adapters hear; those that hear the same kind share one."""
    slots: dict[str, _Slot] = {}
    for name in studio.config.adapters:
        kind = studio.hears(name)
        title = f"{HEARS[kind]} {name}" if kind == "picture" else HEARS[kind]
        slot = slots.setdefault(title, _Slot(title, kind != "reference", kind == "reference", drawn=kind == "drawing"))
        slot.names.append(name)
    return list(slots.values())


def _voices(studio: Studio, slots: list[_Slot]) -> list[tuple[str, Any, Any]]:
    """A switch and a weight for each adapter."""
    voices: list[tuple[str, Any, Any]] = []
    if slots:
        gr.Markdown("**Adapters**, each with its weight")
    for name in studio.config.adapters:
        title = next(slot.title for slot in slots if name in slot.names)
        with gr.Row(equal_height=True, elem_classes="voice"):
            note = ", in place of the prompt" if studio.speaks_for_text(name) else ""
            on = gr.Checkbox(False, label=f"{name} ({title.lower()}{note})", elem_id=f"on-{name}", container=False)
            scale = gr.Number(
                1, minimum=0, maximum=2, step=0.1, container=False, show_label=False, label=f"weight of {name}",
                visible=studio.weighable(name), scale=0, min_width=80,
            )  # fmt: skip
            voices.append((name, on, scale))
    return voices


def _place(studio: Studio, slot: _Slot) -> None:
    """A canvas or a preview, an upload button, and the examples of the config."""
    size, name = None if slot.whole else studio.size, slot.names[0]
    ident = sketch.ID if slot.drawn else slot.title.lower().replace(" ", "-")
    files = list(dict.fromkeys(_first(example, name) for example in studio.examples if name in example.hints))
    with gr.Accordion(f"{slot.title} (for {', '.join(slot.names)})", open=slot.drawn), gr.Row():
        with gr.Column(min_width=200):
            preview: Any = None
            if slot.drawn:
                gr.HTML(
                    sketch.markup(studio.size, slot.title),
                    js_on_load=sketch.SCRIPT.read_text(encoding="utf-8"),
                    elem_id=ident,
                )
                slot.state = gr.Textbox(visible="hidden", elem_id="drawing")
            else:
                slot.state = gr.State(None)
                preview = gr.HTML("<em>none yet</em>", elem_classes="picked", elem_id=ident)
        with gr.Column(min_width=160):
            upload = gr.UploadButton(
                "Upload a picture, or take one of these", file_types=["image"], size="sm", elem_id=f"upload-{ident}"
            )
            gallery = gr.Gallery(
                [str(file) for file in files],
                label=f"{slot.title}: examples",
                elem_id=f"examples-{ident}",
                **{"show_label": False, "columns": 2, "height": 250, "buttons": []},
                **{"allow_preview": False, "interactive": False},
            )

    def take(file: str) -> Any:
        return put(pictures.from_file(Path(file)))

    def choose(event: gradio.SelectData) -> Any:
        file = files[int(event.index)]
        return put(pictures.Upload(file.name, file.read_bytes()))

    def put(upload: pictures.Upload) -> Any:
        with _told():
            data = pictures.png(pictures.read(upload, size, hint=slot.hint))
        if slot.drawn:
            return pictures.data_url(data)
        return str(pictures.keep(studio.folder / "pictures", data)), f'<img src="{pictures.data_url(data)}" alt="">'

    outputs = [slot.state] if slot.drawn else [slot.state, preview]
    for event, handler, given in ((upload.upload, take, [upload]), (gallery.select, choose, [])):
        done = event(handler, given, outputs, show_progress="minimal", api_visibility="private")
        if slot.drawn:
            done.success(None, [slot.state], None, js=sketch.SHOW)


def _first(example: Prompt, name: str) -> Path:
    found = example.hints[name]
    return sorted(path for path in found.iterdir() if path.is_file())[0] if found.is_dir() else found


@contextmanager
def _told() -> Generator[None]:
    """What the visitor can mend becomes a message on the page; anything else is a fault of ours, and stays one."""
    try:
        yield
    except ValueError as error:
        said = escape(" ".join(str(error).split()), quote=False)
        raise gr.Error(said, title="Not drawn", duration=None, print_exception=False) from error


def _answer(studio: Studio, names: list[str], slots: list[_Slot], canvas: str, given: tuple[Any, ...]) -> Iterator[Any]:
    """Draw what the controls say, and the base beside it."""
    with _told():
        (prompt, negative, seed, steps, guidance, sampler, beside), rest = given[:7], given[7:]
        switches, files = rest[: 2 * len(names)], iter(rest[2 * len(names) :])
        heard = {slot.title: _drawing(studio, slot, canvas) if slot.drawn else next(files) for slot in slots}
        voices: dict[str, Voice] = {}
        for name, on, scale in zip(names, switches[::2], switches[1::2], strict=True):
            slot = next(slot for slot in slots if name in slot.names)
            if not on:
                continue
            if (picture := heard[slot.title]) is None:
                raise DataError(f"{name} is on, but has nothing to hear: {_invitation(slot)}, or switch it off")
            if scale is None:
                raise DataError(f"the weight of {name} is empty; give a number")
            voices[name] = Voice(Path(picture), float(scale))
        if None in (seed, steps, guidance):
            raise DataError("seed, steps or guidance is empty; give a number")
        if "${" in f"{prompt}{negative}":
            raise DataError("the prompt has ${, which configs read as a reference; leave it out")
        wish = Wish(prompt or "", negative or "", int(seed), int(steps), float(guidance), sampler, voices)
        yield from _drawings(studio, wish, bool(beside and voices))


def _drawings(studio: Studio, wish: Wish, beside: bool) -> Iterator[Any]:
    """Pictures as they become, then the files; (page, png, yaml) each time."""
    label = " + ".join(wish.voices) or "base"
    figures: dict[str, str] = {}
    files: list[Any] = [gr.DownloadButton(interactive=False)] * 2
    for name, asked in ((label, wish), *([("without adapters", replace(wish, voices={}))] if beside else [])):
        for event in studio.draw(asked):
            if isinstance(event, Drawn):
                figures[name] = _figure(event.file.read_bytes(), f"{name}, seed {asked.seed}")
                if asked is wish:
                    files = [gr.DownloadButton(value=str(f), interactive=True) for f in (event.file, event.config)]
            else:
                figures[name] = _progress(event, name, figures.get(name, ""))
            yield f'<div class="row">{"".join(figures.values())}</div>', *files


def _drawing(studio: Studio, slot: _Slot, canvas: str) -> str | None:
    if not canvas:
        return None
    image = pictures.read(pictures.from_data_url(canvas), studio.size, hint=slot.hint)
    return str(pictures.keep(studio.folder / "pictures", pictures.png(image)))


def _invitation(slot: _Slot) -> str:
    return "draw something" if slot.drawn else f"upload or choose a {slot.title.lower()}"


def _figure(png: bytes, caption: str) -> str:
    image = f'<img src="{pictures.data_url(png)}" alt="">'
    return f'<figure class="done">{image}<figcaption>{escape(caption)}</figcaption></figure>'


def _progress(step: Step, name: str, before: str) -> str:
    """A preview, or the one before where a step has none, and how far it is."""
    found = IMAGE.search(before)
    image = f'<img src="{pictures.data_url(pictures.png(step.preview))}" alt="">' if step.preview else ""
    bar = f'<progress value="{step.done}" max="{step.steps}"></progress>'
    caption = f"<figcaption>{bar}{escape(name)}: step {step.done} of {step.steps}</figcaption>"
    return f"<figure>{image or (found[0] if found else '')}{caption}</figure>"


def _empty() -> str:
    return "<em>Press Draw. Models of 64 pixels take a second or two for a picture.</em>"


class _Headers:
    """ASGI middleware: every answer says that the browser may load from, and talk to, this server alone."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        async def marked(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        await self.app(scope, receive, marked)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def serve(studio: Studio, host: str, port: int, *, block: bool = True) -> Any:
    """Serve the page until it is interrupted, or, with `block` off, until `close()` of what is returned.

    Raises: OSError if the port is taken.
    """
    from starlette.middleware import Middleware  # pyright: ignore[reportMissingImports]
    from starlette.middleware.trustedhost import TrustedHostMiddleware  # pyright: ignore[reportMissingImports]

    here = ["127.0.0.1", "localhost", "[::1]", "::1"]
    hosts = [*here, host] if _loopback(host) else ["*"]  # no other name may lead here
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks itself whether it is up
    page = build(studio).queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        prevent_thread_lock=True,
        show_error=False,
        quiet=True,
        max_threads=8,
        max_file_size=pictures.MAX_BYTES,
        state_session_capacity=64,
        ssr_mode=False,
        allowed_paths=[str((studio.folder / "drawn").resolve())],
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        run_history=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css_paths=STYLE,
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(_Headers)]},
    )
    log.info("the page is at http://%s:%d (Ctrl-C ends it); pictures go to %s", host, port, studio.folder)
    if block:
        page.block_thread()
    return page
