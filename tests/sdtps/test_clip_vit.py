"""The CLIP tower: its equations in loops, any image size, cameras, and pretrained weights in every form they come in."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from core import golden
from core.checkpoint import CheckpointError
from core.layers import resize_positions
from plugins.sdtps.clip_vit import CameraEmbedding, CLIPVisionTransformer, ReferenceKeys, load_weights

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"image_size": (16, 8), "patch": 4, "width": 12, "layers": 2, "heads": 3, "output_dim": 5}


def norm(x, layer):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


@torch.no_grad()
def tokens_by_hand(tower, image, shift):
    """One image (3, h, w): patches cut by hand, then each block token by token."""
    _, height, width = image.shape
    step, side, heads = tower.stride, tower.patch, tower.blocks[0].attention.heads
    cut = [
        image[:, y : y + side, x : x + side] for y in range(0, height - side + 1, step) for x in range(0, width - side + 1, step)
    ]
    patches = torch.stack([(p * kernel).sum() for p in cut for kernel in tower.patches.weight]).reshape(len(cut), -1)
    x = torch.cat([(tower.class_token + shift)[None], patches]) + tower.positions
    x = norm(x, tower.norm_pre)
    for block in tower.blocks:
        packed = norm(x, block.norm_attention) @ block.attention.qkv.weight.T + block.attention.qkv.bias
        q, k, v = packed.chunk(3, -1)
        mixed = torch.zeros_like(x)
        for head in range(heads):
            part = slice(head * x.shape[1] // heads, (head + 1) * x.shape[1] // heads)
            for i in range(len(x)):
                weight = torch.exp(q[i, part] @ k[:, part].T / math.sqrt(x.shape[1] / heads))
                mixed[i, part] = (weight / weight.sum()) @ v[:, part]
        x = x + mixed @ block.attention.out.weight.T + block.attention.out.bias
        hidden = norm(x, block.norm_mlp) @ block.mlp.expand.weight.T + block.mlp.expand.bias
        x = x + (hidden / (1 + torch.exp(-1.702 * hidden))) @ block.mlp.contract.weight.T + block.mlp.contract.bias
    return norm(x, tower.norm_post) @ tower.projection


@pytest.mark.parametrize("stride", [None, 3])
def test_equals_the_equations(stride):
    tower = CLIPVisionTransformer(3, **SMALL, stride=stride, camera_weight=2.0, camera_std=1.0)
    images, cameras = torch.randn(2, 3, 16, 8), torch.tensor([2, 0])
    ours = tower(images, cameras)
    assert ours.shape == (2, 1 + tower.num_patches, 5)
    for i in range(2):
        expected = tokens_by_hand(tower, images[i], 2.0 * tower.camera.table[cameras[i]])
        torch.testing.assert_close(ours[i].detach(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("clip_vit_*.safetensors")), ids=lambda p: p.stem)
def test_golden(path):
    importlib.import_module("plugins.sdtps.golden")
    result = golden.compare(golden.read(path))
    assert result.passed, result.failures


# --- sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "tokens"), [((256, 128), 128), ((128, 256), 128), ((224, 224), 196)])
def test_published_sizes(size, tokens):
    with torch.device("meta"):
        tower = CLIPVisionTransformer(image_size=size)
        assert tower.num_patches == tokens
        assert tower(torch.empty(1, 3, *size)).shape == (1, tokens + 1, 512)


def test_parameter_count_of_vit_b16():
    """86,192,640 with CLIP's own 197 positions; 68 fewer rows of 768 at 256 × 128, and 768 for each camera."""
    with torch.device("meta"):
        count = lambda **options: sum(p.numel() for p in CLIPVisionTransformer(**options).parameters())  # noqa: E731
        assert count(image_size=(224, 224)) == 86_192_640
        assert count(cameras=4) == 86_192_640 - 68 * 768 + 4 * 768


