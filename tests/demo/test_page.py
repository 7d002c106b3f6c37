"""
The demo in a real Chromium (`make test-demo`). No test leaves an error in the browser's console or asks another host.

DEMO_IMAGES=docs/images writes the images of docs/demo.md.
"""

import os
import re
import shutil
import signal
import sys
import threading
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest


gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

from helpers import noise_image, tiny_pipeline, tiny_transformer  # noqa: E402
from launch import PATIENCE_S, started, wait_until  # noqa: E402
from PIL import Image  # noqa: E402

from diffusers_dod import DoDPipeline, desk_checkpoint  # noqa: E402
from diffusers_dod.command_line import INTERRUPTED_EXIT_CODE  # noqa: E402
from diffusers_dod.demo import _page  # noqa: E402
from diffusers_dod.demo.settings import DemoOptions  # noqa: E402
from diffusers_dod.evaluation.gallery import Limits, Sampler  # noqa: E402
from diffusers_dod.image_settings import read_image_settings  # noqa: E402
from diffusers_dod.results import checkpoint_sha256  # noqa: E402


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MAX_IMAGE_BYTES = 300_000
expect = playwright.expect
expect.set_options(timeout=PATIENCE_S * 1000)


@contextmanager
def serving(pipe, folder, name="tiny", sha256="0" * 64):
    """The demo of a pipeline: its address, the pipeline and the folder of its files."""
    options = DemoOptions(port=0, limits=Limits(max_upload_mb=1, max_megapixels=4))
    blocks = _page.Page(Sampler(pipe, options.limits, {"path": name, "sha256": sha256}), name, folder).build()
    try:
        yield SimpleNamespace(address=_page.launch(blocks, options, True), pipe=pipe, folder=folder)
    finally:
        blocks.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The demo of the checkpoint in the repository."""
    pipe = DoDPipeline.from_pretrained(desk_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    sha256 = checkpoint_sha256(desk_checkpoint())
    with serving(pipe, tmp_path_factory.mktemp("files"), "dod-desk", sha256) as served:
        yield served


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(server, browser):
    """Opens the page for a visitor of their own, by the query of a link."""
    contexts, faults = [], []

    def open_page(query="", address=server.address, expected_faults=(), **context):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 1000}, **context}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE_S * 1000)

        def keep(text):
            if not any(fault in text for fault in expected_faults):
                faults.append(text)

        page.on("console", lambda message: keep(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: keep(str(error)))
        known = address, "data:", "blob:"
        page.on("request", lambda request: None if request.url.startswith(known) else keep(request.url))
        page.goto(address + query)
        expect(page.locator("#link textarea")).not_to_have_value("")  # all settings are restored then
        expect(page.locator("#slider img").first).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def generate(page):
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("Done")
    expect(page.locator("#generate")).to_be_enabled()


def sources(page):
    """Addresses of the images in the gallery; the same address is the same image."""
    return page.locator("#gallery img").evaluate_all("images => images.map(image => image.src)")


def choose_tab(page, name):
    page.get_by_role("tab", name=name).click()


def set_slider(page, name, value):
    box = page.locator(f"#{name} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def take_screenshot(page, name, **options):
    """Writes an image of the documentation, if it is asked for."""
    page.mouse.move(0, 0)
    page.wait_for_function("document.getAnimations().every(animation => animation.playState !== 'running')")
    folder = Path(os.environ.get("DEMO_IMAGES", "build"))
    folder.mkdir(exist_ok=True)
    page.screenshot(path=folder / f"demo_{name}.png", animations="disabled", **options)
    assert (folder / f"demo_{name}.png").stat().st_size < MAX_IMAGE_BYTES


def download(page, button, path):
    with page.expect_download() as started:
        page.locator(button).click()
    started.value.save_as(path)
    return path, started.value.suggested_filename


# ---------------------------------------------------------------------------------------------------- first the page


def test_the_page_opens_with_an_example_and_its_cost(visit):
    page = visit()
    expect(page.locator("#gallery img")).to_have_count(8)
    expect(page.locator("#cost")).to_have_text("4 images for 240 evaluations of the model, 10.4 GFLOP.")
    set_slider(page, "num_stages", 3)
    expect(page.locator("#scale_3")).to_be_visible()
    expect(page.locator("#cost")).to_have_text("4 images for 400 evaluations of the model, 17.7 GFLOP.")
    expect(page.locator("#link textarea")).to_have_value(page.url)
    assert "num_stages=3" in page.url and "scales=1,3,3" in page.url


def test_classes_are_found_by_name_drawn_compared_and_downloaded(visit, tmp_path):
    page = visit("?classes=7,5&num_images=2")
    search = page.locator("#classes input")
    search.click()
    search.fill("che")
    page.get_by_role("option", name="checks").click()
    search.press("Escape")
    expect(page.locator("#cost")).to_contain_text("6 images")
    generate(page)
    expect(page.locator("#gallery img")).to_have_count(12)
    expect(page.locator("#pair")).to_contain_text("stage 1, bricks 1")
    page.locator("#gallery button").nth(4).click()  # stage 1 of the third
    expect(page.locator("#pair")).to_contain_text("stage 2, marble 1")
    take_screenshot(page, "classes")
    slider = page.locator("#slider")
    before = slider.screenshot()
    box = slider.locator("img").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    assert slider.screenshot() != before

    path, name = download(page, "#download", tmp_path / "image.png")
    assert name == "05_marble_1_stage_1.png"
    read = read_image_settings(path)
    expected = {"class_name": "marble", "stage": 1, "sample_index": 0, "seed": 0, "classes": [7, 5, 1]}
    assert read["task"] == "demo" and read["options"].items() >= expected.items()
    path, _ = download(page, "#download_all", tmp_path / "all.png")
    with Image.open(path) as sheet:
        assert sheet.width > 2 * 96 and sheet.height > 6 * 96


def test_one_of_a_thousand_classes_is_found(visit, tmp_path):
    names = {number: f"name {number}, other name {number}" for number in range(1000)}
    pipe = tiny_pipeline(transformer=tiny_transformer(num_classes=1000), id2label=names)
    with serving(pipe, tmp_path) as served:
        page = visit("?classes=999&num_images=1", address=served.address)
        search = page.locator("#classes input")
        search.click()
        search.fill("other name 731")
        page.get_by_role("option").click()
        search.press("Escape")
        expect(page.locator("#cost")).to_contain_text("2 images")
        generate(page)
        expect(page.locator("#gallery img")).to_have_count(4)
        assert "classes=999,731" in page.url
        page.close()


def test_a_link_restores_settings_and_images(visit):
    query = "?mode=grid&classes=9&num_images=1&num_stages=2&steps=6&solver=heun&scales=1.5,2&grid_scales=1,4&seed=123"
    page = visit(query)
    expect(page.get_by_role("tab", name="Guidance")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#steps input[type=number]")).to_have_value("6")
    expect(page.locator("#scale_1 input[type=number]")).to_have_value("1.5")
    expect(page.locator("#seed input")).to_have_value("123")
    expect(page.locator("#grid_scales textarea")).to_have_value("1, 4")
    generate(page)
    expect(page.locator("#gallery img")).to_have_count(2)
    again = visit(page.evaluate("location.search"))
    generate(again)
    assert sources(again) == sources(page)
    again.locator("#dice").click()
    expect(again.locator("#seed input")).not_to_have_value("123")
    generate(again)
    assert sources(again) != sources(page)


@pytest.mark.parametrize(
    ("query", "message"),
    [("?num_images=1000000", "at most 32 images"), ("?seed=<b>x</b>", "`seed` must be an integer")],
)
def test_a_link_out_of_range_is_not_followed(visit, query, message):
    page = visit(query)
    expect(page.get_by_text("The link is not followed")).to_contain_text(message)
    expect(page.locator("#num_images input[type=number]")).to_have_value("2")


def test_guidance_and_priors_in_between(visit):
    page = visit("?classes=5,7&num_images=1")
    choose_tab(page, "In between")
    expect(page.locator("#cost")).to_contain_text("6 images for 280 evaluations")
    generate(page)
    expect(page.locator("#gallery img")).to_have_count(6)
    expect(page.locator("#pair")).to_have_text("0%100%")
    take_screenshot(page, "between")
    choose_tab(page, "Guidance")
    page.locator("#first_scales textarea").fill("1, 3")
    page.locator("#grid_scales textarea").fill("1, 2, x")
    expect(page.locator("#cost")).to_contain_text("must be a number, got 'x'")
    page.locator("#grid_scales textarea").fill("1, 2, 4, 8")
    expect(page.locator("#cost")).to_contain_text("16 images")
    generate(page)
    expect(page.locator("#gallery img")).to_have_count(16)
    take_screenshot(page, "grid")


# ------------------------------------------------------------------------------------------------------------ photos


def test_variations_of_a_photo(visit):
    page = visit("?mode=variations&classes=8,3&num_images=3")
    page.locator("#photo input[type=file]").set_input_files(ROOT / "docs" / "images" / "coffee.png")
    expect(page.locator("#photo_crop img")).to_be_visible()
    expect(page.locator("#cost")).to_contain_text("6 images")
    generate(page)
    expect(page.locator("#gallery img")).to_have_count(8)
    expect(page.locator("#pair")).to_contain_text("photo, sphere")
    take_screenshot(page, "photo")


def test_without_a_photo_there_is_a_message(visit):
    page = visit("?mode=variations")
    page.locator("#generate").click()
    expect(page.get_by_text("Variations need a photo")).to_be_visible()
    expect(page.locator("#status")).to_have_text("Nothing was drawn.")
    expect(page.locator("#generate")).to_be_enabled()


@pytest.mark.parametrize("kind", ["broken", "text", "pixels", "long"])
def test_what_is_no_photo_is_refused_with_a_message(visit, tmp_path, kind):
    path = tmp_path / "photo.png"
    if kind == "broken":
        noise_image(64, 64).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "text":
        path.write_text("once upon a time")
    else:
        Image.new("L", (3000, 2000) if kind == "pixels" else (2000, 2)).save(path)
    page = visit("?mode=variations")
    page.locator("#photo input[type=file]").set_input_files(path)
    expect(page.get_by_text("The photo cannot be read")).to_be_visible()
    expect(page.locator("#photo_crop img")).to_have_count(0)
    expect(page.get_by_text("Drop File Here")).to_be_visible()


@pytest.mark.parametrize(
    ("name", "message"), [("photo.txt", "nvalid file type"), ("photo.png", "maximum allowed size")]
)
def test_other_files_and_too_many_bytes_are_refused(visit, tmp_path, name, message):
    path = tmp_path / name
    path.write_bytes(b"x" * (100 if name.endswith("txt") else 2**20 + 1))
    page = visit("?mode=variations", expected_faults=["Failed to load resource", "413", "file size"])
    page.locator("#photo input[type=file]").set_input_files(path)
    expect(page.get_by_text(message).first).to_be_visible()


# ---------------------------------------------------------------------------------------------------- many visitors


class Steps:
    """Counts the passes of the transformer; while it is not open, each one waits for a permit."""

    def __init__(self):
        self.number, self.has_started = 0, threading.Event()
        self.is_open, self.permits = threading.Event(), threading.Semaphore(0)
        self.is_open.set()

    def __call__(self, module, inputs):
        self.number += 1
        self.has_started.set()
        while not self.is_open.is_set() and not self.permits.acquire(timeout=0.05):
            pass

    def close(self):
        self.number = 0
        self.has_started.clear()
        self.is_open.clear()


@pytest.fixture
def steps(server):
    seen = Steps()
    hook = server.pipe.transformer.register_forward_pre_hook(seen)
    yield seen
    seen.is_open.set()
    hook.remove()


def test_cancel_stops_after_the_current_step(server, visit, steps):
    page = visit("?classes=5&num_images=1&num_stages=1&scales=1&steps=100")
    steps.close()  # the first step waits
    page.locator("#generate").click()
    assert steps.has_started.wait(PATIENCE_S)
    page.locator("#cancel").click()
    expect(page.locator("#status")).to_have_text("Cancelled.")
    expect(page.locator("#generate")).to_be_enabled()
    steps.is_open.set()
    server.pipe("wood", num_stages=1, num_inference_steps=1)  # waits until the cancelled call has ended
    assert steps.number < 100
    set_slider(page, "steps", 2)
    generate(page)


def test_sampling_for_a_visitor_who_leaves_is_stopped(server, visit, steps):
    page = visit("?classes=5&num_images=32&num_stages=4&scales=1,1,1,1&steps=1")
    generate(page)
    (files,) = set(server.folder.iterdir()) - {server.folder / "example"}
    set_slider(page, "steps", 100)
    expect(page.locator("#cost")).to_contain_text("12,800 evaluations")
    steps.close()
    page.locator("#generate").click()
    assert steps.has_started.wait(PATIENCE_S)
    page.close()
    wait_until(lambda: not files.exists())
    other = visit("?classes=5&num_images=1&num_stages=1&scales=1&steps=1")
    other.locator("#generate").click()
    wait_until(lambda: steps.permits.release() or "Done" in other.locator("#status").inner_text())
    assert steps.number < 800


def test_two_visitors_at_once_take_turns_and_get_their_own_images(visit, steps):
    first, second = visit("?classes=5&steps=4&seed=1"), visit("?classes=7&steps=4&seed=2")
    steps.close()
    first.locator("#generate").click()
    assert steps.has_started.wait(PATIENCE_S)
    second.locator("#generate").click()
    expect(second.locator("#status")).to_contain_text("Waiting")
    steps.is_open.set()
    for page, name in ((first, "marble"), (second, "bricks")):
        expect(page.locator("#status")).to_contain_text("Done")
        expect(page.locator("#pair")).to_contain_text(name)
    assert set(sources(first)).isdisjoint(sources(second))


# ------------------------------------------------------------------------------------------------------------- forms


def test_a_phone_never_scrolls_sideways(visit):
    page = visit("?classes=7,5&num_images=1", viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)

    def widths():
        return page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")

    for name in ("Photo", "In between", "Guidance", "Classes"):
        choose_tab(page, name)
        assert widths() == [390, 390]
    page.get_by_text("More settings").click()
    assert widths() == [390, 390]
    page.get_by_text("More settings").click()
    generate(page)
    assert widths() == [390, 390]
    page.evaluate("window.scrollTo(0, 0)")
    take_screenshot(page, "phone", full_page=True)


def test_settings_of_a_forged_request_are_checked(tmp_path):
    page = _page.Page(Sampler(tiny_pipeline(), Limits(), {"path": "tiny", "sha256": "0" * 64}), "tiny", tmp_path)
    good = dict(mode="classes", classes=[1], num_images=1, num_stages=2, steps=2, solver="euler", side=16, seed=0)
    rest = [6, "1, 2", "", 1.0, 2.0, 1.0, 1.0]
    page.read(*good.values(), *rest)
    bad = [("classes", None), ("classes", [99]), ("num_images", 1e9), ("num_stages", None), ("num_stages", 9)]
    bad += [("steps", "many"), ("solver", "dopri5"), ("side", 4096), ("seed", -1), ("mode", {}), ("num_stages", "2")]
    for name, value in bad:
        with pytest.raises(gradio.Error):
            page.read(*(good | {name: value}).values(), *rest)


def test_a_pipeline_of_one_stage_has_a_page(tmp_path):
    pipe = tiny_pipeline(latent_embedder=None)
    page = _page.Page(Sampler(pipe, Limits(), {"path": "tiny", "sha256": "0" * 64}), "tiny", tmp_path)
    page.build()
    assert [mode for mode, tab in page.tab_of.items() if tab.visible] == ["classes", "grid"]


def test_the_command_serves_the_page_and_ends_by_an_interrupt(tmp_path):
    command = [
        sys.executable,
        "-m",
        "diffusers_dod.demo",
        "--port",
        "0",
        "--max_images",
        "1",
        "--max_inference_steps",
        "1",
        "--max_stages",
        "1",
        "--max_size_factor",
        "1",
    ]
    with started(command, tmp_path / "output.txt", {"PYTHONUNBUFFERED": "1"}) as process:
        output = tmp_path / "output.txt"
        wait_until(lambda: "Running on local URL" in output.read_text(), process)
        address = re.search(r"http://[\d.:]+", output.read_text())[0]
        with urllib.request.urlopen(address) as response:
            assert "Diffusion on Diffusion" in response.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == INTERRUPTED_EXIT_CODE
