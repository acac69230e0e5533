"""What is put on a Kubernetes cluster: its manifests against the schemas, the wait for a run, the image."""

import copy
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from referencing import Registry, Resource

from jobs.cli import VERBS
from pipeline.load_config import load_config
from pipeline.stop import GRACE_S

ROOT = Path(__file__).resolve().parents[1]
KUBERAY = ROOT / "configs/kuberay"
KUBERNETES = "1.33"
DEFINITIONS = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict/_definitions.json"


def documents(name):
    return list(yaml.safe_load_all((KUBERAY / name).read_text()))


@pytest.fixture(scope="module")
def rayjob_schema():
    """A validator of RayJobs, which refuses unknown fields as the API server does."""

    def closed(schema):
        if isinstance(schema, dict):
            schema = {name: closed(value) for name, value in schema.items()}
            if schema.get("type") == "object" and "additionalProperties" not in schema:
                schema["additionalProperties"] = False
        return [closed(one) for one in schema] if isinstance(schema, list) else schema

    crd = closed(yaml.safe_load((ROOT / "tests/kuberay_crd.yaml").read_text()))
    definitions = json.loads((Path(kubernetes_validate.__file__).parent / DEFINITIONS).read_text())
    crd["$id"] = definitions["$id"].replace("_definitions.json", "rayjob")  # where its references begin
    registry = Resource.from_contents(definitions) @ Registry()
    return jsonschema.Draft202012Validator(crd, registry=registry)


def faults(validator, manifest):
    return sorted(f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest))


def test_the_rayjob_is_one_by_the_operators_schema(rayjob_schema):
    (manifest,) = documents("rayjob.yaml")
    assert faults(rayjob_schema, manifest) == []


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("spec.backofLimit", 0),
        ("spec.backoffLimit", "none"),
        ("spec.submissionMode", "K8sMode"),
        ("spec.rayClusterSpec.enableAutoscaling", True),
        ("spec.rayClusterSpec.authOptions.mode", "password"),
        ("spec.rayClusterSpec.autoscalerOptions.idleTimeoutSecond", 60),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterSpec.workerGroupSpecs.0.minReplica", 1),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.toleration", []),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.envfrom", []),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources.limit", {}),
    ],
)
def test_a_rayjob_with_a_wrong_field_is_refused(rayjob_schema, path, wrong):
    (manifest,) = copy.deepcopy(documents("rayjob.yaml"))
    *parents, name = path.split(".")
    section = manifest
    for parent in parents:
        section = section[int(parent) if isinstance(section, list) else parent]
    section[name] = wrong
    (fault,) = faults(rayjob_schema, manifest)
    assert name in fault


def test_a_rayjob_without_a_required_field_is_refused(rayjob_schema):
    (manifest,) = copy.deepcopy(documents("rayjob.yaml"))
    del manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]
    assert faults(rayjob_schema, manifest) == [
        "$.spec.rayClusterSpec.workerGroupSpecs[0]: 'groupName' is a required property"
    ]


def test_the_cronjob_and_its_rights_are_valid():
    kinds = []
    for manifest in documents("cronjob.yaml"):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        kinds.append(manifest["kind"])
    assert kinds == ["CronJob", "ServiceAccount", "Role", "RoleBinding"]