def test_other_sizes_get_resampled_positions():
    tower = CLIPVisionTransformer(**SMALL)
    wide = CLIPVisionTransformer(**{**SMALL, "image_size": (8, 20)})
    state = tower.state_dict()
    state["positions"] = resize_positions(state["positions"], (4, 2), (2, 5))
    wide.load_state_dict(state)
    images = torch.randn(2, 3, 8, 20)
    torch.testing.assert_close(tower(images), wide(images))


def test_the_class_token_alone_feels_the_camera_at_the_entrance():
    tower = CLIPVisionTransformer(2, **SMALL, camera_std=1.0)
    images = torch.randn(1, 3, 16, 8)
    first, second = (tower.embed(images, tower.camera_shift(torch.tensor([c]))) for c in range(2))
    assert torch.equal(first[:, 1:], second[:, 1:])
    assert not torch.allclose(first[:, 0], second[:, 0])


def test_blocks_can_be_run_in_stretches_and_on_fewer_tokens():
    tower, images = CLIPVisionTransformer(**SMALL), torch.randn(2, 3, 16, 8)
    tokens = tower.embed(images)
    torch.testing.assert_close(tower.project(tower.run(tower.run(tokens, 0, 1), 1)), tower(images))
    assert tower.run(tower.run(tokens, last=1)[:, :4], 1).shape == (2, 4, 12)


def test_gradients_reach_every_parameter():
    tower = CLIPVisionTransformer(3, **SMALL, drop_path=0.1)
    tower(torch.randn(8, 3, 16, 8), torch.arange(8) % 3).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in tower.parameters())
    assert [round(b.drop_path.rate, 6) for b in tower.blocks] == [0, 0.1]


# --- cameras ------------------------------------------------------------------------------------------------------------


def test_camera_embedding_by_table_and_for_unseen_cameras():
    layer = CameraEmbedding(3, 4, weight=0.5, unseen="zero")
    shift = layer(torch.tensor([2, 0, 3, -1]))
    torch.testing.assert_close(shift[:2], 0.5 * layer.table[[2, 0]])
    assert (shift[2:] == 0).all()
    shift.sum().backward()
    torch.testing.assert_close(layer.table.grad[:, 0], torch.tensor([0.5, 0.0, 0.5]))
    strict = CameraEmbedding(3, 4)
    for unseen in (3, -1):
        with pytest.raises(ValueError, match=f"camera {unseen} is not among the 3 training cameras"):
            strict(torch.tensor([0, unseen]))


def test_exported_code_gives_nan_for_an_unseen_camera():
    layer = CameraEmbedding(3, 4)
    program = torch.export.export(layer.eval(), (torch.tensor([0, 2]),)).module()
    torch.testing.assert_close(program(torch.tensor([1, 2])), layer.table[1:].detach())
    assert program(torch.tensor([1, -1])).isnan().any(1).tolist() == [False, True]


def test_camera_embedding_starts_as_told():
    torch.manual_seed(3)
    table = CameraEmbedding(2000, 8, std=0.02).table
    assert table.abs().max() <= 0.04
    assert table.std().item() == pytest.approx(0.02 * 0.8796, rel=0.03)  # a normal cut at two of its deviations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads must divide dim, got dim 12 and heads 5"),
        ({"stride": 5}, r"stride must be in \[1, patch = 4\], got 5"),
        ({"image_size": (2, 8)}, "an image of 2 × 8 is smaller than one patch of 4"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"cameras": -1}, "cameras must be 0"),
        ({"drop_path": 1.0}, r"rate must be in \[0, 1\)"),
    ],
)
def test_constructor_refuses_nonsense(options, message):
    with pytest.raises(ValueError, match=message):
        CLIPVisionTransformer(**{**SMALL, **options})


def test_a_tower_with_cameras_wants_them():
    with pytest.raises(ValueError, match="embeds 2 cameras; give the camera of each image"):
        CLIPVisionTransformer(2, **SMALL)(torch.randn(1, 3, 16, 8))


# --- weights ------------------------------------------------------------------------------------------------------------


