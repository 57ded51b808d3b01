"""Names of the fusion modules' weights in the released checkpoint and in its Hugging Face port.

Our parts are `encoder.*` (FusionEncoder), `decoder.*` (QueryDecoder) and `scorer.*` (PromptScorer). The release packs the
query, key and value projections of an attention in one tensor (rows q, k, v); maps split and join it. Both maps work both
ways and for every configuration of the modules.

`read(model, state)` loads such a checkpoint strictly: every weight of the three parts has to be there, in its shape, and
every weight the file has for them has to be used. What else a file holds (image trunk, text encoder, geometry encoder,
mask head, video tracker) is listed by part and left alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

Naming = Literal["original", "huggingface", "ours"]
PARTS = ("encoder", "decoder", "scorer")

# ours | release | Hugging Face; "#" is a layer number, and ends are whole path steps. First match wins.
_TABLE: tuple[tuple[str, str, str], ...] = (
    ("encoder.blocks.#.self_attn", "transformer.encoder.layers.#.self_attn", "detr_encoder.layers.#.self_attn"),
    ("encoder.blocks.#.prompt_attn", "transformer.encoder.layers.#.cross_attn_image", "detr_encoder.layers.#.cross_attn"),
    ("encoder.blocks.#.ffn.expand", "transformer.encoder.layers.#.linear1", "detr_encoder.layers.#.mlp.fc1"),
    ("encoder.blocks.#.ffn.contract", "transformer.encoder.layers.#.linear2", "detr_encoder.layers.#.mlp.fc2"),
    ("encoder.blocks.#.self_norm", "transformer.encoder.layers.#.norm1", "detr_encoder.layers.#.layer_norm1"),
    ("encoder.blocks.#.prompt_norm", "transformer.encoder.layers.#.norm2", "detr_encoder.layers.#.layer_norm2"),
    ("encoder.blocks.#.ffn_norm", "transformer.encoder.layers.#.norm3", "detr_encoder.layers.#.layer_norm3"),
    ("encoder.pool_proj", "transformer.encoder.text_pooling_proj", "detr_encoder.text_pooling_proj"),
    ("encoder.level_embed", "transformer.encoder.level_embed", "detr_encoder.level_embed"),
    ("decoder.blocks.#.self_attn", "transformer.decoder.layers.#.self_attn", "detr_decoder.layers.#.self_attn"),
    ("decoder.blocks.#.prompt_attn", "transformer.decoder.layers.#.ca_text", "detr_decoder.layers.#.text_cross_attn"),
    ("decoder.blocks.#.image_attn", "transformer.decoder.layers.#.cross_attn", "detr_decoder.layers.#.vision_cross_attn"),
    ("decoder.blocks.#.ffn.expand", "transformer.decoder.layers.#.linear1", "detr_decoder.layers.#.mlp.fc1"),
    ("decoder.blocks.#.ffn.contract", "transformer.decoder.layers.#.linear2", "detr_decoder.layers.#.mlp.fc2"),
    ("decoder.blocks.#.self_norm", "transformer.decoder.layers.#.norm2", "detr_decoder.layers.#.self_attn_layer_norm"),
    (
        "decoder.blocks.#.prompt_norm",
        "transformer.decoder.layers.#.catext_norm",
        "detr_decoder.layers.#.text_cross_attn_layer_norm",
    ),
    ("decoder.blocks.#.image_norm", "transformer.decoder.layers.#.norm1", "detr_decoder.layers.#.vision_cross_attn_layer_norm"),
    ("decoder.blocks.#.ffn_norm", "transformer.decoder.layers.#.norm3", "detr_decoder.layers.#.mlp_layer_norm"),
    ("decoder.out_norm", "transformer.decoder.norm", "detr_decoder.output_layer_norm"),
    ("decoder.box_head.#", "transformer.decoder.bbox_embed.layers.#", "detr_decoder.box_head.layer+"),
    ("decoder.box_bias.x.#", "transformer.decoder.boxRPB_embed_x.layers.#", "detr_decoder.box_rpb_embed_x.layer+"),
    ("decoder.box_bias.y.#", "transformer.decoder.boxRPB_embed_y.layers.#", "detr_decoder.box_rpb_embed_y.layer+"),
    ("decoder.box_pos.#", "transformer.decoder.ref_point_head.layers.#", "detr_decoder.ref_point_head.layer+"),
    ("decoder.queries", "transformer.decoder.query_embed.weight", "detr_decoder.query_embed.weight"),
    ("decoder.anchors", "transformer.decoder.reference_points.weight", "detr_decoder.reference_points.weight"),
    ("decoder.presence.token", "transformer.decoder.presence_token.weight", "detr_decoder.presence_token.weight"),
    ("decoder.presence.norm", "transformer.decoder.presence_token_out_norm", "detr_decoder.presence_layer_norm"),
    ("decoder.presence.head.#", "transformer.decoder.presence_token_head.layers.#", "detr_decoder.presence_head.layer+"),
    ("scorer.mlp.expand", "dot_prod_scoring.prompt_mlp.layers.0", "dot_product_scoring.text_mlp.layer1"),
    ("scorer.mlp.contract", "dot_prod_scoring.prompt_mlp.layers.1", "dot_product_scoring.text_mlp.layer2"),
    ("scorer.norm", "dot_prod_scoring.prompt_mlp.out_norm", "dot_product_scoring.text_mlp_out_norm"),
    ("scorer.prompt_proj", "dot_prod_scoring.prompt_proj", "dot_product_scoring.text_proj"),
    ("scorer.query_proj", "dot_prod_scoring.hs_proj", "dot_product_scoring.query_proj"),
)
_COLUMN = {"ours": 0, "original": 1, "huggingface": 2}
_SCOPES = {
    "original": ("transformer.encoder.", "transformer.decoder.", "dot_prod_scoring."),
    "huggingface": ("detr_encoder.", "detr_decoder.", "dot_product_scoring."),
    "ours": ("encoder.", "decoder.", "scorer."),
}
_PACKED = re.compile(r"(.*(?:self_attn|prompt_attn|image_attn|cross_attn_image|ca_text|cross_attn))\.in_proj_(weight|bias)")
_SPLIT = re.compile(r"(.*)\.([qkv])_proj\.(weight|bias)")


def _pattern(name: str) -> re.Pattern[str]:
    source = re.escape(name).replace(r"\#", "([0-9]+)").replace(r"\+", "([0-9]+)").replace("#", "([0-9]+)")
    return re.compile(source + r"(\..*)?")


def _rename(key: str, source: Naming, target: Naming) -> str | None:
    """The name of a weight in another naming, or None if the table has none for it."""
    for row in _TABLE:
        here, there = row[_COLUMN[source]], row[_COLUMN[target]]
        found = _pattern(here).fullmatch(key)
        if found is None:
            continue
        *numbers, rest = found.groups()
        if numbers:
            number = int(numbers[0]) - here.endswith("+") + there.endswith("+")
            there = there.replace("#", str(number)).replace("+", str(number))
        return there + (rest or "")
    return None


class OriginalKeys:
    """Our names in facebookresearch/sam3, with packed projections.

    Args:
        prefix: what stands before our part names in the state dict at hand: "encoder." for a lone FusionEncoder.
        theirs: likewise what is cut from the release's names: "transformer.encoder." for a lone module.
    """

    naming: Naming = "original"

    def __init__(self, prefix: str = "", theirs: str = ""):
        self.prefix, self.theirs = prefix, theirs

    def to_reference(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename and join.

        Raises:
            KeyError: for a weight without a counterpart, or a projection that comes without its two companions.
        """
        renamed: dict[str, Tensor] = {}
        packed: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, value in ours.items():
            name = self._translate(self.prefix + key, "ours", self.naming)
            found = _SPLIT.fullmatch(name)
            if found is None:
                renamed[name] = value
            else:
                packed.setdefault((found[1], found[3]), {})[found[2]] = value
        for (attention, kind), parts in packed.items():
            if set(parts) != set("qkv"):
                raise KeyError(f"{attention} needs the {kind} of its q, k and v projections, got {', '.join(sorted(parts))}")
            renamed[f"{attention}.in_proj_{kind}"] = torch.cat([parts[p] for p in "qkv"])
        return {k.removeprefix(self.theirs): v for k, v in renamed.items()}

    def from_reference(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Split and rename.

        Raises:
            KeyError: for a name that is none of the fusion modules'.
            ValueError: for a packed projection whose rows are not three times its columns.
        """
        ours: dict[str, Tensor] = {}
        for key, value in theirs.items():
            found = _PACKED.fullmatch(self.theirs + key)
            if found is None:
                ours[self._translate(self.theirs + key, self.naming, "ours")] = value
                continue
            if value.shape[0] % 3 or (value.ndim == 2 and value.shape[0] != 3 * value.shape[1]):
                raise ValueError(f"{key}: a packed projection stacks q, k and v, got shape {tuple(value.shape)}")
            for part, rows in zip("qkv", value.chunk(3)):
                ours[self._translate(f"{found[1]}.{part}_proj.{found[2]}", self.naming, "ours")] = rows.clone()
        return {k.removeprefix(self.prefix): v for k, v in ours.items()}

    @staticmethod
    def _translate(key: str, source: Naming, target: Naming) -> str:
        name = _rename(key, source, target)
        if name is None:
            raise KeyError(f"{key!r} is not a weight of the fusion modules ({source} naming)")
        return name


class HuggingFaceKeys:
    """Our names in transformers' `Sam3Model`: projections are split, their output is `o_proj`, MLP layers count from one."""

    naming: Naming = "huggingface"

    def to_reference(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename.

        Raises:
            KeyError: for a weight without a counterpart.
        """
        return {self._translate(k, "ours", self.naming).replace("attn.out_proj.", "attn.o_proj."): v for k, v in ours.items()}

    def from_reference(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename back.

        Raises:
            KeyError: for a name that is none of the fusion modules'.
        """
        return {self._translate(k.replace("attn.o_proj.", "attn.out_proj."), self.naming, "ours"): v for k, v in theirs.items()}

    _translate = staticmethod(OriginalKeys._translate)


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What came of loading a checkpoint.

    Attributes:
        naming: the naming the file uses.
        loaded: number of our weights that were set.
        missing: our weights that the file does not have.
        unexpected: weights the file has for these parts and the model has no place for.
        misshapen: weights whose shapes differ (ours, then theirs).
        others: number of weights of parts that are not fusion modules, by part.
    """

    naming: Naming
    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]
    others: Mapping[str, int]

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        lines = [f"{self.loaded} weights loaded from a checkpoint in {self.naming} naming"]
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.misshapen)):
            if names:
                lines.append(f"{len(names)} {title}: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}")
        if self.others:
            lines.append("not fusion, left alone: " + ", ".join(f"{part} ({count})" for part, count in self.others.items()))
        return "\n".join(lines)


class KeysDiffer(ValueError):
    """A checkpoint that does not fit the model both ways. `report` lists every difference; nothing was loaded."""

    def __init__(self, report: LoadReport):
        super().__init__(str(report))
        self.report = report


def _flatten(state: Mapping[str, object]) -> dict[str, Tensor]:
    """The weights of a checkpoint, out of its `model` entry and without the detector's and the wrapper's prefix."""
    nested = state.get("model", state.get("state_dict", state))
    if not isinstance(nested, Mapping):
        raise ValueError(f"a checkpoint maps names to tensors; its model entry is a {type(nested).__name__}")
    flat: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Tensor):
            name = str(key).removeprefix("module.").removeprefix("detector.")
            if name in flat:
                raise ValueError(f"the checkpoint has {source[name]!r} and {key!r}, which are one weight; remove one of them")
            flat[name], source[name] = value, str(key)
    if not flat:
        raise ValueError("the checkpoint holds no tensors")
    return flat


def naming_of(names: Iterable[str]) -> Naming:
    """The naming a set of weights uses.

    Raises:
        ValueError: if none of the three fits.
    """
    names = list(names)
    hits = {n: sum(name.startswith(_SCOPES[n]) for name in names) for n in ("original", "huggingface", "ours")}
    best = max(hits, key=lambda n: hits[n])
    if not hits[best]:
        raise ValueError(f"no weight of the fusion modules among {len(names)} names, e.g. {', '.join(sorted(names)[:4])}")
    return best  # type: ignore[return-value]


def read(model: nn.Module, state: Mapping[str, object], *, strict: bool = True) -> LoadReport:
    """Load the fusion weights of a checkpoint into the parts of `model` called `encoder`, `decoder` and `scorer`.

    Args:
        model: has at least one of these parts; only those it has are loaded.
        state: a state dict, possibly under `model` and with the prefix `detector.`, in any of the three namings.
        strict: raise if anything differs. False loads what fits and reports the rest.

    Raises:
        KeysDiffer: in strict mode, for missing, unexpected or misshapen weights; the model is then unchanged.
        ValueError: if the checkpoint has no fusion weights, or one of them under two names, or the model no such part.
    """
    parts = tuple(p for p in PARTS if isinstance(getattr(model, p, None), nn.Module))
    if not parts:
        raise ValueError(f"{type(model).__name__} has none of the parts {', '.join(PARTS)}")
    flat = _flatten(state)
    naming = naming_of(flat)
    scopes = dict(zip(PARTS, _SCOPES[naming]))
    theirs = {k: v for k, v in flat.items() if k.startswith(tuple(scopes[p] for p in parts))}
    others = Counter(k.split(".")[0] for k in flat if k not in theirs)
    found, unknown = _translated(theirs, naming)
    own = {f"{p}.{k}": v for p in parts for k, v in getattr(model, p).state_dict().items()}
    fitting = {k: v for k, v in found.items() if k in own and own[k].shape == v.shape}
    report = LoadReport(
        naming,
        len(fitting),
        tuple(k for k in own if k not in found),
        tuple([k for k in found if k not in own] + unknown),
        tuple(f"{k} {tuple(own[k].shape)} / {tuple(v.shape)}" for k, v in found.items() if k in own and own[k].shape != v.shape),
        dict(others),
    )
    if strict and not report.complete:
        raise KeysDiffer(report)
    for p in parts:
        getattr(model, p).load_state_dict(
            {k.removeprefix(p + "."): v for k, v in fitting.items() if k.startswith(p + ".")}, strict=False
        )
    return report


def _translated(theirs: Mapping[str, Tensor], naming: Naming) -> tuple[dict[str, Tensor], list[str]]:
    """Weights by our names, and the names that no rule knows."""
    if naming == "ours":
        return dict(theirs), []
    keys = OriginalKeys() if naming == "original" else HuggingFaceKeys()
    found: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    unknown: list[str] = []
    for key, value in theirs.items():
        try:
            made = keys.from_reference({key: value})
        except (KeyError, ValueError):
            unknown.append(key)
            continue
        for name in made:
            if name in found:
                raise ValueError(f"the checkpoint has {source[name]!r} and {key!r}, which both are {name}; remove one of them")
            source[name] = key
        found.update(made)
    return found, unknown


def more_queries(state: Mapping[str, Tensor], queries: int) -> dict[str, Tensor]:
    """A state dict (our naming) with more object queries than were trained.

    New queries repeat the trained embeddings in order. Their anchors keep the repeated anchor's width and height and
    take new centres from a low-discrepancy sequence over the image: an equal row would give an equal answer.

    Raises:
        ValueError: for fewer queries than the state has.
        KeyError: if the state has no decoder queries.
    """
    prefix = next((k.removesuffix("queries") for k in state if k == "queries" or k.endswith("decoder.queries")), None)
    if prefix is None:
        raise KeyError("the state dict has no decoder queries")
    trained, anchors = state[prefix + "queries"], state[prefix + "anchors"]
    extra = queries - trained.shape[0]
    if extra < 0:
        raise ValueError(f"queries must be at least the trained {trained.shape[0]}, got {queries}")
    index = torch.arange(extra) % trained.shape[0]
    step = torch.tensor([0.7548776662466927, 0.5698402909980532], dtype=torch.float64)  # 1/g, 1/g² with g³ = g + 1
    centre = (0.5 + torch.arange(1, extra + 1, dtype=torch.float64)[:, None] * step) % 1.0
    fresh = torch.cat((torch.logit(centre, eps=1e-3).to(anchors), anchors[index, 2:]), dim=1)
    grown = {prefix + "queries": torch.cat((trained, trained[index])), prefix + "anchors": torch.cat((anchors, fresh))}
    return {**state, **grown}
