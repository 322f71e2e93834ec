import os
from pathlib import Path

import pytest

from ldm import config
from ldm.config import RunConfig, from_mapping, load, override
from ldm.registry import ConfigError

TINY = Path(__file__).resolve().parents[2] / "configs" / "train" / "tiny"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path / "a.yaml", "")) == RunConfig()


def test_values_are_typed(tmp_path: Path) -> None:
    cfg = load(
        write(tmp_path / "a.yaml", "train: {steps: 50_000, lr: 1e-4, betas: [0.5, 0.9], trainable: ['adapters.*']}")
    )
    assert (cfg.train.steps, cfg.train.lr, cfg.train.betas) == (50_000, 1e-4, (0.5, 0.9))
    assert list(cfg.train.trainable) == ["adapters.*"]


def test_result_is_frozen(tmp_path: Path) -> None:
    cfg = load(write(tmp_path / "a.yaml", ""))
    with pytest.raises(AttributeError):
        cfg.seed = 1  # pyright: ignore


def test_later_includes_win_and_the_file_itself_over_all(tmp_path: Path) -> None:
    write(tmp_path / "one.yaml", "seed: 1\ntrain: {steps: 1, batch: 1, warmup: 1}")
    write(tmp_path / "two.yaml", "train: {steps: 2, batch: 2}")
    cfg = load(write(tmp_path / "a.yaml", "include: [one.yaml, two.yaml]\ntrain: {steps: 3}"))
    assert (cfg.seed, cfg.train.warmup, cfg.train.batch, cfg.train.steps) == (1, 1, 2, 3)


def test_includes_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    write(tmp_path / "parts" / "deep" / "leaf.yaml", "seed: 7")
    write(tmp_path / "parts" / "mid.yaml", "include: [deep/leaf.yaml]")
    assert load(write(tmp_path / "a.yaml", "include: [parts/mid.yaml]")).seed == 7


def test_file_included_twice_is_no_circle(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "seed: 7")
    write(tmp_path / "b.yaml", "include: [base.yaml]")
    assert load(write(tmp_path / "a.yaml", "include: [base.yaml, b.yaml]")).seed == 7


def test_nodes_merge_key_by_key(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "model: {vae: {name: kl, blocks: 1, groups: 8}}")
    cfg = load(write(tmp_path / "a.yaml", "include: [base.yaml]\nmodel: {vae: {groups: 4}}"))
    assert cfg.model.vae == {"name": "kl", "blocks": 1, "groups": 4}


def test_naming_another_class_starts_its_options_afresh(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "model: {clip: {name: clip, image: {name: vit, layers: 6}}}")
    cfg = load(write(tmp_path / "a.yaml", "include: [base.yaml]\nmodel: {clip: {image: {name: swin, window: 4}}}"))
    assert cfg.model.clip == {"name": "clip", "image": {"name": "swin", "window": 4}}


def test_override_sets_keys_together_as_a_command_line_does() -> None:
    base = from_mapping({"sample": {"sampler": {"name": "ddim", "steps": 9, "eta": 0.5}, "strength": 0.5}})
    assert override(base, {"sample.sampler.steps": 4}, "x").sample.sampler == {"name": "ddim", "steps": 4, "eta": 0.5}
    other = override(base, {"sample.sampler.steps": 4, "sample.sampler.name": "heun", "sample.strength": None}, "x")
    assert other.sample.sampler == {"name": "heun", "steps": 4}  # the other class has no eta, and neither order loses 4
    assert other.sample.strength is None and base.sample.strength == 0.5
    with pytest.raises(ConfigError, match=r"x: unknown key 'sample\.guidance\.scael'"):
        override(base, {"sample.guidance.scael": 1}, "x")


def test_null_empties_a_slot(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "model: {vae: {name: kl}}")
    assert load(write(tmp_path / "a.yaml", "include: [base.yaml]\nmodel: {vae: null}")).model.vae is None


def test_command_line_wins_over_the_file_and_later_arguments_over_earlier(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "train: {steps: 1}\nadapters: {canny: {name: controlnet}}")
    cfg = load(
        path,
        ["train.steps=2", "train.steps=3", "adapters.canny.hint=edge", "train.trainable=[unet.*]", "model.vae=null"],
    )
    assert cfg.train.steps == 3
    assert list(cfg.train.trainable) == ["unet.*"]
    assert cfg.adapters == {"canny": {"name": "controlnet", "hint": "edge"}}


def test_command_line_value_may_hold_an_equals_sign_and_be_empty(tmp_path: Path) -> None:
    cfg = load(write(tmp_path / "a.yaml", ""), ["sample.prompts=a=b", "sample.negative=''", "train.ema="])
    assert (cfg.sample.prompts, cfg.sample.negative, cfg.train.ema) == ("a=b", "", None)


@pytest.mark.parametrize("argument", ["train.steps", "=3", "--steps"])
def test_argument_without_a_key_is_refused(tmp_path: Path, argument: str) -> None:
    with pytest.raises(ConfigError, match=r"is not key=value; write e.g. train.steps=100"):
        load(write(tmp_path / "a.yaml", ""), [argument])


