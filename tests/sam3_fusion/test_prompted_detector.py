import functools

import numpy as np
import pytest
import torch
from torch import nn

from core import checkpoint
from core.text import HashedText
from plugins.sam3_fusion import keys, reading, shapes_sample
from plugins.sam3_fusion.boxes import corners
from plugins.sam3_fusion.decoder import BoxBias, QueryDecoder
from plugins.sam3_fusion.detector import ConvTrunk, PromptedDetector, ViTTrunk
from plugins.sam3_fusion.fusion_encoder import FusionEncoder
from plugins.sam3_fusion.losses import DetectionLoss, covered
from plugins.sam3_fusion.processor import Processor
from plugins.sam3_fusion.scoring import PromptScorer
from plugins.sam3_fusion.task import PromptedDetection


def build(queries=5, trunk=None, cell_head=True, side=32, **decoder):
    return PromptedDetector(
        8,
        side,
        trunk or functools.partial(ConvTrunk, 4, 8, 1),
        functools.partial(FusionEncoder, 16, 2, 1, 24, 0.0),
        functools.partial(QueryDecoder, 16, 2, 2, 24, queries, 0.0, **decoder),
        functools.partial(PromptScorer, 16, 24, 0.0),
        cell_head,
    )


def given(pairs=3, tokens=4, side=32, images=2):
    pad = torch.zeros(pairs, tokens, dtype=torch.bool)
    pad[0, 2:] = True
    return torch.randn(images, 3, side, side), torch.randn(pairs, tokens, 8), pad, torch.arange(pairs) % images


def test_one_answer_a_pair_and_one_to_many_rows_in_training_only():
    net, inputs = build(), given()
    out = net(*inputs)
    assert out.scores.shape == (2, 3, 10)
    assert out.presence.shape == (2, 3)
    assert out.cells.shape == (3, 4, 4)
    assert net.eval()(*inputs).scores.shape == (2, 3, 5)


def test_a_pairs_answer_does_not_depend_on_the_other_pairs():
    net = build().eval()
    image, tokens, pad, image_of = given()
    together = net(image, tokens, pad, image_of)
    for p in range(3):
        alone = net(image[image_of[p]][None], tokens[p : p + 1], pad[p : p + 1], torch.zeros(1, dtype=torch.int64))
        torch.testing.assert_close(alone.scores[:, 0], together.scores[:, p], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.boxes[:, 0], together.boxes[:, p], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.presence[:, 0], together.presence[:, p], rtol=1e-4, atol=1e-5)


def test_pooled_text_goes_through_the_other_path():
    net = build().eval()
    net.encoder = FusionEncoder(16, 2, 1, 24, 0.0, pooled_text="masked").eval()
    image, tokens, pad, image_of = given()
    seen = net(image, tokens, pad, image_of).presence
    assert not torch.allclose(seen, net(image, tokens + 1, pad, image_of).presence)


def test_a_prompt_of_padding_alone_gives_finite_answers_and_gradients():
    net, (image, tokens, pad, image_of) = build(), given()
    pad[1] = True
    out = net(image, tokens, pad, image_of)
    loss = out.scores.sum() + out.boxes.sum() + out.presence.sum() + out.cells.sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    tokens[1] = 100.0  # what stands under the padding is not read
    again = net(image, tokens, pad, image_of)
    torch.testing.assert_close(again.presence, out.presence)


def test_boxes_out_of_range_are_clamped_or_refused_and_never_nan():
    processor = Processor(0.0)
    boxes = torch.tensor([[[0.5, 0.5, 3.0, 3.0], [-1.0, 2.0, 0.5, 0.5]]])
    answer = processor(torch.tensor([[2.0, 1.0]]), boxes, torch.tensor([1.0]), [(10, 20)])[0]
    assert answer.boxes.tolist() == [[0, 0, 20, 10], [0, 10, 0, 10]]
    assert torch.isfinite(answer.scores).all()
    targets, valid = torch.tensor([[[0.5, 0.5, 5.0, 5.0]]]), torch.ones(1, 1, dtype=torch.bool)
    scores, predicted = torch.zeros(1, 1, 2, requires_grad=True), torch.zeros(1, 1, 2, 4).add_(0.3).requires_grad_()
    losses = DetectionLoss()(scores, predicted, torch.zeros(1, 1), 2, targets, valid)
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert torch.isfinite(predicted.grad).all()
    with pytest.raises(ValueError, match="not finite"):
        DetectionLoss()(scores, predicted, torch.zeros(1, 1), 2, targets * torch.nan, valid)


