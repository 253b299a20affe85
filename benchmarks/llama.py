"""The peer of generators: `LlamaForCausalLM` of the package transformers, in the sizes of our network.

It is the same transformer but for its rotations: as many layers, heads and parameters, the same products of
matrices. A class comes in as an embedding, the way LlamaGen does it. Sampling runs conditional and unconditional rows
as one batch against the package's static cache, guides in float32 and draws from all codes; a training step is
cross-entropy, clipping and the fused AdamW. Each program is PyTorch's eager one, or compiled by `torch.compile`.
"""

import inspect
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Shape(NamedTuple):
    """What a generator is made of; `size` is its name, `hidden` the width of its feed-forward networks."""

    size: str
    layers: int
    width: int
    heads: int
    hidden: int
    vocab: int
    classes: int
    grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Codes of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def parameters(self) -> int:
        """All parameters, embeddings included."""
        d, f = self.width, self.hidden
        return self.layers * (4 * d * d + 3 * d * f + 2 * d) + (self.classes + 1 + 2 * self.vocab) * d + d


class Peer:
    """The module, on the GPU if there is one."""

    def __init__(self, shape: Shape, dtype: str):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        self.shape, self.dtype = shape, getattr(torch, dtype)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.tokens,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
        with self.device:
            self.llama = LlamaForCausalLM(self.config)
            self.classes = torch.nn.Embedding(shape.classes + 1, shape.width)
        torch.nn.init.normal_(self.classes.weight, std=0.02)
        found = sum(value.numel() for value in self.parameters())
        if found != shape.parameters:
            raise ValueError(f"the peer has {found} parameters, and ours {shape.parameters}")

    @property
    def cache_argument(self) -> str:
        """How the installed version of transformers names the cache; it ignores other names."""
        known = inspect.signature(type(self.llama).forward).parameters
        return "cache" if "cache" in known else "past_key_values"

    def parameters(self) -> list[Any]:
        """Of both modules."""
        return [*self.llama.parameters(), *self.classes.parameters()]

    def inputs(self, labels: Any, codes: Any) -> Any:
        """[class, code 0, ..., code t - 2] as embeddings [b, t, d]."""
        import torch

        return torch.cat([self.classes(labels)[:, None], self.llama.get_input_embeddings()(codes[:, :-1])], 1)


def load_sampling(shape: Shape, dtype: str, compiled: bool, batches: list[int], guidance: float) -> Any:
    """Samples the codes of images; see `processes.py` for what is returned. A run is named by its batch."""
    _forget_compiled()
    import torch
    from transformers import StaticCache

    peer = Peer(shape, dtype)
    peer.llama.to(peer.dtype).eval(), peer.classes.to(peer.dtype)
    name = peer.cache_argument
    rows = 2 if guidance > 1 else 1  # of an image

    def draw(inputs: Any, cache: Any) -> Any:
        """Inputs [rows x b, 1, d] to the next codes [b]."""
        logits = peer.llama(inputs_embeds=inputs, use_cache=True, **{name: cache}).logits[:, -1].float()
        if rows == 2:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + guidance * (conditional - unconditional)
        return torch.multinomial(logits.softmax(-1), 1)[:, 0]

    if compiled:
        torch._dynamo.config.cache_size_limit = 64
        draw = torch.compile(draw, dynamic=False, mode="reduce-overhead" if peer.device.type == "cuda" else None)

    def sample(batch: int) -> Callable[[], np.ndarray]:
        labels = torch.arange(batch, device=peer.device) % shape.classes
        labels = torch.cat([labels, torch.full_like(labels, shape.classes)][:rows])
        caches: list[Any] = []  # made by the first run

        @torch.inference_mode()
        def run() -> np.ndarray:
            if not caches:
                cache = StaticCache(config=peer.config, max_cache_len=shape.tokens)
                like = {"dtype": peer.dtype, "device": peer.device}
                cache.early_initialization(rows * batch, shape.heads, shape.width // shape.heads, **like)
                caches.append(cache)
            caches[0].reset()
            inputs, codes = peer.classes(labels)[:, None], []
            for _ in range(shape.tokens):
                if compiled and peer.device.type == "cuda":
                    torch.compiler.cudagraph_mark_step_begin()
                codes.append(draw(inputs, caches[0]).clone())
                inputs = peer.llama.get_input_embeddings()(codes[-1].repeat(rows))[:, None]
            if caches[0].get_seq_length() != shape.tokens:
                raise ValueError("the peer did not fill its cache: this version of transformers takes it otherwise")
            return torch.stack(codes, 1).cpu().numpy()

        return run

    def build() -> dict[str, Callable]:
        return {"ready": lambda: None} | {str(batch): sample(batch) for batch in batches}

    return build


def load_training(shape: Shape, dtype: str, compiled: bool, labels: np.ndarray, codes: np.ndarray) -> Any:
    """A training step on labels [b] and codes [b, t]; float32 parameters, products in `dtype` by autocast."""
    _forget_compiled()
    import torch
    import torch.nn.functional as F  # noqa: N812

    peer = Peer(shape, dtype)
    inside = torch.from_numpy(labels).to(peer.device), torch.from_numpy(codes).long().to(peer.device)

    def loss_of(labels: Any, codes: Any) -> Any:
        inputs = peer.inputs(labels, codes)
        with torch.autocast(peer.device.type, peer.dtype, enabled=peer.dtype != torch.float32):
            logits = peer.llama(inputs_embeds=inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())

    loss_of = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def build() -> dict[str, Callable]:
        matrices, vectors = [[p for p in peer.parameters() if (p.ndim > 1) == kind] for kind in (True, False)]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
            lr=1e-4,
            betas=(0.9, 0.95),
            fused=True,
        )
        everything = peer.parameters()

        def step() -> float:
            loss = loss_of(*inside)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(everything, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach())  # waits for the GPU

        return {"ready": lambda: None, "step": step}

    return build


def _forget_compiled() -> None:
    """The time of the first run includes compiling, for both sides."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
