"""The layout of Qwen3-VL: pictures between vision marks, rotary positions in three dimensions.

Source: Qwen2-VL (arXiv 2409.12191), section 2.1, multimodal rotary position embedding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from plait.encoders.media_encoder import MediaEncoder
from plait.errors import ModelError, Origin, RenderError
from plait.modalities import MediaPart
from plait.stream import Fill, IntArray, ItemPlan, Span


class Qwen3VLLayout:
    """How Qwen3-VL reads pictures.

    Args:
        encoder: The model's own tower; see `plait.encoders.qwen3_vl`.
        config: The transformers `Qwen3VLConfig` of the model.
    """

    def __init__(self, encoder: MediaEncoder, config: Any) -> None:
        self.encoder = encoder
        self.placeholder_id = int(config.image_token_id)
        self.banned_ids = frozenset(
            {
                self.placeholder_id,
                int(config.video_token_id),
                int(config.vision_start_token_id),
                int(config.vision_end_token_id),
            }
        )

    def plan(self, part: MediaPart, origin: Origin) -> Sequence[tuple[MediaPart, ItemPlan]]:
        """
        Raises:
            RenderError: the part is not a picture.
            DataError: its header cannot be read.
        """
        if part.medium != self.encoder.encoder.medium:
            raise RenderError(
                f"Qwen3-VL is used with pictures here; this sample has {part.medium}; remove it",
                origin,
            )
        return [(part, self.encoder.plan(part, origin))]

    def pieces(self, plans: Sequence[ItemPlan]) -> Sequence[str | Fill]:
        return ["<|vision_start|>", Fill(plans[0].length), "<|vision_end|>"]

    def positions(
        self, token_ids: IntArray, spans: Sequence[Span], plans: Sequence[ItemPlan]
    ) -> IntArray:
        """(3, T): time, row and column.

        Text counts on in all three. A picture's time is that of its first position, its rows and
        columns count from there, and what follows goes on after its longer side.
        """
        positions = np.empty((3, len(token_ids)), dtype=np.int64)
        index, clock = 0, 0
        for span in sorted(spans, key=lambda span: span.start):
            text = span.start - index
            positions[:, index : span.start] = clock + np.arange(text)
            clock += text
            grid = plans[span.item].grid
            cells = np.indices(grid).reshape(3, -1)
            if cells.shape[1] != span.length:
                raise ModelError(
                    f"Qwen3-VL places a picture as one span: its grid {grid} has "
                    f"{cells.shape[1]} cells, its span {span.length} positions"
                )
            positions[:, span.start : span.stop] = clock + cells
            clock += max(grid[1], grid[2])
            index = span.stop
        positions[:, index:] = clock + np.arange(len(token_ids) - index)
        return positions

    def decode_position(self, positions: IntArray) -> int:
        return int(positions.max()) + 1
