"""The embedded emoji set: 10,792 drawings of 1,914 emoji in 8 art styles, as WebDataset shards (see README.md)."""

from clipkit.data.emoji.shards import emoji_shards

__all__ = ["emoji_shards"]
