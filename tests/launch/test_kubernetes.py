"""k8s.yaml and its container."""

import json

import pytest
import yaml

from tests.helpers.launch_flags import check_flags
from tests.helpers.stand_ins import LAUNCH, ROOT


@pytest.fixture(scope="module")
def kubernetes():
    """{(kind, accelerator): object}."""
    objects = list(yaml.safe_load_all((LAUNCH / "k8s.yaml").read_text()))
    named = {(item["kind"], item["metadata"]["labels"]["accelerator"]): item for item in objects}
    assert len(named) == len(objects) == 4
    return named


@pytest.mark.parametrize("accelerator", ["gpu", "tpu"])
def test_kubernetes_job_is_one_run(kubernetes, accelerator):
    service, job = kubernetes["Service", accelerator], kubernetes["Job", accelerator]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {item["name"]: item for item in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert str(spec["parallelism"]) == str(spec["completions"]) == environment["JAX_NUM_PROCESSES"]["value"]
    index = environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"

    name, domain = job["metadata"]["name"], service["metadata"]["name"]
    host, port = environment["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    assert host == f"{name}-0.{domain}"
    assert int(port) in [item["containerPort"] for item in container["ports"]]
    assert pod["subdomain"] == domain
    assert service["spec"] == {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"job-name": name},  # a label that the Job puts on its pods
    }
    assert {item["name"] for item in container["volumeMounts"]} == {item["name"] for item in pod["volumes"]}


@pytest.mark.parametrize("accelerator", ["gpu", "tpu"])
def test_kubernetes_reads_the_exit_codes(kubernetes, accelerator):
    spec = kubernetes["Job", accelerator]["spec"]
    pod = spec["template"]["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    by_code = {rule["onExitCodes"]["values"][0]: rule["action"] for rule in rules if "onExitCodes" in rule}
    assert by_code == {2: "FailJob", 75: "Ignore"}
    assert all(
        rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"] for rule in rules if "onExitCodes" in rule
    )
    (disrupted,) = [rule for rule in rules if "onPodConditions" in rule]
    assert disrupted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy asks for
    assert pod["terminationGracePeriodSeconds"] == 120
    assert spec["podReplacementPolicy"] == "Failed"
    assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (3, 0)


@pytest.mark.parametrize(
    ("accelerator", "resource", "per_node"), [("gpu", "nvidia.com/gpu", 8), ("tpu", "google.com/tpu", 4)]
)
def test_kubernetes_asks_for_devices_that_the_config_can_use(kubernetes, accelerator, resource, per_node):
    spec = kubernetes["Job", accelerator]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {resource: per_node}
    devices = per_node * spec["completions"]
    if accelerator == "tpu":
        assert spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
        assert devices == 16 * 16
    check_flags(container["args"][1:], devices)


def test_the_container_is_made_of_what_is_there():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            assert (ROOT / line.split()[1]).exists(), line
    (entry,) = [line for line in lines if line.startswith("ENTRYPOINT ")]
    assert json.loads(entry.removeprefix("ENTRYPOINT ")) == ["python", "-m", "fvq_jax.main"]
