"""The names of models in tables, which are unique."""

from rayclip.reports.model import Model, short_names


def made(fingerprint: str, spec: str, label: str, data: str = "") -> Model:
    lineage = {"data": {"name": data}} if data else {}
    return Model(fingerprint=fingerprint, spec=spec, label=label, lineage=lineage)


def test_a_label_of_several_models_is_followed_by_their_training_data():
    models = [made("a", "local-dir:m/1", "text loss only", "cifar10"), made("c", "local-dir:m/3", "mmcoa", "cifar10")]
    models += [made("b", "local-dir:m/2", "text loss only", "cifar100")]
    assert short_names(models) == {"a": "text loss only (cifar10)", "b": "text loss only (cifar100)", "c": "mmcoa"}


def test_names_are_as_long_as_it_takes_to_be_unique():
    one, two = (made(name, f"local-dir:{name}/m", f"local-dir:{name}/m") for name in "ab")
    assert short_names([one]) == {"a": "m"}
    assert short_names([one, two]) == {"a": "local-dir:a/m", "b": "local-dir:b/m"}
    alike = [made(name, f"local-dir:{name}/m", "mmcoa", "cifar10") for name in "ab"]
    assert short_names(alike) == {"a": "local-dir:a/m", "b": "local-dir:b/m"}
    assert set(short_names([made("a1", "m", "m"), made("b2", "m", "m")]).values()) == {"m (a1)", "m (b2)"}
