# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""The page itself, in Gradio. Nothing here is imported before the demo starts."""

import html
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from ..data.image_grid import make_grid
from ..evaluation.gallery import (
    FIXED_SOLVERS,
    MAX_SCALE,
    MODES,
    Result,
    Sampler,
    Settings,
    open_photo,
    stream,
    trained_size,
)
from .settings import DemoOptions, default_settings, from_query, open_pipeline, parse_numbers, to_query


FOR_VISITORS = (ValueError, TypeError, FloatingPointError, torch.OutOfMemoryError)  # errors whose message they see
SHARP_BELOW = 128  # pixels; smaller images are enlarged without smoothing
TILE = 96  # pixels of an image in the grid of all
TABS = {
    "classes": (
        "Classes",
        "Images of each class. Stage 1 has no prior, each later stage the one from the stage before.",
    ),
    "variations": ("Photo", "Your photo takes the place of stage 1: new images have about its layout and colors."),
    "between": (
        "In between",
        "Priors between two images: samples of stage 1 of the first and the last class, or photos.",
    ),
    "grid": ("Guidance", "The same noise at several guidance scales, side by side."),
}
CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
footer { display: none !important; }
#head h1 { font-size: 1.75rem; margin: 0; letter-spacing: -.02em; }
#head p { margin: .15rem 0 .4rem; color: var(--body-text-color-subdued); }
#head span { display: inline-block; border: 1px solid var(--border-color-primary); border-radius: 999px;
    padding: 0 .6rem; margin: 0 .3rem .2rem 0; font-size: .85rem; color: var(--body-text-color-subdued); }
#status .track { height: 6px; border-radius: 3px; background: var(--border-color-primary); margin-top: .35rem; }
#status .bar { height: 100%; border-radius: 3px; background: var(--primary-500); transition: width .15s linear; }
#pair .names { display: flex; justify-content: space-between; gap: 1rem; font-weight: 600; }
#dice { align-self: end; height: 2.5rem; margin-bottom: .55rem; }
.crop img { width: 72px !important; height: 72px !important; object-fit: contain !important; margin: 1.6rem auto 0; }
#status .error, #cost .error { color: var(--error-text-color); }
#cost, #status { min-height: 0; }
.sharp img { image-rendering: pixelated; }
#slider img { width: 100%; object-fit: contain; }
#gallery .grid-wrap { min-height: 0; max-height: none; }
#gallery .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)); }
#gallery .caption-label { left: 0; right: 0; bottom: 0; max-width: 100%; border-radius: 0; font-size: .7rem;
    padding: .1rem .2rem; text-align: center; }
