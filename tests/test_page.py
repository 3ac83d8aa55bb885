"""The page of `trace-fast app`: what it computes, and the page itself in a browser."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import dinov2, embedded, student
from torch.testing import assert_close

from trace_fast import Tracer
from trace_fast.masks import read_results
from trace_fast.page import analysis
from trace_fast.page.analysis import Models
from trace_fast.scan import draw_abdiv, scan_photo

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def tracer():
    return Tracer.from_pretrained("mini", device="cpu", size=(48, 64))


@pytest.fixture(scope="module")
def photo():
    image = torch.zeros(1, 3, 40, 60)
    image[..., 10:30, 20:45] = torch.rand(3, 20, 25, generator=torch.Generator().manual_seed(0))
    return image


@pytest.fixture(scope="module")
def scan(tracer, photo):
    return scan_photo(tracer, photo)


def test_scan_is_that_of_the_search(tracer, photo, scan):
    output = tracer(photo, return_kl=True, return_abdiv=True)
    for name in ("edges", "timestep", "timesteps", "kl", "abdiv"):
        assert_close(getattr(scan.output, name), getattr(output, name))
    assert (scan.output.model, scan.output.noising, scan.output.size) == ("mini", "inversion", (48, 64))
    assert_close(scan.abdiv[scan.read], output.abdiv[0])
    assert scan.abdiv.shape == (11, 12, 16)


def test_scan_of_a_search_for_the_peak(photo, tmp_path):
    tracer = Tracer.from_pretrained(embedded(tmp_path), device="cpu")
    tracer.backbone.settings = replace(tracer.backbone.settings, timestep="iep")
    scan = scan_photo(tracer, photo)
    assert scan.read == scan.peak
    assert int(tracer(photo).timestep) == scan.timesteps[scan.peak]


def test_a_timestep_is_described(scan):
    assert scan.describe(0) == "t = 0"
    texts = [scan.describe(index) for index in range(1, 11)]
    assert [index for index, text in enumerate(texts, 1) if text.endswith(", t*")] == [scan.peak]
    assert texts[4].startswith(f"t = 499, KL {scan.output.kl[0, 4]:.3f}")


def test_an_encoder_has_one_timestep_and_no_peak(photo):
    scan = scan_photo(Tracer.from_encoder(dinov2()), photo)
    assert (scan.timesteps, scan.peak, scan.read, scan.describe(0)) == ([0], None, 0, "t = 0")
    assert scan.output.noising == "none" and scan.abdiv.shape == (1, 5, 5)


def test_abdiv_is_drawn_as_edge_probability(scan):
    assert draw_abdiv(scan, 3).size == (16, 12)
    picture = np.asarray(draw_abdiv(scan, 0, (40, 60)))
    assert picture.shape == (40, 60)
    assert_close(torch.from_numpy(picture / 255.0).float(), scan.output.edges[0, 0], atol=0.003, rtol=0)


def test_the_region_of_a_pixel_is_the_smallest_mask():
    masks = torch.zeros(3, 4, 7, dtype=torch.bool)
    masks[0, :, :6], masks[1, 1:3, 2:4], masks[2, 1:, 1:5] = True, True, True
    assert analysis.find_region(masks, 1, 2).equal(masks[1])
    assert analysis.find_region(masks, 3, 2).equal(masks[2])
    assert analysis.find_region(masks, 0, 2).equal(masks[0])
    assert analysis.find_region(masks, 0, 6) is None


def test_attention_of_a_token(tracer, photo):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'trace_fast[app]'")
    masks = torch.zeros(1, 40, 60, dtype=torch.bool)
    masks[0, 10:30, 20:45] = True
    picture, text = analysis.draw_attention(tracer, photo, masks, 199, 20, 30)
    row = tracer.attention(photo, timestep=199)[0, (20 * 12 // 40) * 16 + 30 * 16 // 60].view(12, 16)
    share = row[3:9, 5:12].sum()  # tokens whose centers lie in the mask
    assert text == (
        "Token (6, 8) of 12 x 16 at t = 199. It lies in a region of 20.8% of the photograph, which gets "
        f"{share:.0%} of its attention."
    )
    pixels = np.asarray(picture)
    assert pixels.shape == (40, 60, 3)
    assert tuple(pixels[9, 30]) == analysis.POINT_COLOR  # just above the mask
    # a token that attends otherwise looks otherwise, and lies in no region
    other, text = analysis.draw_attention(tracer, photo, masks, 199, 2, 3)
    assert text == "Token (0, 0) of 12 x 16 at t = 199. It lies in no region."
    assert (np.asarray(other) != pixels).any()


def test_files_hold_edges_and_masks(tmp_path):
    pytest.importorskip("pycocotools", reason="needs pycocotools: pip install 'trace_fast[app]'")
    edges = torch.linspace(0, 1, 35).view(5, 7)
    masks = torch.zeros(2, 5, 7, dtype=torch.bool)
    masks[0, :, :3], masks[1, 2:, 4:] = True, True
    files = analysis.write_files(tmp_path, "photo", edges, masks, torch.tensor([0.5, 0.25]))
    assert [file.name for file in files] == ["photo_edges.png", "photo_coco.json", "photo_labels.png"]
    with Image.open(files[0]) as picture:
        assert_close(torch.from_numpy(np.asarray(picture) / 65535.0).float(), edges, atol=1e-5, rtol=0)
    records = json.loads(files[1].read_text())
    assert [record["score"] for record in records] == [0.5, 0.25]
    assert (read_results(files[1]).images[1].masks() == masks.numpy()).all()
    with Image.open(files[2]) as picture:
        assert (np.asarray(picture) == masks[0].numpy() + 2 * masks[1].numpy()).all()


def test_more_masks_than_labels_have_no_label_map(tmp_path):
    pytest.importorskip("pycocotools", reason="needs pycocotools: pip install 'trace_fast[app]'")
    masks = torch.eye(255).bool().view(255, 15, 17)
    files = analysis.write_files(tmp_path, "photo", torch.zeros(15, 17), masks, torch.ones(255))
    assert [file.name for file in files] == ["photo_edges.png", "photo_coco.json"]


def test_models_have_a_student_where_there_is_one(tmp_path):
    models = Models.load("mini", device="cpu")
    assert models.tracer.name == models.detector.name == "mini"
    embedded(tmp_path / "base")
    assert Models.load(tmp_path / "base", device="cpu").detector is None
    student(tmp_path / "student", tmp_path / "base", (32, 48), "pixels", channels=4)
    models = Models.load(tmp_path / "student", device="cpu")
    assert models.tracer.backbone is models.detector.backbone


# in another process, since gradio leaves event loops open
EVENTS = """
from types import SimpleNamespace

