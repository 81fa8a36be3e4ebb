"""The page: what it shows, and what its buttons do. gradio is imported here alone."""

import html
import json
import tempfile
import threading
import zipfile
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffzoo.demo.ask import Ask, Kind, as_command, as_python, sampled
from diffzoo.demo.job import Stopped, Update, watched
from diffzoo.errors import UserError
from diffzoo.generation import Pipeline, Samples, pipeline
from diffzoo.generation.seeds import parse_seeds
from diffzoo.images import make_grid, png_bytes
from diffzoo.record import kinds
from diffzoo.sampling import Sampler
from diffzoo.sizes import size_text
from diffzoo.zoo.loading import emas_of

__all__ = ["Models", "build", "serve"]

MOST_WAITING, MOST_UPLOAD = 16, "16mb"
PUBLISHED = "as published"
KINDS: dict[str, Kind] = {
    "from noise": "sample",
    "variations of a seed": "variations",
    "between two seeds": "interpolation",
    "from an image": "edit",
}
CSS = "img { image-rendering: pixelated } .live img { width: 100%; max-width: 60rem }"
# the page may load nothing from elsewhere, whatever a version of gradio puts into it
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:"
)
Way = tuple[str, str, str, str]  # weights, steps, guidance, sampler


class Models:
    """The models that a page offers; the one that was used last stays loaded.

    Args:
        sources: what `diffzoo.pipeline` takes; nothing else is ever loaded.
        device: where to compute; default: a GPU if there is one.
    """

    def __init__(self, sources: Sequence[str], device: str | None = None):
        self.sources, self.device = list(sources), device
        self._held: dict[tuple[str, str], Pipeline] = {}
        self._lock = threading.Lock()

    def __call__(self, source: str, weights: str = "ema") -> Pipeline:
        """The pipeline of a source.

        Raises:
            UserError: for one that is not offered.
        """
        if source not in self.sources:
            raise UserError(f"this page does not offer the model {source!r}")
        with self._lock:
            if (source, weights) not in self._held:
                self._held.clear()  # its memory first
                self._held[source, weights] = pipeline(source, self.device, weights=weights)
            return self._held[source, weights]


def _ask(pipe: Pipeline, way: Way, what: dict[str, object], source: str) -> Ask:
    weights, steps, guidance, sampler = way
    chosen = what.pop("classes")
    if pipe.generator.kind == "caption":
        chosen = [line.strip() for line in str(what["captions"]).splitlines() if line.strip()]
    del what["captions"]
    conditions = tuple(chosen) if isinstance(chosen, list) and pipe.generator.kind in ("class", "caption") else ()
    ask = Ask(
        source=source,
        device=str(pipe.device),
        weights=weights,
        classes=conditions,
        steps=_number(int, "steps", steps),
        guidance=_number(float, "guidance", guidance),
        sampler=None if sampler == PUBLISHED else sampler,
        **what,  # type: ignore[arg-type]
    )
    ask.check(pipe)
    return ask


N = TypeVar("N", int, float)


def _number(kind: Callable[[str], N], name: str, text: str) -> N | None:
    """The number in a field; None where it is empty."""
    try:
        return kind(text) if text.strip() else None
    except ValueError:
        raise UserError(f"{name}: expected a number, got {text!r}") from None


