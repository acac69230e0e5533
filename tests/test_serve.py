"""`cvt-pipeline serve`, asked as its page asks it."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.labels.reviews import standing
from pipeline.search import Searcher
from pipeline.storage import Storage
from tests.labelled_images import pictures
from tests.running import cli, make_config, run, write_tar
from tests.serving import NUM_IMAGES, Server, output, server, serving

__all__ = ["output", "server"]  # fixtures


def rows_of(output: Path) -> list[dict]:
    return duckdb.sql(f"FROM read_parquet('{output}/embeddings/*.parquet')").to_arrow_table().to_pylist()


def test_neighbours_are_those_of_search_and_an_image_is_its_own_first(server: Server, output: Path) -> None:
    searcher = Searcher(Storage(str(output)))
    for image_id in searcher.image_ids[::7]:
        found = server.get("/api/search", id=image_id, k=9)
        expected = searcher.by_id(image_id, 9)
        assert [hit["image_id"] for hit in found["hits"]] == [hit.image_id for hit in expected]
        assert [hit["score"] for hit in found["hits"]] == pytest.approx([hit.score for hit in expected])
        assert found["query"]["image_id"] == image_id == found["hits"][0]["image_id"]


def test_a_filter_and_facets_leave_what_sql_leaves(server: Server, output: Path) -> None:
    labels = {row["image_id"]: row["label"] for row in server.get("/api/images", limit=200)["images"]}
    assert len(labels) == NUM_IMAGES
    rows = rows_of(output)
    for where, facets, expected in (
        ("cls = 'rows'", [], [r for r in rows if r["cls"] == "rows"]),
        (None, ["cls:rows", "cls:spots"], [r for r in rows if r["cls"] in ("rows", "spots")]),
        ("width > 0", ["label:spots"], [r for r in rows if labels[r["image_id"]] == "spots"]),
        ("embedding[1] > 0", [], [r for r in rows if r["embedding"][0] > 0]),
        ("json->>'$.number' = '7'", [], [r for r in rows if '"number": 7,' in (r["json"] or "")]),
        ("width < 0", [], []),
    ):
        asked = [("facet", it) for it in facets] + ([("where", where)] if where else [])
        wanted = {row["image_id"] for row in expected}
        page = server.ask("/api/images", [*asked, ("limit", 200)]).json()
        assert {it["image_id"] for it in page["images"]} == wanted, where
        assert page["total"] == len(wanted)
        assert server.ask("/api/facets", asked).json()["total"] == len(wanted)
        hits = server.ask("/api/search", [*asked, ("id", rows[0]["image_id"]), ("k", 100)]).json()["hits"]
        assert {hit["image_id"] for hit in hits} == wanted, where


def test_facets_count_every_value(server: Server, output: Path) -> None:
    facets = {it["name"]: it for it in server.get("/api/facets")["facets"]}
    counted = {it["value"]: it["count"] for it in facets["cls"]["values"]}
    assert counted == {"columns": 21, "rows": 20, "spots": 20}
    assert next(iter(facets)) == "label"
    assert facets["format"]["values"] == [{"value": "PNG", "count": NUM_IMAGES}]
    assert not {"embedding", "image_id", "sha256", "width", "json"} & facets.keys()


def test_pages_follow_each_other_without_gap_or_twin(server: Server) -> None:
    seen, after = [], 0
    while after is not None:
        page = server.get("/api/images", after=after, limit=7)
        seen += [it["image_id"] for it in page["images"]]
        after = page["next"]
    assert len(seen) == len(set(seen)) == NUM_IMAGES


def test_an_image_that_is_uploaded_finds_itself_and_has_an_address(server: Server, output: Path) -> None:
    data = pictures(60)[5][1]
    name = server.ask("/api/uploads", body=data).json()["upload"]
    hits = server.get("/api/search", upload=name, k=3)["hits"]
    assert hits[0]["image_id"].endswith("#spots/005")
    assert hits[0]["score"] > 0.9999
    picture = server.ask("/api/uploads/thumbnail", {"upload": name})
    assert Image.open(io.BytesIO(picture.body)).format == "JPEG"
    unknown = server.ask("/api/search", {"upload": "0" * 64})
    assert unknown.status == 400
    assert "drop it here again" in unknown.json()["error"]


def test_thumbnails_are_of_the_originals_and_a_vanished_one_is_a_placeholder(
    ray_session: None, tmp_path: Path, tiny_model: Path
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (700, 300), (200, 30, 40)).save(buffer, "JPEG")
    members = [("red.jpg", buffer.getvalue()), ("other.png", pictures(1)[0][1])]
    tar = write_tar(tmp_path / "in" / "a.tar", members)
    run(make_config(tmp_path / "in", tiny_model, tmp_path / "out"))
    with serving(tmp_path / "out", cache=tmp_path / "cache") as server:
        seen = server.ask("/api/thumbnail", {"id": "a.tar#red"})
        with Image.open(io.BytesIO(seen.body)) as picture:
            assert picture.size == (256, 110)
            assert np.abs(np.array(picture)[50, 50].astype(int) - (200, 30, 40)).max() < 6
        tar.unlink()
        assert server.ask("/api/thumbnail", {"id": "a.tar#red"}).body == seen.body  # from the cache
        gone = server.ask("/api/thumbnail", {"id": "a.tar#other"})
        assert (gone.status, gone.headers["content-type"]) == (200, "image/svg+xml")
        assert server.ask("/api/thumbnail", {"id": "a.tar#nobody"}).status == 404
        no_index = server.ask("/api/search", {"id": "a.tar#red"})
        assert no_index.status == 400
        assert "run: cvt-pipeline index" in no_index.json()["error"]
        assert server.get("/api/images")["total"] == 2
        assert server.get("/api/duplicates")["groups"] == []


def test_thumbnails_keep_their_limit(tmp_path: Path, output: Path) -> None:
    with serving(output, "serve.thumbnail_bytes=30000", cache=tmp_path) as server:
        for image in server.get("/api/images", limit=200)["images"] * 2:
            server.ask("/api/thumbnail", {"id": image["image_id"], "size": 1024})
    kept = sum(path.stat().st_size for path in (tmp_path / "cvt-pipeline/serve/thumbnails").iterdir())
    assert 0 < kept < 130_000


def test_duplicates_are_those_of_dedup(server: Server, output: Path) -> None:
    version = (output / "dedup/CURRENT").read_text()
    expected = pq.read_table(output / f"dedup/{version}/groups.parquet").to_pylist()
    found, after = [], 0
    while after is not None:
        page = server.get("/api/duplicates", after=after, limit=1)
        found += page["groups"]
        after = page["next"]
    assert [group["size"] for group in found] == [
        sum(row["group"] == number for row in expected) for number in range(len(found))
    ]
    pairs = {(row["image_id"], row["representative"]) for row in expected}
    assert {(it["image_id"], it["representative"]) for group in found for it in group["images"]} <= pairs


def test_the_overview_says_what_status_says_and_reports_are_shut_off(server: Server) -> None:
    facts = server.get("/api/overview")
    assert facts["status"]["images"] == facts["rows"] == facts["index"]["num_vectors"] == NUM_IMAGES
    assert facts["status"]["rejects_by_reason"] == {"not_an_image": 1}
    (ran,) = facts["runs"]
    report = server.ask(f"/reports/{ran['run']}.html")
    assert report.status == 200
    assert report.headers["content-security-policy"].startswith("sandbox allow-scripts; default-src 'none'")
    for name in ("../fingerprint", "..%2f..%2ffingerprint", "nothing"):
        assert server.ask(f"/reports/{name}.html").status == 404


def copied(output: Path, tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(output, tmp_path / "out")
    return tmp_path / "out"


def test_decisions_are_kept_at_once_undone_and_obeyed_by_label(tmp_path: Path, output: Path) -> None:
    out = copied(output, tmp_path)
    with serving(out, cache=tmp_path / "cache") as server:
        counts = server.get("/api/labels")
        label = counts["labels"][0]["label"]
        page = server.get("/api/review", label=label)
        first, second, third = (it["image_id"] for it in page["images"][:3])
        margins = [it["label_score"] for it in page["images"]]
        assert margins[0] <= margins[-1]
        said = [
            {"image_id": first, "action": "accept"},
            {"image_id": second, "action": "reject"},
            {"image_id": third, "action": "relabel", "label": "zebra"},
        ]
        taken = server.ask("/api/review", body={"decisions": said, "reviewer": "ann"}).json()["images"]
        assert [it["decision"]["action"] for it in taken] == ["accept", "reject", "relabel"]
        held = standing(Storage(str(out)))
        assert {it: (held[it].action, held[it].label) for it in held} == {
            first: ("accept", label),
            second: ("reject", None),
            third: ("relabel", "zebra"),
        }
        left = server.get("/api/review", label=label)
        assert left["total"] == page["total"] - 3
        assert server.get("/api/review", label=label, show="decided")["total"] == 3
        assert server.get("/api/labels")["decisions"] == {"accept": 1, "reject": 1, "relabel": 1}
        undo = {"decisions": [{"image_id": second, "action": "undo"}]}
        assert server.ask("/api/review", body=undo).json()["images"][0]["decision"] is None
        again = server.ask("/api/review", body=undo)
        assert again.status == 400
        assert "no such decision" in again.json()["error"]
        seen = {"image_id": second, "action": "accept", "label": "what was shown before"}
        changed = server.ask("/api/review", body={"decisions": [seen]})
        assert changed.status == 409
        assert f"the label is {label} by now" in changed.json()["error"]
        assert second not in standing(Storage(str(out)))
        server.kill()
    done = cli("label", out, "--from", "probe", "--labels", "cls", "--json")
    assert done.returncode == 0, done.stderr
    version = json.loads(done.stdout)["version"]
    rows = {
        row["image_id"]: row for row in pq.read_table(out / f"labels/{version}/labels.parquet").to_pylist()
    }
    assert (rows[third]["label"], rows[third]["method"]) == ("zebra", "review")
    assert (rows[first]["label"], rows[first]["method"]) == (label, "review")
    assert rows[second]["method"] == "probe"


def test_a_killed_server_loses_no_decision_that_it_answered(tmp_path: Path, output: Path) -> None:
    out = copied(output, tmp_path)
    with serving(out, cache=tmp_path / "cache") as server:
        ids = [it["image_id"] for it in server.get("/api/images", limit=200)["images"]]
        answered: list[str] = []

        def review() -> None:
            for image_id in ids * 50:
                body = {"decisions": [{"image_id": image_id, "action": "relabel", "label": "seen"}]}
                try:
                    if server.ask("/api/review", body=body).status != 200:
                        return
                except OSError:
                    return
                answered.append(image_id)

        reviewer = threading.Thread(target=review)
        reviewer.start()
        while len(answered) < 25 and reviewer.is_alive():
            time.sleep(0.01)
        server.kill()
        reviewer.join()
    assert set(answered) <= standing(Storage(str(out))).keys()


def test_what_runs_and_labels_add_meanwhile_is_served(
    ray_session: None, tmp_path: Path, tiny_model: Path
) -> None:
    write_tar(tmp_path / "in" / "a.tar", [(f"{n}.png", data) for n, (_, data) in enumerate(pictures(8))])
    config = make_config(tmp_path / "in", tiny_model, tmp_path / "out")
    run(config)
    with serving(tmp_path / "out", "serve.refresh_s=0.2", cache=tmp_path / "cache") as server:
        assert server.get("/api/images")["total"] == 8
        new = [(f"{n}.png", data) for n, (_, data) in enumerate(pictures(4, seed=1))]
        write_tar(tmp_path / "in" / "b.tar", new)
        run(config)
        assert cli("index", tmp_path / "out").returncode == 0
        until = time.monotonic() + 300
        while not server.get("/api/overview")["index"] and time.monotonic() < until:
            time.sleep(0.2)
        assert server.get("/api/images")["total"] == 12
        assert len(server.get("/api/search", id="b.tar#3", k=50)["hits"]) == 12


def test_another_address_needs_a_token(tmp_path: Path, output: Path) -> None:
    with serving(output, "serve.host=0.0.0.0", cache=tmp_path) as server:
        server.address = server.address.replace("0.0.0.0", "127.0.0.1")
        assert len(server.token) >= 32
        for path in ("/", "/api/overview", "/openapi.json", "/static/app.js", "/?token=wrong"):
            refused = server.ask(path)
            assert refused.status == 401, path
            assert "token" in refused.json()["error"]
        entered = server.ask("/", {"token": server.token})
        assert (entered.status, entered.headers["location"]) == (303, "/")
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie
        for others in ("", 'prefs={"theme":"dark"}; ', "k=a b; ", "[x]=1; "):
            headers = {"Cookie": others + cookie.partition(";")[0]}
            assert server.ask("/api/overview", headers=headers).status == 200
        bearer = {"Authorization": f"Bearer {server.token}"}
        assert server.ask("/api/overview", headers=bearer).status == 200
        assert server.ask("/api/overview", headers={"Authorization": "Bearer x"}).status == 401


def test_what_cannot_be_served_is_refused_with_the_remedy(tmp_path: Path, output: Path) -> None:
    for words, env, mention in (
        ((tmp_path / "nothing",), {}, "nothing"),
        ((output, "serve.port=99999"), {}, "serve.port"),
        ((output, "serve.colour=red"), {}, "serve.colour"),
        ((output, "serve.host=192.0.2.1"), {}, "cannot listen"),
        ((output,), {"CVT_PIPELINE__SERVE__TOKEN": "short"}, "serve.token"),
    ):
        done = cli("serve", *words, env=env)
        assert done.returncode == 2, done.stderr
        assert mention in done.stderr
        assert "Traceback" not in done.stderr
