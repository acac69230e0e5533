"""Exported files against the network that they are made from, run by the runtimes that they are for."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from cvt_model import CvtConfig, CvtForImageClassification, CvtImageProcessor, CvtModel, resolve_checkpoint
from cvt_model.export import OPSET, export_onnx, export_openvino
from cvt_model.save import save_checkpoint
from pipeline.convert import convert
from pipeline.errors import ConfigError, OutputError
from tests.running import cli
from tests.tiny_cvt import randomised

NARROW_CROP = CvtImageProcessor(
    size=48, do_center_crop=True, crop_size=(40, 29), image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4)
)
LABELS = {0: "cat", 1: 'a "quoted" <label>', 2: "é"}


def config(num_stages=2, **overrides):
    """Stages of one layer each."""
    values = {
        "patch_sizes": (7, 3), "patch_stride": (4, 2), "patch_padding": (2, 1), "embed_dim": (12, 24),
        "num_heads": (1, 3), "depth": (1, 1), "mlp_ratio": (2.0, 2.0), "attention_drop_rate": (0.0, 0.0),
        "drop_rate": (0.0, 0.0), "drop_path_rate": (0.0, 0.1), "qkv_bias": (True, False),
        "cls_token": (False, True), "qkv_projection_method": ("dw_bn", "dw_bn"), "kernel_qkv": (3, 3),
        "padding_kv": (1, 1), "stride_kv": (2, 2), "padding_q": (1, 1), "stride_q": (1, 1),
        "id2label": LABELS, "label2id": {label: number for number, label in LABELS.items()},
    }  # fmt: skip
    values.update(overrides)
    return CvtConfig(**{key: x[:num_stages] if isinstance(x, tuple) else x for key, x in values.items()})


NETWORKS = {
    "dw_bn": (CvtForImageClassification, config()),
    "others": (
        CvtForImageClassification,
        config(qkv_projection_method=("avg", "linear"), hidden_act="quick_gelu", cls_token=(False, False)),
    ),
    "headless": (CvtModel, config(1, cls_token=(True,), id2label={}, label2id={})),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Directories in the Hub's layout, by the name of their network."""
    folders = {}
    for name, (model_class, values) in NETWORKS.items():
        torch.manual_seed(1)
        folders[name] = tmp_path_factory.mktemp(name)
        save_checkpoint(folders[name], randomised(model_class(values)), NARROW_CROP)
    return folders


@pytest.fixture(scope="module")
def onnx_file(checkpoints, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "new" / "cvt.onnx"
    assert export_onnx(resolve_checkpoint(str(checkpoints["dw_bn"])), path) == path
    return path


def images(count):
    return np.random.default_rng(count).integers(0, 256, (count, 40, 29, 3), dtype=np.uint8)


def run_onnx(path, array):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: array}), strict=True))


def run_openvino(path, array):
    ov = pytest.importorskip("openvino")
    compiled = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(array)
    return {output.any_name: results[output] for output in compiled.outputs}


def network_output(folder, pixels):
    """What the network, as it is trained, makes of these pixels."""
    model = resolve_checkpoint(str(folder)).load()
    return model(NARROW_CROP.normalize(torch.from_numpy(pixels)))


def assert_near(found, wanted):
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    assert np.abs(found - wanted.numpy()).max() <= 1e-5 * wanted.abs().max()


def assert_same_features(found, folder, pixels):
    """Features, by name, are those of the network."""
    output = network_output(folder, pixels)
    if "logits" in output._fields:
        wanted = {"embedding": output.embedding, "logits": output.logits}
    else:
        wanted = {"embedding": output.cls_token_value[:, 0]}
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert_near(found[name], tensor)


def test_onnx_gives_the_features_of_the_network_for_any_number_of_images(checkpoints, onnx_file):
    for count in (1, 2, 5):
        found = run_onnx(onnx_file, images(count))
        assert_same_features(found, checkpoints["dw_bn"], images(count))


def test_an_onnx_file_is_one_file_and_says_what_it_is(checkpoints, onnx_file):
    assert list(onnx_file.parent.iterdir()) == [onnx_file]
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    session = onnxruntime.InferenceSession(str(onnx_file))
    assert [(x.name, x.type, x.shape) for x in session.get_inputs()] == [
        ("pixels", "tensor(uint8)", ["batch", 40, 29, 3])
    ]
    assert [x.shape for x in session.get_outputs()] == [["batch", 24], ["batch", 3]]
    values = session.get_modelmeta().custom_metadata_map
    checkpoint = resolve_checkpoint(str(checkpoints["dw_bn"]))
    assert json.loads(values["id2label"]) == {str(number): label for number, label in LABELS.items()}
    assert CvtImageProcessor.from_dict(json.loads(values["preprocessor_config"])) == NARROW_CROP
    assert values["weights_sha256"] == checkpoint.weights_sha256
    assert (
        b"fused.py" not in onnx_file.read_bytes()
    )  # the exporter's stack traces name this machine's paths


def test_onnx_of_the_other_projections_without_cls_token(checkpoints, tmp_path):
    path = export_onnx(resolve_checkpoint(str(checkpoints["others"])), tmp_path / "cvt.onnx")
    for count in (1, 3):
        assert_same_features(run_onnx(path, images(count)), checkpoints["others"], images(count))


