"""Configs, texts and Transformers configs that cannot work: one line with the value, the rule and the remedy, at once
and with nothing touched; or they are accepted and work."""

import json
import math
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ringattn
from launch.config import load
from launch.mask_text import parse_mask
from launch.processes import REFUSALS, World
from launch.run import prepare, start
from launch.tables import dump
from tests.support.clock import patience
from tests.support.hf_models import hf_file
from tests.support.pretrain import TINY, config_file, refusal, tiny

REMEDY = re.compile(
    r"for instance|known: |one of |set |give |write |change |leave |correct |use |save |put |choose |name |did you mean"
)

# -- settings -------------------------------------------------------------------------------------

SETTINGS = [
    ("rope_base = 10000.0", "rope_base = 0.0", "model.rope_base is 0.0; it must be a finite number, at least 1"),
    ("rope_base = 10000.0", "rope_base = -1.0", "model.rope_base is -1.0"),
    ("rope_base = 10000.0", "rope_base = nan", "model.rope_base is nan"),
    ("rope_base = 10000.0", "rope_base = inf", "model.rope_base is inf"),
    ("final_lr = 0.1", "final_lr = nan", "optimizer.final_lr is nan"),
    ("final_lr = 0.1", "final_lr = -0.1", "optimizer.final_lr is -0.1; it must be a finite number, at least 0"),
    ("final_lr = 0.1", "final_lr = inf", "optimizer.final_lr is inf"),
    ("lr = 0.01", "lr = inf", "optimizer.lr is inf"),
    ("lr = 0.01", "lr = 0", "optimizer.lr is 0.0"),
    ("clip = 1.0", "clip = nan", "optimizer.clip is nan"),
    ("clip = 1.0", "clip = 0.0", "optimizer.clip is 0.0"),
    ("weight_decay = 0.1", "weight_decay = inf", "optimizer.weight_decay is inf"),
    ("weight_decay = 0.1", "weight_decay = nan", "optimizer.weight_decay is nan"),
    ("weight_decay = 0.1", "weight_decay = 1e30", "optimizer.weight_decay is 1e+30 at optimizer.lr 0.01"),
    ("betas = [0.9, 0.95]", "betas = [0.9, 1.0]", "optimizer.betas is (0.9, 1.0); it must be two numbers"),
    ("betas = [0.9, 0.95]", "betas = [-0.1, 0.9]", "optimizer.betas is (-0.1, 0.9)"),
    ("betas = [0.9, 0.95]", "betas = [nan, 0.9]", "optimizer.betas is (nan, 0.9)"),
    ("betas = [0.9, 0.95]", "betas = [0.9]", "optimizer.betas is (0.9,)"),
    ("betas = [0.9, 0.95]", "betas = 0.9", "optimizer.betas is 0.9; it must be a list"),
    ("[model]", "[lengths]\nmedian = 9\nsigma = nan\n[model]", "lengths.sigma is nan"),
    ("[model]", "[lengths]\nmedian = 9\nsigma = inf\n[model]", "lengths.sigma is inf"),
    ("[model]", "[lengths]\nmedian = 9\nsigma = 1e9\n[model]", "lengths.sigma is 1000000000.0"),
    ("[model]", "[lengths]\nmedian = 1e18\n[model]", "lengths.median is 1e+18; it must be int"),
    ("[model]", f"[lengths]\nmedian = {10**18}\n[model]", f"lengths.median is {10**18}"),
    ('name = "tiny"', 'name = ""', "name is ''"),
    ('"causal()"', '""', "a mask is empty"),
    ('"causal()"', '"   "', "a mask is empty"),
    ("seqlen = 257", "seqlen = 257\nseqlen = 300", "Cannot overwrite a value"),
    ("seqlen = 257", "seqlen = true", "seqlen is True; it must be int"),
    ("seqlen = 257", "seqlen = 1e3", "seqlen is 1000.0; it must be int"),
    ("seqlen = 257", f"seqlen = {10**30}", "it must be a whole number from 2"),
    ("seqlen = 257", f"seqlen = 1{'0' * 5000}", "no TOML that can be read"),
    ("seqlen = 257", f"seqlen = {'[' * 5000}", "no TOML that can be read"),
    ("lr = 0.01", f"lr = 1{'0' * 400}", "it must be float"),
    ("seed = 0", f"seed = {2**63}", f"seed is {2**63}"),
    ("timeout = 300.0", "timeout = 0.0", "timeout is 0.0; it must be a finite number, at least 1"),
    ("timeout = 300.0", "timeout = inf", "timeout is inf"),
    ("d_model = 16\nnum_layers = 2", f"d_model = {2**20}\nnum_layers = 9000", "the model has"),
    ("d_model = 16", f"d_model = {10**9}", "model.d_model is 1000000000; it must be a whole number from 1 to 1048576"),
    ("d_model = 16", "d_model = 0", "model.d_model is 0"),
    ("num_layers = 2", "num_layers = 0", "model.num_layers is 0"),
    ("num_layers = 2", "num_layers = 1", "2 masks for model.num_layers 1"),
    ("num_heads = 4", "num_heads = 0", "model.num_heads is 0"),
    ("num_kv_heads = 2", "num_kv_heads = 0", "model.num_kv_heads is 0"),
    ("[model]", "[model]\n[model]", "is no TOML"),
    ("[model]", "[[model]]", "model is [{"),
    ("documents = true", "documents = 1", "documents is 1; it must be bool"),
    ("ulysses = 1", "ulysses = 0", "ulysses is 0; it must be a whole number from 1 to"),
    ("ulysses = 1", "ulysses = true", "ulysses is True; it must be int"),
    ("ulysses = 1", 'ulysses = "many"', "ulysses is 'many'; it must be a whole number"),
    ("ulysses = 1", "ulysses = 2", "ulysses is 2 and a sequence has 1 rank"),
    ("ulysses = 1", "ulysses = 8", "ulysses is 8 and the model has 4 query heads"),
]


