"""The whole model: where text enters, published counts, and released checkpoints."""

import functools

import pytest
import torch
from torch.testing import assert_close

from core.checkpoint import CheckpointError
from core.profile import profile
from plugins.sam.dformer import DFormer, DFormerv2
from plugins.sam.hamburger import HamburgerHead
from plugins.sam.released_weights import SegmentorKeys, load_pretrained_backbone, load_segmentor
from plugins.sam.segmentor import Segmentor, blocks_per_unit
from plugins.sam.semantic_alignment import SemanticAlignment

TINY = functools.partial(
    DFormer, dims=(8, 16, 16, 32), depths=(1, 1, 2, 1), heads=(2, 2, 2, 4), layer_scale=(None, None, 0.5, None)
)
HEAD = functools.partial(HamburgerHead, dim=16, ham_dim=16, rank=4)


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    return Segmentor(5, 6, TINY, HEAD, **options).eval()


def inputs(batch=2, seed=1):
    torch.manual_seed(seed)
    return torch.randn(batch, 3, 64, 96), torch.rand(batch, 1, 64, 96), torch.randn(batch, 4, 6)


def counted(module, *inputs):
    """(multiply-adds of convolutions and linear layers, all multiply-adds) of a module in units of 10^9, from shapes alone."""
    record = profile(module, inputs, timed=False)
    layers = sum(o.macs for o in record.operators if o.name in ("aten::linear", "aten::conv2d"))
    return layers / 1e9, record.macs / 1e9


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_whole_model_runs_in_every_precision(dtype, training):
    image, depth, text = inputs()
    text[0, 2:] = 0
    expected = tiny()(image, depth, text)
    cast = tiny().to(dtype).train(training)
    logits = cast(image.to(dtype), depth.to(dtype), text.to(dtype))
    logits.float().square().mean().backward()
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in cast.parameters() if p.grad is not None)
    if not training:
        assert (logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
    if dtype != torch.float64:
        with torch.autocast("cpu", dtype):
            mixed = tiny().train(training)(image, depth, text)
        assert torch.isfinite(mixed).all()


@pytest.mark.parametrize(
    ("size", "dim", "plain", "plain_gmacs", "guided", "guided_gmacs"),
    [
        ("S", 512, 26_686_018, (33.685, 40.581), (4_401_170, 4_369_798, 35_456_986), (40.183, 47.195)),
        ("B", 512, 53_923_050, (66.934, 77.177), (8_801_566, 4_930_150, 67_654_766), (79.635, 90.097)),
        ("L", 1024, 95_550_074, (123.772, 136.801), (7_724_564, 7_965_350, 114_011_444), (161.090, 177.128)),
    ],
)
@torch.no_grad()
def test_published_counts(size, dim, plain, plain_gmacs, guided, guided_gmacs):
    """Parameters exactly, multiply-adds at 480x640 to the printed digit, without and with the products inside attention."""
    with torch.device("meta"):
        model = Segmentor(
            40, 512, functools.partial(DFormerv2, size=size), functools.partial(HamburgerHead, dim=dim, ham_dim=None)
        ).eval()
        narrow = HamburgerHead(model.backbone.dims[1:], 40, dim=dim).eval()
        image, text = torch.empty(1, 3, 480, 640), torch.empty(1, 6, 512)
        levels = [torch.empty(1, c, 60 >> i, 80 >> i) for i, c in enumerate(model.backbone.dims[1:])]
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert (parameters["encoder_alignment"], parameters["decoder_alignment"], sum(parameters.values())) == guided
    assert parameters["backbone"] + sum(p.numel() for p in narrow.parameters()) == plain
    assert counted(model, image, image, text) == pytest.approx(guided_gmacs, abs=1e-3)
    # The plain model is the backbone and the upstream head: without text nothing else runs (tested below).
    if size == "S":  # the others are counted by `repro verify sam`
        parts = zip(counted(model.backbone, image, image), counted(narrow, levels))
        assert [a + b for a, b in parts] == pytest.approx(plain_gmacs, abs=1e-3)


def test_sharing_rules():
    sizes = {
        "S": ((3, 4, 18, 4), (64, 128, 256, 512)),
        "B": ((4, 8, 25, 8), (80, 160, 320, 512)),
        "L": ((4, 8, 25, 8), (112, 224, 448, 640)),
    }
    table = {"S": [2, 2, 4, 2], "B": [2, 2, 4, 2], "L": [2, 2, 8, 4]}
    for size, (depths, dims) in sizes.items():
        assert [blocks_per_unit(n, c, "main") for n, c in zip(depths, dims)] == table[size]
    assert [blocks_per_unit(n, c, "seed") for n, c in zip(*sizes["S"])] == [2, 2, 2, 2]
    with torch.device("meta"):
        units = Segmentor(40, sam_share="seed").encoder_alignment
        assert [len(units[str(i)]) for i in (1, 2, 3)] == [2, 9, 2]
        seed_era = Segmentor(40, sam_share="seed", create_unused=True)
        assert sum(p.numel() for p in seed_era.encoder_alignment.parameters()) == 15_185_460
        assert sum(p.numel() for p in seed_era.decoder_alignment.parameters()) == 4_369_804
        assert [len(u) for u in Segmentor(40, sam_share="none").encoder_alignment.values()] == [4, 18, 4]


def test_without_text_the_model_is_plain_dformer():
    image, depth, text = inputs()
    model = tiny()
    bare = tiny(encoder_stages=(), decoder_stages=())
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if "alignment" not in k})
    assert torch.equal(model(image, depth), bare(image, depth))
    assert_close(model(image, depth, torch.zeros_like(text)), bare(image, depth))
    assert (model(image, depth, text) - bare(image, depth)).abs().max() > 1e-4
    assert model(image, depth, text).shape == (2, 5, 64, 96)


