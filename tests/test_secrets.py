"""Secrets in addresses: taken out of what is shown, refused where the address would be written down."""

import json

import pytest

from rayclip.store import Store
from rayclip.tracking.deliverer import Deliverer
from rayclip.tracking.experiment import Experiment
from rayclip.tracking.journal import Journal
from rayclip.types import UserError, has_secret, redacted


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://ann:pa55@host:5000/x", "http://ann:***@host:5000/x"),
        ("postgresql+psycopg2://ann:p%40a:5@db/mlflow", "postgresql+psycopg2://ann:***@db/mlflow"),
        ("http://:pa55@host", "http://:***@host"),
        ("http://ann:pa@55'x@host/y", "http://ann:***@host/y"),
        ("s3://AKIA:pa55@bucket/p?region=eu", "s3://AKIA:***@bucket/p?region=eu"),
        ("s3://b/p?access_key=AKIA&secret_key=pa55&scheme=http", "s3://b/p?access_key=***&secret_key=***&scheme=http"),
        ("s3://b/p?region=eu&session_token=pa55#part", "s3://b/p?region=eu&session_token=***#part"),
        ("https://h/f?X-Amz-Signature=pa55&sig=pa55&TOKEN=pa55", "https://h/f?X-Amz-Signature=***&sig=***&TOKEN=***"),
        ("abfs://c@a/p?sas_token=pa55", "abfs://c@a/p?sas_token=***"),
    ],
)
def test_secrets_of_an_address_are_not_shown(address, shown):
    assert redacted(address) == shown and has_secret(address) and not has_secret(shown)
    sentence = f"'{address}' cannot be opened (see {address}): check it."
    assert redacted(sentence) == f"'{shown}' cannot be opened (see {shown}): check it."
    assert str(UserError(sentence)) == redacted(sentence)
    assert "pa55" not in redacted(sentence)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/p?scheme=http&endpoint_override=127.0.0.1:9000&allow_bucket_creation=true",
        "http://127.0.0.1:5000 and x@y.org",
        "abfs://container@account/p",
        "postgresql://ann@db/mlflow",
        "sqlite:////home/ann/mlflow.db",
        "is it new? key=value & monkey=1",
    ],
)
def test_what_holds_no_secret_stays_as_it_is(text):
    assert redacted(text) == text and not has_secret(text)


@pytest.mark.parametrize("root", ["s3://AKIA:pa55@bucket/results", "s3://bucket/results?access_key=A&secret_key=pa55"])
def test_a_root_with_a_key_is_refused_because_it_would_be_written_down(root):
    with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY") as found:
        Store(root)
    assert "pa55" not in str(found.value)


def test_a_tracking_address_with_a_password_is_refused_because_it_would_travel():
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as found:
        Experiment("http://ann:pa55@127.0.0.1:9", "study")
    assert "pa55" not in str(found.value)


def test_params_tags_and_names_of_runs_hold_no_secrets(mlflow_uri, tmp_path):
    from mlflow import MlflowClient

    journal, source = Journal(Store(str(tmp_path / "out"))), "https://ann:pa55@host/cupl.json?token=pa55"
    journal.add("start", "key", name=source, parent=None, params={"captions": source}, tags={"from": source})
    journal.add("describe", "key", text=f"from {source}", study=False)
    journal.add("data", "key", name="digits", digest="abc", context="training", about={"spec": source})
    deliverer = Deliverer(journal, Experiment(mlflow_uri, "study"))
    (started,) = journal.delivered(deliverer.experiment.address)["runs"].values()
    run = MlflowClient(deliverer.experiment.uri).get_run(started)
    assert run.inputs.dataset_inputs and not any(b"pa55" in p.read_bytes() for p in tmp_path.rglob("*.json*"))
    assert "pa55" not in json.dumps(run.to_dictionary())
    assert run.data.params["captions"] == "https://ann:***@host/cupl.json?token=***"
