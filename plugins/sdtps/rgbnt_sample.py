"""A generated sample in RGBNT201's layout, for where the real set is absent: tri-spectral pedestrian crops from a seed.

It is no substitute for RGBNT201 and its figures say nothing of the paper's: it is there so that the whole pipeline runs on
real files and has something to learn. Each person has three appearances that know nothing of each other:

* visible (RGB): colours and print of the clothes, hair, skin;
* reflected (NIR): how bright the fabrics are under infrared light, and bands that only show there;
* thermal (TIR): insulation of trunk, limbs and shoes, a warm or cold pack, the gradient from collar to hem.

Several persons share each appearance (`sharing`), never two of the three, so that no spectrum tells everybody apart and
all three do. Short sleeves are bare skin in every spectrum; persons who share the visible or the thermal look agree on them.
Cameras see from another side, distance and height, in other light (the second at night: dark and noisy RGB), before
their own background; poses, passers-by, occluders, blur, gain and noise change with every image.

The persons of a split follow from the seed and their number; an image from its person, camera, number and size. So asking for
more images or cameras changes none of the others. Equal bytes need equal versions of Pillow, numpy and scipy, which the
manifest states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL
import scipy
from PIL import Image

from core import data, samples
from core.registry import register
from plugins.sdtps.datasets import MANIFEST, RGBNT201
from plugins.sdtps.pedestrians import CAMERAS, background, persons, render

VERSION = 1  # of what is drawn: another number means other images from the same seed
STATEMENT = (
    "Generated sample in the layout of RGBNT201. No photograph, no person, and no part of RGBNT201 is in it; results on it "
    "are not comparable with published ones."
)
QUALITY = 90
TEST_CAMERAS = 2

_TRAIN, _TEST, _SCENE = 0, 1, 2  # purposes: separate random streams


def _write(root: Path, seed: int, options: dict[str, Any]) -> None:
    """Everything but the manifest, under `root`."""
    height, width = options["height"], options["width"]
    sceneries = [
        background(camera, height, 5 * width, data.generator(seed, _SCENE, number)) for number, camera in enumerate(CAMERAS)
    ]
    first = 1
    for folder, purpose, count, cameras, shots in (
        ("train_171", _TRAIN, options["train_identities"], options["train_cameras"], options["train_images"]),
        ("test", _TEST, options["test_identities"], TEST_CAMERAS, options["test_images"]),
    ):
        for spectrum in ("RGB", "NI", "TI"):
            (root / folder / spectrum).mkdir(parents=True)
        people = persons(count, options["sharing"], data.generator(seed, purpose))
        for i, person in enumerate(people):
            for number in range(cameras):
                for shot in range(shots):
                    rng = data.generator(seed, purpose, i, number, shot)
                    views = render(person, people, CAMERAS[number], sceneries[number], (height, width), rng)
                    for spectrum, view in zip(("RGB", "NI", "TI"), views):
                        file = root / folder / spectrum / f"{first + i:06d}_cam{number + 1}_0_{shot:02d}.jpg"
                        Image.fromarray(view).save(file, quality=QUALITY)
        first += count


@register("dataset_maker", paper="layout of RGBNT201 (Zheng et al., AAAI 2021); images are generated")
def rgbnt_sample(
    root: str,
    seed: int = 0,
    train_identities: int = 96,
    train_cameras: int = 4,
    train_images: int = 2,
    test_identities: int = 20,
    test_images: int = 4,
    sharing: int = 3,
    height: int = 256,
    width: int = 128,
) -> None:
    """Write a generated sample in RGBNT201's layout.

    It is drawn in a folder beside `root` and renamed when whole. If `root` already holds this very sample, nothing is done.

    Args:
        root: folder to make; its `train_171/` and `test/` get `RGB/`, `NI/`, `TI/` with `PPPPPP_camX_0_NN.jpg`.
        seed: everything follows from it.
        train_identities, train_cameras, train_images: persons, cameras (1 to 4), images of each person and camera.
        test_identities, test_images: persons and images of each in cameras 1 and 2; all are query and gallery.
        sharing: how many persons share a look in each spectrum, at most; 1 makes every look unique.
        height, width: pixels, even; RGBNT201's crops are 256 x 128.

    Raises:
        ValueError: for options out of range, or a `root` that holds anything else.
    """
    options = {
        "train_identities": train_identities,
        "train_cameras": train_cameras,
        "train_images": train_images,
        "test_identities": test_identities,
        "test_images": test_images,
        "sharing": sharing,
        "height": height,
        "width": width,
    }
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if train_cameras > len(CAMERAS):
        raise ValueError(f"train_cameras must be at most {len(CAMERAS)} (RGBNT201 has that many), got {train_cameras}")
    if max(train_images, test_images) > 100:
        raise ValueError(
            f"train_images and test_images must be at most 100 (two digits in the file names), got {train_images}, {test_images}"
        )
    if height % 2 or width % 2 or min(height, width) < 16:
        raise ValueError(f"height and width must be even and at least 16, got {height} and {width}")

    def write(draft: Path) -> dict[str, Any]:
        _write(draft, seed, options)
        libraries = {"pillow": PIL.__version__, "numpy": np.__version__, "scipy": scipy.__version__}
        return {"counts": RGBNT201(str(draft)).counts(), **libraries}

    samples.make(
        root, generator="sdtps.rgbnt_sample", version=VERSION, seed=seed, options=options, statement=STATEMENT, write=write
    )


@register("dataset_checker", paper="layout of RGBNT201 (Zheng et al., AAAI 2021); images are generated")
def rgbnt_sample_files(root: str) -> list[data.Finding]:
    """Compare the generated sample in `root` with its own manifest: counts, and every byte of its images."""
    try:
        manifest = samples.read_manifest(root)
        if manifest is None:
            return [
                data.Finding("error", "manifest", f"none in {root}", f"{MANIFEST}, as `repro data make rgbnt-sample` leaves it")
            ]
        layout = RGBNT201(root)
    except ValueError as error:
        return [data.Finding("error", "sample", str(error), "a whole generated sample")]
    pairs: list[tuple[str, object, object]] = [
        (key.replace("_", " "), layout.counts()[key], manifest["counts"].get(key)) for key in layout.counts()
    ]
    pairs.append(("fingerprint of all bytes", layout.fingerprint(contents=True), manifest["fingerprint"]))
    return [data.Finding("ok" if found == made else "error", what, str(found), str(made)) for what, found, made in pairs]
