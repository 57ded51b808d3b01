"""CLIP's vision transformer as a re-identification backbone: camera-aware, for any image size, with all tokens projected.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, sec. 2.4; the camera embedding
is TransReID's side information (He et al., ICCV 2021, sec. 3.3) as DeMo (Wang et al., AAAI 2025) uses it with CLIP: added to the class
token alone, before positions and the first norm.

ViT-B/16 at 256 × 128: 16 × 8 = 128 patch tokens and the class token, width 768, out 512.

Axes: b batch, n tokens (class token first), c width, d output width; y, x rows and columns of the patch grid.
"""

from __future__ import annotations

import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from core.checkpoint import CheckpointError, LoadReport, load_model, read_weights
from core.layers import QuickGELU, TransformerBlock, resize_positions
from core.options import require_idle
from core.registry import register


class CameraEmbedding(nn.Module):
    """A learned vector for each training camera.

    Args:
        cameras: number of training cameras; labels are 0 … cameras - 1.
        dim: width c.
        weight: factor on the vectors.
        std: of their normal initialisation (truncated at two).
        unseen: what a camera outside the table gets: an `error`, or `zero`, no shift at all.
    """

    def __init__(self, cameras: int, dim: int, weight: float = 1.0, std: float = 0.02, unseen: Literal["error", "zero"] = "error"):
        super().__init__()
        if cameras < 1:
            raise ValueError(f"cameras must be at least 1, got {cameras}")
        self.weight, self.unseen = weight, unseen
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(cameras, dim), std=std, a=-2 * std, b=2 * std))

    def forward(self, cameras: Int[Tensor, "b"]) -> Float[Tensor, "b c"]:
        """The cameras' vectors.

        Raises:
            ValueError: for an unseen camera, if those are errors. In training on an accelerator, and in compiled or
                exported code, nothing waits for this check: the vector is NaN there, which the trainer and the evaluation refuse.
        """
        known = (cameras >= 0) & (cameras < len(self.table))
        readable = cameras.device.type != "meta"  # on the meta device there is nothing to look at
        waits = readable and (cameras.device.type == "cpu" or not self.training)
        if self.unseen == "error" and waits and not torch.compiler.is_compiling() and not bool(known.all()):
            raise ValueError(
                f"camera {int(cameras[~known][0])} is not among the {len(self.table)} training cameras; relabel it, or set the "
                "backbone's camera_unseen = 'zero' to go on without its embedding"
            )
        rows = self.table[cameras.clamp(0, len(self.table) - 1)]
        return torch.where(known[:, None], rows * self.weight, torch.nan if self.unseen == "error" else 0.0)