class _Server:
    """What the buttons do."""

    def __init__(self, models: Models):
        self.models = models
        self.running: dict[str, threading.Event] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="diffzoo-demo-"))

    def describe(self, source: str) -> list[object]:
        """Updates of the fields that depend on the model."""
        try:
            pipe = self.models(source)
        except UserError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        kind, classes = pipe.generator.kind, pipe.classes
        names = [(f"{classes.label(i)} ({i})", i) for i in range(classes.count)] if kind == "class" else []
        weights = ["ema", "raw", *emas_of(source)] if emas_of(source) else ["ema"]
        size = size_text(pipe.generator.image_size)
        licence = pipe.metadata.licence or "not stated"
        about = f"{pipe.metadata.title}: {size} pixels, on {pipe.device}. Licence of the weights: {licence}."
        return [
            about,
            gr.Dropdown(choices=names, value=[i for _, i in names[:1]], visible=bool(names)),
            gr.Textbox(visible=kind == "caption"),
            *(gr.Dropdown(choices=weights, value="ema", visible=len(weights) > 1) for _ in range(2)),
        ]

    def sample(self, request: gr.Request, source: str, kind: str, *fields: object) -> Iterator[list[object]]:
        """Updates of the outputs while one or two settings are sampled."""
        *rest, beside = fields
        ways = [rest[9:13], *([rest[13:17]] if beside else [])]
        session, stop = str(request.session_hash), threading.Event()
        self.running[session] = stop
        shown: list[object] = [gr.skip()] * 2
        try:
            asks, shared = [], _decoded(kind, rest[:9])
            for way in ways:
                pipe = self.models(source, str(way[0]))
                asks.append(_ask(pipe, tuple(way), {**shared}, source))  # type: ignore[arg-type]
            made: list[tuple[Ask, Samples]] = []
            for number, ask in enumerate(asks):
                pipe = self.models(source, ask.weights)
                for update in watched(ask.count(), _steps(pipe, ask), partial(sampled, pipe, ask), stop):
                    if isinstance(update, Update):
                        yield [_live(update, number, len(asks)), *shown * 5]
                    else:
                        made.append((ask, update))
            yield self._results(made)
        except Stopped:
            yield ["<p class=stopped>stopped</p>", *shown * 5]
        except UserError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        finally:
            stop.set()
            if self.running.get(session) is stop:
                del self.running[session]

    def stop(self, request: gr.Request) -> None:
        """Stop what this visitor has running."""
        if event := self.running.get(str(request.session_hash)):
            event.set()

    def _results(self, made: list[tuple[Ask, Samples]]) -> list[object]:
        out: list[object] = [""]
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        columns = []
        for number, (ask, samples) in enumerate(made):
            paths = samples.save_png(folder / f"setting{number + 1}")
            pictured = [Path(path).name for path in (ask.image, ask.mask) if path]
            with zipfile.ZipFile(folder / f"images{number + 1}.zip", "w") as archive:
                for path in paths:
                    archive.write(path, path.name)
                archive.writestr("command.txt", as_command(ask, pictured) + "\n")
            gallery = [(str(p), title) for p, title in zip(paths, samples.titles, strict=True)]
            columns.append(
                [
                    gr.Gallery(gallery, visible=True, columns=min(samples.columns, 8)),
                    gr.DownloadButton(value=archive.filename, visible=True),
                    gr.Code(as_command(ask, pictured), visible=True),
                    gr.Code(as_python(ask, pictured), visible=True),
                    samples.records,
                ]
            )
        if len(made) == 1:
            hidden = (gr.Gallery, gr.DownloadButton, gr.Code, gr.Code)
            columns.append([*(component(visible=False) for component in hidden), []])
        # outputs alternate: both galleries, both downloads, both commands, both Pythons, both records
        return out + [part for pair in zip(*columns, strict=True) for part in pair]


def _decoded(kind: str, fields: Sequence[object]) -> dict[str, object]:
    """The fields of `Ask` that both settings share."""
    classes, captions, seeds, around, amount, frames, image, mask, strength = fields
    edit = KINDS[kind] == "edit"
    return {
        "kind": KINDS[kind],
        "classes": classes,
        "captions": captions,
        "seeds": tuple(parse_seeds(str(seeds))),
        "around": int(around or 0),  # type: ignore[call-overload]
        "amount": amount,
        "frames": int(frames or 0),  # type: ignore[call-overload]
        "image": image if edit else None,
        "mask": mask if edit else None,
        "strength": strength if edit else None,
    }


def _steps(pipe: Pipeline, ask: Ask) -> int:
    """Of the walk that is watched."""
    whole = len(pipe.published.sampler(ask.sampler, ask.steps).times(pipe.process)) - 1
    return max(1, round((ask.strength or 1) * whole))


def _live(update: Update, number: int, settings: int) -> str:
    grid = make_grid(update.pixels, min(8, len(update.pixels)))
    which = f"setting {number + 1} of {settings}, " if settings > 1 else ""
    text = html.escape(f"{which}{update.done:.0%}, about {update.left:.0f} s left")
    image = b64encode(png_bytes(grid)).decode()
    return f'<p>{text}</p><progress value="{update.done}"></progress><br><img src="data:image/png;base64,{image}">'


def _record(records: list[dict[str, object]], event: gr.SelectData) -> gr.Code:
    """The metadata of the image that was clicked."""
    record = records[int(event.index)]
    first = {name: record[name] for name in ("drawn", "seed") if name in record}
    return gr.Code(json.dumps({**first, **record}, indent=1), visible=True)