@pytest.mark.parametrize("placement", ["block", "export"])
def test_text_enters_only_where_it_is_asked_to(placement):
    image, depth, text = inputs()
    for stages in ((1,), (2,), (3,), (0, 2)):
        model = tiny(encoder_stages=stages, decoder_stages=(), encoder_placement=placement)
        guided, plain = model.encode(image, depth, text), model.encode(image, depth, None)
        changed = [i for i in range(4) if not torch.equal(guided[i], plain[i])]
        assert changed == (list(range(min(stages), 4)) if placement == "block" else list(stages))
    model = tiny(encoder_stages=(), decoder_stages=(2,))
    levels = model.encode(image, depth, text)
    assert torch.equal(model.align_level(levels[1], 1, text), levels[1])
    assert not torch.equal(model.align_level(levels[2], 2, text), levels[2])


def test_a_sample_without_text_is_not_touched_by_the_texts_of_others():
    image, depth, text = inputs()
    text[1] = 0
    model = tiny()
    assert_close(model(image, depth, text)[1:], model(image[1:], depth[1:]), atol=1e-5, rtol=1e-4)


def test_released_head_bypasses_sam_when_the_whole_batch_has_no_text():
    image, depth, text = inputs()
    model = tiny(alignment=functools.partial(SemanticAlignment, missing_text="upstream"))
    assert_close(model(image, depth, torch.zeros_like(text)), model(image, depth))
    text[1] = 0
    assert (model(image, depth, text)[1] - model(image, depth)[1]).abs().max() > 1e-4


@pytest.mark.parametrize("share", ["main", "none"])  # with `none`, the two blocks of stage 2 have a SAM each
def test_every_parameter_learns_and_none_is_left_over(share):
    image, depth, text = inputs()
    model = tiny(sam_share=share).train()
    assert len(model.encoder_alignment["2"]) == (2 if share == "none" else 1)
    model(image, depth, text).square().sum().backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or float(p.grad.abs().max()) == 0)]
    assert idle == []
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(n.endswith("encoder_logit_scale") for n in frozen)  # the encoder's temperature is fixed by default


def test_encoder_initialisation_and_the_release_s_untrained_export():
    wide = functools.partial(DFormer, dims=(8, 16, 128, 32), depths=(1, 1, 2, 1), heads=(2, 2, 2, 4))
    for init, low, high in (("trunc02", 0.018, 0.022), ("xavier", 0.07, 0.1)):
        model = Segmentor(5, 6, wide, HEAD, encoder_sam_init=init)
        assert low < float(model.encoder_alignment["2"][0].to_query.weight.std()) < high
    lazy = tiny(encoder_placement="export", encoder_sam_build="lazy_upstream").encoder_alignment
    assert not any(p.requires_grad for p in lazy.parameters())
    assert hasattr(lazy["1"][0], "alpha")  # both halves exist there


