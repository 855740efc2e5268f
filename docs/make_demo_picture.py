"""Makes docs/demo.png, the picture of the README, from a demo's run folder.

python docs/make_demo_picture.py runs/demo
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from distmatch.report import image_grid

COLUMNS, ROWS, GAP, HEAD = 10, 10, 24, 28

run = Path(sys.argv[1])
panels = []
for name, title in (("reference", "real"), ("teacher", "teacher, 35 calls"), ("student", "student, 1 call")):
    with np.load(run / "samples" / f"{name}.npz", allow_pickle=False) as file:
        x, labels = file["x"], file["labels"]
    # The first ten of each class, in the order they were drawn: nothing is picked by eye.
    rows = [np.flatnonzero(labels == label)[:COLUMNS] for label in range(ROWS)]
    panels.append((title, image_grid(x[np.concatenate(rows)], COLUMNS).convert("RGBA")))

width = sum(p.width for _, p in panels) + GAP * (len(panels) - 1)
picture = Image.new("RGB", (width, panels[0][1].height + HEAD), "white")
pen = ImageDraw.Draw(picture)
left = 0
for title, panel in panels:
    pen.text((left, 4), title, fill="#333333", font=ImageFont.load_default(16))
    picture.paste(panel, (left, HEAD), panel)
    left += panel.width + GAP
picture.save(Path(__file__).parent / "demo.png", optimize=True)
