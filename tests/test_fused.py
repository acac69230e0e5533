"""The inference form against the network that it is made from, in torch and as an OpenVINO graph."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cvt_model import CvtConfig, CvtForImageClassification, CvtImageProcessor, CvtModel
from cvt_model.fused import FusedCvt
from tests.random_cvt import random_own_values, random_values
from tests.tiny_cvt import TINY, randomised

PROCESSOR = CvtImageProcessor(size=64, image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))


def a_network(values, model_class=CvtForImageClassification):
    torch.manual_seed(1)
    config = CvtConfig(**{**values, "num_channels": 3})
    return randomised(model_class(config)).eval().requires_grad_(False)


def random_images(seed, size):
    return np.random.default_rng(seed).integers(0, 256, (1 + seed % 3, *size, 3), dtype=np.uint8)


def fuse(model, **options):
    return FusedCvt(model.config, model.state_dict(), PROCESSOR, **options).eval()


def run_torch(fused, pixels):
    with torch.inference_mode():
        return [x.numpy() for x in fused(torch.from_numpy(pixels))]


def run_openvino(fused, pixels):
    ov = pytest.importorskip("openvino")
    from cvt_model.openvino_graph import build_graph

    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.compile_model(build_graph(fused, *pixels.shape[1:3]), "CPU", exact)
    results = compiled({"pixels": pixels})
    logits = results["logits"] if len(results) > 1 else np.empty((len(pixels), 0), np.float32)
    return [results["embedding"], logits]


def assert_near(found, wanted, tolerance=1e-5):
    assert found.shape == wanted.shape
    scale = np.abs(wanted).max() if wanted.size else 1
    assert np.abs(found - wanted).max(initial=0) <= tolerance * scale


def normalized(pixels):
    return PROCESSOR.normalize(torch.from_numpy(pixels))


@pytest.mark.parametrize("run", [run_torch, run_openvino])
@pytest.mark.parametrize("draw", [random_values, random_own_values])
def test_features_are_those_of_the_network_whatever_its_config(draw, run):
    for seed in range(12):
        values = draw(seed)
        model = a_network(values)
        shrink = int(np.prod(values["patch_stride"]))
        pixels = random_images(seed, (shrink * 6 + 9, shrink * 5 + 12))
        wanted = model(normalized(pixels))
        embedding, logits = run(fuse(model), pixels)
        assert_near(embedding, wanted.embedding.numpy())
        assert_near(logits, wanted.logits.numpy())


@pytest.mark.parametrize("run", [run_torch, run_openvino])
@pytest.mark.parametrize("with_cls_token", [True, False])
def test_without_a_head_the_embedding_is_the_cls_token_or_the_mean_of_the_tokens(run, with_cls_token):
    values = {**TINY, "num_labels": 0, "cls_token": (False, False, with_cls_token)}
    model = a_network(values, CvtModel)
    pixels = random_images(2, (64, 48))
    output = model(normalized(pixels))
    wanted = output.cls_token_value[:, 0] if with_cls_token else output.last_hidden_state.mean((2, 3))
    embedding, logits = run(fuse(model), pixels)
    assert_near(embedding, wanted.numpy())
    assert logits.shape == (len(pixels), 0)


@pytest.mark.parametrize("run", [run_torch, run_openvino])
def test_the_raw_cls_token_can_be_the_embedding(run):
    model = a_network(TINY)
    pixels = random_images(1, (64, 64))
    wanted = model(normalized(pixels))
    embedding, logits = run(fuse(model, embedding="cls_token"), pixels)
    assert_near(embedding, wanted.cls_token_value[:, 0].numpy())
    assert_near(logits, wanted.logits.numpy())


def test_of_the_last_layer_only_the_cls_token_is_computed():
    model = a_network(TINY)
    pixels = random_images(0, (64, 64))

    def flops(module, x):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            module(x)
        return counter.get_total_flops()

    layers = sum(TINY["depth"])
    spared = flops(model, normalized(pixels)) - flops(fuse(model), torch.from_numpy(pixels))
    width, tokens = TINY["embed_dim"][-1], 4 * 4
    products = 2 * width * width * (1 + 1 + 4 + 4)  # query, output, MLP in and out
    assert layers > 1
    assert spared >= tokens * products


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_std": (0.2, 0.9, 3.0)},
    ],
)
def test_preprocessing_in_the_graph_is_that_of_the_processor(settings):
    processor = CvtImageProcessor(**settings)
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(1, 16, 16, 3)
    gain, offset = processor.affine()
    wanted = processor.normalize(pixels).permute(0, 2, 3, 1)
    torch.testing.assert_close(pixels * gain + offset, wanted, rtol=1e-6, atol=2e-6)


def test_in_bfloat16_embeddings_keep_their_direction():
    model = a_network({**TINY, "depth": (1, 2, 4)})
    pixels = random_images(2, (64, 64))
    exact, _ = run_torch(fuse(model), pixels)
    rounded, _ = run_torch(fuse(model, dtype=torch.bfloat16), pixels)
    cosine = (exact * rounded).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    assert rounded.dtype == np.float32
    assert 0.999 < cosine.min() < 1 - 1e-9


def test_the_form_shares_the_weights_that_it_does_not_change():
    model = a_network(TINY)
    fused = fuse(model)
    mine = {x.untyped_storage().data_ptr() for x in model.state_dict().values()}
    theirs = {x.untyped_storage().data_ptr() for x in fused.state_dict().values()}
    assert len(mine & theirs) > len(theirs) * 0.6
