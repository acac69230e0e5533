"""Night after night on one output: what is gone, young, unwanted, changed or made otherwise, end to end."""

import json
import os
import shutil
import time
from collections import Counter

import pytest

from pipeline.errors import FingerprintError
from pipeline.load_config import load_config
from pipeline.storage import Storage
from pipeline.verify import verify
from tests.conftest import encode, make_image
from tests.running import cli, ids_of, leftovers, make_config, rows_of, run, write_config, write_tar

pytestmark = pytest.mark.usefixtures("ray_session")

NUM_TARS, TAR_IMAGES = 6, 3
FOLDERS = ("commits", "embeddings", "rejects")
REMOVE = {"input__on_deleted": "remove", "limits__max_deleted_fraction": 0.2}  # one shard of six


def members(start, count=TAR_IMAGES, size=(48, 40)):
    images = [(f"{n}.png", encode(make_image(start + n, size))) for n in range(count)]
    return [*images, ("bad.png", b"junk")]


def ids(*tars, count=TAR_IMAGES):
    return sorted(f"{number}.tar#{n}" for number in tars for n in range(count))


def write_corpus(folder):
    for number in range(NUM_TARS):
        write_tar(folder / f"{number}.tar", members(10 * number))
    return folder


def files_of(output):
    """Every file that a reader or a later run would look at: (modification time, bytes) by path."""
    paths = [path for folder in FOLDERS for path in (output / folder).glob("*")]
    return {str(path.relative_to(output)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def of_shard(files, *names):
    return {path: kept for path, kept in files.items() if path.split("/")[1].split("-")[0] in names}


def planned(config, *words):
    """What `plan --json` says, without the keys whose value is 0 or null."""
    done = cli("plan", config, *words, "--json")
    assert done.returncode == 0, done.stderr
    return {name: value for name, value in json.loads(done.stdout).items() if value}


def report_of(output):
    return json.loads(max((output / "reports").glob("*.json")).read_text())


def assert_sound(output):
    assert leftovers(output) == []
    assert verify(Storage(str(output))).problems == []
    stems = {path.stem for path in (output / "commits").iterdir()}
    assert {path.stem for path in (output / "embeddings").iterdir()} == stems
    assert {path.stem for path in (output / "rejects").glob("*")} <= stems


class Nights:
    """An input that changes from night to night, and the output of the first night."""

    def __init__(self, folder, checkpoint):
        self.input, self.output, self.checkpoint = folder / "in", folder / "out", checkpoint
        self.path = folder / "config.yaml"

    def config(self, **overrides):
        """This night's config, which is also what the command line finds in `path`."""
        config = make_config(self.input, self.checkpoint, self.output, **overrides)
        write_config(self.path, config)
        return config

    def lose(self, *numbers):
        for number in numbers:
            (self.input / f"{number}.tar").unlink()


@pytest.fixture(scope="module")
def first_night(ray_session, tiny_model, tmp_path_factory):
    nights = Nights(tmp_path_factory.mktemp("first-night"), tiny_model)
    write_corpus(nights.input)
    assert run(nights.config()).committed_shards == NUM_TARS
    shutil.copytree(nights.input, nights.input.with_name("in-then"))
    shutil.copytree(nights.output, nights.output.with_name("out-then"))
    return nights


@pytest.fixture
def nights(first_night):
    """The first night's input and output as they were then, in the same place: a path is an identity."""
    for folder in (first_night.input, first_night.output):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folder.with_name(f"{folder.name}-then"), folder)  # times of files are kept too
    return first_night


def test_the_rows_of_what_is_gone_stay_unless_the_config_says_otherwise(nights):
    before = files_of(nights.output)
    nights.lose(4)
    assert planned(nights.path) == {"shards_deleted": 1, "shards_done": 5}
    tally = run(nights.config())
    assert (tally.stopped, tally.removed_shards, tally.planned_shards) == ("", 0, 0)
    assert files_of(nights.output) == before


def test_a_removed_shard_takes_its_rows_rejects_and_record_along_and_nothing_else(nights):
    before = files_of(nights.output)
    nights.lose(4)
    write_tar(nights.input / "6.tar", members(60))
    config = nights.config(**REMOVE)
    plan = planned(nights.path)
    size = (nights.input / "6.tar").stat().st_size
    wanted = {"shards_new": 1, "shards_deleted": 1, "shards_removed": 1, "shards_done": 5}
    assert plan == wanted | {"bytes_to_read": size}
    tally = run(config)
    assert (tally.stopped, tally.planned_shards, tally.done_before) == ("", 1, 5)
    assert tally.removed_shards == report_of(nights.output)["shards"]["removed"] == 1
    assert ids_of(nights.output) == ids(0, 1, 2, 3, 5, 6)
    after = files_of(nights.output)
    assert len(of_shard(before, "4.tar")) == len(of_shard(after, "6.tar")) == len(FOLDERS)
    assert of_shard(after, "4.tar") == {}
    kept = ("0.tar", "1.tar", "2.tar", "3.tar", "5.tar")
    assert of_shard(after, *kept) == of_shard(before, *kept)
    assert_sound(nights.output)
    assert planned(nights.path) == {"shards_done": 6}


@pytest.mark.slow
def test_where_too_much_is_gone_nothing_is_removed_and_what_is_new_is_done_all_the_same(nights):
    before = files_of(nights.output)
    nights.lose(1, 4)
    write_tar(nights.input / "6.tar", members(60))
    nights.config(**REMOVE)
    plan = planned(nights.path)
    told = "2 of 6 committed shards are gone from the input, more than limits.max_deleted_fraction = 0.2"
    assert plan.pop("refusal").startswith(told)
    size = (nights.input / "6.tar").stat().st_size
    assert plan == {"shards_new": 1, "shards_deleted": 2, "shards_done": 4, "bytes_to_read": size}
    done = cli("extract", nights.path)
    assert done.returncode == 3, done.stderr
    assert told in done.stderr
    assert "nothing is removed; check that the input is all there, or raise the limit" in done.stderr
    assert "Traceback" not in done.stderr
    after = files_of(nights.output)
    assert of_shard(after, *(f"{n}.tar" for n in range(NUM_TARS))) == before
    assert ids_of(nights.output) == ids(*range(7))
    report = report_of(nights.output)
    assert report["stopped"].startswith(told)
    assert (report["shards"]["committed"], report["shards"]["removed"]) == (1, 0)
    assert_sound(nights.output)
    raised = run(nights.config(input__on_deleted="remove", limits__max_deleted_fraction=0.4))
    assert (raised.stopped, raised.removed_shards, raised.planned_shards) == ("", 2, 0)
    assert ids_of(nights.output) == ids(0, 2, 3, 5, 6)
    assert_sound(nights.output)


@pytest.mark.parametrize("gone", ["the files", "the folder"])
def test_an_input_that_is_all_gone_removes_nothing_whatever_the_limit(nights, gone):
    before = files_of(nights.output)
    nights.lose(*range(NUM_TARS))
    if gone == "the folder":
        nights.input.rmdir()
    nights.config(input__on_deleted="remove", limits__max_deleted_fraction=1)
    for verb in ("extract", "plan"):
        done = cli(verb, nights.path)
        assert done.returncode == 3, done.stderr
        assert "nothing is removed" in done.stderr
        assert str(nights.input) in done.stderr
        assert "Traceback" not in done.stderr
    assert files_of(nights.output) == before
    assert leftovers(nights.output) == []
    nights.config()  # nobody asked for anything to be removed: the usual word for an empty input
    assert cli("extract", nights.path).returncode == 2


def test_a_run_that_never_read_anything_has_an_empty_input_and_nothing_to_lose(nights, tmp_path):
    nights.lose(*range(NUM_TARS))
    nights.config(**REMOVE)
    done = cli("extract", nights.path, f"output.uri={tmp_path / 'new'}")
    assert done.returncode == 2, done.stderr
    assert "matches no file" in done.stderr


@pytest.mark.slow
def test_deleted_images_leave_their_groups_and_the_others_rows_are_copied(
    tiny_model, tmp_path, write_images
):
    write_images(tmp_path / "in", 12)
    config = make_config(tmp_path / "in", tiny_model, tmp_path / "out", compute__shard_images=4, **REMOVE)
    assert run(config).images == 12
    rows = {row["image_id"]: row for row in rows_of(tmp_path / "out")}
    for name in ("001.png", "002.png"):
        (tmp_path / "in" / name).unlink()
    path = write_config(tmp_path / "config.yaml", config)
    assert planned(path) == {"shards_changed": 1, "shards_deleted": 2, "shards_done": 2}
    tally = run(config)
    assert (tally.stopped, tally.planned_shards, tally.images) == ("", 1, 0)  # read; two are copied
    found = rows_of(tmp_path / "out")
    assert found == [rows[name] for name in sorted(rows) if name not in ("001.png", "002.png")]
    assert_sound(tmp_path / "out")
    (tmp_path / "in/000.png").unlink()  # and then the rest of that group
    (tmp_path / "in/003.png").unlink()
    tally = run(config)
    assert (tally.stopped, tally.planned_shards, tally.removed_shards) == ("", 0, 1)
    assert rows_of(tmp_path / "out") == found[2:]
    assert len(list((tmp_path / "out/commits").iterdir())) == 2
    assert_sound(tmp_path / "out")


@pytest.mark.slow
def test_results_made_otherwise_are_refused_and_into_writes_them_beside(nights):
    before = files_of(nights.output)
    nights.config(output__logits=2)
    for verb in ("extract", "plan"):
        done = cli(verb, nights.path)
        assert done.returncode == 2, done.stderr
        assert 'columns.logits: the output has "full", now 2' in done.stderr
        assert "--into" in done.stderr
    beside = nights.output.with_name("out-2")
    plan = json.loads(cli("plan", nights.path, "--into", "out-2", "--json").stdout)
    assert (plan["shards_new"], plan["shards_done"]) == (NUM_TARS, 0)
    assert not beside.exists()
    tally = run(load_config(nights.path, into="out-2"))
    assert (tally.stopped, tally.committed_shards) == ("", NUM_TARS)
    assert ids_of(beside) == ids_of(nights.output) == ids(*range(NUM_TARS))
    assert {len(row["top_ids"]) for row in rows_of(beside)} == {2}
    assert files_of(nights.output) == before
    assert_sound(beside)
    done = cli("extract", nights.path, "--into", "out-2")
    assert (done.returncode, "nothing to do" in done.stderr) == (0, True), done.stderr
    with pytest.raises(FingerprintError, match="--into"):  # nor does it go back unseen
        run(load_config(nights.path, ["output.logits=full"], into=str(beside)))
    shutil.rmtree(beside)


@pytest.mark.slow
def test_young_files_wait_for_a_later_run_and_changed_ones_keep_their_old_rows_until_then(nights):
    before = files_of(nights.output)
    for number in (3, 6):  # one that is uploaded anew, one that is new
        path = write_tar(nights.input / f"{number}.tar", members(100 * number, 5))
        os.utime(path, (time.time() - 300, time.time() - 300))
    write_tar(nights.input / "7.tar", members(70))
    old = time.time() - 7200
    os.utime(nights.input / "7.tar", (old, old))
    config = nights.config(input__min_age_s=3600)
    plan = planned(nights.path)
    size = (nights.input / "7.tar").stat().st_size
    wanted = {"shards_new": 1, "shards_done": 5, "files_too_young": 2, "bytes_to_read": size}
    assert plan == wanted
    tally = run(config)
    assert (tally.stopped, tally.planned_shards, tally.waiting_files) == ("", 1, 2)
    assert report_of(nights.output)["waiting_files"] == 2
    assert of_shard(files_of(nights.output), *(f"{n}.tar" for n in range(NUM_TARS))) == before
    assert ids_of(nights.output) == ids(*range(NUM_TARS), 7)
    waited = cli("extract", nights.path)
    assert waited.returncode == 0, waited.stderr
    assert "2 files are too young and wait for the next run" in waited.stderr
    assert "every shard of the input is committed" not in waited.stderr
    nights.config(input__min_age_s=200)
    plan = planned(nights.path)
    del plan["bytes_to_read"]
    assert plan == {"shards_new": 1, "shards_changed": 1, "shards_done": 6}
    tally = run(nights.config(input__min_age_s=200))
    assert (tally.planned_shards, tally.waiting_files) == (2, 0)
    assert ids_of(nights.output) == sorted(ids(0, 1, 2, 4, 5, 7) + ids(3, 6, count=5))
    assert_sound(nights.output)


@pytest.mark.slow
def test_young_images_wait_and_their_groups_are_not_touched(tiny_model, tmp_path, write_images):
    names = write_images(tmp_path / "in", 6)
    old = time.time() - 7200
    for name in names:
        os.utime(tmp_path / "in" / name, (old, old))
    config = make_config(tmp_path / "in", tiny_model, tmp_path / "out", input__min_age_s=3600)
    assert run(config).images == 6
    before = files_of(tmp_path / "out")
    (tmp_path / "in/002.png").write_bytes(encode(make_image(77)))
    (tmp_path / "in/new.png").write_bytes(encode(make_image(78)))
    path = write_config(tmp_path / "config.yaml", config)
    assert planned(path) == {"shards_done": 1, "files_too_young": 2}
    tally = run(config)
    assert (tally.planned_shards, tally.waiting_files) == (0, 2)
    assert files_of(tmp_path / "out") == before


@pytest.mark.slow
def test_an_ignored_broken_shard_does_not_fail_the_night(nights):
    whole = write_tar(nights.input / "6.tar", members(60)).read_bytes()
    (nights.input / "6.tar").write_bytes(whole[: len(whole) // 2])
    write_tar(nights.input / "sub/7.tar", members(70))
    nights.config()
    broken = cli("extract", nights.path)
    assert broken.returncode == 3, broken.stderr
    assert "left out: 6.tar" in broken.stderr
    config = nights.config(input__ignore_shards=["6.t?r", "5.tar"])  # 5.tar is done: that is not undone
    assert planned(nights.path) == {"shards_done": 7, "shards_ignored": 1}
    quiet = cli("extract", nights.path)
    assert quiet.returncode == 0, quiet.stderr
    assert "1 ignored, as input.ignore_shards says" in quiet.stderr
    assert "every shard of the input is committed" not in quiet.stderr
    report = report_of(nights.output)
    assert (report["shards"]["ignored"], report["shards"]["failed"]) == (["6.tar"], {})
    expected = [*ids(*range(NUM_TARS)), *(f"sub/7.tar#{n}" for n in range(TAR_IMAGES))]
    assert ids_of(nights.output) == expected
    (nights.input / "6.tar").write_bytes(whole)
    assert run(config).planned_shards == 0  # it is the name that is left out, not the damage
    mended = run(nights.config())
    assert (mended.committed_shards, mended.failed_shards) == (1, {})
    assert ids_of(nights.output) == sorted([*expected, *ids(6)])
    assert_sound(nights.output)


def test_a_changed_shard_leaves_no_file_of_its_old_self(nights):
    before = files_of(nights.output)
    write_tar(nights.input / "2.tar", members(200, 5, (60, 50))[:-1])  # without a reject this time
    config = nights.config()
    size = (nights.input / "2.tar").stat().st_size
    assert planned(nights.path) == {"shards_changed": 1, "shards_done": 5, "bytes_to_read": size}
    tally = run(config)
    assert (tally.committed_shards, tally.images, tally.rejects) == (1, 5, Counter())
    after = files_of(nights.output)
    old, new = of_shard(before, "2.tar"), of_shard(after, "2.tar")
    assert not old.keys() & new.keys()
    assert sorted(path.split("/")[0] for path in new) == ["commits", "embeddings"]
    others = tuple(f"{n}.tar" for n in range(NUM_TARS) if n != 2)
    assert of_shard(after, *others) == of_shard(before, *others)
    rows = rows_of(nights.output)
    assert [row["width"] for row in rows if row["shard"] == "2.tar"] == [60] * 5
    assert len(rows) == 5 * TAR_IMAGES + 5
    (record,) = [json.loads(data) for path, (_, data) in new.items() if path.startswith("commits")]
    (superseded,) = [path for path in old if path.startswith("commits")]
    assert record["supersedes"] == [superseded.removeprefix("commits/").removesuffix(".json")]
    assert_sound(nights.output)
    assert run(config).planned_shards == 0


@pytest.mark.slow
def test_of_a_half_replaced_shard_a_later_run_leaves_the_newer_half(nights):
    """As after a kill between the new record and the deletion of what it supersedes."""
    old = of_shard(files_of(nights.output), "2.tar")
    write_tar(nights.input / "2.tar", members(200))
    run(nights.config())
    new = files_of(nights.output)
    for path, (_, data) in old.items():
        (nights.output / path).write_bytes(data)
    assert verify(Storage(str(nights.output))).problems  # files and a record that the next run takes away
    assert run(nights.config()).planned_shards == 0
    assert files_of(nights.output) == new
    assert_sound(nights.output)
