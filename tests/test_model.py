"""The network against transformers' in the same process."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from cvt_model import CvtConfig, CvtForImageClassification, CvtModel
from tests.tiny_cvt import TINY, reference_model

CONFIGS = {
    "cls_in_last_stage": {},
    "no_cls": {"cls_token": [False, False, False]},
    "cls_everywhere": {"embed_dim": [48, 48, 48], "num_heads": [1, 2, 3], "cls_token": [True] * 3},
    "no_qkv_bias": {"qkv_bias": [False, True, False]},
    "other_strides_and_kernels": {
        "patch_sizes": [5, 3, 2],
        "patch_stride": [3, 2, 1],
        "patch_padding": [1, 0, 1],
        "kernel_qkv": [5, 3, 1],
        "padding_q": [2, 1, 0],
        "padding_kv": [2, 0, 0],
        "stride_kv": [3, 1, 2],
        "mlp_ratio": [2.0, 3.5, 1.0],
    },
    "two_stages": {
        **{
            key: list(value)[:2]
            for key, value in transformers.CvtConfig().to_dict().items()
            if isinstance(value, list | tuple)
        },
        "embed_dim": [16, 32],
        "num_heads": [2, 4],
        "depth": [1, 3],
        "cls_token": [False, True],
    },
    "no_classifier": {"num_labels": 0},
    "one_channel": {"num_channels": 1},
}


def copy_of(reference: nn.Module, model_class: Callable[[CvtConfig], nn.Module]) -> nn.Module:
    model = model_class(CvtConfig.from_dict(reference.config.to_dict()))
    model.load_state_dict(reference.state_dict())
    return model.eval()


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(2, 64, 64), (1, 64, 64), (3, 70, 41)])
@torch.no_grad()
def test_logits_and_hidden_states_equal_transformers(name, shape):
    reference = reference_model(**CONFIGS[name])
    model = copy_of(reference, CvtForImageClassification)
    batch, height, width = shape
    pixels = torch.randn(batch, reference.config.num_channels, height, width)
    theirs = reference(pixels, output_hidden_states=True)
    ours = model(pixels, output_hidden_states=True)
    assert theirs.logits.std() > 0.01
    assert max_difference(ours.logits, theirs.logits) <= 1e-5
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for our_map, their_map in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert max_difference(our_map, their_map) <= 2e-5


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_headless_model_equals_transformers(name):
    reference = reference_model(transformers.CvtModel, **CONFIGS[name])
    model = copy_of(reference, CvtModel)
    pixels = torch.randn(2, reference.config.num_channels, 48, 64)
    theirs, ours = reference(pixels), model(pixels)
    assert max_difference(ours.last_hidden_state, theirs.last_hidden_state) <= 2e-5
    assert ours.hidden_states is None
    if theirs.cls_token_value is None:
        assert ours.cls_token_value is None
    else:
        assert max_difference(ours.cls_token_value, theirs.cls_token_value) <= 2e-5


@pytest.mark.parametrize("name", ["cls_in_last_stage", "no_cls"])
@torch.no_grad()
def test_the_embedding_is_what_the_classifier_of_transformers_sees(name):
    reference = reference_model(**CONFIGS[name])
    seen = []
    reference.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = torch.randn(2, 3, 64, 64)
    # transformers fails without a CLS token unless it is asked for hidden states too.
    reference(pixels, output_hidden_states=True)
    output = copy_of(reference, CvtForImageClassification)(pixels)
    assert max_difference(output.embedding, seen[0]) <= 1e-5


@torch.no_grad()
def test_cvt_13_equals_transformers():
    default = transformers.CvtConfig()
    widths = {key: getattr(default, key) for key in ("embed_dim", "num_heads", "depth")}
    reference = reference_model(**widths, num_labels=1000)
    model = copy_of(reference, CvtForImageClassification)
    pixels = torch.randn(1, 3, 224, 224)
    assert max_difference(model(pixels).logits, reference(pixels).logits) <= 1e-4


def test_gradients_equal_those_of_transformers():
    # In float64, as some true gradients are zero (softmax ignores what all keys share).
    reference = reference_model(drop_path_rate=[0.0] * 3).train().double()
    model = copy_of(reference, lambda config: CvtForImageClassification(config).double()).train()
    pixels = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for network in (reference, model):
        network(pixels).logits.square().sum().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert max_difference(parameter.grad, theirs[name].grad) <= 1e-9, name


def test_fresh_weights_are_distributed_as_those_of_transformers():
    torch.manual_seed(1)
    ours = CvtForImageClassification(CvtConfig.from_dict(TINY)).state_dict()
    theirs = transformers.CvtForImageClassification(transformers.CvtConfig(**TINY)).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor.numel() > 500:
            assert ours[name].std().item() == pytest.approx(tensor.std().item(), rel=0.25), name
        elif tensor.ndim == 1:
            assert torch.equal(ours[name], tensor), name


def test_dropout_acts_in_training_and_not_in_evaluation():
    model = CvtForImageClassification(
        CvtConfig.from_dict({**TINY, "drop_rate": [0.5] * 3, "attention_drop_rate": [0.5] * 3})
    )
    pixels = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(pixels).embedding, model(pixels).embedding)
    model.eval()
    assert torch.equal(model(pixels).embedding, model(pixels).embedding)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32)])
def test_pixels_of_a_wrong_shape_are_named(shape):
    model = CvtModel(CvtConfig.from_dict(TINY))
    with pytest.raises(ValueError, match=r"pixel_values: shape .* is not"):
        model(torch.zeros(shape))
