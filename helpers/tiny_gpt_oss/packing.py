"""Many questions on the same passages, computed once: a batch layout and the attention that goes with it.

A training example is a prefix (the passages) and several branches (a question and its answer each). A branch sees the
prefix and itself, never another branch, so each learns exactly what it would learn in a prompt of its own, and the
prefix, which is most of the work, is computed once for all of them.

A row holds the prefix, padded on the left to `prefix` tokens, then the branches, each padded on the right to `branch`
tokens. Only differences of positions matter to rotary embeddings, so every branch starts at position `prefix`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "prefix_and_branches"


@dataclass(frozen=True)
class Layout:
    """Lengths in tokens: of the prefix, of a branch, of the sliding window; and the number of branches."""

    prefix: int
    branch: int
    branches: int
    window: int

    @property
    def tokens(self) -> int:
        """Return the tokens of a row."""
        return self.prefix + self.branches * self.branch

    def positions(self, device="cpu") -> torch.Tensor:
        """Return the position of each token of a row, of shape (1, tokens)."""
        branch = torch.arange(self.prefix, self.prefix + self.branch, device=device).repeat(self.branches)
        return torch.cat([torch.arange(self.prefix, device=device), branch])[None]


def forward(
    model: torch.nn.Module, ids: torch.Tensor, padding: torch.Tensor, layout: Layout, pointed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last hidden states of a batch of rows, (rows, tokens, width), and how well the last layer points.

    `ids`: (rows, layout.tokens); `padding`: (rows, layout.prefix), true where the prefix is padding; `pointed`: (rows,
    branches x branch), for a token of a branch the place in the prefix of what comes next, -1 where that isn't copied.
    The second result is the mean surprise, in nats, of the last layer's pointing heads at those places. `model` is a
    `GptOssModel` whose attention was set with `use`.
    """
    mask = torch.zeros(padding.shape, device=ids.device).masked_fill(padding, float("-inf"))
    positions = layout.positions(ids.device).expand(len(ids), -1)
    masks = {"full_attention": mask, "sliding_attention": mask}
    surprise: list[torch.Tensor] = []
    output = model(
        input_ids=ids, position_ids=positions, attention_mask=masks, use_cache=False, layout=layout, pointed=pointed,
        surprise=surprise, last=model.config.num_hidden_layers - 1,
    )  # fmt: skip
    return output.last_hidden_state, surprise[0]


def use(model: torch.nn.Module) -> None:
    """Make a gpt-oss model compute its attention for this layout."""
    AttentionInterface.register(NAME, attention)
    model.config._attn_implementation = NAME


def attention(
    module, query, key, value, attention_mask, scaling, layout, s_aux, pointed, surprise, last, sliding_window=None, **_
):
    """Attend within the prefix and from each branch to the prefix and itself; same result as eager attention.

    `query`: (rows, heads, tokens, head_dim); `key`, `value`: the same with fewer heads. Returns (rows, tokens, heads,
    head_dim) and no weights.
    """
    groups = module.num_key_value_groups
    query, key = query.to(value.dtype), key.to(value.dtype)  # turning them may have made 32 bits of 16
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    query = query * scaling
    p = layout.prefix
    rows, heads, _, dim = query.shape
    padding = attention_mask[:, None, None, :].to(query.dtype)
    sink = s_aux.to(query.dtype).view(1, heads, 1, 1)
    shape = (rows, heads, layout.branches, layout.branch, dim)
    own = [part[:, :, p:].reshape(shape) for part in (query, key, value)]
    first = [part[:, :, :p] for part in (query, key, value)]
    seen = min(p, layout.window) if sliding_window else p
    if not sliding_window:
        prefix = _causal(*first, padding, sink)
    elif p > layout.window and p % layout.window == 0:
        prefix = _banded(*first, padding, sink, layout.window)
    else:
        far = _mask(p, p, 0, sliding_window, query)
        prefix = _softmax(first[0] @ first[1].transpose(2, 3) + far + padding, sink)[..., :p] @ first[2]
    to_prefix = query[:, :, p:] @ first[1][:, :, p - seen :].transpose(2, 3) + padding[..., p - seen :]
    if sliding_window:
        to_prefix = to_prefix + _mask(layout.branch, seen, seen, sliding_window, query).repeat(layout.branches, 1)
    inside = own[0] @ own[1].transpose(3, 4) + _mask(layout.branch, layout.branch, 0, sliding_window, query)
    inside = inside.reshape(rows, heads, -1, layout.branch)
    weights = _softmax(torch.cat([to_prefix, inside], -1), sink)
    if module.layer_idx == last:
        heads_of_one = weights[:, -groups:, :, :p]
        found = heads_of_one.gather(3, pointed.clamp_min(0)[:, None, :, None].expand(-1, groups, -1, 1))[..., 0]
        here = (pointed >= 0)[:, None].expand_as(found)
        surprise.append(-(found.float().clamp_min(1e-9).log() * here).sum() / here.sum().clamp_min(1))
    branches = weights[..., :seen] @ first[2][:, :, p - seen :]
    inside = weights[..., seen : seen + layout.branch].reshape(*shape[:-1], layout.branch)
    branches = branches + (inside @ own[2]).reshape(branches.shape)
    return torch.cat([prefix, branches], 2).transpose(1, 2).contiguous(), None


def _causal(query, key, value, padding, sink):
    """Attend to all that came before with torch's fused kernel, which knows no sinks.

    The sink is a first token that holds nothing. Eight more numbers (the kernel wants multiples of eight) per query and
    key, of which one counts, add to a score: the sink's own, nothing, or so little that padding is never looked at.
    """
    rows, heads, tokens, dim = query.shape
    score = torch.cat([sink.expand(rows, heads, 1, 1), padding.clamp_min(-3e4).expand(rows, heads, 1, tokens)], 3)
    query, key, value = (F.pad(part, (0, 8, 1, 0)) for part in (query, key, value))
    one = F.pad(torch.ones_like(query[..., :1]), (dim, 7))
    key = key + F.pad(score.transpose(2, 3), (dim, 7))
    return F.scaled_dot_product_attention(query + one, key, value, is_causal=True, scale=1.0)[:, :, 1:, :dim]


def _banded(query, key, value, padding, sink, window):
    """Attend within a window by blocks of its length: a block's tokens see their own block and the one before."""
    rows, heads, tokens, dim = query.shape
    blocks = tokens // window
    query = query.reshape(rows, heads, blocks, window, dim)
    key, value = (F.pad(part, (0, 0, window, 0)).unfold(2, 2 * window, window).transpose(3, 4) for part in (key, value))
    padding = F.pad(padding, (window, 0), value=float("-inf")).unfold(3, 2 * window, window).transpose(2, 3)
    scores = query @ key.transpose(3, 4) + padding + _mask(window, 2 * window, window, window, query)
    weights = _softmax(scores, sink[..., None])[..., : 2 * window]
    return (weights @ value).reshape(rows, heads, tokens, dim)


def _mask(queries, keys, start, window, like):
    """Return 0 where a query may look and -inf where not: not ahead, not further back than the window."""
    ahead = (
        torch.arange(keys, device=like.device)[None] - torch.arange(start, start + queries, device=like.device)[:, None]
    )
    hidden = ahead > 0
    if window:
        hidden |= ahead <= -window
    return torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill(hidden, float("-inf"))


def _softmax(scores, sink):
    """Return the weights with the sink's as the last: a score that is learnt per head and takes what no token gets."""
    scores = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], -1)
    with torch.autocast(scores.device.type, enabled=False):  # which would return it in 32 bit, twice the memory
        return scores.softmax(-1)
