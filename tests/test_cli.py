"""The command line from outside: exit codes, what is said where, and what never begins."""

import csv
import html.parser
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.conftest import encode, make_image
from tests.running import cli, ids_of, make_config, rows_of, run, write_config, write_tar

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, write_images):
    """A folder of 12 images (two of them equal) and a broken one, extracted and indexed."""
    folder = tmp_path_factory.mktemp("made")
    write_images(folder / "in", 12)
    (folder / "in/twin of 005.png").write_bytes((folder / "in/005.png").read_bytes())
    (folder / "in/odd #1.png").write_bytes(encode(make_image(77)))
    (folder / "in/bad.png").write_bytes(b"junk")
    config = make_config(folder / "in", tiny_model, folder / "out", compute__shard_images=6)
    write_config(folder / "config.yaml", config)
    done = cli("extract", folder / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    done = cli("index", folder / "out", "--json")
    assert done.returncode == 0, done.stderr
    (folder / "index.json").write_text(done.stdout)
    return folder


@pytest.fixture
def output(made, tmp_path):
    """A copy of the output, to damage."""
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path / "out"


def refused(words, *mentions, cwd=None):
    """Runs a command that must be refused with exit 2, in words, before Ray starts."""
    with tempfile.TemporaryDirectory() as rays:
        done = cli(*words, cwd=cwd, env={"RAY_TMPDIR": rays})
        assert list(Path(rays).iterdir()) == [], "Ray had been started"
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for mention in mentions:
        assert mention in done.stderr
    return done


@pytest.mark.parametrize(
    ("override", "mentions"),
    [
        ("model.precission=float32", ("model.precission: unknown key", "did you mean precision?")),
        ("output.logits=many", ("output.logits: found 'many'", "'full', 'none', a whole number")),
        ("output.logits=0", ("output.logits: found 0", "a whole number")),
        ("model.precision=int8", ("model.precision: found 'int8'", "'bfloat16'")),
        (
            "limits.max_reject_fraction=2",
            ("limits.max_reject_fraction: found 2", "less than or equal to 1"),
        ),
        ("compute.batch_size=[1]", ("compute.batch_size: found a list", "a whole number")),
        ("nonsense", ("'nonsense': expected key.path=value",)),
        ("input.uri=/nowhere/at/all", ("input.uri: /nowhere/at/all does not exist", "check the path")),
        ("input.uri=/etc/*.no-such-ending", ("input.uri", "matches no file")),
        ("input.uri=memory://somewhere", ("memory://somewhere", "use a folder")),
        ("output.uri=memory://somewhere", ("memory://somewhere", "use a folder")),
        ("input.uri=gopher://somewhere/x", ("gopher",)),
        ("input.format=webdataset", ("input.format: webdataset", ".tar")),
        ("model.checkpoint=/nowhere/model", ("model.checkpoint", "/nowhere/model")),
        ("output.uri=/proc/nothing", ("output.uri: cannot write to /proc/nothing", "check")),
        ("model.precision=bfloat16", ("precision: the output has", "--into")),
    ],
)
def test_a_bad_setting_is_refused_with_its_key_and_the_remedy(made, override, mentions):
    refused(["extract", made / "config.yaml", override], *mentions)


def test_an_unreadable_checkpoint_is_refused(made, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    words = [f"model.checkpoint={tmp_path / 'model'}", f"output.uri={tmp_path / 'new'}"]
    refused(["extract", made / "config.yaml", *words], "model.checkpoint", "model.safetensors")


def test_a_file_in_the_outputs_way_is_refused(made, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for uri in (tmp_path / "file", tmp_path / "file/below"):
        refused(
            ["extract", made / "config.yaml", f"output.uri={uri}"], "output.uri: cannot write to", str(uri)
        )
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    ("text", "mention"),
    [
        ("input: [", "not valid YAML"),
        ("just words", "expected sections"),
        ("model: {checkpoint: x}\noutput: {uri: y}", "input: missing"),
        ("input: {uri: x}\nmodel:\noutput: {uri: y}", "model"),
        ("5: x", "input: missing"),
    ],
)
def test_a_bad_config_file_is_refused(tmp_path, text, mention):
    (tmp_path / "bad.yaml").write_text(text)
    refused(["extract", tmp_path / "bad.yaml"], mention)


def test_a_missing_config_file_is_refused(tmp_path):
    refused(["extract", tmp_path / "absent.yaml"], "absent.yaml")


def test_the_environment_overrides_the_file_and_the_command_line_both(made):
    plan = ["plan", made / "config.yaml", "--json"]
    env = {"CVT_PIPELINE__MODEL__PRECISION": "bfloat16"}
    assert "precision: the output has" in cli(*plan, env=env).stderr
    assert cli(*plan, "model.precision=float32", env=env).returncode == 0


def test_jobs_are_modules_too(made):
    words = [sys.executable, "-m", "jobs.extract", str(made / "config.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stderr
    bad = subprocess.run([*words, "x.y=1"], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "x: unknown key" in bad.stderr


def test_plan_tells_what_extract_would_do_and_does_nothing(made, tmp_path):
    before = sorted(p for p in made.rglob("*"))
    done = cli("plan", made / "config.yaml", "--json")
    assert json.loads(done.stdout) == {
        "shards_new": 0,
        "shards_changed": 0,
        "shards_deleted": 0,
        "shards_removed": 0,
        "shards_done": 3,
        "shards_ignored": 0,
        "files_too_young": 0,
        "images_to_read": 0,
        "bytes_to_read": 0,
        "bytes_to_write": 0,
        "refusal": None,
    }
    fresh = cli("plan", made / "config.yaml", f"output.uri={tmp_path / 'new'}", "--json")
    values = json.loads(fresh.stdout)
    size = sum(p.stat().st_size for p in (made / "in").iterdir())
    assert (values["shards_new"], values["images_to_read"], values["bytes_to_read"]) == (3, 15, size)
    assert not (tmp_path / "new").exists()
    assert sorted(p for p in made.rglob("*")) == before


def test_status_tells_totals_and_the_last_run(made):
    values = json.loads(cli("status", made / "out", "--json").stdout)
    assert (values["shards"], values["images"], values["rejects"]) == (3, 14, 1)
    assert values["rejects_by_reason"] == {"not_an_image": 1}
    assert values["index"] == json.loads((made / "index.json").read_text())["version"]
    assert values["unfinished_runs"] == []
    people = cli("status", made / "out")
    assert (people.returncode, people.stdout) == (0, "")
    assert "14" in people.stderr


def test_the_report_has_the_names_that_programs_read(made):
    report = json.loads(min((made / "out/reports").glob("*.json")).read_text())
    assert (report["images"], report["rejects"]) == (14, 1)
    assert 0 < report["startup_s"] < report["seconds"]
    assert report["limiting_stage"] in ("read", "decode", "model", "write")
    assert report["fingerprint"] == json.loads((made / "out/fingerprint.json").read_text())["digest"]
    assert report["images_per_s"] >= 0
    assert "steps" not in report


def test_verify_passes_an_intact_output(made):
    done = cli("verify", made / "out", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"shards": 3, "images": 14, "rejects": 1, "problems": [], "ok": True}


def flip(output):
    path = min((output / "embeddings").iterdir())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def remove(output):
    path = min((output / "embeddings").iterdir())
    path.unlink()
    return path


def remove_rejects(output):
    (path,) = (output / "rejects").iterdir()
    path.unlink()
    return path


def add_orphan(output):
    path = output / "embeddings/stray-0123456789abcdef.parquet"
    shutil.copy(min((output / "embeddings").iterdir()), path)
    return path


def cut_record(output):
    path = min((output / "commits").iterdir())
    path.write_bytes(path.read_bytes()[:50])
    return path


@pytest.mark.parametrize("damage", [flip, remove, remove_rejects, add_orphan, cut_record])
def test_verify_names_what_is_off_and_exits_3(output, damage):
    path = damage(output)
    done = cli("verify", output, "--json")
    assert done.returncode == 3, done.stderr
    problems = json.loads(done.stdout)["problems"]
    assert any(path.name in problem for problem in problems)
    assert path.name in done.stderr


def test_index_record_has_the_names_that_programs_read(made):
    record = json.loads((made / "index.json").read_text())
    assert record["num_vectors"] == 14
    assert (record["type"], record["dim"], record["metric"]) == ("exact", 48, "cosine")
    assert record["recall_at_1"] == record["recall_at_10"] == record["recall_at_100"] == 1.0
    assert record["latency_ms"] > 0
    folder = made / "out/index" / record["version"]
    assert json.loads((folder / "index.json").read_text()) == record
    assert (made / "out/index/CURRENT").read_text() == record["version"]
    ids = pq.read_table(folder / "ids.parquet")
    assert ids.column_names == ["faiss_id", "image_id"]
    assert sorted(ids.column("image_id").to_pylist()) == ids_of(made / "out")


def search(output, *words):
    done = cli("search", output, *words, "--json")
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)
    return answer


def cosines(output, vector):
    """Brute force: ids and cosines of every row, best first."""
    rows = rows_of(output)
    vectors = np.array([row["embedding"] for row in rows], np.float64)
    scores = vectors @ vector / np.linalg.norm(vectors, axis=1) / np.linalg.norm(vector)
    return [(rows[n]["image_id"], scores[n]) for n in np.argsort(-scores)]


def test_search_by_vector_agrees_with_brute_force(made, tmp_path):
    vector = np.random.default_rng(3).normal(size=48).astype(np.float32)
    np.save(tmp_path / "v.npy", vector)
    answer = search(made / "out", "--vector", tmp_path / "v.npy", "-k", "5")
    wanted = cosines(made / "out", vector)[:5]
    assert answer["query"] == str(tmp_path / "v.npy")
    assert np.allclose([hit["score"] for hit in answer["hits"]], [score for _, score in wanted], atol=1e-5)
    rows = {row["image_id"]: row for row in rows_of(made / "out")}
    for hit in answer["hits"]:
        row = rows[hit["image_id"]]
        for name in ("shard", "key", "label", "label_id", "width", "height"):
            assert hit[name] == row[name]


def test_search_by_image_finds_the_very_image(made, tmp_path):
    (tmp_path / "query.png").write_bytes((made / "in/007.png").read_bytes())
    (best, *rest) = search(made / "out", "--image", tmp_path / "query.png", "-k", "3")["hits"]
    assert best["image_id"] == "007.png"
    assert best["score"] == pytest.approx(1, abs=1e-5)
    assert [hit["score"] for hit in rest] == sorted((hit["score"] for hit in rest), reverse=True)


def test_search_by_id_puts_the_image_itself_first(made):
    assert search(made / "out", "--id", "odd #1.png", "-k", "1")["hits"][0]["image_id"] == "odd #1.png"
    twins = ("005.png", "twin of 005.png")  # equal vectors: only one of them can be the first by score
    assert [search(made / "out", "--id", name, "-k", "1")["hits"][0]["image_id"] for name in twins] == [
        *twins
    ]


def test_a_k_beyond_the_index_gives_every_image_once(made):
    hits = search(made / "out", "--id", "000.png", "-k", "1000")["hits"]
    assert sorted(hit["image_id"] for hit in hits) == ids_of(made / "out")


class Sources(html.parser.HTMLParser):
    """What a page would load or link to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_a_search_page_stands_alone(made, tmp_path):
    done = cli("search", made / "out", "--id", "odd #1.png", "-k", "6", "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    page = (tmp_path / "page.html").read_text()
    sources = Sources()
    sources.feed(page)
    assert len(sources.found) == 7  # the query and six hits
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources.found)
    assert "http:" not in page
    assert "https:" not in page


def save_vectors(folder):
    np.save(folder / "short.npy", np.ones(3, np.float32))
    np.save(folder / "zero.npy", np.zeros(48, np.float32))
    np.save(folder / "scalar.npy", np.float32(3))
    np.save(folder / "words.npy", np.array(["a"]))
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(folder / "several.npz", a=np.ones(48))
    (folder / "empty.npy").write_bytes(b"")
    (folder / "junk.npy").write_bytes(b"junk")


@pytest.mark.parametrize(
    ("name", "mention"),
    [
        ("short.npy", "the vector has 3 numbers, the index 48"),
        ("zero.npy", "zero or not finite"),
        ("scalar.npy", "scalar.npy"),
        ("words.npy", "expected vectors of numbers"),
        ("objects.npy", "cannot read the query vector"),
        ("several.npz", "several.npz"),
        ("empty.npy", "empty.npy"),
        ("junk.npy", "junk.npy"),
        ("absent.npy", "absent.npy"),
    ],
)
def test_a_query_vector_that_cannot_be_used_is_refused(made, tmp_path, name, mention):
    save_vectors(tmp_path)
    refused(["search", made / "out", "--vector", tmp_path / name], mention)


def test_search_refuses_what_it_cannot_answer(made, tmp_path):
    (tmp_path / "junk.png").write_bytes(b"junk")
    refused(["search", made / "out"], "give one query")
    refused(["search", made / "out", "--id", "000.png", "--vector", "x.npy"], "give one query")
    refused(["search", made / "out", "--id", "absent.png"], "absent.png")
    refused(["search", made / "out", "--image", tmp_path / "absent.png"], "absent.png")
    refused(["search", made / "out", "--image", tmp_path / "junk.png"], "not a usable image")
    refused(["search", made / "out", "--id", "000.png", "-k", "0"], "-k")
    refused(
        ["search", made / "out", "--id", "000.png", "--html", tmp_path / "no/such/page.html"], "page.html"
    )
    refused(["search", tmp_path, "--id", "000.png"], "cvt-pipeline index")


def test_search_without_a_whole_index_says_what_to_run(output):
    version = (output / "index/CURRENT").read_text()
    (output / "index" / version / "index.faiss").write_bytes(b"damaged")
    refused(["search", output, "--id", "000.png"], "missing or damaged", "cvt-pipeline index")
    (output / "index" / version / "index.json").unlink()
    refused(["search", output, "--id", "000.png"], "not a whole index", "cvt-pipeline index")
    (output / "index/CURRENT").unlink()
    refused(["search", output, "--id", "000.png"], "has no index", "cvt-pipeline index")


def test_a_search_whose_id_list_is_gone_says_what_to_run(output):
    version = (output / "index/CURRENT").read_text()
    (output / "index" / version / "ids.parquet").unlink()
    refused(["search", output, "--id", "000.png"], "cvt-pipeline index")


def test_verbs_on_what_is_no_output_say_so(tmp_path):
    for verb in ("verify", "status", "index"):
        refused([verb, tmp_path], "is not an output of extract")
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_verb():
    done = cli("--help")
    assert done.returncode == 0
    for verb in ("run", "extract", "plan", "status", "verify", "index", "search", "demo"):
        assert f" {verb} " in done.stdout


@pytest.mark.slow
def test_a_model_named_by_a_relative_path_answers_searches_from_anywhere(
    ray_session, tiny_model, tmp_path, write_images, monkeypatch
):
    """Odd paths all the way: relative ones, spaces, non-ASCII, brackets, a percent sign."""
    home = tmp_path / "ä [home] 100%"
    write_images(home / "pictures [1]", 3)
    (home / "pictures [1]" / "é #?*.png").write_bytes(encode(make_image(50)))
    shutil.copytree(tiny_model, home / "my model")
    monkeypatch.chdir(home)
    assert run(make_config("pictures [1]", "my model", "out put")).images == 4
    assert ids_of(home / "out put") == ["000.png", "001.png", "002.png", "é #?*.png"]
    assert cli("index", "out put", cwd=home).returncode == 0
    query = ["--image", home / "pictures [1]" / "é #?*.png", "-k", "1", "--json"]
    for cwd, output in ((home, "out put"), (tmp_path, home / "out put")):
        found = cli("search", output, *query, cwd=cwd)
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout)[0]["hits"][0]["image_id"] == "é #?*.png"


@pytest.mark.slow
def test_a_manifest_of_one_image_goes_the_whole_way(ray_session, tiny_model, tmp_path):
    (tmp_path / "one.png").write_bytes(encode(make_image(1)))
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["uri"], ["one.png"]])
    assert run(make_config(tmp_path / "list.csv", tiny_model, tmp_path / "out")).images == 1
    record = json.loads(cli("index", tmp_path / "out", "--json").stdout)
    assert (record["num_vectors"], record["recall_at_10"]) == (1, 1.0)
    assert search(tmp_path / "out", "--id", "one.png")["hits"][0]["image_id"] == "one.png"


def test_a_broken_shard_gives_exit_3_and_a_stopped_run_too(tiny_model, tmp_path):
    write_tar(
        tmp_path / "in/good.tar", [("a.png", encode(make_image(0))), ("b.png", b"x"), ("c.png", b"x")]
    )
    (tmp_path / "in/bad.tar").write_bytes(b"x" * 2000)
    config = make_config(tmp_path / "in", tiny_model, tmp_path / "out")
    write_config(tmp_path / "c.yaml", config)
    done = cli("extract", tmp_path / "c.yaml")
    assert done.returncode == 3, done.stderr
    assert "bad.tar" in done.stderr
    assert "limits.max_reject_fraction = 0.5" in done.stderr
    report = json.loads(min((tmp_path / "out/reports").glob("*.json")).read_text())
    assert list(report["shards"]["failed"]) == ["bad.tar"]
    assert report["stopped"]
    (tmp_path / "in/bad.tar").unlink()
    assert cli("extract", tmp_path / "c.yaml", "limits.max_reject_fraction=1").returncode == 0
