"""Token merging in slow loops over numbers, written from the five steps of the paper (sec. 3)."""

import math


def cosine(x, y):
    dot = sum(a * b for a, b in zip(x, y))
    return dot / (math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y)))


def one_round(tokens, merges, weighted=True):
    """`tokens` is a list of (vector, set of patches). Returns the list after one round."""
    a = [t for i, t in enumerate(tokens) if i % 2 == 0]
    b = [t for i, t in enumerate(tokens) if i % 2 == 1]
    edges = []
    for i, (x, _) in enumerate(a):
        best = None
        for j, (y, _) in enumerate(b):
            s = cosine(x, y)
            if best is None or s > best[0]:
                best = (s, j)
        edges.append((best[0], i, best[1]))
    strongest = sorted(edges, key=lambda e: (-e[0], e[1]))[:merges]
    gone = {i for _, i, _ in strongest}
    out = [t for i, t in enumerate(a) if i not in gone]
    for j, (y, patches) in enumerate(b):
        members = [(y, patches)] + [a[i] for _, i, into in strongest if into == j]
        weights = [len(p) if weighted else 1 for _, p in members]
        mean = [sum(w * v[k] for w, (v, _) in zip(weights, members)) / sum(weights) for k in range(len(y))]
        out.append((mean, set().union(*(p for _, p in members))))
    return out


def rounds(sample, schedule, weighted=True):
    """All rounds on a list of vectors."""
    tokens = [(vector, {i}) for i, vector in enumerate(sample)]
    for merges in schedule:
        tokens = one_round(tokens, merges, weighted) if merges else tokens
    return tokens
