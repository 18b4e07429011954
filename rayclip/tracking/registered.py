"""Register checkpoints as versions of MLflow models: with a signature, without pickles, the best one as `champion`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayclip import __version__
from rayclip.models.checkpoint import FILES
from rayclip.paths import temporary_folder
from rayclip.tracking.experiment import Experiment
from rayclip.tracking.names import model_name

LOADER = "rayclip.tracking.serving"
CHAMPION = "champion"
FINGERPRINT, PROTOCOL, WORST = "rayclip.model", "rayclip.protocol", "rayclip.worst"  # tags of a version


def register(experiment: Experiment, run: str, checkpoint: Path, folder: str, about: Mapping[str, Any]) -> None:
    """Log a checkpoint as an MLflow model in `folder` of its run's artifacts, and register it, once.

    It is a version of the model with the experiment's name; `about` has its `class_names`, `template`, `description`,
    `tags`.
    """
    client = experiment.client
    name = model_name(experiment.name)
    if any(v.source.endswith(f"/{folder}") for v in client.search_model_versions(f"run_id = '{run}'")):
        return
    for file in (checkpoint / name for name in FILES if (checkpoint / name).exists()):
        experiment.artifact(run, file, f"{folder}/data")
    with temporary_folder() as place:
        _write_model(place, run, folder, about["class_names"], about["template"])
        experiment.artifact(run, place, folder)
    _make_registered(client, name, experiment.name)
    source = f"{client.get_run(run).info.artifact_uri}/{folder}"
    client.create_model_version(
        name, source, run_id=run, tags=about["tags"], description=about["description"], await_creation_for=0
    )


def rank(experiment: Experiment, protocol: str, accuracies: Mapping[str, float]) -> None:
    """Tag model versions with their worst-case accuracies, in percent by fingerprint; make the best of each its
    champion.

    Only versions with the same `protocol`, a hash, are compared.
    """
    client = experiment.client
    names = set()
    for fingerprint, accuracy in accuracies.items():
        for version in client.search_model_versions(f"tags.`{FINGERPRINT}` = '{fingerprint}'"):
            client.set_model_version_tag(version.name, version.version, WORST, f"{accuracy:.4f}")
            client.set_model_version_tag(version.name, version.version, PROTOCOL, protocol)
            names.add(version.name)
    for name in names:
        versions = client.search_model_versions(f"tags.`{PROTOCOL}` = '{protocol}'")
        measured = [v for v in versions if v.name == name]  # not in the query: a name may hold a quotation mark
        best = max(measured, key=lambda v: (float(v.tags[WORST]), -int(v.version)))  # ties: the older one
        client.set_registered_model_alias(name, CHAMPION, best.version)


def _make_registered(client: Any, name: str, study: str) -> None:
    from mlflow.exceptions import MlflowException

    about = (
        f"Checkpoints of the study '{study}', a version each. `{CHAMPION}` is the one with the best worst-case "
        f"accuracy (tag `{WORST}`, percent) of those that were measured by one protocol (tag `{PROTOCOL}`).\n\n"
        f'`mlflow.pyfunc.load_model("models:/{name}@{CHAMPION}")` classifies images zero-shot; '
        f"`mlflow models serve -m models:/{name}@{CHAMPION} --env-manager local` does so over HTTP."
    )
    try:
        client.create_registered_model(name, description=about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _write_model(place: Path, run: str, folder: str, class_names: Sequence[str], template: str) -> None:
    """Write MLflow's description (`MLmodel`) of a model whose files are in `data` beside it."""
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    text, number = DataType.string, DataType.double
    label, probability = ColSpec(text, "label"), ColSpec(number, "probability")
    names = ParamSpec("class_names", text, list(class_names), shape=(-1,))
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([label, probability, ColSpec(Array(number), "probabilities")]),
        params=ParamSchema([names, ParamSpec("template", text, template)]),
    )
    model = Model(artifact_path=folder, run_id=run, signature=signature)
    pyfunc.add_to_model(model, loader_module=LOADER, data="data")
    model.save(str(place / "MLmodel"))
    (place / "requirements.txt").write_text(f"rayclip=={__version__}\n", encoding="utf-8")
