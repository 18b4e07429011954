"""The Kubernetes files against the published schemas, and against what a careful operator asks of pods."""

import copy

import jsonschema
import kubernetes_validate
import pytest

from cluster import kuberay
from cluster.files import KUBERNETES, documents, one, pod_templates, walk

VERSION = "1.34"
RAY = [(f, d) for f in KUBERNETES for d in documents(f) if d["apiVersion"] == "ray.io/v1"]
OWN = [(f, d) for f in KUBERNETES for d in documents(f) if d["apiVersion"] != "ray.io/v1"]
PODS = [(f"{f} {where}", pod) for f in KUBERNETES for where, pod in pod_templates(f)]


def named(cases):
    return pytest.mark.parametrize("resource", [d for _, d in cases], ids=[f"{f} {d['kind']}" for f, d in cases])


def each_pod(test):
    return pytest.mark.parametrize("pod", [p for _, p in PODS], ids=[name for name, _ in PODS])(test)


def as_pod(template):
    return {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template["spec"]}


def test_every_kind_is_there():
    assert {(f, d["kind"]) for f, d in RAY} == {("kuberay-cluster.yaml", "RayCluster"), ("kuberay-job.yaml", "RayJob")}
    kinds = {d["kind"] for d in documents("mlflow-kubernetes.yaml")}
    assert kinds == {"PersistentVolumeClaim", "Service", "StatefulSet", "Deployment", "NetworkPolicy"}
    assert len(PODS) == 7


@named(OWN)
def test_kubernetes_own_resources_are_valid(resource):
    kubernetes_validate.validate(resource, VERSION, strict=True)


@named(RAY)
def test_ray_resources_are_valid(resource):
    jsonschema.validate(resource, kuberay.resource(resource["kind"]))


@named(RAY)
@pytest.mark.parametrize("where", ["spec", "cluster", "workers", "authOptions"])
def test_a_misspelt_field_is_noticed(resource, where):
    changed = copy.deepcopy(resource)
    cluster = changed["spec"].get("rayClusterSpec", changed["spec"])
    part = {"spec": changed["spec"], "cluster": cluster, "workers": cluster["workerGroupSpecs"][0]}
    part["authOptions"] = cluster["authOptions"]
    part[where]["misspelt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        jsonschema.validate(changed, kuberay.resource(resource["kind"]))


@each_pod
def test_pods_are_valid(pod):
    kubernetes_validate.validate(as_pod(pod), VERSION, strict=True)
    broken = as_pod(copy.deepcopy(pod))
    broken["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSION, strict=True)


@each_pod
def test_no_pod_runs_as_root_or_may_become_it(pod):
    """Pod security "restricted"."""
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] >= 999
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert not any("hostPath" in volume for volume in spec.get("volumes", ()))
    for container in spec["containers"] + spec.get("initContainers", []):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in container["securityContext"]


@each_pod
def test_every_container_says_what_it_takes(pod):
    for container in pod["spec"]["containers"]:
        assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert ":" in container["image"].rpartition("/")[2] and not container["image"].endswith(":latest")
    named = {volume["name"] for volume in pod["spec"].get("volumes", ())}
    mounted = {m["name"] for c in pod["spec"]["containers"] for m in c.get("volumeMounts", ())}
    assert named <= mounted, "no volume without use"


@each_pod
def test_only_the_head_may_talk_to_kubernetes(pod):
    """It asks for nodes; other pods hold no key to the API."""
    is_head = pod["spec"]["containers"][0]["name"] == "ray-head"
    assert pod["spec"].get("automountServiceAccountToken", True) is is_head


def ray_specs():
    return [
        one("kuberay-cluster.yaml", "RayCluster")["spec"],
        one("kuberay-job.yaml", "RayJob")["spec"]["rayClusterSpec"],
    ]


@pytest.mark.parametrize("spec", ray_specs(), ids=["RayCluster", "RayJob"])
def test_ray_clusters_ask_for_a_token_and_grow_with_gpu_workers(spec):
    assert spec["authOptions"] == {"mode": "token"} and spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["securityContext"]["runAsNonRoot"] is True
    assert spec["autoscalerOptions"]["resources"]["limits"].keys() == {"cpu", "memory"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP", "not reachable from outside"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "the head does no work"
    (group,) = spec["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1" and group["minReplicas"] == 0 < group["maxReplicas"]
    settings = [e["name"] for p, v in walk(spec) if p and p[-1] == "env" for e in v]
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & set(settings), "KubeRay sets both"


def test_a_job_ends_its_cluster():
    spec = one("kuberay-job.yaml", "RayJob")["spec"]
    assert spec["shutdownAfterJobFinishes"] and spec["activeDeadlineSeconds"] and spec["ttlSecondsAfterFinished"]


def test_selectors_and_labels_meet():
    for name in KUBERNETES:
        for resource in documents(name):
            if resource["kind"] in ("Deployment", "StatefulSet"):
                labels = resource["spec"]["template"]["metadata"]["labels"]
                assert resource["spec"]["selector"]["matchLabels"].items() <= labels.items()
    labels = [p["metadata"]["labels"] for _, p in PODS]
    for resource in (d for f in KUBERNETES for d in documents(f)):
        if resource["kind"] == "NetworkPolicy":
            assert any(resource["spec"]["podSelector"]["matchLabels"].items() <= own.items() for own in labels)
            assert resource["spec"]["policyTypes"] == ["Ingress"] and resource["spec"]["ingress"]
        if resource["kind"] == "Service":
            assert any(resource["spec"]["selector"].items() <= own.items() for own in labels)
            assert resource["spec"].get("type", "ClusterIP") == "ClusterIP"
