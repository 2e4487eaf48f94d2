"""Where does a pixel look? A context block's attention as pictures, as a page to explore, and in GCNet's numbers.

    python -m tools.attention                                           # the newest run, on images of its own data set
    python -m tools.attention runs/A/best.pt photo.jpg --query 320 200  # the query of your choice, in pixels
    python -m tools.attention runs/A/best.pt runs/B/best.pt photos/ --html
    python -m tools.attention runs/A/best.pt --statistics               # does attention depend on the query?

Writes OUT/NAME.png for each image: a row for each block (a column, if the image is wide), and in it a panel for each
query point, as in figure 1 of GCNet. --html writes OUT/attention.html too, a page of one file, where the pointer is the
query. --statistics prints mean cosine distances, as GCNet's authors published them. Where attention's is 0, it does not
depend on the query: by design in GC, and in a non-local block also while its weights for all positions are still alike.

    block        position i weighs            by
    Non-local    all positions j              softmax_j(theta(x_i) . phi(x_j) / sqrt(channels))
    SNL, GC      all positions j              softmax_j(W_k x_j), whatever i is
    AFNB, APNB   110 samples s (ANN)          softmax_s(query_i . key_s), shown on the positions that s averages
"""

import base64
import io
import json
import textwrap
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ann import AFNB, APNB, AsymmetricNonLocalBlock
from evaluate import data_of, predict
from gcnet import GCBlock, SimplifiedNonLocalBlock
from nonlocal_net import NonLocalBlock
from support import zoo
from support.checkpoint import load_model
from support.command import InputError, Parser, run_command, split_name, whole_number
from support.images import read_image
from support.layouts import find_images
from support.pictures import INK, MARK, PAPER, refuse_to_replace, save_png
from support.processes import start_process
from support.run import newest_checkpoint
from support.settings import PRESETS

