"""Where does a pixel look? A context block's attention as pictures, as a page to explore, and in GCNet's numbers.

    python -m tools.attention                                           # the newest run, on images of its own data set
    python -m tools.attention runs/A/best.pt --images photo.jpg --query 320 200    # the query of your choice, in pixels
    python -m tools.attention runs/A/best.pt runs/B/best.pt --images photos/ --html
    python -m tools.attention runs/A/best.pt --statistics               # does attention depend on the query?

Writes OUT/NAME.png for each image: a column for each block, and in it a panel for each query point, as in figure 1 of
GCNet; ANN's samples are shown on the positions that they average. --html writes OUT/attention.html too, a page of one
file, where the pointer is the query. --statistics prints mean cosine distances, as in section 3.2 of GCNet. Where that
of attention is 0, it does not depend on the query: by design in GC, in others while all its weights are still alike.
"""

import base64
import io
import json
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ann import AFNB, APNB, AsymmetricNonLocalBlock, PyramidPooling
from evaluate import data_of, predict
from gcnet import GCBlock, SimplifiedNonLocalBlock
from nonlocal_net import NonLocalBlock
from support.checkpoint import load_model
from support.command import BAR, InputError, Parser, run_command, whole_number
from support.files import refuse_existing, refuse_output_folder
from support.images import read_image
from support.layouts import find_images
from support.pictures import INK, PAPER, save_png
from support.processes import start_process
from support.settings import PRESETS
from support.zoo import newest_checkpoint

TITLES = {
    NonLocalBlock: "non-local block",
    SimplifiedNonLocalBlock: "SNL block (one map for all queries)",
    GCBlock: "GC block (one map for all queries)",
    AFNB: "AFNB (110 samples)",
    APNB: "APNB (110 samples)",
}
POINTS = [(x / 6, y / 4) for y in (1, 3) for x in (1, 3, 5)]  # of the width and the height
SIDE = 24  # of the page's grid of queries
RAMP = ((20, 10, 50), (110, 25, 110), (205, 60, 75), (250, 150, 40), (255, 250, 160))  # from no weight to the most


# --------------------------------------------------------------------------------------------------------- attention


class Seen(NamedTuple):
    """What a context block did with one image: its attention (HW, S) is softmax(query @ key.T)."""

    title: str
    pooled: bool  # S is ANN's 110, else HW
    query: torch.Tensor  # float (HW, channels)
    key: torch.Tensor  # float (S, channels)
    input: torch.Tensor  # float (C, H, W)
    output: torch.Tensor  # float (C, H, W), before it is added to the input or, in ANN, concatenated


def load_with_blocks(source, device):
    """(model, titles, settings) of a checkpoint: the model in eval mode, and {context block: title} of those to look
    at. Says which blocks are left out, since their weights are no softmax, and may be negative. Raises InputError if
    none is left."""
    model, settings = load_model(source)
    titles = {}
    for name, module in model.named_modules():
        if getattr(module, "mode", None) in ("dot_product", "concatenation"):
            print(f"{source}: {name} is not shown: mode {module.mode}, whose weights are no softmax")
        elif type(module) in TITLES:
            block = module.stages[0] if isinstance(module, AFNB | APNB) else module
            place = name.removeprefix("backbone.").removesuffix(".context_block")
            place = f" in {place}" if name.startswith("backbone.") else ""
            titles[block] = f"{TITLES[type(module)]}{place} of {source}"
    if not titles:
        raise InputError(f"{source}: has no context block whose attention is a softmax")
    return model.eval().to(device, memory_format=torch.channels_last), titles, settings


