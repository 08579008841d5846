"""RWKV-7 and Meta-State in plain NumPy float64, token by token, from the formulas alone.

Nothing here is shared with the library: no chunks, no packing, no batch. Matrices act on the right,
as in docs/architecture.md; `weights` is a flat dict whose names follow RWKV's own checkpoint.
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def unit(x, eps=1e-12):
    """Return x / |x| over the last axis."""
    return x / np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), eps)


def affine_norm(x, weight, bias, eps):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def segments_of(x, sizes):
    return np.split(x, np.cumsum(sizes)[:-1], -1)


def group_norm(x, weight, bias, sizes, eps=64e-5):
    """x [H, N]; mean and variance over each segment of each head."""
    parts = [affine_norm(part, 1.0, 0.0, eps) for part in segments_of(x, sizes)]
    return np.concatenate(parts, -1) * weight.reshape(x.shape) + bias.reshape(x.shape)


def encoding_norm(e, kind, sizes):
    if kind == "none":
        return e
    scale = (lambda n: 1.0) if kind == "l2" else (lambda n: n**0.5)
    return np.concatenate([unit(p) * scale(p.shape[-1]) for p in segments_of(e, sizes)], -1)


def low_rank(f, x, first, second, bias=0.0):
    return f(x @ first) @ second + bias


def identity(x):
    return x


class Oracle:
    """The language model of `config` (read for its plain fields only) with NumPy `weights`."""

    def __init__(self, config, weights):
        self.config, self.w = config, weights
        self.shape = (config.num_heads, config.head_size)
        self.kl = 0.0  # summed over tokens, layers and heads

    def fresh_state(self):
        """Return what a document starts from: S_0 = V_P^T K_P, all else zero."""
        heads, size = self.shape
        layers = []
        for i in range(self.config.num_layers):
            S = np.zeros((heads, size, size))
            if self.config.parameter_tokens:
                for h in range(heads):
                    S[h] = self.w[f"{i}.att.V_P"][h].T @ self.w[f"{i}.att.K_P"][h]
            M = np.zeros((heads, size, size))
            last = np.zeros(self.config.hidden_size)
            layers.append({"S": S, "M": M, "time": last, "channel": last.copy()})
        if self.config.memory_heads:
            size = self.config.hidden_size // self.config.memory_heads
            M = np.zeros((self.config.memory_heads, size, size))
            zeros = np.zeros(self.config.hidden_size)
            layers.append({"M": M, "key": zeros, "features": zeros})
        return layers

    def time_mix(self, i, x, state, v_first):
        """Return the output [D], the first layer's value, and w, kappa, a [H, N]."""

        def p(name):
            return self.w[f"{i}.att.{name}"]

        xr, xw, xk, xv, xa, xg = (x + (state["time"] - x) * p(f"x_{c}") for c in "rwkvag")
        state["time"] = x
        heads = self.shape
        a = sigmoid(low_rank(identity, xa, p("a1"), p("a2"), p("a0"))).reshape(heads)
        k = (xk @ p("key")).reshape(heads)
        kappa = unit(k * p("k_k").reshape(heads))
        k = k * (1 + (a - 1) * p("k_a").reshape(heads))
        v = (xv @ p("value")).reshape(heads)
        if i == 0:
            v_first = v
        else:
            mix = sigmoid(low_rank(identity, xv, p("v1"), p("v2"), p("v0"))).reshape(heads)
            v = v + (v_first - v) * mix
        d = low_rank(np.tanh, xw, p("w1"), p("w2"), p("w0"))
        w = np.exp(-np.exp(-0.5) * sigmoid(d)).reshape(heads)
        r = (xr @ p("receptance")).reshape(heads)
        g = low_rank(sigmoid, xg, p("g1"), p("g2"))
        S, y = np.empty_like(state["S"]), np.empty(heads)
        for h in range(heads[0]):
            transition = np.diag(w[h]) - np.outer(kappa[h], a[h] * kappa[h])
            S[h] = state["S"][h] @ transition + np.outer(v[h], k[h])
            y[h] = r[h] @ S[h].T
        state["S"] = S
        bonus = (r * p("r_k") * k).sum(-1, keepdims=True) * v
        y = group_norm(y, p("ln_x.weight"), p("ln_x.bias"), self.config.head_segments) + bonus
        return (g * y.reshape(-1)) @ p("output"), v_first, (w, kappa, a)

    def channel_mix(self, i, x, state):
        xk = x + (state["channel"] - x) * self.w[f"{i}.ffn.x_k"]
        return np.maximum(xk @ self.w[f"{i}.ffn.key"], 0) ** 2 @ self.w[f"{i}.ffn.value"]

    def meta_state(self, i, x, state, geometry):
        c, (heads, size) = self.config.meta_state, self.shape
        sizes = self.config.head_segments
        w, kappa, a = geometry

        def p(name):
            return self.w[f"{i}.meta.{name}"]

        raw = x
        if c.token_shift:
            x = raw + (state["channel"] - raw) * p("x_x")
        slices = x.reshape(heads, -1)  # [H, D/H]
        width = slices.shape[1]
        used = c.readout != "encoding" or c.encoder_query == "input" or c.encoder == "cross"
        xh = slices @ p("W_p") if size > width and used else slices
        factor = slices[:, np.arange(size) % width]  # the head's slice of x, repeated

        # Time mixing's matrix, on what this layer reads.
        receptance = (raw @ self.w[f"{i}.att.receptance"]).reshape(heads, size)
        asked = receptance if c.encoder_query == "receptance" else xh
        m = c.encoder_size or size
        e = np.zeros((heads, size))
        for h in range(heads):
            block = state["S"][h][:m, :m]
            e[h, :m] = asked[h, :m] @ (block.T if c.read == "key" else block)
        if c.encoder == "cross":
            joint = np.concatenate([xh, e], -1)
            z = np.stack([joint[h] @ p("W_z")[h] for h in range(heads)])
            if c.variational:  # mean and log variance; the mean stands for the draw
                z, log_var = np.split(z, 2, -1)
                self.kl += 0.5 * (z**2 + np.exp(log_var) - 1 - log_var).sum()
            else:
                z = silu(z)
            e = np.stack([z[h] @ p("W_u")[h] for h in range(heads)])
        raw_e, e = e, encoding_norm(e, c.encoding_norm, sizes)

        y = np.zeros((heads, size))
        if c.readout != "encoding":
            M = np.empty_like(state["M"])
            for h in range(heads):
                transition = np.diag(w[h]) - np.outer(kappa[h], a[h] * kappa[h])
                q = {"input": xh, "encoding": e, "receptance": receptance}[c.query][h]
                if c.update == "self":
                    update = np.outer(e[h], e[h])
                elif c.update == "input":
                    update = np.outer(e[h], xh[h] * sizes[0] ** -0.5)
                else:
                    own = unit(xh[h])
                    transition = np.diag(w[h]) - np.outer(own, a[h] * own)
                    update = np.outer(e[h], a[h] * own)
                    q = own if c.query == "input" else q
                M[h] = state["M"][h] @ transition + update
                y[h] = q @ M[h].T
            state["M"] = M
            y = self.output_norm(y, p, "norm_m")
        if c.readout != "meta":
            y = y + self.output_norm(raw_e, p, "norm_e")

        act = {"none": identity, "relu2": lambda u: np.maximum(u, 0) ** 2, "silu": silu}
        if c.modulation == "input":
            y = y * act[c.activation](factor)
        else:
            y = act[c.activation](y)
        y = y.reshape(-1)
        if c.gate:
            xg = raw + (state["channel"] - raw) * p("x_g") if c.token_shift else raw
            y = y * low_rank(sigmoid, xg, p("g1"), p("g2"))
        if c.token_shift:
            state["channel"] = raw
        return y @ p("W_o")

    def surprise_memory(self, u, token, state):
        """Write `token` by its surprise; return the corrected features."""
        inside = self.config.memory_layer is not None
        h = self.layer_norm(u, "surprise_memory.norm") if inside else u
        head, shape = self.w["head"].T, state["M"].shape[:2]

        def p(name):
            return self.w[f"surprise_memory.{name}"]

        row = head[token]
        z = state["features"] @ row * p("logit") + p("place") @ state["features"]
        s = 2 * sigmoid(z + p("token") @ row + p("bias"))
        v = s[:, None] * row.reshape(shape)
        before = state["key"].reshape(shape)
        w = np.exp(-np.exp(-0.5) * sigmoid(p("decay"))).reshape(shape)
        a = sigmoid(p("rate")).reshape(shape)
        key = unit(((h + p("center")) * p("scale")).reshape(shape))
        M, y = np.empty_like(state["M"]), np.empty(shape)
        for i in range(shape[0]):
            transition = np.diag(w[i]) - np.outer(before[i], a[i] * before[i])
            M[i] = state["M"][i] @ transition + np.outer(v[i], before[i])
            y[i] = key[i] @ M[i].T
        state |= {"M": M, "key": key.reshape(-1), "features": h}
        return u + y.reshape(-1) * p("gain")

    def output_norm(self, y, p, name):
        if self.config.meta_state.output_norm == "none":
            return y
        return group_norm(y, p(f"{name}.weight"), p(f"{name}.bias"), self.config.head_segments)

    def layer_norm(self, x, name):
        return affine_norm(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-5)

    def forward(self, tokens, state=None, resets=None):
        """tokens: ints of one row -> logits [T, V] and the state after the last token."""
        state = [dict(layer) for layer in state or self.fresh_state()]
        logits = []
        for t, token in enumerate(tokens):
            if resets is not None and resets[t]:
                state = self.fresh_state()
            x, v_first = self.layer_norm(self.w["emb"][token], "ln0"), None
            for i, layer in enumerate(state[: self.config.num_layers]):
                if i == self.config.memory_layer:
                    x = self.surprise_memory(x, token, state[-1])
                normed = self.layer_norm(x, f"{i}.ln1")
                out, v_first, geometry = self.time_mix(i, normed, layer, v_first)
                x = x + out
                normed = self.layer_norm(x, f"{i}.ln2")
                carried = layer["channel"]
                if self.config.architecture == "metastate":
                    x = x + self.meta_state(i, normed, layer, geometry)
                if self.config.ffn_order == "after" and self.config.ffn_size:
                    normed = self.layer_norm(x, f"{i}.ln3")
                if self.config.architecture == "rwkv7" or self.config.ffn_size:
                    x = x + self.channel_mix(i, normed, layer | {"channel": carried})
                    layer["channel"] = normed
            x = self.layer_norm(x, "ln_out")
            if self.config.memory_heads and self.config.memory_layer is None:
                x = self.surprise_memory(x, token, state[-1])
            logits.append(x @ self.w["head"])
        return np.stack(logits), state
