"""Words of tables: headers of columns, and the notes below that state the protocol of the numbers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rayclip.reports.section import Attack, Section
from rayclip.types import WORST, Cut

# Settings of an attack that are listed below a table; others are in its label, and all are in the result files
SHOWN = (
    "parts iterations restarts targets queries steps step norm start stop substitutes k n constrain changes offset "
    "objective sets captions source scales noise"
).split()


def heading(attack: str) -> str:
    """Return an attack's label as a column header.

    `pgd-10_eps4_bpda` -> `pgd-10 bpda 4/255`; `pgd-10_eps4 stop final` -> `pgd-10 stop final 4/255`; `worst_eps4` ->
    `worst case 4/255`.
    """
    label, _, settings = attack.partition(" ")
    name, separator, rest = label.partition("_eps")
    if name in (WORST, f"{WORST}_l2"):
        name = name.replace(WORST, f"{WORST} case")
    eps, _, aim = rest.partition("_")
    shown = (name.replace("_", " "), aim, settings, f"{eps}/255") if separator else (name, settings)
    return " ".join(filter(None, shown))


def under(attack: Attack) -> str:
    """Return `under pgd-10 1/255` or `in the worst case within 1/255`."""
    if attack.kind != "worst":
        return f"under {heading(attack.label)}"
    return "in the worst case" + (f" within {'l2 ' if attack.norm == 'l2' else ''}{attack.eps}" if attack.eps else "")


class Varying(dict[str, Any]):
    """A setting that differs between data sets: its value by data set."""

    def __str__(self) -> str:
        """Format as `apgd-ce on pcam; apgd-ce, apgd-dlr on cifar10, stl10`."""
        sharing: dict[str, list[str]] = {}
        for dataset, value in self.items():
            sharing.setdefault(str(value), []).append(dataset)
        return "; ".join(f"{value} on {', '.join(datasets)}" for value, datasets in sharing.items())


def merge_protocols(protocols: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Merge one attack's protocols on several data sets: settings that differ become `Varying`."""
    keys = dict.fromkeys(key for protocol in protocols.values() for key in protocol)
    found: dict[str, Any] = {}
    for key in keys:
        values = {dataset: protocol[key] for dataset, protocol in protocols.items() if key in protocol}
        first = next(iter(values.values()))
        alike = len(values) == len(protocols) and all(value == first for value in values.values())
        found[key] = first if alike else Varying(values)
    return found


def group_equal(described: Iterable[tuple[str, str]]) -> list[str]:
    """Group names with equal settings: `NAME, NAME: SETTINGS`."""
    sharing: dict[str, list[str]] = {}
    for name, settings in described:
        sharing.setdefault(settings, []).append(name)
    return [f"{', '.join(names)}: {settings}" for settings, names in sharing.items()]


def resolution_note(protocol: Mapping[str, Any]) -> str:
    """Return `model resolution`, or, for example, `native resolution (plain resize)`."""
    note = f"{protocol['resolution']} resolution"
    return f"{note} ({protocol.get('resize') or 'antialias'} resize)" if protocol["resolution"] == "native" else note


def shared_note(section: Section) -> str:
    """Return the settings that all numbers of a section share."""
    shared, precisions = section.shared, _precisions(section)
    precision = f"{next(iter(precisions))}, " if len(precisions) == 1 else ""
    return (
        f"prompt '{shared['template']}', {shared.get('class_names') or 'curated'} class names, "
        f"{resolution_note(shared)}, {precision}seed {shared['seed']}"
    )


def _precisions(section: Section) -> set[str]:
    return {entry.protocol.get("precision", "fp32") for entry in section.entries.values() if entry.protocol}


def attack_notes(section: Section, attacks: Sequence[Attack], datasets: Sequence[str]) -> list[str]:
    """Return notes with the settings of each attack, and on which models and data sets they differ."""
    plain, worst = [], []
    for attack in attacks:
        if attack.kind == "worst":
            of = ", ".join(heading(label) for label in attack.settings["of"] if label != "clean")
            worst.append(f"{heading(attack.label)}: right under every one of {of}, per sample")
        else:
            plain += _settings_of(section, attack, datasets)
    return [*group_equal(plain), *worst]


def _settings_of(section: Section, attack: Attack, datasets: Sequence[str]) -> list[tuple[str, str]]:
    """Return (attack, settings) pairs; one, unless settings differ between models or data sets."""
    several = len(_precisions(section)) > 1
    described: dict[str, dict[str, list[str]]] = {}  # settings -> kind of model -> data sets
    for subject in section.subjects:
        for dataset in datasets:
            entry = section.get(subject, dataset, attack)
            if entry is None:
                continue
            settings = [f"{k} {v}" for k, v in entry.protocol.items() if k in SHOWN]
            settings += [entry.protocol.get("precision", "fp32")] * several
            where = "defended models" if subject.defense != "none" else "undefended models"
            held = described.setdefault(", ".join(settings), {}).setdefault(where, [])
            held += [dataset] if dataset not in held else []
    everywhere = {d for by_whom in described.values() for datasets in by_whom.values() for d in datasets}
    everyone = {who for by_whom in described.values() for who in by_whom}
    found = []
    for kept, by_whom in described.items():
        only = f" on {next(iter(by_whom))}" if len(described) > 1 and len(by_whom) == 1 else ""
        held = list(dict.fromkeys(d for datasets in by_whom.values() for d in datasets))
        if len(held) < len(everywhere):  # some attacks change their parts on few classes
            only = f" on {', '.join(held)}" if len(by_whom) == len(everyone) else f"{only}, {', '.join(held)}"
        found += [(f"{heading(attack.label)}{only}", kept)] if kept else []
    return found


def defense_notes(section: Section) -> list[str]:
    """Return notes on the defences, and on how attacks treat them; none without a defence."""
    described, draws, judgements = {}, 1, 1
    for (subject, _, _), entry in section.entries.items():
        if subject.defense != "none" and entry.protocol:
            described[subject.defense] = str(entry.protocol.get("defense"))
            draws = max(draws, entry.protocol.get("draws", 1))
            judgements = max(judgements, entry.protocol.get("judgements", 1))
    notes = [f"{label}: {whole}" for label, whole in described.items() if whole != label]
    if described:
        notes.append("Attacks ignore the defence unless a column says how they go through it")
    notes += [f"Through a random defence each query averages {draws} draws"] * (draws > 1)
    return notes + [f"Behind a random defence an image is right if all of {judgements} judgements are"] * (
        judgements > 1
    )


def cut_notes(found: Iterable[tuple[str, Cut]]) -> list[str]:
    """Return notes about truncated texts by owner, such as a model: the most of its counts; once if all are equal."""
    counts: dict[str, Cut] = {}
    for owner, cut in found:
        before = counts.get(owner, Cut())
        counts[owner] = Cut(max(cut.texts, before.texts), max(cut.substitutes, before.substitutes))
    notes = []
    kinds = {
        "texts": "cut at the context length of the text encoder",
        "substitutes": "not read to the end by the masked language model",
    }
    for which, what in kinds.items():
        each = {owner: getattr(cut, which) for owner, cut in counts.items()}
        if len(set(each.values())) > 1:
            notes.append(f"texts {what}: " + ", ".join(f"{owner} {count}" for owner, count in each.items() if count))
        elif any(each.values()):
            count = next(iter(each.values()))
            notes.append(f"{count:,} {'text is' if count == 1 else 'texts are'} {what}")
    return notes
