"""Token selection of SDTPS: score every patch token, keep the best, pool the rest into one extra token.

SEPS, sec. 3 (eq. 1-3), as carried over to RGB/NIR/TIR re-identification by the SDTPS notes. Axes: b batch, n patch tokens,
k kept tokens, d dropped tokens, c channels, g guides (the token's own modality first, then the others), m modalities.

    s_p = sigmoid(W2 gelu(W1 v + b1) + b2)                                                eq. 1
    s_x = (a_x - min a_x) / (max a_x - min a_x + eps)      a_x = cos(v, guide x), over n  eq. 2
    s   = (1 - 2 beta) s_p + beta (sum over other modalities of s_x + 2 s_own)            eq. 3

The k = ceil(rho n) best tokens are kept; extra = sum over the dropped of softmax(s / extra_tau) v.

Two things a reader should know before changing an option (measured figures: README of this plugin):

* With a hard mask the predictor is trained through the extra token only; what it says of kept tokens has no gradient.
* `use_gumbel` makes the *mask* differentiable (straight-through); it reaches the loss only if something reads the mask:
  `TokenAggregation.mask_mode`, `weight_selected`, or `ReID.ratio_weight`. Else it changes nothing, as in the released code of SEPS.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, cast

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from core.options import require_choice, require_fraction, require_idle
from core.registry import register

Rounding = Literal["ceil", "floor", "exact_ceil", "exact_floor"]
Similarity = Literal["cosine", "dot"]
ScoreNorm = Literal["minmax", "zscore", "none"]
Suppression = Literal["hard", "soft"]


# --- options --------------------------------------------------------------------------------------------------------


def token_count(tokens: int, *ratios: float, rounding: Rounding) -> int:
    """`tokens` times the ratios, as a whole number of tokens.

    `ceil` and `floor` multiply floats from left to right, as the release does, and inherit their errors: ceil(100 * 0.55)
    is 56 (100 * 0.55 = 55.00000000000001) and floor(200 * 0.9 * 0.7) is 125 (125.99999999999999). `exact_ceil` and
    `exact_floor` take the ratios as the decimal numbers they were written as: 55 and 126.
    """
    if rounding.startswith("exact"):
        exact = math.prod((Fraction(repr(float(ratio))) for ratio in ratios), start=Fraction(tokens))
        return math.ceil(exact) if rounding == "exact_ceil" else math.floor(exact)
    product: float = tokens
    for ratio in ratios:
        product *= ratio
    return math.ceil(product) if rounding == "ceil" else math.floor(product)


# --- scores ---------------------------------------------------------------------------------------------------------


def attention_maps(
    patches: Float[Tensor, "b n c"], guides: Float[Tensor, "b g c"], similarity: Similarity = "cosine"
) -> Float[Tensor, "b g n"]:
    """How much each patch token resembles each guide.

    `cosine`: <v/max(|v|, 1e-12), w/max(|w|, 1e-12)>, in [-1, 1]. The norms divide the products, not the tokens, so no
    normalised copy of the tokens exists. `dot`: <v, w>/c, as SEPS's paper writes it.
    """
    if similarity == "dot":
        return rearrange(patches @ rearrange(guides, "b g c -> b c g"), "b n g -> b g n") / patches.shape[-1]
    directions = F.normalize(guides, dim=-1)
    products = patches @ rearrange(directions, "b g c -> b c g")
    lengths = torch.linalg.vector_norm(patches, dim=-1, keepdim=True).clamp_min(1e-12)
    return rearrange(products / lengths, "b n g -> b g n")


def normalise(maps: Float[Tensor, "*axes n"], how: ScoreNorm, eps: float) -> Float[Tensor, "*axes n"]:
    """Bring maps to a common range over the tokens of a sample. Half precision is widened: eps would vanish in it.

    `minmax`: (a - min)/(max - min + eps), eq. 2; a constant map gives 0. `zscore`: sigmoid((a - mean)/(std + eps)), with the
    sample standard deviation; a constant map gives 1/2. `none`: as it is.
    """
    maps = maps.float() if maps.dtype in (torch.float16, torch.bfloat16) else maps
    if how == "minmax":
        low, high = maps.aminmax(dim=-1, keepdim=True)
        return (maps - low) / (high - low + eps)
    if how == "zscore":
        spread = maps.std(-1, keepdim=True) if maps.shape[-1] > 1 else torch.zeros_like(maps)
        return ((maps - maps.mean(-1, keepdim=True)) / (spread + eps)).sigmoid()
    return maps


def gumbel_noise(uniform: Float[Tensor, "b n"], eps: float, clip: float | None) -> Float[Tensor, "b n"]:
    """-log(-log(U + eps) + eps), clipped to [-clip, clip]. In float32 and with eps = 1e-9 it stays within [-3.04, 16.7]."""
    noise = -torch.log(-torch.log(uniform + eps) + eps)
    return noise if clip is None else noise.clamp(-clip, clip)


def relaxed_topk(
    scores: Float[Tensor, "b n"], k: int, tau: float, suppression: Suppression = "hard"
) -> tuple[Float[Tensor, "b k n"], Float[Tensor, "b n"]]:
    """A differentiable top-K: k rows over n tokens, softmax after softmax, each with what came before it suppressed.

    `hard`: row j is softmax(s/tau) over all tokens but the j - 1 best, i.e. the chance of each to be drawn j-th if the best
    were drawn before it (Plackett-Luce). As tau goes to 0 it becomes one-hot at the j-th best token, so that `rows @ tokens`
    tends to the hard selection, best first, and steadily: the smaller tau, the nearer.

    `soft`: row j is softmax((s + log r_j)/tau), where r_j is the product of 1 - p over the rows before (Xie & Ermon, IJCAI
    2019). Nothing in it is discrete, but it needs scores far further apart than tau: among 128 scores within a range of one, each row takes
    from every token's neighbours too, and their mean row stays about as far from the hard one as a uniform row is.

    Returns:
        the rows (each sums to 1), and the log of how much of each token they leave, sum of log(1 - p) over the rows.
    """
    smallest = torch.finfo(scores.dtype).eps
    if suppression == "hard":
        rank = scores.detach().sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
        taken = rearrange(rank, "b n -> b 1 n") < rearrange(torch.arange(k, device=scores.device), "k -> 1 k 1")
        rows = repeat(scores / tau, "b n -> b k n", k=k).masked_fill(taken, -math.inf).softmax(-1)
        return rows, torch.log((1 - rows).clamp_min(smallest)).sum(1)
    left, steps = torch.zeros_like(scores), []
    for _ in range(k):
        row = ((scores + left) / tau).softmax(-1)
        steps.append(row)
        left = left + torch.log((1 - row).clamp_min(smallest))
    return torch.stack(steps, 1), left


def ratio_loss(masks: Sequence[Float[Tensor, "b n"]], ratio: float, weights: Sequence[float] | None = None) -> Float[Tensor, ""]:
    """SEPS's ratio constraint (ratio - sum of weight times mean mask)^2.

    The paper sets all weights to 1, which for two masks of mean `ratio` asks for 2·ratio = ratio; by default they are
    1/number of masks. The constraint needs masks whose mean can move: the soft part of `relaxation="sigmoid"`, or
    `selection="relaxed"` (`Selection.soft` of either). With a softmax relaxation the mean is 1/n whatever the scores, and the
    gradient is zero up to rounding; the mean of a straight-through mask is that of its hard part, k/n, whatever the scores.

    Raises:
        ValueError: if no mask carries a gradient (hard masks): the loss would be a constant.
    """
    if not any(mask.requires_grad for mask in masks):
        raise ValueError("ratio_loss needs a differentiable mask; set TokenSparse.use_gumbel = True or selection = 'relaxed'")
    weights = [1 / len(masks)] * len(masks) if weights is None else weights
    return (ratio - torch.stack([w * mask.mean() for w, mask in zip(weights, masks)]).sum()) ** 2


# --- selection ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is kept of one set of tokens.

    Attributes:
        tokens: (b, k, c) kept tokens, best first; (b, n, c) with `selection="in_place"`.
        extra: (b, 1, c) what the dropped tokens are pooled into; zeros if none was dropped; None with `extra_mode="none"`.
        mask: (b, n) the decision matrix D, 0 or 1 (a soft membership with `selection="relaxed"` in training). It carries a
            gradient when Gumbel noise or a relaxed selection is at work, and is a constant otherwise.
        kept_mask: (b, k) D at the kept tokens, ones in value, where it carries a gradient; else None.
        soft: (b, n) the relaxation behind D, soft in value as well, where D carries a gradient; else None.
        kept: (b, k) positions of the kept tokens, best first.
        scores: (b, n) s of eq. 3, without gradient.
    """

    tokens: Tensor
    extra: Tensor | None
    mask: Tensor
    kept_mask: Tensor | None
    kept: Tensor
    scores: Tensor
    soft: Tensor | None = None