def test_one_clear_error_each():
    with pytest.raises(ValueError, match=r"decoder_stages must be distinct and out of .*the head sees stages 1 to 3 only"):
        tiny(decoder_stages=(0, 1))
    with pytest.raises(ValueError, match="encoder_stages must be distinct"):
        tiny(encoder_stages=(1, 1))
    with pytest.raises(ValueError, match="concerns export-only modules"):
        tiny(encoder_sam_build="lazy_upstream")
    for idle in ({"sam_share": "none"}, {"encoder_sam_init": "xavier"}):
        with pytest.raises(ValueError, match=f"{next(iter(idle))} = .* would have no effect, because encoder_placement = 'export'"):
            tiny(encoder_placement="export", **idle)
    image, depth, text = inputs()
    with pytest.raises(ValueError, match=r"text tokens are 5 wide.*text_dim=6"):
        tiny()(image, depth, text[..., :5])


def test_the_model_exports_as_it_computes(tmp_path):
    from core import export

    model = tiny()
    model.example_size, model.example_tokens = (64, 96), 4
    (done,) = export.export(model.export_parts(), tmp_path, formats=("torch",))
    assert done.worst < 1e-5
    assert {s["batch"] for s in done.sizes} >= {1, 2}


# --- released checkpoints -----------------------------------------------------------------------------------------------


def released(model, placement="block"):
    """A checkpoint as the release writes it: its names, its constants, its profiler counters."""
    state = SegmentorKeys(placement).to_reference(model.state_dict())
    for i, stage in enumerate(model.backbone.stages):
        for j, block in enumerate(stage.blocks):
            state[f"backbone.layers.{i}.blocks.{j}.Geo.decay"] = block.prior.decay.clone()
            pairs = model.backbone.dims[i] // model.backbone.heads[i] // 2
            speeds = [10000 ** -(k / (pairs - 1)) for k in range(pairs)]
            state[f"backbone.layers.{i}.blocks.{j}.Geo.angle"] = torch.tensor([s for s in speeds for _ in range(2)])
    for key in [k for k in state if k.endswith(".gamma_scale")]:
        state[key.replace("gamma_scale", "total_ops")] = torch.zeros(1)
        state[key.replace("gamma_scale", "_inv_sqrt_dk")] = torch.ones(())
    return state


@pytest.mark.parametrize("placement", ["block", "export"])
def test_released_checkpoints_load_under_their_own_names(tmp_path, placement):
    source, target = tiny(1, encoder_placement=placement), tiny(2, encoder_placement=placement)
    state = released(source, placement)
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "NYU.pth")
    report = load_segmentor(target, tmp_path / "NYU.pth")
    assert report.complete
    assert report.matched == len(source.state_dict())
    image, depth, text = inputs()
    assert torch.equal(source(image, depth, text), target(image, depth, text))
    if placement == "block":
        assert state["backbone.layers.0.blocks.0.Geo.weight"].shape == (2, 1, 1, 1)
        assert state["backbone.layers.2.blocks.0.gamma_1"].shape == (1, 1, 1, 16)
        assert {
            "backbone.patch_embed.proj.0.weight",
            "backbone.layers.2.blocks.1.Attention.lepe.dwconv.weight",
            "backbone.layers.0.blocks.0.cnn_pos_encode.dwconv.bias",
            "backbone.layers.1.downsample.reduction.weight",
            "backbone.extra_norms.2.weight",
            "backbone.encoder_sam_blocks.2.0.q_proj.weight",
            "decode_head.dec_sam_layers.0.ffn.3.weight",
            "decode_head.dec_sam_layers.2.decoder_logit_scale",
            "decode_head.hamburger.ham_in.conv.bias",
            "decode_head.hamburger.ham_out.bn.running_var",
            "decode_head.squeeze.bn.weight",
            "decode_head.conv_seg.weight",
        } <= set(state)
    else:
        assert "backbone.encoder_sam_stage_modules.1.k_proj.weight" in state


