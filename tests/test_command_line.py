"""From what a person types to settings: quoting through Hydra's own parser, repeated keys, one-line answers, --cfg job."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from clipkit.__main__ import COMMANDS, main
from clipkit.commands.pretrain import IMPLIED
from clipkit.config.command_line import conf_dir, groups_of, hydra_arguments, quote
from clipkit.config.launch import launch
from clipkit.config.pretrain import PretrainConfig
from clipkit.config.schema import SettingsError
from clipkit.config.shards import ShardsCheckConfig, ShardsWriteConfig

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = {"pretrain": PretrainConfig, "shards/write": ShardsWriteConfig, "shards/check": ShardsCheckConfig}
NASTY = [
    "data/{000..003}.tar", "a=b", "a,b", "a b", " lead", "trail ", "  ", "", "it's", "''", "'", '"', 'say "hi"', "\\",
    "back\\slash", "end\\", "end\\\\", "\\'", "a\\'b", "\\\\'", "$", "${", "${x}", "$x", "${oc.env:HOME}", "it's ${y}",
    "1e3", "007", "null", "true", "off", "nan", "[a,b]", "{a:b}", "(x)", "key: value", "über 猫 😀", "~/x", "@/b:c", "%d",
    "tab\tin", "#c", "!", "?*[0-9]", "choice(a,b)", "range(3)", "???", "http://h:80/a?b=c&d", "C:\\new\\${x}",
    "\\${x}", "\\\\${x}",
]


@pytest.fixture
def compose(monkeypatch, tmp_path, capsys):
    """Call it with arguments: all settings objects that the command would have been called with."""
    monkeypatch.chdir(tmp_path)
    # Hydra composes all settings once only to look for hydra.mode in them, and passes over every error there.
    monkeypatch.setattr("hydra._internal.hydra.Hydra.get_mode", lambda self, config_name, overrides: None)

    def call(*arguments: str, command: str = "pretrain") -> list:
        monkeypatch.setattr(sys, "argv", ["clipkit"])
        found = []
        implied = IMPLIED if command == "pretrain" else None
        try:
            launch(command, SCHEMAS[command], lambda config: found.append(config), arguments, implied)
        finally:
            GlobalHydra.instance().clear()
        return found

    return call


@pytest.fixture
def answer(compose, capsys):
    """Call it with arguments that are wrong: the one line of the answer; the exit code is checked here."""
    def call(*arguments: str, command: str = "pretrain") -> str:
        with pytest.raises(SystemExit) as caught:
            compose(*arguments, command=command)
        line = capsys.readouterr().err
        assert caught.value.code == 2, line
        assert line.startswith("clipkit: ")
        assert line.count("\n") == 1, line
        return line.removeprefix("clipkit: ").rstrip("\n")

    return call


@pytest.mark.parametrize("text", NASTY)
def test_hydra_reads_quoted_text_as_it_was_typed(text):
    value = OverridesParser.create().parse_override(f"key={quote(text)}").value()
    assert OmegaConf.to_container(OmegaConf.create({"key": value}), resolve=True) == {"key": text}


def test_texts_arrive_as_they_were_typed(compose):
    texts = [text for text in NASTY if text not in ("", "[a,b]")]  # brackets are a list's own
    parsed = compose("runs_dir=[a,b] {c} it's, ${x} = ", "name=x", *(f"data.train={text}" for text in texts))[0]
    assert parsed.runs_dir == "[a,b] {c} it's, ${x} = "
    assert parsed.data.train == tuple(texts)


def test_null_is_no_text_where_a_setting_may_have_none(compose):
    parsed = compose("name=null", "runs_dir=null", "data.caption_fields=null", "data.caption_weights=null")[0]
    assert (parsed.name, parsed.runs_dir, parsed.data.caption_fields) == (None, "null", None)


def test_hydra_s_plus_before_a_key_that_exists_changes_nothing(compose):
    assert compose("+seed=3", "++optim.lr=2")[0].seed == 3


def test_a_list_may_be_written_in_brackets_with_quotes_around_entries_with_commas(compose):
    parsed = compose("data.train=['a,b.tar',\"c d.tar\", it's.tar , e{0,1}.tar]", "log.to=[]", "name=run",
                     "data.augment.crop_scale=[0.5,1]")[0]
    assert parsed.data.train == ("a,b.tar", "c d.tar", "it's.tar", "e{0,1}.tar")
    assert (parsed.log.to, parsed.data.augment.crop_scale) == ((), (0.5, 1.0))


def test_a_brace_pattern_works_bare_quoted_and_expanded_by_the_shell(compose):
    quoted = compose("data.train=x-{000..001}.tar", "name=run")[0]  # a shell without braces gives the same
    assert quoted.data.train == ("x-{000..001}.tar",)
    expanded = compose("data.train=x-000.tar", "data.train=x-001.tar", "name=run")[0]
    assert expanded.data.train == ("x-000.tar", "x-001.tar")


def test_other_data_imply_the_groups_that_go_with_them_unless_they_are_given(compose):
    parsed = compose("data.train=x.tar", "name=run")[0]
    assert (parsed.model.name, parsed.train.epochs, parsed.evaluation.tasks) == ("ViT-B-32", 32, ())
    assert compose("data.train=x.tar", "name=run", "model=tiny")[0].model.name is None
    assert compose("model.name=RN50")[0].model.config is None


@pytest.mark.parametrize("given", ["data.train=emoji", "data.train=[emoji]"])
def test_the_embedded_data_given_by_name_imply_nothing(compose, given):
    assert compose(given)[0] == compose()[0]


def test_an_inline_model_replaces_the_one_in_the_yaml_file(compose):
    assert compose("model.config.embed_dim=64")[0].model.config["embed_dim"] == 64
    assert compose("model.config={embed_dim: 8}")[0].model.config == {"embed_dim": 8}


@pytest.mark.parametrize(("arguments", "message"), [
    (["optim.nmae=x"], "optim.nmae is not a setting; did you mean optim.name?"),
    (["+optim.nmae=x"], "optim.nmae is not a setting; did you mean optim.name?"),
    (["modle=tiny"], "modle is not a setting; did you mean model?"),
    (["model=tyni"], "model=tyni: no such choice; choose one of emoji, open_clip, start, tiny"),
    (["loss=clip,siglip"], "loss=clip,siglip: no such choice; choose one of clip, emoji, siglip"),
    (["loss=clip", "loss=siglip"], "loss is given 2 times (clip, siglip); give it once"),
    (["optim.name"], "'optim.name' is not a setting; settings are given as key=value, as in optim.lr=1e-3"),
    ([""], "'' is not a setting; settings are given as key=value, as in optim.lr=1e-3"),
    (["optim.lr=1", "optim.lr=2"], "optim.lr is given 2 times (1, 2); it takes one value"),
    (["optim.lr=abc"], "optim.lr is 'abc'; it must be a number"),
    (["optim.lr=-1"], "optim.lr is -1.0; it must be above 0"),
    (["loss.name=foo"], "loss.name is 'foo'; choose one of clip, siglip"),
    (["log.to=[tensorboard,foo]"], "log.to is 'foo'; choose one of tensorboard, wandb"),
    (["train.global_batch_size=1"], "train.global_batch_size is 1; it must be at least 2"),
    (["data.train=x.tar"], "name is required for data other than emoji; give name=... (the run's folder is runs/<name>)"),
    (["data.train=[]", "name=a"],
     "data: data.train is empty; give data.train=emoji or shards such as 'data/{000..099}.tar'"),
    (["data.weights=[1,2]"], "data: data.weights has 2 values for 1 sources; give one each"),
    (["data.caption_fields=[a]"], "data: data.caption_weights has 3 values for 1 caption fields; give one each"),
    (["train.samples=null"],
     "train: give one of train.samples (now None) and train.epochs (now None); set the other to null"),
    (["model.name=RN50", "model=tiny"],
     "model: give either model.name (an open_clip name) or model.config (a model_cfg), not both"),
    (["model.pretrained=openai"], "model: model.pretrained is 'openai' but model.name is null; weights need a named "
     "architecture: give model.name=..."),
])
def test_what_is_wrong_is_answered_in_one_line_and_exit_code_2(answer, arguments, message):
    assert answer(*arguments) == message


@pytest.mark.parametrize("arguments", [
    ["foo=1"], ["optim=3"], ["data.augment=x"], ["=3"], ["~model"], ["~seed"], ["seed=1,2"], ["seed=}{"],
    ["seed={"], ["optim=null"], ["name=", "data.train=x.tar"], ["data.train=", "name=a"], ["hydra.foo=1"],
    ["train.samples=inf"], ["train.samples=1e400"], ["--config-dir", "/no/such/folder"],
], ids=" ".join)
def test_every_other_mistake_is_answered_in_one_line_too(answer, arguments):
    assert answer(*arguments)


def test_shards_commands_name_the_setting_that_they_need(answer):
    assert answer(command="shards/write").startswith("source has no value; give source=... (folder of images")
    assert answer("source=a", command="shards/write") == "out has no value; give out=... (folder for the shards)"
    assert answer(command="shards/check") == "data has no value; give data=... (shards: patterns, globs, URLs)"


def test_an_error_of_the_command_itself_is_one_line_and_its_traceback_is_there_when_asked_for(monkeypatch, capsys):
    def fail(config: PretrainConfig) -> None:
        raise FileNotFoundError("no shard\nat x.tar")

    monkeypatch.setattr(sys, "argv", ["clipkit"])
    with pytest.raises(SystemExit) as caught:
        launch("pretrain", PretrainConfig, fail, [])
    assert (caught.value.code, capsys.readouterr().err) == (2, "clipkit: no shard at x.tar\n")
    GlobalHydra.instance().clear()


def test_the_exit_code_of_a_command_is_passed_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["clipkit"])
    with pytest.raises(SystemExit) as caught:
        launch("pretrain", PretrainConfig, lambda config: 75, [])
    assert caught.value.code == 75
    GlobalHydra.instance().clear()


def test_multirun_calls_the_command_for_each_combination_and_writes_only_below_the_runs_folder(compose, tmp_path):
    runs = compose("-m", "loss=clip,siglip", "name=choice(a,b)", "model.image_weights=c,d")
    assert [(run.loss.name, run.name, run.model.image_weights) for run in runs] == [
        ("clip", "a", "c,d"), ("clip", "b", "c,d"), ("siglip", "a", "c,d"), ("siglip", "b", "c,d")]
    assert [path.name for path in tmp_path.iterdir()] in ([], ["runs"])


def test_multirun_refuses_a_choice_that_does_not_exist_before_it_begins(answer):
    assert answer("-m", "loss=clip,sigmoid") == "loss=sigmoid: no such choice; choose one of clip, emoji, siglip"


def test_hydra_s_own_settings_and_launchers_pass_through(compose):
    groups = groups_of([conf_dir() / "shared", conf_dir() / "pretrain"])
    assert "hydra/launcher=basic" in hydra_arguments(["hydra/launcher=basic"], PretrainConfig, groups)
    assert "hydra.verbose=true" in hydra_arguments(["hydra.verbose=true"], PretrainConfig, groups)


def test_settings_of_one_s_own_come_from_config_dir(compose, tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    text = (conf_dir() / "pretrain" / "model" / "tiny.yaml").read_text(encoding="utf-8").replace("width: 32", "width: 16")
    (tmp_path / "mine" / "model" / "smaller.yaml").write_text(text, encoding="utf-8")
    parsed = compose("--config-dir", str(tmp_path / "mine"), "model=smaller")[0]
    assert parsed.model.config["text_cfg"]["width"] == 16


@pytest.mark.parametrize("arguments", [
    ["model=tiny", "data=emoji", "name=try", "train.samples=512"],
    ["data.train=shards/{00000..00099}.tar", "name=mine"], ["data.train=[emoji,x.tar]", "data.weights=[1,2]", "name=mix"],
    ["model.name=RN50", "model.lock_image=true"], ["loss=siglip", "loss.mask_false_negatives=caption"],
    ["optim.recipe=open_clip", "schedule=constant_with_cooldown", "schedule.warmup=50k samples"],
    ["schedule.warmup=2%", "train.epochs=2", "train.samples=null", "train.precision=amp_bf16", "data.decode=fast",
     "train.overfit_batches=1", "data.workers=0", "data.lanes=4", "model.config.text_cfg.kind=cbow"],
], ids=" ".join)
def test_command_lines_of_pretrain_compose(compose, arguments):
    assert len(compose(*arguments)) == 1


def test_command_lines_of_shards_compose(compose):
    written = compose("source=my pictures, 2024", "out=shards", command="shards/write")[0]
    assert (written.source, written.out) == ("my pictures, 2024", "shards")
    assert compose("data=shards/{00..09}.tar", command="shards/check")[0].data == ("shards/{00..09}.tar",)


def test_unknown_keys_are_found_without_composing():
    with pytest.raises(SettingsError):
        hydra_arguments(["sede=1"], PretrainConfig, {})


def test_cfg_job_prints_all_values_without_loading_torch():
    code = ("import sys; sys.argv = ['clipkit', 'pretrain', 'model=tiny', '--cfg', 'job']\n"
            "from clipkit.__main__ import main; main()\n"
            "assert 'torch' not in sys.modules and 'open_clip' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "global_batch_size: 256" in done.stdout
    assert "patch_size: 8" in done.stdout


@pytest.mark.parametrize(("arguments", "code", "text"), [
    (["--help"], 0, "pretrain"), ([], 0, "shards"), (["--version"], 0, "clipkit 0."),
    (["pretrain", "--help"], 0, "optim.lr "), (["pretrain", "-h"], 0, "model        emoji | open_clip | start | tiny"),
    (["shards"], 0, "clipkit shards write"), (["shards", "check", "--help"], 0, "context_length"),
    (["train"], 1, f"clipkit: 'train' is not a command; choose one of {', '.join(COMMANDS)}"),
    (["shards", "read"], 2, "clipkit: shards read: no such command; choose write or check"),
], ids=str)
def test_help_and_wrong_commands(arguments, code, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["clipkit", *arguments])
    if not code:
        main()
        assert text in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as caught:
        main()
    said = caught.value.code  # a text is printed by Python, and the code is 1
    assert said == (text if code == 1 else code) and (code == 1 or text in capsys.readouterr().err)