class _Block(nn.Module):
    """OpenAI's naming, for a TorchScript archive and for whole state dicts."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        hidden = self.mlp[0](self.ln_2(x))
        return x + self.mlp[1](hidden * torch.sigmoid(1.702 * hidden))


class _Visual(nn.Module):
    def __init__(self, side: int = 3, width: int = 12, heads: int = 3, out: int = 5):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 4, 4, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(1 + side * side, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(_Block(width, heads) for _ in range(2)))
        self.proj = nn.Parameter(torch.randn(width, out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], 1) + self.positional_embedding
        x = self.transformer.resblocks(self.ln_pre(x).permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_post(x) @ self.proj


class _CLIP(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = _Visual()
        self.logit_scale = nn.Parameter(torch.ones(()))
        self.token_embedding = nn.Embedding(4, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual(x)


SQUARE = {**SMALL, "image_size": (12, 12)}


def hugging_face(visual):
    """The same tensors under Hugging Face's names, with q, k and v apart."""
    state = {"logit_scale": torch.ones(()), "text_model.final_layer_norm.weight": torch.ones(3)}
    for key, value in visual.state_dict().items():
        if key == "proj":
            state["visual_projection.weight"] = value.T
            continue
        key = key.replace("class_embedding", "embeddings.class_embedding").replace("conv1", "embeddings.patch_embedding")
        key = key.replace("positional_embedding", "embeddings.position_embedding.weight").replace("ln_pre", "pre_layrnorm")
        key = (
            key.replace("ln_post", "post_layernorm").replace("transformer.resblocks", "encoder.layers").replace("ln_", "layer_norm")
        )
        key = key.replace("attn.", "self_attn.").replace("c_fc", "fc1").replace("c_proj", "fc2")
        if "in_proj" in key:
            for letter, part in zip("qkv", value.chunk(3)):
                state["vision_model." + key.replace("in_proj_", f"{letter}_proj.")] = part.clone()
        else:
            state["vision_model." + key] = value
    state["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    return {k: v.contiguous() for k, v in state.items()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "form", ["script", "script in half precision", "whole", "tower", "wrapped", "safetensors", "hugging face", "ours"]
)
def test_released_weights_load_and_give_the_released_outputs(tmp_path, form):
    clip = _CLIP().eval()
    for parameter in clip.parameters():
        parameter.data.copy_(parameter.data.half().float())
    path = tmp_path / ("weights.safetensors" if form in ("safetensors", "hugging face") else "weights.pt")
    if form.startswith("script"):
        scripted = torch.jit.trace(clip, torch.randn(1, 3, 12, 12))
        (scripted if form == "script" else scripted.half()).save(str(path))
    elif form == "safetensors":
        save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, str(path))
    elif form == "hugging face":
        save_file(hugging_face(clip.visual), str(path))
    elif form == "ours":
        torch.save(ReferenceKeys().from_reference(clip.visual.state_dict()), path)
    else:
        state = clip.visual.state_dict() if form == "tower" else clip.state_dict()
        torch.save({"state_dict": state, "epoch": 3} if form == "wrapped" else state, path)
    tower = CLIPVisionTransformer(2, **SQUARE, weights=str(path), weights_grid=(3, 3) if form == "ours" else None)
    images = torch.randn(2, 3, 12, 12)
    tokens = tower.project(tower.run(tower.embed(images)))
    torch.testing.assert_close(tokens, clip.float()(images), atol=2e-5, rtol=1e-4)
    assert tower.report.matched == len(clip.visual.state_dict())
    assert all(p.dtype == torch.float32 for p in tower.parameters())


def test_positions_of_clips_square_are_resampled_to_the_towers_grid(tmp_path):
    visual = _Visual()
    torch.save(visual.state_dict(), tmp_path / "clip.pt")
    tower = CLIPVisionTransformer(**SMALL)
    load_weights(tower, tmp_path / "clip.pt")
    grid = visual.positional_embedding[1:].reshape(3, 3, 12).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, (4, 2), mode="bilinear", align_corners=False)[0].permute(1, 2, 0).reshape(8, 12)
    torch.testing.assert_close(tower.positions[1:], expected)
    torch.testing.assert_close(tower.positions[0], visual.positional_embedding[0])


