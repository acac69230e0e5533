"""The configuration: errors name the key, what was found and what is allowed; the nearest source wins."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pipeline.config import Config, IndexConfig
from pipeline.errors import ConfigError
from pipeline.finetune.config import MOST_SEED, FinetuneConfig
from pipeline.finetune.network import find_start
from pipeline.load_config import load_config, load_section, read_config

CONFIGS = Path(__file__).parents[1] / "configs"
MINIMAL = "input: {uri: in}\nmodel: {checkpoint: m}\noutput: {uri: out}\n"


def load(folder: Path, text: str = MINIMAL, *overrides: str, env: dict[str, str] | None = None) -> Config:
    path = folder / "c.yaml"
    path.write_text(text)
    return load_config(path, overrides, env or {})


def test_a_minimal_config_has_the_documented_defaults(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.input.format, config.model.precision, config.output.logits) == ("auto", "auto", "full")
    assert (config.limits.max_reject_fraction, config.run.lease_s) == (0.5, 120)
    assert (config.input.metadata_columns, config.output.dtype) == ((), "float32")
    with pytest.raises(ValidationError):
        config.input.uri = "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {checkpoint: m}\noutput: {uri: o}", r"input: missing"),
        ("input: {}\nmodel: {checkpoint: m}\noutput: {uri: o}", r"input\.uri: missing; folder, file or"),
        (
            MINIMAL + "compute: {batchsize: 4}",
            r"compute\.batchsize: unknown key; did you mean batch_size\?",
        ),
        (MINIMAL + "bogus: 1", r"bogus: unknown key; allowed: input, model, output"),
        (MINIMAL + "compute: {batch_size: 0}", r"compute\.batch_size: found 0; allowed: 'auto', a whole"),
        (MINIMAL + "compute: {batch_size: 1.5}", r"compute\.batch_size: found 1\.5; allowed"),
        (MINIMAL + "compute: {actors: true}", r"compute\.actors: found True; allowed: 'auto', a whole"),
        (
            MINIMAL + "limits: {max_reject_fraction: 2}",
            r"limits\.max_reject_fraction: found 2; .*less than",
        ),
        (MINIMAL + "limits: {max_pixels: x}", r"limits\.max_pixels: found 'x'; allowed: a whole number"),
        (MINIMAL + "run: {lease_s: 1}", r"run\.lease_s: found 1; .*10"),
        (MINIMAL + "compute: 5", r"compute: found 5"),
        (
            MINIMAL.replace("in}", "in, format: zip}"),
            r"input\.format: found 'zip'; allowed: 'auto', 'images'",
        ),
        (MINIMAL.replace("in}", "''}"), r"input\.uri: found ''"),
        (
            MINIMAL.replace("out}", "out, logits: top}"),
            r"output\.logits: found 'top'; allowed: 'full', 'none'",
        ),
        (MINIMAL.replace("out}", "out, logits: 0}"), r"output\.logits: found 0; allowed: 'full', 'none'"),
        (
            MINIMAL.replace("m}", "m, precision: int8}"),
            r"model\.precision: found 'int8'; allowed: 'auto', 'fl",
        ),
        (
            MINIMAL.replace("in}", "in, metadata_columns: x}"),
            r"input\.metadata_columns: found 'x'; allowed",
        ),
        (MINIMAL + "1: x", r"1: "),
        (MINIMAL + "null: x", r"None: "),
        ("[]", r"expected sections"),
        ("", r"expected sections"),
        ("a: [", r"not valid YAML"),
        ("a: !!python/object:os.system x", r"not valid YAML"),
    ],
)
def test_an_error_names_the_key_what_was_found_and_what_is_allowed(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=.inf", r"train\.epochs: found inf; input should be a finite number"),
        ("train.clip_grad_norm=.inf", r"train\.clip_grad_norm: found inf; input should be a finite"),
        ("augment.ratio=[1, .inf]", r"augment\.ratio.*: found inf"),
        (
            "train.seed=1.0e+15",
            rf"train\.seed: found .*; allowed: a whole number from 0 to {MOST_SEED} \(of",
        ),
    ],
)
def test_a_recipe_is_of_numbers_that_can_be_computed_with(tmp_path, override, message):
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(ConfigError, match=message):
        read_config(FinetuneConfig, path, [override], environ={})


def test_all_errors_are_told_at_once_a_line_each(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MINIMAL + "compute: {batch_size: 0, x: 1}\nrun: {lease_s: 1}")
    lines = str(caught.value).splitlines()
    assert "c.yaml: the configuration is not valid" in lines[0]
    assert len(lines) == 4


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.yaml", tmp_path):
        with pytest.raises(ConfigError, match=f"{path.name}: cannot read"):
            load_config(path, (), {})
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "x", (), {})


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    text = MINIMAL + "compute: {batch_size: 1, actors: 1, shard_images: 1}"
    env = {"CVT_PIPELINE__COMPUTE__ACTORS": "2", "CVT_PIPELINE__COMPUTE__SHARD_IMAGES": "2", "OTHER": "x"}
    compute = load(tmp_path, text, "compute.shard_images=3", env=env).compute
    assert (compute.batch_size, compute.actors, compute.shard_images) == (1, 2, 3)


def test_overrides_are_yaml_and_make_their_section(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        MINIMAL,
        "output.logits=5",
        "input.metadata_columns=[a, b]",
        "run.lease_s=30",
        "input.uri=a=b",
    )
    assert (config.output.logits, config.run.lease_s, config.input.uri) == (5, 30, "a=b")
    assert config.input.metadata_columns == ("a", "b")


def test_the_environment_is_read_and_its_errors_name_the_key(tmp_path: Path) -> None:
    config = load(tmp_path, env={"CVT_PIPELINE__MODEL__PRECISION": "bfloat16"})
    assert config.model.precision == "bfloat16"
    with pytest.raises(ConfigError, match=r"model\.precision: found 'x'"):
        load(tmp_path, env={"CVT_PIPELINE__MODEL__PRECISION": "x"})
    with pytest.raises(ConfigError, match=r"model\.nothing: unknown key"):
        load(tmp_path, env={"CVT_PIPELINE__MODEL__NOTHING": "x"})


@pytest.mark.parametrize("override", ["model.precision", "=x", "", "input.uri.deep=1", "input.uri=["])
def test_an_override_that_is_none_is_told(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path, MINIMAL, override)


def test_a_section_that_is_empty_in_the_file_can_be_set_from_the_command_line(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + "compute:\n", "compute.batch_size=4").compute.batch_size == 4


def test_a_section_alone_takes_its_own_keys_and_no_others() -> None:
    assert load_section(IndexConfig, ["index.type=exact"], "index").type == "exact"
    with pytest.raises(ConfigError, match=r"index\.memory_budget: found 'much'"):
        load_section(IndexConfig, ["index.memory_budget=much"], "index")
    with pytest.raises(ConfigError, match=r"model: not a key of this command"):
        load_section(IndexConfig, ["model.precision=float32"], "index")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_valid(path: Path) -> None:
    if "train" in yaml.safe_load(path.read_text()):
        config = read_config(FinetuneConfig, path, environ={})
        assert find_start(config.model).pixels if config.model.config else config.model.checkpoint
    else:
        assert load_config(path, environ={}).output.uri


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("4GB", 4e9), ("400 MB", 4e8), ("1.5GiB", 1.5 * 2**30), ("5000000", 5e6)]
)
def test_memory_is_said_in_bytes_or_units(text: str, num_bytes: float) -> None:
    section = load_section(IndexConfig, [f"index.memory_budget={text}"], "index")
    assert section.memory_budget == num_bytes