@pytest.mark.parametrize(("before", "after", "said"), SETTINGS)
def test_settings_that_cannot_work_are_refused(before: str, after: str, said: str, tmp_path: Path, text: Path) -> None:
    file = config_file(tmp_path, before, after, tiny(text))
    begin = time.monotonic()
    line = refusal("--config", file, "--out", tmp_path / "run")
    assert time.monotonic() - begin < patience(1)
    assert said in line and REMEDY.search(line), line
    assert len(line) < 1000 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "data", [b"\xff\xfe\x00", b"\x00", b"name = ", b"= 1", b"[" * 100_000, b"#" * 2_000_000, b"x = '\r\n'", b""]
)
def test_files_that_are_no_config_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_bytes(data)
    assert "bad.toml: " in refusal("--config", tmp_path / "bad.toml", "--out", tmp_path / "run")


def test_masks_that_take_for_ever_are_refused() -> None:
    for mask in (
        " | ".join(["causal()"] * 3000),
        " & ".join(["causal()"] * 65),
        "(" * 3000 + "causal()" + ")" * 3000,
        "-" * 3000 + "causal()",
        f"global_tokens([{', '.join(['1'] * 3000)}])",
    ):
        begin = time.monotonic()
        with pytest.raises(ValueError, match="mask ") as caught:
            parse_mask(mask)
        assert time.monotonic() - begin < patience(1)
        assert len(str(caught.value)) < 500
    assert isinstance(parse_mask(" | ".join(["causal()"] * 64)), ringattn.Mask)
    for mask, said in (("sliding_window(**{})", "name the arguments"), ("chunked(9**9**9)", "no number or list")):
        with pytest.raises(ValueError, match=said):
            parse_mask(mask)


# -- text -----------------------------------------------------------------------------------------


