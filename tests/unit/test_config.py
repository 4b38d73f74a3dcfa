"""Configurations are checked, frozen, written and read back; what is wrong is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from ganscale.cli.training import PRESETS
from ganscale.config import Config, Schedule, field_names, load_config, preset_names
from ganscale.config.methods import (
    BiganMethod,
    EncoderMethod,
    GanMethod,
    SemiSupervisedMethod,
    VaeGanMethod,
    VaeMethod,
)
from ganscale.config.models import (
    BigganModel,
    DcganModel,
    R3ganModel,
    SnganModel,
    Stylegan2Model,
)
from ganscale.errors import ConfigError


def refusal(*overrides: str, source: str | Path = "quickstart") -> str:
    """The one line with which a configuration is refused."""
    with pytest.raises(ConfigError) as error:
        load_config(source, overrides)
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


CHOICES: dict[str, tuple[type[BaseModel], ...]] = {
    "model": (DcganModel, SnganModel, BigganModel, R3ganModel, Stylegan2Model),
    "method": (
        GanMethod,
        VaeMethod,
        VaeGanMethod,
        EncoderMethod,
        BiganMethod,
        SemiSupervisedMethod,
    ),
}


def leaf_descriptions(model: type[BaseModel], prefix: str = "") -> dict[str, str | None]:
    """Of every field by its dotted name; the choices share the descriptions of like fields."""
    found: dict[str, str | None] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if prefix == "" and name in CHOICES:
            for choice in CHOICES[name]:
                fields = leaf_descriptions(choice, f"{name}.")
                found |= {key: text or found.get(key) for key, text in fields.items()}
        elif isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not Schedule:
            found |= leaf_descriptions(kind, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = field.description
    return found


def test_presets_ship_with_the_package() -> None:
    assert {"quickstart", "dcgan-cifar10"} <= set(preset_names())


def test_help_lists_the_presets() -> None:
    assert set(PRESETS.split(", ")) == set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_loads_and_names_its_run(name: str) -> None:
    assert load_config(name).name == name


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 5\ntraining: {batch_size: 32, total_kimg: 7}\n")
    config = load_config(path, ["training.batch_size=16", "data.shards=null", "name=other"])
    assert (config.seed, config.training.batch_size, config.training.total_kimg) == (5, 16, 7.0)
    assert (config.name, config.optimizer) == ("other", Config().optimizer)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text("")
    assert load_config(path) == Config(name="plain")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("training.batchsize=3", "training.batch_size"),
        ("trainning.batch_size=3", "training.batch_size"),
        ("optimizer.learning_rate_=3", "optimizer"),
        ("sed=1", "seed"),
        ("model.zdim=1", "model.z_dim"),
        ("launch.num_worker=1", "launch.num_workers"),
        ("training.steps.more=1", "training"),
    ],
)
def test_an_unknown_field_is_named_with_the_nearest(override: str, nearest: str) -> None:
    message = refusal(override)
    assert "unknown field" in message
    assert nearest in message


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("training.batch_size=many", "training.batch_size"),
        ("training.batch_size=1.5", "training.batch_size"),
        ("training.batch_size=null", "training.batch_size"),
        ("training.batch_size=[1]", "training.batch_size"),
        ("launch.use_gpu=7", "launch.use_gpu"),
        ("data.source=[1, 2]", "data.source"),
        ("optimizer.lr={a: 1}", "optimizer.lr"),
        ("training=3", "training"),
        ("model=null", "model"),
    ],
)
def test_a_wrong_type_names_field_and_value(override: str, field: str) -> None:
    assert field in refusal(override)


@pytest.mark.parametrize(
    "override",
    [
        "training.batch_size=0",
        "training.total_kimg=-1",
        "training.total_kimg=.nan",
        "training.total_kimg=.inf",
        "optimizer.beta1=1",
        "optimizer.lr=0",
        "model.resolution=8",
        "model.resolution=512",
        "model.z_dim=0",
        "checkpoint.keep_last=0",
        "launch.max_failures=-2",
        "samples.num_images=5000",
        "seed=-1",
        "training.precision=fp8",
        "model.img_channels=2",
        "augment.p=1.5",
        "penalty.r1=-1",
        "objective.top_k=0",
        "optimizer.beta2={start: 0.9, end: 1.5, kimg: 3, shape: linear}",
        "optimizer.lr={start: 0.9, end: 1.5, kimg: 3, shape: constant}",
        "model.name=transformer",
        "name=../escape",
        "name=.hidden",
    ],
)
def test_a_value_out_of_bounds_names_field_and_value(override: str) -> None:
    field = override.partition("=")[0]
    assert field in refusal(override)


_WAY = "{start: 0, end: 0.5, kimg: 10, shape: linear}"
_SEMI_SUPERVISED = "method={name: semi-supervised, labels: 100}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.batch_size=4", "launch.num_workers=3"], ["num_workers=3", "batch_size=4"]),
        (["training.batch_size=1", "launch.num_workers=1"], ["batch_size=1", "at least 2"]),
        (["training.batch_size=128", "training.total_kimg=0.1"], ["total_kimg=0.1", "128"]),
        (["model.resolution=48"], ["model.resolution", "power of two", "48"]),
        (["model={name: biggan, z_dim: 81}"], ["model.z_dim=81", "4 parts"]),
        (["model={name: biggan, num_classes: 0}"], ["model.num_classes=0"]),
        (["model.num_classes=10"], ["model.num_classes=10"]),
        (["model={name: r3gan, base_channels: 24, resolution: 64}"], ["base_channels=24", "16"]),
        (["objective.name=wasserstein"], ["wasserstein", "penalty.wgan_gp=10"]),
        (
            ["penalty.gradient_normalisation=true", "penalty.r1=1"],
            ["gradient_normalisation", "penalty.r1", "third derivatives"],
        ),
        (["augment.name=ada"], ["augment.p=0", "augment.target=0.6"]),
        (["augment.p=0.5"], ["augment.name=ada"]),
        (
            ["augment.name=ada", "augment.target=0.6", f"augment.p={_WAY}"],
            ["augment.p", "augment.target=0.6", "adapted"],
        ),
        (
            ["augment.name=ada", "augment.p=0.5", "augment.adapt_kimg=100"],
            ["augment.adapt_kimg=100", "augment.target=0.6"],
        ),
        (
            ["training.extra_ema_halflives_kimg=[50, 50.00001]"],
            ["training.extra_ema_halflives_kimg=[50.0, 50.00001]"],
        ),
        (
            ["penalty.r1=1", "penalty.form=finite_difference", "training.precision=bf16"],
            ["penalty.form=finite_difference", "training.precision=bf16"],
        ),
        (
            ["model=stylegan2", "penalty.orthogonal=1e-4"],
            ["penalty.orthogonal=0.0001", "stylegan2"],
        ),
        (
            [
                "model={name: sngan, num_classes: 10}",
                _SEMI_SUPERVISED,
                "objective.name=wasserstein",
            ],
            ["wasserstein", "penalty.wgan_gp=10"],
        ),
    ],
)
def test_an_impossible_combination_says_what_does_not_fit(
    overrides: list[str], words: list[str]
) -> None:
    message = refusal(*overrides)
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.name=wasserstein", "penalty.wgan_gp=10"],
        ["objective.name=wasserstein", "optimizer.clip_weights=0.01"],
        ["objective.name=wasserstein", "model={name: sngan}"],
        ["objective.name=wasserstein", "method.name=bigan"],
        ["guard.max_rollbacks=5"],  # of callbacks, which ask for rollbacks too
        ["training.extra_ema_halflives_kimg=[50, 50.01]"],
        ["penalty.form=finite_difference", "training.precision=bf16"],
        ["augment.name=ada", "augment.target=0.6", "augment.p=0.2", "augment.adapt_kimg=100"],
        ["training.compile=on", "penalty.r1=1", "method.name=vae-gan"],
        ["augment.name=ada", "augment.target=0.6"],
        ["augment.name=diffaugment", "augment.p=1"],
    ],
)
def test_what_goes_together_is_accepted(overrides: list[str]) -> None:
    load_config("quickstart", overrides)


@pytest.mark.parametrize("text", ["2e-4", "{start: 2e-4, end: 5e-5, kimg: 20, shape: cosine}"])
def test_a_schedule_is_a_number_or_a_way_and_survives_yaml(tmp_path: Path, text: str) -> None:
    config = load_config("quickstart", [f"optimizer.lr={text}"])
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert config.optimizer.lr.at(0) == 2e-4
    assert ("start:" in path.read_text()) == ("start:" in text)


def test_schedules_move_as_they_say() -> None:
    linear = Schedule(start=1.0, end=3.0, kimg=4, shape="linear")
    cosine = Schedule(start=1.0, end=3.0, kimg=4, shape="cosine")
    assert [linear.at(n) for n in (0, 1000, 2000, 4000, 9000)] == [1.0, 1.5, 2.0, 3.0, 3.0]
    quarter = 1 + (1 - 2**-0.5)  # 1 + 2 * (1 - cos(pi / 4)) / 2
    assert [cosine.at(n) for n in (0, 1000, 2000, 4000, 9000)] == pytest.approx(
        [1.0, quarter, 2.0, 3.0, 3.0]
    )


def test_several_mistakes_are_told_at_once() -> None:
    message = refusal("seed=-1", "optimizer.lr=0", "training.btch_size=3")
    assert all(name in message for name in ("seed", "optimizer.lr", "training.btch_size"))


@pytest.mark.parametrize("override", ["seed", "=3", "", "seed:3"])
def test_an_override_without_a_name_or_value_is_refused(override: str) -> None:
    assert "expected section.field=value" in refusal(override)


def test_an_unknown_preset_lists_the_known_and_the_nearest() -> None:
    message = refusal(source="quikstart")
    assert "did you mean 'quickstart'" in message
    assert all(name in message for name in preset_names())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "absent.yaml") in refusal(source=tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "content",
    [
        b"- a\n- b\n",
        b"just words",
        b"3",
        b"training: [\n",
        b"a: b: c\n",
        b"training: 5\n",
        b"1: 2\n",
        b"\xff\xfe\xfa",
        b"\x89PNG\r\n\x1a\n\x00",
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    refusal(source=path)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml" in refusal(source=tmp_path / "folder.yaml")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("evaluation.metrics=[kid,neighbourhood]", "metrics='neighbourhood': .* now called prdc"),
        ("checkpoint.best_metric=frechet", "best_metric='frechet': .* is now called fid"),
    ],
)
def test_an_old_name_of_a_metric_is_refused_with_the_new_one(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=new):
        load_config("dcgan-cifar10", [old])


def test_a_configuration_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.training.batch_size = 3  # type: ignore[misc]


def test_a_changed_copy_is_validated_and_the_original_kept() -> None:
    config = Config()
    assert config.with_changes({"training.batch_size": 16}).training.batch_size == 16
    assert config.training.batch_size == 128
    with pytest.raises(ConfigError, match="launch.num_workers"):
        config.with_changes({"launch.num_workers": 0})


@pytest.mark.parametrize("name", ["sngan", "biggan", "r3gan", "stylegan2"])
def test_another_architecture_has_its_own_defaults_however_it_is_chosen(
    tmp_path: Path, name: str
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: {name: dcgan, img_channels: 1}")
    changed = load_config(file).with_changes({"model.name": name})
    assert changed == load_config(file, [f"model.name={name}"])
    assert changed.model.img_channels == 1


@pytest.mark.parametrize("change", ["model.name=r3gan", "model=r3gan", "model={name: r3gan}"])
def test_another_architecture_does_not_take_the_sizes_of_the_one_before(change: str) -> None:
    assert load_config("dcgan-cifar10", [change]).model == R3ganModel()
    narrow = load_config("quickstart", [change, "model.base_channels=16"])
    assert narrow.model == R3ganModel(base_channels=16)
    assert narrow.optimizer == load_config("quickstart").optimizer
    photos = load_config("photos-64", [change])
    assert photos.model == R3ganModel(resolution=64)


def test_the_architecture_that_is_there_already_keeps_its_sizes() -> None:
    quickstart = load_config("quickstart")
    assert load_config("quickstart", ["model.name=dcgan"]) == quickstart
    assert quickstart.with_changes({"model": {"name": "dcgan"}}).model.base_channels == 32


def test_another_method_does_not_take_the_weights_of_the_one_before() -> None:
    vae_gan = Config(method=VaeGanMethod(beta=3, adversarial=2))
    assert vae_gan.with_changes({"method.name": "vae"}).method == VaeMethod()
    assert vae_gan.with_changes({"method.name": "vae-gan"}).method == vae_gan.method


def test_a_mapping_changes_what_it_names_and_leaves_the_rest_of_its_section() -> None:
    quickstart = load_config("quickstart")
    expected = load_config("quickstart", ["training.total_kimg=48", "training.precision=bf16"])
    changes = {"training": {"total_kimg": 48}, "training.precision": "bf16"}
    assert quickstart.with_changes(changes) == expected
    assert load_config("quickstart", ["training={total_kimg: 48, precision: bf16}"]) == expected
    message = refusal("training={total_kimg: 48, betch_size: 3}", source="quickstart")
    assert "unknown field 'training.betch_size'" in message


def test_a_schedule_is_replaced_as_a_whole() -> None:
    schedule = {"start": 1e-3, "end": 1e-4, "kimg": 10, "shape": "linear"}
    config = load_config("r3gan-cifar10").with_changes({"optimizer": {"lr": schedule}})
    assert config.optimizer.lr == Schedule.model_validate(schedule)
    assert config.optimizer.beta1 == 0
    cut = {"optimizer.lr": {"start": 1e-3}}
    with pytest.raises(ConfigError, match=r"optimizer\.lr.*is required"):
        config.with_changes(cut)


def test_a_change_keeps_the_architecture_and_the_method_that_were_given_as_objects() -> None:
    config = Config(model=SnganModel(base_channels=16), method=VaeMethod(beta=2))
    assert config.with_changes({}) == config
    assert config.with_changes({"model.z_dim": 8}).model == SnganModel(base_channels=16, z_dim=8)


def test_what_a_run_has_written_down_stays_as_it_is_in_a_changed_copy(tmp_path: Path) -> None:
    """A later version may have other defaults; the run was trained with these."""
    file = tmp_path / "config.yaml"
    file.write_text(Config().to_yaml())
    written = load_config(file)
    changed = written.with_changes({"model": {**written.model.model_dump(), "name": "sngan"}})
    assert changed.model.z_dim == Config().model.z_dim
    assert written.with_changes({}).model_fields_set == set(Config.model_fields)


@pytest.mark.parametrize(
    ("source", "override", "problem"),
    [
        ("dcgan-cifar10", "method.beta=2", "method.name=gan has no field beta"),
        ("dcgan-cifar10", "method.labels=3", "method.name=gan has no field labels"),
        ("dcgan-cifar10", "model.blocks_per_stage=3", "model.name=dcgan has no field blocks_per_"),
    ],
)
def test_a_field_of_another_choice_is_refused_by_the_name_of_the_choice(
    source: str, override: str, problem: str
) -> None:
    assert refusal(override, source=source).startswith(problem)


def test_a_section_that_is_given_by_its_name_takes_fields_too(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: sngan\nmethod: vae")
    config = load_config(file, ["model.z_dim=64", "method.beta=2"])
    assert config.model == SnganModel(z_dim=64)
    assert config.method == VaeMethod(beta=2)
    file.write_text("training: fast")
    message = refusal("training.batch_size=8", source=file)
    assert message == "training='fast' is no section of fields, of which training.batch_size is one"


@pytest.mark.parametrize("name", preset_names())
def test_written_yaml_reads_back_equal(tmp_path: Path, name: str) -> None:
    config = load_config(
        name, ["name=other", "seed=9", "optimizer.lr=1e-5", "data.shards=/some/where"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert list(yaml.safe_load(config.to_yaml())) == list(Config.model_fields)


@pytest.mark.parametrize(
    ("total_kimg", "batch_size", "total_nimg"),
    [(1, 100, 1000), (1, 64, 1024), (0.1, 64, 128), (2500, 128, 2_500_096), (0.3, 100, 300)],
)
def test_the_length_is_a_whole_number_of_batches(
    total_kimg: float, batch_size: int, total_nimg: int
) -> None:
    changes = {"training.total_kimg": total_kimg, "training.batch_size": batch_size}
    assert Config().with_changes(changes).total_nimg == total_nimg


@pytest.mark.parametrize("field", ["cuda_graphs", "compile"])
@pytest.mark.parametrize("value", ["auto", "on", "off"])
def test_on_and_off_are_words_in_yaml_and_on_the_command_line(field: str, value: str) -> None:
    config = load_config("quickstart", [f"training.{field}={value}"])
    assert getattr(config.training, field) == value
    assert getattr(Config(**yaml.safe_load(config.to_yaml())).training, field) == value


@pytest.mark.parametrize(("before", "now"), [(True, "on"), (False, "off")])
def test_compile_was_true_or_false(before: bool, now: str) -> None:
    assert Config(training={"compile": before}).training.compile == now


def test_there_are_at_most_96_fields() -> None:
    names = list(field_names())
    assert len(names) == len(set(names))
    assert set(names) == set(leaf_descriptions(Config))
    assert 1 <= len(names) <= 96


@pytest.mark.parametrize(("name", "description"), leaf_descriptions(Config).items())
def test_every_field_has_a_sentence(name: str, description: str | None) -> None:
    assert description, name
    assert description.endswith("."), name


def test_every_field_can_be_set_by_its_name() -> None:
    settable = set()
    configs = [Config(model=model()) for model in CHOICES["model"]]
    methods = ({"name": "vae"}, {"name": "vae-gan"}, {"name": "encoder", "generator": "a.pt"})
    configs += [load_config("quickstart").with_changes({"method": method}) for method in methods]
    semi_supervised = {"method": {"name": "semi-supervised"}, "model.num_classes": 10}
    configs += [Config().with_changes(semi_supervised)]
    for config in configs:
        for name in field_names():
            section, _, field = name.rpartition(".")
            owner = getattr(config, section) if section else config
            if hasattr(owner, field):
                assert config.with_changes({name: getattr(owner, field)}) == config
                settable.add(name)
    assert settable == set(field_names())
