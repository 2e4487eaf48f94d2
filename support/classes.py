"""Class names and colours of the data sets, as their publishers give them: classes.json has RGB in hexadecimal."""

import json
from pathlib import Path

CLASSES = json.loads(Path(__file__).with_suffix(".json").read_text())


def names_and_colours(dataset):
    """(names, RGB colours) of a data set's classes, as two tuples."""
    return tuple(CLASSES[dataset]), tuple(tuple(bytes.fromhex(colour)) for colour in CLASSES[dataset].values())


def bit_colours(count):
    """VOC's colours: the bits of the index spread over R, G and B, from the highest bit down; class 0 is black."""

    def channel(index, shift):
        return sum((index >> (3 * bit + shift) & 1) << (7 - bit) for bit in range(3))

    return tuple((channel(i, 0), channel(i, 1), channel(i, 2)) for i in range(count))
