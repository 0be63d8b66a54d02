"""From an item's reference to what its encoder reads: cached features, or decoded inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from plait.datasets.decoding import Decoder
from plait.datasets.views import Views
from plait.encoders.feature_cache import FeatureCache
from plait.encoders.media_encoder import MediaEncoder
from plait.modalities import Limits
from plait.stream import Encoded, Item, ItemInputs
from plait.trainer.model import PlaitModel

BATCH = 16
"""Items encoded together while features are computed ahead."""


@dataclass(slots=True)
class ItemLoader:
    """Loads items from any thread; looks in the caches of frozen encoders first.

    `caches` holds a cache for each encoder whose features may be kept.
    """

    encoders: Mapping[str, MediaEncoder]
    views: Views
    limits: Limits
    caches: dict[str, FeatureCache]
    decoder: Decoder = field(default_factory=Decoder)

    def __call__(self, item: Item) -> ItemInputs:
        cache = self.caches.get(item.plan.encoder)
        if cache is not None:
            features = cache.get(self.key(item))
            if features is not None:
                return ItemInputs(features=features)
        return self.decode(item)

    def decode(self, item: Item) -> ItemInputs:
        media = self.decoder.decode(item.part, self.limits, item.plan.wanted)
        if self._view(item):
            media = self.views.apply(media, item.part.digest(), item.view)
        return ItemInputs(inputs=self.encoders[item.plan.encoder].encoder.process(media))

    def _view(self, item: Item) -> int:
        """Only pictures have views; a sound or a film is always as it is."""
        return item.view if item.part.medium == "image" else 0

    def key(self, item: Item) -> str:
        """Of the item's file, its view and its encoder, in that encoder's cache."""
        view = f"{self.views.name}:{item.view}" if self._view(item) else "as it is"
        facts = [view, item.part.cut, str(item.plan.wanted or "")]
        return self.caches[item.plan.encoder].key(item.part.digest(), " ".join(filter(None, facts)))

    def keep(self, items: Sequence[Item], inputs: Sequence[ItemInputs]) -> None:
        """Encode decoded items of one encoder together and keep their features."""
        name = items[0].plan.encoder
        for item, encoded in zip(items, self.encode(name, inputs), strict=True):
            self.caches[name].put(self.key(item), encoded)

    def encode(self, name: str, inputs: Sequence[ItemInputs]) -> list[Encoded]:
        """Features of decoded items, as they are computed ahead.

        A batch is filled up to `BATCH` with its last item: kernels that are chosen by the size of
        a batch round otherwise, and the same picture would have other bits in a batch of one.
        """
        filled = [loaded.inputs or {} for loaded in inputs]
        filled += filled[-1:] * (BATCH - len(filled))
        return self.encoders[name].features(filled)[: len(inputs)]


def cacheable(model: PlaitModel) -> list[str]:
    """Names of the encoders whose features never change: those whose tower is frozen."""
    return [name for name in model.encoders if not model.media_encoder(name).trainable]
