"""The whole SAP model: an intrinsic branch that classifies, a domain branch that purification cleans of class.

After the release's ExpB1Model. The branches share no parameter. Only purification can carry a gradient from the
domain losses to the intrinsic encoder, through its anchors, and only if they are not detached.

Axes: b rows of an episode (support first), s support rows, p intrinsic channels, d domain channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from core.distributed import gather, rank, world
from core.registry import register
from plugins.sap.contrastive import DomainSupCon, IntrinsicSupCon
from plugins.sap.domain_classifier import DomainClassifier
from plugins.sap.domain_encoder import StyleStatDomainEncoder
from plugins.sap.episodes import EpisodeShape
from plugins.sap.intrinsic_encoder import IntrinsicEncoder
from plugins.sap.prototype_head import PrototypeHead
from plugins.sap.purification import Purification, SemanticAnchorPurification
from plugins.sap.random_streams import stream


class Features(NamedTuple):
    """What the encoders see in images: intrinsic (b p) and raw domain features (b d)."""

    intrinsic: Tensor
    domain: Tensor


class EpisodeOutput(NamedTuple):
    """What an episode came to.

    Attributes:
        losses: unweighted scalars: class, domain, and where switched on intrinsic_contrast, domain_contrast, orthogonality.
        monitors: detached scalars on the device.
        logits: of the queries.
    """

    losses: dict[str, Tensor]
    monitors: dict[str, Tensor]
    logits: Tensor


class Backbone(nn.Module):
    """The two encoders, under the release's names."""

    def __init__(self, intrinsic: nn.Module, domain: nn.Module):
        super().__init__()
        self.intrinsic_encoder, self.domain_encoder = intrinsic, domain


