"""A run derived from a proxy: the nearest shape, what follows from it, and the proxy back again."""

from __future__ import annotations

import math
from math import prod
from pathlib import Path

import pytest

from megatron_completep.completep import table_of
from megatron_completep.completep.tau import timescales
from megatron_completep.config import Config, load_config, save_config
from megatron_completep.config.derived import num_query_groups, tokens_per_step, total_tokens
from megatron_completep.errors import ConfigError, UserError
from megatron_completep.instruments.derive import Scaling, derived
from megatron_completep.instruments.new_run import (
    Gpus,
    law_tau,
    new_run,
    proxy_of,
    rates,
    reasons,
    yaml_of,
)
from megatron_completep.instruments.run_shape import Asked, Family
from megatron_completep.instruments.trial import change
from megatron_completep.planning.plan import make_plan
from megatron_completep.planning.scaling import gpu_of
from megatron_completep.roles import Role
from megatron_completep.tools.new_run import main
from megatron_completep.tools.show_plan import main as show_plan

ROOT = Path(__file__).resolve().parents[2]
PROXY = ROOT / "configs/completep_1b_proxy.yaml"
RATIO = 128.0  # of the proxy
UNREAD = ["--gpu", "h100", "--duration-exponent", "0.3"]  # by --proxy


@pytest.fixture(scope="module")
def proxy() -> Config:
    return load_config(PROXY)


@pytest.mark.parametrize("parameters", [1e8, 1.5e9, 7e9, 7e10])
def test_the_shape_is_within_three_percent_and_no_other_is_nearer(
    proxy: Config, parameters: float
) -> None:
    family = Family(proxy)
    choice = family.choose(Asked(RATIO, 20.0, parameters=parameters))
    shape = choice.shape
    assert abs(choice.miss) <= 0.03
    assert 1 / 1.5 <= shape.ratio / RATIO <= 1.5
    assert choice.smaller is not None and choice.smaller.parameters < shape.parameters
    assert choice.larger is not None and choice.larger.parameters > shape.parameters
    # Another depth of the same width is farther from what was asked, or from the ratio.
    for depth in (shape.num_layers - 1, shape.num_layers + 1):
        other = family.shape(shape.hidden_size, depth)
        nearer = abs(other.parameters / parameters - 1) < abs(choice.miss)
        closer = abs(math.log(other.ratio / RATIO)) < abs(math.log(shape.ratio / RATIO))
        assert not (nearer and closer)


def test_parameters_and_flops_are_those_of_the_whole_model(proxy: Config) -> None:
    shape = Family(proxy).shape(768, 5)
    config = derived(proxy, shape, Scaling())
    elements = {p.name: (p.role, prod(p.shape)) for p in make_plan(config).parameters}
    assert shape.parameters == sum(size for _, size in elements.values())
    outer = (Role.EMBEDDING, Role.UNEMBEDDING)
    inner = sum(size for role, size in elements.values() if role not in outer)
    assert shape.inner_parameters == inner
    # By hand: 6 FLOPs per parameter of a product, and causal attention.
    model = config.model
    attention = 3 * 4 * model.num_attention_heads * 128 * (model.seq_length + 1) / 2 * 5
    products = inner - sum(size for name, (_, size) in elements.items() if "norm" in name)
    by_hand = 6 * (products + 768 * model.vocab_size) + attention
    assert shape.flops_per_token == pytest.approx(by_hand, rel=1e-9)


def test_depth_flops_and_ratio_are_what_was_asked(proxy: Config) -> None:
    family = Family(proxy)
    deep = family.choose(Asked(RATIO, 20.0, depth=32)).shape
    assert (deep.num_layers, deep.hidden_size) == (32, 4096)
    choice = family.choose(Asked(64.0, 20.0, flops=1e21))
    assert choice.shape.run_flops(20.0) == pytest.approx(1e21, rel=0.03)
    assert choice.shape.ratio == pytest.approx(64, rel=0.5)
    with pytest.raises(ConfigError, match="the nearest shape of this proxy"):
        family.choose(Asked(RATIO, 20.0, parameters=1e5))
    for beyond in ({"parameters": 1e30}, {"flops": 1e60}):
        with pytest.raises(ConfigError, match=r"asked for 1e\+[36]0, but .* 16,384 layers has"):
            family.choose(Asked(RATIO, 20.0, **beyond))
    largest = family.nearest(Asked(RATIO, 20.0, parameters=1e30)).shape
    assert largest.num_layers <= 16_384


def test_asked_for_the_proxy_itself_it_gives_the_proxy_back(proxy: Config) -> None:
    own = Family(proxy).shape(256, 2)
    per_parameter = total_tokens(proxy) / own.parameters
    run = new_run(
        proxy, Asked(RATIO, per_parameter, parameters=own.parameters), Scaling(per_parameter)
    )
    assert run.config.training == proxy.training
    assert run.config.model == proxy.model
    assert make_plan(run.config).parameters == make_plan(proxy).parameters
    # The control: another length does not.
    longer = new_run(proxy, run.asked, Scaling(2 * per_parameter))
    assert longer.config.training.train_steps != proxy.training.train_steps
    assert make_plan(longer.config).parameters != make_plan(proxy).parameters


