"""tools/attention.py: the weights it shows are those the blocks use; its distances; its pictures and its page."""

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import save_model
from PIL import Image

from ann import AsymmetricNonLocalBlock
from gcnet import GCBlock, SimplifiedNonLocalBlock
from nonlocal_net import NonLocalBlock
from tools import attention

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return {name: save_model(place / f"{name}.pt", name) for name in ("nonlocal_net", "gcnet", "fcn")}


def contexts(block, maps, x, y):
    """The block's context at each position, by maps (HW, HW) over positions, and what is added to the input."""
    if isinstance(block, NonLocalBlock):
        return block.conv_out((maps @ block.g(x)[0].flatten(1).T).T.unflatten(1, x.shape[2:])[None])
    if isinstance(block, AsymmetricNonLocalBlock):
        values = block.out_project(block.value_project(y))
        return (values[0].flatten(1) @ maps.T).unflatten(1, x.shape[2:])[None]
    summed = (x[0].flatten(1) @ maps[:1].T)[None, ..., None]
    return block.channel_add_conv(summed) if isinstance(block, GCBlock) else block.conv_value(summed)


@pytest.mark.parametrize(
    "block",
    [
        NonLocalBlock(16),
        NonLocalBlock(16, mode="gaussian"),
        SimplifiedNonLocalBlock(16),
        GCBlock(16),
        AsymmetricNonLocalBlock(16, 12, 8, shared=False),
    ],
    ids=lambda block: f"{type(block).__name__} {getattr(block, 'mode', '')}",
)
@torch.no_grad()
def test_the_maps_reproduce_the_output(block):
    torch.manual_seed(0)
    for weight in block.parameters():
        weight.normal_(std=0.4)
    x, y = torch.randn(1, 16, 11, 10), torch.randn(1, 12, 11, 10)  # 110 positions, but not ANN's samples
    pooled = isinstance(block, AsymmetricNonLocalBlock)
    inputs = (x, y) if pooled else (x,)
    query, key = attention.query_and_key(block.eval(), *inputs)
    seen = attention.Seen("", pooled, query, key, x[0], None)
    points = [((i + 0.5) / 10, (j + 0.5) / 11) for j in range(11) for i in range(10)]
    weights, maps = attention.attention(seen, points)
    assert weights.shape == (110, 110) and maps.shape == (110, 11, 10)
    torch.testing.assert_close(maps.mean((1, 2)), torch.ones(110))
    expected = block(*inputs) if pooled else block(x) - x
    result = contexts(block, maps.flatten(1) / 110, x, y).expand_as(expected)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", ["nl-dot-product", "nl-concatenation"])
def test_weights_that_are_no_softmax_are_left_out(block, folder, tmp_path, run_inside):
    save_model(tmp_path / "gc.pt", "gcnet", blocks=[block, "res4"])
    save_model(tmp_path / "fcn.pt", "fcn", blocks=[block, "res4"])
    note, _, _, row = run_inside(attention, "gc.pt", "--statistics", "--data-root", folder).splitlines()[:4]
    assert note.startswith("gc.pt: backbone.layer3.1.context_block is not shown: mode ")
    assert row.startswith("GC block (one map for all queries) of gc.pt")
    message = run_inside(attention, "fcn.pt", "--data-root", folder, fails=True)
    assert message == "fcn.pt: has no context block whose attention is a softmax"


def test_cosine_distance_is_the_mean_over_all_pairs():
    vectors = torch.randn(50, 7, generator=torch.manual_seed(0))
    cosines = torch.nn.functional.cosine_similarity(vectors[:, None].double(), vectors[None].double(), dim=2)
    expected = ((1 - cosines) / 2).mean().item()
    assert attention.cosine_distance([vectors]) == pytest.approx(expected, abs=1e-7)
    assert attention.cosine_distance(vectors.split(9)) == pytest.approx(expected, abs=1e-7)
    assert attention.cosine_distance([torch.cat([vectors, torch.zeros(3, 7)])]) == pytest.approx(expected, abs=1e-7)
    assert attention.cosine_distance([torch.tensor([[1.0, 0], [-2, 0]])]) == 0.5  # the mean of 0, 1, 1, 0
    assert np.isnan(attention.cosine_distance([torch.zeros(3, 2)]))