@register("backbone", paper="CLIP, sec. 2.4; TransReID, sec. 3.3; DeMo")
class CLIPVisionTransformer(nn.Module):
    """CLIP ViT visual tower: patches, class token, pre-norm blocks with QuickGELU, final norm and projection of every token.

    Args:
        cameras: training cameras that have an embedding; 0 for none.
        image_size: height and width the positions are stored for. Other sizes work too, with resampled positions.
        patch: side of a patch in pixels.
        stride: step between patches in pixels; None is `patch`. Smaller steps overlap.
        width: channels c.
        layers: transformer blocks.
        heads: attention heads; divides `width`.
        output_dim: channels d after the projection.
        drop_path: largest rate of stochastic depth; grows linearly from 0 over the blocks.
        camera_weight: factor on the camera embedding.
        camera_std: of its initialisation (the release: 0.02; its fork later 1e-6).
        camera_unseen: what a camera without an embedding gives: an `error`, or `zero` (no shift).
        weights: file with pretrained weights (see `load_weights`), read after initialisation (but on the meta device).
        weights_grid: rows and columns of the grid that the file's positions are of; None is CLIP's square. The file does not say it,
            and numbers of places do not tell 16 × 8 from 8 × 16, so it is needed for weights of a tower that was not CLIP's square.

    Raises:
        ValueError: for sizes that do not fit each other.
        core.checkpoint.CheckpointError: if the weight file does not hold this tower.
    """

    def __init__(
        self,
        cameras: int = 0,
        *,
        image_size: tuple[int, int] = (256, 128),
        patch: int = 16,
        stride: int | None = None,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        output_dim: int = 512,
        drop_path: float = 0.0,
        camera_weight: float = 1.0,
        camera_std: float = 0.02,
        camera_unseen: Literal["error", "zero"] = "error",
        weights: str | None = None,
        weights_grid: tuple[int, int] | None = None,
    ):
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        if cameras < 0:
            raise ValueError(f"cameras must be 0 (no embedding) or more, got {cameras}")
        if weights is None:
            require_idle(CLIPVisionTransformer, {"weights_grid": weights_grid}, "no weights are read (weights = None)")
        self.patch, self.stride, self.width, self.output_dim = patch, patch if stride is None else stride, width, output_dim
        if not 1 <= self.stride <= patch:
            raise ValueError(f"stride must be in [1, patch = {patch}], got {self.stride}; a larger one leaves pixels out")
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.grid = self.grid_of(*self.image_size)
        self.patches = nn.Conv2d(3, width, patch, self.stride, bias=False)
        self.class_token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positions = nn.Parameter(torch.randn(1 + self.num_patches, width) * width**-0.5)
        self.camera = CameraEmbedding(cameras, width, camera_weight, camera_std, camera_unseen) if cameras else None
        self.norm_pre = nn.LayerNorm(width)
        rates = [drop_path * i / max(1, layers - 1) for i in range(layers)]
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, 4.0, QuickGELU, rate) for rate in rates)
        self.norm_post = nn.LayerNorm(width)
        self.projection = nn.Parameter(torch.randn(width, output_dim) * width**-0.5)
        self._initialise()
        counted = self.class_token.is_meta  # has no values to load into
        self.report: LoadReport | None = None if weights is None or counted else load_weights(self, Path(weights), weights_grid)

    def _initialise(self) -> None:
        """CLIP's initial scales: what adds to the residual stream is smaller the more layers there are."""
        stream = self.width**-0.5 * (2 * len(self.blocks)) ** -0.5
        for name, parameter in self.blocks.named_parameters():
            if name.endswith("bias") or "norm" in name:
                continue
            std = (
                (2 * self.width) ** -0.5
                if "expand" in name
                else stream
                if "out." in name or "contract" in name
                else self.width**-0.5
            )
            nn.init.normal_(parameter, std=std)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("qkv.bias", "out.bias")):
                nn.init.zeros_(parameter)

    @property
    def num_patches(self) -> int:
        """Patch tokens at `image_size`."""
        return self.grid[0] * self.grid[1]

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image.

        Raises:
            ValueError: if the image is smaller than a patch.
        """
        if min(height, width) < self.patch:
            raise ValueError(f"an image of {height} × {width} is smaller than one patch of {self.patch}")
        return (height - self.patch) // self.stride + 1, (width - self.patch) // self.stride + 1

    def forward(self, images: Float[Tensor, "b 3 h w"], cameras: Int[Tensor, "b"] | None = None) -> Float[Tensor, "b n d"]:
        """All tokens, class token first, normed and projected.

        Raises:
            ValueError: if the tower embeds cameras and none are given, or one is unseen (`camera_unseen`).
        """
        return self.project(self.run(self.embed(images, self.camera_shift(cameras))))

    # The three parts, for whoever takes tokens out between blocks: embed, run (any stretch of blocks), project.

    def camera_shift(self, cameras: Int[Tensor, "b"] | None) -> Float[Tensor, "b c"] | None:
        """What the cameras add to the class token; None where the tower embeds no cameras (labels are then not needed)."""
        if self.camera is None:
            return None
        if cameras is None:
            raise ValueError(
                f"this tower embeds {len(self.camera.table)} cameras; give the camera of each image, or build it with cameras = 0"
            )
        shift: Tensor = self.camera(cameras)
        return shift

    def embed(self, images: Float[Tensor, "b 3 h w"], shift: Float[Tensor, "b c"] | None = None) -> Float[Tensor, "b n c"]:
        """Patch tokens behind the class token, with positions, after the first norm. `shift` is added to the class token."""
        grid = self.grid_of(images.shape[2], images.shape[3])
        # Back to the weights' type: under autocast the convolution gives half precision, the residual stream stays full.
        patches = rearrange(self.patches(images), "b c y x -> b (y x) c").to(self.positions.dtype)
        first: Tensor = repeat(self.class_token, "c -> b 1 c", b=len(images))
        if shift is not None:
            first = first + rearrange(shift, "b c -> b 1 c")
        tokens = torch.cat([first, patches], 1) + resize_positions(self.positions, self.grid, grid)
        normed: Tensor = self.norm_pre(tokens)
        return normed

    def run(self, tokens: Float[Tensor, "b n c"], first: int = 0, last: int | None = None) -> Float[Tensor, "b n c"]:
        """Blocks `first` to before `last` (None: to the end), on any number of tokens."""
        for block in self.blocks[first:last]:
            tokens = block(tokens)
        return tokens

    def project(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n d"]:
        """Final norm and projection of every token."""
        projected: Tensor = self.norm_post(tokens) @ self.projection
        return projected


# --- names in released weights --------------------------------------------------------------------------------------

_CLIP = (  # (ours, OpenAI's), regular expressions on one side and templates on the other
    ("class_token", "class_embedding"),
    ("positions", "positional_embedding"),
    ("projection", "proj"),
    ("patches.weight", "conv1.weight"),
    ("norm_pre", "ln_pre"),
    ("norm_post", "ln_post"),
    ("attention.qkv.weight", "attn.in_proj_weight"),
    ("attention.qkv.bias", "attn.in_proj_bias"),
    ("attention.out", "attn.out_proj"),
    ("norm_attention", "ln_1"),
    ("norm_mlp", "ln_2"),
    ("mlp.expand", "mlp.c_fc"),
    ("mlp.contract", "mlp.c_proj"),
)
_HUGGING_FACE = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"^(?:blocks|transformer\.resblocks|encoder\.layers)\.(\d+)\.")


def _renamed(key: str, names: Mapping[str, str], block: str) -> str:
    """`key` with its block prefix replaced, and its stem by the longest entry of `names` that it begins with."""
    found = _BLOCK.match(key)
    prefix, rest = (f"{block}.{found.group(1)}.", key[found.end() :]) if found else ("", key)
    for old in sorted(names, key=len, reverse=True):
        if rest == old or rest.startswith(old + "."):
            return prefix + names[old] + rest[len(old) :]
    return prefix + rest


class ReferenceKeys:
    """Our state-dict keys in OpenAI's naming (`visual.` left off). A pure renaming: all shapes are equal.

    The camera embedding is no part of CLIP; in a checkpoint of the whole re-identification model it is `cv_embed`
    (cameras, 1, c), and this map reads and writes it there.
    """

    def to_reference(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = dict(_CLIP)
        renamed = {_renamed(k, names, "transformer.resblocks"): v for k, v in ours.items() if k != "camera.table"}
        if "camera.table" in ours:
            renamed["cv_embed"] = ours["camera.table"][:, None]
        return renamed

    def from_reference(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {theirs: ours for ours, theirs in _CLIP}
        renamed = {_renamed(k, names, "blocks"): v for k, v in theirs.items() if k != "cv_embed"}
        if "cv_embed" in theirs:
            renamed["camera.table"] = theirs["cv_embed"][:, 0]
        return renamed


def _from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's `vision_model.…` and `visual_projection.weight` in OpenAI's naming, q, k and v packed."""
    names = {theirs: ours for ours, theirs in _HUGGING_FACE.items()}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "visual_projection.weight":
            found["proj"] = value.T
        elif key.startswith("vision_model.") and not key.endswith("position_ids"):
            found[_renamed(key.removeprefix("vision_model."), names, "transformer.resblocks")] = value
    for key in [k for k in found if ".self_attn.q_proj." in k]:
        parts = [found.pop(key.replace("q_proj", p), None) for p in ("q_proj", "k_proj", "v_proj")]
        present = [p for p in parts if p is not None]
        found[key.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(present)
    return found


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of a weight file; a TorchScript archive (OpenAI's own downloads are such) is opened as one, on the CPU."""
    if path.is_file() and path.suffix != ".safetensors" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if scripted:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
            except Exception as error:
                raise CheckpointError(f"cannot read the TorchScript archive {path}: {str(error).splitlines()[0]}") from error
    return read_weights(path)


def load_weights(tower: CLIPVisionTransformer, path: Path, grid: tuple[int, int] | None = None) -> LoadReport:
    """Load pretrained weights: a state dict (.pt, .safetensors) or OpenAI's TorchScript archive; OpenAI's or Hugging Face's naming.

    Of a whole CLIP only the vision tower is read (`visual.…` or `vision_model.…`); a file of the tower alone, in OpenAI's or in
    our own naming, works too. Positions of another grid are resampled bilinearly to ours; half precision becomes float32. The
    camera embedding is not part of CLIP and keeps its initial values unless the file has one.

    Args:
        tower: what to load into.
        path: the file.
        grid: rows and columns of the file's positions. None is the square grid of CLIP's square images; a file in our own naming,
            which may be of any tower, and one with no square number of places then are errors.

    Raises:
        core.checkpoint.CheckpointError: if the file cannot be read, the grid of its positions is not known or not theirs, or a
            tensor is missing, unexpected or of another shape; the message lists them and nothing is loaded.
    """
    state = _read(path)
    if any(k.startswith("vision_model.") for k in state):
        state = _from_hugging_face(state)
    elif any(k.startswith("visual.") for k in state):
        state = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    ours = {k: v.float() for k, v in ReferenceKeys().from_reference(state).items()}
    positions = ours.get("positions")
    if positions is not None and positions.ndim == 2:
        ours["positions"] = _refit(positions, tower, path, grid, released="positions" not in state)
    return load_model(tower, ours, what=str(path), allow=("camera.",))


def _refit(positions: Tensor, tower: CLIPVisionTransformer, path: Path, grid: tuple[int, int] | None, *, released: bool) -> Tensor:
    """A file's positions on the tower's grid; `released`: in a release's naming, so that None is CLIP's square grid."""
    places = len(positions) - 1
    if grid is None:
        side = math.isqrt(max(places, 0))
        why = "are not those of a square grid, as CLIP's own are" if side * side != places else ""
        why = why or ("" if released else "are in this project's own naming, in which a tower may have any grid")
        if why:
            raise CheckpointError(
                f"{path} has {places} places, which {why}; set sdtps.CLIPVisionTransformer.weights_grid to the (rows, columns) of the tower that it is "
                f"of: {tower.grid} if it was built as this one was"
            )
        grid = (side, side)
    elif grid[0] * grid[1] != places:
        raise CheckpointError(
            f"{path} has {places} places, and weights_grid = {tuple(grid)} are {grid[0] * grid[1]}; give its own grid"
        )
    return resize_positions(positions, (int(grid[0]), int(grid[1])), tower.grid)
