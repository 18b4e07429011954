"""Pictures in any size, from a DataLoader: they are made as large as the model's input, and attacked."""

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import rayclip
from rayclip.data import open_data


class Pictures(Dataset):
    """Digits as photographs of several sizes."""

    def __init__(self) -> None:
        self.data = open_data("digits", "test")

    def __len__(self) -> int:
        return 24

    def __getitem__(self, place):
        (image,) = self.data.images([place])
        return image.resize((16 + place % 3,) * 2, Image.Resampling.BICUBIC), int(self.data.labels[place])


pictures = Pictures()
classifier = rayclip.load("digits").zero_shot(pictures.data.class_names)
found = {}
for size in (5, 24):  # as many at a time as one likes
    loader = DataLoader(pictures, batch_size=size, collate_fn=list)
    found[size] = rayclip.attack(classifier, loader, attack="pgd:steps=10", eps="24/255", resolution="model")
assert found[5].images.shape == (24, 3, 8, 8) and found[5].labels.tolist() == [pictures[i][1] for i in range(24)]
assert torch.equal(found[5].success, found[24].success) and torch.allclose(found[5].images, found[24].images, atol=1e-6)
assert (found[5].clean_logits.argmax(1) == found[5].labels).float().mean() > 0.7
assert found[5].success.float().mean() > 0.8

# A list of pictures of one size stays at that size
some = [pictures[place] for place in range(0, 24, 3)]
alike = rayclip.attack(classifier, [image for image, _ in some], [label for _, label in some], "fgsm", eps="24/255")
assert alike.images.shape == (8, 3, 16, 16)
