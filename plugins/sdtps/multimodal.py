"""SDTPS over several modalities: each keeps the tokens that its own and the other modalities' global features point at.

SEPS, sec. 3 (eq. 1-4), with the two captions replaced by two further spectra (RGB, NIR, TIR). Axes: b batch, n patch tokens,
k kept tokens, t output tokens, c channels, g guides.

    128 patches -> 64 kept -> 25 aggregated + 1 extra, at the default ratios, for each modality

SDTPS stands after the backbone: it shortens what the head reads, and adds to the cost of the whole network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from core.options import require_choice, require_idle
from core.profile import TokenReport
from core.registry import register
from plugins.sdtps.fused import COMBINER, PREDICTOR, CosineMaps, SelectAndAggregate, Settings, consists_of, fusable, listened
from plugins.sdtps.token_aggregation import TokenAggregation
from plugins.sdtps.token_sparse import Selection, Similarity, TokenSparse, attention_maps, select


@dataclasses.dataclass(frozen=True)
class Enhanced:
    """What each modality's tokens became, by modality name.

    Attributes:
        tokens: (b, t, c) aggregated tokens with the extra token last.
        masks: (b, n) the decision matrix D over the patches.
        kept: (b, k) positions of the kept patches, best first; empty where a soft mask keeps all of them.
        soft: (b, n) the relaxation behind the mask, for a ratio constraint; no entries where the mask is a constant, or where the
            module gives none.
    """

    tokens: dict[str, Float[Tensor, "b t c"]]
    masks: dict[str, Float[Tensor, "b n"]]
    kept: dict[str, Int[Tensor, "b k"]]
    soft: dict[str, Float[Tensor, "b n"]] = dataclasses.field(default_factory=dict)


def check_inputs(
    modalities: tuple[str, ...],
    num_patches: int,
    patches: Mapping[str, Tensor],
    guides: Mapping[str, Tensor] | None,
    uniforms: Mapping[str, Tensor] | None,
) -> None:
    """ValueError unless each names exactly the modalities and the shapes fit: (b, num_patches, c), (b, c), (b, num_patches)."""
    for role, given in (("patches", patches), ("guides", guides), ("uniforms", uniforms)):
        if given is not None and set(given) != set(modalities):
            raise ValueError(f"{role} are given for {', '.join(given)}; this module was built for {', '.join(modalities)}")
    for name, tokens in patches.items():
        if tokens.shape[1] != num_patches:
            raise ValueError(
                f"{name} has {tokens.shape[1]} patch tokens (shape {tuple(tokens.shape)}), and this module was built for "
                f"num_patches = {num_patches}; take the number from the backbone's output, not from the image size"
            )
    b, _, c = patches[modalities[0]].shape
    wanted = {"patches": (patches, (b, num_patches, c)), "guides": (guides, (b, c)), "uniforms": (uniforms, (b, num_patches))}
    for role, (given, shape) in wanted.items():
        for name, tensor in (given or {}).items():
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{role} of {name} have shape {tuple(tensor.shape)}; beside {modalities[0]}'s patches of shape {(b, num_patches, c)} "
                    f"they must have {shape}"
                )


@register("module", paper="SEPS, sec. 3", equations="eq. 1-4")
class MultiModalSDTPS(nn.Module):
    """Token selection and aggregation for every modality, each guided by all of them. No parameters are shared.

    Args:
        dim: channels c of tokens and guides.
        num_patches: n, tokens of a modality; taken from the backbone, checked at every call.
        modalities: their names; outputs and parameters are filed under them.
        sparse: constructor of the selection, called with `dim`.
        aggregate: constructor of the aggregation, called with `dim`, `num_patches` and the selection's `sparse_ratio`;
            None passes the kept tokens on.
        guide: what the attention maps compare tokens with: the `global` features given to `forward`, or the `mean_patch`,
            the mean of a modality's own tokens (SEPS), which lives in the tokens' own space.
        similarity: `cosine`, or `dot`: the product over c, as SEPS's paper writes it.
        attention_no_grad: compute the attention maps without gradient, so that guides learn nothing from the selection.
        selection_no_grad: compute the whole selection without gradient, as the copy of SEPS's released code does: what the tokens
            become then teaches the aggregation, and neither the patches nor the guides. There must be nothing to learn in it.
        fused: train through `SelectAndAggregate` where the settings allow: equal numbers in less time and memory, no second
            derivative. False always composes the parts.

    Raises:
        ValueError: if fewer than two modalities are named, one is named twice, an aggregation is to follow a selection that keeps
            all tokens in place, or an option could not take effect beside the others.
    """

    def __init__(
        self,
        dim: int = 512,
        num_patches: int = 128,
        modalities: tuple[str, ...] = ("rgb", "nir", "tir"),
        *,
        sparse: Callable[..., nn.Module] = TokenSparse,
        aggregate: Callable[..., nn.Module] | None = TokenAggregation,
        guide: Literal["global", "mean_patch"] = "global",
        similarity: Literal["cosine", "dot"] = "cosine",
        attention_no_grad: bool = True,
        selection_no_grad: bool = False,
        fused: bool = True,
    ):
        super().__init__()
        if len(modalities) < 2 or len(set(modalities)) < len(modalities):
            raise ValueError(f"modalities must be at least two different names, got {modalities}")
        require_choice("guide", guide, Literal["global", "mean_patch"])
        require_choice("similarity", similarity, Similarity)
        self.modalities, self.num_patches = tuple(modalities), num_patches
        self.guide, self.attention_no_grad, self.selection_no_grad, self.fused = guide, attention_no_grad, selection_no_grad, fused
        self.similarity: Similarity = similarity
        self.sparse = nn.ModuleDict({name: sparse(dim=dim) for name in self.modalities})
        first = self.selectors[0]
        if selection_no_grad:
            idle = {"attention_no_grad": attention_no_grad}
            require_idle(MultiModalSDTPS, idle, "selection_no_grad = True leaves the selection no gradient at all")
            if first.score_predictor is not None or first.use_gumbel or first.selection == "relaxed":
                raise ValueError(
                    "selection_no_grad = True, but the selection is to learn (score = 'combined', use_gumbel or selection = 'relaxed'); set "
                    "TokenSparse.score = 'sum' or 'mean', use_gumbel = False and selection = 'hard' or 'in_place', or leave selection_no_grad False"
                )
        if aggregate is not None and first.selection == "in_place":
            raise ValueError("selection = 'in_place' keeps all tokens, dropped ones as zeros; set MultiModalSDTPS.aggregate = None")
        self.aggregate = None
        if aggregate is not None:
            ratio = first.sparse_ratio
            self.aggregate = nn.ModuleDict(
                {name: aggregate(dim=dim, num_patches=num_patches, sparse_ratio=ratio) for name in self.modalities}
            )

    @property
    def selectors(self) -> list[TokenSparse]:
        return [cast(TokenSparse, self.sparse[name]) for name in self.modalities]

    @property
    def num_out(self) -> int:
        """Tokens a modality leaves with, the extra token included."""
        first = self.selectors[0]
        extra = int(first.extra_mode != "none")
        if self.aggregate is not None:
            return cast(TokenAggregation, self.aggregate[self.modalities[0]]).num_out + extra
        return self.num_patches if first.selection == "in_place" else first.kept_count(self.num_patches) + extra

    def token_report(self) -> TokenReport:
        """Tokens of a modality, stage by stage. `in_place` masks: its dropped tokens are zeroed and still there."""
        first = self.selectors[0]
        kept = first.kept_count(self.num_patches)
        stages = [("patches", self.num_patches), ("kept", kept)]
        if self.aggregate is not None:
            stages.append(("aggregated", cast(TokenAggregation, self.aggregate[self.modalities[0]]).num_out))
        if first.extra_mode != "none":
            stages.append(("with extra", self.num_out))
        return TokenReport(stages, masked=first.selection == "in_place")

    def forward(
        self,
        patches: Mapping[str, Float[Tensor, "b n c"]],
        guides: Mapping[str, Float[Tensor, "b c"]] | None = None,
        uniforms: Mapping[str, Float[Tensor, "b n"]] | None = None,
    ) -> Enhanced:
        """Select and aggregate.

        Args:
            patches: patch tokens by modality.
            guides: global features by modality; not needed, and ignored, with `guide="mean_patch"`.
            uniforms: draws from [0, 1) behind the Gumbel noise, by modality; drawn here if None.

        Raises:
            ValueError: if modalities or shapes do not fit, or guides are missing.
        """
        check_inputs(self.modalities, self.num_patches, patches, None if self.guide == "mean_patch" else guides, uniforms)
        maps = self.attention(patches, guides)
        fused = self._fused(patches, maps) if uniforms is None else None
        if fused is not None:
            return fused
        tokens, masks, kept, soft = {}, {}, {}, {}
        for name, selection in self._choose(patches, maps, uniforms).items():
            tokens[name], masks[name], kept[name] = selection.tokens, selection.mask, selection.kept
            if selection.soft is not None:
                soft[name] = selection.soft
            if self.aggregate is not None:
                tokens[name] = self.aggregate[name](tokens[name], selection.kept_mask)
            if selection.extra is not None:
                tokens[name] = torch.cat([tokens[name], selection.extra], 1)
        return Enhanced(tokens, masks, kept, soft)

    def attention(
        self, patches: Mapping[str, Float[Tensor, "b n c"]], guides: Mapping[str, Float[Tensor, "b c"]] | None = None
    ) -> dict[str, Float[Tensor, "b g n"]]:
        """Attention maps of each modality's tokens: own guide first, then the others' in the order of the modalities."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.attention_no_grad):
            if self.guide == "mean_patch":
                guides = {name: patches[name].mean(1) for name in self.modalities}
            if guides is None:
                raise ValueError("guides are needed with guide = 'global': one (b, c) feature for each modality")
            maps = {}
            for name in self.modalities:
                order = [name, *(other for other in self.modalities if other != name)]
                own = torch.stack([guides[g] for g in order], 1)
                if self.fused and self.similarity == "cosine" and fusable([patches[name], own], []):
                    maps[name] = CosineMaps.apply(patches[name], F.normalize(own, dim=-1))
                else:
                    maps[name] = attention_maps(patches[name], own, self.similarity)
        return maps

    def choose(
        self,
        patches: Mapping[str, Float[Tensor, "b n c"]],
        guides: Mapping[str, Float[Tensor, "b c"]] | None = None,
        uniforms: Mapping[str, Float[Tensor, "b n"]] | None = None,
    ) -> dict[str, Selection]:
        """The first half of `forward`: what is kept of each modality, before aggregation. Arguments as there."""
        return self._choose(patches, self.attention(patches, guides), uniforms)

    def _choose(
        self,
        patches: Mapping[str, Float[Tensor, "b n c"]],
        maps: Mapping[str, Float[Tensor, "b g n"]],
        uniforms: Mapping[str, Float[Tensor, "b n"]] | None,
    ) -> dict[str, Selection]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.selection_no_grad):
            return self._select(patches, maps, uniforms)

    def _select(
        self,
        patches: Mapping[str, Float[Tensor, "b n c"]],
        maps: Mapping[str, Float[Tensor, "b g n"]],
        uniforms: Mapping[str, Float[Tensor, "b n"]] | None,
    ) -> dict[str, Selection]:
        names = self.modalities
        draws = None if uniforms is None else [uniforms[name] for name in names]
        if any(type(s).forward is not TokenSparse.forward or listened(s) for s in self.selectors):  # each is called, as it expects
            if draws is None and self.selectors[0].noisy:  # one draw for all of them, as below, so that a hook changes no number
                attended = self.selectors[0].attend(torch.cat([maps[m] for m in names])).detach()
                draws = list(torch.rand_like(attended).chunk(len(names)))
            return {m: self.sparse[m](patches[m], maps[m], None if draws is None else draws[i]) for i, m in enumerate(names)}
        return dict(zip(names, select(self.selectors, [patches[m] for m in names], [maps[m] for m in names], draws)))

    def _fused(self, patches: Mapping[str, Float[Tensor, "b n c"]], maps: Mapping[str, Float[Tensor, "b g n"]]) -> Enhanced | None:
        """The whole step with its hand-written gradient; None where the settings or the circumstances rule it out."""
        selectors, first = self.selectors, self.selectors[0]
        if (
            not self.fused
            or self.selection_no_grad
            or self.aggregate is None
            or not first.hard
            or first.pooling != "softmax"
            or first.score != "combined"
        ):
            return None
        aggregators = [cast(TokenAggregation, self.aggregate[name]) for name in self.modalities]
        if any(type(s).forward is not TokenSparse.forward for s in selectors) or any(
            type(a).forward is not TokenAggregation.forward for a in aggregators
        ):
            return None
        if not all(consists_of(s.score_predictor, PREDICTOR) for s in selectors) or not all(
            consists_of(a.weight, COMBINER) and a.scale.shape == (1, 1, 1) and a.layers[0].eps == aggregators[0].layers[0].eps
            for a in aggregators
        ):
            return None
        if any(listened(part) for own in (*selectors, *aggregators) for part in own.modules()):
            return None
        tokens, seen = [patches[name] for name in self.modalities], [maps[name] for name in self.modalities]
        layers = [(*s.linears, *a.layers) for s, a in zip(selectors, aggregators)]
        if not fusable([*tokens, *seen, layers[0][0].weight], [layer for own in layers for layer in own]):
            return None

        weights = []
        for own, aggregator in zip(layers, aggregators):
            for layer in own:
                weights += [layer.weight, layer.bias]
            weights.append(aggregator.scale)
        k, b = first.kept_count(self.num_patches), tokens[0].shape[0]
        settings = Settings(len(tokens), k, 1 - 2 * first.beta, first.extra_tau, layers[0][2].eps)
        *outputs, mask, order = SelectAndAggregate.apply(settings, first.attend(torch.cat(seen)), *tokens, *weights)
        by_name = dict(zip(self.modalities, outputs))
        masks, kept = dict(zip(self.modalities, mask.split(b))), dict(zip(self.modalities, order[:, :k].split(b)))
        return Enhanced(by_name, masks, kept)

    @torch.no_grad()
    def train_evaluation_gap(
        self, patches: Mapping[str, Float[Tensor, "b n c"]], guides: Mapping[str, Float[Tensor, "b c"]] | None = None
    ) -> dict[str, Tensor]:
        """How far the output in training mode is from that in evaluation mode on the same input, by modality.

        |train - eval| / |eval|, Euclidean over all output tokens. 0 for a selection that is hard in both modes; not 0 for
        `selection="relaxed"` and `extra_mode="uniform_in_training"`. Gumbel noise is drawn as in training.
        """
        mode = self.training
        try:
            soft, hard = self.train()(patches, guides), self.eval()(patches, guides)
        finally:
            self.train(mode)
        return {m: (soft.tokens[m] - hard.tokens[m]).norm() / hard.tokens[m].norm() for m in self.modalities}


class ReferenceKeys:
    """Our state-dict keys in the release: `sparse.rgb.x` is `rgb_sparse.x`, `aggregate.rgb.x` is `rgb_aggr.x`.

    Args:
        prefix: what stands before them in a checkpoint of the whole model: `sdtps.` there, nothing in one of the module.
            Keys of a checkpoint that do not begin with it are left out by `from_reference`.
    """

    def __init__(self, prefix: str = ""):
        self.prefix = prefix

    def to_reference(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for key, value in ours.items():
            role, modality, rest = key.split(".", 2)
            renamed[f"{self.prefix}{modality}_{'sparse' if role == 'sparse' else 'aggr'}.{rest}"] = value
        return renamed

    def from_reference(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for key, value in theirs.items():
            if key.startswith(self.prefix):
                part, rest = key[len(self.prefix) :].split(".", 1)
                modality, role = part.rsplit("_", 1)
                renamed[f"{'sparse' if role == 'sparse' else 'aggregate'}.{modality}.{rest}"] = value
        return renamed