def test_onnx_for_transformers_processors_and_without_a_classifier(checkpoints, tmp_path):
    checkpoint = resolve_checkpoint(str(checkpoints["headless"]))
    path = export_onnx(checkpoint, tmp_path / "cvt.onnx", pixels="normalized")
    model = onnx.load(path)
    assert model.graph.input[0].name == "pixel_values"
    assert "id2label" not in {entry.key for entry in model.metadata_props}
    for count in (1, 3):
        pixel_values = NARROW_CROP.normalize(torch.from_numpy(images(count))).numpy()
        assert_same_features(run_onnx(path, pixel_values), checkpoints["headless"], images(count))


@pytest.mark.parametrize("name", NETWORKS)
def test_openvino_gives_the_features_of_the_network_for_any_number_of_images(name, checkpoints, tmp_path):
    path = tmp_path / "new" / "cvt.xml"
    written = export_openvino(resolve_checkpoint(str(checkpoints[name])), path)
    assert sorted(path.parent.iterdir()) == sorted(written) == [path.with_suffix(".bin"), path]
    for count in (1, 2, 5):
        assert_same_features(run_openvino(path, images(count)), checkpoints[name], images(count))


def test_openvino_with_the_raw_cls_token_says_what_it_is(checkpoints, tmp_path):
    ov = pytest.importorskip("openvino")
    checkpoint = resolve_checkpoint(str(checkpoints["dw_bn"]))
    path, _ = export_openvino(checkpoint, tmp_path / "cvt.xml", embedding="cls_token")
    model = CvtModel.from_pretrained(str(checkpoints["dw_bn"])).requires_grad_(False)
    output = model(NARROW_CROP.normalize(torch.from_numpy(images(2))))
    assert_near(run_openvino(path, images(2))["embedding"], output.cls_token_value[:, 0])
    values = ov.Core().read_model(path)
    assert json.loads(values.get_rt_info("id2label").value) == {str(n): x for n, x in LABELS.items()}
    assert values.get_rt_info("weights_sha256").value == checkpoint.weights_sha256
    processor = CvtImageProcessor.from_dict(json.loads(values.get_rt_info("preprocessor_config").value))
    assert processor == NARROW_CROP


@pytest.mark.parametrize("taken", ["cvt.onnx", "cvt.xml", "cvt.bin"])
def test_a_file_in_the_way_is_left_alone(taken, checkpoints, tmp_path):
    (tmp_path / taken).write_text("mine")
    checkpoint = resolve_checkpoint(str(checkpoints["dw_bn"]))
    write, name = (export_onnx, "cvt.onnx") if taken.endswith("onnx") else (export_openvino, "cvt.xml")
    with pytest.raises(FileExistsError, match=f"{taken} exists"):
        write(checkpoint, tmp_path / name)
    with pytest.raises(OutputError, match=f"DST: .*{taken} exists"):
        convert(str(checkpoints["dw_bn"]), tmp_path / name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(taken, "mine")]


@pytest.mark.parametrize(
    ("package", "extra", "name"),
    [("onnx", "onnx", "a.onnx"), ("onnxscript", "onnx", "a.onnx"), ("openvino", "cpu", "a.xml")],
)
def test_a_missing_package_is_named_with_what_installs_it(
    package, extra, name, checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package} .*pip install 'cvt-pipeline\[{extra}\]'"):
        convert(str(checkpoints["dw_bn"]), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused_in_words_and_leaves_nothing(checkpoints, tmp_path, monkeypatch):
    checkpoint = resolve_checkpoint(str(checkpoints["dw_bn"]))
    with pytest.raises(ValueError, match=r"ends in \.xml"):
        export_openvino(checkpoint, tmp_path / "cvt.onnx")
    monkeypatch.setattr("cvt_model.export.MAX_ONNX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"more than one ONNX file may hold; write OpenVINO"):
        export_onnx(checkpoint, tmp_path / "cvt.onnx")
    save_checkpoint(tmp_path / "own", checkpoint.load(), CvtImageProcessor(do_resize=False))
    with pytest.raises(ConfigError, match="images keep their sizes"):
        convert(str(tmp_path / "own"), tmp_path / "cvt.xml")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_the_verb_writes_what_transformers_computes(tmp_path):
    values = transformers.CvtConfig(**config(1, cls_token=(True,)).to_dict())
    reference = randomised(transformers.CvtForImageClassification(values).eval())
    reference.save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "preprocessor_config.json").write_text(json.dumps(NARROW_CROP.to_dict()))
    pixels = images(3)
    with torch.no_grad():
        wanted = reference(NARROW_CROP.normalize(torch.from_numpy(pixels))).logits
    for name, run in (("cvt.onnx", run_onnx), ("cvt.xml", run_openvino)):
        done = cli("convert", tmp_path / "hub", tmp_path / name)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        files = [name] if name == "cvt.onnx" else [name, "cvt.bin"]
        assert done.stderr.splitlines() == [f"wrote {tmp_path / file}" for file in files]
        assert_near(run(tmp_path / name, pixels)["logits"], wanted)