def _way(choices: list[str], label: str) -> list[gr.components.Component]:
    """The fields of one setting."""
    with gr.Row():
        return [
            gr.Dropdown(["ema"], value="ema", label=f"weights{label}", visible=False),
            gr.Textbox(label=f"steps{label}", placeholder=PUBLISHED, max_lines=1),
            gr.Textbox(label=f"guidance{label}", placeholder=PUBLISHED, max_lines=1),
            gr.Dropdown([PUBLISHED, *choices], value=PUBLISHED, label=f"sampler{label}"),
        ]


def build(models: Models) -> gr.Blocks:
    """The page of some models."""
    server, samplers = _Server(models), kinds(Sampler)
    with gr.Blocks(title="diffzoo", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        with gr.Row():
            with gr.Column(scale=1):
                source = gr.Dropdown(models.sources, value=models.sources[0], label="model")
                about = gr.Markdown()
                kind = gr.Radio(list(KINDS), value="from noise", label="begin")
                classes = gr.Dropdown([], label="classes", multiselect=True, filterable=True)
                captions = gr.Textbox(label="captions, one per line", lines=2, visible=False)
                seeds = gr.Textbox("0-7", label="seeds, such as 0-7 or 3,20")
                around = gr.Number(0, label="vary this seed, towards the seeds above", precision=0, visible=False)
                amount = gr.Slider(0, 1, 0.3, label="amount of variation", visible=False)
                frames = gr.Slider(2, 32, 8, step=1, label="frames", visible=False)
                image = gr.File(label="image", file_types=["image"], visible=False)
                mask = gr.File(label="mask, white where to sample", file_types=["image"], visible=False)
                strength = gr.Slider(0.05, 1, 0.6, label="strength: small keeps the image", visible=False)
                first = _way(samplers, "")
                beside = gr.Checkbox(label="a second setting beside it, same seeds")
                with gr.Group(visible=False) as more:
                    second = _way(samplers, " (second)")
                with gr.Row():
                    go, stop = gr.Button("Sample", variant="primary"), gr.Button("Stop", variant="stop")
            with gr.Column(scale=2):
                live = gr.HTML(elem_classes="live")
                results = []
                with gr.Row():
                    for number in (1, 2):
                        with gr.Column(visible=number == 1) as column:
                            gallery = gr.Gallery(label=f"setting {number}", object_fit="contain", visible=number == 1)
                            record = gr.Code(label="metadata", language="json", visible=False, interactive=False)
                            file = gr.DownloadButton("Download all", visible=False)
                            line = gr.Code(
                                label="as command", language="shell", visible=False, interactive=False, wrap_lines=True
                            )
                            code = gr.Code(
                                label="as Python", language="python", visible=False, interactive=False, wrap_lines=True
                            )
                            records = gr.State([])
                            gallery.select(_record, records, record, queue=False)
                            results.append([gallery, file, line, code, records])
        outputs = [live, *(part for pair in zip(*results, strict=True) for part in pair)]
        shared = [classes, captions, seeds, around, amount, frames, image, mask, strength]
        described = [about, classes, captions, first[0], second[0]]
        gr.on([page.load, source.change], server.describe, source, described, concurrency_id="device")
        beside.change(lambda on: [gr.Group(visible=on), gr.Column(visible=on)], beside, [more, column], queue=False)
        kind.change(_shown, kind, [around, amount, frames, image, mask, strength], queue=False)
        inputs = [source, kind, *shared, *first, *second, beside]
        # one job at a time on the device; the others wait, and the page says at which place
        go.click(server.sample, inputs, outputs, concurrency_id="device", concurrency_limit=1, show_progress="full")
        stop.click(server.stop, queue=False)
    page.queue(max_size=MOST_WAITING)
    return page


def _shown(kind: str) -> list[gr.components.Component]:
    """Which fields a way to begin has."""
    varied, between, edit = (KINDS[kind] == k for k in ("variations", "interpolation", "edit"))
    return [
        gr.Number(visible=varied),
        gr.Slider(visible=varied),
        gr.Slider(visible=between),
        gr.File(visible=edit),
        gr.File(visible=edit),
        gr.Slider(visible=edit),
    ]


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
    page = build(models)
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
