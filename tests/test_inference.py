"""Back ends, batches and memory: the same features, however many images come and however they are cut."""

import json
import logging
import os

import numpy as np
import pytest
import torch

from cvt_model import calibration, inference
from cvt_model.backends import FeatureArrays, TorchBackend
from cvt_model.calibration import choose_batch_size
from cvt_model.checkpoint import resolve_checkpoint
from cvt_model.inference import InferenceModel
from tests.tiny_cvt import reference_model, save_checkpoint

BACKENDS = [
    "torch",
    pytest.param(
        "openvino", marks=pytest.mark.skipif("not __import__('importlib').util.find_spec('openvino')")
    ),
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cvt")
    save_checkpoint(folder, reference_model())
    return resolve_checkpoint(str(folder))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cvt-pipeline" / "batch_sizes"


def images(count):
    return np.random.default_rng(3).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def expected(checkpoint, pixels):
    output = checkpoint.load()(checkpoint.processor.normalize(torch.from_numpy(pixels)))
    return FeatureArrays(output.embedding.numpy(), output.logits.numpy())


def assert_equal(found, wanted, tolerance=2e-6):
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * max(np.abs(theirs).max(), 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_any_number_of_images_comes_back_in_order(checkpoint, backend, batch_size):
    model = InferenceModel(
        checkpoint, backend=backend, device="cpu", batch_size=batch_size, num_threads=2, precision="float32"
    )
    pixels = images(13)
    wanted = expected(checkpoint, pixels)
    for count in (1, batch_size, batch_size + 1, 13):
        assert_equal(model(pixels[:count]), FeatureArrays(*(x[:count] for x in wanted)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images_give_no_features(checkpoint, backend):
    model = InferenceModel(checkpoint, backend=backend, device="cpu", batch_size=2)
    embedding, logits = model(images(0))
    assert (embedding.shape, logits.shape) == ((0, 48), (0, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_images_features_do_not_depend_on_its_neighbours(checkpoint, backend):
    model = InferenceModel(checkpoint, backend=backend, device="cpu", batch_size=4, precision="float32")
    pixels = images(12)
    alone = [model(pixels[n : n + 1]).embedding[0] for n in range(12)]
    shuffled = np.random.default_rng(0).permutation(12)
    together = model(pixels[shuffled]).embedding
    assert_equal([together], [np.stack(alone)[shuffled]])


class Cramped:
    """A back end that does not fit into memory beyond some batch size, at its start or as it runs."""

    def __init__(self, model, limit, *, late):
        self.model, self.limit, self.late, self.sizes = model, limit, late, []
        self.make = model._make

    def __call__(self, batch_size):
        self.sizes.append(batch_size)
        if batch_size <= self.limit:
            return self.make(batch_size)
        if self.late:
            return self.fail
        return self.fail(None)

    def fail(self, pixels):
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("late", [False, True])
def test_out_of_memory_halves_the_batch_and_changes_no_result(checkpoint, caplog, late):
    model = InferenceModel(checkpoint, backend="torch", device="cpu", batch_size=16, precision="float32")
    model._make = cramped = Cramped(model, 5, late=late)
    model._running = None
    pixels = images(20)
    with caplog.at_level(logging.WARNING):
        found = model(pixels)
    assert_equal(found, expected(checkpoint, pixels))
    assert (cramped.sizes, model.batch_size) == ([16, 8, 4], 4)
    assert "out of memory; going on with batches of 4 images" in caplog.text


def test_where_not_one_image_fits_it_says_so(checkpoint):
    model = InferenceModel(checkpoint, backend="torch", device="cpu", batch_size=4)
    model._make, model._running = Cramped(model, 0, late=True), None
    with pytest.raises(MemoryError, match="one image at a time"):
        model(images(1))


def test_the_batch_size_is_measured_once_and_remembered(checkpoint, own_cache, monkeypatch):
    first = InferenceModel(checkpoint, device="cpu", num_threads=1)
    (file,) = own_cache.iterdir()
    assert json.loads(file.read_text())["batch_size"] == first.batch_size
    monkeypatch.setattr(inference, "images_per_s", None)  # a second measurement would fail
    assert InferenceModel(checkpoint, device="cpu", num_threads=1).batch_size == first.batch_size
    with pytest.raises(TypeError):  # other circumstances are measured anew
        InferenceModel(checkpoint, device="cpu", num_threads=2)


def choose(speeds, **circumstances):
    return choose_batch_size(tuple(speeds), 7, speeds.__getitem__, circumstances)


def test_it_is_the_smallest_of_those_that_are_about_as_fast_as_any():
    assert choose({1: 10.0, 2: 20.0, 4: 20.3, 8: 19.0}, case=1) == 2
    assert choose({1: 20.0, 2: 20.4, 4: 20.8}, case=2) == 2
    assert choose({1: 30.0, 2: 20.4, 4: 20.8}, case=3) == 1


@pytest.mark.parametrize("damage", ["", "{}", '{"batch_size": null}', "[1]"])
def test_a_damaged_memory_is_measured_anew(own_cache, damage):
    assert choose({1: 10.0, 2: 20.0}) == 2
    assert choose({1: 20.0, 2: 10.0}) == 2
    (file,) = own_cache.iterdir()
    file.write_text(damage)
    assert choose({1: 20.0, 2: 20.1}) == 1
    assert json.loads(file.read_text())["batch_size"] == 1


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choose({1: 1.0, 2: 2.0}) == 2


def test_sizes_beyond_the_memory_are_not_chosen():
    def measure(size):
        if size > 2:
            raise MemoryError
        return float(size)

    assert choose_batch_size((1, 2, 4, 8), 8, measure, {}) == 2
    assert choose_batch_size((4, 8), 8, measure, {"case": 2}) == 4  # the model itself halves it


def test_a_trial_that_takes_too_long_gives_the_default_and_is_not_remembered(own_cache, monkeypatch):
    monkeypatch.setattr(calibration, "BUDGET_S", -1.0)
    assert choose({1: 10.0, 2: 20.0}) == 7
    assert not own_cache.exists()


def test_a_precision_that_the_cpu_lacks_is_computed_in_float32(checkpoint, monkeypatch, caplog):
    monkeypatch.setattr(inference, "cpu_computes_in", lambda precision: False)
    with caplog.at_level(logging.INFO):
        model = InferenceModel(
            checkpoint, backend="torch", device="cpu", batch_size=4, precision="bfloat16"
        )
    assert "no arithmetic in bfloat16" in caplog.text
    assert_equal(model(images(5)), expected(checkpoint, images(5)))


def test_a_precision_that_the_cpu_has_is_computed_in_it(checkpoint, monkeypatch):
    monkeypatch.setattr(inference, "cpu_computes_in", lambda precision: True)
    model = InferenceModel(checkpoint, backend="torch", device="cpu", batch_size=4, precision="bfloat16")
    embedding, wanted = model(images(5)).embedding, expected(checkpoint, images(5)).embedding
    assert 1e-4 < np.abs(embedding - wanted).max() < 0.1


def test_threads_are_as_many_as_asked_for(checkpoint):
    before = torch.get_num_threads()
    try:
        InferenceModel(checkpoint, backend="torch", device="cpu", batch_size=1, num_threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    own = InferenceModel(checkpoint, backend="torch", device="cpu", batch_size=1)
    assert own.num_threads == len(os.sched_getaffinity(0))
    torch.set_num_threads(before)


def test_a_back_end_that_is_not_there_is_named_with_the_remedy(checkpoint, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'cvt-pipeline\[cpu\]'"):
        InferenceModel(checkpoint, backend="openvino", device="cpu")
    model = InferenceModel(checkpoint, device="cpu", batch_size=1)
    assert isinstance(model._running, TorchBackend)


def test_images_of_their_own_sizes_cannot_be_batched(tmp_path):
    save_checkpoint(tmp_path)
    settings = tmp_path / "preprocessor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "do_resize": False}))
    with pytest.raises(ValueError, match="keep their sizes"):
        InferenceModel(resolve_checkpoint(str(tmp_path)))


@pytest.mark.parametrize("choice", [{"backend": "tensorrt"}, {"precision": "int8"}])
def test_a_choice_that_there_is_none_of_is_refused_with_those_that_there_are(checkpoint, choice):
    (name, value) = next(iter(choice.items()))
    with pytest.raises(ValueError, match=f"{name}: '{value}' is none; choose .* or auto"):
        InferenceModel(checkpoint, device="cpu", batch_size=1, **choice)


@needs_gpu
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05), ("float16", 0.01)]
)
def test_on_a_gpu_any_number_of_images_comes_back_in_order(checkpoint, precision, tolerance):
    model = InferenceModel(checkpoint, precision=precision, batch_size=8)
    pixels = images(21)
    assert_equal(model(pixels), expected(checkpoint, pixels), tolerance)
    assert_equal(model(pixels[:3]), FeatureArrays(*(x[:3] for x in model(pixels))), 1e-6)


@needs_gpu
def test_on_a_gpu_the_batch_size_is_measured(checkpoint):
    assert InferenceModel(checkpoint).batch_size in inference.BATCH_SIZES["cuda"]
