"""Semantic alignment (SAM): a visual feature map attends to the text tokens of its image.

Source: the note "SAM attention modes" and the released code it describes (DFormerv2 with text fusion). Two sides share four
projections. The *decoder* side is a full block (top-m attention, residual, feed-forward) on a level of the decode head; the
*encoder* side is a light gated addition on the attention output inside a backbone block.

    q = W_q x,  k = W_k t,  v = W_v t                            per head; in cosine mode q and k are unit vectors
    a = W_o · concat_h softmax_t(s · <q_h, k_h>) v_h             s = exp(L) / sqrt(d_k), L = log(initial value)
    decoder:  x = LN1(visual),  y = LN2(x + alpha · a),  out = y + FFN(y)
    encoder:  out = visual + gamma · gamma_scale · a

A text token that is all zeros is padding. Axes: b batch, h height, w width, n = h·w, t text tokens, c channels, k heads.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from core.layers import FeedForward
from core.options import require_idle
from core.registry import register

Side = Literal["decoder", "encoder"]
PAD_BELOW = 1e-6  # a token whose absolute sum is at most this is padding
COSINE_EPS = 1e-6
LOG_100 = math.log(100.0)  # CLIP's bound of a learnable temperature
RELEASED_BOUND = ("value_clamp", 2.0)


class _Bounded(torch.autograd.Function):
    """Clamp to [-limit, limit] whose gradient dies only where a descent step would leave the interval further."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.limit = limit
        return value.clamp(-limit, limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (value,) = ctx.saved_tensors
        outward = ((value >= ctx.limit) & (grad < 0)) | ((value <= -ctx.limit) & (grad > 0))
        return grad.masked_fill(outward, 0.0), None


def _widened(x: Tensor) -> Tensor:
    """In float32 where it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mth_largest(logits: Float[Tensor, "b k n t"], m: int) -> Float[Tensor, "b k n 1"]:
    """The m-th largest value along the token axis, ties counted as often as they occur.

    `torch.topk` sorts row by row on the CPU; among a few tokens, m running maxima over all rows at once are faster. In an export
    with a symbolic number of tokens (torch.export, not strict) -inf stands for those that are fewer than m.
    """
    if not isinstance(logits.shape[3], int):
        return F.pad(logits, (0, m), value=-math.inf).topk(m, dim=3).values[..., -1:]
    if logits.device.type != "cpu" or m * logits.shape[3] > 1024:
        return logits.topk(m, dim=3).values[..., -1:]
    best = [torch.full_like(logits[..., 0], -math.inf) for _ in range(m)]
    for value in rearrange(logits, "b k n t -> t b k n").contiguous():
        for place in range(m):
            best[place], value = torch.maximum(best[place], value), torch.minimum(best[place], value)
    return best[-1][..., None]


@register("module", paper="SAM attention modes (note), DFormerv2 with text fusion", equations="sections 2-4 of the note")
class SemanticAlignment(nn.Module):
    """Text-guided attention on a feature map (SAM), decoder side, encoder side, or both on shared projections.

    Defaults follow the note, except where the release is plainly wrong: a learnable temperature can learn, a sample
    without text neither changes nor depends on its batch mates, and a hole among the tokens loses nothing.
    `plugins.sam.golden.RELEASE` and `gin/sam/release.gin` set every switch to the release.

    Args:
        dim: channels of the visual features.
        text_dim: channels of the text tokens.
        heads: attention heads; must divide `dim`.
        side: which half exists. `both` builds the two halves, which `forward` then has to be told apart (the earlier
            release built both everywhere, and left one without gradient).
        decoder_use_cosine, encoder_use_cosine: unit q and k instead of the plain dot product.
        decoder_learnable_temp, encoder_learnable_temp: train the temperature.
        decoder_logit_scale_init, encoder_logit_scale_init: initial value of the logit scale.
        top_m: decoder attention keeps the m best tokens of each query and head (tokens tied with the m-th stay); None
            keeps all. The encoder side always keeps all.
        add_residual: False drops the residual of the decoder attention.
        alpha_init: initial weight of the decoder attention.
        gamma_init, gamma_scale: initial weight of the encoder addition, and its constant factor.
        attn_drop, proj_drop, ffn_drop: dropout of the decoder side (proj_drop acts before the output projection).
        clamp_logit: bound of a learnable log-scale, both ways. Release: 2.0.
        clamp_policy: `ste` bounds the value and lets every gradient through that leads back inside; `value_clamp`
            (release) has gradient exactly zero beyond the bound, where the release's decoder starts; `none`;
            `project_after_step` moves the parameter itself back inside (seen at the next training forward).
        temp_param: `log_of_init` (release) gives s = init / sqrt(d_k); `seed_literal` reads the note's formulas as they
            stand, s = exp(init) / sqrt(d_k) fixed and exp(clamp(value)) / sqrt(d_k) learnable; `init_as_log` reads the
            initial value as a logarithm that is bounded when fixed too.
        cosine_sqrt_dk: divide by sqrt(d_k) in cosine mode too (note and release do).
        cosine_norm_scope: unit length `per_head`, or over the `full_channel` width before heads are split (the code
            before the note, whose attention differs although it was called compatible).
        residual_source: the decoder's stream is the `normed` input (release: the raw input is lost) or the `raw` one.
        ffn_norm_placement: `post` (release: LN2's output is the stream) or `pre` (as the release's docstring says).
        missing_text: `identity_per_sample`, or `upstream`: a decoder sample without text passes through norm, output
            bias and feed-forward, and differently when the whole batch has none.
        pad_trim: `mask_only`, or `prefix` (release, encoder): only the first T' tokens count, T' being the largest number of
            real tokens in the batch, so that real tokens behind a hole are lost.
        shared_text_layout: `expand` gives a text of batch size 1 to every sample; `upstream` deals its tokens out
            among the samples in the decoder, and refuses in the encoder.

    Shapes:
        visual (b, h, w, c); text (b, t, text_dim), (1, t, text_dim), (t, text_dim) shared, or (text_dim) one token.

    Raises:
        ValueError: for a bad option or one that cannot take effect, or text whose width or batch does not fit.
    """

    gamma_scale: Tensor

    def __init__(
        self,
        dim: int,
        text_dim: int = 512,
        *,
        heads: int = 1,
        side: Literal["decoder", "encoder", "both"] = "decoder",
        decoder_use_cosine: bool = True,
        decoder_learnable_temp: bool = True,
        decoder_logit_scale_init: float = 1 / 0.07,
        encoder_use_cosine: bool = False,
        encoder_learnable_temp: bool = False,
        encoder_logit_scale_init: float = 1.0,
        top_m: int | None = 5,
        add_residual: bool = True,
        alpha_init: float = 0.1,
        gamma_init: float = 0.5,
        gamma_scale: float = 1.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        ffn_drop: float = 0.0,
        clamp_logit: float = LOG_100,
        clamp_policy: Literal["ste", "value_clamp", "none", "project_after_step"] = "ste",
        temp_param: Literal["log_of_init", "seed_literal", "init_as_log"] = "log_of_init",
        cosine_sqrt_dk: bool = True,
        cosine_norm_scope: Literal["per_head", "full_channel"] = "per_head",
        residual_source: Literal["normed", "raw"] = "normed",
        ffn_norm_placement: Literal["post", "pre"] = "post",
        missing_text: Literal["identity_per_sample", "upstream"] = "identity_per_sample",
        pad_trim: Literal["mask_only", "prefix"] = "mask_only",
        shared_text_layout: Literal["expand", "upstream"] = "expand",
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide dim, got heads={heads}, dim={dim}")
        if top_m is not None and top_m < 1:
            raise ValueError(f"top_m must be at least 1, or None to keep every token, got {top_m}")
        if clamp_logit <= 0:
            raise ValueError(f"clamp_logit must be positive, got {clamp_logit}; clamp_policy='none' switches the bound off")
        for name, value, allowed in (
            ("side", side, ("decoder", "encoder", "both")),
            ("clamp_policy", clamp_policy, ("ste", "value_clamp", "none", "project_after_step")),
            ("temp_param", temp_param, ("log_of_init", "seed_literal", "init_as_log")),
            ("cosine_norm_scope", cosine_norm_scope, ("per_head", "full_channel")),
            ("residual_source", residual_source, ("normed", "raw")),
            ("ffn_norm_placement", ffn_norm_placement, ("post", "pre")),
            ("missing_text", missing_text, ("identity_per_sample", "upstream")),
            ("pad_trim", pad_trim, ("mask_only", "prefix")),
            ("shared_text_layout", shared_text_layout, ("expand", "upstream")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

        # An option that cannot take effect is an error. The two sides of a model are built from one set of options, so that
        # what concerns either counts; and the release's bound is one of the switches of gin/sam/release.gin, for every preset.
        if clamp_policy == "none":
            require_idle(SemanticAlignment, {"clamp_logit": clamp_logit}, "clamp_policy = 'none' has no bound")
        if not (decoder_learnable_temp or encoder_learnable_temp or temp_param == "init_as_log") and (
            (clamp_policy, clamp_logit) != RELEASED_BOUND
        ):
            bound = {"clamp_policy": clamp_policy, "clamp_logit": clamp_logit}
            require_idle(SemanticAlignment, bound, "both temperatures are fixed, and only a learnable one is bounded")
        if not (decoder_use_cosine or encoder_use_cosine):
            cosine = {"cosine_norm_scope": cosine_norm_scope, "cosine_sqrt_dk": cosine_sqrt_dk}
            require_idle(SemanticAlignment, cosine, "neither side uses cosine")
        if not add_residual and missing_text != "upstream":
            require_idle(SemanticAlignment, {"residual_source": residual_source}, "add_residual = False leaves no residual")

        self.dim, self.text_dim, self.heads, self.side, self.top_m = dim, text_dim, heads, side, top_m
        self.use_cosine = {"decoder": decoder_use_cosine, "encoder": encoder_use_cosine}
        self.learnable = {"decoder": decoder_learnable_temp, "encoder": encoder_learnable_temp}
        self.add_residual, self.attn_drop, self.proj_drop, self.ffn_drop = add_residual, attn_drop, proj_drop, ffn_drop
        self.clamp_logit, self.clamp_policy, self.temp_param = clamp_logit, clamp_policy, temp_param
        self.cosine_sqrt_dk, self.cosine_norm_scope = cosine_sqrt_dk, cosine_norm_scope
        self.residual_source, self.ffn_norm_placement = residual_source, ffn_norm_placement
        self.missing_text, self.pad_trim, self.shared_text_layout = missing_text, pad_trim, shared_text_layout

        self.to_query = nn.Linear(dim, dim)
        self.to_key = nn.Linear(text_dim, dim)
        self.to_value = nn.Linear(text_dim, dim)
        self.to_out = nn.Linear(dim, dim)
        self.register_buffer("gamma_scale", torch.tensor(float(gamma_scale)))
        if side in ("decoder", "both"):
            self.norm1 = nn.LayerNorm(dim)
            self.norm2 = nn.LayerNorm(dim)
            self.ffn = FeedForward(dim, 4 * dim, dropout=ffn_drop)
            self.alpha = nn.Parameter(torch.tensor(float(alpha_init)))
            self.decoder_logit_scale = self._temperature(
                "decoder_logit_scale_init", decoder_logit_scale_init, decoder_learnable_temp
            )
        if side in ("encoder", "both"):
            self.gamma = nn.Parameter(torch.tensor(float(gamma_init)))
            self.encoder_logit_scale = self._temperature(
                "encoder_logit_scale_init", encoder_logit_scale_init, encoder_learnable_temp
            )
        for projection in (self.to_query, self.to_key, self.to_value, self.to_out):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def _temperature(self, name: str, init: float, learnable: bool) -> nn.Parameter:
        """The stored log-scale L, frozen where the temperature is fixed."""
        if self.temp_param == "log_of_init":
            if init <= 0:
                raise ValueError(f"{name} must be positive (its logarithm is stored), got {init}; see temp_param")
            init = math.log(max(init, 1e-6))
        return nn.Parameter(torch.tensor(float(init)), requires_grad=learnable)

    # --- the logit scale ----------------------------------------------------------------------------------------------

    def scale(self, side: Side) -> Float[Tensor, ""]:
        """The factor s on <q, k>: exp(L) / sqrt(d_k), with L bounded where the policy says so."""
        value: nn.Parameter = getattr(self, f"{side}_logit_scale")
        limit = self.clamp_logit
        bounded = self.learnable[side] or self.temp_param == "init_as_log"
        log_scale: Tensor = value
        if bounded and self.clamp_policy == "ste" and torch.is_grad_enabled():
            log_scale = _Bounded.apply(value, limit)
        elif bounded and self.clamp_policy == "project_after_step" and self.training:
            with torch.no_grad():
                value.clamp_(-limit, limit)
        elif bounded and self.clamp_policy != "none":
            log_scale = value.clamp(-limit, limit)
        s = log_scale.exp()
        if self.use_cosine[side] and not self.cosine_sqrt_dk:
            return s
        return s / math.sqrt(self.dim // self.heads)

    # --- text -----------------------------------------------------------------------------------------------------------

    def _batched(self, text: Float[Tensor, "..."], visual: Float[Tensor, "b ..."], side: Side) -> Float[Tensor, "b t ct"]:
        batch = visual.shape[0]
        if text.shape[-1] != self.text_dim:
            raise ValueError(
                f"text tokens are {text.shape[-1]} wide, SemanticAlignment was built for text_dim={self.text_dim} "
                f"(text of shape {tuple(text.shape)}); set text_dim to the text provider's width"
            )
        if text.ndim == 3 and text.shape[0] == batch:
            return text
        if text.ndim == 3 and text.shape[0] == 1 and self.shared_text_layout == "upstream":
            if side == "encoder" or text.shape[1] % batch:
                raise ValueError(
                    f"shared_text_layout='upstream' cannot give text of shape {tuple(text.shape)} to {batch} samples "
                    f"on the {side} side; use shared_text_layout='expand'"
                )
            return rearrange(text, "1 (b t) ct -> b t ct", b=batch)
        if text.ndim < 3 or text.shape[0] == 1:
            return repeat(text.reshape(-1, self.text_dim), "t ct -> b t ct", b=batch)
        raise ValueError(f"text has shape {tuple(text.shape)}, its batch must be 1 or that of the features, {batch}")

    def padding(self, text: Float[Tensor, "b t ct"], side: Side) -> tuple[Bool[Tensor, "b t"], Bool[Tensor, "b"]]:
        """Which tokens are padding, and which samples have any text."""
        padding = reduce(text.float().abs(), "b t ct -> b t", "sum") <= PAD_BELOW
        if side == "encoder" and self.pad_trim == "prefix":
            length = (~padding).sum(dim=1).max()
            padding = padding | (torch.arange(padding.shape[1], device=padding.device) >= length)
        return padding, (~padding).any(dim=1)

    # --- attention ------------------------------------------------------------------------------------------------------

    def _inverse_length(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b k n 1"]:
        """1 / |x| of each head, or of the whole width for every head, as `cosine_norm_scope` says; at least float32.

        That of a zero vector (the key of a padding token) is 1e6: more than float16 holds, where 0 · inf would be NaN.
        """
        heads = self.heads if self.cosine_norm_scope == "per_head" else 1
        squares = reduce(_widened(tokens).square(), "b n (k d) -> b k n 1", "sum", k=heads)
        return squares.clamp_min(COSINE_EPS**2).rsqrt().contiguous()

    def weights(
        self,
        query: Float[Tensor, "b n c"],
        key: Float[Tensor, "b t c"],
        padding: Bool[Tensor, "b t"],
        present: Bool[Tensor, "b"],
        side: Side,
    ) -> Float[Tensor, "b k n t"]:
        """Softmax over the tokens that count. Those of a sample without text are finite; the caller discards them.

        Lengths, logits and softmax are float32 where the features are narrower; the products stay as narrow as these.
        """
        queries, keys = (rearrange(x, "b n (k d) -> b k n d", k=self.heads) for x in (query, key))
        keys = _widened(keys) * self.scale(side)  # few tokens, many queries: scale the short side
        if self.use_cosine[side]:
            keys = keys * self._inverse_length(key)
        logits = _widened(queries @ rearrange(keys.to(query.dtype), "b k t d -> b k d t"))
        hidden = rearrange(padding & present[:, None], "b t -> b 1 1 t")
        bias = torch.zeros_like(hidden, dtype=logits.dtype).masked_fill(hidden, -math.inf)
        if self.use_cosine[side]:  # one factor a query and head: cheaper on the logits than on the query
            logits = torch.addcmul(bias, logits, self._inverse_length(query))
        else:
            logits = logits + bias
        if side == "decoder" and self.top_m is not None and (not isinstance(key.shape[1], int) or self.top_m < key.shape[1]):
            with torch.no_grad():
                kept = logits >= mth_largest(logits, self.top_m)
                bias = torch.where(kept, 0.0, -math.inf).to(logits.dtype)
            logits = logits + bias
        return logits.softmax(dim=-1)

    def attend(
        self,
        query: Float[Tensor, "b n c"],
        key: Float[Tensor, "b t c"],
        value: Float[Tensor, "b t c"],
        padding: Bool[Tensor, "b t"],
        present: Bool[Tensor, "b"],
        side: Side,
    ) -> Float[Tensor, "b n c"]:
        """Attended values with heads joined, before the output projection."""
        weights = self.weights(query, key, padding, present, side)
        if side == "decoder":
            if self.missing_text == "upstream":  # attention of a sample without text is 0, before the output bias
                weights = weights * rearrange(present, "b -> b 1 1 1")
            weights = F.dropout(weights, self.attn_drop, self.training)
        values = rearrange(value, "b t (k d) -> b k t d", k=self.heads)
        attended = rearrange(weights.to(value.dtype) @ values, "b k n d -> b n (k d)")
        return F.dropout(attended, self.proj_drop, self.training) if side == "decoder" else attended

    def _attend(
        self, tokens: Float[Tensor, "b n c"], text: Float[Tensor, "b t ct"], side: Side
    ) -> tuple[Float[Tensor, "b n c"], Bool[Tensor, "b"]]:
        """The projected attention output, and which samples have text."""
        padding, present = self.padding(text, side)
        text = text.to(tokens.dtype)
        attended = self.attend(self.to_query(tokens), self.to_key(text), self.to_value(text), padding, present, side)
        return self.to_out(attended), present

    def attention(
        self, visual: Float[Tensor, "b h w c"], text: Float[Tensor, "..."], side: Side | None = None
    ) -> Float[Tensor, "b k h w t"]:
        """Attention weights of every position over the text tokens, for pictures. Zero for a sample without text."""
        side = self._side(side)
        batched = self._batched(text, visual, side)
        tokens = rearrange(visual, "b h w c -> b (h w) c")
        if side == "decoder":
            tokens = self.norm1(tokens)
        padding, present = self.padding(batched, side)
        weights = self.weights(self.to_query(tokens), self.to_key(batched.to(tokens.dtype)), padding, present, side)
        return rearrange(weights * rearrange(present, "b -> b 1 1 1"), "b k (h w) t -> b k h w t", h=visual.shape[1])

    # --- the two sides --------------------------------------------------------------------------------------------------

    def _side(self, side: Side | None) -> Side:
        if side is None and self.side != "both":
            return self.side  # type: ignore[return-value]
        if side is None or self.side not in (side, "both"):
            raise ValueError(f"SemanticAlignment(side={self.side!r}) was asked for side {side!r}; name one that was built")
        return side

    def forward(
        self, visual: Float[Tensor, "b h w c"], text: Float[Tensor, "..."], side: Side | None = None
    ) -> Float[Tensor, "b h w c"]:
        """Align a feature map to its text.

        Args:
            visual: (b, h, w, c), channels last.
            text: (b, t, text_dim), or a shared text (see the class).
            side: `decoder` or `encoder`; only needed where both were built.
        """
        side = self._side(side)
        height = visual.shape[1]
        batched = self._batched(text, visual, side)
        tokens = rearrange(visual, "b h w c -> b (h w) c")
        aligned = self._decode(tokens, batched) if side == "decoder" else self._encode(tokens, batched)
        return rearrange(aligned, "b (h w) c -> b h w c", h=height)

    def _encode(self, visual: Float[Tensor, "b n c"], text: Float[Tensor, "b t ct"]) -> Float[Tensor, "b n c"]:
        attended, present = self._attend(visual, text, "encoder")
        return visual + attended * (self.gamma * self.gamma_scale * rearrange(present, "b -> b 1 1"))

    def _decode(self, visual: Float[Tensor, "b n c"], text: Float[Tensor, "b t ct"]) -> Float[Tensor, "b n c"]:
        normed = self.norm1(visual)
        attended, present = self._attend(normed, text, "decoder")
        source = normed if self.residual_source == "normed" else visual
        stream = self.alpha * attended
        if self.add_residual:
            stream = source + stream
        if self.missing_text == "upstream":  # a batch without any text skips the attention, not the block
            stream = torch.where(present.any(), stream, source)
        if self.ffn_norm_placement == "post":
            stream = self.norm2(stream)
            fed = self.ffn(stream)
        else:
            fed = self.ffn(self.norm2(stream))
        out = stream + F.dropout(fed, self.ffn_drop, self.training)
        if self.missing_text == "upstream":
            return out
        return torch.lerp(visual, out, rearrange(present, "b -> b 1 1").to(out.dtype))  # exact at weights 0 and 1