def test_more_queries_than_trained_is_a_clear_error_or_a_widening():
    small, large = build(queries=5), build(queries=8)
    with pytest.raises(keys.KeysDiffer, match=r"of another shape: decoder\.queries"):
        keys.read(large, small.state_dict())
    grown = keys.more_queries(small.state_dict(), 8)
    large.load_state_dict(grown)
    out = large.eval()(*given())
    assert out.scores.shape == (2, 3, 8)
    assert torch.isfinite(out.boxes).all()


def test_a_released_checkpoint_with_missing_weights_names_them(tmp_path):
    net = build()
    theirs = keys.OriginalKeys().to_reference({k: v for k, v in net.state_dict().items() if k.startswith(keys.PARTS)})
    gone = "transformer.decoder.presence_token.weight"
    state = {f"detector.{k}": v for k, v in theirs.items() if k != gone}
    with pytest.raises(keys.KeysDiffer, match=r"1 missing: decoder\.presence\.token"):
        keys.read(build(), {"model": state})
    torch.save({"model": {f"detector.{k}": v for k, v in theirs.items()}}, tmp_path / "sam3.pt")
    task = PromptedDetection(
        detector=lambda text_dim, side: build(side=side), text=functools.partial(HashedText, 8), fusion_weights=str(tmp_path / "sam3.pt"), side=32
    )  # fmt: skip
    torch.manual_seed(5)
    loaded = task.model()
    torch.testing.assert_close(loaded.decoder.presence.token, net.decoder.presence.token)
    assert not torch.equal(loaded.prompt.token, net.prompt.token)
    task.fusion_weights = str(tmp_path / "none.pt")
    with pytest.raises(checkpoint.CheckpointError, match="does not exist"):
        task.model()


def test_parts_of_different_width_or_a_side_that_does_not_fit_are_errors():
    with pytest.raises(ValueError, match="need one dim, got encoder 8"):
        PromptedDetector(8, 32, functools.partial(ConvTrunk, 4, 8), functools.partial(FusionEncoder, 8, 2, 1, 8), functools.partial(QueryDecoder, 16, 2, 1, 8, 3))  # fmt: skip
    with pytest.raises(ValueError, match="multiple of the trunk's stride 8, got 30"):
        build(side=30)
    with pytest.raises(ValueError, match="no effect"):
        QueryDecoder(8, 2, 1, 8, 3, box_bias="none", bias_start="local")


def test_a_vision_transformer_trunk_fits_the_detector():
    net = build(trunk=functools.partial(ViTTrunk, 12, 1, 2, 14, 3), side=42)
    assert net(*given(side=42)).cells.shape == (3, 3, 3)
    with pytest.raises(ValueError, match="42 pixels a side, got 28"):
        net(*given(side=28))


@pytest.mark.parametrize("kind", ["linear", "log", "both"])
def test_a_local_start_falls_with_the_distance_outside_the_box(kind):
    bias = BoxBias(16, 2, kind)
    for mlp in (bias.x, bias.y):
        for layer in mlp:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    bias.start_local()
    box = torch.tensor([[[0.5, 0.5, 0.25, 0.25]]])
    along = bias(box, (8, 8), presence=False).x[0, 0, 0]
    inside = along[3:5]  # origins 0.375 and 0.5 of the box from 0.375 to 0.625
    assert inside.tolist() == [0, 0]
    assert (along[:3].diff() > 0).all()
    assert (along[5:].diff() < 0).all()
    assert along[0] < -2


def test_cells_are_covered_where_their_centre_lies_in_a_target():
    targets = torch.tensor([[[0.25, 0.25, 0.5, 0.5], [0.9, 0.9, 0.2, 0.2]]])
    valid = torch.tensor([[True, False]])
    seen = covered(targets, valid, (4, 4))[0]
    assert seen.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert covered(targets, valid.logical_not(), (4, 4))[0].nonzero().tolist() == [[3, 3]]