def test_values_follow_the_table_the_batch_and_the_length(proxy: Config) -> None:
    run = new_run(proxy, Asked(RATIO, 20.0, depth=16), Scaling(duration_exponent=0.32))
    config = run.config
    table = table_of(config)
    assert (table.width_multiplier, table.depth_multiplier) == (8.0, 8.0)
    tokens = total_tokens(config)
    assert tokens == pytest.approx(20 * run.shape.parameters, rel=0.01)
    duration = tokens / total_tokens(proxy)
    batch = tokens_per_step(config) / tokens_per_step(proxy)
    assert batch == pytest.approx(duration**0.383, rel=0.07)
    expected = proxy.optimizer.base_lr * batch**0.5 / duration**0.32
    assert rates(run)[0.32] == pytest.approx(expected)
    embedding = table.values(Role.EMBEDDING, 1.0, config.optimizer)
    assert embedding.lr == pytest.approx(expected)


def test_the_rule_tau_keeps_the_proxys_tau_and_the_law_is_that_of_its_paper(proxy: Config) -> None:
    asked = Asked(RATIO, 20.0, depth=16)
    own = next(timescales(proxy, table_of(proxy))).run
    kept = new_run(proxy, asked, Scaling(duration_exponent=0.3, weight_decay_rule="tau")).config
    for scale in timescales(kept, table_of(kept)):
        assert scale.run == pytest.approx(own, rel=1e-4)
    # The control: under another exponent of the length, the table's own rule does not keep it.
    drifted = new_run(proxy, asked, Scaling(duration_exponent=0.3)).config
    assert next(timescales(drifted, table_of(drifted))).run < 0.5 * own
    for tokens_per_parameter in (5, 20, 200):
        assert law_tau(tokens_per_parameter) == pytest.approx(1.084 * tokens_per_parameter**-0.527)


def test_the_proxy_of_a_target_is_the_one_that_it_came_from(proxy: Config) -> None:
    target = new_run(proxy, Asked(RATIO, 20.0, depth=16), Scaling()).config
    back = proxy_of(target, Scaling())
    assert back.model == proxy.model
    assert back.training.global_batch_size == proxy.training.global_batch_size
    assert back.training.train_steps == proxy.training.train_steps
    # A target that names none gets a small one with heads of its size.
    completep = target.completep.model_copy(
        update={
            "base_hidden_size": None,
            "base_num_layers": None,
            "base_ffn_hidden_size": None,
            "base_head_dim": None,
            "base_total_tokens": None,
        }
    )
    invented = proxy_of(target.model_copy(update={"completep": completep}), Scaling())
    assert (invented.model.num_layers, invented.model.hidden_size) == (2, 256)


def test_every_value_that_is_not_the_proxys_has_a_reason(proxy: Config) -> None:
    steps = proxy.training.train_steps
    counted = {"stop_at_step": steps // 2, "recompute": "full"}
    divided = {"pipeline_parallel_size": 2}
    own = change(proxy, training=counted, parallel=divided)
    scaling = Scaling(duration_exponent=0.3, weight_decay_rule="tau")
    asked = Asked(RATIO, 20.0, depth=4)
    for gpus in (None, Gpus(8, gpu_of("h100"))):
        run = new_run(own, asked, scaling, gpus)
        before = own.model_dump(mode="json")
        texts = reasons(run)
        written = yaml_of(run)
        for section, settings in run.config.model_dump(mode="json").items():
            for key, setting in settings.items():
                if setting != before[section][key]:
                    assert (section, key) in texts
                    assert f"# {texts[section, key]}" in written
    assert "target_tau" in texts["optimizer", "base_weight_decay"]
    assert "dropped" in texts["training", "stop_at_step"]
    # Under the proxy's own rule the decay is read, and its tau is shown.
    plain = reasons(new_run(own, asked, Scaling()))
    assert plain["optimizer", "base_weight_decay"].startswith("the proxy's; tau of ")
    assert ("completep", "duration_exponent") not in plain


def test_the_written_file_is_the_run_with_its_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    words = [str(PROXY), "--parameters", "4e8", "--gpus", "16", "--gpu", "h100", "--to", str(path)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("next: ") == 3
    text = path.read_text()
    config = load_config(path)
    model = config.model
    ratio = f"{model.hidden_size / model.num_layers:.4g}"
    assert f"  hidden_size: {model.hidden_size}  # N : L = {ratio}, asked 128\n" in text
    assert f"  train_steps: {config.training.train_steps}  # 20 tokens a parameter\n" in text
    # The layout is one that the plan of 16 GPUs takes, and holds.
    tensor = config.parallel.tensor_parallel_size
    assert model.num_attention_heads % tensor == 0
    assert num_query_groups(model) % tensor == 0
    assert show_plan([str(path), "--world-size", "16", "--gpu", "h100"]) in (None, 0)
    assert "does not fit" not in capsys.readouterr().out
    save_config(config, tmp_path / "plain.yaml")
    assert load_config(tmp_path / "plain.yaml") == config
    assert config.completep.base_hidden_size == 256
    # The other way, through the tool.
    assert main([str(path), "--proxy", "--to", str(tmp_path / "proxy.yaml")]) == 0
    assert load_config(tmp_path / "proxy.yaml").model == load_config(PROXY).model
    with pytest.raises(UserError, match="--gpu, --duration-exponent: --proxy takes"):
        main([str(path), "--proxy", "--to", str(tmp_path / "other.yaml"), *UNREAD])