def test_data_that_is_no_text_is_refused(tmp_path: Path, text: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "pipe").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        config = config_file(tmp_path, "steps = 6", "steps = 6", TINY)
        for path, said in (
            (tmp_path / "pipe", "is a pipe"),
            ("/dev/null", "is a device"),
            ("/dev/zero", "is a device"),
            (tmp_path / "socket", "is a socket"),
            (tmp_path / "loop", "out of reach"),
            (tmp_path / "nowhere", "does not exist"),
            (tmp_path / "closed", "holds no file"),
            ("x" * 5000, "out of reach"),
            ("new\nline", "does not exist"),
            ("/proc/self/status", "is empty"),
        ):
            begin = time.monotonic()
            line = refusal("--config", config, "--out", tmp_path / "run", "--data", path)
            assert time.monotonic() - begin < patience(1)
            assert said in line and REMEDY.search(line), line
    assert not (tmp_path / "run").exists()


def test_a_file_that_becomes_a_pipe_is_refused(text: Path, tmp_path: Path) -> None:
    job = prepare(tiny(text), tmp_path / "run", go_on=False, overwrite=False)
    for file in text.iterdir():
        file.unlink()
        os.mkfifo(file)
    with pytest.raises(ValueError, match="is gone while it was being read; restore it"):
        job.samples(World())


# -- Transformers configs -------------------------------------------------------------------------

