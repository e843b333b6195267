"""Where the embedded model's weights start: near what reading needs, instead of waiting for it to be found by chance.

Random matrices at a width of 256 make all heads look everywhere alike. To answer, heads have to copy (find where the
last tokens stood before, take what followed) and to match (find the sentence that is about what the question is about).
Each is learnt only where the other parts of it are there already, so it comes late or, in a small model, not at all.
All of what is set here is trained on.
"""

import re

import torch
import torch.nn.functional as F

from helpers.tiny_gpt_oss.worlds import words

ROPE = 1e6  # slowly turning positions: a match over a thousand tokens counts like one over ten
MATCH = 2.0  # how sharply heads that look for the same tokens start
TOPICS = 32  # numbers that say what a token is about
SAME = 0.4  # how much of them is the token's own
RELATE = 1.4  # how sharply heads that look for the same topics start
GATHER = 6.0  # how loudly the topics of many tokens are written down
# Where heads look, by bias: so many tokens back; the turning speeds, in radians a token, that make the peak as wide.
ONE_BACK, TWO_BACK = (1, 0.1, 1.1), (2, 0.1, 1.1)
SENTENCE, QUESTION = (4, 0.06, 0.5), (14, 0.03, 0.2)
HERE = (0, 0.025, 0.12)


@torch.no_grad()
def initialize(model, tokenizer) -> None:
    """Set the weights of a `GptOssForCausalLM` that has just been made: heads of 64, a width of 96 or more.

    Heads hand on what they see as it is (output = transposed values), as in the mimetic initialization of Trockman and
    Kolter (2023). The first layer's look one and two tokens back. In the full layers one pair looks for what followed
    the two tokens that it stands on. The sliding layer before the last writes down what the last few tokens and the
    last question are about; the last layer's second pair looks for tokens of which the one fits the other.
    """
    config = model.config
    width, size, group = config.hidden_size, config.head_dim, config.num_attention_heads // config.num_key_value_heads
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0.0, 0.5)
    model.model.norm.weight.fill_(0.05)
    # Slow rotary frequencies alone, so that a match counts alike near and far; half of them for each of the two tokens.
    turn = torch.arange(size)[:, None] % (size // 2)
    slow, last_token, token_before = turn >= size // 4, turn % 2 == 0, turn % 2 == 1
    # Of a token further back: what is read of it, and where the one and the two tokens back are written.
    seen, one_back, two_back = torch.randn(3, size, width) * width**-0.5
    # Rooms of their own: a token's topics, those of the tokens around it, those of the question.
    rooms = torch.linalg.qr(torch.randn(width, 3 * TOPICS)).Q.T.split(TOPICS)
    about, around, asked = (torch.zeros(size, width).index_copy(0, slow[:, 0].nonzero()[:, 0], room) for room in rooms)
    found = topics(tokenizer) * width**0.5 * 0.5
    embedding -= embedding @ torch.cat(rooms).T @ torch.cat(rooms)
    embedding += found @ rooms[0]
    last = len(model.model.layers) - 1
    for number, layer in enumerate(model.model.layers):
        attention, experts = layer.self_attn, layer.mlp.experts
        experts.gate_up_proj.normal_(0.0, width**-0.5)
        experts.down_proj.zero_()
        queries, keys, values = (
            part.weight.normal_(0.0, width**-0.5).view(-1, size, width)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        outputs = attention.o_proj.weight.view(width, -1, size)
        for head in range(config.num_attention_heads):
            outputs[:, head] = values[head // group].T / group
        if number == 0:
            for pair, (written, where) in enumerate(((one_back, ONE_BACK), (two_back, TWO_BACK))):
                values[pair] = seen
                outputs[:, pair * group : (pair + 1) * group] = written.T[:, None] / group
                _look(attention, pair, group, where, 5.0)
        elif number == last - 1:
            for pair, (written, where) in enumerate(((around, SENTENCE), (asked, QUESTION))):
                values[pair] = about
                outputs[:, pair * group : (pair + 1) * group] = written.T[:, None] / group * GATHER
                _look(attention, pair, group, where, 2.2)
        elif number % 2:
            for head in range(config.num_attention_heads):
                queries[head] = queries[head // group * group] * slow * MATCH
            queries[:group] = (seen * last_token + one_back * token_before) * slow * MATCH
            keys[0] = (one_back * last_token + two_back * token_before) * slow * MATCH
            if number < last:
                keys[1] = queries[group]
            else:
                outputs *= 2
                queries[group:], keys[1] = asked * RELATE, around * RELATE
                _look(attention, 1, group, HERE, -4.0, content=1.0)  # not at the question itself


def _look(attention, pair: int, group: int, where, strength: float, content: float = 0.1) -> None:
    """Make a pair's heads look a distance back (away from it where `strength` is negative), by biases alone.

    Rotary positions turn a query's and a key's bias, so that their product depends on how far apart they are. `content`
    is what counts of the tokens themselves.
    """
    tokens, slowest, fastest = where
    size = attention.head_dim
    turning = ROPE ** (-torch.arange(size // 2) / (size // 2))
    used = ((turning > slowest) & (turning < fastest)).float() * abs(strength)
    heads, own = slice(pair * group * size, (pair + 1) * group * size), slice(pair * size, (pair + 1) * size)
    attention.q_proj.weight[heads] *= content
    attention.k_proj.weight[own] *= content
    attention.k_proj.bias[own] = torch.cat([used, torch.zeros(size // 2)])
    turned = torch.cat([used * (tokens * turning).cos(), -used * (tokens * turning).sin()])
    attention.q_proj.bias[heads] = turned.repeat(group) * (1 if strength > 0 else -1)


def topics(tokenizer) -> torch.Tensor:
    """Return what each token is about, (vocabulary, TOPICS), unit length or nearly 0 for tokens that are everywhere.

    Latent semantic analysis (Deerwester et al. 1990) of what the curriculum says of each attribute: tokens of the
    statements and questions of one attribute come to lie near each other.
    """
    documents = []
    for language in ("en", "es"):
        known = {a.id: a for kind in words(language).attributes.values() for a in kind}
        for a in known.values():
            documents.append([re.sub(r"\{\w+\}", "", t) for t in (a.label, *a.statements, *a.followups, *a.questions)])
        for name in ("nouns", "nouns_m", "nouns_f", "adjectives"):
            documents += [[f" {word}", word.capitalize()] * 4 for word in words(language).frame.get(name, ())]
    counts = torch.zeros(len(tokenizer), len(documents))
    for column, texts in enumerate(documents):
        for ids in tokenizer(texts, add_special_tokens=False).input_ids:
            for token in ids:
                counts[token, column] += 1
    weight, spread = torch.log1p(counts), (counts > 0).sum(1, keepdim=True)
    total = torch.tensor(float(len(documents)))
    rare = torch.log(total / spread.clamp_min(1)) / torch.log(total)  # 0 in all documents, 1 in one
    weight = weight / weight.norm(dim=0, keepdim=True).clamp_min(1e-6)
    left, values, _ = torch.svd_lowrank(weight * rare, q=TOPICS, niter=4)
    found = F.normalize(left * values**0.5, dim=1) * (spread > 0)
    same = F.normalize(torch.randn(len(tokenizer), TOPICS), dim=1)
    gain = ((rare - 0.3) / 0.5).clamp(0, 1)
    gain[: len(tokenizer.all_special_tokens) + 256] = 0  # special tokens and single bytes are about nothing
    return F.normalize(found + SAME * same, dim=1) * gain
