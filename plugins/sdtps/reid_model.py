"""The tri-modal re-identification network: one shared tower, PIFE, a token module, BNNeck heads.

DeMo (Wang et al., AAAI 2025) with SDTPS in the place of its decoupling and mixture-of-experts head, as the design notes and the
fork have it: tower -> (class, patches) a modality -> PIFE -> token module -> mean over tokens -> concatenation -> heads.

Axes: b batch, n patch tokens, t tokens the token module leaves, c tower output width, m modality.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, cast

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from core.distributed import gather
from core.layers import QuickGELU
from core.options import require_idle
from core.registry import register
from plugins.sdtps import clip_vit, multimodal
from plugins.sdtps.adaptive_masking import AdaptiveMaskingKeys
from plugins.sdtps.clip_vit import CLIPVisionTransformer
from plugins.sdtps.multimodal import MultiModalSDTPS

MODALITIES = ("rgb", "nir", "tir")


@dataclasses.dataclass(frozen=True)
class ReIDOutput:
    """What the network gives for a batch.

    Attributes:
        features: (b, d) before the neck, by branch: `ori` or, without a direct head, `ori_rgb` …; and `sdtps`.
        scores: (b, identities) by branch, in training mode only. Both are of the global batch there.
        masks: (b, n) decision matrix of the token module, by modality; empty where there is none.
        soft: (b, n) the relaxation behind the masks, with gradient; empty where they carry none. Of the process's own samples.
    """

    features: dict[str, Float[Tensor, "b d"]]
    scores: dict[str, Float[Tensor, "b p"]]
    masks: dict[str, Float[Tensor, "b n"]]
    soft: dict[str, Float[Tensor, "b n"]] = dataclasses.field(default_factory=dict)


@register("module", paper="DeMo, AAAI 2025, sec. 3.2 (PIFE)")
class PatchIntegrated(nn.Module):
    """PIFE: g ← QuickGELU(W · LayerNorm([g, mean of patches])), for one modality.

    Args:
        dim: width c of class token and patches.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(2 * dim)
        self.reduce = nn.Linear(2 * dim, dim)
        self.act = QuickGELU()

    def forward(self, cls: Float[Tensor, "b c"], patches: Float[Tensor, "b n c"]) -> Float[Tensor, "b c"]:
        local = reduce(patches, "b n c -> b c", "mean")
        return self.act(self.reduce(self.norm(torch.cat([cls, local], -1))))