def test_the_cell_term_is_plain_cross_entropy_over_all_pairs():
    loss = DetectionLoss(cell_weight=3.0, prompt_scale=False)
    cells = torch.randn(2, 2, 2)
    targets, valid = torch.tensor([[[0.25, 0.25, 0.4, 0.4]]] * 2), torch.tensor([[True], [False]])
    got = loss(torch.zeros(1, 2, 3), torch.full((1, 2, 3, 4), 0.2), None, 3, targets, valid, cells)["cells"]
    want = 0.0
    for p in range(2):
        for i in range(2):
            for j in range(2):
                z, aim = float(cells[p, i, j]), float(p == 0 and i == j == 0)
                want += (np.log1p(np.exp(z)) - aim * z) / 8
    assert float(got) == pytest.approx(3 * want, rel=1e-5)


def test_a_cell_head_without_weight_or_the_other_way_round_is_an_error():
    arguments = (
        torch.zeros(1, 1, 2),
        torch.full((1, 1, 2, 4), 0.2),
        None,
        2,
        torch.zeros(1, 1, 4),
        torch.zeros(1, 1, dtype=torch.bool),
    )
    with pytest.raises(ValueError, match="set both or neither"):
        DetectionLoss(cell_weight=1.0)(*arguments)
    with pytest.raises(ValueError, match="set both or neither"):
        DetectionLoss()(*arguments, torch.zeros(1, 2, 2))


def test_the_task_learns_reads_and_shows(tmp_path):
    def sample(root):
        shapes_sample.shapes_sample(root, train=8, test=4, side=32)

    task = PromptedDetection(
        sample=sample, detector=lambda text_dim, side: build(8, side=side, anchor_start="grid", bias_start="local"), text=functools.partial(HashedText, 8),
        loss=functools.partial(DetectionLoss, cell_weight=10.0), side=32, batch=4, eval_batch=3, processor=functools.partial(Processor, 0.0), trunk_lr_scale=0.5,
    )  # fmt: skip
    card = task.prepare(tmp_path)
    assert card.sample
    assert card.counts["train images"] == 8
    net = task.model()
    assert task.parameter_rules() == ((r"^trunk\.", {"lr_scale": 0.5}),)
    batches = task.batches(0, 0)
    first = next(batches)
    torch.testing.assert_close(next(task.batches(0, 0))["image"], first["image"])
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    totals = []
    for _ in range(25):
        optimizer.zero_grad()
        total = sum(task.losses(net, first, 1).losses.values())
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.7 * totals[0]
    net.eval()
    said = task.read(net)
    assert said.scores.shape == (len(said.kinds), 8)
    metrics = task.evaluate(net) | task.conclude(net)
    assert 0 <= metrics["presence AUROC"] <= 1
    assert {t.title for t in task.tables(metrics)} == {"detection", "presence"}
    task.pictures(net, tmp_path)
    assert (tmp_path / "detections.png").stat().st_size > 1000
    moved = reading.measure(said.moved(1.0, 50.0), Processor(0.0))
    assert moved["presence AUROC"] == pytest.approx(metrics["presence AUROC"])
    assert moved["presence logit, absent"] == pytest.approx(metrics["presence logit, absent"] + 50)
    shape = net(*task.profile_inputs(2)).boxes.shape
    assert shape[1:3] == (2, 8)
    assert corners(net(*task.profile_inputs(1)).boxes).isfinite().all()
    seen = list(task.real_inputs(2))
    assert [len(one[3]) for one in seen] == [len(scene.prompts) for scene in task.test.scenes[:2]]
    assert net(*seen[0]).boxes.isfinite().all()


def test_shapes_that_do_not_fit_are_one_clear_error(unchecked_shapes):
    net = build().eval()
    image, tokens, pad, image_of = given()
    with pytest.raises(ValueError, match=r"tokens must be \(prompts, tokens, 8\), got \(3, 4, 6\)"):
        net(image, tokens[..., :6], pad, image_of)
    with pytest.raises(ValueError, match=r"pad must be \(3, 4\), one entry for each token of the prompt, got \(3, 3\)"):
        net(image, tokens, pad[:, :3], image_of)
    with pytest.raises(ValueError, match=r"image_of must be \(3,\), one image for each prompt, got \(2,\)"):
        net(image, tokens, pad, image_of[:2])
    with pytest.raises(ValueError, match="2 prompts for the rows of 3 pairs"):
        net.scorer(torch.randn(2, 3, 5, 16), torch.randn(2, 4, 16))
