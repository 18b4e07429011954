"""Facts that several files of `cluster/` state: they must be the same everywhere."""

import configparser
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from cluster.files import CLUSTER, KUBERNETES, docker_args, documents, one, pod_templates, read, walk

PROJECT = tomllib.loads((CLUSTER.parent / "pyproject.toml").read_text())["project"]
FILES = sorted(p.name for p in CLUSTER.iterdir() if p.is_file() and p.name != ".env")


def test_the_folder_holds_what_is_tested():
    assert list(FILES) == [
        *("Dockerfile", "aws.yaml", "kuberay-access.yaml", "kuberay-cluster.yaml", "kuberay-job.yaml"),
        *("mlflow-auth.ini", "mlflow-compose.yaml", "mlflow-kubernetes.yaml", "slurm.sh"),
    ]


@pytest.mark.parametrize("name", FILES)
def test_the_head_of_a_file_says_how_to_use_it(name):
    head = re.match(r"(#!.*\n)?((#|;).*\n)+", read(name))
    assert head
    commands = re.findall(r"(?m)^[#;]   ?(?:docker|kubectl|ray|sbatch|\(umask|curl|sed)\b", head[0])
    assert 1 <= len(commands) <= 5


def test_one_version_of_ray():
    version = docker_args()["RAY"]
    cluster, job = one("kuberay-cluster.yaml", "RayCluster"), one("kuberay-job.yaml", "RayJob")
    assert {cluster["spec"]["rayVersion"], job["spec"]["rayClusterSpec"]["rayVersion"]} == {version}
    for name in FILES:
        assert set(re.findall(r"(?i)\bray(?:version)?[=: ]{1,2}(\d+\.\d+\.\d+)", read(name))) <= {version}, name


def test_pinned_versions_are_what_the_package_asks_for():
    """The images install what pyproject.toml allows; the very versions are those that the tests last ran with."""
    text = re.sub(r"\$\{(\w+)\}", lambda m: docker_args()[m[1]], read("Dockerfile"))
    pins = dict(re.findall(r"\b([\w-]+)(?:\[[\w,]+\])?==([\w.]+)", text))
    assert pins.keys() == {"ray", "mlflow", "torch", "torchvision", "psycopg2-binary", "boto3"}
    asked = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
    for name in ("ray", "mlflow", "torch", "torchvision"):
        assert asked[name].specifier.contains(pins[name]), name
    python = Requirement(f"python{PROJECT['requires-python']}").specifier
    assert python.contains(docker_args()["PYTHON"]) and f"-py{docker_args()['PYTHON'].replace('.', '')} " in text
    assert importlib.metadata.version("ray").split(".")[0] == pins["ray"].split(".")[0]


def images(name):
    return {v for d in yaml.safe_load_all(read(name)) for p, v in walk(d) if p and p[-1] == "image"}


def test_one_name_of_each_image():
    used = set().union(*(images(f) for f in FILES if f.endswith(".yaml")))
    built = set(re.findall(r"-t (\S+) ", read("Dockerfile")))
    assert used - {"postgres:17.6"} == built
    assert {i.rpartition("/")[2] for i in built} == {f"{n}:{PROJECT['version']}" for n in ("rayclip", "rayclip-mlflow")}
    assert images("mlflow-compose.yaml") & images("mlflow-kubernetes.yaml") >= {"postgres:17.6"}


