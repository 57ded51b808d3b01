"""What the note on SAM 3's fusion transformer and on a student's low scores states, each as a check with a measured figure.

"The note" describes encoder and decoder and proposes four fixes for issue 17 of EfficientSAM3; "the release" is facebookresearch/sam3,
whose behaviour the reference cases record. Claims 10 to 15 are measured on a study in miniature (four colours, seconds of training); the
study itself is `gin/sam3_fusion/issue17/study.gin`, and docs/sam3_presence.md says what it found.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core import export
from core.claims import Verdict, claim, depends, holds
from core.text import HashedText
from plugins.sam3_fusion import shapes_sample
from plugins.sam3_fusion.boxes import logit
from plugins.sam3_fusion.decoder import Presence, QueryDecoder
from plugins.sam3_fusion.detector import ConvTrunk, PromptedDetector
from plugins.sam3_fusion.export import fusion_parts
from plugins.sam3_fusion.fusion_encoder import FusionEncoder
from plugins.sam3_fusion.losses import DetectionLoss
from plugins.sam3_fusion.processor import Processor
from plugins.sam3_fusion.scenes import Prompt
from plugins.sam3_fusion.scoring import PromptScorer
from plugins.sam3_fusion.student import StudentTrunk
from plugins.sam3_fusion.study import CLOSE, CONDITIONS, FIXES, PresenceStudy
from plugins.sam3_fusion.task import PromptedDetection

DIM, GRID = 32, (4, 5)
TEACHER_STEPS, STUDENT_STEPS = 250, 300


def _encoder(**options: Any) -> FusionEncoder:
    torch.manual_seed(0)
    build: Any = FusionEncoder
    built: FusionEncoder = build(DIM, 4, 2, 48, 0.0, **options)
    return built.eval()


def _decoder(**options: Any) -> QueryDecoder:
    torch.manual_seed(0)
    build: Any = QueryDecoder
    decoder: QueryDecoder = build(DIM, 4, 2, 48, 6, 0.0, **options)
    nn.init.normal_(decoder.box_head[2].weight, std=0.2)  # type: ignore[arg-type, union-attr]
    return decoder.eval()


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pad = torch.tensor([[False, False, False], [False, False, True]])
    return torch.randn(2, DIM, *GRID, generator=generator), torch.randn(2, 3, DIM, generator=generator), pad


def _memory() -> Tensor:
    return torch.randn(2, GRID[0] * GRID[1], DIM, generator=torch.Generator().manual_seed(2))


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- the modules ----------------------------------------------------------------------------------------------------------


@claim(
    "SAM3-1",
    "encoder: pooled text is added to image features first (mean, optionally masked, through a linear)",
    source="note, encoder",
    expect="does not hold",
)
def pooled_text() -> Verdict:
    image, prompt, pad = _inputs()
    with torch.device("meta"):
        plain, pooled = _parameters(FusionEncoder()), _parameters(FusionEncoder(pooled_text="masked"))
    moved = {}
    for kind in ("none", "mean", "masked"):
        encoder = _encoder(pooled_text=kind)
        nn.init.zeros_(encoder.blocks[0].prompt_attn.out_proj.weight)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(encoder.blocks[1].prompt_attn.out_proj.weight)  # type: ignore[union-attr, arg-type]
        with torch.no_grad():  # with prompt attention silenced, only pooling can carry the prompt
            moved[kind] = float((encoder(image, prompt, pad).memory - encoder(image, prompt + 1, pad).memory).abs().max())
    return holds(
        plain != 9_472_512 or moved["none"] > 0,
        measured=f"as built {plain:,} parameters (the released state has 9,472,512), with pooling {pooled:,}; prompt attention silenced, another prompt moves "
        f"memory by {moved['none']:g} as built, {moved['mean']:.2f} with the mean, {moved['masked']:.2f} with the masked mean",
        why="the release builds it with pooling off and has no such weights; `FusionEncoder.pooled_text` offers both readings",
    )


@claim(
    "SAM3-2",
    "encoder layer: self-attention with position on q and k; cross-attention image → prompt; FFN; post-norm as written",
    source="note, encoder",
    expect="does not hold",
)
def layer_order() -> Verdict:
    image, prompt, pad = _inputs()
    through = {}
    for kind in ("pre", "post"):
        encoder = _encoder(norm=kind)
        with torch.no_grad():
            through[kind] = float((encoder(image + 7.0, prompt, pad).memory - encoder(image, prompt, pad).memory).mean())
    encoder, pos = _encoder(), torch.randn(1, DIM, *GRID, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for block in encoder.blocks:
            block.self_attn.out_proj.weight.zero_()  # type: ignore[union-attr, operator]
        quiet = float((encoder(image, prompt, pad, pos).memory - encoder(image, prompt, pad, 2 * pos).memory).abs().max())
        seen = float((_encoder()(image, prompt, pad, pos).memory - _encoder()(image, prompt, pad, 2 * pos).memory).abs().max())
    return holds(
        abs(through["pre"] - 7) > 1e-3,
        measured=f"7 added to all channels comes out as {through['pre']:.4f} as built (norms sit inside the branches) and {through['post']:.4f} in post-norm; position moves "
        f"memory by {seen:.2f}, and by {quiet:g} once self-attention is silenced (none at the prompt attention)",
        why="the order and the place of positions are as stated; the norms are not: the release is pre-norm and has no norm at the end. `FusionEncoder.norm` offers both",
    )


@claim(
    "SAM3-3",
    "encoder returns memory, padding mask, position, prompt, level starts, shapes, valid ratios",
    source="note, encoder",
)
def encoder_outputs() -> Verdict:
    torch.manual_seed(0)
    encoder = FusionEncoder(DIM, 4, 1, 48, 0.0, levels=2).eval()
    pads = [torch.zeros(2, 4, 6, dtype=torch.bool), torch.zeros(2, 2, 3, dtype=torch.bool)]
    pads[0][:, :, 3:] = True
    with torch.no_grad():
        out = encoder([torch.randn(2, DIM, 4, 6), torch.randn(2, DIM, 2, 3)], torch.randn(2, 3, DIM), None, None, pads)
    assert out.image_pad is not None
    shapes = {
        "memory": out.memory.shape,
        "position": out.pos.shape,
        "padding": out.image_pad.shape,
        "valid ratios": out.valid_ratios.shape,
    }
    right = shapes == {"memory": (2, 30, DIM), "position": (2, 30, DIM), "padding": (2, 30), "valid ratios": (2, 2, 2)}
    right &= (
        out.level_starts == (0, 24) and out.sizes == ((4, 6), (2, 3)) and out.valid_ratios[0].tolist() == [[0.5, 1.0], [1.0, 1.0]]
    )
    return holds(
        bool(right),
        measured=", ".join(f"{k} {tuple(v)}" for k, v in shapes.items()) + f", level starts {out.level_starts}, shapes {out.sizes}",
        why="batch first here; the prompt, which the release hands back unchanged, stays with the caller; shapes are Python integers, not tensors",
    )


@claim(
    "SAM3-4",
    "decoder: queries, presence token; self-attention over both; text cross-attention optional, queries only; image cross-attention over both; FFN; split",
    source="note, decoder",
    expect="does not hold",
)
def decoder_rows() -> Verdict:
    decoder, (_, prompt, pad) = _decoder(), _inputs()
    rows: dict[str, int] = {}
    block = decoder.blocks[0]

    def watch(name: str) -> Any:
        def note(module: nn.Module, given: tuple[Any, ...]) -> None:
            rows.setdefault(name, given[0].shape[1])

        return note

    block.self_attn.register_forward_pre_hook(watch("self"))  # type: ignore[union-attr, operator]
    block.prompt_attn.register_forward_pre_hook(watch("text"))  # type: ignore[union-attr, operator]
    block.image_attn.q_proj.register_forward_pre_hook(watch("image"))  # type: ignore[union-attr, operator]
    with torch.no_grad():
        decoder(_memory(), GRID, prompt, pad)
        seen = decoder(_memory(), GRID, prompt + 1, pad).presence
        blind = _decoder(prompt_attention=False)
        same = blind(_memory(), GRID, prompt, pad).presence, blind(_memory(), GRID, prompt + 1, pad).presence
    assert seen is not None
    assert torch.equal(*same)  # type: ignore[arg-type]
    return holds(
        rows["text"] == decoder.queries.shape[0],
        measured=f"{decoder.queries.shape[0]} queries: rows in self-attention {rows['self']}, in text attention {rows['text']}, in image attention {rows['image']}",
        why="the presence token attends to the text too (201 rows at full size), and text attention is always on in the release; the rest is as stated",
    )


@claim(
    "SAM3-5",
    "boxes refined each layer by an MLP in logit space; presence logit from a 3-layer MLP on a normalised token",
    source="note, decoder",
)
def refinement() -> Verdict:
    decoder, (_, prompt, pad) = _decoder(), _inputs()
    with torch.no_grad():
        out = decoder(_memory(), GRID, prompt, pad)
        boxes = (decoder.box_head(out.hidden) + logit(out.anchors)).sigmoid()
        worst = float((boxes - out.boxes).abs().max())
        chain = float((out.anchors[1] - out.boxes[0]).abs().max())
        assert decoder.presence is not None
        assert out.presence is not None
        assert out.presence_state is not None
        state = decoder.presence.norm(out.presence_state)
        for i, layer in enumerate(decoder.presence.head):
            state = layer(state) if i == 0 else layer(state.relu())
        apart = float((state[:, 0] - out.presence[-1]).abs().max())
    layers = len(decoder.presence.head)
    return holds(
        worst < 1e-5 and chain < 1e-6 and apart < 1e-5 and layers == 3,
        measured=f"σ(MLP(row) + logit(box)) against the outputs {worst:.1e}; each layer's box enters the next within {chain:.1e}; {layers}-layer MLP on LN(token) against the "
        f"presence logit {apart:.1e}",
        why="the row is normalised before the box MLP too, which the note leaves out",
    )


@claim("SAM3-6", "presence logits are clamped", source="note, decoder", expect="does not hold")
def clamp() -> Verdict:
    found = {}
    for kind in ("none", "hard"):
        torch.manual_seed(0)
        head = Presence(DIM, kind)  # type: ignore[arg-type]
        nn.init.constant_(head.head[2].bias, -30.0)  # type: ignore[arg-type]
        found[kind] = float(head(torch.randn(1, DIM)).detach()[0])
    return holds(
        found["none"] >= -10,
        measured=f"with a last bias of −30 the logit is {found['none']:.2f} as the release runs, {found['hard']:.2f} with presence_clamp='hard'",
        why="the release computes a clamp to ±10 and drops the result; the note's own −11.05 is possible only because of that. The Hugging Face port does clamp",
    )


@claim("SAM3-7", "outputs: hs (L,N,B,256), boxes (L,N,B,4), presence (L,B)", source="note, decoder", expect="depends")
def output_shapes() -> Verdict:
    torch.manual_seed(0)
    decoder = QueryDecoder().eval()
    with torch.no_grad():
        out = decoder(torch.randn(2, 20, 256), GRID, torch.randn(2, 3, 256))
    assert out.presence is not None
    shapes = tuple(out.hidden.shape), tuple(out.boxes.shape), tuple(out.presence.shape)
    assert shapes == ((6, 2, 200, 256), (6, 2, 200, 4), (6, 2))
    return depends(
        measured=f"full size, batch of 2, ours: hs {shapes[0]}, boxes {shapes[1]}, presence {shapes[2]}; {_parameters(decoder):,} parameters",
        why="in the release the boxes are those that enter each layer, not the refined ones, and presence is (6, 1, B); ours puts the batch before the queries",
    )


@claim("SAM3-8", "final score = sigmoid(class) · sigmoid(presence)", source="note, scoring")
def product() -> Verdict:
    scores, presence = torch.tensor([[3.0, -1.0]]), torch.tensor([0.5])
    p = Processor().probability(scores, presence)[0].tolist()
    by_hand = [1 / (1 + math.exp(-s)) / (1 + math.exp(-0.5)) for s in (3.0, -1.0)]
    ceiling = float(Processor().probability(torch.full((1, 1), 12.0), torch.tensor([-5.89]))[0, 0])
    return holds(
        max(abs(a - b) for a, b in zip(p, by_hand)) < 1e-6,
        measured=f"{p[0]:.4f} and {p[1]:.4f} for scores 3 and −1 at presence 0.5, by hand {by_hand[0]:.4f} and {by_hand[1]:.4f}; at presence −5.89 no score exceeds {ceiling:.5f}",
        why="so presence bounds every score; the video model's logits already hold the product and must not be multiplied again",
    )


@claim(
    "SAM3-9",
    "sigmoid(−5.89) ≈ 0.003, sigmoid(−11.05) ≈ 0.000016; 0.95 · 0.000016 ≈ 0.0000152; from −5 to −11 sigmoid falls about 400 times",
    source="note, low scores",
)
def arithmetic() -> Verdict:
    a, b, fall = (1 / (1 + math.exp(5.89)), 1 / (1 + math.exp(11.05)), (1 + math.exp(11)) / (1 + math.exp(5)))
    return holds(
        round(a, 3) == 0.003 and round(b, 6) == 0.000016 and abs(0.95 * 0.000016 - 0.0000152) < 1e-12 and 390 < fall < 410,
        measured=f"σ(−5.89) = {a:.5f}, σ(−11.05) = {b:.2e}, 0.95 of it {0.95 * b:.2e}, σ(−5)/σ(−11) = {fall:.1f}",
        why="but a teacher at −5.89 detects nothing at 0.5 either: the two logits must be of a pair whose prompt is absent or hard, and are no target",
    )


# --- the student's scores -------------------------------------------------------------------------------------------------


def _colours(root: str) -> None:
    """Scenes of coloured shapes, each asked for all four colours."""

    def make(rng: np.random.Generator) -> tuple[Any, list[Prompt]]:
        picture, things = shapes_sample.draw_scene(rng, 32)
        prompts = []
        for colour in shapes_sample.COLOURS:
            boxes = np.array([box for c, _, box in things if c == colour], np.float32).reshape(-1, 4)
            prompts.append(Prompt(colour, "present" if len(boxes) else "absent", boxes))
        return picture, prompts

    Path(root).mkdir(parents=True)
    shapes_sample.write_scenes(Path(root), {"train": 300, "test": 100}, make, 0)


def _small_detector(text_dim: int, side: int) -> PromptedDetector:
    return PromptedDetector(
        text_dim,
        side,
        functools.partial(ConvTrunk, 12, 48, 1),
        functools.partial(FusionEncoder, 48, 4, 1, 96, 0.0),
        functools.partial(QueryDecoder, 48, 4, 1, 96, 6, 0.0, anchor_start="grid", bias_start="local", one_to_many=False),
        functools.partial(PromptScorer, 48, 96, 0.0),
        cell_head=True,
    )


@functools.cache
def miniature() -> Mapping[str, float]:
    """The metrics of `PresenceStudy` on four colours at 32 pixels, trained here and now."""
    torch.manual_seed(0)
    study = PresenceStudy(
        functools.partial(
            PromptedDetection, sample=_colours, detector=_small_detector, text=functools.partial(HashedText, 32), side=32, batch=10, eval_batch=50,
            loss=functools.partial(DetectionLoss, query_weight=8.0, presence_weight=8.0, cell_weight=60.0, least_rows=0, prompt_scale=False),
        ),
        teacher_steps=TEACHER_STEPS, student=functools.partial(StudentTrunk, width=4), calibration=40, presence_steps=40, distil_steps=50,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as held:
        study.prepare(Path(held))
        net = study.model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-4)
        batches = study.batches(0, 0)
        for step in range(1, TEACHER_STEPS + STUDENT_STEPS + 1):
            first = step <= TEACHER_STEPS
            part = step / TEACHER_STEPS if first else (step - TEACHER_STEPS) / STUDENT_STEPS
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, part / 0.05) * 0.5 * (1 + math.cos(math.pi * part))
            optimizer.zero_grad(set_to_none=True)
            losses = study.losses(net, next(batches), step).losses
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_([p for p in net.parameters() if p.grad is not None], 1.0)
            optimizer.step()
        net.eval()
        with torch.inference_mode():
            return study.evaluate(net) | study.conclude(net)


def _fix(metrics: Mapping[str, float], fix: str, figure: str) -> tuple[float, float]:
    """A figure of a fix in both conditions."""
    first, second = (metrics[f"{c}/fix/{fix}/{figure}"] for c in CONDITIONS)
    return first, second


def _tried(metrics: Mapping[str, float], condition: str) -> list[str]:
    """The fixes that were measured in a condition."""
    return [f for f in FIXES if f != "none" and f"{condition}/fix/{f}/cgF1" in metrics]


def _pair(values: tuple[float, float]) -> str:
    return f"{values[0]:.2f} and {values[1]:.2f}"


@claim(
    "SAM3-10",
    "stage-1 distillation leaves fusion untouched; features differ; presence is pushed systematically down",
    source="note, low scores",
    expect="depends",
)
def drift() -> Verdict:
    m = miniature()
    present, absent = (tuple(m[f"{c}/drift/change, {k}"] for c in CONDITIONS) for k in ("present", "absent"))
    explained = tuple(m[f"{c}/drift/R2"] for c in CONDITIONS)
    assert max(present) < -0.3, f"presence on present pairs moved by {present}"
    assert min(absent) > max(present), f"absent pairs moved by {absent}"
    return depends(
        measured=f"same and other preprocessing: R² of features {_pair(explained)}; mean presence logit of present pairs moves by {_pair(present)}, of absent pairs by {_pair(absent)}",  # type: ignore[arg-type]
        why="down on present pairs, not on absent ones: evidence is lost, no constant is subtracted. How far depends on the student and most of all on whether inference "
        "normalises images as training did, which the release does not (docs/sam3_presence.md)",
    )


@claim(
    "SAM3-11",
    "fix 1, skip presence: solves low scores, loses rejection, may add false detections",
    source="note, fixes",
)
def skip() -> Verdict:
    m = miniature()
    recall, before = _fix(m, "skip", "recall"), _fix(m, "none", "recall")
    false, rejected = _fix(m, "skip", "false"), _fix(m, "none", "false")
    return holds(
        all(a >= b for a, b in zip((*recall, *false), (*before, *rejected))) and sum(false) > 2 * sum(rejected),
        measured=f"recall {_pair(before)} becomes {_pair(recall)}, false positives on absent prompts {_pair(rejected)} become {_pair(false)}",
        why="queries never learn from absent prompts; where the features themselves are off, recall returns only in part",
    )


@claim(
    "SAM3-12",
    "fix 2, finetune only names containing `presence_token` (the output norm and head included): works with little data",
    source="note, fixes",
    expect="depends",
)
def presence_only() -> Verdict:
    m = miniature()
    with torch.device("meta"):
        decoder = QueryDecoder()
        assert decoder.presence is not None
        count = _parameters(decoder.presence)
    assert count == 132_609
    nll, was = _fix(m, "presence_few", "NLL"), _fix(m, "none", "NLL")
    recall, before = _fix(m, "presence_few", "recall"), _fix(m, "none", "recall")
    calibrates, finds = all(a < b for a, b in zip(nll, was)), all(a >= b for a, b in zip(recall, before))
    few, many = (m[f"matched/fix/{f}/labels"] for f in ("presence_few", "presence"))
    assert few == m["matched/fix/platt/labels"] < many
    measured = (
        f"{count:,} parameters at full size. With {few:.0f} labelled pairs NLL of presence {_pair(was)} becomes {_pair(nll)}, recall {_pair(before)} becomes "
        f"{_pair(recall)}; with {many:,.0f} NLL {_pair(_fix(m, 'presence', 'NLL'))}, recall {_pair(_fix(m, 'presence', 'recall'))}; teacher NLL "
        f"{m['teacher/fix/none/NLL']:.2f}, recall {m['teacher/fix/none/recall']:.2f}"
    )
    if calibrates == finds:
        return holds(calibrates, measured=measured)
    gained, lost = ("calibrates presence", "recall falls") if calibrates else ("brings recall back", "presence is calibrated worse")
    return depends(
        measured=measured,
        why=f"with little data it {gained}, but {lost}: what it trains comes after the queries and boxes that the changed features have spoiled. In the larger study 32 pairs help "
        "where preprocessing differs (NLL 1.4 to 0.6) and harm where it agrees (0.3 to 0.9 and 0.5), where 7,200 do not (docs/sam3_presence.md)",
    )


@claim("SAM3-13", "fix 3, further distillation: the real cure", source="note, fixes", expect="depends")
def distillation() -> Verdict:
    m = miniature()
    auroc, was = _fix(m, "distil", "AUROC"), _fix(m, "none", "AUROC")
    score, before, target = _fix(m, "distil", "cgF1"), _fix(m, "none", "cgF1"), m["teacher/fix/none/cgF1"]
    better = [a > b for a, b in zip((*auroc, *score), (*was, *before))]
    others = tuple(max((f for f in _tried(m, c) if f != "distil"), key=lambda f: m[f"{c}/fix/{f}/cgF1"]) for c in CONDITIONS)
    shown = " and ".join(f"{m[f'{c}/fix/{f}/cgF1']:.2f} ({FIXES[f]})" for c, f in zip(CONDITIONS, others))
    measured = (
        f"AUROC of presence {_pair(was)} becomes {_pair(auroc)} (teacher {m['teacher/fix/none/AUROC']:.2f}); cgF1 {_pair(before)} becomes {_pair(score)} (teacher {target:.2f}; best other "
        f"fix {shown}), {m['matched/fix/distil/seconds']:.1f} CPU seconds, no labels"
    )
    if min(score) >= target - CLOSE or not any(better):
        return holds(min(score) >= target - CLOSE, measured=measured)
    return depends(
        measured=measured,
        why="against the teacher's presence, query logits, boxes and image tokens. It restores what no map of the logit can, and only part of what was lost: the trunk stays as it is. In the "
        "larger study it gains 0 to 3 points where features are close (R² 0.9), less than 32 labels do, and a wrong normalisation is cheaper put right (docs/sam3_presence.md)",
    )


@claim("SAM3-14", "fix 4, constant offset +5: no training, model-specific", source="note, fixes")
def offset() -> Verdict:
    m = miniature()
    five, fitted, was = _fix(m, "offset", "NLL"), _fix(m, "offset_fitted", "NLL"), _fix(m, "none", "NLL")
    auroc = _fix(m, "offset", "AUROC")
    return holds(
        auroc == _fix(m, "none", "AUROC") and all(a > b for a, b in zip(five, fitted)),
        measured=f"NLL {_pair(was)} becomes {_pair(five)} with +5, {_pair(fitted)} with a shift fitted on {m['matched/fix/offset_fitted/labels']:.0f} labels; AUROC stays {_pair(auroc)}",
        why="it folds into a bias and costs nothing; 5 is no property of students, and an affine map cannot bring back what AUROC has lost",
    )


@claim("SAM3-15", "priority: skip, finetune, distil, offset", source="note, fixes", expect="does not hold")
def priority() -> Verdict:
    m = miniature()
    stated = ("skip", "presence", "distil", "offset")
    ours = sorted(stated, key=lambda f: -sum(_fix(m, f, "cgF1")))
    shown = ", ".join(f"{FIXES[f]} {_pair(_fix(m, f, 'cgF1'))}" for f in ours)
    cost = ("input", "features", "features_moment", "distil")  # from the cheapest
    spent = [tuple(m[f"mismatched/fix/{f}/{k}"] for k in ("labels", "trained", "pairs")) for f in cost]
    assert spent == sorted(spent)
    score = {f: m[f"mismatched/fix/{f}/cgF1"] for f in cost}
    assert min(score.values()) > m["mismatched/fix/none/cgF1"]
    paid = "; ".join(
        f"{FIXES[f]} {score[f]:.2f} for {m[f'mismatched/fix/{f}/trained']:,.0f} parameters, {m[f'mismatched/fix/{f}/seconds']:.1f} CPU s"
        for f in cost
    )
    return holds(
        tuple(ours) == stated,
        measured=f"by cgF1: {shown}; unrepaired {_pair(_fix(m, 'none', 'cgF1'))}. After another preprocessing, without labels, the cheapest first: {paid}",
        why=f"by effect alone the order of the four is another, and after another preprocessing {FIXES[max(score, key=lambda f: score[f])]} gives most. By cost: make inference see what "
        "training saw; where that cannot be changed match feature moments, folded into one convolution; distil if that is not enough. Skipping presence gives up rejection",
    )


@claim("SAM3-16", "ONNX export of encoder and decoder is hard", source="note, export", expect="depends")
def exporting() -> Verdict:
    torch.manual_seed(0)
    parts = fusion_parts(FusionEncoder(16, 2, 1, 24), QueryDecoder(16, 2, 2, 24, 5), PromptScorer(16, 24), (8, 8))[:2]
    sizes = [{"batch": 1, "tokens": 1}, {"batch": 3, "tokens": 9}]
    formats: tuple[export.Format, ...] = ("torch", "onnx")
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        formats = ("torch",)
    with tempfile.TemporaryDirectory() as held:
        done = export.export(parts, Path(held), formats, sizes=lambda part: sizes)
    shown = ", ".join(f"{e.part} to {e.format} {e.worst:.0e}" for e in done)
    return depends(
        measured=f"8×8 tokens, batch and prompt length dynamic, largest difference to PyTorch: {shown}",
        why="the release's encoder exports as it is; its decoder does not (sizes as tensors, a 72×72 cache taken at any size while tracing). With sizes as integers and coordinates "
        "computed in forward both do; `repro export` checks each file"
        + ("" if "onnx" in formats else ". ONNX was not tried here: the extra `export` is not installed"),
    )
