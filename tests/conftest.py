"""Shared fixtures: one thread, no network, one tiny model; what many tests would do again is done once.

Nothing heavy is imported above: the process that only hands tests to workers reads this file, too.
"""

import functools
import gc
import os
import pickle
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before any library reads it, as the next
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

# Python looks for garbage after 700 new objects; a million of torch's and transformers' would be walked again and again.
gc.set_threshold(50_000, 20, 20)


def pytest_sessionfinish():
    """Look for garbage that warns when it goes, once: pytest does it five times, over all that the libraries hold."""
    gc.collect()
    gc.freeze()


TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def merges_are_read_once():
    """Reading the 48,894 merges of CLIP's tokenizer takes longer than most tests do."""
    if "open_clip.tokenizer" in sys.modules:
        make_once_of_each_kind(sys.modules["open_clip.tokenizer"].SimpleTokenizer)


@functools.cache
def make_once_of_each_kind(made: type) -> None:
    """Let objects made from equal arguments share the attributes of the first."""
    attributes, make = {}, made.__init__

    def make_or_share(self, *arguments, **named):
        key = repr((arguments, sorted(named.items())))
        if key not in attributes:
            make(self, *arguments, **named)
            attributes[key] = vars(self).copy()
        vars(self).update(attributes[key])

    made.__init__ = make_or_share


@pytest.fixture(scope="module")
def drawn_curves() -> list[bytes]:
    return []


@pytest.fixture(autouse=True)
def curves_are_drawn_once_a_file(drawn_curves, monkeypatch):
    """Drawing the curves of a small run takes longer than the run: after the first of a file of tests, they are a copy."""
    from clipkit.training import curves

    draw = curves.plot_curves

    def draw_or_copy(run_dir, out=None, **panels):
        if not drawn_curves:
            drawn_curves.append(draw(run_dir, out, **panels).read_bytes())
        path = Path(out or Path(run_dir) / "curves.png")
        path.write_bytes(drawn_curves[0])
        return path

    for user in (curves, sys.modules.get("clipkit.diffusion.reconstruction_report")):
        if user:
            monkeypatch.setattr(user, "plot_curves", draw_or_copy)


@pytest.fixture
def tiny_model():
    """A fresh, seeded CLIP with two very small Transformers (no batch statistics)."""
    import torch

    from clipkit.model.build import build_model

    torch.manual_seed(0)
    return build_model(config=TINY)


@pytest.fixture
def free_port() -> int:
    """A TCP port on the loopback interface that nothing uses."""
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture
def start(tiny_model, tmp_path) -> str:
    """A model folder that fine-tuning starts from."""
    from clipkit.model.folder import save_model_folder

    save_model_folder(tiny_model, tmp_path / "start")
    return str(tmp_path / "start")


def settings(*arguments: str, config_dir=None, model=None):
    """The settings of `clipkit pretrain [--config-dir ... model=...] <arguments>`, composed as the command does."""
    from clipkit.commands.pretrain import IMPLIED
    from clipkit.config import PretrainConfig

    chosen = (f"model={model}",) if model else ()
    return command_settings("pretrain", PretrainConfig, *chosen, *arguments, config_dir=config_dir, implied=IMPLIED)


