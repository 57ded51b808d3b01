"""Semantic Anchor-driven Purification (SAP): take the class-predictable part out of domain features.

SAP design note, "Patch 2" (fixed temperature) and "Patch 3" (learned log-scale), and their release.

The support features of each class are averaged to an anchor. A domain feature asks which anchors it resembles, the answer
is mapped back to the domain space, and a gated share of it is subtracted.

Axes: b rows (support and query), s support rows, n classes of the episode, d domain channels, p semantic channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from core.options import require_idle
from core.registry import register
from plugins.sap.precision import full_precision
from plugins.sap.prototype_head import class_means


class Purification(NamedTuple):
    """What purification gives.

    Attributes:
        purified: domain features without their semantic component, b d.
        attention: share of each anchor in each row, b n; rows sum to 1.
        orthogonal_loss: mean squared cosine between mapped purified and detached semantic features, a scalar.
        monitors: detached scalars on the device: gate, attn_entropy (nats), attn_max, semantic_norm,
            purification_ratio (before the layer norm, so it is not the change of the output), w_orth_norm, logit_scale,
            logit_scale_clipped (0 or 1).
    """

    purified: Tensor
    attention: Tensor
    orthogonal_loss: Tensor
    monitors: dict[str, Tensor]


class UnitDot(torch.autograd.Function):
    """Dot products of rows at unit length: (rows / |rows|) . read.

    The same as normalising first. Written out because the b x p maps dominate the cost of the module: the unit rows are never
    stored, and the gradient (g read - (g . out) rows / |rows|) / |rows| passes over them twice instead of six times.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, read: Tensor, paired: bool) -> Tensor:
        """`read` is b p and meets row by row if `paired`, giving b; else n p, giving b n."""
        inverse = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=1e-12).reciprocal()  # b 1
        dot = torch.linalg.vecdot(rows, read).unsqueeze(-1) if paired else rows @ read.t()
        unit = dot * inverse
        ctx.save_for_backward(rows, read, inverse, unit)
        ctx.paired = paired
        return unit.squeeze(-1) if paired else unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        rows, read, inverse, unit = ctx.saved_tensors
        grad = (grads[0].unsqueeze(-1) if ctx.paired else grads[0]) * inverse
        along = (grad * unit).sum(-1, keepdim=True) * inverse
        to_rows = (grad * read if ctx.paired else grad @ read).addcmul_(rows, along, value=-1)
        to_read = None
        if ctx.needs_input_grad[1]:
            to_read = grad * rows if ctx.paired else grad.t() @ rows
        return to_rows, to_read, None


