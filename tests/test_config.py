"""Reading, checking and writing of configs."""

import json

import pytest
import transformers
from pydantic import ValidationError

from cvt_model.config import PRESETS, CvtConfig

THREE_ARCHITECTURES = [
    {},
    {"num_labels": 1000},
    {"num_labels": 0},
    {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}},
    {"embed_dim": [16, 32], "num_heads": [2, 4], "depth": [1, 3]},
]
PER_STAGE_OF_TWO = {
    key: list(value)[:2]
    for key, value in transformers.CvtConfig().to_dict().items()
    if isinstance(value, list | tuple)
}


def reference_config(values):
    two_stages = PER_STAGE_OF_TWO if len(values.get("depth", "123")) == 2 else {}
    return transformers.CvtConfig(**{**two_stages, **values})


def plain(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("values", THREE_ARCHITECTURES)
def test_what_transformers_saves_is_read_with_equal_fields(values, tmp_path):
    theirs = reference_config(values)
    theirs.save_pretrained(tmp_path)
    ours = CvtConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    for field in CvtConfig.model_fields:
        if field != "label2id" or theirs.label2id:
            assert plain(getattr(ours, field)) == plain(getattr(theirs, field)), field


@pytest.mark.parametrize("values", THREE_ARCHITECTURES)
def test_what_we_write_is_read_by_transformers_and_by_us(values, tmp_path):
    ours = CvtConfig.from_dict(reference_config(values).to_dict())
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    assert CvtConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == ours
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.CvtConfig)
    assert theirs.architectures == ["CvtForImageClassification"]
    assert theirs.num_labels == ours.num_labels
    assert theirs.id2label == ours.id2label
    assert plain(theirs.embed_dim) == list(ours.embed_dim)


def test_defaults_are_those_of_transformers():
    theirs = transformers.CvtConfig()
    ours = CvtConfig()
    for field in CvtConfig.model_fields.keys() - {"label2id"}:
        assert plain(getattr(ours, field)) == plain(getattr(theirs, field)), field


def test_string_keys_of_id2label_become_numbers():
    config = CvtConfig.from_dict({"id2label": {"0": "cat", "1": "dog", "2": "emu"}})
    assert config.num_labels == 3
    assert config.id2label == {0: "cat", 1: "dog", 2: "emu"}
    assert config.label2id == {"cat": 0, "dog": 1, "emu": 2}


def test_num_labels_alone_gives_default_labels():
    assert CvtConfig.from_dict({"num_labels": 2}).id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert CvtConfig.from_dict({}).num_labels == 2


def test_keys_of_others_are_ignored_and_null_means_the_default():
    config = CvtConfig.from_dict(
        {"torch_dtype": "float32", "architectures": ["X"], "use_cache": 1, "mlp_ratio": None}
    )
    assert config == CvtConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_heads": [1, 2]}, "num_heads: has 2 entries for 3 stages"),
        ({"kernel_qkv": [3]}, "kernel_qkv: has 1 entries for 3 stages"),
        ({"depth": []}, "depth: names no stage"),
        ({"embed_dim": [64, 190, 384]}, "num_heads: embed_dim 190 of stage 1"),
        ({"qkv_projection_method": ["dw_bn", "avg", "dw_bn"]}, "qkv_projection_method: 'avg'"),
        ({"qkv_projection_method": ["x", "dw_bn", "dw_bn"]}, "qkv_projection_method: 'x'"),
        ({"stride_q": [1, 2, 1]}, "stride_q: is 2 in stage 1"),
        ({"padding_q": [1, 1, 0]}, "padding_q: 0 with kernel_qkv 3"),
        ({"cls_token": [True, False, True]}, "cls_token: stage 0 is 64 wide"),
        ({"patch_stride": [0, 2, 2]}, r"patch_stride\.0: .* greater than or equal to 1"),
        ({"drop_rate": [0, 0, 1.5]}, r"drop_rate\.2: .* less than 1"),
        ({"embed_dim": "wide"}, "embed_dim: "),
        ({"num_labels": "many"}, "num_labels: "),
        ({"num_labels": 3, "id2label": {"0": "cat"}}, "id2label: has 1 labels"),
        ({"id2label": {"0": "cat", "2": "dog"}}, "id2label: has 2 labels"),
        ({"id2label": {"zero": "cat"}}, "id2label"),
        ({"id2label": ["cat"]}, "id2label"),
        ({"model_type": "vit"}, "model_type: is 'vit'"),
    ],
)
def test_errors_name_the_field(values, message):
    with pytest.raises(ValueError, match=message):
        CvtConfig.from_dict(values)


def test_a_config_cannot_be_changed_and_refuses_unknown_fields():
    with pytest.raises(ValidationError, match="frozen"):
        CvtConfig().depth = (1, 1, 1)
    with pytest.raises(ValidationError, match="dept"):
        CvtConfig(dept=(1, 1, 1))


def test_another_number_of_labels_leaves_the_rest():
    config = CvtConfig(qkv_bias=(False, True, True)).with_num_labels(0)
    assert (config.num_labels, config.id2label, config.label2id) == (0, {}, {})
    assert config.qkv_bias == (False, True, True)


def test_presets_survive_the_round_trip():
    for preset in PRESETS.values():
        assert CvtConfig.from_dict(json.loads(json.dumps(preset.config.to_dict()))) == preset.config
