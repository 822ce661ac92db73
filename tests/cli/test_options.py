"""Settings on the command line: every one is there, none is repeated, and the order of precedence is as promised."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
import numpy as np
import pytest
from click.testing import CliRunner
from workshop import Workshop

from ebm_prior.cli.main import main
from ebm_prior.cli.options import Drawing, config_options
from ebm_prior.errors import ConfigurationError, SettingError
from ebm_prior.evaluation.classifier import ClassifierConfig
from ebm_prior.evaluation.doctor import DoctorConfig
from ebm_prior.evaluation.evaluate import EvalConfig
from ebm_prior.evaluation.fid import FidConfig
from ebm_prior.evaluation.gauge import GaugeConfig
from ebm_prior.evaluation.outliers import OutlierConfig
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.samplers import SamplerChanges, SamplerConfig
from ebm_prior.settings import as_words, every_setting, resolve, setting
from ebm_prior.settings import settings as named
from ebm_prior.training.fit_config import FitConfig, paper_preset
from ebm_prior.training.joint_config import JointConfig
from ebm_prior.training.pretrain_config import PretrainConfig
from ebm_prior.training.stages import StageConfig


@dataclass(frozen=True)
class Deep:
    size: int = setting(3, "a size")


@dataclass(frozen=True)
class Inner:
    deep: Deep = field(default_factory=lambda: Deep(4))
    rate: float = setting(0.5, "a rate")


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=lambda: Inner(Deep(5), 0.25))
    maybe: Deep | None = None
    kind: Literal["a", "b"] = setting("a", "a kind")
    pair: tuple[float, float] = setting((1.0, 2.0), "a pair")
    flag: bool = setting(True, "a flag")
    hidden: int = 7
    seed: int = setting(0, "a seed")


@click.command()
@config_options(Outer, also={"inner_rate": ["--speed"]})
@click.option("--config", type=click.Path(path_type=Path))
def command(config: Path | None, **given: Any) -> None:
    click.echo(json.dumps(dataclasses.asdict(resolve(Outer(), given, config))))


def outcome(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(command, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


DEFAULTS = json.loads(json.dumps(dataclasses.asdict(Outer())))


def changed(**values: Any) -> dict[str, Any]:
    return {**DEFAULTS, **values}


def test_nothing_given_is_the_defaults() -> None:
    assert outcome() == DEFAULTS


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--kind b", changed(kind="b")),
        ("--pair 3 4.5", changed(pair=[3.0, 4.5])),
        ("--no-flag", changed(flag=False)),
        ("--flag", DEFAULTS),
        ("--inner-rate 2", changed(inner={"deep": {"size": 5}, "rate": 2.0})),
        ("--speed 2", changed(inner={"deep": {"size": 5}, "rate": 2.0})),
        ("--inner-deep-size 9", changed(inner={"deep": {"size": 9}, "rate": 0.25})),
        ("--maybe-size 1", changed(maybe={"size": 1})),
    ],
)
def test_each_kind_of_option(arguments: str, expected: dict[str, Any]) -> None:
    assert outcome(*arguments.split()) == expected


def test_the_help_shows_the_defaults_of_the_outermost_dataclass() -> None:
    text = " ".join(CliRunner().invoke(command, ["--help"]).stdout.split())
    for option, default in (("--inner-rate, --speed", "0.25"), ("--inner-deep-size", "5"), ("--pair", "1.0 2.0")):
        assert re.search(rf"{option} [^[]*\[default: {re.escape(default)}\]", text), option
    assert "--flag / --no-flag" in text
    assert "--hidden" not in text
    assert "--seed" not in text  # the common option, not one of its own


def test_a_file_is_put_in_and_options_win(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"kind": "b", "pair": [0, 1], "inner": {"deep": {"size": 8}}, "maybe": None}))
    expected = changed(kind="b", pair=[0, 1], inner={"deep": {"size": 8}, "rate": 0.25})
    assert outcome("--config", str(file)) == expected
    assert outcome("--config", str(file), "--kind", "a", "--inner-deep-size", "2") == changed(
        pair=[0, 1], inner={"deep": {"size": 2}, "rate": 0.25}
    )
    file.write_text(json.dumps({"config": {"flag": False}, "inputs": {}, "versions": {}}))  # a run's config.json
    assert outcome("--config", str(file)) == changed(flag=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"knd": "b", "flags": 1}', "unknown settings flags, knd"),
        ('{"inner": {"deep": {"depth": 1}}}', "unknown settings depth; Deep has size"),
        ('{"kind": "c"}', "kind must be a or b, found 'c'"),
        ('{"flag": 1}', "flag must be true or false, found 1"),
        ('{"pair": [1]}', r"pair must be 2 numbers, found \[1\]"),
        ('{"pair": 1}', "pair must be 2 numbers, found 1"),
        ('{"inner": {"rate": "fast"}}', "rate must be a number, found 'fast'"),
        ('{"inner": {"deep": {"size": 2.5}}}', "size must be a whole number, found 2.5"),
        ('{"inner": {"deep": {"size": true}}}', "size must be a whole number, found True"),
        ('{"inner": null}', "inner must be an object of settings, found None"),
        ("[1]", "expected a JSON object, found list"),
        ('{"kind": ', "cannot be read as JSON"),
    ],
)
def test_a_file_with_a_mistake(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "settings.json"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        outcome("--config", str(file))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.json cannot be read"):
        outcome("--config", str(tmp_path / "absent.json"))


def settings(kind: type[Any], prefix: str = "") -> list[str]:
    """The options that a configuration should have, found another way than `options` does."""
    found: list[str] = []
    for entry in dataclasses.fields(kind):
        hint = str(get_type_hints(kind)[entry.name])
        nested = next(
            (k for k in (EnergyConfig, SamplerConfig, SamplerChanges, StageConfig) if k.__name__ in hint), None
        )
        if nested is not None:
            found += settings(nested, f"{prefix}{entry.name}-")
        elif entry.name not in ("seed", "groupwise", "local") and not (prefix and entry.name == "by_group"):
            # Of a fit's heads and sampler --ratios groupwise decides these two.
            assert entry.metadata.get("help"), f"{kind.__name__}.{entry.name} has no help"
            found.append(f"--{prefix}{entry.name}".replace("_", "-"))
    return found


@pytest.mark.parametrize(
    ("name", "kind"), [("fit", FitConfig), ("pretrain", PretrainConfig), ("sample", SamplerConfig)]
)
def test_every_setting_is_an_option(name: str, kind: type[Any]) -> None:
    text = CliRunner().invoke(main, [name, "--help-all"], terminal_width=200).stdout
    for option in [*settings(kind), "--seed", "--device", "--precision", "--out", "--overwrite", "--json"]:
        assert re.search(rf"{option}[ ,/]", text), option


def test_the_help_of_fit_tells_the_defaults_of_fit() -> None:
    text = " ".join(CliRunner().invoke(main, ["fit", "--help-all"], terminal_width=200).stdout.split())
    config = FitConfig()
    for option, default in (
        ("--iterations", config.iterations),
        ("--chain-proposals", config.chain.proposals),
        ("--chain-step-size", config.chain.step_size),
        ("--energy-channels", config.energy.channels),
    ):
        assert re.search(rf"{option},? [^[]*(\[[a-z|<>=0-9-]+\])?[^[]*\[default: {default}\]", text), option


def test_the_help_says_for_what_an_option_is_and_where_its_default_comes_from() -> None:
    text = CliRunner().invoke(main, ["fit", "--help"], terminal_width=300, env={"COLUMNS": "300"}).stdout
    options = {match[1]: match[2] for match in re.finditer(r"^  --([\w-]+)((?:.|\n(?!  -))*)", text, re.MULTILINE)}
    for name, said in options.items():
        mle = name in ("chains", "refresh", "penalty") or name.startswith("chain-")
        assert ("only with --objective mle" in said) is mle, name
        assert (" ".join(said.split()).endswith("[default: as the preset has it]")) is name.startswith("sampler-"), name


RIDDLES = ("so many", "of these", "what it is of", "whose", "thereof", "as it is", "the rest of the world")
DANGLING = {"a", "an", "and", "as", "at", "by", "else", "for", "in", "is", "of", "on", "or", "than", "the", "to", "too"}
LONGEST_HELP = 200


def flaws(text: str | None) -> list[str]:
    """What keeps the help of an option from being a phrase that makes sense alone, without its "[default: …]"."""
    said = re.sub(r"\s*\[default: [^\]]*\]$", "", text or "")
    words = re.findall(r"[\w'-]+", said.lower())
    found = {
        "fewer than three words": len(words) < 3,
        f"longer than {LONGEST_HELP} characters": len(said) > LONGEST_HELP,
        "begins with neither a capital nor a name": not re.match(r"[A-ZΑ-Ω]|pCN-", said),
        "ends with a dangling word": bool(words) and words[-1] in DANGLING,
        "ends with punctuation": said.endswith((".", ",", ":", ";", "-")),
        "has space to spare": said != " ".join(said.split()),
        "an unclosed parenthesis": said.count("(") != said.count(")") and "[0, 1)" not in said,
    }
    riddles = [riddle for riddle in RIDDLES if riddle in said.lower()]
    return [flaw for flaw, is_so in found.items() if is_so] + riddles


def test_the_help_of_every_option_makes_sense_alone() -> None:
    context = click.Context(main)
    names = main.list_commands(context)
    options = [
        (name, option)
        for name in names
        for option in main.get_command(context, name).params  # type: ignore[union-attr]
        if isinstance(option, click.Option) and option.name != "help_all"  # a sentence, as click's own --help
    ]
    assert len(options) > 10 * len(names)
    wrong = {f"{name} {option.name}": found for name, option in options if (found := flaws(option.help))}
    assert wrong == {}


def test_the_list_of_commands_says_what_each_says_itself() -> None:
    """The line of a command is its first sentence, as far as that fits."""
    context = click.Context(main)
    for name, entry in main.entries.items():  # type: ignore[attr-defined]
        said = " ".join((main.get_command(context, name).help or "").split())  # type: ignore[union-attr]
        assert re.match(re.escape(entry.help.removesuffix(".")) + r"(?!\w)", said), (
            f"{name}: {entry.help!r} and {said!r}"
        )
        assert entry.help.endswith("."), name


def test_the_short_help_refers_to_nothing_that_it_hides() -> None:
    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        first = getattr(command, "first", ())
        shown = [parameter for parameter in command.params if not first or parameter.name in (*first, "help_all")]
        options = {option for parameter in shown for option in parameter.opts} | {"--help"}
        texts = [
            re.sub("`[^`]*`", "", command.help or ""),
            *(getattr(parameter, "help", None) or "" for parameter in shown),
        ]
        named = {option for text in texts for option in re.findall(r"--[a-z][a-z0-9-]*", text)}
        assert named <= options, name


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "Peak rate",
        "of each of these steps",
        "Moves of each of these draws",
        "Stop after so many evaluations",
        "Seed that the run is made of  [default: 0]",
        "Print the result as JSON.",
        "gradient steps of the optimizer",
        "Number of draws (at most all",
        "Word " * 60,
    ],
)
def test_a_riddle_is_no_help(text: str | None) -> None:
    assert flaws(text)


def test_one_name_for_the_samples_at_a_time_and_a_yardstick_that_stands_fast() -> None:
    commands = {name: main.get_command(click.Context(main), name) for name in ("sample", "eval")}
    names = {name: {p.name for p in command.params} for name, command in commands.items()}  # type: ignore[union-attr]
    assert all("chunk" in found and "batch_size" not in found for found in names.values())
    assert {n for n in names["eval"] if n and n.startswith("gauge")} == {"gauge_iterations", "gauge_batch_size"}


def test_presets_are_the_base() -> None:
    assert resolve(paper_preset(), {"iterations": None, "energy_joint": 3}).energy == dataclasses.replace(
        paper_preset().energy, joint=3
    )
    assert resolve(paper_preset(), {}) == paper_preset()
    assert paper_preset() != FitConfig()


def test_options_of_two_configurations_do_not_mix() -> None:
    given = {"samples": 5, "gauge_iterations": 3, "proposals": 7}
    config, sampler = resolve(EvalConfig(), given), resolve(SamplerConfig(), given)
    assert (config.samples, config.gauge.iterations) == (5, 3)
    assert config.gauge.energy == EvalConfig().gauge.energy
    assert sampler == SamplerConfig(proposals=7)


@click.command()
@config_options(FitConfig, skip=())
def fit_command(**given: Any) -> None:
    click.echo(json.dumps(dataclasses.asdict(resolve(FitConfig(), given))))


@pytest.mark.parametrize(
    "config",
    [
        FitConfig(),
        FitConfig(seed=3, decay=False, betas=(0.5, 0.9), energy=EnergyConfig(channels=7, conditional=True)),
        FitConfig(stage=StageConfig(particles=99), sampler=SamplerChanges(steps=3, step_size=1e-5)),
        paper_preset(),
    ],
)
def test_words_give_the_configuration_again(config: FitConfig) -> None:
    words = as_words(config, FitConfig())
    result = CliRunner().invoke(fit_command, words, catch_exceptions=False)
    assert json.loads(result.stdout) == json.loads(json.dumps(dataclasses.asdict(config)))
    assert as_words(config, config) == []
    assert bool(words) == (config != FitConfig())


def test_settings_have_the_names_of_options() -> None:
    assert named(Outer()) == {
        "inner_deep_size": 5,
        "inner_rate": 0.25,
        "maybe": None,
        "kind": "a",
        "pair": (1.0, 2.0),
        "flag": True,
        "hidden": 7,
        "seed": 0,
    }


# Values out of their range.


def numbers(kind: type[Any]) -> list[tuple[str, Any]]:
    """Every setting that is a number, or has several, with values that make no sense."""
    found: list[tuple[str, Any]] = []
    for name, hint, *_ in every_setting(kind, ()):
        parts = get_args(hint) if get_origin(hint) is tuple else (hint,)
        for wrong in {int: (-7,), float: (-7.0, -0.5, math.nan, math.inf)}.get(parts[0], ()):
            found.append((name, (wrong,) * len(parts) if get_origin(hint) is tuple else wrong))
    return found


CONFIGURATIONS = (
    *(FitConfig, PretrainConfig, JointConfig, GaugeConfig, ClassifierConfig),
    *(EvalConfig, FidConfig, DoctorConfig, OutlierConfig, Drawing),
)


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_a_value_out_of_range_names_its_setting_alone(kind: type[Any]) -> None:
    assert numbers(kind)
    for name, wrong in numbers(kind):
        with pytest.raises(SettingError) as caught:
            resolve(kind(), {name: wrong})
        assert caught.value.name == name
        assert re.fullmatch(rf"{name} must [^_]*, found (-7|-7\.0|-0\.5|nan|inf)", str(caught.value))
        assert "must be positive, found inf" not in str(caught.value)  # which infinity is


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_a_value_of_another_kind_names_its_setting_alone(kind: type[Any]) -> None:
    for name in dict.fromkeys(name for name, _ in numbers(kind)):
        for wrong in ("64", True, np.zeros(3)):
            with pytest.raises(
                SettingError, match=rf"^{name} must be (a whole number|a number|2 numbers), found "
            ) as caught:
                resolve(kind(), {name: wrong})
            assert caught.value.name == name
            if name in {entry.name for entry in dataclasses.fields(kind)}:
                with pytest.raises(SettingError, match=rf"^{name} must be "):
                    kind(**{name: wrong})


def test_values_that_mean_the_same_are_kept_as_the_settings_own_kind() -> None:
    given: dict[str, Any] = {"iterations": np.int64(5), "learning_rate": np.float32(0.5), "betas": [np.float64(0.5), 0]}
    for config in (FitConfig(**given), resolve(FitConfig(), given)):
        assert config == FitConfig(iterations=5, learning_rate=0.5, betas=(0.5, 0.0))
        assert [type(value) for value in (config.iterations, config.learning_rate, *config.betas)] == [
            int,
            *[float] * 3,
        ]
    assert type(SamplerChanges(steps=np.int64(3)).steps) is int  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"^learning_rate must be positive and finite, found inf"):
        FitConfig(learning_rate=10**400)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["fit", "--stage-ess", 7], "--stage-ess"),
        (["fit", "--energy-dropout", 7], "--energy-dropout"),
        (["fit", "--sampler-steps", -7], "--sampler-steps"),
        (["fit", "--objective", "mle", "--chain-step-size", 7], "--chain-step-size"),
        (["fit", "--held-out", -7], "--held-out"),
        (["train", "--prior-chain-step-size", 7], "--prior-chain-step-size"),
        (["pretrain", "--kl-warmup", 7], "--kl-warmup"),
        (["doctor", "--samples", 10], "--samples"),
        (["fit", "--sampler-temperature", 0.5], "--sampler-temperature"),
        (["fit", "--objective", "mle", "--chain-adapt-steps", 3], "--chain-adapt-steps"),
        (["fit", "--objective", "mle", "--chains", "persistent", "--chain-proposals", 2], "--chain-proposals"),
        (["fit", "--objective", "mle", "--ratios", "staged"], "--ratios"),
        (["fit", "--target", "published"], "--target"),
        (["train", "--posterior-chain-proposals", 2], "--posterior-chain-proposals"),
        (["train", "--space", "z", "--prior-chain-proposals", 2], "--prior-chain-proposals"),
    ],
)
def test_the_command_line_names_the_option(workshop: Workshop, tmp_path: Path, words: list[Any], option: str) -> None:
    data = ["--data", workshop.images, "--ckpt", workshop.backbone]
    data += ["--out", tmp_path / "out"] if words[0] != "doctor" else []
    assert workshop.error(*words, *data).startswith(f"ebm-prior: error: {option} must be ")
    assert not (tmp_path / "out").exists()
