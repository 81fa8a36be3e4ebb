"""The page: what it shows, and what its buttons do. gradio is imported here alone."""

import html
import json
import shutil
import tempfile
import threading
import zipfile
from base64 import b64encode
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageChops
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffzoo.demo.ask import Ask, Kind, first_of
from diffzoo.demo.job import Stopped, Update, watched
from diffzoo.errors import UserError
from diffzoo.generation import Pipeline, Samples, pipeline
from diffzoo.images import make_grid, png_bytes
from diffzoo.record import kinds
from diffzoo.sampling import Sampler
from diffzoo.sizes import size_text
from diffzoo.zoo.loading import emas_of

__all__ = ["Models", "serve"]

MOST_WAITING, MOST_UPLOAD = 16, "16mb"
PUBLISHED = "as published"
# ways to begin: the method of the pipeline, and the fields that it alone has
KINDS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "from noise": ("__call__", ()),
    "variations of a seed": ("variations", ("around", "amount")),
    "between two seeds": ("interpolate", ("frames",)),
    "from an image": ("edit", ("drawing", "mask", "strength")),
}
HOW: dict[str, type] = {"weights": str, "steps": int, "guidance": float, "sampler": str}  # of each setting
CSS = (
    "img { image-rendering: pixelated } .live img { width: 100%; max-width: 60rem } "
    ".grid-container .caption-label { left: 0; right: 0; bottom: 0; max-width: none } "
    ".grid-container .gallery-item > button { padding-bottom: 1.7rem }"
)
# the page may load nothing from elsewhere, whatever a version of gradio puts into it
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:"
)
Parts = dict[str, Any]  # components, or their values, by name


class Models:
    """The models that a page offers; the one that was used last stays loaded. One call at a time.

    Args:
        sources: what `diffzoo.pipeline` takes; nothing else is ever loaded.
        device: where to compute; default: a GPU if there is one.
    """

    def __init__(self, sources: Sequence[str], device: str | None = None):
        self.sources, self.device = list(sources), device
        self._held: dict[tuple[str, str], Pipeline] = {}

    def __call__(self, source: str, weights: str = "ema") -> Pipeline:
        """The pipeline of a source.

        Raises:
            UserError: for one that is not offered.
        """
        if source not in self.sources:
            raise UserError(f"this page does not offer the model {source!r}")
        if (source, weights) not in self._held:
            self._held.clear()  # its memory first
            self._held[source, weights] = pipeline(source, self.device, weights=weights)
        return self._held[source, weights]


