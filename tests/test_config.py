"""Reading, checking and writing of configs."""

import json

import pytest
import transformers
from pydantic import ValidationError

from cvt_model import CvtConfig

CONFIGS = [
    {},
    {"num_labels": 1000},
    {"num_labels": 0},
    {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}},
    {"embed_dim": [16, 32], "num_heads": [2, 4], "depth": [1, 3]},
    {"problem_type": "multi_label_classification", "qkv_projection_method": ["dw_bn", "avg", "linear"]},
]
OWN_FIELDS = {"hidden_act"}  # transformers' CvT knows but one activation
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


@pytest.mark.parametrize("values", CONFIGS)
def test_what_transformers_saves_is_read_with_equal_fields(values, tmp_path):
    theirs = reference_config(values)
    theirs.save_pretrained(tmp_path)
    ours = CvtConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    for field in CvtConfig.model_fields.keys() - OWN_FIELDS:
        if field != "label2id" or theirs.label2id:
            assert plain(getattr(ours, field)) == plain(getattr(theirs, field)), field


@pytest.mark.parametrize("values", CONFIGS)
def test_what_we_write_is_read_by_transformers_and_by_us(values, tmp_path):
    ours = CvtConfig.from_dict(reference_config(values).to_dict())
    ours.to_json_file(tmp_path / "config.json")
    assert CvtConfig.from_json_file(tmp_path / "config.json") == ours
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.CvtConfig)
    assert theirs.architectures == ["CvtForImageClassification"]
    assert theirs.num_labels == ours.num_labels
    assert theirs.id2label == ours.id2label
    assert plain(theirs.embed_dim) == list(ours.embed_dim)
    assert theirs.problem_type == ours.problem_type


def test_defaults_are_those_of_transformers():
    theirs = transformers.CvtConfig()
    ours = CvtConfig()
    for field in CvtConfig.model_fields.keys() - OWN_FIELDS - {"label2id"}:
        assert plain(getattr(ours, field)) == plain(getattr(theirs, field)), field


def test_every_field_of_transformers_is_there():
    theirs = vars(transformers.CvtConfig()).keys() - vars(transformers.PretrainedConfig()).keys()
    assert theirs
    assert theirs <= CvtConfig.model_fields.keys()


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
def test_what_transformers_does_not_know_is_written_only_where_it_matters(hidden_act):
    config = CvtConfig(hidden_act=hidden_act)
    assert config.to_dict().get("hidden_act") == (None if hidden_act == "gelu" else hidden_act)
    assert CvtConfig.from_dict(config.to_dict()) == config


def test_json_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, not a list"):
        CvtConfig.from_json_file(tmp_path / "config.json")


def test_any_number_of_stages_of_any_depth_with_cls_tokens_anywhere():
    one_of_each = {field: value[:1] for field, value in CvtConfig() if isinstance(value, tuple)}
    for num_stages in (1, 5):
        stages = {field: value * num_stages for field, value in one_of_each.items()}
        widths = tuple(8 * (stage + 1) for stage in range(num_stages))
        config = CvtConfig(**{**stages, "embed_dim": widths, "cls_token": (True,) * num_stages})
        assert config.depth == (1,) * num_stages


@pytest.mark.parametrize("method", ["avg", "linear"])
def test_what_a_projection_never_reads_is_not_checked(method):
    geometry = {"stride_q": (2, 2, 2), "padding_q": (5, 5, 5), "kernel_qkv": (2, 2, 2)}
    config = CvtConfig(qkv_projection_method=(method,) * 3, **geometry)
    assert config.padding_q == (5, 5, 5)
    with pytest.raises(ValueError, match="stride_q: is 2 in stage 1"):
        CvtConfig(qkv_projection_method=(method, "dw_bn", method), **geometry)


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
        (
            {"qkv_projection_method": ["dw_bn", "x", "dw_bn"]},
            r"qkv_projection_method\.1: .* 'dw_bn', 'avg' or 'linear'",
        ),
        (
            {"qkv_projection_method": ["linear", "dw_bn", "avg"], "padding_kv": [2, 2, 2]},
            "padding_kv: 2 is more than half of kernel_qkv 3 in stage 2",
        ),
        ({"hidden_act": "relu"}, "hidden_act: .* 'gelu' or 'quick_gelu'"),
        ({"problem_type": "ranking"}, "problem_type: .* 'regression'"),
        (
            {"problem_type": "single_label_classification", "num_labels": 1},
            "problem_type: single_label_classification needs more than one label",
        ),
        ({"mlp_ratio": [4.0, 0.001, 4.0]}, r"mlp_ratio: 0\.001 leaves no MLP in stage 1"),
        ({"stride_q": [1, 2, 1]}, "stride_q: is 2 in stage 1"),
        ({"padding_q": [1, 1, 0]}, "padding_q: 0 with kernel_qkv 3"),
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
