"""Segments your own images: an overlay with a legend, a coloured label map and the label map itself, for each.

    python predict.py photo.jpg --checkpoint runs/gcnet-r50-ade20k/best.pt
    python predict.py photos/ "more/*.png" --checkpoint gcnet_r50-d8_512x512_80k_ade20k --aug --out predictions

Writes OUT/NAME_overlay.png, OUT/NAME_colour.png and OUT/NAME_labels.png (8-bit, the class index of each pixel).
"""

import glob
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import InputError, read_image
from evaluate import for_inference, predict
from support import checkpoint
from support.command import Parser, run, start_process
from support.pictures import colour, with_legend

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def find_images(arguments):
    """{name below OUT: path} of the images that files, folders and glob patterns name."""
    found = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            paths = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in ENDINGS]
            names = [p.relative_to(path).with_suffix("") for p in paths]
        else:
            paths = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(argument, recursive=True))]
            names = [p.with_suffix("").name for p in paths]
        if not paths:
            raise InputError(f"{argument}: there are no images there")
        for name, path in zip(names, paths, strict=True):
            if found.setdefault(str(name), path) != path:
                raise InputError(f"{path}: its results would overwrite those of {found[str(name)]}; use another --out")
    return found


def main():
    parser = Parser(__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or patterns")
    parser.add_argument("--checkpoint", help="file, URL or published name; default: runs/'s newest best.pt")
    parser.add_argument("--aug", action="store_true", help="multi-scale + flip, instead of one view")
    parser.add_argument("--out", default="predictions", help="the folder to write to (default: predictions)")
    args = parser.parse_args()

    images = find_images(args.images)
    device, _, _ = start_process()
    source = args.checkpoint or checkpoint.newest_run() / "best.pt"
    model, config = checkpoint.load_model(source)
    model = for_inference(model, device)
    with tqdm(images.items(), "predicting", dynamic_ncols=True) as bar:
        for name, path in bar:
            image = read_image(path)
            labels = predict(model, image[None], config, args.aug)[0]
            coloured = colour(labels, config["palette"])
            overlay = Image.blend(Image.fromarray(image.numpy()), coloured, 0.5)
            out = Path(args.out, name)
            out.parent.mkdir(parents=True, exist_ok=True)
            shown = np.unique(labels)
            with_legend(overlay, shown, config["classes"], config["palette"]).save(f"{out}_overlay.png")
            coloured.save(f"{out}_colour.png")
            Image.fromarray(labels.numpy()).save(f"{out}_labels.png")
    print(f"{len(images)} images: {args.out}/*_overlay.png, *_colour.png, *_labels.png")


if __name__ == "__main__":
    run(main)
