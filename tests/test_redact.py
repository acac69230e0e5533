"""Credentials out of sight: taken off URLs, put back for the client, and in no message."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Config
from pipeline.errors import ConfigError, StorageError
from pipeline.load_config import load_config, open_input, open_output, storage_options_of, validate
from pipeline.redact import scrub, split_credentials
from pipeline.storage import Storage, storage_failures

SECRET = "s3cret-f81a6c"
SIGNED = f"X-Amz-Credential=AKIA-{SECRET}&X-Amz-Expires=600&X-Amz-Signature={SECRET}"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (f"https://user:{SECRET}@host/a/b.tar", "https://host/a/b.tar"),
        (f"sftp://user:{SECRET}@host:22/a", "sftp://host:22/a"),
        (f"https://host/a.csv?{SIGNED}", "https://host/a.csv"),
        (f"https://host/a.csv?id=5&{SIGNED}&v=2", "https://host/a.csv?id=5&v=2"),
        (
            f"https://x.blob.core.windows.net/c/a?sv=2024&se=2030&sr=b&sig={SECRET}",
            "https://x.blob.core.windows.net/c/a",
        ),
        (f"https://host/a?access_token={SECRET}", "https://host/a"),
        ("https://host/a?page=2&sort=se", "https://host/a?page=2&sort=se"),
        (
            "abfs://container@account.dfs.core.windows.net/x",
            "abfs://container@account.dfs.core.windows.net/x",
        ),
        ("s3://bucket/a?sig=b:c@d", "s3://bucket/a?sig=b:c@d"),
        ("/data/user:pw@x?sig=1", "/data/user:pw@x?sig=1"),
    ],
)
def test_a_uri_is_shown_without_its_password_and_signature(uri: str, shown: str) -> None:
    assert split_credentials(uri)[0] == shown
    storage = Storage(uri)
    assert storage.uri == shown
    assert SECRET not in repr(storage)
    assert pickle.loads(pickle.dumps(storage)).options == storage.options


def test_the_client_gets_what_is_not_shown() -> None:
    storage = Storage(f"https://user:{SECRET}@host/a?id=5&{SIGNED}")
    assert storage.path("") == f"https://user:{SECRET}@host/a?id=5&{SIGNED}"
    assert storage.path("x.csv").endswith(f"&{SIGNED}")
    assert storage.url("") == "https://host/a?id=5"
    beside = storage.options_for("https://host/b.jpg")
    assert Storage("https://host/b.jpg", beside).path("") == f"https://user:{SECRET}@host/b.jpg"
    assert storage.options_for("https://elsewhere/b.jpg") == {}


def test_a_token_that_may_name_an_image_stays_in_the_rows_of_a_manifest() -> None:
    uri = "https://host/render?key=cat&token=7"
    assert split_credentials(uri, signatures_only=True) == (uri, {})
    assert split_credentials(f"{uri}&Signature=x&Expires=1&Key-Pair-Id=y", signatures_only=True)[0] == uri


def test_messages_are_scrubbed() -> None:
    options = {
        "key": SECRET,
        "client_kwargs": {"headers": {"x": "inner-" + SECRET}},
        "endpoint_url": "http://h:1",
    }
    text = f"at https://u:pass@host/a?id=1&sig={SECRET} : {SECRET} and inner-{SECRET} at http://h:1"
    assert scrub(text, options) == "at https://host/a?id=1&sig=*** : *** and *** at http://h:1"
    connection = {"connection_string": f"AccountName=name;AccountKey={SECRET}==;BlobEndpoint=http://h"}
    assert scrub(f"bad key {SECRET}==", connection) == "bad key ***"
    storage = Storage("s3://bucket/x", {"secret": SECRET})
    with pytest.raises(StorageError) as raised, storage_failures("s3://bucket/x", storage):
        raise OSError(f"invalid: {SECRET}")
    assert SECRET not in str(raised.value)


def test_a_failure_without_words_is_told_by_its_kind() -> None:
    with (
        pytest.raises(StorageError, match="at s3://b/x: TimeoutError; check"),
        storage_failures("s3://b/x"),
    ):
        raise TimeoutError


def config_text(**changed: Any) -> str:
    values: dict[str, Any] = {
        "input": {"uri": "in"},
        "model": {"checkpoint": "m"},
        "output": {"uri": "out"},
    }
    values["storage_options"] = {"key": "k", "secret": SECRET, "client_kwargs": {"inner": SECRET}}
    return yaml.safe_dump(values | changed)


def test_a_config_is_dumped_and_shown_without_its_options(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    uri = f"https://u:{SECRET}@host/a?{SIGNED}"
    path.write_text(
        config_text(input={"uri": uri}, output={"uri": "s3://b/o", "storage_options": {"token": SECRET}})
    )
    config = load_config(path)
    for text in (
        repr(config),
        str(config.model_dump()),
        config.model_dump_json(),
        str(config.model_dump(mode="json")),
    ):
        assert SECRET not in text
        assert "'key': '***'" in text or '"key":"***"' in text or text == repr(config)
    assert config.input.uri == "https://host/a"
    assert Storage(config.input.uri, config.input_options).path("") == uri
    assert config.output_options["token"] == SECRET
    assert config.output_options["client_kwargs"] == {"inner": SECRET}


@pytest.mark.parametrize(
    ("text", "overrides", "told"),
    [
        (config_text(storage_options=SECRET), [], r"storage_options: found \*\*\*"),
        (config_text(storage_options=[SECRET]), [], r"storage_options: found \*\*\*"),
        (
            config_text(output={"uri": "o", "storage_options": SECRET}),
            [],
            r"output\.storage_options: found \*\*\*",
        ),
        (config_text(output=[{"storage_options": SECRET}]), [], r"output: found a list"),
        (config_text(output={"uri": 5, "storage_options": {"a": SECRET}}), [], r"output\.uri: found 5"),
        (config_text(output=f"https://u:{SECRET}@host"), [], r"output: found 'https://host'"),
        (config_text(), [f"storage_options.secret.inner={SECRET}"], r"secret is a value, not a section"),
        (
            config_text(),
            [f"storage_options.other={{{SECRET}: ["],
            r"storage_options\.other: the value is not valid YAML",
        ),
        (config_text(), [f"={SECRET}"], "expected key.path=value"),
        (f"storage_options: {{secret: *{SECRET}}}", [], "line 1, column 27: found undefined alias"),
        (f"storage_options: {{secret: !{SECRET} x}}", [], "could not determine a constructor"),
        (f"storage_options: {{secret: '{SECRET}", [], "not valid YAML"),
        (f"- storage_options: {{secret: {SECRET}}}", [], "found a list"),
        (config_text() + "day: 2020-13-45", [], "not valid YAML"),
    ],
)
def test_errors_of_a_config_do_not_tell_its_secrets(
    tmp_path: Path, text: str, overrides: list[str], told: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told) as raised:
        load_config(path, overrides, environ={})
    assert SECRET not in str(raised.value)


def test_the_environment_gives_options_to_verbs_without_a_config() -> None:
    environ = {
        "CVT_PIPELINE__STORAGE_OPTIONS": f"{{key: shared, secret: {SECRET}}}",
        "CVT_PIPELINE__OUTPUT__STORAGE_OPTIONS": '{"key": "own", "client_kwargs": {"region_name": "x"}}',
        "CVT_PIPELINE__INPUT__STORAGE_OPTIONS__TOKEN": "0123456789",
        "CVT_PIPELINE__MODEL__PRECISION": "nonsense that is not for this verb",
    }
    assert storage_options_of("output", environ) == {
        "key": "own",
        "secret": SECRET,
        "client_kwargs": {"region_name": "x"},
    }
    assert storage_options_of("input", environ) == {
        "key": "shared",
        "secret": SECRET,
        "token": "0123456789",
    }
    assert storage_options_of("input", environ, shared=False) == {"token": "0123456789"}
    assert storage_options_of("output", {}) == {}


@pytest.mark.parametrize("name", ["CVT_PIPELINE__STORAGE_OPTIONS", "CVT_PIPELINE__OUTPUT__STORAGE_OPTIONS"])
@pytest.mark.parametrize("value", [SECRET, f"[{SECRET}]", f"{{{SECRET}", "5"])
def test_options_in_the_environment_that_are_no_mapping_are_refused_unseen(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=r"(?i)storage_options") as raised:
        storage_options_of("output", {name: value})
    assert SECRET not in str(raised.value)


def test_options_are_not_for_folders_of_this_machine(tmp_path: Path) -> None:
    environ = {"CVT_PIPELINE__STORAGE_OPTIONS": "{key: k, no_such_option: 1}"}
    output = open_output(str(tmp_path), environ)
    output.write_bytes("x", b"1")
    assert open_input(f"file://{tmp_path}", output, environ).read_bytes("x") == b"1"


def test_an_input_of_another_service_does_not_get_the_outputs_options() -> None:
    output = Storage("s3://bucket/out", {"secret": SECRET})
    assert open_input("s3://other/in", output, {}).options == {"secret": SECRET}
    assert open_input("gs://other/in", output, {}).options == {}
    own = {"CVT_PIPELINE__INPUT__STORAGE_OPTIONS": "{token: mine}"}
    assert open_input("gs://other/in", output, own).options == {"token": "mine"}
    assert open_input("s3a://other/in", output, own).options == {"secret": SECRET, "token": "mine"}


def test_options_survive_a_config_that_is_validated_again() -> None:
    config = validate(Config, yaml.safe_load(config_text()), origin="test")
    assert config.input_options == config.output_options == config.storage_options
    assert config.storage_options["secret"] == SECRET