def query_and_key(block, x, y=None):
    """The two of Seen, of a block's inputs (1, C, H, W): one, or ANN's two."""
    if isinstance(block, AsymmetricNonLocalBlock):
        query, key = block.query_project(x), block.pool(block.key_project(y))
        query = query * key.shape[1] ** -0.5
    elif not isinstance(block, NonLocalBlock):  # GC and SNL: one logit for each position
        key = block.conv_mask(x) if block.conv_mask else torch.zeros_like(x[:, :1])
        query = torch.ones_like(key)
    elif block.mode == "embedded_gaussian":
        query, key = block.theta(x), block.phi(x)
        query = query * key.shape[1] ** -0.5
    else:  # gaussian
        query = key = x
    return query[0].flatten(1).T, key[0].flatten(1).T


@torch.inference_mode()
def observe(model, titles, image, settings):
    """A list of Seen, one of each block in `titles`, while the model predicts an image uint8 (H, W, 3); if the settings
    have a stride, one of each block in each window."""
    seen = []

    def look(block, inputs, output):
        pooled = isinstance(block, AsymmetricNonLocalBlock)
        added = output if pooled else output - inputs[0]
        seen.append(Seen(titles[block], pooled, *query_and_key(block, *inputs), inputs[0][0], added[0]))

    hooks = [block.register_forward_hook(look) for block in titles]
    predict(model, image, settings)
    for hook in hooks:
        hook.remove()
    return seen


def unpool(weights, height, width):
    """Attention to samples (Q, 110) as maps (Q, H, W) of the same sum: each sample's weight, in equal parts, on the
    positions that it averages. That is what the gradient of the pooling does."""
    positions = torch.zeros(len(weights), 1, height, width, device=weights.device, requires_grad=True)
    with torch.enable_grad():
        samples = PyramidPooling()(positions)  # (Q, 1, 110)
    return torch.autograd.grad(samples, positions, weights[:, None])[0][:, 0]


def attention(seen, points):
    """The attention of points (x, y), in 0..1 of the image's width and height: float (Q, S), and as maps (Q, H, W) in
    multiples of the mean weight 1 / HW."""
    height, width = seen.input.shape[1:]
    weights = (seen.query[[int(y * height) * width + int(x * width) for x, y in points]] @ seen.key.T).softmax(1)
    maps = unpool(weights, height, width) if seen.pooled else weights.unflatten(1, (height, width))
    return weights, maps * height * width


def cosine_distance(parts):
    """The mean of (1 - cos(v_i, v_j)) / 2 over all pairs, i = j among them: avg_dist in section 3.2 of GCNet.

    Takes the vectors as the rows of float (n, C) tensors, one tensor after another, so that they are never held at
    once: the sum of all cosines is |sum_i v_i / |v_i||^2. Vectors of zeros have no direction, and are left out.
    """
    total = torch.zeros(())
    count = 0
    for part in parts:
        vectors = part.double()[part.any(1)]
        total = total + F.normalize(vectors, dim=1, eps=0).sum(0)
        count += len(vectors)
    return max(0.5 - total.square().sum().item() / (2 * count**2), 0.0) if count else float("nan")


def statistics(model, titles, data, settings):
    """{title: float64 (3,)}: the cosine distances of a block's inputs, attention and outputs, averaged over a data
    set's images (over windows, if the checkpoint is evaluated in windows)."""
    distances = {title: [] for title in titles.values()}
    for i in tqdm(range(len(data)), leave=False, **BAR):
        for seen in observe(model, titles, data[i][0], settings):
            rows = ((part @ seen.key.T).softmax(1) for part in seen.query.split(256))
            kinds = ([seen.input.flatten(1).T], rows, [seen.output.flatten(1).T])
            distances[seen.title].append([cosine_distance(kind) for kind in kinds])
    return {title: np.mean(values, axis=0) for title, values in distances.items()}


# ---------------------------------------------------------------------------------------------------------- pictures


def levels(maps):
    """uint8 maps, 255 for the weight that one position in 200 exceeds, and that weight as text; from twice the mean
    upwards, so that attention to everything alike is neither dark nor bright."""
    brightest = maps.flatten().cpu().quantile(0.995).clamp(min=2)
    return (maps.cpu() / brightest * 255).clamp(max=255).byte().numpy(), f"{brightest:.3g} x the mean weight"