@register("module", paper="SEPS, sec. 3", equations="eq. 1-3")
class TokenSparse(nn.Module):
    """Scores tokens by a learned predictor and by attention maps, and keeps the best (eq. 1-3).

    Args:
        dim: channels c of a token.
        sparse_ratio: rho, the share of tokens kept, in (0, 1].
        beta: weight of an attention map in the score, in [0, 0.5]; 0.5 leaves the predictor no weight.
        score: `combined` is eq. 3; `sum` and `mean` are the sum and mean of the maps, with no predictor and no beta
            (`sum`: SEPS's released code; `mean`: the release's in-place variant).
        score_norm: what brings the maps to a common range, see `normalise`.
        score_eps: its epsilon.
        selection: `hard` gathers the kept tokens. `relaxed` does so in evaluation, and in training takes k soft mixtures
            from `relaxed_topk`. `in_place` keeps all n tokens and multiplies the dropped ones by 0.
        round_select: how rho·n becomes k, see `token_count`; at least 1.
        use_gumbel: make the mask D differentiable: D = hard + soft - stopgrad(soft), soft from Gumbel-perturbed scores.
            In `relaxed` selection it perturbs the scores.
        gumbel_tau: temperature of soft, and of `relaxed` selection.
        gumbel_eps, gumbel_clip: see `gumbel_noise`.
        gumbel_train_only: draw noise in training only; False also makes evaluation's mask differentiable.
        noisy_topk: let the noise decide which tokens are kept. The release keeps by the score alone.
        relaxation: soft = softmax((s + g)/tau) over n, which sums to 1 (release); `k_softmax` is k times that, so that it
            sums to k as the hard mask does; `sigmoid` is sigmoid((s + g - t)/tau) with t half way between the last
            kept and the first dropped score.
        suppression: how a relaxed row keeps off what earlier rows took, see `relaxed_topk`.
        weight_selected: multiply the kept tokens by D at their places (ones in value), for the gradient.
        extra_mode: weights of the pooled dropped tokens: `softmax` of their scores, `uniform`, `uniform_in_training`
            (uniform in training, softmax in evaluation: what the release of plan B does), or `none`: no extra token.
        extra_tau: temperature of that softmax.

    Raises:
        ValueError: for a value out of range, or one that cannot take effect beside the others.
    """

    def __init__(
        self,
        dim: int,
        sparse_ratio: float = 0.5,
        beta: float = 0.25,
        *,
        score: Literal["combined", "sum", "mean"] = "combined",
        score_norm: Literal["minmax", "zscore", "none"] = "minmax",
        score_eps: float = 1e-8,
        selection: Literal["hard", "relaxed", "in_place"] = "hard",
        round_select: Literal["ceil", "floor", "exact_ceil", "exact_floor"] = "ceil",
        use_gumbel: bool = False,
        gumbel_tau: float = 1.0,
        gumbel_eps: float = 1e-9,
        gumbel_clip: float | None = None,
        gumbel_train_only: bool = True,
        noisy_topk: bool = False,
        relaxation: Literal["softmax", "sigmoid", "k_softmax"] = "softmax",
        suppression: Literal["hard", "soft"] = "hard",
        weight_selected: bool = False,
        extra_mode: Literal["softmax", "uniform", "uniform_in_training", "none"] = "softmax",
        extra_tau: float = 1.0,
    ):
        super().__init__()
        require_fraction("sparse_ratio", sparse_ratio)
        if not 0 <= beta <= 0.5:
            raise ValueError(f"beta must be in [0, 0.5], so that the predictor's weight 1 - 2 beta is not negative; got {beta}")
        for name, value, choices in (
            ("score", score, Literal["combined", "sum", "mean"]),
            ("score_norm", score_norm, ScoreNorm),
            ("selection", selection, Literal["hard", "relaxed", "in_place"]),
            ("round_select", round_select, Rounding),
            ("relaxation", relaxation, Literal["softmax", "sigmoid", "k_softmax"]),
            ("suppression", suppression, Suppression),
            ("extra_mode", extra_mode, Literal["softmax", "uniform", "uniform_in_training", "none"]),
        ):
            require_choice(name, value, choices)
        for name, positive in (
            ("gumbel_tau", gumbel_tau), ("extra_tau", extra_tau), ("gumbel_eps", gumbel_eps), ("gumbel_clip", gumbel_clip)
        ):  # fmt: skip
            if positive is not None and positive <= 0:
                raise ValueError(f"{name} must be positive, got {positive}")
        if score != "combined":
            require_idle(TokenSparse, {"beta": beta}, f"score = {score!r} has no beta")
        if score_norm == "none":
            require_idle(TokenSparse, {"score_eps": score_eps}, "score_norm = 'none'")
        if not use_gumbel:
            noise = {
                "gumbel_eps": gumbel_eps, "gumbel_clip": gumbel_clip, "gumbel_train_only": gumbel_train_only,
                "noisy_topk": noisy_topk, "relaxation": relaxation, "weight_selected": weight_selected,
            }  # fmt: skip
            noise |= {} if selection == "relaxed" else {"gumbel_tau": gumbel_tau}
            require_idle(TokenSparse, noise, "use_gumbel = False")
        if selection == "relaxed":
            idle = {"noisy_topk": noisy_topk, "relaxation": relaxation, "weight_selected": weight_selected}
            idle["gumbel_train_only"] = gumbel_train_only
            require_idle(TokenSparse, idle, "selection = 'relaxed' puts the noise in the relaxed top-k of training")
        if selection != "relaxed":
            require_idle(TokenSparse, {"suppression": suppression}, f"selection = {selection!r} relaxes nothing")
        if selection == "in_place":
            require_idle(TokenSparse, {"weight_selected": weight_selected}, "selection = 'in_place' weights all tokens by D")
            if extra_mode != "none":
                raise ValueError("selection = 'in_place' keeps every token and has none to pool; set extra_mode = 'none'")
        if extra_mode in ("uniform", "none"):
            require_idle(TokenSparse, {"extra_tau": extra_tau}, f"extra_mode = {extra_mode!r}")

        self.sparse_ratio, self.beta, self.score = sparse_ratio, beta, score
        self.score_norm: ScoreNorm = score_norm
        self.score_eps, self.selection = score_eps, selection
        self.round_select: Rounding = round_select
        self.use_gumbel, self.gumbel_tau, self.gumbel_eps, self.gumbel_clip = use_gumbel, gumbel_tau, gumbel_eps, gumbel_clip
        self.gumbel_train_only, self.noisy_topk = gumbel_train_only, noisy_topk
        self.relaxation, self.weight_selected = relaxation, weight_selected
        self.suppression: Suppression = suppression
        self.extra_mode, self.extra_tau = extra_mode, extra_tau
        self.score_predictor: nn.Sequential | None = None
        if score == "combined":
            self.score_predictor = nn.Sequential(nn.Linear(dim, dim // 4), nn.GELU(), nn.Linear(dim // 4, 1), nn.Sigmoid())

    def kept_count(self, tokens: int) -> int:
        """k for n tokens: 1 at least."""
        return max(1, token_count(tokens, self.sparse_ratio, rounding=self.round_select))

    def forward(
        self, patches: Float[Tensor, "b n c"], maps: Float[Tensor, "b g n"], uniform: Float[Tensor, "b n"] | None = None
    ) -> Selection:
        """Select.

        Args:
            patches: the tokens.
            maps: attention maps before normalisation, own modality first (`attention_maps`).
            uniform: draws from [0, 1) behind the Gumbel noise; drawn here if None.

        Raises:
            ValueError: if `uniform` is given where no noise is drawn.
        """
        return select([self], [patches], [maps], None if uniform is None else [uniform])[0]

    def attend(self, maps: Float[Tensor, "b g n"]) -> Float[Tensor, "b n"]:
        """The maps' part of the score: normalised (eq. 2) and weighted (eq. 3)."""
        maps = normalise(maps, self.score_norm, self.score_eps)
        if self.score == "combined":
            return self.beta * (maps.sum(1) + maps[:, 0])  # own modality counts twice
        return maps.sum(1) if self.score == "sum" else maps.mean(1)

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The predictor's two linear layers; there are none unless `score="combined"`."""
        one, _, two, _ = cast(nn.Sequential, self.score_predictor)
        return cast(nn.Linear, one), cast(nn.Linear, two)

    @property
    def noisy(self) -> bool:
        """Whether Gumbel noise is drawn in the present mode."""
        return self.use_gumbel and (self.training or not self.gumbel_train_only)

    @property
    def hard(self) -> bool:
        """Whether, in the present mode, tokens are gathered by constant indices and no mask carries a gradient."""
        return not self.noisy and (self.selection == "hard" or (self.selection == "relaxed" and not self.training))

    @property
    def ratio_moves(self) -> bool:
        """Whether in training the share of tokens that the soft mask keeps depends on the scores (see `ratio_loss`)."""
        return self.selection == "relaxed" or (self.use_gumbel and self.relaxation == "sigmoid")

    @property
    def pooling(self) -> str:
        """How dropped tokens are pooled in the present mode: softmax, uniform or none."""
        if self.extra_mode == "uniform_in_training":
            return "uniform" if self.training else "softmax"
        return self.extra_mode

    def soft_mask(self, perturbed: Float[Tensor, "b n"], ranked: Float[Tensor, "b n"], k: int) -> Float[Tensor, "b n"]:
        """The relaxation behind the straight-through mask.

        Args:
            perturbed: s + g.
            ranked: what the tokens were ranked by, in descending order, without gradient.
            k: tokens kept.
        """
        if self.relaxation == "sigmoid":
            threshold = ranked[:, k - 1 : k + 1].mean(-1, keepdim=True)  # the last score alone where none is dropped
            return ((perturbed - threshold) / self.gumbel_tau).sigmoid()
        soft = (perturbed / self.gumbel_tau).softmax(-1)
        return soft if self.relaxation == "softmax" else k * soft


def select(
    selectors: Sequence[TokenSparse],
    patches: Sequence[Float[Tensor, "b n c"]],
    maps: Sequence[Float[Tensor, "b g n"]],
    uniforms: Sequence[Float[Tensor, "b n"]] | None = None,
) -> list[Selection]:
    """Run several selectors of equal settings side by side; what has no parameters runs once, on all of them.

    One selector with one set of tokens is `TokenSparse.forward`.

    Raises:
        ValueError: if the sets of tokens differ in shape, or if `uniforms` is given where no noise is drawn.
    """
    if any(p.shape != patches[0].shape for p in patches):
        raise ValueError(f"token sets that are selected together must have one shape, got {[tuple(p.shape) for p in patches]}")
    first, count = selectors[0], len(selectors)
    b, n = patches[0].shape[0], int(patches[0].shape[1])  # a number also while tracing, where k has to be one
    if uniforms is not None and not first.noisy:
        raise ValueError("uniform draws were given, but no Gumbel noise is drawn in this mode (use_gumbel, train/eval)")

    attention = first.attend(torch.cat(list(maps)))
    k = first.kept_count(n)
    relaxed = first.selection == "relaxed" and first.training

    scores = attention
    if first.score == "combined":
        predicted = torch.cat(
            [rearrange(cast(nn.Sequential, s.score_predictor)(p), "b n 1 -> b n") for s, p in zip(selectors, patches)]
        )
        scores = (1 - 2 * first.beta) * predicted.to(attention.dtype) + attention  # eq. 3
    perturbed = scores
    if first.noisy:
        uniform = torch.rand_like(scores.detach()) if uniforms is None else torch.cat(list(uniforms)).to(scores.dtype)
        perturbed = scores + gumbel_noise(uniform, first.gumbel_eps, first.gumbel_clip)

    ranked, order = (perturbed if first.noisy and first.noisy_topk else scores).detach().sort(dim=-1, descending=True, stable=True)
    kept, dropped = order[:, :k], order[:, k:]
    hard = torch.zeros_like(ranked).scatter_(1, kept, 1.0)
    weights: Tensor | None = None  # of the extra token, over all tokens (relaxed) or over the dropped ones
    kept_mask: Tensor | None = None
    rows: Tensor | None = None
    soft: Tensor | None = None
    if relaxed:
        rows, left = relaxed_topk(perturbed, k, first.gumbel_tau, first.suppression)
        mask = soft = -torch.expm1(left)
        if first.pooling != "none" and k == n:  # none is dropped, however little the rows leave of each
            weights = torch.zeros_like(scores)
        elif first.pooling != "none":
            weights = (left + scores / first.extra_tau if first.pooling == "softmax" else left).softmax(-1)
    else:
        mask = hard
        if first.noisy:
            soft = first.soft_mask(perturbed, ranked, k)
            mask = hard + (soft - soft.detach())
            kept_mask = mask.gather(1, kept)
        if first.pooling == "softmax":
            weights = (scores.gather(1, dropped) / first.extra_tau).softmax(-1)
        elif first.pooling == "uniform":
            weights = torch.full_like(dropped, 1 / max(1, n - k), dtype=scores.dtype)

    def part(joined: Tensor | None, index: int) -> Tensor | None:
        return None if joined is None else joined[index * b : (index + 1) * b]

    results = []
    for i, tokens in enumerate(patches):
        rows_i, weights_i, kept_mask_i, soft_i = part(rows, i), part(weights, i), part(kept_mask, i), part(soft, i)
        kept_i, mask_i = kept[i * b : (i + 1) * b], mask[i * b : (i + 1) * b]
        pool_from = tokens if relaxed else _gather(tokens, dropped[i * b : (i + 1) * b])
        if rows_i is not None:
            chosen = rows_i.to(tokens.dtype) @ tokens
        elif first.selection == "in_place":
            chosen = tokens * rearrange(mask_i, "b n -> b n 1").to(tokens.dtype)
        else:
            chosen = _gather(tokens, kept_i)
            if first.weight_selected and kept_mask_i is not None:
                chosen = chosen * rearrange(kept_mask_i, "b k -> b k 1").to(tokens.dtype)
        extra = None if weights_i is None else rearrange(weights_i, "b d -> b 1 d").to(tokens.dtype) @ pool_from
        results.append(Selection(chosen, extra, mask_i, kept_mask_i, kept_i, scores.detach()[i * b : (i + 1) * b], soft_i))
    assert len(results) == count
    return results


def _gather(tokens: Float[Tensor, "b n c"], positions: Int[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
    return tokens.gather(1, repeat(positions, "b k -> b k c", c=tokens.shape[-1]))
