"""One evaluation of three protocols of the field, made small: `python three_protocols.py OUT cluster|here`."""

import sys

from rayclip import api
from rayclip.cli.request import Request
from rayclip.names import find_protocol

SMALL = {
    "tecoa": {"attacks": ["clean,pgd:stop=final,cw:stop=final,autoattack-seeds:iterations=2"], "steps": 5},
    "robustvlm": {"attacks": ["clean,apgd-ce+apgd-t:iterations=2"], "resolution": "native:digits,clip"},
    "coop": {"steps": 5},
}
ALL = {"data": ["digits"], "limit": 12, "eps": ["32/255"], "defense": ["none,rn"]}


def evaluate(out: str, cluster: bool | None) -> None:
    asked = [
        Request(model=["digits"], out=out, protocol=name, **find_protocol(name) | ALL | changes)
        for name, changes in SMALL.items()
    ]
    where = api.Where(out=out, cluster=cluster, quiet=True)
    api.compare("three protocols", {"digits": "digits"}, [one.evaluation for one in asked], where)


if __name__ == "__main__":
    evaluate(sys.argv[1], True if sys.argv[2] == "cluster" else None)
