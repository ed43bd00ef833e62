"""What `inspect` shows of a quantization and of the files."""

from engines.directory import open_directory
from export.build import build
from export.build_options import BuildOptions
from export.file_purposes import purpose
from export.inspect import print_manifest
from tests.prequantized import awq, awq_config, save_quantized


def shown_of(directory, capsys):
    print_manifest(open_directory(directory))
    return " ".join(capsys.readouterr().out.split())


def test_precisions_are_mapped(tiny_model, build_engine, capsys):
    keep = ("layers.0.*", "layers.2.mlp.down_proj", "lm_head")
    shown = shown_of(build_engine(tiny_model, keep_float=keep), capsys)
    assert "linears 7 w8a8-token, 6 float" in shown
    # Layer 0 has every kind, layer 2 one of them.
    assert "self_attn.qkv_proj 0; self_attn.o_proj 0; mlp.gate_up_proj 0; mlp.down_proj 0, 2; lm_head" in shown
    shown = shown_of(build_engine(tiny_model, keep_float=("*.down_proj",)), capsys)
    assert "float mlp.down_proj 0-2" in shown


def test_stored_weights_that_are_all_kept_float(tmp_path, capsys):
    save_quantized(tmp_path / "model", awq_config(), awq())
    model, output = str(tmp_path / "model"), tmp_path / "engine"
    shown = shown_of(build(BuildOptions(model=model, output=output, precision="stored", keep_float=("*",))), capsys)
    assert "precision stored" in shown
    assert "float" in shown


def test_search_is_shown_step_by_step(tiny_engine, capsys):
    shown = shown_of(tiny_engine, capsys)
    search = open_directory(tiny_engine).manifest.calibration["search"]
    (step,) = search["steps"]
    assert f"refined factors kept in {step['kept']} of 4 blocks, errors {100 * step['gain']:.0f} % smaller" in shown
    reached = search["precisions"]["w8a8-token"]
    # Few prompts leave none to hold out.
    assert search["held_back_tokens"] == 0
    found = f"w8a8-token {reached['kl']:.4f} ({reached['answers_kl']:.4f} on answers)"
    assert f"KL on the text that it was fitted to: {found}" in shown
    assert "default w8a8" not in shown


def test_the_default_precision_says_why(tiny_model, build_engine, capsys):
    shown = shown_of(build_engine(tiny_model, precision=None), capsys)
    assert "default w8a8-token: within KL 0.005 on fitted text" in shown


def test_the_cache_s_type_and_the_draft_head(head_engine, capsys):
    head = open_directory(head_engine).manifest.draft_head
    shown = shown_of(head_engine, capsys)
    assert f"MB in {open_directory(head_engine).manifest.contract.kv_dtype} " in shown
    assert f"draft head {head.source} ({head.kind}, {head.precision})" in shown


def test_a_fixed_alpha_has_no_search(tiny_model, build_engine, capsys):
    shown = shown_of(build_engine(tiny_model, alpha="off"), capsys)
    assert "alpha off" in shown
    assert "held-out" not in shown


def test_what_each_stage_took(tiny_engine, capsys):
    seconds = open_directory(tiny_engine).manifest.build_seconds
    assert list(seconds) == ["text", "calibrate", "export", "lower", "probe", "fidelity", "successors"]
    assert f"built in {sum(seconds.values()):.0f} s (text {seconds['text']:.0f}, " in shown_of(tiny_engine, capsys)


def test_every_file_is_shown_with_its_size_and_purpose(tiny_engine, capsys):
    shown = shown_of(tiny_engine, capsys)
    files = open_directory(tiny_engine).manifest.files
    for name, entry in files.items():
        assert purpose(name)
        assert f"{entry['bytes'] / 1e6:.2f} {purpose(name).split()[0]}" in shown
    listed = shown[shown.index(" path MB for ") :]
    places = [listed.index(f" {name} ") for name in sorted(files, key=lambda name: -files[name]["bytes"])]
    assert places == sorted(places)


def test_files_of_an_unknown_back_end_are_called_so():
    assert purpose("npu/weights.bin") == "npu: a back end's own"
    assert purpose("tensorrt/verifier-float16-fused.onnx.data") == "TensorRT: INT8 weights in tiles"