def heat(levels):
    """Pillow's RGB image of uint8 (H, W), along RAMP."""
    stops = np.linspace(0, 255, len(RAMP))
    return Image.fromarray(np.stack([np.interp(levels, stops, c) for c in np.transpose(RAMP)], -1).astype(np.uint8))


def picture(image, points, blocks, width=300, head=124, gap=8):
    """Pillow's picture of an image uint8 (H, W, 3) and what blocks (each a Seen) did with it: a column for each block,
    of the image with the query points and a panel of this width for each of these, below a head of text."""
    font = ImageFont.load_default(14)
    height = max(round(width * image.shape[0] / image.shape[1]), 1)
    photo = Image.fromarray(image.numpy()).resize((width, height))
    grey = photo.convert("L").convert("RGB")
    size = gap + len(blocks) * (width + gap), gap + head + (1 + len(points)) * (height + gap)
    canvas = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(canvas)
    for number, seen in enumerate(blocks):
        left = gap + number * (width + gap)
        weights, maps = attention(seen, points)
        shades, brightest = levels(maps)
        pen.text((left, gap), "0", INK, font)
        canvas.paste(heat(np.arange(256)[None]).resize((100, 14)), (left + 14, gap + 2))
        pen.text((left + 120, gap), brightest, INK, font)
        distance = f"distance between the queries' weights: {cosine_distance([weights]):.3f} (0: alike)"
        pen.text((left, gap + 20), "\n".join(textwrap.wrap(distance, 44) + textwrap.wrap(seen.title, 44)), INK, font)
        coloured = [heat(shade).resize((width, height), Image.Resampling.NEAREST) for shade in shades]
        for i, panel in enumerate([photo, *(Image.blend(grey, layer, 0.75) for layer in coloured)]):
            corner = left, gap + head + i * (height + gap)
            canvas.paste(panel, corner)
            for query in range(len(points)) if i == 0 else [i - 1]:
                x, y = corner + np.multiply(points[query], (width, height))
                pen.ellipse((x - 8, y - 8, x + 8, y + 8), PAPER, INK, 2)
                pen.text((x, y), str(query + 1), INK, font, anchor="mm")
    return canvas


def explorable(name, image, blocks):
    """What attention.html shows of an image uint8 (H, W, 3) and what blocks (each a Seen) did with it: the attention of
    at most SIDE x SIDE queries to as many places."""
    photo, jpeg = Image.fromarray(image.numpy()), io.BytesIO()
    photo.thumbnail((640, 640))
    photo.save(jpeg, "JPEG", quality=85)
    shown = []
    for seen in blocks:
        full = seen.input.shape[1:]
        keys = [max(round(side * min(SIDE / max(full), 1)), 1) for side in full]
        rows, columns = (1, 1) if seen.query.shape[1] == 1 else keys  # GC and SNL: one map for all queries
        points = [((x + 0.5) / columns, (y + 0.5) / rows) for y in range(rows) for x in range(columns)]
        weights, maps = attention(seen, points)
        coarse, brightest = levels(F.adaptive_avg_pool2d(maps, keys))
        to_mean = (1 - F.cosine_similarity(weights, weights.mean(0, keepdim=True))).clamp(min=0) / 2
        entry = {"title": seen.title, "queries": [rows, columns], "keys": keys, "brightest": brightest}
        entry["distance"] = f"{cosine_distance([weights]):.3f}"
        entry["to_mean"] = [f"{distance:.3f}" for distance in to_mean.tolist()]
        entry["levels"] = base64.b64encode(coarse.tobytes()).decode()
        shown.append(entry)
    size = image.shape[1::-1]
    return {"name": name, "size": size, "image": base64.b64encode(jpeg.getvalue()).decode(), "blocks": shown}


