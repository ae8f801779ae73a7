"""Projections from encoder frames to decoder embeddings, by name.

To add one, write a class, add it to `PROJECTIONS`, and its name to `Projection` in config.py. Its constructor takes
(audio_size, text_size, dropout); it maps [..., positions, audio_size] to [..., positions, text_size], with the latent
of a clip at the first position and its frames after it.
"""

import math

import torch
from torch import nn

TRANSFORMER_LAYERS = 2


class MellowProjection(nn.Module):
    """The published projection, with one residual step."""

    def __init__(self, audio_size: int, text_size: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(audio_size, text_size, bias=False)
        self.linear2 = nn.Linear(text_size, text_size, bias=False)
        self.layer_norm = nn.LayerNorm(text_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Map [..., audio_size] to [..., text_size]."""
        embedding = self.linear1(frames)
        residual = self.dropout(self.linear2(nn.functional.gelu(embedding)))
        return self.layer_norm(embedding + residual)


class LinearProjection(nn.Module):
    """One linear layer without dropout."""

    def __init__(self, audio_size: int, text_size: int, dropout: float):
        super().__init__()
        self.linear = nn.Linear(audio_size, text_size)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Map [..., audio_size] to [..., text_size]."""
        return self.linear(frames)


class MLPProjection(nn.Module):
    """Two linear layers with GELU between them, as in LLaVA 1.5 (arXiv 2310.03744)."""

    def __init__(self, audio_size: int, text_size: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(audio_size, text_size)
        self.linear2 = nn.Linear(text_size, text_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Map [..., audio_size] to [..., text_size]."""
        return self.linear2(self.dropout(nn.functional.gelu(self.linear1(frames))))


class TransformerProjection(nn.Module):
    """A linear layer and a small pre-norm transformer over the positions of a clip."""

    def __init__(self, audio_size: int, text_size: int, dropout: float):
        super().__init__()
        self.linear = nn.Linear(audio_size, text_size)
        layer = nn.TransformerEncoderLayer(
            text_size,
            nhead=math.gcd(text_size, 8),
            dim_feedforward=2 * text_size,
            dropout=dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        norm = nn.LayerNorm(text_size)
        self.transformer = nn.TransformerEncoder(layer, TRANSFORMER_LAYERS, norm, enable_nested_tensor=False)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Map [..., positions, audio_size] to [..., positions, text_size]."""
        embedding = self.linear(frames)
        embedding = embedding + self._positions(*embedding.shape[-2:]).to(embedding)
        return self.transformer(embedding.flatten(0, -3)).view_as(embedding)

    @staticmethod
    def _positions(positions: int, size: int) -> torch.Tensor:
        """Return sinusoidal position embeddings [positions, size] (arXiv 1706.03762)."""
        rates = torch.exp(torch.arange(0, size, 2) * (-math.log(10_000.0) / size))
        angles = torch.arange(positions)[:, None] * rates
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :size]


PROJECTIONS: dict[str, type[nn.Module]] = {
    "mellow": MellowProjection,
    "linear": LinearProjection,
    "mlp": MLPProjection,
    "transformer": TransformerProjection,
}


def projection_class(name: str) -> type[nn.Module]:
    """Return the projection class `name`.

    Raises:
        ValueError: unknown name.
    """
    if name not in PROJECTIONS:
        raise ValueError(f"projection {name!r} does not exist; choose one of {', '.join(PROJECTIONS)}")
    return PROJECTIONS[name]