import gradio
import torch
from PIL import Image
from safetensors import SafetensorError

from trace_fast.scan import scan_photo
from trace_fast.page.analysis import Models
from trace_fast.page.layout import MEASURING, NO_PHOTO, SEARCH, Page, Session, sentences
from trace_fast.tracer import Tracer


def refuse(call, index, text):
    try:
        call(session, SimpleNamespace(index=index))
    except gradio.Error as error:
        assert text in str(error), error
    else:
        raise AssertionError(index)


tracer = Tracer.from_pretrained("mini", device="cpu", size=(16, 16))
page, photo = Page(Models(tracer, None)), torch.rand(1, 3, 40, 60)
scan, masks = scan_photo(tracer, photo), torch.zeros(0, 40, 60, dtype=torch.bool)
session = Session("photo", photo, torch.zeros(40, 60), masks, torch.zeros(0), scan, scan.read)
for index in (11, -1, 10**9, None, "x", [1, 2], float("nan")):
    refuse(page.choose_timestep, index, "app: timestep must be one of those that are shown, got")
assert session.index == scan.read
for index in ([float("nan"), 1], [float("inf"), 1], [1], 5, ["a", "b"]):
    refuse(page.choose_point, index, "")
for index, point in (([1e9, -5], (0, 59)), ([-7, 1e9], (39, 0)), ([59.9, 39.9], (39, 59))):
    page.choose_point(session, SimpleNamespace(index=index))
    assert session.point == point

# a run that is canceled ends before the next pass of the network, and the next one is as any other
visitor, pixels = SimpleNamespace(session_hash="v"), (photo[0] * 255).byte().permute(1, 2, 0).numpy()
Image.fromarray(pixels).save("photo.png")
assert page.stop(visitor) == "There is nothing to cancel."
for cancel in (True, False):
    page.begin(visitor)
    run = page.run("photo.png", SEARCH, 0.3, 3, visitor)
    assert next(run)[page.status] == MEASURING
    if cancel:
        assert page.stop(visitor) == "Canceling ..."
    updates = next(run)
    assert (updates == {page.status: "Canceled."}) == cancel and (page.strip in updates) != cancel
    assert list(run) == [] and page.stop(visitor) == "There is nothing to cancel."
page.begin(visitor)
page.stop(visitor)
tracer.edges(photo)  # of nobody's

# clicks before the search has ended
session.scan = None
assert page.choose_point(session, SimpleNamespace(index=[3, 5])) == {page.status: MEASURING}
assert page.choose_timestep(None, SimpleNamespace(index=0)) == {page.status: NO_PHOTO}
session.scan = scan
assert page.attention in page.show_timestep(session) and session.point == (5, 3)

for error, text in ((SafetensorError("damaged"), "damaged"), (KeyError("x"), "KeyError: 'x'"), (MemoryError(), "Mem")):
    try:
        with sentences():
            raise error
    except gradio.Error as shown:
        assert text in str(shown)
