"""Names that a shell completes, where nothing heavy is imported: what they stand for is in the registries."""

ATTACKS_ABOUT = {
    "clean": "no attack",
    "fgsm": "one step of eps along the gradient's sign (Goodfellow et al. 2015)",
    "pgd": "steps along the gradient of the cross-entropy, l_inf or l_2 (Madry et al. 2018)",
    "pgd-l2": "PGD in an l_2 ball",
    "cw": "PGD on the logit margin (Carlini & Wagner 2017)",
    "apgd-ce": "PGD that chooses its step by itself, on the cross-entropy (Croce & Hein 2020)",
    "apgd-dlr": "the same on the difference of logits ratio",
    "apgd-t": "the same on the targeted DLR, toward each of the likeliest wrong classes",
    "fab-t": "looks for the nearest misclassified image (Croce & Hein 2020)",
    "square": "random search over square windows, by scores alone (Andriushchenko et al. 2020)",
    "autoattack": "APGD-CE, APGD-T, FAB-T and Square, each on what survives (Croce & Hein 2020)",
    "autoattack-seeds": "APGD-CE and APGD-DLR, as SAFT and TTC run it",
    "feature": "moves the image's embedding away from the clean one (FARE, TTC; AdvPT)",
    "semantic": "against several captions a class at once (SAFT)",
    "transfer": "made on another model, judged on this one",
    "bert": "BERT-Attack: changes words of the class prompts (Li et al. 2020)",
    "co-attack": "prompts first, then the image away from itself and from them (Zhang et al. 2022)",
    "sga": "prompts and image guided by each other, over scales (Lu et al. 2023)",
    "sep": "image and prompts attacked on their own, judged together (MMCoA's multimodal attack)",
}

DEFENSES_ABOUT = {
    "ttc": "counterattacks images that an attack made falsely stable (Xing et al. 2025)",
    "rn": "uniform noise",
    "tte": "mean prediction over the image, four crops and their mirror images (Pérez et al. 2021)",
    "anti-adversary": "two steps that make the predicted class surer (Alfarra et al. 2022)",
    "hedge": "steps that raise the loss of all classes together (Wu et al. 2021)",
}

METHODS = ("ft-standard", "tecoa", "pmg-aft", "fare", "tga-zsr", "saft", "mmcoa", "advpt", "vp")

DATASETS = (
    "digits",
    "cifar10",
    "cifar100",
    "stl10",
    "imagenet",
    "caltech101",
    "caltech256",
    "oxford_pets",
    "flowers102",
    "fgvc_aircraft",
    "stanford_cars",
    "food101",
    "sun397",
    "country211",
    "eurosat",
    "dtd",
    "pcam",
    "tiny_imagenet",
    "mscoco_captions",
    "flickr30k",
    "flickr8k",
)