@register("model", paper="SAP release (ExpB1)", denylist=["n_domains"])
class DualStreamModel(nn.Module):
    """Intrinsic and domain encoder, prototype head, domain classifier, contrastive losses, purification.

    Sub-modules carry the release's names. The intrinsic branch is built first, so that its initial weights do not depend on
    what else is switched on.

    Args:
        n_domains: domains of the data, the held-out one included.
        intrinsic, domain: constructors of the encoders; they tell their width as `.dim`.
        head: constructor of the classifier over prototypes.
        classifier: constructor of the domain classifier, called with `dim=, n_domains=`.
        purification: constructor, called with `dom_dim=, phy_dim=`; None leaves it out, and the domain losses see raw features.
        intrinsic_contrast, domain_contrast: constructors, called with `in_dim=`; None leaves them out.
        joint_forward: encode support and query in one call, so that MixStyle mixes across the domains of an episode. The
            release makes two calls, in which it mixes inside the support or inside the queries (of one domain). In
            evaluation both are the same.
    """

    def __init__(
        self,
        n_domains: int = 4,
        intrinsic: Callable[..., nn.Module] = IntrinsicEncoder,
        domain: Callable[..., nn.Module] = StyleStatDomainEncoder,
        head: Callable[..., nn.Module] = PrototypeHead,
        classifier: Callable[..., nn.Module] = DomainClassifier,
        purification: Callable[..., nn.Module] | None = SemanticAnchorPurification,
        intrinsic_contrast: Callable[..., nn.Module] | None = IntrinsicSupCon,
        domain_contrast: Callable[..., nn.Module] | None = DomainSupCon,
        joint_forward: bool = True,
    ):
        super().__init__()
        encoder = intrinsic()
        phy_dim = int(encoder.dim)  # type: ignore[arg-type]
        self.intrinsic_supcon_module = intrinsic_contrast(in_dim=phy_dim) if intrinsic_contrast else None
        style = domain()
        dom_dim = int(style.dim)  # type: ignore[arg-type]
        self.backbone = Backbone(encoder, style)
        self.prototype_head = head()
        self.domain_classifier = classifier(dim=dom_dim, n_domains=n_domains)
        self.domain_supcon_module = domain_contrast(in_dim=dom_dim) if domain_contrast else None
        self.sap_module = purification(dom_dim=dom_dim, phy_dim=phy_dim) if purification else None
        self.joint_forward = joint_forward

    def intrinsic_features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b p"]:
        """The map's mean, in float32."""
        return reduce(self.backbone.intrinsic_encoder(images).float(), "b p h w -> b p", "mean")

    def purify(
        self,
        domain: Float[Tensor, "b d"],
        intrinsic: Float[Tensor, "b p"],
        support: Int[Tensor, "s"],
        labels: Int[Tensor, "s"],
        n_way: int,
    ) -> Purification | None:
        """Purify domain features with the anchors of the rows `support` and their labels; None without purification."""
        if self.sap_module is None:
            return None
        result: Purification = self.sap_module(domain, intrinsic, intrinsic[support], labels, n_way=n_way)
        return result

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        classes: Int[Tensor, "b"] | None = None,
        domains: Int[Tensor, "b"] | None = None,
        *,
        shape: EpisodeShape | None = None,
        epoch: float | int = 0,
        noise: tuple[int, ...] | None = None,
    ) -> Features | EpisodeOutput:
        """Features of images; or, with `shape`, the losses of an episode.

        Args:
            images: normalised; in an episode in the order of `EpisodeShape`, or this process's contiguous part of it.
            classes: class numbers of the data set (for the contrastive losses).
            domains: domain numbers.
            shape: of the episode; None gives `Features`.
            epoch: 0-based, for the temperatures.
            noise: names the random streams of this step, (seed, step); None draws from the global stream.
        """
        device = images.device
        if shape is None:
            return Features(self.intrinsic_features(images), self.backbone.domain_encoder(images))
        if classes is None or domains is None:
            raise ValueError("an episode needs class and domain numbers of its rows")
        local = None if noise is None else (*noise, rank())  # rows of each process: their own noise; gathered rows: the same
        with stream(local, "intrinsic", device):
            if self.joint_forward:
                intrinsic = self.intrinsic_features(images)
            elif world() > 1:
                raise ValueError("joint_forward = False needs one process: an episode's support may lie on several")
            else:
                parts = images[: shape.support], images[shape.support :]
                intrinsic = torch.cat([self.intrinsic_features(part) for part in parts])
        with stream(local, "domain", device):
            domain = self.backbone.domain_encoder(images).float()
        intrinsic, domain, classes, domains = gather(intrinsic), gather(domain), gather(classes), gather(domains)
        if intrinsic.shape[0] != shape.rows:
            raise ValueError(f"an episode of {shape} has {shape.rows} rows, got {intrinsic.shape[0]}")

        labels = shape.labels(device)
        targets = labels[shape.support :]
        logits, _ = self.prototype_head(
            intrinsic[shape.support :], intrinsic[: shape.support], labels[: shape.support], n_way=shape.n_way
        )
        losses = {"class": F.cross_entropy(logits, targets)}
        monitors = {"accuracy[train]": (logits.detach().argmax(-1) == targets).float().mean()}

        cleaned = domain
        if self.sap_module is not None:
            with stream(noise, "purification", device):
                purified: Purification = self.sap_module(
                    domain, intrinsic, intrinsic[: shape.support], labels[: shape.support], n_way=shape.n_way
                )
            cleaned = purified.purified
            losses["orthogonality"] = purified.orthogonal_loss
            monitors.update(purified.monitors)
        with stream(noise, "domain_classifier", device):
            guess = self.domain_classifier(cleaned).float()
        losses["domain"] = F.cross_entropy(guess, domains)
        monitors["domain_accuracy"] = (guess.detach().argmax(-1) == domains).float().mean()
        if self.intrinsic_supcon_module is not None:
            with stream(noise, "intrinsic_contrast", device):
                contrast = self.intrinsic_supcon_module(intrinsic, classes, domains, epoch)
            losses["intrinsic_contrast"] = contrast.loss
            monitors.update({f"intrinsic_{name}": value for name, value in contrast.monitors.items() if name != "leak_index"})
        if self.domain_supcon_module is not None:
            with stream(noise, "domain_contrast", device):
                contrast = self.domain_supcon_module(cleaned, classes, domains, epoch)
            losses["domain_contrast"] = contrast.loss
            monitors.update({f"domain_{name}": value for name, value in contrast.monitors.items()})
        return EpisodeOutput(losses, monitors, logits)