def test_positions_are_of_a_known_grid(tmp_path):
    """An equal number of places does not make an equal grid: 16 are 4 × 4 in a release's file, and in our own they may be 2 × 8."""
    wide, square, file = {**SMALL, "image_size": (8, 32)}, {**SMALL, "image_size": (16, 16)}, tmp_path / "weights.pt"
    source = CLIPVisionTransformer(**square)
    square_places = source.positions[1:].reshape(4, 4, 12).permute(2, 0, 1)[None]
    expected = F.interpolate(square_places, (2, 8), mode="bilinear", align_corners=False)[0].permute(1, 2, 0).reshape(16, 12)
    torch.save(ReferenceKeys().to_reference(source.state_dict()), file)
    torch.testing.assert_close(CLIPVisionTransformer(**wide, weights=str(file)).positions[1:], expected)
    torch.save(source.state_dict(), file)
    with pytest.raises(CheckpointError, match=r"16 places, which are in this project's own naming.*weights_grid.*\(2, 8\) if"):
        CLIPVisionTransformer(**wide, weights=str(file))
    with pytest.raises(CheckpointError, match=r"16 places, and weights_grid = \(3, 4\) are 12"):
        CLIPVisionTransformer(**wide, weights=str(file), weights_grid=(3, 4))
    torch.testing.assert_close(CLIPVisionTransformer(**wide, weights=str(file), weights_grid=(4, 4)).positions[1:], expected)
    assert torch.equal(CLIPVisionTransformer(**square, weights=str(file), weights_grid=(4, 4)).positions, source.positions)
    with pytest.raises(ValueError, match=r"weights_grid = \(4, 4\) would have no effect, because no weights are read"):
        CLIPVisionTransformer(**wide, weights_grid=(4, 4))


def test_the_camera_embedding_keeps_its_values_unless_the_file_has_one(tmp_path):
    tower = CLIPVisionTransformer(2, **SQUARE)
    before = tower.camera.table.clone()
    state = _Visual().state_dict()
    torch.save(state, tmp_path / "clip.pt")
    load_weights(tower, tmp_path / "clip.pt")
    assert torch.equal(tower.camera.table, before)
    torch.save({**state, "cv_embed": torch.full((2, 1, 12), 0.5)}, tmp_path / "trained.pt")
    load_weights(tower, tmp_path / "trained.pt")
    assert (tower.camera.table == 0.5).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("proj"), "missing: projection"),
        (lambda s: s.update(extra=torch.ones(1)), "unexpected: extra"),
        (lambda s: s.update({"ln_pre.weight": torch.ones(7)}), r"mismatched: norm_pre.weight \(file \(7,\), model \(12,\)\)"),
        (
            lambda s: s.update(positional_embedding=torch.ones(8, 12)),
            r"has 7 places, which are not those of a square grid.*weights_grid to the \(rows, columns\).*\(3, 3\) if",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_whole(tmp_path, change, message):
    state = _Visual().state_dict()
    change(state)
    torch.save(state, tmp_path / "clip.pt")
    tower = CLIPVisionTransformer(**SQUARE)
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_weights(tower, tmp_path / "clip.pt")
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())


def test_unreadable_weights_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        CLIPVisionTransformer(**SMALL, weights=str(tmp_path / "none.pt"))
    (tmp_path / "noise.pt").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="not a weight file that can be read without running code"):
        CLIPVisionTransformer(**SMALL, weights=str(tmp_path / "noise.pt"))


def test_keys_map_both_ways():
    tower = CLIPVisionTransformer(2, **SMALL)
    keys = ReferenceKeys()
    back = keys.from_reference(keys.to_reference(tower.state_dict()))
    assert set(back) == set(tower.state_dict())
    assert all(torch.equal(v, back[k]) for k, v in tower.state_dict().items())
