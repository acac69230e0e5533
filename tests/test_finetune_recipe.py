"""The arithmetic of a training: rates, averages, mixing, Muon, and the beginning that attends to itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from cvt_model.config import CvtConfig
from cvt_model.initialization import SELF_LOGIT, attend_to_self
from cvt_model.layers import DropPath
from cvt_model.model import CvtForImageClassification, SelfAttention
from pipeline.finetune.config import MOST_SEED, AugmentConfig, TrainConfig
from pipeline.finetune.muon import Muon, orthogonal
from pipeline.finetune.recipe import (
    NO_MIX,
    Average,
    Mix,
    Schedule,
    draw_mix,
    make_optimizers,
    mix_pairs,
    mixed_loss,
    set_rates,
)
from pipeline.finetune.together import Chances
from tests.labelled_images import NETWORK


def network(**changes: object) -> CvtForImageClassification:
    torch.manual_seed(0)
    return CvtForImageClassification(CvtConfig.from_dict({**NETWORK, "num_labels": 3, **changes}))


def test_the_rate_rises_to_its_peak_and_falls_along_half_a_cosine():
    train = TrainConfig(epochs=10, batch_size=10, warmup_epochs=2, learning_rate=1.0, min_learning_rate=0.1)
    schedule = Schedule.of(train, num_samples=100)
    assert (schedule.total_steps, schedule.warmup_steps) == (100, 20)
    assert [schedule.rate(step) for step in (0, 9, 19)] == pytest.approx([0.05, 0.5, 1.0])
    assert schedule.rate(60) == pytest.approx(0.55)  # half-way down
    assert schedule.rate(99) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 79 / 80)) / 2)


def test_norms_biases_and_cls_tokens_do_not_decay_and_muon_takes_the_matrices():
    model = network()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    both = make_optimizers(model, TrainConfig(optimizer="muon"))
    decaying, others = ([names[id(p)] for p in g["params"]] for g in both["adamw"].param_groups)
    assert both["adamw"].param_groups[1]["weight_decay"] == 0
    assert all(name.endswith(("bias", "cls_token")) or "norm" in name for name in others)
    assert all("convolution.weight" in name or name == "classifier.weight" for name in decaying)
    matrices = [names[id(p)] for group in both["muon"].param_groups for p in group["params"]]
    assert any("projection_query" in name for name in matrices)
    assert any("convolution_embeddings.projection" in name for name in matrices)
    every = [*decaying, *others, *matrices]
    assert sorted(every) == sorted(names.values())


def test_muon_gets_the_same_share_of_its_own_rate():
    train = TrainConfig(optimizer="muon", learning_rate=1e-3, muon_learning_rate=0.04)
    optimizers = make_optimizers(network(), train)
    set_rates(optimizers, 2.5e-4, train)
    assert optimizers["adamw"].param_groups[0]["lr"] == pytest.approx(2.5e-4)
    assert optimizers["muon"].param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("shape", [(8, 8), (4, 32), (32, 4)])
def test_orthogonal_brings_every_singular_value_near_one(shape):
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.4
    torch.testing.assert_close(orthogonal(5 * matrix), orthogonal(matrix))


def test_muon_descends_and_decays():
    torch.manual_seed(2)
    weight = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = Muon([weight], lr=0.05, weight_decay=0.1)
    target = torch.randn(6, 4)
    before = (weight - target).norm().item()
    for _ in range(60):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert (weight - target).norm().item() < before / 5


def test_the_average_follows_the_formula_and_copies_counters():
    model = network()
    average = Average(model, decay=0.9)
    name = "classifier.weight"
    expected = average.state[name].clone()
    for step in range(40):
        with torch.no_grad():
            model.classifier.weight.add_(1.0)
        model.cvt.encoder["stages"][0].layers[0].attention["attention"].convolution_projection_query[0][
            1
        ].num_batches_tracked += 1
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.classifier.weight.detach()
    torch.testing.assert_close(average.state[name], expected)
    counter = next(key for key in average.state if key.endswith("num_batches_tracked"))
    assert average.state[counter] == model.state_dict()[counter]


def test_mixup_is_the_cross_entropy_with_mixed_targets():
    torch.manual_seed(3)
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 4])
    partner = labels[[1, 0, 3, 2, 5, 4]]
    target = 0.7 * F.one_hot(labels, 5).float() + 0.3 * F.one_hot(partner, 5).float()
    target = 0.9 * target + 0.1 / 5
    expected = F.cross_entropy(logits, target)
    torch.testing.assert_close(mixed_loss(logits, labels, Mix(0.7), 0.1), expected)
    images = torch.randn(6, 3, 4, 4)
    mixed = mix_pairs(images, Mix(0.7))
    torch.testing.assert_close(mixed[2], 0.7 * images[2] + 0.3 * images[3])
    torch.testing.assert_close(mixed[3], 0.7 * images[3] + 0.3 * images[2])
    assert mix_pairs(images, NO_MIX) is images


def test_cutmix_exchanges_a_box_and_keeps_its_share():
    augment = AugmentConfig(mixup=0, cutmix=1.0)
    images = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    shares = []
    for seed in range(50):
        mix = draw_mix(augment, 16, np.random.default_rng(seed))
        mixed = mix_pairs(images, mix)
        assert mixed[0].mean().item() == pytest.approx(1 - mix.kept, abs=1e-6)
        assert mixed[1].mean().item() == pytest.approx(mix.kept, abs=1e-6)
        shares.append(mix.kept)
    assert min(shares) < 0.3
    assert max(shares) > 0.7


def test_mixing_happens_as_often_as_it_is_asked_for():
    rng = np.random.default_rng(0)
    augment = AugmentConfig(mixup=0.8, cutmix=1.0, mix_probability=0.25)
    drawn = [draw_mix(augment, 16, rng) for _ in range(400)]
    assert 60 < sum(mix != NO_MIX for mix in drawn) < 140
    boxes = [mix.box is not None for mix in drawn if mix != NO_MIX]
    assert 0.3 < np.mean(boxes) < 0.7
    assert draw_mix(AugmentConfig(mixup=0, cutmix=0), 16, rng) == NO_MIX


def test_attention_begins_at_the_token_itself():
    model = network().train()
    attend_to_self(model)
    layer = next(module for module in model.modules() if isinstance(module, SelfAttention))
    tokens = F.layer_norm(torch.randn(4, 64, 16), (16,))
    query = layer.projection_query(tokens)
    key = layer.projection_key(tokens)
    logits = query @ key.transpose(1, 2) * layer.scale
    own = logits.diagonal(dim1=1, dim2=2)
    assert own.mean().item() == pytest.approx(SELF_LOGIT, rel=0.05)
    assert logits.mean().abs().item() < 0.3
    state = layer.state_dict()
    for name, value in state.items():
        if name.startswith("convolution_projection_query") and name.endswith("convolution.weight"):
            torch.testing.assert_close(value, state[name.replace("query", "key")])


def test_the_largest_seed_gives_chances_at_any_step():
    drawn = Chances(network(), TrainConfig(seed=MOST_SEED).seed).draw(step=10**12, batch_size=4)
    assert drawn.shape == (1, 2, 4)


def test_a_step_s_dropped_branches_can_be_repeated():
    drop = DropPath(0.5).train()
    x_BLC = torch.ones(4, 1, 1)
    drop.chances = iter([torch.tensor([0.1, 0.6, 0.4, 0.9]), torch.tensor([0.9, 0.1, 0.9, 0.1])])
    assert drop(x_BLC).flatten().tolist() == [0, 2, 0, 2]
    assert drop(x_BLC).flatten().tolist() == [2, 0, 2, 0]
