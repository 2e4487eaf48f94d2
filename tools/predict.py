"""Segments your own images: an overlay with a legend, a coloured label map and the label map itself, for each.

    python -m tools.predict photo.jpg --checkpoint runs/gcnet-r50-ade20k/best.pt
    python -m tools.predict photos/ "more/*.png" --checkpoint gcnet_r50-d8_512x512_80k_ade20k --aug --out predictions

Writes OUT/NAME_overlay.png, OUT/NAME_colour.png and OUT/NAME_labels.png (8-bit, the class index of each pixel).
"""

from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from evaluate import predict
from support.checkpoint import load_model
from support.command import BAR, Parser, run_command
from support.fast import for_inference
from support.files import refuse_existing
from support.images import read_image
from support.layouts import find_images
from support.pictures import colour, save_png, with_legend
from support.processes import start_process
from support.zoo import newest_checkpoint


def paths(out, name):
    """The three files that are written for the image `name`."""
    return [out / f"{name}_{kind}.png" for kind in ("overlay", "colour", "labels")]


def save(image, prediction, settings, files):
    """Writes the three pictures of an image uint8 (H, W, 3) and its prediction uint8 (H, W)."""
    coloured = colour(prediction, settings.palette)
    overlay = Image.blend(Image.fromarray(image.numpy()), coloured, 0.5)
    overlay = with_legend(overlay, np.unique(prediction), settings.classes, settings.palette)
    for path, picture in zip(files, (overlay, coloured, Image.fromarray(prediction.numpy())), strict=True):
        save_png(picture, path)


def main():
    parser = Parser(__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or patterns")
    parser.add_argument("--checkpoint", help="file, folder, URL or published name (default: newest in runs/)")
    parser.add_argument("--aug", action="store_true", help="multi-scale + flip, instead of one view")
    parser.add_stride()
    parser.add_device()
    text = "the folder to write to (default: predictions)"
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR", help=text)
    parser.add_overwrite()
    args = parser.parse_args()

    images = find_images(args.images, args.out)
    refuse_existing([path for name in images for path in paths(args.out, name)], args.overwrite)
    for path in tqdm(images.values(), "checking", leave=False, **BAR):
        read_image(path)  # a damaged one is found before anything is written
    device = start_process(args.device)
    model, settings = load_model(args.checkpoint or newest_checkpoint(), args.stride)
    model = for_inference(model, device)
    with tqdm(images.items(), "predicting", **BAR) as bar:  # whose line ends before an error is printed
        for name, path in bar:
            image = read_image(path)
            prediction, _ = predict(model, image, settings, args.aug)
            save(image, prediction, settings, paths(args.out, name))
    print(f"{len(images)} images: {args.out}/*_overlay.png, *_colour.png, *_labels.png")


if __name__ == "__main__":
    run_command(main)