# ------------------------------------------------------------------------------------------------------ command line


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="file, folder, URL or published name (default: newest)")
    add("--images", nargs="+", metavar="IMAGE", help="files, folders or patterns (default: the data set's first four)")
    add("--query", type=whole_number, nargs=2, action="append", metavar=("X", "Y"), help="a pixel; may be repeated")
    add("--html", action="store_true", help="write the page as well")
    add("--statistics", action="store_true", help="instead print mean cosine distances over a data set")
    add("--dataset", choices=PRESETS, help="default: the one that the first checkpoint was trained on")
    add("--data-root", help="the data set's folder (default: the one that it was trained on)")
    add("--split", default="val", help="train, val or test (default: val)")
    parser.add_device()
    add("--out", default="attention", help="the folder to write to (default: attention)")
    parser.add_overwrite()
    args = parser.parse_args()
    if args.statistics and args.images:
        raise InputError(f"{args.images[0]}: --statistics goes over a data set: --dataset, --data-root, --split")
    return args


def images_of(args, settings):
    """[(name below OUT, path, function that reads it)] of the images to look at: those given, or a data set's first."""
    if args.images:
        found = find_images(args.images, args.out)
        return [(name, path, lambda path=path: read_image(path)) for name, path in found.items()]
    data = data_of(settings, args)
    paths = [path for path, _ in data.files[:4]]
    names = [path.relative_to(data.tree) if data.tree else Path(path.name) for path in paths]
    return [(str(name.with_suffix("")), paths[i], lambda i=i: data[i][0]) for i, name in enumerate(names)]


def query_points(query, path, image):
    """Pixels of an image, in 0..1 of its width and height. Raises InputError if one is outside."""
    height, width = image.shape[:2]
    points = [((x + 0.5) / width, (y + 0.5) / height) for x, y in query]
    if max(max(point) for point in points) > 1:
        raise InputError(f"--query: {path} is {width}x{height}; x ends at {width - 1} and y at {height - 1}")
    return points


def print_statistics(models, args):
    data = data_of(models[0][2], args)
    rows = {}
    for model, titles, settings in models:
        rows |= statistics(model, titles, data, settings)
    width = max(map(len, rows))
    print(f"mean cosine distance over all pairs of positions; mean of {len(data)} images (split {args.split})")
    print(f"{'':<{width}}{'input':>11}{'attention':>11}{'output':>11}")
    for title, row in rows.items():
        print(f"{title:<{width}}" + "".join(f"{value:>11.3f}" for value in row))


def write_pictures(models, args):
    images = images_of(args, models[0][2])
    out = Path(args.out)
    page = out / "attention.html"
    refuse_output_folder(out, [path for _, path, _ in images])
    refuse_existing([out / f"{name}.png" for name, _, _ in images] + [page] * args.html, args.overwrite)
    shown = []
    for name, path, read in tqdm(images, leave=False, **BAR):
        image = read()
        points = query_points(args.query, path, image) if args.query else POINTS
        blocks = []
        for model, titles, settings in models:  # also a model that is evaluated in windows sees the whole image here
            blocks += observe(model, titles, image, replace(settings, stride=None))
        save_png(picture(image, points, blocks), out / f"{name}.png")
        if args.html:
            shown.append(explorable(str(path), image, blocks))
    if args.html:
        values = json.dumps({"ramp": RAMP, "side": SIDE, "images": shown}).replace("<", "\\u003c")
        page.write_text(Path(__file__).with_suffix(".html").read_text().replace("DATA_HERE", values))
    print(f"{out}/: pictures of {len(images)} images" + args.html * ", attention.html (open it in a browser)")


def main():
    args = parse_arguments()
    device = start_process(args.device)
    models = [load_with_blocks(source, device) for source in args.checkpoints or [newest_checkpoint()]]
    if args.statistics:
        print_statistics(models, args)
    else:
        write_pictures(models, args)


if __name__ == "__main__":
    run_command(main)
