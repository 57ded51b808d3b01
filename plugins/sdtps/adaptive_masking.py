"""Adaptive masking: the release's latest selection, which weighs tokens instead of dropping them.

No paper; the formulas are those of the release's head version. Axes: b batch, n patch tokens, c channels, g guides (own
modality first, then the others), m modalities.

    a_x  = softmax over n of (q(guide x) · k(v) / sqrt(c) + cos(v, guide x) / 0.3)     or a_x = cos(v, guide x)
    s    = sum over x of w_x sigmoid((a_x - mean) / (std + 1e-5)),   w = softmax(MLP(all guides, in the order of the modalities))
    mask = sigmoid((s - quantile_{1-rho}(s)) / 0.3)                                    out = mask · v

With the soft mask nothing is dropped: mask values lie around one half (0.26 to 0.83 with random tokens and untrained weights),
so a mean over the n output tokens shrinks every feature by about two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from core.options import require_choice, require_fraction, require_idle
from core.registry import register
from plugins.sdtps.multimodal import Enhanced, check_inputs
from plugins.sdtps.token_sparse import Rounding, attention_maps, gumbel_noise, normalise, token_count


class GuideAttention(nn.Module):
    """Logits of a single query, the guide, over the patch tokens: q·k/sqrt(c). Xavier weights, zero biases."""

    def __init__(self, dim: int):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for layer in (self.q_proj, self.k_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, guide: Float[Tensor, "b c"], patches: Float[Tensor, "b n c"]) -> Float[Tensor, "b n"]:
        return einsum(self.q_proj(guide), self.k_proj(patches), "b c, b n c -> b n") * patches.shape[-1] ** -0.5


class ModalityWeights(nn.Module):
    """Weights of the guides from all global features. They start equal: the last layer's weights and bias are zero."""

    def __init__(self, dim: int, modalities: int, hidden: tuple[int, int] = (256, 64), dropout: float = 0.1):
        super().__init__()
        wide, narrow = hidden
        self.modal_weight_mlp = nn.Sequential(
            nn.Linear(modalities * dim, wide), nn.LayerNorm(wide), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(wide, narrow), nn.GELU(), nn.Linear(narrow, modalities),
        )  # fmt: skip
        for parameter in self.modal_weight_mlp[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, guides: Float[Tensor, "b mc"]) -> Float[Tensor, "b m"]:
        return self.modal_weight_mlp(guides).softmax(-1)