def test_reference_to_another_key_is_resolved(tmp_path: Path) -> None:
    cfg = load(write(tmp_path / "a.yaml", "seed: 5\ndata: {name: synthetic, size: 32, seed: '${seed}'}"), ["seed=6"])
    assert cfg.data == {"name": "synthetic", "size": 32, "seed": 6}


def test_unknown_key_is_refused_with_its_path_and_a_suggestion(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "train: {stepz: 3}")
    with pytest.raises(
        ConfigError, match=r"a.yaml: unknown key 'train.stepz'; keys here: steps,.*did you mean 'steps'\?"
    ):
        load(path)


def test_unknown_top_level_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'trian'.*did you mean 'train'\?"):
        load(write(tmp_path / "a.yaml", "trian: {steps: 3}"))


@pytest.mark.parametrize(
    "key", ["zzz", "run.zzz", "model.zzz", "train.zzz", "sample.guidance.zzz", "validation.zzz", "out.zzz"]
)
def test_unknown_key_is_refused_in_every_group(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
        load(write(tmp_path / "a.yaml", ""), [f"{key}=1"])


def test_unknown_key_on_the_command_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'sample.promts'.*did you mean 'prompts'\?"):
        load(write(tmp_path / "a.yaml", ""), ["sample.promts=a cat"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {steps: many}", "train.steps is 'many', must be int, e.g. 1000$"),
        ("train: {lr: [1]}", r"train.lr is \[1\], must be float, e.g. 0.0001$"),
        ("train: {ema: fast}", r"train.ema is 'fast', must be float \| null$"),
        ("train: {compile: fast}", "train.compile is 'fast', must be bool, e.g. false$"),
        ("data: [folder]", r"data is \['folder'\], must be a mapping of keys$"),
        ("train: 3", "train"),
        ("train: {betas: 0.9}", r"train\.betas is 0\.9, must be a list like \[0\.9, 0\.999\]"),
        ("train: {betas: [0.9]}", r"train\.betas is \[0\.9\], must be a list like"),
        ("train: {trainable: adapters.*}", r"train\.trainable is 'adapters\.\*', must be a list like \['\*'\]"),
        ("train: {steps: {a: 1}}", "train.steps"),
        ("seed: null", "seed"),
        ("model: {vae: kl}", r"model.vae is 'kl', must be a mapping \| null$"),
        ("adapters: [controlnet]", "adapters"),
    ],
)
def test_wrong_type_is_refused_in_one_line_with_its_path(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"a.yaml: {said}") as error:
        load(write(tmp_path / "a.yaml", text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.steps=3", "train.stepz=3", "seed=1"], r"^argument 'train\.stepz=3': unknown key 'train\.stepz'; keys"),
        (["seed=1", "train.lr=fast"], r"^argument 'train\.lr=fast': train\.lr is 'fast', must be float"),
        (["train.lr=-1", "seed=1"], r"^argument 'train\.lr=-1': train\.lr is -1\.0, must be at least 0"),
        (["train.lr=fast", "seed=1"], r"^argument 'train\.lr=fast': train\.lr is 'fast'"),
        (["seed=1", "train.lr=fast", "train.stepz=3"], r"^argument 'train\.lr=fast': "),
        (["train=3", "seed=1"], r"^argument 'train=3': train is 3, must be a mapping"),
    ],
)
def test_a_fault_of_the_command_line_names_its_argument(tmp_path: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(write(tmp_path / "a.yaml", "train: {steps: 5}"), arguments)


def test_a_fault_of_the_file_names_the_file_whatever_the_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a.yaml: unknown key 'train\.stepz'"):
        load(write(tmp_path / "a.yaml", "train: {stepz: 5}"), ["seed=1", "train.lr=1"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {steps: 0}", "train.steps is 0, must be at least 1 and finite"),
        ("train: {micro_batch: 0}", "train.micro_batch is 0, must be at least 1"),
        ("checkpoint: {every: 0}", "checkpoint.every is 0, must be at least 1"),
        ("train: {lr: -1.0}", "train.lr is -1.0, must be at least 0"),
        ("train: {lr: .nan}", "train.lr is nan, must be at least 0 and finite"),
        ("train: {lr: .inf}", "train.lr is inf, must be at least 0 and finite"),
        ("train: {clip: 0.0}", "train.clip is 0, which stops all training; must be positive, or null for none"),
        ("train: {ema: 1.0}", "train.ema is 1.0, must be at least 0 and below 1"),
        ("train: {betas: [0.9, 1.0]}", r"train.betas is \(0.9, 1.0\), must be at least 0 and below 1"),
        ("train: {precision: bf61}", r"train.precision is 'bf61'; allowed: fp32, bf16, fp16; did you mean 'bf16'\?"),
        ("train: {decay: linear}", "train.decay is 'linear'; allowed: constant, cosine"),
        ("log: {wandb: on}", "log.wandb is 'True'; allowed: disabled, offline, online"),
        ("device: gpu", "device is 'gpu'; allowed: auto, cpu, cuda"),
        ("model: {objective: epsilon}", "model.objective is 'epsilon'; allowed: eps, v, x0"),
    ],
)
def test_value_out_of_range_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"a.yaml: {said}"):
        load(write(tmp_path / "a.yaml", text))


def test_missing_file_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    write(tmp_path / "controlnet.yaml", "")
    with pytest.raises(ConfigError, match=r"contrlnet.yaml does not exist; did you mean 'controlnet.yaml'\?"):
        load(tmp_path / "contrlnet.yaml")


def test_missing_folder_and_folder_instead_of_file_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere" / "a.yaml", tmp_path):
        with pytest.raises(
            ConfigError, match=r"does not exist; correct the path; configs to begin with are in configs/$"
        ):
            load(path)


def test_missing_include_names_the_included_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone.yaml does not exist"):
        load(write(tmp_path / "a.yaml", "include: [gone.yaml]"))


def test_include_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "b.yaml", "include: [a.yaml]")
    with pytest.raises(ConfigError, match=r"a.yaml: includes itself through a.yaml -> b.yaml; break the circle"):
        load(write(tmp_path / "a.yaml", "include: [b.yaml]"))