@torch.no_grad()
def test_statistics(models, folder, run_inside):
    arguments = ("--statistics", "--data-root", folder, "--split", "train")
    lines = run_inside(attention, models["nonlocal_net"], models["gcnet"], *arguments).splitlines()
    rows = {" ".join(words[:-3]): [float(value) for value in words[-3:]] for words in map(str.split, lines[2:])}
    assert "6 images" in lines[0]
    assert min(rows[f"non-local block of {models['nonlocal_net']}"]) > 0
    gc = rows[f"GC block (one map for all queries) of {models['gcnet']}"]
    assert (
        gc[0] > 0 and str(gc[1]) == "0.0" and np.isnan(gc[2])
    )  # its last weights start at zero, and so do its outputs

    # The same, but of the N x N pairs of one image.
    model, titles, settings = attention.load_with_blocks(models["nonlocal_net"], "cpu")
    image = torch.randint(256, (40, 48, 3), generator=torch.manual_seed(0)).byte()
    (seen,) = attention.observe(model, titles, image, settings)
    block = model.decode_head.nl_block
    torch.testing.assert_close(seen.output, (block(seen.input[None]) - seen.input)[0])
    kinds = (seen.input.flatten(1).T, (seen.query @ seen.key.T).softmax(1), seen.output.flatten(1).T)
    unit = [kind.double() / kind.double().norm(dim=1, keepdim=True) for kind in kinds]
    expected = [((1 - u @ u.T) / 2).mean().item() for u in unit]
    data = [(image, None)]
    assert attention.statistics(model, titles, data, settings)[seen.title] == pytest.approx(expected, abs=1e-6)
    # In windows, each of which is an image of its own.
    windows = attention.observe(model, titles, image, replace(settings, stride=[8, 16]))
    assert [len(seen.query) for seen in windows] == [16] * 4
    (alone,) = attention.observe(model, titles, image[8:40, 16:48], settings)
    torch.testing.assert_close(windows[3].output, alone.output)


def test_blocks_in_the_backbone_are_shown(folder, run_inside, tmp_path):
    """By where they are; of GC's with average pooling the attention is even, for every query."""
    save_model(tmp_path / "nl.pt", "ann", blocks=["nl", "res4"])
    save_model(tmp_path / "gc.pt", "fcn", blocks=["gc16-avg", "alternate"])
    lines = run_inside(attention, "nl.pt", "gc.pt", "--statistics", "--data-root", folder).splitlines()
    rows = {" ".join(words[:-3]): words[-2] for words in map(str.split, lines[2:])}
    nl = ["non-local block in layer3.1", "AFNB (110 samples)", "APNB (110 samples)"]
    gc = [f"GC block (one map for all queries) in layer{place}" for place in ("2.1", "3.1")]
    assert list(rows) == [f"{title} of nl.pt" for title in nl] + [f"{title} of gc.pt" for title in gc]
    assert [rows[f"{title} of gc.pt"] for title in gc] == ["0.000", "0.000"]


@pytest.fixture
def page(models, tmp_path, run_inside):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 160, 3)).astype(np.uint8)).save(tmp_path / "a&b.png")
    arguments = ["--images", "a&b.png", "--html", "--query", "5", "6", "--query", "159", "95"]
    run_inside(attention, models["nonlocal_net"], models["gcnet"], *arguments)
    return tmp_path / "attention/attention.html"


def test_pictures_and_page(page):
    pixels = np.asarray(Image.open(page.parent / "a&b.png")).astype(int)
    assert pixels.shape == (8 + 124 + 3 * 188, 8 + 2 * 308, 3)
    for column, alike in ((0, False), (1, True)):  # away from the marks, GC's panels are the same
        one, two = (pixels[132 + i * 188 : 312 + i * 188, 308 * column + 40 : 308 * column + 280] for i in (1, 2))
        assert (one == two).all() == alike and one.std() > 1

    text = page.read_text()
    assert not re.search(r"https?:|<link|src=|url\(|import ", text)  # nothing comes from elsewhere
    (image,) = json.loads(re.search("const DATA = (.*);\n", text)[1])["images"]
    nonlocal_net, gcnet = image["blocks"]
    assert (image["name"], image["size"]) == ("a&b.png", [160, 96])
    assert (nonlocal_net["queries"], nonlocal_net["keys"]) == ([12, 20], [12, 20])
    assert (gcnet["queries"], gcnet["keys"]) == ([1, 1], [12, 20])
    assert len(base64.b64decode(nonlocal_net["levels"])) == 240**2 and len(base64.b64decode(gcnet["levels"])) == 240
    assert len(nonlocal_net["to_mean"]) == 240 and float(nonlocal_net["distance"]) > 0 == float(gcnet["distance"])


