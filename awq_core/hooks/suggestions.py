"""Which plugin to install for a model nobody here claims. The one place of the core that names architectures.

The table only fills an error message. It never chooses scale groups, and a model type that is missing from it costs
the user a hint, nothing else. Add a line when a plugin is published, or when it claims a new model type.
"""

from __future__ import annotations

PREFIX = "awq-plugin-"

FAMILIES: dict[str, tuple[str, ...]] = {
    "baichuan": ("baichuan", "baichuan_m1"),
    "bloom": ("bloom",),
    "cohere": ("cohere", "cohere2", "cohere2_moe", "cohere2_vision", "aya_vision"),
    "deepseek": (
        "deepseek",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "deepseek_v4",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "deepseek_vl_v2",
    ),
    "ernie": ("ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe"),
    "exaone": ("exaone", "exaone4", "exaone4_5", "exaone_moe"),
    "falcon": ("falcon", "RefinedWeb", "RefinedWebModel", "falcon_h1", "falcon_mamba"),
    "gemma": ("gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "recurrent_gemma", "vaultgemma"),
    "glm": (
        "chatglm",
        "glm",
        "glm4",
        "glm46v",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v",
        "glm4v_moe",
        "glm_moe_dsa",
        "glm_ocr",
    ),
    "gpt": (
        "codegen",
        "gpt-sw3",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gpt_neox_japanese",
        "gpt_oss",
        "gptj",
        "starcoder2",
    ),
    "granite": ("granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "granite_swa", "granitemoe_swa"),
    "hunyuan": ("hunyuan", "hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl", "hy_v3", "hy_v4"),
    "idefics": ("idefics2", "idefics3", "smolvlm"),
    "internlm": ("internlm", "internlm2", "internlm3", "internvl", "internvl_chat"),
    "jamba": ("bamba", "jamba"),
    "llama": ("Yi", "aquila", "llama", "llama4", "mllama", "smollm3"),
    "llava": ("llava", "llava_next", "llava_next_video", "llava_onevision", "video_llava", "vipllava"),
    "minicpm": ("minicpm", "minicpm3", "minicpm_ocr", "minicpmo", "minicpmv", "minicpmv4_6", "minicpmv4_7"),
    "mistral": ("ministral", "ministral3", "mistral", "mistral3", "mistral4", "mistral_large4", "mixtral", "pixtral"),
    "mpt": ("mpt",),
    "nemotron": ("nemotron", "nemotron-nas", "nemotron_h", "nemotron_h_omni"),
    "olmo": ("flex_olmo", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe"),
    "opt": ("opt",),
    "paligemma": ("paligemma",),
    "phi": ("phi", "phi-msft", "phi3", "phi3_v", "phi4_multimodal", "phimoe"),
    "qwen": (
        "qwen",
        "qwen2",
        "qwen2_5_omni",
        "qwen2_5_omni_thinker",
        "qwen2_5_vl",
        "qwen2_audio",
        "qwen2_moe",
        "qwen2_vl",
        "qwen3",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_omni_moe",
        "qwen3_omni_moe_thinker",
        "qwen3_vl",
        "qwen3_vl_moe",
    ),
    "stablelm": ("stablelm", "stablelm_epoch"),
}

MODEL_TYPES: dict[str, str] = {kind: PREFIX + family for family, kinds in FAMILIES.items() for kind in kinds}


def suggest(model_type: str) -> str | None:
    """The distribution that supports `model_type` ("awq-plugin-falcon"), as far as this release knows. The text half
    of a vision-language model ("gemma3_text") is supported by the family's plugin too."""
    return MODEL_TYPES.get(model_type) or MODEL_TYPES.get(model_type.removesuffix("_text"))
