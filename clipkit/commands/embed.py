"""`clipkit embed`: the embeddings of pictures, and of their captions, as arrays for work of one's own."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from clipkit.config.launch import launch
from clipkit.config.zero_shot import EmbedConfig

TIMEOUT_SECONDS = 3600


def main(arguments: Sequence[str]) -> None:
    launch("embed", EmbedConfig, embed, arguments)


def embed(config: EmbedConfig) -> None:
    """Encode pictures and captions, spread over all processes, and write them.

    `out` gets image_features.npy (N, D) and samples.parquet (N rows: key, label, captions), and, where pictures have
    captions, text_features.npy (T, D) with captions.parquet (T rows: caption, number of its picture). fp32, unit norm.

    Raises:
      FileNotFoundError: there is no such model or data.
      ValueError: the data or the model cannot be used.
    """
    print(f"clipkit embed: {config.data} with {config.model} (loading)", flush=True)
    import numpy as np
    from pandas import DataFrame

    from clipkit.evaluation.encode import encode_task, encode_texts
    from clipkit.evaluation.progress_line import ProgressLine
    from clipkit.evaluation.tasks import RETRIEVAL, Task, load_task, pictures_in
    from clipkit.model.folder import load_model
    from clipkit.training.distributed import start_process, stop_process

    process = start_process(config.device, TIMEOUT_SECONDS)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(stop_process)
        try:
            task = load_task(config.data, cache_dir=config.cache_dir)
        except ValueError as error:
            if not Path(config.data).expanduser().is_dir():
                raise
            print(f"note      pictures alone, without captions or labels: {error}", flush=True)
            task = Task(name=config.data, split="all", kind=RETRIEVAL, images=pictures_in(config.data))
        model = load_model(config.model, pretrained=config.pretrained, device=process.device)
        with ProgressLine("encoded   ", process.is_main) as line:
            encoded = encode_task(model, task, batch_size=config.batch_size, spread=True, workers=config.workers,
                                  progress=line.show)
        captions = [caption for of_image in encoded.captions for caption in of_image]
        images = [number for number, of_image in enumerate(encoded.captions) for _ in of_image]
        text_features = encode_texts(model, captions, batch_size=config.batch_size, spread=True) if captions else None
        if not process.is_main:
            return
        out = Path(config.out).expanduser()
        out.mkdir(parents=True, exist_ok=True)
        np.save(out / "image_features.npy", encoded.image_features.numpy(force=True))
        DataFrame({"key": encoded.keys, "label": encoded.labels.tolist(), "captions": [list(c) for c in encoded.captions]}
                  ).to_parquet(out / "samples.parquet", index=False)
        if text_features is not None:
            np.save(out / "text_features.npy", text_features.numpy(force=True))
            DataFrame({"caption": captions, "image": images}).to_parquet(out / "captions.parquet", index=False)
        bad = f", {encoded.num_bad.total():,} bad ones left out {dict(encoded.num_bad)}" if encoded.num_bad else ""
        print(f"written   {out}: {len(encoded.keys):,} images{bad}, {len(captions):,} captions, "
              f"{encoded.image_features.shape[1]} dimensions, of weights {model.source_sha256 or 'that have no file'}")