def test_one_port_of_each_service():
    for name in ("kuberay-cluster.yaml", "kuberay-job.yaml"):
        (head,) = [p for where, p in pod_templates(name) if "headGroupSpec" in where]
        ports = {p["name"]: p["containerPort"] for p in head["spec"]["containers"][0]["ports"]}
        assert ports == {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
    aws = read("aws.yaml")
    assert "--port=6379" in aws and "--address=$RAY_HEAD_IP:6379" in aws and "--dashboard-port=8265" in aws
    for name in ("aws.yaml", "kuberay-cluster.yaml"):
        assert "--address http://127.0.0.1:8265" in read(name)
    assert "--port 5000" in read("Dockerfile") and "EXPOSE 5000" in read("Dockerfile")
    services = {d["metadata"]["name"]: d["spec"] for d in documents("mlflow-kubernetes.yaml") if d["kind"] == "Service"}
    assert services["rayclip-mlflow"]["ports"][0]["port"] == 5000 and services["postgres"]["ports"][0]["port"] == 5432


def test_a_head_says_how_far_its_cluster_grows():
    """`rayclip.distributed.resources` reads it: without, GPUs that are not there yet would not be asked for."""
    for spec in (
        one("kuberay-cluster.yaml", "RayCluster")["spec"],
        one("kuberay-job.yaml", "RayJob")["spec"]["rayClusterSpec"],
    ):
        (group,) = spec["workerGroupSpecs"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        most = {"GPU": int(limits["nvidia.com/gpu"]), "CPU": int(limits["cpu"])}
        labels = {f"autoscales-to-{what}": str(group["maxReplicas"] * each) for what, each in most.items()}
        assert spec["headGroupSpec"]["labels"] == labels
    aws = yaml.safe_load(read("aws.yaml"))
    gpu, (start,) = aws["available_node_types"]["gpu"], [c for c in aws["head_start_ray_commands"] if "ray start" in c]
    labels = [f"autoscales-to-{what}={gpu['max_workers'] * gpu['resources'][what]}" for what in ("GPU", "CPU")]
    assert f"--labels={','.join(labels)}" in start.split()


def test_ray_pods_find_the_mlflow_server_and_its_secret():
    service = "http://rayclip-mlflow:5000"
    (server,) = [p for where, p in pod_templates("mlflow-kubernetes.yaml") if "Deployment" in where]
    hosts = {e["name"]: e.get("value") for e in server["spec"]["containers"][0]["env"]}["MLFLOW_SERVER_ALLOWED_HOSTS"]
    assert "rayclip-mlflow:*" in hosts.split(",")
    made = set(re.findall(r"--from-literal=([\w-]+)=", read("mlflow-kubernetes.yaml")))
    used = set()
    for name in KUBERNETES:
        for where, pod in pod_templates(name):
            env = {e["name"]: e for c in pod["spec"]["containers"] for e in c.get("env", ())}
            keys = [e["valueFrom"]["secretKeyRef"] for e in env.values() if "valueFrom" in e]
            assert all(k["name"] == "rayclip-mlflow" for k in keys)
            used |= {k["key"] for k in keys}
            if "GroupSpec" in where:
                assert env["MLFLOW_TRACKING_URI"]["value"] == service
                assert {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"} <= env.keys()
    assert used == made


def test_the_mlflow_server_has_users_wherever_it_runs():
    """One command, in the image; both ways to run it give what it wants."""
    command = read("Dockerfile").partition("AS mlflow")[2].partition("CMD ")[2]
    assert "--app-name basic-auth" in command
    needs = {"MLFLOW_BACKEND_STORE_URI", "PGPASSWORD", "MLFLOW_AUTH_ADMIN_USERNAME", "MLFLOW_AUTH_ADMIN_PASSWORD"}
    needs |= {"MLFLOW_FLASK_SERVER_SECRET_KEY"}
    compose = yaml.safe_load(read("mlflow-compose.yaml"))["services"]["mlflow"]
    (pod,) = [p for where, p in pod_templates("mlflow-kubernetes.yaml") if "Deployment" in where]
    container = pod["spec"]["containers"][0]
    given = {e["name"]: e.get("value") for e in container["env"]}
    assert needs <= compose["environment"].keys() and needs <= given.keys()
    assert not {"command", "entrypoint"} & compose.keys() and not {"command", "args"} & container.keys()
    auth = configparser.ConfigParser(inline_comment_prefixes=None)
    auth.read(CLUSTER / "mlflow-auth.ini")
    store = auth["mlflow"]["database_uri"]
    assert store == compose["environment"]["MLFLOW_BACKEND_STORE_URI"] == given["MLFLOW_BACKEND_STORE_URI"]
    assert "admin_password" not in auth["mlflow"] and auth["mlflow"]["default_permission"] in ("READ", "NO_PERMISSIONS")


def test_authentication_is_on_in_each():
    on = {
        "Dockerfile": "RAY_AUTH_MODE=token",
        "aws.yaml": "RAY_AUTH_MODE=token",
        "kuberay-cluster.yaml": "mode: token",
        "kuberay-job.yaml": "mode: token",
        "slurm.sh": "RAY_AUTH_MODE=token",
        "mlflow-auth.ini": "authenticate_request_basic_auth",
        "mlflow-compose.yaml": "MLFLOW_AUTH_ADMIN_PASSWORD",
        "mlflow-kubernetes.yaml": "MLFLOW_AUTH_ADMIN_PASSWORD",
    }
    assert on.keys() | {"kuberay-access.yaml"} == set(FILES)
    for name, words in on.items():
        assert words in re.sub(r"(?m)^#.*\n", "", read(name)), name
        assert "disabled" not in read(name)


def test_no_file_holds_a_secret():
    """Passwords come from the environment or a Secret; commands in comments make them."""
    for name in FILES:
        text = read(name)
        assert not re.search(r"://[^/\s'\"]*:[^/\s'\"@]+@", text), f"{name}: a password in an address"
        assert not re.search(r"(?i)(password|secret_key|token)['\"]?\s*[:=]\s*['\"]?[0-9a-f]{8,}", text), name
        assert "AKIA" not in text and "PRIVATE KEY" not in text


def test_secrets_that_are_made_beside_the_files_are_not_committed():
    assert "/cluster/.env" in Path(CLUSTER.parent, ".gitignore").read_text().splitlines()