def test_include_must_be_a_list(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"include is 'b.yaml', must be a list of files"):
        load(write(tmp_path / "a.yaml", "include: b.yaml"))


def test_duplicate_key_is_refused_at_any_depth(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"key 'lr' is given twice.*line 2"):
        load(write(tmp_path / "a.yaml", "train:\n  lr: 1\n  lr: 2\n"))


@pytest.mark.parametrize("text", ["train: {", "a: b: c", "\t- x", "- a\n- b", "just text", "3"])
def test_bad_yaml_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path / "a.yaml", text))
    assert "\n" not in str(error.value)
    assert "a.yaml" in str(error.value)


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00seed")
    with pytest.raises(ConfigError, match=r"a.yaml.*not"):
        load(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch {mark}']",
        "!!python/object/new:os.system ['touch {mark}']",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
def test_yaml_tags_that_run_code_are_refused(tmp_path: Path, value: str) -> None:
    mark = tmp_path / "mark"
    path = write(tmp_path / "a.yaml", f"sample:\n  prompts: {value.format(mark=mark)}")
    with pytest.raises(ConfigError, match="not valid YAML: could not determine a constructor"):
        load(path)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(write(tmp_path / "b.yaml", ""), [f"sample.prompts={value.format(mark=mark)}"])
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:HOME}",
        "${oc.env:HOME,x}",
        "${oc.decode:'1'}",
        "a ${oc.env:${seed}} b",
        "${no_such:1}",
        "${oc.${seed}:HOME}",
    ],
)
def test_resolvers_are_refused(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HOME", "secret")
    for place in ('out: {{dir: "{}"}}', 'data: {{name: folder, root: [{{a: "{}"}}]}}'):
        with pytest.raises(ConfigError, match="is a resolver; only references") as error:
            load(write(tmp_path / "a.yaml", place.format(text)))
        assert "secret" not in str(error.value)


@pytest.mark.parametrize("text", ["${nowhere}", "${seed", "${out.dir}"])
def test_reference_that_leads_nowhere_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"a.yaml: "):
        load(write(tmp_path / "a.yaml", f"out: {{dir: '{text}'}}"))
    with pytest.raises(ConfigError, match=r"^argument .*out\.dir="):
        load(write(tmp_path / "b.yaml", ""), [f"out.dir='{text}'"])


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    text = """
    seed: 3
    model: {vae: {name: kl, channels: [8, 16]}, schedule: {kind: cosine}, objective: v}
    adapters: {a: {name: controlnet, hint_widths: [8, 16]}}
    data: {name: synthetic, size: 32, where: {split: [x, y]}}
    train: {lr: 1.0e-5, ema: 0.999, clip: null, micro_batch: 2}
    sample: {prompts: ["a: b", "yes", "été ${seed}"], seeds: "0-3", hints: {a: x.png}}
    """
    cfg = load(write(tmp_path / "a.yaml", text))
    again = load(write(tmp_path / "b.yaml", config.dump(cfg)))
    assert again == cfg
    assert config.dump(again) == config.dump(cfg)


def test_parser_offers_what_every_script_shares() -> None:
    args = config.parser("words").parse_intermixed_args(["--config", "a.yaml", "train.steps=3", "--dry-run", "seed=1"])
    assert (args.config, args.dry_run, args.print_config) == ("a.yaml", True, False)
    assert args.overrides == ["train.steps=3", "seed=1"]


def test_a_name_in_place_of_a_node_says_how_to_write_it() -> None:
    with pytest.raises(ConfigError, match=r"sample.sampler is 'euler', .* e.g. sample.sampler.name=euler"):
        config.load(TINY / "ldm.yaml", ["sample.sampler=euler"])
