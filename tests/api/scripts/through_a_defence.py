"""A defended classifier, attacked blindly and through its defence: only the second figure is a lower bound."""

import torch

import rayclip
from rayclip.data import batch_pixels, open_data

data = open_data("digits", "test")
images, labels = batch_pixels(data, range(24), "native", 8).float() / 255, torch.as_tensor(data.labels[:24])
bare = rayclip.load("digits").zero_shot(data.class_names)
defended = bare.behind("ttc:eps=16/255,tau=1")
assert defended.defense.startswith("ttc") and bare.defense == "none"

plain = rayclip.attack(bare, images, labels, "pgd:steps=5,stop=final", eps="24/255")
blind = rayclip.attack(defended, images, labels, "pgd:steps=5", eps="24/255")
through = rayclip.attack(defended, images, labels, "pgd:steps=5", eps="24/255", aim="bpda")
assert torch.equal(plain.images, blind.images)  # which does not see the defence, and runs to its last step
assert blind.success.sum() < plain.success.sum()  # which mends some of these images
assert not torch.equal(blind.images, through.images)
assert through.success.sum() > blind.success.sum()  # but not those that were made for it

# A random defence draws anew at each query of the attack, and once for all when it judges
noisy = bare.behind("rn:eps=8/255+tte")
one, two = (rayclip.attack(noisy, images[:4], labels[:4], "pgd:steps=2", eps="8/255", aim="bpda") for _ in range(2))
assert torch.equal(one.images, two.images) and torch.equal(one.logits, two.logits)
assert torch.equal(noisy(one.images), one.logits)