def command_settings(command: str, schema, *arguments: str, config_dir=None, implied=None):
    """The settings of `clipkit <command> <arguments>`, as the command composes them; each choice of files is read once."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from clipkit.config import parse
    from clipkit.config.command_line import conf_dir, groups_of, hydra_arguments

    folders = (conf_dir() / "shared", conf_dir() / command, *([config_dir] if config_dir else []))
    groups = groups_of(folders)
    overrides = hydra_arguments(arguments, schema, groups, implied)
    files = tuple(text for text in overrides if text.partition("=")[0] in groups)
    values = pickle.loads(composed(folders, files))
    for one in OverridesParser.create().parse_overrides([text for text in overrides if text not in files]):
        OmegaConf.update(values, one.key_or_group, one.value(), force_add=one.is_force_add())
    return parse(schema, OmegaConf.to_container(values, resolve=True))


@functools.cache
def composed(folders: tuple[Path, ...], files: tuple[str, ...]) -> bytes:
    """What Hydra makes of the shared, the command's own and further folders of settings, for a choice of files; pickled."""
    from hydra import compose, initialize_config_dir

    shared, own, *more = folders
    search = ",".join(f"file://{folder}" for folder in (shared, *more))
    with initialize_config_dir(str(own), version_base="1.3"):
        return pickle.dumps(compose("config", [f"hydra.searchpath=[{search}]", *files]))


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A pattern of four shards of 32 coloured squares each, with captions that say colour and number."""
    import io
    import json
    import random
    import tarfile

    from PIL import Image

    folder = tmp_path_factory.mktemp("shards")
    colours = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220), "yellow": (230, 220, 40),
               "white": (250, 250, 250), "black": (5, 5, 5), "purple": (140, 40, 160), "orange": (240, 140, 20)}
    rng = random.Random(0)
    for number in range(4):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as tar:
            for index in range(32):
                colour = rng.choice(list(colours))
                image = Image.new("RGB", (40, 36), colours[colour])
                image.putpixel((rng.randrange(40), rng.randrange(36)), (index * 7 % 256, 0, 255))
                file = io.BytesIO()
                image.save(file, "PNG")
                members = {"png": file.getvalue(), "txt": f"a {colour} square, {index} of shard {number}".encode(),
                           "json": json.dumps({"colour": colour, "captions": None}).encode()}
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{number:03d}{index:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return f"{folder}/{{000..003}}.tar"


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    """Write (name, content) members as a tar; returns its path."""
    import io
    import tarfile

    with tarfile.open(path, "w") as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return str(path)


@pytest.fixture
def server(tmp_path):
    """The URL of a loopback server of tmp_path, without range requests, as the simplest servers are."""
    import functools
    import http.server
    import threading

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture
def small_siglip_trunk(monkeypatch):
    """timm's SigLIP towers are large: let it know a small one of the same kind."""
    import timm.models._registry as registry

    from clipkit.interop.from_transformers import SIGLIP_TRUNKS
    from tests.test_import import vit_test_patch8_siglip_32

    monkeypatch.setitem(registry._model_entrypoints, "vit_test_patch8_siglip_32", vit_test_patch8_siglip_32)
    monkeypatch.setitem(SIGLIP_TRUNKS, (32, 2, 2, 64, 8), ("vit_test_patch8_siglip", (32,)))


@pytest.fixture(scope="session")
def written_tokenizers():
    """Folders of write_clip_tokenizer with what it returned, by its arguments."""
    return {}


@pytest.fixture
def tokenizer_is_written_once(written_tokenizers, tmp_path_factory, monkeypatch):
    """Each export gets a copy of the tokenizer's folder: making it takes longer than the rest. Not for tests of itself."""
    import shutil

    from clipkit.interop.clip_tokenizer_folder import write_clip_tokenizer

    def copy_of_the_first(folder, **options):
        key = tuple(sorted(options.items()))
        if key not in written_tokenizers:
            first = tmp_path_factory.mktemp("tokenizer")
            written_tokenizers[key] = first, write_clip_tokenizer(first, **options)
        first, tokenizer = written_tokenizers[key]
        shutil.copytree(first, folder, dirs_exist_ok=True)
        return tokenizer

    for module in ("text_encoder", "to_transformers", "onnx_export"):
        monkeypatch.setattr(f"clipkit.interop.{module}.write_clip_tokenizer", copy_of_the_first)


@pytest.fixture
def quick_format(monkeypatch):
    """The export format text_encoder writes one small file."""
    from clipkit.interop.export import FORMATS

    def write(model, folder, config):
        (folder / "layer").write_text(config.layer)
        return {"greatest_differences": {}}

    monkeypatch.setitem(FORMATS, "text_encoder", write)


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory):
    """A tiny CLIP's exported text encoder."""
    import torch

    from clipkit.interop.export import export_text_encoder
    from clipkit.model.build import build_model

    torch.manual_seed(0)
    return export_text_encoder(build_model(config=TINY), tmp_path_factory.mktemp("exported") / "te")


@pytest.fixture(scope="session")
def folders(text_encoder, tmp_path_factory):
    """{name of the process: folder} of text-conditioned latent pipelines."""
    from clipkit.diffusion.conditioning import load_text_conditioning
    from tests.tiny_pipelines import FLOW, PROCESS, make_pipeline

    place = tmp_path_factory.mktemp("pipelines")
    return {name: make_pipeline(place / name, load_text_conditioning(str(text_encoder)), process=process)
            for name, process in (("v", PROCESS), ("flow", FLOW))}