class _InwardCap(torch.autograd.Function):
    """min(scale, cap), whose gradient at or above the cap survives where descent would lower the scale."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, cap: float) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.cap = cap
        return scale.clamp(max=cap)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        (grad,) = grads
        return torch.where((scale < ctx.cap) | (grad > 0), grad, torch.zeros_like(grad)), None


@register(
    "module", paper="SAP design note, Patch 2 and Patch 3", equations="anchors, query, attention, component, gate, orthogonality"
)
class SemanticAnchorPurification(nn.Module):
    """Purify domain features with the semantic anchors of an episode.

        p_c = normalise(mean of support features of class c)         anchors
        q_i = normalise(Dropout(W_q f_i))                            query
        a_i = softmax_c(s q_i . p_c)                                 attention
        c_i = Dropout(W_proj sum_c a_ic p_c)                         semantic component
        o_i = LayerNorm(f_i - sigmoid(alpha) c_i)                    purified feature
        L   = mean_i cos(W_orth o_i, stopgrad f_phy_i)^2             orthogonality

    Everything runs in float32, also under mixed precision. State-dict keys are the release's.

    Args:
        dom_dim: domain channels d.
        phy_dim: semantic ("physical") channels p.
        dropout: rate in query and projection.
        scale_mode: "learned" is Patch 3: s = exp(logit_scale_log), capped. "fixed_sqrt" is Patch 2: s = 1/sqrt(phy_dim),
            which keeps the attention of 5 classes within [0.188, 0.213], that is flat, whatever the features.
        scale_init: first value of the learned scale. It multiplies; the Patch 2 scale is 1/25.3, not 25.3.
        scale_max: cap of the learned scale.
        cap_mode: what happens at the cap. "hard" (release): min(s, cap), whose gradient is exactly 0 at and above the
            cap, so a scale that gets there can never return. "inward" (default): the same value, and the gradient passes
            when descent lowers the scale; the cap bounds and does not trap. "soft": cap * e^v / (cap + e^v), smooth
            everywhere, never quite at the cap; its log parameter starts where the scale equals scale_init.
        detach_anchors: stop gradients from the domain losses into the semantic features. The Patch 3 release does so,
            the Patch 2 release and the note do not; the default follows the note, because with detached anchors
            purification cannot reach the classifier at all.
        row_max_shift: subtract each row's maximum before the softmax, as in the Patch 3 release. Softmax does it anyway:
            values and gradients are the same.
        normalize_query: L2-normalise queries, so that logits lie in [-s, s].
        use_layernorm: normalise the purified features.
        alpha_init: first value of the gate's logit.
        purify_in_eval: purify in evaluation mode too. The release does not: there its domain head sees features
            with another distribution than in training. Only support labels are read, so purifying is legitimate.
    """

    def __init__(
        self,
        dom_dim: int = 64,
        phy_dim: int = 640,
        dropout: float = 0.1,
        scale_mode: Literal["learned", "fixed_sqrt"] = "learned",
        scale_init: float = 25.0,
        scale_max: float = 100.0,
        cap_mode: Literal["inward", "hard", "soft"] = "inward",
        detach_anchors: bool = False,
        row_max_shift: bool = False,
        normalize_query: bool = True,
        use_layernorm: bool = True,
        alpha_init: float = 0.0,
        purify_in_eval: bool = True,
    ):
        super().__init__()
        if scale_mode not in ("learned", "fixed_sqrt"):
            raise ValueError(f"scale_mode must be 'learned' (Patch 3) or 'fixed_sqrt' (Patch 2), got {scale_mode!r}")
        if cap_mode not in ("inward", "hard", "soft"):
            raise ValueError(f"cap_mode must be 'inward', 'hard' (release) or 'soft', got {cap_mode!r}")
        if scale_mode == "fixed_sqrt":
            learned = {"scale_init": scale_init, "scale_max": scale_max, "cap_mode": cap_mode}
            require_idle(SemanticAnchorPurification, learned, "scale_mode = 'fixed_sqrt' has no learned scale and no cap")
        if not 0 < scale_init <= scale_max:
            raise ValueError(
                f"scale_init must be in (0, scale_max = {scale_max}], got {scale_init}; raise scale_max or start lower"
            )
        if cap_mode == "soft" and scale_init == scale_max:
            raise ValueError(f"scale_init must be below scale_max = {scale_max} with cap_mode 'soft', which never reaches its cap")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.dom_dim, self.phy_dim = dom_dim, phy_dim
        self.scale_mode, self.cap_mode = scale_mode, cap_mode
        self.logit_scale_max = scale_max
        self.detach_anchors, self.row_max_shift = detach_anchors, row_max_shift
        self.normalize_query, self.use_layernorm = normalize_query, use_layernorm
        self.purify_in_eval = purify_in_eval

        if scale_mode == "learned":
            self.logit_scale_log = nn.Parameter(torch.tensor(self.log_of(scale_init)))
        self.alpha = nn.Parameter(torch.tensor(float(alpha_init)))
        ask, project = nn.Linear(dom_dim, phy_dim), nn.Linear(phy_dim, dom_dim)
        for layer in (ask, project):
            nn.init.xavier_uniform_(layer.weight, gain=0.5)
            nn.init.zeros_(layer.bias)
        # In place: a linear layer needs no output to differentiate, and the b p maps are what fills the cache here.
        self.W_q = nn.Sequential(ask, nn.Dropout(dropout, inplace=True))
        self.W_proj = nn.Sequential(project, nn.Dropout(dropout, inplace=True))
        self.W_orth = nn.Linear(dom_dim, phy_dim, bias=False)
        if use_layernorm:
            self.output_ln = nn.LayerNorm(dom_dim)
        nn.init.xavier_uniform_(self.W_orth.weight)

    def log_of(self, scale: float) -> float:
        """The value of `logit_scale_log` at which the module's scale is `scale`."""
        return math.log(scale) - (math.log1p(-scale / self.logit_scale_max) if self.cap_mode == "soft" else 0.0)

    def scale(self) -> Float[Tensor, ""]:
        """The factor of the attention logits."""
        if self.scale_mode == "fixed_sqrt":
            return torch.full_like(self.alpha, self.phy_dim**-0.5)
        if self.cap_mode == "soft":
            return self.logit_scale_max * torch.sigmoid(self.logit_scale_log - math.log(self.logit_scale_max))
        grown = self.logit_scale_log.exp()
        if self.cap_mode == "hard":
            return grown.clamp(max=self.logit_scale_max)
        capped: Tensor = _InwardCap.apply(grown, self.logit_scale_max)
        return capped

    def forward(
        self,
        domain: Float[Tensor, "b d"],
        semantic: Float[Tensor, "b p"],
        support_semantic: Float[Tensor, "s p"],
        support_labels: Int[Tensor, "s"],
        *,
        n_way: int,
    ) -> Purification:
        """Purify every row of `domain`.

        Args:
            domain: domain features of support and query rows, in any order.
            semantic: semantic features of the same rows; read, detached, by the orthogonality loss alone.
            support_semantic: semantic features of the support rows; the anchors come from these.
            support_labels: classes of the support rows, 0 .. n_way-1, each present. Check them where they are made, with
                `prototype_head.check_support`; here a missing class trips an asynchronous assertion and never gives NaN.
            n_way: number of classes.

        Raises:
            ValueError: if the widths are not the constructed ones.
            RuntimeError: if a class has no support.
        """
        if domain.shape[-1] != self.dom_dim or semantic.shape[-1] != self.phy_dim:
            raise ValueError(
                f"domain and semantic features must have {self.dom_dim} and {self.phy_dim} channels, "
                f"got shapes {tuple(domain.shape)} and {tuple(semantic.shape)}"
            )
        with full_precision(domain):
            return self._purify(domain.float(), semantic.float(), support_semantic.float(), support_labels, n_way)

    def _purify(self, domain: Tensor, semantic: Tensor, support: Tensor, labels: Tensor, n_way: int) -> Purification:
        if self.detach_anchors:
            support = support.detach()
        anchors = F.normalize(class_means(support, labels, n_way), dim=-1)  # n p

        query = self.W_q(domain)
        scale = self.scale()
        logits = scale * (UnitDot.apply(query, anchors, False) if self.normalize_query else query @ anchors.t())  # b n
        if self.row_max_shift:
            logits = logits - logits.amax(-1, keepdim=True)
        attention = logits.softmax(-1)

        # W_proj (sum_c a_ic p_c) + b = sum_c a_ic (W_proj p_c + b), since shares sum to 1: project n anchors, not b mixtures.
        project, drop = cast(nn.Linear, self.W_proj[0]), self.W_proj[1]
        component = drop(attention @ F.linear(anchors, project.weight, project.bias))

        gate = self.alpha.sigmoid()
        if self.training or self.purify_in_eval:
            purified = domain - gate * component
            if self.use_layernorm:
                purified = self.output_ln(purified)
        else:
            purified = domain
        return Purification(
            purified, attention, self._orthogonality(purified, semantic), self._monitors(domain, attention, component, gate, scale)
        )

    def _orthogonality(self, purified: Float[Tensor, "b d"], semantic: Float[Tensor, "b p"]) -> Float[Tensor, ""]:
        """mean_i cos(W_orth o_i, stopgrad f_i)^2."""
        target = semantic.detach()
        cosine = UnitDot.apply(self.W_orth(purified), target, True) / torch.linalg.vector_norm(target, dim=-1).clamp(min=1e-12)
        return cosine.square().mean()

    @torch.no_grad()
    def _monitors(self, domain: Tensor, attention: Tensor, component: Tensor, gate: Tensor, scale: Tensor) -> dict[str, Tensor]:
        taken = torch.linalg.vector_norm(component, dim=-1)
        return {
            "gate": gate.detach(),
            "attn_entropy": torch.special.entr(attention).sum() / attention.shape[0],
            "attn_max": attention.amax(-1).mean(),
            "semantic_norm": taken.mean(),
            "purification_ratio": gate * (taken / (torch.linalg.vector_norm(domain, dim=-1) + 1e-8)).mean(),
            "w_orth_norm": torch.linalg.vector_norm(self.W_orth.weight),
            "logit_scale": scale.detach(),
            "logit_scale_clipped": (scale >= self.logit_scale_max).float(),
        }


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a checkpoint of the release was, and what was done to load it.

    Attributes:
        patch: 2 or 3, by whether the checkpoint has `logit_scale_log`.
        loaded: keys taken from the checkpoint.
        filled: keys it lacks, with the value given to them.
        scale: the module's scale after loading.
        notes: settings of the module under which it would train differently from that patch.
    """

    patch: int
    loaded: tuple[str, ...]
    filled: Mapping[str, float]
    scale: float
    notes: tuple[str, ...]


def load_release(module: SemanticAnchorPurification, state: Mapping[str, Tensor], prefix: str = "") -> LoadReport:
    """Load a Patch 2 or Patch 3 checkpoint of the release into `module`, strictly.

    A Patch 2 checkpoint has no `logit_scale_log`. A module with a learned scale gets the value at which its scale is
    1/sqrt(phy_dim), which makes it exactly Patch 2 until it trains on.

    Args:
        module: the module to fill.
        state: state dict of the release, of this module or of the whole model.
        prefix: what to strip from the keys, e.g. "sap_module." for a checkpoint of the whole model.

    Raises:
        ValueError: if keys or shapes do not fit, or a learned scale is loaded into scale_mode "fixed_sqrt".
    """
    ours = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    patch = 3 if "logit_scale_log" in ours else 2
    filled: dict[str, float] = {}
    notes: list[str] = []
    if patch == 3 and module.scale_mode == "fixed_sqrt":
        raise ValueError(
            "the checkpoint has a learned scale (Patch 3) and the module scale_mode 'fixed_sqrt' (Patch 2); set scale_mode 'learned'"
        )
    if patch == 2 and module.scale_mode == "learned":
        filled["logit_scale_log"] = module.log_of(module.phy_dim**-0.5)
        notes.append("scale_mode is 'learned': the scale starts at Patch 2's value and will move in training")
    if patch == 3 and module.cap_mode != "hard":
        if module.cap_mode == "soft":
            filled["logit_scale_log"] = module.log_of(
                min(float(ours["logit_scale_log"].exp()), module.logit_scale_max * (1 - 1e-6))
            )
        notes.append(f"cap_mode is {module.cap_mode!r}, the release's is 'hard'")
    if module.detach_anchors != (patch == 3):
        notes.append(f"detach_anchors is {module.detach_anchors}, the Patch {patch} release's is {patch == 3}")
    given = {**ours, **{key: torch.tensor(value) for key, value in filled.items()}}
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in given.items()}
    if expected != found:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        said = "; ".join(f"{key}: checkpoint {found.get(key, 'has none')}, module {expected.get(key, 'has none')}" for key in wrong)
        raise ValueError(f"the checkpoint does not fit (prefix {prefix!r}): {said}")
    module.load_state_dict(given, strict=True)
    with torch.no_grad():
        scale = float(module.scale())
    return LoadReport(patch, tuple(sorted(ours.keys() - filled.keys())), filled, scale, tuple(notes))
