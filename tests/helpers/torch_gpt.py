"""LlamaGen's class-conditional generator as a PyTorch module whose `state_dict` has the published names and shapes.

A second implementation, written from the structure alone: tests compare `fvq_jax` and its exported files with it. It
needs PyTorch, so a test calls `pytest.importorskip("torch")` before it imports this file.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x, turns):
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(turned(q, turns), turned(k, turns), v, is_causal=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, width, heads, hidden, eps):
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width, hidden)
        self.attention_norm, self.ffn_norm = RMSNorm(width, eps), RMSNorm(width, eps)

    def forward(self, x, turns):
        x = x + self.attention(self.attention_norm(x), turns)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    def __init__(self, rows, width):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)


class GPT(nn.Module):
    """`hidden`: width of the feed-forward networks; `null`: whether the table of classes has a row for no class."""

    def __init__(self, vocab, classes, grid, layers, width, heads, hidden, null=True, base=10000.0, eps=1e-5):
        super().__init__()
        self.grid, self.base, self.head_width = grid, base, width // heads
        self.cls_embedding = ClassEmbedding(classes + null, width)
        self.tok_embeddings = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Layer(width, heads, hidden, eps) for _ in range(layers))
        self.norm = RMSNorm(width, eps)
        self.output = nn.Linear(width, vocab, bias=False)

    def forward(self, labels, codes):
        """Logits [b, t, v] of all codes [b, t] of the images."""
        first = self.cls_embedding.embedding_table(labels)[:, None]
        x = torch.cat([first, self.tok_embeddings(codes[:, :-1])], dim=1)
        turns = rotations(self.grid, self.head_width, self.base)
        for layer in self.layers:
            x = layer(x, turns)
        return self.output(self.norm(x))


def rotations(grid, head_width, base):
    """Complex numbers [t, head_width / 2] that pairs of channels are multiplied by; 0 for the class."""
    rows, columns = grid
    y = torch.arange(rows).repeat_interleave(columns)
    x = torch.arange(columns).repeat(rows)
    slow = torch.tensor([base ** (-2 * j / (head_width / 2)) for j in range(head_width // 4)])
    angles = torch.cat([torch.outer(y, slow), torch.outer(x, slow)], dim=1)
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.cat([torch.zeros_like(turns[:1]), turns[:-1]])


def turned(x, turns):
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
