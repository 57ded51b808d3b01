"""The three published layouts, written with a few grey images."""

import numpy as np
from PIL import Image

GREY = {"rgb": 40, "nir": 120, "tir": 200}  # what each spectrum's images are filled with


def save(path, value, width=12, height=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(path, quality=95)


def write_rgbnt201(root, train=(2, 7), test=(258, 30), cameras=(1, 2), shots=2):
    for folder, pids in (("train_171", train), ("test", test)):
        for pid in pids:
            for camera in cameras:
                for shot in range(shots):
                    for spectrum, value in zip(("RGB", "NI", "TI"), GREY.values()):
                        save(root / folder / spectrum / f"{pid:06d}_cam{camera}_0_{shot:02d}.jpg", value)
    return root


def write_rgbnt100(root, train=(2, 7), test=(502, 30), cameras=(1, 8)):
    places = {"bounding_box_train": train, "query": test[:1], "bounding_box_test": test}
    for folder, pids in places.items():
        for pid in pids:
            for camera in cameras:
                strip = np.repeat(np.array([list(GREY.values())], np.uint8), 12, axis=1).repeat(8, 0)
                file = root / "rgbir" / folder / f"{pid:04d}_c{camera:04d}_000.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(strip[:, :, None].repeat(3, 2)).save(file, quality=95)
    return root


def write_msvr310(root, train=(2, 7), test=(268, 30), views=(0, 7), scenes=(1, 24)):
    places = {"bounding_box_train": train, "query3": test[:1], "bounding_box_test": test}
    for folder, pids in places.items():
        for pid in pids:
            for scene in scenes:
                for view in views:
                    for spectrum, value in zip(("vis", "ni", "th"), GREY.values()):
                        save(root / folder / f"{pid:04d}" / spectrum / f"{pid:04d}_s{scene:03d}_v{view}_000.jpg", value)
    return root
