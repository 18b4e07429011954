"""`rayclip.attack` beside torchattacks and foolbox, run here: on digits, and on a small CNN that is no CLIP."""

import foolbox
import pytest
import torch
import torchattacks
from torch import nn

import rayclip
from rayclip.data import batch_pixels, open_data

COUNT, FOR_FAB = 32, 16
EPS, STEP, STEPS = 24 / 255, 4 / 255, 10
EPS_2, STEP_2 = 0.6, 0.12


def digits(split: str) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    data = open_data("digits", split)
    images = batch_pixels(data, range(len(data)), "native", 8).float() / 255
    return images, torch.as_tensor(data.labels), data.class_names


def small_cnn() -> nn.Module:
    """A CNN as torchvision builds them, after five epochs on the digits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )
    images, labels, _ = digits("train")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(5):
        for at in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[at]), labels[at]).backward()
            optimizer.step()
    return model.eval()


class Module(nn.Module):
    """A zero-shot classifier as other tool boxes want it."""

    def __init__(self, classifier: rayclip.Classifier) -> None:
        super().__init__()
        self.clip, self.classifier = classifier.model.clip, classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(images)


@pytest.fixture(scope="module", params=["digits", "cnn"])
def case(request):
    """What rayclip attacks, the same for the others, and images that are classified right."""
    images, labels, names = digits("test")
    ours = rayclip.load("digits").zero_shot(names) if request.param == "digits" else small_cnn()
    module = Module(ours).eval() if request.param == "digits" else ours
    with torch.no_grad():
        right = (module(images).argmax(1) == labels).nonzero().squeeze(1)[:COUNT]
    assert len(right) == COUNT
    return ours, module, images[right], labels[right]


def by_torchattacks(kind, module, images, labels, **settings):
    return getattr(torchattacks, kind)(module, **settings)(images, labels)


def by_foolbox(kind, module, images, labels, eps, step):
    attack = getattr(foolbox.attacks, kind)(abs_stepsize=step, steps=STEPS, random_start=False)
    raw, *_ = attack(foolbox.PyTorchModel(module, bounds=(0, 1), device="cpu"), images, labels, epsilons=[eps])
    return raw[0]


PGD = f"pgd:steps={STEPS},step={STEP},start=zero,stop=final"
PGD_2 = f"pgd-l2:steps={STEPS},step={STEP_2},start=zero,stop=final"
RUNS = {
    "torchattacks l_inf": (
        PGD,
        EPS,
        lambda *c: by_torchattacks("PGD", *c, eps=EPS, alpha=STEP, steps=STEPS, random_start=False),
    ),
    "foolbox l_inf": (PGD, EPS, lambda *c: by_foolbox("LinfPGD", *c, EPS, STEP)),
    "torchattacks l_2": (
        PGD_2,
        EPS_2,
        lambda *c: by_torchattacks("PGDL2", *c, eps=EPS_2, alpha=STEP_2, steps=STEPS, random_start=False),
    ),
    "foolbox l_2": (PGD_2, EPS_2, lambda *c: by_foolbox("L2PGD", *c, EPS_2, STEP_2)),
}


@pytest.mark.parametrize("run", RUNS)
def test_pgd_is_the_same_image_by_image(case, run):
    ours, module, images, labels = case
    name, eps, others = RUNS[run]
    found, theirs = rayclip.attack(ours, images, labels, name, eps=eps), others(module, images, labels)
    with torch.no_grad():
        broken = module(theirs).argmax(1) != labels
    assert torch.equal(found.success, broken) and 3 < broken.sum() < COUNT - 3
    assert ((found.images - theirs).abs() < 1e-3).float().mean() > 0.99


@pytest.mark.ci
@pytest.mark.parametrize(("norm", "eps"), [("Linf", EPS), ("L2", EPS_2)])
def test_fab_breaks_the_same_images(case, norm, eps):
    ours, module, images, labels = case
    images, labels = images[:FOR_FAB], labels[:FOR_FAB]
    theirs = by_torchattacks(
        "FAB", module, images, labels, norm=norm, eps=eps, steps=10, multi_targeted=True, n_classes=10
    )
    with torch.no_grad():
        broken = module(theirs).argmax(1) != labels
    name = f"fab-t:iterations=10,norm={'linf' if norm == 'Linf' else 'l2'}"
    found = rayclip.attack(ours, images, labels, name, eps=eps)
    assert torch.equal(found.success, broken) and 1 < broken.sum() < FOR_FAB - 1, (found.success, broken)
