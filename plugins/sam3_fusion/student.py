"""A student's image trunk, and how it is taught: by the teacher's trunk features alone (EfficientSAM3, stage 1).

Axes: b images, c channels of the teacher's trunk, h and w cells, s side of an image.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from core.registry import register
from plugins.sam3_fusion.detector import ConvTrunk


@register("backbone", paper="EfficientSAM3 (release), stage 1: a small trunk and a projection head", denylist=["channels"])
class StudentTrunk(nn.Module):
    """A small `ConvTrunk`, then conv 1×1, batch norm, GELU, conv 3×3 to the teacher's channels.

    Args:
        channels: of the teacher's trunk.
        width: of the small trunk's first stage; doubled in the second and again in the third.
        depth: residual blocks of each of its stages.
    """

    stride = ConvTrunk.stride

    def __init__(self, channels: int, width: int = 6, depth: int = 0):
        super().__init__()
        self.channels = channels
        self.body = ConvTrunk(width, 4 * width, depth)
        self.mix = nn.Conv2d(4 * width, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        self.out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, image: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b c h w"]:
        return self.out(F.gelu(self.norm(self.mix(self.body(image)))))


class Preprocessing(NamedTuple):
    """A change of the input's normalisation: x → scale · x + shift, channel by channel."""

    scale: tuple[float, float, float]
    shift: tuple[float, float, float]

    def __call__(self, image: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
        scale, shift = image.new_tensor(self.scale), image.new_tensor(self.shift)
        return image * scale[:, None, None] + shift[:, None, None]


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imagenet_of_half() -> Preprocessing:
    """What turns an image normalised by (x − 0.5)/0.5 into the same image normalised by ImageNet's mean and deviation.

    Stage 1 of the release trains student and teacher on the latter, and everything after runs on the former: at inference the
    student sees less than half of the contrast it was trained on.
    """
    scale = tuple(0.5 / s for s in IMAGENET_STD)
    shift = tuple((0.5 - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD))
    return Preprocessing(scale, shift)  # type: ignore[arg-type]


def feature_loss(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"], cosine_weight: float
) -> dict[str, Float[Tensor, ""]]:
    """Squared error summed over channels, mean over cells, and the mean of 1 − cosine between the channels of a cell.

    (The release's target is not normalised, so the first term grows with the number of channels.)
    """
    square = (student - teacher).square().sum(dim=1).mean()
    turned = 1 - F.cosine_similarity(student, teacher, dim=1).mean()
    return {"features": square, "cosine": cosine_weight * turned}


def explained(student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """R²: share of the teacher's variance (per channel, over images and cells) that the student explains."""
    left = (student - teacher).square().mean()
    return 1 - left / teacher.var(dim=(0, 2, 3), correction=0).mean()
