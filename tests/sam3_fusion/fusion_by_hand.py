"""The equations of the fusion modules in slow loops over samples, heads and tokens; written from them, not from our code."""

import math

import torch


def linear(weights, name, x):
    return weights[name + ".weight"] @ x + weights[name + ".bias"]


def norm(weights, name, x):
    mean, variance = x.mean(), x.var(unbiased=False)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weights[name + ".weight"] + weights[name + ".bias"]


def mlp(weights, name, x):
    last = max(int(k.removeprefix(name + ".").split(".")[0]) for k in weights if k.startswith(name + "."))
    for i in range(last + 1):
        x = linear(weights, f"{name}.{i}", x)
        if i < last:
            x = x.clamp(min=0)
    return x


def attention(weights, name, heads, queries, keys, values, pad=None, bias=None):
    """Lists of vectors to a list of vectors; bias[head][query][key]."""
    dim = len(queries[0]) // heads
    q = [linear(weights, name + ".q_proj", x) for x in queries]
    k = [linear(weights, name + ".k_proj", x) for x in keys]
    v = [linear(weights, name + ".v_proj", x) for x in values]
    seen = [m for m in range(len(keys)) if pad is None or not pad[m]]
    result = []
    for i in range(len(q)):
        joined = []
        for h in range(heads):
            part = slice(h * dim, (h + 1) * dim)
            logits = [q[i][part] @ k[m][part] / math.sqrt(dim) + (bias[h][i][m] if bias is not None else 0.0) for m in seen]
            total = sum(torch.exp(z) for z in logits) if logits else 1.0
            mixed = torch.zeros(dim)
            for z, m in zip(logits, seen):
                mixed = mixed + torch.exp(z) / total * v[m][part]
            joined.append(mixed)
        result.append(linear(weights, name + ".out_proj", torch.cat(joined)))
    return result


def ffn(weights, name, x):
    return linear(weights, name + ".contract", linear(weights, name + ".expand", x).clamp(min=0))


def sine(c, dim):
    code = []
    for k in range(dim):
        angle = 2 * math.pi * float(c) / 10000 ** (2 * (k // 2) / dim)
        code.append(math.sin(angle) if k % 2 == 0 else math.cos(angle))
    return torch.tensor(code)


def grid_positions(height, width, dim):
    return [
        torch.cat((sine((i + 1) / (height + 1e-6), dim // 2), sine((j + 1) / (width + 1e-6), dim // 2)))
        for i in range(height)
        for j in range(width)
    ]


def encoder(weights, heads, layers, tokens, pos, prompt, pad, post=False, pos_in_prompt_query=False):
    """One image: lists of vectors."""
    x = list(tokens)
    for i in range(layers):
        at = f"blocks.{i}."
        n = x if post else [norm(weights, at + "self_norm", t) for t in x]
        qk = [t + p for t, p in zip(n, pos)]
        x = [t + a for t, a in zip(x, attention(weights, at + "self_attn", heads, qk, qk, n))]
        x = [norm(weights, at + "self_norm", t) for t in x] if post else x
        n = x if post else [norm(weights, at + "prompt_norm", t) for t in x]
        q = [t + p for t, p in zip(n, pos)] if pos_in_prompt_query else n
        x = [t + a for t, a in zip(x, attention(weights, at + "prompt_attn", heads, q, prompt, prompt, pad))]
        x = [norm(weights, at + "prompt_norm", t) for t in x] if post else x
        n = x if post else [norm(weights, at + "ffn_norm", t) for t in x]
        x = [t + ffn(weights, at + "ffn", u) for t, u in zip(x, n)]
        x = [norm(weights, at + "ffn_norm", t) for t in x] if post else x
    return x


def logit(c, floor=1e-3):
    c = min(max(float(c), 0.0), 1.0)
    return math.log(max(c, floor) / max(1 - c, floor))


def stretch(delta, kind):
    scaled = 8 * delta
    log = math.copysign(math.log2(abs(scaled) + 1) / 3, scaled) if scaled else 0.0
    return {"linear": [delta], "log": [log], "both": [delta, log]}[kind]


def box_bias(weights, kind, heads, boxes, height, width, presence):
    """bias[head][row][cell]"""
    bias = [[[0.0] * (height * width)] if presence else [] for _ in range(heads)]
    for cx, cy, w, h in boxes:
        x0, y0, x1, y1 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
        cells = []
        for i in range(height):
            first, second = stretch(float(i / height - y0), kind), stretch(float(i / height - y1), kind)
            by = mlp(weights, "box_bias.y", torch.tensor([v for pair in zip(first, second) for v in pair]))
            for j in range(width):
                first, second = stretch(float(j / width - x0), kind), stretch(float(j / width - x1), kind)
                cells.append(by + mlp(weights, "box_bias.x", torch.tensor([v for pair in zip(first, second) for v in pair])))
        for head in range(heads):
            bias[head].append([cell[head] for cell in cells])
    return bias


def decoder(weights, heads, layers, memory, pos, size, prompt, pad, kind="log", presence=True, text=True, copies=1):
    """One image. Returns per layer: normalised rows, entering boxes, refined boxes, presence logit."""
    height, width = size
    dim = len(memory[0])
    rows = [q for _ in range(copies) for q in weights["queries"]]
    boxes = [torch.sigmoid(a) for _ in range(copies) for a in weights["anchors"]]
    seen = len(weights["queries"]) + presence
    y = ([weights["presence.token"][0]] if presence else []) + rows
    keys = [m + p for m, p in zip(memory, pos)]
    out = []
    for i in range(layers):
        at = f"blocks.{i}."
        u = [torch.zeros(dim)] if presence else []
        for cx, cy, w, h in boxes:
            u.append(mlp(weights, "box_pos", torch.cat([sine(c, dim // 2) for c in (cy, cx, w, h)])))
        q = [a + b for a, b in zip(y[:seen], u)]
        mixed = attention(weights, at + "self_attn", heads, q, q, y[:seen])
        y = [a + b for a, b in zip(y, mixed)] + y[seen:]
        y = [norm(weights, at + "self_norm", t) for t in y]
        if text:
            q = [a + b for a, b in zip(y, u)]
            y = [a + b for a, b in zip(y, attention(weights, at + "prompt_attn", heads, q, prompt, prompt, pad))]
            y = [norm(weights, at + "prompt_norm", t) for t in y]
        bias = None if kind == "none" else box_bias(weights, kind, heads, boxes, height, width, presence)
        q = [a + b for a, b in zip(y, u)]
        y = [a + b for a, b in zip(y, attention(weights, at + "image_attn", heads, q, keys, memory, bias=bias))]
        y = [norm(weights, at + "image_norm", t) for t in y]
        y = [norm(weights, at + "ffn_norm", t + ffn(weights, at + "ffn", t)) for t in y]
        normed = [norm(weights, "out_norm", t) for t in y[presence:]]
        refined = [torch.sigmoid(mlp(weights, "box_head", o) + torch.tensor([logit(c) for c in b])) for o, b in zip(normed, boxes)]
        z = mlp(weights, "presence.head", norm(weights, "presence.norm", y[0])) if presence else None
        out.append((torch.stack(normed), torch.stack(boxes), torch.stack(refined), z))
        boxes = refined
    return out
