"""Settings of `clipkit export`."""

from dataclasses import dataclass

from clipkit.config.schema import fraction, setting

FORMATS = ("text_encoder", "transformers", "onnx", "open_clip")
END_OF_TEXT, EXCLAMATION_MARK = 49407, 0  # what CLIP's tokenizers are padded with: transformers' own, and open_clip's


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    model: str = setting("a run, a model folder, a transformers folder or an open_clip name")
    pretrained: str | None = setting("open_clip tag or weights file, with an open_clip name")
    base: str | None = setting("what model was fine-tuned from, for interpolate; as model")
    interpolate: float | None = setting("write the model on the line from base (0) to model (1)", fraction)
    format: str = setting("text_encoder for diffusion, the whole model for transformers, onnx or open_clip", choices=FORMATS)
    out: str | None = setting("folder to make; null = export/<format> in the run, or export/<model>/<format>")
    overwrite: bool = setting("replace an export that is there")
    layer: str = setting("of text_encoder: its last hidden state is the last layer's (SD 1, SDXL, SD 3, Flux) or that of the "
                         "one before (SD 2)", choices=("last", "penultimate"))
    pad_token_id: int = setting("token that fills up the rows; 0 is open_clip's and turns a literal ! into padding",
                                choices=(END_OF_TEXT, EXCLAMATION_MARK))
    single_file: bool = setting("of text_encoder: one file more, under the names that ComfyUI, SD 3 and Flux read")
    single_file_dtype: str = setting("what the single file's numbers are", choices=("fp16", "fp32"))

    def __post_init__(self) -> None:
        if (self.base is None) != (self.interpolate is None):
            raise ValueError(f"base is {self.base} and interpolate is {self.interpolate}; give both, as in base=ViT-B-32 "
                             "interpolate=0.5, or none")
        if self.format != "text_encoder" and (self.layer != "last" or self.single_file):
            raise ValueError("layer and single_file are settings of format=text_encoder, and format is "
                             f"{self.format}; leave them out")
        if self.format not in ("text_encoder", "transformers") and self.pad_token_id != END_OF_TEXT:
            raise ValueError(f"pad_token_id is {self.pad_token_id}, but format={self.format} keeps the model's own padding; "
                             "leave it out")
        if self.single_file and self.layer != "last":
            raise ValueError("single_file=true needs layer=last: its readers choose the layer themselves")
