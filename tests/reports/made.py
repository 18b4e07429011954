"""Result folders with verdicts that a test chooses, in the files that an evaluation writes."""

import hashlib

import numpy as np

from rayclip.store import Store

SHARED = {
    "seed": 0,
    "resolution": "native",
    "class_names": "curated",
    "template": "a {}",
    "scorer": "template",
    "defense": "none",
    "precision": "fp32",
    "protocol": 2,
}
CLEAN = ("clean", {"attack": "clean"})


def pgd(eps="1/255", steps=10, **changes):
    label = f"pgd-{steps}_eps{eps.removesuffix('/255')}"
    settings = {"attack": "pgd", "eps": eps, "steps": steps, "step": "1/255", "norm": "linf", "start": "random"}
    return label, {**settings, "stop": "final", **changes}


BERT = ("bert", {"attack": "bert", "substitutes": "clip-table", "k": 10, "changes": 1})
SEP = ("sep_pgd-10_eps1", {**pgd()[1], "attack": "sep", "substitutes": "clip-table", "k": 10, "changes": 1})


def fingerprint(name):
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def put(
    root,
    model,
    attack,
    right,
    *,
    dataset="set",
    positions=None,
    defense="none",
    shard=7,
    confidence=None,
    note=None,
    **changes,
):
    """Write a cell in shards of `shard` samples; `right` are bools in the order of `positions`, `confidence` numbers,
    and `note` the timing of each shard, or None as in results of older versions."""
    store = Store(str(root))
    label, settings = attack
    right = np.asarray(right)
    positions = np.arange(len(right)) if positions is None else np.asarray(positions)
    protocol = {**SHARED, **settings, "defense": defense, **changes}
    cell = fingerprint(f"{model} {dataset} {label} {defense} {sorted(protocol.items())}")
    record = {
        "model": model,
        "model_fingerprint": fingerprint(model),
        "data": dataset,
        "dataset": dataset,
        "data_fingerprint": fingerprint(dataset),
        "class_names": ["zero", "one", "two"],
        "attack_label": label,
        "defense_label": defense,
        "scorer_label": protocol["scorer"],
        "protocol": protocol,
    }
    store.write_json(f"cells/{cell}/cell.json", record)
    labels = positions % 3
    for first in range(0, len(right), shard):
        part = slice(first, first + shard)
        columns = {
            "position": positions[part],
            "label": labels[part],
            "clean_pred": labels[part],
            "adv_pred": np.where(right[part], labels[part], labels[part] + 1),
            "linf": np.zeros(len(labels[part]), np.float32),
        }
        if confidence is not None:
            columns["adv_confidence"] = np.asarray(confidence, np.float32)[part]
        store.write_table(f"cells/{cell}/{first:08d}.parquet", columns, note)
    return cell


def describe(root, model, *, label=None, method=None, shots=None, data="digits", base="digits", **lineage):
    """Write the record of a model."""
    config = {"model": base, "data": data, "shots": shots, "method": {"name": method}}
    found = {"config": config, "data": {"name": data}, **lineage} if method else None
    record = {"model": model, "label": label, "lineage": found}
    Store(str(root)).write_json(f"lineage/{fingerprint(model)}.json", record)


def bits(seed, n=50, p=0.5):
    return np.random.default_rng(seed).random(n) < p