class _Page:
    """The components, and what the buttons do."""

    def __init__(self, models: Models):
        self.models = models
        self.running: dict[str, threading.Event] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="diffzoo-demo-"))
        with gr.Blocks(title="diffzoo", analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks, gr.Row():
            with gr.Column(scale=1):
                self.fields = _fields(models.sources)
                with gr.Row():
                    go, stop = gr.Button("Sample", variant="primary"), gr.Button("Stop", variant="stop")
            with gr.Column(scale=2):
                self.live = gr.HTML(elem_classes="live")
                with gr.Row():
                    self.results = [_result(number) for number in (1, 2)]
            self._listen(go, stop)
        self.blocks.queue(max_size=MOST_WAITING)

    def _listen(self, go: gr.Button, stop: gr.Button) -> None:
        """One job at a time on the device; the others wait, and the page says at which place."""
        fields, results = self.fields, [part for result in self.results for part in result.values()]
        described = [fields[name] for name in ("about", "classes", "captions", "weights", "weights2")]
        alone: Parts = {"concurrency_id": "device", "concurrency_limit": 1}
        gr.on([self.blocks.load, fields["source"].change], self.describe, fields["source"], described, **alone)
        go.click(self.sample, set(fields.values()), [self.live, *results], show_progress="full", **alone)
        stop.click(self.stop, queue=False)
        own = {name: fields[name] for _, names in KINDS.values() for name in names}
        fields["kind"].change(
            lambda kind: [gr.update(visible=name in KINDS[kind][1]) for name in own],
            fields["kind"],
            [*own.values()],
            queue=False,
        )

    def describe(self, source: str) -> list[object]:
        """Updates of the fields that depend on the model."""
        try:
            pipe = self.models(source)
        except UserError as error:
            raise _said(error) from error
        kind, classes = first_of(pipe).generator.kind, first_of(pipe).classes
        names = [(f"{classes.label(i)} ({i})", i) for i in range(classes.count)] if kind == "class" else []
        weights = ["ema", "raw", *emas_of(source)] if emas_of(source) else ["ema"]
        size, licence = size_text(pipe.generator.image_size), pipe.metadata.licence or "not stated"
        return [
            f"{pipe.metadata.title}: {size} pixels, on {pipe.device}. Licence of the weights: {licence}.",
            gr.update(choices=names, value=[i for _, i in names[:1]], visible=bool(names)),
            gr.update(visible=kind == "caption"),
            *[gr.update(choices=weights, value="ema", visible=len(weights) > 1)] * 2,
        ]

    def sample(self, request: gr.Request, values: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        """Updates of the outputs while one or two settings are sampled."""
        session, stop = str(request.session_hash), threading.Event()
        self.running[session] = stop
        shown: dict[Any, Any] = {self.live: ""}
        try:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            asks = self._asks({name: values.get(field) for name, field in self.fields.items()}, folder)
            for number, (ask, result) in enumerate(zip(asks, self.results, strict=False)):
                pipe = self.models(ask.source, ask.weights)
                for update in watched(ask.count(), partial(ask.sampled, pipe), stop):
                    if isinstance(update, Update):
                        yield {self.live: _live(update, number, len(asks))}
                    else:
                        shown |= _shown(result, ask, update, folder / f"setting{number + 1}")
            if len(asks) == 1:
                shown[self.results[1]["column"]] = gr.update(visible=False)
            yield shown
        except Stopped:
            yield {self.live: "<p class=stopped>stopped</p>"}
        except UserError as error:
            raise _said(error) from error
        finally:
            stop.set()
            if self.running.get(session) is stop:
                del self.running[session]

    def stop(self, request: gr.Request) -> None:
        """Stop what this visitor has running."""
        if event := self.running.get(str(request.session_hash)):
            event.set()

    def _asks(self, values: Parts, folder: Path) -> list[Ask]:
        """The settings that the fields state, checked; uploads are put into the folder."""
        kind, names = KINDS[values["kind"]]
        own: Parts = {name: values[name] for name in names}
        if kind == "edit":
            own |= _pictures(own.pop("drawing"), own["mask"], folder)
        asks = []
        for suffix in ("", "2") if values["beside"] else ("",):
            how: Parts = {name: _read(name, values[name + suffix]) for name in HOW}
            pipe = self.models(values["source"], how["weights"])
            lines = [line.strip() for line in (values["captions"] or "").splitlines() if line.strip()]
            conditions = {"class": values["classes"], "caption": lines}.get(first_of(pipe).generator.kind) or ()
            own |= {"source": values["source"], "device": str(pipe.device), "kind": kind, "seeds": values["seeds"]}
            ask = Ask(**own, **how, classes=tuple(conditions))
            ask.check(pipe)
            asks.append(ask)
        return asks


def _read(name: str, text: str) -> Any:
    """What stands in a field of a setting; None where it is empty."""
    try:
        return HOW[name](text) if text.strip() else None
    except ValueError:
        raise UserError(
            f"{name}: expected {'a whole number' if HOW[name] is int else 'a number'}, got {text!r}"
        ) from None


def _said(error: UserError) -> gr.Error:
    return gr.Error(str(error), duration=None, print_exception=False)


def _pictures(drawing: Parts | None, mask: str | None, folder: Path) -> dict[str, str | None]:
    """The image to begin with, and the mask: a file, or else what was painted over the image, as files."""
    if drawing is None or drawing["background"] is None:
        return {"image": None, "mask": None}
    image, white = folder / "image.png", folder / "mask.png"
    drawing["background"].convert("RGB").save(image)
    if mask is not None:
        shutil.copy(mask, white)
        return {"image": str(image), "mask": str(white)}
    painted = Image.new("L", drawing["background"].size)
    for layer in drawing["layers"]:
        painted = ImageChops.lighter(painted, layer.getchannel("A").point(lambda alpha: 255 * (alpha > 127)))
    painted.save(white)
    return {"image": str(image), "mask": str(white) if painted.getbbox() else None}


def _live(update: Update, number: int, settings: int) -> str:
    grid = make_grid(update.pixels, min(8, len(update.pixels)))
    which = f"setting {number + 1} of {settings}, " if settings > 1 else ""
    text = html.escape(f"{which}{update.done:.0%}, about {update.left:.0f} s left")
    image = b64encode(png_bytes(grid)).decode()
    return f'<p>{text}</p><progress value="{update.done}"></progress><br><img src="data:image/png;base64,{image}">'


def _shown(result: Parts, ask: Ask, samples: Samples, folder: Path) -> dict[Any, Any]:
    """Updates of the column of one setting; the archive holds all that its command needs."""
    paths = samples.save_png(folder)
    written = ask.beside()
    with zipfile.ZipFile(folder / f"{folder.name}.zip", "w") as archive:
        for path in [*paths, *(Path(given) for given in (ask.image, ask.mask) if given)]:
            archive.write(path, path.name)
        archive.writestr("command.txt", written.as_command() + "\n")
    gallery = [(str(path), title) for path, title in zip(paths, samples.titles, strict=True)]
    return {
        result["column"]: gr.update(visible=True),
        result["gallery"]: gr.update(value=gallery, columns=min(samples.columns, 4)),
        result["record"]: gr.update(visible=False),
        result["file"]: gr.update(value=archive.filename),
        result["command"]: gr.update(value=written.as_command()),
        result["python"]: gr.update(value=written.as_python()),
        result["records"]: samples.records,
    }


def _record(records: list[dict[str, object]], event: gr.SelectData) -> object:
    """The metadata of the image that was clicked."""
    record = records[int(event.index)]
    first = {name: record[name] for name in ("drawn", "seed") if name in record}
    return gr.update(value=json.dumps({**first, **record}, indent=1), visible=True)


def _fields(sources: list[str]) -> Parts:
    """What a visitor fills in, by name."""
    fields: Parts = {
        "source": gr.Dropdown(sources, value=sources[0], label="model"),
        "about": gr.Markdown(),
        "kind": gr.Radio(list(KINDS), value="from noise", label="begin"),
        "classes": gr.Dropdown([], label="classes", multiselect=True, filterable=True),
        "captions": gr.Textbox(label="captions, one per line", lines=2, visible=False),
        "seeds": gr.Textbox("0-7", label="seeds, such as 0-7 or 3,20"),
        "around": gr.Number(0, label="vary this seed, towards the seeds above", precision=0, visible=False),
        "amount": gr.Slider(0, 1, 0.3, label="amount of variation", visible=False),
        "frames": gr.Slider(2, 32, 8, step=1, precision=0, label="frames", visible=False),
        "drawing": gr.ImageEditor(
            type="pil",
            format="png",
            label="image; paint what to change",
            sources=("upload", "clipboard"),
            transforms=(),
            layers=False,
            brush=gr.Brush(colors=["#ffffff"], color_mode="fixed"),
            visible=False,
        ),
        "mask": gr.File(label="or a mask, white where to change", file_types=["image"], visible=False),
        "strength": gr.Slider(0.05, 1, 0.6, label="strength: small keeps the image", visible=False),
    }
    fields |= _way("")
    fields["beside"] = gr.Checkbox(label="a second setting beside it, same seeds")
    with gr.Group(visible=False) as more:
        fields |= {f"{name}2": field for name, field in _way(" (second)").items()}
    fields["beside"].change(lambda on: gr.update(visible=on), fields["beside"], more, queue=False)
    return fields


def _way(label: str) -> Parts:
    """The fields of one setting."""
    with gr.Row():
        return {
            "weights": gr.Dropdown(["ema"], value="ema", label=f"weights{label}", visible=False),
            "steps": gr.Textbox(label=f"steps{label}", placeholder=PUBLISHED, max_lines=1),
            "guidance": gr.Textbox(label=f"guidance{label}", placeholder=PUBLISHED, max_lines=1),
            "sampler": gr.Dropdown([(PUBLISHED, ""), *kinds(Sampler)], value="", label=f"sampler{label}"),
        }


def _result(number: int) -> Parts:
    """Where the images of a setting appear, by name."""
    with gr.Column(visible=False) as column:
        fixed: Parts = {"interactive": False, "wrap_lines": True, "lines": 1, "max_lines": 8}
        result = {
            "column": column,
            "gallery": gr.Gallery(label=f"setting {number}", object_fit="contain", height="auto"),
            "record": gr.Code(label="metadata", language="json", visible=False, interactive=False),
            "file": gr.DownloadButton("Download images and command"),
            "command": gr.Code(label="as command", language="shell", **fixed),
            "python": gr.Code(label="as Python", language="python", **fixed),
            "records": gr.State([]),
        }
    result["gallery"].select(_record, result["records"], result["record"], queue=False)
    return result


class _OnlyHere:
    """Middleware that forbids the page to load anything from other hosts."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def serve(models: Models, host: str = "127.0.0.1", port: int | None = None, password: str | None = None) -> gr.Blocks:
    """Serve the page from threads of this process; `close()` of what is returned ends that."""
    page = _Page(models).blocks
    font = ["system-ui", "sans-serif"]
    page.launch(
        server_name=host,
        server_port=port,
        auth=("diffzoo", password) if password else None,
        prevent_thread_lock=True,
        quiet=True,
        inline=False,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=MOST_UPLOAD,
        app_kwargs={"middleware": [Middleware(_OnlyHere)]},
        theme=gr.themes.Default(font=font, font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )
    return page
