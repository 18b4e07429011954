"""A registered checkpoint is loaded by MLflow alone, answers as the model does, and the best one is the champion."""

import base64
import io
import json
import os
import sys
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from rayclip.api.logbook import Logbook
from rayclip.data import open_data
from rayclip.data.images import batch_pixels
from rayclip.models import ZeroShot, load_model
from rayclip.models.checkpoint import save_checkpoint
from rayclip.store import Store
from rayclip.tracking.deliverer import Deliverer
from rayclip.tracking.experiment import Experiment
from rayclip.tracking.journal import Journal
from servers import HttpServer

LINEAGE = {"config": {"method": {"name": "tecoa"}, "model": "digits", "template": "This is a photo of a {}"}}


@pytest.fixture(scope="module")
def digits():
    return open_data("digits", "test")


def logbook(uri, folder):
    journal = Journal(Store(str(folder)))
    return Logbook(journal, Deliverer(journal, Experiment(uri, "a study")), "a study")


@pytest.fixture(scope="module")
def study(tmp_path_factory, digits):
    """Three checkpoints of a study, registered: the bundled model, one moved a little, one that is broken."""
    folder = tmp_path_factory.mktemp("study")
    uri, clip, prints = f"sqlite:///{folder}/mlflow.db", load_model("digits"), {}
    with logbook(uri, folder / "results") as log:
        for name, noise in (("bundled", 0.0), ("moved", 0.01), ("broken", 1.0)):
            torch.manual_seed(0)
            with torch.no_grad():
                for p in clip.model.parameters():
                    p.add_(torch.randn_like(p), alpha=noise)
            data = {"name": "digits", "fingerprint": digits.fingerprint, "class_names": list(digits.class_names)}
            save_checkpoint(clip, folder / name, {**LINEAGE, "data": data})
            log.checkpoint(log.open(name), folder / name, f"local-dir:{folder / name}", name)
            prints[name] = clip.fingerprint()
    return uri, folder, prints


@pytest.fixture
def client(study, monkeypatch):
    mlflow.set_tracking_uri(study[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", study[0])
    yield MlflowClient(study[0])
    mlflow.set_tracking_uri(None)


def files(data, positions) -> pd.DataFrame:
    """PNG files of some images."""
    contents = []
    for image in data.images(positions):
        image.save(buffer := io.BytesIO(), "PNG")
        contents.append(buffer.getvalue())
    return pd.DataFrame({"image": contents})


def test_every_checkpoint_is_a_version_once_and_says_what_it_is(study, client):
    versions = {v.tags["rayclip.name"]: v for v in client.search_model_versions("name = 'a study'")}
    assert set(versions) == {"bundled", "moved", "broken"} and len(client.search_model_versions("")) == 3
    for name, version in versions.items():
        assert version.tags["rayclip.model"] == study[2][name] and version.tags["rayclip.method"] == "tecoa"
        assert client.get_run(version.run_id).info.run_name == name and "tecoa" in version.description
    with logbook(study[0], study[1] / "results") as log:
        log.checkpoint(log.open("moved"), study[1] / "moved", f"local-dir:{study[1] / 'moved'}", "moved")
    assert len(client.search_model_versions("")) == 3


def test_mlflow_loads_it_and_it_answers_as_the_model_does(study, client, digits):
    (version,) = [v for v in client.search_model_versions("") if v.tags["rayclip.name"] == "bundled"]
    served = mlflow.pyfunc.load_model(f"models:/a study/{version.version}")
    positions = range(80)
    answers = served.predict(files(digits, positions))
    clip = load_model("digits")
    pixels = batch_pixels(digits, positions, "model", clip.image_size) / 255
    with torch.no_grad():
        expected = ZeroShot(clip, digits.class_names)(pixels).softmax(-1).numpy()
    np.testing.assert_allclose(np.stack(answers["probabilities"]), expected, atol=1e-5)
    assert list(answers["label"]) == [digits.class_names[i] for i in expected.argmax(-1)]
    assert (answers["label"] == [digits.class_names[digits.labels[i]] for i in positions]).mean() > 0.9
    other = served.predict(files(digits, [0, 1]), params={"class_names": ["three", "nought"], "template": "a {}"})
    assert set(other["label"]) <= {"three", "nought"} and len(other["probabilities"][0]) == 2
    assert served.metadata.signature.inputs.input_names() == ["image"]
    assert len(served.predict(pd.DataFrame({"image": pd.Series([], dtype=bytes)}))) == 0


@pytest.mark.parametrize(
    ("image", "params", "sentence"),
    [(b"no picture", {}, "cannot be read"), (None, {"template": "a photo"}, "has no {}")],
)
def test_a_bad_request_is_explained(study, client, digits, image, params, sentence):
    served = mlflow.pyfunc.load_model("models:/a study/1")
    rows = files(digits, [0]) if image is None else pd.DataFrame({"image": [image]})
    with pytest.raises(Exception, match=sentence):
        served.predict(rows, params=params)


def test_the_best_under_one_protocol_is_the_champion(study, client):
    uri, folder, prints = study
    journal = Journal(Store(str(folder / "ranks")))
    deliverer = Deliverer(journal, Experiment(uri, "a study"))
    content = {"parent": None, "params": {}, "tags": {}}
    journal.add("start", "key", name="evaluation", **content)

    def rank(protocol, accuracies):
        journal.add("rank", "key", protocol=protocol, accuracies=accuracies)
        assert deliverer.deliver() == 0 and deliverer.refused == []

    def champion() -> str:
        return client.get_model_version_by_alias("a study", "champion").tags["rayclip.name"]

    rank("one", {prints["broken"]: 10.0})
    assert champion() == "broken", "nothing else was measured"
    rank("one", {prints["bundled"]: 9.0, prints["moved"]: 40.0})
    assert champion() == "moved"
    rank("two", {prints["bundled"]: 5.0})
    assert champion() == "bundled", "by another protocol, under which the others were not measured"


class ServedModel(HttpServer):
    """`mlflow models serve`, as the description of the registered model says."""

    def command(self):
        command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/a study/1"]
        env = {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return [*command, "--env-manager", "local", "--port", str(self.port), "--workers", "1"], os.environ | env


@pytest.mark.e2e
def test_it_is_served_over_http(study, client, digits, tmp_path):
    server = ServedModel(tmp_path)
    try:
        server.start()
        rows = files(digits, [0, 1, 2])["image"]
        body = {"dataframe_split": {"columns": ["image"], "data": [[base64.b64encode(r).decode()] for r in rows]}}
        request = urllib.request.Request(
            f"{server.uri}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answers = json.load(response)["predictions"]
        assert [a["label"] for a in answers] == [digits.class_names[digits.labels[i]] for i in range(3)]
    finally:
        server.kill()
