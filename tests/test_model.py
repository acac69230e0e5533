"""The network against transformers' in the same process, and against the original definitions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from cvt_model import CvtConfig, CvtForImageClassification, CvtImageProcessor, CvtModel
from cvt_model.layers import DropPath
from cvt_model.model import Layer, SelfAttention
from tests.random_cvt import random_own_values, random_pixels, random_values, restated_maps
from tests.tiny_cvt import TINY, randomised, reference_model

SEEDS = range(20)
NO_DROPS = ("attention_drop_rate", "drop_rate", "drop_path_rate")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def copy_of(reference: nn.Module, model_class: Callable[[CvtConfig], Any]) -> Any:
    model = model_class(CvtConfig.from_dict(reference.config.to_dict()))
    model.load_state_dict(reference.state_dict())
    return model.eval()


def own_model(values: dict[str, Any], model_class: Callable[[CvtConfig], Any] = CvtModel) -> Any:
    return randomised(model_class(CvtConfig.from_dict(values))).eval()


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor, relative: float = 1e-5) -> None:
    assert theirs.abs().max() > 0.01
    assert max_difference(ours, theirs) <= relative * theirs.abs().max().item()


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_a_random_network_computes_what_transformers_computes(seed):
    values = random_values(seed)
    reference = reference_model(**values)
    model = copy_of(reference, CvtForImageClassification)
    pixels = random_pixels(values, seed)
    # transformers fails without a CLS token unless it is asked for hidden states too.
    theirs = reference(pixels, output_hidden_states=True)
    ours = model(pixels, output_hidden_states=True)
    assert_equal(ours.logits, theirs.logits)
    for our_map, their_map in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_equal(our_map, their_map)
    features, their_features = model.cvt(pixels), reference.cvt(pixels)
    assert_equal(features.last_hidden_state, their_features.last_hidden_state)
    assert features.hidden_states is None
    if values["cls_token"][-1]:
        assert_equal(features.cls_token_value, their_features.cls_token_value)
        assert torch.equal(ours.cls_token_value, features.cls_token_value)
    else:
        assert features.cls_token_value is their_features.cls_token_value is None


def random_labels(problem_type: str, batch_size: int, num_labels: int) -> torch.Tensor:
    if problem_type == "single_label_classification":
        return torch.randint(num_labels, (batch_size,))
    shape = (batch_size, num_labels)
    values = torch.rand(shape, dtype=torch.float64)
    return values if problem_type == "regression" else values.round()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_loss_and_gradients_are_those_of_transformers(seed, training):
    # In float64, as some true gradients are zero (softmax ignores what all keys share).
    values = random_values(seed)
    values |= {name: [0.0] * len(values["depth"]) for name in NO_DROPS}
    problem_type = PROBLEM_TYPES[seed % 3]
    by_labels = seed % 2 == 0  # the problem is not named, but follows from the labels
    if problem_type == "regression":
        values["num_labels"] = 1 if by_labels else 3
    else:
        values["num_labels"] = max(values["num_labels"], 2)
    reference = reference_model(**values, problem_type=None if by_labels else problem_type).double()
    model = copy_of(reference, lambda config: CvtForImageClassification(config).double())
    pixels = random_pixels(values, seed, torch.float64)
    labels = random_labels(problem_type, len(pixels), values["num_labels"])
    for network in (reference, model):
        network.train(training)
    theirs = reference(pixels, labels=labels, output_hidden_states=True)
    ours = model(pixels, labels=labels)
    assert theirs.loss > 1e-3
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-10)
    assert model.config.problem_type == (None if by_labels else problem_type)
    theirs.loss.backward()
    ours.loss.backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        bound = 1e-7 * gradients[name].abs().max().item() + 1e-11
        assert max_difference(parameter.grad, gradients[name]) <= bound, name
    buffers = dict(reference.named_buffers())  # of BatchNorm: what training has seen
    for name, buffer in model.named_buffers():
        assert torch.allclose(buffer, buffers[name], rtol=1e-10), name


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_what_transformers_cannot_run_follows_the_original_authors(seed):
    values = random_own_values(seed)
    model = own_model(values).double()
    pixels = random_pixels(values, seed, torch.float64)
    maps, cls = restated_maps(model.config, model.state_dict(), pixels)
    ours = model(pixels, output_hidden_states=True)
    for our_map, their_map in zip(ours.hidden_states, maps, strict=True):
        assert_equal(our_map, their_map, 1e-10)
    assert (ours.cls_token_value is None) == (cls is None)
    if cls is not None:
        assert_equal(ours.cls_token_value, cls, 1e-10)


@torch.no_grad()
def test_quick_gelu_is_another_network_than_gelu():
    gelu, quick = (own_model({**TINY, "hidden_act": act}) for act in ("gelu", "quick_gelu"))
    quick.load_state_dict(gelu.state_dict())
    pixels = torch.randn(1, 3, 32, 32)
    difference = max_difference(gelu(pixels).last_hidden_state, quick(pixels).last_hidden_state)
    assert 1e-4 < difference < 1


@pytest.mark.parametrize("cls_token", [True, False])
@torch.no_grad()
def test_the_embedding_is_what_the_classifier_of_transformers_sees(cls_token):
    reference = reference_model(cls_token=[False, False, cls_token])
    seen = []
    reference.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = torch.randn(2, 3, 64, 64)
    reference(pixels, output_hidden_states=True)
    output = copy_of(reference, CvtForImageClassification)(pixels)
    assert_equal(output.embedding, seen[0])


@torch.no_grad()
def test_without_labels_the_logits_are_the_embedding():
    output = copy_of(reference_model(num_labels=0), CvtForImageClassification)(torch.randn(1, 3, 32, 32))
    assert torch.equal(output.logits, output.embedding)


@pytest.mark.parametrize("labels", [None, torch.tensor([1, 2])])
@pytest.mark.parametrize("output_hidden_states", [True, False])
@torch.no_grad()
def test_a_tuple_has_what_that_of_transformers_has(labels, output_hidden_states):
    reference = reference_model()
    model = copy_of(reference, CvtForImageClassification)
    pixels = torch.randn(2, 3, 32, 48)
    options = {"output_hidden_states": output_hidden_states, "return_dict": False}
    pairs = [
        (model(pixels, labels, **options), reference(pixels, labels, **options)),
        (model.cvt(pixels, **options), reference.cvt(pixels, **options)),
    ]
    for ours, theirs in pairs:
        assert type(ours) is tuple
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            if isinstance(other, tuple):
                for our_map, their_map in zip(mine, other, strict=True):
                    assert_equal(our_map, their_map)
            else:
                assert_equal(mine, other)


@torch.no_grad()
def test_a_tuple_without_a_cls_token_has_the_hidden_states_that_were_asked_for():
    model = own_model({**TINY, "cls_token": [False] * 3}, CvtForImageClassification)
    logits, hidden_states = model(torch.randn(1, 3, 32, 32), output_hidden_states=True, return_dict=False)
    assert logits.shape == (1, 5)
    assert [len(map_CHW) for (map_CHW,) in hidden_states] == TINY["embed_dim"]


@torch.no_grad()
def test_cvt_13_equals_transformers():
    default = transformers.CvtConfig()
    widths = {key: getattr(default, key) for key in ("embed_dim", "num_heads", "depth")}
    reference = reference_model(**widths, num_labels=1000)
    model = copy_of(reference, CvtForImageClassification)
    pixels = torch.randn(1, 3, 224, 224)
    assert_equal(model(pixels).logits, reference(pixels).logits)


def test_fresh_weights_are_drawn_as_the_original_authors_draw_them():
    torch.manual_seed(1)
    config = {**TINY, "initializer_range": 0.05, "cls_token": [True] * 3, "embed_dim": [96] * 3}
    model = CvtForImageClassification(CvtConfig.from_dict(config))
    theirs = transformers.CvtForImageClassification(transformers.CvtConfig(**config)).state_dict()
    assert model.state_dict().keys() == theirs.keys()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.05, rel=0.1), name
            assert module.weight.std().item() == pytest.approx(
                theirs[name + ".weight"].std().item(), rel=0.15
            )
            assert torch.all(module.bias == 0), name
        elif isinstance(module, nn.Conv2d):  # unlike transformers': as torch leaves them, uniform
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert 0.9 * bound < module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert torch.all(module.weight == 1), name
            assert torch.all(module.bias == 0), name
    for stage in model.cvt.encoder["stages"]:
        assert stage.cls_token.std().item() == pytest.approx(0.05, rel=0.3)


def test_dropout_acts_in_training_and_not_in_evaluation():
    for field in ("drop_rate", "attention_drop_rate", "drop_path_rate"):
        values = {**TINY, "drop_path_rate": [0.0] * 3, "depth": [1, 2, 3], field: [0.5] * 3}
        model = own_model(values, CvtForImageClassification)
        pixels = torch.randn(8, 3, 32, 32)
        assert torch.equal(model(pixels).embedding, model(pixels).embedding), field
        for module in model.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        assert not torch.equal(model(pixels).embedding, model(pixels).embedding), field


def test_dropouts_stand_where_transformers_has_them():
    reference = reference_model(drop_rate=[0.1, 0.2, 0.3], attention_drop_rate=[0.4, 0.5, 0.6])
    theirs = {name: it.p for name, it in reference.named_modules() if isinstance(it, nn.Dropout)}
    model = copy_of(reference, CvtForImageClassification)
    ours = {name: it.p for name, it in model.named_modules() if isinstance(it, nn.Dropout)}
    for name, module in model.named_modules():
        if isinstance(module, SelfAttention):  # its dropout is part of torch's attention
            ours[name + ".dropout"] = module.drop_rate
    assert ours == theirs


def test_drop_path_rates_rise_from_layer_to_layer_within_a_stage():
    model = own_model({**TINY, "depth": [1, 3, 5], "drop_path_rate": [0.4, 0.2, 0.1]})
    rates = [[layer.drop_path.rate for layer in stage.layers] for stage in model.encoder["stages"]]
    assert rates == [[0.0], pytest.approx([0, 0.1, 0.2]), pytest.approx([0, 0.025, 0.05, 0.075, 0.1])]


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x_BLC = torch.rand(20_000, 2, 3) + 1
    drop_path = DropPath(0.3)
    factors = drop_path(x_BLC) / x_BLC
    dropped = factors[:, 0, 0] == 0
    assert torch.allclose(factors[dropped], torch.tensor(0.0))
    assert torch.allclose(factors[~dropped], torch.tensor(1 / 0.7))
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.015)
    assert torch.equal(drop_path.eval()(x_BLC), x_BLC)


def test_a_layer_whose_branches_are_dropped_passes_its_input_on():
    """transformers drops the residual connection as well, and with it the sample."""
    torch.manual_seed(0)
    layer = randomised(Layer(CvtConfig.from_dict(TINY), 0, drop_path_rate=0.9999)).train()
    x_BLC = torch.randn(3, 16, 16)
    assert torch.equal(layer(x_BLC, 4, 4), x_BLC)
    assert max_difference(layer.eval()(x_BLC, 4, 4), x_BLC) > 0.1


def test_the_network_is_one_graph_for_compilers():
    values = {**TINY, "qkv_projection_method": ["avg", "dw_bn", "linear"], "drop_path_rate": [0.0] * 3}
    model = own_model(values, CvtForImageClassification)
    pixels = torch.randn(2, 3, 40, 32)
    expected = model(pixels).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_equal(compiled(pixels).logits, expected)
    labels = torch.tensor([1, 4])
    assert_equal(compiled.train()(pixels, labels).loss, model(pixels, labels).loss)


def test_the_network_exports_with_any_number_of_images():
    model = own_model(TINY, CvtForImageClassification)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        model, (torch.randn(2, 3, 40, 32),), dynamic_shapes={"pixel_values": {0: batch}}
    ).module()
    pixels = torch.randn(5, 3, 40, 32)
    assert_equal(exported(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("class_name", ["CvtForImageClassification", "CvtModel"])
@torch.no_grad()
def test_what_save_pretrained_writes_is_read_by_us_and_by_transformers(class_name, tmp_path):
    model_class = {"CvtModel": CvtModel}.get(class_name, CvtForImageClassification)
    model = own_model(TINY, model_class)
    model.save_pretrained(tmp_path, CvtImageProcessor.from_dict({"size": {"shortest_edge": 32}}))
    pixels = torch.randn(1, 3, 32, 32)
    expected = model(pixels)
    ours = model_class.from_pretrained(str(tmp_path))(pixels)
    theirs = getattr(transformers, class_name).from_pretrained(tmp_path)(pixels)
    name = "logits" if class_name != "CvtModel" else "last_hidden_state"
    assert torch.equal(getattr(ours, name), getattr(expected, name))
    assert_equal(getattr(expected, name), getattr(theirs, name))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32)])
def test_pixels_of_a_wrong_shape_are_named(shape):
    model = CvtModel(CvtConfig.from_dict(TINY))
    with pytest.raises(ValueError, match=r"pixel_values: shape .* is not"):
        model(torch.zeros(shape))
