"""Released weights: how our names and shapes map to those of the release, and loading its checkpoints strictly.

    | ours                                        | release                                                        |
    |---------------------------------------------|----------------------------------------------------------------|
    | backbone.stem.N                             | backbone.patch_embed.proj.N                                    |
    | backbone.stages.I.blocks.J.position         | backbone.layers.I.blocks.J.cnn_pos_encode.dwconv               |
    | ….attention.to_{query,key,value,out}        | ….Attention.{q,k,v,out}_proj                                   |
    | ….attention.enhance, ….prior.weight         | ….Attention.lepe.dwconv, ….Geo.weight                          |
    | ….ffn.{expand,local,shrink}                 | ….ffn.{fc1, dwconv.dwconv, fc2}                                |
    | ….gamma1, ….norm1                           | ….gamma_1, ….layer_norm1                                       |
    | ….downsample.reduce, backbone.out_norms.N   | ….downsample.reduction, backbone.extra_norms.N                 |
    | head.{squeeze,align}.norm, head.classify    | decode_head.{squeeze,align}.bn, decode_head.conv_seg           |
    | head.hamburger.{enter, leave.norm}          | decode_head.hamburger.{ham_in.conv, ham_out.bn}                |
    | encoder_alignment.I.U (block)               | backbone.encoder_sam_blocks.I.U                                |
    | encoder_alignment.I.0 (export)              | backbone.encoder_sam_stage_modules.I                           |
    | decoder_alignment.I                         | decode_head.dec_sam_layers.(I - 1)                             |
    | to_{query,key,value,out} of a SAM           | {q,k,v,out}_proj                                               |
    | ffn.{expand,contract} of a SAM              | ffn.{0,3}                                                      |

The constants Geo.decay and Geo.angle, and a SAM's gamma_scale, say how a checkpoint's model was configured; ours are compared
with them. Profiler counters (total_ops, total_params) and the stored 1/sqrt(d_k) are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.checkpoint import CheckpointError, LoadReport, load_model, read_weights
from plugins.sam.dformer import rotary_angles

# (ours, release), each a pattern of the other's text with {n} for an index. Order matters: first match wins.
_BACKBONE = (
    ("stem.{n}.", "patch_embed.proj.{n}."),
    ("stages.{n}.", "layers.{n}."),
    (".position.", ".cnn_pos_encode.dwconv."),
    (".attention.to_query.", ".Attention.q_proj."),
    (".attention.to_key.", ".Attention.k_proj."),
    (".attention.to_value.", ".Attention.v_proj."),
    (".attention.to_out.", ".Attention.out_proj."),
    (".attention.enhance.", ".Attention.lepe.dwconv."),
    (".prior.weight", ".Geo.weight"),
    (".ffn.expand.", ".ffn.fc1."),
    (".ffn.shrink.", ".ffn.fc2."),
    (".ffn.local.", ".ffn.dwconv.dwconv."),
    (".gamma{n}", ".gamma_{n}"),
    (".norm{n}.", ".layer_norm{n}."),
    (".downsample.reduce.", ".downsample.reduction."),
    ("out_norms.{n}.", "extra_norms.{n}."),
)
_HEAD = (
    (".squeeze.norm.", ".squeeze.bn."),
    (".align.norm.", ".align.bn."),
    (".hamburger.enter.", ".hamburger.ham_in.conv."),
    (".hamburger.leave.conv.", ".hamburger.ham_out.conv."),
    (".hamburger.leave.norm.", ".hamburger.ham_out.bn."),
    (".classify.", ".conv_seg."),
)
_ALIGNMENT = (
    ("to_query.", "q_proj."),
    ("to_key.", "k_proj."),
    ("to_value.", "v_proj."),
    ("to_out.", "out_proj."),
    ("ffn.expand.", "ffn.0."),
    ("ffn.contract.", "ffn.3."),
)
IGNORED = ("total_ops", "total_params", "_inv_sqrt_dk")
_CONSTANT = re.compile(r"(?P<block>.*)\.Geo\.(?P<name>decay|angle)$")


def _rename(key: str, table: tuple[tuple[str, str], ...], back: bool) -> str:
    for ours, theirs in table:
        source, target = (theirs, ours) if back else (ours, theirs)
        pattern = re.escape(source).replace(re.escape("{n}"), r"(\d+)")
        key = re.sub(pattern, target.replace("{n}", r"\g<1>"), key, count=1)
    return key


class AlignmentKeys:
    """Names of one SemanticAlignment in the release."""

    def to_reference(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {_rename(k, _ALIGNMENT, back=False): v for k, v in ours.items()}

    def from_reference(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {_rename(k, _ALIGNMENT, back=True): v for k, v in theirs.items() if not k.endswith(IGNORED)}


class BackboneKeys:
    """Names and shapes of the backbone in the release."""

    def to_reference(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for key, value in ours.items():
            name = _rename(key, _BACKBONE, back=False)
            if name.endswith((".gamma_1", ".gamma_2")):
                value = value.reshape(1, 1, 1, -1)
            elif name.endswith(".Geo.weight"):
                value = value.reshape(2, 1, 1, 1)
            out[name] = value
        return out

    def from_reference(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for key, value in theirs.items():
            if key.endswith(IGNORED) or _CONSTANT.match(key):
                continue
            flat = key.endswith((".gamma_1", ".gamma_2", ".Geo.weight"))
            out[_rename(key, _BACKBONE, back=True)] = value.reshape(-1) if flat else value
        return out


class SegmentorKeys:
    """Names of the whole model in the release.

    Args:
        placement: where the encoder SAMs sit, `block` or `export` (their names differ in the release).
    """

    def __init__(self, placement: Literal["block", "export"] = "block"):
        self.placement = placement

    def to_reference(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for key, value in ours.items():
            part, rest = key.split(".", 1)
            if part == "backbone":
                out.update({f"backbone.{k}": v for k, v in BackboneKeys().to_reference({rest: value}).items()})
            elif part == "head":
                out[_rename(f"decode_head.{rest}", _HEAD, back=False)] = value
            elif part == "encoder_alignment":
                stage, unit, rest = rest.split(".", 2)
                place = f"sam_blocks.{stage}.{unit}" if self.placement == "block" else f"sam_stage_modules.{stage}"
                out[f"backbone.encoder_{place}.{_rename(rest, _ALIGNMENT, back=False)}"] = value
            else:
                stage, rest = rest.split(".", 1)
                out[f"decode_head.dec_sam_layers.{int(stage) - 1}.{_rename(rest, _ALIGNMENT, back=False)}"] = value
        return out

    def from_reference(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        block = self.placement == "block"
        for key, value in theirs.items():
            if key.endswith(IGNORED) or _CONSTANT.match(key):
                continue
            if block and (m := re.match(r"backbone\.encoder_sam_blocks\.(\d+)\.(\d+)\.(.*)", key)):
                out[f"encoder_alignment.{m[1]}.{m[2]}.{_rename(m[3], _ALIGNMENT, back=True)}"] = value
            elif not block and (m := re.match(r"backbone\.encoder_sam_stage_modules\.(\d+)\.(.*)", key)):
                out[f"encoder_alignment.{m[1]}.0.{_rename(m[2], _ALIGNMENT, back=True)}"] = value
            elif m := re.match(r"decode_head\.dec_sam_layers\.(\d+)\.(.*)", key):
                out[f"decoder_alignment.{int(m[1]) + 1}.{_rename(m[2], _ALIGNMENT, back=True)}"] = value
            elif key.startswith("backbone.encoder_sam_"):
                out[key] = value  # of the other placement: unexpected, though its shapes may fit
            elif key.startswith("backbone."):
                rest = BackboneKeys().from_reference({key.removeprefix("backbone."): value})
                out.update({f"backbone.{k}": v for k, v in rest.items()})
            elif key.startswith("decode_head."):
                out["head." + _rename(key, _HEAD, back=True).removeprefix("decode_head.")] = value
            else:
                out[key] = value  # unexpected: the report names it
        return out


def _angle(backbone: Any, stage: int) -> Tensor:
    """What the release stores: by how much one step to the right turns each channel of a head."""
    dim_head = backbone.dims[stage] // backbone.heads[stage]
    return rotary_angles(dim_head, backbone.rope_index, (1, 2), torch.device("cpu"))[0, 1].repeat_interleave(2)


def _check_constants(model: nn.Module, theirs: Mapping[str, Tensor], what: str) -> None:
    """Compare the constants that a checkpoint stores with ours: another decay is another model, whatever the shapes say."""
    modules = dict(model.named_modules())
    for key, value in theirs.items():
        if not (m := _CONSTANT.match(key)):
            continue
        name = f"backbone.{_rename(m['block'].removeprefix('backbone.') + '.', _BACKBONE, back=True)}prior"
        prior = modules.get(name) or modules.get(name.removeprefix("backbone."))
        if prior is None:
            continue
        if m["name"] == "decay":
            ours, check = prior.decay.cpu(), "heads and heads_range"
        else:
            ours, check = (
                _angle(getattr(model, "backbone", model), int(name.split("stages.")[1].split(".")[0])),
                "heads and rope_index",
            )
        rounded = ours.to(value.dtype).to(ours.dtype)  # a file of half precision holds the constants so
        if ours.shape != value.shape or not torch.allclose(rounded, value.cpu().to(ours.dtype), atol=1e-5):
            raise CheckpointError(f"{what}: {key} is {value.tolist()}, this model has {ours.tolist()}; check {check}")
    ours_state = SegmentorKeys(getattr(model, "encoder_placement", "block")).to_reference(
        {k: v for k, v in model.state_dict().items() if k.startswith(("encoder_alignment.", "decoder_alignment."))}
    )
    for key, value in theirs.items():
        if key.endswith(".gamma_scale") and key in ours_state and float(value) != float(ours_state[key]):
            raise CheckpointError(f"{what}: {key} is {float(value)}, this model has gamma_scale {float(ours_state[key])}")


def load_segmentor(model: nn.Module, path: Path) -> LoadReport:
    """Load a released checkpoint of a whole model into a Segmentor, every tensor or none.

    Raises:
        CheckpointError: with the missing, unexpected and mismatched names, or the constant that differs.
    """
    theirs = _read(path)
    _check_constants(model, theirs, str(path))
    keys = SegmentorKeys(getattr(model, "encoder_placement", "block"))
    return load_model(model, keys.from_reference(theirs), what=str(path))


def load_pretrained_backbone(model: nn.Module, path: Path) -> LoadReport:
    """Load a released pretraining checkpoint (DFormerv2_*_pretrained.pth) into a DFormer.

    The pretraining classifier and what else is no part of the backbone is ignored by name; the output norms, which
    pretraining does not have, keep their initial values.

    Raises:
        CheckpointError: with the names that do not fit.
    """
    theirs = {k.removeprefix("backbone."): v for k, v in _read(path).items()}
    _check_constants(model, theirs, str(path))
    ours = BackboneKeys().from_reference(theirs)
    classifier = tuple(k for k in ours if k.split(".")[0] in ("head", "norm", "proj", "fc", "classifier", "aux_head"))
    return load_model(model, ours, what=str(path), ignore=classifier or (), allow=("out_norms.",))


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, without data-parallel prefixes."""
    return {k.removeprefix("module."): v for k, v in read_weights(path).items()}
