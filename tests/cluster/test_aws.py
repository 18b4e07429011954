"""`ray up`'s file through Ray's own parser, without a call to the cloud."""

import copy

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.files import read


@pytest.fixture
def config():
    return yaml.safe_load(read("aws.yaml"))


def test_ray_takes_it(config):
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["head_start_ray_commands"] == config["head_start_ray_commands"], "ours, not the defaults"
    config["misspelt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        validate_config(prepare_config(config))


def test_workers_are_on_the_spot_market_and_the_head_is_not(config):
    head, gpu = config["available_node_types"]["head"], config["available_node_types"]["gpu"]
    assert config["head_node_type"] == "head" and "InstanceMarketOptions" not in head["node_config"]
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert head["resources"] == {"CPU": 0}, "the head does no work"
    assert gpu["min_workers"] == 0 < gpu["max_workers"] <= config["max_workers"] and gpu["resources"]["GPU"] == 1


def test_every_node_asks_for_the_token_and_has_it(config):
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        starts = [c for c in commands if "ray start" in c]
        assert starts and all(c.startswith("RAY_AUTH_MODE=token ray start") for c in starts)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"], "also of `ray exec` and `ray attach`"
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_dashboard_is_reached_through_ssh_alone(config):
    (start,) = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    assert "--dashboard-host=127.0.0.1" in start
    for node in config["available_node_types"].values():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required", "IMDSv2"
        assert all(d["Ebs"]["Encrypted"] for d in node["node_config"]["BlockDeviceMappings"])
