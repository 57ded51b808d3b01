"""The main job at a size that takes seconds: overrides for `gin/sdtps_rgbnt.gin`, and a data set to go with them."""

from pathlib import Path

OVERRIDES = (
    "trainer.train.threads=1", "trainer.train.eval_first=False", "sdtps.PKPlan.identities=3", "sdtps.PKPlan.instances=2",
    "sdtps.CLIPVisionTransformer.width=16", "sdtps.CLIPVisionTransformer.layers=1", "sdtps.CLIPVisionTransformer.heads=2",
)  # fmt: skip


def sample(root: Path) -> Path:
    """A tiny sample in RGBNT201's layout, made by the registered maker."""
    from plugins.sdtps.rgbnt_sample import rgbnt_sample

    rgbnt_sample(
        str(root),
        train_identities=6,
        train_cameras=2,
        train_images=2,
        test_identities=4,
        test_images=2,
        sharing=1,
        height=64,
        width=32,
    )
    return root
