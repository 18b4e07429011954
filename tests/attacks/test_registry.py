"""`rayclip attacks` names every attack with a line of its own and settings that parse back."""

from calling import call
from rayclip.attacks import ATTACKS, parse_attacks
from rayclip.settings import format_defaults


def test_every_attack_has_a_line_and_defaults_that_parse(monkeypatch, capsys):
    lines = {ATTACKS.about(name) for name in ATTACKS}
    assert len(lines) == len(ATTACKS) and "" not in lines
    for name, kind in ATTACKS.items():
        given = {"transfer": {"source": "digits"}, "uap": {"file": "uap.npy"}}.get(name, {})
        settings = {k: v for k, v in format_defaults(kind).items() if v not in ("None", "…")} | given
        written = ",".join(f"{k}={v}" for k, v in settings.items())
        (parsed,) = parse_attacks(f"{name}:{written}" if written else name, {})
        assert parsed == kind(**given)
    code, out, err = call(monkeypatch, capsys, "attacks")
    assert code == 0 and err == ""
    assert all(f"\n{name} " in out for name in ATTACKS)