@register("module", paper="SDTPS release, latest version")
class AdaptiveMasking(nn.Module):
    """Multiplies every patch token by a mask read off cross-attention and cosine maps. All n tokens stay.

    Args:
        dim: channels c of tokens and guides.
        num_patches: n, checked at every call.
        modalities: their names.
        sparse_ratio: rho: the mask passes one half at the (1 - rho) quantile of the scores; with `mask="hard"`, the share kept.
        maps: `attention` (one projection pair for every pair of modalities, cosine as a bias) or `cosine` (no parameters).
        share_attention: one projection pair for each modality's tokens, used with all its guides.
        mask: `soft` is the release's default. `hard` keeps the best ceil(rho n) and multiplies the others by 0; what scores
            the tokens then learns nothing, unless `use_gumbel` is on.
        use_gumbel: give the hard mask, in training, the straight-through gradient of sigmoid((s + g - 1/2)/gumbel_tau). The
            release's switch is dead with its soft mask; here it is refused there.
        gumbel_tau: temperature of that gradient.
        cosine_tau, mask_tau: the temperatures 0.3 in the formulas above.
        score_norm: `zscore` as above, `minmax` or `none`; see `token_sparse.normalise`.
        score_eps: its epsilon.
        dropout: inside the MLP of the weights.
        round_select: how rho·n becomes the number of kept tokens of a hard mask.

    Raises:
        ValueError: for a value out of range, or one that cannot take effect beside the others.
    """

    def __init__(
        self,
        dim: int = 512,
        num_patches: int = 128,
        modalities: tuple[str, ...] = ("rgb", "nir", "tir"),
        sparse_ratio: float = 0.7,
        *,
        maps: Literal["attention", "cosine"] = "attention",
        share_attention: bool = False,
        mask: Literal["soft", "hard"] = "soft",
        use_gumbel: bool = False,
        gumbel_tau: float = 1.0,
        cosine_tau: float = 0.3,
        mask_tau: float = 0.3,
        score_norm: Literal["minmax", "zscore", "none"] = "zscore",
        score_eps: float = 1e-5,
        dropout: float = 0.1,
        round_select: Literal["ceil", "floor", "exact_ceil", "exact_floor"] = "ceil",
    ):
        super().__init__()
        if len(modalities) < 2 or len(set(modalities)) < len(modalities):
            raise ValueError(f"modalities must be at least two different names, got {modalities}")
        require_fraction("sparse_ratio", sparse_ratio)
        require_choice("maps", maps, Literal["attention", "cosine"])
        require_choice("mask", mask, Literal["soft", "hard"])
        require_choice("score_norm", score_norm, Literal["minmax", "zscore", "none"])
        require_choice("round_select", round_select, Rounding)
        for name, positive in (("gumbel_tau", gumbel_tau), ("cosine_tau", cosine_tau), ("mask_tau", mask_tau)):
            if positive <= 0:
                raise ValueError(f"{name} must be positive, got {positive}")
        if maps == "cosine":
            idle: dict[str, object] = {"share_attention": share_attention, "cosine_tau": cosine_tau}
            require_idle(AdaptiveMasking, idle, "maps = 'cosine' has no attention")
        if not use_gumbel:
            require_idle(AdaptiveMasking, {"gumbel_tau": gumbel_tau}, "use_gumbel = False")
        if mask == "soft":
            idle = {"use_gumbel": use_gumbel, "round_select": round_select}
            require_idle(AdaptiveMasking, idle, "mask = 'soft' draws no noise and counts no tokens")
        else:
            require_idle(AdaptiveMasking, {"mask_tau": mask_tau}, "mask = 'hard' has no quantile")
        if score_norm == "none":
            require_idle(AdaptiveMasking, {"score_eps": score_eps}, "score_norm = 'none'")
        self.modalities, self.num_patches, self.sparse_ratio = tuple(modalities), num_patches, sparse_ratio
        self.maps, self.mask, self.score_norm, self.score_eps = maps, mask, score_norm, score_eps
        self.use_gumbel, self.gumbel_tau, self.cosine_tau, self.mask_tau = use_gumbel, gumbel_tau, cosine_tau, mask_tau
        self.share_attention, self.round_select = share_attention, round_select
        self.weights = nn.ModuleDict({name: ModalityWeights(dim, len(modalities), dropout=dropout) for name in modalities})
        self.attention = nn.ModuleDict()
        if maps == "attention":
            for name in modalities:
                for guide in [name] if share_attention else modalities:
                    self.attention[f"{name}_by_{guide}"] = GuideAttention(dim)

    @property
    def num_out(self) -> int:
        """Tokens a modality leaves with: all of them."""
        return self.num_patches

    def forward(
        self,
        patches: Mapping[str, Float[Tensor, "b n c"]],
        guides: Mapping[str, Float[Tensor, "b c"]],
        uniforms: Mapping[str, Float[Tensor, "b n"]] | None = None,
    ) -> Enhanced:
        """Mask.

        Args:
            patches: patch tokens by modality.
            guides: global features by modality.
            uniforms: draws from [0, 1) behind the Gumbel noise, by modality; drawn here if None.

        Raises:
            ValueError: if modalities or shapes do not fit.
        """
        check_inputs(self.modalities, self.num_patches, patches, guides, uniforms)
        together = torch.cat([guides[name] for name in self.modalities], -1)
        tokens, masks, kept = {}, {}, {}
        for name in self.modalities:
            order = [name, *(other for other in self.modalities if other != name)]
            maps = attention_maps(patches[name], torch.stack([guides[guide] for guide in order], 1))
            if self.maps == "attention":
                logits = [self._attention(name, guide)(guides[guide], patches[name]) for guide in order]
                maps = (torch.stack(logits, 1) + maps / self.cosine_tau).softmax(-1)
            maps = normalise(maps, self.score_norm, self.score_eps)  # float32 at least, as a quantile needs
            shares = rearrange(self.weights[name](together), "b g -> b g 1").to(maps.dtype)
            scores = reduce(shares * maps, "b g n -> b n", "sum")
            masks[name], kept[name] = self._mask(scores, None if uniforms is None else uniforms[name])
            tokens[name] = patches[name] * rearrange(masks[name], "b n -> b n 1").to(patches[name].dtype)
        return Enhanced(tokens, masks, kept)

    def _attention(self, name: str, guide: str) -> nn.Module:
        return self.attention[f"{name}_by_{name if self.share_attention else guide}"]

    def _mask(
        self, scores: Float[Tensor, "b n"], uniform: Float[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n"], Int[Tensor, "b k"]]:
        b, n = scores.shape
        if self.mask == "soft":
            threshold = torch.quantile(scores, 1 - self.sparse_ratio, dim=-1, keepdim=True)
            return ((scores - threshold) / self.mask_tau).sigmoid(), repeat(torch.arange(0, device=scores.device), "k -> b k", b=b)
        k = max(1, token_count(n, self.sparse_ratio, rounding=self.round_select))
        kept = scores.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]
        hard = torch.zeros_like(scores.detach()).scatter_(1, kept, 1.0)
        if not (self.use_gumbel and self.training):
            return hard, kept
        noise = gumbel_noise(torch.rand_like(hard) if uniform is None else uniform, 1e-9, None)
        soft = ((scores + noise - 0.5) / self.gumbel_tau).sigmoid()
        return hard + (soft - soft.detach()), kept


class AdaptiveMaskingKeys:
    """Our state-dict keys in the release: `weights.rgb.x` is `rgb_sparse.x`, `attention.rgb_by_nir.x` is `rgb_cross_nir.x`.

    Args:
        prefix: as in `ReferenceKeys`.
    """

    def __init__(self, prefix: str = ""):
        self.prefix = prefix

    def to_reference(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for key, value in ours.items():
            role, owner, rest = key.split(".", 2)
            if role == "attention":
                modality, guide = owner.split("_by_")
                owner = f"{modality}_self_attn" if modality == guide else f"{modality}_cross_{guide}"
            else:
                owner = f"{owner}_sparse"
            renamed[f"{self.prefix}{owner}.{rest}"] = value
        return renamed

    def from_reference(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for key, value in theirs.items():
            if not key.startswith(self.prefix):
                continue
            owner, rest = key[len(self.prefix) :].split(".", 1)
            if owner.endswith("_sparse"):
                renamed[f"weights.{owner.removesuffix('_sparse')}.{rest}"] = value
            elif owner.endswith("_self_attn"):
                modality = owner.removesuffix("_self_attn")
                renamed[f"attention.{modality}_by_{modality}.{rest}"] = value
            else:
                modality, guide = owner.split("_cross_")
                renamed[f"attention.{modality}_by_{guide}.{rest}"] = value
        return renamed