TITLES = {
    NonLocalBlock: "non-local block",
    SimplifiedNonLocalBlock: "SNL block (one map for all queries)",
    GCBlock: "GC block (one map for all queries)",
    AFNB: "AFNB (110 samples)",
    APNB: "APNB (110 samples)",
}
NO_SOFTMAX = ("dot_product", "concatenation")  # modes of a non-local block
PUBLISHED = {  # by GCNet's authors, of trained embedded Gaussian blocks: input, attention, output
    "COCO": (0.401, 0.020, 0.012),
    "ImageNet": (0.358, 0.004, 0.003),
    "Kinetics": (0.301, 0.115, 0.074),
    "Cityscapes": (0.315, 0.383, 0.354),
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


def titles_of(model):
    """{context block: its title} of a model, but for blocks whose weights are no softmax, and may be negative."""
    titles = {}
    for name, module in model.named_modules():
        if type(module) in TITLES and getattr(module, "mode", None) not in NO_SOFTMAX:
            block = module.stages[0] if isinstance(module, AFNB | APNB) else module
            place = name.removeprefix("backbone.").removesuffix(".context_block")
            titles[block] = TITLES[type(module)] + (f" in {place}" if name.startswith("backbone.") else "")
    return titles


def query_and_key(block, x, y=None):
    """The two of Seen for each of N images, of a block's inputs (N, C, H, W): one, or ANN's two."""
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
    return query.flatten(2).transpose(1, 2), key.flatten(2).transpose(1, 2)


@torch.inference_mode()
def observe(model, image, config):
    """A list of Seen, one for each context block, and for each window if the config says so; the arguments are those
    of evaluate.predict, which also prepares the image."""
    seen = []
    titles = titles_of(model)

    def look(block, inputs, output):
        pooled = isinstance(block, AsymmetricNonLocalBlock)
        added = output if pooled else output - inputs[0]
        for parts in zip(*query_and_key(block, *inputs), inputs[0], added, strict=True):
            seen.append(Seen(titles[block], pooled, *parts))

    hooks = [block.register_forward_hook(look) for block in titles]
    predict(model, image[None], config)
    for hook in hooks:
        hook.remove()
    return seen


def unpool(weights, height, width):
    """Attention to samples (Q, 110) as maps (Q, H, W) of the same sum: a sample gives its weight to what it averages.

    It is the adjoint of PyramidPooling, whose averages over cells are averages over columns, then over rows.
    """
    maps = 0
    for n, part in zip((1, 3, 6, 8), weights.split((1, 9, 36, 64), dim=1), strict=True):
        rows, columns = (F.adaptive_avg_pool1d(torch.eye(side).to(weights), n) for side in (height, width))  # (side, n)
        maps = maps + rows @ part.unflatten(1, (n, n)) @ columns.T
    return maps


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


def statistics(model, data, config):
    """{block: float64 (3,)}: the cosine distances of its inputs, attention and outputs, averaged over a data set's
    images (over windows, if the checkpoint is evaluated in windows)."""
    distances = {}
    for i in tqdm(range(len(data)), leave=False, dynamic_ncols=True):
        for seen in observe(model, data[i][0], config):
            rows = ((part @ seen.key.T).softmax(1) for part in seen.query.split(256))
            kinds = ([seen.input.flatten(1).T], rows, [seen.output.flatten(1).T])
            distances.setdefault(seen.title, []).append([cosine_distance(kind) for kind in kinds])
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


def picture(image, points, blocks, gap=8):
    """Pillow's picture of an image uint8 (H, W, 3) and the (title, Seen) in blocks: a row for each block, of the image
    with the query points and a panel for each of these. If the image is wide, a column for each block instead."""
    photo, font = Image.fromarray(image.numpy()), ImageFont.load_default(14)
    wide = photo.width > 3 * photo.height
    tile = 300 if wide else 224  # the longer side of a panel
    head = 124 if wide else 24  # the height of the text over a block's panels
    room = 0 if wide else 960  # what the text needs across
    width, height = (max(round(side * tile / max(photo.size)), 1) for side in photo.size)
    photo = photo.resize((width, height))
    grey = photo.convert("L").convert("RGB")
    right, down = width + gap, height + gap
    to_panel = np.array((0, down) if wide else (right, 0))  # from one panel of a block to the next
    to_block = np.array((right, 0) if wide else (0, head + down))
    size = len(points) * to_panel + (len(blocks) - 1) * to_block + (right + gap, head + down + gap)
    canvas = Image.new("RGB", (max(int(size[0]), room), int(size[1])), PAPER)
    pen = ImageDraw.Draw(canvas)

    def show(panel, corner, numbers):
        canvas.paste(panel, tuple(corner.tolist()))
        for i in numbers:
            x, y = corner + np.multiply(points[i], (width, height))
            pen.ellipse((x - 8, y - 8, x + 8, y + 8), PAPER, INK, 2)
            pen.text((x, y), str(i + 1), INK, font, anchor="mm")

    for block, (title, seen) in enumerate(blocks):
        left, top = (gap + block * to_block).tolist()
        weights, maps = attention(seen, points)
        panels, brightest = levels(maps)
        distance = f"distance between the queries' weights: {cosine_distance([weights]):.3f} (0: alike)"
        pen.text((left, top), "0", INK, font)
        canvas.paste(heat(np.arange(256)[None]).resize((100, 14)), (left + 14, top + 2))
        if wide:
            lines = textwrap.wrap(distance, 44) + textwrap.wrap(title, 44)
            pen.text((left, top + 20), "\n".join(lines), INK, font)
        pen.text((left + 120, top), brightest if wide else f"{brightest}      {distance}      {title}", INK, font)
        corner = np.array((left, top + head))
        show(photo, corner, range(len(points)))
        for i, panel in enumerate(panels, 1):
            coloured = heat(panel).resize((width, height), Image.Resampling.NEAREST)
            show(Image.blend(grey, coloured, 0.75), corner + i * to_panel, [i - 1])
    return canvas


def explorable(name, image, blocks):
    """What attention.html shows of an image uint8 (H, W, 3) and the (title, Seen) in blocks: the attention of at most
    SIDE x SIDE queries to as many places."""
    photo, jpeg = Image.fromarray(image.numpy()), io.BytesIO()
    size = photo.size
    photo.thumbnail((640, 640))
    photo.save(jpeg, "JPEG", quality=85)
    shown = []
    for title, seen in blocks:
        full = seen.input.shape[1:]
        keys = [max(round(side * min(SIDE / max(full), 1)), 1) for side in full]
        rows, columns = (1, 1) if seen.query.shape[1] == 1 else keys  # GC and SNL: one map for all queries
        points = [((x + 0.5) / columns, (y + 0.5) / rows) for y in range(rows) for x in range(columns)]
        weights, maps = attention(seen, points)
        coarse, brightest = levels(F.adaptive_avg_pool2d(maps, keys))
        to_mean = (1 - F.cosine_similarity(weights, weights.mean(0, keepdim=True))).clamp(min=0) / 2
        entry = {"title": title, "queries": [rows, columns], "keys": keys, "brightest": brightest}
        entry["distance"] = f"{cosine_distance([weights]):.3f}"
        entry["to_mean"] = [f"{distance:.3f}" for distance in to_mean.tolist()]
        entry["levels"] = base64.b64encode(coarse.tobytes()).decode()
        shown.append(entry)
    return {"name": name, "size": size, "image": base64.b64encode(jpeg.getvalue()).decode(), "blocks": shown}


# ------------------------------------------------------------------------------------------------------ command line


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "files", nargs="*", metavar="FILE", help="checkpoints (files, runs, published names); images, folders, patterns"
    )
    add("--query", type=whole_number, nargs=2, action="append", metavar=("X", "Y"), help="a pixel; may be repeated")
    add("--html", action="store_true", help="write the page as well")
    add("--statistics", action="store_true", help="instead print mean cosine distances over a data set")
    add("--dataset", choices=PRESETS, help="default: the one that the first checkpoint was trained on")
    add("--data-root", help="the data set's folder (default: the one that it was trained on)")
    add("--split", type=split_name, default="val", help="train, val or test (default: val)")
    parser.add_device()
    add("--out", default="attention", help="the folder to write to (default: attention)")
    args = parser.parse_intermixed_args()
    published = zoo.published()
    kinds = (".pt", ".pth", ".safetensors")
    args.checkpoints = [name for name in args.files if name in published or zoo.in_folder(Path(name)).suffix in kinds]
    args.images = [name for name in args.files if name not in args.checkpoints]
    if args.statistics and args.images:
        raise InputError(
            f"{args.images[0]}: --statistics takes checkpoints, and a data set by --dataset, --data-root, --split"
        )
    return args