def test_a_cronjob_with_a_wrong_field_is_refused():
    manifest = documents("cronjob.yaml")[0]
    manifest["spec"]["concurencyPolicy"] = "Forbid"
    with pytest.raises(kubernetes_validate.ValidationError, match="concurencyPolicy"):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_the_manifests_agree_with_each_other():
    cronjob, account, role, binding = documents("cronjob.yaml")
    (rayjob,) = documents("rayjob.yaml")
    job = cronjob["spec"]["jobTemplate"]["spec"]
    assert cronjob["spec"]["concurrencyPolicy"] == "Forbid"
    assert job["backoffLimit"] == rayjob["spec"]["backoffLimit"] == 0
    assert job["activeDeadlineSeconds"] > rayjob["spec"]["activeDeadlineSeconds"]
    names = {account["metadata"]["name"], job["template"]["spec"]["serviceAccountName"]}
    assert names == {binding["subjects"][0]["name"]}
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert role["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]
    assert "name" not in rayjob["metadata"]  # a second night would meet the first one's


def pods(rayjob):
    cluster = rayjob["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_every_volume_that_is_mounted_is_there():
    cronjob = documents("cronjob.yaml")[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    for pod in [*pods(*documents("rayjob.yaml")), cronjob]:
        mounted = {mount["name"] for one in pod["containers"] for mount in one["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_cluster_has_the_ray_of_the_image():
    (pinned,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    (manifest,) = documents("rayjob.yaml")
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == pinned


def test_a_pod_leaves_a_run_the_time_to_stop():
    head = pods(*documents("rayjob.yaml"))[0]
    held_s = int(head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    ray_waits_s = int(re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", (ROOT / "Dockerfile").read_text())[0])
    assert GRACE_S < ray_waits_s <= held_s < head["terminationGracePeriodSeconds"]


def test_the_entrypoint_is_a_command_line_of_ours():
    (manifest,) = documents("rayjob.yaml")
    program, verb, mounted, *overrides = manifest["spec"]["entrypoint"].split()
    assert (program, verb in VERBS) == ("cvt-pipeline", True)
    head = pods(manifest)[0]["containers"][0]
    assert str(Path(mounted).parent) in {mount["mountPath"] for mount in head["volumeMounts"]}
    config = load_config(KUBERAY / Path(mounted).name, overrides, environ={})
    assert (
        config.compute.actors.max
        == manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"]
    )


FAKE_KUBECTL = """#!/bin/sh
# Answers as the API server would: one line of $STATES after the other, then the last one for ever.
case "$1" in
  patch) cat "$MANIFEST"; printf '%s' "$*" > "$FOLDER/patched" ;;
  create) cat > "$FOLDER/created"; echo rayjob.ray.io/cvt-extract-x7k2p ;;
  get)
    case "$3" in
      *jobDeploymentStatus*)
        state=$(head -n 1 "$FOLDER/states")
        if [ "$(wc -l < "$FOLDER/states")" -gt 1 ]; then sed -i 1d "$FOLDER/states"; fi
        if [ "$state" = gone ]; then echo 'Error: not found' >&2; exit 1; fi
        printf '%s' "$state" ;;
      *message*) cat "$FOLDER/message" ;;
      *) cat "$FOLDER/ended" ;;
    esac ;;
  *) exit 64 ;;
esac
"""

FAILED = (
    "Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars):\n"
)


@pytest.mark.parametrize(
    ("states", "ended", "message", "code"),
    [
        (["", "Initializing", "Running", "Complete"], "SUCCEEDED ", "Job finished successfully.", 0),
        (["Running", "gone", "Running", "Complete"], "SUCCEEDED ", "", 0),
        (["Running", "Failed"], "FAILED AppFailed", FAILED.format(3) + "failed with exit code 9", 3),
        (["Running", "Complete"], "FAILED ", FAILED.format(3), 3),
        (["Running", "Failed"], "FAILED AppFailed", FAILED.format(4) + "error: is held by run …", 0),
        (["Running", "Failed"], "FAILED AppFailed", FAILED.format(2), 2),
        (["Running", "Failed"], "RUNNING DeadlineExceeded", "it ran past its deadline", 1),
        (["Running", "Complete"], "STOPPED ", "Job was intentionally stopped.", 1),
        (["gone"], "", "", 1),
    ],
)
def test_the_wait_ends_as_the_run_did(tmp_path, states, ended, message, code):
    job = documents("cronjob.yaml")[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    kubectl = tmp_path / "bin/kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text(FAKE_KUBECTL)
    kubectl.chmod(0o755)
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    (tmp_path / "ended").write_text(ended)
    (tmp_path / "message").write_text(message)
    env = {one["name"]: one["value"] for one in job["env"] if "value" in one}
    env |= {"FOLDER": str(tmp_path), "MANIFEST": str(KUBERAY / "rayjob.yaml"), "POLL_S": "0.01"}
    env |= {"PATH": f"{kubectl.parent}:{os.environ['PATH']}", "JOB": "cvt-extract-29", "JOB_UID": "0f1e"}
    found = subprocess.run(
        [*job["command"], *job["args"]], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == code, found.stdout + found.stderr
    assert "created rayjob.ray.io/cvt-extract-x7k2p" in found.stdout
    assert (tmp_path / "created").read_text() == (KUBERAY / "rayjob.yaml").read_text()
    patch = re.findall(r"--patch=(\S+)$", (tmp_path / "patched").read_text())[0]
    assert json.loads(patch)["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "cvt-extract-29", "uid": "0f1e"}
    ]


def test_kubectl_itself_gives_the_rayjob_its_owner(tmp_path):
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    owner = '{"metadata":{"ownerReferences":[{"apiVersion":"batch/v1","kind":"Job","name":"a","uid":"b"}]}}'
    words = ["patch", "--local", "--type=merge", f"--filename={KUBERAY / 'rayjob.yaml'}", "--output=yaml"]
    patched = subprocess.run(
        ["kubectl", *words, f"--patch={owner}"],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    (manifest,) = documents("rayjob.yaml")
    manifest["metadata"] |= json.loads(owner)["metadata"]
    assert yaml.safe_load(patched.stdout) == manifest
