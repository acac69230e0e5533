"""`bench model`: what its figures are made from. Nothing here asks how fast anything is."""

import json
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cvt_model.backends import FeatureArrays
from cvt_model.checkpoint import resolve_checkpoint
from cvt_model.config import CvtConfig
from cvt_model.presets import Architecture
from jobs.bench import bench
from pipeline.bench import inputs as bench_inputs
from pipeline.bench.figures import agreement, all_ratios, speed_figures
from pipeline.bench.inputs import Inputs, Setting, photographs, random_pixels, save_random
from pipeline.bench.memory import measure_memory
from pipeline.bench.model import ModelBench, bench_model
from pipeline.bench.report import HEADINGS, markdown
from pipeline.bench.rivals import RIVALS, Form
from pipeline.errors import ConfigError
from tests.conftest import encode, make_image
from tests.running import cli


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Batch sizes measured in tests are not remembered for anybody."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr("pipeline.bench.peak.SIDES", {"cpu": 64})
        yield


def tiny_bench(model, **overrides):
    values = {"precisions": ("float32",), "rivals": ("eager",), "rounds": 2, "num_threads": 1}
    return ModelBench(str(model), batch_size=3, **{**values, **overrides})


def uninstall(monkeypatch, *packages):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


def test_ratios_are_those_of_the_recorded_times():
    image_s = {
        "ours_float32": [1.0, 2.0, 1.0],
        "ours_torch_float32": [2.0, 2.0, 2.0],
        "transformers_eager_float32": [3.0, 8.0, 5.0],
        "transformers_openvino_float32": [1.5],
    }
    found = all_ratios(image_s, ["float32", "bfloat16"])
    assert {name: value for name, value in found.items() if value is not None} == {
        "ratio_float32": 4.0,  # of 3, 4 and 5
        "ratio_torch_float32": 2.5,  # of 1.5, 4 and 2.5
        "ratio_openvino_float32": 1.5,
    }
    assert {"ratio_bfloat16", "ratio_openvino_bfloat16", "ratio_compiled_float32"} < found.keys()


def test_where_ours_is_torch_it_is_its_own_torch_ratio():
    image_s = {"ours_float32": [1.0], "transformers_eager_float32": [2.0]}
    assert all_ratios(image_s, ["float32"])["ratio_torch_float32"] == 2.0


def test_speed_is_per_second_and_share_is_of_the_peak():
    figures = speed_figures([0.5, 0.25, 1.0], flops=4_000_000_000, peak=16e9)
    assert figures == {
        "images_per_s": 2.0,
        "images_per_s_min": 1.0,
        "images_per_s_max": 4.0,
        "gflops": 8.0,
        "share_of_peak": 0.5,
    }


def test_agreement_is_over_the_images_that_both_have():
    truth = FeatureArrays(np.array([[3.0, 4.0], [1.0, 0.0]], np.float32), np.zeros((2, 3), np.float32))
    seen = FeatureArrays(np.array([[6.0, 8.0]], np.float32), np.array([[0.0, -0.5, 0.25]], np.float32))
    found = agreement(seen, truth)
    assert found["images_compared"] == 1
    assert found["max_abs_logit_difference"] == 0.5
    assert found["min_cosine"] == pytest.approx(1.0)
    turned = FeatureArrays(np.array([[3.0, 4.0], [0.0, 1.0]], np.float32), truth.logits)
    assert agreement(turned, truth)["min_cosine"] == pytest.approx(0.0)


def test_agreement_without_a_classifier_has_no_logits():
    features = FeatureArrays(np.ones((2, 4), np.float32), np.empty((2, 0), np.float32))
    assert agreement(features, features)["max_abs_logit_difference"] is None