class BNNeckHead(nn.Module):
    """Batch norm without a trained shift, then a bias-free classifier (Luo et al., CVPRW 2019, sec. 3.5).

    The metric loss sees what enters the norm, the classification loss what leaves it.

    Args:
        dim: width of the feature.
        identities: classes.
    """

    def __init__(self, dim: int, identities: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.norm.bias.requires_grad_(False)
        self.classify = nn.Linear(dim, identities, bias=False)
        nn.init.normal_(self.classify.weight, std=0.001)

    def forward(self, feature: Float[Tensor, "b d"]) -> Float[Tensor, "b p"]:
        return self.classify(self.norm(feature))


def mean_over_tokens(tokens: Float[Tensor, "b t c"], masked: bool) -> Float[Tensor, "b c"]:
    """Mean over tokens; with `masked`, over those that are not all zero, so that dropped tokens do not shrink the feature."""
    if not masked:
        return reduce(tokens, "b t c -> b c", "mean")
    present = (tokens != 0).any(-1, keepdim=True).to(tokens.dtype)
    return (tokens * present).sum(1) / present.sum(1).clamp(min=1)


@register("model", paper="DeMo, AAAI 2025; SDTPS final note")
class TriModalReID(nn.Module):
    """RGB, NIR and TIR images of a person or vehicle to features and identity scores.

    Args:
        identities: training identities.
        cameras: training cameras, for the tower's camera embedding.
        backbone: constructor of the tower, called with `cameras=`.
        inside: constructor of a token module that works inside the tower, called as `tokens` is but with the tower's width; the
            blocks after it see only what it leaves, so that compute really falls. Class tokens guide it. None is off.
        inside_after: how many blocks run before it.
        tokens: constructor of the token module, called with `dim=, num_patches=, modalities=`; None leaves the baseline.
        pife: integrate patches into the global features before anything else uses them.
        guide: what guides the token module: the `pife` global features, or the raw `cls` tokens.
        direct: one head over the concatenated global features; False has a head a modality.
        masked_mean: the mean over tokens leaves out all-zero tokens.
        missing_guide: whether a missing modality (all its input zero) still guides the others: `keep` as the release does,
            `drop` replaces its guide by the mean of those present, for the token module and for the one inside the tower.

    Raises:
        ValueError: for a value out of range, or an option that could not take effect beside the others.
    """

    def __init__(
        self,
        identities: int,
        cameras: int,
        *,
        backbone: Callable[..., nn.Module] = CLIPVisionTransformer,
        inside: Callable[..., nn.Module] | None = None,
        inside_after: int = 1,
        tokens: Callable[..., nn.Module] | None = MultiModalSDTPS,
        pife: bool = True,
        guide: Literal["pife", "cls"] = "pife",
        direct: bool = True,
        masked_mean: bool = True,
        missing_guide: Literal["keep", "drop"] = "keep",
    ):
        super().__init__()
        if tokens is not None and guide == "pife" and not pife:
            raise ValueError("guide is 'pife', but pife is False; set guide = 'cls'")
        if tokens is None:
            idle = {"masked_mean": masked_mean} | ({"guide": guide} if pife else {})
            require_idle(TriModalReID, idle, "there is no token module (tokens = None)")
        if inside is None:
            require_idle(TriModalReID, {"inside_after": inside_after}, "there is no token module inside the tower (inside = None)")
        self.guide, self.direct, self.masked_mean, self.missing_guide = guide, direct, masked_mean, missing_guide
        self.backbone = backbone(cameras=cameras)
        tower = cast(CLIPVisionTransformer, self.backbone)
        dim, patches = tower.output_dim, tower.num_patches
        self.inside: nn.Module | None = None
        self.inside_after = inside_after
        if inside is not None:
            depth = len(tower.blocks)
            if not 0 <= inside_after < depth:
                raise ValueError(
                    f"inside_after must leave a block to run: 0 to {depth - 1} for a tower of {depth}, got {inside_after}"
                )
            self.inside = inside(dim=tower.width, num_patches=patches, modalities=MODALITIES)
            patches = int(cast(MultiModalSDTPS, self.inside).num_out)
        self.pife = nn.ModuleDict({m: PatchIntegrated(dim) for m in MODALITIES}) if pife else None
        self.tokens = tokens(dim=dim, num_patches=patches, modalities=MODALITIES) if tokens is not None else None
        parts = [part for part in (self.tokens, self.inside) if part is not None]
        guided = [part for part in parts if getattr(part, "guide", "global") == "global"]
        if not guided:
            why = "no token module takes a guide (none, or guide = 'mean_patch')"
            require_idle(TriModalReID, {"missing_guide": missing_guide}, why)
        if self.tokens is not None and self.tokens not in guided:
            require_idle(TriModalReID, {"guide": guide} if pife else {}, "the token module's own guide is 'mean_patch'")
        self.heads = nn.ModuleDict()
        if direct:
            self.heads["ori"] = BNNeckHead(3 * dim, identities)
        else:
            for m in MODALITIES:
                self.heads[f"ori_{m}"] = BNNeckHead(dim, identities)
        if self.tokens is not None:
            self.heads["sdtps"] = BNNeckHead(3 * dim, identities)

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the features that `forward` gives."""
        return tuple(self.heads)

    def forward(self, images: Mapping[str, Float[Tensor, "b 3 h w"]], cameras: Int[Tensor, "b"] | None = None) -> ReIDOutput:
        """One pass of the tower over the three modalities stacked, then each step by modality.

        Args:
            images: normalised images by modality.
            cameras: training camera of each image, for the tower's embedding; None where it has none.
        """
        stacked = torch.cat([images[m] for m in MODALITIES])
        every = None if cameras is None else cameras.repeat(len(MODALITIES))
        masks: dict[str, Tensor] = {}
        soft: dict[str, Tensor] = {}
        if self.inside is None:
            out = self.backbone(stacked, every)
        else:
            out, masks, soft = self._pruned(stacked, every, images)
        tokens = rearrange(out, "(m b) n c -> m b n c", m=len(MODALITIES))
        cls = {m: tokens[i, :, 0] for i, m in enumerate(MODALITIES)}
        patches = {m: tokens[i, :, 1:] for i, m in enumerate(MODALITIES)}
        glob = {m: self.pife[m](cls[m], patches[m]) for m in MODALITIES} if self.pife is not None else cls
        if self.direct:
            features = {"ori": torch.cat([glob[m] for m in MODALITIES], -1)}
        else:
            features = {f"ori_{m}": glob[m] for m in MODALITIES}
        if self.tokens is not None:
            guides = self._present(glob if self.guide == "pife" else cls, images)
            enhanced = self.tokens(patches, guides)
            masks, soft = masks or enhanced.masks, soft or getattr(enhanced, "soft", {})  # a module of one's own may have none
            features["sdtps"] = torch.cat([mean_over_tokens(enhanced.tokens[m], self.masked_mean) for m in MODALITIES], -1)
        if not self.training:
            return ReIDOutput(features, {}, masks, soft)
        # The norm and the losses couple the samples of a batch: they see the whole of it, whatever the number of processes.
        features = {name: gather(feature) for name, feature in features.items()}
        return ReIDOutput(features, {name: self.heads[name](feature) for name, feature in features.items()}, masks, soft)

    def _pruned(
        self, stacked: Tensor, cameras: Tensor | None, images: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The tower with its tokens reduced after `inside_after` blocks, and the masks over the patches, decided and soft."""
        tower = cast(CLIPVisionTransformer, self.backbone)
        hidden = tower.run(tower.embed(stacked, tower.camera_shift(cameras)), 0, self.inside_after)
        by_modality = rearrange(hidden, "(m b) n c -> m b n c", m=len(MODALITIES))
        patches = {m: by_modality[i, :, 1:] for i, m in enumerate(MODALITIES)}
        cls = {m: by_modality[i, :, 0] for i, m in enumerate(MODALITIES)}
        assert self.inside is not None
        reduced = self.inside(patches, self._present(cls, images))
        left = torch.cat([torch.cat([cls[m][:, None], reduced.tokens[m]], 1) for m in MODALITIES])
        return tower.project(tower.run(left, self.inside_after, None)), reduced.masks, getattr(reduced, "soft", {})

    def _present(self, guides: dict[str, Tensor], images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.missing_guide == "keep":
            return guides
        there = torch.stack([(images[m] != 0).flatten(1).any(1) for m in MODALITIES])  # (m, b)
        weight = rearrange(there.to(guides["rgb"].dtype), "m b -> m b 1")
        mean = sum(guides[m] * weight[i] for i, m in enumerate(MODALITIES)) / weight.sum(0).clamp(min=1)
        return {m: torch.where(weight[i].bool(), guides[m], mean) for i, m in enumerate(MODALITIES)}


def pattern(features: Mapping[str, Tensor], which: Literal["ori", "branch", "both"]) -> Tensor:
    """The evaluated descriptor: the heads of the backbone, the token branch, or both concatenated (b, d).

    Raises:
        ValueError: if there is no token branch and `which` asks for it.
    """
    ori = [v for k, v in features.items() if k.startswith("ori")]
    branch = [v for k, v in features.items() if not k.startswith("ori")]
    if which == "ori":
        return torch.cat(ori, -1)
    if not branch:
        raise ValueError(f"evaluation pattern {which!r} needs a token branch, and the model has none; use 'ori'")
    return torch.cat(branch if which == "branch" else ori + branch, -1)


# --- names in released checkpoints ----------------------------------------------------------------------------------

_PARTS: tuple[tuple[str, str], ...] = (  # (ours, theirs): beginnings of keys outside the tower and the token module
    *((f"pife.{m}.norm.", f"{m}_reduce.0.") for m in MODALITIES),
    *((f"pife.{m}.reduce.", f"{m}_reduce.1.") for m in MODALITIES),
    *((f"heads.ori_{m}.norm.", f"bottleneck_{m[0]}.") for m in MODALITIES),
    *((f"heads.ori_{m}.classify.", f"classifier_{m[0]}.") for m in MODALITIES),
    ("heads.ori.norm.", "bottleneck."),
    ("heads.ori.classify.", "classifier."),
    ("heads.sdtps.norm.", "bottleneck_sdtps."),
    ("heads.sdtps.classify.", "classifier_sdtps."),
)


class ReferenceKeys:
    """The whole network's state-dict keys in DeMo's naming, and in that of the fork which put SDTPS into it.

    `backbone.…` is `BACKBONE.base.…` in OpenAI's naming (the camera embedding `BACKBONE.cv_embed`), `pife.rgb` is `rgb_reduce`, heads
    are `bottleneck…` and `classifier…`, and the token module stands under `sdtps.`. Keys of none of these are passed on as they
    are, so that a strict load names them.

    Args:
        tokens: naming of the token module, with prefix `sdtps.`; None is the tri-modal module's.
    """

    def __init__(self, tokens: multimodal.ReferenceKeys | AdaptiveMaskingKeys | None = None):
        self.tower = clip_vit.ReferenceKeys()
        self.tokens = multimodal.ReferenceKeys("sdtps.") if tokens is None else tokens

    def to_reference(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key, value in self.tower.to_reference(_below(ours, "backbone.")).items():
            found[f"BACKBONE.{key}" if key == "cv_embed" else f"BACKBONE.base.{key}"] = value
        found.update(self.tokens.to_reference(_below(ours, "tokens.")))
        rest = {k: v for k, v in ours.items() if not k.startswith(("backbone.", "tokens."))}
        return found | _replaced(rest, _PARTS)

    def from_reference(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tower = _below(theirs, "BACKBONE.base.") | {k: v for k, v in _below(theirs, "BACKBONE.").items() if k == "cv_embed"}
        found = {f"backbone.{k}": v for k, v in self.tower.from_reference(tower).items()}
        module = {k: v for k, v in theirs.items() if k.startswith("sdtps.")}
        found.update({f"tokens.{k}": v for k, v in self.tokens.from_reference(module).items()})
        rest = {k: v for k, v in theirs.items() if k != "BACKBONE.cv_embed" and not k.startswith(("BACKBONE.base.", "sdtps."))}
        return found | _replaced(rest, tuple((b, a) for a, b in _PARTS))


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _replaced(state: Mapping[str, Tensor], pairs: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        old, new = next((pair for pair in pairs if key.startswith(pair[0])), ("", ""))
        renamed[new + key.removeprefix(old)] = value
    return renamed