@media (max-width: 640px) {
    .tab-container { overflow-x: auto; }
    .tab-container button { padding: 0 .45rem !important; font-size: .85rem; }
    #gallery .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
}
"""
# The address of the page becomes the link to its settings, so that a bookmark has them.
SHOW_LINK = """(query) => {
    const address = window.location.origin + window.location.pathname + query;
    window.history.replaceState(null, "", address);
    return address;
}"""
RANDOM_SEED = "() => Math.floor(Math.random() * 2 ** 32)"
# On a phone the images are far below the button.
SHOW_IMAGES = """() => {
    if (window.innerWidth < 640) document.querySelector("#pair").scrollIntoView({behavior: "smooth"});
}"""


def serve(options: DemoOptions) -> None:
    """Loads the pipeline that `options` name, draws the example, and serves the page until it is interrupted."""
    pipe, identity = open_pipeline(options)
    name = identity["path"].removeprefix("checkpoints/")
    print(f"Draws an example with {name} on {options.device} first ...", flush=True)
    sampler = Sampler(pipe, options.limits, identity)
    with tempfile.TemporaryDirectory(prefix="dod-demo-") as folder:
        launch(Page(sampler, name, Path(folder)).build(), options)


def launch(blocks: gr.Blocks, options: DemoOptions, prevent_thread_lock: bool = False) -> str:
    """Serves the page `blocks` and returns its address; waits for its end unless `prevent_thread_lock`."""
    limits = options.limits
    theme = gr.themes.Soft(
        primary_hue="indigo",
        neutral_hue="slate",
        spacing_size="sm",
        font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        block_title_background_fill="transparent",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        block_label_background_fill="transparent",
        block_label_text_color="*body_text_color",
    )
    return blocks.queue(max_size=limits.max_waiting, default_concurrency_limit=1).launch(
        server_name=options.host,
        server_port=options.port or None,
        share=options.share,
        prevent_thread_lock=prevent_thread_lock,
        max_file_size=limits.max_upload_mb * 2**20,
        footer_links=[],
        theme=theme,
        css=CSS,
        ssr_mode=False,
    )[1]


class Page:
    """
    The page and what its buttons do.

    Args:
        sampler ([`Sampler`]): Draws the images.
        name (`str`): Name of the checkpoint.
        folder (`Path`): Where files are written that visitors get.
    """

    def __init__(self, sampler: Sampler, name: str, folder: Path):
        self.sampler, self.pipe, self.limits = sampler, sampler.pipe, sampler.limits
        self.name, self.folder = name, folder
        self.size = trained_size(self.pipe)
        self.has_priors = self.pipe.latent_embedder is not None
        self.max_stages = self.limits.max_stages if self.has_priors else 1
        self.defaults = default_settings(self.pipe, self.limits)

    # ------------------------------------------------------------------------------------------------------ layout

    def build(self) -> gr.Blocks:
        """Lays out the page, with an example that is drawn here."""
        example = self._write(self.sampler.sample(self.defaults), "example")
        with gr.Blocks(title="Diffusion on Diffusion", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
            gr.HTML(self._head(), elem_id="head")
            with gr.Row():
                with gr.Column(scale=5, min_width=300):
                    self._build_controls()
                with gr.Column(scale=6, min_width=300):
                    self._build_results(example)
            self._connect(blocks)
        return blocks

    def _head(self) -> str:
        num_classes = self.pipe.transformer.config.num_classes
        facts = [self.name, f"{num_classes:,} classes", f"{self.size} × {self.size} pixels", str(self.pipe.device)]
        spans = "".join(f"<span>{html.escape(fact)}</span>" for fact in facts)
        return (
            "<h1>Diffusion on Diffusion</h1><p>Images are sampled in stages: each stage draws again from fresh noise, "
            f"guided by what the stage before has drawn.</p>{spans}"
        )

    def _build_controls(self) -> None:
        defaults, limits = self.defaults, self.limits
        choices = [
            (self.pipe.id2label.get(i, f"class {i}"), i) for i in range(self.pipe.transformer.config.num_classes)
        ]
        self.mode = gr.State("classes")
        self.crops: dict[gr.File, gr.Image] = {}  # of the photos
        self.classes = gr.Dropdown(
            choices, value=list(defaults.classes), multiselect=True, max_choices=limits.max_images, elem_id="classes",
            label="Classes (type to search)",
        )  # fmt: skip
        with gr.Tabs(selected="classes") as self.tabs:
            self.tab_of = {mode: self._build_tab(mode) for mode in MODES}
        with gr.Row():
            self.num_images = self._slider(1, limits.max_images, defaults.num_images, "Images", "num_images")
            self.steps = self._slider(1, limits.max_inference_steps, defaults.steps, "Steps", "steps")
        with gr.Row(elem_id="seed_row"):
            self.num_stages = self._slider(1, self.max_stages, defaults.num_stages, "Stages", "num_stages")
            self.seed = gr.Number(
                defaults.seed, precision=0, minimum=0, maximum=2**32 - 1, label="Seed", elem_id="seed", min_width=90
            )
            self.dice = gr.Button("Random", size="sm", elem_id="dice", min_width=70, scale=0)
        with gr.Row():
            self.scales = [
                self._slider(
                    0,
                    MAX_SCALE,
                    self._scale(number),
                    f"Guidance {number + 1}" if self.has_priors else "Guidance",
                    f"scale_{number + 1}",
                    visible=number < defaults.num_stages,
                    step=0.1,
                )
                for number in range(self.max_stages)
            ]
        with gr.Accordion("More settings", open=False):
            with gr.Row():
                self.solver = gr.Dropdown(FIXED_SOLVERS, value=defaults.solver, label="Solver", min_width=140)
                largest = int(self.size * limits.max_size_factor) // self.multiple * self.multiple
                self.side = self._slider(self.multiple, largest, self.size, "Pixels", "side", step=self.multiple)
        self.cost = gr.HTML(self.sampler.cost(defaults).to_html(), elem_id="cost")
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=3, min_width=140)
            self.cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", interactive=False, min_width=100)
        self.status = gr.HTML(_status("The images are an example."), elem_id="status")
        self.link = gr.Textbox(label="Link to these settings", interactive=False, buttons=["copy"], elem_id="link")
        self.query = gr.Textbox(to_query(defaults), visible=False)

    def _slider(self, least, most, value, label: str, name: str, step: float = 1, visible: bool = True) -> gr.Slider:
        """A slider; Gradio refuses one of a single value, which is hidden."""
        return gr.Slider(
            least,
            max(most, least + step),
            value,
            step=step,
            label=label,
            elem_id=name,
            visible=visible and most > least,
            min_width=120,
            buttons=[],
        )

    def _build_tab(self, mode: str) -> gr.Tab:
        title, text = TABS[mode]
        with gr.Tab(title, id=mode, visible=self.has_priors or mode in ("classes", "grid")) as tab:
            gr.Markdown(text)
            if mode == "variations":
                self._build_photo("Photo", "photo")
            if mode == "between":
                most, value = self.limits.max_images, self.defaults.num_between
                self.num_between = self._slider(2, most, value, "Images from one to the other", "num_between")
                with gr.Accordion("Photos in place of the classes", open=False):
                    self._build_photo("First photo", "first")
                    self._build_photo("Last photo", "last")
            if mode == "grid":
                self.grid_scales = gr.Textbox(
                    ", ".join(f"{scale:g}" for scale in self.defaults.grid_scales), elem_id="grid_scales",
                    label="Guidance scales, one column each",
                )  # fmt: skip
                self.first_scales = gr.Textbox(
                    "", label="Scales of stage 1, one row each", placeholder="as set below", elem_id="first_scales",
                    visible=self.has_priors,
                )  # fmt: skip
        return tab

    def _build_photo(self, label: str, name: str) -> None:
        with gr.Row(equal_height=True):
            photo = gr.File(label=label, file_types=["image"], height=130, min_width=150, elem_id=name)
            crop = gr.Image(
                label="As the model sees it", interactive=False, height=130, min_width=120, buttons=[], format="png",
                elem_id=f"{name}_crop", elem_classes=["crop", *self._sharp],
            )  # fmt: skip
        self.crops[photo] = crop

    def _build_results(self, example: dict[str, Any]) -> None:
        self.pair = gr.HTML(example["pair"], elem_id="pair")
        self.slider = gr.ImageSlider(
            example["slider"], show_label=False, format="png", elem_id="slider", elem_classes=self._sharp,
            buttons=["fullscreen"], interactive=False, max_height=420,
        )  # fmt: skip
        self.gallery = gr.Gallery(
            example["gallery"], columns=example["columns"], label="All images", show_label=False, allow_preview=False,
            object_fit="contain", interactive=False, buttons=[], elem_id="gallery", elem_classes=self._sharp,
        )  # fmt: skip
        self.columns = gr.State(example["per_row"])
        with gr.Row():
            self.download = gr.DownloadButton(
                "Download image", example["slider"][1], elem_id="download", min_width=140
            )
            self.download_all = gr.DownloadButton(
                "Download all as one", example["sheet"], elem_id="download_all", min_width=140
            )
        gr.Markdown(
            "Choose an image below the slider to compare it. PNG files hold the settings they were drawn with."
        )

    @property
    def multiple(self) -> int:
        """Pixels that sides of images are multiples of."""
        return self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size

    @property
    def _sharp(self) -> list[str]:
        return ["sharp"] if self.size < SHARP_BELOW else []

    def _scale(self, number: int) -> float:
        """Default guidance scale of a stage, from 0."""
        scales = self.defaults.scales
        return scales[min(number, len(scales) - 1)]

    # ------------------------------------------------------------------------------------------------------ events

    def _connect(self, blocks: gr.Blocks) -> None:
        hidden = {"queue": False, "show_progress": "hidden"}
        inputs = [self.mode, self.classes, self.num_images, self.num_stages, self.steps, self.solver, self.side]
        inputs += [self.seed, self.num_between, self.grid_scales, self.first_scales, *self.scales]
        asked, told = [*inputs, *self.crops], [self.cost, self.query]
        for photo, crop in self.crops.items():
            photo.change(self._show_crop, [photo, self.side], [photo, crop, self.status], **hidden)
        self.num_stages.change(self._show_scales, self.num_stages, self.scales, **hidden)
        self.dice.click(None, None, self.seed, js=RANDOM_SEED)
        changes = [component.change for component in asked[1:]]
        gr.on(changes, self._show_cost, asked, told, trigger_mode="always_last", **hidden)
        for mode, tab in self.tab_of.items():
            tab.select(lambda mode=mode: mode, None, self.mode, **hidden).then(self._show_cost, asked, told, **hidden)

        buttons = [self.status, self.generate, self.cancel]
        results = [self.pair, self.slider, self.gallery, self.columns, self.download, self.download_all]
        start = self.generate.click(self._start, None, buttons, **hidden)
        run = start.then(
            self._draw, asked, [*buttons, *results], show_progress="minimal", show_progress_on=self.status
        )
        run.success(None, None, None, js=SHOW_IMAGES)
        run.failure(self._fail, None, buttons, **hidden)
        self.cancel.click(self._stop, None, buttons, cancels=[run], **hidden)
        compared = [self.pair, self.slider, self.download]
        self.gallery.select(self._compare, [self.gallery, self.columns], compared, **hidden)

        self.query.change(None, self.query, self.link, js=SHOW_LINK)
        restored = blocks.load(self._restore, None, [self.tabs, *inputs, self.query, self.status], **hidden)
        restored.then(None, self.query, self.link, js=SHOW_LINK)
        blocks.unload(self._leave)

    def read(self, mode, classes, num_images, num_stages, steps, solver, side, seed, num_between, *others) -> Settings:
        """Reads the settings off the page, as any client may send them."""
        grid_scales, first_scales, *scales = others
        try:
            settings = Settings(
                mode=mode,
                classes=tuple(classes or ()),
                num_images=num_images,
                num_between=num_between,
                num_stages=num_stages if self.has_priors else 1,
                steps=steps,
                solver=solver,
                scales=tuple(map(float, scales[: num_stages if self.has_priors else 1])),
                grid_scales=parse_numbers("grid_scales", grid_scales),
                first_scales=parse_numbers("first_scales", first_scales) or None,
                size=None if side == self.size else side,
                seed=seed,
            )
            self.sampler.check(settings)
        except FOR_VISITORS as error:
            raise gr.Error(str(error), print_exception=False) from error
        return settings

    def _split(self, values: tuple) -> tuple[Settings, dict[int, Path]]:
        """Settings, and the photos that they use."""
        photos = values[-len(self.crops) :]
        settings = self.read(*values[: -len(self.crops)])
        used = {"variations": photos[:1], "between": photos[1:]}.get(settings.mode, ())
        return settings, {end: Path(photo) for end, photo in enumerate(used) if photo}

    def _open(self, path: str | Path, side: int | None) -> Any:
        side = int(side or self.size)
        try:
            return open_photo(Path(path), self.limits, side, side)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def _show_crop(self, path: str | None, side: int) -> tuple:
        if path is None:
            return gr.skip(), None, gr.skip()
        try:
            return gr.skip(), self._open(path, side), _status("The photo is read.")
        except gr.Error as error:  # the file is taken away again
            return None, None, _error(error.message)

    def _show_scales(self, num_stages: int) -> list:
        return [gr.update(visible=number < num_stages) for number in range(self.max_stages)]

    def _show_cost(self, *values) -> tuple[str, Any]:
        try:
            settings, photos = self._split(values)
            return self.sampler.cost(settings, photos).to_html(), to_query(settings)
        except gr.Error as error:
            return _error(error.message), gr.skip()
        except FOR_VISITORS as error:
            return _error(str(error)), gr.skip()

    def _draw(self, request: gr.Request, *values) -> Iterator[tuple]:
        settings, paths = self._split(values)
        photos = {end: self._open(path, settings.size) for end, path in paths.items()}
        same = [gr.skip()] * 6
        yield _status("Starting ...", 0), *_buttons(is_busy=True), *same
        try:
            for event in stream(lambda report: self.sampler.sample(settings, photos, report)):
                if isinstance(event, Result):
                    shown = self._write(event, request.session_hash)
                    updates = (
                        shown["pair"], shown["slider"], gr.update(value=shown["gallery"], columns=shown["columns"]),
                        shown["per_row"], shown["slider"][1], shown["sheet"],
                    )  # fmt: skip
                    yield _status(f"Done: {event.title}."), *_buttons(is_busy=False), *updates
                else:
                    done, total, stage = event
                    text = f"Stage {stage} of {settings.num_stages}, step {done} of {total}"
                    yield _status(text, done / total), *[gr.skip()] * 2, *same
        except FOR_VISITORS as error:
            raise gr.Error(str(error), print_exception=False) from error

    def _start(self) -> tuple:
        return _status("Waiting for a turn ..."), *_buttons(is_busy=True)

    def _stop(self) -> tuple:
        return _status("Cancelled."), *_buttons(is_busy=False)

    def _fail(self) -> tuple:
        return _status("Nothing was drawn."), *_buttons(is_busy=False)

    def _compare(self, gallery: list[tuple[str, str]], per_row: int, event: gr.SelectData) -> tuple:
        front = event.index // per_row * per_row
        other = event.index if event.index > front else front + per_row - 1
        (left, left_name), (right, right_name) = gallery[front], gallery[min(other, len(gallery) - 1)]
        chosen = left if event.index == front else right
        return _pair(left_name, right_name), (left, right), chosen

    def _restore(self, request: gr.Request) -> list:
        """Values of the controls, by the query of the page's address."""
        settings, status = self.defaults, gr.skip()
        if query := dict(request.query_params):
            try:
                settings = default_settings(self.pipe, self.limits, **from_query(query))
                self.sampler.check(settings)
            except FOR_VISITORS as error:
                settings, status = self.defaults, _error(f"The link is not followed: {error}")
        scales = [*settings.scales, *map(self._scale, range(len(settings.scales), self.max_stages))]
        return [
            gr.update(selected=settings.mode),
            settings.mode,
            list(settings.classes),
            settings.num_images,
            settings.num_stages,
            settings.steps,
            settings.solver,
            settings.size or self.size,
            settings.seed,
            settings.num_between,
            ", ".join(f"{scale:g}" for scale in settings.grid_scales),
            ", ".join(f"{scale:g}" for scale in settings.first_scales or ()),
            *[gr.update(value=s, visible=place < settings.num_stages) for place, s in enumerate(scales)],
            to_query(settings),
            status,
        ]

    def _leave(self, request: gr.Request) -> None:
        shutil.rmtree(self.folder / request.session_hash, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------------- files

    def _write(self, result: Result, owner: str) -> dict[str, Any]:
        """Writes images as files of a visitor, and returns what the page shows of them."""
        folder = self.folder / owner
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        gallery, per_row = [], len(result.rows[0])
        for name, row in zip(result.row_names, result.rows, strict=True):
            for column, drawn in zip(result.column_names, row, strict=True):
                stem = re.sub("[^A-Za-z0-9]+", "_", f"{name}_{column}")[:60].strip("_")
                path = folder / f"{len(gallery) + 1:02}_{stem}.png"
                self.sampler.save(drawn, path)
                gallery.append((str(path), column if len(result.rows) == 1 else f"{column}, {name}"))
        images = [[drawn.image for drawn in row] for row in result.rows]
        sheet = folder / "all.png"
        scale = max(1, TILE // images[0][0].width)
        names = {"column_names": result.column_names, "row_names": result.row_names}
        make_grid(images, scale, gap=4, title=f"{self.name}: {result.title}", **names).save(sheet)
        (left, left_name), (right, right_name) = gallery[0], gallery[per_row - 1]
        return {
            "pair": _pair(left_name, right_name),
            "slider": (left, right),
            "gallery": gallery,
            "columns": per_row * max(1, 4 // per_row) if per_row < 7 else 6,
            "per_row": per_row,
            "sheet": str(sheet),
        }


def _pair(left: str, right: str) -> str:
    return f"<div class='names'><span>{html.escape(left)}</span><span>{html.escape(right)}</span></div>"


def _status(text: str, share: float | None = None) -> str:
    bar = "" if share is None else f"<div class='track'><div class='bar' style='width: {share:.1%}'></div></div>"
    return f"<div>{html.escape(text)}{bar}</div>"


def _error(text: str) -> str:
    return f"<div class='error'>{html.escape(text)}</div>"


def _buttons(is_busy: bool) -> tuple:
    """Updates of the buttons Generate and Cancel."""
    return gr.update(interactive=not is_busy), gr.update(interactive=is_busy)
