"""The formulas, written out loop by loop and sample by sample: slow, plain, and without a line of the package's.

They take a model's two encoders as functions and return what the package must agree with.
"""

import math
from fractions import Fraction

import torch

M0, M1, W0, W1, MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def philox_words(key: int, count: int, stream: int = 0) -> list[int]:
    """Philox4x32-10 with Python's integers: words of the blocks (0, stream, 0, 0), (1, stream, 0, 0), ..."""
    words: list[int] = []
    for block in range(-(-count // 4)):
        c, k0, k1 = [block, stream, 0, 0], key & MASK, key >> 32 & MASK
        for _ in range(10):
            a, b = M0 * c[0], M1 * c[2]
            c = [(b >> 32) ^ c[1] ^ k0, b & MASK, (a >> 32) ^ c[3] ^ k1, a & MASK]
            k0, k1 = k0 + W0 & MASK, k1 + W1 & MASK
        words += c
    return words[:count]


def uniforms(key: int, shape: tuple[int, ...], stream: int = 0) -> torch.Tensor:
    values = [(w >> 8) / 2**24 for w in philox_words(key, math.prod(shape), stream)]
    return torch.tensor(values, dtype=torch.float64).view(shape)


def cross_entropy(scores: list[float], label: int) -> float:
    top = max(scores)
    return math.log(sum(math.exp(s - top) for s in scores)) + top - scores[label]


def scores(image: torch.Tensor, texts: torch.Tensor, scale: float) -> list[float]:
    """s · <f, t_c> for unnormalised vectors, one by one."""
    f = image / image.pow(2).sum().sqrt()
    return [float(scale * sum(f[d] * (t / t.pow(2).sum().sqrt())[d] for d in range(len(f)))) for t in texts]


def predict(encode, texts, scale, x) -> int:
    values = scores(encode(x[None])[0].detach(), texts, scale)
    return max(range(len(values)), key=values.__getitem__)


def pgd(encode, texts, scale, x, y, *, key, eps, step, steps, norm, start, stop):
    """One image (C, H, W), one step at a time. Returns the adversarial image and the number of steps behind it."""
    if predict(encode, texts, scale, x) != y:
        return x, 0
    d = torch.zeros_like(x)
    if start == "random" and norm == "linf":
        d = (2 * uniforms(key, tuple(x.shape)) - 1) * eps
    elif start == "random":
        u1, u2 = uniforms(key, tuple(x.shape)), uniforms(key, tuple(x.shape), 1)
        gauss = (-2 * (1 - u1).log()).sqrt() * (2 * math.pi * u2).cos()
        d = gauss / gauss.pow(2).sum().sqrt() * uniforms(key, (1,), 2) * eps
    d = torch.clamp(d, -x, 1 - x)
    done = 0
    while True:
        if stop == "first_success" and predict(encode, texts, scale, x + d) != y:
            return x + d, done
        if done == steps:
            return x + d, done
        z = (x + d).requires_grad_()
        f = encode(z[None])[0]
        f = f / f.pow(2).sum().sqrt()
        logits = torch.stack([scale * (f * t / t.pow(2).sum().sqrt()).sum() for t in texts])
        loss = torch.logsumexp(logits, 0) - logits[y]
        g = torch.autograd.grad(loss, z)[0]
        if norm == "linf":
            d = torch.clamp(d + step * g.sign(), -eps, eps)
        else:
            d = d + step * g / g.pow(2).sum().sqrt()
            length = d.pow(2).sum().sqrt()
            if length > eps:
                d = d / length * eps
        d = torch.clamp(d, -x, 1 - x)
        done += 1


def margin(z: list, y: int):
    return z[y] - max(z[j] for j in range(len(z)) if j != y)


def dlr(z: list, y: int):
    down = sorted(z, reverse=True)
    return -margin(z, y) / (down[0] - down[2])


def targeted_dlr(z: list, y: int, t: int):
    down = sorted(z, reverse=True)
    return -(z[y] - z[t]) / (down[0] - 0.5 * (down[2] + down[3]))


def cw(z: list, y: int):
    return -max(margin(z, y) + 50, 0)


def apgd_checkpoints(n: int) -> list[int]:
    """w_0 = 0, w_1, ..., each once."""
    p = [Fraction(0), Fraction(22, 100)]
    while p[-1] <= 1:
        p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
    return sorted({math.ceil(q * n) for q in p if q <= 1})


def apgd(logits, loss, clean, x0, y, *, eps, n, norm):
    """Algorithm 1 of Croce & Hein 2020 on one image (C, H, W), line by line.

    `logits(x)` and `loss(z)` are differentiable. Returns the points where f was looked at, the iterations in which the
    step was halved, and x_max, f_max. Ends at the first point that is misclassified.
    """

    def P(v):  # noqa: N802 (the paper's P_S)
        d = v - clean
        if norm == "linf":
            d = torch.clamp(d, -eps, eps)
        elif d.pow(2).sum().sqrt() > eps:
            d = d / d.pow(2).sum().sqrt() * eps
        return torch.clamp(clean + d, 0, 1)

    def look(v):
        """f, the step's direction, and whether v is misclassified."""
        v = v.clone().requires_grad_()
        z = logits(v)
        value = loss(z)
        g = torch.autograd.grad(value, v)[0]
        s = g.sign() if norm == "linf" else g / g.pow(2).sum().sqrt()
        return value.item(), s, max(range(len(z)), key=[a.item() for a in z].__getitem__) != y

    points, halved = [x0], []
    f0, s0, broken = look(x0)
    x, f, s, eta, fmax = {0: x0}, {0: f0}, {0: s0}, {0: 2 * eps}, {0: f0}
    best = (f0, x0, s0)
    if broken:
        return points, halved, best[1], best[0], True
    w = apgd_checkpoints(n)
    for k in range(n):
        z = P(x[k] + eta[k] * s[k])
        x[k + 1] = z if k == 0 else P(x[k] + 0.75 * (z - x[k]) + 0.25 * (x[k] - x[k - 1]))
        points.append(x[k + 1])
        f[k + 1], s[k + 1], broken = look(x[k + 1])
        if broken:
            return points, halved, x[k + 1], f[k + 1], True
        if f[k + 1] > best[0]:
            best = (f[k + 1], x[k + 1], s[k + 1])
        fmax[k + 1], eta[k + 1] = best[0], eta[k]
        if k in w and k > 0:
            before = w[w.index(k) - 1]
            first = sum(f[i + 1] > f[i] for i in range(before, k)) < 0.75 * (k - before)
            second = eta[before] == eta[k] and fmax[before] == fmax[k]
            if first or second:
                halved.append(k)
                eta[k + 1] = eta[k] / 2
                x[k + 1], s[k + 1] = best[1], best[2]
    return points, halved, best[1], best[0], False


def start(key, clean, eps, norm, stream):
    """A random start in the ball, cut to the image range."""
    if norm == "linf":
        d = (2 * uniforms(key, tuple(clean.shape), stream) - 1) * eps
    else:
        u1, u2 = uniforms(key, tuple(clean.shape), stream), uniforms(key, tuple(clean.shape), stream + 1)
        gauss = (-2 * (1 - u1).log()).sqrt() * (2 * math.pi * u2).cos()
        d = gauss / gauss.pow(2).sum().sqrt() * uniforms(key, (1,), stream + 2) * eps
    return torch.clamp(clean + d, 0, 1)


def resize_and_pad(image, share, left, top):
    """DI's warp of an image (C, H, W), pixel by pixel: `share` of the canvas, offsets as shares of it; bilinear."""
    h, w = image.shape[1:]
    out = torch.zeros_like(image)
    for i in range(h):
        for j in range(w):
            y = ((i + 0.5) / h - top) / share * h - 0.5
            x = ((j + 0.5) / w - left) / share * w - 0.5
            for a in (math.floor(y), math.floor(y) + 1):
                for b in (math.floor(x), math.floor(x) + 1):
                    if 0 <= a < h and 0 <= b < w:
                        out[:, i, j] += image[:, a, b] * (1 - abs(y - a)) * (1 - abs(x - b))
    return out


def contrastive(images, texts, labels, scale, targets) -> torch.Tensor:
    """Mean over pairs of CE(i→t) + CE(t→i), entry by entry, differentiable."""
    n = len(labels)
    f, t = [unit(v) for v in images], [unit(v) for v in texts]
    total = 0
    for i in range(n):
        positives = [i] if targets == "diagonal" else [j for j in range(n) if labels[j] == labels[i]]
        rows = [scale * (f[i] * t[j]).sum() for j in range(n)]
        columns = [scale * (f[j] * t[i]).sum() for j in range(n)]
        for scores in (rows, columns):
            whole = torch.logsumexp(torch.stack(scores), 0)
            total = total + sum(whole - scores[j] for j in positives) / len(positives)
    return total / n


def softmax(v: torch.Tensor) -> list[float]:
    top = max(v.tolist())
    e = [math.exp(a - top) for a in v.tolist()]
    return [a / sum(e) for a in e]


def kl(p_vector: torch.Tensor, q_vector: torch.Tensor) -> float:
    return sum(p * (math.log(p) - math.log(q)) for p, q in zip(softmax(p_vector), softmax(q_vector), strict=True))


def bert_attack(
    embed, prompt: str, substitutes, stop_words, changes: int = 1, guide: torch.Tensor | None = None
) -> str:
    """One prompt, one forward per masked word and per candidate.

    `embed(text)` gives a normalised embedding; `substitutes(words, i)` the candidates for word i, best first. With a
    normalised image embedding as `guide` the candidate least similar to it is taken (SGA).
    """
    words = prompt.lower().split()
    clean = embed(" ".join(words))
    importance = []
    for i in range(len(words)):
        masked = [*words[:i], "[UNK]", *words[i + 1 :]]
        importance.append((-kl(clean, embed(" ".join(masked))), i))
    current, changed = list(words), 0
    for _, i in sorted(importance):
        if changed == changes:
            break
        if words[i] in stop_words or not any(c.isalnum() for c in words[i]):
            continue
        best, most = None, -math.inf
        for candidate in substitutes(words, i):
            new = embed(" ".join([*current[:i], candidate, *current[i + 1 :]]))
            gain = kl(clean, new) if guide is None else -float((guide * new).sum())
            if gain > most:
                best, most = candidate, gain
        if best is not None:
            current[i] = best
            changed += 1
    return " ".join(current)


CHARACTERS = [chr(code) for code in range(32, 127)]


def edits(text: str, characters: list[str]) -> set[str]:
    """Every text that one insertion, replacement or deletion makes of a text."""
    cuts = [(text[:i], text[i:]) for i in range(len(text) + 1)]
    inserted = {a + c + b for a, b in cuts for c in characters}
    replaced = {a + c + b[1:] for a, b in cuts if b for c in characters if c != b[0]}
    return inserted | replaced | {a + b[1:] for a, b in cuts if b}


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's, by its recursion."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def leaf_step(gain, text: str, places: list[int], characters: list[str], allowed) -> str:
    """One edit: the blank's best of these places, and there the best of these characters; "" deletes."""

    def at(place: int, c: str) -> str:
        letters = list(text)
        if place % 2:
            letters[place // 2] = "" if c == letters[place // 2] else c
        else:
            letters.insert(place // 2, c)
        made = "".join(letters)
        return made if allowed(text, made) else text

    best, most = places[0], -math.inf
    for place in places:
        value = gain(at(place, " "))
        if value > most:
            best, most = place, value
    found, most = text, gain(text)
    for c in characters:
        value = gain(at(best, c))
        if value > most:
            found, most = at(best, c), value
    return found


def published_bert_attack(
    embed, read, text: str, substitutes, stop_words, changes: int = 1, guide: torch.Tensor | None = None
) -> str:
    """The same as MMCoA's code has it: words split at blanks, their case kept; `read(text)` is what CLIP gets of it.

    A word stays where none of its substitutes is better, and the next important one has its turn.
    """
    words = text.split(" ")
    clean = embed(read(text))
    importance = []
    for i in range(len(words)):
        masked = [*words[:i], "[UNK]", *words[i + 1 :]]
        importance.append((-kl(clean, embed(read(" ".join(masked)))), i))
    current, changed = list(words), 0
    for _, i in sorted(importance):
        if changed == changes:
            break
        if words[i] in stop_words:
            continue
        best, most = words[i], -math.inf
        for candidate in [words[i], *substitutes(words, i)]:
            new = embed(read(" ".join([*current[:i], candidate, *current[i + 1 :]])))
            gain = kl(clean, new) if guide is None else -float((guide * new).sum())
            if gain > most:
                best, most = candidate, gain
        if best != words[i]:
            current[i] = best
            changed += 1
    return " ".join(current)


def nearest_words(table: torch.Tensor, vocabulary: dict[str, int], pieces, word: str, k: int, stop_words) -> list[str]:
    """The k whole alphabetic words whose rows have the largest cosine with the mean of the word's normalised rows."""
    rows = [table[p] / table[p].pow(2).sum().sqrt() for p in pieces(word)]
    query = sum(rows) / len(rows)
    ranked = []
    for token, row in vocabulary.items():
        name = token.removesuffix("</w>")
        if token.endswith("</w>") and len(name) > 1 and name.isascii() and name.isalpha() and name not in stop_words:
            ranked.append((name, row))
    vectors = table[[row for _, row in ranked]]
    cosine = (vectors @ query) / vectors.norm(dim=1)
    order = sorted(range(len(ranked)), key=lambda i: -float(cosine[i]))[: k + 1]
    return [ranked[i][0] for i in order if ranked[i][0] != word][:k]


def unit(v: torch.Tensor) -> torch.Tensor:
    return v / v.pow(2).sum().sqrt()


def co_attack_loss(image: torch.Tensor, clean: torch.Tensor, texts: list[torch.Tensor], weight: float = 3.0):
    """KL(softmax e ‖ softmax e') + weight · mean over texts of KL(softmax t ‖ softmax e'); one image. Every embedding
    is brought to length 1 first."""

    def divergence(p, q):
        p, q = unit(p), unit(q)
        p, q = p.exp() / p.exp().sum(), q.exp() / q.exp().sum()
        return sum(p[d] * (p[d].log() - q[d].log()) for d in range(len(p)))

    return divergence(clean, image) + weight * sum(divergence(t, image) for t in texts) / len(texts)


def noise(key: int, shape: tuple[int, ...], stream: int) -> torch.Tensor:
    u1, u2 = uniforms(key, shape, stream), uniforms(key, shape, stream + 1)
    return (-2 * (1 - u1).log()).sqrt() * (2 * math.pi * u2).cos()


def sga_loss(encode, z: torch.Tensor, texts: list[torch.Tensor], scales, deviation: float, key: int, stream: int):
    """-Σ_scales mean over texts of <f(view), t>; one image (C, H, W). The streams of a step's noises are 2 apart."""
    total = 0
    for scale in scales:
        view = z[None]
        if scale != 1:
            size = [max(1, round(side * scale)) for side in z.shape[1:]]
            view = (z + deviation * noise(key, tuple(z.shape), stream))[None]
            view = torch.nn.functional.interpolate(view, size=size, mode="bicubic", antialias=True).clamp(0, 1)
            stream += 2
        f = unit(encode(view)[0])
        total = total - sum((f * t).sum() for t in texts) / len(texts)
    return total


def ascend(loss, x: torch.Tensor, *, key: int, eps: float, step: float, steps: int) -> torch.Tensor:
    """l_inf, random start, last iterate; `loss(z, done)` of one image and the steps before this one."""
    d = torch.clamp((2 * uniforms(key, tuple(x.shape)) - 1) * eps, -x, 1 - x)
    for done in range(steps):
        z = (x + d).requires_grad_()
        g = torch.autograd.grad(loss(z, done), z)[0]
        d = torch.clamp(torch.clamp(d + step * g.sign(), -eps, eps), -x, 1 - x)
    return x + d


def ascend_together(loss, x: torch.Tensor, *, keys: list[int], eps: float, step: float, steps: int) -> torch.Tensor:
    """The same on a batch (B, C, H, W) whose loss is one number of all images."""
    starts = torch.stack([(2 * uniforms(key, tuple(x.shape[1:])) - 1) * eps for key in keys])
    d = torch.clamp(starts, -x, 1 - x)
    for _ in range(steps):
        z = (x + d).requires_grad_()
        g = torch.autograd.grad(loss(z), z)[0]
        d = torch.clamp(torch.clamp(d + step * g.sign(), -eps, eps), -x, 1 - x)
    return x + d


def patch_embeddings(clip, image: torch.Tensor) -> list[torch.Tensor]:
    """Each patch of an image (C, H, W) of the model's own size, through its ViT taken apart; unnormalised."""
    tower = clip.model.visual
    x = tower.conv1((image - clip.mean) / clip.std)[0].flatten(1).T
    x = torch.cat([tower.class_embedding[None], x]) + tower.positional_embedding
    x = tower.ln_pre(x)[None]
    for block in tower.transformer.resblocks:
        x = block(x)
    return [tower.ln_post(token) @ tower.proj for token in x[0, 1:]]


def attention(patches: list[torch.Tensor], texts: list[torch.Tensor], size: int) -> torch.Tensor:
    """Cosines, averaged over the texts, then scaled to [0, 1], enlarged bilinearly pixel by pixel: `size`² values."""
    cosines = [sum((unit(p) * unit(text)).sum() for text in texts) / len(texts) for p in patches]
    low, high = min(cosines), max(cosines)
    scaled = [(c - low) / (high - low) for c in cosines]
    side = math.isqrt(len(patches))

    def ends(i: int) -> list[tuple[int, float]]:
        at = min(max((i + 0.5) * side / size - 0.5, 0), side - 1)
        return [(a, 1 - abs(at - a)) for a in (math.floor(at), math.floor(at) + 1) if abs(at - a) < 1]

    pixels = [
        sum(v * h * scaled[y * side + x] for y, v in ends(i) for x, h in ends(j))
        for i in range(size)
        for j in range(size)
    ]
    return torch.stack(pixels)