print("done")
"""


@pytest.mark.slow
def test_events_of_any_content_are_answered_with_a_sentence(tmp_path):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'trace_fast[app]'")
    command = [sys.executable, "-c", EVENTS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert result.stdout == "done\n", result.stderr


@pytest.fixture(scope="module")
def address():
    pytest.importorskip("gradio", reason="needs gradio: pip install 'trace_fast[app]'")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "trace_fast", "app", "--device", "cpu", "--port", str(port)])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None
            try:
                urllib.request.urlopen(address).close()
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


def visit(browser, address):
    """Open the page as another visitor; return it, and the set of hosts that it asks."""
    page = browser.new_context(viewport={"width": 1300, "height": 900}).new_page()
    page.set_default_timeout(300_000)  # a machine may be busy
    hosts = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "://" in request.url else None)
    page.goto(address)
    page.wait_for_selector("#file input[type=file]", state="attached")
    return page, hosts


def ask(address, path, content=None, **headers):
    """Return the status of a request."""
    data = None if content is None else json.dumps(content).encode()
    headers = {"Content-Type": "application/json", **headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, data, headers), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.slow
def test_requests_for_other_files_and_of_other_hosts(address, tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "private.png")
    for path in (tmp_path / "private.png", "/etc/passwd", "README.md", "../../etc/passwd", "http://127.0.0.1:1/x.png"):
        assert ask(address, f"/gradio_api/file={path}")[0] == 403
        file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        # the second function of the page is the one that reads the file
        content = {"data": [file, "student, in one step", 0.5, 3], "fn_index": 1, "session_hash": "a"}
        assert ask(address, "/gradio_api/queue/join", content)[0] == 200
        events = ask(address, "/gradio_api/queue/data?session_hash=a")[1].decode()
        assert '"success":false' in events and "process_generating" not in events
    assert ask(address, "/config")[0] == 200
    assert ask(address, "/config", Host="other.example")[0] == 400


@pytest.mark.slow
def test_cancel(browser, address, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    page, _ = visit(browser, address)
    page.click("#cancel")
    page.wait_for_selector("#status:has-text('There is nothing to cancel.')")
    page.set_input_files("#file input[type=file]", tmp_path / "a.png")
    page.wait_for_selector("#status:has-text('...')")  # finding edges, or already measuring
    page.click("#cancel")
    page.wait_for_selector("#status:has-text('Canceled.')")
    assert page.locator("#strip .thumbnail-item").count() == 0
    page.click("#start")
    page.wait_for_selector("#status:has-text('t* = ')")
    assert page.locator("#strip .thumbnail-item").count() == 11


@pytest.mark.slow
def test_the_page_in_a_browser(browser, address, tmp_path):
    from skimage import data

    Image.fromarray(data.coffee()).save(tmp_path / "coffee.jpg")
    Image.fromarray(data.chelsea()).save(tmp_path / "cat.png")
    page, hosts = visit(browser, address)
    other, _ = visit(browser, address)
    page.set_input_files("#file input[type=file]", tmp_path / "coffee.jpg")
    other.set_input_files("#file input[type=file]", tmp_path / "cat.png")
    for visitor, size in ((page, "600 x 400 pixels"), (other, "451 x 300 pixels")):
        visitor.wait_for_selector("#status:has-text('t* = ')")
        assert visitor.inner_text("#status").startswith(size)

    # the slider between photograph and edges
    left = page.locator("#slider .fixed, #slider img").last.evaluate("element => getComputedStyle(element).clipPath")
    slider = page.locator("#slider img").first.bounding_box()
    middle = slider["x"] + slider["width"] / 2, slider["y"] + slider["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] - 150, middle[1], steps=5)
    page.mouse.up()
    moved = page.locator("#slider .fixed, #slider img").last.evaluate("element => getComputedStyle(element).clipPath")
    assert left != moved

    # a timestep, and a point
    assert page.locator("#strip .thumbnail-item").count() == 11
    page.locator("#strip .thumbnail-item").nth(3).click()
    page.wait_for_selector("#abdiv:has-text('ABDiv at t = 299')")
    picture = page.locator("#photo img")
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] * 0.51, "y": box["height"] * 0.26})
    page.wait_for_selector("#token:has-text('Token (8, 16) of 32 x 32 at t = 299.')")

    # fewer masks, and the files
    page.locator("#count input[type=number]").fill("3")
    page.locator("#count input[type=number]").blur()
    page.wait_for_selector("#status:has-text('600 x 400 pixels, 3 masks.')")
    links = page.locator("#files a[download]")
    with page.expect_download() as download:
        links.first.click()
    with Image.open(download.value.path()) as edges:
        assert (edges.size, edges.mode) == ((600, 400), "I;16")
    files = {}
    for link in links.all():
        with page.expect_download() as download:
            link.click()
        files[download.value.suggested_filename] = download.value.path()
    (image,) = read_results(files["coffee_coco.json"]).images.values()
    assert len(image.instances) == 3 and (image.height, image.width) == (400, 600)
    with Image.open(files["coffee_labels.png"]) as labels:
        assert labels.size == (600, 400) and {0, 1, 2, 3} >= {level for _, level in labels.getcolors()} > {0}

    # a file that is none
    (tmp_path / "notes.jpg").write_text("no picture")
    page.locator("#file button[aria-label='Clear']").click()
    page.set_input_files("#file input[type=file]", tmp_path / "notes.jpg")
    page.wait_for_selector("text=edges: image must be")
    assert hosts == {address.removeprefix("http://")}