@pytest.mark.slow
def test_images_of_the_data_set(models, folder, tmp_path, run_script):
    done = run_script("tools.attention", models["gcnet"], "--data-root", folder, "--out", "to")
    assert done.stdout.strip() == "to/: pictures of 3 images"
    found = sorted(path.relative_to(tmp_path / "to").as_posix() for path in (tmp_path / "to").rglob("*.png"))
    assert found == ["scene1.png", "scene2.png", "street/scene0.png"]  # below OUT as their images are below their own


def test_no_pictures_among_the_data(models, folder, run_inside):
    arguments = (models["gcnet"], "--data-root", folder, "--out", folder / "images")
    before = set(folder.rglob("*"))
    assert "where images or labels are; name another folder" in run_inside(attention, *arguments, fails=True)
    assert set(folder.rglob("*")) == before


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium (Debian: apt-get install chromium)")
def test_the_page_in_a_browser(page, tmp_path):
    def outputs(file, address=""):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--dump-dom", file.as_uri() + address]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        return re.findall("<output[^>]*>(.*?)</output>", dom)

    first, second = outputs(page, "#query=1,4,4"), outputs(page, "#query=1,150,90")
    assert first[0] == "Query: x 4, y 4 of 160 x 96" and second[0] == "Query: x 150, y 90 of 160 x 96"
    block = json.loads(re.search("const DATA = (.*);\n", page.read_text())[1])["images"][0]["blocks"][0]
    maps = np.frombuffer(base64.b64decode(block["levels"]), np.uint8).reshape(240, 240)  # on grids of 12 x 20
    for outputs_of, query in ((first, 0), (second, 11 * 20 + 18)):
        row, column = divmod(maps[query].argmax(), 20)
        assert f"brightest near x {8 * column + 4}, y {8 * row + 4};" in outputs_of[1]
        assert outputs_of[1].endswith(block["to_mean"][query])
    assert maps[0].argmax() != maps[-2].argmax() and first[2] == second[2]
    # A key press, as a user's: the query starts in the middle, and a step is a 24th of the longer side.
    pressed = page.with_name("pressed.html")
    key = 'document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }))'
    script = f'<script>document.querySelector("[tabindex]").focus(); {key}</script>'
    pressed.write_text(page.read_text().replace("</html>", f"{script}</html>"))
    assert outputs(pressed)[0] == "Query: x 86, y 48 of 160 x 96"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["fcn.pt"], ["fcn.pt", "no context block"]),
        (["gcnet.pt", "--images", "image.png", "--statistics"], ["image.png", "--statistics"]),
        (
            ["gcnet.pt", "--images", "image.png", "--query", "20", "9"],
            ["--query", "image.png is 20x10", "x ends at 19"],
        ),
        (["gcnet.pt", "--images", "none.png"], ["none.png"]),
        (["none.pt", "--images", "image.png"], ["none.pt"]),
        (["gcnet.pt", "image.png"], ["image.png: cannot be read as a checkpoint"]),
        (["gcnet.pt", "--images", "image.png", "--out", "."], [".: is, or holds, ., where images or labels are"]),
        (["gcnet.pt", "--images", "image.png", "--out", "page", "--html"], ["page/attention.html: already exists"]),
        (["run"], ["run/best.pt: cannot be read as a checkpoint"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_one_line(arguments, words, models, tmp_path, run_inside):
    Image.new("RGB", (20, 10)).save(tmp_path / "image.png")
    for name in ("run/best.pt", "page/attention.html"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    message = run_inside(attention, *(models.get(name.removesuffix(".pt"), name) for name in arguments), fails=True)
    assert all(word in message for word in words)