FOREIGN: list[tuple[dict[str, Any], str]] = [
    ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number from 1"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"hidden_size": "32"}, "hidden_size is '32'"),
    ({"hidden_size": 2**22, "intermediate_size": 2**22}, "the model has"),
    ({"head_dim": 7}, "even"),
    ({"vocab_size": -1}, "vocab_size is -1"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan; it must be a finite number, above 0"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
    ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf"),
    ({"initializer_range": math.nan}, "initializer_range is nan"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_parameters.rope_theta is 0.0"),
    (
        {"rope_parameters": {"rope_type": "defualt", "rope_theta": 1e4}},
        "rope_type is 'defualt' (did you mean 'default'?)",
    ),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": math.nan, "rope_theta": 1e4}},
        "rope_parameters.factor is nan",
    ),
    ({"hidden_act": "sillu"}, "hidden_act is 'sillu' (did you mean 'silu'?)"),
    ({"hidden_act": 3}, "hidden_act is 3"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config is {"),
    ({"auto_map": {"AutoConfig": "code.Config"}}, "auto_map is {"),
    ({"attention_dropout": 1.5}, "attention_dropout is 1.5"),
    ({"attention_bias": math.nan}, "attention_bias is nan"),
    ({"pad_token_id": 10**9}, "correct the config"),
    ({"num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok is 3 of num_local_experts 2"),
]


@pytest.mark.parametrize(("changes", "said"), FOREIGN, ids=lambda value: str(value)[:30])
def test_transformers_configs_that_cannot_work_are_refused(
    changes: dict[str, Any], said: str, tmp_path: Path, text: Path
) -> None:
    file = Path(hf_file("gpt-oss" if "num_local_experts" in changes else "llama", tmp_path))
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    config = config_file(tmp_path, "steps = 6", "steps = 6", tiny(text))
    begin = time.monotonic()
    line = refusal("--config", config, "--out", tmp_path / "run", "--model", f"hf:{file}")
    assert time.monotonic() - begin < patience(2)
    assert said in line and REMEDY.search(line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"null", b'{"model_type": "bert"}'])
def test_files_that_are_no_transformers_config_are_refused(data: bytes, tmp_path: Path, text: Path) -> None:
    (tmp_path / "bad.json").write_bytes(data)
    config = config_file(tmp_path, "steps = 6", "steps = 6", tiny(text))
    assert "bad.json: " in refusal("--config", config, "--out", tmp_path / "run", "--model", f"hf:{tmp_path}/bad.json")


# -- anything at all ------------------------------------------------------------------------------

NUMBERS = (0, 1, 2, 3, -1, 2**31, 2**63, 10**30, 0.0, -0.0, 0.5, -1.5, 1e-300, 1e300, math.inf, -math.inf, math.nan)
OTHERS = (True, False, "", "causal()", "x", "\x00", "a\nb", "../..", [], [1], ["causal()"], {}, {"a": 1})
ODD = st.sampled_from((*NUMBERS, *OTHERS))
SMALL = st.integers(1, 40)


def keys_of(table: dict[str, Any], where: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in table.items():
        found.append((*where, name))
        if isinstance(value, dict):
            found += keys_of(value, (*where, name))
    return found


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {toml(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)


def accepted_or_refused(file: Path, run: Path) -> None:
    """Loads and prepares it: a job that begins, or one line, within two seconds."""
    begin = time.monotonic()
    try:
        config = load(file)
        job = prepare(config, run, go_on=False, overwrite=False)
        start(job, World())
    except REFUSALS as error:
        line = " ".join(str(error).split())
        assert REMEDY.search(line) or "must" in line, line
        assert len(line) < 1500, line
    assert time.monotonic() - begin < patience(2)


def fuzz(examples: int) -> Any:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, suppress_health_check=checks, derandomize=True)


def change_and_try(draw: st.DataObject, tmp_path: Path, text: Path) -> None:
    import tomllib

    table = tomllib.loads(dump(tiny(text)))
    if draw.draw(st.booleans()):
        table["lengths"] = {"median": 30, "sigma": 1.0}
    for _ in range(draw.draw(st.integers(1, 3))):
        *path, name = draw.draw(st.sampled_from(keys_of(table)))
        inner = table
        for step in path:
            inner = inner[step]
            if not isinstance(inner, dict):
                break
        else:
            action = draw.draw(st.sampled_from(("replace", "small", "drop", "rename")))
            if action == "replace":
                inner[name] = draw.draw(ODD)
            elif action == "small":
                inner[name] = draw.draw(SMALL)
            else:
                value = inner.pop(name, 1)
                if action == "rename":
                    inner[name + "s"] = value
    file = tmp_path / "fuzzed.toml"
    file.write_text("\n".join(f"{json.dumps(name)} = {toml(value)}" for name, value in table.items()))
    accepted_or_refused(file, tmp_path / "run")


@fuzz(60)
@given(draw=st.data())
def test_any_config_is_refused_in_time_or_works(draw: st.DataObject, tmp_path: Path, text: Path) -> None:
    change_and_try(draw, tmp_path, text)


@pytest.mark.slow
@pytest.mark.timeout(300)
@fuzz(1500)
@given(draw=st.data())
def test_very_many_configs_are_refused_in_time_or_work(draw: st.DataObject, tmp_path: Path, text: Path) -> None:
    change_and_try(draw, tmp_path, text)


@pytest.mark.slow
@pytest.mark.timeout(300)
@fuzz(400)
@given(draw=st.data())
def test_any_transformers_config_is_refused_in_time_or_works(draw: st.DataObject, tmp_path: Path, text: Path) -> None:
    family = draw.draw(st.sampled_from(("llama", "gemma3", "gpt-oss", "deepseek-v3")))
    file = Path(hf_file(family, tmp_path))
    settings_of = json.loads(file.read_text())
    for _ in range(draw.draw(st.integers(1, 2))):
        *path, name = draw.draw(st.sampled_from(keys_of(settings_of)))
        inner = settings_of
        for step in path:
            inner = inner[step] if isinstance(inner, dict) else inner
        if isinstance(inner, dict):
            inner[name] = draw.draw(ODD | SMALL)
    file.write_text(json.dumps(settings_of))
    config = tmp_path / "hf.toml"
    config.write_text(dump(tiny(text, model=None, masks=(), hf=str(file), dtype="float32")))
    accepted_or_refused(config, tmp_path / "run")


@fuzz(200)
@given(mask=st.text(st.sampled_from("()|&-,.*[]{}0123456789=causlfw_ \n\x00é"), max_size=80))
def test_any_mask_text_is_refused_or_a_mask(mask: str) -> None:
    try:
        parse_mask(mask)
    except ValueError as error:
        assert "mask" in str(error)