def load_models(sources, device):
    """[(source, model in eval mode, config)]. Raises InputError for a model without attention."""
    models = []
    for source in sources:
        model, config = load_model(source)
        for name, module in model.named_modules():
            if isinstance(module, NonLocalBlock) and module.mode in NO_SOFTMAX:
                print(f"{source}: {name} is not shown: mode {module.mode}, whose weights are no softmax")
        if not titles_of(model):
            raise InputError(f"{source}: has no context block whose attention is a softmax")
        models.append((source, model.eval().to(device, memory_format=torch.channels_last), config))
    return models


def images_of(args, config):
    """[(name below OUT, path, function that reads it)] of the images to look at: those given, or a data set's first."""
    if args.images:
        found = find_images(args.images)
        return [(name, path, partial(read_image, path)) for name, path in found.items()]
    data = data_of(config, args)
    return [(f"{args.split}{i}", data.files[i][0], lambda i=i: data[i][0]) for i in range(min(4, len(data)))]


def query_points(args, path, image):
    """The queries in 0..1 of the image's width and height."""
    height, width = image.shape[:2]
    points = [((x + 0.5) / width, (y + 0.5) / height) for x, y in args.query or []] or POINTS
    if max(max(point) for point in points) > 1:
        raise InputError(f"--query: {path} is {width}x{height}; x ends at {width - 1} and y at {height - 1}")
    return points


def print_statistics(models, args):
    data = data_of(models[0][2], args)
    rows = {}
    for source, model, config in models:
        rows |= {f"{title} of {source}": row for title, row in statistics(model, data, config).items()}
    rows |= {f"published: {task}": row for task, row in PUBLISHED.items()}
    width = max(map(len, rows))
    print(f"mean cosine distance over all pairs of positions; mean of {len(data)} images (split {args.split})")
    print(f"{'':<{width}}{'input':>11}{'attention':>11}{'output':>11}")
    for title, row in rows.items():
        print(f"{title:<{width}}" + "".join(f"{value:>11.3f}" for value in row))


def write_pictures(models, args):
    images = images_of(args, models[0][2])
    out = Path(args.out)
    refuse_to_replace([out / f"{name}.png" for name, _, _ in images] + [out / "attention.html"] * args.html)
    shown = []
    for name, path, read in tqdm(images, leave=False, dynamic_ncols=True):
        image = read()
        points = query_points(args, path, image)
        blocks = [  # a model that is evaluated in windows sees the whole image here
            (f"{seen.title} of {source}", seen)
            for source, model, config in models
            for seen in observe(model, image, config | {"stride": None})
        ]
        save_png(picture(image, points, blocks), out / f"{name}.png")
        if args.html:
            shown.append(explorable(str(path), image, blocks))
    if args.html:
        values = json.dumps({"ramp": RAMP, "side": SIDE, "images": shown}).replace("<", "\\u003c")
        page = Path(__file__).with_suffix(".html").read_text()
        (out / "attention.html").write_text(page.replace("MARK_HERE", MARK).replace("DATA_HERE", values))
    print(f"{out}/: pictures of {len(images)} images" + args.html * ", attention.html (open it in a browser)")


def main():
    args = parse_arguments()
    models = load_models(args.checkpoints or [newest_checkpoint()], start_process(args.device))
    if args.statistics:
        print_statistics(models, args)
    else:
        write_pictures(models, args)


if __name__ == "__main__":
    run_command(main)