def test_angles_by_row_and_column_do_not_take_the_release_s(tmp_path):
    torch.save(released(tiny(1)), tmp_path / "NYU.pth")
    axial = Segmentor(5, 6, functools.partial(TINY, rope_index="axial2d"), HEAD)
    with pytest.raises(CheckpointError, match=r"layers\.0\.blocks\.0\.Geo\.angle .* check heads and rope_index"):
        load_segmentor(axial, tmp_path / "NYU.pth")


@pytest.mark.parametrize("placement", ["block", "export"])
def test_a_checkpoint_of_the_other_placement_is_refused_though_the_shapes_fit(tmp_path, placement):
    """With one unit a stage, as here, only the names tell them apart."""
    other = {"block": "export", "export": "block"}[placement]
    torch.save(released(tiny(1, encoder_placement=placement), placement), tmp_path / "NYU.pth")
    with pytest.raises(CheckpointError, match=r"unexpected: backbone\.encoder_sam_"):
        load_segmentor(tiny(2, encoder_placement=other), tmp_path / "NYU.pth")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.pop("decode_head.conv_seg.weight"), "missing: head.classify.weight"),
        (lambda s: s.update({"decode_head.extra": torch.ones(1)}), "unexpected: head.extra"),
        (
            lambda s: s.update({"decode_head.conv_seg.weight": torch.ones(7, 16, 1, 1)}),
            r"mismatched: head.classify.weight \(file \(7",
        ),
        (lambda s: s["backbone.layers.0.blocks.0.Geo.decay"].mul_(2), "check heads and heads_range"),
        (lambda s: s["backbone.layers.1.blocks.0.Geo.angle"].mul_(2), "check heads and rope_index"),
        (lambda s: s["decode_head.dec_sam_layers.0.gamma_scale"].fill_(3), r"gamma_scale is 3.0, this model has gamma_scale 1.0"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_names(tmp_path, change, complaint):
    state = {k: v.clone() for k, v in released(tiny(1)).items()}
    change(state)
    torch.save(state, tmp_path / "damaged.pth")
    target = tiny(2)
    before = target.head.classify.weight.clone()
    with pytest.raises(CheckpointError, match=complaint):
        load_segmentor(target, tmp_path / "damaged.pth")
    assert torch.equal(target.head.classify.weight, before)


@pytest.mark.parametrize("wrappers", [(), ("model",), ("state_dict",), ("model", "state_dict"), ("state_dict", "model")])
def test_a_checkpoint_is_unwrapped_as_the_release_does(tmp_path, wrappers):
    source, target = tiny(1), tiny(2)
    held = {f"module.{k}": v for k, v in released(source).items()}
    for name in reversed(wrappers):
        held = {name: held, "epoch": 3}
    torch.save(held, tmp_path / "NYU.pth")
    assert load_segmentor(target, tmp_path / "NYU.pth").matched == len(source.state_dict())
    backbone = load_pretrained_backbone(tiny(2, encoder_stages=(), decoder_stages=()).backbone, wrapped(tmp_path, source, wrappers))
    assert backbone.matched == len(source.backbone.state_dict())


def wrapped(folder, source, wrappers):
    """The backbone alone, as pretraining leaves it, in the same wrappers."""
    held = {k: v for k, v in released(source).items() if k.startswith("backbone.") and "_sam_" not in k}
    for name in reversed(wrappers):
        held = {name: held}
    torch.save(held, folder / "pretrained.pth")
    return folder / "pretrained.pth"


def test_pretrained_backbone_loads_without_its_classifier(tmp_path):
    source, target = tiny(1), tiny(2)
    state = {k.removeprefix("backbone."): v for k, v in released(source).items() if k.startswith("backbone.") and "_sam_" not in k}
    state = {k: v for k, v in state.items() if not k.startswith("extra_norms.")}
    state |= {"head.weight": torch.ones(1000, 32), "norm.weight": torch.ones(32)}
    torch.save({"state_dict": state}, tmp_path / "pretrained.pth")
    report = load_pretrained_backbone(target.backbone, tmp_path / "pretrained.pth")
    assert set(report.ignored) == {"head.weight", "norm.weight"}
    image, depth, _ = inputs()
    assert torch.equal(source.backbone(image, depth)[0], target.backbone(image, depth)[0])
    del state["patch_embed.proj.0.weight"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=r"missing: stem\.0\.weight"):
        load_pretrained_backbone(target.backbone, tmp_path / "short.pth")
