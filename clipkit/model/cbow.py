"""A bag-of-words text encoder in the place of the Transformer. open_clip cannot load it."""

import torch
from torch import Tensor, nn


class CBOWTextTower(nn.Module):
    """The mean of a caption's token embeddings, then an MLP and the projection.

    Args:
      vocab_size: Rows of the embedding.
      width: Embedding width; the MLP is four times as wide.
      embed_dim: Output width, D.
      context_length: Tokens of a caption, L.

    Source: CBOW, Mikolov et al. 2013 (arXiv:1301.3781); as the text baseline of CLIP, Radford et al. 2021, section 2.3.
    """

    def __init__(self, *, vocab_size: int, width: int, embed_dim: int, context_length: int) -> None:
        super().__init__()
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.ln = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.text_projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed token ids (B, L). (B, D), not normalised. Tokens after the end of text (the largest id) do not count."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # (L,)
        inside = (positions <= tokens.argmax(dim=-1, keepdim=True)).unsqueeze(-1)  # (B, L, 1)
        embeddings = self.token_embedding(tokens) * inside  # (B, L, width)
        mean = embeddings.sum(dim=1) / inside.sum(dim=1)  # (B, width)
        return self.text_projection(mean + self.mlp(self.ln(mean)))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Nothing to recompute: the activations of a bag of words are small."""
