"""The compose file against the Compose specification, and what it promises."""

import re

import pytest
import yaml
from compose_spec import PyCompose

from cluster.files import read

SECRETS = ("POSTGRES_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY")


@pytest.fixture
def services():
    return yaml.safe_load(read("mlflow-compose.yaml"))["services"]


def test_it_is_compose():
    text = read("mlflow-compose.yaml")
    compose = PyCompose.from_yaml(text)
    compose.validate()
    assert sorted(compose.services) == ["mlflow", "postgres"]
    for broken in (text.replace("depends_on:", "depends_upon:"), text.replace("context: ..", "contxt: ..")):
        with pytest.raises(ValueError):
            PyCompose.from_yaml(broken).validate()


def test_no_secret_has_a_default(services):
    text = read("mlflow-compose.yaml")
    for name in SECRETS:
        uses = re.findall(rf"\$\{{{name}([^}}]*)\}}", text)
        assert uses and all(use.startswith(":?") for use in uses), f"{name} must be given"
        assert name in text.partition("name: rayclip-mlflow")[0], "the head says how to make it"
    words = [v for s in services.values() for k, v in s["environment"].items() if re.search("PASSW|SECRET|_KEY", k)]
    assert all(v.startswith("${") for v in words)


def test_only_this_machine_reaches_the_server_and_only_the_server_the_database(services):
    assert services["mlflow"]["ports"] == ["127.0.0.1:5000:5000"] and "ports" not in services["postgres"]
    networks = yaml.safe_load(read("mlflow-compose.yaml"))["networks"]
    assert services["postgres"]["networks"] == ["database"] and networks["database"]["internal"] is True


def test_services_hold_no_more_rights_than_they_need(services):
    for service in services.values():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}
        assert "privileged" not in service and not service["image"].endswith(":latest") and ":" in service["image"]
    assert services["postgres"]["user"] == "postgres", "the server's image names its own user"
