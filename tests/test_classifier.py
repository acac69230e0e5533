"""`CvtClassifier` against transformers: its model and softmax, and its own one-liner."""

import importlib.util
import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from PIL import ExifTags, Image, ImageOps
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from cvt_model import CheckpointError, CvtClassifier, ImageError, Prediction
from cvt_model.classifier import MIN_CHUNK
from tests.conftest import encode, make_image
from tests.tiny_cvt import reference_model, save_checkpoint
from tests.web_server import serving_folder

LABELS = ("tench", "goldfish", "a label, with a comma", "日本", "hen")
BACKENDS = ("torch", "openvino") if importlib.util.find_spec("openvino") else ("torch",)
TOLERANCE = 1e-5


def named(**options):
    """A reference model whose classes have names."""
    id2label = dict(enumerate(LABELS))
    label2id = {label: number for number, label in id2label.items()}
    return reference_model(id2label=id2label, label2id=label2id, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory with a tiny CvT as transformers saves it, and transformers' model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, save_checkpoint(folder, named())


@pytest.fixture(scope="module")
def classify(checkpoint):
    return CvtClassifier(checkpoint[0], device="cpu", num_threads=1)


def reference(checkpoint, image):
    """What transformers makes of an RGB image: classes and their scores, best first."""
    folder, model = checkpoint
    pixels = ConvNextImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt")
    with torch.no_grad():
        scores = model(**pixels).logits.softmax(dim=1)[0]
    order = scores.argsort(descending=True).tolist()
    return [Prediction(LABELS[number], number, float(scores[number])) for number in order]


def agree(found, expected, tolerance=TOLERANCE):
    assert [p[:2] for p in found] == [p[:2] for p in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.score == pytest.approx(other.score, abs=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_the_reference_in_order_over_many_chunks(checkpoint, backend, batch_size):
    images = [make_image(seed, (40 + seed % 7, 50)) for seed in range(MIN_CHUNK + 5)]
    num_threads = 2 if backend == "openvino" else 1  # torch would keep two for the tests that follow
    classify = CvtClassifier(
        checkpoint[0],
        dtype="float32",
        device="cpu",
        backend=backend,
        batch_size=batch_size,
        num_threads=num_threads,
    )
    found = classify(images)
    assert len(found) == len(images)
    for image, predictions in zip(images, found, strict=True):
        agree(predictions, reference(checkpoint, image))
        assert sum(p.score for p in predictions) == pytest.approx(1)
    assert len({predictions[0].score for predictions in found}) > len(images) / 2  # no two alike


@pytest.mark.parametrize(
    "problem_type", [None, "single_label_classification", "multi_label_classification"]
)
def test_it_answers_as_the_one_liner_of_transformers(tmp_path, problem_type):
    model = save_checkpoint(tmp_path, named(problem_type=problem_type))
    processor = ConvNextImageProcessorPil.from_pretrained(tmp_path)
    theirs = transformers.pipeline("image-classification", model=model, image_processor=processor)
    ours = CvtClassifier(tmp_path, device="cpu", num_threads=1)
    images = [make_image(seed) for seed in range(3)]
    for found, expected in zip(ours(images, top_k=3), theirs(images, top_k=3), strict=True):
        assert [p.label for p in found] == [p["label"] for p in expected]
        assert [p.score for p in found] == pytest.approx([p["score"] for p in expected], abs=TOLERANCE)
        assert {"label", "score"} <= found[0]._asdict().keys()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"]
)
def test_pil_images_of_every_mode_are_taken_as_transformers_takes_them(checkpoint, classify, mode):
    image = make_image(3).convert("L" if mode in ("I;16", "PA") else "RGB")
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    assert image.mode == mode
    before = image.tobytes()
    agree(classify(image), reference(checkpoint, image.convert("RGB")))
    assert image.tobytes() == before


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright_however_it_comes(checkpoint, classify, tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    make_image(5, (64, 36)).save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as opened:
        expected = reference(checkpoint, ImageOps.exif_transpose(opened).convert("RGB"))
        agree(classify(opened), expected)
    agree(classify(tmp_path / "turned.jpg"), expected)
    agree(classify((tmp_path / "turned.jpg").read_bytes()), expected)


@pytest.fixture
def web(tmp_path):
    """The test's folder on a web server."""
    with serving_folder(tmp_path) as url:
        yield url


def test_inputs_of_every_kind_mix_in_one_list(classify, tmp_path, web):
    for seed in range(3):
        (tmp_path / f"{seed}:ä.png").write_bytes(encode(make_image(seed)))
    one, two, three = ([*classify(make_image(seed))] for seed in range(3))
    mixed = [
        str(tmp_path / "1:ä.png"), make_image(0), f"{web}/2:ä.png", encode(make_image(1)),
        tmp_path / "0:ä.png", f"{web}/1:ä.png", bytearray(encode(make_image(2))),
    ]  # fmt: skip
    assert classify(mixed) == [two, one, three, two, one, two, three]
    assert classify(tuple(mixed)) == classify(iter(mixed)) == classify(mixed)
    assert classify(f"{web}/2:ä.png") == three
    assert classify([f"{web}/2:ä.png"]) == [three]
    assert classify([]) == []


def test_a_bad_image_is_named_and_costs_no_other_in_a_stream(classify, tmp_path, web):
    (tmp_path / "bad.png").write_bytes(b"junk")
    good = encode(make_image(0))
    images = [good, str(tmp_path / "bad.png"), good[:200], f"{web}/absent.png", tmp_path, good]
    found = list(classify.stream(images))
    assert found[0] == found[5] == classify(good)
    reasons = [(error.reason, error.message) for error in found[1:5]]
    named = (f"{tmp_path}/bad.png: ", "images[2]: ", f"{web}/absent.png: ", f"{tmp_path}: ")
    for (_, message), name in zip(reasons, named, strict=True):
        assert message.startswith(name)
    assert [reason for reason, _ in reasons] == ["not_an_image", "truncated", "unreadable", "unreadable"]
    assert "404" in reasons[2][1]
    with pytest.raises(ImageError, match=r"bad\.png: the file appears to be"):
        classify(images)
    with pytest.raises(ImageError, match="404"):
        classify(f"{web}/absent.png")
    assert all(isinstance(result, ImageError) for result in classify.stream([b"", tmp_path]))


def test_what_is_no_image_is_refused_by_its_place(classify):
    with pytest.raises(TypeError, match=r"images\[1\]: expected a path.*found int"):
        classify([make_image(0), 5])


def test_top_k_counts_the_classes(classify):
    image = make_image(0)
    everything = classify(image, top_k=None)
    assert len(everything) == 5
    assert classify(image, top_k=2) == everything[:2]
    assert classify(image, top_k=99) == classify(image) == everything
    for top_k in (0, -1):
        with pytest.raises(ValueError, match="top_k"):
            classify(image, top_k=top_k)


def test_a_stream_takes_its_images_as_it_goes(classify):
    taken = itertools.count()
    endless = (make_image(next(taken)) for _ in itertools.count())
    stream = classify.stream(endless)
    assert isinstance(next(stream), list)
    assert next(taken) <= 2 * MIN_CHUNK
    stream.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_go_by_torchs_name_or_as_words(checkpoint, backend):
    build = partial(CvtClassifier, checkpoint[0], device="cpu", num_threads=1, backend=backend)
    image = make_image(0)
    exact = build(dtype=torch.float32)(image)
    assert build(dtype="float32")(image) == build(dtype="auto")(image) == exact
    rough = build(dtype=torch.bfloat16)
    assert rough.model.precision == "bfloat16"
    assert {p.label_id: p.score for p in rough(image)} == pytest.approx(
        {p.label_id: p.score for p in exact}, abs=0.05
    )


@pytest.mark.parametrize(
    "choice",
    [{"dtype": torch.int8}, {"dtype": "half"}, {"backend": "tensorrt"}, {"batch_size": 0}],
    ids=str,
)
def test_a_choice_that_does_not_exist_is_refused(checkpoint, choice):
    (value,) = choice.values()
    with pytest.raises(ValueError, match=str(value).removeprefix("torch.")):
        CvtClassifier(checkpoint[0], device="cpu", **choice)


def test_a_checkpoint_that_cannot_classify_is_refused_with_the_remedy(tmp_path):
    save_checkpoint(tmp_path, reference_model(transformers.CvtModel))
    with pytest.raises(CheckpointError, match=r"no classifier.*cvt-13"):
        CvtClassifier(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        CvtClassifier(Path("no/such/place"))


def test_a_built_in_model_needs_no_file():
    assert len(CvtClassifier("cvt-tiny-random", device="cpu")(make_image(0), top_k=None)) == 10