@pytest.fixture(scope="module")
def figures(tiny_model):
    """What the command prints, with two rivals, in this process."""
    pytest.importorskip("openvino")
    words = ("--checkpoint", tiny_model, "--batch-size", "3", "--rounds", "2", "--threads", "1")
    words = (*words, "--rival", "eager", "--rival", "openvino", "--json")
    done = CliRunner().invoke(bench, ["model", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_the_figures_that_programs_read_are_at_the_top(figures):
    names = ("ratio", "ratio_openvino", "ratio_torch", "peak_gflops")
    for key in (f"{name}_{precision}" for name in names for precision in ("float32", "bfloat16")):
        assert figures[key] > 0, key
    assert figures["batch_size"] == 3
    assert figures["image_size"] == [32, 32]
    assert figures["hardware"]["threads"] == 1
    assert {"torch", "transformers", "openvino", "onnxruntime", "cvt-pipeline"} < figures["versions"].keys()
    assert figures["versions"]["torch"] == torch.__version__


def test_every_form_has_its_speed_and_agrees(figures):
    names = ("ours", "ours_torch", "transformers_eager", "transformers_openvino")
    keys = [f"{name}_{precision}" for precision in ("float32", "bfloat16") for name in names]
    assert list(figures["forms"]) == keys
    for key, form in figures["forms"].items():
        assert form["images_per_s_min"] <= form["images_per_s"] <= form["images_per_s_max"]
        assert form["rounds"] == 2
        assert form["images_compared"] == 3
        exact = key.endswith("float32")
        assert form["max_abs_logit_difference"] < (1e-4 if exact else 0.1), key
        assert form["min_cosine"] > (0.9999999 if exact else 0.9995), key
    assert figures["forms"]["transformers_eager_float32"]["max_abs_logit_difference"] < 1e-5
    assert figures["unavailable"] == {}


def test_markdown_has_a_row_a_form_and_its_reasons(figures):
    figures = {**figures, "forms": {**figures["forms"], "absent": None}, "unavailable": {"absent": "why"}}
    table = [line for line in markdown(figures).splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(figures["forms"])
    assert {line.count("|") for line in table} == {len(HEADINGS) + 1}
    assert "not measured: absent: why" in markdown(figures)


def test_a_rival_that_is_not_installed_is_null_with_its_reason(tiny_model, monkeypatch):
    uninstall(monkeypatch, "openvino", "onnxruntime")
    found = bench_model(tiny_bench(tiny_model, rivals=("eager", "openvino", "onnxruntime")))
    assert found["ratio_openvino_float32"] is None
    assert found["forms"]["transformers_openvino_float32"] is None
    assert found["unavailable"] == {
        "transformers_openvino_float32": "openvino is not installed",
        "transformers_onnxruntime_float32": "onnxruntime is not installed",
    }
    assert found["backend"] == "torch"
    assert found["ratio_float32"] == found["ratio_torch_float32"] > 0
    json.dumps(found)


def test_without_transformers_ours_is_compared_with_our_plain_network(tiny_model, monkeypatch):
    uninstall(monkeypatch, "transformers")
    found = bench_model(tiny_bench(tiny_model, rivals=("eager", "compiled")))
    assert found["ratio_float32"] is None
    assert found["agreement_with"] == "cvt_model.model float32"
    assert found["unavailable"]["transformers_compiled_float32"] == "transformers is not installed"
    assert 0 < found["forms"]["ours_float32"]["max_abs_logit_difference"] < 1e-4


def test_a_weight_that_differs_shows(tiny_model, monkeypatch):
    intact = Inputs.reference.func

    def broken(inputs):
        model = intact(inputs)
        with torch.no_grad():
            model.model.classifier.linear.bias[3] += 0.5
        return model

    monkeypatch.setattr(Inputs, "reference", property(broken))
    found = bench_model(tiny_bench(tiny_model))
    assert found["forms"]["ours_float32"]["max_abs_logit_difference"] == pytest.approx(0.5, abs=1e-4)
    assert found["forms"]["ours_float32"]["min_cosine"] > 0.9999999


def test_what_transformers_cannot_compute_is_no_rival(tiny_model, tmp_path):
    config = {**json.loads((tiny_model / "config.json").read_text()), "hidden_act": "quick_gelu"}
    for name in ("model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = bench_model(tiny_bench(tmp_path))
    assert found["ratio_float32"] is None
    assert "quick_gelu" in found["unavailable"]["transformers_eager_float32"]
    assert found["forms"]["ours_float32"]["max_abs_logit_difference"] < 1e-4


@pytest.mark.parametrize("preset", ["cvt-tiny-random", "headless"])
def test_a_network_without_cls_token_or_head_has_its_rival(preset, tmp_path):
    source = preset
    if preset == "headless":
        from transformers import CvtModel

        from tests.tiny_cvt import reference_model, save_checkpoint

        save_checkpoint(tmp_path, reference_model(CvtModel))
        source = str(tmp_path)
    found = bench_model(tiny_bench(source))
    assert found["agreement_with"] == "transformers eager float32"
    assert found["forms"]["ours_float32"]["min_cosine"] > 0.9999999


def test_what_would_take_too_long_is_measured_in_smaller_batches(tiny_model, monkeypatch):
    monkeypatch.setattr("pipeline.bench.rivals.cpu_computes_in", lambda precision: False)
    monkeypatch.setattr("pipeline.bench.model.RUN_BUDGET_S", 0.0)
    monkeypatch.setattr("pipeline.bench.model.FORM_BUDGET_S", 0.0)
    found = bench_model(tiny_bench(tiny_model))
    eager, ours = (found["forms"][f"{name}_float32"] for name in ("transformers_eager", "ours"))
    assert (eager["batch_size"], ours["batch_size"]) == (1, 3)
    assert (eager["rounds"], ours["rounds"]) == (1, 1)
    assert eager["images_compared"] == 1
    assert "in smaller batches, as whole ones would take too long: transformers_eager" in markdown(found)


def test_random_weights_are_random_everywhere_and_the_same_again(tmp_path, monkeypatch):
    config = CvtConfig(embed_dim=(16, 32, 48), num_heads=(1, 2, 3), depth=(1, 2, 3), num_labels=9)
    monkeypatch.setattr(bench_inputs, "ARCHITECTURES", {"cvt-13": Architecture(config, 64, "x/y")})
    states = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        save_random("cvt-13", folder)
        states.append(resolve_checkpoint(str(folder)).load().state_dict())
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key])
        assert not tensor.is_floating_point() or tensor.std() > 0.01, key
    found = bench_model(tiny_bench("cvt-13", random_weights=True))
    assert (found["checkpoint"], found["weights"]) == ("cvt-13", "random")
    assert found["image_size"] == [64, 64]
    inputs = Inputs(Setting(str(tmp_path / "a"), 8, 1, None))
    logits = Form("transformers_eager", "float32").make(inputs, 8)().logits
    assert logits.std(axis=0).min() > 0.01, "images must differ in every logit"


def test_pixels_are_never_all_the_same():
    pixels = random_pixels(3, (8, 8))
    assert pixels.shape == (3, 8, 8, 3)
    assert len(np.unique(pixels)) > 100


def test_photographs_are_taken_in_order_and_again(tiny_model, tmp_path, caplog):
    processor = resolve_checkpoint(str(tiny_model)).processor
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(encode(make_image(number)))
    (tmp_path / "0.txt").write_bytes(b"no image")
    pixels = photographs(5, tmp_path, processor)
    assert np.array_equal(pixels[0], processor.to_pixels(make_image(0)))
    assert np.array_equal(pixels[1], processor.to_pixels(make_image(1)))
    assert np.array_equal(pixels[4], pixels[0])
    assert "0.txt" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "mention"),
    [
        ({"checkpoint": "/nowhere"}, "--checkpoint: /nowhere"),
        ({"checkpoint": "resnet-50", "random_weights": True}, "resnet-50 is no published architecture"),
        ({"precisions": ("int8",)}, "--precision: found 'int8'"),
        ({"rivals": ("timm",)}, "--rival: found 'timm'"),
    ],
)
def test_arguments_that_name_nothing_are_refused(overrides, mention):
    with pytest.raises(ConfigError, match=mention):
        bench_model(ModelBench(**{"checkpoint": "cvt-tiny-random", "batch_size": 2, **overrides}))


def test_folders_without_images_are_refused(tiny_model, tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="--images"):
            bench_model(tiny_bench(tiny_model, images=folder))


def test_the_command_refuses_what_it_cannot_measure():
    for words in (("--checkpoint", "/nowhere", "--batch-size", "2"), ("--checkpoint", "cvt-13")):
        done = cli("bench", "model", *words)
        assert done.returncode == 2
        assert done.stdout == ""
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours", *(f"transformers_{rival}" for rival in RIVALS)])
def test_every_form_runs_alone_and_agrees(tiny_model, name):
    for package in ("openvino", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    setting = Setting(str(tiny_model), 3, 1, None)
    inputs = Inputs(setting)
    truth = Form("transformers_eager", "float32").make(inputs, 3)()
    found = agreement(Form(name, "float32").make(inputs, 3)(), truth)
    assert found["max_abs_logit_difference"] < 1e-4
    memory = measure_memory(setting, Form(name, "float32"), 3)
    assert memory is not None
    assert 1e6 < memory < 2e9
